"""Triton kernels compiled before they are first called, for this machine's GPU or for one that another machine has.

Tensors become meta tensors, which have a shape, strides and a dtype but no data; launches on those compile and do not
run. Triton keeps what it compiles on disk (``TRITON_CACHE_DIR``), so an image that is built so starts warm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from transfuse.backends import Target
from transfuse.errors import ArgumentError, BackendError
from transfuse.ops import _nested

_driver_lock = threading.RLock()


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """A kernel that was compiled, and what it takes of a GPU."""

    name: str
    module: str
    capability: tuple[int, int]
    constants: dict[str, Any]
    """The values that are compiled in."""
    warps: int
    registers: int | None
    """Of one thread; None where Triton came without cuobjdump."""
    spilled_bytes: int | None
    """Local memory of one thread: registers that had to be kept in memory. None as above."""
    shared_bytes: int
    """Shared memory of one block."""
    cubin: bytes = dataclasses.field(repr=False)


def warmup(
    function: Callable[..., Any],
    *args: Any,
    backward: bool = False,
    target: tuple[int, int] | None = None,
    **kwargs: Any,
) -> list[CompiledKernel]:
    """Compile every Triton kernel that ``function(*args, **kwargs)`` would launch, without running or allocating.

    Args:
        function: an op, a module, a model, a method of one, or any function of them that reads no tensor's values.
        args, kwargs: as for a call. Tensors stand for their shape, strides, dtype, alignment and requires_grad, so
            meta tensors do too; lists, dicts, modules and this package's objects that hold tensors are looked into.
        backward: also compile what the gradient of every output launches (with contiguous incoming gradients).
        target: the compute capability to compile for, as in ``(8, 0)`` or ``(9, 0)``, which needs no GPU; every op
            that has a Triton kernel is then taken to run on it, unless another backend is asked for. None is the GPU
            that the tensors are on, or the current one.

    Returns:
        The kernels in the order of their first launch. They are in Triton's cache, those for this GPU in memory too.

    Raises:
        BackendError: Triton is missing or interpreted, or there is neither a GPU nor a target.
        ArgumentError: the function reads values, autocast is on, or backward finds no gradient.

    >>> import torch, transfuse
    >>> x = torch.empty(64, 768, device="meta", dtype=torch.float16)
    >>> kernels = transfuse.warmup(transfuse.rms_norm, x, None, target=(9, 0))  # doctest: +SKIP
    >>> [kernel.spilled_bytes for kernel in kernels]  # doctest: +SKIP
    [0]
    """
    compiled_for, driver = _target(target, (function, args, kwargs))
    if torch.is_autocast_enabled("cuda"):
        raise ArgumentError("warmup: autocast is on, and meta tensors do not take part in it: call .to(dtype) yourself")
    from transfuse.ops import _triton

    function, args, kwargs = _nested.without_data((function, args, kwargs))
    with driver, _triton.compiling(compiled_for) as compiled:
        try:
            outputs = list(_nested.tensors(function(*args, **kwargs)))
            if backward:
                _backward(outputs)
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error):
                raise
            reason = str(error).strip().splitlines()[0]
            raise ArgumentError(
                f"warmup: the function reads values of tensors, or uses tensors that are not among its arguments, "
                f"and compiling ahead has no values ({reason})"
            ) from error
    return [_facts(kernel) for kernel in {id(kernel): kernel for kernel in compiled}.values()]


def _backward(outputs: list[torch.Tensor]) -> None:
    differentiable = [t for t in outputs if t.requires_grad]
    if not differentiable:
        raise ArgumentError("warmup: backward=True, but no output depends on a tensor that requires a gradient")
    torch.autograd.backward(
        differentiable, [torch.empty_like(t, memory_format=torch.contiguous_format) for t in differentiable]
    )


# --- what is compiled for -------------------------------------------------------------------------------------------


def _target(capability: tuple[int, int] | None, values: Any) -> tuple[Target, contextlib.AbstractContextManager[None]]:
    """The target and the context in which Triton compiles for it."""
    if importlib.util.find_spec("triton") is None:
        raise BackendError("warmup: the package triton is not installed (pip install triton)")
    from transfuse.ops import _triton

    if _triton.INTERPRETED:
        raise BackendError(
            "warmup: Triton's kernels are interpreted in this process, and nothing is compiled"
            " (start Python without TRITON_INTERPRET=1)"
        )
    if capability is not None:
        if not (isinstance(capability, tuple) and len(capability) == 2 and all(type(n) is int for n in capability)):
            raise ArgumentError(f"warmup: target must be a compute capability such as (9, 0), got {capability!r}")
        return Target(capability), _compiling_without_gpu(capability)
    if not torch.cuda.is_available():
        raise BackendError("warmup: there is no GPU to compile for (name one by its capability, as in target=(9, 0))")
    on_gpu = next((t.device.index for t in _nested.tensors(values) if t.is_cuda), None)
    index = torch.cuda.current_device() if on_gpu is None else on_gpu
    return Target(torch.cuda.get_device_capability(index), index), torch.cuda.device(index)


class _Driver:
    """Triton's driver to one thread says that the GPU is the target; to the others it is what it was."""

    def __init__(self, capability: tuple[int, int], before: Any) -> None:
        from triton.backends.compiler import GPUTarget

        self._gpu = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
        self._thread = threading.get_ident()
        self._before = before

    def _mine(self) -> bool:
        return threading.get_ident() == self._thread

    def _real(self) -> Any:
        from triton.runtime import driver

        return driver.default if self._before is None else self._before

    def get_current_target(self) -> Any:
        return self._gpu if self._mine() else self._real().get_current_target()

    def get_current_device(self) -> Any:
        # Kernels keep what they compiled by this number: no GPU's, or a launch on that would take the target's code.
        return f"sm_{self._gpu.arch}" if self._mine() else self._real().get_current_device()

    def get_current_stream(self, device: Any = None) -> Any:
        return 0 if self._mine() else self._real().get_current_stream(device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real(), name)


@contextlib.contextmanager
def _compiling_without_gpu(capability: tuple[int, int]) -> Iterator[None]:
    from triton.runtime import driver

    with _driver_lock:
        before = driver._active  # ``active`` itself would look for a GPU
        driver.set_active(_Driver(capability, before))
        try:
            yield
        finally:
            driver.set_active(before)


# --- what came out --------------------------------------------------------------------------------------------------


def _facts(kernel: Any) -> CompiledKernel:
    names = kernel.src.fn.arg_names
    cubin = kernel.asm["cubin"]
    registers, spilled = _resources(cubin)
    arch = kernel.metadata.target.arch
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items() if len(path) == 1}
    return CompiledKernel(
        name=kernel.name,
        module=kernel.src.fn.module,
        capability=(arch // 10, arch % 10),
        constants=constants,
        warps=kernel.metadata.num_warps,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=kernel.metadata.shared,
        cubin=cubin,
    )


def _resources(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and bytes of local memory of one thread."""
    import triton

    try:
        tool = triton.knobs.nvidia.cuobjdump.path
    except RuntimeError:
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return used["REG"], used["STACK"] + used["LOCAL"]
