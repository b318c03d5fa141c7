"""T5, Marian and BART against transformers: seeded random models of many configurations, written by transformers, read
here and compared, written here and read there; old spellings; training; and what fp16 does to T5."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from families import assert_close, assert_comes_back, hf, loaded, transformers
from transfuse import TransformerConfig, from_pretrained
from transfuse.errors import ArgumentError, CheckpointError, ConfigError
from transfuse.models import Encoder, Seq2SeqBody, SequenceClassifier, SpanClassifier, TokenClassifier
from transfuse.models.pretrained import save_pretrained
from transfuse.nn import FeedForward

T5 = {
    "vocab_size": 61,
    "d_model": 36,
    "d_kv": 7,
    "d_ff": 50,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 11,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": 61,
    "d_model": 36,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 50,
    "decoder_ffn_dim": 34,
    "max_position_embeddings": 29,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "init_std": 0.2,
}
MARIAN = {**BART, "decoder_vocab_size": 61, "decoder_start_token_id": 1, "activation_function": "swish"}
# transformers 4 makes both tables of the encoder's size
TWO = {"decoder_vocab_size": 61 if transformers.__version__ < "5" else 43, "share_encoder_decoder_embeddings": False}
T5_11 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
T5_LM, BART_LM = "T5ForConditionalGeneration", "BartForConditionalGeneration"

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5-1.0": (T5_LM, {}),
    "t5-1.1": (T5_LM, T5_11),
    "t5-1.1-tied": (T5_LM, {**T5_11, "feed_forward_proj": "gated-silu"}),
    "t5-body": ("T5Model", {"feed_forward_proj": "gelu", "num_decoder_layers": 3}),
    "t5-encoder": ("T5EncoderModel", {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}),
    "t5-text": ("T5ForSequenceClassification", {"num_labels": 4}),
    "t5-tokens": ("T5ForTokenClassification", {"num_labels": 5}),
    "t5-spans": ("T5ForQuestionAnswering", {}),
    "marian": ("MarianMTModel", {"scale_embedding": True}),
    "marian-two": ("MarianMTModel", TWO),
    "marian-untied": ("MarianMTModel", {"tie_word_embeddings": False}),
    "marian-two-untied": ("MarianMTModel", {**TWO, "tie_word_embeddings": False}),
    "bart": (BART_LM, {}),
    "bart-untied": (BART_LM, {"tie_word_embeddings": False, "scale_embedding": True}),
    "bart-relu-one-head": (BART_LM, {"encoder_attention_heads": 1, "activation_function": "relu"}),
    "bart-body": ("BartModel", {"decoder_attention_heads": 3}),
    "bart-text": ("BartForSequenceClassification", {"num_labels": 4}),
    "bart-spans": ("BartForQuestionAnswering", {}),
}
GENERATES = ["t5-1.0", "t5-1.1", "marian", "marian-two", "marian-untied", "bart", "bart-untied"]


@torch.no_grad()
def of_case(case: str) -> Any:
    """Their model of a case, with every parameter random."""
    kind, changes = CASES[case]
    theirs = hf(kind, {**{"T5": T5, "Ma": MARIAN, "Ba": BART}[kind[:2]], **changes}, seed=3)
    if hasattr(theirs, "final_logits_bias"):
        theirs.final_logits_bias.normal_()
    if case == "t5-1.1":  # transformers 5 makes it tied, but reads and writes it untied
        theirs.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(61, 36))
    return theirs


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Theirs, and ours read from what they wrote."""
    theirs = of_case(request.param)
    return theirs, loaded(theirs, tmp_path_factory.mktemp("theirs"))


def padded(config: Any, lengths: tuple[int, ...] = (11, 7, 3)) -> dict[str, torch.Tensor]:
    """Sources of unequal length that each end in the end token, padding on the right."""
    mask = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
    ids = torch.randint(3, 43, mask.shape).masked_fill(mask == 0, config.pad_token_id)
    ids[torch.arange(len(lengths)), mask.sum(1) - 1] = config.eos_token_id
    ids[:, 0] = config.eos_token_id  # the last one counts
    return {"input_ids": ids, "attention_mask": mask}


