"""The marker that ends a context: a special token of the tokenizer that no model ever sees."""

from __future__ import annotations

from typing import Any

from obcache_sglang.errors import HostError

# Both sides are tried with letters, blanks and line breaks next to the cut, where tokenizers merge or add blanks.
_LEFT = ("A context ends here.", "line\n\n", "tail ")
_RIGHT = ("What follows?", "\n\nQuestion: what?", " and so on")


def register_marker(tokenizer: Any, marker: str) -> int:
    """Makes `marker` a special token of `tokenizer` and returns its id. Raises HostError where it does not cut text cleanly.

    tokenizer: a Hugging Face tokenizer; changed in place. Registering the same marker again gives the same id.
    The id may lie within the model's (padded) vocabulary, so it has to be taken out of every prompt.
    """
    from transformers import AddedToken

    token = AddedToken(marker, special=True, normalized=False, lstrip=False, rstrip=False, single_word=False)
    tokenizer.add_tokens([token], special_tokens=True)
    marker_id = tokenizer.convert_tokens_to_ids(marker)
    problem = _cut_problem(tokenizer, marker, marker_id)
    if problem is not None:
        raise HostError(
            f"--obcache-marker={marker!r} cannot be used with the tokenizer {type(tokenizer).__name__}: {problem}. "
            "Choose another marker, or send token ids with context_len and start with --skip-tokenizer-init."
        )
    return int(marker_id)


def _cut_problem(tokenizer: Any, marker: str, marker_id: int | None) -> str | None:
    """Why text does not split at the marker into the same two halves whatever is on the other side; None if it does."""
    if marker_id is None or marker_id == tokenizer.unk_token_id:
        return "it did not become a token"
    halves: dict[str, set[tuple[int, ...]]] = {text: set() for text in (*_LEFT, *_RIGHT)}
    for left in _LEFT:
        for right in _RIGHT:
            token_ids = list(tokenizer(left + marker + right)["input_ids"])
            if token_ids.count(marker_id) != 1:
                return f"a text that holds it once becomes {token_ids.count(marker_id)} marker tokens"
            cut = token_ids.index(marker_id)
            halves[left].add(tuple(token_ids[:cut]))
            halves[right].add(tuple(token_ids[cut + 1 :]))
    for text, seen in halves.items():
        if len(seen) != 1:
            return f"the text {text!r} becomes different tokens beside it, depending on what is on the other side"
    return None
