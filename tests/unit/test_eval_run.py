"""Arms, prompts and divergences of an evaluation; its answers are tested with a real server in tests/serving/test_eval.py."""

import json
import math

import pytest

from obcache_sglang.errors import ConfigError
from obcache_sglang.eval.arms import EXACT, Arm, attention_baseline, differences, effect, parse_arms, parse_ratios
from obcache_sglang.eval.prompts import Prompts, TooLong
from obcache_sglang.eval.provenance import kv_bytes_per_token
from obcache_sglang.eval.run import Runner, _answered, divergence
from obcache_sglang.eval.samples import Question, Sample


def test_arms_are_a_product_and_exact_comes_first():
    arms = parse_arms(["tova/obcache-v/uniform", "kvzip"], [0.5, 0.9], ["agnostic", "aware"])
    assert arms[0] is EXACT
    assert len(arms) == 1 + 2 * 2 * 2
    assert arms[1] == Arm("tova", "obcache-v", "uniform", 0.5)
    assert arms[1].wish == {"method": "tova", "score": "obcache-v", "budget": "uniform", "compression_ratio": 0.5}
    kvzip = arms[-1]
    assert (kvzip.score, kvzip.budget, kvzip.mode) == ("attention", "global", "aware")
    assert kvzip.wish == {"preset": "kvzip", "compression_ratio": 0.9, "mode": "prompt"}
    assert EXACT.wish is False
    assert [Arm(**arm.to_dict()) for arm in arms] == arms
    assert parse_arms(["tova/obcache-v/uniform"] * 2, [0.5], ["agnostic"]) == arms[:2]


@pytest.mark.parametrize(
    ("texts", "ratios", "named"),
    [
        (["tova/obcache-v"], [0.5], "tova/obcache-v: give METHOD/SCORE/BUDGET"),
        (["tova/best/uniform"], [0.5], "score='best'"),
        (["kvzip"], [1.0], "compression_ratio=1.0"),
        (["kvzip+recent_tokens=-1"], [0.5], "recent_tokens=-1"),
        (["kvzip+recent_tokens=many"], [0.5], "recent_tokens='many'"),
        (["kvzip+recent"], [0.5], "NAME=VALUE of one of window, pooling"),
        (["kvzip+score=obcache-v"], [0.5], "NAME=VALUE of one of window, pooling"),
        (["replay/obcache-v/global+window=64"], [0.5], "window=64"),
    ],
)
def test_wrong_arms_are_named(texts, ratios, named):
    with pytest.raises(ConfigError, match=named):
        parse_arms(texts, ratios, ["agnostic"])


def test_an_arm_can_have_settings_of_its_own():
    kvzip, recent = parse_arms(["kvzip", "kvzip+recent_tokens=8"], [0.7], ["agnostic"])[1:]
    assert recent.wish == {"preset": "kvzip", "recent_tokens": 8, "compression_ratio": 0.7}
    assert (recent.settings.kept_window, kvzip.settings.kept_window) == (8, 0)
    assert Arm(**recent.to_dict()) == recent != kvzip and "options" not in kvzip.to_dict()
    (chunked,) = parse_arms(["replay/attention/global+replay_chunk=256+normalization=none"], [0.7], ["agnostic"])[1:]
    assert chunked.options == "normalization=none,replay_chunk=256"
    assert chunked.wish_for(9) == {
        "context_len": 9,
        "method": "replay",
        "score": "attention",
        "budget": "global",
        "normalization": "none",
        "replay_chunk": 256,
        "compression_ratio": 0.7,
    }


MAX, MEASURED = "score: attention (largest of all queries) -> obcache-v", "budget divided by measured errors: no -> yes"


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        ("snapkv/attention/adakv", "snapkv/obcache-k/adakv", ["score: attention -> obcache-k"]),
        ("replay/attention/global", "replay/obcache-v/global", [MAX]),
        ("replay/attention/adakv", "replay/obcache-v/adakv", [MAX]),
        ("kvzip", "kvzip+recent_tokens=8", ["recent tokens: 0 -> 8"]),
        ("kvzip", "replay/attention/global+recent_tokens=0", ["preset: kvzip -> default", MEASURED]),
        ("replay/attention/global+normalization=none", "replay/attention/global", [MEASURED]),
        ("replay/attention/global+normalization=none", "replay/obcache-v/global", [MAX, MEASURED]),
        (
            "replay/obcache-v/global+normalization=none",
            "replay/obcache-v/global",
            ["scores relative to their layer's output: no -> yes", MEASURED],
        ),
        ("snapkv/obcache-k/uniform", "snapkv/obcache-k/adakv", ["budget: uniform -> adakv"]),
        # tova's even budget is one choice for all heads.
        ("tova/obcache-v/uniform", "tova/obcache-v/profile", ["heads: shared -> per-head", "budget: uniform -> profile"]),
        ("replay/obcache-v/global+replay_chunk=256", "replay/obcache-v/global", ["replay chunk: 256 -> 2048"]),
        ("tova/attention/uniform", "tova/attention/uniform", []),
    ],
)
def test_arms_differ_in_what_they_do(one, other, differ):
    first, second = (parse_arms([text], [0.7], ["agnostic"])[1] for text in (one, other))
    assert differences(first, second) == tuple(differ)
    assert len(differences(second, first)) == len(differ)
    refused = effect(first, second).startswith("not the effect of one thing; they differ in ")
    assert refused == (len(differ) > 1)
    alone = len(differ) == 1 and differ[0].startswith("score: attention")
    assert (attention_baseline(second) == first) == alone


