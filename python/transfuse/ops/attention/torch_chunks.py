"""Attention in plain PyTorch, block by block: every feature, never more than one block of scores in memory.

A block is a few batch rows and a run of query rows against the keys that those rows can see, sized to stay in cache.
Scores are formed in fp32 (fp64 for fp64), so that they agree with whatever lse; the other products of low-precision
matrices in that precision. Backward recomputes P from lse:

    dP = D (dO V^T)       delta = rowsum(P * dP) - dlse      dS = P * (dP - delta)
    dV += (D P)^T dO      dQ = scale dS K      dK += scale dS^T Q      dbias = dS summed over its broadcast dimensions
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from transfuse.ops.attention.torch_explicit import fold, products
from transfuse.ops.attention.variant import (
    Variant,
    distances,
    per_head,
    shift,
    statistics_dtype,
    visible_block,
    visible_columns,
)

Gradients = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None
]

_BLOCK = 1 << 20
"""Scores in a block: 4 MB in fp32."""
WINDOW_ROWS = 128
"""Query rows in a block when a window limits what they see: thin blocks skip more of what is hidden."""
_ROWS = 64
"""Fewer query rows than this make poor matrix products."""


class Block(NamedTuple):
    batch: slice
    rows: tuple[int, int]
    columns: tuple[int, int]


def forward(
    q: torch.Tensor,  # (batch, heads, q_len, head_dim)
    k: torch.Tensor,  # (batch, kv_heads, k_len, head_dim)
    v: torch.Tensor,  # (batch, kv_heads, k_len, v_head_dim)
    variant: Variant,
    keep: torch.Tensor | None,  # bool (batch, heads, q_len, k_len): what dropout keeps
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); lse is fp32, or fp64 for fp64."""
    wide = statistics_dtype(q)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=wide)
    for block in _blocks(q, k, variant):
        s, _ = _scores(q, k, variant, block, wide)
        top = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:3], 1), -torch.inf)
        if variant.sinks is not None:
            sink = per_head(variant.sinks).to(wide)
            top = torch.maximum(top, sink)
        top.masked_fill_(top == -torch.inf, 0)
        total = s.sub_(top).exp_().sum(-1, keepdim=True)
        if variant.sinks is not None:
            total += (sink - top).exp_()
        if keep is not None:
            s *= _cut(keep, block)
        o = _times_keys(s, v, block, wide)
        empty = total == 0
        o /= total.masked_fill(empty, 1) * (1 - variant.dropout_p)
        out[block.batch, :, slice(*block.rows)] = o
        lse[block.batch, :, slice(*block.rows)] = (top + total.log_()).squeeze(-1)
    return out, lse


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    variant: Variant,
    keep: torch.Tensor | None,
    want: tuple[bool, bool, bool],
) -> Gradients:
    """(dq, dk, dv, dbias, dalibi_slopes, dsinks); ``want`` says which of the last three to compute if they exist."""
    wide = statistics_dtype(q)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    dbias, dslopes, dsinks = (
        None if t is None or not w else torch.zeros(t.shape, dtype=wide, device=t.device)
        for t, w in zip(variant[1:4], want, strict=True)
    )
    for block in _blocks(q, k, variant):
        rows, columns = slice(*block.rows), slice(*block.columns)
        s, capped = _scores(q, k, variant, block, wide)
        row_lse = lse[block.batch, :, rows, None]
        p = s.sub_(row_lse.masked_fill(row_lse == -torch.inf, 0)).exp_()
        g = fold(dout[block.batch, :, rows], k.shape[1])
        dp = (g @ v[block.batch, :, columns].mT).to(wide).view(p.shape)
        dropped = p
        if keep is not None:
            scaled = _cut(keep, block).to(wide).div_(1 - variant.dropout_p)
            dp *= scaled
            dropped = p * scaled
        dv[block.batch, :, columns] += fold(dropped, k.shape[1]).to(g.dtype).mT @ g
        # a block holds whole rows, so delta need not come from out, which has been rounded
        ds = dp.mul_(p)
        delta = ds.sum(-1, keepdim=True)
        if dlse is not None:
            delta -= dlse[block.batch, :, rows, None]
        ds.addcmul_(p, delta, value=-1)
        if dbias is not None:
            target = _cut(dbias, block)
            target += ds.sum_to_size(target.shape)
        if dslopes is not None:
            slope = (ds * _distances(q, k, variant, block)).sum((-2, -1))
            target = dslopes if dslopes.dim() == 1 else dslopes[block.batch]
            target -= slope.sum_to_size(target.shape)
        if dsinks is not None:
            dsinks += sinks_gradient(variant.sinks, row_lse.squeeze(-1), delta.squeeze(-1))
        if capped is not None:
            ds *= capped.square_().neg_().add_(1)
        ds = fold(ds, k.shape[1]).mul_(variant.scale).to(q.dtype)
        dq[block.batch, :, rows] = (ds @ k[block.batch, :, columns]).view(*p.shape[:3], q.shape[3])
        dk[block.batch, :, columns] += ds.mT @ fold(q[block.batch, :, rows], k.shape[1])
    others = (
        None if x is None or t is None else x.to(t.dtype)
        for x, t in zip((dbias, dslopes, dsinks), variant[1:4], strict=True)
    )
    return dq, dk.to(k.dtype), dv.to(v.dtype), *others  # type: ignore[return-value]


