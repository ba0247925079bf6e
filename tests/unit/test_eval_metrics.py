"""The metrics against cases that were worked out by hand."""

from __future__ import annotations

import sys

import pytest

from obcache_sglang.errors import ConfigError
from obcache_sglang.eval import metrics
from obcache_sglang.eval.metrics import METRICS

FUNCTION = "def area(width, height):\n    checked = check(width, height)\n    return checked.width * checked.height\n"
OTHER = "def name(self):\n    return self.first + ' ' + self.last\n"

CASES = [
    ("starts_with", " 9770867. This", ["9770867"], 1),
    ("starts_with", "\n\nAnna", ["Tom", "Anna"], 1),
    ("starts_with", "It is 9770867", ["9770867"], 0),
    ("string_match_all", "abcde and FGHIJ", ["ABCDE", "fghij", "klmno", "pqrst"], 0.5),
    ("string_match_all", "", ["1"], 0),
    ("string_match_part", "In PARIS, they say", ["London", "Paris"], 1),
    ("string_match_part", "Rome", ["London", "Paris"], 0),
    # Without articles and punctuation: 3 words of 4 shared, 2 in the reference: P = 2/4, R = 2/2.
    ("qa_f1", "The red, old fox jumps", ["a red fox"], 2 / 3),
    ("qa_f1", "fox fox", ["the fox"], 2 / 3),
    ("qa_f1", "cat", ["dog", "Cat!"], 1),
    ("qa_f1", "", ["dog"], 0),
    ("qa_f1_first_line", "\nParis\nQuestion: next", ["Paris"], 1),
    ("qa_f1_zh_characters", "北京 市。", ["北京"], 0.8),
    ("retrieval", "Paragraph 12, or 3", ["Paragraph 12"], 0.5),
    ("retrieval", "Paragraph 120", ["Paragraph 12"], 0),
    ("retrieval_zh", "段落7", ["段落7"], 1),
    ("count", "There are 7, not 8 and not 7", ["7"], 2 / 3),
    ("count", "seven", ["7"], 0),
    ("code_similarity", "```python\n# next\nreturn a + b\nmore", ["return a + c"], 0.92),
    ("code_similarity", "# only a comment", ["return a"], 0),
    # What a metric can make nothing of is never right.
    ("string_match_all", "anything", [], 0),
    ("string_match_part", "anything", [], 0),
    ("retrieval", "Paragraph 3", ["the third"], 0),
    ("retrieval_zh", "段落7", ["第七"], 0),
    ("count", "7", ["seven"], 0),
    ("first_number", "12", ["twelve"], 0),
    ("qa_f1", "anything", [], 0),
    ("contains", '"value": "a-b"', ["a-b"], 1),
    ("contains", "A-B", ["a-b"], 0),
    ("first_integer", "It is 123, not 45", ["123"], 1),
    ("first_integer", "It is 123, not 45", ["45"], 0),
    ("first_number", "about 12.7", ["12"], 1),
    ("first_number", "about 12.7", ["12.7"], 1),
    ("first_number", "about 12.7", ["12.5"], 0),
    ("first_number", "none", ["12"], 0),
    ("choice", " B. Because", ["Blue sky", "B"], 1),
    ("choice", "C", ["Blue sky", "B"], 0),
    ("choice", "So the answer is: B", ["blue sky", "B"], 1),
    ("choice", "So the answer is blue sky", ["blue sky", "B"], 1),
    ("choice", "So the answer is D, not B", ["blue sky", "B"], 0),
    ("choice", "I take B", ["blue sky", "B"], 1),
    ("choice", "", ["blue sky", "B"], 0),
]
PACKAGED_CASES = [
    # The longest common subsequence is "the cat on mat": 4 of 6 words and of 5, or of 4 different ones, which package rouge counts.
    ("rouge_l", "rouge", "the cat sat on a mat", ["the cat on the mat"], 0.8),
    ("rouge_l", "rouge", "", ["the cat"], 0),
    ("rouge_l", "rouge", "the cat", ["a dog", "the cat"], 1),
    ("rouge_l_first_line", "rouge", "the cat\nsat on a mat", ["the cat"], 1),
    ("rouge_l_sum", "rouge_score", "The cat sat on a mat.", ["the cat on the mat"], 8 / 11),
    ("qa_f1_zh", "jieba", "我爱北京。", ["北京"], 0.5),
    ("rouge_l_zh", "jieba", "我爱北京", ["我爱北京"], 1),
]


@pytest.mark.parametrize(("metric", "prediction", "references", "score"), CASES)
def test_by_hand(metric: str, prediction: str, references: list[str], score: float) -> None:
    assert METRICS[metric](prediction, references, ()) == pytest.approx(score)


@pytest.mark.parametrize(("metric", "package", "prediction", "references", "score"), PACKAGED_CASES)
def test_by_hand_with_the_extra(metric: str, package: str, prediction: str, references: list[str], score: float) -> None:
    pytest.importorskip(package)
    assert METRICS[metric](prediction, references, ()) == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        # "Other" is part of the right class and does not count; "number", after it, is passed over, and does.
        ("Type: Other number\nQuestion: ... Type: Date", 0.5),
        ("Other number or Date", 1 / 3),
        ("Date", 0.0),
        ("\nDate\nOther number", 0.0),  # only the first line counts
    ],
)
def test_classification(prediction: str, score: float) -> None:
    assert METRICS["classification"](prediction, ["Other number"], ["Date", "Other", "number", "Other number"]) == score


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        (f"Here it is:\n```python\n{FUNCTION}```\nIt computes.\n```\nnot this\n```", 1.0),
        (FUNCTION, 1.0),
        (f"```\n{OTHER}```", 0.0),  # another function of the repository
        (f"```\n{FUNCTION.splitlines()[0]}\n```", 0.0),  # most like the right one, but not enough
        ("", 0.0),
    ],
)
def test_function(prediction: str, score: float) -> None:
    pytest.importorskip("nltk")
    assert METRICS["function"](prediction, [FUNCTION], [OTHER, FUNCTION]) == score


@pytest.mark.parametrize(("metric", "package"), [("rouge_l_sum", "rouge_score"), ("rouge_l", "rouge")])
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, metric: str, package: str) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    metrics._rouge_scorer.cache_clear()
    metrics._rouge.cache_clear()
    with pytest.raises(ConfigError, match=rf"{package.replace('_', '-')}.*obcache-sglang\[eval\]"):
        METRICS[metric]("a b", ["a b"], ())
