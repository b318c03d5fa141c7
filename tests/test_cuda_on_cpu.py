"""The CUDA sources run on the CPU: device functions against torch and the PTX ISA, and a planted bug for each detector.

The kernels are those of tests/cuda_on_cpu/kernels; docs/testing-kernels.md says what the engine simulates.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import transfuse
from conftest import cuda_on_cpu, skip_unless
from cuda_on_cpu import build
from transfuse import _extension

NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int32: 3}  # csrc/tensor.h


class Kernels:
    """The test kernels on one device. Tensors go there and come back, so that a test reads the same for both."""

    def __init__(self, device: str) -> None:
        folder = build.HERE / "kernels"
        sources = [*sorted(folder.glob("*.cu")), folder / "bindings.cpp", build.ROOT / "csrc/error.cpp"]
        path = build.build("_planted", sources) if device == "cpu" else build.build_for_gpu("_planted", sources)
        spec = importlib.util.spec_from_file_location("_planted", path)
        assert spec is not None
        assert spec.loader is not None
        self._module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._module)
        self._device = torch.device(device)

    def __call__(self, name: str, *arguments: object) -> None:
        there = [a.to(self._device) if isinstance(a, torch.Tensor) else a for a in arguments]
        views = [view(a) if isinstance(a, torch.Tensor) else a for a in there]
        getattr(self._module, name)(*views, _extension.target(self._device))
        for here, result in zip(arguments, there, strict=True):
            if isinstance(here, torch.Tensor) and isinstance(result, torch.Tensor) and result is not here:
                here.copy_(result)


_kernels = functools.cache(Kernels)


def view(tensor: torch.Tensor) -> _extension.View:
    return tensor.data_ptr(), NUMBERS[tensor.dtype], tuple(tensor.shape), tensor.stride()


@pytest.fixture
def engine() -> Kernels:
    """The kernels on the CPU alone: what only the engine can do."""
    skip_unless(build.why_not())
    return _kernels("cpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """The kernels on the CPU, and the same ones on a GPU: both must give what the ISA says."""
    if request.param == "cpu":
        skip_unless(build.why_not())
    elif not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    elif shutil.which("nvcc") is None:
        pytest.skip("needs nvcc, to build the same kernels for the GPU")
    return _kernels(request.param)


# --- each kind of bug -----------------------------------------------------------------------------------------------

N = 100
IN, OUT = r"in float32 \(100\)", r"out float32 \(100\)"
STAGED, THREAD = r"byte \d+ of staged \(256 bytes, shared\)", r"thread \(\d+, 0, 0\)"
TOO_EARLY = rf"(race: reads {STAGED}, which {THREAD} wrote|race: writes {STAGED}, which {THREAD} reads) with no barrier"
NOT_YET = rf"({TOO_EARLY}|reads {STAGED}, which no thread of this block has written yet: .* barrier that is missing)"
BUGS = {  # kernel: threads a block, what the message says in whatever order threads run
    "read_past_end": (32, rf"4-byte read out of bounds: up to 4 bytes past the end of {IN}"),
    "write_past_end": (32, rf"4-byte write out of bounds: up to 4 bytes past the end of {OUT}"),
    "read_before_start": (32, rf"4-byte read out of bounds: 4 bytes before {IN}"),
    "read_absent": (32, r"4-byte read out of bounds: address \d+: a null pointer"),
    "misaligned_vector": (32, rf"misaligned access at byte \d+ of {IN}: its address must be a multiple of 16 bytes"),
    "writes_an_input": (32, rf"writes to {IN}, which its Call lists as an input"),
    "leaves_an_output": (32, rf"output {OUT} was left unwritten at \(99\), 1 elements in all"),
    "reads_an_output": (32, rf"reads byte \d+ of {OUT}, which nothing has written"),
    "register_index": (32, r"index [4-7] is out of bounds of its array \[planted.cu:\d+\]"),
    "static_shared_index": (64, r"4-byte read out of bounds"),
    "dynamic_shared_index": (64, r"4-byte write out of bounds at byte 256 of dynamic shared memory \(256 bytes\)"),
    "uninitialised_shared": (64, r"reads byte 20 of staged .*, which no thread of this block has written yet: init"),
    "read_races": (64, NOT_YET),
    "write_races": (64, TOO_EARLY),
    "warp_races": (64, NOT_YET),
    "atomic_races": (64, rf"race: reads byte 0 of total \(4 bytes, shared\), which {THREAD} wrote with no barrier"),
    "exits_before_barrier": (64, rf"{THREAD} waits at __syncthreads .* while thread \(7, 0, 0\) has exited"),
    "two_barriers": (64, rf"{THREAD} waits at __syncthreads \(planted.cu:\d+\) while {THREAD} waits at __syncthreads"),
    "divergent_shuffle": (
        64,
        rf"{THREAD} waits at __shfl_xor_sync .* 0xffffffff while {THREAD} waits at __syncthreads",
    ),
    "shuffle_without_itself": (64, r"__shfl_sync with mask 0xfffffffe, which leaves out this lane \(0\)"),
    "shuffle_from_outside": (64, r"a shuffle reads lane 16, which its mask 0x0000ffff leaves out"),
    "copy_without_wait": (64, rf"reads {STAGED} before the cp.async of {THREAD} into it was waited for"),
    "copy_waits_for_too_few": (
        64,
        rf"reads byte \d+ of second .* before the cp.async of {THREAD} into it was waited for",
    ),
    "copy_without_barrier": (64, rf"({NOT_YET}|reads {STAGED} before the cp.async of {THREAD} into it was waited for)"),
    "copy_misaligned": (32, r"misaligned cp.async: its source must be at a multiple of 16 bytes"),
    "copy_left_behind": (64, rf"4-byte write out of bounds: up to 4 bytes past the end of {OUT}"),
    "ldmatrix_misaligned": (32, r"misaligned: ldmatrix reads rows at multiples of 16 bytes"),
}


def run_planted(engine: Kernels, name: str, bug: bool, threads: int) -> torch.Tensor:
    source, out = torch.randn(N), torch.full((N,), float("nan"))
    engine("run", name, bug, source, out, threads, 4 * threads)
    return out


@pytest.mark.parametrize("seed", [None, "1"], ids=["in_order", "permuted"])
@pytest.mark.parametrize("name", BUGS)
def test_planted_bug(name: str, seed: str | None, engine: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    if seed is not None:
        monkeypatch.setenv("TRANSFUSE_CUDA_ON_CPU_SEED", seed)
    threads, message = BUGS[name]
    with pytest.raises(RuntimeError, match=message) as caught:
        run_planted(engine, name, True, threads)
    if name != "leaves_an_output":  # found after the kernel
        where = rf"cuda_on_cpu: planted::.*{name}: block \(\d, 0, 0\), .*thread \(\d+, 0, 0\).*planted.cu:\d+"
        assert re.search(where, str(caught.value)), str(caught.value)
    assert not run_planted(engine, name, False, threads).isnan().any()


def test_the_gap_between_rows_is_out_of_bounds(engine: Kernels) -> None:
    source, wide = torch.randn(4, 10), torch.zeros(4, 10)
    engine("run_rows", False, source[:, :7], wide[:, :7])
    assert torch.equal(wide[:, :7], source[:, :7])
    with pytest.raises(RuntimeError, match=r"between the elements of out float32 \(4, 7\), at byte 28"):
        engine("run_rows", True, source, wide[:, :7])
    with pytest.raises(RuntimeError, match=r"between the elements of in float32 \(4, 7\), at byte 28"):
        engine("run_rows", True, source[:, :7], wide)


def test_a_workspace_is_read_after_it_was_written(engine: Kernels) -> None:
    source, work, out = torch.randn(N), torch.empty(N), torch.empty(N)
    engine("run_workspace", False, source, work, out)
    assert torch.equal(out, source)
    with pytest.raises(RuntimeError, match=r"reads byte 396 of work float32 \(100\), which nothing has written"):
        engine("run_workspace", True, source, work, out)


def test_a_tensor_that_the_call_does_not_list(engine: Kernels) -> None:
    storage = torch.randn(2**20)  # 4 MB: the output is not near
    source, out = storage[:N], torch.empty(N)
    engine("run_unlisted", False, source, out)
    with pytest.raises(RuntimeError, match=r"4-byte read out of bounds: .*(in no tensor of the call|out float32)"):
        engine("run_unlisted", True, source, out)


def test_a_launch_that_a_gpu_refuses(engine: Kernels) -> None:
    x = torch.zeros(2000)
    with pytest.raises(RuntimeError, match=r"a GPU refuses a block of \(2000, 1, 1\) threads"):
        engine("run", "read_past_end", False, x, x.clone(), 2000, 0)
    with pytest.raises(RuntimeError, match=r"shared memory failed with cudaErrorInvalidValue"):
        engine("run", "read_past_end", False, x, x.clone(), 32, 164 * 1024)  # sm_80 has 163 KB


@pytest.mark.parametrize("name", ["read_races", "two_barriers", "divergent_shuffle", "copy_without_wait"])
def test_stacks_switch_by_ucontext_too(name: str, engine: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do on processors other than x86-64."""
    out = torch.empty(256)
    for way in ("native", "ucontext"):
        if way == "ucontext":
            monkeypatch.setenv("TRANSFUSE_CUDA_ON_CPU_UCONTEXT", "1")
        threads, message = BUGS[name]
        with pytest.raises(RuntimeError, match=message):
            run_planted(engine, name, True, threads)
        assert not run_planted(engine, name, False, threads).isnan().any()
        engine("barriers", out, 5)
        assert torch.equal(out, (torch.arange(256.0) + 5) % 256)


