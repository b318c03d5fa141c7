"""Layer norm and RMS norm on the kernels of ``triton_kernels``: outputs, tiles, launches."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton

from transfuse.ops import _validate
from transfuse.ops._triton import INTERPRETED, launch, multiprocessors
from transfuse.ops._tuning import tuned
from transfuse.ops.norm import triton_kernels
from transfuse.ops.norm.rows import packed, row_strided
from transfuse.ops.norm.triton_kernels import Rows

_WIDEST = 2**30  # columns are counted in 32 bits


class Tiles(NamedTuple):
    """What a program holds at a time, its warps, and (in backward) how many programs share a multiprocessor."""

    ROWS: int
    COLUMNS: int
    num_warps: int
    programs: int = 1


def why_not(x: torch.Tensor, weight: torch.Tensor | None) -> str | None:
    """Why the kernels cannot take these (validated) arguments, or None."""
    if x.shape[-1] > _WIDEST:
        return f"the Triton kernel takes rows of up to {_WIDEST} columns, not {x.shape[-1]} (use backend='torch')"
    return _validate.beyond_kernels("triton", x)


def layer_norm_forward(
    x: torch.Tensor,  # (..., N)
    weight: torch.Tensor | None,  # (N,)
    bias: torch.Tensor | None,  # (N,)
    eps: float,
    residual: torch.Tensor | None,  # (..., N)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, s, mean, rstd): y and s contiguous, s empty without a residual, statistics fp32 of shape x.shape[:-1]."""
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    y, summed, rstd = _forward(x, weight, bias, eps, residual, mean)
    return y, summed, mean, rstd


def rms_norm_forward(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, s, rstd) as layer_norm_forward."""
    return _forward(x, weight, None, eps, residual, None)


def layer_norm_backward(
    dout: torch.Tensor,  # (..., N)
    dsummed: torch.Tensor | None,  # (..., N)
    summed: torch.Tensor,  # (..., N)
    weight: torch.Tensor | None,  # (N,)
    bias: torch.Tensor | None,  # (N,)
    mean: torch.Tensor,  # (...)
    rstd: torch.Tensor,  # (...)
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dweight, dbias); dx serves x and the residual alike, an absent parameter's gradient is empty."""
    return _backward(dout, dsummed, summed, weight, bias, mean, rstd)


