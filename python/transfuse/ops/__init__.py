"""The fused operations: one API over the CUDA, Triton and plain-PyTorch implementations."""

from __future__ import annotations

from transfuse.ops.attention import (
    attention,
    attention_decode,
    attention_varlen,
    attention_weights,
    scaled_dot_product_attention,
)
from transfuse.ops.causal_softmax import causal_softmax
from transfuse.ops.ffn import ffn, linear_act
from transfuse.ops.norm import layer_norm, rms_norm
from transfuse.ops.rotary import cache_append, rotary_append, rotary_embedding

__all__ = [
    "attention",
    "attention_decode",
    "attention_varlen",
    "attention_weights",
    "cache_append",
    "causal_softmax",
    "ffn",
    "layer_norm",
    "linear_act",
    "rms_norm",
    "rotary_append",
    "rotary_embedding",
    "scaled_dot_product_attention",
]
