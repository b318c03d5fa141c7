"""The fused operations: one API over the CUDA, Triton and plain-PyTorch implementations."""

from __future__ import annotations

from transfuse.ops.norm import layer_norm, rms_norm

__all__ = ["layer_norm", "rms_norm"]
