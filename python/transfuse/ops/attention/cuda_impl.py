"""Attention forward on the CUDA kernel of ``csrc/attention``; what is missing here runs on PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from transfuse import _extension
from transfuse.ops.attention.variant import Variant

_FARTHEST = 2**30
"""A window or position beyond this is no different from one at it; the kernel adds two of them in 32 bits."""


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); seed: int64 (2,), read under dropout."""
    return _forward(q, k, v, variant, seed, None, None, q.shape[2], k.shape[2])


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
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # (1, heads, total, width)
    out, lse = _forward(q, k, v, variant, seed, cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    return out[0].transpose(0, 1), lse[0]


def _forward(
    q: torch.Tensor,  # (batch, heads, q_len, head_dim); packed rows: (1, heads, total_q, head_dim)
    k: torch.Tensor,  # (batch, kv_heads, k_len, head_dim), likewise
    v: torch.Tensor,  # (batch, kv_heads, k_len, v_head_dim), likewise
    variant: Variant,
    seed: torch.Tensor | None,
    q_starts: torch.Tensor | None,
    k_starts: torch.Tensor | None,
    max_q: int,
    max_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out like q but v_head_dim wide, lse (batch, heads, q_len) fp32)."""
    v_dim = v.shape[3]
    if k.shape[1] == 0:
        return q.new_zeros(*q.shape[:3], v_dim), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    if q_starts is None:
        out = q.new_empty(*q.shape[:3], v.shape[3])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    else:  # rows in memory as they came in; some may belong to no sequence
        out = q.new_zeros(q.shape[2], q.shape[1], v.shape[3]).transpose(0, 1)[None]
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    # Named until after the launch: a view holds no reference, and the memory of a copy dropped before it is reused.
    slopes, sinks = _per_head(variant.alibi_slopes), _per_head(variant.sinks)
    starts = [None if t is None else t.to(torch.int32).contiguous() for t in (q_starts, k_starts)]
    drops = variant.dropout_p > 0 and seed is not None
    view = _extension.view
    _extension.kernels().attention_forward(
        view(q),
        view(k),
        view(v),
        view(out),
        view(lse[..., None]),
        view(variant.mask),
        view(variant.bias),
        view(slopes),
        view(sinks),
        view(starts[0]),
        view(starts[1]),
        None,
        view(seed) if drops else None,
        max_q,
        max_k,
        variant.scale,
        min(variant.left, _FARTHEST),
        min(variant.right, _FARTHEST),
        variant.first,
        variant.softcap,
        variant.dropout_p,
        _extension.target(q.device),
    )
    return (out if v_dim == v.shape[3] else out[..., :v_dim]), lse


def _aligned(t: torch.Tensor) -> torch.Tensor:
    """t with whole 16-byte chunks in every row: itself where it has them, else a copy, widened with zeros."""
    chunk = 16 // t.element_size()
    strides_fit = all(
        size <= 1 or stride % chunk == 0 for size, stride in zip(t.shape[:3], t.stride()[:3], strict=True)
    )
    if t.shape[3] % chunk == 0 and t.shape[3] > 0 and t.stride(3) == 1 and strides_fit and t.data_ptr() % 16 == 0:
        return t
    return F.pad(t, (0, (-t.shape[3]) % chunk if t.shape[3] else chunk)).contiguous()


def _per_head(t: torch.Tensor | None) -> torch.Tensor | None:
    """(heads,) or (batch, heads) as (batch|1, heads, 1, 1) fp32."""
    return None if t is None else t.float().reshape(-1, t.shape[-1], 1, 1)
