"""The tokenizer process: markers become boundaries, requests become plans, and reports find their way back.

The hooks sit where every prompt passes, whatever endpoint it came from: `_validate_one_request` (before SGLang checks
lengths) and `_create_tokenized_object` (what is sent to the scheduler). A TokenizerManager without a `Frontend` works as if this
package were not installed, with one exception: it refuses requests that rely on compression.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from obcache_sglang.errors import HostError, RequestError, shown
from obcache_sglang.frontend.breakpoints import combined
from obcache_sglang.frontend.calibration_watch import CalibrationWatch
from obcache_sglang.frontend.checks import (
    check_choices,
    check_embeddings,
    check_ids,
    check_sampling,
    check_scalars,
    check_texts,
    exact_reason,
)
from obcache_sglang.frontend.control import ExpiryTimer
from obcache_sglang.frontend.exchange import NAMESPACE_FIELDS, dropped_names, marks_tools, note_report, params_with
from obcache_sglang.frontend.marker import Marker
from obcache_sglang.frontend.marker_options import contains
from obcache_sglang.frontend.wish import make_plan, parse_wish, split_markers
from obcache_sglang.host import Touch
from obcache_sglang.messages import KEY, Action, Plan
from obcache_sglang.settings import ServerSettings, published_settings

logger = logging.getLogger(__name__)

_FRONTEND = "obcache_frontend"  # attribute of a TokenizerManager that serves with compression
_REFUSED_MARKER = "obcache_refused_marker"  # attribute of one that serves without compression: the marker that it refuses
ACTION = "obcache_action"  # attribute of a GenerateReqInput made by POST /obcache/compress
_PLAN = "obcache_plan"  # attribute of a GenerateReqInput that was sent with a plan

# Schedulers count a context's lifetime from the last time stamp they saw. The timer wakes them a little after its expiry.
_EXPIRY_MARGIN_SECONDS = 0.2


@dataclass
class _Prepared:
    """A prompt between SGLang's length check and its dispatch, recognised by the list object that SGLang passes to both."""

    given_ids: Sequence[int]
    sent_ids: Sequence[int]
    plan: Plan | None


