"""What the model re-reads when a context is scored by replay (KVzip, arXiv 2505.23416; prompts as in KVPress's KVzipPress).

A pass is an ordinary prefill after the context's exact KV: a prompt that asks for the context again, the chat template's words
before an answer, and a chunk of the context as that answer. Its queries, which look for what they repeat, score the context.
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


@dataclass(frozen=True)
class ReplayPass:
    """tokens: what the model reads after the context; first, last: the context's tokens first ... last - 1 that it repeats."""

    tokens: array[int]
    first: int
    last: int


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

    def passes(self, context: array[int], chunk_tokens: int) -> list[ReplayPass]:
        """The passes that re-read a context, `chunk_tokens` at a time. Template words before the context are not re-read."""
        start = len(self.before) if context[: len(self.before)] == self.before else 0
        passes: list[ReplayPass] = []
        for first in range(start, len(context), chunk_tokens):
            last = min(first + chunk_tokens, len(context))
            prompt = self.first if first == start else self.later + context[max(start, first - _NUM_LEAD_TOKENS) : first]
            passes.append(ReplayPass(prompt + self.after + context[first:last], first, last))
        return passes
