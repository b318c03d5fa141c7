"""attention under autograd twice, torch.library, torch.compile, torch.export and torch.func."""

from __future__ import annotations

import pytest
import torch

from transfuse import (
    attention,
    attention_decode,
    attention_varlen,
    attention_weights,
    scaled_dot_product_attention,
)
from transfuse.ops.attention import torch_chunks, torch_impl

OPS = torch.ops.transfuse
SCALE = 0.5
PLAIN = (None, None, None, None, SCALE, -1, -1, 0, 0.0, 0.0, False)
SEED = torch.tensor([3, 4])


def doubles(*sizes):
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes]


def everything(batch, q_len, k_len, dropout_p):
    """A flattened Variant with all its parts, and its differentiable tensors."""
    mask = torch.rand(batch, 1, q_len, k_len) > 0.3
    mask[:, :, 1] = False
    bias, slopes, sinks = doubles((1, 4, 1, k_len), (4,), (4,))
    return (mask, bias, slopes, sinks, SCALE, 2, 1, None, 2.0, dropout_p, False), (bias, slopes, sinks)


@pytest.fixture(params=["few", "many"])
def scores(request, monkeypatch):
    """Scores kept whole, or the blocks and ATen's flash attention."""
    if request.param == "many":
        monkeypatch.setattr(torch_impl, "_FEW_SCORES", -1)
        monkeypatch.setattr(torch_chunks, "_BLOCK", 8)
        monkeypatch.setattr(torch_chunks, "_ROWS", 2)


def functions():
    """name -> (function, its differentiable inputs)."""
    q, k, v = doubles((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 3))
    bias, slopes, sinks = doubles((1, 4, 1, 5), (4,), (4,))
    mask = torch.rand(2, 1, 3, 5) > 0.3
    mask[:, :, 1] = False
    pq, pk, pv = doubles((7, 4, 4), (9, 2, 4), (9, 2, 3))
    where = (torch.tensor([0, 2, 2, 6]), torch.tensor([0, 5, 6, 9]), 4, 5)
    lengths = torch.tensor([5, 3])
    lse = attention(q, k, v, return_lse=True)[1].detach().requires_grad_()
    more = {"mask": mask, "softcap": 2.0, "window": (2, 1)}

    def finite(out, lse):
        return out, lse.masked_fill(lse == -torch.inf, 0)

    return {
        "plain": (lambda q, k, v: attention(q, k, v, causal=True), (q, k, v)),
        "same_width": (lambda q, k: attention(q, k, k, mask=mask), (q, k)),
        "lse": (lambda q, k, v: attention(q, k, v, causal="lower_right", return_lse=True), (q, k, v)),
        "everything": (
            lambda q, k, v, b, a, s: attention(q, k, v, bias=b, alibi_slopes=a, sinks=s, return_lse=True, **more),
            (q, k, v, bias, slopes, sinks),
        ),
        "sinks": (lambda q, k, v, s: attention(q, k, v, sinks=s, mask=mask, return_lse=True), (q, k, v, sinks)),
        "weights": (lambda q, k, lse, b: attention_weights(q, k, lse, bias=b, **more), (q, k, lse, bias)),
        "varlen": (
            lambda q, k, v, a, s: finite(
                *attention_varlen(q, k, v, *where, alibi_slopes=a, sinks=s, causal=True, return_lse=True)
            ),
            (pq, pk, pv, slopes, sinks),
        ),
        "decode": (
            lambda q, k, v, b: attention_decode(q, k, v, lengths, bias=b, causal=True, return_lse=True),
            (q, k, v, bias),
        ),
        "sdpa": (lambda q, k, v, b: scaled_dot_product_attention(q, k, v, b, enable_gqa=True), (q, k, v, bias)),
    }


def registered():
    """name -> (registered op's overload, arguments, how many outputs are floating)."""
    q, k, v = doubles((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 3))
    pq, pk, pv = doubles((7, 4, 4), (9, 2, 4), (9, 2, 3))
    where = (torch.tensor([0, 2, 2, 6]), torch.tensor([0, 5, 6, 9]), 4, 5)
    full, _ = everything(2, 3, 5, 0.3)
    packed_full, _ = everything(3, 4, 5, 0.3)
    lse = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    no_dropout = (*full[:3], None, *full[4:9], 0.0, False)
    return {
        "attention": (OPS.attention, (q, k, v, *full, SEED, "torch")),
        "attention_plain": (OPS.attention, (q, k, v, *PLAIN, None, "torch")),
        "attention_weights": (OPS.attention_weights, (q, k, lse, *no_dropout, "torch")),
        "attention_varlen": (OPS.attention_varlen, (pq, pk, pv, *where, *packed_full, SEED, "torch")),
        "attention_varlen_plain": (OPS.attention_varlen, (pq, pk, pv, *where, *PLAIN, None, "torch")),
        "attention_decode": (OPS.attention_decode, (q, k, v, torch.tensor([5, 3]), *full, SEED, "torch")),
    }


