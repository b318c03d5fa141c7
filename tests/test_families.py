"""Checkpoint families against transformers: seeded random models of many configurations, written by transformers, read
here and compared; then written here and read there. And every way that a checkpoint may not fit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import transfuse
from families import assert_close, randomise_small
from transfuse import TransformerConfig, from_pretrained
from transfuse.errors import CheckpointError, ConfigError
from transfuse.models import checkpoint_writer
from transfuse.models.pretrained import save_pretrained

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

BERT = {
    "vocab_size": 61,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 50,
    "max_position_embeddings": 29,
    "type_vocab_size": 3,
    "initializer_range": 0.2,
}
LLAMA = {
    "vocab_size": 67,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 70,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def hf_bert(kind: str = "BertModel", **changes: Any) -> Any:
    torch.manual_seed(1)
    model = getattr(transformers, kind)(transformers.BertConfig(**{**BERT, **changes})).eval()
    randomise_small(model)
    return model


def hf_llama(**changes: Any) -> Any:
    torch.manual_seed(2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**copy.deepcopy({**LLAMA, **changes}))).eval()
    randomise_small(model)
    return model


def right_padded(vocab: int, lengths: tuple[int, ...] = (11, 7, 1)) -> dict[str, torch.Tensor]:
    mask = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
    return {"input_ids": torch.randint(0, vocab, mask.shape), "attention_mask": mask}


BERT_CASES: dict[str, dict[str, Any]] = {
    "odd-sizes": {},
    "one-head": {"num_attention_heads": 1, "hidden_size": 13, "intermediate_size": 7},
    "tanh-gelu": {"hidden_act": "gelu_new"},
    "relu-big-eps": {"hidden_act": "relu", "layer_norm_eps": 1e-3},
    "one-layer-no-pad-id": {"num_hidden_layers": 1, "pad_token_id": None},
}


@pytest.mark.parametrize("case", BERT_CASES)
@torch.no_grad()
def test_bert_equals_transformers(tmp_path: Path, case: str) -> None:
    theirs = hf_bert(**BERT_CASES[case])
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    assert isinstance(ours, transfuse.Encoder)
    assert not ours.training
    batch = right_padded(61)
    batch["token_type_ids"] = torch.randint(0, 3, batch["input_ids"].shape)
    expected = theirs(**batch, output_hidden_states=True)
    got = ours(**batch, output_hidden_states=True)
    tokens = batch["attention_mask"].bool()
    assert len(got.hidden_states) == len(expected.hidden_states)
    for mine, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert_close(mine[tokens], other[tokens])
    assert_close(got.last_hidden_state[tokens], expected.last_hidden_state[tokens])
    assert_close(got.pooler_output, expected.pooler_output)
    assert_close(ours(batch["input_ids"]).last_hidden_state, theirs(batch["input_ids"]).last_hidden_state)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@torch.no_grad()
def test_bert_masked_lm(tmp_path: Path, tied: bool) -> None:
    theirs = hf_bert("BertForMaskedLM", tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)  # the head follows from config.json
    batch = right_padded(61)
    tokens = batch["attention_mask"].bool()
    assert_close(ours(**batch).logits[tokens], theirs(**batch).logits[tokens])
    encoder = from_pretrained(tmp_path, "encoder")  # the same file without its head, and without a pooler
    assert_close(encoder(**batch).last_hidden_state[tokens], theirs.bert(**batch).last_hidden_state[tokens])
    assert encoder.pooler is None


@pytest.mark.parametrize(
    "kind, labels",
    [("BertForSequenceClassification", 4), ("BertForTokenClassification", 5), ("BertForQuestionAnswering", 2)],
)
@torch.no_grad()
def test_bert_classification_heads(tmp_path: Path, kind: str, labels: int) -> None:
    names = {i: f"class {i}" for i in range(labels)}
    theirs = hf_bert(kind, id2label=names, label2id={name: i for i, name in names.items()})
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    if kind != "BertForQuestionAnswering":
        assert ours.labels == tuple(names.values())
        save_pretrained(ours, tmp_path / "again")
        assert from_pretrained(tmp_path / "again").labels == ours.labels
        assert transformers.AutoConfig.from_pretrained(tmp_path / "again").id2label == names
    batch = right_padded(61)
    got, expected = ours(**batch), theirs(**batch)
    if kind == "BertForQuestionAnswering":
        assert_close(got.start_logits[0], expected.start_logits[0])
        assert_close(got.end_logits[0], expected.end_logits[0])
    elif kind == "BertForTokenClassification":
        tokens = batch["attention_mask"].bool()
        assert_close(got.logits[tokens], expected.logits[tokens])
    else:
        assert_close(got.logits, expected.logits)


@torch.no_grad()
def test_bert_pretraining_checkpoint_serves_two_tasks(tmp_path: Path) -> None:
    """Both heads, the prefix, the old norm names and the old position buffer, as the first BERT files have them."""
    theirs = hf_bert("BertForPreTraining")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(29)[None]
    save_file(old, tmp_path / "model.safetensors")
    batch = right_padded(61)
    tokens, expected = batch["attention_mask"].bool(), theirs(**batch)
    assert_close(from_pretrained(tmp_path, "masked-lm")(**batch).logits[tokens], expected.prediction_logits[tokens])
    assert_close(from_pretrained(tmp_path, "encoder")(**batch).pooler_output, theirs.bert(**batch).pooler_output)


LLAMA_CASES: dict[str, dict[str, Any]] = {
    "grouped-queries": {},
    "one-kv-head-tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "as-many-kv-heads": {"num_key_value_heads": 6, "rms_norm_eps": 1e-5},
    "own-head-dim": {"head_dim": 10, "rope_theta": 500000.0},
    "all-biases": {"attention_bias": True, "mlp_bias": True},
    "linear-rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3-rope": {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500.0},
    "gelu-gate": {"hidden_act": "gelu_pytorch_tanh"},
}


def legacy_rope(folder: Path) -> None:
    """Rewrite config.json as transformers 4 did: rope_theta and rope_scaling in place of rope_parameters."""
    values = json.loads((folder / "config.json").read_text())
    rope = values.pop("rope_parameters", None)
    if rope is not None:
        values["rope_theta"] = rope.pop("rope_theta")
        values["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("form", ["current", "legacy"])
@pytest.mark.parametrize("case", LLAMA_CASES)
@torch.no_grad()
def test_llama_equals_transformers(tmp_path: Path, case: str, form: str) -> None:
    theirs = hf_llama(**LLAMA_CASES[case])
    theirs.save_pretrained(tmp_path)
    if form == "legacy":
        legacy_rope(tmp_path)
    ours = from_pretrained(tmp_path)
    assert isinstance(ours, transfuse.Decoder)
    ids = torch.randint(0, 67, (2, 33))
    expected, got = theirs(ids, output_hidden_states=True), ours(ids, output_hidden_states=True)
    for mine, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert_close(mine, other)
    assert_close(got.logits, expected.logits)


@pytest.mark.parametrize("case", ["grouped-queries", "llama3-rope"])
@torch.no_grad()
def test_llama_with_a_cache_equals_transformers(tmp_path: Path, case: str) -> None:
    """Left-padded rows, a first part at once, then token by token, against transformers with and without its cache."""
    theirs = hf_llama(**LLAMA_CASES[case])
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    ids = torch.randint(0, 67, (3, 20))
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, :1] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
    past = theirs(ids[:, :12], attention_mask=mask[:, :12], position_ids=positions[:, :12], use_cache=True)
    cache = ours.new_cache(3, 20)
    first = ours(ids[:, :12], attention_mask=mask[:, :12], cache=cache).logits
    assert_close(first[mask[:, :12].bool()], expected[:, :12][mask[:, :12].bool()])
    for i in range(12, 20):
        step = {"attention_mask": mask[:, : i + 1], "position_ids": positions[:, i : i + 1]}
        past = theirs(ids[:, i : i + 1], past_key_values=past.past_key_values, use_cache=True, **step)
        got = ours(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], cache=cache).logits
        assert_close(got, past.logits)
        assert_close(got[:, 0], expected[:, i])


def test_llama_generates_what_transformers_generates(tmp_path: Path) -> None:
    theirs = hf_llama(eos_token_id=None, pad_token_id=0)
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    ids = torch.randint(1, 67, (2, 9))
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30)
    assert torch.equal(ours.generate(ids, max_new_tokens=30), expected)


def test_end_tokens_of_generation_config_are_used(tmp_path: Path) -> None:
    hf_llama().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert from_pretrained(tmp_path).config.eos_token_id == (5, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["bert", "llama"])
@torch.no_grad()
def test_half_precision_files(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    (hf_bert() if family == "bert" else hf_llama()).to(dtype).save_pretrained(tmp_path)
    body = transformers.AutoModel
    theirs = body.from_pretrained(tmp_path, dtype=dtype).eval()
    theirs_wide = body.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(0, 61, (2, 9))
    expected = theirs_wide(ids).last_hidden_state
    assert_close(from_pretrained(tmp_path, dtype=torch.float32)(ids).last_hidden_state, expected)
    ours = from_pretrained(tmp_path)
    assert ours.dtype == dtype
    error = (ours(ids).last_hidden_state.float() - expected).abs().max()
    budget = (theirs(ids).last_hidden_state.float() - expected).abs().max()
    assert error <= 2 * budget + torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_shards_give_the_same_model(tmp_path: Path, family: str) -> None:
    theirs = hf_bert() if family == "bert" else hf_llama()
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = from_pretrained(tmp_path / "one").state_dict(), from_pretrained(tmp_path / "many").state_dict()
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def write_llama_gguf(path: Path, model: Any, rope_factors: torch.Tensor | None = None) -> None:
    """What llama.cpp's converter makes of a transformers model: its names, and neighbouring rows rotated together."""
    gguf = pytest.importorskip("gguf")
    c, writer = model.config, gguf.GGUFWriter(path, "llama")
    scaling = getattr(c, "rope_scaling", None) or {}
    rope = getattr(c, "rope_parameters", None) or {"rope_type": "default", "rope_theta": c.rope_theta, **scaling}
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_key_length(c.head_dim)
    writer.add_vocab_size(c.vocab_size)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.numpy())
    tied = c.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        for theirs, stored in GGUF_NAMES.items():
            name = name.replace(theirs, stored)
        heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", ["grouped-queries", "one-kv-head-tied", "own-head-dim", "linear-rope", "all-biases"])
