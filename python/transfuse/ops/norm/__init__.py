"""Layer norm and RMS norm over the last dimension, with an optional fused residual addition.

This package is the pattern of every op: ``reference`` is the specification, ``torch_impl`` the plain-PyTorch path,
``triton_impl`` and ``cuda_impl`` the kernels; this file validates once, picks, calls, and registers.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, overload

import torch

from transfuse.backends import choose
from transfuse.errors import ArgumentError
from transfuse.ops import _autocast, _registry, _validate
from transfuse.ops.norm import reference, torch_impl

__all__ = ["layer_norm", "rms_norm"]


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float = ...,
    residual: None = ...,
    *,
    backend: str | None = ...,
) -> torch.Tensor: ...
@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float = ...,
    residual: torch.Tensor = ...,
    *,
    backend: str | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension (Ba, Kiros, Hinton 2016).

    Args:
        x: (..., hidden), fp32, fp16, bf16 or fp64, any strides.
        weight, bias: (hidden,), x's dtype or fp32; None leaves the step out.
        eps: added to the variance.
        residual: x's shape and dtype; added to x first, and the sum, rounded to x's dtype, is what is normalised.
        backend: see :func:`transfuse.use_backend`.

    Returns:
        y (..., hidden) in x's dtype; with a residual (y, x + residual). Under autocast both are fp32.

    Raises:
        ArgumentError: a shape or eps is wrong. DtypeError, DeviceError, BackendError: as their names say.

    >>> import torch
    >>> y, s = layer_norm(torch.ones(2, 8), torch.ones(8), torch.zeros(8), residual=torch.arange(8.).expand(2, 8))
    >>> y.mean().abs().item() < 1e-6, s[0, 3].item()
    (True, 4.0)
    """
    _validate.floating("layer_norm", "x", x)
    if _autocast.active(x):
        x, weight, bias, residual = _float(x), _float(weight), _float(bias), _float(residual)
    _check("layer_norm", x, weight, bias, eps, residual)
    name = choose("layer_norm", x.device, backend, lambda b: _why_not(b, x, weight))
    if name in ("torch", "reference"):
        plain = torch_impl if name == "torch" else reference
        y, summed = plain.layer_norm(x, weight, bias, eps, residual)
    else:
        y, summed, _, _ = torch.ops.transfuse.layer_norm(x, weight, bias, eps, residual, name)
    return y if residual is None else (y, summed)


