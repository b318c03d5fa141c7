"""rotary_embedding, cache_append and both in one on every backend: values, gradients, strides, empties, errors."""

from __future__ import annotations

import importlib
from contextlib import nullcontext

import pytest
import torch

from conftest import skip_unless
from oracle import check
from transfuse import Decoder, TransformerConfig, use_backend
from transfuse.errors import ArgumentError, BackendError, DeviceError, DtypeError
from transfuse.models import KVCache
from transfuse.nn import RotaryEmbedding, apply_rotary
from transfuse.ops import cache_append, rotary, rotary_append, rotary_embedding
from transfuse.ops.rotary import reference

feed_forward = importlib.import_module("transfuse.ops.ffn")  # the name in transfuse.ops is its function's
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (batch, length, heads, kv_heads, head_dim, rotary_dim)
SHAPES = [(2, 3, 6, 2, 16, 16), (1, 5, 3, 1, 20, 12), (3, 1, 9, 9, 8, 8), (2, 2, 1, 5, 7, 2), (1, 2, 2, 1, 40, 40)]
EMPTY = [(0, 3, 2, 1, 8, 8), (2, 0, 2, 1, 8, 8), (2, 3, 0, 0, 8, 8), (2, 3, 2, 0, 8, 4), (2, 3, 2, 1, 0, 0)]
EMPTY += [(1, 2, 2, 1, 8, 0)]  # nothing turns
_id = lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else str(v).removeprefix("torch.")  # noqa: E731


