"""ffn and linear_act on every backend: values, gradients, gates, dropout, strides, autocast, errors, registration."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from conftest import device_of, skip_unless
from oracle import check
from transfuse.backends import why_not
from transfuse.errors import ArgumentError, BackendError, DeviceError, DtypeError
from transfuse.ops._philox import keep_mask
from transfuse.ops.ffn import ACTIVATIONS, _why_not, ffn, linear_act, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [((3, 5), 16, 40), ((2, 7), 33, 57), ((1,), 64, 256), ((), 8, 24), ((2, 1, 3), 1, 1), ((130,), 96, 200)]
OPS = torch.ops.transfuse
PARAMETERS = ("w1", "b1", "w2", "b2", "w_gate")
_id = lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else str(v).removeprefix("torch.")  # noqa: E731


def inputs(rows, d, d_ff, dtype=torch.float32, device="cpu", *, gated=False, biases=True):
    def random(*shape, fan_in=1):
        return (torch.randn(shape, device=device) / fan_in**0.5).to(dtype)

    return {
        "x": random(*rows, d),
        "w1": random(d_ff, d, fan_in=d),
        "b1": random(d_ff) if biases else None,
        "w2": random(d, d_ff, fan_in=d_ff),
        "b2": random(d) if biases else None,
        "w_gate": random(d_ff, d, fan_in=d) if gated else None,
    }


def run(tensors, backend, activation="gelu", **options):
    """Judge ffn and all its gradients against the formulas."""
    skip_unless(_why_not(backend, "ffn", *tensors.values()))
    return check(
        lambda **kw: ffn(**kw, backend=backend),
        reference.ffn,
        tensors,
        grads=[n for n, t in tensors.items() if t is not None],
        activation=activation,
        **options,
    )


def run_linear(tensors, backend, activation, **options):
    """Judge linear_act on x, w1 and b1."""
    x, w, b = tensors["x"], tensors["w1"], tensors["b1"]
    skip_unless(_why_not(backend, "linear_act", x, w))
    return check(
        lambda **kw: linear_act(**kw, backend=backend),
        reference.linear_act,
        {"x": x, "w": w, "b": b},
        grads=["x", "w"] + ["b"] * (b is not None),
        activation=activation,
        **options,
    )


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_values_and_gradients(dtype, activation, gated, backend, device, poisoned):
    run(inputs((2, 9), 24, 56, dtype, device, gated=gated), backend, activation)


@pytest.mark.parametrize("rows, d, d_ff", SHAPES, ids=lambda v: _id(v) if isinstance(v, tuple) else str(v))
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_shapes(rows, d, d_ff, gated, backend, device, poisoned):
    run(inputs(rows, d, d_ff, device=device, gated=gated), backend, "silu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_linear_act(dtype, activation, backend, device, poisoned):
    run_linear(inputs((3, 7), 20, 48, dtype, device), backend, activation)
    run_linear(inputs((), 20, 48, dtype, device, biases=False), backend, activation)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_without_biases(gated, backend, device):
    run(inputs((4, 3), 12, 30, device=device, gated=gated, biases=False), backend)


def test_activations_far_out(backend, device):
    # erf and sigmoid saturate here; gelu of -30 must be -0 and not NaN, its gradient 0.
    tensors = {"x": torch.linspace(-60, 60, 121, device=device)[:, None], "w1": torch.ones(1, 1, device=device)}
    for activation in ACTIVATIONS:
        run_linear({**tensors, "b1": None}, backend, activation)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, :, ::2],
        lambda x: x[:, 1:, 3:],
        lambda x: x[:1].expand(6, -1, -1),
        lambda x: x[..., :1].expand(-1, -1, 20),
    ],
    ids=["transposed", "step2", "offset", "expanded_rows", "expanded_hidden"],
)
def test_strides(view, backend, device, poisoned):
    random = lambda: view(torch.randn(4, 6, 40, device=device))  # noqa: E731
    x = random()
    tensors = inputs(tuple(x.shape[:-1]), x.shape[-1], 26, device=device, gated=True)
    tensors.update(x=x, w1=tensors["w1"].T.contiguous().T, w2=torch.randn(x.shape[-1], 52, device=device)[:, ::2])
    run(tensors, backend, grad_outputs=[random()])
    run_linear(tensors, backend, "gelu", grad_outputs=[torch.randn(26, *x.shape[:-1]).permute(1, 2, 0).to(device)])


@pytest.mark.parametrize("rows, d, d_ff", [((0,), 4, 6), ((2, 0), 4, 6), ((3,), 4, 0), ((3,), 0, 5)], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_empty(rows, d, d_ff, gated, backend, device):
    tensors = inputs(rows, d, d_ff, device=device, gated=gated)
    skip_unless(_why_not(backend, "ffn", *tensors.values()))
    leaves = {n: None if t is None else t.requires_grad_() for n, t in tensors.items()}
    out = ffn(**leaves, backend=backend)
    out.sum().backward()
    assert out.shape == (*rows, d)
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values() if leaf is not None)
    if d_ff == 0:
        assert torch.equal(out, leaves["b2"].expand(out.shape))
    assert linear_act(leaves["x"], leaves["w1"], leaves["b1"], backend=backend).shape == (*rows, d_ff)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.integers(1, 5), max_size=3),
    # With fewer columns plain PyTorch's own error, which sets the budget, is a matter of luck.
    d=st.integers(4, 40),
    d_ff=st.integers(8, 90),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    gated=st.booleans(),
    biases=st.booleans(),
)
def test_any_shape(rows, d, d_ff, dtype, activation, gated, biases, backend, device):
    run(inputs(tuple(rows), d, d_ff, dtype, device, gated=gated, biases=biases), backend, activation)


# --- dropout --------------------------------------------------------------------------------------------------------


def dropped(out, h):
    """Which inner activations were dropped, read off an ffn whose second layer is the identity."""
    return out.eq(0) & h.ne(0)


def test_dropout_drops_its_share_and_scales_the_rest(backend, device):
    t = inputs((300,), 64, 64, device=device, biases=False)
    t["w2"] = torch.eye(64, device=device)
    skip_unless(_why_not(backend, "ffn", t["x"], t["w1"]))
    h = ffn(**t, backend=backend)
    out = ffn(**t, dropout_p=0.3, backend=backend)
    gone = dropped(out, h)
    torch.testing.assert_close(out[~gone], h[~gone] / 0.7)
    # 19200 independent draws: four standard deviations of the mean
    assert abs(gone.double().mean().item() - 0.3) < 4 * (0.3 * 0.7 / h.numel()) ** 0.5
    assert not torch.equal(gone, dropped(ffn(**t, dropout_p=0.3, backend=backend), h))


def test_dropout_follows_the_generator(backend, device):
    t = inputs((5,), 8, 32, device=device)
    skip_unless(_why_not(backend, "ffn", t["x"], t["w1"]))
    torch.manual_seed(7)
    first = ffn(**t, dropout_p=0.5, backend=backend)
    torch.manual_seed(7)
    assert torch.equal(first, ffn(**t, dropout_p=0.5, backend=backend))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_dropout_of_the_registered_op_is_replayed_in_backward(dtype, gated, backend, device, poisoned):
    seed, p = torch.tensor([123456789012345, 7], device=device), 0.6
    tensors = inputs((4, 9), 12, 83, dtype, device, gated=gated)
    skip_unless(_why_not(backend, "ffn", *tensors.values()))
    keep = keep_mask(seed, p, 1, 1, 36, 83, device).view(4, 9, 83)

    def op(x, w1, b1, w2, b2, w_gate):
        return OPS.ffn(x, w1, b1, w2, b2, w_gate, "gelu", p, seed, True, backend)[0]

    def formula(**kw):
        scale = keep.to(kw["x"]) / (1 - p)
        return reference.ffn(**kw, activation="gelu", dropout_scale=scale)

    check(op, formula, tensors, grads=[n for n, t in tensors.items() if t is not None])


# --- the plain path and the registered op ---------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_gradcheck_twice(activation, gated):
    t = inputs((2,), 2, 3, torch.float64, gated=gated)
    names = [n for n, v in t.items() if v is not None]
    leaves = [t[n].requires_grad_() for n in names]
    seed = torch.tensor([5, 6])

    def named(a):
        return {"b1": None, "b2": None, "w_gate": None, **dict(zip(names, a, strict=True))}

    def registered(*a):
        n = named(a)
        order = (n["x"], n["w1"], n["b1"], n["w2"], n["b2"], n["w_gate"])
        return OPS.ffn(*order, activation, 0.3, seed, True, "torch")[0]

    functions = [
        lambda *a: ffn(**named(a), activation=activation),
        registered,
        lambda *a: OPS.linear_act(*a[:3], activation, True, "torch")[0],
    ]
    for function in functions[: 2 if gated else 3]:
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("full", [False, True], ids=["plain", "gated-biases-dropout"])
def test_opcheck_ffn(full):
    t = inputs((3, 2), 6, 10, torch.bfloat16 if full else torch.float32, gated=full, biases=full)
    t["x"] = t["x"].transpose(0, 1)
    x, w1, b1, w2, b2, w_gate = (None if v is None else v.requires_grad_() for v in t.values())
    rest = ("silu", 0.3, torch.tensor([5, 6])) if full else ("relu", 0.0, None)
    torch.library.opcheck(OPS.ffn.default, (x, w1, b1, w2, b2, w_gate, *rest, True, "torch"))
    _, up, gate = OPS.ffn(x, w1, b1, w2, b2, w_gate, *rest, True, "torch")
    dout = torch.randn(3, 2, 6, dtype=x.dtype).transpose(0, 1).requires_grad_()
    needs = [True] * 6 if full else [False, True, False, True, False, False]
    args = (dout, x, w1, b1, w2, b2, w_gate, up, gate, *rest, needs, "torch")
    torch.library.opcheck(OPS.ffn_backward.default, args)
    if full:
        frozen = [None if v is None else v.detach() for v in (x, w1, b1, w2, b2, w_gate)]
        torch.library.opcheck(OPS.ffn.default, (*frozen, *rest, False, "torch"))


def test_opcheck_on_triton():
    device = device_of("triton")
    skip_unless(why_not("triton", device))
    t = inputs((3, 2), 6, 10, device=device, gated=True)
    x, w1, b1, w2, b2, w_gate = (v.requires_grad_() for v in t.values())
    x = x.transpose(0, 1)
    rest = ("silu", 0.3, torch.tensor([5, 6], device=device))
    torch.library.opcheck(OPS.ffn.default, (x, w1, b1, w2, b2, w_gate, *rest, True, "triton"))
    torch.library.opcheck(OPS.linear_act.default, (x, w1, b1, "gelu", True, "triton"))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_opcheck_linear_act(bias):
    t = inputs((2, 3), 6, 10, biases=bias)
    x, w, b = (None if t[n] is None else t[n].requires_grad_() for n in ("x", "w1", "b1"))
    torch.library.opcheck(OPS.linear_act.default, (x, w, b, "gelu", True, "torch"))
    z = OPS.linear_act(x, w, b, "gelu", True, "torch")[1]
    args = (torch.randn(2, 3, 10), x, w, b, z, "gelu", [True, not bias, bias], "torch")
    torch.library.opcheck(OPS.linear_act_backward.default, args)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_registered_ops_agree_with_the_reference(dtype, activation, gated):
    tensors = inputs((3, 4), 10, 22, dtype, gated=gated)
    check(
        lambda x, w1, b1, w2, b2, w_gate, activation: OPS.ffn(
            x, w1, b1, w2, b2, w_gate, activation, 0.0, None, True, "torch"
        )[0],
        reference.ffn,
        tensors,
        grads=[n for n, t in tensors.items() if t is not None],
        activation=activation,
    )
    check(
        lambda x, w, b, activation: OPS.linear_act(x, w, b, activation, True, "torch")[0],
        reference.linear_act,
        {"x": tensors["x"], "w": tensors["w1"], "b": tensors["b1"]},
        grads=["x", "w", "b"],
        activation=activation,
    )


def test_registered_op_saves_the_preactivations_alone(backend, device):
    t = inputs((8,), 4, 64, device=device, gated=True)
    leaves = [t[n].requires_grad_() for n in ("x", *PARAMETERS)]
    skip_unless(_why_not(backend, "ffn", *leaves))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        out, up, gate = OPS.ffn(*leaves, "silu", 0.0, None, True, backend)
    assert sum(s.numel() for s in saved if s.shape == (8, 64)) == 2 * 8 * 64
    torch.testing.assert_close(up, F.linear(t["x"], t["w1"], t["b1"]))
    torch.testing.assert_close(gate, F.linear(t["x"], t["w_gate"]))
    with torch.no_grad():
        unsaved = OPS.ffn(*leaves, "silu", 0.0, None, False, backend)
    assert [o.numel() for o in unsaved] == [32, 0, 0]
    assert torch.equal(unsaved[0], out)


@pytest.mark.parametrize("rows, d", [(2, 72), (40, 24)], ids=["split", "whole"])
def test_the_same_bits_every_time(rows, d, backend, device):
    t = inputs((rows,), d, 70, device=device, gated=True)
    skip_unless(_why_not(backend, "ffn", *t.values()))
    leaves = [v.requires_grad_() for v in t.values()]
    dout = torch.randn(rows, d, device=device)
    first, second = (torch.autograd.grad(ffn(**t, backend=backend), leaves, dout) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_triton_with_torchs_matmul_for_what_is_not_fused(dtype, gated, monkeypatch, poisoned):
    triton_impl = pytest.importorskip("transfuse.ops.ffn.triton_impl")
    device = device_of("triton")
    skip_unless(why_not("triton", device))
    asked = []
    monkeypatch.setattr(triton_impl, "use_cublas", lambda *shape: asked.append(shape[:3]) or True)
    run(inputs((3, 7), 20, 44, dtype, device, gated=gated), "triton")
    # out, dw2, dw1, and dw_gate or dx: the two products of the gated dx are one kernel
    assert sorted(asked) == sorted([(21, 20, 44), (20, 44, 21), (44, 20, 21), (44, 20, 21) if gated else (21, 20, 44)])
    run_linear(inputs((3, 7), 20, 44, dtype, device), "triton", "gelu")


def test_triton_refuses_fp64():
    t = inputs((2,), 4, 6, torch.float64)
    skip_unless(why_not("triton", torch.device("cpu")))
    with pytest.raises(BackendError, match=r"takes float32, float16 or bfloat16, got float64"):
        ffn(**t, backend="triton")
    with pytest.raises(BackendError, match=r"linear_act: .*got float64"):
        linear_act(t["x"], t["w1"], None, backend="triton")


def test_relu_of_infinities(backend, device):
    x = torch.tensor([[float("-inf")], [float("inf")], [float("nan")], [-0.0], [2.0]], device=device)
    w = torch.ones(1, 1, device=device)
    skip_unless(_why_not(backend, "linear_act", x, w))
    expected = torch.tensor([[0.0], [float("inf")], [float("nan")], [0.0], [2.0]], device=device)
    torch.testing.assert_close(linear_act(x, w, None, "relu", backend=backend), expected, equal_nan=True)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("trained", [*PARAMETERS, "x"])
def test_frozen_parameters_get_no_gradient(trained, gated, backend, device, poisoned):
    t = inputs((3,), 6, 8, device=device, gated=gated)
    if t[trained] is None:
        pytest.skip("not gated")
    skip_unless(_why_not(backend, "ffn", *t.values()))
    seed = torch.tensor([3, 4], device=device)
    scale = keep_mask(seed, 0.5, 1, 1, 3, 8, device).view(3, 8) / 0.5
    t[trained].requires_grad_()
    out = OPS.ffn(*t.values(), "gelu", 0.5, seed, True, backend)[0]
    (got,) = torch.autograd.grad(out.square().sum(), t[trained])
    (expected,) = torch.autograd.grad(reference.ffn(**t, dropout_scale=scale).square().sum(), t[trained])
    torch.testing.assert_close(got, expected)
    untrained = [n for n, v in t.items() if v is not None and not v.requires_grad]
    needs = [n == trained for n in t]
    up, gate = OPS.ffn(*t.values(), "gelu", 0.5, seed, True, backend)[1:]
    found = OPS.ffn_backward(out.detach(), *t.values(), up, gate, "gelu", 0.5, seed, needs, backend)
    assert all(g.numel() == 0 for n, g in zip(t, found, strict=True) if n in untrained)


def test_matches_torch():
    t = inputs((6, 5), 16, 48, gated=True)
    x, w1, b1, w2, b2, w_gate = (t[n] for n in ("x", *PARAMETERS))
    assert torch.equal(ffn(x, w1, b1, w2, b2), F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2))
    expected = F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w1, b1), w2, b2)
    assert torch.equal(ffn(x, w1, b1, w2, b2, activation="silu", w_gate=w_gate), expected)
    assert torch.equal(linear_act(x, w1, b1, "gelu_tanh"), F.gelu(F.linear(x, w1, b1), approximate="tanh"))


def test_inputs_are_left_alone():
    t = inputs((6, 5), 16, 48, gated=True)
    before = {n: v.clone() for n, v in t.items()}
    for activation in ACTIVATIONS:
        ffn(**t, activation=activation)
        ffn(**{**t, "w_gate": None}, activation=activation)
        linear_act(t["x"], t["w1"], None, activation)
    assert all(torch.equal(before[n], t[n]) for n in t)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_whole(dynamic):
    def step(x, w1, b1, w2, b2, w_gate):
        plain = ffn(x, w1, b1, w2, b2)
        gated = ffn(plain, w1, None, w2, None, activation="silu", w_gate=w_gate)
        registered = OPS.ffn(x, w1, b1, w2, b2, w_gate, "relu", 0.0, None, True, "torch")[0]
        return gated + registered + linear_act(x, w1, b1, "gelu_tanh").sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for rows in (3, 5) if dynamic else (3,):
        t = {n: v.requires_grad_() for n, v in inputs((rows,), 8, 20, gated=True).items()}
        got, expected = compiled(**t), step(**t)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        grads = (torch.autograd.grad(o.sum(), list(t.values())) for o in (got, expected))
        for g, e in zip(*grads, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-3)


def test_transforms():
    t = {n: v for n, v in inputs((3, 4), 8, 12, gated=True).items() if n in ("x", "w1", "w2", "w_gate")}

    def apply(x, w1, w2, w_gate):
        return ffn(x, w1, None, w2, None, activation="silu", w_gate=w_gate) + ffn(x, w1, None, w2, None)

    expected = apply(**t)
    args = list(t.values())
    for i, name in enumerate(t):
        stacked = [a[None].expand(2, *a.shape) if j == i else a for j, a in enumerate(args)]
        got = torch.func.vmap(apply, in_dims=tuple(0 if j == i else None for j in range(4)))(*stacked)
        torch.testing.assert_close(got, expected.expand(2, *expected.shape), msg=name)
    torch.testing.assert_close(make_fx(apply)(*args)(*args), expected)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")

    class Module(torch.nn.Module):
        def forward(self, x):
            return apply(x, *args[1:])

    exported = torch.export.export(Module(), (args[0],), dynamic_shapes=({0: batch, 1: length},)).module()
    longer = torch.randn(5, 7, 8)
    torch.testing.assert_close(exported(longer), apply(longer, *args[1:]))


def test_autocast_computes_in_the_autocast_dtype():
    t = inputs((4, 3), 8, 20, gated=True)
    t["x"] = t["x"].bfloat16()  # what an attention under autocast hands over, beside fp32 weights
    low = {n: v.bfloat16() for n, v in t.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, one = ffn(**t), linear_act(t["x"], t["w1"], t["b1"])
    assert got.dtype == one.dtype == torch.bfloat16
    assert torch.equal(got, ffn(**low))
    assert torch.equal(one, linear_act(low["x"], low["w1"], low["b1"]))


# --- mistakes -------------------------------------------------------------------------------------------------------

X, W1, B1, W2, B2 = (v for v in inputs((2, 3), 4, 6).values() if v is not None)
DOUBLES = [t.double() for t in (X, W1, B1, W2, B2)]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: ffn([1.0], W1, B1, W2, B2), DtypeError, "x must be a tensor, got list"),
        (lambda: ffn(X.int(), W1, B1, W2, B2), DtypeError, "x must be float32.*got int32"),
        (lambda: ffn(torch.tensor(1.0), W1, B1, W2, B2), ArgumentError, "x must have at least one dimension"),
        (
            lambda: ffn(X, W1[0], B1, W2, B2),
            ArgumentError,
            r"w1 must have two dimensions \(out, in\), got",
        ),
        (lambda: ffn(X, W1.T, B1, W2, B2), ArgumentError, r"w1 must have shape \(4, 4\), got \(4, 6\)"),
        (lambda: ffn(X, W1, B2, W2, B2), ArgumentError, r"b1 must have shape \(6,\), got \(4,\)"),
        (lambda: ffn(X, W1, B1, W1, B2), ArgumentError, r"w2 must have shape \(4, 6\), got \(6, 4\)"),
        (lambda: ffn(X, W1, B1, W2, B1), ArgumentError, r"b2 must have shape \(4,\), got \(6,\)"),
        (lambda: ffn(X, W1, B1, W2, B2, w_gate=W2), ArgumentError, r"w_gate must have shape \(6, 4\), got \(4, 6\)"),
        (
            lambda: ffn(X, W1, B1, W2, B2, activation="swish"),
            ArgumentError,
            "one of relu, gelu, gelu_tanh, silu, got",
        ),
        (
            lambda: ffn(X, W1, B1, W2, B2, dropout_p=1.0),
            ArgumentError,
            "dropout_p must be at least 0 and below 1",
        ),
        (lambda: ffn(X, W1, B1, W2, B2, dropout_p="a"), ArgumentError, "dropout_p must be .* got 'a'"),
        (lambda: ffn(X, W1, B1, None, B2), DtypeError, "w2 must be a tensor, got NoneType"),
        (lambda: ffn(X.half(), W1, B1, W2, B2), DtypeError, "w1 must be float16 .*autocast.*got float32"),
        (lambda: ffn(X, W1, B1, W2.bfloat16(), B2), DtypeError, "w2 must be float32 .*got bfloat16"),
        (lambda: ffn(X, W1, B1, W2, B2.to("meta")), DeviceError, "b2 must be on cpu like x, got meta"),
        (lambda: ffn(X, W1, B1, W2, B2, backend="tpu"), BackendError, "unknown backend 'tpu'"),
        (lambda: ffn(*DOUBLES, backend="triton"), BackendError, "ffn: backend 'triton' cannot run this call: "),
        (lambda: linear_act(X, W2, B1), ArgumentError, r"linear_act: w must have shape \(4, 4\), got \(4, 6\)"),
        (lambda: linear_act(X, W1, B2), ArgumentError, r"linear_act: b must have shape \(6,\), got \(4,\)"),
        (lambda: linear_act(X, W1, B1, "tanh"), ArgumentError, "linear_act: activation must be one of .*got 'tanh'"),
        (lambda: linear_act(X, W1.half(), B1), DtypeError, "linear_act: w must be float32 .*got float16"),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
