"""causal_softmax on every backend: values, gradients, masks, empty rows, strides, errors, registration."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from causal_softmax_cases import CAUSAL, DTYPES, INF, NAN, from_saved_probabilities, run
from causal_softmax_cases import name_of as _id
from conftest import skip_unless
from oracle import check
from transfuse.errors import ArgumentError, BackendError, DeviceError, DtypeError
from transfuse.ops.causal_softmax import _diagonal, _why_not, causal_softmax, reference, torch_impl

SHAPES = [(2, 3, 17, 17), (1, 2, 5, 111), (3, 64, 8), (1, 1), (2, 1, 1, 300), (2, 128, 128)]
EMPTY = [(0, 4, 4), (2, 0, 5), (2, 5, 0), (0, 0)]
OP = torch.ops.transfuse.causal_softmax


@pytest.mark.parametrize("causal", CAUSAL, ids=_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize("shape", SHAPES, ids=_id)
def test_values_and_gradients(shape, dtype, causal, backend, device, poisoned):
    run({"scores": torch.randn(shape, device=device).mul(4).to(dtype)}, backend, causal=causal)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    "mask, bias",
    [
        ((2, 1, 1, 9), None),
        ((2, 3, 7, 9), None),
        ((9,), (3, 7, 9)),
        ((), ()),
        (None, (1, 3, 7, 9)),
        (None, (2, 1, 1, 9)),
        (None, (7, 1)),
        ((2, 1, 7, 1), (2, 3, 7, 9)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_id)
def test_masks_and_biases_of_every_shape(mask, bias, dtype, causal, backend, device, poisoned):
    tensors = {"scores": torch.randn(2, 3, 7, 9, device=device).to(dtype)}
    if mask is not None:
        tensors["mask"] = torch.rand(mask, device=device) > 0.4
    if bias is not None:
        tensors["bias"] = torch.randn(bias, device=device).to(dtype)
    run(tensors, backend, causal=causal)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=_id)
def test_fp32_bias_on_low_precision_scores(dtype, backend, device):
    # Here alone the formulas, promoted to fp32 by the bias, know the probabilities better than what a kernel saves.
    scores = torch.randn(2, 4, 12, 12, device=device).to(dtype)
    bias = torch.randn(4, 12, 12, device=device)
    formulas = reference.causal_softmax if backend == "torch" else from_saved_probabilities
    run({"scores": scores, "bias": bias}, backend, formulas=formulas)


# --- rows that see nothing, and values that hurt --------------------------------------------------------------------


def blind_rows(kind, device):
    """Tensors of 2x6x8 scores whose rows 2 and 3 of the first matrix see nothing."""
    scores = torch.randn(2, 6, 8, device=device)
    if kind == "mask":
        mask = torch.ones(2, 6, 8, dtype=torch.bool, device=device)
        mask[0, 2:4] = False
        return {"scores": scores, "mask": mask}
    if kind == "bias":
        bias = torch.randn(2, 6, 8, device=device)
        bias[0, 2:4] = -INF
        return {"scores": scores, "bias": bias}
    scores[0, 2:4] = -INF
    return {"scores": scores}


@pytest.mark.parametrize("kind", ["mask", "bias", "scores"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_a_row_that_sees_nothing_is_zero_with_a_zero_gradient(kind, causal, backend, device):
    tensors = blind_rows(kind, device)
    run(tensors, backend, causal=causal)
    tensors = {"mask": None, "bias": None, **tensors}
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items() if t is not None and t.is_floating_point()}
    out = causal_softmax(
        leaves["scores"], causal=causal, mask=tensors["mask"], bias=leaves.get("bias"), backend=backend
    )
    out.backward(torch.randn_like(out))
    assert out[0, 2:4].eq(0).all()
    assert out[0, 4].sum() > 0.99
    for leaf in leaves.values():
        assert leaf.grad.isfinite().all()
        assert leaf.grad[0, 2:4].eq(0).all()


def test_lower_right_with_more_queries_than_keys(backend, device):
    # The first three queries come before every key.
    tensors = {"scores": torch.randn(2, 8, 5, device=device)}
    run(tensors, backend, causal="lower_right")
    out = causal_softmax(tensors["scores"], causal="lower_right", backend=backend)
    assert out[:, :3].eq(0).all()
    assert out[:, 3, 0].eq(1).all()


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_hidden_scores_are_never_looked_at(value, backend, device):
    scores = torch.randn(2, 6, 6, device=device)
    future = torch.ones(6, 6, dtype=torch.bool, device=device).triu(1)
    hurt = scores.masked_fill(future, value).requires_grad_()
    skip_unless(_why_not(backend, scores, None, None))
    out = causal_softmax(hurt, scale=0.5, backend=backend)
    torch.testing.assert_close(out, causal_softmax(scores, scale=0.5, backend=backend))
    out.backward(torch.randn_like(out))
    assert hurt.grad.isfinite().all()


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
def test_a_seen_nan_or_infinity_spoils_its_row_alone(value, backend, device):
    scores = torch.randn(2, 6, 6, device=device)
    scores[1, 3, 2] = value
    skip_unless(_why_not(backend, scores, None, None))
    out = causal_softmax(scores, backend=backend)
    assert out[1, 3, :4].isnan().all()
    rest = torch.ones(2, 6, dtype=torch.bool, device=device)
    rest[1, 3] = False
    assert torch.equal(out[rest], causal_softmax(scores.nan_to_num(0, 0, 0), backend=backend)[rest])


@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_lowest_finite_bias_is_not_minus_infinity(dtype, backend, device):
    # finfo.min swallows the score in fp32; in fp16 finfo.min + score would overflow to -inf if it were not widened.
    scores = torch.randn(2, 4, 6, device=device).mul(20).to(dtype)
    bias = torch.full((4, 6), torch.finfo(dtype).min, device=device, dtype=dtype)
    skip_unless(_why_not(backend, scores, None, bias))
    out = causal_softmax(scores, causal=False, bias=bias, backend=backend)
    assert (out.float().sum(-1) - 1).abs().max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_large_scores_do_not_overflow(dtype, backend, device):
    run({"scores": (torch.randn(4, 33, 33, device=device) * 1e4).to(dtype)}, backend, scale=1.0)


# --- shapes and layouts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(-1, -2),
        lambda x: x[:, ::2, ::2],
        lambda x: x[:, 1:, 3:],
        lambda x: x[:1].expand(5, -1, -1),
        lambda x: x[..., :1].expand(-1, -1, 12),
        lambda x: x[..., 4:],
        lambda x: x[..., 1:9],
        lambda x: x.permute(2, 1, 0),
    ],
    ids=["transposed", "step2", "offset", "expanded_batch", "expanded_keys", "aligned", "misaligned", "permuted"],
)
def test_strides(view, backend, device, poisoned):
    x = lambda: view(torch.randn(4, 12, 12, device=device))  # noqa: E731
    run({"scores": x(), "mask": x() > -1, "bias": x()}, backend, dout=x())


@pytest.mark.parametrize("shape", EMPTY, ids=_id)
def test_empty(shape, backend, device):
    scores = torch.randn(shape, device=device, requires_grad=True)
    bias = torch.randn(shape[-1:], device=device, requires_grad=True)
    skip_unless(_why_not(backend, scores, None, bias))
    out = causal_softmax(scores, bias=bias, backend=backend)
    out.sum().backward()
    assert out.shape == scores.grad.shape == shape
    assert bias.grad.eq(0).all()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lead=st.lists(st.integers(1, 4), max_size=2),
    q_len=st.integers(1, 40),
    k_len=st.integers(1, 80),
    dtype=st.sampled_from(DTYPES),
    causal=st.sampled_from(CAUSAL),
    scale=st.sampled_from([1.0, 0.125, -0.7, 0.0, 3.0]),
    masked=st.sampled_from([None, 0.05, 0.5, 1.0]),
    biased=st.booleans(),
    data=st.data(),
)
def test_any_shape(lead, q_len, k_len, dtype, causal, scale, masked, biased, data, backend, device):
    shape = (*lead, q_len, k_len)

    def part():
        keep = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
        return tuple(n if k else 1 for n, k in zip(shape, keep, strict=True))[data.draw(st.integers(0, len(shape))) :]

    tensors = {"scores": torch.randn(shape, device=device).mul(3).to(dtype)}
    if masked is not None:
        tensors["mask"] = torch.rand(part(), device=device) < masked
    if biased:
        tensors["bias"] = torch.randn(part(), device=device).to(dtype)
    run(tensors, backend, causal=causal, scale=scale)


# --- the plain path and the registered op ---------------------------------------------------------------------------


def doubles(*shapes):
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("causal", CAUSAL, ids=_id)
def test_gradcheck_twice(causal):
    scores, bias = doubles((2, 3, 2), (2,))
    mask = torch.tensor([[[True, True]], [[True, False]]])
    diagonal = _diagonal(scores, causal)
    functions = [
        lambda s, b: causal_softmax(s, scale=0.7, causal=causal, mask=mask, bias=b),
        lambda s, b: OP(s, 0.7, diagonal, mask, b, "torch"),
        lambda s, b: OP(s, 0.7, diagonal, mask, None, "torch"),
        lambda s, b: torch_impl._selecting(s, 0.7, diagonal, mask, b),
    ]
    for function in functions:
        assert torch.autograd.gradcheck(function, (scores, bias))
        assert torch.autograd.gradgradcheck(function, (scores, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_id)
def test_opcheck(dtype):
    scores = torch.randn(2, 6, 3, 5, dtype=dtype).transpose(1, 2).requires_grad_()  # (2, 3, 6, 5), strided
    bias, mask = torch.randn(1, 6, 5, dtype=dtype, requires_grad=True), torch.rand(2, 1, 1, 5) > 0.4
    torch.library.opcheck(OP.default, (scores, 0.3, -1, mask, bias, "torch"))
    torch.library.opcheck(OP.default, (scores, 0.3, None, None, None, "torch"))
    out = OP(scores, 0.3, 0, mask, bias, "torch").detach().requires_grad_()
    dout = torch.randn(2, 6, 3, 5, dtype=dtype).transpose(1, 2).requires_grad_()
    backward = torch.ops.transfuse.causal_softmax_backward.default
    torch.library.opcheck(backward, (dout, out, 0.3, 0, bias, "torch"))
    torch.library.opcheck(backward, (dout, out, 0.3, 0, None, "torch"))


@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_registered_op_agrees_with_the_reference(dtype):
    tensors = {
        "scores": torch.randn(2, 3, 9, 9).to(dtype),
        "mask": torch.rand(9) > 0.3,
        "bias": torch.randn(3, 1, 9).to(dtype),
    }
    check(
        lambda scores, scale, causal, mask, bias: OP(scores, scale, 0, mask, bias, "torch"),
        reference.causal_softmax,
        tensors,
        grads=["scores", "bias"],
        scale=0.4,
        causal=True,
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_whole(dynamic):
    mask = torch.tensor([True, True, False, True, True])

    def step(scores, bias):
        first = causal_softmax(scores, scale=0.25, causal="lower_right", mask=mask, bias=bias)
        return first + OP(scores, 0.25, 0, mask, bias, "torch")

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for rows in (3, 7) if dynamic else (3,):
        scores, bias = torch.randn(2, rows, 5, requires_grad=True), torch.randn(5, requires_grad=True)
        got, expected = compiled(scores, bias), step(scores, bias)
        torch.testing.assert_close(got, expected)
        grad = torch.randn_like(got)
        for g, e in zip(*(torch.autograd.grad(o, (scores, bias), grad) for o in (got, expected)), strict=True):
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


def test_traces_without_looking_at_values():
    x = torch.randn(2, 5, 5)
    scaled = lambda s: causal_softmax(s, scale=s.shape[-1] ** -0.5)  # noqa: E731
    for symbolic in ("real", "fake", "symbolic"):
        traced = make_fx(scaled, tracing_mode=symbolic)(x)
        torch.testing.assert_close(traced(-x), scaled(-x))
    with FakeTensorMode():
        assert causal_softmax(torch.empty(3, 4, 6)).shape == (3, 4, 6)
    assert causal_softmax(torch.empty(3, 4, 6, device="meta")).device.type == "meta"

    class Module(torch.nn.Module):
        def forward(self, s):
            return scaled(s)

    length = torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(Module(), (x,), dynamic_shapes=({1: length, 2: length},)).module()
    longer = torch.randn(2, 9, 9)
    torch.testing.assert_close(exported(longer), scaled(longer))
    compiled = torch.compile(scaled, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(longer), scaled(longer))


def test_transforms():
    x = torch.randn(4, 3, 6, 6)
    expected = causal_softmax(x)
    torch.testing.assert_close(torch.func.vmap(causal_softmax)(x), expected)
    got = torch.func.vmap(torch.func.grad(lambda s: causal_softmax(s)[..., 0].sum()))(x)
    leaf = x.clone().requires_grad_()
    causal_softmax(leaf)[..., 0].sum().backward()
    torch.testing.assert_close(got, leaf.grad)
    _, tangent = torch.func.jvp(causal_softmax, (x[0],), (torch.ones_like(x[0]),))
    assert tangent.abs().max() < 1e-6  # softmax does not see a common shift


@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_autocast_leaves_the_dtype(dtype):
    scores = torch.randn(2, 5, 5).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = causal_softmax(scores, scale=0.3)
        blind = causal_softmax(scores, mask=torch.zeros((), dtype=torch.bool))
    assert got.dtype == blind.dtype == dtype
    assert torch.equal(got, causal_softmax(scores, scale=0.3))


def test_little_is_saved_for_backward():
    scores = torch.randn(4, 64, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        causal_softmax(scores, scale=0.5, mask=torch.rand(4, 1, 64) > 0.1)
    assert sum(t.numel() * t.element_size() for t in saved) <= scores.numel() * scores.element_size()
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        OP(scores, 0.5, 0, None, None, "torch")
    assert [t.shape for t in saved] == [scores.shape]


def test_inputs_are_left_alone():
    scores, bias, mask = torch.randn(2, 5, 5), torch.randn(5, 5), torch.rand(5, 5) > 0.5
    before = scores.clone(), bias.clone(), mask.clone()
    for scale in (1.0, 0.5):
        for b in (None, bias):
            for m in (None, mask):
                causal_softmax(scores, scale=scale, mask=m, bias=b)
    assert all(torch.equal(a, b) for a, b in zip((scores, bias, mask), before, strict=True))


# --- mistakes -------------------------------------------------------------------------------------------------------

S = torch.randn(2, 4, 6)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: causal_softmax([1.0]), DtypeError, "scores must be a tensor, got list"),
        (lambda: causal_softmax(S.int()), DtypeError, "scores must be float32.*got int32"),
        (
            lambda: causal_softmax(torch.ones(3)),
            ArgumentError,
            r"scores must have shape \(..., q_len, k_len\), got",
        ),
        (lambda: causal_softmax(S, scale=NAN), ArgumentError, "scale must be a finite number, got nan"),
        (lambda: causal_softmax(S, scale=math.inf), ArgumentError, "scale must be a finite number, got inf"),
        (lambda: causal_softmax(S, scale=None), ArgumentError, "scale must be a finite number, got None"),
        (
            lambda: causal_softmax(S, causal="top"),
            ArgumentError,
            "causal must be True, False or 'lower_right', got",
        ),
        (lambda: causal_softmax(S, mask=torch.ones(6)), DtypeError, "mask must be a bool tensor.*got float32"),
        (lambda: causal_softmax(S, mask=[True]), DtypeError, "mask must be a bool tensor.*got list"),
        (lambda: causal_softmax(S, mask=torch.ones(4) > 0), ArgumentError, r"mask must broadcast to shape \(2, 4, 6\)"),
        (lambda: causal_softmax(S, bias=torch.ones(3, 1, 1)), ArgumentError, r"bias must broadcast to .*got \(3, 1, 1"),
        (lambda: causal_softmax(S, bias=torch.ones(1, 2, 4, 6)), ArgumentError, "bias must broadcast to"),
        (lambda: causal_softmax(S, bias=torch.ones(6).half()), DtypeError, "bias must be float32 .*got float16"),
        (
            lambda: causal_softmax(S.half(), bias=torch.ones(6).bfloat16()),
            DtypeError,
            "bias must be float16 or flo",
        ),
        (lambda: causal_softmax(S, bias=torch.ones(6, device="meta")), DeviceError, "bias must be on cpu like scores"),
        (
            lambda: causal_softmax(S, mask=torch.ones(6, device="meta") > 0),
            DeviceError,
            "mask must be on cpu like s",
        ),
        (lambda: causal_softmax(S, backend="tpu"), BackendError, "unknown backend 'tpu'"),
        (
            lambda: causal_softmax(S.double(), backend="cuda"),
            BackendError,
            "causal_softmax: backend 'cuda' cannot run",
        ),
        (
            lambda: causal_softmax(S.double(), backend="triton"),
            BackendError,
            "causal_softmax: backend 'triton' cannot run",
        ),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
