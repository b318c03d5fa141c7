"""Causal softmax in Triton: scale, causal diagonal, bool mask, bias and softmax in one pass over the scores, and back.

    s = scale * scores + bias where key j < limit_i (j <= i + diagonal) and mask, else -inf;   P = exp(s - max s) / sum
    r_i = sum_j P_ij G_ij,   dlogits = P (G - r),   dscores = scale * dlogits,   dbias = sum over broadcast of dlogits

``_forward_rows``   a program owns ROWS rows, whole, in registers: scores are read once and P written once.
``_forward_long``   a program owns one row too long for that: running maximum and sum, then a second reading.
``_backward_*``     the same two. Rows are numbered (group, member): a group is what one row of bias belongs to, its
                    members differ in the dimensions along which that row is broadcast. A program owns ROWS groups and
                    a chunk of their members, goes through these in order and sums dlogits in fp32; chunks, if there
                    is more than one, leave fp32 partial sums that torch.sum adds. No atomics: the same bits always.

Keys at or beyond limit_i are neither read (but for the rest of a 16-byte access) nor computed; P and dscores get 0
there. A row that sees nothing has sum 0 and gets 0; a NaN seen makes the sum NaN. The exponent is taken of
(s - max s) * log2 e: s * log2 e alone would turn finfo.min into -inf. Saved for backward: P alone.

The launcher guarantees: row dimensions are collapsed, their strides in one tuple a tensor; ALIGN elements divide k_len
and every row stride of a tensor with contiguous keys; out, dscores and dbias are contiguous and overlap nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from transfuse.ops import _validate
from transfuse.ops._triton import launch
from transfuse.ops._tuning import tuned
from transfuse.ops.causal_softmax import rows

_LOG2E = tl.constexpr(math.log2(math.e))
_NEG_INF = tl.constexpr(float("-inf"))
# Lengths of any value share one compilation; keys must divide evenly by ALIGN, which is a constant of its own.
_LENGTHS = ["rows", "groups", "members", "a_chunk", "k_len", "diagonal", "scale"]

MOST_COLUMNS = 16384
"""Longest row kept in registers: 32 fp32 of it a thread at 16 warps."""
_TILE = 2048  # elements of a tile of short rows: 16 a thread at 4 warps


class Rows(NamedTuple):
    """A (..., q_len, k_len) tensor as the forward kernels see it; pointer None: absent."""

    pointer: torch.Tensor | None
    row: tuple[int, ...]  # stride of each row dimension
    column: int | None  # stride of the keys; None: they are contiguous


class Groups(NamedTuple):
    """The same for the backward kernels."""

    pointer: torch.Tensor | None
    group: tuple[int, ...]
    member: tuple[int, ...]
    column: int | None


class Tiles(NamedTuple):
    """What a program owns: ROWS rows (or groups of rows) and COLUMNS keys at a time."""

    ROWS: int
    COLUMNS: int
    num_warps: int


# --- device code ----------------------------------------------------------------------------------------------------


@triton.jit
def _offset(index, sizes, strides):  # type: ignore[no-untyped-def]
    """Element offset (int64) of row ``index`` of a tensor with row dimensions of these sizes and strides."""
    offset = index.to(tl.int64) * 0
    for d in tl.static_range(len(sizes) - 1, 0, -1):
        offset += (index % sizes[d]).to(tl.int64) * strides[d]
        index = index // sizes[d]
    return offset + index.to(tl.int64) * strides[0]


@triton.jit
def _limit(query, k_len, diagonal):  # type: ignore[no-untyped-def]
    """How many keys a query may see, int64; diagonal None: all of them."""
    if diagonal is None:
        limit = query * 0 + k_len
    else:
        limit = tl.minimum(tl.maximum(query + diagonal + 1, 0), k_len)
    return limit


@triton.jit
def _up(count, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The next multiple of ALIGN, in a form the compiler knows to be one: it vectorizes what such a bound masks."""
    return (count + (ALIGN - 1)) // ALIGN * ALIGN