@pytest.mark.parametrize("name", functions())
def test_gradcheck_twice(name, scores):
    function, leaves = functions()[name]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("name", registered())
def test_gradcheck_of_registered_ops_twice(name):
    op, arguments = registered()[name]
    at = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.requires_grad]

    def function(*leaves):
        given = list(arguments)
        for i, leaf in zip(at, leaves, strict=True):
            given[i] = leaf
        found = op(*given)
        found = (found,) if isinstance(found, torch.Tensor) else found
        return tuple(t.masked_fill(t.isinf(), 0) for t in found)

    leaves = tuple(arguments[i] for i in at)
    assert torch.autograd.gradcheck(function, leaves)  # dropout included: backward replays the mask of its seed
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("name", registered())
def test_opcheck(name):
    op, arguments = registered()[name]
    torch.library.opcheck(op.default, arguments)
    strided = [a.mT.contiguous().mT if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in arguments]
    strided = [
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in strided
    ]
    torch.library.opcheck(op.default, tuple(strided))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("name", ["attention", "attention_weights", "attention_varlen", "attention_decode"])
def test_opcheck_of_kernels(name, backend, device):
    op, arguments = registered()[name]
    given = [a.detach().to(device) if isinstance(a, torch.Tensor) else a for a in arguments[:-1]]
    given = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in given]
    torch.library.opcheck(op.default, (*given, backend), test_utils=("test_schema", "test_faketensor"))
    leaves = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in given]
    torch.library.opcheck(op.default, (*leaves, backend), test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", [n for n in registered() if n != "attention_weights"])
def test_opcheck_of_backward(name):
    op, arguments = registered()[name]
    given = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    out, lse = op(*given)
    backward = getattr(OPS, f"{name.removesuffix('_plain')}_backward").default
    variant = given[-13:-2]
    want = [t is not None for t in variant[1:4]]
    rest = (*given[:3], out, lse, *given[3:-1], want, "torch")
    torch.library.opcheck(backward, (torch.randn_like(out), torch.randn_like(lse), *rest))
    torch.library.opcheck(backward, (torch.randn_like(out), None, *rest))


@pytest.mark.parametrize("name", ["attention", "attention_varlen", "attention_decode"])
def test_registered_ops_agree_with_the_plain_functions(name):
    op, arguments = registered()[f"{name}_plain" if name != "attention_decode" else name]
    given = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    given = [*given[:-13], *PLAIN, None, "torch"]
    options = {"scale": SCALE, "return_lse": True}
    if name == "attention_decode":
        given[-6] = None  # first: the newest query stands at the newest key
        expected = attention_decode(*given[:4], **options)
    else:
        function = attention if name == "attention" else attention_varlen
        expected = function(*given[:-13], **options)
    for g, e in zip(op(*given), expected, strict=True):
        torch.testing.assert_close(g, e)


def traced_cases():
    """name -> (function, argument lists of the same ranks and other sizes)."""

    def qkv(q_len, k_len):
        sizes = ((2, 4, q_len, 16), (2, 2, k_len, 16), (2, 2, k_len, 16))
        return [torch.randn(s, requires_grad=True) for s in sizes]

    def packed(*lengths):
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        total = sum(lengths) + 2
        rows = [torch.randn(total, h, 16, requires_grad=True) for h in (4, 2, 2)]
        return [*rows, bounds, bounds, max(lengths), max(lengths)]

    def mask(k_len):
        return torch.rand(2, 1, 1, k_len) > 0.3

    def bias(k_len):
        return torch.randn(1, 4, 1, k_len, requires_grad=True)

    slopes = torch.rand(4, requires_grad=True)
    lower_right = {"causal": "lower_right"}
    registered_rest = (*PLAIN, None, "torch")
    return {
        "causal": (lambda q, k, v: attention(q, k, v, causal=True), [qkv(8, 8), qkv(12, 12)]),
        "lower_right": (lambda q, k, v: attention(q, k, v, **lower_right), [qkv(5, 9), qkv(7, 20)]),
        "lse": (lambda q, k, v: attention(q, k, v, causal=True, return_lse=True), [qkv(8, 8), qkv(12, 12)]),
        "everything": (
            lambda q, k, v, m, b, s: attention(
                q, k, v, mask=m, bias=b, alibi_slopes=s, sinks=s, window=(3, 3), softcap=2.0, return_lse=True
            ),
            [[*qkv(5, 9), mask(9), bias(9), slopes], [*qkv(7, 20), mask(20), bias(20), slopes]],
        ),
        "mask-bias": (
            lambda q, k, v, m, b: attention(q, k, v, mask=m, bias=b, **lower_right),
            [[*qkv(5, 9), mask(9), bias(9)], [*qkv(7, 20), mask(20), bias(20)]],
        ),
        "weights": (
            lambda q, k, v: attention_weights(q, k, attention(q, k, v, return_lse=True)[1], window=(2, 2)),
            [qkv(8, 8), qkv(6, 12)],
        ),
        "sdpa": (
            lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
            [qkv(8, 8), qkv(12, 12)],
        ),
        "varlen": (
            lambda q, k, v, a, b, m, n: attention_varlen(q, k, v, a, b, m, n, causal=True, return_lse=True),
            [packed(3, 4, 1), packed(5, 2, 6)],
        ),
        "decode": (
            lambda q, k, v, lengths: attention_decode(q, k, v, lengths, causal=True, return_lse=True),
            [[*qkv(1, 10), torch.tensor([4, 9])], [*qkv(1, 14), torch.tensor([14, 2])]],
        ),
        "registered": (lambda q, k, v: OPS.attention(q, k, v, *registered_rest), [qkv(8, 8), qkv(6, 12)]),
        "registered_varlen": (
            lambda q, k, v, a, b, m, n: OPS.attention_varlen(q, k, v, a, b, m, n, *registered_rest),
            [packed(3, 4, 1), packed(5, 2, 6)],
        ),
        "registered_decode": (
            lambda q, k, v, lengths: OPS.attention_decode(q, k, v, lengths, *registered_rest),
            [[*qkv(1, 10), torch.tensor([4, 9])], [*qkv(1, 14), torch.tensor([14, 2])]],
        ),
    }


def same(function, compiled, arguments):
    leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    results = []
    for f in (function, compiled):
        found = f(*arguments)
        found = (found,) if isinstance(found, torch.Tensor) else found
        found = [t.masked_fill(t.isinf(), 0) for t in found]
        total = sum(t.square().sum() for t in found)
        results.append([*found, *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def compiles_whole(name, dynamic):
    torch._dynamo.reset()
    function, arguments = traced_cases()[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for given in arguments if dynamic else arguments[:1]:
        same(function, compiled, given)


@pytest.mark.parametrize("name", traced_cases())
def test_compiles_whole(name):
    compiles_whole(name, dynamic=False)


@pytest.mark.parametrize("name", ["causal", "lower_right", "registered", "registered_varlen", "registered_decode"])
def test_compiles_whole_for_any_size(name):
    compiles_whole(name, dynamic=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lse", "everything", "mask-bias", "weights", "sdpa", "varlen", "decode"])
def test_compiles_more_for_any_size(name):
    compiles_whole(name, dynamic=True)


@pytest.mark.slow
def test_inductor_compiles_whole():
    torch._dynamo.reset()
    for name in ("causal", "everything", "varlen", "registered"):
        function, arguments = traced_cases()[name]
        same(function, torch.compile(function, fullgraph=True), arguments[0])


def test_compiled_dropout_differs_from_call_to_call():
    torch._dynamo.reset()
    x = torch.eye(32)[None, None]
    q = torch.randn(1, 1, 32, 32)
    for options in ({}, {"softcap": 5.0}):
        compiled = torch.compile(
            lambda q, options=options: attention(q, q, x, dropout_p=0.5, **options), fullgraph=True, backend="aot_eager"
        )
        first, second = compiled(q), compiled(q)
        assert 0.4 < first.eq(0).float().mean() < 0.6
        assert not torch.equal(first, second)


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, causal=True, softcap=3.0)

    q, k, v = (torch.randn(2, 2, 6, 8) for _ in range(3))
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(Module(), (q, k, v), dynamic_shapes=({2: length}, {2: length}, {2: length}))
    longer = [torch.randn(2, 2, 11, 8) for _ in range(3)]
    torch.testing.assert_close(program.module()(*longer), Module()(*longer))


@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"softcap": 2.0, "window": (2, 2)}, {"mask": torch.tensor([True, False, True, False, True])}],
    ids=["causal", "softcap", "mask"],
)
def test_function_transforms(options):
    q, k, v = (torch.randn(3, 2, 2, 5, 8, dtype=torch.float64) for _ in range(3))

    def loss(q, k, v):
        return attention(q, k, v, **options).square().sum()

    many = torch.func.vmap(lambda q, k, v: attention(q, k, v, **options))(q, k, v)
    each = torch.stack([attention(*x, **options) for x in zip(q, k, v, strict=True)])
    torch.testing.assert_close(many, each)
    leaf = q[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, k[0], v[0]), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(q[0], k[0], v[0]), expected)
    per_sample = torch.func.vmap(torch.func.grad(loss))(q, k, v)
    torch.testing.assert_close(per_sample[0], expected)


def test_checkpointing_and_backward_twice():
    q, k, v = (torch.randn(2, 2, 9, 8, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, causal=True)
    expected = torch.autograd.grad(out.sum(), q, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], expected)
    again = torch.utils.checkpoint.checkpoint(lambda *x: attention(*x, causal=True), q, k, v, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sum(), q)[0], expected)
