"""Which implementation an op runs on, and why.

Order of choice: the op's ``backend=`` argument, then :func:`use_backend`, then the environment variable
``TRANSFUSE_BACKEND`` (read once, at import), then the first of ``cuda``, ``triton``, ``torch`` that gives no reason
against itself. A backend chosen by name that cannot run raises :class:`~transfuse.errors.BackendError`; nothing is
silently replaced. The automatic choice is logged once per op and reason at INFO (logger ``transfuse``).
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

import torch

from transfuse import _extension
from transfuse.errors import BackendError

NAMES = ("cuda", "triton", "torch", "reference")
AUTOMATIC = ("cuda", "triton", "torch")
"""The automatic order; ``reference`` (the formulas, unfused) runs only when asked for."""
OF_PRODUCTS = ("triton", "cuda", "torch")
"""The order for ops of large products: Triton has Hopper's wgmma, the CUDA kernels have mma.sync; neither is timed."""

_log = logging.getLogger("transfuse")
_logged: set[tuple[str, str, str]] = set()
_thread = threading.local()  # not a ContextVar: Dynamo traces and guards thread locals only
# What the process was asked for, and by which call; the last one counts. A with block takes its own entry out again,
# whatever other threads have asked for in the meantime.
_process: dict[use_backend | None, str | None] = {None: os.environ.get("TRANSFUSE_BACKEND") or None}
_KEPT = 64  # entries; older ones are of plain calls that later ones have replaced


@dataclass(frozen=True)
class BackendStatus:
    """One backend on this machine: usable or not, and if not, exactly why and what to do."""

    name: str
    usable: bool
    reason: str | None = None
    remedy: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class use_backend:
    """Choose the backend of every op, for the process or for a ``with`` block of this thread.

    Args:
        name: one of ``cuda``, ``triton``, ``torch``, ``reference``, or None for the automatic choice.

    Raises:
        BackendError: the name is not a backend.

    >>> import torch, transfuse
    >>> with transfuse.use_backend("reference"):
    ...     y = transfuse.layer_norm(torch.ones(2, 4), None, None)
    >>> y.shape
    torch.Size([2, 4])
    """

    def __init__(self, name: str | None) -> None:
        if name is not None:
            _known(name)
        self._name = name
        self._before: list[tuple[str | None] | None] = []  # of this thread, one for each block that is open
        _process[self] = name
        if len(_process) > _KEPT:
            del _process[list(_process)[1]]

    def __enter__(self) -> use_backend:
        _process.pop(self, None)  # a with block speaks for its own thread alone
        self._before.append(getattr(_thread, "forced", None))
        _thread.forced = (self._name,)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        _thread.forced = self._before.pop()


def forced() -> str | None:
    """The backend that :func:`use_backend` or ``TRANSFUSE_BACKEND`` asks for, or None."""
    chosen = getattr(_thread, "forced", None)
    if chosen is not None:
        return chosen[0]
    return _process[None] if len(_process) == 1 else list(_process.values())[-1]


class Target(NamedTuple):
    """What kernels are compiled for instead of being run."""

    capability: tuple[int, int]
    gpu: int | None = None  # its index where it is one of this machine


@contextmanager
def compiled_for(target: Target) -> Iterator[None]:
    """Inside, kernels that this thread launches on meta tensors are compiled for the target and do not run."""
    before = ahead()
    _thread.ahead = target
    try:
        yield
    finally:
        _thread.ahead = before


def ahead() -> Target | None:
    """What this thread compiles kernels for instead of running them; None where it runs them."""
    return getattr(_thread, "ahead", None)


def _known(name: str) -> str:
    if name not in NAMES:
        raise BackendError(f"unknown backend {name!r}: expected one of {', '.join(NAMES)}")
    return name


def _cannot_run_on(name: str, device_type: str, index: int | None) -> tuple[str, str] | None:
    """(reason, remedy) against a backend on a device, whatever the op; None if it can run there."""
    if name in ("torch", "reference"):
        return None
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed", "pip install triton"
        if device_type == "cuda" or _interpreted():
            return None
        return (
            f"Triton kernels need CUDA tensors, these are on {device_type}",
            "move the tensors to a GPU, or set TRITON_INTERPRET=1 before Python starts to interpret kernels on the CPU",
        )
    reason = _extension.why_not()
    if reason is not None:
        return reason, "see `transfuse doctor`"
    if _extension.on_cpu():
        return None if device_type == "cpu" else ("TRANSFUSE_CUDA_ON_CPU takes CPU tensors alone", "unset it")
    if device_type == "cuda":
        return _gpu_cannot_run_extension(index)
    return f"CUDA kernels need CUDA tensors, these are on {device_type}", "move the tensors to a GPU"