# --- rounding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_round_as_torch_does(dtype: torch.dtype, kernels: Kernels) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = torch.empty(2**16)
    kernels("convert", every, wide)
    assert torch.equal(wide.nan_to_num(123.0), every.float().nan_to_num(123.0))

    # Each value, the midpoint to its neighbour, and the floats on both sides of that; and random bits.
    step = wide[wide.isfinite()].sort().values
    middle = ((step[1:].double() + step[:-1].double()) / 2).float()
    around = [middle, *(torch.nextafter(middle, torch.full_like(middle, end)) for end in (-torch.inf, torch.inf))]
    bits = torch.randint(-(2**31), 2**31, (100_000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = torch.cat([step, *around, bits, torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 65519.0, 65520.0])])
    narrow = torch.empty(x.shape, dtype=dtype)
    kernels("convert", x, narrow)
    expected = x.to(dtype)
    assert torch.equal(narrow.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(narrow.view(torch.int16)[number], expected.view(torch.int16)[number])


# --- warps ----------------------------------------------------------------------------------------------------------


def shuffled(kind: int, lane: int, operand: int, width: int) -> int:
    """The lane that __shfl_*_sync reads, by the CUDA programming guide's words."""
    first = lane // width * width
    if kind == 0:
        return first + operand % width
    source = (lane - operand, lane + operand, lane ^ operand)[kind - 1]
    inside = source >= first if kind == 1 else source < first + width
    return source if inside else lane


@pytest.mark.parametrize("width", [32, 16, 4])
@pytest.mark.parametrize("kind", range(4), ids=["index", "up", "down", "xor"])
def test_shuffles(kind: int, width: int, kernels: Kernels) -> None:
    x, out = torch.randn(32), torch.empty(32)
    for operand in (0, 1, 3, 8, 17):
        kernels("shuffles", x, out, kind, operand, width)
        assert torch.equal(out, x[[shuffled(kind, lane, operand, width) for lane in range(32)]])


@pytest.mark.parametrize("lanes", [[], [0, 5, 31], list(range(32))], ids=["none", "some", "all"])
def test_votes(lanes: list[int], kernels: Kernels) -> None:
    x, out = torch.zeros(32, dtype=torch.int32), torch.empty(4, 32, dtype=torch.int32)
    x[lanes] = 1
    kernels("votes", x, out)
    ballot = np.uint32(sum(1 << lane for lane in lanes)).astype(np.int32).item()
    for row, expected in zip(out, (ballot, len(lanes) == 32, len(lanes) > 0, 32), strict=True):
        assert torch.equal(row, torch.full_like(row, expected))


# --- tensor cores: fragments by the tables of the PTX ISA, section "Matrix Fragments for mma.m16n8k..." ---------------


def a_place(shape: str, lane: int, i: int) -> tuple[int, int]:
    """(row, column) of element a_i of a lane."""
    group, in_group = lane >> 2, lane % 4
    if shape == "k16":  # .f16 and .bf16, a0 to a7
        row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
        return row, in_group * 2 + (i & 1) + (0 if i < 4 else 8)
    if shape == "k8":  # .f16 and .bf16, a0 to a3
        return (group if i < 2 else group + 8), in_group * 2 + (i & 1)
    return (group if i in (0, 2) else group + 8), (in_group if i in (0, 1) else in_group + 4)  # k8 .tf32


def b_place(shape: str, lane: int, i: int) -> tuple[int, int]:
    group, in_group = lane >> 2, lane % 4
    if shape == "k16":
        return in_group * 2 + (i & 1) + (0 if i < 2 else 8), group
    if shape == "k8":
        return in_group * 2 + i, group
    return (in_group if i == 0 else in_group + 4), group


def c_place(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2 if i < 2 else (lane >> 2) + 8), (lane % 4) * 2 + (i & 1)


def fragments(matrix: torch.Tensor, count: int, place) -> torch.Tensor:  # type: ignore[no-untyped-def]
    return torch.stack([torch.stack([matrix[place(lane, i)] for i in range(count)]) for lane in range(32)])


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "tf32"])
@pytest.mark.parametrize("k", [16, 8])
def test_mma(kind: str, k: int, kernels: Kernels) -> None:
    if kind == "tf32" and k == 16:
        pytest.skip("the kernels use tf32 with K = 8 alone")
    shape = "tf32" if kind == "tf32" else f"k{k}"
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    # Small whole numbers: every sum is exact, whatever its order.
    a, b = (torch.randint(-8, 9, size).to(dtype) for size in ((16, k), (k, 8)))
    c = torch.randint(-8, 9, (16, 8)).float()
    a_registers = fragments(a, k // 2, functools.partial(a_place, shape))
    b_registers = fragments(b, k // 4, functools.partial(b_place, shape))
    if kind != "tf32":  # element 0 in the low half
        a_registers, b_registers = a_registers.view(torch.int32), b_registers.view(torch.int32)
    d = fragments(c, 4, c_place)
    kernels("mma", kind, a_registers, b_registers, d)
    assert torch.equal(d, fragments(a.float() @ b.float() + c, 4, c_place))


def test_tf32_keeps_ten_bits_of_fraction(kernels: Kernels) -> None:
    a, b, d = torch.zeros(32, 4), torch.zeros(32, 2), torch.zeros(32, 4)
    a[0, 0], b[0, 0] = 1 + 2**-11, 1.0  # a tie: away from zero
    kernels("mma", "tf32", a, b, d)
    assert d[0, 0] == 1 + 2**-10


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_ldmatrix(matrices: int, transposed: bool, kernels: Kernels) -> None:
    # Lane 8 m + r points to row r of matrix m, wherever that lies; what the other lanes point to is not read.
    tiles, out = torch.randn(matrices, 8, 8).half(), torch.empty(32, matrices, dtype=torch.int32)
    rows = torch.randperm(8 * matrices, dtype=torch.int32).repeat(32 // (8 * matrices))
    rows[8 * matrices :] = 0
    kernels("ldmatrix", tiles, rows, out, transposed)
    pointed = tiles.flatten(0, 1)[rows[: 8 * matrices].long()].view(matrices, 8, 8)
    for lane in range(32):
        for m in range(matrices):
            tile = pointed[m].T if transposed else pointed[m]
            pair = tile[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
            assert torch.equal(out[lane, m : m + 1].view(torch.float16), pair)


def test_copies_arrive_in_the_order_of_their_groups(kernels: Kernels) -> None:
    x, out = torch.randn(2, 128), torch.empty(2, 128)
    kernels("copies", x, out)
    assert torch.equal(out[:, :64], x[:, :64])
    assert not out[:, 64:].any()  # read_bytes = 0


# --- the extension's own kernels --------------------------------------------------------------------------------------


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_on_cpu(monkeypatch)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("hidden", [96, 3000])
def test_no_result_hangs_on_the_order_of_threads(hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, residual, weight = torch.randn(5, hidden).half(), torch.randn(5, hidden).half(), torch.randn(hidden)
    in_order = transfuse.layer_norm(x, weight, None, residual=residual, backend="cuda")
    for seed in ("1", "2"):
        monkeypatch.setenv("TRANSFUSE_CUDA_ON_CPU_SEED", seed)
        permuted = transfuse.layer_norm(x, weight, None, residual=residual, backend="cuda")
        assert all(map(torch.equal, in_order, permuted))


@pytest.mark.usefixtures("extension")
def test_a_view_of_some_columns_leaves_the_others() -> None:
    x, y, mean, rstd = torch.randn(3, 64), torch.empty(3, 64), torch.empty(3), torch.empty(3)

    def launch(columns: int) -> None:
        rows = [(t.data_ptr(), 0, (3, columns), (64, 1)) for t in (x, y)]
        statistics = [(t.data_ptr(), 0, (3,), (1,)) for t in (mean, rstd)]
        _extension.kernels().layer_norm_forward(rows[0], None, None, None, rows[1], None, *statistics, 1e-5, (0, 0))

    launch(64)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (64,)))
    before = y.clone()
    launch(40)  # a view of the first columns: the others stay as they were
    torch.testing.assert_close(y[:, :40], torch.nn.functional.layer_norm(x[:, :40], (40,)))
    assert torch.equal(y[:, 40:], before[:, 40:])


def test_the_path_that_build_prints_serves_another_process() -> None:
    skip_unless(build.why_not())
    built = subprocess.run([sys.executable, build.__file__], capture_output=True, text=True, check=True)
    call = "transfuse.layer_norm(torch.ones(2, 4), None, None, backend='cuda')"
    code = f"import torch, transfuse; print({call}.sum().item())"
    environment = {**os.environ, "TRANSFUSE_CUDA_ON_CPU": built.stdout.strip()}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "0.0", done.stderr


# --- speed: a suite must afford it ------------------------------------------------------------------------------------


def test_a_barrier_of_256_threads_costs_microseconds(engine: Kernels) -> None:
    out = torch.empty(256)
    best = float("inf")
    for _ in range(5):
        begin = time.process_time()
        engine("barriers", out, 50)  # 100 barriers
        best = min(best, time.process_time() - begin)
    assert torch.equal(out, (torch.arange(256.0) + 50) % 256)
    assert best / 100 < 1e-3, f"{best / 100 * 1e6:.0f} us a barrier"
