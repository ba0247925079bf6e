"""Checks of values that SGLang would pass on from a request, but that must not reach its scheduler."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from obcache_sglang.errors import RequestError, shown


def check_ids(token_ids: Sequence[int], vocab_size: int | None) -> None:
    """Raises RequestError for anything that is not a token id of the model: clients must not send the virtual ids of contexts.

    token_ids: as a client sent them, so it may be anything. vocab_size: None to check only that they are whole numbers.
    """
    if not isinstance(token_ids, Sequence) or isinstance(token_ids, str | bytes):
        raise RequestError(f"{shown(token_ids)} is not a list of token ids.")
    try:
        ids = np.frombuffer(array("q", token_ids), dtype=np.int64)
    except (TypeError, OverflowError):
        wrong = next(i for i in token_ids if not isinstance(i, int) or not -(1 << 63) <= i < 1 << 63)
        raise RequestError(f"{shown(wrong)} in the prompt is not a token id: give whole numbers.") from None
    if vocab_size is None or len(ids) == 0:
        return
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise RequestError(f"Token id {outside[0]} is outside [0, {vocab_size}), the model's vocabulary.")


def check_texts(request: Any) -> None:
    """Raises RequestError for texts that are not valid Unicode: half of a surrogate pair cannot be encoded for the scheduler."""
    for name in ("rid", "cache_salt", "extra_key", "session_id"):
        value = getattr(request, name, None)
        if isinstance(value, str):
            check_unicode(name, value)


_SCALARS: dict[str, tuple[type, ...]] = {
    "lora_id": (str,),
    "lora_path": (str,),
    "return_logprob": (bool,),
    "logprob_start_len": (int,),
    "top_logprobs_num": (int,),
}
"""What one request may have. SGLang allows lists of these for a batch, and takes them for one prompt too; its scheduler ends on some."""


def check_scalars(request: Any) -> None:
    """Raises RequestError for a request of one prompt that has a list where one value is meant."""
    for name, allowed in _SCALARS.items():
        value = getattr(request, name, None)
        if value is not None and not isinstance(value, allowed):
            raise RequestError(f"{name}={shown(value)} is not allowed: one prompt has one {allowed[0].__name__}.")


_MAX_FLOAT32 = float(np.finfo(np.float32).max)

MAX_CHOICES = 4096
"""Answers to one prompt that a request may ask for (`n`). SGLang makes a request of each before anything is checked."""


def check_choices(sampling_params: Any) -> None:
    """Raises RequestError for more than `MAX_CHOICES` answers to a prompt: the tokenizer process would make requests until it has no memory.

    sampling_params: a request's, of one prompt or a list of them, as a client sent them.
    """
    for params in sampling_params if isinstance(sampling_params, list) else [sampling_params]:
        choices = params.get("n") if isinstance(params, dict) else None
        if isinstance(choices, int) and choices > MAX_CHOICES:
            raise RequestError(
                f"n={shown(choices)} is more than {MAX_CHOICES}, the most answers to one prompt. Send more requests."
            )


def check_sampling(request: Any, vocab_size: int) -> None:
    """Raises RequestError for what SGLang passes on to its scheduler as it is, and what would end the scheduler there.

    request: a GenerateReqInput of one prompt.
    """
    params = request.sampling_params if isinstance(request.sampling_params, dict) else {}
    biases = params.get("logit_bias")
    for bias in biases.values() if isinstance(biases, dict) else ():
        # An infinite one arrives there as None.
        if not isinstance(bias, int | float) or not abs(bias) <= _MAX_FLOAT32:
            raise RequestError(f"logit_bias has the value {shown(bias)}: give a finite number for each token id.")
    least, stops = params.get("min_new_tokens"), params.get("stop_token_ids")
    if isinstance(least, int) and least > 0 and isinstance(stops, list | tuple | set):
        for token in stops:
            if isinstance(token, int) and not 0 <= token < vocab_size:
                raise RequestError(
                    f"stop_token_ids has {token}, which is outside [0, {vocab_size}), the model's vocabulary. With min_new_tokens it must be inside."
                )
    most, start = request.top_logprobs_num, request.logprob_start_len
    if isinstance(most, int) and most > vocab_size:
        raise RequestError(f"top_logprobs_num={most} is more than {vocab_size}, the tokens of the model's vocabulary.")
    if isinstance(start, int) and start < -1:
        raise RequestError(
            f"logprob_start_len={start} is below -1: give -1 for none of the prompt, or the position of its first token."
        )


def check_embeddings(request: Any) -> None:
    """Raises RequestError for embeddings that came as JSON: they are not tensors, and would end SGLang's scheduler."""
    value = getattr(request, "positional_embed_overrides", None)
    if isinstance(value, str | int | float | list | dict):
        raise RequestError(
            f"positional_embed_overrides={shown(value)} is not a tensor. Pass tensors, from Python: JSON cannot carry them."
        )


def check_keys(body: Mapping[str, Any], allowed: Sequence[str], where: str = "") -> None:
    """Raises RequestError, with the first of them, for keys of a body that mean nothing. where: " in the body of ...", for the message."""
    unknown = [key for key in body if key not in allowed]
    if unknown:
        raise RequestError(f"Unknown keys{where}: {', '.join(map(shown, unknown[:5]))}. Allowed keys: {', '.join(allowed)}.")


def check_unicode(name: str, text: str) -> None:
    """Raises RequestError if a text has half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} is not valid Unicode: it has half of a surrogate pair at position {error.start}. Remove it."
        ) from error


def exact_reason(request: Any) -> str | None:
    """Why a request cannot use a compressed context: it would read tokens that the context no longer has."""
    params = request.sampling_params or {}
    if request.session_params:
        return "session"
    if request.custom_logit_processor:
        return "custom_logit_processor"
    if request.watermark is not None or params.get("watermark") is not None:
        return "watermark"
    beam_width = params.get("beam_width")
    if isinstance(beam_width, int | float) and beam_width > 1:  # SGLang refuses other values
        return "beam_search"
    if request.positional_embed_overrides is not None:
        return "embedding_overrides"
    if request.multi_item_delimiter_indices is not None or request.token_indices_to_pool is not None:
        return "multi_item_scoring"
    if request.return_routed_experts or request.return_indexer_topk:
        return "routed_experts"
    return None
