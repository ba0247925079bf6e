"""Requests: from what a client writes to the plan for the scheduler, on a real tokenizer; and the report on its way back."""

import asyncio
import json
from array import array
from types import SimpleNamespace

import pytest
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from transformers import AutoTokenizer

from obcache_sglang import lang
from obcache_sglang.errors import ContextNotFound, HostError, RequestError
from obcache_sglang.frontend import service
from obcache_sglang.frontend.hooks import GUARD_TOUCHES
from obcache_sglang.frontend.hooks import TOUCHES as TOKENIZER_TOUCHES
from obcache_sglang.frontend.marker import register_marker
from obcache_sglang.frontend.openai_reports import with_report
from obcache_sglang.frontend.wish import REQUEST_KEYS, make_plan, parse_wish, split_markers
from obcache_sglang.kv.context import SHARED
from obcache_sglang.plugin import CLI_TOUCHES, register
from obcache_sglang.scheduler.context_cache import ContextCache
from obcache_sglang.scheduler.metrics import Metrics
from obcache_sglang.settings import SETTINGS_ENV, CompressionSettings, settings_from_python
from tests.unit.engine import HALF, KEPT, make_tree

MARKER = "<|obcache|>"
SOME_ID = "0123456789abcdef" * 2
SERVER = settings_from_python({"min_tokens": 4, "compression_ratio": 0.5})


def plan_of(value=None, *, num_tokens=100, marker_position=None, server=SERVER, **more):
    positions = () if marker_position is None else (marker_position,)
    plan = make_plan(parse_wish(value), **{"num_tokens": num_tokens, "marker_positions": positions, "server": server, **more})
    return None if plan is None else plan.to_dict()


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def marker_id(tokenizer):
    return register_marker(tokenizer, MARKER)


# --- the marker ---------------------------------------------------------------------------------------------------------


def test_the_marker_is_one_token_and_leaves_both_sides_alone(tokenizer, marker_id):
    before, after = "The rain in Spain.\n\n", " stays mainly in the plain"
    plain = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    sent, (position,) = split_markers(tokenizer(before + MARKER + after)["input_ids"], marker_id)
    assert sent == plain(before)["input_ids"] + plain(after)["input_ids"]
    assert position == len(plain(before)["input_ids"])
    assert tokenizer("nothing to see")["input_ids"] == plain("nothing to see")["input_ids"]


