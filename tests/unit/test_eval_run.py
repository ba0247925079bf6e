"""Arms, prompts and divergences of an evaluation; its answers are tested with a real server in tests/serving/test_eval.py."""

import math

import pytest

from obcache_sglang.errors import ConfigError
from obcache_sglang.eval.arms import EXACT, Arm, parse_arms, parse_ratios
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
    ],
)
def test_wrong_arms_are_named(texts, ratios, named):
    with pytest.raises(ConfigError, match=named):
        parse_arms(texts, ratios, ["agnostic"])


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