@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float = ...,
    residual: None = ...,
    *,
    backend: str | None = ...,
) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float = ...,
    residual: torch.Tensor = ...,
    *,
    backend: str | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (Zhang, Sennrich 2019).

    Args (x, weight, eps, residual, backend), returns and raises as :func:`layer_norm`, without a bias.

    >>> import torch
    >>> rms_norm(torch.tensor([[3.0, 4.0]]), None, eps=0.0).square().mean().item()
    1.0
    """
    _validate.floating("rms_norm", "x", x)
    if _autocast.active(x):
        x, weight, residual = _float(x), _float(weight), _float(residual)
    _check("rms_norm", x, weight, None, eps, residual)
    name = choose("rms_norm", x.device, backend, lambda b: _why_not(b, x, weight))
    if name in ("torch", "reference"):
        plain = torch_impl if name == "torch" else reference
        y, summed = plain.rms_norm(x, weight, eps, residual)
    else:
        y, summed, _ = torch.ops.transfuse.rms_norm(x, weight, eps, residual, name)
    return y if residual is None else (y, summed)


def _float(t: torch.Tensor | None) -> Any:
    return None if t is None else t.float()


def _check(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> None:
    if x.dim() == 0:
        raise ArgumentError(f"{op}: x must have at least one dimension, got a scalar")
    if not _validate.within(eps, lambda value: 0.0 <= value < math.inf):
        raise ArgumentError(f"{op}: eps must be at least 0 and finite, got {eps!r}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            _validate.shape(op, name, t, x.shape[-1:])
            _validate.dtype(op, name, t, (x.dtype, torch.float32), "x's dtype or float32")
            _validate.same_device(op, name, t, x, "x")
    if weight is not None and bias is not None:
        _validate.dtype(op, "bias", bias, (weight.dtype,), "weight's dtype")
    if residual is not None:
        _validate.shape(op, "residual", residual, x.shape)
        _validate.dtype(op, "residual", residual, (x.dtype,), "x's dtype")
        _validate.same_device(op, "residual", residual, x, "x")


def _implementation(backend: str) -> ModuleType:
    """The implementation module of a kernel backend; imported here and not above so that CPU users never pay for it."""
    if backend == "cuda":
        from transfuse.ops.norm import cuda_impl

        return cuda_impl
    if backend == "triton":
        from transfuse.ops.norm import triton_impl

        return triton_impl
    return torch_impl


def _why_not(backend: str, x: torch.Tensor, weight: torch.Tensor | None) -> str | None:
    if backend in ("torch", "reference"):
        return None
    reason: str | None = _implementation(backend).why_not(x, weight)
    return reason


# --- transfuse::layer_norm ------------------------------------------------------------------------------------------


def _layer_norm(x, weight, bias, eps, residual, backend):  # type: ignore[no-untyped-def]
    return _implementation(backend).layer_norm_forward(x, weight, bias, eps, residual)


def _layer_norm_fake(x, weight, bias, eps, residual, backend):  # type: ignore[no-untyped-def]
    summed = x.new_empty(0) if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    statistics = _statistics(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, summed, statistics, torch.empty_like(statistics)


def _layer_norm_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, eps, residual, backend = inputs
    _, summed, mean, rstd = output
    ctx.save_for_backward(x if residual is None else summed, weight, bias, mean, rstd)
    ctx.eps, ctx.backend, ctx.has_residual = eps, backend, residual is not None


def _layer_norm_grad(ctx, dout, dsummed, _dmean, _drstd):  # type: ignore[no-untyped-def]
    summed, weight, bias, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.transfuse.layer_norm_backward(
        dout, dsummed if ctx.has_residual else None, summed, weight, bias, mean, rstd, ctx.eps, ctx.backend
    )
    return (
        dx,
        None if weight is None else dweight,
        None if bias is None else dbias,
        None,
        dx if ctx.has_residual else None,
        None,
    )


def _layer_norm_backward(dout, dsummed, summed, weight, bias, mean, rstd, eps, backend):  # type: ignore[no-untyped-def]
    return _implementation(backend).layer_norm_backward(dout, dsummed, summed, weight, bias, mean, rstd, eps)


def _layer_norm_backward_fake(dout, dsummed, summed, weight, bias, mean, rstd, eps, backend):  # type: ignore[no-untyped-def]
    return _dx(summed), _parameter_grad(weight, summed), _parameter_grad(bias, summed)


def _layer_norm_backward_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    dout, dsummed, summed, weight, bias, _, _, eps, _ = inputs
    ctx.save_for_backward(dout, dsummed, summed, weight, bias)
    ctx.eps = eps


def _layer_norm_double(ctx, ddx, ddweight, ddbias):  # type: ignore[no-untyped-def]
    dout, dsummed, summed, weight, bias = ctx.saved_tensors

    def function(x, weight, bias):  # type: ignore[no-untyped-def]
        return torch_impl.layer_norm(x, weight, bias, ctx.eps, None)

    (dx, dw, db), (g_out, g_summed) = _registry.double_backward(
        function,
        (summed, weight, bias),
        (dout, dsummed),
        (ddx, None if weight is None else ddweight, None if bias is None else ddbias),
    )
    return g_out, g_summed, dx, dw, db, None, None, None, None


# --- transfuse::rms_norm --------------------------------------------------------------------------------------------


def _rms_norm(x, weight, eps, residual, backend):  # type: ignore[no-untyped-def]
    return _implementation(backend).rms_norm_forward(x, weight, eps, residual)


def _rms_norm_fake(x, weight, eps, residual, backend):  # type: ignore[no-untyped-def]
    y, summed, rstd, _ = _layer_norm_fake(x, weight, None, eps, residual, backend)
    return y, summed, rstd


def _rms_norm_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, eps, residual, backend = inputs
    _, summed, rstd = output
    ctx.save_for_backward(x if residual is None else summed, weight, rstd)
    ctx.eps, ctx.backend, ctx.has_residual = eps, backend, residual is not None


def _rms_norm_grad(ctx, dout, dsummed, _drstd):  # type: ignore[no-untyped-def]
    summed, weight, rstd = ctx.saved_tensors
    dx, dweight = torch.ops.transfuse.rms_norm_backward(
        dout, dsummed if ctx.has_residual else None, summed, weight, rstd, ctx.eps, ctx.backend
    )
    return dx, None if weight is None else dweight, None, dx if ctx.has_residual else None, None


def _rms_norm_backward(dout, dsummed, summed, weight, rstd, eps, backend):  # type: ignore[no-untyped-def]
    return _implementation(backend).rms_norm_backward(dout, dsummed, summed, weight, rstd, eps)


def _rms_norm_backward_fake(dout, dsummed, summed, weight, rstd, eps, backend):  # type: ignore[no-untyped-def]
    return _dx(summed), _parameter_grad(weight, summed)


def _rms_norm_backward_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    dout, dsummed, summed, weight, _, eps, _ = inputs
    ctx.save_for_backward(dout, dsummed, summed, weight)
    ctx.eps = eps


def _rms_norm_double(ctx, ddx, ddweight):  # type: ignore[no-untyped-def]
    dout, dsummed, summed, weight = ctx.saved_tensors

    def function(x, weight):  # type: ignore[no-untyped-def]
        return torch_impl.rms_norm(x, weight, ctx.eps, None)

    (dx, dw), (g_out, g_summed) = _registry.double_backward(
        function, (summed, weight), (dout, dsummed), (ddx, None if weight is None else ddweight)
    )
    return g_out, g_summed, dx, dw, None, None, None


def _statistics(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _dx(summed: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(summed, memory_format=torch.contiguous_format)


def _parameter_grad(parameter: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0) if parameter is None else torch.empty_like(parameter)


_registry.define(
    "layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? residual, str backend)"
    " -> (Tensor out, Tensor summed, Tensor mean, Tensor rstd)",
    _layer_norm,
    _layer_norm_fake,
)
_registry.define(
    "layer_norm_backward",
    "(Tensor dout, Tensor? dsummed, Tensor summed, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, float eps,"
    " str backend) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _layer_norm_backward,
    _layer_norm_backward_fake,
)
_registry.define(
    "rms_norm",
    "(Tensor x, Tensor? weight, float eps, Tensor? residual, str backend) -> (Tensor out, Tensor summed, Tensor rstd)",
    _rms_norm,
    _rms_norm_fake,
)
_registry.define(
    "rms_norm_backward",
    "(Tensor dout, Tensor? dsummed, Tensor summed, Tensor? weight, Tensor rstd, float eps, str backend)"
    " -> (Tensor dx, Tensor dweight)",
    _rms_norm_backward,
    _rms_norm_backward_fake,
)
_registry.autograd("layer_norm", _layer_norm_setup, _layer_norm_grad)
_registry.autograd("layer_norm_backward", _layer_norm_backward_setup, _layer_norm_double)
_registry.autograd("rms_norm", _rms_norm_setup, _rms_norm_grad)
_registry.autograd("rms_norm_backward", _rms_norm_backward_setup, _rms_norm_double)
