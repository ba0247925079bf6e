"""How right an answer is, from 0 to 1: the metrics of RULER, LongBench and SCBench, and a strict one.

RULER's and LongBench's give what the published ones give (`tests/unit/test_eval_published.py`). A reference that a metric can make
nothing of, such as one without the number that it looks for, is never matched. Every metric is called with the model's answer, the references and the sample's options. Those of LongBench and SCBench that
compare longer texts need packages of the extra `eval`; each is imported by the first answer that needs it.
"""

from __future__ import annotations

import difflib
import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from obcache_sglang.errors import ConfigError

Metric = Callable[[str, Sequence[str], Sequence[str]], float]

SIMILAR_FUNCTION = 0.8
"""BLEU from which RepoQA takes a function for the one that was asked for."""

_CHINESE_PUNCTUATION = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."


def starts_with(prediction: str, references: Sequence[str], options: Sequence[str]) -> float:
    """1 if the answer begins with a reference, after blanks."""
    return float(prediction.lstrip().startswith(tuple(references)))


# --- RULER --------------------------------------------------------------------------------------------------------------


def string_match_all(prediction: str, references: Sequence[str], options: Sequence[str]) -> float:
    """The share of references that the answer contains, in any case (upper or lower)."""
    found = [reference.lower() in prediction.lower() for reference in references]
    return sum(found) / len(found) if found else 0.0


def string_match_part(prediction: str, references: Sequence[str], options: Sequence[str]) -> float:
    """1 if the answer contains one of the references, in any case."""
    return float(any(reference.lower() in prediction.lower() for reference in references))


# --- LongBench ----------------------------------------------------------------------------------------------------------


def _best(score: Callable[[str, str], float], first_line: bool = False) -> Metric:
    """The metric that `score` gives with the reference that suits the answer best.

    first_line: only the first line of the answer counts (few-shot tasks, where models go on with further examples).
    """

    def metric(prediction: str, references: Sequence[str], options: Sequence[str]) -> float:
        if first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        return max((score(prediction, reference) for reference in references), default=0.0)

    metric.__doc__ = score.__doc__
    return metric


def _f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    common = sum((Counter(prediction) & Counter(reference)).values())
    return 2 * common / (len(prediction) + len(reference)) if common else 0.0


def _qa_f1(prediction: str, reference: str) -> float:
    """F1 of the words that answer and reference share, without case, punctuation and articles."""
    return _f1(_english_words(prediction), _english_words(reference))


def _english_words(text: str) -> list[str]:
    without_punctuation = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", without_punctuation).split()


def _qa_f1_zh(prediction: str, reference: str) -> float:
    """F1 of the Chinese words that answer and reference share, without case and punctuation."""
    return _f1(*([word for word in map(_plain_chinese, _chinese_words(text)) if word] for text in (prediction, reference)))


def _qa_f1_zh_characters(prediction: str, reference: str) -> float:
    """The same of characters, as SCBench has it."""
    return _f1(_plain_chinese(prediction), _plain_chinese(reference))


def _plain_chinese(text: str) -> str:
    return "".join(char for char in text.lower() if char not in string.punctuation + _CHINESE_PUNCTUATION and not char.isspace())


def _chinese_words(text: str) -> list[str]:
    return list(_package("jieba").cut(text, cut_all=False))


def _rouge_l(prediction: str, reference: str) -> float:
    """F1 of ROUGE-L, from package rouge."""
    scorer = _rouge()  # outside: what it raises where the package is missing is a ValueError too
    try:
        return float(scorer.get_scores(prediction, reference)[0]["rouge-l"]["f"])
    except (ValueError, RecursionError):
        # An empty answer, or one long sentence: rouge refuses both, and LongBench counts what it refuses as wrong.
        return 0.0


def _rouge_l_zh(prediction: str, reference: str) -> float:
    """F1 of ROUGE-L of Chinese words."""
    return _rouge_l(" ".join(_chinese_words(prediction)), " ".join(_chinese_words(reference)))


@cache
def _rouge() -> Any:
    return _package("rouge").Rouge(metrics=["rouge-l"])


def classification(prediction: str, references: Sequence[str], options: Sequence[str]) -> float:
    """1 / the number of classes (options) that the answer's first line names, if the right one is among them.

    A class whose name is part of the right one's does not count; but as published, the class named after one that does not count is
    overlooked, and counts.
    """

    def score(line: str, reference: str) -> float:
        named = [option for option in options if option in line]
        index = 0
        while index < len(named):
            if named[index] in reference and named[index] != reference:
                del named[index]  # the next one takes its place, and is passed over
            index += 1
        return 1 / len(named) if reference in named else 0.0

    return _best(score, first_line=True)(prediction, references, options)


