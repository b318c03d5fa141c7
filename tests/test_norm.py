"""layer_norm and rms_norm on every backend: values, gradients, strides, empties, errors, registration."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import skip_unless
from oracle import check
from transfuse import layer_norm, rms_norm
from transfuse.errors import ArgumentError, BackendError, DeviceError, DtypeError
from transfuse.ops import norm
from transfuse.ops.norm import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(4, 64), (3, 5, 111), (2, 1), (1, 768), (7, 1000), (2, 8192), (2, 10007), (64,)]
EMPTY = [(0, 16), (3, 0, 16), (0,), (4, 0)]
_id = lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else str(v).removeprefix("torch.")  # noqa: E731


def inputs(shape, dtype, device, *, weights=None, residual=False, scale=1.0):
    weights = dtype if weights is None else weights
    hidden = shape[-1:]
    return {
        "x": (torch.randn(shape, device=device) * scale + 0.5).to(dtype),
        "weight": torch.randn(hidden, device=device).to(weights),
        "bias": torch.randn(hidden, device=device).to(weights),
        "residual": torch.randn(shape, device=device).to(dtype) if residual else None,
    }


def run(kind, tensors, backend, grads=("x", "weight", "bias", "residual"), **options):
    """check() on one of the two norms; rms_norm has no bias."""
    tensors = dict(tensors)
    if kind == "rms_norm":
        tensors.pop("bias")
    skip_unless(norm._why_not(backend, tensors["x"], tensors["weight"]))
    grads = [g for g in grads if g in tensors]
    op, formula = (layer_norm, reference.layer_norm) if kind == "layer_norm" else (rms_norm, reference.rms_norm)
    both = tensors["residual"] is not None
    eps = options.get("eps", 1e-5)

    def spec(x, residual=None, **parameters):
        if residual is None:
            return formula(x=x, residual=None, **parameters)[0]
        # s is rounded to x's dtype whatever the precision of the evaluation; its gradient is that of the sum.
        exact = x + residual
        s = exact + (exact.detach().to(tensors["x"].dtype).to(exact.dtype) - exact.detach())
        return formula(x=s, residual=None, **parameters)[0], s

    grad_outputs = [torch.randn_like(tensors["x"]) for _ in range(1 + both)]
    sizes = (
        aten_sizes(tensors, grad_outputs, eps)
        if backend == "torch"
        else intermediates(kind, tensors, grad_outputs, eps)
    )
    return check(
        lambda **kw: op(**kw, backend=backend),
        spec,
        tensors,
        grads=grads,
        names=("y", "summed") if both else ("y",),
        grad_outputs=grad_outputs,
        sizes=sizes,
        eps=eps,
    )


def intermediates(kind, tensors, grad_outputs, eps):
    """Sizes at which our kernels round: the mean at that of s, the weights' gradients at that of a sum over rows."""
    s = tensors["x"].double() if tensors["residual"] is None else tensors["x"].double() + tensors["residual"].double()
    centred = s - s.mean(-1, keepdim=True) if kind == "layer_norm" else s
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    size = s.abs().amax(-1) * rstd
    gain = 1.0 if tensors["weight"] is None else tensors["weight"].abs().max().item()
    g = max(t.abs().max().item() for t in grad_outputs)
    dx = g * gain * (rstd * size.clamp(min=1.0)).max().item()
    total = g * rstd.numel()
    size = size.max().item()
    return {"y": size * gain, "dx": dx, "dresidual": dx, "dweight": total * size, "dbias": total}


def aten_sizes(tensors, grad_outputs, eps):
    """Intermediates of ATen's layer norm: it folds the mean into multiply-adds (x * rstd - mean * rstd; in backward
    g * rstd + b * x + c with b of size g * x * rstd^3), so it rounds at their size and not at that of the result.
    """
    x = tensors["x"].double() if tensors["residual"] is None else tensors["x"].double() + tensors["residual"].double()
    rstd = ((x - x.mean(-1, keepdim=True)).square().mean(-1) + eps).rsqrt().max().item()
    size = x.abs().max().item() * rstd
    gain = 1.0 if tensors["weight"] is None else tensors["weight"].abs().max().item()
    g = max(t.abs().max().item() for t in grad_outputs)
    dx = g * gain * rstd * max(1.0, size) ** 2
    rows = x.numel() // x.shape[-1]
    return {"y": size * gain, "dx": dx, "dresidual": dx, "dweight": g * size * rows}


