"""Other people's models on transfuse: patch and unpatch, and transformers' attention dispatch."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import transfuse
from transfuse.errors import ArgumentError, MissingDependencyError

VOCAB, LENGTH = 50, 9
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
T5_SIZES = {
    "vocab_size": VOCAB,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART_SIZES = {
    "vocab_size": VOCAB,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
}
# name: (class, configuration); what computes in fp32 inside fp64 models stands in FP32_INSIDE.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", SIZES),
    "roberta": ("RobertaForMaskedLM", SIZES),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": VOCAB, "dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 40},
    ),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 24,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 3,
            "max_position_embeddings": 64,
        },
    ),
    "llama": ("LlamaForCausalLM", {**SIZES, "num_key_value_heads": 2}),
    "t5": ("T5ForConditionalGeneration", T5_SIZES),
    "t5_gated": ("T5ForConditionalGeneration", {**T5_SIZES, "feed_forward_proj": "gated-gelu"}),
    "marian": ("MarianMTModel", {**BART_SIZES, "pad_token_id": 49, "decoder_start_token_id": 49, "eos_token_id": 0}),
    "bart": ("BartForConditionalGeneration", BART_SIZES),
    "vit": (
        "ViTForImageClassification",
        {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 40,
            "image_size": 16,
            "patch_size": 4,
        },
    ),
}
FP32_INSIDE = ("llama", "t5", "t5_gated", "gpt_neo")
GENERATES = ("gpt2", "gpt_neo", "llama", "t5", "t5_gated", "marian", "bart")
# What the dispatch takes beyond the models above: a sliding window, soft capping, sinks.
DISPATCHED = {
    "mistral": ("MistralForCausalLM", {**SIZES, "num_key_value_heads": 2, "sliding_window": 3}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {**SIZES, "num_key_value_heads": 2, "head_dim": 6, "attn_logit_softcapping": 5.0, "sliding_window": 3},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            **SIZES,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "sliding_window": 3,
        },
    ),
}

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs the package transformers"
)


def build(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """A model with random weights and without dropout."""
    transformers = pytest.importorskip("transformers")
    class_name, sizes = {**MODELS, **DISPATCHED}[name]
    kind = getattr(transformers, class_name)
    torch.manual_seed(0)
    model: nn.Module = kind(kind.config_class(**sizes, **changes)).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute in ("dropout", "activation_dropout", "attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs(model: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    dtype = next(model.parameters()).dtype
    if "ViT" in type(model).__name__:
        return {"pixel_values": torch.randn(2, 3, 16, 16, dtype=dtype)}
    ids = torch.randint(3, 49, (2, LENGTH))
    mask = torch.ones_like(ids)
    # In a sliding window of 3 every query still sees something: transformers' own code gives NaN there in fp64.
    mask[1, 8 if getattr(model.config, "sliding_window", None) else 6 :] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(3, 49, (2, 5))
    return given


def results(model: Any, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Logits where they mean something, and every parameter's gradient."""
    model.zero_grad()
    logits = model(**given).logits
    if logits.dim() == 3 and not model.config.is_encoder_decoder:
        logits = logits * given["attention_mask"][..., None]
    (logits * torch.linspace(0, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def _collector_of_transformers() -> object:
    from transfuse.integrations import transformers_attention

    return transformers_attention._collector


def near(got: list[torch.Tensor], expected: list[torch.Tensor], limit: float) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= limit * (1e-3 + b.abs().max())


@needs_transformers
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_stay(name: str) -> None:
    model = build(name).train()
    given = inputs(model)
    before, state = results(model, given), {k: v.clone() for k, v in model.state_dict().items()}
    own = {id(p) for p in model.parameters()}
    report = transfuse.patch(model)
    assert {id(p) for p in model.parameters()} == own
    assert report.changed
    after = results(model, given)
    near(after, before, 1e-5 if name in FP32_INSIDE else 1e-10)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    transfuse.unpatch(model)
    for got, expected in zip(results(model, given), before, strict=True):
        assert torch.equal(got, expected)
    for other in copies:  # a copy is patched, and can be set back by itself
        for got, expected in zip(results(other, given), after, strict=True):
            assert torch.equal(got, expected)
        transfuse.unpatch(other)
        assert torch.equal(results(other, given)[0], before[0])
    assert not [m for m in model.modules() if hasattr(type(m), "fused_from")]


@needs_transformers
@pytest.mark.parametrize("name", MODELS)
def test_every_part_named_is_exchanged(name: str) -> None:
    model = build(name)
    report = transfuse.patch(model)
    words = " ".join(report.changed.values())
    if "not dispatched" not in str(report):  # by this version of transformers
        assert "attn_implementation" in words
    elif name == "gpt_neo":
        assert "transfuse.attention" in words
    assert ("rms_norm" if name in ("llama", "t5", "t5_gated") else "LayerNorm") in words
    if name in ("marian", "bart"):
        assert "feed-forward network is written out" in str(report)
    else:
        assert "linear_act" in words or "ffn" in words
    assert all(reason for reason in report.left.values())
    assert not transfuse.patch(model).changed  # all is done already


@needs_transformers
@pytest.mark.parametrize("name", GENERATES)
def test_generated_tokens_stay(name: str) -> None:
    model = build(name).eval()
    given = inputs(model)
    given.pop("decoder_input_ids", None)
    given["attention_mask"] = given["attention_mask"].flip(1)  # padding on the left
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    before = model.generate(**given, **options)
    with transfuse.patched(model):
        assert torch.equal(model.generate(**given, **options), before)
    assert torch.equal(model.generate(**given, **options), before)


@needs_transformers
@pytest.mark.parametrize("name", [*MODELS, *DISPATCHED])
def test_dispatched_attention(name: str) -> None:
    """Logits, every attention map and gradient against transformers' eager code."""
    transfuse.register_with_transformers()
    model: Any = build(name, torch.float32).eval()
    if not model._can_set_attn_implementation():
        pytest.skip("its attention is not dispatched by transformers")
    # A mixture of experts has no products of fp64.
    exact: Any = copy.deepcopy(model).to(torch.float32 if name == "gpt_oss" else torch.float64)
    given = inputs(model)
    found = []
    for part, implementation in ((exact, "eager"), (model, "eager"), (model, "transfuse")):
        part.set_attn_implementation(implementation)
        dtype = next(part.parameters()).dtype
        arguments = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
        out = part(**arguments, output_attentions=True)
        maps = [
            m[0]  # the row without padding: elsewhere a query may see nothing
            for key in ("attentions", "decoder_attentions", "encoder_attentions", "cross_attentions")
            for m in out.get(key) or ()
            if m is not None
        ]
        if _collector_of_transformers() is None:
            maps = []  # transformers 4 asks for them of its eager code alone
        else:
            assert maps
        found.append([*results(part, arguments), *maps])
    truth, eager, ours = found
    for t, e, o in zip(truth, eager, ours, strict=True):
        size = t.abs().max().item()
        error, budget = (o - t).abs().max().item(), (e - t).abs().max().item()
        assert error <= 2 * budget + 64 * torch.finfo(torch.float32).eps * max(size, 1e-2)


@needs_transformers
def test_a_position_bias_gets_its_gradient() -> None:
    transfuse.register_with_transformers()
    model: Any = build("t5")
    model.set_attn_implementation("transfuse")
    results(model, inputs(model))
    table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert table.grad.abs().sum() > 0


@needs_transformers
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_training_run_keeps_its_losses(name: str) -> None:
    losses = []
    for use in (False, True):
        model: Any = build(name, torch.float32).train()
        if use:
            transfuse.patch(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        torch.manual_seed(2)
        curve = []
        for _ in range(20):
            given = inputs(model)
            given.pop("decoder_input_ids", None)
            labels = torch.tensor([0, 1]) if name == "bert" else given["input_ids"][:, :5].contiguous()
            loss = model(**given, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses.append(torch.tensor(curve))
    assert losses[0][-1] < 0.8 * losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)


@needs_transformers
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_gradient_checkpointing(name: str) -> None:
    model: Any = build(name).train()
    given = inputs(model)
    before = results(model, given)
    with transfuse.patched(model):
        model.gradient_checkpointing_enable()
        near(results(model, given), before, 1e-5)


@needs_transformers
@pytest.mark.parametrize("name", ["bert", "gpt_neo", pytest.param("t5", marks=pytest.mark.slow)])
def test_compiles_whole(name: str) -> None:
    torch._dynamo.reset()
    model: Any = build(name).eval()
    transfuse.patch(model)
    given = inputs(model)
    expected = results(model, given)
    near(results(torch.compile(model, fullgraph=True, backend="aot_eager"), given), expected, 1e-5)


@needs_transformers
def test_what_is_not_torch_s_own_is_called_step_by_step() -> None:
    model: Any = build("llama").eval()
    given = inputs(model)
    layer = model.model.layers[0].mlp
    calls: list[str] = []
    layer.act_fn.register_forward_hook(lambda *_: calls.append("activation"))
    layer.up_proj = nn.Sequential(layer.up_proj)  # as an adapter wraps it
    before = results(model, given)[0]
    calls.clear()
    transfuse.patch(model)
    near(results(model, given)[:1], [before], 1e-5)
    assert calls == ["activation"]


@needs_transformers
def test_half_precision_with_an_fp32_last_weight() -> None:
    model: Any = build("t5", torch.bfloat16).eval()
    for block in model.encoder.block:
        block.layer[-1].DenseReluDense.wo.float()
    exact = copy.deepcopy(model).double()
    given = inputs(model)
    truth, before = exact(**given).logits, model(**given).logits
    transfuse.patch(model)
    budget = (before.double() - truth).abs().max()
    assert (model(**given).logits.double() - truth).abs().max() <= 2 * budget


def test_modules_of_torch() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2),
            "attention": nn.MultiheadAttention(16, 4, batch_first=True),
            "norm": nn.RMSNorm(16),
            "other": type("OwnNorm", (nn.LayerNorm,), {})(16),
        }
    ).eval()
    inputs = torch.randn(2, 5, 16)

    def run() -> torch.Tensor:
        x = model["encoder"](inputs)
        result: torch.Tensor = model["other"](model["norm"](model["attention"](x, x, x)[0]))
        return result

    before = run()
    kinds = {name: type(module) for name, module in model.named_modules()}
    report = transfuse.patch(model)
    torch.testing.assert_close(run(), before)
    assert report.changed["encoder.layers.1.self_attn"] == "MultiheadAttention -> transfuse.nn.MultiheadAttention"
    assert report.left["other"].startswith("OwnNorm: a subclass of torch.nn.LayerNorm")
    transfuse.unpatch(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert torch.equal(run(), before)
    transfuse.unpatch(model)  # nothing left to undo


def test_a_with_block_leaves_an_earlier_patch_alone() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    transfuse.patch(model)
    model.append(nn.RMSNorm(8))
    with transfuse.patched(model):
        assert isinstance(model[1], transfuse.nn.RMSNorm)
    assert type(model[1]) is nn.RMSNorm
    assert isinstance(model[0], transfuse.nn.LayerNorm)
    transfuse.unpatch(model)
    assert type(model[0]) is nn.LayerNorm
    with pytest.raises(ArgumentError, match=r"model must be a torch\.nn\.Module, got int"):
        transfuse.patch(3)  # type: ignore[arg-type]


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(
        MissingDependencyError, match=r"needs transformers 4\.53 or later .* pip install -U transformers"
    ):
        transfuse.register_with_transformers()
