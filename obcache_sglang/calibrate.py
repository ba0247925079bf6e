"""`python -m obcache_sglang.calibrate MODEL --text FILE...`: measures how much each KV head needs, and writes a head profile.

Each text is put into the user's turn of the chat template and scored by replay, as `--obcache-method replay` does: the model reads
the text again, and the queries of this second reading score its tokens. The scores are divided by the mean squared norm of their layer's
outputs (not weighted per query, as budget `global` does: profiles that were measured that way kept fewer needles). The tokens with the
highest scores across all heads and layers are kept. The share that each head gets of them, averaged over the texts, is its share in the
profile. No server is needed: the model runs in transformers, on the GPU if there is one (in the checkpoint's dtype), else on the CPU
(in float32).

With `--gates` the same scores also make gates (`compress.gates`): what each head's scores are, as a function of a token's own K and V. Every
fifth text is first left out, to say how well the gates of the others predict its scores. Of fewer than five texts, every fifth part is.

`--obcache-head-profile auto` and `--obcache-gates auto` run this before the server starts, once per model.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from importlib.metadata import distributions, version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from obcache_sglang import __version__
from obcache_sglang.compress.calibration import (
    DEFAULT_MAX_TOKENS,
    DEFAULT_RATIOS,
    GATE_TOKENS,
    HELD_OUT,
    MIN_TOKENS,
    Findings,
    is_left_out,
    normalised,
    scoring_settings,
    text_parts,
)
from obcache_sglang.compress.gates import GateFile
from obcache_sglang.compress.head_profile import HeadProfile, ModelIdentity
from obcache_sglang.compress.replay import ReplayPrompts
from obcache_sglang.compress.rotary import rotated_back
from obcache_sglang.compress.scores import ScoringQueries, accumulate_scores
from obcache_sglang.errors import ConfigError, HostError, ObcacheError
from obcache_sglang.settings import CompressionSettings

SCORES = ("obcache-v", "attention")
"""The scores that a profile may be measured with. The key terms of the other scores mislead under replay."""

DEFAULT_TOPICS = ("compound", "typesseq", "specialnames")
"""The default texts: chapters of Python's documentation, from `pydoc_data`."""

