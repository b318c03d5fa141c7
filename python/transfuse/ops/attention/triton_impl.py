"""Attention in Triton, in the shapes of the registered ops; what is missing here runs on PyTorch (``registration``)."""

from __future__ import annotations

import torch

from transfuse.ops.attention.variant import Variant

_LARGEST_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant) -> str | None:
    """Why these kernels cannot take a call, with the remedy, or None."""
    if q.dtype not in _DTYPES:
        name = str(q.dtype).removeprefix("torch.")
        return f"{op}'s Triton kernels take float32, float16 and bfloat16, got {name} (use backend='torch')"
    widest = max(q.shape[-1], v.shape[-1])
    if widest > _LARGEST_HEAD_DIM:
        return f"{op}'s Triton kernels take a head_dim up to {_LARGEST_HEAD_DIM}, got {widest} (use backend='torch')"
    return None