def target(lengths: tuple[int, ...] = (9, 9, 4)) -> dict[str, torch.Tensor]:
    mask = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
    return {"decoder_input_ids": torch.randint(3, 43, mask.shape), "decoder_attention_mask": mask}


def inputs_for(ours: Any, theirs: Any) -> dict[str, torch.Tensor]:
    return padded(theirs.config) | (target() if isinstance(ours, Seq2SeqBody) else {})


@torch.no_grad()
def test_equals_transformers(pair: Any) -> None:
    """Every output at every token that is not padding: scores, hidden states, maps of both stacks and between them."""
    theirs, ours = pair
    inputs = inputs_for(ours, theirs)
    source = inputs["attention_mask"].bool()
    own = inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()
    also = {"output_hidden_states": True, "output_attentions": True}
    expected, got = theirs(**inputs, **also), ours(**inputs, **also)
    compared = 0
    for name, value in expected.items():
        if name == "past_key_values" or (isinstance(value, tuple) and not value):
            continue
        mine, other = getattr(got, name), value
        rows = source if name.startswith("encoder") else own
        if name == "logits" and value.dim() == 2:  # one row of classes a text
            assert_close(mine, other)
        elif not isinstance(value, tuple):
            assert_close(mine[rows], other[rows])
        else:
            assert len(mine) == len(other)
            for a, b in zip(mine, other, strict=True):
                a, b = (a.transpose(1, 2), b.transpose(1, 2)) if "attentions" in name else (a, b)
                assert_close(a[rows], b[rows])
        compared += 1
    assert compared >= (6 if expected.keys() & {"cross_attentions"} and hasattr(ours, "seq2seq") else 3)
    inputs = {n: ids for n, ids in inputs.items() if n.endswith("input_ids")}  # and without padding
    name = next(n for n in ("logits", "start_logits", "last_hidden_state") if n in expected)
    assert_close(getattr(ours(**inputs), name), theirs(**inputs)[name])


def test_saved_model_reads_back_here_and_in_transformers(pair: Any, tmp_path: Path) -> None:
    theirs, ours = pair
    # an untied model has a shared table that nobody reads, if any
    assert_comes_back(ours, theirs, tmp_path, inputs_for(ours, theirs), name="model.shared.weight")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == theirs.config.model_type


@pytest.mark.parametrize("pair", GENERATES, indirect=True)
@torch.no_grad()
def test_with_a_cache_equals_transformers(pair: Any) -> None:
    """A padded source, left-padded targets: some tokens at once, then one by one. Their decoders count padding too."""
    theirs, ours = pair
    source = padded(theirs.config)
    ids, mask = torch.randint(3, 43, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[0, :3], mask[2, :1] = 0, 0
    places = {} if ours.config.position == "relative" else {"decoder_position_ids": torch.arange(12)[None]}
    whole = theirs(**source, decoder_input_ids=ids, decoder_attention_mask=mask).logits
    assert_close(
        ours(**source, decoder_input_ids=ids, decoder_attention_mask=mask, **places).logits[mask.bool()],
        whole[mask.bool()],
    )
    cache, past = ours.new_cache(3, 12), None
    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 12)):
        step = {"decoder_input_ids": ids[:, start:stop], "decoder_attention_mask": mask[:, :stop]}
        expected = theirs(**source, **step, past_key_values=past, use_cache=True)
        past = expected.past_key_values
        here = {name: value[:, start:stop] for name, value in places.items()}
        first = source if start == 0 else {}  # later on the cache holds all that is needed of it
        got = ours(**first, **step, cache=cache, **here).logits
        tokens = mask[:, start:stop].bool()
        assert_close(got[tokens], expected.logits[tokens])
        assert_close(got[tokens], whole[:, start:stop][tokens])


@pytest.mark.parametrize("pair", GENERATES, indirect=True)
def test_generates_what_transformers_generates(pair: Any) -> None:
    theirs, ours = pair
    source = padded(theirs.config)
    same = {"do_sample": False, "repetition_penalty": 4.0, "max_new_tokens": 15}  # else random models repeat one token
    got = ours.generate(**source, **same)
    assert torch.equal(got, theirs.generate(**source, **same, num_beams=1))
    assert len(got.unique()) > 4


