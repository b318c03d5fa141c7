"""What every model has: one initialisation, a count of its parameters, saving."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from transfuse.errors import ConfigError
from transfuse.generation import GenerationConfig
from transfuse.models.blocks import Block
from transfuse.models.config import TransformerConfig
from transfuse.models.heads import MaskedLMHead, OutputHead
from transfuse.models.placement import check_dtype, machine_memory, usable_device
from transfuse.nn import RelativePositionBias


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part; a tensor shared by two parts is counted once, where it is first used.

    >>> print(ParameterCount(embedding=1000, attention=400, feed_forward=800, norm=20, head=0))
    2,220 parameters: embedding 1,000, attention 400, feed_forward 800, norm 20, head 0
    """

    embedding: int
    attention: int
    feed_forward: int
    norm: int
    head: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.embedding + self.attention + self.feed_forward + self.norm + self.head

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {getattr(self, name):,}" for name in self.__dataclass_fields__)
        return f"{self.total:,} parameters: {parts}"


class TransformerModel(nn.Module):
    """Base of all models: holds the configuration, initialises, counts.

    Sub-modules are made on the meta device and materialised once, by :meth:`_materialise`, so that nothing is
    allocated before its size was checked and nothing is initialised twice.
    """

    config: TransformerConfig
    labels: tuple[str, ...] = ()  # names of a classifier's classes, where a checkpoint gave them
    generation_config: GenerationConfig | None = None  # what a checkpoint says about generating from it
    # what config.json says to the tasks and not to the model: problem_type, task_specific_params, prefix
    task_settings: Mapping[str, Any] = MappingProxyType({})

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the parameters are."""
        return next(self.parameters()).dtype

    def num_parameters(self) -> ParameterCount:
        """The parameters, by part: embedding, attention (relative positions included), feed_forward, norm, head."""
        counts = dict.fromkeys(ParameterCount.__dataclass_fields__, 0)
        for name, parameter in self.named_parameters():
            counts[_part(name)] += parameter.numel()
        return ParameterCount(**counts)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights and tables normal with ``initializer_range``, biases 0, norms 1.

        In pre-norm models the two or three projections of a layer that add to the stream are divided by the square
        root of how many such additions the stack has, so that the stream's variance does not grow with depth (GPT-2).
        """
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, RelativePositionBias)):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm, OutputHead, MaskedLMHead)):
                module.reset_parameters()
        for stack in self.modules():
            if isinstance(stack, nn.ModuleList):
                _scale_additions([b for b in stack if isinstance(b, Block) and b.pre])

    def save_pretrained(self, folder: str | os.PathLike[str], *, max_shard_size: int | str = "50GB") -> None:
        """Writes ``config.json`` and ``model.safetensors`` into ``folder``.

        See :func:`transfuse.models.save_pretrained`.

        Args:
            folder: made if it is not there.
            max_shard_size: larger weights become several files and an index.

        Raises:
            CheckpointError: the folder cannot be written. ArgumentError: max_shard_size is no size.
        """
        from transfuse.models.pretrained import save_pretrained

        save_pretrained(self, folder, max_shard_size=max_shard_size)

    @classmethod
    def _check(cls, config: TransformerConfig, dtype: torch.dtype | None) -> None:
        """What every constructor asks first.

        Raises:
            ConfigError, DtypeError: config or dtype is something else.
        """
        if not isinstance(config, TransformerConfig):
            raise ConfigError(
                f"{cls.__name__}: expected a TransformerConfig, got {type(config).__name__}; from_dict makes one from "
                "a mapping, transfuse.from_pretrained loads a checkpoint"
            )
        check_dtype(dtype)

    def _materialise(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Gives the parameters memory on ``device`` and first values; on the meta device it does nothing."""
        where = usable_device(device)
        if where.type == "meta":
            return
        if where.type == "cpu":
            _check_memory(self.num_parameters().total, dtype or torch.get_default_dtype())
        self.to_empty(device=where)
        self.reset_parameters()


def _scale_additions(blocks: list[Block]) -> None:
    """Divides what a pre-norm stack adds to its stream by the square root of the number of additions."""
    for block in blocks:
        added = [block.attention.out, block.feed_forward.down]
        if block.cross_attention is not None:
            added.append(block.cross_attention.out)
        for projection in added:
            projection.weight.mul_(1.0 / math.sqrt(len(added) * len(blocks)))


def _part(name: str) -> str:
    """The part of a model that a parameter belongs to, by its name."""
    words = name.split(".")[:-1]
    if any(w.endswith("norm") for w in words):
        return "norm"
    if "embeddings" in words:
        return "embedding"
    if "attention" in words or "cross_attention" in words or "relative_position" in words:
        return "attention"
    return "feed_forward" if "feed_forward" in words else "head"


def _check_memory(parameters: int, dtype: torch.dtype) -> None:
    """Refuses a model larger than the machine's memory: the kernel would kill the process instead of failing."""
    memory, need = machine_memory(), parameters * dtype.itemsize
    if 0 < memory < need:
        raise ConfigError(
            f"config: the model has {parameters:,} parameters and needs {need / 2**30:,.1f} GiB in {dtype}, this "
            f"machine has {memory / 2**30:,.1f} GiB; take a smaller configuration or dtype, or device='meta'"
        )