def inputs(shape, dtype, device, *, angles=None, rows=None):
    """q, k, cos and sin of a shape; rows: cos's batch."""
    batch, length, heads, kv_heads, head_dim, rotary_dim = shape
    angle = torch.rand(batch if rows is None else rows, length, 1, rotary_dim // 2, device=device) * 6.3
    cos, sin = angle.cos(), angle.sin()
    return {
        "q": torch.randn(batch, length, heads, head_dim, device=device).to(dtype),
        "k": torch.randn(batch, length, kv_heads, head_dim, device=device).to(dtype),
        "cos": torch.cat((cos, cos), -1).to(angles or dtype),
        "sin": torch.cat((-sin, sin), -1).to(angles or dtype),
    }


def run(tensors, backend):
    """check() of both outputs and of their gradients."""
    skip_unless(rotary._why_not(backend, tensors["q"], tensors["cos"], tensors["sin"]))
    # The two terms of a result may cancel: they are as large as what is turned.
    size = max(t.abs().max().item() if t.numel() else 0.0 for t in (tensors["q"], tensors["k"]))
    grad_outputs = [torch.randn_like(tensors[n]) for n in "qk"]
    largest = max(g.abs().max().item() if g.numel() else 0.0 for g in grad_outputs)
    return check(
        lambda **kw: rotary_embedding(**kw, backend=backend),
        reference.rotary_embedding,
        tensors,
        grads=("q", "k"),
        names=("q", "k"),
        grad_outputs=grad_outputs,
        sizes={"q": size, "k": size, "dq": largest, "dk": largest},
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize("shape", SHAPES, ids=_id)
def test_values_and_gradients(shape, dtype, backend, device, poisoned):
    run(inputs(shape, dtype, device), backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=_id)
def test_fp32_angles_for_low_precision_heads(dtype, backend, device, poisoned):
    run(inputs(SHAPES[1], dtype, device, angles=torch.float32), backend)


def test_positions_shared_by_all_rows(backend, device):
    run(inputs((3, 4, 2, 1, 8, 8), torch.float32, device, rows=1), backend)


@pytest.mark.parametrize("shape", EMPTY, ids=_id)
def test_empty(shape, backend, device, poisoned):
    run(inputs(shape, torch.float32, device), backend)


VIEWS = {
    "packed": lambda b, n, h, d: torch.randn(b, n, h + 3, d)[:, :, 1 : h + 1],
    "heads_first": lambda b, n, h, d: torch.randn(b, h, n, d).transpose(1, 2),
    "every_second": lambda b, n, h, d: torch.randn(b, n, h, 2 * d)[..., ::2],
    "offset": lambda b, n, h, d: torch.randn(b, n, h, d + 1)[..., 1:],
    "same_row": lambda b, n, h, d: torch.randn(b, 1, h, d).expand(b, n, h, d),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_id)
def test_strides(view, dtype, backend, device, poisoned):
    tensors = inputs((2, 3, 4, 2, 12, 8), dtype, device)
    make = VIEWS[view]
    run({**tensors, "q": make(2, 3, 4, 12).to(device, dtype), "k": make(2, 3, 2, 12).to(device, dtype)}, backend)
    for name in ("cos", "sin"):
        tensors[name] = torch.cat((tensors[name], tensors[name]), 1)[:, 1:4].flip(1)
        tensors[name] = tensors[name].mT.contiguous().mT
    run(tensors, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_id)
def test_strided_grad_outputs(dtype, backend, device):
    tensors = inputs((2, 3, 4, 2, 8, 8), dtype, device)
    skip_unless(rotary._why_not(backend, tensors["q"], tensors["cos"], tensors["sin"]))
    q = tensors["q"].requires_grad_()
    out, _ = rotary_embedding(**tensors, backend=backend)
    for dout in (torch.randn(8, 4, 3, 2).permute(3, 2, 1, 0), torch.randn(1, 1, 1, 1).expand(2, 3, 4, 8)):
        dout = dout.to(device, dtype)
        (got,) = torch.autograd.grad(out, q, dout, retain_graph=True)
        half = tensors["sin"].roll(4, -1)  # the turn back
        expected = reference.rotary_embedding(dout.double(), None, tensors["cos"].double(), half.double())[0]
        torch.testing.assert_close(got.double(), expected, atol=4 * torch.finfo(dtype).eps, rtol=2e-2)


def test_one_tensor_for_queries_and_keys(backend, device):
    tensors = inputs((2, 3, 4, 2, 8, 8), torch.float32, device)
    skip_unless(rotary._why_not(backend, tensors["q"], tensors["cos"], tensors["sin"]))
    together = torch.cat((tensors["q"], tensors["k"]), 2).requires_grad_()
    turned, nothing = rotary_embedding(together, None, tensors["cos"], tensors["sin"], backend=backend)
    assert nothing is None
    assert torch.equal(turned, torch.cat(rotary_embedding(**tensors, backend=backend), 2))
    (grad,) = torch.autograd.grad(turned.square().sum(), together)
    torch.testing.assert_close(grad, 2 * together.detach())  # turns keep lengths


def test_is_what_the_module_applies(backend, device):
    cos, sin = RotaryEmbedding(8)(torch.arange(5, device=device)[None])
    x = torch.randn(2, 5, 3, 12, device=device)
    skip_unless(rotary._why_not(backend, x, cos, sin))
    torch.testing.assert_close(rotary_embedding(x, None, cos, sin, backend=backend)[0], apply_rotary(x, cos, sin))


def test_gradcheck():
    tensors = inputs((1, 2, 2, 1, 6, 4), torch.float64, "cpu")
    q, k = (tensors[n].requires_grad_() for n in "qk")
    cos, sin = (tensors[n].requires_grad_() for n in ("cos", "sin"))
    assert torch.autograd.gradcheck(lambda *a: rotary_embedding(*a, backend="torch"), (q, k, cos, sin))


def test_double_backward(backend, device):
    tensors = inputs((1, 2, 2, 1, 8, 4), torch.float32, device)
    skip_unless(rotary._why_not(backend, tensors["q"], tensors["cos"], tensors["sin"]))
    found = []
    for name in (backend, "reference"):
        q, dout = tensors["q"].clone().requires_grad_(), torch.ones_like(tensors["q"]).requires_grad_()
        out, _ = rotary_embedding(**{**tensors, "q": q}, backend=name)
        (dq,) = torch.autograd.grad(out.square(), q, dout, create_graph=True)
        found.append(torch.autograd.grad(dq.square().sum(), (q, dout)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def test_opcheck(backend, device):
    tensors = inputs((2, 2, 2, 1, 8, 4), torch.float32, device)
    skip_unless(rotary._why_not(backend, tensors["q"], tensors["cos"], tensors["sin"]))
    q, k, cos, sin = tensors.values()
    op = torch.ops.transfuse.rotary_embedding.default
    torch.library.opcheck(op, (q.requires_grad_(), k.requires_grad_(), cos, sin, False, backend))
    torch.library.opcheck(op, (q, None, cos, sin, True, backend))
    new, cache = torch.randn(2, 1, 2, 4, device=device), torch.zeros(2, 1, 5, 4, device=device)
    for starts in (None, torch.tensor([0, 3], device=device)):
        torch.library.opcheck(
            torch.ops.transfuse.cache_append.default, (new, new, cache.clone(), cache.clone(), starts, 1, backend)
        )
        more = (*(t.detach() for t in (q, k, k, cos, sin)), *torch.zeros(2, 2, 1, 5, 8, device=device))
        torch.library.opcheck(torch.ops.transfuse.rotary_append.default, (*more, starts, 1, backend))


def test_compile(backend, device):
    tensors = inputs((2, 3, 4, 2, 8, 8), torch.float32, device)
    skip_unless(rotary._why_not(backend, tensors["q"], tensors["cos"], tensors["sin"]))
    k_cache, v_cache = (torch.zeros(2, 2, 9, 8, device=device) for _ in range(2))

    def step(q, k, cos, sin, k_cache, v_cache, start):
        q, k = rotary_embedding(q, k, cos, sin, backend=backend)
        cache_append(k.transpose(1, 2), k.transpose(1, 2), k_cache, v_cache, start, backend=backend)
        turned = rotary_append(q, k, k, cos, sin, k_cache, v_cache, start, backend=backend)
        return q + turned + k_cache.sum()

    for start in (2, torch.tensor([1, 4], device=device)):
        caches = [k_cache.clone(), v_cache.clone()], [k_cache.clone(), v_cache.clone()]
        expected = step(*tensors.values(), *caches[0], start)
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*tensors.values(), *caches[1], start), expected)
        assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))


