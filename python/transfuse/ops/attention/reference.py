"""Attention as formulas, in any precision: the specification. It materialises every score.

For query i standing at position p_i among the keys (p_i = i, or i + k_len - q_len when aligned lower right):

    s_ij = softcap * tanh(scale * q_i.k_j / softcap) + bias_ij - slope * |p_i - j|     (plain scale * q_i.k_j without)
    s_ij = -inf   where mask_ij is False or j is outside [p_i - left, p_i + right]
    lse_i = log(sum_j exp(s_ij) + exp(sink))        P_ij = exp(s_ij - lse_i)        out_i = sum_j D_ij P_ij v_j

D is 1, or under dropout 0 with probability p and else 1 / (1 - p). A row that sees no key has out = 0, no gradient and
lse = -inf (= sink with a sink). See docs/attention.md.
"""

from __future__ import annotations

import torch

from transfuse.ops.attention.variant import (
    Variant,
    corner,
    distances,
    per_head,
    rows_of,
    shift,
    statistics_dtype,
    visible,
)


def attention(
    q: torch.Tensor,  # (batch, heads, q_len, head_dim)
    k: torch.Tensor,  # (batch, kv_heads, k_len, head_dim)
    v: torch.Tensor,  # (batch, kv_heads, k_len, v_head_dim)
    variant: Variant,
    keep: torch.Tensor | None = None,  # bool (batch, heads, q_len, k_len): what dropout keeps
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (out, lse): (batch, heads, q_len, v_head_dim) and (batch, heads, q_len)."""
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    s = scores(q, k, variant)
    sinks = variant.sinks
    sink = torch.full((), -torch.inf, dtype=s.dtype, device=s.device) if sinks is None else per_head(sinks).to(s.dtype)
    s = torch.cat([s, sink.expand(*s.shape[:-1], 1)], -1)  # the sink as one more key, so no row is empty
    highest = s.detach().amax(-1, keepdim=True)
    weights = (s - highest.masked_fill(highest == -torch.inf, 0)).exp()
    total = weights.sum(-1, keepdim=True)
    nothing = total == 0
    weights = weights / total.masked_fill(nothing, 1)
    p = weights[..., :-1]
    if keep is not None:
        p = p * keep / (1 - variant.dropout_p)
    out = p @ v.repeat_interleave(group, 1)
    lse = (highest + total.masked_fill(nothing, 1).log()).squeeze(-1)
    return out, lse.to(statistics_dtype(q))


def scores(q: torch.Tensor, k: torch.Tensor, variant: Variant) -> torch.Tensor:
    """s: (batch, heads, q_len, k_len), -inf where a query does not see a key."""
    q_len, k_len = q.shape[2], k.shape[2]
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    s = q @ k.repeat_interleave(group, 1).mT * variant.scale
    if variant.softcap > 0:
        s = variant.softcap * torch.tanh(s / variant.softcap)
    if variant.bias is not None:
        s = s + variant.bias.to(s.dtype)
    q_positions = torch.arange(q_len, device=q.device) + shift(variant, q_len, k_len)
    k_positions = torch.arange(k_len, device=q.device)
    if variant.alibi_slopes is not None:
        s = s - per_head(variant.alibi_slopes).to(s.dtype) * distances(q_positions, k_positions)
    seen = visible(q_positions, k_positions, variant.left, variant.right)
    if variant.mask is not None:
        seen = seen & variant.mask
    return s.masked_fill(~seen, -torch.inf)


def attention_weights(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, variant: Variant) -> torch.Tensor:
    """P: (batch, heads, q_len, k_len) from the lse of an earlier call; a row with lse = -inf is zero."""
    lse = lse.masked_fill(lse == -torch.inf, 0)[..., None]
    return (scores(q, k, variant) - lse.to(q.dtype)).exp()


def attention_varlen(
    q: torch.Tensor,  # (total_q, heads, head_dim)
    k: torch.Tensor,  # (total_k, kv_heads, head_dim)
    v: torch.Tensor,  # (total_k, kv_heads, v_head_dim)
    cu_seqlens_q: torch.Tensor,  # (batch + 1,)
    cu_seqlens_k: torch.Tensor,
    variant: Variant,
    keep: torch.Tensor | None = None,  # bool (batch, heads, max_q, max_k)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every sequence by itself: (total_q, heads, v_head_dim) and lse (heads, total_q); others 0, -inf."""
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [], []
    for b in range(len(bounds_q) - 1):
        rows, keys = slice(*bounds_q[b : b + 2]), slice(*bounds_k[b : b + 2])
        q_len, k_len = bounds_q[b + 1] - bounds_q[b], bounds_k[b + 1] - bounds_k[b]
        out, lse = attention(
            q[rows].transpose(0, 1)[None],
            k[keys].transpose(0, 1)[None],
            v[keys].transpose(0, 1)[None],
            rows_of(variant, slice(b, b + 1), q_len, k_len),
            corner(keep, slice(b, b + 1), q_len, k_len),
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    rest = q[bounds_q[-1] :]
    outs.append(rest.new_zeros(rest.shape[0], q.shape[1], v.shape[2]))
    lses.append(rest.new_full((q.shape[1], rest.shape[0]), -torch.inf, dtype=statistics_dtype(q)))
    return torch.cat(outs), torch.cat(lses, 1)


def attention_decode(
    q: torch.Tensor,  # (batch, heads, q_len, head_dim)
    k_cache: torch.Tensor,  # (batch, kv_heads, max_len, head_dim)
    v_cache: torch.Tensor,  # (batch, kv_heads, max_len, v_head_dim)
    cache_lengths: torch.Tensor,  # (batch,)
    variant: Variant,  # first is None: aligned lower right
    keep: torch.Tensor | None = None,  # bool (batch, heads, q_len, max_len)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row against its own first cache_lengths[b] keys: (batch, heads, q_len, v_head_dim) and lse."""
    pairs = [
        attention(
            q[b : b + 1],
            k_cache[b : b + 1, :, :length],
            v_cache[b : b + 1, :, :length],
            rows_of(variant, slice(b, b + 1), q.shape[2], length),
            corner(keep, slice(b, b + 1), q.shape[2], length),
        )
        for b, length in enumerate(cache_lengths.tolist())
    ]
    if not pairs:
        return attention(q, k_cache, v_cache, variant, keep)
    return torch.cat([out for out, _ in pairs]), torch.cat([lse for _, lse in pairs])
