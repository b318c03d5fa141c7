"""Reads GGUF files: a bounded walk over the header, then tensors dequantised to fp32 one at a time.

The header is read here rather than with ``gguf.GGUFReader``, which trusts every length it meets (a damaged count makes
it loop for hours) and takes 2.4 s where this takes 0.1 s on a 49,152-token vocabulary. The quantisation formats are the
``gguf`` package's. A Llama file is presented under the names and in the layout of Hugging Face's checkpoints, so
that one key map serves both: llama.cpp interleaves the rows of the query and key projections, and reading undoes that.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transfuse.errors import CheckpointError, ConfigError, MissingDependencyError
from transfuse.models.checkpoint import TensorInfo, TensorSource
from transfuse.nn.rotary import RopeScaling, rotary_frequencies

# GGUF value type -> struct code; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_LLAMA_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LLAMA_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
# The llama3 scalings of released models. A GGUF file keeps only the divisors that follow from them.
_LLAMA3_SCALINGS = (RopeScaling("llama3", factor=8.0), RopeScaling("llama3", factor=32.0))


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: ``shape`` in torch's order, ``kind`` the GGML type number, byte range in the file."""

    shape: tuple[int, ...]
    kind: int
    start: int
    stop: int


class _Cursor:
    """Reads little-endian values from a buffer and refuses to pass its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.at = 0

    def fail(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a valid GGUF file ({reason}); download it again")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise self.fail(f"{count} bytes expected at offset {self.at}, the file has {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        try:
            return self.take(self.scalar("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"text before offset {self.at} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.fail(f"unknown value type {kind} at offset {self.at}")
        item, count = self.scalar("I"), self.scalar("Q")
        if item == _STRING:
            if count > (len(self.data) - self.at) // 8:  # a string takes at least its length's 8 bytes
                raise self.fail(f"an array of {count} strings at offset {self.at} does not fit")
            return [self.string() for _ in range(count)]
        if item not in _SCALARS:
            raise self.fail(f"unknown array type {item} at offset {self.at}")
        code = _SCALARS[item]
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code))))


class GgufFile:
    """The metadata and the tensor table of a GGUF file (versions 2 and 3, little-endian).

    ``metadata`` maps key to value (numbers, strings, lists); ``tensors`` maps name to where it lies. Nothing of a
    tensor is read yet.

    Raises:
        CheckpointError: the file is missing or damaged.
        MissingDependencyError: the package ``gguf`` is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, _Stored] = {}
        try:
            with path.open("rb") as stream:
                self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise CheckpointError(f"{path}: cannot read a GGUF file here: {error}") from error
        self._read(_Cursor(self._data, path))

    def _read(self, cursor: _Cursor) -> None:
        if cursor.take(4) != b"GGUF":
            raise cursor.fail("it does not start with 'GGUF'")
        version, tensor_count, key_count = cursor.scalar("I"), cursor.scalar("Q"), cursor.scalar("Q")
        if version not in (2, 3):
            raise cursor.fail(f"version {version}, expected 2 or 3 in little-endian order")
        for _ in range(key_count):  # ends at the first read past the end, whatever the count claims
            key = cursor.string()
            if key in self.metadata:
                raise cursor.fail(f"metadata key {key!r} appears twice")
            self.metadata[key] = cursor.value(cursor.scalar("I"))
        table = [self._tensor_entry(cursor) for _ in range(min(tensor_count, len(self._data)))]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise cursor.fail(f"alignment {alignment!r} is not a power of two")
        base = -(-cursor.at // alignment) * alignment
        for name, shape, kind, offset, size in table:
            start = base + offset
            if name in self.tensors:
                raise cursor.fail(f"tensor {name} appears twice")
            if start + size > len(self._data):
                raise cursor.fail(f"tensor {name} ends at byte {start + size}, the file has {len(self._data)}")
            self.tensors[name] = _Stored(shape, kind, start, start + size)

    @staticmethod
    def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int, int]:
        name, dims = cursor.string(), cursor.scalar("I")
        if dims > 4:
            raise cursor.fail(f"tensor {name!r} has {dims} dimensions, expected at most 4")
        shape = tuple(cursor.scalar("Q") for _ in range(dims))[::-1]
        if any(size > len(cursor.data) * 8 for size in shape):  # no format stores a number in less than a bit
            raise cursor.fail(f"tensor {name!r} has the shape {shape}")
        kind, offset = cursor.scalar("I"), cursor.scalar("Q")
        sizes = _gguf().GGML_QUANT_SIZES
        if kind not in sizes:
            raise cursor.fail(f"tensor {name!r} has the unknown type {kind}")
        block, block_bytes = sizes[kind]
        if (shape[-1] if shape else 1) % block:
            raise cursor.fail(f"tensor {name!r} has rows of {shape[-1]}, which is not a multiple of its block {block}")
        return name, shape, kind, offset, math.prod(shape) // block * block_bytes

    def kind_name(self, name: str) -> str:
        """The GGML name of a tensor's type: "F32", "Q4_1", ..."""
        return _gguf().GGMLQuantizationType(self.tensors[name].kind).name

    def read(self, name: str) -> torch.Tensor:
        """The tensor called ``name``, dequantised to fp32, in torch's dimension order.

        Raises:
            CheckpointError: its quantisation format is one that cannot be dequantised.
        """
        gguf, stored = _gguf(), self.tensors[name]
        kind = gguf.GGMLQuantizationType(stored.kind)
        if 0 in stored.shape:
            return torch.empty(stored.shape)
        raw = np.frombuffer(self._data, dtype=np.uint8, count=stored.stop - stored.start, offset=stored.start)
        try:
            values = gguf.quants.dequantize(raw.reshape(*stored.shape[:-1], -1), kind)
        except NotImplementedError as error:
            raise CheckpointError(f"{self.path}: {name} is stored as {kind.name}, which cannot be read") from error
        # fp32 is given back as a view of the file: copy it, so that the tensor can be written to
        copy = values.base is not None
        return torch.from_numpy(values.astype(np.float32, copy=copy).reshape(stored.shape))