def test_mistakes():
    good = inputs((2, 3, 4, 2, 8, 8), torch.float32, "cpu")
    for change, error, words in [
        ({"q": good["q"][0]}, ArgumentError, "batch, length, heads, head_dim"),
        ({"k": good["k"][:, :2]}, ArgumentError, "k must have shape"),
        ({"k": good["k"].half()}, DtypeError, "q's dtype"),
        ({"cos": good["cos"][..., :3]}, ArgumentError, "even rotary_dim"),
        ({"cos": good["cos"][:, :2], "sin": good["sin"][:, :2]}, ArgumentError, "cos must have shape"),
        ({"sin": good["sin"][..., :4]}, ArgumentError, "sin must have shape"),
        ({"cos": good["cos"].double(), "sin": good["sin"].double()}, DtypeError, "float32"),
        ({"q": good["q"].long()}, DtypeError, "q must be float32"),
        ({"sin": good["sin"].to("meta")}, DeviceError, "sin must be on cpu"),
    ]:
        with pytest.raises(error, match=words):
            rotary_embedding(**{**good, **change})
    new, cache = torch.randn(2, 1, 2, 4), torch.zeros(2, 1, 5, 4)
    for arguments, error, words in [
        ((new, new, cache, cache, 4), ArgumentError, "from 0 to 3"),
        ((new, new, cache, cache, torch.tensor([0, -1])), ArgumentError, "from 0 to 3"),
        ((new, new, cache, cache, torch.tensor([0])), ArgumentError, "start must have shape"),
        ((new, new, cache, cache, torch.tensor([0.0, 1.0])), DtypeError, "int64"),
        ((new[0], new, cache, cache, 0), ArgumentError, "k must have shape"),
        ((new, new[:1], cache, cache, 0), ArgumentError, "v must have shape"),
        ((new, new, cache[..., :3], cache, 0), ArgumentError, "k_cache must have shape"),
    ]:
        with pytest.raises(error, match=words):
            cache_append(*arguments)


def test_gradients_of_angles_are_refused_by_kernels(backend, device):
    tensors = inputs((1, 2, 2, 1, 8, 8), torch.float32, device)
    if backend == "torch":
        pytest.skip("has them")
    skip_unless(rotary._why_not(backend, tensors["q"], tensors["cos"], tensors["sin"]))
    with pytest.raises(BackendError, match="no gradient for cos and sin"):
        rotary_embedding(**{**tensors, "cos": tensors["cos"].requires_grad_()}, backend=backend)


@pytest.mark.parametrize("kind", ["int", "int32", "int64"])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_append(dtype, new, kind, backend, device):
    k = torch.randn(2, new, 5, 6, device=device).to(dtype).transpose(1, 2)
    v = torch.randn(2, 5, new, 3, device=device).to(dtype)
    caches = [torch.randn(2, 5, 8, 6, device=device).to(dtype), torch.randn(2, 8, 5, 3, device=device).to(dtype)]
    caches[1] = caches[1].transpose(1, 2)
    skip_unless(rotary._why_not_append(backend, k, v, *caches))
    start = 4 if kind == "int" else torch.tensor([5, 0], dtype=getattr(torch, kind), device=device)
    expected = [c.clone() for c in caches]
    reference.cache_append(k, v, *expected, start)
    cache_append(k, v, *caches, start, backend=backend)
    assert all(torch.equal(c, e) for c, e in zip(caches, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 1, 4), (2, 0, 1, 4), (2, 2, 0, 4), (2, 2, 1, 0)], ids=_id)
