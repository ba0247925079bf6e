"""Helpers for SGLang's frontend language."""

from __future__ import annotations

from obcache_sglang.settings import ServerSettings

MARKER = ServerSettings.marker
"""The default marker; a server started with `--obcache-marker` has its own."""


def context(text: str, *, marker: str = MARKER) -> str:
    """`text` as a context: what comes before and within it is compressed once, what follows is asked about it.

        @sgl.function
        def ask(s, document, question):
            s += obcache_sglang.lang.context(document)
            s += "Question: " + question + "\\nAnswer:" + sgl.gen("answer", max_tokens=32)

        ask.run_batch([{"document": document, "question": q} for q in questions])

    The same holds after `s.fork(n)`. A program holds one context, and its marker stands in every prompt the program sends.
    Raises ValueError where `text` holds the marker already.
    """
    if marker in text:
        raise ValueError(f"The text already contains the marker {marker!r}. A prompt has one context: remove the marker.")
    return text + marker
