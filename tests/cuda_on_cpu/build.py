"""Build the CUDA sources for the host: ``python tests/cuda_on_cpu/build.py`` prints the path of the module.

The module has the bindings of ``transfuse._C`` and runs its kernels on CPU tensors, thread by thread, checking what a
GPU would forgive or corrupt (docs/testing-kernels.md). It is built once for each state of the sources, by the C++
compiler alone; no CUDA is needed.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "cuda_on_cpu"
REPLACED = {"csrc/launch.cu"}  # by engine/tensors.cpp

# -fsanitize=thread puts a call before every load and store; engine/memory.cpp defines what is called. The sanitizer's
# own library is never linked.
WATCHED = [
    "-fsanitize=thread",
    "-fsanitize=bounds,alignment",
    "-DCUDA_ON_CPU_KERNELS",
    "-include",
    "cuda_runtime.h",
    "-x",
    "c++",
]
NATIVE = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-g1",
    NATIVE,
    "-fno-gnu-unique",
    "-Wall",
    "-Wno-unknown-pragmas",
]


def compiler() -> str | None:
    """GCC, the compiler whose instrumentation the engine defines; None if it is not here."""
    return shutil.which("g++")


def why_not() -> str | None:
    """Why the module cannot be built here, or None."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return (
            f"the CUDA sources run on the CPU under Linux on x86-64 or aarch64, not {sys.platform} {platform.machine()}"
        )
    if compiler() is None:
        return "running the CUDA sources on the CPU needs GCC (install g++)"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "running the CUDA sources on the CPU needs pybind11 (pip install pybind11)"
    return None


def extension_sources() -> list[Path]:
    """What CMakeLists.txt lists, but for what the engine replaces."""
    listed = re.findall(r"^\s+(csrc/\S+\.(?:cu|cpp))\s*$", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
    return [ROOT / name for name in listed if name not in REPLACED]


def build(name: str = "_C", sources: Sequence[Path] | None = None) -> Path:
    """Build the module ``name`` from ``sources`` (the extension's) and the engine, unless it is there already.

    Raises:
        RuntimeError: a compiler call failed; the message holds its output.
    """
    import pybind11

    sources = [*(extension_sources() if sources is None else sources), *sorted((HERE / "engine").glob("*.cpp"))]
    includes = [HERE / "include", HERE / "engine", ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    command = [compiler() or "g++", *FLAGS, *(f"-I{path}" for path in includes), *_definitions()]
    target = CACHE / _digest(command) / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed: other processes of a test run wait for this build
        if target.is_file():
            return target
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
            objects = list(pool.map(functools.partial(_compile, command), sources))
        new = target.with_suffix(".new")
        _run([command[0], "-shared", "-o", str(new), *map(str, objects), "-ldl"])
        new.rename(target)
        for old in CACHE.glob("*/*.so"):
            if old.stat().st_mtime < time.time() - 86400:
                shutil.rmtree(old.parent, ignore_errors=True)
    return target


def build_for_gpu(name: str, sources: Sequence[Path]) -> Path:
    """The same sources with nvcc for the GPU that is here, to compare both; built anew at each call."""
    import pybind11

    target = CACHE / "gpu" / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    target.parent.mkdir(parents=True, exist_ok=True)
    includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    options = ["-std=c++17", "-O2", "-arch=native", "-Xcompiler=-fPIC,-fvisibility=hidden", "-shared"]
    command = ["nvcc", *options, *(f"-I{path}" for path in includes), *_definitions()[1:]]
    _run([*command, "-o", str(target), *map(str, sources), str(ROOT / "csrc/launch.cu")])
    return target


def _definitions() -> list[str]:
    version: dict[str, str] = {}
    exec((ROOT / "python/transfuse/_version.py").read_text(), version)
    return [
        "-DTRANSFUSE_CUDA_ON_CPU",
        f'-DTRANSFUSE_VERSION="{version["__version__"]}"',
        '-DTRANSFUSE_ARCH_LIST="this CPU"',
    ]


def _compile(command: list[str], source: Path) -> Path:
    """The object file of one source; compiled only if the command or a file that went into it has changed."""
    how = ["-O1", *WATCHED] if source.suffix == ".cu" else ["-O3"]
    command = [*command, *how, "-c", str(source)]
    stem = CACHE / "objects" / f"{source.stem}-{hashlib.sha256(repr(command).encode()).hexdigest()[:16]}"  # no dots
    stem.parent.mkdir(exist_ok=True)
    to, record = stem.with_suffix(".o"), stem.with_suffix(".json")
    if to.is_file() and record.is_file() and all(_hash(p) == h for p, h in json.loads(record.read_text()).items()):
        return to
    record.unlink(missing_ok=True)
    _run([*command, "-o", str(to), "-MD", "-MF", str(stem.with_suffix(".d"))])
    read = shlex.split(stem.with_suffix(".d").read_text().replace("\\\n", " "))[1:]
    record.write_text(json.dumps({path: _hash(path) for path in read}))
    return to


def _hash(path: str) -> str | None:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else None


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")


def _digest(command: list[str]) -> str:
    """Of all that decides what the module is: sources, headers, flags, compiler, processor, Python."""
    digest = hashlib.sha256()
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout
    cpu = re.search(r"^(?:flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    for text in (*command, version, sys.version, cpu.group() if cpu else ""):
        digest.update(text.encode())
    for folder in (ROOT / "csrc", HERE):
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".cu", ".cuh", ".h", ".cpp", ".py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    reason = why_not()
    if reason is not None:
        sys.exit(reason)
    print(build())