@torch.no_grad()
def test_llama_gguf(tmp_path: Path, case: str) -> None:
    theirs = hf_llama(**LLAMA_CASES[case])
    write_llama_gguf(tmp_path / "m.gguf", theirs)
    ours = from_pretrained(tmp_path / "m.gguf")
    assert ours.dtype == torch.float32
    ids = torch.randint(0, 67, (2, 15))
    assert_close(ours(ids).logits, theirs(ids).logits)


@torch.no_grad()
def test_llama3_rope_is_recognised_in_gguf(tmp_path: Path) -> None:
    rope = {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}
    theirs = hf_llama(head_dim=16, rope_theta=500000.0, rope_scaling=rope, max_position_embeddings=16384)
    plain = 500000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    factors = (plain / theirs.model.rotary_emb.inv_freq.double()).float()
    assert factors.min().item() == pytest.approx(1)
    assert factors.max().item() == pytest.approx(8)
    write_llama_gguf(tmp_path / "m.gguf", theirs, factors)
    ours = from_pretrained(tmp_path / "m.gguf")
    ids, positions = torch.randint(0, 67, (1, 15)), torch.arange(9000, 9015)[None]
    got, expected = ours(ids, position_ids=positions), theirs(ids, position_ids=positions)
    assert_close(got.logits, expected.logits, tolerance=1e-3)  # angles near 9000 carry fp32's rounding
    write_llama_gguf(tmp_path / "other.gguf", theirs, factors * 1.5)
    with pytest.raises(ConfigError, match="no known rope scaling"):
        from_pretrained(tmp_path / "other.gguf")


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("BertModel", {}),
        ("BertForMaskedLM", {}),
        ("BertForMaskedLM", {"tie_word_embeddings": False}),
        ("BertForSequenceClassification", {"num_labels": 4}),
        ("BertForTokenClassification", {"num_labels": 5}),
        ("BertForQuestionAnswering", {}),
        *[("LlamaForCausalLM", LLAMA_CASES[case]) for case in LLAMA_CASES],
    ],
)
@torch.no_grad()
def test_saved_model_reads_back_here_and_in_transformers(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    theirs = hf_llama(**changes) if kind == "LlamaForCausalLM" else hf_bert(kind, **changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs")
    save_pretrained(ours, tmp_path / "ours")
    again = from_pretrained(tmp_path / "ours")
    assert type(again) is type(ours)
    assert again.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values(), strict=True))
    returned, info = getattr(transformers, kind).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for (name, before), after in zip(theirs.state_dict().items(), returned.state_dict().values(), strict=True):
        if name != "cls.predictions.bias" or theirs.config.tie_word_embeddings:  # read by nobody in an untied model
            assert torch.equal(before, after), name
    batch = right_padded(61)
    assert torch.equal(theirs(**batch)[0], returned.eval()(**batch)[0])


