"""What the model re-reads when a context is scored by replay (KVzip, arXiv 2505.23416; prompts as in KVPress's KVzipPress).

A pass is an ordinary prefill after the context's exact KV: a prompt that asks for the context again, the chat template's words
before an answer, and a chunk of the context as that answer. Its queries, which look for what they repeat, score the context.

A *local* pass sees only the context's first tokens, its own chunk and some tokens before that, and scores its chunk. So passes cost as
much for each token of a long context as for each of a short one, where passes that see all of it cost the more the longer it is.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

_FIRST_PROMPT = "\n\nRepeat the previous context exactly."
_LATER_PROMPT = "\n\nRepeat the part of the previous context exactly, starting with"
_NUM_LEAD_TOKENS = 8
"""Last tokens of the chunk before, with which a later prompt says where to start."""
_SEPARATOR = "\n#############"

_LOCAL_SINKS = 8
"""First tokens of the context that a local pass sees: whatever heads attend to that look for nothing."""

_LOCAL_MARGIN = 64
"""Tokens before its chunk that a local pass sees: a chunk begins in the middle of a sentence."""


@dataclass(frozen=True)
class ReplayPass:
    """tokens: what the model reads after the context; first, last: the context's tokens first ... last - 1 that it repeats.

    is_local: whether it sees only these tokens, some before them, and the context's first. Then it stands right after them in the KV pool.
    """

    tokens: array[int]
    first: int
    last: int
    is_local: bool = False

    @property
    def first_seen(self) -> int:
        """The context's tokens from here to the last one before it are seen by all of its queries; before it, a local pass sees sinks alone."""
        return max(0, self.first - _LOCAL_MARGIN) if self.is_local else 0

    @property
    def num_sinks(self) -> int:
        """Tokens before `first_seen` that its queries see: the context's first."""
        return min(_LOCAL_SINKS, self.first_seen)

    def num_before(self, num_tokens: int) -> int:
        """Tokens of a context of num_tokens that it stands after in the KV pool."""
        return self.last if self.is_local else num_tokens


class ReplayPrompts:
    """The words around a replayed chunk, as tokens of one model."""

    def __init__(self, tokenizer: Any) -> None:
        """tokenizer: of Hugging Face transformers; one without a chat template gets a line break for the template's words."""
        before, after = "", "\n"
        if getattr(tokenizer, "chat_template", None):
            turn = tokenizer.apply_chat_template(
                [{"role": "user", "content": "context" + _SEPARATOR}],
                add_generation_prompt=True,
                tokenize=False,
                enable_thinking=False,
            )
            before, after = turn.split("context" + _SEPARATOR)
        self.first, self.later, self.before, self.after = (
            array("q", tokenizer.encode(text, add_special_tokens=False)) for text in (_FIRST_PROMPT, _LATER_PROMPT, before, after)
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of a pass that are not its chunk, at most."""
        return len(self.later) + _NUM_LEAD_TOKENS + len(self.first) + len(self.after)

    def passes(self, context: array[int], chunk_tokens: int, *, local: bool = False, page_size: int = 1) -> list[ReplayPass]:
        """The passes that re-read a context (whole pages), `chunk_tokens` at a time. Template words before the context are not re-read.

        local: whether these are local passes. Then chunks end where pages of page_size tokens do, since only whole pages are cached.
        """
        page_size = page_size if local else 1
        start = len(self.before) if context[: len(self.before)] == self.before else 0
        passes: list[ReplayPass] = []
        first = start
        while first < len(context):
            page = first // page_size
            last = min(max((first + chunk_tokens) // page_size, page + 1) * page_size, len(context))
            prompt = self.first if first == start else self.later + context[max(start, first - _NUM_LEAD_TOKENS) : first]
            passes.append(ReplayPass(prompt + self.after + context[first:last], first, last, local))
            first = last
        return passes
