"""What `transfuse doctor` tells: each backend usable or not and exactly why, versions, GPUs, the extension.

Facts are gathered one by one, and a fact that cannot be had says why in its place: the doctor must work on the very
machine where something is broken. :func:`examine` gives everything as plain data; :func:`show` prints it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from transfuse import _extension, ops
from transfuse._version import __version__
from transfuse.backends import BackendStatus, backends, forced
from transfuse.errors import BackendError

if TYPE_CHECKING:
    from rich.console import Console

_VARIABLES = (
    "TRANSFUSE_",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
)
_PACKAGES = ("triton", "numpy", "safetensors", "tokenizers", "huggingface_hub", "gguf", "matplotlib", "transformers")


def examine() -> dict[str, Any]:
    """Everything the doctor knows, as JSON-ready data.

    Returns:
        ``versions`` {name: version or None}, ``cpu``, ``gpus`` [{...}], ``no_gpu`` (why there is none, or None),
        ``extension``, ``triton`` {version, interpreted, ptxas}, ``backends`` [{name, usable, reason, remedy, tested}],
        ``chosen`` {backend, device, why, problem} and ``environment`` (variables that matter and are set).

    >>> report = examine()
    >>> [b["name"] for b in report["backends"]]
    ['cuda', 'triton', 'torch', 'reference']
    """
    found = _attempt(_gpus)
    gpus, no_gpu = ([], found) if isinstance(found, str) else found
    known = _statuses()
    statuses = [_backend(status) for status in known]
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "gpus": gpus,
        "no_gpu": no_gpu,
        "extension": _extension_facts(),
        "triton": next(status.facts for status in known if status.name == "triton"),
        "backends": statuses,
        "chosen": _chosen(statuses, bool(gpus)),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
    }


def healthy(report: dict[str, Any]) -> bool:
    """Whether ops run here: the backend in use works, and every backend that claims to be usable computed correctly."""
    broken = [b for b in report["backends"] if b["usable"] and isinstance(b["tested"], str)]
    return not broken and report["chosen"]["problem"] is None


def _attempt(function: Callable[[], Any]) -> Any:
    """A fact, or in words why it cannot be had: one broken tool must not hide the other facts."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _statuses() -> list[BackendStatus]:
    found = _attempt(backends)
    if isinstance(found, str):  # a driver that fails to answer, say; PyTorch on the CPU needs none
        kernels = [BackendStatus(name, False, found) for name in ("cuda", "triton")]
        return [*kernels, BackendStatus("torch", True), BackendStatus("reference", True)]
    return list(found)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "transfuse": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    found |= {name: _package_version(name) for name in _PACKAGES}
    found["cuda (torch's)"] = torch.version.cuda
    found["nvidia driver"] = _attempt(_driver)
    found["nvcc"] = _attempt(_nvcc)
    return found


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The kernel driver's version; None where no NVIDIA driver is loaded."""
    file = Path("/proc/driver/nvidia/version")
    if not file.is_file():
        return None
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", file.read_text())
    return found[1] if found else "unknown"


def _nvcc() -> str | None:
    """Version and path of the CUDA compiler; None where there is none."""
    homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    homes.append(Path("/usr/local/cuda/bin"))
    spec = importlib.util.find_spec("nvidia")  # the pip packages nvidia-cuda-nvcc
    for folder in (spec.submodule_search_locations or []) if spec else []:
        homes += sorted(path.parent for path in Path(folder).glob("*/bin/nvcc"))
    candidates = [shutil.which("nvcc"), *(shutil.which("nvcc", path=str(home)) for home in homes)]
    path = next((candidate for candidate in candidates if candidate), None)
    if path is None:
        return None
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    release = re.search(r"release \S+ V(\S+)|V(\d+\.\d+\.\d+)", said)
    version = next((group for group in release.groups() if group), "unknown") if release else "unknown"
    return f"{version} ({path})"


def _cpu() -> dict[str, Any]:
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": _attempt(torch.backends.cpu.get_cpu_capability),
    }


