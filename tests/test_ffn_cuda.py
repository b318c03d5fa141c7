"""What only the CUDA products of ffn can get wrong: every tile, layout and split, torch's matmul instead, bad calls."""

from __future__ import annotations

import pytest
import torch

import transfuse
from conftest import cuda_on_cpu, device_of, skip_unless
from oracle import check
from test_ffn import DTYPES, inputs, run, run_linear
from transfuse import _extension
from transfuse.backends import why_not
from transfuse.ops import _tuning
from transfuse.ops.ffn import cuda_plans, cuda_product, ffn, linear_act
from transfuse.ops.ffn.cuda_plans import CUBLAS, FORWARD, INPUT, WEIGHT, Plan
from transfuse.ops.ffn.cuda_product import Ends

_id = lambda v: str(v).removeprefix("torch.")  # noqa: E731
LAYOUTS = {FORWARD: "x wT", INPUT: "dy w", WEIGHT: "dyT x"}
PLANS = [Plan(tile, splits) for tile in (0, 1, 2) for splits in (1, 3)]


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """The kernels' device: the GPU where there is one, else the CPU through their stand-in."""
    if not torch.cuda.is_available() and not _extension.on_cpu():
        cuda_on_cpu(monkeypatch)
    skip_unless(why_not("cuda", device_of("cuda")))
    return device_of("cuda")


@pytest.fixture
def force(monkeypatch):
    """Makes every product run by one plan; those of weights' gradients have one tile alone."""

    def to(plan):
        def chosen(M, N, K, dtype, kind, layout, device, cublas):
            return plan._replace(tile=0) if layout == WEIGHT and plan.tile != CUBLAS else plan

        monkeypatch.setattr(cuda_plans, "choose", chosen)

    return to


def matrices(layout, M, N, K, dtype, device):
    """a (M, K) and b (K, N), lying in memory as the layout says, in rows of whole 16 bytes or not."""

    def stored(rows, columns):
        return (torch.randn(rows, columns, device=device) / K**0.25).to(dtype)

    a = stored(K, M).T if layout == WEIGHT else stored(M, K)
    return {"a": a, "b": stored(N, K).T if layout == FORWARD else stored(K, N)}


def plain_product(a, b):
    return a @ b


