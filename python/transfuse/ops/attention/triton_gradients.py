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

from transfuse.ops._triton import dot, precision
from transfuse.ops.attention.triton_scores import (
    LOG2E,
    LOWEST,
    Lengths,
    Rule,
    Strided,
    dropout,
    per_head,
    rule,
    strided,
    tile,
)
from transfuse.ops.attention.triton_tiles import Tiles, block_d
from transfuse.ops.attention.variant import Variant


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
    """1 / (1 - dropout_p), 1 without dropout"""
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
    return Call(
        inputs,
        rule(variant),
        lengths,
        *dropout(variant, seed),
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


def resident(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether tiles of rows are read whole, and those that a program keeps once: not where rows are wide and fp32.

    Those are read again, a part at a time (:func:`products`).
    """
    return q.dtype != torch.float32 or max(block_d(q.shape[3]), block_d(v.shape[3])) <= 64


def constants(tiles: Tiles, q: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
    """What every kernel over tiles of scores is compiled for."""
    return {
        **tiles._asdict(),
        "DIM": q.shape[3],
        "V_DIM": v.shape[3],
        "BLOCK_D": block_d(q.shape[3]),
        "BLOCK_DV": block_d(v.shape[3]),
        "PRECISION": precision(q.dtype),
        "RESIDENT": resident(q, v),
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
def products(x, y, b, x_head, y_head, x_at, x_end, y_at, y_end, WIDTH: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """x y^T, [len(x_at), len(y_at)] fp32, 32 columns at a time; x_at, y_at: rows, [len, 1], zero from their ends on.

    Of fp32 the tensor cores take the operands' high and low parts from registers: of whole wide rows they fill them.
    """
    total = tl.zeros([x_at.shape[0], y_at.shape[0]], tl.float32)
    # WIDTH, but not to the compiler: it would unroll the loop and hold all parts at a time.
    width = WIDTH + tl.minimum(x_end, 0)
    for first in tl.range(0, width, 32, num_stages=1):
        column = first + tl.arange(0, 32)[None, :]
        left = tl.load(tile(x, b, x_head, x_at, column), mask=(x_at < x_end) & (column < WIDTH), other=0.0)
        right = tl.load(tile(y, b, y_head, y_at, column), mask=(y_at < y_end) & (column < WIDTH), other=0.0)
        total = dot(left, tl.trans(right), total, PRECISION)
    return total


@triton.jit
def base2(lse):  # type: ignore[no-untyped-def]
    """lse log2 e, +inf where nothing is seen; finite where lse is (the mean of keys biased by finfo.min)."""
    return tl.where(lse == float("-inf"), float("inf"), tl.maximum(lse * LOG2E, LOWEST))


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
