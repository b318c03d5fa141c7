"""The feed-forward network as one op, plain or gated, and the linear layer with its activation.

``reference`` is the specification and ``torch_impl`` the plain-PyTorch path; this file validates once, picks, calls,
and registers. ``triton_impl`` and ``cuda_impl`` hold the kernels; a kernel module has ``why_not(op, *tensors)`` and
torch_impl's ``*_forward`` and ``*_backward``.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from transfuse.backends import OF_PRODUCTS, choose
from transfuse.errors import ArgumentError
from transfuse.ops import _autocast, _registry, _validate
from transfuse.ops._philox import draw_seed
from transfuse.ops.ffn import reference, torch_impl

__all__ = ["ACTIVATIONS", "ffn", "linear_act"]

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


def ffn(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    *,
    activation: str = "gelu",
    w_gate: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """``dropout(h) @ w2.T + b2`` with ``h = act(x @ w1.T + b1)``, or gated ``h = act(x @ w_gate.T) * (x @ w1.T + b1)``.

    The feed-forward network of Vaswani et al. 2017; gated as in Shazeer 2020 (GeGLU with gelu, SwiGLU with silu).

    Args:
        x: (..., d), fp32, fp16, bf16 or fp64, any strides.
        w1, b1: (d_ff, d) and (d_ff,), as torch.nn.Linear keeps them; b1 may be None.
        w2, b2: (d, d_ff) and (d,); b2 may be None.
        activation: ``relu``, ``gelu`` (with erf), ``gelu_tanh`` or ``silu``.
        w_gate: (d_ff, d); given, the network is gated.
        dropout_p: of the inner activations, whether training or not: pass 0 in evaluation.
        backend: see :func:`transfuse.use_backend`.

    Returns:
        (..., d) in x's dtype; under autocast everything is cast to the autocast dtype first.

    Raises:
        ArgumentError: a shape, activation or dropout_p is wrong. DtypeError (also where dtypes differ outside
            autocast), DeviceError, BackendError: as their names say.

    >>> import torch
    >>> x, w1, w2 = torch.ones(2, 4), torch.ones(8, 4), torch.ones(4, 8)
    >>> ffn(x, w1, None, w2, torch.ones(4), activation="relu")[0]
    tensor([33., 33., 33., 33.])
    >>> ffn(x, w1, None, w2, None, activation="relu", w_gate=w1)[0]
    tensor([128., 128., 128., 128.])
    """
    _check_ffn(x, w1, b1, w2, b2, activation, w_gate, dropout_p)
    name = choose("ffn", x.device, backend, lambda k: _why_not(k, "ffn", x, w1, b1, w2, b2, w_gate), OF_PRODUCTS)
    if name == "torch":
        return torch_impl.ffn(x, w1, b1, w2, b2, activation, w_gate, dropout_p)
    if name == "reference":
        scale = F.dropout(x.new_ones(*x.shape[:-1], w1.shape[0]), dropout_p) if dropout_p > 0.0 else None
        return reference.ffn(x, w1, b1, w2, b2, activation, w_gate, scale)
    x, w1, b1, w2, b2, w_gate = _cast(x, w1, b1, w2, b2, w_gate)
    seed = draw_seed(x.device) if dropout_p > 0.0 else None
    save = _needs_graph(x, w1, b1, w2, b2, w_gate)
    return torch.ops.transfuse.ffn(x, w1, b1, w2, b2, w_gate, activation, dropout_p, seed, save, name)[0]


def linear_act(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    activation: str = "gelu",
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``act(x @ w.T + b)``: one matrix product with its epilogue.

    Args:
        x: (..., d_in), fp32, fp16, bf16 or fp64, any strides.
        w, b: (d_out, d_in) and (d_out,), as torch.nn.Linear keeps them; b may be None.
        activation, backend: as for :func:`ffn`.

    Returns:
        (..., d_out) in x's dtype; under autocast everything is cast to the autocast dtype first.

    Raises:
        As :func:`ffn`.

    >>> import torch
    >>> linear_act(torch.ones(4), torch.ones(2, 4), torch.tensor([1.0, -9.0]), "relu")
    tensor([5., 0.])
    """
    _check_linear("linear_act", x, "w", w, "b", b)
    _check_activation("linear_act", activation)
    name = choose("linear_act", x.device, backend, lambda k: _why_not(k, "linear_act", x, w, b), OF_PRODUCTS)
    if name in ("torch", "reference"):
        return (torch_impl if name == "torch" else reference).linear_act(x, w, b, activation)
    x, w, b = _cast(x, w, b)
    return torch.ops.transfuse.linear_act(x, w, b, activation, _needs_graph(x, w, b), name)[0]


