"""Rotary positions of queries and keys, and the write of new keys and values into a cache: one launch each, or both.

``reference`` is the specification, ``torch_impl`` the plain-PyTorch path, ``triton_impl`` and ``cuda_impl`` the
kernels; this file validates once, picks, calls, and registers. See docs/rotary.md.
"""

from __future__ import annotations

from types import ModuleType
from typing import overload

import torch

from transfuse.backends import choose, forced
from transfuse.errors import ArgumentError, DtypeError
from transfuse.ops import _registry, _validate
from transfuse.ops.rotary import reference, torch_impl

__all__ = ["cache_append", "rotary_append", "rotary_embedding"]


@overload
def rotary_embedding(
    q: torch.Tensor, k: None, cos: torch.Tensor, sin: torch.Tensor, *, backend: str | None = ...
) -> tuple[torch.Tensor, None]: ...
@overload
def rotary_embedding(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backend: str | None = ...
) -> tuple[torch.Tensor, torch.Tensor]: ...
def rotary_embedding(
    q: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Turns pairs of head dimensions by the angles of their positions (Su et al. 2021).

    Args:
        q: (batch, length, heads, head_dim), fp32, fp16, bf16 or fp64, any strides.
        k: (batch, length, kv_heads, head_dim), or None: one tensor may hold the heads of both.
        cos, sin: (batch or 1, length, 1, rotary_dim) in q's dtype or fp32, as :class:`transfuse.nn.RotaryEmbedding`
            gives them: dimension i is paired with i + rotary_dim / 2, and sin's first half has its sign turned already.
            Head dimensions from rotary_dim on stay. The kernels know no gradient of cos and sin.
        backend: see :func:`transfuse.use_backend`.

    Returns:
        (q, k) turned, in their dtype; k None if it was.

    Raises:
        ArgumentError: a shape is wrong. DtypeError, DeviceError, BackendError: as their names say.

    >>> import torch
    >>> cos, sin = torch.zeros(1, 1, 1, 2), torch.tensor([-1.0, 1.0]).reshape(1, 1, 1, 2)  # a quarter turn
    >>> q, _ = rotary_embedding(torch.tensor([3.0, 4.0]).reshape(1, 1, 1, 2), None, cos, sin)
    >>> q.flatten().tolist()
    [-4.0, 3.0]
    """
    _check_rotary(q, k, cos, sin)
    name = choose("rotary_embedding", q.device, backend, lambda b: _why_not(b, q, cos, sin))
    if name == "torch":
        return torch_impl.rotary_embedding(q, k, cos, sin)
    if name == "reference":
        return reference.rotary_embedding(q, k, cos, sin)
    turned_q, turned_k = torch.ops.transfuse.rotary_embedding(q, k, cos, sin, False, name)
    return turned_q, None if k is None else turned_k


def cache_append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    start: int | torch.Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Writes new keys and values into a cache, in place: ``k_cache[b, :, start + i] = k[b, :, i]``, and v likewise.

    Args:
        k: (batch, kv_heads, new, head_dim), any strides.
        v: (batch, kv_heads, new, v_head_dim).
        k_cache: (batch, kv_heads, max_length, head_dim); what is written is cast to its dtype.
        v_cache: (batch, kv_heads, max_length, v_head_dim).
        start: where the new ones go, for all rows or (batch,) int32 or int64, a place for each. Its values are checked
            on CPUs only; elsewhere they are not read by the host, and what lies outside the cache is not written.
        backend: see :func:`transfuse.use_backend`. The kernels record no gradient.

    Raises:
        ArgumentError: a shape or start is wrong. DtypeError, DeviceError, BackendError: as their names say.

    >>> import torch
    >>> k_cache, v_cache = torch.zeros(2, 1, 4, 1), torch.zeros(2, 1, 4, 1)
    >>> new = torch.ones(2, 1, 2, 1)
    >>> cache_append(new, 2 * new, k_cache, v_cache, torch.tensor([0, 2]))
    >>> v_cache[:, 0, :, 0].tolist()
    [[2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0]]
    """
    _check_append(k, v, k_cache, v_cache, start)
    name = choose("cache_append", k.device, backend, lambda b: _why_not_append(b, k, v, k_cache, v_cache))
    if name == "torch":
        torch_impl.cache_append(k, v, k_cache, v_cache, start)
    elif name == "reference":
        reference.cache_append(k, v, k_cache, v_cache, start)
    elif isinstance(start, torch.Tensor):
        torch.ops.transfuse.cache_append(k, v, k_cache, v_cache, start, 0, name)
    else:
        torch.ops.transfuse.cache_append(k, v, k_cache, v_cache, None, start, name)


def rotary_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    start: int | torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """:func:`rotary_embedding` of new queries and keys and :func:`cache_append` of keys and values, in one launch.

    Args:
        q: (batch, new, heads, head_dim), as a projection gives them.
        k: (batch, new, kv_heads, head_dim), likewise.
        v: (batch, new, kv_heads, v_head_dim), in k's dtype.
        cos, sin: (batch or 1, new, 1, rotary_dim).
        k_cache, v_cache: (batch, kv_heads, max_length, head_dim or v_head_dim), written in place.
        start: where the new ones go, one place or (batch,).
        backend: see :func:`transfuse.use_backend`. The kernels record no gradient.

    Returns:
        q turned, (batch, new, heads, head_dim).

    Raises:
        ArgumentError: a shape or start is wrong. DtypeError, DeviceError, BackendError: as their names say.

    >>> import torch
    >>> cos, sin = torch.zeros(1, 1, 1, 2), torch.tensor([-1.0, 1.0]).reshape(1, 1, 1, 2)  # a quarter turn
    >>> x, caches = torch.tensor([3.0, 4.0]).reshape(1, 1, 1, 2), torch.zeros(2, 1, 1, 2, 2)
    >>> q = rotary_append(x, x, x, cos, sin, *caches, 1)
    >>> caches[0].flatten().tolist(), caches[1].flatten().tolist()
    ([0.0, 0.0, -4.0, 3.0], [0.0, 0.0, 3.0, 4.0])
    """
    op = "rotary_append"
    _check_rotary(q, k, cos, sin, op)
    _validate.floating(op, "v", v)
    _validate.dtype(op, "v", v, (k.dtype,), "k's dtype")
    if v.dim() != 4:
        raise ArgumentError(f"{op}: v must have shape (batch, new, kv_heads, v_head_dim), got {tuple(v.shape)}")
    _check_append(k.transpose(1, 2), v.transpose(1, 2), k_cache, v_cache, start, op)
    name = choose(op, q.device, backend, lambda b: _why_not_both(b, q, k, v, cos, sin, k_cache, v_cache))
    if name in ("torch", "reference"):
        plain = torch_impl if name == "torch" else reference
        return plain.rotary_append(q, k, v, cos, sin, k_cache, v_cache, start)
    starts, place = (start, 0) if isinstance(start, torch.Tensor) else (None, start)
    return torch.ops.transfuse.rotary_append(q, k, v, cos, sin, k_cache, v_cache, starts, place, name)


def rotate_heads(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """:func:`rotary_embedding` of one tensor for a layer, which knows its shapes: its checks cost a CPU too much."""
    if _plainly(x):
        return torch_impl.turned(x, cos, sin)
    return rotary_embedding(x, None, cos, sin)[0]


def write_new(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, start: int) -> None:
    """:func:`cache_append` for a cache, which knows its shapes; where gradients are recorded PyTorch writes."""
    if _plainly(k) or (torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)):
        torch_impl.write_at(k, v, k_cache, v_cache, start)
    else:
        cache_append(k, v, k_cache, v_cache, start)


def in_one(x: torch.Tensor) -> bool:
    """Whether a layer with a cache should call :func:`rotary_append`: a kernel may run, and no gradient is recorded."""
    return not (_plainly(x) or (torch.is_grad_enabled() and x.requires_grad))


def _plainly(x: torch.Tensor) -> bool:
    """Whether PyTorch is what choose() would give, known without asking."""
    return x.is_cpu and forced() is None


def _check_rotary(
    q: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, op: str = "rotary_embedding"
) -> None:
    _validate.floating(op, "q", q)
    if q.dim() != 4:
        raise ArgumentError(f"{op}: q must have shape (batch, length, heads, head_dim), got {tuple(q.shape)}")
    batch, length, _, head_dim = q.shape
    if k is not None:
        _validate.floating(op, "k", k)
        _validate.dtype(op, "k", k, (q.dtype,), "q's dtype")
        _validate.same_device(op, "k", k, q, "q")
        if k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != head_dim:
            raise ArgumentError(
                f"{op}: k must have shape ({batch}, {length}, kv_heads, {head_dim}), got {tuple(k.shape)}"
            )
    for name, t in (("cos", cos), ("sin", sin)):
        _validate.floating(op, name, t)
        _validate.dtype(op, name, t, (q.dtype, torch.float32), "q's dtype or float32")
        _validate.same_device(op, name, t, q, "q")
        fits = t.dim() == 4 and t.shape[1] == length and t.shape[2] == 1 and t.shape[3] <= head_dim
        if not fits or t.shape[3] % 2 or t.shape[0] not in (1, batch) or t.shape != cos.shape or t.dtype != cos.dtype:
            raise ArgumentError(
                f"{op}: {name} must have shape ({batch} or 1, {length}, 1, an even rotary_dim up to {head_dim}), sin "
                f"like cos, got {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
            )


def _check_append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    start: int | torch.Tensor,
    op: str = "cache_append",
) -> None:
    for name, t in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        _validate.floating(op, name, t)
        _validate.same_device(op, name, t, k, "k")
        if t.dim() != 4:
            raise ArgumentError(f"{op}: {name} must have shape (batch, kv_heads, length, dim), got {tuple(t.shape)}")
    batch, heads, new, dim = k.shape
    room = k_cache.shape[2]
    _validate.shape(op, "v", v, (batch, heads, new, v.shape[3]))
    _validate.shape(op, "k_cache", k_cache, (batch, heads, room, dim))
    _validate.shape(op, "v_cache", v_cache, (batch, heads, room, v.shape[3]))
    if not isinstance(start, torch.Tensor):
        if not 0 <= start <= room - new:
            raise ArgumentError(f"{op}: start must be from 0 to {room - new} ({new} of {room} positions), got {start}")
        return
    if start.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"{op}: start must be an int or an int32 or int64 tensor, got {start.dtype}")
    _validate.shape(op, "start", start, (batch,))
    _validate.same_device(op, "start", start, k, "k")
    if start.device.type != "cpu" or torch.compiler.is_compiling():
        return  # reading it would make the host wait
    for first in start.tolist():
        if not 0 <= first <= room - new:
            raise ArgumentError(f"{op}: start must be from 0 to {room - new} ({new} of {room} positions), got {first}")


def _implementation(backend: str) -> ModuleType:
    """The implementation module of a kernel backend; imported here so that CPU users never pay for it."""
    if backend == "triton":
        from transfuse.ops.rotary import triton_impl

        return triton_impl
    if backend == "cuda":
        from transfuse.ops.rotary import cuda_impl

        return cuda_impl
    return torch_impl


def _why_not(backend: str, q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    if backend in ("torch", "reference"):
        return None
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return "the kernel has no gradient for cos and sin (detach them, or use backend='torch')"
    reason: str | None = _implementation(backend).why_not("rotary_embedding", q, cos)
    return reason


def _why_not_append(backend: str, *tensors: torch.Tensor) -> str | None:
    if backend in ("torch", "reference"):
        return None
    if torch.is_grad_enabled() and (tensors[0].requires_grad or tensors[1].requires_grad):
        return "the kernel records no gradient of k and v (use torch.no_grad() or backend='torch')"
    reason: str | None = _implementation(backend).why_not("cache_append", *tensors)
    return reason


def _why_not_both(backend: str, *tensors: torch.Tensor) -> str | None:
    if backend in ("torch", "reference"):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "the kernel records no gradient (use torch.no_grad() or backend='torch')"
    reason: str | None = _implementation(backend).why_not("rotary_append", *tensors)
    return reason


# --- transfuse::rotary_embedding ------------------------------------------------------------------------------------


def _rotary(q, k, cos, sin, inverse, backend):  # type: ignore[no-untyped-def]
    if backend in ("cuda", "triton"):
        turned_q, turned_k = _implementation(backend).rotary_embedding(q, k, cos, sin, inverse)
    else:
        turned_q, turned_k = torch_impl.rotary_embedding(q, k, cos, torch_impl.transposed(sin) if inverse else sin)
    return turned_q.contiguous(), q.new_empty(0) if turned_k is None else turned_k.contiguous()


def _rotary_fake(q, k, cos, sin, inverse, backend):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), q.new_empty(0) if k is None else k.new_empty(k.shape)


def _rotary_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, k, cos, sin, ctx.inverse, ctx.backend = inputs
    ctx.save_for_backward(cos, sin)
    ctx.one = k is None


def _rotary_grad(ctx, dq, dk):  # type: ignore[no-untyped-def]
    # The map is linear: its gradient is the transposed map, and that one's gradient the map itself.
    cos, sin = ctx.saved_tensors
    rotary = torch.ops.transfuse.rotary_embedding
    dq, dk = rotary(dq, None if ctx.one else dk, cos, sin, not ctx.inverse, ctx.backend)
    return dq, None if ctx.one else dk, None, None, None, None


# --- transfuse::cache_append ----------------------------------------------------------------------------------------


def _append(k, v, k_cache, v_cache, starts, start, backend):  # type: ignore[no-untyped-def]
    _implementation(backend).cache_append(k, v, k_cache, v_cache, start if starts is None else starts)


def _append_fake(k, v, k_cache, v_cache, starts, start, backend):  # type: ignore[no-untyped-def]
    return None


# --- transfuse::rotary_append ---------------------------------------------------------------------------------------


def _both(q, k, v, cos, sin, k_cache, v_cache, starts, start, backend):  # type: ignore[no-untyped-def]
    place = start if starts is None else starts
    return _implementation(backend).rotary_append(q, k, v, cos, sin, k_cache, v_cache, place).contiguous()


def _both_fake(q, k, v, cos, sin, k_cache, v_cache, starts, start, backend):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape)


_registry.define(
    "rotary_embedding",
    "(Tensor q, Tensor? k, Tensor cos, Tensor sin, bool inverse, str backend) -> (Tensor, Tensor)",
    _rotary,
    _rotary_fake,
)
_registry.autograd("rotary_embedding", _rotary_setup, _rotary_grad)
_registry.define(
    "cache_append",
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? starts, SymInt start, str backend) -> ()",
    _append,
    _append_fake,
)
_registry.define(
    "rotary_append",
    "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? starts,"
    " SymInt start, str backend) -> Tensor",
    _both,
    _both_fake,
)
