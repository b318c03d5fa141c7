"""Every architecture against a second, plain transformer: values, attention maps and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from model_cases import ARCHITECTURES, POSITIONS, VARIANTS, build, make_config, one_thread, some_inputs  # noqa: F401 (a fixture)
from oracle import judge, to_fp64
from plain_transformer import transformer

ACTIVATIONS = list(itertools.product(["relu", "gelu", "gelu_tanh", "silu"], [False, True]))


def compare(config, model, inputs):
    """Judges hidden states, logits, pooled output and attention maps against the plain transformer."""
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
        state = model.state_dict()
        truth = transformer(config, to_fp64(state), **inputs)
        plain = transformer(config, state, **inputs)
    got = (out.last_hidden_state, out.logits, out.pooler_output, out.attentions, out.cross_attentions)
    names = ("last_hidden_state", "logits", "pooler_output", "attentions", "cross_attentions")
    mask = inputs.get("attention_mask")
    real = None if mask is None or config.is_encoder_decoder else mask.bool()
    for name, g, t, p in zip(names, got, truth, plain, strict=True):
        assert (g is None or len(g) == 0) == (t is None or len(t) == 0), name
        if g is None:
            continue
        for i, (a, b, c) in enumerate(zip(*map(listed, (g, t, p)), strict=True)):
            if real is not None and name in ("last_hidden_state", "logits"):
                a, b, c = a[real], b[real], c[real]
            elif real is not None and name == "attentions":
                a, b, c = (x.transpose(1, 2)[real] for x in (a, b, c))
            # scores and statistics round at the size of the stream, not at the size of what comes out
            verdict = judge(f"{name}[{i}]", a, b, c, size=8.0)
            assert verdict.ok, verdict


def listed(x):
    return [x] if isinstance(x, torch.Tensor) else list(x)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_plain_transformer(architecture, placement, norm, position):
    first = ARCHITECTURES.index(architecture) + POSITIONS.index(position) + (norm == "rms")
    for activation, gated in ACTIVATIONS[first % 4 :: 4]:  # all eight within a few cases
        config = make_config(
            architecture,
            norm_placement=placement,
            norm=norm,
            position=position,
            activation=activation,
            gated=gated,
            final_norm=placement == "pre",
        )
        compare(config, build(config), some_inputs(config))


@pytest.mark.parametrize("padded", [None, "left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_variants_equal_the_plain_transformer(architecture, variant, padded):
    changes = dict(VARIANTS[variant])
    if architecture != "encoder_decoder":
        changes.pop("num_decoder_layers", None)
    config = make_config(architecture, **changes)
    compare(config, build(config), some_inputs(config, padded=padded))


def test_token_types_and_pooler():
    config = make_config(type_vocab_size=3, pooler=True, norm_placement="post", final_norm=False, embedding_norm=True)
    model = build(config)
    inputs = some_inputs(config)
    compare(config, model, inputs)
    compare(config, model, {**inputs, "token_type_ids": torch.randint(0, 3, (3, 9))})


def test_unequal_halves():
    config = make_config(
        "encoder_decoder",
        num_decoder_layers=3,
        num_decoder_heads=2,
        decoder_intermediate_size=40,
        decoder_vocab_size=71,
        share_embeddings=False,
        head_dim=8,
    )
    compare(config, build(config), some_inputs(config))


GRADIENT_CASES = {
    "pre-layer": {},
    "post-rms": {"norm_placement": "post", "norm": "rms"},
    "relative-gated": {"position": "relative", "gated": True},
    "rotary-grouped-softcap": {"position": "rotary", "num_kv_heads": 2, "softcap": 3.0, "activation": "silu"},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradients_equal_the_plain_transformer(architecture, case):
    """Every parameter gets a gradient, and the right one."""
    config = make_config(architecture, tie_embeddings=False, **GRADIENT_CASES[case])
    model = build(config)
    inputs = some_inputs(config, padded="right")

    def loss(hidden, scores):
        out = hidden if scores is None else scores
        out = out if config.is_encoder_decoder else out[inputs["attention_mask"].bool()]
        torch.manual_seed(1)
        return (out * torch.randn(out.shape, dtype=torch.float64).to(out.dtype)).sum()

    out = model(**inputs)
    loss(out.last_hidden_state, out.logits).backward()
    truth, plain = (plain_gradients(config, model, inputs, loss, d) for d in (torch.float64, torch.float32))
    # a gradient sums over all tokens, and cancels where the norm removes a direction
    size = max(g.abs().max().item() for g in truth.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        verdict = judge(name, parameter.grad, truth[name], plain[name], size=size)
        assert verdict.ok, verdict


def plain_gradients(config, model, inputs, loss, dtype):
    leaves = {n: p.detach().to(dtype).requires_grad_() for n, p in model.named_parameters()}
    params = dict(leaves)
    if config.is_encoder_decoder:
        params["decoder.embeddings.token.weight"] = params["encoder.embeddings.token.weight"]
    hidden, scores, *_ = transformer(config, params, **inputs)
    return dict(zip(leaves, torch.autograd.grad(loss(hidden, scores), list(leaves.values())), strict=True))


@pytest.mark.parametrize("position", POSITIONS)
def test_low_precision_stays_near(position):
    """A bf16 model errs no more than the plain transformer does in bf16."""
    config = make_config("decoder", position=position, norm="rms", gated=True, activation="silu")
    model = build(config).to(torch.bfloat16)
    ids = torch.randint(0, 61, (2, 12))
    with torch.no_grad():
        state = model.state_dict()
        got = model(ids).logits
        truth, plain = (transformer(config, s, ids)[1] for s in (to_fp64(state), state))
    verdict = judge("logits", got, truth, plain)
    assert verdict.ok, verdict