def rms_norm_backward(
    dout: torch.Tensor,
    dsummed: torch.Tensor | None,
    summed: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx, dweight) as layer_norm_backward."""
    dx, dweight, _ = _backward(dout, dsummed, summed, weight, None, None, rstd)
    return dx, dweight


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    mean: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, s, rstd); the mean is taken, subtracted and written where there is a tensor for it."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    summed = x.new_empty(0) if residual is None else torch.empty_like(y)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    M, N = rstd.numel(), x.shape[-1]
    if N == 0:
        return y, summed, rstd.fill_(math.nan)
    rows = [_rows(t, N) for t in (x, residual)]
    outputs = [Rows(y, N), Rows(None if residual is None else summed, N)]
    tensors = (*rows, packed(weight), packed(bias), *outputs, mean, rstd)
    align = math.gcd(16, N, *(r.stride for r in rows))

    def run(tiles: Tiles) -> None:
        options: dict[str, Any] = {
            "device": x.device,
            "num_warps": tiles.num_warps,
            "COLUMNS": tiles.COLUMNS,
            "ALIGN": align,
        }
        if tiles.COLUMNS < N:
            launch(triton_kernels.norm_forward_loop, M, *tensors, N // align, eps, **options)
        else:
            launch(
                triton_kernels.norm_forward_rows,
                triton.cdiv(M, tiles.ROWS),
                *tensors,
                M,
                N // align,
                eps,
                ROWS=tiles.ROWS,
                **options,
            )

    tiles = forward_tiles(N)
    key = (tiles.COLUMNS, x.dtype, residual is None, mean is None)
    tuned("norm_forward", key, tiles, _alternatives(tiles), run, x.device)
    return y, summed, rstd


def _backward(
    dout: torch.Tensor,
    dsummed: torch.Tensor | None,
    summed: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    M, N = rstd.numel(), summed.shape[-1]
    dx = torch.empty_like(summed, memory_format=torch.contiguous_format)
    dweight, dbias = (summed.new_empty(0) if t is None else torch.empty_like(t) for t in (weight, bias))
    if N == 0:
        return dx, dweight, dbias
    rows = [_rows(t, N) for t in (dout, dsummed, summed)]
    statistics = (packed(mean), rstd.contiguous())
    gradients = (None if weight is None else dweight, None if bias is None else dbias)
    align = math.gcd(16, N, *(r.stride for r in rows))

    def run(tiles: Tiles) -> None:
        options: dict[str, Any] = {
            "device": summed.device,
            "num_warps": tiles.num_warps,
            "COLUMNS": tiles.COLUMNS,
            "ALIGN": align,
        }
        if tiles.COLUMNS < N:
            launch(
                triton_kernels.norm_backward_loop,
                M,
                *rows,
                packed(weight),
                *statistics,
                Rows(dx, N),
                M,
                N // align,
                **options,
            )
            _weight_gradients_apart(rows[0], rows[2], *statistics, gradients, M, N, align, summed.device)
            return
        groups = min(triton.cdiv(M, tiles.ROWS), tiles.programs * _multiprocessors(summed.device))
        partials = _partials(gradients, groups, N)
        tensors = (*rows, packed(weight), *statistics, Rows(dx, N), *partials)
        launch(triton_kernels.norm_backward_rows, groups, *tensors, M, N // align, ROWS=tiles.ROWS, **options)
        _sum(partials, gradients, groups, N, align, summed.device)

    tiles = backward_tiles(N, max(t.element_size() for t in (summed, weight) if t is not None))
    key = (tiles.COLUMNS, summed.dtype, dsummed is None, mean is None)
    tuned("norm_backward", key, tiles, _alternatives(tiles), run, summed.device)
    return dx, dweight, dbias


Gradients = tuple[torch.Tensor | None, torch.Tensor | None]
"""Of weight and bias, (N,) or (groups, N); None where the parameter is absent."""


def _weight_gradients_apart(
    dout: Rows,
    summed: Rows,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    gradients: Gradients,
    M: int,
    N: int,
    align: int,
    device: torch.device,
) -> None:
    """The weights' gradients of rows too wide to be summed beside ds: a second read, in blocks of columns."""
    if gradients == (None, None):
        return
    rows, columns = 2, 2048  # 16 elements a thread, as in backward_tiles
    blocks = triton.cdiv(N, columns)
    groups = max(1, min(triton.cdiv(M, rows), 4 * _multiprocessors(device) // blocks))
    partials = _partials(gradients, groups, N)
    sizes: dict[str, Any] = {"ROWS": rows, "COLUMNS": columns, "ALIGN": align}
    launch(
        triton_kernels.norm_weight_partials, groups * blocks, dout, summed, mean, rstd, *partials, M, N // align,
        groups, device=device, num_warps=8, **sizes,
    )  # fmt: skip
    _sum(partials, gradients, groups, N, align, device)


def _partials(gradients: Gradients, groups: int, N: int) -> Gradients:
    first, second = (None if g is None else g.new_empty(groups, N, dtype=torch.float32) for g in gradients)
    return first, second


def _sum(partials: Gradients, gradients: Gradients, groups: int, N: int, align: int, device: torch.device) -> None:
    if gradients == (None, None):
        return
    # Few columns and many rows a program: there are hundreds of rows, and only as many programs as blocks of columns.
    rows = 256 if groups > 32 else 32 if groups > 4 else 4
    columns = _TILE // rows
    launch(
        triton_kernels.norm_weight_sums, triton.cdiv(N, columns), *partials, *gradients, groups, N // align,
        device=device, num_warps=4, ROWS=rows, COLUMNS=columns, ALIGN=align,
    )  # fmt: skip


def _rows(t: torch.Tensor | None, N: int) -> Rows:
    if t is None:
        return Rows(None, 0)
    t = row_strided(t)
    return Rows(t, N if t.is_contiguous() else t.stride(0))


# --- tiles ----------------------------------------------------------------------------------------------------------

_RESIDENT_FORWARD = 16384
_RESIDENT_BACKWARD = 16384  # bytes
_TILE = 4096  # elements


def forward_tiles(N: int) -> Tiles:
    """4096 elements by 128 threads: 64 bytes of bf16 a thread in flight, and room for 6 such programs on an SM.

    One row that is wider than half of that takes more warps instead of more rows, at 16 elements a thread; 16384
    columns take 32 a thread, since 1024 threads have 64 registers each and reductions over them two more steps.
    """
    columns = _columns(N)
    if columns > _RESIDENT_FORWARD:
        return Tiles(1, 8192, 16)
    warps = 4 if columns <= 2048 else min(columns // 512, 16)
    return Tiles(max(1, _TILE // columns), columns, warps)


def backward_tiles(N: int, itemsize: int) -> Tiles:
    """16 elements a thread: what this tile and the next one hold of s and dy, and two sums, take 123 registers (bf16).

    512 threads then fill an SM, in programs of 128 as long as a row leaves the choice: they wait for one another's
    reductions least, and 32 KB are always on their way. fp32, and rows narrower than a warp's 256 columns, take 138
    registers and one program less. More programs than fit would run in a second wave, and every program adds a row of
    partial sums. itemsize: of s or weight, the larger.
    """
    columns = _columns(N)
    if columns * itemsize > _RESIDENT_BACKWARD:  # 8192 columns beside anything in fp32 spill
        return Tiles(1, 4096, 8)
    rows = max(1, 2048 // columns)
    warps = rows * columns // 512
    resident = 16 if itemsize == 2 and columns >= 256 else 12  # warps
    return Tiles(rows, columns, warps, programs=max(1, resident // warps))


def _columns(N: int) -> int:
    return max(16, triton.next_power_of_2(N))


def _multiprocessors(device: torch.device) -> int:
    return 2 if INTERPRETED else multiprocessors(device)  # few, so that small inputs have several tiles a program


def _alternatives(tiles: Tiles) -> list[Tiles]:
    """What else may be worth measuring: fewer or more rows a program, and programs a multiprocessor."""
    if tiles.COLUMNS >= _TILE:
        return [tiles, tiles._replace(num_warps=min(2 * tiles.num_warps, 32))]
    other = [tiles._replace(ROWS=rows) for rows in (max(1, tiles.ROWS // 2), 2 * tiles.ROWS)]
    return [tiles, *other, tiles._replace(programs=2 * tiles.programs)]
