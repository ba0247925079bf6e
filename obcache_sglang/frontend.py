"""The tokenizer process: markers become boundaries, requests become plans, and reports find their way back.

The hooks sit where every prompt passes, whatever endpoint it came from: `_validate_one_request` (before SGLang checks
lengths) and `_create_tokenized_object` (what is sent to the scheduler). A TokenizerManager without a `Frontend` of its own
is served as if this package were not there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from obcache_sglang.config import ServerSettings
from obcache_sglang.control import expire_after
from obcache_sglang.errors import HostError, RequestError
from obcache_sglang.host import Touch
from obcache_sglang.marker import register_marker
from obcache_sglang.plan import PARAM, Action, make_plan, parse_wish, split_marker

_FRONTEND = "obcache_frontend"  # attribute of a TokenizerManager that serves with compression
ACTION = "obcache_action"  # attribute of a GenerateReqInput made by POST /obcache/compress
_PLAN = "obcache_plan"  # attribute of a GenerateReqInput that was sent with a plan

# A context lives from the last stamp a scheduler saw; its expiry is announced safely after that.
_EXPIRY_MARGIN_SECONDS = 0.2


@dataclass
class _Prepared:
    """A prompt between SGLang's length check and its dispatch, recognised by the list object SGLang passes to both."""

    given_ids: Sequence[int]
    sent_ids: Sequence[int]
    plan: dict[str, Any] | None


class Frontend:
    """Compression as one TokenizerManager sees it.

    settings: the server's. marker_id: token id of the marker, None where the server has no tokenizer.
    """

    def __init__(self, settings: ServerSettings, marker_id: int | None) -> None:
        self.settings = settings
        self.marker_id = marker_id
        self._prepared: _Prepared | None = None

    @staticmethod
    def of(tokenizer_manager: Any) -> Frontend | None:
        """The Frontend of a TokenizerManager, or None where it serves without compression."""
        return getattr(tokenizer_manager, _FRONTEND, None)

    def prepare(self, request: Any, token_ids: Sequence[int]) -> _Prepared:
        """Takes the marker out of `token_ids` and makes the request's plan. Raises RequestError.

        request: a GenerateReqInput of one prompt; not changed. token_ids: as tokenized or given by the client; not changed.
        """
        sent_ids, marker_position = split_marker(token_ids, self.marker_id)
        action: Action = getattr(request, ACTION, "ask")
        if action == "compress" and marker_position is not None:
            sent_ids, marker_position = sent_ids[:marker_position], None
        custom_params = request.sampling_params.get("custom_params")
        wish = parse_wish(custom_params.get(PARAM) if isinstance(custom_params, dict) else None)
        plan = make_plan(
            wish,
            num_tokens=len(sent_ids),
            marker_position=marker_position,
            server=self.settings,
            action=action,
            exact=_exact_reason(request),
        )
        if plan is not None:
            _check_logprobs(request, plan)
        return _Prepared(token_ids, sent_ids, plan)

    def hold(self, prepared: _Prepared) -> None:
        """Keeps a prepared prompt for `take`; SGLang awaits nothing in between."""
        self._prepared = prepared

    def take(self, request: Any, token_ids: Sequence[int]) -> _Prepared:
        """The prompt that `hold` kept for this list, prepared now if it did not come that way."""
        prepared, self._prepared = self._prepared, None
        if prepared is None or prepared.given_ids is not token_ids:
            prepared = self.prepare(request, token_ids)
        return prepared


def _exact_reason(request: Any) -> str | None:
    """Why a request cannot use a compressed context: what it does would read the tokens that are not there."""
    if request.session_params:
        return "session"
    if request.custom_logit_processor:
        return "custom_logit_processor"
    if request.watermark is not None or request.sampling_params.get("watermark") is not None:
        return "watermark"
    if (request.sampling_params.get("beam_width") or 1) > 1:
        return "beam_search"
    if request.positional_embed_overrides is not None:
        return "embedding_overrides"
    if request.multi_item_delimiter_indices is not None or request.token_indices_to_pool is not None:
        return "multi_item_scoring"
    return None


def _check_logprobs(request: Any, plan: dict[str, Any]) -> None:
    start = request.logprob_start_len
    if plan["exact"] is None and request.return_logprob and 0 <= start < plan["context_len"]:
        raise RequestError(
            f"logprob_start_len={start} lies inside the context of {plan['context_len']} tokens, whose log-probabilities are not "
            f'available: give {plan["context_len"]} or more, or -1 for none, or turn compression off (custom_params={{"{PARAM}": false}}).'
        )


# --- hooks ------------------------------------------------------------------------------------------------------------------


def _attach(result: None, tokenizer_manager: Any) -> None:
    """After TokenizerManager.init_tokenizer_and_processor: the marker becomes a token, and the manager gets its Frontend."""
    settings = ServerSettings.from_environment()
    if settings is None:
        return
    tokenizer = tokenizer_manager.tokenizer
    try:
        marker_id = None if tokenizer is None else register_marker(tokenizer, settings.marker)
    except HostError as error:
        raise SystemExit(f"HostError: {error}") from error
    setattr(tokenizer_manager, _FRONTEND, Frontend(settings, marker_id))


