"""transfuse::attention and transfuse::attention_weights, their gradients and the gradients of those.

A kernel backend drops in as the ``KERNELS`` of ``triton_impl`` or ``cuda_impl``.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from transfuse.ops import _registry, _validate
from transfuse.ops.attention import torch_chunks, torch_explicit, torch_impl
from transfuse.ops.attention.kernels import Kernels
from transfuse.ops.attention.variant import Variant, statistics_dtype

FIELDS = (
    "Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, float scale, SymInt left, SymInt right,"
    " SymInt? first, float softcap, float dropout_p, bool deterministic"
)
"""A Variant, flattened."""
N = len(Variant._fields)

_LARGEST_HEAD_DIM = 256  # of the kernels


def implementation(backend: str) -> ModuleType | Kernels:
    """What runs a backend; imported on demand so that others never pay for it."""
    if backend == "triton":
        from transfuse.ops.attention import triton_impl

        return triton_impl.KERNELS
    if backend == "cuda":
        from transfuse.ops.attention import cuda_impl

        return cuda_impl.KERNELS
    return torch_impl


def _function(backend: str, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(implementation(backend), name)
    return found


def why_not(backend: str, op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant) -> str | None:
    """Why a backend cannot take this call, with the remedy, or None."""
    if backend in ("torch", "reference"):
        return None
    reason = _validate.beyond_kernels(backend, q)
    widest = max(q.shape[-1], v.shape[-1])
    if reason is None and widest > _LARGEST_HEAD_DIM:
        reason = f"the kernels take a head_dim up to {_LARGEST_HEAD_DIM}, got {widest} (use backend='torch')"
    return reason


def split_variant(variant: Variant) -> tuple[tuple[torch.Tensor | None, ...], Variant]:
    """(its tensors, the rest): tensors that autograd is to see must be saved apart."""
    return tuple(variant[:4]), variant._replace(mask=None, bias=None, alibi_slopes=None, sinks=None)


def join_variant(tensors: tuple[torch.Tensor | None, ...], rest: Variant) -> Variant:
    """The inverse of :func:`split_variant`."""
    mask, bias, slopes, sinks = tensors
    return rest._replace(mask=mask, bias=bias, alibi_slopes=slopes, sinks=sinks)


def or_empty(t: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """A registered op returns a tensor for every output: an empty one where there is none."""
    return like.new_empty(0) if t is None else t.contiguous()


def wants(variant_tensors: tuple[torch.Tensor | None, ...], needed: tuple[bool, ...]) -> list[bool]:
    """Of bias, ALiBi slopes and sinks, which exist and need a gradient."""
    return [t is not None and n for t, n in zip(variant_tensors[1:], needed, strict=True)]


# --- transfuse::attention -------------------------------------------------------------------------------------------


def _forward(q, k, v, *rest):  # type: ignore[no-untyped-def]
    seed, backend = rest[N:]
    out, lse = _function(backend, "attention_forward")(q, k, v, Variant(*rest[:N]), seed)
    return out.contiguous(), lse.contiguous()


def _forward_fake(q, k, v, *rest):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=statistics_dtype(q))


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, *rest = inputs
    tensors, ctx.rest = split_variant(Variant(*rest[:N]))
    seed, ctx.backend = rest[N:]
    ctx.save_for_backward(q, k, v, *output, *tensors, seed)
    ctx.set_materialize_grads(False)


def _grad(ctx, dout, dlse):  # type: ignore[no-untyped-def]
    q, k, v, out, lse, *tensors, seed = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * (3 + N + 2)
    dout = torch.zeros_like(out) if dout is None else dout
    want = wants(tuple(tensors), ctx.needs_input_grad[4:7])
    dq, dk, dv, *others = torch.ops.transfuse.attention_backward(
        dout, dlse, q, k, v, out, lse, *join_variant(tuple(tensors), ctx.rest), seed, want, ctx.backend
    )
    of_tensors = [g if w else None for g, w in zip(others, want, strict=True)]
    return dq, dk, dv, None, *of_tensors, *(None,) * (N - 4 + 2)


def _backward(dout, dlse, q, k, v, out, lse, *rest):  # type: ignore[no-untyped-def]
    seed, want, backend = rest[N:]
    grads = _function(backend, "attention_backward")(
        dout, dlse, q, k, v, out, lse, Variant(*rest[:N]), seed, tuple(want)
    )
    return tuple(or_empty(g, q) for g in grads)


def _backward_fake(dout, dlse, q, k, v, out, lse, *rest):  # type: ignore[no-untyped-def]
    of_tensors = [contiguous_like(t) if w else q.new_empty(0) for t, w in zip(rest[1:4], rest[N + 1], strict=True)]
    return contiguous_like(q), contiguous_like(k), contiguous_like(v), *of_tensors


def contiguous_like(t: torch.Tensor) -> torch.Tensor:
    """An uninitialised contiguous tensor of this shape and dtype."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _backward_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    dout, dlse, q, k, v, _, _, *rest = inputs
    tensors, ctx.rest = split_variant(Variant(*rest[:N]))
    seed, ctx.want, _ = rest[N:]
    ctx.save_for_backward(dout, dlse, q, k, v, *tensors, seed)
    ctx.set_materialize_grads(False)