_GATE_CHARACTERS = 4500
_GATE_TEXTS = 48
_ATTENTION = "obcache_calibrate"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1, with the reason on stderr, when no profile was written."""
    given = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m obcache_sglang.calibrate", description=(__doc__ or "").split(": ", 1)[1].split("\n\n")[0]
    )
    parser.add_argument("model", help="model directory, or its name on the Hugging Face Hub")
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="texts like those to be served (default: chapters of Python's manual)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where to write the profile (default: MODEL.head-profile.json, or none with --gates)",
    )
    parser.add_argument(
        "--gates",
        type=Path,
        metavar="FILE",
        help="make gates too, and write them with the profile to this file; five texts or more",
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=list(DEFAULT_RATIOS), help="default: 0.3 0.5 0.7 0.8 0.9")
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"tokens read of each text (default: {DEFAULT_MAX_TOKENS}; with --gates, texts are cut into parts of {GATE_TOKENS})",
    )
    parser.add_argument("--score", choices=SCORES, default=SCORES[0], help="how a query scores a token (default: obcache-v)")
    arguments = parser.parse_args(given)
    wants_gates = arguments.gates is not None
    output = arguments.output or (None if wants_gates else Path(f"{Path(arguments.model).name}.head-profile.json"))
    try:
        for file in (output, arguments.gates):
            if file is not None and not file.absolute().parent.is_dir():
                raise ConfigError(f"{file} cannot be written: there is no directory {file.parent}. Make it first.")
        texts = [_read(file) for file in arguments.text or ()]
        profile, gates = calibrate(
            arguments.model,
            texts or (_gate_texts() if wants_gates else [topics[name] for name in DEFAULT_TOPICS]),
            ratios=arguments.ratios,
            max_tokens=arguments.max_tokens or (GATE_TOKENS if wants_gates else DEFAULT_MAX_TOKENS),
            score=arguments.score,
            command=_command(given),
            with_gates=wants_gates,
        )
        written = []
        if output is not None:
            profile.save(output)
            written.append(output)
        if gates is not None:
            gates.save(arguments.gates)
            written.append(arguments.gates)
            held_out = gates.r_squared
            print(f"calibrate: R^2 of the gates on texts left out: mean {held_out.mean():.2f}, lowest head {held_out.min():.2f}")
    except (ObcacheError, OSError) as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return 1
    print(f"calibrate: {' and '.join(map(str, written))} written")
    return 0


def _gate_texts() -> list[str]:
    """The beginnings of what the packages installed beside this one say about themselves: READMEs, of many hands and kinds.

    What gates are made with decides: chapters of Python's manual alone kept fewer needles (launch/results/quality.md).
    """
    descriptions = {each.name.lower(): str(each.metadata.json.get("description", "")) for each in distributions()}
    texts = [text[:_GATE_CHARACTERS] for _, text in sorted(descriptions.items()) if len(text) >= _GATE_CHARACTERS]
    return texts[:_GATE_TEXTS]


def calibrate(
    model_name: str,
    texts: Sequence[str],
    *,
    ratios: Sequence[float],
    max_tokens: int,
    score: str,
    command: str,
    with_gates: bool = False,
) -> tuple[HeadProfile, GateFile | None]:
    """The head profile of a model from these texts, and its gates if asked for; prints its progress.

    model_name: directory or Hugging Face name.
    ratios: compression ratios in (0, 1), in any order.
    max_tokens: read of each text; for gates a longer text is cut into several.
    score: one of `SCORES`.
    command: how to make the profile again, for the record.

    Memory, in addition to the model: the KV cache of one text, its scores ([layers, kv_heads, tokens] float32) and the scratch of one
    layer's attention and scoring. Raises ConfigError and HostError; OSError if transformers cannot load the model.
    """
    ratios = sorted(set(ratios))
    if not 0 < ratios[0] <= ratios[-1] < 1:
        raise ConfigError(f"--ratios {' '.join(map(str, ratios))}: compression ratios must be between 0 and 1.")
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    prompts = ReplayPrompts(tokenizer)
    parts = [
        (number, each)
        for number, text in enumerate(texts, 1)
        for each in text_parts(tokenizer, prompts, text, max_tokens, whole=with_gates)
    ]
    contexts = [context for _, context in parts]
    _check_lengths([len(context) for context in contexts], prompts, AutoConfig.from_pretrained(model_name))
    if with_gates and len(contexts) < HELD_OUT:
        raise ConfigError(
            f"--gates has {len(contexts)} texts of up to {max_tokens} tokens. Give {HELD_OUT} or more, or longer ones."
        )
    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype="auto" if on_gpu else torch.float32)
    replay = Replay(model.to("cuda" if on_gpu else "cpu"), score)
    if with_gates:
        replay.check_rotation()

    findings = Findings(ModelIdentity.of(model.config), ratios=ratios, with_gates=with_gates)
    for number, (of_text, context) in enumerate(parts, 1):
        started_at = time.perf_counter()
        print(f"calibrate: text {number} of {len(contexts)}, {len(context)} tokens", flush=True)
        scores = replay.score(context, prompts)
        findings.add(scores, replay.keys_values(), left_out=is_left_out(of_text, number, len(texts)))
        print(f"calibrate: text {number} took {time.perf_counter() - started_at:.1f} s", flush=True)
    made = {
        "command": command,
        "method": "replay",
        "score": score,
        "texts": findings.num_texts,
        "tokens": findings.num_tokens,
        "versions": {"obcache_sglang": __version__} | {name: version(name) for name in ("torch", "transformers")},
    }
    if not with_gates:
        return findings.profile(made), None
    file = findings.gate_file(*findings.solve(), made)
    return file.profile, file


class Replay:
    """A model that scores a context while it reads the context again.

    model: from transformers; its attention is replaced with ours. heads: (layers, KV heads).
    """

    def __init__(self, model: Any, score: str) -> None:
        self.model = model
        text = model.config.get_text_config()
        self.heads = (text.num_hidden_layers, getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
        self._settings = scoring_settings(score)
        # Sums over the passes after the current context: its scores [layers, kv_heads, tokens], None while the context itself is
        # read, and the squared norms of each layer's attention outputs [layers].
        self._scores: torch.Tensor | None = None
        self._output_sq = torch.zeros(text.num_hidden_layers)
        AttentionInterface.register(_ATTENTION, self._attention)
        AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
        model.set_attn_implementation(_ATTENTION)

    @torch.no_grad()
    def score(
        self, context: array[int], prompts: ReplayPrompts, chunk_tokens: int = CompressionSettings.replay_chunk
    ) -> torch.Tensor:
        """The scores [layers, kv_heads, len(context)] float32 of a context's tokens; obcache scores are normalised per layer.

        chunk_tokens: how many tokens the model reads at a time.
        """
        self._cache = cache = DynamicCache(config=self.model.config)
        for first in range(0, len(context), chunk_tokens):
            self._read(context[first : first + chunk_tokens], cache)
        device = self.model.device
        self._scores = scores = torch.zeros(*self.heads, len(context), dtype=torch.float32, device=device)
        self._output_sq = torch.zeros(self.heads[0], dtype=torch.float32, device=device)
        try:
            for replayed in prompts.passes(context, chunk_tokens):
                self._read(replayed.tokens, cache)
                cache.crop(-len(replayed.tokens))
                print(f"calibrate:   {replayed.last} of {len(context)} tokens re-read", flush=True)
        finally:
            self._scores = None
        if self._settings.score != "attention":
            normalised(scores, self._output_sq)
        return scores

    def check_rotation(self) -> None:
        """Raises HostError if `keys_values` would not undo what this model's layers do to K."""
        attention = next(module for module in self.model.modules() if hasattr(module, "layer_idx") and hasattr(module, "k_proj"))
        rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        k = torch.randn(1, 1, 16, attention.head_dim, device=self.model.device)
        cos, sin = self.model.base_model.rotary_emb(k, torch.arange(16, device=k.device)[None])
        if rotate is not None:
            rotated = rotate(k, k, cos, sin)[1][0].transpose(0, 1)
            cos, sin = (each[0].chunk(2, dim=-1)[0] for each in (cos, sin))
            if torch.allclose(rotated_back(rotated, cos, sin), k[0].transpose(0, 1), atol=1e-4):
                return
        raise HostError(
            f"gates cannot be made of a {type(self.model).__name__}: its rotary embedding is not that of Llama and Qwen models. "
            "Measure a head profile without --gates."
        )

    def keys_values(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of each layer, K before RoPE and V [tokens, kv_heads, head_dim] of the context that was scored last."""
        for layer in self._cache.layers:
            k, v = layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)
            positions = torch.arange(len(k), device=k.device)[None]
            # As `check_rotation` has seen: halves are rotated, each angle stands in both.
            cos, sin = (each[0].chunk(2, dim=-1)[0] for each in self.model.base_model.rotary_emb(v, positions))
            yield rotated_back(k, cos, sin), v

    def _read(self, tokens: array[int], cache: DynamicCache) -> None:
        # Without the output layer: the logits of all tokens would need more memory than everything else.
        self.model.base_model(input_ids=torch.tensor([tokens], device=self.model.device), past_key_values=cache, use_cache=True)

    def _attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        *,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """SDPA; in a pass after the context, its queries then score. query, key, value: [1, heads, tokens, head_dim], after RoPE."""
        unsupported = [name for name in ("softcap", "sliding_window") if kwargs.get(name) is not None]
        if unsupported:
            raise HostError(
                f"the model's attention uses {' and '.join(unsupported)}, which --obcache does not support: serve another model."
            )
        output: torch.Tensor
        output, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
        if self._scores is not None:
            q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
            queries = ScoringQueries(q, len(k) - len(q), scaling)
            mine, settings = self._scores[module.layer_idx], self._settings
            accumulate_scores(mine, queries, k, v, score=settings.score, reduce=settings.reduce)
            self._output_sq[module.layer_idx] += output.float().square().sum()
        return output, None


def max_positions(config: Any) -> float:
    """How many positions this configuration's model has; infinite if it gives no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def _check_lengths(lengths: Sequence[int], prompts: ReplayPrompts, config: Any) -> None:
    limit = max_positions(config)
    for number, num_tokens in enumerate(lengths, 1):
        if num_tokens < MIN_TOKENS:
            raise ConfigError(
                f"text {number} has {num_tokens} tokens, too few to measure heads with. Give at least {MIN_TOKENS}."
            )
        longest = num_tokens + prompts.num_tokens + min(num_tokens, CompressionSettings.replay_chunk)
        if longest > limit:
            raise ConfigError(
                f"text {number} has {num_tokens} tokens, which the model reads again after the text. That takes {longest} positions, and "
                f"the model has {limit}. Lower --max-tokens by {longest - limit} or more."
            )


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text {file} is not UTF-8 text ({error}).") from error


def _command(given: list[str]) -> str:
    """The command line, with names of local files in place of their paths, which mean nothing on another machine."""
    words = [Path(word).name if Path(word).exists() or Path(word).is_absolute() else word for word in given]
    return shlex.join(["python", "-m", "obcache_sglang.calibrate", *words])


if __name__ == "__main__":
    sys.exit(main())