@pytest.fixture(params=["layer_norm", "rms_norm"])
def kind(request):
    return request.param


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize("shape", SHAPES, ids=_id)
def test_values_and_gradients(kind, shape, dtype, residual, backend, device, poisoned):
    run(kind, inputs(shape, dtype, device, residual=residual), backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=_id)
def test_fp32_weights_on_a_low_precision_input(kind, dtype, backend, device, poisoned):
    run(kind, inputs((5, 96), dtype, device, weights=torch.float32, residual=True), backend)


def test_without_parameters(kind, backend, device):
    run(kind, {**inputs((5, 48), torch.float32, device), "weight": None, "bias": None}, backend)


def test_large_offset_does_not_cancel(backend, device):
    # A one-pass variance (E[x^2] - E[x]^2) loses every digit here.
    tensors = inputs((4, 512), torch.float32, device)
    tensors["x"] = tensors["x"] + 3e3
    run("layer_norm", tensors, backend)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, :, ::2],
        lambda x: x[:, 1:, 3:],
        lambda x: x[:1].expand(6, -1, -1),
        lambda x: x[..., :1].expand(-1, -1, 40),
    ],
    ids=["transposed", "step2", "offset", "expanded_rows", "expanded_hidden"],
)
def test_strides(kind, view, backend, device, poisoned):
    x = view(torch.randn(4, 6, 40, device=device))
    tensors = inputs(tuple(x.shape), torch.float32, device)
    run(kind, {**tensors, "x": x, "residual": view(torch.randn(4, 6, 40, device=device))}, backend)


def test_strided_grad_output(kind, backend, device):
    tensors = inputs((4, 6, 40), torch.float32, device)
    tensors.pop("residual")
    if kind == "rms_norm":
        tensors.pop("bias")
    skip_unless(norm._why_not(backend, tensors["x"], tensors["weight"]))
    op, formula = (layer_norm, reference.layer_norm) if kind == "layer_norm" else (rms_norm, reference.rms_norm)
    for grad in (torch.randn(40, 6, 4, device=device).permute(2, 1, 0), torch.randn(1, 1, 1).expand(4, 6, 40)):
        check(
            lambda **kw: op(**kw, backend=backend),
            lambda **kw: formula(**kw, residual=None)[0],
            tensors,
            grads=list(tensors),
            grad_outputs=[grad.to(device)],
            eps=1e-5,
        )


@pytest.mark.parametrize("shape", EMPTY, ids=_id)
def test_empty(kind, shape, backend, device):
    tensors = inputs(shape, torch.float32, device, residual=True)
    op = layer_norm if kind == "layer_norm" else rms_norm
    if kind == "rms_norm":
        tensors.pop("bias")
    skip_unless(norm._why_not(backend, tensors["x"], tensors["weight"]))
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    y, summed = op(**leaves, backend=backend)
    (y.sum() + summed.sum()).backward()
    assert y.shape == summed.shape == shape
    assert not leaves["weight"].grad.isnan().any()
    if shape[-1]:
        assert leaves["weight"].grad.eq(0).all()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.integers(1, 5), max_size=3),
    hidden=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    residual=st.booleans(),
    parameters=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    name=st.sampled_from(["layer_norm", "rms_norm"]),
)
def test_any_shape(rows, hidden, dtype, residual, parameters, scale, name, backend, device):
    tensors = inputs((*rows, hidden), dtype, device, residual=residual, scale=scale)
    if not parameters:
        tensors.update(weight=None, bias=None)
    run(name, tensors, backend)


# --- what kernels do with rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", [(150, 24), (70, 100), (23, 1032), (3, 16640)], ids=_id)
def test_more_rows_than_programs(kind, shape, residual, backend, device, poisoned):
    """Rows that no tile size divides, over several rounds of every program; narrow, wide, and wider than registers."""
    run(kind, inputs(shape, torch.float16, device, residual=residual), backend)


@pytest.mark.parametrize("given", [("weight",), ("bias",)], ids=_id)
@pytest.mark.parametrize("hidden", [40, 8200])
def test_one_parameter(given, hidden, backend, device, poisoned):
    tensors = inputs((5, hidden), torch.float32, device)
    run("layer_norm", {n: t if n in given or n == "x" else None for n, t in tensors.items()}, backend)


