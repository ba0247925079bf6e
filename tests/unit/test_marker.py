"""The marker with tokenizers of the kinds that models use: what the model reads is the same however a request says where it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from obcache_sglang.errors import RequestError
from obcache_sglang.frontend.hooks import Frontend
from obcache_sglang.frontend.marker import Marker
from obcache_sglang.settings import settings_from_python

TEXT = "<|obcache|>"
SOME_ID = "0123456789abcdef" * 2
DOCUMENT = "The Council met in Geneva. It agreed on:\n\n1. nothing at all"
QUESTIONS = ("\n\nWhat was agreed?", " And then?", "Where did it meet", "ice cream")
PROSE = [topics["class"], topics["exceptions"], DOCUMENT]

# How Qwen and Llama 3 cut text before they merge bytes.
_SPLIT = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(bos: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_SPLIT, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(PROSE, trainers.BpeTrainer(vocab_size=1000, special_tokens=special, initial_alphabet=alphabet))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin_of_text|>")


def sentencepiece(scheme: str) -> PreTrainedTokenizerFast:
    """scheme: where a text begins with a blank. "normalizer": as Llama 2's own files say it, at the start of each text between added tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        blanks = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        blanks = [decoders.Metaspace(prepend_scheme=scheme), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(blanks)
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        [*PROSE, TEXT], trainers.BpeTrainer(vocab_size=900, special_tokens=special, max_token_length=12)
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    # The trainer takes the tokens of bytes as special ones only. No model's are.
    written = json.loads(tokenizer.to_str())
    written["added_tokens"] = [each for each in written["added_tokens"] if not each["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(written))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def with_blanks(tokenizer: Any) -> Any:
    """Added tokens for runs of blanks, as Gemma and GPT-NeoX have them."""
    tokenizer.add_tokens([AddedToken(blanks, normalized=False) for blanks in ("  ", "   ", "\n\n", "\n\n\n")])
    return tokenizer


KINDS: dict[str, Callable[[Any], Any]] = {
    "smollm2": lambda model_dir: AutoTokenizer.from_pretrained(model_dir),
    "llama2": lambda model_dir: sentencepiece("first"),
    "llama2-legacy": lambda model_dir: sentencepiece("always"),
    "llama2-normalizer": lambda model_dir: sentencepiece("normalizer"),
    "llama3": lambda model_dir: byte_level(bos=True),
    "qwen": lambda model_dir: byte_level(bos=False),
    "gemma": lambda model_dir: with_blanks(sentencepiece("never")),
}


@pytest.fixture(scope="module", params=list(KINDS))
def frontend(request: pytest.FixtureRequest, model_dir: Any) -> Frontend:
    tokenizer = KINDS[request.param](model_dir)
    marker = Marker.register(tokenizer, TEXT)
    return Frontend(settings_from_python({"min_tokens": 4}), marker, vocab_size=len(tokenizer))


def prepare(frontend: Frontend, prompt: str | list[int], context_id: str | None = None) -> Any:
    none = dict.fromkeys(("session_params", "custom_logit_processor", "watermark", "positional_embed_overrides"))
    none |= dict.fromkeys(
        ("multi_item_delimiter_indices", "token_indices_to_pool", "return_routed_experts", "return_indexer_topk")
    )
    params = {} if context_id is None else {"custom_params": {"obcache": {"context_id": context_id}}}
    request = SimpleNamespace(sampling_params=params, return_logprob=False, logprob_start_len=-1, **none)
    ids = prompt if isinstance(prompt, list) else list(frontend.marker.tokenizer(prompt)["input_ids"])
    return frontend.prepare(request, ids)


@pytest.mark.parametrize("asked", QUESTIONS)
def test_a_question_by_id_reads_as_the_rest_of_the_text_does_by_marker(frontend: Frontend, asked: str) -> None:
    by_marker = prepare(frontend, DOCUMENT + TEXT + asked)
    boundary = by_marker.plan.context_len
    by_id = prepare(frontend, TEXT + asked, SOME_ID)
    assert list(by_id.sent_ids) == list(by_marker.sent_ids[boundary:])
    assert list(by_id.plan.before) == []
    assert frontend.marker_id not in by_id.sent_ids


def test_a_question_by_id_that_would_be_answered_without_its_id_is_refused(frontend: Frontend) -> None:
    """Where its `custom_params` are dropped on the way, by a router say, it must be an error as well."""
    for words in ("System: be brief.\n", "Document:\n", "[System] ", DOCUMENT):
        assert prepare(frontend, words + TEXT + " And then?").plan.context_len > 0
        with pytest.raises(RequestError, match="stand before the marker"):
            prepare(frontend, words + TEXT + " And then?", SOME_ID)


# ChatML brings a system message of its own where none is given, as SmolLM2's and Qwen2.5's templates do.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    ),
    "llama2": (
        "{% for m in messages %}{% if m['role'] == 'system' %}<<SYS>>{{ m['content'] }}<</SYS>>{% elif m['role'] == 'user' %}"
        "[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }} {% endif %}{% endfor %}"
    ),
    # The system message inside the first turn, as Llama 2's own, and after words of the template's, as Llama 3.2's.
    "inside": (
        "{% for m in messages %}{% if m['role'] == 'system' %}[INST] <<SYS>>Today is {{ strftime_now('%d %b %Y') }}.\n"
        "{{ m['content'] }}<</SYS>>\n\n{% elif m['role'] == 'user' %}"
        "{% if loop.index == 1 or messages[loop.index0 - 1]['role'] != 'system' %}[INST] {% endif %}{{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }} {% endif %}{% endfor %}"
    ),
}
SYSTEM = {"role": "system", "content": "You know everything about Geneva."}
TURN = [{"role": "user", "content": DOCUMENT}, {"role": "assistant", "content": "I see."}]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_message_that_begins_with_the_marker_has_no_document(kind: str, template: str, model_dir: Any) -> None:
    """A question by id whose `custom_params` were dropped on the way, by a router say: its context would be the template's words."""
    tokenizer = KINDS[kind](model_dir)
    tokenizer.chat_template = TEMPLATES[template]
    frontend = Frontend(settings_from_python({"min_tokens": 4}), Marker.register(tokenizer, TEXT), vocab_size=len(tokenizer))

    def ask(*messages: dict[str, str], context_id: str | None = None) -> Any:
        rendered = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return prepare(frontend, list(tokenizer(rendered, add_special_tokens=False)["input_ids"]), context_id)

    for messages in (
        [user(TEXT + " And then?")],
        [SYSTEM, user(TEXT + " And then?")],
        [user(TEXT + " And then?"), *TURN[1:], user("So?")],
        [SYSTEM, user(TEXT + " And then?"), *TURN[1:], user("So?")],
        [{**SYSTEM, "content": TEXT}, user("And then?")],
        [{**SYSTEM, "content": TEXT + "Be brief."}, user("And then?"), *TURN[1:], user("So?")],
    ):
        with pytest.raises(RequestError, match="no context before it"):
            ask(*messages)
        assert ask(*messages, context_id=SOME_ID).plan.context_id == SOME_ID
    for messages in (
        [user(DOCUMENT + TEXT + " And then?")],
        [{**SYSTEM, "content": SYSTEM["content"] + TEXT}, user("And then?")],
        [{**SYSTEM, "content": "Now:" + TEXT}, user("And then?")],
        [*TURN, user(TEXT + "And then?")],
        [SYSTEM, *TURN, user(TEXT + "And then?")],
    ):
        assert ask(*messages).plan.context_len > 4
        with pytest.raises(RequestError, match="stand before the marker"):
            ask(*messages, context_id=SOME_ID)


def test_without_a_document_before_it_the_marker_is_refused(frontend: Frontend) -> None:
    for prompt, words in ((TEXT + " And then?", "no context before it"), (TEXT, "no context before it|empty")):
        with pytest.raises(RequestError, match=words):
            prepare(frontend, prompt)
    with pytest.raises(RequestError, match="put the marker"):
        prepare(frontend, " And then?", SOME_ID)
    with pytest.raises(RequestError, match="empty"):
        prepare(frontend, TEXT, SOME_ID)


def test_the_marker_as_ordinary_tokens_is_found_or_refused(frontend: Frontend) -> None:
    """As it comes from clients that tokenize with a tokenizer that does not know it."""
    assert frontend.marker is not None
    split = frontend.marker.tokenizer
    for left, right in (("agreed on:", "\n\nWhat?"), ("at all", " And"), ("at all.", "."), ("x<", ">"), ("\n", "A")):
        ids = [*split(left, split_special_tokens=True)["input_ids"]]
        joined = split(left + TEXT + right, split_special_tokens=True)["input_ids"]
        try:
            plan = prepare(frontend, list(joined)).plan
        except RequestError as error:
            if "ordinary tokens" not in str(error):
                raise
            continue
        assert plan is not None, (left, right)
        assert plan.context_len == len(ids)


def test_prose_about_the_marker_is_no_marker(frontend: Frontend) -> None:
    for text in ("obcache is a plugin", "the token |obcache| here", "<|obcache", "obcache " * 500):
        assert prepare(frontend, text * 2).plan is None
    assert frontend.marker.read([]) == ([], {})


OPTIONS = "<|obcache:ratio=0.5, pin|>"


@pytest.mark.parametrize(
    "asked",
    [
        *QUESTIONS,
        "",
        " ",
        "\n",
        ">",
        "|> Why?",
        ", ratio=0.9|>",
        "<",
        "obcache?",
        "é",
        " 北京",
        "a\n\n\n b  c",
        "What?<s>And<s> then?",
    ],
)
def test_a_marker_with_options_cuts_as_the_plain_one(frontend: Frontend, asked: str) -> None:
    """The model reads the same, whatever tokens the options' last characters have become one with."""
    for document in (DOCUMENT, DOCUMENT + "\n\n", DOCUMENT + " <", DOCUMENT + " obcache:"):
        plain, told = prepare(frontend, document + TEXT + asked), prepare(frontend, document + OPTIONS + asked)
        assert list(told.sent_ids) == list(plain.sent_ids)
        assert told.plan.context_len == plain.plan.context_len
        assert (told.plan.settings.compression_ratio, told.plan.pin) == (0.5, True)
        assert (plain.plan.settings.compression_ratio, plain.plan.pin) == (0.7, False)


def test_options_may_begin_with_a_blank(frontend: Frontend) -> None:
    """Which some tokenizers leave out where they decode a text that begins with one."""
    plain, told = (prepare(frontend, DOCUMENT + marker + "\n\nWhat?") for marker in (TEXT, "<|obcache:  ratio=0.5 ,   pin |>"))
    assert list(told.sent_ids) == list(plain.sent_ids)
    assert told.plan.settings.compression_ratio == 0.5


def test_a_question_by_id_may_have_options(frontend: Frontend) -> None:
    plain, told = prepare(frontend, TEXT + " And then?", SOME_ID), prepare(frontend, "<|obcache:ttl=60|> And then?", SOME_ID)
    assert list(told.sent_ids) == list(plain.sent_ids)
    assert told.plan.ttl_seconds == 60 and told.plan.context_id == SOME_ID
    with pytest.raises(RequestError, match="leave out compression_ratio"):
        prepare(frontend, OPTIONS + " And then?", SOME_ID)


def test_each_marker_may_have_a_ratio_of_its_own(frontend: Frontend) -> None:
    settings = settings_from_python({"min_tokens": 4, "gates": "smollm2-135m"})
    frontend = Frontend(settings, frontend.marker, vocab_size=frontend.vocab_size)
    told = prepare(frontend, DOCUMENT + "<|obcache:ratio=0|>" + DOCUMENT + "<|obcache:ratio=0.8,pin|> Why?")
    assert told.plan.settings.segment_ratios == (0.0,) and told.plan.settings.compression_ratio == 0.8 and told.plan.pin
    with pytest.raises(RequestError, match="has 3 context markers, of which 2 have"):
        prepare(frontend, DOCUMENT + "<|obcache:ratio=0|>" + DOCUMENT + TEXT + "<|obcache:ratio=0.8|> Why?")


def test_markers_of_both_forms_are_counted_together(frontend: Frontend) -> None:
    for markers in ((TEXT, OPTIONS), (OPTIONS, TEXT), (OPTIONS, OPTIONS)):
        with pytest.raises(RequestError, match="contains the context marker 2 times"):
            prepare(frontend, DOCUMENT + markers[0] + " And" + markers[1] + " then?")


@pytest.mark.parametrize(
    "wrong", ["<|obcache:|>", "<|obcache:ratio=|>", "<|obcache:ratio=0.5", "<|obcache:ratio|>", "<|obcache:x=1|>"]
)
@pytest.mark.parametrize("end", ["", "\n\nWhat?", "<s>"])
def test_a_marker_that_cannot_be_read_is_refused(frontend: Frontend, wrong: str, end: str) -> None:
    with pytest.raises(RequestError, match=r"context marker (has|with) the option|compression_ratio"):
        prepare(frontend, DOCUMENT + wrong + end)


def test_prose_about_markers_with_options_stays_as_it_is(frontend: Frontend) -> None:
    assert frontend.marker is not None
    for text in (
        "the words `<|obcache:` begin",
        'a "<|obcache:", b "<|obcache:"',
        "it ends with <|obcache:",
        "<|obcache:\n\nx",
    ):
        prepared = prepare(frontend, text)
        assert prepared.plan is None
        assert not frontend.marker.is_special_in(prepared.sent_ids)
        read = frontend.marker.tokenizer.decode(list(prepared.sent_ids), skip_special_tokens=False)
        assert "".join(read.split()).removeprefix("<s>").removeprefix("<|begin_of_text|>") == "".join(text.split())
        marked = prepare(frontend, text + "\n" + OPTIONS + " What?")
        assert marked.plan.settings.compression_ratio == 0.5 and not frontend.marker.is_special_in(marked.sent_ids)


def test_a_marker_with_options_as_ordinary_tokens_is_refused(frontend: Frontend) -> None:
    assert frontend.marker is not None
    for left, right in (("agreed on:", "\n\nWhat?"), ("at all", " And"), ("x<", ">"), ("", "A"), ("obcache", "")):
        for marker in (OPTIONS, "<|obcache:|>", "<|obcache:ratio=0.5"):
            ids = frontend.marker.tokenizer(left + marker + right, split_special_tokens=True)["input_ids"]
            with pytest.raises(RequestError, match="as ordinary tokens, with options"):
                prepare(frontend, list(ids))
    ids = frontend.marker.tokenizer("the words `<|obcache:` begin", split_special_tokens=True)["input_ids"]
    assert prepare(frontend, list(ids)).sent_ids == ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_marker_without_letters_is_found_with_options_too(kind: str, model_dir: Any) -> None:
    """What of it no neighbour merges with is not the same in both forms."""
    tokenizer = KINDS[kind](model_dir)
    frontend = Frontend(settings_from_python({"min_tokens": 4}), Marker.register(tokenizer, "<|#|>"), vocab_size=len(tokenizer))
    assert prepare(frontend, DOCUMENT + "<|#:ratio=0.5|> And?").plan.settings.compression_ratio == 0.5
    with pytest.raises(RequestError, match="as ordinary tokens, with options"):
        prepare(frontend, list(tokenizer(DOCUMENT + "<|#:ratio=0.5|> And?", split_special_tokens=True)["input_ids"]))


def test_a_head_at_the_end_of_a_turn_is_prose(model_dir: Any) -> None:
    """Templates may go on with any special token."""
    tokenizer = KINDS["qwen"](model_dir)
    tokenizer.add_tokens(["[/INST]"], special_tokens=True)
    frontend = Frontend(settings_from_python({"min_tokens": 4}), Marker.register(tokenizer, TEXT), vocab_size=len(tokenizer))
    prepared = prepare(frontend, "[INST] It begins with <|obcache:[/INST]")
    assert prepared.plan is None
    assert tokenizer.decode(list(prepared.sent_ids)) == "[INST] It begins with <|obcache:[/INST]"
    other = KINDS["qwen"](model_dir)
    other.add_tokens(["[/INST]"], special_tokens=True)
    stock = Marker.unregistered(other, TEXT)
    assert not stock.is_plain_in(other("It begins with <|obcache:[/INST]")["input_ids"])
    assert stock.is_plain_in(other("It begins with <|obcache:ratio[/INST]")["input_ids"])


def test_a_marker_of_the_tokenizers_own_tokens_is_found(model_dir: Any) -> None:
    marker = "<|im_end|>#"
    tokenizer = KINDS["smollm2"](model_dir)
    ids = list(tokenizer(DOCUMENT + marker + " And?")["input_ids"])
    frontend = Frontend(settings_from_python({"min_tokens": 4}), Marker.register(tokenizer, marker), vocab_size=len(tokenizer))
    assert prepare(frontend, ids).plan.context_len == len(tokenizer(DOCUMENT)["input_ids"])


def test_options_whose_tokens_are_no_tokenizers_are_refused(frontend: Frontend) -> None:
    """A client that cuts them in its own way: which text it means would be a guess."""
    assert frontend.marker is not None
    tokenizer = frontend.marker.tokenizer
    spelled = [token for letter in "ratio=0.5|>" for token in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    ids = [*tokenizer(DOCUMENT)["input_ids"], frontend.marker.head_id, *spelled]
    with pytest.raises(RequestError, match="cannot be read from the tokens"):
        prepare(frontend, ids)


def test_a_marker_without_bars_takes_no_options(model_dir: Any) -> None:
    tokenizer = KINDS["smollm2"](model_dir)
    marker = Marker.register(tokenizer, "¶¶")
    frontend = Frontend(settings_from_python({"min_tokens": 4, "marker": "¶¶"}), marker, vocab_size=len(tokenizer))
    assert marker.head_id is None
    assert prepare(frontend, DOCUMENT + OPTIONS + " And?").plan is None
    assert prepare(frontend, DOCUMENT + "¶¶:ratio=0.5 And?").plan.settings.compression_ratio == 0.7


def test_a_document_may_name_the_marker_beside_it(frontend: Frontend) -> None:
    """Decoded, its special token is the marker's text too, a few tokens after words that the search for ordinary tokens stops at."""
    for left, right in (("All about\nobcache", " And then?"), ("a|obcache", "obcache?"), ("agreed on:", "obcache|> it is")):
        assert list(prepare(frontend, left + TEXT + right).sent_ids) == [
            *frontend.marker.tokenizer(left)["input_ids"],
            *prepare(frontend, TEXT + right, SOME_ID).sent_ids,
        ]


def test_ids_outside_the_vocabulary_name_the_first_of_them(frontend: Frontend) -> None:
    for wrong in (-1, frontend.vocab_size + 5, 1 << 61):
        with pytest.raises(RequestError, match=f"Token id {wrong} is outside"):
            prepare(frontend, [5, wrong, 6])
    for wrong in (1 << 80, 1.5, "a", None):
        with pytest.raises(RequestError, match="is not a token id"):
            prepare(frontend, [5, wrong])


def test_the_chat_template_that_is_in_use_counts(model_dir: Any) -> None:
    """SGLang sets `--chat-template` when the marker is registered already."""
    tokenizer = KINDS["smollm2"](model_dir)
    marker = Marker.register(tokenizer, TEXT)
    opened = tokenizer("[USER] ", add_special_tokens=False)["input_ids"]
    assert not marker.stands_first(opened)
    tokenizer.chat_template = "{% for message in messages %}[{{ message.role | upper }}] {{ message.content }}[END]{% endfor %}"
    assert marker.stands_first(opened)
    assert not marker.stands_first([*opened, *tokenizer("A document.")["input_ids"]])
