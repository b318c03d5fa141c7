"""Builds ``transfuse._C`` with CMake where a CUDA compiler is found, and a pure Python package where none is.

TRANSFUSE_CUDA says what to do (docs/building.md): ``auto`` (the default) builds the extension if a compiler is found
and the build succeeds, and installs without it otherwise; ``off`` never builds; ``require`` fails without; ``pip`` is
``require`` with the compiler from NVIDIA's pip packages, which build_backend.py asks for. How it went is written into
the package (_build_info.json), since pip hides what a build prints: ``transfuse doctor`` reads it.

Whether a GPU is visible plays no part: images are often built on machines without one. torch is never imported.
"""

from __future__ import annotations

import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(ROOT / "python/transfuse/_version.py"))["__version__"]
MODES = ("auto", "off", "require", "pip")
OLDEST_CUDA = (12, 6)  # the oldest CUDA that torch 2.9, the oldest torch here, is built with
GIB_PER_JOB = 1.5  # what nvcc takes at its peak for one of the larger sources
REINSTALL = "reinstall with TRANSFUSE_CUDA=pip to have the compiler fetched by pip, or install the CUDA toolkit first"


class BuildError(RuntimeError):
    """The extension could not be built; the message says why, ``log`` where all of the compiler's output is."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log


# --- the compiler ---------------------------------------------------------------------------------------------------


def requested_mode() -> str:
    mode = os.environ.get("TRANSFUSE_CUDA", "").strip().lower() or "auto"
    if mode not in MODES:
        raise SystemExit(f"transfuse: TRANSFUSE_CUDA must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def find_nvcc(mode: str) -> tuple[Path | None, str]:
    """(nvcc, "") or (None, why there is none that serves)."""
    places: list[Path] = []
    if mode != "pip":
        if os.environ.get("CUDACXX"):
            places.append(Path(os.environ["CUDACXX"]))
        places += [Path(os.environ[name]) / "bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        on_path = shutil.which("nvcc")
        places += [Path(on_path)] if on_path else []
        places.append(Path("/usr/local/cuda/bin/nvcc"))
    # Under build isolation sys.path holds the packages that build_backend.py asked for, sysconfig the user's own.
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    places += [nvcc for folder in dict.fromkeys(folders) for nvcc in sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"))]
    unfit = []
    for nvcc in places:
        if os.access(nvcc, os.X_OK):
            version = nvcc_version(nvcc)
            if version >= OLDEST_CUDA:
                return nvcc, ""
            unfit.append(f"{nvcc} is CUDA {dotted(version)}, {dotted(OLDEST_CUDA)} or newer is needed")
    if unfit:
        return None, "; ".join(unfit)
    if mode == "pip":
        return None, "the pip packages nvidia-cuda-nvcc, -runtime, -crt, -cccl and nvidia-nvvm (13.0) are not installed"
    return None, "no CUDA compiler (nvcc) in CUDACXX, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda or the pip packages"


def nvcc_version(nvcc: Path) -> tuple[int, int]:
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return (0, 0)
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


# --- the build ------------------------------------------------------------------------------------------------------


def tool(name: str) -> str:
    """cmake or ninja: from the pip package of that name, which is a build requirement, or from PATH."""
    try:
        package = __import__(name)
        found = Path(package.CMAKE_BIN_DIR if name == "cmake" else package.BIN_DIR) / name
        if found.is_file():
            return str(found)
    except (ImportError, AttributeError):
        pass
    on_path = shutil.which(name)
    if on_path is None:
        raise BuildError(f"{name} was not found (pip install {name})")
    return on_path


def jobs() -> int:
    """How many compilers run at once: MAX_JOBS, or what cores and free memory allow."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [float("inf")]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        limits += [int(kib) / 2**20 for kib in re.findall(r"^MemAvailable:\s+(\d+)", meminfo.read_text(), re.MULTILINE)]
    group = Path("/sys/fs/cgroup/memory.max")
    if group.is_file() and group.read_text().strip().isdigit():
        limits.append(int(group.read_text()) / 2**30)
    return int(max(1, min(cores, min(limits) / GIB_PER_JOB)))


def run_cmake(nvcc: Path, build_folder: Path, output: Path) -> None:
    """Configure, compile and link the extension into the file ``output``."""
    try:
        import pybind11
    except ImportError as error:
        raise BuildError("pybind11 was not found (pip install pybind11)") from error

    build_folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    ninja = tool("ninja")
    configure = [
        tool("cmake"),
        *("-S", str(ROOT), "-B", str(build_folder), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DTRANSFUSE_VERSION={VERSION}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build_folder / 'out'}",
        *shlex.split(os.environ.get("CMAKE_ARGS", "")),
    ]
    # A cache of another compiler or of an isolated build's vanished tools would stop CMake: begin anew then.
    stamp = build_folder / "configured-with"
    if not stamp.is_file() or stamp.read_text() != "\n".join(configure):
        shutil.rmtree(build_folder)
        build_folder.mkdir()
    # NVIDIA's pip packages keep libcudart_static.a in lib, where their nvcc (it looks in lib64) does not find it.
    libraries = [str(nvcc.resolve().parent.parent / "lib"), os.environ.get("LIBRARY_PATH", "")]
    environment = {**os.environ, "LIBRARY_PATH": os.pathsep.join(filter(None, libraries))}
    log = build_folder / "build.log"
    with log.open("w") as stream:
        for command in (configure, [tool("cmake"), "--build", str(build_folder), "--parallel", str(jobs())]):
            stream.write(f"$ {shlex.join(command)}\n")
            stream.flush()
            if subprocess.run(command, env=environment, stdout=stream, stderr=subprocess.STDOUT).returncode != 0:
                details = build_folder / "CMakeFiles/CMakeConfigureLog.yaml"  # what the compiler said to CMake's probes
                if command is configure and details.is_file():
                    stream.write(details.read_text(errors="replace"))
                step = "configuring" if command is configure else "compiling"
                raise BuildError(f"{step} the extension failed", log)
            stamp.write_text("\n".join(configure))
    built = sorted((build_folder / "out").glob("_C*.so"))
    shutil.copy2(built[0], output)


