"""The extension as a binary: quiet to import, self-contained, refused with a reason, and compiled as intended."""

from __future__ import annotations

import importlib.machinery
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import cuda_kernels
from conftest import skip_unless
from cuda_on_cpu import build
from transfuse import _extension
from transfuse.errors import ArgumentError
from transfuse.ops.norm import cuda_impl

built = pytest.mark.skipif(_extension.load() is None, reason=f"{_extension.why_not()}")
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


def python(code: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own; `path` comes before the package under test."""
    folders = [str(path)] if path else [str(Path(_extension.__file__).parent.parent)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFUSE_")}
    env = {**kept, "PYTHONPATH": os.pathsep.join(folders), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of the loader alone, into whose folder a test puts what a broken installation would have."""
    folder = tmp_path / "transfuse"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name in ("_extension.py", "_version.py", "errors.py"):
        shutil.copy(Path(_extension.__file__).parent / name, folder)
    return folder


def reason_of(package: Path, **environment: str) -> str:
    """why_not() of that package, which neither prints nor raises."""
    code = "from transfuse import _extension as e; assert e.load() is None; e.info(); print(e.why_not())"
    done = python(code, package.parent, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


def test_importing_is_quiet_and_touches_no_cuda() -> None:
    done = python(
        "from transfuse import _extension\n_extension.load()\nimport torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'libcuda.so' not in open('/proc/self/maps').read()",
        CUDA_VISIBLE_DEVICES="",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_loader_needs_no_torch(package: Path) -> None:
    done = python(
        "import sys\nfrom transfuse import _extension as e\ne.why_not()\nassert 'torch' not in sys.modules",
        package.parent,
    )
    assert done.returncode == 0, done.stderr


def test_a_source_tree_says_it_was_not_built(package: Path) -> None:
    assert reason_of(package) == (
        "this source tree was not built: run `pip install -e .` where there is a CUDA compiler"
    )


def test_the_builds_own_words_come_back(package: Path) -> None:
    record = {"cuda": "not built", "reason": "no nvcc anywhere", "remedy": "install one"}
    (package / "_build_info.json").write_text(json.dumps(record))
    assert reason_of(package) == "installed without the CUDA extension: no nvcc anywhere; install one"


def test_a_file_that_went_missing(package: Path) -> None:
    (package / "_build_info.json").write_text('{"cuda": "built"}')
    assert reason_of(package).startswith("the extension was built but its file is gone: reinstall")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cuda": "not built"}'])
def test_a_damaged_record_is_no_crash(package: Path, text: str) -> None:
    (package / "_build_info.json").write_text(text)
    assert re.search("not built|without the CUDA extension", reason_of(package))


def test_a_corrupt_file(package: Path) -> None:
    (package / f"_C{SUFFIX}").write_bytes(b"\x7fELF, but not for long")
    reason = reason_of(package)
    assert reason.startswith("the extension could not be imported (")
    assert "reinstall" in reason


def test_another_pythons_file(package: Path) -> None:
    (package / "_C.cpython-38-x86_64-linux-gnu.so").touch()
    assert reason_of(package).startswith(
        "the extension was built for another Python (_C.cpython-38-x86_64-linux-gnu.so)"
    )


def test_the_cpu_stand_ins_path_is_checked(package: Path, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.so"
    reason = reason_of(package, TRANSFUSE_CUDA_ON_CPU=str(missing))
    assert str(missing) in reason
    assert "unset TRANSFUSE_CUDA_ON_CPU" in reason


@built
def test_another_versions_file(package: Path) -> None:
    shutil.copy(_extension.kernels().__file__ or "", package / f"_C{SUFFIX}")
    (package / "_version.py").write_text('__version__ = "99.0.0"\n')
    assert re.search(r"was built for transfuse \S+, this is 99\.0\.0: reinstall", reason_of(package))


@built
def test_info_names_file_and_versions() -> None:
    facts = _extension.info()
    assert Path(facts["file"]).is_file()
    assert facts["architectures"]
    assert re.fullmatch(r"\d+\.\d+", facts["cuda_runtime"])


@built
def test_a_view_carries_geometry_and_dtype() -> None:
    x = torch.zeros(4, 6, dtype=torch.bfloat16)[1:, ::2]
    numbers = _extension.kernels().dtypes
    assert _extension.view(x) == (x.data_ptr(), numbers["bfloat16"], (3, 3), (6, 2))
    assert _extension.view(None) is None
    y = torch.zeros(2, 3, 5)
    assert _extension.view(y, (6, 5))[2:] == ((6, 5), (5, 1))  # type: ignore[index]
    assert _extension.view(torch.zeros(2, 0), (0, 0))[2:] == ((0, 0), (1, 1))  # type: ignore[index]
    with pytest.raises(ArgumentError, match=r"shape \(4, 6\) cannot be seen as \(24,\)"):
        _extension.view(torch.zeros(6, 4).T, (24,))


# --- the launcher's own checks, which need no GPU -------------------------------------------------------------------


def launch(x: torch.Tensor, y: torch.Tensor, *, weight: torch.Tensor | None = None, device: int = 0) -> None:
    view = _extension.view
    rows = torch.empty(x.shape[0])
    arguments: Sequence[object] = (view(x), None, view(weight), None, view(y), None, view(rows), view(rows))
    _extension.kernels().layer_norm_forward(*arguments, 1e-5, (device, 0))


@built
@pytest.mark.parametrize(
    "x, y, weight, message",
    [
        (torch.zeros(2, 8).int(), torch.zeros(2, 8).int(), None, "x must be float32, float16 or bfloat16"),
        (torch.zeros(8), torch.zeros(8), None, "x must be (rows, columns)"),
        (torch.zeros(2, 8), torch.zeros(2, 9), None, "must have x's dtype and shape"),
        (torch.zeros(2, 8), torch.zeros(2, 8).half(), None, "must have x's dtype and shape"),
        (torch.zeros(8, 2).T, torch.zeros(2, 8), None, "must have contiguous columns"),
        (torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(7), "weight and bias must be (columns)"),
        (torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(16)[::2], "must be contiguous"),
    ],
    ids=["dtype", "rank", "shape", "y-dtype", "strides", "weight-length", "weight-stride"],
)
def test_a_wrong_call_never_reaches_the_kernel(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        launch(x, y, weight=weight)
    assert str(caught.value).startswith("layer_norm_forward: ")
    assert "got x " in str(caught.value)


@built
def test_zero_rows_need_no_gpu() -> None:
    launch(torch.zeros(0, 8), torch.zeros(0, 8))


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.skipif(_extension.on_cpu(), reason="TRANSFUSE_CUDA_ON_CPU runs without a GPU")
def test_a_launch_without_a_driver_is_a_python_error() -> None:
    with pytest.raises(
        RuntimeError, match=r"layer_norm_forward: .* failed with cudaError\w+ .* for x float32 \(2, 8\)"
    ):
        launch(torch.zeros(2, 8), torch.zeros(2, 8))


# --- what the machine code shows ------------------------------------------------------------------------------------


OTHERS = ("combine", "sum", "statistics", "partials")  # parts of names of kernels that multiply no matrices


@pytest.fixture(scope="module")
def module() -> Path:
    """The extension's file, where it can be disassembled."""
    if _extension.load() is None or _extension.on_cpu():
        pytest.skip(f"no machine code here: {_extension.why_not() or 'TRANSFUSE_CUDA_ON_CPU is set'}")
    if cuda_kernels.cuobjdump() is None:
        pytest.skip("cuobjdump was not found (pip install triton)")
    return Path(str(_extension.kernels().__file__))


@pytest.fixture(scope="module", params=cuda_kernels.ARCHITECTURES)
def kernels(request: pytest.FixtureRequest, module: Path) -> list[cuda_kernels.Kernel]:
    found = list(cuda_kernels.kernels(module, request.param).values())
    assert found
    return found


def test_machine_code_for_the_promised_gpus(module: Path) -> None:
    listed = {kind: " ".join(cuda_kernels.dump(module, f"--list-{kind}")) for kind in ("elf", "ptx")}
    assert set(re.findall(r"\.(sm_\w+)\.cubin", listed["elf"])) == {"sm_80", "sm_90a"}
    assert set(re.findall(r"\.(sm_\w+)\.ptx", listed["ptx"])) == {"sm_80"}


def test_the_file_stays_small(module: Path) -> None:
    assert module.stat().st_size <= 20 << 20


def test_no_kernel_uses_local_memory(kernels: list[cuda_kernels.Kernel]) -> None:
    assert [k.name for k in kernels if k.stack or k.local] == []
    assert max(k.registers for k in kernels if "layer_norm_" in k.name) <= 128


def test_matrix_products_run_on_tensor_cores(kernels: list[cuda_kernels.Kernel]) -> None:
    products = [k for k in kernels if re.match("attention|ffn", k.name) and not re.search("|".join(OTHERS), k.name)]
    assert len(products) >= 18
    assert [k.name for k in products if not k.tensor_core] == []


def test_kernels_read_16_bytes_at_a_time(kernels: list[cuda_kernels.Kernel]) -> None:
    """The last template argument of a row's kernel is its pack: 4 or 8 elements are 16 bytes, 1 serves all else."""
    packed = [k for k in kernels if not re.search("norm_weight_sums|, 1>$", k.name)]
    assert [k.name for k in packed if max(k.loads, default=16) < 16] == []
    rows = [k for k in kernels if re.match(r"norm::.*(row|loop|partials)<.*, [48]>$", k.name)]
    assert len(rows) == 25
    for kernel in rows:
        statistics = 4 * ("layer_norm_" not in kernel.name)  # mean and rstd of a row, read in two places
        assert kernel.loads.count(16) >= 4, kernel.name
        assert len(kernel.loads) - kernel.loads.count(16) <= statistics, kernel.name
        assert 16 in kernel.stores, kernel.name


@pytest.fixture(scope="module")
def launches(module: Path) -> dict[str, cuda_kernels.Launch]:
    skip_unless(build.why_not())
    return cuda_kernels.launches()


def test_launches_keep_the_promised_bounds(module: Path, launches: dict[str, cuda_kernels.Launch]) -> None:
    """Threads as __launch_bounds__ says; room for as many blocks, with the shared memory that a launch asks for."""
    for architecture in cuda_kernels.ARCHITECTURES:
        for name, kernel in cuda_kernels.kernels(module, architecture).items():
            assert kernel.threads, f"{name} has no __launch_bounds__"
            threads, shared = launches.get(name, (kernel.threads, 0))
            assert threads <= kernel.threads, f"{name} is launched with {threads} threads"
            fits = kernel.fits(architecture, (kernel.threads, shared))
            assert fits >= kernel.blocks, f"{name} on {architecture}: {fits} blocks fit, {kernel.blocks} are promised"


def test_every_kernel_is_launched_by_a_case(module: Path, launches: dict[str, cuda_kernels.Launch]) -> None:
    assert set(cuda_kernels.kernels(module, "sm_80")) - set(launches) == set()


def test_the_page_lists_the_kernels_there_are(module: Path) -> None:
    page = cuda_kernels.listed(build.ROOT / "docs/cuda-kernels.md")
    there = set().union(*(cuda_kernels.kernels(module, a) for a in cuda_kernels.ARCHITECTURES))
    remedy = "run `python tests/cuda_kernels.py > docs/cuda-kernels.md`"
    assert page == there, f"{remedy}: {sorted(page - there)} are gone, {sorted(there - page)} are new"


# --- the implementation on top --------------------------------------------------------------------------------------


def test_the_implementation_says_which_dtypes_it_takes() -> None:
    assert cuda_impl.why_not(torch.zeros(2, 8), None) is None
    assert "float64" in (cuda_impl.why_not(torch.zeros(2, 8, dtype=torch.float64), None) or "")