def test_append_nothing(shape, backend, device):
    new = torch.randn(shape, device=device)
    cache = torch.zeros(*shape[:2], 3, shape[3], device=device)
    skip_unless(rotary._why_not_append(backend, new, new, cache, cache))
    cache_append(new, new, cache, cache.clone(), 1, backend=backend)
    assert not cache.any()


@pytest.mark.parametrize("to", DTYPES, ids=_id)
def test_append_casts_to_the_cache(to, backend, device):
    new = torch.randn(2, 2, 1, 4, device=device)
    caches = [torch.zeros(2, 2, 3, 4, device=device, dtype=to) for _ in range(2)]
    skip_unless(rotary._why_not_append(backend, new, new, *caches))
    cache_append(new, 2 * new, *caches, 1, backend=backend)
    assert torch.equal(caches[0][:, :, 1:2], new.to(to))
    assert torch.equal(caches[1][:, :, 1:2], (2 * new).to(to))


def test_a_kernel_writes_nothing_outside_the_cache(backend, device):
    if backend == "torch":
        pytest.skip("an error there")
    new = torch.ones(2, 1, 2, 4, device=device)
    room = torch.zeros(3, 1, 3, 4, device=device)
    skip_unless(rotary._why_not_append(backend, new, new, room, room))
    starts = torch.tensor([2, -1], device=device)  # half of each row's two positions
    cache = room[:2]
    torch.ops.transfuse.cache_append(new, new, cache, cache.clone(), starts, 0, backend)
    assert torch.equal(room[:, 0, :, 0].cpu(), torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 0, 0]]))


def projected(dtype, device, to=None):
    """q, k, v as a projection leaves them, angles, and caches of dtype ``to``."""
    heads = torch.randn(2, 3, 9, 16, device=device).to(dtype)
    q, k, v = heads.split((5, 2, 2), 2)
    angles = inputs((2, 3, 1, 1, 16, 8), dtype, device)
    caches = torch.randn(2, 8, 4, 16, device=device).to(to or dtype).transpose(1, 2).split(2, 1)
    return {"q": q, "k": k, "v": v, "cos": angles["cos"], "sin": angles["sin"]}, caches


def supports_both(backend, tensors, caches):
    skip_unless(rotary._why_not_both(backend, *tensors.values(), *caches))


@pytest.mark.parametrize("kind", ["int", "int32", "int64"])
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_both_at_once(dtype, kind, backend, device, poisoned):
    tensors, caches = projected(dtype, device)
    if kind == "int32":  # rows that 16-byte accesses do not fit
        tensors["v"], caches = tensors["v"][..., 1:4], (caches[0], caches[1][..., 3:6])
    supports_both(backend, tensors, caches)
    start = 4 if kind == "int" else torch.tensor([5, 0], dtype=getattr(torch, kind), device=device)

    def written(op, **tensors):
        own = [c.to(tensors["q"], copy=True) for c in caches]
        return op(**tensors, k_cache=own[0], v_cache=own[1], start=start), *own

    size = tensors["q"].abs().max().item()
    check(
        lambda **kw: written(lambda **all: rotary_append(**all, backend=backend), **kw),
        lambda **kw: written(reference.rotary_append, **kw),
        tensors,
        names=("q", "k_cache", "v_cache"),
        sizes={"q": size, "k_cache": size},
    )


@pytest.mark.parametrize("to", DTYPES, ids=_id)
def test_both_at_once_are_both_apart(to, backend, device):
    tensors, caches = projected(torch.float16, device, to)
    supports_both(backend, tensors, caches)
    expected = [c.clone() for c in caches]
    q, k = rotary_embedding(*(tensors[n] for n in ("q", "k", "cos", "sin")), backend=backend)
    cache_append(k.transpose(1, 2), tensors["v"].transpose(1, 2), *expected, 5, backend=backend)
    assert torch.equal(rotary_append(**tensors, k_cache=caches[0], v_cache=caches[1], start=5, backend=backend), q)
    assert all(torch.equal(c, e) for c, e in zip(caches, expected, strict=True))


