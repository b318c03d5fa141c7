"""The binding on a real GPU: pointers and streams of torch's context, graphs, devices, failures, and the first kernel.

None of this can be shown without a GPU, so every test here is skipped, with the reason, where there is none.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading

import pytest
import torch

import transfuse
from oracle import judge
from transfuse import _extension, backends
from transfuse.ops.norm import cuda_impl, reference


def _reason() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA GPU is available"
    if _extension.on_cpu():
        return "TRANSFUSE_CUDA_ON_CPU takes the extension's place"
    return backends.why_not("cuda", torch.device("cuda"))


REASON = _reason()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=f"{REASON}")]
DEVICE = "cuda"


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, layout: str = "contiguous", device: str = DEVICE
) -> torch.Tensor:
    """Random rows in one of the layouts that take different paths through the launcher."""
    columns = shape[-1]
    if layout == "misaligned":  # single elements: the start is off 16 bytes
        return torch.randn(*shape[:-1], columns + 3, device=device).to(dtype)[..., 1 : 1 + columns]
    if layout == "padded":  # 16-byte accesses over a row stride that is not the width
        return torch.randn(*shape[:-1], columns + 64, device=device).to(dtype)[..., :columns]
    if layout == "transposed":  # copied first
        return torch.randn(*reversed(shape), device=device).to(dtype).permute(*reversed(range(len(shape))))
    if layout == "expanded":  # row stride 0
        return torch.randn(columns, device=device).to(dtype).expand(shape)
    return torch.randn(shape, device=device).to(dtype)


def check_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> None:
    """Judge y by the computed budget; summed must be exact, the statistics right to fp32."""
    y, summed, mean, rstd = cuda_impl.layer_norm_forward(x, weight, bias, eps, residual)
    given = x if residual is None else x + residual
    if residual is not None:
        assert torch.equal(summed, given)
    wide = [None if t is None else t.double() for t in (weight, bias)]
    truth = reference.layer_norm(given.double(), *wide, eps, None)[0].cpu()
    plain = reference.layer_norm(given, weight, bias, eps, None)[0]
    verdict = judge("y", y, truth, plain)
    assert verdict.ok, f"error {verdict.error:.3e} > budget {verdict.budget:.3e}"
    centre = given.double().mean(-1)
    spread = (given.double() - centre[..., None]).square().mean(-1).add(eps).rsqrt()
    torch.testing.assert_close(mean.double(), centre, rtol=1e-6, atol=1e-6 * given.abs().max().item())
    torch.testing.assert_close(rstd.double(), spread, rtol=1e-5, atol=0)


def raw_launch(x: torch.Tensor, y: torch.Tensor, statistics: torch.Tensor, target: tuple[int, int]) -> None:
    """The launcher itself, with nothing of torch in between. x, y: (M, N); statistics: (2, M)."""
    view = _extension.view
    _extension.kernels().layer_norm_forward(
        view(x), None, None, None, view(y), None, view(statistics[0]), view(statistics[1]), 1e-5, target
    )


def current_context() -> int | None:
    """The driver's current context on this thread."""
    context = ctypes.c_void_p()
    assert ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(context)) == 0
    return context.value


# --- the binding ----------------------------------------------------------------------------------------------------


def test_it_works_in_torchs_context() -> None:
    x = inputs((64, 768))
    before = current_context()
    assert before is not None
    check_forward(x)
    assert current_context() == before


@pytest.mark.parametrize("side", [False, True], ids=["current-stream", "side-stream"])
def test_a_launch_waits_for_its_stream(side: bool) -> None:
    stale, fresh = inputs((256, 1024)), inputs((256, 1024))
    truth = reference.layer_norm(fresh, None, None, 1e-5, None)[0]
    check_forward(stale)  # the driver loads a kernel's code at its first launch, and may wait for the device to do so
    x = stale.clone()
    stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # some 0.1 s
        x.copy_(fresh)
        y = cuda_impl.layer_norm_forward(x, None, None, 1e-5, None)[0]
        done = torch.cuda.Event()
        done.record()
    assert not done.query(), "the launch did not wait behind the work of its stream"
    torch.cuda.synchronize()
    torch.testing.assert_close(y, truth)


def test_a_graph_captures_it_and_replays_on_new_data() -> None:
    static = inputs((32, 768), torch.bfloat16)
    weight = torch.randn(768, device=DEVICE, dtype=torch.bfloat16)
    with torch.cuda.stream(torch.cuda.Stream()):
        transfuse.layer_norm(static, weight, None, backend="cuda")  # warm up
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = transfuse.layer_norm(static, weight, None, backend="cuda")
    for _ in range(3):
        fresh = inputs((32, 768), torch.bfloat16)
        static.copy_(fresh)
        graph.replay()
        assert torch.equal(y, transfuse.layer_norm(fresh, weight, None, backend="cuda"))


def test_the_current_device_stays() -> None:
    before = torch.cuda.current_device()
    last = torch.cuda.device_count() - 1
    check_forward(inputs((8, 64), device=f"cuda:{last}"))
    assert torch.cuda.current_device() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_a_device_that_is_not_current() -> None:
    with torch.cuda.device(0):
        context = current_context()
        x = inputs((8, 64), device="cuda:1")
        check_forward(x)
        assert current_context() == context
        assert torch.cuda.current_device() == 0