@pytest.mark.parametrize("pair", ["t5-1.1", "marian-two", "bart"], indirect=True)
def test_loss_and_gradients_equal_transformers(pair: Any) -> None:
    theirs, ours = pair
    source, labels = padded(theirs.config), target()["decoder_input_ids"]
    labels[0, 2], labels[1, 5:] = -100, -100
    ours.zero_grad(), theirs.zero_grad()
    expected = theirs(**source, labels=labels).loss
    logits = ours(**source, decoder_input_ids=ours.shift_right(labels)).logits
    loss = F.cross_entropy(logits.mT, labels)
    assert_close(loss, expected)
    expected.backward(), loss.backward()
    table = {"t5": "shared", "marian": "model.encoder.embed_tokens", "bart": "model.shared"}[ours.config.family]
    stack = "block.0.layer.0.SelfAttention.q" if ours.config.family == "t5" else "layers.0.self_attn.q_proj"
    body = theirs if ours.config.family == "t5" else theirs.model
    theirs_by_name = dict(theirs.named_parameters())
    learns = torch.arange(61) != theirs.config.pad_token_id  # looked up, padding teaches theirs nothing
    assert_close(ours.encoder.embeddings.token.weight.grad[learns], theirs_by_name[f"{table}.weight"].grad[learns])
    for ours_stack, theirs_stack in ((ours.encoder, body.encoder), (ours.decoder, body.decoder)):
        query = theirs_stack.get_submodule(stack).weight.grad
        assert_close(ours_stack.layers[0].attention.qkv.weight.grad[: query.shape[0]], query)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["t5-1.1", "marian", "bart"])
@torch.no_grad()
def test_half_precision_files(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    wide = of_case(case)
    wide.to(dtype).save_pretrained(tmp_path)
    wide = type(wide).from_pretrained(tmp_path, dtype=torch.float32).eval()
    inputs = padded(wide.config) | target()
    expected, tokens = wide(**inputs).logits, inputs["decoder_attention_mask"].bool()
    assert_close(from_pretrained(tmp_path, dtype=torch.float32)(**inputs).logits[tokens], expected[tokens])
    theirs, ours = type(wide).from_pretrained(tmp_path, dtype=dtype).eval(), from_pretrained(tmp_path)
    assert ours.dtype == dtype
    error, budget = ((model(**inputs).logits.float() - expected)[tokens].abs().max() for model in (ours, theirs))
    assert error <= 2 * budget + torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("case", ["t5-1.0", "marian-two", "bart"])
def test_shards_give_the_same_model(tmp_path: Path, case: str) -> None:
    theirs = of_case(case)
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = from_pretrained(tmp_path / "one").state_dict(), from_pretrained(tmp_path / "many").state_dict()
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


@torch.no_grad()
def rewrite(folder: Path, change: Any) -> None:
    """Changes the tensors of a saved model: a function of name -> tensor."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def old_t5(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As T5's first files: a table a stack, and a bias that cross-attention never used."""
    table = tensors.pop("shared.weight")
    bias = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.randn(8, 3)}
    return {**tensors, **bias, "encoder.embed_tokens.weight": table, "decoder.embed_tokens.weight": table}


