"""Attention in Triton, in the shapes of the registered ops; what is missing here runs on PyTorch (``registration``)."""

from __future__ import annotations

import torch

from transfuse.ops.attention import triton_forward
from transfuse.ops.attention.triton_scores import Lengths
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


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); seed: int64 (2,), read under dropout."""
    return triton_forward.forward(q, k, v, variant, seed, Lengths(), q.shape[2], k.shape[2])


def attention_weights_forward(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, variant: Variant) -> torch.Tensor:
    """P: (batch, heads, q_len, k_len) in q's dtype, zero in rows whose lse is -inf."""
    return triton_forward.weights(q, k, lse, variant)


def attention_varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_q: int,
    max_k: int,
    variant: Variant,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (total_q, heads, v_head_dim), lse (heads, total_q))."""
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k)
    out, lse = triton_forward.forward(packed(q), packed(k), packed(v), variant, seed, lengths, max_q, max_k)
    return out[0].transpose(0, 1), lse[0]


def packed(t: torch.Tensor) -> torch.Tensor:
    """(total, heads, width) as (1, heads, total, width)."""
    return t.transpose(0, 1)[None]