def test_a_thread_that_never_used_cuda_is_left_so() -> None:
    x = inputs((8, 64))
    y, statistics = torch.full_like(x, torch.nan), torch.empty(2, 8, device=DEVICE)
    target = _extension.target(x.device)
    torch.cuda.synchronize()
    contexts: list[int | None] = []

    def work() -> None:
        contexts.append(current_context())
        raw_launch(x, y, statistics, target)
        contexts.append(current_context())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert len(contexts) == 2, "the launch failed in the thread"
    assert contexts[0] == contexts[1]
    torch.testing.assert_close(y, reference.layer_norm(x, None, None, 1e-5, None)[0])


def test_threads_on_streams_of_their_own() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                x = inputs((16, 512)) + number
                y = cuda_impl.layer_norm_forward(x, None, None, 1e-5, None)[0]
                truth = reference.layer_norm(x, None, None, 1e-5, None)[0]
                if not torch.allclose(y, truth, rtol=1e-4, atol=1e-4):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_refused_launch_is_a_python_error_and_no_more() -> None:
    x = inputs((8, 64))
    y, statistics = torch.empty_like(x), torch.empty(2, 8, device=DEVICE)
    message = r"layer_norm_forward: choosing the device failed with cudaErrorInvalidDevice .* for x float32 \(8, 64\)"
    context = current_context()
    with pytest.raises(RuntimeError, match=message):
        raw_launch(x, y, statistics, (torch.cuda.device_count(), 0))
    assert current_context() == context
    torch.cuda.synchronize()
    check_forward(x)


def test_a_kernel_that_failed_earlier_is_named_at_the_next_launch() -> None:
    # In a process of its own: after an illegal address nothing of the context can be used.
    code = """
import torch
from transfuse import _extension
view, kernels = _extension.view, _extension.kernels()
x, s = torch.ones(8, 64, device="cuda"), torch.empty(8, device="cuda")
wild = (64, *view(x)[1:])
target = _extension.target(x.device)
kernels.layer_norm_forward(wild, None, None, None, view(x), None, view(s), view(s), 1e-5, target)
try:
    torch.cuda.synchronize()
except RuntimeError as error:
    print("torch:", str(error).splitlines()[0])
try:
    kernels.layer_norm_forward(view(x), None, None, None, view(x), None, view(s), view(s), 1e-5, target)
except RuntimeError as error:
    print("transfuse:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "torch: " in done.stdout, done.stderr
    assert "transfuse: layer_norm_forward: " in done.stdout, done.stderr
    assert "CUDA_LAUNCH_BLOCKING=1" in done.stdout


# --- layer norm forward ---------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One warp a row; several warps; the edge of the registers; the loop; one row, many rows.
SHAPES = [(5, 1), (3, 7, 111), (4097, 64), (33, 768), (9, 1024), (9, 1032), (3, 4096), (2, 8192), (2, 8200), (1, 40000)]


def _id(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "padded", "transposed", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize("shape", SHAPES, ids=_id)
def test_forward(shape: tuple[int, ...], dtype: torch.dtype, layout: str, poisoned: None) -> None:
    wide = torch.randn(2, shape[-1], device=DEVICE)
    check_forward(inputs(shape, dtype, layout))
    check_forward(inputs(shape, dtype, layout), wide[0], wide[1])
    residual = inputs(shape, dtype, layout)
    check_forward(inputs(shape, dtype, layout), wide[0].to(dtype), wide[1].to(dtype), residual)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (4, 0), (0,)], ids=_id)
def test_empty(shape: tuple[int, ...]) -> None:
    y, _, mean, _ = cuda_impl.layer_norm_forward(inputs(shape), None, None, 1e-5, None)
    torch.cuda.synchronize()
    assert y.shape == shape
    assert mean.shape == shape[:-1]


@pytest.mark.parametrize("offset", [0.0, 1e3, -3e4], ids=_id)
def test_a_large_mean_does_not_cancel(offset: float) -> None:
    check_forward(inputs((16, 2048)) + offset)


def test_every_run_gives_the_same_bits() -> None:
    x = inputs((1000, 3000), torch.bfloat16)
    first = cuda_impl.layer_norm_forward(x, None, None, 1e-5, x)
    for _ in range(5):
        again = cuda_impl.layer_norm_forward(x, None, None, 1e-5, x)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_rows_beyond_what_one_grid_dimension_of_old_took() -> None:
    check_forward(inputs((300_000, 8)))


@pytest.mark.slow
def test_beyond_two_to_the_31_elements() -> None:
    rows, columns = 2**21 + 5, 1024
    needed = 3 * rows * columns * 2
    if torch.cuda.mem_get_info()[0] < needed + 2**31:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    x = torch.empty(rows, columns, device=DEVICE, dtype=torch.bfloat16).normal_()
    y, _, mean, _ = cuda_impl.layer_norm_forward(x, None, None, 1e-5, None)
    for part in (slice(0, 64), slice(2**21 - 32, 2**21 + 5)):
        truth = reference.layer_norm(x[part].double(), None, None, 1e-5, None)[0].cpu()
        plain = reference.layer_norm(x[part], None, None, 1e-5, None)[0]
        assert judge("y", y[part], truth, plain).ok
        torch.testing.assert_close(mean[part], x[part].float().mean(-1), rtol=1e-4, atol=1e-5)
