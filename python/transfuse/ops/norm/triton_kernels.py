"""Layer norm and RMS norm in Triton: s = x + residual rounded to x's dtype, y = (s - mean) * rstd * weight + bias.

A None pointer leaves its step out of the kernel; RMS norm is the kernel without `mean` (then 0) and without `bias`.

    norm_forward_rows     N <= 16384. A program owns ROWS whole rows in registers: one read, one write, and a variance
                          of two passes over the registers (E[x^2] - E[x]^2 would cancel for rows with a large mean)
    norm_forward_loop     any N. A program owns one row, read twice in rounds of COLUMNS, whose means and squared
                          deviations are merged as Chan, Golub and LeVeque do; the second read comes from the L2 cache

Backward, n = (s - mean) * rstd and g = dy * weight:  ds = rstd * (g - mean(g) - n * mean(g * n)) + dsummed,
dweight = sum dy * n,  dbias = sum dy.  RMS norm has no mean(g).

    norm_backward_rows    N <= 8192 (4096 beside fp32). Program k of G owns tiles k, k + G, ... of ROWS rows; it reads
                          the next tile while it works on this one, and sums its rows' dy * n and dy in registers into
                          row k of (G, N)
    norm_backward_loop    any N. A program owns one row, read twice: its two means first, then ds
    norm_weight_partials  beside norm_backward_loop: program (k, b) of G x B sums COLUMNS columns over tiles k, k + G...
    norm_weight_sums      a program owns COLUMNS columns and sums the G rows of partial sums

Saved for backward: s, mean, rstd (fp32). No atomics: G and every order depend on shapes and on the GPU's size alone.
The launchers guarantee contiguous columns; N = packs * ALIGN > 0 and ALIGN divides every row stride (Triton would see
multiples of 16 alone, and 16-byte accesses need multiples of 4 or 8); outputs overlap nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from transfuse.ops._triton import rounded


class Rows(NamedTuple):
    """A (M, N) tensor in a kernel: its pointer, None if absent, and how far its rows are apart."""

    pointer: torch.Tensor | None
    stride: int


# --- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _at(t, row, column, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pointers [ROWS, COLUMNS]; row: int64 [ROWS], column: [COLUMNS]."""
    return t.pointer + tl.multiple_of(row * t.stride, ALIGN)[:, None] + column[None, :]


@triton.jit
def _sum_of(x, residual, summed, row, column, inside, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """s in fp32 [ROWS, COLUMNS], 0 outside; `summed` is written on the way."""
    s = tl.load(_at(x, row, column, ALIGN), mask=inside, other=0.0).to(tl.float32)
    if residual.pointer is not None:
        s += tl.load(_at(residual, row, column, ALIGN), mask=inside, other=0.0).to(tl.float32)
        stored = rounded(s, x.pointer.dtype.element_ty)
        tl.store(_at(summed, row, column, ALIGN), stored, mask=inside)
        s = stored.to(tl.float32)
    return s


@triton.jit
def _reciprocal_root(squares, N, eps):  # type: ignore[no-untyped-def]
    # IEEE square root and division, once a row: rsqrt would spend two units in the last place of every element.
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, N.to(tl.float32)) + eps))


