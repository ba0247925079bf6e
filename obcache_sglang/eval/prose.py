"""Long English prose that needs no network.

RULER hides its needles in Paul Graham's essays, which cannot be shipped. Instead: Newton's Opticks (1730; 140,000 tokens or so),
which lies inside apache-tvm-ffi, a package that SGLang needs, and after it Python's own language reference
(`pydoc_data.topics`, as long again). Opticks comes first because it is the same everywhere; the reference differs from one Python
release to the next.
"""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

from obcache_sglang.errors import ConfigError

_OPTICKS = Path("3rdparty", "libbacktrace", "Isaac.Newton-Opticks.txt")
_OPTICKS_BEGINS = "My Design in this Book"


@cache
def opticks() -> str:
    """The text of Newton's Opticks from its first sentence: paragraphs of one line each, an empty line between them.

    Raises ConfigError where apache-tvm-ffi is not installed, or came without it.
    """
    spec = importlib.util.find_spec("tvm_ffi")
    path = Path(spec.origin).parent / _OPTICKS if spec is not None and spec.origin is not None else _OPTICKS
    if not path.is_file():
        raise ConfigError(f"the prose of generated tasks is not at {path}: reinstall SGLang's dependency apache-tvm-ffi.")
    text = path.read_text(encoding="utf-8")
    return _paragraphs(text[text.index(_OPTICKS_BEGINS) :])


@cache
def topics() -> str:
    """Python's language reference as `help()` shows it, laid out like :func:`opticks`."""
    from pydoc_data.topics import topics as texts

    return _paragraphs("\n\n".join(texts[name] for name in sorted(texts)))


@cache
def words() -> tuple[str, ...]:
    """All words of :func:`opticks`, then those of :func:`topics`, as they stand between blanks."""
    return (*opticks().split(), *topics().split())


@cache
def vocabulary() -> tuple[str, ...]:
    """The different lower-case words of four to twelve letters in :func:`opticks`, in alphabetical order."""
    return tuple(sorted(set(re.findall(r"\b[a-z]{4,12}\b", opticks()))))


def sentences(text: str) -> list[str]:
    """`text` cut where a sentence ends; joined with blanks, the pieces are the text again, with single blanks."""
    return re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(text.split()))


def _paragraphs(text: str) -> str:
    """Without the marks of pictures and italics, lines joined within paragraphs."""
    text = re.sub(r"\[Illustration[^]]*\]|_", "", text)
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