def _share_of_numbers(pattern: str) -> Callable[[str, str], float]:
    """Scores the share of the answer's numbers that are the one that `pattern` finds in the reference."""

    def score(prediction: str, reference: str) -> float:
        right = re.search(pattern, reference)
        numbers = re.findall(r"\d+", prediction)
        return numbers.count(right.group(1)) / len(numbers) if right and numbers else 0.0

    return score


def _code_similarity(prediction: str, reference: str) -> float:
    """Edit similarity of the answer's first line that is neither comment nor fence, to the hundredth.

    Of Python's difflib, which fuzzywuzzy has without Levenshtein, as LongBench requires it.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


# --- SCBench ------------------------------------------------------------------------------------------------------------


def contains(prediction: str, references: Sequence[str], options: Sequence[str]) -> float:
    """1 if the answer contains one of the references, as it is written."""
    return float(any(reference in prediction for reference in references))


def first_integer(prediction: str, references: Sequence[str], options: Sequence[str]) -> float:
    """1 if the answer's first digits are a reference."""
    found = re.search(r"\d+", prediction, re.ASCII)
    return float(found is not None and found.group() in references)


def first_number(prediction: str, references: Sequence[str], options: Sequence[str]) -> float:
    """1 if the answer's first number is that of a reference; where the reference is whole, up to its decimals."""
    found = re.search(r"\d+\.\d+|\d+", prediction, re.ASCII)
    if found is None:
        return 0.0
    number = float(found.group())
    return float(any((number if "." in reference else int(number)) == _number(reference) for reference in references))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def choice(prediction: str, references: Sequence[str], options: Sequence[str]) -> float:
    """1 if the answer chooses right. references: the right option's text, and its letter of A to D."""
    prediction = prediction.strip()
    if prediction[:1] in tuple("ABCD"):
        return float(prediction[0] in references)
    if prediction in references:
        return 1.0
    plain = " ".join(re.sub(r"[\n\"'.,?!{}]", " ", prediction).split())
    for opening in ("answer is:", "answer:", "answer is", "option is"):
        _, found, rest = plain.partition(opening)
        if found:
            return float(rest.lstrip().startswith(tuple(references)))
    letter = re.search(r"\b[ABCD]\b", plain)
    return float(letter is not None and letter.group() in references)


def _rouge_l_sum(prediction: str, reference: str) -> float:
    """F1 of ROUGE-Lsum, from package rouge-score."""
    return float(_rouge_scorer().score(reference, prediction)["rougeLsum"].fmeasure)


@cache
def _rouge_scorer() -> Any:
    return _package("rouge_score.rouge_scorer").RougeScorer(["rougeLsum"])


def function(prediction: str, references: Sequence[str], options: Sequence[str]) -> float:
    """1 if of all functions (options) the answer's code block is most like the right one, by a BLEU of SIMILAR_FUNCTION or more.

    RepoQA's measure without its parsers: the whole first block counts, not the first function in it.
    """
    block = re.search(r"^```(?:\w+)?[^\S\n]*\n(.*?)^```", prediction.strip(), re.DOTALL | re.MULTILINE)
    words = (block.group(1) if block else prediction).split()
    bleu = _package("nltk.translate.bleu_score")
    smoothing = bleu.SmoothingFunction().method4

    def likeness(code: str) -> float:
        return float(bleu.sentence_bleu([code.split()], words, smoothing_function=smoothing)) if words else 0.0

    best = max(dict.fromkeys((*references, *options)), key=likeness, default="")
    return float(best in references and likeness(best) >= SIMILAR_FUNCTION)


# What a metric's module is installed as, where the names differ.
_DISTRIBUTIONS = {"rouge_score": "rouge-score"}


def _package(module: str) -> Any:
    """The module, of a package that only some metrics need. Raises ConfigError, saying how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        raise ConfigError(
            f"this task's metric needs the package {_DISTRIBUTIONS.get(package, package)}, which is not installed: "
            "pip install 'obcache-sglang[eval]'"
        ) from error


METRICS: dict[str, Metric] = {
    "starts_with": starts_with,
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
    "qa_f1": _best(_qa_f1),
    "qa_f1_first_line": _best(_qa_f1, first_line=True),
    "qa_f1_zh": _best(_qa_f1_zh),
    "qa_f1_zh_characters": _best(_qa_f1_zh_characters),
    "rouge_l": _best(_rouge_l),
    "rouge_l_first_line": _best(_rouge_l, first_line=True),
    "rouge_l_zh": _best(_rouge_l_zh),
    "rouge_l_sum": _best(_rouge_l_sum),
    "classification": classification,
    "retrieval": _best(_share_of_numbers(r"Paragraph (\d+)")),
    "retrieval_zh": _best(_share_of_numbers(r"段落(\d+)")),
    "count": _best(_share_of_numbers(r"^(\d+)$")),
    "code_similarity": _best(_code_similarity),
    "contains": contains,
    "first_integer": first_integer,
    "first_number": first_number,
    "choice": choice,
    "function": function,
}
"""The metrics by name: (answer, references, options) -> 0 to 1."""
