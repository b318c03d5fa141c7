"""Checkpoints that do not fit, impossible configurations, and where models are looked for: one clear error each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import transfuse
from test_families import hf_bert, hf_llama
from transfuse import from_pretrained
from transfuse.errors import ArgumentError, CheckpointError, ConfigError, DtypeError


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    hf_llama().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def test_all_misfits_in_one_error_and_nothing_allocated(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = load_file(llama_folder / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(2)
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(70, 48)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(48, 70)
    tensors["model.layers.2.mlp.down_proj.weight"] = torch.zeros(48, 70, dtype=torch.int8)
    save_file(tensors, llama_folder / "model.safetensors")
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *a, **k: pytest.fail("memory was taken before the check"))
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(llama_folder)
    message = str(caught.value)
    assert "\n" not in message
    assert "2 missing (model.layers.1.self_attn.k_proj.weight, model.norm.weight)" in message or (
        "2 missing (model.norm.weight, model.layers.1.self_attn.k_proj.weight)" in message
    )
    assert "2 unexpected" in message
    assert "lora_A" in message
    assert "model.layers.2.mlp.up_proj.weight: file (48, 70), model (70, 48)" in message
    assert "model.layers.2.mlp.down_proj.weight: dtype I8" in message


def test_a_long_list_stays_readable(llama_folder: Path) -> None:
    save_file({"other": torch.zeros(1)}, llama_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"30 missing .* and 20 more") as caught:
        from_pretrained(llama_folder)
    assert len(str(caught.value)) < 1000


ABSURD = {
    "hidden-1e12": {"hidden_size": 10**12},
    "layers-1e9": {"num_hidden_layers": 10**9},
    "vocab-1e30": {"vocab_size": 10**30},
    "heads-0": {"num_attention_heads": 0},
    "heads-negative": {"num_attention_heads": -6},
    "heads-do-not-divide": {"num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": None},
    "kv-heads-do-not-divide": {"num_key_value_heads": 4},
    "head-dim-odd": {"head_dim": 7},
    "text-for-a-number": {"hidden_size": "48"},
    "fraction": {"hidden_size": 48.5},
    "true-for-a-number": {"num_hidden_layers": True},
    "list": {"intermediate_size": [70]},
    "not-a-number": {"rms_norm_eps": float("nan")},
    "infinite-theta": {"rope_parameters": {"rope_theta": float("inf"), "rope_type": "default"}},
    "zero-eps": {"rms_norm_eps": 0.0},
    "activation": {"hidden_act": "swishhh"},
    "activation-a-list": {"hidden_act": ["silu"]},
    "rope-kind": {"rope_parameters": {"rope_type": "spiral", "factor": 2.0}},
    "rope-length": {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": "long"}},
    "rope-text": {"rope_parameters": "linear"},
    "rope-negative": {"rope_parameters": {"rope_type": "linear", "factor": -1.0}},
    "token-id": {"pad_token_id": 10**6},
    "dropout": {"attention_dropout": 1.5},
    "too-much-altogether": {"hidden_size": 2**17, "intermediate_size": 2**20, "num_hidden_layers": 4000},
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("case", ABSURD)
def test_absurd_config_is_refused_at_once(llama_folder: Path, case: str) -> None:
    rewrite(llama_folder, **ABSURD[case])
    with pytest.raises(ConfigError) as caught:
        from_pretrained(llama_folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "not valid JSON"),
        ('{"model_type": "llama"', "not valid JSON"),
        ("[1, 2]", "expected a JSON object, got list"),
        ('{"model_type": "mamba"}', "'mamba' is not a known family; known: .*bert, .*llama"),
        ("{}", "None is not a known family"),
        ('{"model_type": ["llama"]}', "not a known family"),
        ('{"model_type": "transfuse", "layers": 3}', "unknown field 'layers'"),
        ("\x00\xff", "not valid JSON"),
        ('{"a":' * 50_000, "not valid JSON"),
    ],
    ids=["empty", "cut", "list", "unknown", "none", "type-a-list", "own-unknown-field", "binary", "deep"],
)
def test_damaged_config(llama_folder: Path, text: str, expected: str) -> None:
    (llama_folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=expected) as caught:
        from_pretrained(llama_folder)
    assert "\n" not in str(caught.value)


def test_bert_that_is_a_decoder(tmp_path: Path) -> None:
    hf_bert().save_pretrained(tmp_path)
    rewrite(tmp_path, is_decoder=True)
    with pytest.raises(ConfigError, match="decoder"):
        from_pretrained(tmp_path)


def test_copy_of_a_tied_tensor_must_be_equal(tmp_path: Path) -> None:
    hf_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(from_pretrained(tmp_path).embeddings.token.weight, tensors["lm_head.weight"])
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"ties lm_head\.weight to model.embed_tokens\.weight, but they differ"):
        from_pretrained(tmp_path)
    del tensors["model.embed_tokens.weight"]  # the copy alone is enough
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(from_pretrained(tmp_path).embeddings.token.weight, tensors["lm_head.weight"])


def test_head_that_is_not_in_the_file(tmp_path: Path) -> None:
    hf_bert().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"2 missing \(classifier\.weight, classifier\.bias"):
        from_pretrained(tmp_path, "sequence-classification")


def test_wrong_task_dtype_and_paths(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="llama has no task 'masked-lm'; it has causal-lm"):
        from_pretrained(llama_folder, "masked-lm")
    with pytest.raises(DtypeError, match=r"dtype: expected torch\.float64, "):
        from_pretrained(llama_folder, dtype=torch.int8)
    with pytest.raises(CheckpointError, match=r"expected a folder with config\.json"):
        from_pretrained(llama_folder / "config.json")
    (llama_folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="a pickle can run any code"):
        from_pretrained(llama_folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        from_pretrained(llama_folder / "nothing")
    (llama_folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        from_pretrained(llama_folder)
    (llama_folder / "empty.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="GGUF"):
        from_pretrained(llama_folder / "empty.gguf")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with nothing in it, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "hub"


def test_hub_model_comes_from_the_cache(hub_cache: Path, tmp_path: Path) -> None:
    theirs = hf_llama()
    theirs.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    repository = hub_cache / "models--someone--tiny"
    for part in ("blobs", "refs", "snapshots/abc123"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    for i, file in enumerate((tmp_path / "model").iterdir()):
        shutil.copy(file, repository / "blobs" / str(i))
        (repository / "snapshots" / "abc123" / file.name).symlink_to(f"../../blobs/{i}")
    ours = from_pretrained("someone/tiny")
    assert torch.equal(ours.embeddings.token.weight, theirs.model.embed_tokens.weight)
    next((repository / "snapshots" / "abc123").glob("*.safetensors")).unlink()  # an interrupted download
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        from_pretrained("someone/tiny")


@pytest.mark.parametrize("name", ["someone/absent", "absent"])
def test_offline_and_absent_is_one_clear_error(hub_cache: Path, name: str) -> None:
    for load in (from_pretrained, transfuse.load_tokenizer):
        with pytest.raises(CheckpointError) as caught:
            load(name)
        message = str(caught.value)
        assert "\n" not in message
        for part in (name, "minilm, smollm2", str(hub_cache), "HF_HUB_OFFLINE", f"hf download {name}"):
            assert part in message


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "../up", "", "x\0y", "model.bin", "-rf"])
def test_what_can_be_no_hub_id_is_never_looked_up(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(name)
    assert "\n" not in str(caught.value)