def test_the_marker_survives_the_chat_template(tokenizer, marker_id):
    messages = [{"role": "system", "content": "A document." + MARKER}, {"role": "user", "content": "A question?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    _, (position,) = split_markers(tokenizer(text)["input_ids"], marker_id)
    assert tokenizer.decode(tokenizer(text)["input_ids"][:position]).endswith("A document.")


def test_registering_the_marker_again_gives_the_same_id(tokenizer, marker_id):
    assert register_marker(tokenizer, MARKER) == marker_id


def test_a_tokenizer_that_reads_the_marker_apart_is_refused(model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir, split_special_tokens=True)
    with pytest.raises(HostError, match="becomes 0 marker tokens"):
        register_marker(tokenizer, "<|cut|>")


def test_a_tokenizer_that_reads_the_right_side_differently_is_refused(model_dir):
    class Wobbly:
        """Splits off the first letter after the marker when the text before it ends with a blank."""

        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, text):
            ids = self.inner(text)["input_ids"]
            return {"input_ids": ids[:-1] if "tail " in text else ids}

    with pytest.raises(HostError, match="becomes different tokens"):
        register_marker(Wobbly(AutoTokenizer.from_pretrained(model_dir)), "<|cut|>")


def test_prompts_without_a_marker_are_the_same_object():
    token_ids = [1, 2, 3]
    sent, positions = split_markers(token_ids, 9)
    assert sent is token_ids
    assert positions == ()
    assert split_markers(token_ids, None) == (token_ids, ())
    given = [1, 9, 2, 3, 9, 4]
    assert split_markers(given, 9) == ([1, 2, 3, 4], (1, 3))
    assert given == [1, 9, 2, 3, 9, 4], "a client's list must not change: n > 1 tokenizes it again"


# --- the plan -----------------------------------------------------------------------------------------------------------


def test_requests_that_say_nothing_are_left_alone():
    assert plan_of() is None
    assert plan_of(False) is None
    assert plan_of(False, marker_position=50) is None


def test_the_marker_is_the_boundary():
    plan = plan_of(marker_position=50)
    assert plan["now"] > 1.7e9
    assert {key: value for key, value in plan.items() if key != "now"} == {
        "context_len": 50,
        "settings": SERVER.compression.to_dict(),
        "action": "ask",
        "pin": False,
        "ttl_seconds": None,
        "context_id": None,
        "before": [],
        "finds_boundary": False,
        "judged_by_rest": False,
        "exact": None,
    }
    assert json.loads(json.dumps(plan)) == plan


@pytest.mark.parametrize(
    ("value", "position", "expected"),
    [
        ({"context_len": 60}, None, {"context_len": 60}),
        ({"context_len": 100}, None, {"context_len": 100}),
        (True, None, {"context_len": 0, "context_id": None}),
        ({"context_id": SOME_ID}, 0, {"context_len": 0, "context_id": SOME_ID}),
        ({"mode": "prompt"}, None, {"context_len": 99, "judged_by_rest": True}),
        ({"mode": "prompt"}, 50, {"context_len": 50, "judged_by_rest": False}),
        ({"mode": "prompt", "context_len": 60}, None, {"context_len": 60, "judged_by_rest": False}),
        ({"pin": True, "ttl_seconds": 60}, 50, {"pin": True, "ttl_seconds": 60.0}),
        ({}, 3, {"exact": "below_min_tokens"}),
        ({}, 4, {"exact": None}),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict | bool) else None,
)
def test_plans(value, position, expected):
    plan = plan_of(value, marker_position=position)
    assert {key: plan[key] for key in expected} == expected


GATES = settings_from_python({"min_tokens": 4, "gates": "smollm2-135m"})


@pytest.mark.parametrize(
    ("value", "positions", "context_len", "boundaries"),
    [
        (None, (30, 50, 90), 90, [30, 50]),
        (None, (30,), 30, []),
        ({"boundaries": [30, 50]}, (90,), 90, [30, 50]),
        ({"boundaries": [30, 50], "context_len": 90}, (), 90, [30, 50]),
        ({"boundaries": []}, (90,), 90, []),
    ],
)
def test_segments_end_at_all_markers_but_the_last(value, positions, context_len, boundaries):
    plan = plan_of(value, marker_positions=positions, server=GATES)
    assert (plan["context_len"], plan["settings"]["boundaries"]) == (context_len, boundaries)


@pytest.mark.parametrize(
    ("segments", "positions", "exact_tokens"),
    [(1, (300, 900), 300), (2, (300, 500, 900), 500), (5, (300, 500, 900), 900), (1, (900,), 900), (1, (50, 300, 900), 50)],
)
def test_first_segments_may_stay_exact(segments, positions, exact_tokens):
    plan = plan_of({"exact_segments": segments}, num_tokens=1000, marker_positions=positions, server=GATES)
    settings = CompressionSettings.from_dict(plan["settings"])
    assert settings.within(plan["context_len"], 1).exact_tokens == exact_tokens
    assert (
        CompressionSettings.from_dict(plan_of({"method": "tova"}, server=GATES, marker_position=50)["settings"]).method == "tova"
    )


def test_under_pressure_only_the_last_end_counts():
    server = settings_from_python({"min_tokens": 4, "gates": "smollm2-135m", "when": "pressure"})
    plan = plan_of(None, marker_positions=(30, 50, 90), server=server)
    assert (plan["context_len"], plan["settings"]["boundaries"]) == (90, [])


@pytest.mark.parametrize(
    ("value", "positions", "words"),
    [
        ({"method": "tova"}, (30, 50), "contains the context marker 2 times. With method=tova it may contain it once"),
        ({"method": "tova", "boundaries": [30]}, (50,), '["boundaries"]=[30] can be used with method=gate only'),
        ({"boundaries": [30]}, (40, 50), "cannot be combined with several markers"),
        ({"boundaries": [50]}, (50,), "does not end before the context, which has 50 tokens"),
        ({"boundaries": [30]}, (), "does not end before the context, which has 0 tokens"),
        ({"boundaries": [50, 30]}, (90,), "does not ascend"),
        ({"boundaries": [30, 30]}, (90,), "does not ascend"),
        ({"boundaries": [0]}, (90,), "a whole number from 1 to"),
        ({"boundaries": [1.5]}, (90,), "a whole number from 1 to"),
        ({"boundaries": "30"}, (90,), "is not a list of at most 4096 token counts"),
        ({"boundaries": [*range(1, 5000)]}, (90,), "is not a list of at most 4096 token counts"),
        (None, tuple(range(1, 5000)), "4999 times, more than 4097"),
        ({"context_id": SOME_ID}, (0, 30), "give one marker, before the question"),
        ({"context_id": SOME_ID, "boundaries": [30]}, (0,), "leave out boundaries"),
        (None, (0, 30), "no context before it"),
    ],
)
def test_wrong_boundaries_say_what_is_allowed(value, positions, words):
    with pytest.raises(RequestError) as refused:
        plan_of(value, num_tokens=500, marker_positions=positions, server=GATES)
    assert words in str(refused.value)


def test_a_reason_to_be_exact_is_carried_on():
    assert plan_of(marker_position=50, exact="session")["exact"] == "session"


def test_mode_prompt_takes_all_but_the_last_token():
    server = settings_from_python({"mode": "prompt", "min_tokens": 4})
    assert plan_of(server=server)["context_len"] == 99
    assert plan_of(server=server, num_tokens=1) is None
    assert plan_of(False, server=server) is None
    assert plan_of({"mode": "marked"}, server=server)["context_len"] == 0


def test_compressing_ahead_takes_the_whole_prompt():
    assert plan_of(action="compress")["context_len"] == 100


def test_requests_override_the_servers_settings():
    plan = plan_of({"compression_ratio": 0.9, "method": "tova", "score": "attention"}, marker_position=50)
    assert (plan["settings"]["compression_ratio"], plan["settings"]["window"]) == (0.9, 1)


@pytest.mark.parametrize(
    ("value", "position", "words"),
    [
        ("yes", None, "give true, false or an object with any of the keys context_len"),
        ({"ratio": 0.5}, None, '["ratio"]=0.5 is not a known key. Allowed keys: context_len, context_id'),
        ({"compression_ratio": 1.0}, 50, '["compression_ratio"]=1.0 is outside [0, 1)'),
        ({"score": "v"}, 50, "choose attention, obcache-v, obcache-k or obcache-kv"),
        ({"method": "tova", "window": 5}, 50, '["window"]=5 cannot be used with method=tova'),
        ({"mode": "both"}, 50, "choose marked, auto or prompt"),
        ({"context_len": 0}, None, "a whole number from 1 to"),
        ({"context_len": True}, None, "a whole number from 1 to"),
        ({"context_len": 10**400}, None, "a whole number from 1 to"),
        ({"context_len": 101}, None, "outside [1, 100]"),
        ({"context_len": 50}, 50, "cannot be combined with the marker"),
        ({"context_id": SOME_ID, "context_len": 5}, 0, "leave out context_len"),
        ({"context_id": SOME_ID, "compression_ratio": 0.5}, 0, "leave out compression_ratio"),
        ({"context_id": 7}, 0, "is not the id of a context"),
        ({"context_id": SOME_ID + "0"}, 0, "is not the id of a context"),
        ({}, 0, "no context before it"),
        ({"pin": 1}, 50, "true or false"),
        ({"ttl_seconds": 0}, 50, "a number from 1 to 31622400"),
        ({"ttl_seconds": float("inf")}, 50, "a number from 1 to 31622400"),
        ({"ttl_seconds": float("nan")}, 50, "a number from 1 to 31622400"),
        ({"ttl_seconds": 10**400}, 50, "a number from 1 to 31622400"),
        ({"kernel_size": 999999999999, "pooling": "max"}, 50, "an odd whole number from 1 to 127"),
        ({"replay_chunk": 1, "method": "replay"}, 50, "a whole number from 32 to"),
        ({"window": 10**6, "method": "snapkv"}, 50, "a whole number from 1 to 8192"),
        ({"max_contexts": 5}, 50, "is not a known key"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_wrong_requests_name_key_value_and_what_is_allowed(value, position, words):
    with pytest.raises(RequestError) as refused:
        plan_of(value, marker_position=position)
    assert words in str(refused.value)
    assert refused.value.status_code == 400
    assert isinstance(refused.value, ValueError), "SGLang answers a ValueError with 400"


# --- hooks on SGLang's TokenizerManager -----------------------------------------------------------------------------------


class Manager:
    """What our hooks touch of a TokenizerManager, with SGLang's own unbound methods where they do the work."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.model_config = SimpleNamespace(vocab_size=49152)
        self.sent = None

    def init(self):
        """Stands for init_tokenizer_and_processor, which has made the tokenizer."""

    def validate(self, obj, input_ids):
        self.validated = list(input_ids)
        del input_ids[self.limit :]  # what --allow-auto-truncate does

    limit = 10_000

    def create(self, obj, input_text, input_ids, *args):
        params = SimpleNamespace(custom_params=obj.sampling_params.get("custom_params"))
        return SimpleNamespace(input_ids=list(input_ids), sampling_params=params)


@pytest.fixture
def serve_one(monkeypatch, tokenizer):
    """Takes one prompt through validation and creation as TokenizerManager does; returns (request, what was sent)."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    from obcache_sglang.frontend import hooks as frontend

    monkeypatch.setenv(SETTINGS_ENV, json.dumps({"min_tokens": 4}))
    manager = Manager(tokenizer)
    frontend._attach(None, manager)

    def serve(text=None, custom=None, limit=10_000, **fields):
        manager.limit = limit
        params = {"custom_params": custom} if custom is not None else {}
        request = GenerateReqInput(text=text, sampling_params=params, **fields)
        request.normalize_batch_and_arguments()
        token_ids = manager.tokenizer(text)["input_ids"] if text is not None else request.input_ids
        frontend._validate(Manager.validate, manager, request, token_ids)
        return request, frontend._create(Manager.create, manager, request, text, token_ids)

    serve.manager = manager
    serve.frontend = frontend.Frontend.of(manager)
    return serve


def test_what_goes_wrong_with_an_empty_report_ends_nothing():
    """SGLang calls this hook in the loop that answers everybody."""
    (touch,) = [each for each in TOKENIZER_TOUCHES if each.target.endswith("update_request_meta_info")]
    meta_info = {"obcache": []}
    touch.hook(None, None, meta_info, SimpleNamespace(customized_info_accumulated=None))
    state = SimpleNamespace(customized_info_accumulated={"obcache": []}, customized_info_reported_keys={"obcache"})
    touch.hook(None, None, meta_info, state)
    assert meta_info == {} == state.customized_info_accumulated


def test_a_marker_in_a_prompt_whose_positions_are_counted_is_refused(serve_one):
    ids = serve_one.manager.tokenizer(f"{CONTEXT}{MARKER}Which?")["input_ids"]
    with pytest.raises(RequestError, match="counts positions"):
        serve_one(input_ids=ids, multi_item_delimiter_indices=[3])


CONTEXT = "One two three four five six seven eight. "


def test_the_marker_is_gone_before_lengths_are_checked(serve_one):
    _, sent = serve_one(CONTEXT + MARKER + "Nine?")
    assert serve_one.frontend.marker_id not in serve_one.manager.validated
    assert sent.input_ids == serve_one.manager.validated
    assert sent.sampling_params.custom_params["obcache"]["context_len"] == len(serve_one.manager.tokenizer(CONTEXT)["input_ids"])


def test_options_of_the_marker_are_the_requests_wish(serve_one):
    _, plain = serve_one(CONTEXT + MARKER + "Nine?")
    _, sent = serve_one(CONTEXT + "<|obcache:ratio=0.25,method=tova,pin,ttl=60|>" + "Nine?")
    plan = sent.sampling_params.custom_params["obcache"]
    assert sent.input_ids == plain.input_ids == serve_one.manager.validated
    assert plan["context_len"] == plain.sampling_params.custom_params["obcache"]["context_len"]
    assert (plan["settings"]["compression_ratio"], plan["settings"]["method"]) == (0.25, "tova")
    assert (plan["pin"], plan["ttl_seconds"]) == (True, 60)


@pytest.mark.parametrize(
    ("own", "ratio", "pin"),
    [
        ({"compression_ratio": 0.9}, 0.9, True),
        ({"pin": False}, 0.25, False),
        (True, 0.25, True),
        ({"ttl_seconds": 60}, 0.25, True),
    ],
)
def test_what_custom_params_say_counts_more_than_the_markers_options(serve_one, own, ratio, pin):
    _, sent = serve_one(CONTEXT + "<|obcache:ratio=0.25,pin|>Nine?", {"obcache": own})
    plan = sent.sampling_params.custom_params["obcache"]
    assert (plan["settings"]["compression_ratio"], plan["pin"]) == (ratio, pin)


def test_off_counts_more_than_the_markers_options(serve_one):
    _, plain = serve_one(CONTEXT + MARKER + "Nine?", {"obcache": False})
    _, sent = serve_one(CONTEXT + "<|obcache:ratio=0.25|>Nine?", {"obcache": False})
    assert sent.input_ids == plain.input_ids
    assert sent.sampling_params.custom_params is None


def test_wrong_options_of_the_marker_are_named(serve_one):
    for said, words in (
        ("ratio=2", '["compression_ratio"]=2 is outside'),
        ("pin=5", '["pin"]=5 is not true or false'),
        ("method=tova,window=5", '["window"]=5 cannot be used with method=tova'),
        ("color=red", "'color', which is not a known key"),
    ):
        with pytest.raises(RequestError) as refused:
            serve_one(CONTEXT + f"<|obcache:{said}|>Nine?")
        assert words in str(refused.value)


def test_a_defect_of_ours_lets_no_options_through(serve_one, monkeypatch):
    """They would be read as a token of no meaning, and the rest of them as text."""
    monkeypatch.setattr("obcache_sglang.frontend.hooks.split_markers", lambda *_: 1 / 0)
    serve_one.frontend.vocab_size += 100  # padded, as many models' are
    assert serve_one(CONTEXT)[1].input_ids == serve_one.manager.tokenizer(CONTEXT)["input_ids"]
    with pytest.raises(ZeroDivisionError):
        serve_one(CONTEXT + "<|obcache:ratio=0.25|>Nine?")


def test_an_echo_has_no_marker_in_either_form(serve_one):
    from obcache_sglang.frontend.openai_reports import _without_marker

    serving = SimpleNamespace(tokenizer_manager=serve_one.manager)
    assert _without_marker(f"a{MARKER}b", serving) == _without_marker("a<|obcache:ratio=0.25|>b", serving) == "ab"
    assert _without_marker(["a<|obcache:ratio=0.25|>b", "`<|obcache:`"], serving) == ["ab", "`<|obcache:`"]


def test_other_custom_params_and_the_clients_request_stay_as_they_are(serve_one):
    custom = {"thinking_budget": 5, "obcache": {"compression_ratio": 0.9}}
    request, sent = serve_one(CONTEXT + MARKER + "Nine?", custom)
    assert sent.sampling_params.custom_params["thinking_budget"] == 5
    assert request.sampling_params["custom_params"] == {"thinking_budget": 5, "obcache": {"compression_ratio": 0.9}}


def test_off_strips_the_marker_and_leaves_nothing_of_ours(serve_one):
    _, sent = serve_one(CONTEXT + MARKER + "Nine?", {"obcache": False})
    assert sent.sampling_params.custom_params is None
    assert serve_one.frontend.marker_id not in sent.input_ids
    _, sent = serve_one(CONTEXT, {"obcache": False, "x": 1})
    assert sent.sampling_params.custom_params == {"x": 1}


def test_token_ids_of_the_client_hold_the_marker_too(serve_one):
    marker_id = serve_one.frontend.marker_id
    given = [5, 6, 7, 8, 9, marker_id, 10]
    request, sent = serve_one(input_ids=given)
    assert sent.input_ids == [5, 6, 7, 8, 9, 10]
    assert sent.sampling_params.custom_params["obcache"]["context_len"] == 5
    assert request.input_ids == [5, 6, 7, 8, 9, marker_id, 10]


def test_truncation_by_sglang_moves_the_boundary(serve_one):
    _, sent = serve_one(CONTEXT + MARKER + "Nine?", limit=5)
    assert len(sent.input_ids) == 5
    assert sent.sampling_params.custom_params["obcache"]["context_len"] == 5


@pytest.mark.parametrize(
    ("fields", "custom", "reason"),
    [
        ({"session_params": {"id": "s"}}, None, "session"),
        ({"custom_logit_processor": "x"}, None, "custom_logit_processor"),
        ({"positional_embed_overrides": object()}, None, "embedding_overrides"),
        ({"return_routed_experts": True}, None, "routed_experts"),
        ({"return_indexer_topk": True}, None, "routed_experts"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_requests_that_read_the_context_are_served_exactly(serve_one, fields, custom, reason):
    _, sent = serve_one(CONTEXT + MARKER + "Nine?", custom, **fields)
    assert sent.sampling_params.custom_params["obcache"]["exact"] == reason


def test_log_probabilities_inside_the_context_are_refused(serve_one):
    prompt = CONTEXT + MARKER + "Nine?"
    num_context = len(serve_one.manager.tokenizer(CONTEXT)["input_ids"])
    with pytest.raises(RequestError, match="logprob_start_len=3 lies inside the context"):
        serve_one(prompt, return_logprob=True, logprob_start_len=3)
    for allowed in (-1, num_context):
        serve_one(prompt, return_logprob=True, logprob_start_len=allowed)
    serve_one(prompt, {"obcache": False}, return_logprob=True, logprob_start_len=3)
    serve_one(prompt, logprob_start_len=3)


def test_a_manager_without_a_frontend_passes_on_what_does_not_rely_on_one(monkeypatch, model_dir):
    from sglang.srt.managers.io_struct import GenerateReqInput

    from obcache_sglang.frontend import hooks as frontend

    monkeypatch.delenv(SETTINGS_ENV, raising=False)
    manager = Manager(AutoTokenizer.from_pretrained(model_dir))
    frontend._attach(None, manager)
    assert frontend.Frontend.of(manager) is None
    request = GenerateReqInput(text=MARKER, sampling_params={"custom_params": {"obcache": "left to others"}})
    token_ids = manager.tokenizer(MARKER)["input_ids"]
    assert len(token_ids) > 1, "without --obcache the marker is text like any other"
    refused = [request, GenerateReqInput(text="a" + MARKER, sampling_params={}), GenerateReqInput(input_ids=token_ids)]
    refused.append(GenerateReqInput(text="a", sampling_params={"custom_params": {"obcache": True}}))
    for wrong in ("<|obcache:ratio=0.5|>", "<|obcache:|>", "<|obcache:ratio"):
        refused.append(GenerateReqInput(text="a" + wrong, sampling_params={}))
        refused.append(GenerateReqInput(input_ids=manager.tokenizer(f"a{wrong}b")["input_ids"]))
    for each in refused:
        with pytest.raises(RequestError, match="started without --obcache"):
            frontend._validate(Manager.validate, manager, each, list(token_ids))
    others = {"obcache": False, "x": 1}
    text = "obcache, `<|obcache:`"
    plain = GenerateReqInput(text=text, sampling_params={"custom_params": others})
    token_ids = manager.tokenizer(text)["input_ids"]
    frontend._validate(Manager.validate, manager, GenerateReqInput(input_ids=token_ids, sampling_params={}), token_ids)
    frontend._validate(Manager.validate, manager, plain, token_ids)
    sent = frontend._create(Manager.create, manager, plain, text, token_ids)
    assert sent.input_ids == token_ids
    assert sent.sampling_params.custom_params == others


def test_every_output_carries_the_report_as_one_object(serve_one):
    from obcache_sglang.frontend import hooks as frontend

    request, _ = serve_one(CONTEXT + MARKER + "Nine?")

    async def outputs():
        for finish_reason in (None, {"type": "length"}):
            yield {"meta_info": {"finish_reason": finish_reason}}

    state = SimpleNamespace(customized_info_accumulated={"obcache": [{"status": "reused"}]})
    serve_one.manager.rid_to_state = {request.rid: state}

    async def collect():
        stream = frontend._report(lambda manager, obj: outputs(), serve_one.manager, request)
        return [output["meta_info"]["obcache"] async for output in stream]

    assert asyncio.run(collect()) == [{"status": "reused"}, {"status": "reused"}]
    unplanned, _ = serve_one(CONTEXT)
    stream = object()
    assert frontend._report(lambda manager, obj: stream, serve_one.manager, unplanned) is stream


# --- OpenAI streams, compress bodies, metrics, the frontend language -----------------------------------------------------


def test_only_the_chunk_that_finishes_a_choice_gets_its_report():
    reports = {1: {"status": "reused"}}
    event = {"id": "x", "choices": [{"index": 1, "text": "é", "finish_reason": "stop"}]}
    chunk = f"data: {json.dumps(event)}\n\n"
    got = with_report(chunk, reports)
    assert got.startswith("data: ") and got.endswith("\n\n")
    assert json.loads(got[6:]) == event | {"metadata": {"obcache": {"status": "reused"}}}
    other = f"data: {json.dumps(event | {'choices': [{'index': 0}]})}\n\n"
    assert with_report(other, reports) == other
    for unchanged in (
        'data: {"error": {"message": "x"}}\n\n',
        'data: {"choices":[]}\n\n',
        "data: {}\n\n",
        ": ping\n\n",
    ):
        assert with_report(unchanged, reports) == unchanged


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "needs exactly one of text, messages, input_ids; given: none"),
        ({"text": "a", "input_ids": [1]}, "given: text, input_ids"),
        ({"text": ["a", "b"]}, "text is not a non-empty string"),
        ({"text": ""}, "text is not a non-empty string"),
        ({"input_ids": [True]}, "input_ids is not a non-empty list of token ids"),
        ({"text": "a", "ratio": 0.5}, "Unknown keys in the body of compress: 'ratio'. Allowed keys: text"),
        ({"text": "a", "context_len": 5}, "body of compress: 'context_len'"),
        ({"text": "a", "cache_salt": 5}, "cache_salt=5 is not a string"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_wrong_compress_bodies_are_refused(body, words):
    with pytest.raises(RequestError) as refused:
        service._compress_request(None, lambda: None, body)
    assert words in str(refused.value)


def test_a_compress_body_becomes_a_request_of_no_new_tokens():
    request = service._compress_request(
        None, lambda: None, {"text": "a", "pin": True, "compression_ratio": 0.5, "cache_salt": "s"}
    )
    assert request.sampling_params["max_new_tokens"] == 0
    assert request.sampling_params["custom_params"] == {"obcache": {"pin": True, "compression_ratio": 0.5}}
    assert request.cache_salt == "s"


def test_compress_ends_the_context_of_messages_where_their_text_ends():
    messages = [{"role": "system", "content": "A document."}]
    assert service._with_marker(messages, MARKER) == [{"role": "system", "content": "A document." + MARKER}]
    assert messages == [{"role": "system", "content": "A document."}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "A"}]}]
    assert service._with_marker(parts, MARKER)[0]["content"][0]["text"] == "A" + MARKER
    marked = [{"role": "system", "content": "A" + MARKER + "b"}]
    assert service._with_marker(marked, MARKER) is marked
    told = [{"role": "system", "content": "A<|obcache:pin|>b"}]
    assert service._with_marker(told, MARKER) is told
    for wrong in ([], "text", [{"role": "user"}], [{"role": "user", "content": []}]):
        with pytest.raises(RequestError, match="do not end with text"):
            service._with_marker(wrong, MARKER)


def test_answers_of_the_schedulers_become_results_or_errors():
    assert service.checked({"ok": True, "dp_rank": 0, "contexts": []}) == {"contexts": []}
    with pytest.raises(RequestError, match="busy") as conflict:
        service.checked({"ok": False, "status_code": 409, "error": "busy"})
    assert conflict.value.status_code == 409
    with pytest.raises(ContextNotFound):
        service._found([(0, {"ok": False, "status_code": 404}), (1, {"ok": False, "status_code": 404})], {"context_id": "x"})
    found = service._found([(0, {"ok": False, "status_code": 404}), (1, {"ok": True, "gone": True})], {"context_id": "x"})
    assert found == [(1, {"gone": True})]


def test_counters_of_ranks_add_up():
    ranks = [{"reuses": 1, "exact": {"session": 2}}, {"reuses": 2, "exact": {"no_slots": 1, "session": 1}}]
    assert service._summed(ranks) == {"reuses": 3, "exact": {"session": 3, "no_slots": 1}}


@pytest.mark.parametrize("ranks", [1, 2])
def test_progress_never_goes_back_when_a_job_has_ended_before_its_answer_is_here(monkeypatch, ranks):
    looks = [(0, 0), (512, 900), (900, 900), (0, 0)]
    step = 0

    async def call(_, operation):
        nonlocal step
        tokens, total = looks[min(step, 3)]
        # The second rank reads as the first one, and is still at it when that has ended.
        late = looks[min(step, 2)]
        step += 1
        answers = [(0, {"ok": True, "tokens": tokens, "of": total}), (1, {"ok": True, "tokens": late[0], "of": late[1]})]
        return answers[:ranks]

    async def compress(*_):
        while step < len(looks):
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        return {"status": "compressed"}

    async def shown():
        return [step async for step in service.compress_progress(None, lambda: None, {"text": "a context"})]

    monkeypatch.setattr(service, "_PROGRESS_SECONDS", 0.001)
    monkeypatch.setattr(service.control, "call", call)
    monkeypatch.setattr(service, "_compress", compress)
    *steps, made = asyncio.run(shown())
    assert made == {"status": "compressed"}
    assert [step["progress"]["tokens"] for step in steps] == [0, 512 * ranks, 900 * ranks]


def test_metrics_count_once_for_status_and_prometheus():
    from prometheus_client import REGISTRY

    labels = {"model_name": "m", "tp_rank": "0"}
    metrics = Metrics.create(True, labels)
    metrics.compressed(0.5, context_tokens=100, kept_slots=30)
    metrics.compressed_in_place()
    metrics.reused(100)
    metrics.reused(100)
    metrics.replayed(300, 1.5)
    metrics.exact("session")
    metrics.evicted()
    metrics.waiting(3)
    metrics.waited(1.25)
    metrics.loaded(0.5, num_bytes=1000)
    metrics.saved(0.75, num_bytes=2000)
    metrics.file_missed()
    metrics.unsaved()
    metrics.in_folder(2, 5000)
    metrics.came_back(0.125, num_slots=30)
    cache = ContextCache(make_tree(200, host="write_back"), max_contexts=3)
    made = []
    for first in (0, 1000):
        context = cache.obtain(SHARED, HALF, array("q", range(first, first + 140)))
        assert context is not None and cache.reserve(context) is not None
        cache.publish(context, KEPT)
        made.append(context)
    assert cache.tree.evict(EvictParams(num_tokens=70)) and cache.obtain(SHARED, HALF, array("q", range(5)))
    cache.pin(made[1])
    metrics.restored(cache)
    assert metrics.set_gauges(cache) == made[1:]
    metrics.pass_decided(0.25, used_slots=630)
    assert metrics.to_dict() == {
        "compressions": 1,
        "in_place": 1,
        "restored": 1,
        "reuses": 2,
        "context_tokens": 100,
        "slots_saved": 70,
        "tokens_saved": 200,
        "replayed_tokens": 300,
        "replay_seconds": 1.5,
        "schedule_passes": 1,
        "schedule_seconds": 0.25,
        "compression_seconds": 0.5,
        "exact": {"session": 1},
        "host_contexts": 1,
        "folder_contexts": 2,
        "folder_bytes": 5000,
        "host_loads": 1,
        "host_slots_loaded": 30,
        "host_load_seconds": 0.125,
        "lost_share": 0.1,
        "contexts": 1,
        "pinned": 1,
        "evictions": 1,
        "waiting": 3,
        "waiting_seconds": 1.25,
        "slots_saved_now": 70,
        "file_loads": 1,
        "file_saves": 1,
        "file_unsaved": 1,
        "file_misses": 1,
        "file_bytes_read": 1000,
        "file_bytes_written": 2000,
        "file_load_seconds": 0.5,
        "file_save_seconds": 0.75,
    }
    assert REGISTRY.get_sample_value("sglang:obcache_file_written_bytes_total", labels) == 2000
    assert REGISTRY.get_sample_value("sglang:obcache_reuses_total", labels) == 2
    assert REGISTRY.get_sample_value("sglang:obcache_exact_total", labels | {"reason": "session"}) == 1
    assert REGISTRY.get_sample_value("sglang:obcache_compression_seconds_count", labels) == 1
    assert REGISTRY.get_sample_value("sglang:obcache_in_place_total", labels) == 1
    silent = Metrics.create(False, labels)
    silent.reused(5)
    assert silent.to_dict()["tokens_saved"] == 5
    assert REGISTRY.get_sample_value("sglang:obcache_reuses_total", labels) == 2


def test_every_family_of_metrics_has_a_sample_before_anything_happened(tmp_path, monkeypatch):
    """Prometheus's collector for several processes shows a gauge that was never set without labels, and `sglang-router` refuses to join that with
    the labels of another replica."""
    from prometheus_client import REGISTRY, CollectorRegistry, values
    from prometheus_client.multiprocess import MultiProcessCollector

    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    # As in a process that imports prometheus_client with that variable set, and has no metrics yet.
    monkeypatch.setattr(values, "ValueClass", values.MultiProcessValue())
    monkeypatch.setattr(REGISTRY, "_names_to_collectors", {})
    monkeypatch.setattr(REGISTRY, "_collector_to_names", {})
    Metrics.create(True, {"model_name": "m"})
    families = list(MultiProcessCollector(CollectorRegistry()).collect())
    values.close_all_multiprocess_files()
    assert len(families) > 10
    assert [each.name for each in families if not each.samples] == []


def test_a_context_in_the_frontend_language_ends_with_the_marker():
    assert lang.context("A document.") == "A document." + MARKER
    assert lang.context("A document.", marker="¶") == "A document.¶"
    assert lang.context("A document.", compression_ratio=0.5, pin=True) == "A document.<|obcache:compression_ratio=0.5,pin|>"
    with pytest.raises(ValueError, match="already contains the marker"):
        lang.context("A" + MARKER)
    with pytest.raises(ValueError, match="already contains the marker"):
        lang.context("A<|obcache:pin|>")
    with pytest.raises(ValueError, match="takes no options"):
        lang.context("A", marker="¶", pin=True)


def test_a_variable_left_in_a_shell_turns_nothing_on_in_a_launcher(monkeypatch):
    from sglang.srt.plugins.hook_registry import HookRegistry

    monkeypatch.setenv(SETTINGS_ENV, "{}")
    before = set(HookRegistry._hooks)
    register()
    assert set(HookRegistry._hooks) - before <= {touch.target for touch in (*CLI_TOUCHES, *GUARD_TOUCHES)}


def test_request_keys_are_the_documented_ones():
    assert REQUEST_KEYS[:5] == ("context_len", "context_id", "mode", "pin", "ttl_seconds")
    assert "compression_ratio" in REQUEST_KEYS and "budget" in REQUEST_KEYS


def test_the_middleware_of_the_host_sees_which_routes_are_for_operators(monkeypatch):
    from fastapi import FastAPI
    from sglang.srt.entrypoints import http_server
    from sglang.srt.utils.auth import AuthLevel, _get_auth_level_from_app_and_scope

    from obcache_sglang.frontend import http_api

    app = FastAPI()
    monkeypatch.setattr(http_server, "app", app)
    monkeypatch.setattr(http_api.Frontend, "of", lambda manager: SimpleNamespace(marker=None, settings=SERVER))
    http_api._add_routes(SimpleNamespace(admin_api_key="k"), None)

    def level(method, path):
        return _get_auth_level_from_app_and_scope(
            app, {"type": "http", "method": method, "path": path, "root_path": "", "headers": []}
        )

    operators = [("GET", "/obcache/contexts"), ("GET", "/obcache/contexts/by-name/x"), ("DELETE", "/obcache/contexts/by-name/x")]
    clients = [
        ("GET", "/obcache/contexts/x"),
        ("DELETE", "/obcache/contexts/x"),
        ("POST", "/obcache/compress"),
        ("GET", "/obcache/status"),
    ]
    assert {level(*each) for each in operators} == {AuthLevel.ADMIN_OPTIONAL}
    assert {level(*each) for each in clients} == {AuthLevel.NORMAL}


def test_positions_are_read_for_a_few_clients_at_a_time(monkeypatch):
    """Each such answer may hold millions of numbers: many at once would take the server's memory."""
    from fastapi import FastAPI
    from httpx import ASGITransport, AsyncClient

    from obcache_sglang.frontend import http_api

    reading, most = [], {True: 0, False: 0}

    async def get_context(tokenizer_manager, context_id, *, positions, caller):
        reading.append(positions)
        most[positions] = max(most[positions], reading.count(positions))
        await asyncio.sleep(0.01)
        reading.remove(positions)
        return {"id": context_id}

    monkeypatch.setattr(service, "get_context", get_context)
    app = FastAPI()
    app.include_router(http_api.make_router(None, has_admin_key=False))

    async def ask(positions):
        async with AsyncClient(transport=ASGITransport(app), base_url="http://server") as client:
            path = f"/obcache/contexts/{SOME_ID}"
            return await asyncio.gather(*(client.get(path, params={"positions": positions}) for _ in range(9)))

    for positions in (True, False):
        assert {answer.status_code for answer in asyncio.run(ask(positions))} == {200}
    assert most == {True: http_api.POSITIONS_AT_ONCE, False: 9}


def test_context_ids_are_shortened_in_the_access_log():
    import logging

    from obcache_sglang.frontend.http_api import _IdsShortened

    args = ("127.0.0.1:5", "GET", f"/obcache/contexts/{SOME_ID}?positions=true", "1.1", 200)
    record = logging.LogRecord("uvicorn.access", logging.INFO, "", 0, '%s - "%s %s HTTP/%s" %d', args, None)
    assert _IdsShortened().filter(record)
    assert record.getMessage() == '127.0.0.1:5 - "GET /obcache/contexts/01234567...?positions=true HTTP/1.1" 200'
