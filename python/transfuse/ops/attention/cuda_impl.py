"""Attention on the CUDA kernels of ``csrc/attention``: which of them take a call."""

from __future__ import annotations

import torch

from transfuse import _extension
from transfuse.ops.attention import cuda_backward, cuda_decode
from transfuse.ops.attention.cuda_arguments import aligned, shaping
from transfuse.ops.attention.kernels import Kernels, Rows
from transfuse.ops.attention.variant import Variant


def _forward(
    q: torch.Tensor,  # (batch, heads, q_len, head_dim); packed rows: (1, heads, total_q, head_dim)
    k: torch.Tensor,  # (batch, kv_heads, k_len, head_dim), likewise
    v: torch.Tensor,  # (batch, kv_heads, k_len, v_head_dim), likewise
    variant: Variant,
    seed: torch.Tensor | None,
    rows: Rows,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out like q but v_head_dim wide, lse (batch, heads, q_len) fp32)."""
    few = cuda_decode.use_splits if rows.k_lengths is None else cuda_decode.few_rows
    if rows.q_starts is None and few(q, k):
        return cuda_decode.decode_forward(q, k, v, variant, seed, rows.k_lengths)
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


KERNELS = Kernels(_forward, cuda_backward.backward, cuda_decode.weights)