def _gguf() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise MissingDependencyError("reading .gguf files needs the package gguf: pip install gguf") from error
    return gguf


class LlamaGgufSource(TensorSource):
    """The tensors of a Llama GGUF file under their Hugging Face names, and the matching ``config``.

    Raises:
        CheckpointError: the file is damaged.
        ConfigError: it holds another architecture, or a setting that cannot be expressed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GgufFile(path)
        architecture = self._file.metadata.get("general.architecture")
        if architecture != "llama":
            raise ConfigError(f"{path}: GGUF architecture {architecture!r}, expected 'llama'; convert to safetensors")
        self._stored_name = {_llama_name(name): name for name in self._file.tensors if name != _ROPE_FACTORS}
        self.entries = {
            ours: TensorInfo(self._file.tensors[stored].shape, self._file.kind_name(stored))
            for ours, stored in self._stored_name.items()
        }
        self.readable: Collection[str] = {info.dtype for info in self.entries.values()}  # reading dequantises all
        self.config = self._llama_config()

    def read(self, name: str) -> torch.Tensor:
        """The tensor with the Hugging Face name ``name``, fp32, rows of the query and key projections in its order."""
        tensor = self._file.read(self._stored_name[name])
        if ".q_proj." in name:
            return _undo_interleave(tensor, self.config["num_attention_heads"])
        if ".k_proj." in name:
            return _undo_interleave(tensor, self.config["num_key_value_heads"])
        return tensor

    def _number(self, key: str, default: float | None = None) -> Any:
        value = self._file.metadata.get(f"llama.{key}", default)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.path}: expected one number for llama.{key}, got {str(value)[:60]!r}")
        return value

    def _llama_config(self) -> dict[str, Any]:
        meta, heads, hidden = (
            self._file.metadata,
            self._number("attention.head_count"),
            self._number("embedding_length"),
        )
        if not (isinstance(heads, int) and heads > 0):
            raise ConfigError(f"{self.path}: llama.attention.head_count is {heads!r}, expected a positive integer")
        head_dim = self._number("attention.key_length", hidden // heads)
        if (rotary := self._number("rope.dimension_count", head_dim)) != head_dim:
            raise ConfigError(f"{self.path}: rotary dimension {rotary} of a head of {head_dim} is not supported")
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self._number("vocab_size", len(meta.get("tokenizer.ggml.tokens", ()))),
            "hidden_size": hidden,
            "intermediate_size": self._number("feed_forward_length"),
            "num_hidden_layers": self._number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._number("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._number("context_length"),
            "rms_norm_eps": _shortest(self._number("attention.layer_norm_rms_epsilon")),
            "rope_theta": _shortest(self._number("rope.freq_base", 10000.0)),
            "rope_scaling": self._rope_scaling(head_dim),
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self.entries,
            "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in self.entries,
            "tie_word_embeddings": "lm_head.weight" not in self.entries,
        }
        for name in ("bos", "eos", "padding"):
            token = meta.get(f"tokenizer.ggml.{name}_token_id")
            config["pad_token_id" if name == "padding" else f"{name}_token_id"] = token
        return config

    def _rope_scaling(self, head_dim: int) -> dict[str, Any] | None:
        kind = self._file.metadata.get("llama.rope.scaling.type", "none")
        if kind not in ("none", "linear"):
            raise ConfigError(f"{self.path}: rope scaling {kind!r} is not supported in GGUF files; known: none, linear")
        if kind == "linear":
            return {"rope_type": "linear", "factor": self._number("rope.scaling.factor")}
        if _ROPE_FACTORS not in self._file.tensors:
            return None
        found = self._file.read(_ROPE_FACTORS)
        theta = self._number("rope.freq_base", 10000.0)
        for scaling in _LLAMA3_SCALINGS:
            expected = _llama3_divisors(head_dim, theta, scaling)
            if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3):
                return {
                    "rope_type": "llama3",
                    "factor": scaling.factor,
                    "low_freq_factor": scaling.low_freq_factor,
                    "high_freq_factor": scaling.high_freq_factor,
                    "original_max_position_embeddings": scaling.original_max_positions,
                }
        raise ConfigError(f"{self.path}: the divisors in {_ROPE_FACTORS} belong to no known rope scaling")


def _llama3_divisors(head_dim: int, theta: float, scaling: RopeScaling) -> torch.Tensor:
    """What llama3 scaling divides each rotary frequency by: 1 for short waves, ``factor`` for long ones. fp32."""
    return rotary_frequencies(head_dim, theta) / rotary_frequencies(head_dim, theta, scaling)


def _undo_interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (heads, half, 2) as llama.cpp rotates neighbours -> (heads, 2, half) as halves are rotated here."""
    if weight.shape[0] % (2 * heads):
        return weight  # its shape is wrong, and the comparison with the model says so
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _llama_name(stored: str) -> str:
    """The Hugging Face name of a stored tensor; an unknown name stays as it is and is reported as unexpected."""
    if stored in _LLAMA_NAMES:
        return _LLAMA_NAMES[stored]
    parts = stored.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LLAMA_BLOCK_NAMES:
        return f"model.layers.{parts[1]}.{_LLAMA_BLOCK_NAMES[parts[2]]}.{parts[3]}"
    return stored


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to the same fp32 number: 9.99999975e-06, as stored, becomes 1e-05."""
    return float(str(np.float32(value)))
