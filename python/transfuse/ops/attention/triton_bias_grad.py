"""The gradient of an attention bias that was broadcast, in Triton: dS added up over what the bias was broadcast in.

    dbias = sum of dS over every batch row, head, query and key that share an element of the bias

with dS as in ``triton_gradients``, recomputed; a bias of every score's own is written by ``attention_backward_dq``. One
program owns a tile of the gradient and goes through a run of the tiles of scores that are added into it, in fp32:

    bias of (., ., q_len, k_len)   owns BLOCK_M x BLOCK_N elements,   loops over batch rows and heads that share them
    bias of (., ., 1, k_len)       owns BLOCK_N columns,              loops over those and over tiles of queries
    bias of (., ., q_len, 1)       owns BLOCK_M rows,                 loops over those and over tiles of keys
    bias of (., ., 1, 1)           owns BLOCK_M rows' part of the sum, as before

Where that is too few programs for a device, the run is cut into splits, each a partial of its own; what is left is one
sum over the partials, in the order of its index. No atomics: the result repeats bitwise. Tiles outside the window are
left out. Nothing is saved for it beyond what the rest of the backward reads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from transfuse.ops._triton import dot, kept, launch, rounded
from transfuse.ops._tuning import tuned
from transfuse.ops.attention.triton_backward_tiles import dbias_tiles
from transfuse.ops.attention.triton_gradients import NUMBERS, Call, base2, constants, products, statistics_of, zeros
from transfuse.ops.attention.triton_scores import (
    Lengths,
    first_position,
    k_span,
    key_range,
    of_head,
    q_span,
    query_range,
    rows_of,
    scores,
    strided,
    tile,
)
from transfuse.ops.attention.triton_tiles import Tiles

_PROGRAMS = 512
"""Splits go on until about so many programs run: four for each multiprocessor of the largest devices."""
_SHORTEST_RUN = 4
"""Tiles of scores that a split should at least add up: each split's partial is written and read once more."""


