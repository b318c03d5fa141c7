"""attention on every backend: values, gradients, broadcasting, strides, empties, edge cases."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention_cases import (
    DTYPES,
    EVERYTHING,
    FEATURES,
    SHAPES,
    Shape,
    brute_force,
    features,
    inputs,
    name_of,
    quick_interpreted,
    sizes_of_intermediates,
)
from conftest import skip_unless
from oracle import check
from transfuse import attention, attention_weights
from transfuse.ops import _philox
from transfuse.ops.attention import arguments, reference, registration, torch_chunks, torch_impl
from transfuse.ops.attention.variant import Variant


@pytest.fixture(params=["few", "many"])
def scores(request, monkeypatch, backend):
    """The torch path keeps few scores whole and goes through many in blocks: both, whatever the size."""
    if backend != "torch" and request.param == "many":
        pytest.skip("the torch path's choice")
    monkeypatch.setattr(torch_impl, "_FEW_SCORES", 1 << 30 if request.param == "few" else -1)
    if request.param == "many":
        monkeypatch.setattr(torch_impl, "_FEW_LOW_SCORES", -1)
        for name, size in (("_BLOCK", 1 << 11), ("_ROWS", 16), ("WINDOW_ROWS", 16)):
            monkeypatch.setattr(torch_chunks, name, size)
    return request.param


def run(tensors, backend, *, grads=None, grad_outputs=None, **options):
    """check() of out, lse and the gradient of every floating tensor."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    skip_unless(
        registration.why_not(backend, "attention", q, k, v, Variant(*(tensors.get(n) for n in Variant._fields[:4])))
    )
    floating = [n for n, t in tensors.items() if t is not None and t.is_floating_point()]
    if grad_outputs is None:
        grad_outputs = [
            torch.randn(*q.shape[:3], v.shape[3], device=q.device),
            torch.randn(q.shape[:3], device=q.device),
        ]
    return check(
        lambda **kw: attention(**kw, backend=backend, return_lse=True),
        lambda **kw: attention(**kw, backend="reference", return_lse=True),
        tensors,
        grads=floating if grads is None else grads,
        names=("out", "lse"),
        grad_outputs=grad_outputs,
        sizes=sizes_of_intermediates(tensors, options, grad_outputs),
        **options,
    )


@quick_interpreted(
    # each feature, and each dtype at each shape
    lambda p: p["feature"] == EVERYTHING or (p["shape"], p["dtype"]) == (SHAPES[1], torch.float32)
)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, feature, scores, backend, device, poisoned):
    if backend == "torch" and scores == "few" and shape not in (SHAPES[1], SHAPES[4]):
        pytest.skip("the shapes left out differ for the blocks alone")
    tensors, options = features(feature, shape, dtype, device)
    run({**inputs(shape, dtype, device), **tensors}, backend, **options)