def test_more_programs_than_two_dimensions_of_a_grid_take(kind, backend, device):
    if device.type == "cpu":
        pytest.skip("as many programs take minutes without a GPU")
    skip_unless(norm._why_not(backend, torch.empty(1, device=device), None))
    x = torch.randn(70_000, 2056, dtype=torch.float16, device=device)  # one row a program
    op = layer_norm if kind == "layer_norm" else rms_norm
    parameters = (None, None) if kind == "layer_norm" else (None,)
    rows = torch.tensor([0, 65_535, 65_536, 69_999], device=device)
    y = op(x, *parameters, backend=backend)
    assert torch.equal(y[rows], op(x[rows], *parameters, backend=backend))


def test_gradients_repeat_to_the_bit(kind, backend, device, poisoned):
    tensors = inputs((37, 200), torch.bfloat16, device)
    dout = torch.randn(37, 200, device=device).to(torch.bfloat16)
    if kind == "rms_norm":
        tensors.pop("bias")
    tensors.pop("residual")
    skip_unless(norm._why_not(backend, tensors["x"], tensors["weight"]))
    op = layer_norm if kind == "layer_norm" else rms_norm
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    first = torch.autograd.grad(op(**leaves, backend=backend), list(leaves.values()), dout)
    for _ in range(3):
        again = torch.autograd.grad(op(**leaves, backend=backend), list(leaves.values()), dout)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_kernels_take_no_fp64(name):
    if name == "triton":
        pytest.importorskip("triton")
    assert "got float64" in norm._why_not(name, X.double(), None)


# --- the plain path and the registered op ---------------------------------------------------------------------------


def doubles(*shapes):
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def test_gradcheck_twice():
    x, w, b, r = doubles((3, 7), 7, 7, (3, 7))
    ops = torch.ops.transfuse
    functions = {
        "layer_norm": lambda *a: layer_norm(a[0], a[1], a[2], 1e-5, a[3]),
        "rms_norm": lambda *a: rms_norm(a[0], a[1], 1e-5, a[3]),
        "op layer_norm": lambda *a: ops.layer_norm(a[0], a[1], a[2], 1e-5, a[3], "torch")[:2],
        "op rms_norm": lambda *a: ops.rms_norm(a[0], a[1], 1e-5, a[3], "torch")[:2],
    }
    for function in functions.values():
        used = (x, w, b, r)
        assert torch.autograd.gradcheck(function, used)
        assert torch.autograd.gradgradcheck(function, used)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_id)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_opcheck(dtype, residual):
    t = inputs((2, 3, 16), dtype, "cpu", residual=residual)
    for v in t.values():
        if v is not None:
            v.requires_grad_()
    x = t["x"].transpose(0, 1)
    r = None if t["residual"] is None else t["residual"].transpose(0, 1)
    ops = torch.ops.transfuse
    torch.library.opcheck(ops.layer_norm.default, (x, t["weight"], t["bias"], 1e-5, r, "torch"))
    torch.library.opcheck(ops.layer_norm.default, (x, None, None, 1e-5, r, "torch"))
    torch.library.opcheck(ops.rms_norm.default, (x, t["weight"], 1e-5, r, "torch"))
    dout, dsummed = torch.randn_like(x).contiguous(), None if r is None else torch.randn_like(r)
    _, _, mean, rstd = ops.layer_norm(x, t["weight"], t["bias"], 1e-5, None, "torch")
    saved = (x.detach(), t["weight"].detach(), t["bias"].detach(), mean.detach(), rstd.detach(), 1e-5, "torch")
    torch.library.opcheck(ops.layer_norm_backward.default, (dout, dsummed, *saved))
    saved = (x.detach(), t["weight"].detach(), rstd.detach(), 1e-5, "torch")
    torch.library.opcheck(ops.rms_norm_backward.default, (dout, dsummed, *saved))


def test_registered_op_agrees_with_the_reference(kind):
    tensors = inputs((5, 33), torch.bfloat16, "cpu", residual=True)
    ops = torch.ops.transfuse
    if kind == "rms_norm":
        tensors.pop("bias")
        op = lambda x, weight, residual, eps: ops.rms_norm(x, weight, eps, residual, "torch")[:2]  # noqa: E731
        formula = reference.rms_norm
    else:
        op = lambda x, weight, bias, residual, eps: ops.layer_norm(x, weight, bias, eps, residual, "torch")[:2]  # noqa: E731
        formula = reference.layer_norm
    check(op, formula, tensors, grads=list(tensors), names=("y", "summed"), eps=1e-5)