NATIVE = {
    "decoder": TransformerConfig("decoder", 31, 24, 2, 4, rope_theta=99.0, position="rotary", window=5, num_kv_heads=2),
    "encoder": TransformerConfig("encoder", 31, 24, 2, 4, norm_placement="post", pooler=True),
    "seq2seq": TransformerConfig(
        "encoder_decoder", 31, 24, 2, 4, position="relative", norm="rms", pad_token_id=0, decoder_start_token_id=0
    ),
}


def native_model(name: str) -> Any:
    config = NATIVE[name.split("-")[0]]
    if name == "decoder":
        return transfuse.Decoder(config)
    if name == "encoder":
        return transfuse.Encoder(config)
    if name == "seq2seq":
        return transfuse.Seq2Seq(config)
    if name == "encoder-classes":
        return transfuse.models.SequenceClassifier(config, 5)
    return transfuse.models.MaskedLM(config)


@pytest.mark.parametrize("name", ["decoder", "encoder", "seq2seq", "encoder-classes", "encoder-masked"])
def test_own_configurations_round_trip(tmp_path: Path, name: str) -> None:
    model = native_model(name).eval()
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    if name == "encoder-masked":
        encoder = from_pretrained(tmp_path, "encoder")
        ids = torch.randint(0, 31, (1, 7))
        assert torch.equal(encoder(ids).last_hidden_state, model(ids).last_hidden_state)


def test_llama_that_transformers_cannot_express_is_saved_in_own_form(tmp_path: Path) -> None:
    hf_llama().save_pretrained(tmp_path / "theirs")
    config = from_pretrained(tmp_path / "theirs").config
    changed = TransformerConfig.from_dict({**config.to_dict(), "softcap": 30.0})
    save_pretrained(transfuse.Decoder(changed), tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "transfuse"
    assert from_pretrained(tmp_path / "ours").config == changed


def test_failed_saving_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = native_model("decoder")
    save_pretrained(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(tensors: object, path: Path, metadata: object = None) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "save_file", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        save_pretrained(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the model"):
        save_pretrained(native_model("decoder"), tmp_path / "taken")