def _check_ffn(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str,
    w_gate: torch.Tensor | None,
    dropout_p: float,
) -> None:
    _check_linear("ffn", x, "w1", w1, "b1", b1)
    d_ff, d = w1.shape
    _check_parameter("ffn", "w2", w2, (d, d_ff), x)
    for name, t, shape in (("b2", b2, (d,)), ("w_gate", w_gate, (d_ff, d))):
        if t is not None:
            _check_parameter("ffn", name, t, shape, x)
    _check_activation("ffn", activation)
    _validate.probability("ffn", "dropout_p", dropout_p)


def _check_linear(op: str, x: torch.Tensor, w_name: str, w: torch.Tensor, b_name: str, b: torch.Tensor | None) -> None:
    _validate.floating(op, "x", x)
    if x.dim() == 0:
        raise ArgumentError(f"{op}: x must have at least one dimension, got a scalar")
    _validate.floating(op, w_name, w)
    if w.dim() != 2:
        raise ArgumentError(f"{op}: {w_name} must have two dimensions (out, in), got shape {tuple(w.shape)}")
    _check_parameter(op, w_name, w, (w.shape[0], x.shape[-1]), x)
    if b is not None:
        _check_parameter(op, b_name, b, w.shape[:1], x)


def _check_parameter(op: str, name: str, t: torch.Tensor, shape: Any, x: torch.Tensor) -> None:
    _validate.floating(op, name, t)
    _validate.shape(op, name, t, shape)
    if t.dtype != x.dtype and not _autocast.active(x):
        _validate.dtype(op, name, t, (x.dtype,), "x's dtype; cast one of them or use torch.autocast")
    _validate.same_device(op, name, t, x, "x")


def _check_activation(op: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _cast(x: torch.Tensor, *others: torch.Tensor | None) -> Any:
    """What ATen's linear does on its own under autocast: everything but fp64 in the autocast dtype."""
    tensors = (x, *others)
    if not _autocast.active(x):
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _needs_graph(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _implementation(backend: str) -> ModuleType:
    """The implementation module of a kernel backend; imported here and not above so that CPU users never pay for it."""
    if backend == "triton":
        from transfuse.ops.ffn import triton_impl

        return triton_impl
    if backend == "cuda":
        from transfuse.ops.ffn import cuda_impl

        return cuda_impl
    return torch_impl


def _why_not(backend: str, op: str, *tensors: torch.Tensor | None) -> str | None:
    if backend in ("torch", "reference"):
        return None
    return _implementation(backend).why_not(op, *tensors)


# --- transfuse::ffn -------------------------------------------------------------------------------------------------


def _ffn(x, w1, b1, w2, b2, w_gate, activation, dropout_p, seed, save, backend):  # type: ignore[no-untyped-def]
    return _implementation(backend).ffn_forward(x, w1, b1, w2, b2, activation, w_gate, dropout_p, seed, save)


def _ffn_fake(x, w1, b1, w2, b2, w_gate, activation, dropout_p, seed, save, backend):  # type: ignore[no-untyped-def]
    inner = (*x.shape[:-1], w1.shape[0])
    up = x.new_empty(inner if save else 0)
    gate = x.new_empty(inner if save and w_gate is not None else 0)
    return x.new_empty((*x.shape[:-1], w2.shape[0])), up, gate


def _ffn_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, w1, b1, w2, b2, w_gate, activation, dropout_p, seed, _, backend = inputs
    _, up, gate = output
    ctx.save_for_backward(x, w1, b1, w2, b2, w_gate, up, gate, seed)
    ctx.options = activation, dropout_p, backend
    ctx.mark_non_differentiable(up, gate)


def _ffn_grad(ctx, dout, _dup, _dgate):  # type: ignore[no-untyped-def]
    x, w1, b1, w2, b2, w_gate, up, gate, seed = ctx.saved_tensors
    activation, dropout_p, backend = ctx.options
    needs = list(ctx.needs_input_grad[:6])
    grads = torch.ops.transfuse.ffn_backward(
        dout, x, w1, b1, w2, b2, w_gate, up, gate, activation, dropout_p, seed, needs, backend
    )
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), None, None, None, None, None


def _ffn_backward(  # type: ignore[no-untyped-def]
    dout, x, w1, b1, w2, b2, w_gate, up, gate, activation, dropout_p, seed, needs, backend
):
    backward = _implementation(backend).ffn_backward
    return backward(dout, x, w1, w2, w_gate, up, gate, activation, dropout_p, seed, needs)


def _ffn_backward_fake(  # type: ignore[no-untyped-def]
    dout, x, w1, b1, w2, b2, w_gate, up, gate, activation, dropout_p, seed, needs, backend
):
    return _gradients_like((x, w1, b1, w2, b2, w_gate), needs)


def _ffn_backward_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    dout, x, w1, b1, w2, b2, w_gate, _, _, activation, dropout_p, seed, needs, _ = inputs
    ctx.save_for_backward(dout, x, w1, b1, w2, b2, w_gate, seed)
    ctx.options = activation, dropout_p, needs


def _ffn_double(ctx, *ddinputs):  # type: ignore[no-untyped-def]
    dout, *inputs, seed = ctx.saved_tensors
    activation, dropout_p, needs = ctx.options

    def function(x, w1, b1, w2, b2, w_gate):  # type: ignore[no-untyped-def]
        return (torch_impl.ffn(x, w1, b1, w2, b2, activation, w_gate, dropout_p, seed),)

    used = [dd if needed else None for dd, needed in zip(ddinputs, needs, strict=True)]
    grads, (ddout,) = _registry.double_backward(function, inputs, (dout,), used)
    return ddout, *grads, None, None, None, None, None, None, None


# --- transfuse::linear_act ------------------------------------------------------------------------------------------


def _linear_act(x, w, b, activation, save, backend):  # type: ignore[no-untyped-def]
    return _implementation(backend).linear_act_forward(x, w, b, activation, save)


def _linear_act_fake(x, w, b, activation, save, backend):  # type: ignore[no-untyped-def]
    out = x.new_empty((*x.shape[:-1], w.shape[0]))
    return out, torch.empty_like(out) if save else x.new_empty(0)


def _linear_act_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, w, b, activation, _, backend = inputs
    ctx.save_for_backward(x, w, b, output[1])
    ctx.options = activation, backend
    ctx.mark_non_differentiable(output[1])


def _linear_act_grad(ctx, dout, _dz):  # type: ignore[no-untyped-def]
    x, w, b, z = ctx.saved_tensors
    activation, backend = ctx.options
    needs = list(ctx.needs_input_grad[:3])
    grads = torch.ops.transfuse.linear_act_backward(dout, x, w, b, z, activation, needs, backend)
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), None, None, None


