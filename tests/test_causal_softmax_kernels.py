"""What only kernels of causal_softmax can get wrong: long rows, many dimensions, split sums; and what they refuse."""

from __future__ import annotations

import pytest
import torch

from causal_softmax_cases import INF, NAN, run
from causal_softmax_cases import name_of as _id
from conftest import cuda_on_cpu, device_of, skip_unless
from transfuse import _extension
from transfuse.backends import why_not
from transfuse.ops.causal_softmax import _why_not, causal_softmax


def test_many_dimensions(backend, device, poisoned):
    # Ten dimensions, permuted, none of which can be joined with its neighbour in all three.
    shape = (1, 2, 1, 3, 2, 1, 2, 2, 2, 6)
    scores = torch.randn(shape[::-1], device=device).permute(*range(9, -1, -1))
    mask = torch.rand(2, 1, 3, 2, 1, 1, 2, 2, 6, device=device) > 0.3
    run({"scores": scores, "mask": mask, "bias": torch.randn(3, 1, 1, 2, 1, 1, 6, device=device)}, backend)


@pytest.mark.parametrize("bias", [(8, 3, 5), (3, 5), (5,), (3, 1), (8, 1, 5), ()], ids=str)
def test_a_bias_gradient_is_summed_in_a_fixed_order(bias, backend, device, poisoned):
    # 8 matrices: enough for the sum over them to be split among programs
    scores, bias = torch.randn(8, 3, 5, device=device), torch.randn(bias, device=device)
    run({"scores": scores, "bias": bias}, backend, causal=len(bias.shape) % 2 == 1)
    leaf, dout = bias.requires_grad_(), torch.randn_like(scores)
    first, second = (
        torch.autograd.grad(causal_softmax(scores, bias=leaf, backend=backend), leaf, dout)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def short_rows_only(monkeypatch, columns):
    """Make a kernel take rows of more columns for too long to be kept in registers."""
    triton_impl = pytest.importorskip("transfuse.ops.causal_softmax.triton_impl")
    monkeypatch.setattr(triton_impl, "MOST_COLUMNS", columns)


@pytest.mark.parametrize(
    "dtype, causal, mask, bias",
    [
        (torch.float32, True, None, None),
        (torch.bfloat16, False, (2, 1, 13), (2, 5, 13)),
        (torch.bfloat16, "lower_right", (13,), (5, 13)),
        (torch.float32, True, (5, 1), (13,)),
        (torch.float16, True, (), (5, 1)),
        (torch.bfloat16, "lower_right", None, ()),
    ],
    ids=_id,
)
def test_triton_rows_too_long_for_registers(dtype, mask, bias, causal, poisoned, monkeypatch):
    device = device_of("triton")
    skip_unless(why_not("triton", device))
    short_rows_only(monkeypatch, 4)
    tensors = {"scores": torch.randn(2, 5, 13, device=device).mul(3).to(dtype)}
    if mask is not None:
        tensors["mask"] = torch.rand(mask, device=device) > 0.3
    if bias is not None:
        tensors["bias"] = torch.randn(bias, device=device).to(dtype)
    run(tensors, "triton", causal=causal)


@pytest.mark.parametrize(
    "dtype, k_len, bias",
    [
        (torch.float16, 4096, (2, 4096)),
        (torch.bfloat16, 8200, (2, 1)),
        (torch.bfloat16, 16392, (2, 16392)),
        (torch.float32, 20001, (20001,)),
    ],
    ids=_id,
)
def test_long_rows(dtype, k_len, bias, backend, device, poisoned):
    scores = torch.randn(2, 2, k_len, device=device).to(dtype)
    bias = torch.randn(bias, device=device).to(dtype)
    mask = torch.rand(k_len, device=device) > 0.5
    run({"scores": scores, "mask": mask, "bias": bias}, backend, causal="lower_right")
    if backend == "triton":
        leaf = scores.requires_grad_()
        out = causal_softmax(leaf, backend=backend)
        out.sum().backward()  # the gradient comes in with strides of 0
        assert out[:, 0, 1:].eq(0).all()
        assert leaf.grad[:, 0].eq(0).all()


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
def test_long_rows_and_values_that_hurt(value, backend, device, monkeypatch):
    if backend == "triton":
        short_rows_only(monkeypatch, 4)
    scores = torch.randn(10, 10, device=device)
    skip_unless(_why_not(backend, scores, None, None))
    scores[5, 6:] = value  # hidden
    scores[7, :8] = -INF  # nothing else to see
    scores[9, 5:7] = value  # seen
    out = causal_softmax(scores, backend=backend)
    assert out[9].isnan().all()
    assert out[7].eq(0).all()
    assert out[:9].isfinite().all()
    assert out[5].sum() > 0.99


def test_what_kernels_do_not_take():
    pytest.importorskip("triton")
    for backend in ("triton", "cuda"):
        assert _why_not(backend, torch.ones(3, 3), None, None) is None
        assert "got float64" in _why_not(backend, torch.ones(3, 3).double(), None, None)
    many = torch.ones(*[2] * 8, 3)
    assert "up to 7 dimensions" in _why_not("cuda", many, None, None)
    assert _why_not("triton", many, None, None) is None


def test_launchers_refuse_what_their_kernels_cannot_take(monkeypatch):
    if _extension.why_not() is not None:
        cuda_on_cpu(monkeypatch)
    kernels, view = _extension.kernels(), _extension.view
    scores, out, mask = torch.ones(4, 8), torch.ones(4, 8), torch.ones(4, 8) > 0

    def forward(scores=scores, mask=mask, out=out, query=0):
        kernels.causal_softmax_forward(view(scores), view(mask), None, view(out), 1.0, query, 0, (0, 0))

    def backward(sums, group_dims=1, a_chunk=1):
        tensors = view(out), view(scores), view(out)
        kernels.causal_softmax_backward(*tensors, view(sums), group_dims, a_chunk, 1.0, 0, 0, (0, 0))

    with pytest.raises(
        ValueError, match=r"causal_softmax_forward: tensors must have the same sizes.*out float32 \(4, 9\)"
    ):
        forward(out=torch.ones(4, 9))
    with pytest.raises(ValueError, match="tensors must share a dtype"):
        forward(mask=scores)
    with pytest.raises(ValueError, match="outputs must have contiguous keys"):
        forward(out=torch.ones(8, 4).t())
    with pytest.raises(ValueError, match="the first tensor must be float32"):
        forward(scores=mask)
    with pytest.raises(ValueError, match="the dimension of queries"):
        forward(query=1)
    with pytest.raises(ValueError, match=r"sums must be \(chunks, groups, keys or 1\)"):
        backward(torch.ones(2, 4, 8))
    with pytest.raises(ValueError, match="sums must be contiguous"):
        backward(torch.ones(1, 8, 8)[:, ::2])
    with pytest.raises(ValueError, match="a chunk has at least one member"):
        backward(None, a_chunk=0)
