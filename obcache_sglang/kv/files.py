"""The file of one compressed context and one tensor-parallel rank: a safetensors file, written and read layer by layer.

    tensor                      dtype            shape
    offsets                     I64              [layers * kv_heads + 1]           as in `cells.KeptTokens`
    tokens                      I64              [L]
    judges                      I64              [judges]                          the tokens after it that scored it, if any did
    positions                   I32              [M * layers * kv_heads]
    k                           the KV cache's   [layers, M, kv_heads, head_dim]   whole slots, in the context's order
    v                           the KV cache's   [layers, M, kv_heads, v_head_dim]

`__metadata__` has `obcache`, a JSON object (`Head`), and `checksum`: BLAKE2b over that object's text and the tensors, `k` and `v` layer by layer in turn.
It does not have the namespace: only the file's name depends on that (`file_name`).

Nothing is mapped into memory: a page that cannot be read would stop the whole process, or end it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from obcache_sglang import __version__
from obcache_sglang.errors import ObcacheError
from obcache_sglang.kv.cells import KeptTokens
from obcache_sglang.kv.context import Namespace
from obcache_sglang.settings import CompressionSettings

FORMAT = 1
"""Version of the file format; files of another one are not read."""

_LONGEST_HEADER = 1 << 20
_SYNC_BYTES = 64 << 20
_NO_CHECKSUM = "0" * 64
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
"""Of KV caches that files can hold: torch's name, and safetensors'."""

_COUNTS = ("num_layers", "num_kv_heads", "head_dim", "v_head_dim", "page_size", "num_ranks")
_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4}


class BadFile(ObcacheError, ValueError):
    """A file that is not, or no longer, what its name says. The message continues "the file ..."."""


@dataclass(frozen=True)
class Served:
    """What of a server a file must agree with, on one rank.

    model: 32 hexadecimal digits of the model, its weights and how it computes. dtype: of the KV cache, as torch names it.
    num_kv_heads: on this rank. rank, num_ranks: of the tensor-parallel group that shares a context.
    """

    model: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    page_size: int
    rank: int = 0
    num_ranks: int = 1

    @property
    def num_heads(self) -> int:
        """KV heads of all layers."""
        return self.num_layers * self.num_kv_heads


@dataclass(frozen=True)
class Head:
    """What a file says of itself.

    chooser: digest of the gates or the head profile that chose its tokens; empty where none did.
    num_tokens: L. num_slots: M. num_judges: tokens after it that scored it. created: seconds since the epoch. expires_at: likewise, when its
    context was to be deleted, as it was saved; None for never.
    """

    served: Served
    settings: CompressionSettings
    chooser: str
    num_tokens: int
    num_slots: int
    num_judges: int
    created: float = field(default_factory=lambda: round(time.time(), 3))
    expires_at: float | None = None
    version: str = __version__
    format: int = FORMAT

    def to_json(self) -> str:
        """As it stands in the file."""
        return json.dumps(asdict(self) | {"settings": self.settings.to_dict()}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Head:
        """The inverse of `to_json`. Raises BadFile, also for a file of another format."""
        try:
            values = json.loads(text)
            if values["format"] != FORMAT:
                raise BadFile(f"has format {values['format']!r}, and this package reads format {FORMAT}")
            settings = CompressionSettings.from_dict(values["settings"])
            head = cls(**{**values, "served": Served(**values["served"]), "settings": settings})
            if head.expires_at is not None:
                float(head.expires_at)
            counts = [head.num_tokens, head.num_slots, *(getattr(head.served, name) for name in _COUNTS)]
            if (
                not all(type(each) is int and each > 0 for each in counts)
                or head.num_judges < 0
                or head.served.dtype not in DTYPES
            ):
                raise BadFile("has metadata that means nothing")
            return head
        except BadFile:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadFile(f"has metadata that cannot be read ({type(error).__name__}: {error})") from error

    def tensors(self) -> dict[str, tuple[str, list[int]]]:
        """The file's tensors in their order: safetensors' name of the dtype, and the shape."""
        served, slots = self.served, self.num_slots
        dtype = DTYPES[served.dtype]
        return {
            "offsets": ("I64", [served.num_heads + 1]),
            "tokens": ("I64", [self.num_tokens]),
            "judges": ("I64", [self.num_judges]),
            "positions": ("I32", [slots * served.num_heads]),
            "k": (dtype, [served.num_layers, slots, served.num_kv_heads, served.head_dim]),
            "v": (dtype, [served.num_layers, slots, served.num_kv_heads, served.v_head_dim]),
        }

    def spans(self) -> dict[str, tuple[int, int]]:
        """First byte and the one after the last of each tensor, counted from the end of the file's header."""
        spans, first = {}, 0
        for name, (dtype, shape) in self.tensors().items():
            last = first + _SIZES[dtype] * math.prod(shape)
            spans[name] = (first, last)
            first = last
        return spans

    @property
    def layer_bytes(self) -> tuple[int, int]:
        """Of one layer's K and of its V."""
        spans = self.spans()
        return tuple((spans[name][1] - spans[name][0]) // self.served.num_layers for name in ("k", "v"))  # type: ignore[return-value]

    @property
    def has_expired(self) -> bool:
        """Whether its context was to be deleted by now."""
        return self.expires_at is not None and self.expires_at <= time.time()

    def check(self, served: Served, chooser: str) -> None:
        """Raises BadFile, with the reason, for a file that another server wrote, and FileNotFoundError for one whose time has passed.

        chooser: that the file's settings have here.
        """
        for name, mine in asdict(served).items():
            if (its := getattr(self.served, name)) != mine:
                raise BadFile(f"was written with {name} {its}, and this server has {mine}")
        if self.has_expired:
            raise FileNotFoundError
        if self.chooser != chooser:
            raise BadFile("was written with other gates, or another head profile")


@dataclass(frozen=True)
class Table:
    """What a file has beside K and V. positions: [M * heads] int32, offsets: [heads + 1] int64, on the host, as in `cells.KeptTokens`."""

    tokens: array[int]
    judges: array[int]
    positions: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of(cls, tokens: array[int], judges: array[int], kept: KeptTokens) -> Table:
        """Of a context on this rank, whose `kept` may be on a device."""
        return cls(tokens, judges, kept.positions.to("cpu", torch.int32), kept.offsets.to("cpu", torch.int64))

    def raw(self) -> list[bytes]:
        """As it stands in the file, in the order of `Head.tensors`."""
        return [
            self.offsets.numpy().tobytes(),
            self.tokens.tobytes(),
            self.judges.tobytes(),
            self.positions.numpy().tobytes(),
        ]


def file_name(key: bytes, head: Head, namespace: Namespace, tokens: array[int], judges: array[int]) -> str:
    """What a context's files are called, in 64 hexadecimal digits: a hash that is keyed with the folder's key.

    Equal on every server with that folder for the same model, settings, namespace and tokens. Without the key nobody can tell whether a file
    is of a guessed text, or of a guessed salt.
    """
    served = head.served
    whose = [namespace.extra_key, namespace.cache_salt, namespace.lora_id]
    how = [served.model, served.dtype, served.page_size, head.settings.fingerprint(), head.chooser]
    first = json.dumps([whose, how, len(judges)]).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(hashlib.blake2b(first, key=key).digest(), digest_size=32, key=key)
    digest.update(judges.tobytes())
    digest.update(tokens.tobytes())
    return digest.hexdigest()


def _header(head: Head, checksum: str) -> bytes:
    """All before the tensors. As long for every checksum."""
    spans = head.spans()
    entries: dict[str, Any] = {"__metadata__": {"obcache": head.to_json(), "checksum": checksum}}
    for name, (dtype, shape) in head.tensors().items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": list(spans[name])}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _digest_of(head_text: str) -> hashlib.blake2b:
    return hashlib.blake2b(head_text.encode(), digest_size=32)


class Writer:
    """Writes one file. descriptor: of an empty file, which stays its owner's to close. Raises OSError."""

    def __init__(self, descriptor: int, head: Head, table: Table) -> None:
        self.head, self._file = head, descriptor
        self._digest = _digest_of(head.to_json())
        self._layer = self._unsynced = 0
        header = _header(head, _NO_CHECKSUM)
        self._start = len(header)
        first = b"".join(table.raw())
        assert len(first) == head.spans()["k"][0], "the table is the head's"
        self._digest.update(first)
        _write(descriptor, memoryview(header + first), 0)

    def layer(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """The next layer. k, v: its slots' bytes, [M, bytes of a slot] uint8, on the host."""
        for name, tensor, size in zip("kv", (k, v), self.head.layer_bytes, strict=True):
            raw = _raw(tensor.contiguous())
            assert len(raw) == size, "the layer is the head's"
            self._digest.update(raw)
            _write(self._file, raw, self._start + self.head.spans()[name][0] + self._layer * size)
            self._unsynced += size
        if self._unsynced >= _SYNC_BYTES:  # else the last step would write all of a large file
            os.fdatasync(self._file)
            self._unsynced = 0
        self._layer += 1

    def finish(self) -> int:
        """After the last layer: the checksum. Returns the file's bytes, all of which are on the disk."""
        assert self._layer == self.head.served.num_layers, "all layers are written"
        _write(self._file, memoryview(_header(self.head, self._digest.hexdigest())), 0)
        os.fsync(self._file)
        return self._start + self.head.spans()["v"][1]


class Reader:
    """Reads one file. descriptor: of a regular file, which stays its owner's to close.

    Raises BadFile for what is not a whole file of this format, and OSError.
    """

    def __init__(self, descriptor: int) -> None:
        self._file = descriptor
        size = os.fstat(descriptor).st_size
        length = int.from_bytes(_read(descriptor, 8, 0), "little")
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise BadFile("has no header of a safetensors file")
        text = _read(descriptor, length, 8)
        try:
            entries = json.loads(text)
            metadata = entries.pop("__metadata__")
            head_text, self._checksum = metadata["obcache"], metadata["checksum"]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise BadFile("has no metadata of a compressed context") from error
        self.head = Head.from_json(head_text)
        spans = self.head.spans()
        expected = {
            name: {"dtype": dtype, "shape": shape, "data_offsets": list(spans[name])}
            for name, (dtype, shape) in self.head.tensors().items()
        }
        self._start = 8 + length
        if entries != expected:
            raise BadFile("has other tensors than its metadata says")
        self.num_bytes = self._start + spans["v"][1]
        if size != self.num_bytes:
            raise BadFile(f"has {size} bytes and not {self.num_bytes}: it is torn")
        self._digest = _digest_of(head_text)
        self._layer = 0

    def table(self) -> Table:
        """First of all. Its content is not known to be right before `finish`, but its offsets and positions lie within their bounds."""
        raw = _read(self._file, self.head.spans()["k"][0], self._start)
        self._digest.update(raw)
        parts = {name: raw[slice(*span)] for name, span in self.head.spans().items() if name not in ("k", "v")}
        offsets = torch.frombuffer(bytearray(parts["offsets"]), dtype=torch.int64)
        positions = torch.frombuffer(bytearray(parts["positions"]), dtype=torch.int32)
        num_cells = self.head.num_slots * self.head.served.num_heads
        if offsets[0] != 0 or offsets[-1] != num_cells or (offsets.diff() < 0).any():
            raise BadFile("has offsets that do not divide its cells")
        if positions.min() < 0 or positions.max() >= self.head.num_tokens:
            raise BadFile("has positions outside its tokens")
        return Table(array("q", parts["tokens"]), array("q", parts["judges"]), positions, offsets)

    def layer(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Reads the next layer into k and v, [M, bytes of a slot] uint8, on the host."""
        for name, tensor, size in zip("kv", (k, v), self.head.layer_bytes, strict=True):
            raw = _raw(tensor)
            _read_into(self._file, raw, self._start + self.head.spans()[name][0] + self._layer * size)
            self._digest.update(raw)
        self._layer += 1

    def finish(self) -> None:
        """After the last layer: raises BadFile where the content is not what was written."""
        if self._digest.hexdigest() != self._checksum:
            raise BadFile("has another checksum than its content: it is corrupt")


def empty_layer(head: Head, *, pinned: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Host memory for the K and the V of one layer, [M, bytes of a slot] uint8 each. pinned: so that a GPU reads it by itself."""
    k, v = (
        torch.empty(head.num_slots, size // head.num_slots, dtype=torch.uint8, pin_memory=pinned) for size in head.layer_bytes
    )
    return k, v


def describe(head: Head, name: str, num_bytes: int) -> Mapping[str, Any]:
    """JSON-safe facts for lists of files."""
    return {
        "file": name,
        "context_tokens": head.num_tokens,
        "kept_tokens": head.num_slots,
        "bytes": num_bytes,
        "created": head.created,
        "version": head.version,
        "num_ranks": head.served.num_ranks,
        "dtype": head.served.dtype,
        "settings": head.settings.to_dict(),
    }


def _raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor [M, bytes of a slot] uint8 where they lie."""
    array_of_it: Any = tensor.numpy()
    return memoryview(array_of_it).cast("B")


def _write(descriptor: int, raw: memoryview, offset: int) -> None:
    while raw:
        done = os.pwrite(descriptor, raw, offset)
        raw, offset = raw[done:], offset + done


def _read(descriptor: int, size: int, offset: int) -> bytes:
    raw = bytearray(size)
    _read_into(descriptor, memoryview(raw), offset)
    return bytes(raw)


def _read_into(descriptor: int, raw: memoryview, offset: int) -> None:
    while raw:
        done = os.preadv(descriptor, [raw], offset)
        if done == 0:
            raise BadFile("is shorter than it was: it is torn")
        raw, offset = raw[done:], offset + done