def test_both_at_once_write_nothing_outside_the_cache(backend, device):
    if backend == "torch":
        pytest.skip("an error there")
    tensors, caches = projected(torch.float32, device)
    supports_both(backend, tensors, caches)
    before = [c.clone() for c in caches]
    starts = torch.tensor([7, -2], device=device)  # one of each row's three positions is inside
    torch.ops.transfuse.rotary_append(*tensors.values(), *caches, starts, 0, backend)
    for cache, old in zip(caches, before, strict=True):
        changed = (cache != old).any(3).any(1)
        assert changed[0].tolist() == [False] * 7 + [True]
        assert changed[1].tolist() == [True] + [False] * 7


@pytest.mark.parametrize("empty", ["batch", "new", "kv_heads", "head_dim"])
def test_both_at_once_of_nothing(empty, backend, device):
    batch, new, kv_heads, dim = (0 if n == empty else 2 for n in ("batch", "new", "kv_heads", "head_dim"))
    q, k = torch.randn(batch, new, 4, dim, device=device), torch.randn(batch, new, kv_heads, dim, device=device)
    angles = torch.zeros(1, new, 1, dim, device=device)
    cache = torch.zeros(batch, kv_heads, 5, dim, device=device)
    supports_both(backend, {"q": q, "k": k, "v": k, "cos": angles, "sin": angles}, (cache, cache))
    out = rotary_append(q, k, k, angles, angles, cache, cache.clone(), 1, backend=backend)
    assert out.shape == q.shape
    assert not out.any()  # cos and sin are 0


def test_both_at_once_are_refused(backend, device):
    tensors, caches = projected(torch.float32, "cpu")
    both = {**tensors, "k_cache": caches[0], "v_cache": caches[1], "start": 1}
    for change, error, words in [
        ({"q": tensors["q"][:1]}, ArgumentError, "rotary_append: k must have shape"),
        ({"v": tensors["v"][:, :2]}, ArgumentError, "rotary_append: v must have shape"),
        ({"v": tensors["v"].half()}, DtypeError, "k's dtype"),
        ({"start": 6}, ArgumentError, "rotary_append: start must be from 0 to 5"),
    ]:
        with pytest.raises(error, match=words):
            rotary_append(**{**both, **change})
    if backend != "torch":
        tensors["v"].requires_grad_()
        with pytest.raises(BackendError, match="records no gradient"):
            rotary_append(**{**both, "v": tensors["v"].requires_grad_()}, backend=backend)


def test_a_model_and_its_cache_take_them(backend, device, monkeypatch):
    q = torch.empty(1, 1, 1, 8, device=device)
    skip_unless(rotary._why_not(backend, q, q, q))
    skip_unless(feed_forward._why_not(backend, "ffn", q, q[0, 0], None, q[0, 0], None, None))
    config = TransformerConfig(
        "decoder", vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, position="rotary"
    )
    model = Decoder(config).eval().to(device)
    tokens = torch.randint(50, (2, 4), device=device)
    calls = []
    if backend != "torch":
        kernels = rotary._implementation(backend)
        for name in ("rotary_embedding", "cache_append", "rotary_append"):
            kernel = getattr(kernels, name)
            monkeypatch.setattr(kernels, name, lambda *a, n=name, f=kernel: (calls.append(n), f(*a))[1])
    with torch.no_grad():
        expected = model(tokens).logits
        calls.clear()
        with use_backend(None if backend == "torch" else backend):
            cache = model.new_cache(batch=2, max_length=8)
            steps = [model(part, cache=cache).logits for part in (tokens[:, :3], tokens[:, 3:])]
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-4, rtol=1e-4)
    if backend != "torch":
        assert calls == ["rotary_append"] * 4


def test_gradients_flow_through_a_models_cache(backend, device):
    # what a kernel writes has no gradient: PyTorch writes while gradients are recorded
    k = torch.randn(1, 2, 1, 4, device=device, requires_grad=True)
    skip_unless(rotary._why_not_append(backend, *[k.detach()] * 4))
    with pytest.raises(BackendError, match="records no gradient") if backend != "torch" else nullcontext():
        cache_append(k, k, torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0, backend=backend)
    cache = KVCache(1, 1, 2, 3, 4, device=device)
    with use_backend(backend):
        keys, _ = cache.layers[0].append(k, k)
    (grad,) = torch.autograd.grad(keys.sum(), k)
    assert torch.equal(grad, torch.ones_like(k))
