"""Scores of one tile, as every attention kernel computes them, and the range of keys that a tile of queries sees.

    s_ij = softcap(scale * q_i.k_j) + bias_ij - slope * |p_i - j|,   p_i = first + i,   -inf where hidden

kept in base 2 (s * log2 e), so that the softmax is exp2. A tile's indices come ready to broadcast, i: [M, 1] and
j: [1, N], or transposed, i: [1, M] and j: [N, 1]; everything here follows their shape.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from transfuse.ops._triton import tanh
from transfuse.ops.attention.variant import Variant

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_FARTHEST = 1 << 30  # no two positions are farther apart; sums with one stay within 32 bits
LOWEST = tl.constexpr(-3.4028234663852886e38)


class Strided(NamedTuple):
    """A (batch, heads, rows, columns) tensor in a kernel: its pointer, None if absent, and strides in elements."""

    pointer: torch.Tensor | None
    batch: int
    head: int
    row: int
    column: int


class Rule(NamedTuple):
    """What shapes the scores beyond tensors; None where a step is left out (and compiled without)."""

    scale: float
    softcap: float | None
    left: int | None
    right: int | None
    first: int | None
    """p_0, None for k_len - q_len."""


class Lengths(NamedTuple):
    """Where each batch row's queries and keys stand: all None where every row is whole."""

    q_starts: torch.Tensor | None = None
    """int32 or int64 (batch + 1): packed queries, cu_seqlens."""
    k_starts: torch.Tensor | None = None
    """int32 or int64 (batch + 1): packed keys."""
    k_lengths: torch.Tensor | None = None
    """int32 or int64 (batch,): how many keys of each row's cache are filled."""


def strided(t: torch.Tensor | None) -> Strided:
    """(batch, heads, rows, columns), a stride of 0 where the size is 1."""
    if t is None:
        return Strided(None, 0, 0, 0, 0)
    return Strided(t, *(0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)))


def per_head(t: torch.Tensor | None) -> Strided:
    """(heads,) or (batch, heads): sinks, ALiBi slopes."""
    if t is None:
        return Strided(None, 0, 0, 0, 0)
    return Strided(t, t.stride(0) if t.dim() == 2 else 0, t.stride(-1), 0, 0)


def rule(variant: Variant) -> Rule:
    """The numbers of a variant."""
    limit = lambda side: None if side < 0 else min(side, _FARTHEST)  # noqa: E731
    return Rule(variant.scale, variant.softcap or None, limit(variant.left), limit(variant.right), variant.first)


def dropout(variant: Variant, seed: torch.Tensor | None) -> tuple[torch.Tensor | None, int, float]:
    """(seed, or None without dropout; dropout_p * 2^32, below which a draw drops; what the kept grow by)."""
    if seed is None or variant.dropout_p == 0:
        return None, 0, 1.0
    return seed, round(variant.dropout_p * 2**32), 1 / (1 - variant.dropout_p)


@triton.jit
def tile(t, b, h, i, j):  # type: ignore[no-untyped-def]
    """Pointers to t[b, h, i, j], with i and j ready to broadcast. In 64 bits: a product may pass 2^31."""
    start = t.pointer + tl.cast(b, tl.int64) * t.batch + tl.cast(h, tl.int64) * t.head
    return start + i.to(tl.int64) * t.row + j.to(tl.int64) * t.column


@triton.jit
def rows_of(  # type: ignore[no-untyped-def]
    t,
    b,
    h,
    i,
    end,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALL: tl.constexpr,
    FROM: tl.constexpr = 0,
    AGAIN: tl.constexpr = False,
):
    """t[b, h, i, FROM : FROM + BLOCK] as [len(i), BLOCK], 0 beyond ``end`` and COLUMNS. i: [len(i), 1].

    ALL: no i is beyond. AGAIN: in a loop that changes none of this, load all the same at every turn.
    """
    column = FROM + tl.arange(0, BLOCK)[None, :]
    pointers = tile(t, b, h, i, column)
    if ALL and FROM + BLOCK <= COLUMNS:
        return tl.load(pointers, volatile=AGAIN)
    elif ALL:  # noqa: RET505 - a constexpr branch
        return tl.load(pointers, mask=column < COLUMNS, other=0.0, volatile=AGAIN)
    elif FROM + BLOCK <= COLUMNS:
        return tl.load(pointers, mask=i < end, other=0.0, volatile=AGAIN)
    else:
        return tl.load(pointers, mask=(i < end) & (column < COLUMNS), other=0.0, volatile=AGAIN)


@triton.jit
def of_head(t, b, h):  # type: ignore[no-untyped-def]
    """t[b, h] of a per_head tensor, fp32."""
    return tl.load(t.pointer + tl.cast(b, tl.int64) * t.batch + tl.cast(h, tl.int64) * t.head).to(tl.float32)


@triton.jit
def q_span(lengths, b, q_len):  # type: ignore[no-untyped-def]
    """(first row, number) of batch row b's queries; int32."""
    begin = q_len * 0
    length = q_len
    if lengths.q_starts is not None:
        begin = tl.load(lengths.q_starts + b).to(tl.int32)
        length = tl.load(lengths.q_starts + b + 1).to(tl.int32) - begin
    return begin, length


