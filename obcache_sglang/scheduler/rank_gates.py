"""The gates of one rank: what a model and its KV pool must be for them, what they are made from, and where they take effect."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from obcache_sglang.compress.gates import GateFile, Gates
from obcache_sglang.compress.head_profile import HeadProfile, ModelIdentity
from obcache_sglang.compress.hidden_gates import load_hidden_gates
from obcache_sglang.compress.rotary import inverse_rotaries
from obcache_sglang.errors import HostError
from obcache_sglang.host import use

if TYPE_CHECKING:
    from obcache_sglang.compress.compression import Compressor
    from obcache_sglang.settings import ServerSettings


def read_back_keys(compressor: Compressor, model_runner: Any) -> None:
    """What method gate needs of a model: K as it was before RoPE, and on GPUs the kernel that scores. Raises HostError where K cannot be read back."""
    if compressor.rotaries:
        return
    compressor.rotaries = inverse_rotaries(model_runner.model, model_runner.token_to_kv_pool.layer_num)
    if torch.device(model_runner.device).type == "cuda":
        # Not every machine can import kernels.
        from obcache_sglang.gpu.gate_kernel import gate_scores_paged

        compressor.gate_scores = gate_scores_paged


class RankGates:
    """Of one scheduler. lanes: (first, last + 1) of a layer's KV heads that it has. is_first: whether it is the rank that writes files."""

    def __init__(self, scheduler: Any, compressor: Compressor) -> None:
        self._scheduler, self._compressor = scheduler, compressor
        self._pool: Any = compressor.kv_pool
        self._group = scheduler.attn_tp_cpu_group
        self._num_ranks: int = scheduler.attn_tp_group.world_size
        self._has_own_profile = False
        self._num_kv_heads: int = scheduler.model_config.get_total_num_kv_heads()
        self.lanes = compressor.lanes
        self.is_first = scheduler.attn_tp_group.rank_in_group == 0

    def load(self, settings: ServerSettings) -> None:
        """Gates, hidden gates and head profile of files. Raises HostError and ConfigError."""
        config = self._scheduler.model_config.hf_config
        self._has_own_profile = settings.head_profile is not None
        if settings.gates is not None:
            if (refusal := self._pool_refusal()) is not None:
                raise HostError(f"--obcache-gates {refusal}. Set --kv-cache-dtype auto, or serve without gates.")
            file = GateFile.load(settings.gates)
            file.check_model(config)
            self.install(self.own(file), file.profile)
        if settings.hidden_gates is not None:
            hidden = load_hidden_gates(settings.hidden_gates)
            hidden.check_model(config)
            dtype = self._scheduler.model_config.dtype
            self._compressor.hidden_gates = hidden.lanes(*self.lanes).to(self._pool.device, dtype)
        if settings.head_profile is not None:
            self._compressor.head_profile = HeadProfile.load(settings.head_profile)
            self._compressor.head_profile.check_model(config)

    def _pool_refusal(self) -> str | None:
        return f"cannot read a KV cache of {self._pool.dtype}" if self._pool.store_dtype.itemsize < 2 else None

    def own(self, file: GateFile) -> Gates:
        """The gates of this rank's heads, on its device."""
        return file.gates.lanes(*self.lanes).to(self._pool.device)

    def install(self, own: Gates, profile: HeadProfile) -> None:
        """Compressions use these gates from now on, and their head profile unless the operator has given another one."""
        self._compressor.gates = own
        if not self._has_own_profile:
            self._compressor.head_profile = profile

    # --- calibration ------------------------------------------------------------------------------------------------

    def refusal(self) -> str | None:
        """Why gates cannot be made in this server, or None. From then on K can be read back."""
        if self._scheduler.server_args.dp_size > 1:
            return (
                "Calibration does not work with data parallelism, whose ranks would each make gates of their own. Calibrate on a server with "
                "--dp-size 1, and start this one with the file."
            )
        if self._num_kv_heads % self._num_ranks:
            return (
                f"Calibration needs KV heads that ranks do not share: the model has {self._num_kv_heads}, for {self._num_ranks} ranks. Calibrate "
                "on a server with another --tp-size, and start this one with the file."
            )
        if (refusal := self._pool_refusal()) is not None:
            return f"Gates {refusal}. Start the server with --kv-cache-dtype auto."
        try:
            read_back_keys(self._compressor, self._scheduler.tp_worker.model_runner)
        except HostError as error:
            return str(error)
        return None

    def identity(self) -> ModelIdentity:
        """Of the model that is served."""
        return ModelIdentity.of(self._scheduler.model_config.hf_config)

    def keys_values(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K before RoPE and V of a layer, [tokens, kv_heads of this rank, head_dim], K float32. slots: [tokens] int64, from position 0 on."""
        layer_id = self._pool.start_layer + layer
        positions = torch.arange(len(slots), device=slots.device)
        keys, values = self._pool.get_key_buffer(layer_id), self._pool.get_value_buffer(layer_id)
        return self._compressor.rotaries[layer_id](keys[slots], positions), values[slots]

    def of_all_ranks(self, own: torch.Tensor) -> torch.Tensor:
        """Joined along the second dimension, on the host: [layers, kv_heads of the model, ...]. A collective.

        own: [layers, kv_heads of this rank, ...] float32.
        """
        own = own.cpu().contiguous()
        if self._num_ranks == 1:
            return own
        found = [torch.empty_like(own) for _ in range(self._num_ranks)]
        torch.distributed.all_gather(found, own, group=self._group)
        return torch.cat(found, dim=1)

    def write(self, file: GateFile, name: str | None) -> Path:
        """Writes the file where `--obcache-gates auto` finds it, or under a name beside that. Raises OSError and ValueError."""
        # Imports transformers' models, which a scheduler does not need otherwise.
        from obcache_sglang import measured_files

        path = measured_files.made_gates_path(self._scheduler.server_args.model_path, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            file.save(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path


TOUCHES = (
    use(
        "sglang.srt.configs.model_config.ModelConfig.get_total_num_kv_heads", "call", "the heads that calibration makes gates of"
    ),
    use(
        "sglang.srt.distributed.parallel_state.GroupCoordinator",
        "read",
        "rank_in_group, world_size, cpu_group: calibration joins what the ranks have found",
    ),
)