@pytest.mark.parametrize("feature", ["causal", EVERYTHING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_wide_heads(dtype, feature, backend, device, poisoned):
    shape = Shape(1, 2, 1, 20, 37, 200, 136)
    more, options = features(feature, shape, dtype, device)
    run({**inputs(shape, dtype, device), **more}, backend, **options)


def test_what_triton_leaves_to_others():
    pytest.importorskip("triton")
    for dtype, width, words in ((torch.float64, 8, "got float64"), (torch.float32, 264, "up to 256, got 264")):
        x = torch.zeros(1, 1, 2, width, dtype=dtype)
        for op in ("attention", "attention_weights", "attention_varlen", "attention_decode"):
            reason = registration.why_not("triton", op, x, x, x, Variant())
            assert words in reason
            assert "use backend='torch'" in reason


@pytest.mark.parametrize("feature", FEATURES)
def test_the_reference_is_what_a_loop_computes(feature):
    shape = Shape(2, 2, 1, 5, 7, 4, 3)
    tensors, options = features(feature, shape, torch.float64)
    tensors = {**inputs(shape, torch.float64), **tensors}
    expected = brute_force(**tensors, **options)
    for name in ("reference", "torch"):
        got = attention(**tensors, **options, return_lse=True, backend=name)
        for g, e in zip(got, expected, strict=True):
            assert torch.equal(g.isinf(), e.isinf())
            torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("kind", ["none", "dout_only", "dlse_only"])
def test_each_output_alone(kind, dtype, scores, backend, device):
    shape = SHAPES[1]
    tensors, options = features("lower_right-sinks", shape, dtype, device)
    tensors = {**inputs(shape, dtype, device), **tensors}
    grad_outputs = {
        "none": [torch.randn(1, 4, 37, 64, device=device), torch.randn(1, 4, 37, device=device)],
        "dout_only": [torch.randn(1, 4, 37, 64, device=device), None],
        "dlse_only": [None, torch.randn(1, 4, 37, device=device)],
    }[kind]
    run(tensors, backend, grad_outputs=grad_outputs, **options)


@quick_interpreted(lambda p: not p["causal"] or p["size"] == (7, 1))
@pytest.mark.parametrize(
    "size",
    [(), (9,), (7, 1), (7, 9), (4, 1, 1), (1, 7, 9), (2, 1, 1, 9), (1, 4, 1, 1), (2, 4, 7, 9), (2, 1, 7, 1)],
    ids=lambda s: "x".join(map(str, s)) or "scalar",
)
@pytest.mark.parametrize("causal", [False, True, "lower_right"], ids=str)
def test_masks_and_biases_broadcast(size, causal, scores, backend, device, poisoned):
    shape = Shape(2, 4, 2, 7, 9, 16, 16)
    tensors = inputs(shape, torch.float32, device)
    tensors["bias"] = torch.randn(size, device=device)
    run(tensors, backend, causal=causal)
    tensors["mask"] = torch.rand(size, device=device) > 0.3
    run(tensors, backend, causal=causal)


def test_slopes_of_every_batch_row(scores, backend, device):
    tensors = inputs(SHAPES[2], torch.float32, device)
    tensors["alibi_slopes"] = torch.rand(2, 4, device=device)
    run(tensors, backend, causal=True)


VIEWS = {
    "transposed": lambda b, h, n, d: torch.randn(b, n, h, d).transpose(1, 2),
    "packed": lambda b, h, n, d: torch.randn(b, n, 3, h, d)[:, :, 1].transpose(1, 2),
    "dim_first": lambda b, h, n, d: torch.randn(b, h, d, n).mT,
    "every_second": lambda b, h, n, d: torch.randn(b, h, n, 2 * d)[..., ::2],
    "offset": lambda b, h, n, d: torch.randn(b, h, n + 1, d + 1)[:, :, 1:, 1:],
    "same_head": lambda b, h, n, d: torch.randn(b, 1, n, d).expand(b, h, n, d),
    "same_row": lambda b, h, n, d: torch.randn(b, h, 1, d).expand(b, h, n, d),
    "overlapping": lambda b, h, n, d: torch.randn(b * h * n * d).as_strided((b, h, n, d), (h * n * d, n * d, 3, 1)),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_strides(view, dtype, scores, backend, device, poisoned):
    make = VIEWS[view]
    tensors = {n: make(2, 4, length, 16).to(dtype).to(device) for n, length in (("q", 9), ("k", 13), ("v", 13))}
    run(tensors, backend)
    if backend == "torch":  # which takes other ways then
        run(tensors, backend, causal="lower_right", softcap=3.0)
    tensors["bias"] = make(2, 4, 9, 13).to(device)
    if backend == "torch":
        run(tensors, backend, grads=("q", "k", "v"))
    tensors["mask"] = make(2, 4, 9, 13).to(device) > 0
    run(tensors, backend)


@pytest.mark.parametrize("feature", ["plain", "softcap", "bias", "sinks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_strided_grad_outputs(feature, dtype, scores, backend, device):
    shape = Shape(2, 4, 2, 9, 13, 16, 16)
    more, options = features(feature, shape, dtype, device)
    tensors = {**inputs(shape, dtype, device), **more}
    for dout in (torch.randn(16, 9, 4, 2).permute(3, 2, 1, 0), torch.randn(1, 1, 1, 1).expand(2, 4, 9, 16)):
        dlse = torch.randn(9, 4, 2).permute(2, 1, 0)
        run(tensors, backend, grad_outputs=[dout.to(device), dlse.to(device)], **options)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(0, 2, 1, 3, 4, 8, 8),
        Shape(2, 2, 1, 0, 4, 8, 8),
        Shape(2, 2, 1, 3, 0, 8, 8),
        Shape(2, 2, 2, 0, 0, 8, 8),
        Shape(2, 2, 1, 3, 4, 0, 8),
        Shape(2, 2, 1, 3, 4, 8, 0),
        Shape(2, 0, 0, 3, 4, 8, 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("feature", ["plain", "causal", "lower_right-window-softcap", "sinks"])
def test_empty(shape, feature, backend, device, poisoned):
    tensors, options = features(feature, shape, torch.float32, device)
    run({**inputs(shape, torch.float32, device), **tensors}, backend, **options)


@pytest.mark.parametrize("how", ["mask", "bias", "nothing_before"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_row_that_sees_nothing(how, sinks, dtype, scores, backend, device):
    shape = Shape(2, 2, 2, 6, 4, 16, 16)
    tensors = {n: t.requires_grad_() for n, t in inputs(shape, dtype, device).items()}
    options = {}
    rows = [0, 1]
    if how == "mask":
        options["mask"] = (torch.arange(6, device=device) > 1)[:, None]
    elif how == "bias":
        bias = torch.zeros(6, 4, device=device, dtype=dtype)
        bias[:2] = -math.inf
        options["bias"] = bias.requires_grad_()
    else:
        options["causal"] = "lower_right"  # six queries over four keys: the first two stand before the first key
    if sinks:
        options["sinks"] = torch.tensor([0.5, -1.0], device=device)
    skip_unless(registration.why_not(backend, "attention", *tensors.values(), Variant()))
    out, lse = attention(**tensors, **options, return_lse=True, backend=backend)
    assert out[:, :, rows].eq(0).all()
    expected = options["sinks"][:, None] if sinks else torch.tensor(-math.inf)
    assert torch.equal(lse[:, :, rows], expected.to(lse).expand(2, 2, 2))
    assert lse[:, :, 2:].isfinite().all()
    leaves = [*tensors.values(), *(t for t in options.values() if isinstance(t, torch.Tensor) and t.requires_grad)]
    grads = torch.autograd.grad(out.float().square().sum() + lse[:, :, 2:].sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][:, :, rows].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_the_lowest_number_as_bias_is_not_a_mask(dtype, scores, backend, device):
    tensors = inputs(SHAPES[0], dtype, device)
    skip_unless(registration.why_not(backend, "attention", *tensors.values(), Variant()))
    lowest = torch.full((1, 1, 1, 16), torch.finfo(dtype).min, dtype=dtype, device=device)
    out = attention(**tensors, bias=lowest, backend=backend)
    v = tensors["v"].double()
    # Rounded once to dtype; in fp32 the sum of the 16 keys before.
    limit = (torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps) * v.abs().mean(2, keepdim=True)
    assert ((out.double() - v.mean(2, keepdim=True)).abs() <= limit).all()


def test_what_hidden_keys_hold_changes_nothing(scores, backend, device):
    tensors = inputs(SHAPES[1], torch.float32, device)
    skip_unless(registration.why_not(backend, "attention", *tensors.values(), Variant()))
    mask = torch.rand(1, 1, 1, 53, device=device) > 0.4
    wild = {**tensors}
    for name in ("k", "v"):
        wild[name] = torch.where(mask.mT, tensors[name], 1e4)
    got = []
    for t in (tensors, wild):
        leaf = t["q"].clone().requires_grad_()
        out = attention(leaf, t["k"], t["v"], mask=mask, backend=backend)
        got.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for a, b in zip(*got, strict=True):
        torch.testing.assert_close(a, b)


def test_large_scores_do_not_overflow(scores, backend, device):
    # q.k reaches 1e5 before the scale: beyond fp16, within it after, but not where the scale is 1
    tensors = inputs(Shape(1, 2, 2, 20, 20, 64, 64), torch.float16, device)
    tensors["q"] = tensors["q"] * 40
    tensors["k"] = tensors["k"] * 40
    skip_unless(registration.why_not(backend, "attention", *tensors.values(), Variant()))
    for options in ({}, {"softcap": 50.0}, {"scale": 1.0}):
        leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
        out = attention(**leaves, **options, backend=backend)
        out.sum().backward()
        expected = attention(**{n: t.double() for n, t in tensors.items()}, **options, backend="reference")
        torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)
        assert all(t.grad.isfinite().all() for t in leaves.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_many_heads_that_share_keys_add_up_in_fp32(dtype, backend, device):
    run(inputs(Shape(1, 16, 1, 300, 300, 32, 32), dtype, device), backend, causal=True)


def any_shape(examples, most):
    """Hypothesis over shapes of up to most batch rows, key heads and heads a group."""
    few = st.integers(1, most)
    lengths = st.tuples(st.integers(1, 40), st.integers(1, 40))
    drawn = {"seed": st.integers(0, 1000), "lengths": lengths, "dims": lengths, "dtype": st.sampled_from(DTYPES)}
    given_all = given(data=st.data(), batch=few, kv_heads=few, group=few, **drawn)
    chosen = settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    return lambda test: chosen(given_all(test))


@quick_interpreted(lambda p: False)
@any_shape(examples=25, most=3)
def test_any_shape_and_any_combination(
    data, seed, batch, kv_heads, group, lengths, dims, dtype, scores, backend, device
):
    any_combination(data, seed, Shape(batch, kv_heads * group, kv_heads, *lengths, *dims), dtype, backend, device)


@pytest.mark.parametrize("backend", ["triton", "cuda"], indirect=True)
@any_shape(examples=4, most=2)
def test_a_few_shapes_and_combinations(data, seed, batch, kv_heads, group, lengths, dims, dtype, backend, device):
    any_combination(data, seed, Shape(batch, kv_heads * group, kv_heads, *lengths, *dims), dtype, backend, device)


def any_combination(data, seed, shape, dtype, backend, device):
    torch.manual_seed(seed)
    names = data.draw(st.lists(st.sampled_from(["mask", "bias", "alibi", "softcap", "sinks"]), unique=True))
    causal = data.draw(st.sampled_from([False, True, "lower_right"]))
    limit = st.integers(-1, 45)
    window = data.draw(st.none() | st.tuples(limit, limit))
    tensors, options = features("-".join(names) or "plain", shape, dtype, device)
    run({**inputs(shape, dtype, device), **tensors}, backend, **options, causal=causal, window=window)


# --- dropout --------------------------------------------------------------------------------------------------------


def test_philox_gives_its_published_words():
    def words(*values):
        return tuple(torch.tensor(v) for v in values)

    full = 0xFFFFFFFF
    cases = [
        (words(0, 0), words(0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (words(full, full), words(full, full, full, full), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            words(0xA4093822, 0x299F31D0),
            words(0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for key, counter, expected in cases:
        assert tuple(w.item() for w in _philox.philox4x32(key, counter)) == expected


def test_the_dropout_mask_of_a_seed_does_not_depend_on_the_number_of_keys():
    seed = torch.tensor([11, 3])
    wide = _philox.keep_mask(seed, 0.3, 2, 3, 5, 101, torch.device("cpu"))
    assert torch.equal(wide[..., :37], _philox.keep_mask(seed, 0.3, 2, 3, 5, 37, torch.device("cpu")))
    assert not torch.equal(wide, _philox.keep_mask(seed + 1, 0.3, 2, 3, 5, 101, torch.device("cpu")))


@pytest.mark.parametrize("feature", ["plain", "causal", EVERYTHING])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_dropout_of_a_seed(dtype, feature, backend, device, poisoned):
    # the registered op against the formulas, both with the mask that the seed stands for
    shape = SHAPES[1]
    more, options = features(feature, shape, dtype, device)
    tensors = {**inputs(shape, dtype, device), **more}
    order = ("q", "k", "v", *Variant._fields[:4])
    seed = torch.tensor([2**62 + 11, 3])

    def call(function, **kw):
        given = [kw.get(n) for n in order]
        q = given[0]
        variant = arguments.make_variant(
            "attention",
            q,
            (*q.shape[:3], given[1].shape[2]),
            **{n: kw.get(n) for n in (*Variant._fields[:4], "window", "softcap")},
            causal=kw.get("causal", False),
            scale=None,
            dropout_p=0.3,
            deterministic=True,
        )
        return function(*given[:3], variant)

    def op(q, k, v, variant):
        skip_unless(registration.why_not(backend, "attention", q, k, v, variant))
        return torch.ops.transfuse.attention(q, k, v, *variant, seed.to(q.device), backend)

    def formulas(q, k, v, variant):
        return reference.attention(q, k, v, variant, torch_impl.keep_of(variant, seed, q, k))

    grad_outputs = [torch.randn(1, 4, 37, 64, device=device), torch.randn(1, 4, 37, device=device)]
    sizes = sizes_of_intermediates(tensors, options, grad_outputs)
    check(
        functools.partial(call, op),
        functools.partial(call, formulas),
        tensors,
        grads=[n for n, t in tensors.items() if t.is_floating_point()],
        names=("out", "lse"),
        grad_outputs=grad_outputs,
        sizes={n: size / 0.7 for n, size in sizes.items()},
        **options,
    )


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 2.0}, {"sinks": torch.zeros(4)}], ids=str)
def test_dropout_drops_weights_and_its_gradient_knows_which(options, scores, backend, device):
    length, p = 48, 0.3
    q, k = (torch.randn(2, 4, length, length, device=device, dtype=torch.float64) for _ in range(2))
    skip_unless(registration.why_not(backend, "attention", q, k, k, Variant(dropout_p=p)))
    options = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    torch.manual_seed(7)
    dropped = attention(q, k, torch.eye(length, device=device, dtype=q.dtype).expand(2, 4, length, length),
                        dropout_p=p, backend=backend, **options)  # fmt: skip
    _, lse = attention(q, k, k, return_lse=True, backend=backend, **options)
    shaping = {n: v for n, v in options.items() if n != "sinks"}
    weights = attention_weights(q, k, lse, **shaping)
    seen = weights > 0
    keep = dropped > 0
    torch.testing.assert_close(dropped, weights * keep / (1 - p))
    rate = 1 - keep[seen].double().mean().item()
    assert abs(rate - p) < 5 * math.sqrt(p * (1 - p) / seen.sum().item())

    leaves = {n: t.clone().requires_grad_() for n, t in (("q", q), ("k", k), ("v", torch.randn_like(k)))}
    torch.manual_seed(7)
    out = attention(**leaves, dropout_p=p, backend=backend, **options)
    grads = torch.autograd.grad(out.square().sum(), list(leaves.values()))
    s = leaves["q"] @ leaves["k"].mT / length**0.5
    s = 2.0 * torch.tanh(s / 2.0) if "softcap" in options else s
    s = s.masked_fill(~seen, -math.inf)
    sink = torch.zeros(2, 4, length, 1, dtype=q.dtype, device=device)
    full = torch.softmax(torch.cat([s, sink], -1), -1)[..., :-1] if "sinks" in options else torch.softmax(s, -1)
    expected = (full * keep / (1 - p)) @ leaves["v"]
    torch.testing.assert_close(out, expected)
    for g, e in zip(grads, torch.autograd.grad(expected.square().sum(), list(leaves.values())), strict=True):
        torch.testing.assert_close(g, e)


def test_dropout_follows_the_seed(backend, device):
    tensors = inputs(SHAPES[0], torch.float32, device)
    skip_unless(registration.why_not(backend, "attention", *tensors.values(), Variant(dropout_p=0.5)))

    def draw(seed):
        torch.manual_seed(seed)
        return attention(**tensors, dropout_p=0.5, backend=backend)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1), attention(**tensors, dropout_p=0.5, backend=backend))


def test_the_reference_and_the_registered_op_draw_the_same_mask():
    q, k, v = (torch.randn(2, 4, 9, 16) for _ in range(3))
    torch.manual_seed(3)
    expected = attention(q, k, v, dropout_p=0.4, backend="reference")
    torch.manual_seed(3)
    seed = _philox.draw_seed()
    out, _ = torch.ops.transfuse.attention(q, k, v, *Variant(scale=0.25, dropout_p=0.4), seed, "torch")
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("feature", ["causal", "bias", "lower_right-mask-bias-alibi-window-softcap-sinks"])
def test_gradients_repeat_bitwise(feature, scores, backend, device):
    more, options = features(feature, SHAPES[1], torch.float32, device)
    tensors = {**inputs(SHAPES[1], torch.float32, device), **more}
    skip_unless(registration.why_not(backend, "attention", *(tensors[n] for n in "qkv"), Variant()))
    leaves = [t.requires_grad_() for t in tensors.values() if t.is_floating_point()]

    def gradients():
        out = attention(**tensors, **options, deterministic=True, backend=backend)
        return torch.autograd.grad(out.sum(), leaves)

    for a, b in zip(gradients(), gradients(), strict=True):
        assert torch.equal(a, b)


# --- torch's own ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_agrees_with_torch(dtype):
    q, k, v = inputs(Shape(2, 6, 2, 33, 33, 64, 64), dtype).values()
    mask = torch.rand(2, 1, 33, 33) > 0.3
    with torch.no_grad():
        for ours, theirs in (({}, {}), ({"causal": True}, {"is_causal": True}), ({"mask": mask}, {"attn_mask": mask})):
            expected = F.scaled_dot_product_attention(q, k, v, **theirs, enable_gqa=True)
            assert torch.equal(attention(q, k, v, **ours), expected)


def test_autocast_computes_in_its_dtype():
    q, k, v = (t.requires_grad_() for t in inputs(SHAPES[1], torch.float32).values())
    bias = torch.randn(37, 53)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = attention(q, k, v, bias=bias, softcap=2.0, return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    expected = attention(*(t.bfloat16() for t in (q, k, v)), bias=bias, softcap=2.0, return_lse=True)
    assert all(map(torch.equal, (out, lse), expected))
    out.sum().backward()
    assert q.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(q.double(), k.double(), v.double()).dtype == torch.float64


@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize("causal", [False, True, "lower_right"])
@pytest.mark.parametrize("length", [4, 300])
def test_a_scale_that_is_not_positive_hides_no_less(scale, causal, length):
    tensors = inputs(Shape(1, 2, 2, length, length, 8, 8), torch.float32)
    run(tensors, "torch", causal=causal, scale=scale)
