"""Makes Triton's interpreter stricter and truer for tests.

Memory: a kernel may touch only elements of the tensors that its launch was given, through the pointer of the tensor
they belong to, and no element that another program of the launch wrote. To tell pointers apart, each argument's number
stands in the upper 16 bits of its addresses, where address arithmetic leaves it alone.

Speed: what the interpreter does again and again is done once, or by numpy instead of by tensors of its own.

Rounding: fp32 goes to bf16 as on the hardware, where the interpreter cuts the low bits off.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

_TAG = np.uint64(48)
_LARGEST_MAP = 2**26  # elements; of a larger tensor with gaps the gaps are not looked at


@dataclass
class Region:
    """The memory of one argument."""

    name: str
    tensor: torch.Tensor
    base: int = field(init=False)
    size: int = field(init=False)  # of an element, in bytes
    count: int = field(init=False)  # elements from the first to the last
    last: np.uint64 = field(init=False)  # offset of the last in bytes
    reachable: np.ndarray | None = field(init=False)  # (count,) bool; None: all of them
    place: tuple[int, int, int] = field(init=False)  # the same for two arguments that are one tensor

    def __post_init__(self) -> None:
        t = self.tensor
        self.base, self.size = t.data_ptr(), t.element_size()
        steps = [(n, s) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1 and s > 0]
        self.count = 1 + sum((n - 1) * s for n, s in steps) if t.numel() else 0
        self.place = (self.base, self.size, self.count)
        self.last = np.uint64(max(0, (self.count - 1) * self.size))
        self.reachable = None
        if math.prod(n for n, _ in steps) < self.count <= _LARGEST_MAP:
            self.reachable = np.zeros(self.count, bool)
            torch.from_numpy(self.reachable).as_strided(t.shape, t.stride()).fill_(True)

    def __str__(self) -> str:
        t = self.tensor
        return f"{self.name} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} with strides {t.stride()}"


class Launch:
    """The launch that is being interpreted."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.program: tuple[int, ...] = (0, 0, 0)
        self.regions: list[Region] = []
        self.names: dict[int, str] = {}
        self.patched: set[frozenset[int]] = set()  # the modules whose functions have been replaced
        self.writers: dict[tuple[int, int, int], np.ndarray] = {}  # by place: (count,) int32, which program + 1, or 0

    def tagged(self, t: torch.Tensor) -> int:
        self.regions.append(Region(self.names.get(id(t), "an argument"), t))
        return self.regions[-1].base | len(self.regions) << int(_TAG)

    def addresses(self, pointers: np.ndarray, mask: np.ndarray, does: str) -> np.ndarray:
        """The pointers without their tags, each checked where the mask is on."""
        tag = int(pointers.flat[0] >> _TAG) if pointers.size else 0
        if not 0 < tag <= len(self.regions):
            return self._mixed(pointers, mask, does)
        region = self.regions[tag - 1]
        offset = pointers - np.uint64(tag << int(_TAG) | region.base)  # wraps where the pointer lies before
        outside = offset > region.last if region.count else np.ones(offset.shape, bool)
        if (outside & mask).any():
            if (pointers >> _TAG != tag).any():
                return self._mixed(pointers, mask, does)
            self._fail(region, offset, outside & mask, does)
        if region.reachable is not None or does == "writes" or region.place in self.writers:
            self._check_elements(region, np.where(outside, 0, offset), mask, does)
        return offset + np.uint64(region.base)

    def _mixed(self, pointers: np.ndarray, mask: np.ndarray, does: str) -> np.ndarray:
        """Pointers into several tensors, or into none: one tag after another."""
        found = pointers & np.uint64(2 ** int(_TAG) - 1)
        for tag in np.unique((pointers >> _TAG)[mask]):
            if not 0 < tag <= len(self.regions):
                raise AssertionError(f"{self.kernel}, program {self.program}: {does} an address of no argument")
            here = mask & (pointers >> _TAG == tag)
            found[here] = self.addresses(pointers[here], np.ones(int(here.sum()), bool), does)
        return found

    def _check_elements(self, region: Region, offset: np.ndarray, mask: np.ndarray, does: str) -> None:
        if region.count == 0:
            return
        index = offset // np.uint64(region.size)
        if region.reachable is not None:
            between = mask & ~region.reachable[index]
            if between.any():
                self._fail(region, offset, between, does)
        if does == "atomically updates":
            return
        if region.place not in self.writers:
            if does != "writes":
                return
            self.writers[region.place] = np.zeros(region.count, np.int32)
        writer = self.writers[region.place]
        number = 1 + self.program[0]
        before = writer[index]
        others = mask & (before != 0) & (before != number)
        if others.any():
            first = int(index[others][0])
            raise AssertionError(
                f"{self.kernel}, program {number - 1}: {does} element {first} of {region}, which program"
                f" {int(before[others][0]) - 1} wrote; programs run in any order"
            )
        if does == "writes":
            writer[index[mask]] = number

    def _fail(self, region: Region, offset: np.ndarray, wrong: np.ndarray, does: str) -> None:
        first = int(offset[wrong].view(np.int64)[0]) // region.size
        if first < 0:
            where = f"{-first} before its first"
        elif first >= region.count:
            where = f"{first - region.count + 1} past its last"
        else:
            where = f"number {first}, between two of its own"
        raise AssertionError(
            f"{self.kernel}, program {self.program[0]}: {does} {int(wrong.sum())} elements outside of {region};"
            f" the first is {where}"
        )


