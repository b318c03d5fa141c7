"""BERT, RoBERTa, XLM-RoBERTa, CamemBERT and DistilBERT with every head against transformers: written there, read and
compared here, written here, read there; padding on both sides; old spellings, half precision, shards, what fits not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import assert_close, assert_comes_back, assert_same_outputs, hf, loaded, padded_batch
from transfuse import from_pretrained
from transfuse.errors import ArgumentError, CheckpointError, ConfigError
from transfuse.models import NextSentencePredictor, Pretraining, SequenceClassifier, TransformerConfig
from transfuse.models.families import _families, find_family
from transfuse.models.pretrained import save_pretrained

BERT = {
    "vocab_size": 61,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 50,
    "max_position_embeddings": 29,
}
SIZES: dict[str, dict[str, Any]] = {
    "bert": {**BERT, "type_vocab_size": 3},
    "roberta": {**BERT, "type_vocab_size": 2},
    "xlm-roberta": {**BERT, "type_vocab_size": 1, "pad_token_id": 3},
    "camembert": {**BERT, "type_vocab_size": 1},
    "distilbert": {
        "vocab_size": 61,
        "dim": 36,
        "n_layers": 3,
        "n_heads": 3,
        "hidden_dim": 50,
        "max_position_embeddings": 29,
    },
}
LABELS = {"sequence-classification": {"num_labels": 4}, "token-classification": {"num_labels": 5}}
EVERY_HEAD = [(family, task) for family in SIZES for task in find_family(family).tasks]
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f"{family}-{task}": (family, task, LABELS.get(task, {})) for family, task in EVERY_HEAD},
    "bert-pretraining-untied": ("bert", "pretraining", {"tie_word_embeddings": False}),
    "roberta-untied": ("roberta", "masked-lm", {"tie_word_embeddings": False}),
    "roberta-one-head-relu": ("roberta", "encoder", {"num_attention_heads": 1, "hidden_act": "relu"}),
    "roberta-thirteen-wide": ("roberta", "encoder", {"hidden_size": 13, "num_attention_heads": 1}),
    "roberta-one-label": ("roberta", "sequence-classification", {"num_labels": 1, "classifier_dropout": 0.3}),
    "distilbert-untied": ("distilbert", "masked-lm", {"tie_word_embeddings": False, "activation": "relu"}),
    "distilbert-table-of-sinusoids": ("distilbert", "encoder", {"sinusoidal_pos_embds": True}),
}


def model_of(family: str, task: str, changes: dict[str, Any]) -> Any:
    return hf(find_family(family).tasks[task], {**SIZES[family], **changes})


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers_and_comes_back(tmp_path: Path, case: str) -> None:
    family, task, changes = CASES[case]
    theirs = model_of(family, task, changes)
    ours = loaded(theirs, tmp_path / "theirs")
    types = SIZES[family].get("type_vocab_size", 0)
    batch = padded_batch(theirs.config, **({"token_type_ids": types} if types else {}))
    assert_same_outputs(ours, theirs, batch)
    del batch["attention_mask"]
    unread = {"bert": "cls.predictions.bias", "roberta": "lm_head.bias"}.get(family, "")  # in untied models
    skipped = {"name": unread} if changes.get("tie_word_embeddings") is False else {}
    assert_comes_back(ours, theirs, tmp_path / "ours", batch, **skipped)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@torch.no_grad()
def test_left_padding_changes_nothing(tmp_path: Path, family: str) -> None:
    """Also not the pooled token, which is the first one and not what stands at the left."""
    theirs = model_of(family, "sequence-classification", LABELS["sequence-classification"])
    ours = loaded(theirs, tmp_path)
    batch = padded_batch(theirs.config, "-ll")
    with pytest.raises(ArgumentError, match=r"at least one token a row, got shape \(3, 0\)"):
        ours(batch["input_ids"][:, :0])
    got = ours(**batch, output_hidden_states=True)
    for row, tokens in enumerate(batch["attention_mask"].bool()):
        alone = batch["input_ids"][row][tokens][None]
        expected = theirs(alone, output_hidden_states=True)
        assert_close(got.logits[row], expected.logits[0])
        for mine, other in zip(got.hidden_states, expected.hidden_states, strict=True):
            assert_close(mine[row][tokens], other[0])


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta"])
@torch.no_grad()
def test_positions_begin_after_the_padding_id(tmp_path: Path, family: str) -> None:
    theirs = model_of(family, "encoder", {})
    ours = loaded(theirs, tmp_path)
    pad = theirs.config.pad_token_id
    assert (ours.config.position_offset, ours.config.max_positions) == (pad + 1, 29 - pad - 1)
    ids = torch.randint(4, 61, (1, 29 - pad))
    assert_close(ours(ids[:, 1:]).last_hidden_state, theirs(ids[:, 1:]).last_hidden_state)
    with pytest.raises(ArgumentError, match=f"this model has {28 - pad} positions, got a sequence of {29 - pad}"):
        ours(ids)
    apart = torch.tensor([[7, 2, 5]])  # ours count tokens, theirs rows of the table
    expected = theirs(ids[:, :3], position_ids=apart + pad + 1)
    assert_close(ours(ids[:, :3], position_ids=apart).last_hidden_state, expected.last_hidden_state)


@torch.no_grad()
def test_one_pretraining_file_serves_every_task(tmp_path: Path) -> None:
    """Both heads, gamma and beta, a position buffer: what the first BERT files hold."""
    theirs = model_of("bert", "pretraining", {})
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old = {n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for n, t in weights.items()}
    save_file({**old, "bert.embeddings.position_ids": torch.arange(29)[None]}, tmp_path / "model.safetensors")
    ids = torch.randint(0, 61, (2, 9))
    expected = theirs(ids)
    both, next_one = from_pretrained(tmp_path), from_pretrained(tmp_path, "next-sentence-prediction")
    assert isinstance(both, Pretraining)
    assert isinstance(next_one, NextSentencePredictor)
    assert_close(both(ids).prediction_logits, expected.prediction_logits)
    assert_close(both(ids).seq_relationship_logits, expected.seq_relationship_logits)
    assert_close(next_one(ids).logits, expected.seq_relationship_logits)
    assert_close(from_pretrained(tmp_path, "masked-lm")(ids).logits, expected.prediction_logits)
    with pytest.raises(CheckpointError, match=r"2 missing \(classifier\.weight, classifier\.bias\)"):
        from_pretrained(tmp_path, "sequence-classification")


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
@torch.no_grad()
def test_other_spellings(tmp_path: Path, family: str) -> None:
    """Names without the prefix, a position buffer, both names of a tied tensor; another task's head in the file."""
    theirs = model_of(family, "masked-lm", {})
    theirs.save_pretrained(tmp_path)
    prefix = find_family(family).prefix
    stored = {n.removeprefix(prefix): t for n, t in load_file(tmp_path / "model.safetensors").items()}
    decoder = "lm_head.decoder.weight" if family == "roberta" else "vocab_projector.weight"
    stored |= {"embeddings.position_ids": torch.arange(29)[None], "qa_outputs.bias": torch.ones(2)}
    stored[decoder] = stored["embeddings.word_embeddings.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors")
    ids = torch.randint(4, 61, (2, 9))
    assert_close(from_pretrained(tmp_path)(ids).logits, theirs(ids).logits)
    body = from_pretrained(tmp_path, "encoder")
    assert body.pooler is None
    assert_close(body(ids).last_hidden_state, getattr(theirs, prefix[:-1])(ids).last_hidden_state)
    stored[decoder] = stored[decoder] + 1
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"ties .* to .*, but they differ"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_names_that_do_not_fit_are_listed(tmp_path: Path, family: str) -> None:
    model_of(family, "encoder", {}).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in stored if "layer.1" in name)
    del stored[gone]
    stored |= {"embeddings.LayerNorm.weight": torch.ones(35), "embeddings.extra": torch.ones(2)}
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(tmp_path)
    message = str(caught.value)
    assert f"1 missing ({find_family(family).prefix}{gone})" in message
    assert "1 unexpected (embeddings.extra)" in message
    assert "embeddings.LayerNorm.weight: file (35,), model (36,)" in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["roberta", "distilbert"])
