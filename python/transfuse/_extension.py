"""The CUDA extension ``transfuse._C``: loaded once, on first use, and why not if it cannot be.

Nothing here touches a GPU: the extension is linked with nothing of torch and nothing of the driver, so it imports on
any machine. Whether a GPU can run its kernels is for :mod:`transfuse.backends` and the ops to say.

The environment variable ``TRANSFUSE_CUDA_ON_CPU``, the path of a module with the same bindings whose kernels run on
host memory, takes the place of ``_C`` in tests of the kernels without a GPU.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from transfuse._version import __version__
from transfuse.errors import ArgumentError

if TYPE_CHECKING:
    import torch

# What crosses to the extension for a tensor: data pointer, dtype number, sizes, strides.
View = tuple[int, int, tuple[int, ...], tuple[int, ...]]

_FOLDER = Path(__file__).parent
_ON_CPU = "TRANSFUSE_CUDA_ON_CPU"
_REBUILD = "reinstall with `pip install --force-reinstall --no-deps .` from a checkout of transfuse"


def load() -> ModuleType | None:
    """The extension, or None: :func:`why_not` then says why.

    >>> (load() is None) == (why_not() is not None)
    True
    """
    return _load()[0]


def kernels() -> ModuleType:
    """The extension, for an implementation that runs only after :func:`why_not` found nothing.

    Raises:
        RuntimeError: there is none after all.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"the CUDA extension is not available: {reason}")
    return module


def why_not() -> str | None:
    """Why there is no extension, with the remedy; None if there is one."""
    return _load()[1]


def on_cpu() -> bool:
    """Whether the extension in use is the one of ``TRANSFUSE_CUDA_ON_CPU``, whose kernels take CPU tensors."""
    return bool(os.environ.get(_ON_CPU)) and load() is not None


def info() -> dict[str, Any]:
    """What `transfuse doctor` prints: the extension's file, versions and architectures, and how the build went."""
    module, build = load(), _build_record()
    facts: dict[str, Any] = {f"build_{key}": value for key, value in build.items() if value is not None}
    if module is not None:
        facts["file"] = module.__file__
        facts["architectures"] = module.arch_list
        facts["cuda_runtime"] = _dotted(module.runtime_version())
        facts["cuda_driver"] = _dotted(module.driver_version())
    return facts


def view(tensor: torch.Tensor | None, shape: tuple[int, ...] | None = None) -> View | None:
    """A tensor as the extension's launchers take it; None stays None.

    The view holds no reference: the caller keeps the tensor until the launcher has returned. After that a CUDA tensor
    may go, for torch's allocator gives its memory only to later work of the same stream.

    Args:
        tensor: of a dtype that the extension knows.
        shape: reads a contiguous tensor as this shape instead of its own, without the microseconds of a reshape. A
            tensor that is not contiguous must have the shape already.

    Raises:
        ArgumentError: the tensor is not contiguous and its shape is another.
    """
    if tensor is None:
        return None
    own: tuple[int, ...] = tensor.shape
    strides = tensor.stride()
    if shape is not None and own != shape:
        if not tensor.is_contiguous():
            raise ArgumentError(f"a strided tensor of shape {tuple(own)} cannot be seen as {shape} without a copy")
        own, strides = shape, _packed_strides(shape)
    return tensor.data_ptr(), _dtype_numbers()[tensor.dtype], own, strides


def _packed_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def target(device: torch.device) -> tuple[int, int]:
    """Where a launch goes: (device index, handle of torch's current stream there); (0, 0) for CPU tensors."""
    if device.type != "cuda":
        return 0, 0
    import torch

    index = torch.cuda.current_device() if device.index is None else device.index
    # The same as torch.cuda.current_stream(index).cuda_stream, without building the Stream object.
    return index, torch._C._cuda_getCurrentRawStream(index)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; a few where kernels run on the CPU, so that small inputs have several tiles for each."""
    import torch

    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    stand_in = os.environ.get(_ON_CPU)
    if stand_in:
        return _import(Path(stand_in), f"unset {_ON_CPU}, or give it the path of a built module")
    files = [path for suffix in importlib.machinery.EXTENSION_SUFFIXES if (path := _FOLDER / f"_C{suffix}").is_file()]
    if not files:
        return None, _why_absent()
    module, reason = _import(files[0], _REBUILD)
    built_for = getattr(module, "__version__", None)
    if module is not None and built_for != __version__:
        return None, f"{files[0].name} was built for transfuse {built_for}, this is {__version__}: {_REBUILD}"
    return module, reason


def _import(path: Path, remedy: str) -> tuple[ModuleType | None, str | None]:
    try:
        # pybind11 makes one module for a name and gives it again for another file: a stand-in has a name of its own.
        package = "transfuse" if path.parent == _FOLDER else f"transfuse_{path.parent.name}"
        spec = importlib.util.spec_from_file_location(f"{package}._C", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} does not have the suffix of an extension module")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:
        return None, f"the extension could not be imported ({error}): {remedy}"
    return module, None


def _why_absent() -> str:
    """Why the package has no extension for this Python: what the build wrote down, or what the folder shows."""
    others = sorted(path.name for path in _FOLDER.glob("_C.*.so"))
    if others:
        return f"the extension was built for another Python ({', '.join(others)}): {_REBUILD}"
    build = _build_record()
    if not build:
        return "this source tree was not built: run `pip install -e .` where there is a CUDA compiler"
    if build.get("cuda") == "built":
        return f"the extension was built but its file is gone: {_REBUILD}"
    reason, remedy = build.get("reason", "no reason was written down"), build.get("remedy", _REBUILD)
    return f"installed without the CUDA extension: {reason}; {remedy}"


def _build_record() -> dict[str, Any]:
    """What setup.py wrote down when it built this copy of the package; empty for a bare source tree."""
    try:
        record = json.loads((_FOLDER / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


@functools.cache
def _dtype_numbers() -> dict[torch.dtype, int]:
    import torch

    return {getattr(torch, name): number for name, number in kernels().dtypes.items()}


def _dotted(version: int) -> str:
    """13020 is 13.2; 0 is no driver."""
    return f"{version // 1000}.{version % 1000 // 10}" if version else "none"