@pytest.mark.parametrize(
    "layout, plan",
    [(layout, plan) for layout in LAYOUTS for plan in PLANS if layout != WEIGHT or plan.tile == 0],
    ids=lambda v: f"tile{v.tile}-splits{v.splits}" if isinstance(v, Plan) else LAYOUTS[v],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_every_tile(dtype, layout, plan, device, force, poisoned):
    force(plan)
    # Ten rows of the smallest tiles are more than one group of them; K ends within a step, N within 16 bytes.
    for M, N, K in ((147 if plan.tile == 2 else 136, 133, 83), (16, 8, 200)):
        tensors = matrices(layout, M, N, K, dtype, device)
        assert cuda_product._layout(*tensors.values()) == layout
        check(cuda_product.matmul, plain_product, tensors)


@pytest.mark.parametrize("plan", [*PLANS, Plan(CUBLAS, 1)], ids=lambda p: f"tile{p.tile}-splits{p.splits}")
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_every_end(gated, plan, device, force, poisoned):
    force(plan)
    dtype = DTYPES[plan.splits % 3]
    run(inputs((70,), 40, 72, dtype, device, gated=gated), "cuda", "gelu_tanh")
    run(inputs((5,), 33, 57, dtype, device, gated=gated, biases=False), "cuda", "silu")
    run_linear(inputs((19,), 24, 36, dtype, device), "cuda", "gelu")


def test_long_sums(device, poisoned):
    # fp32's error stays of fp32's class over thousands of products.
    check(cuda_product.matmul, plain_product, matrices(FORWARD, 4, 24, 6000, torch.float32, device))


@pytest.mark.parametrize("plan", [Plan(2, 4), Plan(0, 1)], ids=["split", "whole"])
def test_infinities(plan, device, force):
    force(plan)
    a = torch.tensor([[float("inf"), 1.1, 1.0], [1.0, 2.0, float("nan")], [-1.0, -float("inf"), 0.3]], device=device)
    b = torch.tensor([[1.0, -1.1, 0.0], [1.0, 1.0, 1.7], [-5.0, 0.1, 2.0]], device=device)
    torch.testing.assert_close(cuda_product.matmul(a, b), a @ b, equal_nan=True)


def test_a_view_of_an_aligned_tensor_is_not_copied(device):
    wide = torch.randn(6, 64, device=device)
    assert cuda_product.aligned(wide[:, :21]).data_ptr() == wide.data_ptr()
    for copied in (wide[:, 1:], wide.T, wide[:, ::2], torch.randn(6, 21, device=device)):
        stored = cuda_product.aligned(copied)
        assert torch.equal(stored, copied)
        assert cuda_product.fits(stored)


@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_what_is_beside_the_rows_is_left_alone(dtype, device):
    # Padding of an operand is never read, that of an output never written.
    x = torch.full((20, 48), float("nan"), device=device, dtype=dtype)
    x[:, :37] = 1.0
    out = torch.full((20, 32), 7.0, device=device, dtype=dtype)
    w = torch.ones(29, 40, device=device, dtype=dtype)[:, :37]
    cuda_product.product(x[:, :37], w.T, Ends(out=out[:, :29]), activation="relu")
    assert (out[:, :29] == 37).all()
    assert (out[:, 29:] == 7).all()


def test_the_same_bits_however_often(device):
    t = inputs((24,), 40, 200, device=device, gated=True)
    leaves = [v.requires_grad_() for v in t.values()]
    dout = torch.randn(24, 40, device=device)
    first, *others = (torch.autograd.grad(ffn(**t, backend="cuda"), leaves, dout) for _ in range(4))
    assert all(torch.equal(f, o) for other in others for f, o in zip(first, other, strict=True))


def test_measured_plans_take_the_place_of_chosen_ones(device, monkeypatch):
    monkeypatch.setattr(_tuning, "_tables", {})
    x, w = torch.randn(20, 64, device=device), torch.randn(40, 64, device=device)
    before = linear_act(x, w, None, backend="cuda")
    ran = []
    monkeypatch.setattr(cuda_product, "_launch", lambda *a, launch=cuda_product._launch: ran.append(a[1]) or launch(*a))
    # The first candidate beyond the choice is called twice as fast as everything else.
    times = iter([2.0, 1.0])
    monkeypatch.setattr(_tuning, "_median", lambda run, device: (run(), next(times, 3.0))[1])
    (measured,) = transfuse.autotune(linear_act, x, w, None, backend="cuda")
    assert measured.op == "ffn_product_cuda"
    best = Plan(*measured.tiles)
    assert ran[0] != best
    ran.clear()
    torch.testing.assert_close(linear_act(x, w, None, backend="cuda"), before)
    assert ran == [best]


def test_opcheck(device):
    t = inputs((3, 2), 6, 10, device=device, gated=True)
    x, w1, b1, w2, b2, w_gate = (v.requires_grad_() for v in t.values())
    x = x.transpose(0, 1)
    rest = ("silu", 0.3, torch.tensor([5, 6], device=device))
    torch.library.opcheck(torch.ops.transfuse.ffn.default, (x, w1, b1, w2, b2, w_gate, *rest, True, "cuda"))
    torch.library.opcheck(torch.ops.transfuse.linear_act.default, (x, w1, b1, "gelu", True, "cuda"))


def _call(a, b, *, layout=FORWARD, tile=0, splits=1, b_gate=None, partials=None, activation=0, **ends):
    view, end = _extension.view, Ends(**ends)
    _extension.kernels().ffn_product(
        layout, tile, splits, *map(view, (a, b, b_gate, None, None, partials, *end)), activation, False, 0.0, (0, 0)
    )


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"b": torch.zeros(8, 13)}, "the product's shape"),
        ({"b": torch.zeros(8, 12).half()}, "the product's shape and dtype"),
        ({"out": torch.zeros(8, 9)}, "the product's shape"),
        ({"a": torch.zeros(4, 13)[:, :12]}, "aligned to 16 bytes"),
        ({"layout": WEIGHT, "tile": 1}, "no such layout, tile"),
        ({"splits": 2}, "partials are for products split over K"),
        ({"splits": 2, "partials": torch.zeros(2, 4, 9)}, "partials must be"),
        ({"activation": 5}, "no such activation"),
        ({"bias": torch.zeros(9)}, r"bias must be \(columns\)"),
        ({"sums": torch.zeros(1, 8)}, "belong to the backward"),
        ({"seed": torch.zeros(2)}, r"seed must be int64 \(2\)"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_a_wrong_call_never_reaches_the_kernel(changed, message, device):
    right = {"a": torch.zeros(4, 12), "b": torch.zeros(8, 12), "out": torch.zeros(4, 8)}
    with pytest.raises(ValueError, match=message) as caught:
        _call(**(right | changed))
    assert str(caught.value).startswith("ffn_product: ")