def _interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter: what it takes for a yes."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _triton_facts() -> dict[str, Any]:
    """Triton's version, whether it interprets, and the assembler it compiles with; nothing where it is missing."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return {}
    versions = [d.version for d in map(_distribution, ("triton", "pytorch-triton")) if d is not None]
    own = os.path.join(os.path.dirname(spec.origin), "backends", "nvidia", "bin", "ptxas")
    found = [path for path in (os.environ.get("TRITON_PTXAS_PATH"), own) if path and os.access(path, os.X_OK)]
    return {
        "version": versions[0] if versions else None,
        "interpreted": _interpreted(),
        "ptxas": found[0] if found else None,
    }


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _gpu_cannot_run_extension(index: int | None) -> tuple[str, str] | None:
    """Against the extension on one GPU: its driver is too old, or it is older than the kernels' machine code."""
    module = _extension.load()
    assert module is not None  # why_not() was asked before
    driver, runtime = module.driver_version(), module.runtime_version()
    if driver // 1000 < runtime // 1000:
        have, need = (f"{v // 1000}.{v % 1000 // 10}" for v in (driver, runtime))
        return f"the driver supports CUDA {have}, the extension needs {need}", "update the NVIDIA driver"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"the kernels need compute capability 8.0 or newer, this GPU has {major}.{minor}", "use another backend"
    return None


# torch.compiler.assume_constant_result sets this mark and no more, but imports all of Dynamo (a second) to do so.
_cannot_run_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_differentiated() -> bool:
    """Whether torch.func takes a derivative now: registered ops refuse its grad, and jvp would find a zero in them."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    transforms = torch._C._functorch.get_interpreter_stack() or []
    return any(t.key() != torch._C._functorch.TransformType.Vmap for t in transforms)


def why_not(name: str, device: torch.device) -> str | None:
    """Why no op can run on this backend and device, with the remedy in the text; None if it can.

    >>> why_not("torch", torch.device("cpu")) is None
    True
    """
    target = ahead() if device.type == "meta" else None
    found: tuple[str, str] | None
    if name in ("cuda", "triton") and _is_differentiated():
        found = ("torch.func.grad, jvp and what is built on them do not see into kernels", "leave the backend out")
    elif target is None:
        found = _cannot_run_on(_known(name), device.type, device.index)
    elif _known(name) == "cuda" and target.gpu is None:
        found = ("only Triton kernels can be compiled without the GPU", "leave the backend out, or name 'triton'")
    else:
        found = _cannot_run_on(name, "cuda", target.gpu)
    return None if found is None else f"{found[0]} ({found[1]})"


def choose(
    op: str,
    device: torch.device,
    requested: str | None,
    op_why_not: Callable[[str], str | None],
    order: Sequence[str] = AUTOMATIC,
) -> str:
    """The backend one call runs on.

    Args:
        op: name of the op, for messages.
        device: where its tensors are.
        requested: the call's ``backend=`` argument.
        op_why_not: given a backend that can run on this device, why it cannot take these arguments, or None.
        order: what the automatic choice tries in turn on a device other than the CPU.

    Raises:
        BackendError: a backend asked for by name cannot run; the message names each reason and the remedy.
    """
    name = requested if requested is not None else forced()
    if name is not None:
        reason = why_not(name, device) or op_why_not(name)
        if reason is not None:
            raise BackendError(f"{op}: backend {name!r} cannot run this call: {reason}")
        return name
    if device.type == "cpu":
        _log_once(op, "torch", "the tensors are on the CPU")
        return "torch"
    against: list[str] = []
    for name in order:
        reason = why_not(name, device) or op_why_not(name)
        if reason is None:
            _log_once(op, name, "; ".join(against) or "first in order")
            return name
        against.append(f"not {name}: {reason}")
    raise BackendError(f"{op}: no backend can run this call: {'; '.join(against)}")


def _log_once(op: str, name: str, reason: str) -> None:
    if torch.compiler.is_compiling():
        return
    key = (op, name, reason)
    if key not in _logged:
        _logged.add(key)
        _log.info("%s runs on %s (%s)", op, name, reason)


def backends() -> list[BackendStatus]:
    """Every backend's state on this machine, for ``transfuse doctor`` and for bug reports.

    >>> [b.name for b in backends()]
    ['cuda', 'triton', 'torch', 'reference']
    """
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for name in NAMES:
        against = _cannot_run_on(name, device_type, None)
        reason, remedy = against or (None, None)
        facts = {"cuda": _extension.info, "triton": _triton_facts}.get(name, dict)()
        found.append(BackendStatus(name, against is None, reason, remedy, facts))
    return found