@torch.no_grad()
def test_half_precision(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    theirs = model_of(family, "token-classification", {"num_labels": 5}).to(dtype)
    ours = loaded(theirs, tmp_path)
    assert ours.dtype == dtype
    ids = torch.randint(4, 61, (2, 9))
    expected = theirs.float()(ids).logits
    assert_close(from_pretrained(tmp_path, dtype=torch.float32)(ids).logits, expected)
    budget = (theirs.to(dtype)(ids).logits.float() - expected).abs().max()
    error = (ours(ids).logits.float() - expected).abs().max()
    assert error <= 2 * budget + torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
@torch.no_grad()
def test_shards_both_ways(tmp_path: Path, family: str) -> None:
    theirs = model_of(family, "masked-lm", {})
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    ours = from_pretrained(tmp_path / "theirs")
    save_pretrained(ours, tmp_path / "ours", max_shard_size="20KB")
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 2
    returned, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), returned.parameters(), strict=True))


WRONG: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "decoder": ("roberta", "encoder", {"is_decoder": True}, "an encoder as a decoder .* is not supported"),
    "relative": (
        "bert",
        "encoder",
        {"position_embedding_type": "relative_key"},
        "must be 'absolute', got 'relative_key'",
    ),
    "no-rows": (
        "roberta",
        "encoder",
        {"pad_token_id": 40},
        r"must exceed pad_token_id \+ 1.* got 29 and pad_token_id 40",
    ),
    "pad-text": ("roberta", "encoder", {"pad_token_id": "<pad>"}, "got 29 and pad_token_id '<pad>'"),
    "activation": ("roberta", "masked-lm", {"hidden_act": "relu"}, "has a gelu whatever the layers have.* 'relu'"),
    "unknown-activation": ("distilbert", "encoder", {"activation": "mish"}, "activation must be one of .*, got 'mish'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_configurations_that_are_refused(case: str) -> None:
    family, task, changes, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        find_family(family).read_config({**SIZES[family], **changes}, task)


def test_what_transformers_cannot_say_is_written_in_own_form(tmp_path: Path) -> None:
    model_of("distilbert", "sequence-classification", {"num_labels": 3}).save_pretrained(tmp_path / "theirs")
    config = from_pretrained(tmp_path / "theirs").config
    changed = TransformerConfig.from_dict({**config.to_dict(), "norm_eps": 1e-5})
    save_pretrained(SequenceClassifier(changed, 3), tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "transfuse"
    assert from_pretrained(tmp_path / "ours").config == changed


def test_dropout_acts_where_the_configuration_says(tmp_path: Path) -> None:
    changes = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.999, "num_labels": 3}
    ours = loaded(model_of("distilbert", "sequence-classification", changes), tmp_path).train()
    ids = torch.randint(4, 61, (4, 9))
    bias = ours.classifier.bias
    assert (ours(ids).logits == bias).all(1).any(), "nearly all of what the classifier reads is dropped"
    torch.testing.assert_close(ours.encoder(ids).pooler_output, ours.eval().encoder(ids).pooler_output)


def test_the_page_names_every_class() -> None:
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
    for name, family in _families().items():
        if name != "transfuse":
            absent = [
                f"{task}: {cls}"
                for task, cls in family.tasks.items()
                if f"`{task}`: " not in page or f"`{cls}`" not in page
            ]
            assert not absent, f"docs/families.md lacks {absent} of {name}"
