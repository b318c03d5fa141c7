"""The fused operations: one API over the CUDA, Triton and plain-PyTorch implementations."""

from __future__ import annotations

from transfuse.ops.attention import attention, attention_weights
from transfuse.ops.norm import layer_norm, rms_norm

__all__ = ["attention", "attention_weights", "layer_norm", "rms_norm"]