@triton.jit
def _looped(  # type: ignore[no-untyped-def]
    k_low,
    q_low,
    q_len,
    k_len,
    rule,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VARY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """[low, high) of the tiles that a program loops over for one head; empty or one where it loops over heads alone.

    With lengths that VARY by batch row it is all of them.
    """
    first = first_position(rule, q_len, k_len)
    if ROWS:
        low, high = key_range(q_low, tl.minimum(q_low + BLOCK_M, q_len), first, k_len, rule)
        if VARY:
            low, high = k_len * 0, k_len
        if COLUMNS:  # its own tile of keys, if seen at all
            seen = (k_low < high) & (k_low + BLOCK_N > low)
            return k_low // BLOCK_N, k_low // BLOCK_N + tl.where(seen, 1, 0)
        else:  # noqa: RET505 - a constexpr branch
            return low // BLOCK_N, tl.where(low < high, tl.cdiv(high, BLOCK_N), low // BLOCK_N)
    else:
        low, high = query_range(k_low, tl.minimum(k_low + BLOCK_N, k_len), first, q_len, rule)
        if VARY:
            low, high = q_len * 0, q_len
        return low // BLOCK_M, tl.where(low < high, tl.cdiv(high, BLOCK_M), low // BLOCK_M)


@triton.jit
def _ds(  # type: ignore[no-untyped-def]
    inputs,
    rule,
    lengths,
    seed,
    threshold,
    up,
    heads,
    group,
    q_len,
    k_len,
    b,
    h,
    i,
    j,
    j_low,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """dS [BLOCK_M, BLOCK_N] of queries i and keys j of one head; 0 beyond their ends."""
    q_begin, q_length = q_span(lengths, b, q_len)
    k_begin, k_length = k_span(lengths, b, k_len)
    first = first_position(rule, q_length, k_length)
    i_at, q_end = q_begin + i[:, None], q_begin + q_length
    j_at, k_end = k_begin + j[:, None], k_begin + k_length
    kv_head = h // group
    slope = None
    if inputs.slopes.pointer is not None:
        slope = of_head(inputs.slopes, b, h)
    nothing = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    # S = Q K^T [BLOCK_M, BLOCK_N]
    if RESIDENT:
        q_tile = rows_of(inputs.q, b, h, i_at, q_end, DIM, BLOCK_D, False)  # [BLOCK_M, BLOCK_D]
        k_tile = rows_of(inputs.k, b, kv_head, j_at, k_end, DIM, BLOCK_D, False)  # [BLOCK_N, BLOCK_D]
        dots = dot(q_tile, tl.trans(k_tile), nothing, PRECISION)
    else:
        dots = products(inputs.q, inputs.k, b, h, kv_head, i_at, q_end, j_at, k_end, DIM, PRECISION)
    s, _ = scores(
        dots, i[:, None], j[None, :], b, h, first, q_length, k_length, inputs.mask, inputs.bias, slope, rule, True
    )
    lse2 = base2(statistics_of(inputs.lse, b, h, q_begin, i, q_length, float("inf"), True))
    p = tl.exp2(s - lse2[:, None])
    # dP = dO V^T [BLOCK_M, BLOCK_N]
    if RESIDENT:
        dout_tile = rows_of(inputs.dout, b, h, i_at, q_end, V_DIM, BLOCK_DV, False)  # [BLOCK_M, BLOCK_DV]
        v_tile = rows_of(inputs.v, b, kv_head, j_at, k_end, V_DIM, BLOCK_DV, False)  # [BLOCK_N, BLOCK_DV]
        dp = dot(dout_tile, tl.trans(v_tile), nothing, PRECISION)
    else:
        dp = products(inputs.dout, inputs.v, b, h, kv_head, i_at, q_end, j_at, k_end, V_DIM, PRECISION)
    if seed is not None:
        row = (tl.cast(b, tl.int64) * heads + h) * q_len + i
        dp = tl.where(kept(seed, row, j_low, threshold, j.shape[0]), dp * up, 0.0)
    delta = statistics_of(inputs.delta, b, h, q_begin, i, q_length, 0.0, True)
    return p * (dp - delta[:, None])


@triton.jit
def _seen(rule, lengths, q_len, k_len, b, i_low, j_low, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether batch row b has queries at i_low and keys at j_low that may see one another."""
    _, q_length = q_span(lengths, b, q_len)
    _, k_length = k_span(lengths, b, k_len)
    i_high = tl.minimum(i_low + BLOCK_M, q_length)
    low, high = key_range(i_low, i_high, first_position(rule, q_length, k_length), k_length, rule)
    return (i_low < q_length) & (j_low < high) & (j_low + BLOCK_N > low)


@triton.jit(do_not_specialize=[*NUMBERS, "bias_heads", "batches_each", "heads_each", "splits", "split_stride"])
def attention_backward_dbias(  # type: ignore[no-untyped-def]
    inputs,
    rule,
    lengths,
    seed,
    threshold,
    up,
    heads,
    group,
    q_len,
    k_len,
    dbias,  # Strided (bias batch, bias heads, q_len | 1, k_len | 1), the first split's
    split_stride,  # elements from one partial to the next
    splits,
    bias_heads,
    batches_each,  # batch rows that share an element: batch or 1
    heads_each,  # likewise
    ROWS: tl.constexpr,  # whether the bias has a row for each query
    COLUMNS: tl.constexpr,  # and a column for each key
    VARY: tl.constexpr,  # whether lengths differ by batch row
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    program = tl.program_id(0)
    down = 1 if COLUMNS and not ROWS else tl.cdiv(q_len, BLOCK_M)
    across = tl.cdiv(k_len, BLOCK_N) if COLUMNS else 1
    q_low = program // across % down * BLOCK_M
    k_low = program % across * BLOCK_N
    split = program // (across * down) % splits
    owner = program // (across * down) // splits

    low, high = _looped(k_low, q_low, q_len, k_len, rule, ROWS or not COLUMNS, COLUMNS, VARY, BLOCK_M, BLOCK_N)
    tiles = tl.maximum(high - low, 1)
    units = (high - low) * batches_each * heads_each
    run = tl.cdiv(units, splits)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for unit in range(split * run, tl.minimum(split * run + run, units)):
        sharing = unit // tiles
        b = owner // bias_heads + sharing // heads_each
        h = owner % bias_heads + sharing % heads_each
        if COLUMNS and not ROWS:
            i_low, j_low = (low + unit % tiles) * BLOCK_M, k_low
        else:
            i_low, j_low = q_low, (low + unit % tiles) * BLOCK_N
        i = i_low + tl.arange(0, BLOCK_M)
        j = j_low + tl.arange(0, BLOCK_N)
        if VARY:
            if _seen(rule, lengths, q_len, k_len, b, i_low, j_low, BLOCK_M, BLOCK_N):
                total += _ds(inputs, rule, lengths, seed, threshold, up, heads, group, q_len, k_len, b, h, i, j, j_low,
                             DIM, V_DIM, BLOCK_D, BLOCK_DV, PRECISION, RESIDENT)  # fmt: skip
        else:
            total += _ds(inputs, rule, lengths, seed, threshold, up, heads, group, q_len, k_len, b, h, i, j, j_low,
                         DIM, V_DIM, BLOCK_D, BLOCK_DV, PRECISION, RESIDENT)  # fmt: skip

    # A bias of (., ., 1, 1) has a partial for each split of each tile of queries.
    part = split if ROWS or COLUMNS else split * down + q_low // BLOCK_M
    at = tile(dbias, owner // bias_heads, owner % bias_heads, 0 * q_low, 0 * q_low)
    at += tl.cast(part, tl.int64) * split_stride
    i = (q_low + tl.arange(0, BLOCK_M)).to(tl.int64)
    j = (k_low + tl.arange(0, BLOCK_N)).to(tl.int64)
    TYPE: tl.constexpr = dbias.pointer.dtype.element_ty
    if ROWS and COLUMNS:
        at += i[:, None] * dbias.row + j[None, :] * dbias.column
        tl.store(at, rounded(total, TYPE), mask=(i < q_len)[:, None] & (j < k_len)[None, :])
    elif ROWS:
        tl.store(at + i * dbias.row, rounded(tl.sum(total, 1), TYPE), mask=i < q_len)
    elif COLUMNS:
        tl.store(at + j * dbias.column, rounded(tl.sum(total, 0), TYPE), mask=j < k_len)
    else:
        tl.store(at, rounded(tl.sum(tl.sum(total, 1), 0), TYPE))


def bias_gradient(call: Call, batch: int, q: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The gradient of a bias (batch|1, heads|1, q_len|1, k_len|1), in its shape and dtype."""
    if bias.numel() == 0 or call.k_len == 0:
        return zeros(bias)
    rows, columns = bias.shape[2] > 1, bias.shape[3] > 1
    batches_each = batch if bias.shape[0] == 1 else 1
    heads_each = call.heads if bias.shape[1] == 1 else 1
    dbias = bias  # until it is run

    def run(tiles: Tiles) -> None:
        nonlocal dbias
        m_tiles, n_tiles = triton.cdiv(call.q_len, tiles.BLOCK_M), triton.cdiv(call.k_len, tiles.BLOCK_N)
        owned = (1 if columns and not rows else m_tiles) * (n_tiles if columns else 1)
        looped = m_tiles * n_tiles // owned * batches_each * heads_each
        owners = owned * bias.shape[0] * bias.shape[1]
        splits = max(1, min(_PROGRAMS // owners, looped // _SHORTEST_RUN))
        parts = splits * (1 if rows or columns else m_tiles)
        # One part is the gradient itself.
        partial = torch.empty(parts, *bias.shape, dtype=bias.dtype if parts == 1 else torch.float32, device=bias.device)
        launch(
            attention_backward_dbias,
            owners * splits,
            *call,
            strided(partial[0])._replace(pointer=partial),
            bias.numel(),
            splits,
            bias.shape[1],
            batches_each,
            heads_each,
            device=bias.device,
            ROWS=rows,
            COLUMNS=columns,
            VARY=call.lengths != Lengths(),
            **constants(tiles, q, v),
        )
        dbias = partial[0] if parts == 1 else partial.sum(0).to(bias.dtype)

    key, tiles, candidates = dbias_tiles(call, q, v)
    tuned("attention_backward_dbias", key, tiles, candidates, run, q.device)
    return dbias
