"""A folder whose download was cut off: one clear error that names what is missing and says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import transfuse
from test_cli import assert_mistake, run
from transfuse.errors import CheckpointError

CUT = "model-00002-of-00002.safetensors.incomplete"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded checkpoint with a tokenizer, whole."""
    config = transfuse.TransformerConfig("decoder", 5, 16, num_layers=1, num_heads=2, position="rotary")
    transfuse.Decoder(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\na\nb\n")
    return tmp_path


def cut(folder: Path, name: str, parts: str | None = None) -> None:
    """Lose a file, and leave a part of it where a download leaves it."""
    (folder / name).unlink()
    if parts is not None:
        (folder / parts).mkdir(parents=True, exist_ok=True)
        (folder / parts / f"{name}.incomplete").write_bytes(b"half of it")


def test_the_whole_folder_loads(folder: Path) -> None:
    assert transfuse.from_pretrained(folder)(torch.tensor([transfuse.load_tokenizer(folder).encode("a b")]))


@pytest.mark.parametrize("parts", [None, ".", ".cache/huggingface/download"], ids=str)
@pytest.mark.parametrize(
    "name, message",
    [
        ("model-00002-of-00002.safetensors", "1 of 2 shards are missing: model-00002-of-00002.safetensors"),
        ("model.safetensors.index.json", "expected model.safetensors or model.safetensors.index.json, found"),
        ("config.json", "no config.json"),
        ("vocab.txt", "expected tokenizer.json, vocab.txt, .* found none"),
    ],
)
def test_a_missing_file_is_named(folder: Path, name: str, message: str, parts: str | None) -> None:
    cut(folder, name, parts)
    load = transfuse.load_tokenizer if name == "vocab.txt" else transfuse.from_pretrained
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    said = str(caught.value)
    assert "\n" not in said
    if parts is not None and name != "model.safetensors.index.json":
        assert f"({name}.incomplete: a download was cut off; start it again)" in said


def test_a_shard_cut_short(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors: not a valid .* download it again"):
        transfuse.from_pretrained(folder)


def test_the_command_says_it_in_one_line(folder: Path) -> None:
    cut(folder, "model-00002-of-00002.safetensors", ".")
    assert_mistake(
        run("generate", str(folder), "-p", "a"), "1 of 2 shards are missing", f"({CUT}: a download was cut off"
    )