@triton.jit
def k_span(lengths, b, k_len):  # type: ignore[no-untyped-def]
    """(first row, number) of batch row b's keys; int32."""
    begin = k_len * 0
    length = k_len
    if lengths.k_starts is not None:
        begin = tl.load(lengths.k_starts + b).to(tl.int32)
        length = tl.load(lengths.k_starts + b + 1).to(tl.int32) - begin
    if lengths.k_lengths is not None:
        length = tl.load(lengths.k_lengths + b).to(tl.int32)
        length = tl.minimum(tl.maximum(length, 0), k_len)  # lengths on a GPU are trusted by nobody else
    return begin, length


@triton.jit
def first_position(rule, q_len, k_len):  # type: ignore[no-untyped-def]
    """p_0."""
    first = k_len - q_len
    if rule.first is not None:
        first = rule.first
    return first


@triton.jit
def key_range(i_low, i_high, first, k_len, rule):  # type: ignore[no-untyped-def]
    """[low, high): outside it no query of [i_low, i_high) sees a key."""
    low = k_len * 0
    high = k_len
    if rule.left is not None:
        low = tl.minimum(tl.maximum(first + i_low - rule.left, 0), k_len)
    if rule.right is not None:
        high = tl.minimum(tl.maximum(first + i_high + rule.right, 0), k_len)
    return low, tl.maximum(low, high)


@triton.jit
def inner_key_range(i_low, i_high, first, k_len, rule):  # type: ignore[no-untyped-def]
    """[low, high): inside it every query of [i_low, i_high) sees every key, as far as positions go."""
    low = k_len * 0
    high = k_len
    if rule.left is not None:
        low = tl.minimum(tl.maximum(first + i_high - 1 - rule.left, 0), k_len)
    if rule.right is not None:
        high = tl.minimum(tl.maximum(first + i_low + rule.right + 1, 0), k_len)
    return low, tl.maximum(low, high)


@triton.jit
def query_range(j_low, j_high, first, q_len, rule):  # type: ignore[no-untyped-def]
    """[low, high): outside it no query sees a key of [j_low, j_high)."""
    low = q_len * 0
    high = q_len
    if rule.right is not None:
        low = tl.minimum(tl.maximum(j_low - rule.right - first, 0), q_len)
    if rule.left is not None:
        high = tl.minimum(tl.maximum(j_high + rule.left - first, 0), q_len)
    return low, tl.maximum(low, high)


@triton.jit
def inner_query_range(j_low, j_high, first, q_len, rule):  # type: ignore[no-untyped-def]
    """[low, high): inside it every query sees every key of [j_low, j_high), as far as positions go."""
    low = q_len * 0
    high = q_len
    if rule.right is not None:
        low = tl.minimum(tl.maximum(j_high - 1 - rule.right - first, 0), q_len)
    if rule.left is not None:
        high = tl.minimum(tl.maximum(j_low + rule.left - first + 1, 0), q_len)
    return low, tl.maximum(low, high)


@triton.jit
def scores(dots, i, j, b, h, first, q_len, k_len, mask, bias, slope, rule, EDGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(s * log2 e, d softcap(x) / dx) of one tile; the second is 1 without soft capping.

    Args:
        dots: fp32, q.k of the tile.
        i, j: query and key indices, int32, ready to broadcast to the tile; any beyond q_len and k_len are let through.
        mask, bias: Strided. slope: fp32 scalar, or None.
        EDGE: whether the window or k_len may hide keys of this tile; rows beyond q_len hold no meaning.
    """
    # Scalars take log2 e in, so that a plain score costs one product.
    through = 1.0
    if rule.softcap is not None:
        t = tanh(dots * (rule.scale / rule.softcap))
        s = t * (rule.softcap * LOG2E)
        through = 1.0 - t * t
    else:
        s = dots * (rule.scale * LOG2E)
    # Rows beyond q_len read the last row's mask and bias instead of being masked: such loads stay whole vectors.
    i_inside = tl.minimum(i, q_len - 1)
    if bias.pointer is not None:
        if EDGE:
            more = tl.load(tile(bias, b, h, i_inside, j), mask=(i_inside >= 0) & (j < k_len), other=0.0).to(tl.float32)
        else:
            more = tl.load(tile(bias, b, h, i_inside, j)).to(tl.float32)
        # finfo.min is a number and not -inf: a row of nothing else is the mean of its values.
        s += more * LOG2E
        s = tl.where((s < LOWEST) & (more >= LOWEST), LOWEST, s)
    if slope is not None:
        s -= (slope * LOG2E) * tl.abs(first + i - j).to(tl.float32)
    if EDGE:
        seen = (j < k_len) & (i >= 0)
        if rule.left is not None:
            seen = seen & (j >= first + i - rule.left)
        if rule.right is not None:
            seen = seen & (j <= first + i + rule.right)
        s = tl.where(seen, s, float("-inf"))
    if mask.pointer is not None:
        if EDGE:
            attend = tl.load(tile(mask, b, h, i_inside, j), mask=(i_inside >= 0) & (j < k_len), other=False)
        else:
            attend = tl.load(tile(mask, b, h, i_inside, j))
        s = tl.where(attend, s, float("-inf"))
    return s, through


@triton.jit
def raised(m, highest):  # type: ignore[no-untyped-def]
    """m raised to cover ``highest``, in base 2: (new m, its finite stand-in, what the sums so far shrink by).

    A row that has seen nothing has m = -inf, and -inf - -inf would be NaN: 0 stands in for it.
    """
    higher = tl.maximum(m, highest)
    finite = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, finite, tl.exp2(m - finite)
