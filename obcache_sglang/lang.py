"""Helpers for SGLang's frontend language."""

from __future__ import annotations

from typing import Any

from obcache_sglang.frontend.marker_options import contains, with_options
from obcache_sglang.settings import ServerSettings

MARKER = ServerSettings.marker
"""The default marker; a server started with `--obcache-marker` has its own."""


def context(text: str, *, marker: str = MARKER, **options: Any) -> str:
    """`text` as a context: everything up to its end is compressed once, and what follows is asked about it.

        @sgl.function
        def ask(s, document, question):
            s += obcache_sglang.lang.context(document)
            s += "Question: " + question + "\\nAnswer:" + sgl.gen("answer", max_tokens=32)

        ask.run_batch([{"document": document, "question": q} for q in questions])

    The same holds after `s.fork(n)`. A program has one context, and every prompt that the program sends contains its marker.
    options: what the marker says beside that, such as `compression_ratio=0.5, pin=True`: this language passes no `custom_params` on.
    Raises ValueError if `text` already contains the marker, or if the marker takes no options.
    """
    if contains(text, marker):
        raise ValueError(f"The text already contains the marker {marker!r}. A prompt has one context: remove the marker.")
    return text + with_options(marker, options)