@triton.jit
def _at(tensor, start, begin, column, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pointers to keys begin + column of rows that start at these offsets; start: [ROWS, 1], column: [1, COLUMNS]."""
    if tensor.column is None:
        offset = (start + begin) // ALIGN * ALIGN + column  # changes nothing, but shows the compiler a multiple
    else:
        offset = start + (begin + column.to(tl.int64)) * tensor.column
    return tensor.pointer + offset


@triton.jit
def _starts(row, sizes, scores, mask, bias):  # type: ignore[no-untyped-def]
    """Offsets of a row in scores, mask and bias; any number where one is absent."""
    in_scores = _offset(row, sizes, scores.row)
    in_mask = in_scores
    in_bias = in_scores
    if mask.pointer is not None:
        in_mask = _offset(row, sizes, mask.row)
    if bias.pointer is not None:
        in_bias = _offset(row, sizes, bias.row)
    return in_scores, in_mask, in_bias


@triton.jit
def _logits(scores, mask, bias, starts, begin, column, limit, scale, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """scale * scores + bias where seen and -inf elsewhere: fp32 [ROWS, COLUMNS], keys begin + column.

    starts: see _starts; limit: int32, how many keys from ``begin`` on may be seen.
    """
    read = column < _up(limit, ALIGN)
    s = tl.load(_at(scores, starts[0], begin, column, ALIGN), read, other=0.0).to(tl.float32) * scale
    if bias.pointer is not None:
        s += tl.load(_at(bias, starts[2], begin, column, ALIGN), read, other=0.0).to(tl.float32)
    seen = column < limit
    if mask.pointer is not None:
        seen = seen & (tl.load(_at(mask, starts[1], begin, column, ALIGN), read, other=0) != 0)
    return tl.where(seen, s, _NEG_INF)


@triton.jit
def _exp(s, most):  # type: ignore[no-untyped-def]
    """e^(s - most); 0 for s of -inf, whatever the maximum: -inf - -inf would be NaN."""
    return tl.exp2((s - tl.where(most == _NEG_INF, 0.0, most)) * _LOG2E)


@triton.jit
def _inverse(total):  # type: ignore[no-untyped-def]
    """1 / total, and 0 for the sum of a row that sees nothing."""
    return 1.0 / tl.where(total == 0.0, float("inf"), total)


@triton.jit
def _write(tensor, start, begin, column, columns, value, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store value [ROWS, COLUMNS] at keys begin + column, rounded, as far as column < columns."""
    to = _at(tensor, start, begin, column, ALIGN)
    tl.store(to, value.to(tensor.pointer.dtype.element_ty), column < _up(columns, ALIGN))


# --- forward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_LENGTHS)
def _forward_rows(  # type: ignore[no-untyped-def]
    scores, mask, bias, out, query, sizes, rows, k_len, diagonal, scale,
    INDEX: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    columns = tl.where(row < rows, k_len, 0).to(tl.int32)
    limit = tl.minimum(_limit(_offset(row, sizes, query), k_len, diagonal).to(tl.int32), columns)
    s = _logits(scores, mask, bias, _starts(row, sizes, scores, mask, bias), 0, column, limit, scale, ALIGN)
    p = _exp(s, tl.max(s, 1)[:, None])
    p *= _inverse(tl.sum(p, 1)[:, None])
    p = tl.where(column < limit, p, 0.0)  # in a row that a NaN spoils, too
    _write(out, row.to(tl.int64) * k_len, 0, column, columns, p, ALIGN)


@triton.jit(do_not_specialize=_LENGTHS)
def _forward_long(  # type: ignore[no-untyped-def]
    scores, mask, bias, out, query, sizes, rows, k_len, diagonal, scale,
    INDEX: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(INDEX)
    limit = _limit(_offset(row, sizes, query), k_len, diagonal)  # int64
    column = tl.arange(0, COLUMNS)[None, :]
    row = row + tl.zeros([1, 1], INDEX)
    starts = _starts(row, sizes, scores, mask, bias)
    most = tl.full([1, 1], _NEG_INF, tl.float32)
    total = tl.zeros([1, 1], tl.float32)
    for begin in range(0, limit, COLUMNS):
        left = tl.minimum(limit - begin, COLUMNS).to(tl.int32)
        s = _logits(scores, mask, bias, starts, begin, column, left, scale, ALIGN)
        higher = tl.maximum(most, tl.max(s, 1)[:, None])
        total = total * _exp(most, higher) + tl.sum(_exp(s, higher), 1)[:, None]
        most = higher
    factor = _inverse(total)
    start = row.to(tl.int64) * k_len
    for begin in range(0, limit, COLUMNS):
        left = tl.minimum(limit - begin, COLUMNS).to(tl.int32)
        s = _logits(scores, mask, bias, starts, begin, column, left, scale, ALIGN)
        p = tl.where(column < left, _exp(s, most) * factor, 0.0)
        _write(out, start, begin, column, tl.minimum(k_len - begin, COLUMNS).to(tl.int32), p, ALIGN)
    zero = tl.zeros([1, COLUMNS], tl.float32)
    for begin in range(_up(limit, COLUMNS), k_len, COLUMNS):
        _write(out, start, begin, column, tl.minimum(k_len - begin, COLUMNS).to(tl.int32), zero, ALIGN)


# --- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def _read(tensor, start, begin, column, limit, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 [ROWS, COLUMNS], 0 where column >= limit."""
    value = tl.load(_at(tensor, start, begin, column, ALIGN), column < _up(limit, ALIGN), other=0.0)
    return tl.where(column < limit, value.to(tl.float32), 0.0)


@triton.jit(do_not_specialize=_LENGTHS)
def _backward_rows(  # type: ignore[no-untyped-def]
    dout, out, dscores, dbias, query_group, query_member, group_sizes, member_sizes,
    groups, members, a_chunk, k_len, diagonal, scale,
    INDEX: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles = (groups + (ROWS - 1)) // ROWS
    chunk = tl.program_id(0).to(INDEX) // tiles
    group = ((tl.program_id(0).to(INDEX) % tiles) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    columns = tl.where(group < groups, k_len, 0).to(tl.int32)
    query = _offset(group, group_sizes, query_group)
    out_group = _offset(group, group_sizes, out.group)
    dout_group = _offset(group, group_sizes, dout.group)
    dscores_group = _offset(group, group_sizes, dscores.group)
    sum_ = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = chunk * a_chunk
    for step in range(tl.minimum(a_chunk, members - first)):
        member = first + step
        limit = _limit(query + _offset(member, member_sizes, query_member), k_len, diagonal)
        limit = tl.minimum(limit.to(tl.int32), columns)
        p = _read(out, out_group + _offset(member, member_sizes, out.member), 0, column, limit, ALIGN)
        g = _read(dout, dout_group + _offset(member, member_sizes, dout.member), 0, column, limit, ALIGN)
        dlogits = p * (g - tl.sum(p * g, 1)[:, None])
        start = dscores_group + _offset(member, member_sizes, dscores.member)
        _write(dscores, start, 0, column, columns, dlogits * scale, ALIGN)
        if dbias.pointer is not None:
            sum_ += dlogits
    if dbias.pointer is not None:
        at_dbias = chunk.to(tl.int64) * groups + group
        if dbias.column is None:
            _write(dbias, at_dbias * k_len, 0, column, columns, sum_, ALIGN)
        else:  # one number a row of bias
            value = tl.sum(sum_, 1)[:, None].to(dbias.pointer.dtype.element_ty)
            tl.store(dbias.pointer + at_dbias, value, group < groups)


@triton.jit(do_not_specialize=_LENGTHS)
def _backward_long(  # type: ignore[no-untyped-def]
    dout, out, dscores, dbias, query_group, query_member, group_sizes, member_sizes,
    groups, members, a_chunk, k_len, diagonal, scale,
    INDEX: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(INDEX) // groups
    group = tl.program_id(0).to(INDEX) % groups
    column = tl.arange(0, COLUMNS)[None, :]
    zero = tl.zeros([1, COLUMNS], tl.float32)
    sum_ = tl.zeros([1, 1], tl.float32)
    at_dbias = (chunk.to(tl.int64) * groups + group) * k_len + tl.zeros([1, 1], tl.int64)
    query = _offset(group, group_sizes, query_group)
    row = group + tl.zeros([1, 1], INDEX)
    out_group = _offset(row, group_sizes, out.group)
    dout_group = _offset(row, group_sizes, dout.group)
    dscores_group = _offset(row, group_sizes, dscores.group)
    first = chunk * a_chunk
    for step in range(tl.minimum(a_chunk, members - first)):
        member = first + step
        limit = _limit(query + _offset(member, member_sizes, query_member), k_len, diagonal)  # int64
        at_out = out_group + _offset(member, member_sizes, out.member)
        at_dout = dout_group + _offset(member, member_sizes, dout.member)
        at_dscores = dscores_group + _offset(member, member_sizes, dscores.member)
        along = zero
        for begin in range(0, limit, COLUMNS):
            left = tl.minimum(limit - begin, COLUMNS).to(tl.int32)
            p = _read(out, at_out, begin, column, left, ALIGN)
            along += p * _read(dout, at_dout, begin, column, left, ALIGN)
        r = tl.sum(along, 1)[:, None]
        for begin in range(0, k_len, COLUMNS):
            left = tl.minimum(tl.maximum(limit - begin, 0), COLUMNS).to(tl.int32)
            columns = tl.minimum(k_len - begin, COLUMNS).to(tl.int32)
            p = _read(out, at_out, begin, column, left, ALIGN)
            dlogits = p * (_read(dout, at_dout, begin, column, left, ALIGN) - r)
            _write(dscores, at_dscores, begin, column, columns, dlogits * scale, ALIGN)
            if dbias.pointer is not None:
                if dbias.column is None:
                    if step > 0:
                        dlogits += _read(dbias, at_dbias, begin, column, columns, ALIGN)
                    _write(dbias, at_dbias, begin, column, columns, dlogits, ALIGN)
                else:
                    sum_ += tl.sum(dlogits, 1)[:, None]
        if dbias.pointer is not None:
            tl.debug_barrier()  # the next member reads the sums, and maybe through other threads
    if dbias.pointer is not None and dbias.column is not None:
        to = dbias.pointer + (chunk.to(tl.int64) * groups + group) + tl.zeros([1, 1], tl.int32)
        tl.store(to, sum_.to(dbias.pointer.dtype.element_ty))


# --- host -----------------------------------------------------------------------------------------------------------


def why_not(scores: torch.Tensor, mask: torch.Tensor | None, bias: torch.Tensor | None) -> str | None:
    """Why the kernels cannot take these (validated) arguments, or None."""
    return _validate.beyond_kernels("triton", scores)


def tiles(columns: int, count: int) -> Tiles:
    """What a program owns of so many rows of so many keys."""
    if columns > MOST_COLUMNS:
        # 16 elements a thread in flight; the second reading finds the row in L2.
        return Tiles(1, min(4096, MOST_COLUMNS), 8)
    width = triton.next_power_of_2(max(columns, 1))
    if width >= _TILE:
        # One row a program, 16 elements a thread: at 8192 keys 16 warps, beyond that 32 elements.
        return Tiles(1, width, min(16, width // 512))
    # Several short rows share a program, so that each of its threads still has 16 elements in flight.
    height = min(_TILE // width, triton.next_power_of_2(max(count, 1)))
    return Tiles(height, width, max(1, min(4, height * width // 512)))


def causal_softmax_forward(
    scores: torch.Tensor, scale: float, diagonal: int | None, mask: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """Probabilities, contiguous, like scores (..., q_len, k_len); query i sees the keys up to i + diagonal."""
    out = torch.empty_like(scores, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    k_len, shape, dims = scores.shape[-1], scores.shape, scores.dim() - 1
    given = [scores, *(None if t is None else t.expand(shape) for t in (mask, bias)), out]
    unjoined = [*(rows.row_strides(t, dims) for t in given), rows.query_strides(dims, diagonal)]
    sizes, strides = rows.join(shape[:-1], unjoined)
    views = [Rows(t, row, _column(t)) for t, row in zip(given, strides, strict=False)]
    count = math.prod(sizes)

    def run(chosen: Tiles) -> None:
        launch(
            _forward_long if k_len > chosen.COLUMNS else _forward_rows,
            triton.cdiv(count, chosen.ROWS),
            *views,
            strides[-1],
            sizes,
            count,
            k_len,
            diagonal,
            float(scale),
            device=scores.device,
            num_warps=chosen.num_warps,
            INDEX=_index(count),
            ALIGN=_align(k_len, scores, views),
            ROWS=chosen.ROWS,
            COLUMNS=chosen.COLUMNS,
        )

    _tuned("causal_softmax_forward", scores, count, (mask is not None, bias is not None), run)
    return out


def causal_softmax_backward(
    dout: torch.Tensor, out: torch.Tensor, scale: float, diagonal: int | None, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dscores, dbias), contiguous; dbias like bias, summed in fp32 in a fixed order, and empty without a bias."""
    if out.numel() == 0:
        return rows.no_gradients(out, bias)
    dscores = torch.empty_like(out, memory_format=torch.contiguous_format)
    k_len, shape, dims = out.shape[-1], out.shape, out.dim() - 1
    given = [dout, out, dscores]
    unjoined = [*(rows.row_strides(t, dims) for t in given), rows.query_strides(dims, diagonal)]
    (group_sizes, by_group), (member_sizes, by_member) = (
        rows.join([shape[d] for d in side], [[s[d] for d in side] for s in unjoined])
        for side in rows.groups_and_members(shape, bias)
    )
    groups, members = math.prod(group_sizes), math.prod(member_sizes)

    a_chunk = rows.members_a_chunk(groups, members)
    chunks = triton.cdiv(members, a_chunk)
    sums, bias_column = None, None
    if bias is not None:
        sums = rows.new_sums(bias, chunks, in_place=members == 1 or k_len <= MOST_COLUMNS)
        bias_column = None if k_len == 1 or (bias.dim() and bias.shape[-1] > 1) else 0
    views = [Groups(t, g, m, _column(t)) for t, g, m in zip(given, by_group, by_member, strict=False)]
    views.append(Groups(sums, (0,), (0,), bias_column))

    def run(chosen: Tiles) -> None:
        launch(
            _backward_long if k_len > chosen.COLUMNS else _backward_rows,
            chunks * triton.cdiv(groups, chosen.ROWS),
            *views,
            by_group[-1],
            by_member[-1],
            group_sizes,
            member_sizes,
            groups,
            members,
            a_chunk,
            k_len,
            diagonal,
            float(scale),
            device=out.device,
            num_warps=chosen.num_warps,
            INDEX=_index(groups * members),
            ALIGN=_align(k_len, out, views),
            ROWS=chosen.ROWS,
            COLUMNS=chosen.COLUMNS,
        )

    _tuned("causal_softmax_backward", out, groups, (bias is not None, members > 1), run)
    if bias is None or sums is None:
        return dscores, out.new_empty(0)
    return dscores, rows.bias_gradient(bias, sums)


def _tuned(op: str, x: torch.Tensor, count: int, features: tuple[bool, ...], run: Any) -> None:
    chosen = tiles(x.shape[-1], count)
    others = [chosen._replace(num_warps=w) for w in (chosen.num_warps // 2, chosen.num_warps * 2) if 1 <= w <= 16]
    tuned(op, (x.dtype, triton.next_power_of_2(x.shape[-1]), *features), chosen, [chosen, *others], run, x.device)


def _column(t: torch.Tensor | None) -> int | None:
    return None if t is None or t.stride(-1) == 1 else t.stride(-1)


def _align(k_len: int, x: torch.Tensor, views: Sequence[Rows] | Sequence[Groups]) -> int:
    """Elements of x in 16 bytes, if rows with contiguous keys begin and end at multiples of them; else 1.

    Whether the first row does is for Triton to see, from the pointer.
    """
    align = 16 // x.element_size()
    steps = [s for v in views if v.pointer is not None and v.column is None for side in v[1:-1] for s in side]
    return align if all(s % align == 0 for s in (k_len, *steps)) else 1


def _index(count: int) -> Any:
    """The type that numbers rows; divisions of 64 bits take a dozen times those of 32."""
    return tl.int32 if count < 2**31 - 2 * _TILE else tl.int64
