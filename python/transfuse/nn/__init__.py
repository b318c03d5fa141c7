"""Modules on the fused ops: norms, feed-forward, attention and positions; and torch.nn on them.

``import transfuse.nn as nn`` is enough for a model written for torch.nn: ``LayerNorm``, ``RMSNorm``,
``MultiheadAttention``, ``Transformer`` and its layers and stacks are subclasses of torch's with the same constructors,
state_dicts and results, ``functional`` has our scaled_dot_product_attention, and every other name is torch.nn's own.

>>> import transfuse.nn as nn
>>> nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))(torch.randn(2, 8)).shape
torch.Size([2, 8])
"""

from __future__ import annotations

from typing import Any

import torch

from transfuse.nn import functional
from transfuse.nn.attention import Attention
from transfuse.nn.feed_forward import ActivatedLinear, FeedForward
from transfuse.nn.multihead import MultiheadAttention
from transfuse.nn.norm import LayerNorm, RMSNorm
from transfuse.nn.positions import RelativePositionBias, SinusoidalPositions
from transfuse.nn.rotary import RopeScaling, RotaryEmbedding, apply_rotary
from transfuse.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "ActivatedLinear",
    "Attention",
    "FeedForward",
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "RelativePositionBias",
    "RopeScaling",
    "RotaryEmbedding",
    "SinusoidalPositions",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "apply_rotary",
    "functional",
]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(torch.nn, name)


def __dir__() -> list[str]:
    return sorted({*dir(torch.nn), *globals()})
