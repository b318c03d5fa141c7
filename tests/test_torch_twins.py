"""transfuse.nn's torch.nn classes against torch's own: results, gradients, parameters, state, hooks, errors."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import transfuse.nn as ours
from transfuse.errors import ArgumentError
from transfuse.nn.transformer import TWINS

DTYPE = torch.float64
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
N, L, S, E, H = 3, 5, 7, 12, 3


def twins(name: str, *args: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Torch's module and ours, made from the same random numbers."""
    made = []
    for library in (nn, ours):
        torch.manual_seed(1)
        made.append(getattr(library, name)(*args, **options))
    for key, value in made[0].state_dict().items():
        assert torch.equal(value, made[1].state_dict()[key])
    with torch.no_grad():  # biases and norms start at 0 and 1: a mistake there would not show
        for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True):
            a.add_(0.1 * torch.randn_like(a))
            b.copy_(a)
    return made[0], made[1]


def flat(result: Any) -> list[torch.Tensor]:
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]


def same(theirs: nn.Module, mine: nn.Module, inputs: list[torch.Tensor], rows: Any = ..., **options: Any) -> None:
    """Outputs, gradients of inputs and of parameters."""
    found = []
    for module in (theirs, mine):
        leaves = [x.clone().requires_grad_() for x in inputs]
        leaves = [leaves[0]] * 3 if options.get("one") else leaves
        module.zero_grad()
        outputs = flat(module(*leaves, **{k: v for k, v in options.items() if k != "one"}))
        outputs[0] = outputs[0][rows]
        sum((o * torch.linspace(1, 2, o.numel(), dtype=o.dtype).view_as(o)).sum() for o in outputs).backward()
        found.append([*outputs, *(x.grad for x in leaves), *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(b, a, **CLOSE)


def masks(kind: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    padding = torch.arange(columns) >= torch.tensor([columns, columns - 2, 1])[:, None]
    hidden = torch.rand(rows, columns) > 0.7
    hidden[:, 0] = False
    return {
        "none": {},
        "bool": {"attn_mask": hidden},
        "float": {"attn_mask": torch.randn(rows, columns, dtype=DTYPE)},
        "bool3": {"attn_mask": hidden.expand(N * H, -1, -1).clone()},
        "float3": {"attn_mask": torch.randn(N * H, rows, columns, dtype=DTYPE)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
        "both_float": {
            "attn_mask": torch.randn(rows, columns, dtype=DTYPE),
            "key_padding_mask": torch.zeros(N, columns, dtype=DTYPE).masked_fill(padding, -torch.inf),
        },
        "causal": {"attn_mask": torch.ones(rows, columns, dtype=torch.bool).triu(1), "is_causal": True},  # type: ignore[dict-item]
    }[kind]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False, "batch_first": True},
    "own_widths": {"kdim": 6, "vdim": 10, "batch_first": True},
    "bias_kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True, "batch_first": True},
    "bias_kv_zero_widths": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "bias": False},
}


@pytest.mark.parametrize("weights", ["averaged", "each", "none"])
@pytest.mark.parametrize(
    "kind", ["none", "bool", "float", "bool3", "float3", "padding", "both", "both_float", "causal"]
)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_multihead_attention(variant: str, kind: str, weights: str) -> None:
    options = VARIANTS[variant]
    theirs, mine = twins("MultiheadAttention", E, H, dtype=DTYPE, **options)
    widths = (E, options.get("kdim", E), options.get("vdim", E))
    inputs = [torch.randn(N, n, w, dtype=DTYPE) for n, w in zip((L, S, S), widths, strict=True)]
    if not options.get("batch_first"):
        inputs = [x.transpose(0, 1) for x in inputs]
    call: dict[str, Any] = {"need_weights": weights != "none", "average_attn_weights": weights == "averaged"}
    given = masks(kind, L, S)
    if kind == "causal" and ("zero" in variant or "kv" in variant):
        given.pop("is_causal")  # torch then hides the keys that it appends, or not, by need_weights
    same(theirs, mine, inputs, **call, **given)


@pytest.mark.parametrize("kind", ["one", "key_is_value", "unbatched", "unbatched_masked"])
def test_multihead_attention_of_shared_and_single_inputs(kind: str) -> None:
    theirs, mine = twins("MultiheadAttention", E, H, dtype=DTYPE)
    if kind == "one":
        same(theirs, mine, [torch.randn(L, N, E, dtype=DTYPE)], one=True)
    elif kind == "key_is_value":
        q, k = torch.randn(L, N, E, dtype=DTYPE), torch.randn(S, N, E, dtype=DTYPE)
        for a, b in zip(flat(theirs(q, k, k)), flat(mine(q, k, k)), strict=True):
            torch.testing.assert_close(b, a, **CLOSE)
    else:
        options: dict[str, Any] = {}
        if kind == "unbatched_masked":
            options = {"attn_mask": torch.rand(H, L, S) > 0.8, "key_padding_mask": torch.arange(S) > 4}
        inputs = [torch.randn(n, E, dtype=DTYPE) for n in (L, S, S)]
        same(theirs, mine, inputs, **options)


@pytest.mark.parametrize("sizes", [(0, L, S), (N, 0, S), (N, L, 0)], ids=["batch", "queries", "keys"])
def test_nothing_in_nothing_out(sizes: tuple[int, int, int]) -> None:
    n, rows, columns = sizes
    theirs, mine = twins("MultiheadAttention", E, H, batch_first=True)
    q, k = torch.randn(n, rows, E), torch.randn(n, columns, E)
    expected, got = theirs(q, k, k), mine(q, k, k)
    assert [t.shape for t in got] == [t.shape for t in expected]
    if columns:
        torch.testing.assert_close(got, expected)


def test_a_query_that_sees_nothing_gives_zero() -> None:
    theirs, mine = twins("MultiheadAttention", E, H, batch_first=True)
    x = torch.randn(2, L, E, requires_grad=True)
    padding = torch.tensor([[False] * L, [True] * L])
    out, weights = mine(x, x, x, key_padding_mask=padding)
    assert theirs(x, x, x, key_padding_mask=padding)[0][1].isnan().all()
    assert torch.equal(out[1], mine.out_proj.bias.expand(L, E))
    assert weights[1].eq(0).all()
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.isfinite().all()


def test_a_learned_mask_gets_its_gradient() -> None:
    theirs, mine = twins("MultiheadAttention", E, H, dtype=DTYPE)
    x = torch.randn(L, N, E, dtype=DTYPE)
    grads = []
    for module in (theirs, mine):
        bias = torch.ones(L, L, dtype=DTYPE).mul(0.3).requires_grad_()
        grads += torch.autograd.grad(module(x, x, x, attn_mask=bias)[0].square().sum(), bias)
    torch.testing.assert_close(grads[1], grads[0], **CLOSE)


LAYERS = {
    "post": {},
    "pre": {"norm_first": True},
    "gelu": {"activation": "gelu", "batch_first": True},
    "module": {"activation": nn.GELU(approximate="tanh"), "batch_first": True, "norm_first": True},
    "callable": {"activation": torch.tanh, "bias": False},
}


@pytest.mark.parametrize("kind", ["none", "bool", "float", "padding", "both", "causal"])
@pytest.mark.parametrize("variant", LAYERS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_layers(variant: str, kind: str, training: bool) -> None:
    options: dict[str, Any] = {"dropout": 0.0, "dtype": DTYPE, **LAYERS[variant]}
    batch_first = options.get("batch_first", False)
    tgt, memory = torch.randn(N, L, E, dtype=DTYPE), torch.randn(N, S, E, dtype=DTYPE)
    tgt, memory = (x if batch_first else x.transpose(0, 1) for x in (tgt, memory))
    given = masks(kind, L, L)
    names = {"attn_mask": "src_mask", "key_padding_mask": "src_key_padding_mask"}
    theirs, mine = twins("TransformerEncoderLayer", E, H, 20, **options)
    same(theirs.train(training), mine.train(training), [tgt], **{names.get(k, k): v for k, v in given.items()})
    names = {"attn_mask": "tgt_mask", "key_padding_mask": "tgt_key_padding_mask", "is_causal": "tgt_is_causal"}
    theirs, mine = twins("TransformerDecoderLayer", E, H, 20, **options)
    padding = torch.arange(S) >= torch.tensor([S, 2, 4])[:, None]
    padding = padding if kind != "float" else torch.zeros(N, S, dtype=DTYPE).masked_fill(padding, -torch.inf)
    arguments = {names.get(k, k): v for k, v in given.items()}
    arguments |= {} if kind == "none" else {"memory_key_padding_mask": padding}
    same(theirs.train(training), mine.train(training), [tgt, memory], **arguments)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_transformer(norm_first: bool, training: bool) -> None:
    options = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first, "dtype": DTYPE}
    theirs, mine = twins("Transformer", E, H, 2, 2, 20, **options)
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    src, tgt = torch.randn(N, S, E, dtype=DTYPE), torch.randn(N, L, E, dtype=DTYPE)
    padding = torch.arange(S) >= torch.tensor([S, S - 2, 1])[:, None]
    given = {
        "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(L, dtype=DTYPE),
    }
    same(theirs.train(training), mine.train(training), [src, tgt], **given)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("side", ["right", "left", "empty_row"])
@pytest.mark.parametrize("enabled", [True, False])
def test_an_encoder_in_inference_leaves_padding_out(enabled: bool, side: str) -> None:
    made = []
    for library in (nn, ours):
        torch.manual_seed(1)
        layer = library.TransformerEncoderLayer(E, 2, 20, batch_first=True, dtype=DTYPE)
        norm = library.LayerNorm(E, dtype=DTYPE)
        made.append(library.TransformerEncoder(layer, 2, norm, enable_nested_tensor=enabled).eval())
    src = torch.randn(N, S, E, dtype=DTYPE)
    padding = torch.arange(S) >= torch.tensor([S, S - 2, 1])[:, None]
    if side == "left":
        padding = padding.flip(1)
    elif side == "empty_row":
        padding[2] = True
    with torch.no_grad():
        expected, got = (m(src, src_key_padding_mask=padding) for m in made)
    keep = ~padding
    if side == "empty_row":
        keep[2] = False
    torch.testing.assert_close(got[keep], expected[keep], **CLOSE)
    if enabled:
        assert torch.equal(got[padding], made[1].norm(torch.zeros(E, dtype=DTYPE)).expand(int(padding.sum()), E))
    with torch.enable_grad():  # gradients are wanted: nothing is packed
        full = made[1](src, src_key_padding_mask=padding)
    torch.testing.assert_close(full[keep], expected[keep], **CLOSE)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_our_layer_in_torch_s_encoder() -> None:
    torch.manual_seed(1)
    layer = ours.TransformerEncoderLayer(E, 2, 20, batch_first=True, dtype=DTYPE)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    src = torch.randn(N, S, E, dtype=DTYPE)
    padding = torch.arange(S) >= torch.tensor([S, S - 2, 1])[:, None]
    with torch.no_grad():
        nested = encoder(src, src_key_padding_mask=padding)
        plain = src
        for part in encoder.layers:
            plain = part(plain, src_key_padding_mask=padding)
    torch.testing.assert_close(nested[~padding], plain[~padding], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_is_as_near_to_the_truth_as_torch(dtype: torch.dtype) -> None:
    theirs, mine = twins("TransformerEncoderLayer", 64, 4, 128, dropout=0.0, batch_first=True, dtype=dtype)
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(N, 33, 64).to(dtype)
    padding = torch.arange(33) >= torch.tensor([33, 20, 9])[:, None]
    truth = exact(x.double(), src_key_padding_mask=padding)
    errors = [(m(x, src_key_padding_mask=padding).double() - truth).abs().max().item() for m in (theirs, mine)]
    assert errors[1] <= 2 * errors[0] + torch.finfo(dtype).eps * truth.abs().max().item()


def test_autocast_keeps_the_stream_as_torch_does() -> None:
    theirs, mine = twins("TransformerEncoderLayer", 64, 4, 128, dropout=0.0, batch_first=True)
    x = torch.randn(N, 9, 64)
    truth = copy.deepcopy(theirs).double()(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [m(x) for m in (theirs, mine)]
    assert outputs[1].dtype == outputs[0].dtype
    errors = [(out.double() - truth).abs().max().item() for out in outputs]
    assert errors[1] <= 2 * errors[0]


def test_dropout_drops_in_training_alone() -> None:
    layer = ours.TransformerEncoderLayer(64, 4, 256, dropout=0.5, batch_first=True)
    x = torch.randn(2, 40, 64)
    assert not torch.equal(layer(x), layer(x))
    attention = ours.MultiheadAttention(64, 4, dropout=0.5, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight[128:] = torch.cat([torch.eye(64)])
        attention.in_proj_weight[:128] = 0.0
        attention.out_proj.weight.copy_(torch.eye(64))
    ones = torch.ones(64, 100, 64)
    dropped = attention(ones, ones, ones, need_weights=False)[0]
    assert abs(dropped.mean().item() - 1.0) < 0.01  # what is kept grows by 1 / (1 - p)
    expected = (1.0 / 100) ** 0.5  # of the mean of 100 keys, each 0 or 2
    assert abs(dropped[:, :, 0].std().item() / expected - 1) < 0.1
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_constructors_state_copies_and_pickles() -> None:
    for theirs, mine in TWINS.items():
        assert issubclass(mine, theirs)
        assert inspect.signature(mine) == inspect.signature(theirs)
        assert getattr(ours, theirs.__name__) is mine
    model = ours.Transformer(E, H, 1, 1, 20, batch_first=True)
    assert not [m for m in model.modules() if type(m) in TWINS]
    x = torch.randn(2, 4, E)
    model.eval()
    expected = model(x, x)
    restored = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(torch.float64).to(torch.float32)]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    restored.append(torch.load(buffer, weights_only=False))
    plain = nn.Transformer(E, H, 1, 1, 20, batch_first=True).eval()
    plain.load_state_dict(model.state_dict())
    for other in restored:
        assert type(other) is ours.Transformer
        assert torch.equal(other(x, x), expected)
    torch.testing.assert_close(plain(x, x), expected)


def test_a_custom_encoder_stays_as_it_is() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 2, 20, batch_first=True), 1)
    model = ours.Transformer(E, 2, 1, 1, 20, batch_first=True, custom_encoder=encoder)
    assert type(model.encoder.layers[0]) is nn.TransformerEncoderLayer
    assert type(model.decoder.layers[0]) is ours.TransformerDecoderLayer


@pytest.mark.parametrize("place", ["linear1", "linear2", "dropout", "norm1", "norm2", "self_attn", "dropout1"])
def test_hooks_see_what_torch_s_see(place: str) -> None:
    made = twins("TransformerEncoderLayer", E, H, 20, dropout=0.0, batch_first=True, dtype=DTYPE)
    x, seen = torch.randn(N, L, E, dtype=DTYPE), []
    for layer in made:
        calls: list[torch.Tensor] = []
        layer.get_submodule(place).register_forward_hook(lambda m, i, o, calls=calls: calls.append(flat(o)[0]))
        out = layer(x)
        seen.append([*calls, out])
    assert len(seen[0]) == len(seen[1]) == 2
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(b, a, **CLOSE)


def test_a_hook_may_change_what_it_sees() -> None:
    theirs, mine = twins("TransformerEncoderLayer", E, H, 20, dropout=0.0, dtype=DTYPE)
    for layer in (theirs, mine):
        layer.norm1.register_forward_hook(lambda m, i, o: 2 * o)
        layer.linear1.register_forward_pre_hook(lambda m, i: (i[0] + 1,))
    same(theirs, mine, [torch.randn(L, N, E, dtype=DTYPE)])


def test_every_other_name_is_torch_s() -> None:
    for name in ("Linear", "init", "TransformerDecoder"):
        assert getattr(ours, name) is getattr(nn, name)
        assert name in dir(ours)
    assert ours.functional.cross_entropy is nn.functional.cross_entropy
    assert "softmax" in dir(ours.functional)
    q = torch.randn(1, 2, 3, 4)
    mask = torch.zeros(3, 3, dtype=torch.bool)
    assert ours.functional.scaled_dot_product_attention(q, q, q, mask).eq(0).all()
    with pytest.raises(AttributeError, match="Lineal"):
        _ = ours.Lineal


@pytest.mark.parametrize("what", ["layer", "encoder", "attention"])
def test_compiles_whole(what: str) -> None:
    torch._dynamo.reset()
    layer = ours.TransformerEncoderLayer(E, H, 20, dropout=0.0, batch_first=True)
    module: Any = {
        "layer": layer,
        "encoder": ours.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        "attention": ours.MultiheadAttention(E, H, batch_first=True),
    }[what]
    padding = torch.arange(L) >= torch.tensor([L, 2, 4])[:, None]

    def run(x: torch.Tensor) -> torch.Tensor:
        if what == "attention":
            return module(x, x, x, key_padding_mask=padding)[0]
        return module(x, src_key_padding_mask=padding)

    x = torch.randn(N, L, E, requires_grad=True)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).square().sum(), x), torch.autograd.grad(run(x).square().sum(), x)
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, x: m(x[0, 0], x[0, 0], x[0, 0]), "must have 3 dimensions, or all of them 2"),
        (lambda m, x: m(x, x[0], x[0]), "must have 3 dimensions, or all of them 2"),
        (lambda m, x: m(x[..., :4], x, x), r"query must end in 12, got \(3, 5, 4\)"),
        (lambda m, x: m(x, x, x[:, :2]), "key and value must agree in length and batch"),
        (lambda m, x: m(x, x[:2], x[:2]), "one batch size, got 3 and 2; batch_first is True"),
        (lambda m, x: m(x, x, x, key_padding_mask=torch.zeros(5, 3).bool()), r"shape \(3, 5\), got \(5, 3\)"),
        (lambda m, x: m(x, x, x, attn_mask=torch.zeros(3, 5, 5).bool()), r"\(5, 5\) or \(9, 5, 5\), got \(3, 5, 5\)"),
        (lambda m, x: m(x, x, x, attn_mask=torch.zeros(5, 5).int()), r"bool or floating, got torch.int32; call .bool"),
    ],
)
def test_mistakes_are_refused_where_torch_refuses_them(call: Any, message: str) -> None:
    theirs, mine = (lib.MultiheadAttention(E, H, batch_first=True) for lib in (nn, ours))
    x = torch.randn(N, L, E)
    with pytest.raises((AssertionError, RuntimeError)):
        call(theirs.train(), x)
    with pytest.raises(ArgumentError, match=message):
        call(mine, x)
