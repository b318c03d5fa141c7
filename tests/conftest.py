"""Fixtures of the whole suite: backends with the reason of each skip, devices, poisoned memory, seeds."""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import pytest
import torch

# Triton reads this when it is first imported: on a machine without a GPU its kernels are interpreted on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from cuda_on_cpu import build
from transfuse import _extension
from transfuse.backends import _process, why_not

os.environ["TRANSFUSE_TUNING"] = "off"  # what was measured on this machine is no part of a test

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    import triton_interpreter

    triton_interpreter.install()

# One thread a process where several share the cores: more would wait for one another.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


def device_of(backend: str) -> torch.device:
    """Where a backend's tests run: a GPU where there is one; kernels on the CPU through their interpreters."""
    if backend in ("cuda", "triton") and torch.cuda.is_available() and not _extension.on_cpu():
        return torch.device("cuda")
    return torch.device("cpu")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is slow on kernels is marked so; opcheck's tests skip where its expecttest is missing."""
    # Triton's are interpreted or compiled for each case, CUDA's run thread by thread where there is no GPU.
    slow = ("triton",) if torch.cuda.is_available() else ("triton", "cuda")
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        quick = getattr(getattr(item, "function", None), "quick_interpreted", None)
        if quick is not None and params.get("backend") in slow and not quick(params):
            item.add_marker(pytest.mark.slow)
    if importlib.util.find_spec("expecttest") is None:
        for item in items:
            if "opcheck" in item.name:
                item.add_marker(pytest.mark.skip(reason="torch.library.opcheck needs the package expecttest"))


@functools.cache
def _built_for_the_cpu() -> tuple[ModuleType | None, str | None, RuntimeError | None]:
    """The CUDA sources as a module for CPU tensors, built once; or why not here; or how its build failed."""
    if (reason := build.why_not()) is not None:
        return None, reason, None
    try:
        return (*_extension._import(build.build(), "see docs/testing-kernels.md"), None)
    except RuntimeError as error:
        return None, None, error


def cuda_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one test, ``_C`` is the CUDA sources built for the host; skips where they cannot be built."""
    module, reason, error = _built_for_the_cpu()
    if error is not None:
        raise error
    skip_unless(reason)
    assert module is not None
    monkeypatch.setenv("TRANSFUSE_CUDA_ON_CPU", str(module.__file__))
    monkeypatch.setattr(_extension, "_load", lambda: (module, None))


@pytest.fixture(params=["torch", "triton", "cuda"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend in turn; one that cannot run here is skipped with its own words.

    A test whose op lacks a kernel on that backend says so by calling :func:`skip_unless`.
    """
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available() and not _extension.on_cpu():
        cuda_on_cpu(monkeypatch)
    reason = why_not(name, device_of(name))
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return name


@pytest.fixture
def device(backend: str) -> torch.device:
    """The device the ``backend`` fixture's tests run on."""
    return device_of(backend)


def skip_unless(reason: str | None) -> None:
    """Skip with the op's own words when it cannot run on the backend under test."""
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers for a test wherever it stands in the run."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned():  # type: ignore[no-untyped-def]
    """torch.empty and its kin give NaN, so an output nobody wrote, or padding somebody read, is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def no_forced_backend():  # type: ignore[no-untyped-def]
    """No test leaves a process-wide backend behind."""
    before = dict(_process)
    yield
    _process.clear()
    _process.update(before)
