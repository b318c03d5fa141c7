"""Triton on a real GPU: launches captured in graphs, on side streams, on devices that are not current; their memory."""

from __future__ import annotations

import pytest
import torch

import transfuse

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
OPTIONS = {"causal": True, "backend": "triton"}


def qkv(length: int = 128, device: str = "cuda") -> list[torch.Tensor]:
    return [torch.randn(2, 4, length, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


def test_a_graph_captures_forward_and_backward():
    static, dout = qkv(), torch.randn(2, 4, 128, 64, device="cuda", dtype=torch.bfloat16)
    with torch.cuda.stream(torch.cuda.Stream()):  # compiles
        torch.autograd.grad(transfuse.attention(*static, **OPTIONS), static, dout)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = transfuse.attention(*static, **OPTIONS)
        grads = torch.autograd.grad(out, static, dout)
    for _ in range(3):
        fresh = qkv()
        with torch.no_grad():
            for s, f in zip(static, fresh, strict=True):
                s.copy_(f)
        graph.replay()
        expected = transfuse.attention(*fresh, **OPTIONS)
        assert torch.equal(out, expected)
        for got, want in zip(grads, torch.autograd.grad(expected, fresh, dout), strict=True):
            assert torch.equal(got, want)


def test_replays_of_a_graph_drop_differently():
    q, k, v = (t.detach() for t in qkv())
    with torch.cuda.stream(torch.cuda.Stream()):
        transfuse.attention(q, k, v, dropout_p=0.5, **OPTIONS)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = transfuse.attention(q, k, v, dropout_p=0.5, **OPTIONS)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


def test_a_launch_goes_to_the_current_stream():
    x = torch.zeros(1 << 14, 1024, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.add_(torch.arange(1024, device="cuda"))
        y = transfuse.layer_norm(x, None, None, backend="triton")  # on any other stream it would read zeros
    torch.cuda.synchronize()
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (1024,)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_a_device_that_is_not_current():
    with torch.cuda.device(0):
        q, k, v = qkv(device="cuda:1")
        out = transfuse.attention(q, k, v, **OPTIONS)
        assert torch.cuda.current_device() == 0
    torch.testing.assert_close(out, transfuse.attention(q, k, v, causal=True, backend="torch"), rtol=2e-2, atol=2e-2)


def test_peak_memory_grows_with_length_and_not_with_its_square():
    def peak(length: int) -> int:
        inputs = qkv(length)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = transfuse.attention(*inputs, **OPTIONS)
        torch.autograd.grad(out, inputs, torch.ones_like(out))
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    assert peak(8192) <= 4.5 * peak(2048)