class Frontend:
    """Compression as one TokenizerManager sees it.

    settings: the server's.
    marker: None if the server has no tokenizer.
    vocab_size: the model's; token ids in prompts are below it.
    """

    def __init__(self, settings: ServerSettings, marker: Marker | None, vocab_size: int) -> None:
        self.settings = settings
        self.marker = marker
        self.vocab_size = vocab_size
        self.expiry = ExpiryTimer()
        self.calibration = CalibrationWatch(self)
        self._prepared: _Prepared | None = None

    @staticmethod
    def of(tokenizer_manager: Any) -> Frontend | None:
        """The Frontend of a TokenizerManager, or None if it serves without compression."""
        return getattr(tokenizer_manager, _FRONTEND, None)

    @property
    def marker_id(self) -> int | None:
        """The marker's token id."""
        return None if self.marker is None else self.marker.token_id

    def prepare(self, request: Any, token_ids: Sequence[int]) -> _Prepared:
        """Takes the marker out of `token_ids` and makes the request's plan. Raises RequestError.

        request: a GenerateReqInput of one prompt; not changed. token_ids: as tokenized or given by the client; not changed.
        """
        check_ids(token_ids, None)
        if not isinstance(request.sampling_params, dict | None):
            raise RequestError("sampling_params is not an object: a request with one prompt takes one object, not a list.")
        given_ids = token_ids
        token_ids, options = (token_ids, {}) if self.marker is None else self.marker.read(token_ids)
        sent_ids, positions = split_markers(token_ids, self.marker_id)
        wish = parse_wish(combined(_own_params(request), options))
        action: Action = getattr(request, ACTION, "ask")
        before: tuple[int, ...] = ()
        if self.marker is not None and positions and action == "ask":
            first = positions[0]
            is_first = self.marker.stands_first(in_front := sent_ids[:first]) and not marks_tools()
            if wish.context_id is None and is_first:
                positions = (0,)  # no context: `make_plan` says so
            elif wish.context_id is not None and not is_first:
                # A prompt that would be answered without its document, if something on the way here dropped its custom_params.
                raise RequestError(
                    f'custom_params["{KEY}"]["context_id"] is given, but {first} tokens stand before the marker, which are not '
                    "the chat template's. Put the marker where the document would begin: at the very start of the prompt, of the system "
                    "message, or of the first user message."
                )
            elif wish.context_id is not None and list(in_front) == list(self.marker.lead):
                sent_ids, positions = sent_ids[first:], tuple(each - first for each in positions)
        if positions and request.multi_item_delimiter_indices is not None:
            raise RequestError(
                "The prompt contains the context marker, but multi-item scoring counts positions in it. Leave it out: such prompts are exact."
            )
        if wish.context_id is not None:
            if not positions and self.marker is not None:
                raise RequestError(
                    f'custom_params["{KEY}"]["context_id"] is given, but the prompt has no marker: put the marker where the document '
                    f"would be, before the question (as a token: {self.marker_id}). Without it, the question could be answered without "
                    "the document."
                )
            cut = min(positions, default=0)
            before, sent_ids, positions = tuple(sent_ids[:cut]), sent_ids[cut:], tuple(each - cut for each in positions) or (0,)
        if action == "compress" and positions:
            sent_ids = sent_ids[: positions[-1]]
        if len(sent_ids) == 0 and not request.session_params:  # a turn of a session may add nothing
            raise RequestError("The prompt is empty apart from the context marker: send some text.")
        check_ids(sent_ids, self.vocab_size)
        plan = make_plan(
            wish,
            num_tokens=len(sent_ids),
            marker_positions=positions,
            server=self.settings,
            action=action,
            exact="excluded" if self._is_excluded(request) else exact_reason(request),
            before=before,
        )
        if plan is not None:
            plan = _with_logprobs(request, plan, asked=wish.asked or bool(positions))
        return _Prepared(given_ids, sent_ids, plan)

    def _is_excluded(self, request: Any) -> bool:
        """Whether the operator wants the namespace of a request served exactly."""
        own = (getattr(request, name, None) for name in NAMESPACE_FIELDS)
        return any(name in self.settings.exclude for name in (*own, *dropped_names()))

    def hold(self, prepared: _Prepared) -> None:
        """Keeps a prepared prompt for `take`. SGLang awaits nothing between the two calls."""
        self._prepared = prepared

    def take(self, request: Any, token_ids: Sequence[int]) -> _Prepared:
        """The prompt that `hold` kept for this list; if it kept none, prepares the prompt now."""
        prepared, self._prepared = self._prepared, None
        if prepared is None or prepared.given_ids is not token_ids:
            prepared = self.prepare(request, token_ids)
        return prepared


def _own_params(request: Any) -> Any:
    """custom_params["obcache"] of a request, or None. Raises RequestError if custom_params is not an object."""
    params = request.sampling_params
    custom_params = params.get("custom_params") if isinstance(params, dict) else None
    if custom_params and not isinstance(custom_params, dict):
        raise RequestError(f"custom_params={shown(custom_params)} is not an object.")
    return params_with(custom_params.get(KEY) if isinstance(custom_params, dict) else None)


def _with_logprobs(request: Any, plan: Plan, *, asked: bool) -> Plan:
    """The plan of a request that may want input log-probabilities inside its context.

    A request that did not ask for a context is then served exactly. Raises RequestError for one that did.
    """
    start = request.logprob_start_len
    if plan.exact is not None or not request.return_logprob or not 0 <= start < plan.context_len:
        return plan
    if not asked:
        return replace(plan, exact="input_logprobs")
    raise RequestError(
        f"logprob_start_len={start} lies inside the context of {plan.context_len} tokens, whose log-probabilities are not available. "
        f'Give {plan.context_len} or more, give -1 for none, or turn compression off (custom_params={{"{KEY}": false}}).'
    )


