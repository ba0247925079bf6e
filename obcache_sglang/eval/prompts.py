"""Token ids of contexts and questions, as the served model reads them, and how a prompt that is too long is cut."""

from __future__ import annotations

from typing import Any

from obcache_sglang.eval.samples import Question, Sample

Prompt = tuple[list[int], list[int]]
"""Token ids of a context, and of all after it."""

_SEPARATOR = "<|obcache-eval-context-ends-here|>"

_CUTS = 4
"""Attempts to cut a context short enough: text that was cut and joined may have some tokens more."""


class Prompts:
    """Makes prompts.

    tokenizer: of transformers. With a chat template, context and question stand in the user's turn, and the answer's prefix begins
    the assistant's; without one, and in plain samples, they follow each other.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def split(self, sample: Sample) -> list[Prompt]:
        """The prompt of each question of a sample."""
        return [self._of(sample, sample.context, question) for question in sample.questions]

    def fitted(self, sample: Sample, limit: int) -> tuple[list[Prompt], int]:
        """The prompt of each question, none of them longer than `limit` tokens with its answer; and how many were cut.

        Contexts lose their middle, where the sample allows it: of the prompt as plain text, the first and the last half of what fits
        stay (LongBench's rule). Raises TooLong.
        """
        prompts, cut = [], 0
        for question in sample.questions:
            room = limit - question.max_new_tokens
            prompt = self._of(sample, sample.context, question)
            if _length(prompt) > room:
                prompt = self._cut(sample, question, room)
                cut += 1
            prompts.append(prompt)
        return prompts, cut

    def _cut(self, sample: Sample, question: Question, room: int) -> Prompt:
        prompt = self._of(sample, sample.context, question)
        too_long = TooLong(
            f"a prompt of {_length(prompt)} tokens and an answer of up to {question.max_new_tokens} do not fit the model's {room} tokens for prompts"
        )
        if not sample.cut_middle:
            raise too_long
        asked = question.text if self._in_chat(sample) else question.text + question.answer_prefix
        whole, after = self._encode(sample.context + asked, special=False), len(self._encode(asked, special=False))
        kept = room - (_length(prompt) - len(whole))
        for _ in range(_CUTS):
            half = kept // 2
            if half <= after:
                break
            parts = (whole[:half], whole[len(whole) - half : len(whole) - after])
            context = "".join(self.tokenizer.decode(part, skip_special_tokens=True) for part in parts)
            prompt = self._of(sample, context, question)
            if _length(prompt) <= room:
                return prompt
            kept -= _length(prompt) - room
        raise too_long

    def _of(self, sample: Sample, context: str, question: Question) -> Prompt:
        return self.ask(context, question) if self._in_chat(sample) else self.continuation(context, question)

    def _in_chat(self, sample: Sample) -> bool:
        return bool(self.tokenizer.chat_template) and not sample.plain and sample.metric != "nll"

    def ask(self, context: str, question: Question) -> Prompt:
        """Ids of the context, with what the template puts before it, and of all after it."""
        text = f"{context}{_SEPARATOR}{question.text}"
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False, enable_thinking=False
            )
            text += question.answer_prefix
            before, after = text.split(_SEPARATOR)
            return self._encode(before, special=False), self._encode(after, special=False)
        return self.continuation(context, question)

    def continuation(self, context: str, question: Question) -> Prompt:
        """Ids of plain text, and of what follows it."""
        return self._encode(context, special=True), self._encode(question.text + question.answer_prefix, special=False)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=special))


class TooLong(Exception):
    """A prompt does not fit the model, and may not be cut, or not so far."""


def _length(prompt: Prompt) -> int:
    return len(prompt[0]) + len(prompt[1])
