"""Matrix products on Triton, and all that linear_act and ffn do to a product before it is written.

    product   C = A B + A2 B2 (the second pair where given), beside it G = A B_gate where gated; fp32 sums
    combine   C = C_0 + C_1 + ..., in this order: products that were split over K, or one matrix as it is

and on each element of C and G, with k the dropout's factors,

    forward   u = C + bias, g = G; out = k h, where h = act(u), gated h = act(g) u; u and g written where asked for
    backward  dh = k C; out = du = dh act'(u), gated du = dh act(g) and dg = dh u act'(g), from the saved u and g;
              k h computed again and the sums of du over the tile's rows (fp32) written where asked for

product: a program owns one tile [BLOCK_M, BLOCK_N] of C (and G) over one of the splits' ranges of K; tiles go in groups
of GROUP_M rows of tiles, so that programs at work together share rows of A and columns of B in L2. combine: one tile.
For the backward the forward saves u, and g where gated, rounded to x's dtype.

The launchers guarantee: A, B any strides; all that `Ends` holds contiguous, [M, N] (bias [N], sums [tiles of M, N]);
K in whole BLOCK_K a range but for the last; outputs written only, so a launch can be repeated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from transfuse.ops._triton import INTERPRETED, dot, kept, launch, precision, rounded
from transfuse.ops._tuning import tuned
from transfuse.ops.ffn.fused import Ends
from transfuse.ops.ffn.triton_tiles import Tiles, candidates, choose, parts, power_of_2


class Matrix(NamedTuple):
    """A matrix of any strides in a kernel; pointer None where absent."""

    pointer: torch.Tensor | None
    row: int
    column: int


# --- device functions -----------------------------------------------------------------------------------------------


@triton.jit
def _share(z, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """s(z), where act(z) = z s(z); forward and backward both start from it."""
    if ACTIVATION == "gelu":
        s = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(t)) / 2 = sigmoid(2 t), 2 t = 2 sqrt(2/pi) (z + 0.044715 z^3)
        s = tl.sigmoid(z * (1.5957691216057308 + 0.07135481282553435 * z * z))
    elif ACTIVATION == "silu":
        s = tl.sigmoid(z)
    else:  # relu
        s = tl.where(z > 0.0, 1.0, 0.0)
    return s


@triton.jit
def _activated(z, s, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """act(z); s = _share(z)."""
    if ACTIVATION == "relu":
        return tl.where(z <= 0.0, 0.0, z)  # not z s: -inf gives 0, NaN stays
    return z * s


@triton.jit
def _slope(z, s, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """act'(z) = s + z s'(z); s = _share(z)."""
    if ACTIVATION == "gelu":
        return s + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    if ACTIVATION == "gelu_tanh":
        return s + z * (s * (1.0 - s)) * (1.5957691216057308 + 0.21406443847660305 * z * z)
    if ACTIVATION == "silu":
        return s + z * (s * (1.0 - s))
    return s


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    c,  # [BLOCK_M, BLOCK_N] fp32, 0 outside [M, N]
    g,  # the same, read where GATED
    ends,
    tile_m,
    tile_n,
    M,
    N,
    threshold,
    scale,
    BACKWARD: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile from its product to what is written; ACTIVATION "" leaves out = k (c + bias)."""
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    at = m[:, None] * N + n[None, :]
    if ends.seed is not None:
        keep = kept(ends.seed, m, tile_n * BLOCK_N, threshold, BLOCK_N)
    if BACKWARD:
        if ends.seed is not None:
            c = tl.where(keep, c * scale, 0.0)
        u = tl.load(ends.up + at, mask=inside, other=0.0).to(tl.float32)
        if ends.gate is not None:
            g = tl.load(ends.gate + at, mask=inside, other=0.0).to(tl.float32)
            s = _share(g, ACTIVATION)
            dg = c * u * _slope(g, s, ACTIVATION)
            tl.store(ends.dgate + at, rounded(dg, ends.dgate.dtype.element_ty), mask=inside)
            act = _activated(g, s, ACTIVATION)
            h = act * u
            result = c * act
        else:
            s = _share(u, ACTIVATION)
            h = _activated(u, s, ACTIVATION)
            result = c * _slope(u, s, ACTIVATION)
        if ends.hidden is not None:
            if ends.seed is not None:
                h = tl.where(keep, h * scale, 0.0)
            tl.store(ends.hidden + at, rounded(h, ends.hidden.dtype.element_ty), mask=inside)
        if ends.sums is not None:
            tl.store(ends.sums + tile_m.to(tl.int64) * N + n, tl.sum(result, 0), mask=n < N)
    else:
        if ends.bias is not None:
            c += tl.load(ends.bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if ends.up is not None:
            tl.store(ends.up + at, rounded(c, ends.up.dtype.element_ty), mask=inside)
        if GATED:
            if ends.gate is not None:
                tl.store(ends.gate + at, rounded(g, ends.gate.dtype.element_ty), mask=inside)
            result = _activated(g, _share(g, ACTIVATION), ACTIVATION) * c
        elif ACTIVATION != "":
            result = _activated(c, _share(c, ACTIVATION), ACTIVATION)
        else:
            result = c
        if ends.seed is not None:
            result = tl.where(keep, result * scale, 0.0)
    if ends.out is not None:
        tl.store(ends.out + at, rounded(result, ends.out.dtype.element_ty), mask=inside)


@triton.jit
def _finish_parts(  # type: ignore[no-untyped-def]
    c,
    g,
    ends,
    tile_m,
    tile_n,
    M,
    N,
    threshold,
    scale,
    BACKWARD: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    """_finish for one stretch of columns after the other: beside the sums, only one stretch's values take registers."""
    if PARTS == 1:
        _finish(c, g, ends, tile_m, tile_n, M, N, threshold, scale, BACKWARD, GATED, ACTIVATION, BLOCK_M, BLOCK_N)
    else:
        # [BLOCK_M, BLOCK_N] -> [BLOCK_M, 2, BLOCK_N / 2] -> the left and the right half
        c0, c1 = c.reshape([BLOCK_M, 2, BLOCK_N // 2]).permute(0, 2, 1).split()
        g0, g1 = g.reshape([BLOCK_M, 2, BLOCK_N // 2]).permute(0, 2, 1).split()
        _finish_parts(
            c0, g0, ends, tile_m, tile_n * 2, M, N, threshold, scale, BACKWARD, GATED, ACTIVATION,
            BLOCK_M, BLOCK_N // 2, PARTS // 2,
        )  # fmt: skip
        _finish_parts(
            c1, g1, ends, tile_m, tile_n * 2 + 1, M, N, threshold, scale, BACKWARD, GATED, ACTIVATION,
            BLOCK_M, BLOCK_N // 2, PARTS // 2,
        )  # fmt: skip


@triton.jit
def _at(matrix, row, column):  # type: ignore[no-untyped-def]
    """Pointers [ROWS, COLUMNS] of int64 row and column numbers."""
    return matrix.pointer + row[:, None] * matrix.row + column[None, :] * matrix.column


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]
    c,  # [BLOCK_M, BLOCK_N] fp32
    g,  # the same, left alone without b_gate
    a,
    b,
    b_gate,
    m,  # int64 [BLOCK_M]
    n,  # int64 [BLOCK_N]
    first,
    last,
    M,
    N,
    K,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """c + A[m, first:last] B[first:last, n], g + A[m, first:last] B_gate[first:last, n]."""
    columns = tl.arange(0, BLOCK_K)
    k = first + columns.to(tl.int64)
    a_at, b_at = _at(a, m, k), _at(b, k, n)
    # A stride of 1 is a constant without a type, and the step can pass 2^31: both are well in int64.
    a_step = tl.full([], BLOCK_K, tl.int64) * a.column
    b_step = tl.full([], BLOCK_K, tl.int64) * b.row
    if b_gate.pointer is not None:
        gate_at = _at(b_gate, k, n)
        gate_step = tl.full([], BLOCK_K, tl.int64) * b_gate.row
    m_inside, n_inside = (m < M)[:, None], (n < N)[None, :]
    for start in range(first, last, BLOCK_K):
        k_inside = start + columns < K
        x = tl.load(a_at, mask=m_inside & k_inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(b_at, mask=k_inside[:, None] & n_inside, other=0.0)  # [BLOCK_K, BLOCK_N]
        c = dot(x, w, c, PRECISION)
        a_at += a_step
        b_at += b_step
        if b_gate.pointer is not None:
            w_gate = tl.load(gate_at, mask=k_inside[:, None] & n_inside, other=0.0)
            g = dot(x, w_gate, g, PRECISION)
            gate_at += gate_step
    return c, g


# --- kernels --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["M", "K", "span", "splits", "threshold"])
def _product(  # type: ignore[no-untyped-def]
    a,  # [M, K]
    b,  # [K, N]
    b_gate,  # [K, N] or absent
    a2,  # [M, K] or absent
    b2,  # [K, N] or absent
    partials,  # fp32 [SPLITS (twice where gated), M, N], or None: the products end here
    ends,
    M,
    N,
    K,
    span,  # whole BLOCK_K a split
    splits,
    threshold,
    scale,
    BACKWARD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    M_UNIT: tl.constexpr,
    K_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    GATED: tl.constexpr = b_gate.pointer is not None
    # Masks along a contiguous dimension leave 16-byte loads only where its length is known to be a multiple of them.
    M = M // M_UNIT * M_UNIT
    K = K // K_UNIT * K_UNIT
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    split = program // (tiles_m * tiles_n)
    program = program % (tiles_m * tiles_n)
    group = program // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + program % (GROUP_M * tiles_n) % height
    tile_n = program % (GROUP_M * tiles_n) // height
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = split.to(K.dtype) * span * BLOCK_K
    last = tl.minimum(first + span * BLOCK_K, K)
    c = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    c, g = _multiply(c, g, a, b, b_gate, m, n, first, last, M, N, K, PRECISION, BLOCK_K)
    if a2.pointer is not None:
        c, g = _multiply(c, g, a2, b2, b_gate, m, n, first, last, M, N, K, PRECISION, BLOCK_K)
    if partials is None:
        _finish_parts(
            c, g, ends, tile_m, tile_n, M, N, threshold, scale, BACKWARD, GATED, ACTIVATION, BLOCK_M, BLOCK_N, PARTS
        )  # fmt: skip
    else:
        at = partials + m[:, None] * N + n[None, :]
        inside = (m < M)[:, None] & (n < N)[None, :]
        tl.store(at + split.to(tl.int64) * M * N, c, mask=inside)
        if GATED:
            tl.store(at + (split + splits).to(tl.int64) * M * N, g, mask=inside)


@triton.jit(do_not_specialize=["M", "splits", "threshold"])
def _combine(  # type: ignore[no-untyped-def]
    c_parts,  # [splits, M, N]: partial sums of _product, or one matrix of any strides
    g_parts,  # the same or absent
    ends,
    M,
    N,
    splits,
    threshold,
    scale,
    BACKWARD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    GATED: tl.constexpr = g_parts.pointer is not None
    c = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for split in range(splits):
        skipped = (tl.zeros([], tl.int64) + split) * M * N
        c += tl.load(_at(c_parts, m, n) + skipped, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            g += tl.load(_at(g_parts, m, n) + skipped, mask=inside, other=0.0).to(tl.float32)
    _finish(
        c, g, ends, tile_m, tile_n, M, N, threshold, scale, BACKWARD, GATED, ACTIVATION, BLOCK_M, BLOCK_N
    )  # fmt: skip


# --- launchers ------------------------------------------------------------------------------------------------------


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    ends: Ends,
    *,
    b_gate: torch.Tensor | None = None,
    second: tuple[torch.Tensor, torch.Tensor] | None = None,
    activation: str = "",
    backward: bool = False,
    dropout_p: float = 0.0,
    sums: bool = False,
) -> torch.Tensor | None:
    """``a @ b`` with its end; a: (M, K), b, b_gate: (K, N), second: (M, K) and (K, N), any strides.

    Returns:
        With ``sums`` (backward alone) du summed over its rows, fp32 (N,).
    """
    (M, K), N, device = a.shape, b.shape[1], a.device
    a2, b2 = second or (None, None)
    # Only where a mask runs along a contiguous dimension, and that is never the rows, whose number varies.
    m_unit = 16 if M % 16 == 0 and a.stride(0) == 1 else 1
    k_unit = 16 if K % 16 == 0 and (a.stride(1) == 1 or b.stride(0) == 1) else 1
    kind = "gated" if b_gate is not None else "backward" if backward else "one"
    found: list[torch.Tensor | None] = []

    def run(tiles: Tiles) -> None:
        splits, gated = tiles.splits, b_gate is not None
        partials = a.new_empty((splits * (1 + gated), M, N), dtype=torch.float32) if splits > 1 else None
        # Products that end as partial sums are one kernel, whatever becomes of their sum.
        end, back, act = (ends, backward, activation) if partials is None else (Ends(), False, "")
        if sums and partials is None:
            end = end._replace(sums=_room_for_sums(a, M, N, tiles.BLOCK_M))
        launch(
            _product, -(-M // tiles.BLOCK_M) * -(-N // tiles.BLOCK_N) * splits,
            _matrix(a), _matrix(b), _matrix(b_gate), _matrix(a2), _matrix(b2), partials, end,
            M, N, K, -(-K // (tiles.BLOCK_K * splits)), splits, *_dropout(dropout_p),
            device=device, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            BACKWARD=back, ACTIVATION=act, PRECISION=precision(a.dtype), M_UNIT=m_unit, K_UNIT=k_unit,
            BLOCK_M=tiles.BLOCK_M, BLOCK_N=tiles.BLOCK_N, BLOCK_K=tiles.BLOCK_K, GROUP_M=8,
            PARTS=parts(tiles, kind, act, end.seed is not None),
        )  # fmt: skip
        total = None if end.sums is None else end.sums.sum(0)
        if partials is not None:
            c, g = partials[:splits], partials[splits:] if gated else None
            total = combine(c, g, ends, activation=activation, backward=backward, dropout_p=dropout_p, sums=sums)
        found.append(total)

    chosen = choose(M, N, K, a.dtype, kind, device)
    tuned("ffn_product", (kind, a.dtype, power_of_2(M), N, power_of_2(K)), chosen, candidates(chosen), run, device)
    return found[-1]


def combine(
    c: torch.Tensor,
    g: torch.Tensor | None,
    ends: Ends,
    *,
    activation: str = "",
    backward: bool = False,
    dropout_p: float = 0.0,
    sums: bool = False,
) -> torch.Tensor | None:
    """The end of a product over its parts, added in their order; c, g: (splits, M, N), contiguous, or splits is 1.

    Returns:
        As :func:`product`.
    """
    splits, M, N = c.shape
    # Many rows a program leave few partial sums; of few rows none should be empty.
    block_m, block_n = (8, 64) if INTERPRETED else (32, 128) if M > 32 else (4, 256)
    if sums:
        ends = ends._replace(sums=_room_for_sums(c, M, N, block_m))
    launch(
        _combine, -(-M // block_m) * -(-N // block_n),
        Matrix(c, c.stride(1), c.stride(2)),
        Matrix(None, 0, 0) if g is None else Matrix(g, g.stride(1), g.stride(2)),
        ends, M, N, splits, *_dropout(dropout_p),
        device=c.device, num_warps=4, num_stages=1,
        BACKWARD=backward, ACTIVATION=activation, BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    return None if ends.sums is None else ends.sums.sum(0)


def _room_for_sums(like: torch.Tensor, M: int, N: int, block_m: int) -> torch.Tensor:
    return like.new_empty((-(-M // block_m), N), dtype=torch.float32)


def _matrix(t: torch.Tensor | None) -> Matrix:
    return Matrix(None, 0, 0) if t is None else Matrix(t, t.stride(0), t.stride(1))


def _dropout(p: float) -> tuple[int, float]:
    """(threshold of _philox.keep_mask, factor of what is kept)."""
    return round(p * 2**32), 1.0 / (1.0 - p)