def _gpus() -> tuple[list[dict[str, Any]], str | None]:
    """The visible GPUs, or none and why."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        return [], _why_no_gpu([str(warning.message) for warning in caught])
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "index": index,
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return found, None


def _why_no_gpu(warned: list[str]) -> str:
    driver = Path("/proc/driver/nvidia").exists()
    if torch.version.cuda is None:
        without = f"this torch ({torch.__version__}) is built without CUDA"
        remedy = "there is an NVIDIA driver: install a CUDA build of torch, see pytorch.org/get-started"
        return f"{without}; {remedy}" if driver else f"{without}, and no NVIDIA driver is loaded"
    if not driver:
        return "no NVIDIA driver is loaded on this machine"
    if warned:
        return warned[0].splitlines()[0]
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every GPU"
    return "torch sees no GPU"


def _extension_facts() -> dict[str, Any]:
    facts: dict[str, Any] = {"loaded": _extension.load() is not None, "reason": _extension.why_not()}
    known = _attempt(_extension.info)
    facts |= {"facts": known} if isinstance(known, str) else known
    file = facts.get("file")
    if file is not None:
        facts["size_bytes"] = _attempt(lambda: Path(file).stat().st_size)
    return facts


def _backend(status: BackendStatus) -> dict[str, Any]:
    remedy = status.remedy
    if remedy is not None and "transfuse doctor" in remedy:  # this is it, and the reason holds its remedy
        remedy = None
    return {
        "name": status.name,
        "usable": status.usable,
        "reason": status.reason,
        "remedy": remedy,
        "tested": _try_out(status.name) if status.usable else None,
    }


def _try_out(name: str) -> bool | str | None:
    """Run a small layer norm: True if it is right, None if the backend has no kernel for it, else what went wrong."""
    kernels = name in ("cuda", "triton")
    device = "cuda" if kernels and torch.cuda.is_available() and not _extension.on_cpu() else "cpu"
    try:
        x = torch.linspace(-1.0, 1.0, 256, device=device).view(4, 64)
        y = ops.layer_norm(x, None, None, backend=name)
        difference = (y - torch.nn.functional.layer_norm(x, (64,))).abs().max().item()
    except BackendError:
        return None
    except Exception as error:
        return f"layer_norm failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return True if difference < 1e-5 else f"layer_norm is wrong by {difference:.1e}"


def _chosen(statuses: list[dict[str, Any]], has_gpu: bool) -> dict[str, Any]:
    """The backend that a call without ``backend=`` runs on here, and why."""
    device = "cuda" if has_gpu else "cpu"
    usable = {status["name"]: status["usable"] for status in statuses}
    asked = forced()
    if asked is not None:
        problem = None
        if asked not in usable:
            problem = f"{asked!r} is not a backend; expected one of {', '.join(usable)}"
        elif not usable[asked]:
            reason = next(status["reason"] for status in statuses if status["name"] == asked)
            problem = f"{asked} cannot run here: {reason}"
        return {"backend": asked, "device": device, "why": "TRANSFUSE_BACKEND asks for it", "problem": problem}
    if device == "cpu":
        return {"backend": "torch", "device": device, "why": "there is no GPU, tensors are on the CPU", "problem": None}
    name = next(name for name in ("cuda", "triton", "torch") if usable[name])
    why = "first usable in the order cuda, triton, torch; an op without a kernel there takes the next"
    return {"backend": name, "device": device, "why": why, "problem": None}


def show(report: dict[str, Any], console: Console) -> None:
    """Print a report of :func:`examine` for people."""
    from rich.table import Table

    console.print(_chosen_line(report["chosen"]), soft_wrap=True, style=None if healthy(report) else "red")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=True, header_style="bold")
    table.add_column("backend")
    table.add_column("usable")
    table.add_column("why not, and what to do", overflow="fold")
    for status in report["backends"]:
        table.add_row(status["name"], *_verdict(status))
    console.print()
    console.print(table)
    for title, facts in _sections(report):
        console.print(f"\n[bold]{title}[/bold]")
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in facts.items():
            grid.add_row(f"  {name}", _plain(value))
        console.print(grid)


def _chosen_line(chosen: dict[str, Any]) -> str:
    line = f"Ops run on [bold]{chosen['backend']}[/bold] here: {chosen['why']}."
    return line if chosen["problem"] is None else f"{line} But {_plain(chosen['problem'])}."


def _verdict(status: dict[str, Any]) -> tuple[str, str]:
    if not status["usable"]:
        remedy = f"; {status['remedy']}" if status["remedy"] else ""
        return "[yellow]no[/yellow]", _plain(f"{status['reason']}{remedy}")
    if isinstance(status["tested"], str):
        return "[red]broken[/red]", _plain(status["tested"])
    notes = {"reference": "the formulas themselves, slow; only when asked for", "torch": "plain PyTorch, any device"}
    return "[green]yes[/green]", notes.get(status["name"], "")


def _sections(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    gpus = {f"{gpu['index']}": _describe_gpu(gpu) for gpu in report["gpus"]} or {"none": report["no_gpu"]}
    cpu = report["cpu"]
    cores = (
        f"{cpu['usable_cores']} of {cpu['cores']} cores"
        if cpu["usable_cores"] != cpu["cores"]
        else f"{cpu['cores']} cores"
    )
    known = {name: value for name, value in report["extension"].items() if value not in (None, "")}
    extension = {name.replace("_", " "): value for name, value in known.items()}
    if isinstance(size := extension.pop("size bytes", None), int):
        extension["size"] = f"{size / 1e6:.1f} MB"
    triton = report["triton"] and {
        "version": report["triton"]["version"] or "unknown",
        "kernels are": "interpreted on the CPU (TRITON_INTERPRET is set)"
        if report["triton"]["interpreted"]
        else "compiled",
        "ptxas": report["triton"]["ptxas"] or "not there: nothing can be compiled for an NVIDIA GPU",
    }
    sections = [
        ("GPU", gpus),
        (
            "CPU",
            {"machine": cpu["machine"], "threads": f"{cpu['threads']} on {cores}", "instructions": cpu["instructions"]},
        ),
        ("CUDA extension", extension),
        *([("Triton", triton)] if triton else []),
        ("versions", {name: version or "not there" for name, version in report["versions"].items()}),
    ]
    return [*sections, ("environment", report["environment"])] if report["environment"] else sections


def _describe_gpu(gpu: dict[str, Any]) -> str:
    memory = gpu["memory_bytes"] / 2**30
    return f"{gpu['name']}, capability {gpu['capability']}, {memory:.1f} GiB, {gpu['multiprocessors']} multiprocessors"


def _plain(value: Any) -> str:
    """A value as text in which rich sees no markup."""
    from rich.markup import escape

    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return escape(", ".join(str(item) for item in value))
    return escape(str(value))
