"""Layer norm and RMS norm as formulas, in any precision: the specification.

layer_norm (Ba, Kiros, Hinton 2016):  y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
rms_norm (Zhang, Sennrich 2019):      y = x / sqrt(mean(x^2) + eps) * weight

Both over the last dimension. With a residual, s = x + residual is rounded to x's dtype first and s is what is
normalised: exactly what an unfused program would compute.
"""

from __future__ import annotations

import torch


def layer_norm(
    x: torch.Tensor,  # (..., hidden)
    weight: torch.Tensor | None,  # (hidden,)
    bias: torch.Tensor | None,  # (hidden,)
    eps: float,
    residual: torch.Tensor | None,  # (..., hidden)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (y, s): y normalised, s = x + residual (x itself without one)."""
    summed = x if residual is None else x + residual
    centred = summed - summed.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return _affine(y, weight, bias).to(x.dtype), summed


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (y, s) as layer_norm does."""
    summed = x if residual is None else x + residual
    y = summed / (summed.square().mean(-1, keepdim=True) + eps).sqrt()
    return _affine(y, weight, None).to(x.dtype), summed


def _affine(y: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias
