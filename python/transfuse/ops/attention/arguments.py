"""The checks of the attention ops, made once, and how their arguments become a Variant."""

from __future__ import annotations

import math

import torch

from transfuse.errors import ArgumentError, DtypeError
from transfuse.ops import _autocast, _validate
from transfuse.ops.attention.variant import Variant

Window = tuple[int, int]


def autocasting(op: str, q: torch.Tensor) -> bool:
    """Whether autocast is on where q stands."""
    _validate.floating(op, "q", q)
    return _autocast.active(q)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v in the dtype that autocast prescribes for attention; fp64 stays."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def check_qkv(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, names: str = "q k v") -> None:
    """q (batch, heads, q_len, head_dim) against k and v (batch, kv_heads, k_len, ·)."""
    _, name_k, name_v = names.split()
    check_alike(op, name_k, k, q)
    check_alike(op, name_v, v, q)
    if q.dim() != 4:
        raise ArgumentError(f"{op}: q must have shape (batch, heads, q_len, head_dim), got {tuple(q.shape)}")
    batch, heads, _, head_dim = q.shape
    if k.dim() != 4 or k.shape[0] != batch or k.shape[3] != head_dim:
        raise ArgumentError(
            f"{op}: {name_k} must have shape ({batch}, kv_heads, k_len, {head_dim}) for q of shape {tuple(q.shape)}, "
            f"got {tuple(k.shape)}"
        )
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ArgumentError(
            f"{op}: {name_v} must have shape ({batch}, {k.shape[1]}, {k.shape[2]}, v_head_dim) like {name_k}, "
            f"got {tuple(v.shape)}"
        )
    check_heads(op, heads, k.shape[1], name_k)


def check_alike(op: str, name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    """x must have q's dtype and device."""
    if isinstance(x, torch.Tensor) and x.dtype == q.dtype and x.device == q.device:
        return
    _validate.floating(op, name, x)
    _validate.dtype(op, name, x, (q.dtype,), "q's dtype")
    _validate.same_device(op, name, x, q, "q")


def check_heads(op: str, heads: int, kv_heads: int, name: str) -> None:
    """Every key head serves the same number of query heads."""
    if kv_heads == heads:
        return
    if kv_heads == 0 or heads % kv_heads:
        raise ArgumentError(f"{op}: q's {heads} heads must be a multiple of {name}'s heads, got {kv_heads}")


def make_variant(
    op: str,
    q: torch.Tensor,
    target: tuple[int, int, int, int],  # (batch, heads, q_len, k_len)
    *,
    causal: bool | str,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    window: Window | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scale: float | None,
    dropout_p: float,
    deterministic: bool | None,
    lower_right: bool = False,
) -> Variant:
    """The checked Variant of a call; ``lower_right`` aligns whatever ``causal`` says."""
    if causal is not True and causal is not False and causal != "lower_right":
        raise ArgumentError(f"{op}: causal must be False, True or 'lower_right', got {causal!r}")
    left, right = (-1, -1) if window is None else _check_window(op, window)
    if causal:
        right = 0
    head_dim = q.shape[-1]
    if scale is None:
        scale = head_dim**-0.5 if head_dim else 1.0
    elif not _validate.within(scale, lambda value: -math.inf < value < math.inf):
        raise ArgumentError(f"{op}: scale must be a finite number, got {scale!r}")
    if softcap is not None and not _validate.within(softcap, lambda cap: 0 < cap < math.inf):
        raise ArgumentError(f"{op}: softcap must be positive and finite, got {softcap!r}")
    if dropout_p != 0:
        _validate.probability(op, "dropout_p", dropout_p)
    if mask is not None:
        mask = _check_mask(op, mask, q, target)
    if bias is not None:
        bias = _check_bias(op, bias, q, target)
    if alibi_slopes is not None:
        _check_per_head(op, "alibi_slopes", alibi_slopes, q, target[:2])
    if sinks is not None:
        _check_per_head(op, "sinks", sinks, q, (target[1],))
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    first = None if lower_right or causal == "lower_right" else 0
    softcap = softcap or 0.0
    return Variant(mask, bias, alibi_slopes, sinks, scale, left, right, first, softcap, dropout_p, deterministic)


def _check_window(op: str, window: Window) -> Window:
    try:
        left, right = window
        fits = int(left) == left >= -1 and int(right) == right >= -1
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise ArgumentError(
            f"{op}: window must be two integers (keys before, keys after), -1 for no limit, got {window!r}"
        )
    return left, right


def _check_mask(op: str, mask: torch.Tensor, q: torch.Tensor, target: tuple[int, int, int, int]) -> torch.Tensor:
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        got = str(mask.dtype).removeprefix("torch.") if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise DtypeError(f"{op}: mask must be a bool tensor, True = attend, got {got} (numbers to add go to bias)")
    _validate.broadcasts(op, "mask", mask, target)
    _validate.same_device(op, "mask", mask, q, "q")
    return four_dimensional(mask)


def _check_bias(op: str, bias: torch.Tensor, q: torch.Tensor, target: tuple[int, int, int, int]) -> torch.Tensor:
    _validate.floating(op, "bias", bias)
    _validate.dtype(op, "bias", bias, (q.dtype, torch.float32), "q's dtype or float32")
    _validate.broadcasts(op, "bias", bias, target)
    _validate.same_device(op, "bias", bias, q, "q")
    return four_dimensional(bias)


def _check_per_head(op: str, name: str, x: torch.Tensor, q: torch.Tensor, shape: tuple[int, ...]) -> None:
    _validate.floating(op, name, x)
    _validate.dtype(op, name, x, (q.dtype, torch.float32), "q's dtype or float32")
    _validate.same_device(op, name, x, q, "q")
    if x.shape != shape and x.shape != shape[-1:]:
        allowed = f"{shape[-1:]}" if len(shape) == 1 else f"{shape[-1:]} or {shape}"
        raise ArgumentError(f"{op}: {name} must have shape {allowed}, got {tuple(x.shape)}")


def four_dimensional(x: torch.Tensor) -> torch.Tensor:
    """A view with leading dimensions of one."""
    return x if x.dim() == 4 else x[(None,) * (4 - x.dim())]
