"""What the kernels of attention's backward share: their inputs, loads, and the cut of a loop at its edges.

Every one of them recomputes a tile of P from lse and of dP from dO and V, in base 2 as ``triton_scores`` gives s:

    P = 2^(s - lse log2 e)      dP = D (dO V^T)      dS = P (dP - delta)      delta = rowsum(dO out) - dlse

lse is taken as +inf in rows that see nothing and in rows beyond the last: P is 0 there whatever the scores are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from transfuse.ops._triton import precision
from transfuse.ops.attention.triton_scores import LOG2E, Lengths, Rule, Strided, per_head, rule, strided
from transfuse.ops.attention.triton_tiles import Tiles, block_d
from transfuse.ops.attention.variant import Variant

_LOWEST = tl.constexpr(-3.4028234663852886e38)


class Inputs(NamedTuple):
    """The tensors that every kernel of the backward reads; packed rows are one batch row."""

    q: Strided
    """(batch, heads, q_len, head_dim)"""
    k: Strided
    """(batch, kv_heads, k_len, head_dim)"""
    v: Strided
    """(batch, kv_heads, k_len, v_head_dim)"""
    dout: Strided
    """(batch, heads, q_len, v_head_dim)"""
    lse: Strided
    """(batch, heads, q_len, 1), fp32"""
    delta: Strided
    """As lse."""
    mask: Strided
    bias: Strided
    slopes: Strided


class Call(NamedTuple):
    """One backward as its kernels take it, in the order of their first arguments."""

    inputs: Inputs
    rule: Rule
    lengths: Lengths
    seed: torch.Tensor | None
    """int64 (2,) under dropout."""
    threshold: int
    up: float
    """1 / (1 - dropout_p)"""
    heads: int
    group: int
    """heads / kv_heads"""
    q_len: int
    """Of the longest batch row."""
    k_len: int


NUMBERS = ["threshold", "heads", "group", "q_len", "k_len"]
"""Those of a Call that change from call to call: not worth a compilation each."""


def make_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    variant: Variant,
    seed: torch.Tensor | None,
    lengths: Lengths,
    max_q: int,
    max_k: int,
) -> Call:
    """Views of the tensors of one backward and its numbers."""
    inputs = Inputs(
        strided(q),
        strided(k),
        strided(v),
        strided(dout),
        strided(lse[..., None]),
        strided(delta[..., None]),
        strided(variant.mask),
        strided(variant.bias),
        per_head(variant.alibi_slopes),
    )
    dropping = variant.dropout_p > 0 and seed is not None
    return Call(
        inputs,
        rule(variant),
        lengths,
        seed if dropping else None,
        round(variant.dropout_p * 2**32) if dropping else 0,
        1 / (1 - variant.dropout_p),
        q.shape[1],
        q.shape[1] // k.shape[1],
        max_q,
        max_k,
    )


def zeros(t: torch.Tensor) -> torch.Tensor:
    """Like t, contiguous."""
    return torch.zeros_like(t, memory_format=torch.contiguous_format)


def like(t: torch.Tensor, packed: bool) -> torch.Tensor:
    """Where t's gradient goes: its rows in memory as they came in, zero if some may belong to no sequence."""
    if not packed:
        return torch.empty_like(t, memory_format=torch.contiguous_format)
    return t.new_zeros(t.shape[2], t.shape[1], t.shape[3]).transpose(0, 1)[None]


def constants(tiles: Tiles, q: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
    """What every kernel over tiles of scores is compiled for."""
    return {
        **tiles._asdict(),
        "DIM": q.shape[3],
        "V_DIM": v.shape[3],
        "BLOCK_D": block_d(q.shape[3]),
        "BLOCK_DV": block_d(v.shape[3]),
        "PRECISION": precision(q.dtype),
    }


@triton.jit
def statistics_of(t, b, h, begin, i, length, OTHER: tl.constexpr, EDGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """t[b, h, begin + i] as [ROWS]; OTHER beyond length."""
    pointers = t.pointer + tl.cast(b, tl.int64) * t.batch + tl.cast(h, tl.int64) * t.head
    pointers += (begin + i).to(tl.int64) * t.row
    if EDGE:
        return tl.load(pointers, mask=i < length, other=OTHER)
    else:  # noqa: RET505 - a constexpr branch
        return tl.load(pointers)


@triton.jit
def base2(lse):  # type: ignore[no-untyped-def]
    """lse log2 e, +inf where nothing is seen; finite where lse is (the mean of keys biased by finfo.min)."""
    return tl.where(lse == float("-inf"), float("inf"), tl.maximum(lse * LOG2E, _LOWEST))


@triton.jit
def cut(low, high, inner_low, inner_high, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """[low, high) in tiles: (first tile, edge tiles before the inner ones, inner tiles, all edge tiles).

    Inner tiles lie in [inner_low, inner_high) and need no masks. A kernel goes through all edge tiles in one loop and
    through the inner ones in another: two copies of its body.
    """
    end = tl.where(low < high, tl.cdiv(high, BLOCK), 0)
    start = tl.minimum(low // BLOCK, end)
    inner_start = tl.minimum(tl.maximum(tl.cdiv(inner_low, BLOCK), start), end)
    inner_end = tl.maximum(inner_start, tl.minimum(tl.minimum(inner_high, high) // BLOCK, end))
    inner = inner_end - inner_start
    return start, inner_start - start, inner, end - start - inner


@triton.jit
def tile_at(n, start, before, inner, EDGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The n-th edge or inner tile of a :func:`cut`."""
    if EDGE:
        return start + n + tl.where(n < before, 0, inner)
    else:  # noqa: RET505 - a constexpr branch
        return start + before + n
