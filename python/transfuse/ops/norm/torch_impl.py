"""Layer norm and RMS norm on ATen's fused ops: the CPU default, and the fallback everywhere else.

``layer_norm`` and ``rms_norm`` are plain differentiable functions. The ``*_forward`` and ``*_backward`` functions are
the same thing in the shape of the registered ops, with the statistics in fp32 (fp64 for fp64).
"""

from __future__ import annotations

from typing import overload

import torch
import torch.nn.functional as F


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, s) with s = x + residual; x: (..., hidden)."""
    summed = x if residual is None else x + residual
    hidden = summed.shape[-1:]
    if _aten_is_exact(summed, weight, bias):
        return F.layer_norm(summed, hidden, weight, bias, eps), summed
    return F.layer_norm(_wide(summed), hidden, _wide(weight), _wide(bias), eps).to(x.dtype), summed


def _aten_is_exact(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> bool:
    """Whether ATen's kernel takes these dtypes and rounds once. On a CPU its low-precision backward reads statistics of
    low precision and sums the weights' gradients in it, even into fp32 weights; elsewhere it does not mix dtypes."""
    if x.dtype in (torch.float32, torch.float64):
        return True
    if x.device.type == "cpu":
        learning = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
        return not learning
    return all(p is None or p.dtype == x.dtype for p in (weight, bias))


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, s) with s = x + residual; x: (..., hidden)."""
    summed = x if residual is None else x + residual
    if weight is None or weight.dtype == x.dtype:
        return F.rms_norm(summed, summed.shape[-1:], weight, eps), summed
    return F.rms_norm(summed.to(weight.dtype), summed.shape[-1:], weight, eps).to(x.dtype), summed


def layer_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, s, mean, rstd): s empty without a residual, mean and rstd of shape x.shape[:-1]."""
    summed = x if residual is None else x + residual
    wide = _wide(summed)
    mean = wide.mean(-1)
    variance = (wide - mean[..., None]).square().mean(-1)
    rstd = (variance + eps).rsqrt()
    y = F.layer_norm(wide, wide.shape[-1:], _wide(weight), _wide(bias), eps)
    return _out(y, x.dtype), _own(summed, residual), mean, rstd


def layer_norm_backward(
    dout: torch.Tensor,
    dsummed: torch.Tensor | None,
    summed: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dweight, dbias); dx serves x and the residual alike, an absent parameter's gradient is empty."""
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        _wide(dout),
        _wide(summed),
        summed.shape[-1:],
        mean[..., None],
        rstd[..., None],
        _wide(weight),
        _wide(bias),
        [True, weight is not None, bias is not None],
    )
    return _finish(dx, dsummed, summed), _gradient_of(weight, dweight, summed), _gradient_of(bias, dbias, summed)


def rms_norm_forward(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, s, rstd): s empty without a residual, rstd of shape x.shape[:-1]."""
    summed = x if residual is None else x + residual
    wide = _wide(summed)
    rstd = (wide.square().mean(-1) + eps).rsqrt()
    y = wide * rstd[..., None]
    if weight is not None:
        y = y * _wide(weight)
    return _out(y, x.dtype), _own(summed, residual), rstd


def rms_norm_backward(
    dout: torch.Tensor,
    dsummed: torch.Tensor | None,
    summed: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx, dweight) with n = s * rstd and g = dout * weight: dx = rstd * (g - n * mean(g * n))."""
    normed = _wide(summed) * rstd[..., None]
    grad = _wide(dout)
    dweight = (grad * normed).flatten(0, -2).sum(0) if summed.dim() > 1 else grad * normed
    if weight is not None:
        grad = grad * _wide(weight)
    dx = rstd[..., None] * (grad - normed * (grad * normed).mean(-1, keepdim=True))
    return _finish(dx, dsummed, summed), _gradient_of(weight, dweight, summed)


@overload
def _wide(t: torch.Tensor) -> torch.Tensor: ...
@overload
def _wide(t: None) -> None: ...
def _wide(t: torch.Tensor | None) -> torch.Tensor | None:
    return t if t is None or t.dtype == torch.float64 else t.float()


def _own(summed: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    # A registered op may not return its input, so "no residual" is an empty tensor.
    return summed.new_empty(0) if residual is None else summed.contiguous()


def _out(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # Registered ops return contiguous tensors, whatever the strides of what came in: their fakes promise it.
    return t.to(dtype).contiguous()


def _finish(dx: torch.Tensor, dsummed: torch.Tensor | None, summed: torch.Tensor) -> torch.Tensor:
    return _out(dx if dsummed is None else dx + dsummed, summed.dtype)


def _gradient_of(parameter: torch.Tensor | None, grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0) if parameter is None else grad.to(parameter.dtype)