def _validate(original: Callable[..., None], tokenizer_manager: Any, obj: Any, input_ids: list[int] | None) -> None:
    """Around TokenizerManager._validate_one_request: SGLang checks (or truncates) the prompt that the model will read."""
    frontend = Frontend.of(tokenizer_manager)
    if frontend is None or not isinstance(obj, GenerateReqInput):
        original(tokenizer_manager, obj, input_ids)
        return
    if input_ids is None:
        _refuse_embeds(obj)
        original(tokenizer_manager, obj, input_ids)
        return
    prepared = frontend.prepare(obj, input_ids)
    original(tokenizer_manager, obj, prepared.sent_ids)
    if prepared.plan is not None:
        # SGLang may have truncated the prompt within its context.
        prepared.plan["context_len"] = min(prepared.plan["context_len"], len(prepared.sent_ids))
    frontend.hold(prepared)


def _create(
    original: Callable[..., Any],
    tokenizer_manager: Any,
    obj: Any,
    input_text: Any,
    input_ids: list[int] | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Around TokenizerManager._create_tokenized_object: what goes to the scheduler has no marker and carries the plan."""
    frontend = Frontend.of(tokenizer_manager)
    if frontend is None or input_ids is None or not isinstance(obj, GenerateReqInput):
        return original(tokenizer_manager, obj, input_text, input_ids, *args, **kwargs)
    prepared = frontend.take(obj, input_ids)
    tokenized = original(tokenizer_manager, obj, input_text, prepared.sent_ids, *args, **kwargs)
    if prepared.sent_ids is not input_ids:
        assert frontend.marker_id not in tokenized.input_ids, "a context marker would reach the model"
    params = tokenized.sampling_params
    if prepared.plan is not None:
        params.custom_params = {**(params.custom_params or {}), PARAM: prepared.plan}
        setattr(obj, _PLAN, prepared.plan)
    elif params.custom_params and PARAM in params.custom_params:
        params.custom_params = {key: value for key, value in params.custom_params.items() if key != PARAM} or None
    return tokenized


def _report(original: Callable[..., Any], tokenizer_manager: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    """Around TokenizerManager._wait_one_response: every output of a planned request carries its report, as one object."""
    stream = original(tokenizer_manager, obj, *args, **kwargs)
    plan = getattr(obj, _PLAN, None)
    if plan is None:
        return stream
    return _with_report(stream, tokenizer_manager, tokenizer_manager.rid_to_state[obj.rid], plan)


async def _with_report(stream: Any, tokenizer_manager: Any, state: Any, plan: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    # SGLang collects a request's extra information in lists, one entry per token or one per request, and repeats
    # them in some chunks of a stream only.
    async with aclosing(stream):
        async for output in stream:
            reports = state.customized_info_accumulated.get(PARAM)
            if reports:
                output["meta_info"][PARAM] = reports[-1]
            if plan["ttl_seconds"] is not None and output["meta_info"]["finish_reason"] is not None:
                expire_after(tokenizer_manager, plan["ttl_seconds"] + _EXPIRY_MARGIN_SECONDS)
            yield output


def _refuse_embeds(request: Any) -> None:
    custom_params = (request.sampling_params or {}).get("custom_params")
    if isinstance(custom_params, dict) and parse_wish(custom_params.get(PARAM)).asked:
        raise RequestError("input_embeds cannot be compressed: a context is known by its tokens; send text or input_ids.")


TOUCHES = (
    Touch(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.init_tokenizer_and_processor",
        "after",
        "registers the marker in the one tokenizer that all endpoints use",
        (),
        "tokenizer",
        _attach,
    ),
    Touch(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        "around",
        "takes the marker out before lengths are checked; wrong requests become a 400 here",
        ("obj", "input_ids"),
        "tokenizer",
        _validate,
    ),
    Touch(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
        "around",
        "what goes to the scheduler has no marker and carries the plan in custom_params",
        ("obj", "input_text", "input_ids"),
        "tokenizer",
        _create,
    ),
    Touch(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._wait_one_response",
        "around",
        "meta_info['obcache'] becomes one object, in every chunk of a stream",
        ("obj",),
        "tokenizer",
        _report,
    ),
    Touch(
        "sglang.srt.managers.tokenizer_manager.ReqState",
        "read",
        "customized_info_accumulated: the scheduler's report of a request",
        ("customized_info_accumulated",),
        "tokenizer",
    ),
    Touch(
        "sglang.srt.managers.io_struct.GenerateReqInput",
        "read",
        "requests as they arrive",
        (
            "text",
            "input_ids",
            "sampling_params",
            "rid",
            "return_logprob",
            "logprob_start_len",
            "session_params",
            "custom_logit_processor",
            "watermark",
            "positional_embed_overrides",
            "multi_item_delimiter_indices",
            "token_indices_to_pool",
        ),
        "tokenizer",
    ),
    Touch(
        "sglang.srt.sampling.sampling_params.SamplingParams",
        "read",
        "custom_params: carries the plan to the scheduler",
        ("custom_params",),
        "tokenizer",
    ),
)
