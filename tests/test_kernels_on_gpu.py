"""Kernels on a real GPU: in captured graphs, on side streams, on another than the current device; bits and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import transfuse
from conftest import skip_unless
from transfuse.backends import why_not
from transfuse.errors import BackendError
from transfuse.ops.rotary import rotary_embedding

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

Op = Callable[..., torch.Tensor]
LENGTHS = [5, 128, 67]
DECODE = [3, 200]


@pytest.fixture(params=["triton", "cuda"])
def kernels(request: pytest.FixtureRequest) -> str:
    """The backends that have kernels."""
    skip_unless(why_not(request.param, torch.device("cuda")))
    return str(request.param)


def leaves(*shapes: tuple[int, ...], device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


def cases(device: str = "cuda") -> dict[str, tuple[Op, list[torch.Tensor]]]:
    """name -> (op of tensors and keywords, tensors); every op that has kernels."""
    starts = torch.tensor([0, *LENGTHS], device=device).cumsum(0, dtype=torch.int32)
    filled = torch.tensor(DECODE, device=device)
    total = sum(LENGTHS)
    mask = torch.rand(2, 1, 1, 128, device=device) > 0.3

    def weights(q: torch.Tensor, k: torch.Tensor, **options: Any) -> torch.Tensor:
        lse = transfuse.attention(q, k, k, return_lse=True, **options)[1].detach()
        return transfuse.attention_weights(q, k, lse, **options)

    return {
        "attention": (transfuse.attention, leaves(*[(2, 4, 128, 64)] * 3, device=device)),
        "attention_masked": (
            lambda q, k, v, bias, **options: transfuse.attention(q, k, v, mask=mask, bias=bias, **options),
            leaves((2, 4, 100, 96), (2, 2, 128, 96), (2, 2, 128, 96), (1, 4, 100, 128), device=device),
        ),
        "attention_weights": (weights, leaves((2, 4, 33, 64), (2, 2, 130, 64), device=device)),
        "attention_varlen": (
            lambda q, k, v, **options: transfuse.attention_varlen(
                q, k, v, starts, starts, max(LENGTHS), max(LENGTHS), causal=True, **options
            ),
            leaves(*[(total, 4, 64)] * 3, device=device),
        ),
        "attention_decode": (
            lambda q, k, v, **options: transfuse.attention_decode(q, k, v, filled, **options),
            leaves((2, 8, 1, 64), (2, 2, 256, 64), (2, 2, 256, 64), device=device),
        ),
        "causal_softmax": (transfuse.causal_softmax, leaves((2, 4, 100, 100), device=device)),
        "layer_norm": (transfuse.layer_norm, leaves((300, 768), (768,), (768,), device=device)),
        "rms_norm": (transfuse.rms_norm, leaves((300, 768), (768,), device=device)),
        "ffn": (transfuse.ffn, leaves((65, 96), (160, 96), (160,), (96, 160), (96,), device=device)),
        "linear_act": (transfuse.linear_act, leaves((65, 96), (160, 96), (160,), device=device)),
        "rotary_embedding": (
            lambda q, angle, **options: rotary_embedding(
                q, None, angle.detach().cos(), angle.detach().sin(), **options
            )[0],
            leaves((2, 50, 4, 64), (1, 50, 1, 64), device=device),
        ),
    }


NAMES = [
    "attention",
    "attention_masked",
    "attention_weights",
    "attention_varlen",
    "attention_decode",
    "causal_softmax",
    "layer_norm",
    "rms_norm",
    "ffn",
    "linear_act",
    "rotary_embedding",
]


def both_ways(op: Op, tensors: list[torch.Tensor], dout: torch.Tensor | None, **options: Any) -> list[torch.Tensor]:
    """The output and the gradients of all tensors."""
    out = op(*tensors, **options)
    dout = torch.ones_like(out) if dout is None else dout
    return [out, *torch.autograd.grad(out, tensors, dout, allow_unused=True, materialize_grads=True)]


def run_or_skip(name: str, backend: str, device: str = "cuda") -> tuple[Op, list[torch.Tensor], list[torch.Tensor]]:
    """(op, tensors, its results on the current stream); skips where the backend lacks the op."""
    op, tensors = cases(device)[name]
    try:
        return op, tensors, both_ways(op, tensors, None, backend=backend)
    except BackendError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_captures_forward_and_backward(name: str, kernels: str) -> None:
    op, static, first = run_or_skip(name, kernels)
    dout = torch.randn_like(first[0])
    with torch.cuda.stream(torch.cuda.Stream()):  # compiles
        both_ways(op, static, dout, backend=kernels)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_ways(op, static, dout, backend=kernels)
    for _ in range(3):
        fresh = [torch.randn_like(t).requires_grad_() for t in static]
        with torch.no_grad():
            for s, f in zip(static, fresh, strict=True):
                s.copy_(f)
        graph.replay()
        for got, want in zip(captured, both_ways(op, fresh, dout, backend=kernels), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["attention", "attention_varlen", "attention_decode", "ffn"])
def test_replays_of_a_graph_drop_differently(name: str, kernels: str) -> None:
    op, tensors, _ = run_or_skip(name, kernels)
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        op(*tensors, dropout_p=0.5, backend=kernels)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = op(*tensors, dropout_p=0.5, backend=kernels)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


@pytest.mark.parametrize("name", NAMES)
def test_a_launch_goes_to_the_current_stream(name: str, kernels: str) -> None:
    op, tensors, expected = run_or_skip(name, kernels)
    late = [torch.zeros_like(t).requires_grad_() for t in tensors]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for t, given in zip(late, tensors, strict=True):
                t.copy_(given)
        found = both_ways(op, late, None, backend=kernels)  # on any other stream it would read zeros
    torch.cuda.synchronize()
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_runs_give_the_same_bits(name: str, kernels: str) -> None:
    op, tensors, expected = run_or_skip(name, kernels)
    different = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(1000):
        for got, want in zip(both_ways(op, tensors, None, backend=kernels), expected, strict=True):
            different += (got != want).sum()
    assert int(different) == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_a_device_that_is_not_current(name: str, kernels: str) -> None:
    with torch.cuda.device(0):
        op, tensors, found = run_or_skip(name, kernels, "cuda:1")
        assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        for got, want in zip(found, both_ways(op, tensors, None, backend=kernels), strict=True):
            assert torch.equal(got, want)


def test_peak_memory_grows_with_length_and_not_with_its_square(kernels: str) -> None:
    def peak(length: int) -> int:
        tensors = leaves(*[(2, 4, length, 64)] * 3)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both_ways(transfuse.attention, tensors, None, causal=True, backend=kernels)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    assert peak(8192) <= 4.5 * peak(2048)
