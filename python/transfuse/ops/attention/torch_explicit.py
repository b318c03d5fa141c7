"""Attention as a differentiable composition of ATen ops.

Used inside traces and transforms (torch.compile, torch.func), where a gradient is itself differentiated, and where
the scores are few enough that keeping P for backward beats computing it again.
"""

from __future__ import annotations

import math

import torch

from transfuse.ops.attention.variant import Variant, distances, per_head, shift, statistics_dtype, unlimited, visible


def attention(
    q: torch.Tensor,  # (batch, heads, q_len, head_dim)
    k: torch.Tensor,  # (batch, kv_heads, k_len, head_dim)
    v: torch.Tensor,  # (batch, kv_heads, k_len, v_head_dim)
    variant: Variant,
    keep: torch.Tensor | None,  # bool (batch, heads, q_len, k_len): what dropout keeps
    with_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse or None)."""
    s = scores(q, k, variant, exact=with_lse)
    lse = None
    if with_lse or variant.sinks is not None:
        p, lse = _softmax(s, variant.sinks)
    else:
        p = torch.softmax(s, -1)
        if may_hide_rows(variant, q.shape[2], k.shape[2]) and (_opaque(s) or _has_nan_rows(p)):
            p = torch._safe_softmax(s, -1)
    if keep is not None:
        p = p * keep / (1 - variant.dropout_p)
    return (fold(p.to(v.dtype), v.shape[1]) @ v).view(*p.shape[:3], v.shape[3]), lse


def scores(q: torch.Tensor, k: torch.Tensor, variant: Variant, exact: bool) -> torch.Tensor:
    """s: (batch, heads, q_len, k_len) in fp32 (fp64 for fp64), -inf where a query does not see a key.

    ``exact``: multiply q and k in fp32 too, for scores that are to agree with an lse made elsewhere.
    """
    q_len, k_len = q.shape[2], k.shape[2]
    s = products(q, k, variant.scale, exact)
    if variant.softcap > 0:
        s = torch.tanh(s / variant.softcap) * variant.softcap
    if variant.bias is not None:
        s = s + variant.bias
    q_positions = torch.arange(q_len, device=q.device) + shift(variant, q_len, k_len)
    k_positions = torch.arange(k_len, device=q.device)
    if variant.alibi_slopes is not None:
        s = s - per_head(variant.alibi_slopes).to(s.dtype) * distances(q_positions, k_positions)
    if variant.mask is not None:
        s = s.masked_fill(~variant.mask, -torch.inf)
    if not unlimited(variant, q_len, k_len):
        s = s.masked_fill(~visible(q_positions, k_positions, variant.left, variant.right), -torch.inf)
    return s


def may_hide_rows(variant: Variant, q_len: int, k_len: int) -> bool:
    """Whether a row could see no key at all, as far as can be told without reading the mask."""
    if variant.mask is not None or variant.bias is not None or k_len == 0:
        return True
    first = shift(variant, q_len, k_len)
    before, behind = first < 0 and variant.right >= 0, variant.left >= 0 and first + q_len - 1 - variant.left >= k_len
    return before or behind


def _opaque(s: torch.Tensor) -> bool:
    """Whether values cannot be looked at here, or not without waiting for a device."""
    return s.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _has_nan_rows(p: torch.Tensor) -> bool:
    # softmax makes a row that sees nothing NaN from end to end, so the first column tells
    return math.isnan(p.detach()[..., :1].sum().item())


def products(q: torch.Tensor, k: torch.Tensor, scale: float, exact: bool) -> torch.Tensor:
    """scale * Q K^T in fp32 (fp64 for fp64).

    Products of low-precision matrices come rounded to that precision. The power of two in the scale, which rounds
    nothing, goes in before and keeps fp16 from overflowing; the rest is applied in fp32. Where the scale is too large
    for that (1 in T5 and GPT-Neo, whose scores do pass 65504), fp16 is multiplied in fp32.
    """
    wide = statistics_dtype(q)
    if exact or q.dtype == wide or (q.dtype == torch.float16 and scale >= 0.5):
        s = fold(q.to(wide) * scale, k.shape[1]) @ k.mT.to(wide)
    else:
        rest, exponent = math.frexp(scale)
        s = (fold(q * 2.0**exponent, k.shape[1]) @ k.mT).to(wide) * rest
    return s.view(*q.shape[:3], k.shape[2])


def _softmax(s: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, lse) with the sink in the denominator; rows that see nothing are 0 and -inf, and pass no gradient."""
    sink = None if sinks is None else per_head(sinks).to(s.dtype)
    if s.shape[-1] > 0:
        top = s.detach().amax(-1, keepdim=True)
    else:
        top = s.detach().new_full((*s.shape[:-1], 1), -torch.inf)
    top = top if sink is None else torch.maximum(top, sink.detach())
    top = top.masked_fill(top == -torch.inf, 0)
    p = (s - top).exp()
    total = p.sum(-1, keepdim=True)
    total = total if sink is None else total + (sink - top).exp()
    empty = total == 0
    total = total.masked_fill(empty, 1)
    return p / total, (top + total.log()).masked_fill(empty, -torch.inf).squeeze(-1)


def fold(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(batch, heads, rows, n) -> (batch, kv_heads, group * rows, n): queries that share keys in one matrix."""
    if x.shape[1] == kv_heads:
        return x
    return x.reshape(x.shape[0], kv_heads, x.shape[1] // kv_heads * x.shape[2], x.shape[3])
