"""Modules on the fused ops: norms, feed-forward, attention and positions.

``LayerNorm`` and ``RMSNorm`` have torch.nn's constructors and state_dicts.
"""

from __future__ import annotations

from transfuse.nn.attention import Attention
from transfuse.nn.feed_forward import ActivatedLinear, FeedForward
from transfuse.nn.norm import LayerNorm, RMSNorm
from transfuse.nn.positions import RelativePositionBias, SinusoidalPositions
from transfuse.nn.rotary import RopeScaling, RotaryEmbedding, apply_rotary

__all__ = [
    "ActivatedLinear",
    "Attention",
    "FeedForward",
    "LayerNorm",
    "RMSNorm",
    "RelativePositionBias",
    "RopeScaling",
    "RotaryEmbedding",
    "SinusoidalPositions",
    "apply_rotary",
]