def _linear_act_backward(dout, x, w, b, z, activation, needs, backend):  # type: ignore[no-untyped-def]
    return _implementation(backend).linear_act_backward(dout, x, w, z, activation, needs)


def _linear_act_backward_fake(dout, x, w, b, z, activation, needs, backend):  # type: ignore[no-untyped-def]
    return _gradients_like((x, w, b), needs)


def _linear_act_backward_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    dout, x, w, b, _, activation, needs, _ = inputs
    ctx.save_for_backward(dout, x, w, b)
    ctx.options = activation, needs


def _linear_act_double(ctx, *ddinputs):  # type: ignore[no-untyped-def]
    dout, *inputs = ctx.saved_tensors
    activation, needs = ctx.options

    def function(x, w, b):  # type: ignore[no-untyped-def]
        return (torch_impl.linear_act(x, w, b, activation),)

    used = [dd if needed else None for dd, needed in zip(ddinputs, needs, strict=True)]
    grads, (ddout,) = _registry.double_backward(function, inputs, (dout,), used)
    return ddout, *grads, None, None, None, None


def _gradients_like(inputs, needs):  # type: ignore[no-untyped-def]
    like = inputs[0]
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed else like.new_empty(0)
        for t, needed in zip(inputs, needs, strict=True)
    )


_registry.define(
    "ffn",
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? w_gate, str activation, float dropout_p,"
    " Tensor? seed, bool save, str backend) -> (Tensor out, Tensor up, Tensor gate)",
    _ffn,
    _ffn_fake,
)
_registry.define(
    "ffn_backward",
    "(Tensor dout, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? w_gate, Tensor up, Tensor gate,"
    " str activation, float dropout_p, Tensor? seed, bool[] needs, str backend)"
    " -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dw_gate)",
    _ffn_backward,
    _ffn_backward_fake,
)
_registry.define(
    "linear_act",
    "(Tensor x, Tensor w, Tensor? b, str activation, bool save, str backend) -> (Tensor out, Tensor z)",
    _linear_act,
    _linear_act_fake,
)
_registry.define(
    "linear_act_backward",
    "(Tensor dout, Tensor x, Tensor w, Tensor? b, Tensor z, str activation, bool[] needs, str backend)"
    " -> (Tensor dx, Tensor dw, Tensor db)",
    _linear_act_backward,
    _linear_act_backward_fake,
)
_registry.autograd("ffn", _ffn_setup, _ffn_grad)
_registry.autograd("ffn_backward", _ffn_backward_setup, _ffn_double)
_registry.autograd("linear_act", _linear_act_setup, _linear_act_grad)
_registry.autograd("linear_act_backward", _linear_act_backward_setup, _linear_act_double)