# --- what is written down -------------------------------------------------------------------------------------------


def say(message: str) -> None:
    print(f"transfuse: {message}", file=sys.stderr, flush=True)


def write_record(package: Path, record: dict[str, Any]) -> None:
    package.mkdir(parents=True, exist_ok=True)
    record = {**record, "python": platform.python_version(), "version": VERSION}
    (package / "_build_info.json").write_text(json.dumps(record, indent=1) + "\n")


def first_complaint(log: str) -> str:
    """The first error in a log and the lines after it, as one line of some 600 characters."""
    lines = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith("$ ")]
    for i, line in enumerate(lines):
        if re.search(r"\berror\b|\bfatal\b|not found", line, re.IGNORECASE):
            return " ".join(lines[i : i + 6])[:600]
    return " ".join(lines[-3:])[:600]


def failure_record(error: BuildError, nvcc: Path) -> dict[str, Any]:
    """The record of a failed build; its log is moved to where it outlives pip's temporary folders."""
    reason = f"the CUDA build with {nvcc} failed: {error}"
    if error.log is None:
        return {"cuda": "failed", "reason": reason, "remedy": "install what is missing and reinstall"}
    text = error.log.read_text(errors="replace")
    with tempfile.NamedTemporaryFile("w", prefix="transfuse-build-", suffix=".log", delete=False) as kept:
        kept.write(text)
    return {
        "cuda": "failed",
        "reason": f"{reason}: {first_complaint(text)}",
        "remedy": f"see {kept.name}, or reinstall with TRANSFUSE_CUDA=require to be shown the whole output",
        "log": kept.name,
        "log_tail": text.splitlines()[-20:],
    }


# --- setuptools' commands -------------------------------------------------------------------------------------------

MODE = requested_mode()
NVCC, NO_NVCC = (None, "TRANSFUSE_CUDA=off was set") if MODE == "off" else find_nvcc(MODE)


class BuildPython(build_py):
    """Copies the package; where no extension will be built, writes down why."""

    def run(self) -> None:
        if NVCC is None and MODE in ("require", "pip"):
            raise SystemExit(f"transfuse: TRANSFUSE_CUDA={MODE}, but {NO_NVCC}")
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "transfuse", ignore_errors=True)  # files since deleted or renamed
        super().run()
        if NVCC is None:
            remedy = "reinstall without it" if MODE == "off" else REINSTALL
            package = ROOT / "python/transfuse" if self.editable_mode else Path(self.build_lib) / "transfuse"
            write_record(package, {"cuda": "not built", "reason": NO_NVCC, "remedy": remedy})
            if MODE != "off":
                say(f"installing without the CUDA extension: {NO_NVCC}. PyTorch and Triton do its work; {REINSTALL}.")


class BuildExtension(build_ext):
    """Runs CMake; in auto mode a failed build leaves a working package without the extension."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        package, folder = output.parent, Path(self.build_temp).resolve() / "cmake"
        if self.editable_mode or self.inplace:  # the package is the source tree; its build folder serves the next time
            package, folder = ROOT / "python/transfuse", ROOT / f"build/cmake-{sysconfig.get_config_var('SOABI')}"
        start = time.monotonic()
        try:
            run_cmake(NVCC, folder, output)
        except BuildError as error:
            if MODE != "auto":
                print(error.log.read_text(errors="replace") if error.log else "", file=sys.stderr)
                raise SystemExit(f"transfuse: TRANSFUSE_CUDA={MODE}, but {error} (all output above)") from error
            record = failure_record(error, NVCC)
            say(f"installing without the CUDA extension: {record['reason']}. PyTorch and Triton do its work;")
            say("\n".join([record["remedy"], *record.get("log_tail", [])]))
            ext.optional = True  # an editable install else misses the file
            output.unlink(missing_ok=True)
            (package / output.name).unlink(missing_ok=True)
        else:
            seconds, version = round(time.monotonic() - start, 1), dotted(nvcc_version(NVCC))
            record = {"cuda": "built", "nvcc": str(NVCC), "cuda_version": version, "seconds": seconds}
            say(f"built {output.name} ({output.stat().st_size / 2**20:.1f} MiB) with {NVCC}, {version}, in {seconds} s")
        write_record(package, record)


if __name__ == "__main__":  # the tests read the functions above
    setup(
        cmdclass={"build_py": BuildPython, "build_ext": BuildExtension},
        ext_modules=[Extension("transfuse._C", sources=[])] if NVCC else [],
    )
