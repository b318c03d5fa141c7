"""Layer norm and RMS norm on the CUDA kernels of ``csrc/norm``: outputs from torch's allocator, pointers to ``_C``."""

from __future__ import annotations

import torch

from transfuse import _extension
from transfuse.ops import _validate
from transfuse.ops.norm.rows import packed, row_strided


def why_not(x: torch.Tensor, weight: torch.Tensor | None) -> str | None:
    """Why the kernels cannot take these (validated) arguments, or None."""
    return _validate.beyond_kernels("cuda", x)


def layer_norm_forward(
    x: torch.Tensor,  # (..., hidden)
    weight: torch.Tensor | None,  # (hidden,)
    bias: torch.Tensor | None,  # (hidden,)
    eps: float,
    residual: torch.Tensor | None,  # (..., hidden)
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
    dout: torch.Tensor,  # (..., hidden)
    dsummed: torch.Tensor | None,  # (..., hidden)
    summed: torch.Tensor,  # (..., hidden)
    weight: torch.Tensor | None,  # (hidden,)
    bias: torch.Tensor | None,  # (hidden,)
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
    """(y, s, rstd); layer norm where there is a tensor for the mean, else RMS norm."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    summed = x.new_empty(0) if residual is None else torch.empty_like(y)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rows, hidden = rstd.numel(), x.shape[-1]
    # Named until after the launch: a view holds no reference, and the memory of a copy dropped before it is reused.
    x_rows, residual_rows, weight, bias = row_strided(x), row_strided(residual), packed(weight), packed(bias)
    view, shape = _extension.view, (rows, hidden)
    inputs = (view(x_rows, shape), view(residual_rows, shape), view(weight))
    outputs = (view(y, shape), None if residual is None else view(summed, shape))
    target = _extension.target(x.device)
    if mean is None:
        _extension.kernels().rms_norm_forward(*inputs, *outputs, view(rstd, (rows,)), eps, target)
    else:
        statistics = view(mean, (rows,)), view(rstd, (rows,))
        _extension.kernels().layer_norm_forward(*inputs, view(bias), *outputs, *statistics, eps, target)
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
    rows, hidden = rstd.numel(), summed.shape[-1]
    dx = torch.empty_like(summed, memory_format=torch.contiguous_format)
    if rows == 0:
        dweight, dbias = (summed.new_empty(0) if t is None else torch.zeros_like(t) for t in (weight, bias))
        return dx, dweight, dbias
    dweight, dbias = (summed.new_empty(0) if t is None else torch.empty_like(t) for t in (weight, bias))
    groups = _groups(rows, hidden, summed.device)
    # All named until after the launches, as in _forward.
    partials = [None if t is None else t.new_empty(groups, hidden, dtype=torch.float32) for t in (weight, bias)]
    tensors = [row_strided(t) for t in (dout, dsummed, summed)]
    weight, mean, rstd = packed(weight), packed(mean), rstd.contiguous()
    view, shape = _extension.view, (rows, hidden)
    inputs = (*(view(t, shape) for t in tensors), view(weight))
    target = _extension.target(summed.device)
    if mean is None:
        _extension.kernels().rms_norm_backward(*inputs, view(rstd, (rows,)), view(dx, shape), view(partials[0]), target)
    else:
        statistics = view(mean, (rows,)), view(rstd, (rows,))
        _extension.kernels().layer_norm_backward(*inputs, *statistics, view(dx, shape), *map(view, partials), target)
    if weight is not None or bias is not None:
        sums = (None if p is None else view(t) for p, t in zip(partials, (dweight, dbias), strict=True))
        _extension.kernels().norm_weight_sums(*map(view, partials), *sums, target)
    return dx, dweight, dbias


def _groups(rows: int, hidden: int, device: torch.device) -> int:
    """Blocks that share the rows, each with its row of partial sums: what fills the GPU once, at 512 threads of 128
    registers a multiprocessor, but where a block would get fewer than 8 rows, so that partial sums stay the lesser
    part of the memory traffic, only one a multiprocessor.
    """
    threads = 128 if hidden <= 512 else -(-hidden // 512) * 32
    tiles = -(-rows // 4) if hidden <= 512 else rows
    multiprocessors = _extension.multiprocessors(device)
    return min(tiles, max(multiprocessors, min(512 * multiprocessors // threads, tiles // 8)), 2**31 - 1)
