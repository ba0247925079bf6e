"""The marker that ends a context: a special token of the tokenizer that no model ever sees."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, takewhile
from typing import Any

from obcache_sglang.errors import HostError, RequestError
from obcache_sglang.frontend.marker_options import contains, head_of, is_marker_before, read_options, together

# Both sides are tried with letters, spaces and line breaks next to the cut, where tokenizers merge or add spaces.
_LEFT = ("A context ends here.", "line\n\n", "tail ")
_RIGHT = ("What follows?", "\n\nQuestion: what?", " and so on")

# The marker's text begins and ends within this many tokens of its middle.
_NEIGHBOURS = 8

# Enough tokens after a marker's head to see whether it is a marker.
_PEEKED = 16

_SYSTEM_TEXT = "You answer questions."


@dataclass(frozen=True)
class Marker:
    """The marker of a server, in the forms in which prompts contain it.

    token_id: its special token; None on a server without compression.
    head: what it begins with if it has options; None for a marker that takes none.
    head_id: the head's special token; None without one. Nothing before the head is merged with it, and what follows can be read back.
    lead: what the tokenizer puts before any text (begin-of-text).
    plain: its text as ordinary tokens, as clients send it that tokenize prompts themselves.
    plain_head: the head as ordinary tokens.
    added: the tokenizer's added tokens that end a text, the marker's and the head's among them.
    middles: the parts of `plain` and of `plain_head` that do not depend on the text next to them.
    """

    text: str
    tokenizer: Any
    token_id: int | None
    head: str | None
    head_id: int | None
    lead: array[int]
    plain: array[int]
    plain_head: array[int]
    added: frozenset[int]
    middles: tuple[array[int], ...]
    _openings_of: dict[str, tuple[tuple[str, ...], int]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def register(cls, tokenizer: Any, text: str) -> Marker:
        """Makes `text` a special token of `tokenizer`, in place. Raises HostError if it does not cut text cleanly."""
        head = head_of(text)
        plain, plain_head = _plain(tokenizer, text), _plain(tokenizer, head or "")
        token_id = register_marker(tokenizer, text)
        head_id = None if head is None else register_marker(tokenizer, head)
        with_lead = list(tokenizer(text)["input_ids"])
        lead = array("q", with_lead[: with_lead.index(token_id)])
        middles = _middles(tokenizer, plain, plain_head)
        added = _added(tokenizer, plain, plain_head)
        return cls(text, tokenizer, token_id, head, head_id, lead, plain, plain_head, added, middles)

    @classmethod
    def unregistered(cls, tokenizer: Any, text: str) -> Marker:
        """The marker on a server without compression, where it is ordinary text."""
        head = head_of(text)
        plain, plain_head = _plain(tokenizer, text), _plain(tokenizer, head or "")
        added, middles = _added(tokenizer, plain, plain_head), _middles(tokenizer, plain, plain_head)
        return cls(text, tokenizer, None, head, None, array("q"), plain, plain_head, added, middles)

    def stands_first(self, before: Sequence[int]) -> bool:
        """Whether the marker begins its prompt, its system message, or its first user's turn: no document is in front of it.

        After earlier turns it may stand first: they are the context. before: the tokens in front of the marker.
        """
        ids = list(before)
        if not ids or ids == list(self.lead):
            return True
        # As text: what stands beside the template's words may be one token with them.
        openings, num_tokens = self._openings()
        end = self._decoded(ids[-num_tokens:]).rstrip()
        for opening in openings:
            if end.endswith(opening) and self._decoded(ids).count(opening) == 1:
                return True
        if len(ids) > num_tokens:
            return False
        # Rendered anew, since some templates write the day's date there.
        start = _before_system_text(self.tokenizer, self.text)
        return bool(start) and "".join(self._decoded(ids).split()) == "".join(start.split())

    def _openings(self) -> tuple[tuple[str, ...], int]:
        """(the chat template's words before a user's text, between turns and after a system message; none if it does not mark turns, at least as
        many tokens as each of them has, and as the template puts before a system message's text).

        Of the template that is in use: SGLang sets `--chat-template` after the tokenizer is made.
        """
        template = str(getattr(self.tokenizer, "chat_template", None))
        if template not in self._openings_of:
            openings = _openings(self.tokenizer, self.text)
            words = (*openings, _before_system_text(self.tokenizer, self.text))
            length = max(len(self.tokenizer(each, add_special_tokens=False)["input_ids"]) for each in words) + _NEIGHBOURS
            self._openings_of[template] = openings, length
        return self._openings_of[template]

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def is_special_in(self, token_ids: Sequence[int]) -> bool:
        """Whether the tokens have a special one of the marker's, which no model may see."""
        return self.token_id in token_ids or self.head_id in token_ids

    def is_plain_in(self, token_ids: Sequence[int]) -> bool:
        """Whether ordinary tokens contain the marker's text, in either form, merged with the text next to it or not."""
        # The special token is not ordinary: beside it, a document may say "obcache". A template's tokens end a text.
        ids = array("q", token_ids)
        return any(
            contains(self._decoded(list(ordinary)), self.text)
            for middle in self.middles
            for part in _suspects(ids, middle)
            for is_added, ordinary in groupby(part, self.added.__contains__)
            if not is_added
        )

    def read(self, token_ids: Sequence[int]) -> tuple[Sequence[int], dict[str, Any]]:
        """(token_ids with the marker's special token in place of its other forms, its options); the same object if there are none.

        Raises RequestError for options that cannot be read, and for a marker of ordinary tokens where no cut would be clean.
        """
        if self.token_id is None:
            return token_ids, {}
        said: list[dict[str, Any]] = []
        if self.head_id in token_ids:
            token_ids, said = self._without_options(token_ids)
        token_ids = self._normalized(token_ids)
        return token_ids, together(said, token_ids.count(self.token_id)) if said else {}

    def _without_options(self, token_ids: Sequence[int]) -> tuple[list[int], list[dict[str, Any]]]:
        """As `read`, for markers that were tokenized with their options, each with its own."""
        assert self.token_id is not None and self.head is not None
        ids: list[int] = []
        options: list[dict[str, Any]] = []
        done = 0
        for place, token in enumerate(token_ids):
            if token != self.head_id:
                continue
            ids += token_ids[done:place]
            done = place + 1
            end = next((later for later in range(done, len(token_ids)) if token_ids[later] in self.added), len(token_ids))
            if not is_marker_before(self._decoded(list(token_ids[done : min(end, done + _PEEKED)]))):
                ids += self.plain_head
                continue
            said, rest = read_options(self._text_after_head(list(token_ids[done:end])))
            options.append(said)
            ids += [self.token_id, *self._tokens_after(self.text, self.token_id, rest)]
            done = end
        return [*ids, *token_ids[done:]], options

    def _text_after_head(self, after: list[int]) -> str:
        """The text that became these tokens after a head. Raises RequestError if there is none."""
        assert self.head is not None and self.head_id is not None
        # Some tokenizers write a blank at the start of a text, and leave it out when they decode one.
        beside = self._decoded([self.head_id, *after]).removeprefix(self.head)
        for text in (beside, self._decoded(after)):
            if self._tokens_after(self.head, self.head_id, text) == after:
                return text
        raise RequestError(
            "The options of the context marker cannot be read from the tokens of the prompt. Send text, or the plain marker with its "
            "options in custom_params."
        )

    def _tokens_after(self, special: str, special_id: int, text: str) -> list[int]:
        """The tokens of a text that follows a special token."""
        ids = list(self.tokenizer(special + text, add_special_tokens=False)["input_ids"])
        return ids[ids.index(special_id) + 1 :]

    def _normalized(self, token_ids: Sequence[int]) -> Sequence[int]:
        if self.token_id is None or not self.is_plain_in(token_ids):
            return token_ids
        ids, replaced, last = array("q", token_ids), array("q"), 0
        for place in _places(ids, self.plain):
            replaced += ids[last:place]
            replaced.append(self.token_id)
            last = place + len(self.plain)
        replaced += ids[last:]
        if self.is_plain_in(replaced):
            raise RequestError(
                "The prompt contains the context marker as ordinary tokens, with options or merged with the text next to it. Send text, or "
                f"put the token {self.token_id} where the context ends, and options into custom_params."
            )
        return list(replaced)


def _suspects(ids: array[int], middle: array[int]) -> Iterator[array[int]]:
    """The parts of a prompt that may contain the text whose middle this is. No token is in two parts."""
    start = end = 0
    for place in _places(ids, middle):
        if place - _NEIGHBOURS > end:
            yield ids[start:end]
            start = place - _NEIGHBOURS
        end = place + len(middle) + _NEIGHBOURS
    yield ids[max(0, start) : end]


def _plain(tokenizer: Any, text: str) -> array[int]:
    # Once the marker is registered, only splitting special tokens gives its ordinary tokens.
    more = {"split_special_tokens": True} if text in tokenizer.get_added_vocab() else {}
    return array("q", tokenizer(text, add_special_tokens=False, **more)["input_ids"])


def _openings(tokenizer: Any, text: str) -> tuple[str, ...]:
    """What the chat template writes before the first user's text, without blanks around it: as in later turns, and after a system message."""
    question, answer = {"role": "user", "content": text}, {"role": "assistant", "content": "B"}
    first = _rendered_before(tokenizer, text, [question])
    later = _rendered_before(tokenizer, text, [{**question, "content": "A"}, answer, question])
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(reversed(first), reversed(later), strict=False)))
    turn = first[len(first) - shared :].strip()
    told = _rendered_before(tokenizer, text, [{"role": "system", "content": _SYSTEM_TEXT}, question])
    after_system = told.rpartition(_SYSTEM_TEXT)[2].strip() if _SYSTEM_TEXT in told else ""
    # Where each turn is marked alike, the words after a system message are those after an answer too.
    return tuple(each for each in (turn, "" if turn and turn in after_system else after_system) if each)


