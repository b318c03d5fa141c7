"""What `pip install` builds in each setting, on machines with and without a CUDA compiler, and what it writes down."""

from __future__ import annotations

import email
import email.message
import importlib.machinery
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("pip", "setuptools", "cmake", "ninja", "pybind11")
# Not importlib.util.find_spec: looking for pip that way makes setuptools give up its distutils in this process, and
# torch.compile, which imports setuptools, fails afterwards.
MISSING = [name for name in NEEDED if importlib.machinery.PathFinder.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="these tests need a checkout of transfuse"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (pip install 'transfuse[test]')"),
]
SOURCES = ("pyproject.toml", "setup.py", "build_backend.py", "CMakeLists.txt", "MANIFEST.in", "LICENSE", "README.md")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what is built, in a folder of its own."""
    copy = tmp_path / "a clone"  # with a space: any path must do
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, copy)
    built = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json", "*.egg-info")
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    shutil.copytree(ROOT / "python", copy / "python", ignore=built)
    return copy


@pytest.fixture
def without_nvcc(source: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a machine without a CUDA compiler; the source looks away from /usr/local/cuda too."""
    setup = source / "setup.py"
    setup.write_text(setup.read_text().replace("/usr/local/cuda/bin", "/nowhere").replace("nvidia/cu*", "nowhere"))
    tools = tmp_path / "tools"
    tools.mkdir()
    for folder in reversed(os.environ["PATH"].split(os.pathsep)):  # the first on PATH wins, so it is linked last
        for tool in Path(folder).glob("*") if folder else ():
            if not tool.name.startswith("nvcc"):
                (tools / tool.name).unlink(missing_ok=True)
                (tools / tool.name).symlink_to(tool)
    return clean_environment(PATH=str(tools))


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment less what steers a build or an import."""
    steering = ("TRANSFUSE_", "CUDA", "CMAKE_ARGS", "MAX_JOBS", "PYTHONPATH", "PIP_CONSTRAINT")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(steering)}
    return {**kept, **changes}


def build(source: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`pip wheel` into source/../wheels with what is installed here: no index is asked."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-v"]
    return subprocess.run(
        [*command, "-w", str(source.parent / "wheels"), str(source)], env=env, capture_output=True, text=True
    )


def wheel_of(source: Path, env: dict[str, str]) -> Path:
    done = build(source, env)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (source.parent / "wheels").glob("transfuse-*.whl")
    return wheel


def record_in(wheel: Path) -> dict[str, Any]:
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("transfuse/_build_info.json"))


def run_in(wheel: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Python code against the unpacked wheel, from a folder that is not the checkout."""
    site = wheel.parent / "site"
    if not site.is_dir():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    env = clean_environment(PYTHONPATH=str(site))
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=wheel.parent)


def fake_nvcc(folder: Path, release: str) -> Path:
    """An executable that knows its version and can do nothing else."""
    nvcc = folder / "toolkit/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "Cuda compilation tools, release {release}, V{release}" && exit 0\n'
        'echo "nvcc fatal: this compiler is broken" >&2\nexit 1\n'
    )
    nvcc.chmod(0o755)
    return nvcc


def test_without_a_compiler_the_package_is_pure_and_says_why(source: Path, without_nvcc: dict[str, str]) -> None:
    before = {path for path in source.rglob("*") if "__pycache__" not in path.parts}
    done = build(source, without_nvcc)
    assert done.returncode == 0, done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if "without the CUDA extension" in line]
    assert len(said) == 1
    assert "TRANSFUSE_CUDA=pip" in said[0]
    (wheel,) = (source.parent / "wheels").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    answer = run_in(
        wheel,
        "import torch, transfuse; from transfuse import _extension\n"
        "assert _extension.load() is None and not _extension.on_cpu()\n"
        "assert transfuse.layer_norm(torch.ones(2, 4), None, None).shape == (2, 4)\n"
        "print(_extension.why_not()); print(transfuse.backends()[0].reason)",
    )
    assert answer.returncode == 0, answer.stderr
    reason, of_backends = answer.stdout.splitlines()
    assert reason == of_backends
    for word in ("CUDACXX", "CUDA_HOME", "PATH", "nvcc", "TRANSFUSE_CUDA=pip"):
        assert word in reason
    added = {path for path in source.rglob("*") if "__pycache__" not in path.parts} - before
    added_parts = [path.relative_to(source).parts for path in added]
    ignored_by_git = [("build",), ("python", "transfuse.egg-info")]
    assert [parts for parts in added_parts if parts[:1] not in ignored_by_git and parts[:2] not in ignored_by_git] == []


def test_off_builds_no_extension_even_with_a_compiler(source: Path) -> None:
    wheel = wheel_of(source, clean_environment(TRANSFUSE_CUDA="off"))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert record_in(wheel)["reason"] == "TRANSFUSE_CUDA=off was set"


@pytest.mark.parametrize("mode", ["require", "pip"])
def test_a_required_extension_fails_without_a_compiler(source: Path, without_nvcc: dict[str, str], mode: str) -> None:
    done = build(source, {**without_nvcc, "TRANSFUSE_CUDA": mode})
    assert done.returncode != 0
    assert f"transfuse: TRANSFUSE_CUDA={mode}, but " in done.stdout + done.stderr
    assert not list((source.parent / "wheels").glob("*"))