def sinks_gradient(sinks: torch.Tensor | None, lse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """(heads,): a sink is a key whose value is 0, so its dS = P * (0 - delta) with P = exp(sink - lse)."""
    assert sinks is not None
    p = (sinks.to(lse.dtype)[:, None] - lse.masked_fill(lse == -torch.inf, torch.inf)).exp()
    return -(p * delta).sum((0, 2))


def _blocks(q: torch.Tensor, k: torch.Tensor, variant: Variant) -> Iterator[Block]:
    batch, heads, q_len, _ = q.shape
    k_len = k.shape[2]
    if batch == 0 or heads == 0 or q_len == 0:
        return
    row = heads * max(k_len, 1)
    rows = min(q_len, max(_ROWS, _BLOCK // row))
    if variant.left >= 0 or variant.right >= 0:
        rows = min(rows, WINDOW_ROWS)
    together = max(1, _BLOCK // (row * rows)) if rows == q_len else 1
    for b in range(0, batch, together):
        for i in range(0, q_len, rows):
            run = (i, min(i + rows, q_len))
            yield Block(slice(b, b + together), run, visible_columns(variant, q_len, k_len, run))


def _scores(
    q: torch.Tensor, k: torch.Tensor, variant: Variant, block: Block, wide: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(s, tanh of the capped scores or None), each (block batch, heads, block rows, block columns)."""
    rows, columns = slice(*block.rows), slice(*block.columns)
    s = products(q[block.batch, :, rows], k[block.batch, :, columns], variant.scale / (variant.softcap or 1.0), True)
    capped = None
    if variant.softcap > 0:
        capped = s.tanh_()
        s = capped * variant.softcap
    if variant.bias is not None:
        s += _cut(variant.bias, block)
    if variant.alibi_slopes is not None:
        slopes = per_head(variant.alibi_slopes).to(wide)
        s -= (slopes if slopes.shape[0] == 1 else slopes[block.batch]) * _distances(q, k, variant, block)
    if variant.mask is not None:
        s.masked_fill_(~_cut(variant.mask, block), -torch.inf)
    seen = visible_block(variant, q.shape[2], k.shape[2], block.rows, block.columns, q.device)
    return s if seen is None else s.masked_fill_(~seen, -torch.inf), capped


def _distances(q: torch.Tensor, k: torch.Tensor, variant: Variant, block: Block) -> torch.Tensor:
    first = shift(variant, q.shape[2], k.shape[2])
    q_positions = torch.arange(first + block.rows[0], first + block.rows[1], device=q.device)
    return distances(q_positions, torch.arange(*block.columns, device=q.device))


def _times_keys(s: torch.Tensor, v: torch.Tensor, block: Block, wide: torch.dtype) -> torch.Tensor:
    values = v[block.batch, :, slice(*block.columns)]
    return (fold(s, v.shape[1]).to(v.dtype) @ values).to(wide).view(*s.shape[:3], v.shape[3])


def _cut(t: torch.Tensor, block: Block) -> torch.Tensor:
    """The block's part of (batch|1, heads|1, q_len|1, k_len|1)."""
    if t.shape[0] > 1:
        t = t[block.batch]
    if t.shape[2] > 1:
        t = t[:, :, slice(*block.rows)]
    return t[..., slice(*block.columns)] if t.shape[3] > 1 else t


def weights_backward(
    dp: torch.Tensor,  # (batch, heads, q_len, k_len)
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    variant: Variant,
    want_bias: bool,
    want_slopes: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dq, dk, dlse, dbias, dalibi_slopes) of P = exp(s - lse): dS = P * dP and dlse = -rowsum(dS)."""
    wide = statistics_dtype(q)
    whole = Block(slice(None), (0, q.shape[2]), (0, k.shape[2]))
    s, capped = _scores(q, k, variant, whole, wide)
    ds = s.sub_(lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp_().mul_(dp)
    dlse = -ds.sum(-1).to(lse.dtype)
    dbias = (
        ds.sum_to_size(variant.bias.shape).to(variant.bias.dtype) if want_bias and variant.bias is not None else None
    )
    dslopes = None
    if want_slopes and variant.alibi_slopes is not None:
        slope = -(ds * _distances(q, k, variant, whole)).sum((-2, -1))
        dslopes = slope.sum_to_size(variant.alibi_slopes.shape).to(variant.alibi_slopes.dtype)
    if capped is not None:
        ds *= capped.square_().neg_().add_(1)
    ds = fold(ds, k.shape[1]).mul_(variant.scale)
    dq = (ds @ k.to(wide)).view(q.shape).to(q.dtype)
    dk = (ds.mT @ fold(q, k.shape[1]).to(wide)).to(k.dtype)
    return dq, dk, dlse, dbias, dslopes