# --- hooks ------------------------------------------------------------------------------------------------------------------


def _attach(result: None, tokenizer_manager: Any) -> None:
    """After TokenizerManager.init_tokenizer_and_processor: the marker becomes a token, and the manager gets its Frontend."""
    settings = published_settings()
    tokenizer = tokenizer_manager.tokenizer
    if settings is None:
        marker = None if tokenizer is None else Marker.unregistered(tokenizer, ServerSettings.marker)
        setattr(tokenizer_manager, _REFUSED_MARKER, marker)
        return
    try:
        marker = None if tokenizer is None else Marker.register(tokenizer, settings.marker)
    except HostError as error:
        raise SystemExit(f"HostError: {error}") from error
    setattr(tokenizer_manager, _FRONTEND, Frontend(settings, marker, tokenizer_manager.model_config.vocab_size))


def _validate(original: Callable[..., None], tokenizer_manager: Any, obj: Any, input_ids: list[int] | None) -> None:
    """Around TokenizerManager._validate_one_request: SGLang checks (or truncates) the prompt that the model will read."""
    frontend = Frontend.of(tokenizer_manager)
    if frontend is None:
        _refuse_without_compression(obj, getattr(tokenizer_manager, _REFUSED_MARKER, None))
        original(tokenizer_manager, obj, input_ids)
        return
    check_texts(obj)
    check_scalars(obj)
    check_embeddings(obj)
    if not isinstance(obj, GenerateReqInput):
        if input_ids is not None:
            check_ids(input_ids, frontend.vocab_size)
        original(tokenizer_manager, obj, input_ids)
        return
    check_sampling(obj, frontend.vocab_size)
    if input_ids is None or obj.input_embeds is not None:
        _refuse_embeds(obj)
        original(tokenizer_manager, obj, input_ids)
        return
    prepared = _prepared(frontend, obj, input_ids)
    original(tokenizer_manager, obj, prepared.sent_ids)
    if prepared.plan is not None:
        # SGLang may have truncated the prompt within its context.
        prepared.plan = replace(prepared.plan, context_len=min(prepared.plan.context_len, len(prepared.sent_ids)))
    frontend.hold(prepared)


def _normalize(original: Callable[..., None], request: Any, *args: Any, **kwargs: Any) -> None:
    """Around GenerateReqInput.normalize_batch_and_arguments, which makes a request of each answer that is asked for."""
    check_choices(request.sampling_params)
    original(request, *args, **kwargs)


def _prepared(frontend: Frontend, request: Any, token_ids: list[int]) -> _Prepared:
    """As `Frontend.prepare`, but a defect of ours does not fail requests that do not ask for compression."""
    try:
        return frontend.prepare(request, token_ids)
    except ValueError:  # the request is wrong
        raise
    except Exception:
        check_ids(token_ids, frontend.vocab_size)
        marked = frontend.marker is not None and frontend.marker.is_special_in(token_ids)
        if frontend.settings.mode == "prompt" or _own_params(request) not in (None, False) or marked:
            raise
        logger.exception("obcache: preparing a request failed; it does not ask for compression, and is passed on unchanged")
        return _Prepared(token_ids, token_ids, None)


