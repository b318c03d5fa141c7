"""Layer norm on the CUDA kernels of ``csrc/norm``: outputs from torch's allocator, pointers and stream to ``_C``."""

from __future__ import annotations

import torch

from transfuse import _extension

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(x: torch.Tensor, weight: torch.Tensor | None) -> str | None:
    """Why the kernels cannot take these (validated) arguments, or None."""
    if x.dtype not in _DTYPES:
        return f"the CUDA kernel takes float32, float16 or bfloat16, not {x.dtype} (use backend='torch')"
    return None


def layer_norm_forward(
    x: torch.Tensor,  # (..., hidden)
    weight: torch.Tensor | None,  # (hidden,)
    bias: torch.Tensor | None,  # (hidden,)
    eps: float,
    residual: torch.Tensor | None,  # (..., hidden)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, s, mean, rstd): y and s contiguous, s empty without a residual, statistics fp32 of shape x.shape[:-1]."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    summed = x.new_empty(0) if residual is None else torch.empty_like(y)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    rows, hidden = mean.numel(), x.shape[-1]
    # Named until after the launch: a view holds no reference, and the memory of a copy dropped before it is reused.
    x_rows, residual_rows, weight, bias = _row_strided(x), _row_strided(residual), _packed(weight), _packed(bias)
    view = _extension.view
    _extension.kernels().layer_norm_forward(
        view(x_rows, (rows, hidden)),
        view(residual_rows, (rows, hidden)),
        view(weight),
        view(bias),
        view(y, (rows, hidden)),
        None if residual is None else view(summed, (rows, hidden)),
        view(mean, (rows,)),
        view(rstd, (rows,)),
        eps,
        _extension.target(x.device),
    )
    return y, summed, mean, rstd


def _row_strided(t: torch.Tensor | None) -> torch.Tensor | None:
    """t itself if contiguous, else (rows, hidden) with contiguous columns: a view where strides allow, or a copy."""
    if t is None or t.is_contiguous():
        return t
    rows = t.reshape(t.shape[:-1].numel(), t.shape[-1])  # not (-1, hidden): that is ambiguous when hidden is 0
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


def _packed(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()
