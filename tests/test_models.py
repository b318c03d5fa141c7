"""What Encoder, Decoder, Seq2Seq and the heads promise: padding, outputs, ties, copies, dtypes, compiling, errors."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields, replace

import pytest
import torch

from model_cases import ARCHITECTURES, POSITIONS, VARIANTS, build, build_seeded, make_config, one_thread, some_inputs  # noqa: F401 (a fixture)
from transfuse import models
from transfuse.errors import ArgumentError, ConfigError, DeviceError, DtypeError
from transfuse.models import Decoder, Encoder, ModelOutput, Seq2Seq, TransformerConfig


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_changes_nothing(architecture, position, side):
    """Each row of a padded batch equals the row alone; garbage in the padding makes no difference."""
    config = make_config(architecture, position=position)
    model = build(config).double()
    inputs = some_inputs(config, padded=side)
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        out = model(**inputs).last_hidden_state
        other = {**inputs, "input_ids": torch.where(mask, inputs["input_ids"], 60 - inputs["input_ids"])}
        again = model(**other).last_hidden_state
        for row in range(3):
            alone = {k: v[row : row + 1] for k, v in inputs.items() if k != "attention_mask"}
            alone["input_ids"] = inputs["input_ids"][row : row + 1, mask[row]]
            expected = model(**alone).last_hidden_state[0]
            keep = slice(None) if config.is_encoder_decoder else mask[row]
            torch.testing.assert_close(out[row, keep], expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(again[row, keep], expected, rtol=0, atol=1e-12)
    assert out.isfinite().all()


def test_all_ones_mask_is_no_mask():
    config = make_config()
    model = build(config)
    ids = torch.randint(0, 61, (2, 5))
    seen = []
    model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[2].mask))
    a, b = model(ids).last_hidden_state, model(ids, torch.ones_like(ids)).last_hidden_state
    assert torch.equal(a, b)
    assert seen == [None, None]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs(architecture):
    config = make_config(architecture, num_kv_heads=2)
    model = build(config)
    inputs = some_inputs(config)
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    plain = model(**inputs)
    assert plain.hidden_states is None
    assert plain.attentions is None
    assert torch.equal(out.last_hidden_state, plain.last_hidden_state)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    length = 7 if config.is_encoder_decoder else 9
    assert [tuple(a.shape) for a in out.attentions] == [(3, 4, length, length)] * 2
    if config.is_encoder_decoder:
        assert [tuple(a.shape) for a in out.cross_attentions] == [(3, 4, 7, 9)] * 2
        assert len(out.encoder_hidden_states) == 3
        assert [tuple(a.shape) for a in out.encoder_attentions] == [(3, 4, 9, 9)] * 2
        assert out.decoder_hidden_states is out.hidden_states
        assert out.decoder_attentions is out.attentions
        assert torch.equal(out.encoder_hidden_states[-1], out.encoder_last_hidden_state)
    else:
        assert out.cross_attentions is None


def test_explicit_positions():
    for position in ("learned", "sinusoidal", "rotary"):
        config = make_config("decoder", position=position)
        model = build(config)
        ids = torch.randint(0, 61, (2, 5))
        expected = model(ids).logits
        for given in (torch.arange(5), torch.arange(5)[None], torch.arange(5).expand(2, 5)):
            torch.testing.assert_close(model(ids, position_ids=given).logits, expected)
        assert not torch.allclose(model(ids, position_ids=torch.arange(5).flip(0)).logits, expected)


def test_sinusoids_beyond_max_positions():
    """The table grows; nothing depends on max_positions."""
    short, long = (build_seeded(make_config("decoder", position="sinusoidal", max_positions=n)) for n in (4, 400))
    ids = torch.randint(0, 61, (1, 100))
    assert torch.equal(short(ids).logits, long(ids).logits)


def test_last_logits_only():
    for architecture in ("decoder", "encoder_decoder"):
        config = make_config(architecture)
        model = build(config)
        inputs = some_inputs(config)
        full, last = model(**inputs).logits, model(**inputs, last_logits_only=True).logits
        assert last.shape == (3, 1, 61)
        torch.testing.assert_close(last, full[:, -1:])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout_in_training_only(architecture):
    config = make_config(architecture, hidden_dropout=0.3, attention_dropout=0.3, ffn_dropout=0.3)
    model = build(config)
    inputs = some_inputs(config)
    assert torch.equal(model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    model.train()
    torch.manual_seed(1)
    a = model(**inputs).last_hidden_state
    b = model(**inputs).last_hidden_state
    torch.manual_seed(1)
    c = model(**inputs).last_hidden_state
    assert torch.equal(a, c)
    assert not torch.equal(a, b)


@pytest.mark.parametrize("changes", [{}, *VARIANTS.values(), {"type_vocab_size": 2}], ids=["plain", *VARIANTS, "types"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_num_parameters(architecture, changes):
    """The count by part is exact, and the configuration knows it without building anything."""
    if architecture != "encoder_decoder":
        changes = {k: v for k, v in changes.items() if k != "num_decoder_layers"}
    for share in (True, False):
        config = make_config(architecture, pooler=architecture == "encoder", share_embeddings=share, **changes)
        model = build(config, device="meta")
        count = model.num_parameters()
        assert count.total == sum(p.numel() for p in model.parameters())
        assert count.total == config.num_parameters()


def test_num_parameters_by_part():
    config = TransformerConfig(
        "decoder", 100, 16, 3, 4, num_kv_heads=2, intermediate_size=40, gated=True, norm="rms", position="rotary",
        qkv_bias=False, out_bias=False, ffn_bias=False, tie_embeddings=False,
    )  # fmt: skip
    count = Decoder(config, device="meta").num_parameters()
    assert count.embedding == 100 * 16
    assert count.attention == 3 * (16 * 16 + 2 * 16 * 8 + 16 * 16)
    assert count.feed_forward == 3 * 3 * 16 * 40
    assert count.norm == (2 * 3 + 1) * 16
    assert count.head == 100 * 16
    assert f"{count.total:,} parameters: embedding 1,600" in str(count)


def test_tied_embeddings():
    tied, untied = (build(make_config("decoder", tie_embeddings=t)) for t in (True, False))
    assert "lm_head.weight" not in tied.state_dict()
    assert untied.state_dict()["lm_head.weight"].data_ptr() != untied.embeddings.token.weight.data_ptr()
    ids = torch.tensor([[1, 2, 3]])
    tied(ids).logits[..., 60].sum().backward()
    assert tied.embeddings.token.weight.grad[60].abs().max() > 0  # by way of the head: 60 is not in the input
    untied(ids).logits[..., 60].sum().backward()
    assert untied.embeddings.token.weight.grad[60].abs().max() == 0


def remade(model, how):
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    fresh = type(model)(model.config, device="meta").eval()
    if how == "meta":
        assert all(p.is_meta for p in fresh.parameters())
        fresh.to_empty(device="cpu")
        fresh.load_state_dict(model.state_dict())
    else:
        fresh.load_state_dict(model.state_dict(), assign=True)
    return fresh


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "meta", "assign"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_copies_are_whole(architecture, position, how):
    """A copy gives the same results, shares what the original shares, and nothing with the original."""
    config = make_config(architecture, position=position)
    model = build(config)
    inputs = some_inputs(config)
    expected = model(**inputs).last_hidden_state  # also fills what is kept between calls
    twin = remade(model, how)
    assert torch.equal(twin(**inputs).last_hidden_state, expected)
    assert sum(p.numel() for p in twin.parameters()) == config.num_parameters()
    if config.is_encoder_decoder:
        assert twin.encoder.embeddings.token.weight is twin.decoder.embeddings.token.weight
    if how != "assign":
        theirs = {p.data_ptr() for p in model.parameters()}
        assert not theirs & {p.data_ptr() for p in twin.parameters()}


def test_dtype_and_device():
    config = make_config("decoder", position="rotary")
    model = Decoder(config, dtype=torch.bfloat16).eval()
    assert (model.dtype, model.device) == (torch.bfloat16, torch.device("cpu"))
    assert model(torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16
    with torch.device("meta"):
        assert Decoder(config).device.type == "meta"
    wide = Decoder(config).double().eval()
    assert wide(torch.tensor([[1, 2]])).logits.dtype == torch.float64


def test_autocast():
    config = make_config("decoder", position="rotary")
    model = build(config)
    ids = torch.randint(0, 61, (2, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids).logits
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), model(ids).logits, rtol=0.1, atol=0.3)
    out.float().sum().backward()


def test_initialisation():
    torch.manual_seed(0)
    config = TransformerConfig("decoder", 1000, 128, 4, 4, initializer_range=0.05, tie_embeddings=False)
    model = Decoder(config)
    block = model.layers[1]
    for weight, std in [
        (model.embeddings.token.weight, 0.05),
        (model.lm_head.weight, 0.05),
        (block.attention.qkv.weight, 0.05),
        (block.attention.out.weight, 0.05 / 8**0.5),
        (block.feed_forward.down.weight, 0.05 / 8**0.5),
    ]:
        # the standard deviation of a sample of n has a relative error of about 1 / sqrt(2 n)
        assert abs(weight.std().item() / std - 1) < 5 / (2 * weight.numel()) ** 0.5
        assert abs(weight.mean().item()) < 5 * std / weight.numel() ** 0.5
    assert block.attention.qkv.bias.abs().max() == 0
    assert (block.attention_norm.weight == 1).all()
    post = Encoder(replace(config, architecture="encoder", norm_placement="post"))
    assert abs(post.layers[0].attention.out.weight.std().item() / 0.05 - 1) < 0.05


@pytest.fixture
def fresh_compiler():
    """Dynamo counts the compilations of a piece of code, over all tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "architecture, position", [("encoder", "sinusoidal"), ("decoder", "rotary"), ("encoder_decoder", "relative")]
)
def test_compiles_whole(architecture, position):
    config = make_config(architecture, position=position, num_layers=1)
    model = build(config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = some_inputs(config, padded="left")
    torch.testing.assert_close(compiled(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    del inputs["attention_mask"]
    torch.testing.assert_close(compiled(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_compiled_steps_with_a_cache():
    """The prompt and a step are compiled once each; the steps that follow reuse the code."""
    model = build(make_config("decoder", position="rotary", num_layers=1))
    ids = torch.randint(0, 61, (1, 9))
    compilations = []

    def backend(graph, inputs):
        compilations.append(1)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    cache = model.new_cache(1, 9)
    parts = [compiled(ids[:, :4], cache=cache).logits, compiled(ids[:, 4:5], cache=cache).logits]
    before = len(compilations)
    parts += [compiled(ids[:, i : i + 1], cache=cache).logits for i in range(5, 9)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits)
    assert cache.length == 9
    assert len(compilations) <= before + 1


def test_exports():
    """torch.export takes an encoder with batch and length left open, and gives its output type back."""
    model = build(make_config("encoder", position="learned"))
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=40)
    shapes = {"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}}
    example = some_inputs(model.config, padded="right")
    exported = torch.export.export(model, (), example, dynamic_shapes=shapes).module()
    inputs = some_inputs(model.config, batch=2, length=13, padded="left")
    out, real = exported(**inputs), inputs["attention_mask"].bool()
    assert isinstance(out, ModelOutput)
    torch.testing.assert_close(out.last_hidden_state[real], model(**inputs).last_hidden_state[real])


def test_generate_and_stream():
    config = make_config("decoder", position="rotary")
    model = build(config)
    prompt = torch.tensor([[5, 6, 7], [0, 8, 9]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    tokens = model.generate(prompt, mask, max_new_tokens=6)
    assert tokens.shape == (2, 9)
    alone = model.generate(prompt[1:, 1:], max_new_tokens=6)
    assert torch.equal(tokens[1, 3:], alone[0, 2:])
    assert torch.equal(torch.stack(list(model.stream(prompt, mask, max_new_tokens=6)), 1), tokens[:, 3:])
    for n in range(6):  # without a cache: the likeliest next token of the whole text so far
        assert model(alone[:, : 2 + n]).logits[0, -1].argmax() == alone[0, 2 + n]


def test_generate_from_an_encoder():
    config = make_config("encoder_decoder", decoder_start_token_id=0)
    model = build(config)
    source = torch.randint(1, 61, (2, 6))
    tokens = model.generate(source, max_new_tokens=5)
    for n in range(5):
        logits = model(source, decoder_input_ids=tokens[:, : 1 + n]).logits[:, -1]
        assert torch.equal(logits.argmax(-1), tokens[:, 1 + n])


def test_task_heads():
    config = make_config(pooler=True, norm_placement="post", final_norm=False)
    inputs = some_inputs(config)
    for tie in (True, False):
        model = models.MaskedLM(replace(config, tie_embeddings=tie)).eval()
        hidden = model.encoder(**inputs).last_hidden_state
        h = torch.nn.functional.gelu(hidden @ model.head.dense.weight.T + model.head.dense.bias)
        h = torch.nn.functional.layer_norm(h, (32,), eps=1e-5)
        table = model.encoder.embeddings.token.weight if tie else model.head.decoder.weight
        torch.testing.assert_close(model(**inputs).logits, h @ table.T)
        model(**inputs).logits.sum().backward()
        unused = {n for n, p in model.named_parameters() if p.grad is None}
        assert unused == {"encoder.pooler.weight", "encoder.pooler.bias"}
    model = models.SequenceClassifier(config, 3).eval()
    expected = model.classifier(model.encoder(**inputs).pooler_output)
    assert torch.equal(model(**inputs).logits, expected)
    model = models.TokenClassifier(config, 5).eval()
    assert model(**inputs, output_hidden_states=True).logits.shape == (3, 9, 5)
    model = models.SpanClassifier(config).eval()
    out = model(**inputs)
    assert out.start_logits.shape == out.end_logits.shape == (3, 9)
    assert model.num_parameters().head == 2 * 32 + 2 + 32 * 32 + 32
    with pytest.raises(ConfigError, match="pooler"):
        models.SequenceClassifier(replace(config, pooler=False), 3)
    with pytest.raises(ConfigError, match="num_labels must be between"):
        models.TokenClassifier(config, 0)


def test_replaced_linears_are_called():
    """LoRA, quantisation and hooks put something else where a Linear was: it must run, not be read around."""

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    config = make_config(gated=True, ffn_bias=False)
    model, expected = (build_seeded(config) for _ in range(2))
    for layer, twin in zip(model.layers, expected.layers, strict=True):
        doubled = Doubled(128, 32, bias=False)
        doubled.load_state_dict(layer.feed_forward.down.state_dict())
        layer.feed_forward.down = doubled
        twin.feed_forward.down.weight.data.mul_(2)
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(ids).last_hidden_state, expected(ids).last_hidden_state)
    calls = []
    expected.layers[0].feed_forward.up.register_forward_hook(lambda *a: calls.append(1))
    expected(ids)
    assert calls == [1]


BAD_CALLS = {
    "float-ids": (lambda m: m(torch.randn(2, 3)), DtypeError, "input_ids: expected an int64 or int32 tensor"),
    "list-ids": (lambda m: m([[1, 2]]), DtypeError, "got list"),
    "one-dimension": (
        lambda m: m(torch.tensor([1, 2])),
        ArgumentError,
        r"expected shape \(batch, length\), got \(2,\)",
    ),
    "id-too-high": (lambda m: m(torch.tensor([[61]])), ArgumentError, "from 0 to 60, got 61 to 61"),
    "id-negative": (lambda m: m(torch.tensor([[-1]])), ArgumentError, "from 0 to 60, got -1"),
    "too-long": (lambda m: m(torch.zeros(1, 41).long()), ArgumentError, "40 positions, got a sequence of 41"),
    "mask-shape": (
        lambda m: m(torch.zeros(2, 3).long(), torch.ones(2, 4)),
        ArgumentError,
        r"attention_mask: expected shape \(2, 3\) .*got \(2, 4\)",
    ),
    "position-shape": (
        lambda m: m(torch.zeros(2, 3).long(), position_ids=torch.arange(4)),
        ArgumentError,
        r"position_ids: expected shape \(2, 3\) or \(1, 3\) or \(3,\), got \(4,\)",
    ),
    "position-range": (
        lambda m: m(torch.zeros(1, 1).long(), position_ids=torch.tensor([[40]])),
        ArgumentError,
        "position_ids: values must be from 0 to 39, got 40",
    ),
    "device": (lambda m: m(torch.zeros(1, 1, device="meta").long()), DeviceError, "on cpu like the model, got meta"),
    "mask-device": (
        lambda m: m(torch.zeros(1, 1).long(), torch.ones(1, 1, device="meta")),
        DeviceError,
        "attention_mask: must be on cpu",
    ),
    "token-types": (
        lambda m: m(torch.zeros(1, 1).long(), token_type_ids=torch.zeros(1, 1).long()),
        ArgumentError,
        "no token types",
    ),
    "no-cross": (
        lambda m: m(torch.zeros(1, 1).long(), encoder_hidden_states=torch.zeros(1, 1, 32)),
        ArgumentError,
        "no cross-attention",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_wrong_calls(case):
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call(build(make_config("decoder")))


def test_wrong_seq2seq_calls():
    model = build(make_config("encoder_decoder"))
    ids = torch.tensor([[1, 2]])
    with pytest.raises(ArgumentError, match="decoder_input_ids is missing; begin with decoder_start_token_id"):
        model(ids)
    with pytest.raises(ArgumentError, match="expected input_ids or encoder_hidden_states, got neither"):
        model(decoder_input_ids=ids)
    with pytest.raises(ArgumentError, match="attends to an encoder's output, got None"):
        model.decoder(ids)


def test_wrong_architecture():
    with pytest.raises(ConfigError, match=r"use transfuse\.Decoder"):
        Encoder(make_config("decoder"))
    with pytest.raises(ConfigError, match=r"use transfuse\.Encoder"):
        Decoder(make_config("encoder"))
    with pytest.raises(ConfigError, match=r"must be 'encoder_decoder', got 'encoder'; use transfuse\.Encoder"):
        Seq2Seq(make_config("encoder"))


def test_larger_than_memory():
    """Refused before anything is allocated, and in no time."""
    config = TransformerConfig("decoder", 2**20, 2**14, 100, 128)
    with pytest.raises(ConfigError, match=r"parameters and needs .* GiB in torch.float32, this machine has"):
        Decoder(config)
    assert Decoder(replace(config, num_layers=2), device="meta").num_parameters().total > 2**34


def test_output_fields_are_transformers_names():
    from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, Seq2SeqLMOutput

    theirs = {f.name for c in (BaseModelOutputWithPoolingAndCrossAttentions, Seq2SeqLMOutput) for f in fields(c)}
    ours = {f.name for f in fields(ModelOutput)} - {"cache", "start_logits", "end_logits", "seq_relationship_logits"}
    assert ours | {"decoder_hidden_states", "decoder_attentions"} <= theirs | {"last_hidden_state"}
