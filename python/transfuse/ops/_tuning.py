"""Tile sizes measured on request and kept by device; without a request nothing is ever measured.

A launch goes through :func:`tuned`, which takes the tiles that its op chose by reasoning, or those that an earlier
:func:`autotune` found faster on this device. What was found is kept in one JSON file: ``TRANSFUSE_TUNING`` names it
("off": none is read or written), else it is ``transfuse/tuning.json`` in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from transfuse.backends import ahead
from transfuse.errors import ArgumentError
from transfuse.ops import _nested

Tiles = TypeVar("Tiles", bound=tuple[int, ...])

_FORMAT = 1
_WORTH = 0.98  # a candidate must be this much faster: medians of equally fast kernels differ by about as much
_log = logging.getLogger("transfuse")


class _Thread(threading.local):
    session: _Session | None = None  # of the class: a thread that has none finds it at once


_thread = _Thread()


class _Table:
    """What was measured on one device: {op: {key in words: fields of the tiles}}."""

    def __init__(self, entries: dict[str, dict[str, dict[str, int]]]) -> None:
        self.entries = entries
        self._found: dict[tuple[str, tuple[object, ...]], Any] = {}

    def look_up(self, op: str, key: tuple[object, ...], tiles: Tiles, candidates: Sequence[Tiles]) -> Tiles:
        known = self._found.get((op, key))
        if known is None:
            fields = self.entries.get(op, {}).get(repr(key))
            # Only what the op itself would try: the file may be older than its kernels, or edited.
            known = next((c for c in candidates if _fields(c) == fields), tiles)
            if len(self._found) < 4096:
                self._found[op, key] = known
        return known


_tables: dict[torch.device, _Table] = {}


def tuned(
    op: str,
    key: tuple[object, ...],
    tiles: Tiles,
    candidates: Sequence[Tiles],
    run: Callable[[Tiles], None],
    device: torch.device,
) -> None:
    """Run a launch with the tiles that its op chose, or with those measured to be faster for this key and device.

    Args:
        op: name of the launch.
        key: all that the choice depends on; strings, numbers, dtypes and None.
        tiles: a named tuple of numbers.
        candidates: what a measurement tries besides.
        run: launches; it may be called any number of times.
        device: where the tensors are.
    """
    session = _thread.session
    if session is not None:
        session.run(op, key, tiles, candidates, run, device)
        return
    table = _tables.get(device)
    if table is None:
        table = _table(device)
    run(table.look_up(op, key, tiles, candidates) if table.entries else tiles)


@dataclass(frozen=True)
class Measured:
    """What :func:`autotune` found for one launch; times are medians."""

    op: str
    key: tuple[object, ...]
    tiles: tuple[int, ...]
    microseconds: float
    default_microseconds: float
    skipped: int
    """Candidates that do not compile or do not fit on the device."""


def autotune(function: Callable[..., Any], *args: Any, backward: bool = False, **kwargs: Any) -> list[Measured]:
    """Run ``function(*args, **kwargs)`` and measure, at each Triton launch and CUDA product in it, every choice.

    The fastest are used from then on, in this process and, through a file, in later ones on the same kind of device
    with the same Triton (see the variable ``TRANSFUSE_TUNING``). Tiles decide in which order sums are added up, so
    results may differ from the untuned ones in their last bits.

    Args:
        function: an op, a module, a model or any function of them; it is called once, its launches many times.
        args, kwargs: its arguments, at the sizes that matter.
        backward: measure the gradients' launches too, with respect to the tensors and parameters in the arguments
            that require one. No ``.grad`` changes.

    Returns:
        What was measured, in the order of the launches; empty where nothing ran on kernels with a choice.

    Raises:
        ArgumentError: backward, and no output depends on a tensor among the arguments that requires a gradient.

    >>> x = torch.randn(4, 64)
    >>> autotune(torch.nn.functional.gelu, x)  # nothing in this has a choice
    []
    """
    session = _Session()
    before = _thread.session
    _thread.session = session
    try:
        # Otherwise gradients on a GPU are computed in a thread of their own, which knows nothing of the session.
        with torch.autograd.set_multithreading_enabled(False):
            outputs = [t for t in _nested.tensors(function(*args, **kwargs)) if t.requires_grad]
            if backward:
                leaves = [t for t in _nested.tensors((function, args, kwargs)) if t.requires_grad]
                if not outputs or not leaves:
                    raise ArgumentError(
                        "autotune: backward=True, but no output depends on a tensor among the arguments that"
                        " requires a gradient"
                    )
                torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs], allow_unused=True)
    finally:
        _thread.session = before
        session.keep()
    return list(session.measured.values())


class _Session:
    """One call of autotune: measures each (device, op, key) once."""

    def __init__(self) -> None:
        self.measured: dict[tuple[torch.device, str, tuple[object, ...]], Measured] = {}
        self._best: dict[tuple[torch.device, str, tuple[object, ...]], Any] = {}

    def run(
        self,
        op: str,
        key: tuple[object, ...],
        tiles: Tiles,
        candidates: Sequence[Tiles],
        run: Callable[[Tiles], None],
        device: torch.device,
    ) -> None:
        entry = (device, op, key)
        if entry not in self._best:
            times = {tiles: _median(lambda: run(tiles), device)}  # what the op chose must run
            others = [c for c in dict.fromkeys(candidates) if c != tiles]
            for candidate in others:
                with _skipping(op, candidate):
                    times[candidate] = _median(lambda c=candidate: run(c), device)  # type: ignore[misc]
            best = min(times, key=times.__getitem__)
            best = best if times[best] < _WORTH * times[tiles] else tiles
            self._best[entry] = best
            skipped = 1 + len(others) - len(times)
            self.measured[entry] = Measured(op, key, best, times[best], times[tiles], skipped)
        run(self._best[entry])

    def keep(self) -> None:
        """Use what was found, and write it to the file."""
        for device in {device for device, _, _ in self.measured}:
            found: dict[str, dict[str, dict[str, int]]] = {}
            for (where, op, key), measured in self.measured.items():
                if where == device:
                    found.setdefault(op, {})[repr(key)] = _fields(measured.tiles)
            _tables[device] = _Table(_merged(_table(device).entries, found))
            path = _path()
            if path is not None:
                _write(path, _name(device), found)


@contextlib.contextmanager
def _skipping(op: str, tiles: tuple[int, ...]) -> Iterator[None]:
    """Pass over a candidate that does not compile or does not fit; other errors are errors."""
    from triton.errors import TritonError

    try:
        yield
    except (TritonError, RuntimeError) as error:
        # MLIR's passes and the driver's loader raise RuntimeError; so does a kernel that has gone wrong.
        words = ("PassManager", "out of resource", "too many resources")
        if not isinstance(error, TritonError) and not any(word in str(error) for word in words):
            raise
        _log.info("%s cannot run with %s: %s", op, tiles, str(error).splitlines()[-1] if str(error) else error)


def _median(run: Callable[[], None], device: torch.device) -> float:
    """Microseconds of one launch."""
    run()  # compile, and raise what there is to raise
    if device.type == "cuda":
        import triton

        with torch.cuda.device(device):
            return 1e3 * float(triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median"))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


# --- the file -------------------------------------------------------------------------------------------------------


def _table(device: torch.device) -> _Table:
    """The table of a device, read from the file when it is first asked for."""
    if device.type == "meta":  # compiling for a GPU that is here: its table; for another: none
        target = ahead()
        if target is None or target.gpu is None:
            return _Table({})
        device = torch.device("cuda", target.gpu)
    if device not in _tables:
        path = _path()
        entries = {} if path is None else _read(path).get(_name(device), {})
        _tables[device] = _Table(entries)
    return _tables[device]


def _name(device: torch.device) -> str:
    """What a measurement holds for: tiles that are best on one GPU and compiler are not on others."""
    try:
        from triton import __version__ as version
    except ImportError:  # what was measured are CUDA kernels alone
        version = "none"
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return f"{kind}, triton {version}"


def _path() -> Path | None:
    named = os.environ.get("TRANSFUSE_TUNING")
    if named:
        return None if named == "off" else Path(named).expanduser()
    if own := os.environ.get("TRANSFUSE_CACHE"):
        return Path(own).expanduser() / "tuning.json"
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "transfuse" / "tuning.json"
    except RuntimeError:  # there is no home
        return None


def _read(path: Path) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """{device: {op: {key: fields}}}; nothing where there is no file, or none that can be understood."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, this version reads {_FORMAT}")
        devices = content["devices"]
        for ops in devices.values():
            for keys in ops.values():
                for fields in keys.values():
                    fields.items()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path} is left aside, tiles are the default ones: {type(error).__name__}: {error}"
            " (transfuse.autotune writes it anew)",
            stacklevel=2,
        )
        return {}
    return dict(devices)


def _write(path: Path, device: str, found: dict[str, dict[str, dict[str, int]]]) -> None:
    """Add to the file; a reader sees it before or after, and of two writers neither loses what it found."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(path.name + ".lock")):
            devices = _read(path)
            devices[device] = _merged(devices.get(device, {}), found)
            written = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
            written.write_text(json.dumps({"format": _FORMAT, "devices": devices}, indent=1), encoding="utf-8")
            os.replace(written, path)
    except OSError as error:
        warnings.warn(f"what was measured lasts for this process only: {path}: {error}", stacklevel=2)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _merged(
    before: dict[str, dict[str, dict[str, int]]], found: dict[str, dict[str, dict[str, int]]]
) -> dict[str, dict[str, dict[str, int]]]:
    return before | {op: before.get(op, {}) | keys for op, keys in found.items()}


def _fields(tiles: Any) -> dict[str, int]:
    fields: dict[str, int] = tiles._asdict()
    return fields
