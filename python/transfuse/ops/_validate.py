"""Checks that every op makes once, before dispatch. Each raises with what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from transfuse.errors import ArgumentError, DeviceError, DtypeError

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OF_KERNELS = (torch.float32, torch.bfloat16, torch.float16)


def floating(op: str, name: str, x: torch.Tensor) -> None:
    """x must be a tensor of fp32, fp16, bf16 or fp64."""
    if not isinstance(x, torch.Tensor):
        raise DtypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise DtypeError(f"{op}: {name} must be a dense tensor, got layout {x.layout} (use {name}.to_dense())")
    if x.dtype not in FLOATING:
        raise DtypeError(f"{op}: {name} must be float32, float16, bfloat16 or float64, got {_short(x.dtype)}")


def beyond_kernels(backend: str, *tensors: torch.Tensor | None) -> str | None:
    """Why a backend's kernels, which know fp32, fp16 and bf16 alone, cannot take one of these tensors, or None."""
    for t in tensors:
        if t is not None and t.dtype not in _OF_KERNELS:
            name = "Triton" if backend == "triton" else "CUDA"
            return f"the {name} kernel takes float32, float16 or bfloat16, got {_short(t.dtype)} (use backend='torch')"
    return None


def same_device(op: str, name: str, x: torch.Tensor, like: torch.Tensor, like_name: str) -> None:
    """x must stand where the op's first tensor stands."""
    if x.device != like.device:
        raise DeviceError(f"{op}: {name} must be on {like.device} like {like_name}, got {x.device}")


def dtype(op: str, name: str, x: torch.Tensor, allowed: Sequence[torch.dtype], because: str) -> None:
    """x's dtype must be one of those allowed; ``because`` says what they follow from."""
    if x.dtype not in allowed:
        names = " or ".join(dict.fromkeys(_short(d) for d in allowed))
        raise DtypeError(f"{op}: {name} must be {names} ({because}), got {_short(x.dtype)}")


def shape(op: str, name: str, x: torch.Tensor, expected: Sequence[int]) -> None:
    """x must be a tensor of exactly this shape."""
    if not isinstance(x, torch.Tensor):
        raise DtypeError(f"{op}: {name} must be a tensor of shape {tuple(expected)}, got {type(x).__name__}")
    if x.shape != tuple(expected):
        raise ArgumentError(f"{op}: {name} must have shape {tuple(expected)}, got {tuple(x.shape)}")


def broadcasts(op: str, name: str, x: torch.Tensor, target: Sequence[int]) -> None:
    """x must broadcast to the target shape without enlarging it."""
    target = tuple(target)
    fits = x.dim() <= len(target)
    if fits:
        for i in range(1, x.dim() + 1):  # a loop: older Dynamos do not trace all(generator)
            fits = fits and (x.shape[-i] == 1 or x.shape[-i] == target[-i])
    if not fits:
        raise ArgumentError(f"{op}: {name} must broadcast to shape {target}, got {tuple(x.shape)}")


def probability(op: str, name: str, p: float) -> None:
    """p must lie in [0, 1)."""
    if not within(p, lambda value: 0.0 <= value < 1.0):
        raise ArgumentError(f"{op}: {name} must be at least 0 and below 1, got {p!r}")


def within(number: float, test: Callable[[float], bool]) -> bool:
    """Whether something is a number that passes the test; what cannot be compared is none."""
    try:
        return bool(test(number))
    except (TypeError, ValueError, RuntimeError):
        return False


def _short(d: torch.dtype) -> str:
    return str(d).removeprefix("torch.")
