"""Attention on the CUDA kernels of ``csrc/attention``; what is missing here runs on PyTorch."""

from __future__ import annotations

import torch

from transfuse import _extension
from transfuse.ops.attention import cuda_backward, cuda_decode
from transfuse.ops.attention.cuda_arguments import Rows, aligned, packed, shaping, unpacked
from transfuse.ops.attention.variant import Variant

attention_backward = cuda_backward.attention_backward
attention_varlen_backward = cuda_backward.attention_varlen_backward
attention_decode_backward = cuda_backward.attention_decode_backward


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); seed: int64 (2,), read under dropout."""
    if cuda_decode.use_splits(q, k):
        return cuda_decode.decode_forward(q, k, v, variant, seed)
    return _forward(q, k, v, variant, seed, Rows(q.shape[2], k.shape[2]))


def attention_weights_forward(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, variant: Variant) -> torch.Tensor:
    """P: (batch, heads, q_len, k_len) in q's dtype, zero in rows whose lse is -inf."""
    return cuda_decode.weights(q, k, lse, variant)


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
    rows = Rows(max_q, max_k, cu_seqlens_q, cu_seqlens_k)
    out, lse = _forward(packed(q), packed(k), packed(v), variant, seed, rows)
    return unpacked(out), lse[0]


def attention_decode_forward(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
    variant: Variant,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (batch, heads, q_len, v_head_dim), lse (batch, heads, q_len))."""
    if cuda_decode.few_rows(q, k_cache):
        return cuda_decode.decode_forward(q, k_cache, v_cache, variant, seed, cache_lengths)
    rows = Rows(q.shape[2], k_cache.shape[2], k_lengths=cache_lengths)
    return _forward(q, k_cache, v_cache, variant, seed, rows)


def _forward(
    q: torch.Tensor,  # (batch, heads, q_len, head_dim); packed rows: (1, heads, total_q, head_dim)
    k: torch.Tensor,  # (batch, kv_heads, k_len, head_dim), likewise
    v: torch.Tensor,  # (batch, kv_heads, k_len, v_head_dim), likewise
    variant: Variant,
    seed: torch.Tensor | None,
    rows: Rows,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out like q but v_head_dim wide, lse (batch, heads, q_len) fp32)."""
    v_dim = v.shape[3]
    if k.shape[1] == 0:
        return q.new_zeros(*q.shape[:3], v_dim), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    q, k, v = aligned(q), aligned(k), aligned(v)
    if rows.q_starts is None:
        out = q.new_empty(*q.shape[:3], v.shape[3])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    else:  # rows in memory as they came in; some may belong to no sequence
        out = q.new_zeros(q.shape[2], q.shape[1], v.shape[3]).transpose(0, 1)[None]
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    arguments, held = shaping(variant, seed, rows, q.device)
    views = (_extension.view(t) for t in (q, k, v, out, lse[..., None]))
    _extension.kernels().attention_forward(*views, *arguments)
    del held
    return (out if v_dim == v.shape[3] else out[..., :v_dim]), lse