@triton.jit
def _store_normalised(y, normed, weight, bias, row, column, inside, N, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """y = normed * weight + bias; normed: fp32 [ROWS, COLUMNS]."""
    if weight is not None:
        normed = normed * tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        normed = normed + tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    tl.store(_at(y, row, column, ALIGN), rounded(normed, y.pointer.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "packs", "eps"])
def norm_forward_rows(  # type: ignore[no-untyped-def]
    x, residual, weight, bias, y, summed, mean, rstd, M, packs, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    N = packs * ALIGN
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < M)[:, None] & (column < N)[None, :]
    s = _sum_of(x, residual, summed, row, column, inside, ALIGN)
    if mean is not None:
        centre = tl.div_rn(tl.sum(s, 1), N.to(tl.float32))
        tl.store(mean + row, centre, mask=row < M)
        s = tl.where(inside, s - centre[:, None], 0.0)
    scale = _reciprocal_root(tl.sum(s * s, 1), N, eps)
    tl.store(rstd + row, scale, mask=row < M)
    _store_normalised(y, s * scale[:, None], weight, bias, row, column, inside, N, ALIGN)


@triton.jit(do_not_specialize=["packs", "eps"])
def norm_forward_loop(  # type: ignore[no-untyped-def]
    x, residual, weight, bias, y, summed, mean, rstd, packs, eps,
    COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    N = packs * ALIGN
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    centre = tl.zeros([1], tl.float32)
    squares = tl.zeros([1], tl.float32)
    for begin in range(0, N, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        inside = (column < N)[None, :]
        s = _sum_of(x, residual, summed, row, column, inside, ALIGN)
        if mean is not None:
            # Merges the round's mean and squared deviations with those of the `begin` columns before it.
            count = tl.minimum(N - begin, COLUMNS).to(tl.float32)
            round_centre = tl.div_rn(tl.sum(s, 1), count)
            s = tl.where(inside, s - round_centre[:, None], 0.0)
            share = count / (begin + count)
            apart = round_centre - centre
            squares += apart * apart * (begin * share)
            centre += apart * share
        squares += tl.sum(s * s, 1)
    scale = _reciprocal_root(squares, N, eps)
    if mean is not None:
        tl.store(mean + row, centre)
    tl.store(rstd + row, scale)
    if residual.pointer is not None:
        tl.debug_barrier()  # `summed` is read back, perhaps by other threads than those that wrote it
    for begin in range(0, N, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        inside = (column < N)[None, :]
        if residual.pointer is not None:
            s = tl.load(_at(summed, row, column, ALIGN), mask=inside, other=0.0).to(tl.float32)
        else:
            s = tl.load(_at(x, row, column, ALIGN), mask=inside, other=0.0).to(tl.float32)
        normed = (s - centre[:, None]) * scale[:, None]
        _store_normalised(y, normed, weight, bias, row, column, inside, N, ALIGN)


# --- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def _read_tile(dout, summed, mean, rstd, row, column, M, N, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """(s, dy) [ROWS, COLUMNS] as they are stored, (mean, rstd) [ROWS]; all 0 outside, the mean also where none is."""
    inside = (row < M)[:, None] & (column < N)[None, :]
    s = tl.load(_at(summed, row, column, ALIGN), mask=inside, other=0.0)
    dy = tl.load(_at(dout, row, column, ALIGN), mask=inside, other=0.0)
    scale = tl.load(rstd + row, mask=row < M, other=0.0)
    if mean is not None:
        centre = tl.load(mean + row, mask=row < M, other=0.0)
    else:
        centre = tl.zeros([row.shape[0]], tl.float32)
    return s, dy, centre, scale


@triton.jit
def _normed(s, centre, scale):  # type: ignore[no-untyped-def]
    return (s.to(tl.float32) - centre[:, None]) * scale[:, None]


@triton.jit
def _weighted(dy, weight, column, N):  # type: ignore[no-untyped-def]
    """g = dy * weight in fp32 [ROWS, COLUMNS]."""
    g = dy.to(tl.float32)
    if weight is not None:
        g = g * tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    return g


@triton.jit
def _store_ds(dx, dsummed, g, n, mean_g, mean_gn, scale, row, column, M, N, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """ds = rstd * (g - mean(g) - n * mean(g * n)) + dsummed; the means [ROWS] come as sums."""
    inside = (row < M)[:, None] & (column < N)[None, :]
    columns = N.to(tl.float32)
    ds = g - tl.div_rn(mean_g, columns)[:, None] - n * tl.div_rn(mean_gn, columns)[:, None]
    ds = ds * scale[:, None]
    if dsummed.pointer is not None:
        ds += tl.load(_at(dsummed, row, column, ALIGN), mask=inside, other=0.0).to(tl.float32)
    tl.store(_at(dx, row, column, ALIGN), rounded(ds, dx.pointer.dtype.element_ty), mask=inside)


@triton.jit
def _store_partial(partial, total, group, column, N):  # type: ignore[no-untyped-def]
    """Row `group` of partial sums: fp32 (G, N)."""
    tl.store(partial + group.to(tl.int64) * N + column, tl.sum(total, 0), mask=column < N)


@triton.jit(do_not_specialize=["M", "packs"])
def norm_backward_rows(  # type: ignore[no-untyped-def]
    dout, dsummed, summed, weight, mean, rstd, dx, dweight, dbias, M, packs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    N = packs * ALIGN
    group, groups = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, COLUMNS)
    # [ROWS, COLUMNS] and not [COLUMNS]: the sum over rows, which crosses threads, is then made once and not every tile.
    dweight_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    next_row = group.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    next_s, next_dy, next_centre, next_scale = _read_tile(dout, summed, mean, rstd, next_row, column, M, N, ALIGN)
    for _ in range(group, tl.cdiv(M, ROWS), groups):
        row, dy, scale = next_row, next_dy, next_scale
        n = _normed(next_s, next_centre, scale)
        next_row = row + groups * ROWS
        next_s, next_dy, next_centre, next_scale = _read_tile(dout, summed, mean, rstd, next_row, column, M, N, ALIGN)
        if dweight is not None:
            dweight_sum += dy.to(tl.float32) * n
        if dbias is not None:
            dbias_sum += dy.to(tl.float32)
        g = _weighted(dy, weight, column, N)
        sum_gn = tl.sum(g * n, 1)
        sum_g = tl.sum(g, 1) if mean is not None else tl.zeros([ROWS], tl.float32)
        _store_ds(dx, dsummed, g, n, sum_g, sum_gn, scale, row, column, M, N, ALIGN)
    if dweight is not None:
        _store_partial(dweight, dweight_sum, group, column, N)
    if dbias is not None:
        _store_partial(dbias, dbias_sum, group, column, N)


@triton.jit(do_not_specialize=["M", "packs"])
def norm_backward_loop(  # type: ignore[no-untyped-def]
    dout, dsummed, summed, weight, mean, rstd, dx, M, packs,
    COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    N = packs * ALIGN
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    sums_g = tl.zeros([1, COLUMNS], tl.float32)
    sums_gn = tl.zeros([1, COLUMNS], tl.float32)
    for begin in range(0, N, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        s, dy, centre, scale = _read_tile(dout, summed, mean, rstd, row, column, M, N, ALIGN)
        g = _weighted(dy, weight, column, N)
        sums_gn += g * _normed(s, centre, scale)
        if mean is not None:
            sums_g += g
    sum_g, sum_gn = tl.sum(sums_g, 1), tl.sum(sums_gn, 1)
    for begin in range(0, N, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        s, dy, centre, scale = _read_tile(dout, summed, mean, rstd, row, column, M, N, ALIGN)
        g = _weighted(dy, weight, column, N)
        _store_ds(dx, dsummed, g, _normed(s, centre, scale), sum_g, sum_gn, scale, row, column, M, N, ALIGN)


@triton.jit(do_not_specialize=["M", "packs", "groups"])
def norm_weight_partials(  # type: ignore[no-untyped-def]
    dout, summed, mean, rstd, dweight, dbias, M, packs, groups,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    N = packs * ALIGN
    group, block = tl.program_id(0) % groups, tl.program_id(0) // groups
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    dweight_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    row = group.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for _ in range(group, tl.cdiv(M, ROWS), groups):
        s, dy, centre, scale = _read_tile(dout, summed, mean, rstd, row, column, M, N, ALIGN)
        if dweight is not None:
            dweight_sum += dy.to(tl.float32) * _normed(s, centre, scale)
        if dbias is not None:
            dbias_sum += dy.to(tl.float32)
        row += groups * ROWS
    if dweight is not None:
        _store_partial(dweight, dweight_sum, group, column, N)
    if dbias is not None:
        _store_partial(dbias, dbias_sum, group, column, N)


@triton.jit(do_not_specialize=["packs", "groups"])
def norm_weight_sums(  # type: ignore[no-untyped-def]
    dweight_partial, dbias_partial, dweight, dbias, groups, packs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    N = packs * ALIGN
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if dweight is not None:
        _sum_partials(dweight_partial, dweight, groups, column, N, ROWS)
    if dbias is not None:
        _sum_partials(dbias_partial, dbias, groups, column, N, ROWS)


@triton.jit
def _sum_partials(partial, out, groups, column, N, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[column] = sum of partial (G, N) over G, a tile of ROWS at a time."""
    total = tl.zeros([ROWS, column.shape[0]], tl.float32)
    for begin in range(0, groups, ROWS):
        group = begin + tl.arange(0, ROWS)
        inside = (group < groups)[:, None] & (column < N)[None, :]
        total += tl.load(partial + group.to(tl.int64)[:, None] * N + column[None, :], mask=inside, other=0.0)
    tl.store(out + column, rounded(tl.sum(total, 0), out.dtype.element_ty), mask=column < N)
