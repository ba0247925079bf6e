"""Hostile requests for `python -m tests.fuzz`: what a client could send by mistake or on purpose, drawn from a seed.

Left out is what ends or stops a server without this package too (`NOT_SENT` says what and why).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from obcache_sglang.frontend.wish import REQUEST_KEYS

MARKER = "<|obcache|>"
MARKERS = (
    *5 * (MARKER,), "<|obcache:ratio=0.5|>", "<|obcache:ratio=0.25, pin,ttl=5|>", "<|obcache:method=tova|>", "<|obcache:|>",
    "<|obcache:ratio=", "<|obcache:\n", "`<|obcache:`", "<|obcache:ttl=\ud800|>",
)  # fmt: skip
"""In the forms in which texts have it, and what looks like it."""

NOT_SENT = {
    "rid HEALTH_CHECK...": "SGLang takes it for a health check of its own, which it drops without an answer while it is busy",
}
"""Requests that stock SGLang does not survive or never answers."""

_VALUES: dict[str, tuple[Sequence[Any], Sequence[Any]]] = {
    "method": (("snapkv", "h2o", "tova", "replay", "streaming", "random"), ("kvzip",)),
    "score": (("attention", "obcache-v", "obcache-k", "obcache-kv"), ("",)),
    "budget": (("uniform", "adakv", "global", "profile"), ("Uniform",)),
    "preset": (("default", "kvpress", "paper"), ("kvzip",)),
    "heads": (("per-head", "shared"), (1,)),
    "pooling": (("none", "average", "max"), (None,)),
    "normalization": (("layer", "none"), ([],)),
    "mode": (("marked", "marked", "prompt"), (True,)),
    "compression_ratio": ((0, 0.3, 0.7, 0.99, 0.999999), (1, -0.1, "0.5")),
    "window": ((1, 8, 64, 8192), (0, "all", 1e3, 10**9)),
    "kernel_size": ((1, 3, 5, 127), (2, 129, 10**12, -1)),
    "sink_tokens": ((0, 4, 10**6), (-1, 1 << 25)),
    "recent_tokens": ((0, 8, 500, 1 << 24), (-1,)),
    "max_kept_tokens": ((1, 16, 1000), (None, 0)),
    "adakv_safeguard": ((0, 0.2, 1), (1.5,)),
    "replay_chunk": ((32, 100, 1 << 20), (31, 1)),
    "replay_attention": (("whole", "local"), ("Local", 1)),
    "segment_ratios": (((), ""), ((1,), (0.5, "x"), [0.1] * 5000, 0.5)),
    "context_len": ((1, 40, 64, 100), (10**6, 0, -1)),
    "pin": ((True, False), ("yes", 1)),
    "ttl_seconds": ((1, 2.5, 60, 366 * 86400), (0, -1, 10**400)),
}
"""What a request may set: (allowed, not allowed)."""

_SCHEMA = json.dumps({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
_SAMPLING: dict[str, tuple[Sequence[Any], Sequence[Any]]] = {
    "temperature": ((0, 0.7, 1.0), (-1,)),
    "max_new_tokens": ((0, 1, 2, 4, 8), (-1,)),
    "n": ((1, 2, 3), (0,)),
    "top_p": ((0.5, 1.0), (0, 2)),
    "top_k": ((1, 40, -1), (0,)),
    "stop": (("the", ["\n", "a"]), ("", [""])),
    "ignore_eos": ((True, False), (3,)),
    "regex": (("[0-9]{1,4}", "(yes|no)"), ("(", "a{2000}")),
    "json_schema": ((_SCHEMA,), ("{", '{"type": "nonsense"}', "true")),
    "ebnf": (('root ::= "a" | "b"',), ("root ::=",)),
    "frequency_penalty": ((0.5,), (3,)),
    "min_new_tokens": ((0, 1), (-1,)),
    "logit_bias": (({"11": 5.0}, {}), ({"x": 1}, {"1000000": 1})),
}
"""Likewise."""


@dataclass(frozen=True)
class Attempt:
    """One request. hang_up: the client goes after so many seconds, answered or not; None: it waits for its answer.

    foreign: it names a context of somebody else, so that it must not be answered with one.
    """

    method: str
    path: str
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    hang_up: float | None = None
    foreign: bool = False

    def __str__(self) -> str:
        body = b"" if self.body is None else self.body
        shown = body if len(body) < 3000 else body[:1500] + b" ... " + body[-1500:]
        return f"{self.method} {self.path} {self.params or ''} {self.headers or ''} {shown!r}"


# Of a client's own. They would run in the server's process.
_TEMPLATES = (
    "{{ messages }}",
    "{{ 1 / 0 }}",
    "{% for a in range(10 ** 8) %}{{ a }}{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{%",
    7,
)


class Hostile:
    """Draws attempts.

    token_ids: of a long text, that prompts are cut from; words: a text likewise. marker_id, plain: the marker as one token, and as
    the ordinary ones of its text. own_ids: context ids that this client was told, filled by whoever sends; foreign_ids: of others.
    """

    def __init__(
        self, seed: str, *, words: str, token_ids: list[int], marker_id: int, plain: list[int], foreign_ids: list[str]
    ) -> None:
        self.random = random.Random(seed)
        self.words, self.token_ids, self.marker_id, self.plain = words, token_ids, marker_id, plain
        self.own_ids: list[str] = []
        self.foreign_ids = foreign_ids
        self._foreign = False
        self._calm = False

    def attempt(self) -> Attempt:
        self._foreign = False
        # Half of all are what an honest client would send, so that there are contexts and answers to attack.
        self._calm = self._one_in(2)
        kinds: list[tuple[int, Callable[[], Attempt]]] = [
            (36, self._generate),
            (12, self._completions),
            (12, self._chat),
            (16, self._compress),
            (14, self._contexts),
            (6, self._other),
            (5, self._control),
            (4, self._garbage),
        ]
        (kind,) = self.random.choices([make for _, make in kinds], [weight for weight, _ in kinds])
        attempt = kind()
        hang_up = round(self.random.uniform(0.01, 1.5), 3) if self._one_in(8) else attempt.hang_up
        return Attempt(**{**attempt.__dict__, "hang_up": hang_up, "foreign": self._foreign})

    # --- small things -----------------------------------------------------------------------------------------------

    def _one_in(self, n: int) -> bool:
        return self.random.random() * n < 1

    def _pick(self, values: Sequence[Any]) -> Any:
        # Not random.choice, which draws more or less often depending on how many there are: own_ids differ from run to run.
        return values[int(self.random.random() * len(values))]

    def _value(self, table: dict[str, tuple[Sequence[Any], Sequence[Any]]], key: str) -> Any:
        allowed, wrong = table[key]
        return self._pick(wrong if not self._calm and self._one_in(6) else allowed)

    def junk(self, depth: int = 0) -> Any:
        """A value that hardly any field expects."""
        simple = [
            None, True, False, 0, -1, 1, 3.7, 2**31, 2**63, -(2**63) - 1, 2**64, 10**400, 1e308, -0.0, 5e-324,
            float("nan"), float("inf"), float("-inf"), "", "x", "\ud800", "\udfff\ud800", "\0", "\n\r\n", "é\u0301\u202e🙂",
            "a" * 20_000, MARKER, "null", "NaN", "-1", "../../etc/passwd", "%s%n{}", [], {}, [[]], {"": None},
        ]  # fmt: skip
        if depth > 2 or not self._one_in(4):
            return self._pick(simple)
        if self._one_in(6):
            nested: Any = 1
            for _ in range(self._pick((30, 300))):
                nested = [nested] if self._one_in(2) else {"a": nested}
            return nested
        items = [self.junk(depth + 1) for _ in range(self._pick((1, 2, 5)))]
        return (
            items
            if self._one_in(2)
            else {str(self._pick(("a", "\ud800", "obcache", "0", ""))) + str(i): x for i, x in enumerate(items)}
        )

    def _spoiled(self, body: dict[str, Any]) -> dict[str, Any]:
        """With some value somewhere in it replaced, taken away or put in."""
        if self._calm:
            return body
        for _ in range(self._pick((0, 0, 0, 1, 1, 2, 4))):
            target = body
            while (inner := [v for v in target.values() if isinstance(v, dict) and v]) and self._one_in(2):
                target = self._pick(inner)
            key = self._pick(list(target)) if target and not self._one_in(5) else self._pick(("x", "", "obcache", "\ud800"))
            if self._one_in(6):
                target.pop(key, None)
            else:
                target[key] = self.junk()
        return body

    def _id(self) -> Any:
        kind = "own" if self._calm else self._pick(("own", "own", "foreign", "made up", "wrong"))
        if kind == "foreign" and self.foreign_ids:
            self._foreign = True
            return self._pick(self.foreign_ids)
        if kind == "own" and self.own_ids:
            return self._pick(self.own_ids)
        if kind == "wrong":
            return self._pick(("0" * 31, "0" * 33, "G" * 32, "A" * 32, "", "0" * 32 + "\n", "../contexts", "%00", "é" * 32, " "))
        return "".join(self._pick("0123456789abcdef") for _ in range(32))

    def _rid(self) -> Any:
        return self._pick(
            ("same", "same", "a\nb", "\r\nX: y", "obcache-job-0", 'obcache:{"op":"status"}', "\ud800", "", "é", "x" * 5000, None,
             ["a", "b"], ["a", "a"], 7, "a", "obcache", "{}", "compress-0", "0" * 32)
        )  # fmt: skip

    def wish(self) -> Any:
        """custom_params["obcache"]."""
        if not self._calm and self._one_in(10):
            return self.junk()
        if self._one_in(6):
            return self._pick((True, False, None))
        keys = [key for key in _VALUES if key not in (("context_len", "preset", "mode") if self._calm else ())]
        wish = {key: self._value(_VALUES, key) for key in self.random.sample(keys, self._pick((0, 1, 1, 2, 3)))}
        if not self._calm and self._one_in(4):
            wish["context_id"] = self._id()
            if not self._one_in(5):
                wish = {key: wish[key] for key in wish if key in ("context_id", "pin", "ttl_seconds")}
        if not self._calm and self._one_in(20):
            wish[self._pick(("ratio", "", "\ud800", "Context_Id", *REQUEST_KEYS))] = self.junk()
        return wish

    # --- prompts ----------------------------------------------------------------------------------------------------

    def text(self) -> str:
        if self._calm:
            first, length = self._pick((0, 0, 0, 100, 2000)), self._pick((300, 300, 600, 1500))
            return self.words[first : first + length] + MARKER + self._pick((" So", "\n\nIn short,", "?", "\n\nThis means that"))
        length = self._pick((0, 3, 40, 300, 300, 600, 600, 1500, 1500)) if not self._one_in(60) else 200_000
        first = self._pick((0, 0, 0, 100, 2000))
        text = self.words[first : first + length] if length < 20_000 else self.words * 4
        for _ in range(self._pick((0, 0, 1, 1, 1, 1, 1, 2, 3))):
            place = self._pick((0, len(text), len(text), len(text) // 2, int(self.random.random() * (len(text) + 1))))
            text = text[:place] + self._pick(MARKERS) + text[place:]
        if self._one_in(2):
            text += self._pick((" So", "\n\nIn short,", "?", " 🙂", "\ud800", "\0", "<|im_end|>", "<|obcache", "|>"))
        return text

    def ids(self) -> list[Any]:
        if self._calm:
            first, length = self._pick((0, 0, 0, 50, 700)), self._pick((50, 80, 150, 150, 400))
            marker = self.plain if self._one_in(4) else [self.marker_id]
            return [*self.token_ids[first : first + length], *marker, *self.token_ids[: self._pick((1, 3, 9))]]
        first = self._pick((0, 0, 0, 50, 700))
        ids: list[Any] = self.token_ids[first : first + self._pick((0, 1, 33, 80, 150, 150, 400))]
        for _ in range(self._pick((0, 0, 1, 1, 1, 2))):
            place = self._pick((0, len(ids), len(ids) // 2))
            ids[place:place] = self.plain if self._one_in(3) else [self.marker_id]
        ids += self.token_ids[: self._pick((0, 1, 3, 9))]
        if self._one_in(8):
            wrong = (
                -1,
                2**31,
                2**61,
                2**61 + 5,
                2**62,
                2**63,
                49152,
                49153,
                10**9,
                -(2**40),
                1.5,
                "1",
                None,
                True,
                [1],
                float("nan"),
            )
            ids.insert(self._pick((0, len(ids))), self._pick(wrong))
        return ids

    def _prompts(self, one: Callable[[], Any]) -> Any:
        if not self._one_in(6):
            return one()
        prompts = [one() for _ in range(self._pick((1, 2, 3, 8) if self._calm else (0, 1, 3)))]
        return [*prompts, self.junk()] if not self._calm and self._one_in(8) else prompts

    # --- endpoints --------------------------------------------------------------------------------------------------

    def _json(self, path: str, body: Any, **fields: Any) -> Attempt:
        encoded = json.dumps(body).encode()
        return Attempt("POST", path, encoded, {"Content-Type": "application/json", **fields.pop("headers", {})}, **fields)

    def _common(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self._one_in(4):
            fields["rid"] = "same" if self._calm else self._rid()
        if self._one_in(4):
            fields["stream"] = self._calm or self._pick((True, True, False, "yes", 1))
        if self._one_in(4):
            fields["cache_salt"] = "hostile" if self._calm else self._pick(("other", "", "\ud800", ["a", "b"], 3, "ordinary"))
        if self._one_in(6):
            fields["extra_key"] = "hostile" if self._calm else self._pick(("hostile", "", "\ud800", ["a"], 3))
        if not self._calm and self._one_in(6):
            name = self._pick(
                ("lora_path", "session_params", "session_id", "custom_logit_processor", "priority", "watermark", "input_embeds",
                 "return_hidden_states", "routed_dp_rank", "data_parallel_rank", "return_routed_experts", "background", "beam_width",
                 "positional_embed_overrides", "return_prompt_token_ids", "return_bytes", "modalities", "image_data", "kv_hints")
            )  # fmt: skip
            fields[name] = self._pick((True, {"id": "s", "rid": None}, "x", [1], self.junk()))
        return fields

    def _params(self) -> dict[str, Any]:
        params: dict[str, Any] = {"max_new_tokens": self._pick((1, 2, 4, 8)), "temperature": 0}
        for key in self.random.sample([*_SAMPLING], self._pick((0, 0, 0, 1, 2))):
            params[key] = self._value(_SAMPLING, key)
        if self._one_in(2):
            params["custom_params"] = {"obcache": self.wish()} if self._calm or not self._one_in(15) else self.junk()
        return params

    def _generate(self) -> Attempt:
        if self._calm and self.own_ids and self._one_in(3):
            wish = {"context_id": self._id(), "pin": self._one_in(3)}
            params = {"max_new_tokens": 4, "temperature": 0, "custom_params": {"obcache": wish}}
            return self._json(
                "/generate", {"text": MARKER + self._pick((" So", " In short,")), "sampling_params": params, **self._common()}
            )
        body: dict[str, Any] = {"sampling_params": self._params(), **self._common()}
        if not self._calm and self._one_in(12):
            body["sampling_params"] = [self._params() for _ in range(self._pick((1, 2, 3)))]
        body["text" if self._one_in(2) else "input_ids"] = "x"
        for key, one in (("text", self.text), ("input_ids", self.ids)):
            if key in body or (not self._calm and self._one_in(20)):
                body[key] = self._prompts(one)
        if self._one_in(5):
            body["return_logprob"] = True
            body["logprob_start_len"] = self._pick((-1, 0, 5, 100, 150, 10**6))
            body["top_logprobs_num"] = self._pick((0, 1, 5))
        return self._json("/generate", self._spoiled(body))

    def _openai(self) -> dict[str, Any]:
        params = self._params()
        params["max_tokens"] = params.pop("max_new_tokens")
        for key in ("min_new_tokens", "json_schema"):
            params.pop(key, None)
        return {"model": "default" if self._calm else self._pick(("default", "default:x", "")), **params, **self._common()}

    def _completions(self) -> Attempt:
        prompt = self._prompts(self.text if self._one_in(2) else self.ids)
        body = {**self._openai(), "prompt": prompt}
        for key, values in (("echo", (True,)), ("logprobs", (0, 3)), ("suffix", ("x",)), ("best_of", (2,)), ("seed", (3,))):
            if self._one_in(6):
                body[key] = self._pick(values)
        return self._json("/v1/completions", self._spoiled(body))

    def messages(self) -> Any:
        messages: list[Any] = [
            {"role": "system", "content": self.text()},
            {"role": "user", "content": "So?" if self._calm else self.text()},
        ]
        if not self._calm and self._one_in(4):
            messages[0]["content"] = [{"type": "text", "text": self.text()}, {"type": "text", "text": "b"}]
        if not self._calm and self._one_in(4):
            messages.insert(
                self._pick((0, 1, 2)), self._pick(({"role": "assistant", "content": MARKER}, {"role": "user"}, {}, self.junk()))
            )
        return messages

    def _chat(self) -> Attempt:
        body = {**self._openai(), "messages": self.messages()}
        for key, values in (
            ("logprobs", (True,)),
            ("top_logprobs", (2,)),
            ("tools", ([{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],)),
            ("tool_choice", ("required", "auto", "none")),
            ("response_format", ({"type": "json_object"}, {"type": "x"})),
            ("continue_final_message", (True,)),
            (
                "chat_template_kwargs",
                ({"add_generation_prompt": False}, {"x": 1}, *({"chat_template": each} for each in _TEMPLATES)),
            ),
        ):
            if self._one_in(8):
                body[key] = self._pick(values)
        return self._json("/v1/chat/completions", self._spoiled(body))

    def _compress(self) -> Attempt:
        wish = self.wish()
        body: dict[str, Any] = (
            {k: v for k, v in wish.items() if k != "context_len"} if isinstance(wish, dict) else {"method": wish}
        )
        kind = self._pick(("text", "input_ids", "messages"))
        body[kind] = {"text": self.text, "input_ids": self.ids, "messages": self.messages}[kind]()
        common = self._common()
        body.update({key: common[key] for key in ("stream", "cache_salt", "extra_key", "lora_path") if key in common})
        return self._json("/obcache/compress", self._spoiled(body))

    def _contexts(self) -> Attempt:
        headers = {}
        if self._one_in(2):
            name = self._pick(("X-Cache-Salt", "X-Extra-Key", "X-Lora-Path"))
            headers[name] = self._pick(("hostile", "other", "", "x" * 4000, "ordinary"))
        params = {}
        if self._one_in(3):
            params["positions"] = self._pick(("true", "1", "maybe", "", "nan"))
        if self._one_in(3):
            params["wait_seconds"] = self._pick(("0", "0.2", "-1", "nan", "inf", "1e400", "x", "10000"))
        where = self._pick(("", "", "/", "/by-name/", "/", "/by-name"))
        path = "/obcache/contexts" + where + (str(self._id()) if where.endswith("/") else "")
        method = self._pick(("GET", "GET", "GET", "DELETE", "PUT"))
        return Attempt(method, path, None, headers, params, hang_up=5.0 if method == "DELETE" else None)

    def _control(self) -> Attempt:
        kind = self._pick(("abort", "abort", "abort", "status", "status", "loads", "health", "flush", "all"))
        match kind:
            case "abort":
                return self._json("/abort_request", self._spoiled({"rid": self._rid()}))
            case "all" if self._one_in(3):
                return self._json("/abort_request", {"rid": "", "abort_all": True})
            case "flush":
                return Attempt(
                    "POST", "/flush_cache", params={"timeout": self._pick(("0", "0.1", "1", "-1", "nan"))}, hang_up=8.0
                )
            case "loads":
                return Attempt("GET", "/v1/loads")
            case "health":
                return Attempt("GET", "/health")
        return Attempt(self._pick(("GET", "GET", "POST")), "/obcache/status", params={"x": "1"} if self._one_in(3) else {})

    def _other(self) -> Attempt:
        params = self._params()
        bodies: list[tuple[str, dict[str, Any]]] = [
            (
                "/v1/score",
                {"query": self.text(), "items": [self.text(), "b"], "label_token_ids": self._pick(([1, 2], [10**9], [-1]))},
            ),
            ("/v1/responses", {"model": "default", "input": self.text(), "max_output_tokens": 4}),
            ("/v1/messages", {"model": "default", "max_tokens": 4, "messages": [{"role": "user", "content": self.text()}]}),
            ("/tokenize", {"model": "default", "prompt": self.text()}),
            ("/detokenize", {"model": "default", "tokens": self.ids()}),
            ("/v1/embeddings", {"model": "default", "input": self.text()}),
            ("/encode", {"text": self.text()}),
            ("/classify", {"text": self.text()}),
            ("/api/generate", {"model": "default", "prompt": self.text(), "stream": False, "options": {"num_predict": 3}}),
            ("/vertex_generate", {"instances": [{"text": self.text()}], "parameters": {"sampling_params": params}}),
        ]
        path, body = self._pick(bodies)
        return self._json(path, self._spoiled(body), hang_up=20.0)

    def _garbage(self) -> Attempt:
        path = self._pick(("/generate", "/v1/completions", "/v1/chat/completions", "/obcache/compress", "/abort_request"))
        body = self._pick(
            (b"", b"{", b"null", b"[]", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{}", b'{"text": "\xff"}', b"1" * 6000, b'"x"',
             b'{"text": "a", "text": "<|obcache|>"}', b'{"input_ids": [' + b"9" * 5000 + b"]}", b'{"text": "a"}\0', b"{}" * 3,
             b'{"text": "' + b"a " * 1_000_000 + b'"}')
        )  # fmt: skip
        kind = self._pick(
            ("application/json", "application/json", "text/plain", "multipart/form-data", "application/json; charset=utf-16")
        )
        return Attempt("POST", path, body, {"Content-Type": kind})
