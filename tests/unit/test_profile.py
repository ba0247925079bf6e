"""Head profiles: what they say about a context's heads, what is refused, and how they are measured."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AttentionInterface, AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from obcache_sglang import calibrate, measured_files, plugin
from obcache_sglang.compress import reference
from obcache_sglang.compress.calibration import kept_shares
from obcache_sglang.compress.head_profile import AUTO, PACKAGED, HeadProfile, ModelIdentity
from obcache_sglang.compress.ranking import keep_across_heads, rank_positions
from obcache_sglang.compress.replay import ReplayPrompts
from obcache_sglang.errors import ConfigError, HostError
from obcache_sglang.eval.prose import opticks
from obcache_sglang.settings import settings_from_python

PACKAGED_NAME = "smollm2-135m"
RATIOS = [0.3, 0.5, 0.9]


def model_config(**changes: Any) -> LlamaConfig:
    shape = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "vocab_size": 128}
    return LlamaConfig(**(shape | {"head_dim": 8, "intermediate_size": 48, "architectures": ["LlamaForCausalLM"]} | changes))


def profile_of(shares: Any, ratios: list[float]) -> HeadProfile:
    """A profile of a model with these shares [ratios][layers][kv_heads]."""
    shares = np.asarray(shares)
    config = model_config(num_hidden_layers=shares.shape[1], num_key_value_heads=shares.shape[2])
    return HeadProfile(ModelIdentity.of(config), ratios, shares.tolist(), {"command": "python -m obcache_sglang.calibrate"})


@pytest.fixture
def profile() -> HeadProfile:
    """Six heads: one that keeps all at 0.5, one that keeps nothing at 0.9."""
    shares = [
        [[1.0, 0.9], [0.8, 0.5], [0.6, 0.4]],
        [[1.0, 0.8], [0.5, 0.1], [0.45, 0.15]],
        [[0.4, 0.1], [0.06, 0.0], [0.02, 0.02]],
    ]
    return profile_of(shares, RATIOS)


# --- what a context's heads keep ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_len", [1, 7, 333, 1000, 40961])
@pytest.mark.parametrize("lanes", [None, (0, 1), (1, 2)])
def test_counts_are_exact(profile: HeadProfile, context_len: int, lanes: tuple[int, int] | None) -> None:
    for percent in (*range(0, 100, 3), 50):  # 30 and 90 among them: the recorded ratios, all between and both ends
        num_slots = max(1, int(context_len * (1 - percent / 100)))
        for floor in {0, min(4, num_slots), num_slots}:
            counts = profile.counts(context_len, num_slots, floor, lanes)
            assert len(counts) == (6 if lanes is None else 3)
            assert sum(counts) == num_slots * len(counts)
            assert all(floor <= count <= context_len for count in counts), (percent, floor)


def test_counts_are_the_recorded_shares(profile: HeadProfile) -> None:
    assert profile.counts(1000, 700) == [1000, 900, 800, 500, 600, 400]
    assert profile.counts(1000, 500) == [1000, 800, 500, 100, 450, 150]
    assert profile.counts(1000, 100) == [400, 100, 60, 0, 20, 20]


def test_counts_between_the_recorded_ratios(profile: HeadProfile) -> None:
    assert profile.counts(1000, 600) == [1000, 850, 650, 300, 525, 275]
    assert profile.counts(1000, 1000) == [1000] * 6
    assert profile.counts(1000, 850) == [1000, 950, 900, 750, 800, 700]  # half-way to keeping all
    assert profile.counts(1000, 50) == [200, 50, 30, 0, 10, 10]  # half-way to keeping nothing
    assert profile.counts(1000, 0) == [0] * 6


def test_floors_are_paid_by_the_other_heads_in_proportion(profile: HeadProfile) -> None:
    counts = profile.counts(1000, 100, floor=30)
    assert counts[3:] == [30, 30, 30]
    # 510 tokens are left for heads with shares 0.4, 0.1 and 0.06.
    assert counts[:3] == [364, 91, 55]
    assert profile.counts(1000, 100, floor=100) == [100] * 6


def test_a_full_head_takes_no_more(profile: HeadProfile) -> None:
    """Floors and the slice of a rank move tokens; what a full head cannot take goes to the others."""
    assert profile.counts(1000, 500, lanes=(0, 1)) == [769, 385, 346]
    assert profile.counts(1000, 700, lanes=(0, 1)) == [875, 700, 525]
    assert profile.counts(1000, 700, lanes=(1, 2)) == [1000, 611, 489]


def test_fractions_go_to_the_largest_remainder_then_the_earlier_head() -> None:
    even = profile_of(np.full((1, 2, 2), 0.5), [0.5])
    assert even.counts(7, 3) == [3, 3, 3, 3]
    thirds = profile_of([[[0.75, 0.25, 0.5]]], [0.5])
    assert thirds.counts(6, 3) == [5, 1, 3]  # 4.5, 1.5, 3
    assert profile_of([[[0.75, 0.15, 0.6]]], [0.5]).counts(6, 3) == [4, 1, 4]  # 4.5, 0.9, 3.6


def test_heads_without_a_share_get_what_no_other_can_take() -> None:
    assert profile_of([[[1.0, 0.0], [1.0, 0.0]]], [0.5]).counts(10, 5, lanes=(1, 2)) == [5, 5]
    lanes = profile_of([[[1.0, 0.5], [0.0, 0.5]]], [0.5])
    assert lanes.counts(10, 5, lanes=(0, 1)) == [10, 0]


def test_counts_refuse_what_cannot_be(profile: HeadProfile) -> None:
    for arguments in ((10, 11), (10, 5, 6), (10, 5, -1)):
        with pytest.raises(ValueError, match="must be ascending"):
            profile.counts(*arguments)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("ratio", "power"), [(0.8, 2.0), (0.45, 0.5)], ids=["some-at-the-floor", "some-full"])
def test_one_factor_explains_all_counts(ratio: float, power: float, seed: int) -> None:
    """Within the one token that rounding moves, each is its share times the same number, or its floor, or all."""
    shares = np.random.default_rng(seed).random((1, 6, 4)) ** power
    profile = profile_of(shares * (1 - ratio) / shares.mean(), [ratio])
    for lanes in (None, (1, 3), (2, 3)):
        counts = np.array(profile.counts(457, round(457 * (1 - ratio)), 5, lanes))
        own = np.asarray(profile.shares)[0][:, slice(*lanes) if lanes else slice(None)].ravel()
        at_least = np.where(counts > 5, (counts - 1) / own, 0)
        at_most = np.where(counts < 457, (counts + 1) / own, np.inf)
        assert at_least.max() <= at_most.min()


# --- files and models ---------------------------------------------------------------------------------------------------


def test_a_profile_is_read_as_it_was_written(profile: HeadProfile, tmp_path: Path) -> None:
    profile.save(tmp_path / "p.json")
    assert HeadProfile.load(tmp_path / "p.json") == profile
    assert json.loads((tmp_path / "p.json").read_text())["format"] == 1


def test_shares_are_rounded_in_the_file(profile: HeadProfile, tmp_path: Path) -> None:
    shares = np.asarray(profile.shares)
    shares[0, 0] += [-1 / 3e4, 1 / 3e4]
    replace(profile, shares=shares.tolist()).save(tmp_path / "p.json")
    assert HeadProfile.load(str(tmp_path / "p.json")) == profile


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "its format is 2, but this release reads format 1\\. Make it again"),
        ({"ratios": [0.5, 0.3, 0.9]}, r"ratios=\[0.5, 0.3, 0.9\] must be ascending"),
        ({"ratios": [0.3, 0.5, 1.0]}, "must be ascending, between 0 and 1"),
        ({"ratios": []}, "must be ascending"),
        ({"ratios": [0.3, 0.5]}, r"shares are \[3, 3, 2\]; they must be \[ratios, layers, KV heads\], \[2, 3, 2\]"),
        ({"ratios": [0.3, 0.6, 0.9]}, "the shares of ratio 0.6 have mean 0.5000; it must be 0.4000"),
        ({"shares": [[[0.5, 0.5]]]}, r"shares are \[1, 1, 2\]"),
        ({"shares": [[[0.5], [0.5, 0.5]]]}, "cannot be read"),
        ({"shares": [[[1.5, -0.1], [0.8, 0.8], [0.6, 0.6]]] * 3}, "shares must be between 0 and 1"),
        ({"shares": None}, "cannot be read"),
        ({"model": {"layers": 3}}, "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused(profile: HeadProfile, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "p.json"
    profile.save(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=message) as raised:
        HeadProfile.load(file)
    assert str(file) in str(raised.value) and "obcache_sglang.calibrate" in str(raised.value)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1}', "{"])
def test_what_is_no_profile_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ConfigError, match=r"p\.json: (cannot be read|lacks 'model')"):
        HeadProfile.load(tmp_path / "p.json")


def test_a_missing_file_is_refused_with_the_packaged_names() -> None:
    with pytest.raises(ConfigError, match=f"head profile nowhere.json: there is no such file.*{PACKAGED_NAME}.*calibrate"):
        HeadProfile.load("nowhere.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 4}, "it has num_hidden_layers 3, not 4"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 2, not 4"),
        ({"architectures": ["MistralForCausalLM"]}, "architecture LlamaForCausalLM, not MistralForCausalLM"),
        ({"vocab_size": 256, "hidden_size": 64}, "hidden_size 32, not 64, vocab_size 128, not 256"),
    ],
)
def test_a_profile_of_another_model_is_refused(profile: HeadProfile, change: dict[str, Any], message: str) -> None:
    profile.check_model(model_config())
    with pytest.raises(HostError, match=message):
        profile.check_model(model_config(**change))


@pytest.mark.parametrize("key", ["_name_or_path", "_model_name_or_path"])
def test_models_of_one_shape_are_told_by_the_name_in_their_config(profile: HeadProfile, tmp_path: Path, key: str) -> None:
    values = json.loads(model_config().to_json_string(use_diff=False))
    configs = {}
    for directory, name in (("base", "a/base"), ("moved", "a/base"), ("chat", "a/chat")):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "config.json").write_text(json.dumps(values | {key: name}))
        configs[directory] = AutoConfig.from_pretrained(tmp_path / directory)
    measured = replace(profile, model=ModelIdentity.of(configs["base"]))
    measured.check_model(configs["moved"])
    with pytest.raises(HostError, match=r"the same shape, but another name in its config\.json"):
        measured.check_model(configs["chat"])


def test_a_model_keeps_its_identity_in_sglang(model_dir: Path, model_dir_bf16: Path) -> None:
    from sglang.srt.configs.model_config import ModelConfig

    profile = HeadProfile.load(PACKAGED_NAME)
    for directory in (model_dir, model_dir_bf16):
        profile.check_model(AutoConfig.from_pretrained(directory))
        profile.check_model(ModelConfig(str(directory)).hf_config)


def test_the_packaged_profiles_are_whole() -> None:
    for file in PACKAGED.glob("*.json"):
        profile = HeadProfile.load(file.stem)
        assert profile == HeadProfile.load(file)
        assert profile.ratios == [0.3, 0.5, 0.7, 0.8, 0.9]
        assert " /" not in profile.made["command"]
        assert file.stat().st_size < 100_000


# --- how they are measured ----------------------------------------------------------------------------------------------


class Words:
    """A tokenizer without a chat template whose words are numbers."""

    chat_template = None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [len(word) for word in text.split()] or [0]


@pytest.mark.parametrize("score", calibrate.SCORES)
def test_scores_are_those_of_the_replay_queries(score: str) -> None:
    """Against one forward of the context and each pass without a cache, in pieces that do not divide the context."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config(initializer_range=0.5)).eval()
    context = array("q", torch.randint(0, 128, (50,)).tolist())
    prompts = ReplayPrompts(Words())
    scores = calibrate.Replay(model, score).score(context, prompts, chunk_tokens=20)

    plain = LlamaForCausalLM(model.config).eval()
    plain.load_state_dict(model.state_dict())
    expected, output_sq = torch.zeros(3, 2, 50, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for replayed in prompts.passes(context, 20):
        for layer, (q, k, v) in enumerate(attention_inputs(plain, context + replayed.tokens)):
            q, k, v, scale = q[50:].double(), k.double(), v.double(), 8**-0.5
            for head in range(4):
                z, weights, o = reference.attention(q[:, head], k[:, head // 2], v[:, head // 2], start=50, scale=scale)
                pairs = reference.pair_scores(z, weights, o, v[:, head // 2], score)[:, :50]
                output_sq[layer] += o.square().sum()
                if score == "attention":
                    expected[layer, head // 2] = torch.maximum(expected[layer, head // 2], pairs.amax(0))
                else:
                    expected[layer, head // 2] += pairs.sum(0) / 2
    if score != "attention":
        expected /= output_sq[:, None, None]
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-7)


def attention_inputs(model: LlamaForCausalLM, tokens: array[int]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Per layer: q [tokens, 4, 8], k and v [tokens, 2, 8] after RoPE."""
    inputs = []

    def recording(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        inputs.append(tuple(tensor[0].transpose(0, 1) for tensor in (query, key, value)))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("recording", recording)
    model.set_attn_implementation("recording")
    with torch.no_grad():
        model(torch.tensor([tokens]), use_cache=False)
    return inputs


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7, 0.9])
def test_shares_of_few_cells_have_the_mean_that_a_profile_needs(ratio: float) -> None:
    for num_tokens in (137, 196, 197):
        scores = torch.rand(2, 3, num_tokens, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 6).view(2, 3, 1)
        shares = kept_shares(scores, ratio)
        assert shares.mean() == pytest.approx(1 - ratio, abs=5e-5)
        assert ((shares >= 0) & (shares <= 1)).all()


def test_shares_are_what_a_global_selection_keeps() -> None:
    scores = torch.rand(3, 2, 200, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 6).view(3, 2, 1)
    for ratio in (0.3, 0.655, 0.9):
        shares = kept_shares(scores, ratio)
        assert shares.shape == (3, 2) and shares.dtype == torch.float64
        assert shares.mean() == pytest.approx(1 - ratio, abs=1 / 1200)
        assert (shares >= 4 / 200).all()  # sinks
    ranked = rank_positions(scores.flatten(0, 1), 20, window=0, sink_tokens=4, pooling="none", kernel_size=1, shrink_window=False)
    _, offsets = keep_across_heads(ranked, 120)
    assert (shares.flatten() * 200).round().int().tolist() == offsets.diff().tolist()


@pytest.mark.long
def test_calibrating_a_model(model_dir: Path, tmp_path: Path) -> None:
    """Half a thousand tokens of another text show which heads need much as the packaged profile does (measured: 0.97, 0.98)."""
    text, output = tmp_path / "text.txt", tmp_path / "profile.json"
    text.write_text(opticks()[100_000:104_000], encoding="utf-8")
    arguments = [str(model_dir), "--text", str(text), "--output", str(output), "--ratios", "0.9", "0.7", "--max-tokens", "512"]
    assert calibrate.main(arguments) == 0
    measured = HeadProfile.load(output)
    packaged = HeadProfile.load(PACKAGED_NAME)
    assert measured.ratios == [0.7, 0.9] and measured.model == packaged.model
    assert measured.made["texts"] == 1 and 512 < measured.made["tokens"] < 550 and str(tmp_path) not in output.read_text()
    for ratio in measured.ratios:
        shares = np.asarray(measured.shares[measured.ratios.index(ratio)])
        others = np.asarray(packaged.shares[packaged.ratios.index(ratio)])
        assert shares.shape == (30, 3) and shares.mean() == pytest.approx(1 - ratio, abs=1e-4)
        correlation = np.corrcoef(shares.ravel(), others.ravel())[0, 1]
        print(f"ratio {ratio}: correlation {correlation:.3f}")
        assert correlation > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratios", "0.5", "1.0"], r"--ratios 0.5 1.0: compression ratios must be between 0 and 1"),
        (["--max-tokens", "50"], "text 1 has [0-9]+ tokens, too few to measure heads with. Give at least 128"),
        (["--max-tokens", "7000"], "Lower --max-tokens by [0-9]+ or more"),
        (["--text", "nowhere.txt"], "No such file.*nowhere.txt"),
    ],
)
def test_calibrating_refuses(model_dir: Path, tmp_path: Path, capsys: Any, arguments: list[str], message: str) -> None:
    (tmp_path / "text.txt").write_text(opticks()[:40_000], encoding="utf-8")
    output = tmp_path / "profile.json"
    assert calibrate.main([str(model_dir), "--text", str(tmp_path / "text.txt"), "--output", str(output), *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not output.exists()


def renamed_model(model_dir: Path, folder: Path, *, weights: bool) -> Path:
    """The model's first two layers under a name that no profile is of. Its short context length makes texts of 172 tokens of it.

    So few cells that their rounding shows in a share's fourth digit.
    """
    folder.mkdir()
    for file in model_dir.iterdir():
        if weights or file.suffix != ".safetensors":
            (folder / file.name).symlink_to(file)
    config = json.loads((model_dir / "config.json").read_text())
    (folder / "config.json").unlink()
    changed = config | {"_name_or_path": "renamed", "max_position_embeddings": 600, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    return folder


def test_auto_takes_the_profile_that_comes_with_the_package(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_files.subprocess, "run", None)
    assert measured_files.profile_for(str(model_dir)) == PACKAGED / f"{PACKAGED_NAME}.json"
    settings = settings_from_python({"head_profile": AUTO})
    assert settings is not None
    found = plugin.with_measured_files(settings, str(model_dir))
    assert found == replace(settings, head_profile=str(PACKAGED / f"{PACKAGED_NAME}.json"))
    assert found.compression.budget == "profile"


@pytest.mark.long
def test_auto_measures_another_model_once(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = renamed_model(model_dir, tmp_path / "model", weights=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = measured_files.profile_for(str(model))
    assert file.parent == tmp_path / "cache" / "obcache_sglang"
    profile = HeadProfile.load(file)
    profile.check_model(AutoConfig.from_pretrained(model))
    assert profile.made["texts"] == 3 and 3 * 172 <= profile.made["tokens"] < 3 * 172 + 100
    monkeypatch.setattr(measured_files.subprocess, "run", None)
    assert measured_files.profile_for(str(model)) == file
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_auto_measures_again_for_other_weights_and_after_a_change_of_the_format(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = renamed_model(model_dir, tmp_path / "model", weights=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measured: list[str] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        measured.append(command[3])
        shutil.copy(PACKAGED / f"{PACKAGED_NAME}.json", command[command.index("--output") + 1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(measured_files.subprocess, "run", run)
    files = []
    for value in (0.5, 0.501):  # a model and a fine-tuned one
        save_file({"weight": torch.full((300_000,), value)}, model / "model.safetensors")
        files += [measured_files.profile_for(str(model)), measured_files.profile_for(str(model))]
    assert len(measured) == 2 and files[0] == files[1] != files[2] == files[3]
    files[3].write_text("{}", encoding="utf-8")
    assert measured_files.profile_for(str(model)) == files[3]
    assert len(measured) == 3


def run_here(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    assert command[:3] == [sys.executable, "-m", "obcache_sglang.calibrate"]
    return subprocess.CompletedProcess(command, calibrate.main(command[3:]))


def test_auto_that_fails_stops_the_server_with_the_reason(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # In this process, which has all imported already; the test above goes into another.
    monkeypatch.setattr(measured_files.subprocess, "run", run_here)
    settings = settings_from_python({"head_profile": AUTO})
    assert settings is not None
    with pytest.raises(HostError, match=r"could not be measured here, see above\. Measure it where the model fits"):
        plugin.with_measured_files(settings, str(renamed_model(model_dir, tmp_path / "model", weights=False)))
    with pytest.raises(HostError, match=f"head-profile auto: .*{tmp_path / 'nowhere'}"):
        plugin.with_measured_files(settings, str(tmp_path / "nowhere"))