def test_modes_and_ratios_are_differences_and_exact_is_all_of_one():
    arms = parse_arms(["tova/obcache-v/uniform"], [0.5, 0.7], ["agnostic", "aware"])
    assert differences(arms[1], arms[2]) == ("compression ratio: 0.5 -> 0.7",)
    assert differences(arms[1], arms[3]) == ("mode: agnostic -> aware",)
    assert effect(EXACT, arms[1]) == "compression"


def test_ratios_are_numbers_and_names():
    assert parse_ratios(["paper", "0.25", "0.7"]) == [0.25, 0.6, 0.7, 0.8, 0.9]
    with pytest.raises(ConfigError, match="many"):
        parse_ratios(["many"])


def test_divergence_of_known_distributions():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4), the third token listed by neither or by one only."""
    p, q = [(math.log(0.5), 1), (math.log(0.25), 2)], [(math.log(0.5), 2), (math.log(0.25), 1)]
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert divergence(p, q) == pytest.approx(expected)
    assert divergence([*p, (math.log(0.25), 3)], q) == pytest.approx(expected)
    assert divergence(p, p) == pytest.approx(0)
    assert divergence([(math.log(0.5), 1)], [(math.log(0.5), 2)]) == pytest.approx(0)  # nothing in common: one token


def test_context_and_rest_are_the_whole_prompt(model_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    question = Question("\n\nWhat is it?", "It is", ("x",), 4)
    context, rest = Prompts(tokenizer).ask("A text. It has two sentences.", question)
    messages = [{"role": "user", "content": "A text. It has two sentences.\n\nWhat is it?"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + "It is"
    assert tokenizer.decode(context + rest) == whole
    assert tokenizer.decode(context).endswith("A text. It has two sentences.")
    tokenizer.chat_template = None
    context, rest = Prompts(tokenizer).ask("A text.", question)
    assert tokenizer.decode(context + rest) == "A text.\n\nWhat is it?It is"


def test_a_line_that_was_cut_off_is_taken_away(tmp_path):
    file = tmp_path / "answers.jsonl"
    assert _answered(file) == set()
    line = '{"arm": {"method": "exact", "ratio": 0.0}, "task": "t", "sample": 0, "question": 1, "output": "\u2028é"}\n'
    file.write_bytes((line + line.replace("0.0", "0.5")).encode()[:-40])
    assert _answered(file) == {(EXACT, "t", 0, 1)}
    assert file.read_text(encoding="utf-8") == line


def test_bytes_of_a_token_are_those_of_the_pool(model_dir, model_dir_bf16, tmp_path):
    """SmolLM2-135M: 30 layers, 3 KV heads of 64, K and V, in 4 and 2 bytes."""
    assert kv_bytes_per_token(str(model_dir)) == 2 * 30 * 3 * 64 * 4
    assert kv_bytes_per_token(str(model_dir_bf16)) == 2 * 30 * 3 * 64 * 2
    assert kv_bytes_per_token(str(tmp_path)) is None


# --- prompts that are too long ------------------------------------------------------------------------------------------

NUMBERS = " ".join(f"number {i}." for i in range(1000, 1400))
ASK = Question("\n\nWhich number is the last? Answer:", "", ("1399",), 10)


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


@pytest.mark.parametrize("plain", [True, False])
def test_a_context_that_is_too_long_loses_its_middle(tokenizer, plain):
    """As many tokens of the prompt stay at its beginning as at its end, the question among these; the template is whole."""
    sample = Sample("longbench/qasper", 0, NUMBERS, (ASK,), "qa_f1", plain=plain, cut_middle=True)
    prompts = Prompts(tokenizer)
    ((whole, behind),) = prompts.split(sample)
    limit = 500
    assert len(whole) + len(behind) > 2 * limit
    ((context, rest),), cut = prompts.fitted(sample, limit)
    assert cut == 1 and rest == behind
    assert limit - 10 - 4 <= len(context) + len(rest) + ASK.max_new_tokens <= limit
    text = tokenizer.decode(context)
    assert "number 1000." in text and text.endswith("number 1399.")
    assert "number 1200." not in text
    template = 0 if plain else len(whole) + len(behind) - len(tokenizer.encode(NUMBERS + ASK.text, add_special_tokens=False))
    half = (limit - 10 - template) // 2
    begins = next(i for i, (one, other) in enumerate(zip(context, whole, strict=False)) if one != other)
    before = 0 if plain else len(tokenizer.encode(tokenizer.decode(whole).split("number")[0], add_special_tokens=False))
    assert abs(begins - before - half) <= 3
    assert tokenizer.decode(whole).startswith("number 1000") == plain  # without the template


def test_a_prompt_that_fits_is_left_alone(tokenizer):
    sample = Sample("t", 0, NUMBERS, (ASK,), "qa_f1", cut_middle=True)
    prompts = Prompts(tokenizer)
    ((context, rest),) = prompts.split(sample)
    exactly = len(context) + len(rest) + ASK.max_new_tokens
    assert prompts.fitted(sample, exactly) == ([(context, rest)], 0)
    assert prompts.fitted(sample, exactly - 1)[1] == 1


@pytest.mark.parametrize(
    ("sample", "limit"),
    [
        (Sample("needle", 0, NUMBERS, (ASK,), "qa_f1"), 500),
        (Sample("longbench/qasper", 0, "short", (Question(NUMBERS, "", ("x",), 10),), "qa_f1", cut_middle=True), 500),
        (Sample("longbench/qasper", 0, NUMBERS, (ASK,), "qa_f1", cut_middle=True), 20),
    ],
    ids=["may not be cut", "long question", "no room"],
)
def test_what_cannot_be_cut_is_refused(tokenizer, sample, limit):
    with pytest.raises(TooLong, match=rf"do not fit the model's {limit - 10} tokens"):
        Prompts(tokenizer).fitted(sample, limit)


def test_plain_samples_have_no_chat_template(tokenizer):
    sample = Sample("longbench/trec", 0, "Examples.\n", (Question("Which? Type:", "", ("x",), 4),), "classification", plain=True)
    ((context, rest),) = Prompts(tokenizer).split(sample)
    assert tokenizer.decode(context + rest) == "Examples.\nWhich? Type:"


class FakeClient:
    """A server whose answers are right."""

    def __init__(self):
        self.asked = []

    def get(self, path):
        assert path == "/server_info"
        return {"max_req_input_len": 501}

    def post(self, path, body):
        self.asked += list(zip(body["input_ids"], body["sampling_params"], strict=True))
        return [{"text": "1399", "meta_info": {}} for _ in body["input_ids"]]


def test_a_sample_that_is_too_long_does_not_end_the_run(tokenizer, tmp_path):
    samples = [
        Sample("facts", 0, NUMBERS, (ASK,), "starts_with"),
        Sample("longbench/qasper", 0, NUMBERS, (ASK, ASK), "qa_f1", cut_middle=True),
        Sample("facts", 1, "number 1399.", (ASK,), "starts_with", not_comparable="other words"),
    ]
    client = FakeClient()
    runner = Runner(client, tokenizer, tmp_path)
    runner.run(samples, [EXACT])
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["task"], line["sample"], line.get("cut"), line.get("not_comparable")) for line in lines] == [
        ("longbench/qasper", 0, 2, None),
        ("longbench/qasper", 0, 2, None),
        ("facts", 1, None, "other words"),
    ]
    assert lines[0]["asked"] == ASK.text
    assert all(len(ids) + params["max_new_tokens"] <= 500 for ids, params in client.asked)
    skipped = json.loads((tmp_path / "skipped.json").read_text(encoding="utf-8"))
    assert list(skipped) == ["facts 0"] and "do not fit the model's 490 tokens for prompts" in skipped["facts 0"]
    # A run that goes on skips the same ones again, and asks nothing twice.
    again = Runner(client, tokenizer, tmp_path)
    asked = len(client.asked)
    again.run(samples, [EXACT])
    assert (len(client.asked), json.loads((tmp_path / "skipped.json").read_text(encoding="utf-8"))) == (asked, skipped)
    again.note_survivors(samples[:1], [])
    again.run(samples[1:], [EXACT])
    assert not (tmp_path / "skipped.json").exists()


def test_samsum_ends_at_a_line_break(tokenizer, tmp_path):
    client = FakeClient()
    question = Question("Dialogue. Summary:", "", ("x",), 8)
    for stops in (True, False):
        sample = Sample(f"stops {stops}", 0, "Examples.", (question,), "qa_f1", plain=True, stop_at_newline=stops)
        Runner(client, tokenizer, tmp_path).run([sample], [EXACT])
    (_, stopping), (_, free) = client.asked
    assert (stopping["min_new_tokens"], stopping["stop_token_ids"]) == (1, tokenizer.encode("\n", add_special_tokens=False))
    assert not {"min_new_tokens", "stop_token_ids"} & free.keys()