def _double(ctx, *grad_grads):  # type: ignore[no-untyped-def]
    dout, dlse, q, k, v, mask, bias, slopes, sinks, seed = ctx.saved_tensors

    def function(q, k, v, bias, slopes, sinks):  # type: ignore[no-untyped-def]
        variant = join_variant((mask, bias, slopes, sinks), ctx.rest)
        return torch_explicit.attention(q, k, v, variant, torch_impl.keep_of(variant, seed, q, k))

    contract = [*grad_grads[:3], *(g if w else None for g, w in zip(grad_grads[3:], ctx.want, strict=True))]
    if all(g is None for g in contract):
        return (None,) * (7 + N + 3)
    found, (g_dout, g_dlse) = _registry.double_backward(
        function, (q, k, v, bias, slopes, sinks), (dout, dlse), contract
    )
    return g_dout, g_dlse, *found[:3], None, None, None, *found[3:], *(None,) * (N - 4 + 3)


# --- transfuse::attention_weights -----------------------------------------------------------------------------------


def _weights(q, k, lse, *rest):  # type: ignore[no-untyped-def]
    return _function(rest[N], "attention_weights_forward")(q, k, lse, Variant(*rest[:N])).contiguous()


def _weights_fake(q, k, lse, *rest):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:3], k.shape[2])


def _weights_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, lse, *rest = inputs
    tensors, ctx.rest = split_variant(Variant(*rest[:N]))
    ctx.save_for_backward(q, k, lse, *tensors)


def _weights_grad(ctx, dp):  # type: ignore[no-untyped-def]
    q, k, lse, *tensors = ctx.saved_tensors
    want = wants((*tensors[:3], None), (*ctx.needs_input_grad[4:6], False))
    dq, dk, dlse, *others = torch.ops.transfuse.attention_weights_backward(
        dp, q, k, lse, *join_variant(tuple(tensors), ctx.rest), want[:2]
    )
    of_tensors = [g if w else None for g, w in zip(others, want[:2], strict=True)]
    return dq, dk, dlse, None, *of_tensors, *(None,) * (N - 3 + 1)


def _weights_backward(dp, q, k, lse, *rest):  # type: ignore[no-untyped-def]
    grads = torch_chunks.weights_backward(dp, q, k, lse, Variant(*rest[:N]), *rest[N])
    return tuple(or_empty(g, q) for g in grads)


def _weights_backward_fake(dp, q, k, lse, *rest):  # type: ignore[no-untyped-def]
    of_tensors = [contiguous_like(t) if w else q.new_empty(0) for t, w in zip(rest[1:3], rest[N], strict=True)]
    return contiguous_like(q), contiguous_like(k), contiguous_like(lse), *of_tensors


def _weights_backward_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    dp, q, k, lse, *rest = inputs
    tensors, ctx.rest = split_variant(Variant(*rest[:N]))
    ctx.want = rest[N]
    ctx.save_for_backward(dp, q, k, lse, *tensors)
    ctx.set_materialize_grads(False)


def _weights_double(ctx, *grad_grads):  # type: ignore[no-untyped-def]
    dp, q, k, lse, mask, bias, slopes, _ = ctx.saved_tensors

    def function(q, k, lse, bias, slopes):  # type: ignore[no-untyped-def]
        variant = join_variant((mask, bias, slopes, None), ctx.rest)
        return (torch_impl.attention_weights(q, k, lse, variant),)

    contract = [*grad_grads[:3], *(g if w else None for g, w in zip(grad_grads[3:], ctx.want, strict=True))]
    if all(g is None for g in contract):
        return (None,) * (4 + N + 1)
    found, (g_dp,) = _registry.double_backward(function, (q, k, lse, bias, slopes), (dp,), contract)
    return g_dp, *found[:3], None, *found[3:], *(None,) * (N - 3 + 1)


_QKV = "Tensor q, Tensor k, Tensor v"
_registry.define(
    "attention",
    f"({_QKV}, {FIELDS}, Tensor? seed, str backend) -> (Tensor out, Tensor lse)",
    _forward,
    _forward_fake,
)
_registry.define(
    "attention_backward",
    f"(Tensor dout, Tensor? dlse, {_QKV}, Tensor out, Tensor lse, {FIELDS}, Tensor? seed, bool[] want, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dalibi_slopes, Tensor dsinks)",
    _backward,
    _backward_fake,
)
_registry.define(
    "attention_weights", f"(Tensor q, Tensor k, Tensor lse, {FIELDS}, str backend) -> Tensor", _weights, _weights_fake
)
_registry.define(
    "attention_weights_backward",
    f"(Tensor dp, Tensor q, Tensor k, Tensor lse, {FIELDS}, bool[] want)"
    " -> (Tensor dq, Tensor dk, Tensor dlse, Tensor dbias, Tensor dalibi_slopes)",
    _weights_backward,
    _weights_backward_fake,
)
_registry.autograd("attention", _setup, _grad)
_registry.autograd("attention_backward", _backward_setup, _double)
_registry.autograd("attention_weights", _weights_setup, _weights_grad)
_registry.autograd("attention_weights_backward", _weights_backward_setup, _weights_double)