def old_marian(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With tables of sinusoids, and the head stored too."""
    sinusoids = {f"model.{stack}.embed_positions.weight": torch.randn(29, 36) for stack in ("encoder", "decoder")}
    return {**tensors, **sinusoids, "lm_head.weight": tensors["model.shared.weight"]}


def old_bart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the prefix, with a version; the head's bias of zeros left out."""
    del tensors["final_logits_bias"]
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    return {**bare, "encoder.version": torch.tensor([3.0])}


@pytest.mark.parametrize(
    "case, change", [("t5-1.0", old_t5), ("marian", old_marian), ("bart", old_bart)], ids=["t5", "marian", "bart"]
)
@torch.no_grad()
def test_old_spellings(tmp_path: Path, case: str, change: Any) -> None:
    theirs = of_case(case)
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    if case == "bart":
        theirs.final_logits_bias.zero_()
    ours = from_pretrained(tmp_path, "seq2seq-lm")
    inputs = {**padded(theirs.config), **target((9, 9, 9))}
    assert_close(ours(**inputs).logits, theirs(**inputs).logits)
    save_pretrained(ours, tmp_path / "again")
    _, info = type(theirs).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"], info
    assert from_pretrained(tmp_path / "again").config == ours.config


@torch.no_grad()
def test_t5_encoder_of_another_task(tmp_path: Path) -> None:
    """The encoder alone, from a whole model and from below another prefix."""
    for case in ("t5-1.1", "t5-tokens"):
        theirs = of_case(case)
        theirs.save_pretrained(tmp_path / case)
        ours = from_pretrained(tmp_path / case, "encoder")
        assert isinstance(ours, Encoder)
        inputs = padded(theirs.config)
        tokens = inputs["attention_mask"].bool()
        body = theirs.encoder if case == "t5-1.1" else theirs.transformer
        assert_close(ours(**inputs).last_hidden_state[tokens], body(**inputs).last_hidden_state[tokens])


@pytest.mark.parametrize("scaled", [True, False], ids=["as-1.0", "as-1.1"])
@torch.no_grad()
def test_t5_head_of_transformers_4_and_5(tmp_path: Path, scaled: bool) -> None:
    """4 unties and unscales 1.1 by one flag; 5 says it is tied, and that it does not scale."""
    theirs = of_case("t5-1.0" if scaled else "t5-1.1")
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    inputs = {**padded(theirs.config), **target((9, 9, 9))}
    expected = (
        theirs.decoder(
            inputs["decoder_input_ids"],
            encoder_hidden_states=theirs.encoder(**padded_only(inputs)).last_hidden_state,
            encoder_attention_mask=inputs["attention_mask"],
        ).last_hidden_state
        @ theirs.lm_head.weight.T
        * (36**-0.5 if scaled else 1.0)
    )
    for form in ({"tie_word_embeddings": scaled}, {"tie_word_embeddings": True, "scale_decoder_outputs": scaled}):
        values.pop("scale_decoder_outputs", None)
        (tmp_path / "config.json").write_text(json.dumps({**values, **form}))
        ours = from_pretrained(tmp_path)
        assert ours.config.tie_embeddings == scaled
        assert_close(ours(**inputs).logits, expected)


def padded_only(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("case", ["t5-1.0", "t5-1.1"])
@torch.no_grad()
def test_t5_in_fp16_survives_sums_beyond_its_largest_number(tmp_path: Path, case: str) -> None:
    theirs = of_case(case)
    for name, parameter in theirs.named_parameters():
        if "DenseReluDense.w" in name:
            parameter.mul_(5e3 if ".wo." in name else 50)
    theirs.half().save_pretrained(tmp_path)
    wide = type(theirs).from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours, half = from_pretrained(tmp_path), type(theirs).from_pretrained(tmp_path, dtype=torch.float16).eval()
    assert ours.dtype == torch.float16
    inputs = {**padded(wide.config), **target((9, 9, 9))}
    expected = wide(**inputs, output_hidden_states=True)
    assert expected.decoder_hidden_states[1].abs().max() > 65504
    got = ours(**inputs, output_hidden_states=True)
    error, budget = ((out.logits.float() - expected.logits).abs().max() for out in (got, half(**inputs)))
    assert error <= 2 * budget + torch.finfo(torch.float16).eps * expected.logits.abs().max()
    assert budget < 0.05 * expected.logits.abs().max()
    for mine, other in zip(got.hidden_states, expected.decoder_hidden_states, strict=True):
        assert_close(mine, other, tolerance=0.01)
    assert torch.equal(ours.generate(inputs["input_ids"], max_new_tokens=4)[:, 0], torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("gated", [True, False])
def test_wide_feed_forward_is_finite_and_right(gated: bool) -> None:
    """The gate's product and the way down pass fp16's largest number, each matrix alone does not; gradients flow."""
    torch.manual_seed(0)
    layer = FeedForward(24, 40, activation="gelu_tanh", gated=gated, wide=True).half()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1500)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(3, 24, dtype=torch.float16)
    got, expected = layer(x), exact(x.double())
    assert got.dtype == torch.float32
    assert expected.abs().max() > 65504
    assert (got - expected).abs().max() <= 2 * torch.finfo(torch.float16).eps * expected.abs().max()
    (got / 2**20).sum().backward(), (expected / 2**20).sum().backward()
    assert_close(layer.down.weight.grad, exact.down.weight.grad, tolerance=4e-3)


def test_tensors_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    of_case("bart").save_pretrained(tmp_path)
    gone, extra = "model.decoder.layers.1.encoder_attn.k_proj.weight", "model.encoder.layers.7.fc1.weight"
    rewrite(tmp_path, lambda t: {n: v for n, v in t.items() if n != gone} | {extra: torch.zeros(2)})
    with pytest.raises(CheckpointError, match=rf"1 missing \({gone}\); 1 unexpected \({extra}\)"):
        from_pretrained(tmp_path)
    of_case("t5-1.0").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {**t, "lm_head.weight": t["shared.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"ties lm_head\.weight to shared\.weight, but they differ"):
        from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"4 missing \(classification_head"):
        from_pretrained(tmp_path, "sequence-classification")
    with pytest.raises(ArgumentError, match="t5 has no task 'causal-lm'; it has seq2seq-lm, seq2seq, encoder"):
        from_pretrained(tmp_path, "causal-lm")


@pytest.mark.parametrize(
    "family, values, message",
    [
        ("bart", {"decoder_attention_heads": 7}, "d_model must be a multiple of decoder_attention_heads, got 36 and 7"),
        ("bart", {"activation_function": "tanh"}, "activation_function must be one of relu"),
        ("marian", {"decoder_vocab_size": 43}, "share_embeddings needs one vocabulary"),
        ("t5", {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj must be one of relu"),
        ("t5", {"feed_forward_proj": 3}, "feed_forward_proj must be a name"),
        ("t5", {"relative_attention_num_buckets": 6}, "relative_buckets must be a multiple of 4"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, family: str, values: dict[str, Any], message: str) -> None:
    base = {"t5": T5, "marian": MARIAN, "bart": BART}[family]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **base, **values}))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        from_pretrained(tmp_path)


def test_classifier_of_a_text_without_an_end(tmp_path: Path) -> None:
    of_case("bart-text").save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 2], [5, 6, 7]])
    with pytest.raises(ArgumentError, match=r"an end token \(2\) in every row, rows \[1\] have none"):
        ours(ids)
    with pytest.raises(ArgumentError, match="an encoder-decoder takes neither"):
        ours(ids[:1], token_type_ids=ids[:1])


@pytest.mark.parametrize("head", ["body", "text", "tokens", "spans"])
def test_own_encoder_decoders_round_trip(tmp_path: Path, head: str) -> None:
    """In our own form, for which there is no class of transformers, and each file's parts for the other tasks."""
    preset = TransformerConfig.preset("transformer", 31, hidden_size=24, num_layers=2, num_heads=4)
    config = replace(preset, decoder_start_token_id=1, eos_token_id=2)
    kinds = {"body": Seq2SeqBody, "text": SequenceClassifier, "tokens": TokenClassifier, "spans": SpanClassifier}
    model = kinds[head](config, 3) if head in ("text", "tokens") else kinds[head](config)
    model.eval().save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.config == config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    source = torch.tensor([[5, 6, 7, 2]])
    expected = model(source, decoder_input_ids=source) if head == "body" else model(source)
    encoder, whole = from_pretrained(tmp_path, "encoder"), from_pretrained(tmp_path, "seq2seq-lm")
    assert torch.equal(encoder(source).last_hidden_state, expected.encoder_last_hidden_state)
    read = source if head == "body" else whole.shift_right(source)
    assert torch.equal(whole(source, decoder_input_ids=read).last_hidden_state, expected.last_hidden_state)
