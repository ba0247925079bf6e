"""Arms, prompts and divergences of an evaluation; its answers are tested with a real server in tests/serving/test_eval.py."""

import math

import pytest

from obcache_sglang.errors import ConfigError
from obcache_sglang.eval.arms import EXACT, Arm, attention_baseline, differences, effect, parse_arms, parse_ratios
from obcache_sglang.eval.provenance import kv_bytes_per_token
from obcache_sglang.eval.run import Prompts, _answered, divergence
from obcache_sglang.eval.samples import Question


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