def test_an_unknown_mode_is_an_error(source: Path) -> None:
    done = build(source, clean_environment(TRANSFUSE_CUDA="yes"))
    assert done.returncode != 0
    assert "TRANSFUSE_CUDA must be one of auto, off, require, pip, got 'yes'" in done.stdout + done.stderr


def test_an_old_compiler_is_named_with_its_version(source: Path, without_nvcc: dict[str, str], tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path, "11.8")
    wheel = wheel_of(source, {**without_nvcc, "CUDA_HOME": str(nvcc.parent.parent)})
    assert record_in(wheel)["reason"] == f"{nvcc} is CUDA 11.8, 12.6 or newer is needed"


def test_a_failing_build_degrades_and_keeps_its_log(source: Path, without_nvcc: dict[str, str], tmp_path: Path) -> None:
    broken = {**without_nvcc, "CUDACXX": str(fake_nvcc(tmp_path, "13.0")), "TMPDIR": str(tmp_path)}
    wheel = wheel_of(source, broken)
    record = record_in(wheel)
    assert record["cuda"] == "failed"
    assert "is not able to compile a simple test program" in record["reason"]
    assert "nvcc fatal: this compiler is broken" in Path(record["log"]).read_text()
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
    answer = run_in(wheel, "from transfuse import _extension; print(_extension.why_not())")
    assert record["log"] in answer.stdout
    required = build(source, {**broken, "TRANSFUSE_CUDA": "require"})
    assert required.returncode != 0
    assert "nvcc fatal: this compiler is broken" in required.stdout + required.stderr


def test_metadata_never_replaces_the_users_torch(source: Path) -> None:
    wheel = wheel_of(source, clean_environment(TRANSFUSE_CUDA="off"))
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata: email.message.Message = email.message_from_bytes(archive.read(name))
        packed = set(archive.namelist())
    requirements = metadata.get_all("Requires-Dist") or []
    assert "torch>=2.9" in requirements
    assert not [line for line in requirements if "==" in line.partition(";")[0]]
    assert metadata["License-Expression"] == "Apache-2.0"
    here = [path for path in (source / "python").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    ours = {str(path.relative_to(source / "python")) for path in here if "egg-info" not in str(path)}
    assert ours <= packed, f"not in the wheel: {sorted(ours - packed)}"


def test_an_sdist_builds_the_same_wheel(source: Path, tmp_path: Path) -> None:
    env = clean_environment(TRANSFUSE_CUDA="off")
    code = f"import build_backend; print(build_backend.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("transfuse-*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    sources = {str(path.relative_to(source)) for path in (source / "csrc").rglob("*.*")}
    assert sources <= {str(path.relative_to(unpacked)) for path in unpacked.rglob("*")}
    wheel_of(unpacked, env)


def test_an_editable_build_records_its_outcome_in_the_source_tree(source: Path, tmp_path: Path) -> None:
    env = clean_environment(TRANSFUSE_CUDA="off")
    code = f"import build_backend; build_backend.build_editable({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((source / "python/transfuse/_build_info.json").read_text())
    assert record["reason"] == "TRANSFUSE_CUDA=off was set"


def ask_setup(expression: str, **environment: str) -> str:
    """The value of an expression over setup.py's functions; not in this process: setuptools replaces distutils."""
    code = f"import runpy; setup = runpy.run_path('setup.py', run_name='setup'); print({expression})"
    env = clean_environment(**environment)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_parallel_jobs_follow_memory_and_max_jobs() -> None:
    assert ask_setup("setup['jobs']()", MAX_JOBS="7") == "7"
    assert 1 <= int(ask_setup("setup['jobs']()")) <= (os.cpu_count() or 1)
    assert ask_setup("[setup['jobs'].__globals__.update(GIB_PER_JOB=1e6), setup['jobs']()][1]") == "1"


@pytest.mark.parametrize("mode", ["", "auto", "off", "require", "pip"])
def test_only_pip_mode_asks_for_a_compiler(mode: str) -> None:
    env = clean_environment(TRANSFUSE_CUDA=mode)
    code = "import build_backend; print(*build_backend.get_requires_for_build_wheel(), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = [line for line in done.stdout.splitlines() if line.startswith("nvidia-")]
    assert len(asked) == (5 if mode == "pip" else 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_compiler_gives_a_self_contained_extension(source: Path) -> None:
    nvcc, _, why = ask_setup("*setup['find_nvcc']('auto'), sep='|'").partition("|")
    if nvcc == "None":
        pytest.skip(why)
    wheel = wheel_of(source, clean_environment(TRANSFUSE_CUDA="require", CUDACXX=nvcc))
    assert record_in(wheel)["cuda"] == "built"
    answer = run_in(wheel, "from transfuse import _extension as e; print(e.load().__file__); print(e.why_not())")
    assert answer.returncode == 0, answer.stderr
    file, reason = answer.stdout.splitlines()
    assert reason == "None"
    assert answer.stderr == ""
    linked = subprocess.run(["ldd", file], capture_output=True, text=True).stdout
    assert "libc.so" in linked
    assert not re.search(r"libtorch|libc10|libcudart|libcuda\b|not found", linked), linked
    if shutil.which("nm"):
        exported = subprocess.run(["nm", "-D", "--defined-only", file], capture_output=True, text=True).stdout
        assert [line.split()[-1] for line in exported.splitlines()] == ["PyInit__C"]
    assert os.path.getsize(file) < 64 * 2**20