_launch: Launch | None = None


def install() -> None:
    """Patch the interpreter of this process; once is enough."""
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_stricter"):
        interpreter._stricter = True
        _round_truly(interpreter)
        _patch_once(interpreter)
        _check_overflow_at_once()
        interpreter._get_np_dtype = _of_scalars(interpreter._get_np_dtype)
        _check_memory(interpreter)


def _check_memory(interpreter: Any) -> None:
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    call, arguments, convert = executor.__call__, executor._init_args_hst, interpreter._implicit_cvt
    set_program = builder.set_grid_idx

    def watched_call(self: Any, *args: Any, **kwargs: Any) -> None:
        global _launch
        _launch = Launch(self.fn.__name__)
        try:
            call(self, *args, **kwargs)
        finally:
            _launch = None

    def named_arguments(self: Any, args: Any, kwargs: Any) -> Any:
        found = arguments(self, args, kwargs)
        assert _launch is not None
        named = [*zip(self.arg_names, found[0], strict=False), *found[1].items()]
        while named:
            name, value = named.pop()
            if isinstance(value, torch.Tensor):
                _launch.names[id(value)] = name
            elif isinstance(value, tuple):
                fields = getattr(value, "_fields", range(len(value)))
                named += [(f"{name}.{key}", item) for key, item in zip(fields, value, strict=True)]
        return found

    def tagging(value: Any) -> Any:
        found = convert(value)
        if isinstance(value, torch.Tensor) and _launch is not None:
            found.handle.data = np.array([_launch.tagged(value)], np.uint64)
        return found

    def watched_program(self: Any, *program: int) -> None:
        set_program(self, *program)
        if _launch is not None:
            _launch.program = program

    executor.__call__, executor._init_args_hst = watched_call, named_arguments
    interpreter._implicit_cvt = tagging
    builder.set_grid_idx = watched_program
    for method, does, pointer, mask in (
        ("create_masked_load", "reads", 0, 1),
        ("create_masked_store", "writes", 0, 2),
        ("create_atomic_rmw", "atomically updates", 1, 3),
        ("create_atomic_cas", "atomically updates", 0, None),
    ):
        setattr(builder, method, _watched(interpreter, getattr(builder, method), does, pointer, mask))


def _patch_once(interpreter: Any) -> None:
    """The functions of triton.language are replaced once a launch, not whenever a kernel calls another function."""
    import triton.language as tl

    patch = interpreter._patch_lang

    @functools.cache
    def modules_of(function: Any) -> frozenset[int]:
        return frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)

    def patch_once(function: Any) -> Any:
        modules = modules_of(function)
        if _launch is not None:
            if modules in _launch.patched:
                return None  # a function that a kernel calls: it does not look at what comes back
            _launch.patched.add(modules)
        return patch(function)

    interpreter._patch_lang = patch_once


def _check_overflow_at_once() -> None:
    """Integer sums and products are checked by numpy, not by a dozen operations of the language."""
    from triton.language.semantic import TritonSemantic

    def check(self: Any, left: Any, right: Any, operation: Any) -> None:
        scalar = left.type.scalar
        if scalar.int_bitwidth >= 64:
            return
        function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
        exact = function(left.handle.data.astype(np.int64), right.handle.data.astype(np.int64))
        if exact.size and not scalar.get_int_min_value() <= exact.min() <= exact.max() <= scalar.get_int_max_value():
            kernel = _launch.kernel if _launch is not None else "a kernel"
            raise AssertionError(f"{kernel}: {operation.__name__} overflows {scalar}")

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def _of_scalars(original: Any) -> Any:
    """The interpreter's numpy dtype of a dtype, remembered for scalars: it makes a table of them at each call."""
    known: dict[str, np.dtype] = {}

    def numpy_dtype(dtype: Any) -> np.dtype:
        scalar = dtype.scalar
        if scalar.is_ptr():
            return original(scalar)
        if scalar.name not in known:
            known[scalar.name] = original(scalar)
        return known[scalar.name]

    return numpy_dtype


def _watched(interpreter: Any, original: Any, does: str, pointer: int, mask: int | None) -> Any:
    """A builder's method whose arguments number ``pointer`` and ``mask`` are checked."""

    def method(self: Any, *args: Any) -> Any:
        if _launch is None:
            return original(self, *args)
        pointers = args[pointer]
        on = np.ones(pointers.data.shape, bool) if mask is None else args[mask].data
        handle = interpreter.TensorHandle(_launch.addresses(pointers.data, on, does), pointers.dtype)
        return original(self, *args[:pointer], handle, *args[pointer + 1 :])

    return method


def _round_truly(interpreter: Any) -> None:
    import triton.language as tl

    original = interpreter._convert_float

    def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            return to_bf16(data)
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        return original(data, source, target, rounding)

    interpreter._convert_float = convert


def to_bf16(data: np.ndarray) -> np.ndarray:
    """The bits of fp32 rounded to the nearest bf16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), (bits >> 16) | 0x40, rounded).astype(np.uint16)