def _refuse_without_compression(request: Any, marker: Marker | None) -> None:
    """Raises RequestError for a request that relies on compression, on a server without it: its answer would not be what was asked for."""
    asks = _own_params(request) not in (None, False)
    text, token_ids = getattr(request, "text", None), getattr(request, "input_ids", None)
    if not asks and isinstance(text, str):
        asks = contains(text, ServerSettings.marker)
    elif not asks and marker is not None and isinstance(token_ids, list):
        try:
            asks = marker.is_plain_in(token_ids)
        except (TypeError, OverflowError):  # not token ids; SGLang refuses them
            asks = False
    if asks:
        raise RequestError(
            f'This server was started without --obcache: the marker {ServerSettings.marker} and custom_params["{KEY}"] have no effect '
            "here. Start the server with --obcache, or leave them out."
        )


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
    if frontend is None or input_ids is None or not isinstance(obj, GenerateReqInput) or obj.input_embeds is not None:
        return original(tokenizer_manager, obj, input_text, input_ids, *args, **kwargs)
    frontend.calibration.begin_if_asked(tokenizer_manager)
    prepared = frontend.take(obj, input_ids)
    tokenized = original(tokenizer_manager, obj, input_text, prepared.sent_ids, *args, **kwargs)
    if prepared.sent_ids is not input_ids:
        assert frontend.marker is None or not frontend.marker.is_special_in(tokenized.input_ids), "the model would read a marker"
    params = tokenized.sampling_params
    if prepared.plan is not None:
        params.custom_params = {**(params.custom_params or {}), KEY: prepared.plan.to_dict()}
        setattr(obj, _PLAN, prepared.plan)
    elif isinstance(params.custom_params, dict) and KEY in params.custom_params:
        params.custom_params = {key: value for key, value in params.custom_params.items() if key != KEY} or None
    return tokenized


def _report(original: Callable[..., Any], tokenizer_manager: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    """Around TokenizerManager._wait_one_response: every output of a planned request carries its report, as one object."""
    stream = original(tokenizer_manager, obj, *args, **kwargs)
    plan = getattr(obj, _PLAN, None)
    if plan is None:
        return stream
    return _with_report(stream, tokenizer_manager, tokenizer_manager.rid_to_state[obj.rid], plan)


async def _with_report(stream: Any, tokenizer_manager: Any, state: Any, plan: Plan) -> AsyncIterator[dict[str, Any]]:
    # SGLang collects a request's extra information in lists, with one entry per token or per request, and repeats the lists only
    # in some chunks of a stream.
    async with aclosing(stream):
        async for output in stream:
            reports = state.customized_info_accumulated.get(KEY)
            if reports:
                output["meta_info"][KEY] = reports[-1]
                note_report(reports[-1])
            if plan.ttl_seconds is not None and output["meta_info"]["finish_reason"] is not None:
                frontend = Frontend.of(tokenizer_manager)
                assert frontend is not None
                frontend.expiry.wake_after(tokenizer_manager, plan.ttl_seconds + _EXPIRY_MARGIN_SECONDS)
            yield output


def _no_empty_report(
    result: None, tokenizer_manager: Any, meta_info: dict[str, Any], state: Any, *args: Any, **kwargs: Any
) -> None:
    """After TokenizerManager.update_request_meta_info: removes the empty report of a request that has none.

    If one request of a batch has a report, SGLang gives the others empty lists. Here all answers pass: what raises would end the process.
    """
    try:
        if not state.customized_info_accumulated.get(KEY, True):
            del state.customized_info_accumulated[KEY]
            state.customized_info_reported_keys.discard(KEY)
            meta_info.pop(KEY, None)
    except Exception:
        logger.exception("obcache: taking an empty report away failed")


def _refuse_embeds(request: Any) -> None:
    if parse_wish(_own_params(request)).asked:
        raise RequestError(
            "input_embeds cannot be compressed, since a context is identified by its tokens. Send text or input_ids."
        )


GUARD_TOUCHES = (
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
)
"""Hooks that are applied without --obcache too: there, requests that rely on compression are refused."""

TOUCHES = (
    *GUARD_TOUCHES,
    Touch(
        "sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments",
        "around",
        "bounds the answers to one prompt before a request is made of each",
        (),
        "tokenizer",
        _normalize,
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
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.update_request_meta_info",
        "after",
        "takes away the empty lists that SGLang gives to requests without a report",
        ("meta_info", "state"),
        "tokenizer",
        _no_empty_report,
    ),
    Touch(
        "sglang.srt.managers.tokenizer_manager.ReqState",
        "read",
        "customized_info_accumulated: the scheduler's report of a request",
        ("customized_info_accumulated", "customized_info_reported_keys"),
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
            "return_routed_experts",
            "return_indexer_topk",
            "cache_salt",
            "extra_key",
            "session_id",
            "input_embeds",
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