def _before_system_text(tokenizer: Any, text: str) -> str:
    """What the chat template writes before the text of a system message; empty where it takes none."""
    return _rendered_before(tokenizer, text, [{"role": "system", "content": text}, {"role": "user", "content": "A"}])


def _rendered_before(tokenizer: Any, text: str, messages: list[dict[str, str]]) -> str:
    """What the chat template writes before `text`, which is one of the messages; empty where it cannot."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    try:
        before, found, _ = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).partition(text)
    except Exception:  # whatever a model's template makes of such messages
        return ""
    return str(before) if found else ""


def _added(tokenizer: Any, *plain: array[int]) -> frozenset[int]:
    """The tokenizer's added tokens, but blanks (some have tokens for many) and those that are in the marker's own text."""
    words = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if str(token).strip())
    return frozenset(words).difference(*plain)


def _middles(tokenizer: Any, *plain: array[int]) -> tuple[array[int], ...]:
    """The middle of each text that is given as ordinary tokens, once where they are the same."""
    found: list[array[int]] = []
    for each in plain:
        middle = _middle(tokenizer, each)
        if middle and middle not in found:
            found.append(middle)
    return tuple(found)


def _middle(tokenizer: Any, plain: array[int]) -> array[int]:
    """The longest run of tokens of letters and digits, since no text next to the marker is merged with it.

    If there is no such run: all tokens but the first and the last.
    """
    letters = [tokenizer.decode([token]).strip().isalnum() for token in plain]
    best = range(0)
    start = 0
    for place, is_word in enumerate([*letters, False]):
        if not is_word:
            best = max(best, range(start, place), key=len)
            start = place + 1
    if not best:
        best = range(1, len(plain) - 1) if len(plain) > 2 else range(len(plain))
    return plain[best.start : best.stop]


def _places(ids: array[int], wanted: array[int]) -> Iterator[int]:
    """Where `wanted` occurs in `ids`, without overlaps."""
    haystack, needle, place = ids.tobytes(), wanted.tobytes(), 0
    while needle and (place := haystack.find(needle, place)) >= 0:
        if place % ids.itemsize:
            place += 1
        else:
            yield place // ids.itemsize
            place += len(needle)


def register_marker(tokenizer: Any, marker: str) -> int:
    """Makes `marker` a special token of `tokenizer` and returns its id. Raises HostError if it does not cut text cleanly.

    tokenizer: a Hugging Face tokenizer; changed in place. Registering the same marker again gives the same id.
    The id may lie inside the model's padded vocabulary, so it must be taken out of every prompt.
    """
    from transformers import AddedToken

    token = AddedToken(marker, special=True, normalized=False, lstrip=False, rstrip=False, single_word=False)
    tokenizer.add_tokens([token], special_tokens=True)
    marker_id = tokenizer.convert_tokens_to_ids(marker)
    problem = _cut_problem(tokenizer, marker, marker_id)
    if problem is not None:
        raise HostError(
            f"--obcache-marker={marker!r} cannot be used with the tokenizer {type(tokenizer).__name__}: {problem}. "
            "Choose another marker, or start with --skip-tokenizer-init and send token ids with context_len."
        )
    return int(marker_id)


def _cut_problem(tokenizer: Any, marker: str, marker_id: int | None) -> str | None:
    """Why the tokens on one side of the marker depend on the text on the other side; None if they do not."""
    if marker_id is None or marker_id == tokenizer.unk_token_id:
        return "the tokenizer did not make it a token"
    halves: dict[str, set[tuple[int, ...]]] = {text: set() for text in (*_LEFT, *_RIGHT)}
    for left in _LEFT:
        for right in _RIGHT:
            token_ids = list(tokenizer(left + marker + right)["input_ids"])
            if token_ids.count(marker_id) != 1:
                return f"a text that contains it once becomes {token_ids.count(marker_id)} marker tokens"
            cut = token_ids.index(marker_id)
            halves[left].add(tuple(token_ids[:cut]))
            halves[right].add(tuple(token_ids[cut + 1 :]))
    for text, seen in halves.items():
        if len(seen) != 1:
            return f"the text {text!r} next to it becomes different tokens, depending on the text on the other side"
    return None