def test_matches_torch():
    x, w, b = torch.randn(6, 50), torch.randn(50), torch.randn(50)
    assert torch.equal(layer_norm(x, w, b), F.layer_norm(x, (50,), w, b))
    assert torch.equal(rms_norm(x, w, 1e-6), F.rms_norm(x, (50,), w, 1e-6))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_whole(dynamic):
    def step(x, w, b, r):
        y, s = layer_norm(x, w, b, 1e-5, r)
        return rms_norm(y, w) * 2 + s + torch.ops.transfuse.layer_norm(y, w, b, 1e-5, None, "torch")[0]

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for rows in (3, 5):
        x, r = torch.randn(rows, 24, requires_grad=True), torch.randn(rows, 24)
        w, b = torch.randn(24, requires_grad=True), torch.randn(24)
        got, expected = compiled(x, w, b, r), step(x, w, b, r)
        torch.testing.assert_close(got, expected)
        for g, e in zip(*(torch.autograd.grad(o.sum(), (x, w)) for o in (got, expected)), strict=True):
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


def test_autocast_computes_in_fp32(kind):
    x, w = torch.randn(4, 16, dtype=torch.bfloat16), torch.randn(16, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer_norm(x, w, w) if kind == "layer_norm" else rms_norm(x, w)
    expected = layer_norm(x.float(), w.float(), w.float()) if kind == "layer_norm" else rms_norm(x.float(), w.float())
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)


def test_autocast_takes_a_stream_of_another_dtype():
    x, r, w = torch.randn(4, 16, dtype=torch.bfloat16), torch.randn(4, 16), torch.randn(16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, summed = layer_norm(x, w, w, residual=r)
    assert torch.equal(summed, x.float() + r)


def test_meta_tensors(kind):
    x, w = torch.empty(3, 8, device="meta"), torch.empty(8, device="meta")
    y = layer_norm(x, w, None) if kind == "layer_norm" else rms_norm(x, w)
    assert (y.shape, y.device.type) == (x.shape, "meta")


# --- mistakes -------------------------------------------------------------------------------------------------------


X, W = torch.randn(2, 8), torch.randn(8)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: layer_norm(X, torch.ones(5), None), ArgumentError, r"weight must have shape \(8,\), got \(5,\)"),
        (lambda: layer_norm(X, W, torch.ones(2, 8)), ArgumentError, r"bias must have shape \(8,\), got \(2, 8\)"),
        (
            lambda: layer_norm(X, W, W, residual=X[:1]),
            ArgumentError,
            r"residual must have shape \(2, 8\), got \(1, 8\)",
        ),
        (lambda: layer_norm(X, W, W, eps=-1.0), ArgumentError, "eps must be at least 0 and finite, got -1.0"),
        (lambda: layer_norm(X, W, W, eps=float("nan")), ArgumentError, "eps must be .* got nan"),
        (lambda: layer_norm(X, W, W, eps=None), ArgumentError, "eps must be .* got None"),
        (lambda: rms_norm(X, W, "small"), ArgumentError, "eps must be .* got 'small'"),
        (lambda: layer_norm(X, [1.0] * 8, None), DtypeError, "weight must be a tensor of shape .*, got list"),
        (lambda: rms_norm(X, W.numpy()), DtypeError, "weight must be a tensor of shape .*, got ndarray"),
        (lambda: layer_norm(X, W, W, residual=1.0), DtypeError, "residual must be a tensor of shape .*, got float"),
        (lambda: layer_norm(torch.tensor(1.0), None, None), ArgumentError, "at least one dimension"),
        (lambda: layer_norm(X.int(), W, W), DtypeError, "x must be float32.*got int32"),
        (lambda: layer_norm([1.0], W, W), DtypeError, "x must be a tensor, got list"),
        (lambda: layer_norm(X, W.half(), None), DtypeError, "weight must be float32 .*got float16"),
        (lambda: layer_norm(X.half(), W.half(), W), DtypeError, "bias must be float16 .*weight's dtype.*got float32"),
        (lambda: rms_norm(X, W, residual=X.half()), DtypeError, "residual must be float32"),
        (lambda: layer_norm(X, W.to("meta"), None), DeviceError, "weight must be on cpu like x, got meta"),
        (lambda: layer_norm(X, W, W, backend="tpu"), BackendError, "unknown backend 'tpu': expected one of cuda"),
        (lambda: rms_norm(X.double(), W, backend="triton"), BackendError, "rms_norm: backend 'triton' cannot run this"),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
