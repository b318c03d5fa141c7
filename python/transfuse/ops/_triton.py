"""What every Triton kernel here shares: how it is launched or only compiled, and the device functions all of them need.

Kernels are launched through :func:`launch` alone. Under TRITON_INTERPRET=1 (set before Triton is imported) they run on
CPU tensors, statement by statement; inside :func:`compiling` nothing runs and the compiled kernels are collected.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl

from transfuse.backends import Target, ahead, compiled_for
from transfuse.errors import ArgumentError

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter."""

_INTERPRETED = tl.constexpr(INTERPRETED)
_MOST_PROGRAMS = 2**31 - 1


class _State(threading.local):
    collected: list[Any] | None = None  # what this thread compiles instead of running it


_state = _State()


def launch(
    kernel: Any,
    programs: int,
    *args: Any,
    device: torch.device,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """Run ``programs`` programs of a kernel on a device's current stream; none at all where there is nothing to do.

    Args:
        kernel: a ``triton.jit`` function.
        programs: size of the grid's only dimension (the others end at 65535).
        args: tensors, numbers, None, and named tuples of them.
        device: where the tensors are; made current around the launch.
        constants: the kernel's constexpr parameters.
    """
    if programs == 0:
        return
    if programs > _MOST_PROGRAMS:
        raise ArgumentError(
            f"{kernel.fn.__name__}: a launch takes up to {_MOST_PROGRAMS} programs, got {programs} (split the batch)"
        )
    grid = (programs,)
    if INTERPRETED:
        kernel[grid](*args, **constants)
        return
    collected = _state.collected
    if collected is not None:
        described = [_described(arg) for arg in args]
        collected.append(kernel.warmup(*described, grid=grid, num_warps=num_warps, num_stages=num_stages, **constants))
        return
    with torch.cuda.device(device):
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)


@contextmanager
def compiling(target: Target = Target((9, 0))) -> Iterator[list[Any]]:  # noqa: B008 - immutable
    """Compile what is launched inside on meta tensors instead of running it; gives the list the kernels go to.

    Triton's active driver says what they are compiled for; ``target`` must be the same.
    """
    before = _state.collected
    collected: list[Any] = []
    _state.collected = collected
    try:
        with compiled_for(target):
            yield collected
    finally:
        _state.collected = before


class _Described:
    """Of a tensor what Triton specialises a kernel for: its dtype, and whether its address is a multiple of 16."""

    def __init__(self, t: torch.Tensor) -> None:
        self.dtype = t.dtype
        # A meta tensor has no address; its storage would have been aligned.
        self._address = int(t.storage_offset()) * t.element_size()

    def data_ptr(self) -> int:
        return self._address


def _described(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        return _Described(arg)
    if isinstance(arg, tuple):
        described = [_described(value) for value in arg]
        return type(arg)(*described) if hasattr(arg, "_fields") else tuple(described)
    return arg


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability that tiles on this device are chosen for; (9, 0) where kernels are interpreted."""
    if device.type == "cuda":
        return _facts(device.index)[0]
    target = ahead()
    return (9, 0) if target is None else target.capability


def multiprocessors(device: torch.device) -> int:
    """How many streaming multiprocessors the device has; an H100's 132 where there is no GPU."""
    if device.type == "cuda":
        return _facts(device.index)[1]
    target = ahead()
    return 132 if target is None or target.gpu is None else _facts(target.gpu)[1]


@functools.cache
def _facts(index: int | None) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a tl.dot over operands of this dtype, by torch's own setting for fp32 matmuls.

    "tf32" or "ieee" where ``torch.backends.cuda.matmul.fp32_precision`` (or allow_tf32) asks for it; else three tf32
    products ("tf32x3"), whose error is of fp32's class, on tensor cores.
    """
    if dtype != torch.float32:
        return "ieee"  # has no meaning there
    asked = torch.backends.cuda.matmul.fp32_precision
    return asked if asked in ("ieee", "tf32") else "tf32x3"


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + a @ b in fp32; a: [M, K], b: [K, N], acc: [M, N] fp32."""
    if _INTERPRETED:
        # The interpreter multiplies the bits of bf16; products of fp16 and bf16 are exact in fp32.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x, fp32, rounded to the nearest value of another dtype, ties to even."""
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        # The interpreter's own cast cuts the low bits off. A NaN keeps its high bits, one of which must be set.
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        x = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def kept(seed, row, first_column, threshold, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which probabilities dropout keeps, as in ``_philox.keep_mask``: bool [ROWS, COLUMNS].

    seed: pointer to int64 (2,); row: int64 [ROWS], (b * heads + h) * q_len + i; first_column: a multiple of 4;
    threshold: p * 2^32 rounded.
    """
    key = tl.load(seed)
    group = (first_column // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)[None, :]
    zero = tl.zeros([row.shape[0], COLUMNS // 4], tl.uint32)
    word0, word1, word2, word3 = tl.philox_impl(
        zero + group,
        zero + row.to(tl.uint32)[:, None],
        zero + (row >> 32).to(tl.uint32)[:, None],
        zero + tl.load(seed + 1).to(tl.uint32),
        key.to(tl.uint32),
        (key >> 32).to(tl.uint32),
    )
    # [ROWS, G] x 4 -> [ROWS, G, 2, 2] -> [ROWS, 4 G], word j mod 4 at column j
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3)).reshape([row.shape[0], COLUMNS])
    return words.to(tl.int64) >= threshold


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """To a few units in the last place of fp32: the Pade approximant [7/6] near 0, where 1 - exp(-2x) cancels."""
    square = x * x
    over = x * (135135.0 + square * (17325.0 + square * (378.0 + square)))
    under = 135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0))
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)
    far = (1.0 - e) / (1.0 + e)
    return tl.where(square < 0.4, over / under, tl.where(x < 0.0, -far, far))
