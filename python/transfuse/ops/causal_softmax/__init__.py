"""Scale, mask, bias and softmax of attention scores as one op, for those who keep the scores.

``reference`` is the specification and ``torch_impl`` the plain-PyTorch path; this file validates once, picks, calls,
and registers. The kernels, ``triton_impl`` and ``cuda_impl``, have ``why_not(scores, mask, bias)``,
``causal_softmax_forward`` and ``causal_softmax_backward`` of torch_impl's signatures, and share ``rows`` on the host.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch

from transfuse.backends import choose
from transfuse.errors import ArgumentError, DtypeError
from transfuse.ops import _registry, _validate
from transfuse.ops.causal_softmax import reference, torch_impl

__all__ = ["causal_softmax"]


def causal_softmax(
    scores: torch.Tensor,
    *,
    scale: float = 1.0,
    causal: bool | str = True,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """``softmax(scale * scores + bias)`` over the keys that each query may see; the others get probability 0.

    Args:
        scores: (..., q_len, k_len), fp32, fp16, bf16 or fp64, any strides.
        scale: a finite number, usually ``1 / sqrt(head_dim)``.
        causal: True: query i sees keys 0..i. ``"lower_right"``: the last query sees the last key, so query i sees keys
            0..i + k_len - q_len (new queries over a cache). False: all of them.
        mask: bool, True = attend, of any shape that broadcasts to scores.
        bias: scores' dtype or fp32, of any shape that broadcasts to scores; its gradient has its own shape.
        backend: see :func:`transfuse.use_backend`.

    Returns:
        (..., q_len, k_len) in scores' dtype (under autocast too), maximum and sum in fp32. A query that sees nothing,
        its scores hidden or all -inf, gets a row of 0 and passes a zero gradient. Hidden scores are never looked at,
        NaN and infinities included; a NaN or +inf that is seen makes its row NaN.

    Raises:
        ArgumentError: a shape, scale or causal is wrong. DtypeError, DeviceError, BackendError: as their names say.

    >>> import torch
    >>> causal_softmax(torch.zeros(3, 3))
    tensor([[1.0000, 0.0000, 0.0000],
            [0.5000, 0.5000, 0.0000],
            [0.3333, 0.3333, 0.3333]])
    >>> causal_softmax(torch.zeros(1, 3), causal="lower_right", mask=torch.tensor([True, False, True]))
    tensor([[0.5000, 0.0000, 0.5000]])
    """
    _check(scores, scale, causal, mask, bias)
    name = choose("causal_softmax", scores.device, backend, lambda b: _why_not(b, scores, mask, bias))
    if name == "reference":
        return reference.causal_softmax(scores, scale, causal, mask, bias)
    diagonal = _diagonal(scores, causal)
    if name == "torch":
        return torch_impl.causal_softmax(scores, scale, diagonal, mask, bias)
    return torch.ops.transfuse.causal_softmax(scores, scale, diagonal, mask, bias, name)


def _check(
    scores: torch.Tensor, scale: float, causal: bool | str, mask: torch.Tensor | None, bias: torch.Tensor | None
) -> None:
    op = "causal_softmax"
    _validate.floating(op, "scores", scores)
    if scores.dim() < 2:
        raise ArgumentError(f"{op}: scores must have shape (..., q_len, k_len), got {tuple(scores.shape)}")
    # not math.isfinite, which would make a symbolic scale a constant
    if not _validate.within(scale, lambda value: -math.inf < value < math.inf):
        raise ArgumentError(f"{op}: scale must be a finite number, got {scale!r}")
    if causal is not True and causal is not False and causal != "lower_right":
        raise ArgumentError(f"{op}: causal must be True, False or 'lower_right', got {causal!r}")
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            got = str(mask.dtype).removeprefix("torch.") if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise DtypeError(f"{op}: mask must be a bool tensor, True = attend, got {got}; pass numbers as bias")
        _validate.broadcasts(op, "mask", mask, scores.shape)
        _validate.same_device(op, "mask", mask, scores, "scores")
    if bias is not None:
        _validate.floating(op, "bias", bias)
        _validate.dtype(op, "bias", bias, (scores.dtype, torch.float32), "scores' dtype or float32")
        _validate.broadcasts(op, "bias", bias, scores.shape)
        _validate.same_device(op, "bias", bias, scores, "scores")


def _diagonal(scores: torch.Tensor, causal: bool | str) -> int | None:
    """Query i sees the keys up to i + diagonal; None: all of them."""
    if not causal:
        return None
    return scores.shape[-1] - scores.shape[-2] if causal == "lower_right" else 0


def _implementation(backend: str) -> ModuleType:
    """The implementation module of a kernel backend; imported here and not above so that CPU users never pay for it."""
    if backend == "cuda":
        from transfuse.ops.causal_softmax import cuda_impl

        return cuda_impl
    if backend == "triton":
        from transfuse.ops.causal_softmax import triton_impl

        return triton_impl
    return torch_impl


def _why_not(backend: str, scores: torch.Tensor, mask: torch.Tensor | None, bias: torch.Tensor | None) -> str | None:
    if backend in ("torch", "reference"):
        return None
    return _implementation(backend).why_not(scores, mask, bias)


# --- transfuse::causal_softmax --------------------------------------------------------------------------------------


def _forward(scores, scale, diagonal, mask, bias, backend):  # type: ignore[no-untyped-def]
    return _implementation(backend).causal_softmax_forward(scores, scale, diagonal, mask, bias)


def _forward_fake(scores, scale, diagonal, mask, bias, backend):  # type: ignore[no-untyped-def]
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, scale, diagonal, _, bias, backend = inputs
    ctx.save_for_backward(output, bias if ctx.needs_input_grad[4] else None)
    ctx.scale, ctx.diagonal, ctx.backend = scale, diagonal, backend


def _grad(ctx, dout):  # type: ignore[no-untyped-def]
    out, bias = ctx.saved_tensors
    dscores, dbias = torch.ops.transfuse.causal_softmax_backward(dout, out, ctx.scale, ctx.diagonal, bias, ctx.backend)
    return dscores, None, None, None, None if bias is None else dbias, None


def _backward(dout, out, scale, diagonal, bias, backend):  # type: ignore[no-untyped-def]
    return _implementation(backend).causal_softmax_backward(dout, out, scale, diagonal, bias)


def _backward_fake(dout, out, scale, diagonal, bias, backend):  # type: ignore[no-untyped-def]
    dscores = torch.empty_like(out, memory_format=torch.contiguous_format)
    if bias is None:
        return dscores, out.new_empty(0)
    return dscores, torch.empty_like(bias, memory_format=torch.contiguous_format)


def _backward_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    dout, out, scale, _, bias, _ = inputs
    ctx.save_for_backward(dout, out)
    ctx.scale, ctx.has_bias = scale, bias is not None


def _double(ctx, ddscores, ddbias):  # type: ignore[no-untyped-def]
    """With g what comes in for dlogits = out * (dout - r), r = sum(out * dout): docs/causal_softmax.md."""
    dout, out = ctx.saved_tensors
    g = ddscores * ctx.scale
    if ctx.has_bias:
        g = (g + ddbias).to(out.dtype)
    along = (out * g).sum(-1, keepdim=True)
    r = (out * dout).sum(-1, keepdim=True)
    return out * (g - along), g * (dout - r) - dout * along, None, None, None, None


_registry.define(
    "causal_softmax",
    "(Tensor scores, float scale, SymInt? diagonal, Tensor? mask, Tensor? bias, str backend) -> Tensor",
    _forward,
    _forward_fake,
)
_registry.define(
    "causal_softmax_backward",
    "(Tensor dout, Tensor out, float scale, SymInt? diagonal, Tensor? bias, str backend)"
    " -> (Tensor dscores, Tensor dbias)",
    _backward,
    _backward_fake,
)
_registry.autograd("causal_softmax", _setup, _grad)
_registry.autograd("causal_softmax_backward", _backward_setup, _double)
