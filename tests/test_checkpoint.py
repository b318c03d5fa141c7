"""Checkpoint files: what is read is what was written, and every damage is one clear line, whatever its kind."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from transfuse.errors import CheckpointError, ConfigError
from transfuse.models.checkpoint import INDEX, WEIGHTS, open_safetensors, read_header, read_json
from transfuse.models.gguf import GgufFile, LlamaGgufSource

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([0.5, -2.0, 65504.0], dtype=torch.float16),
    "c.weight": torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "empty": torch.zeros(0, 3),
}
GOOD = save(TENSORS)
HEADER_BYTES = int.from_bytes(GOOD[:8], "little")
HEADER = json.loads(GOOD[8 : 8 + HEADER_BYTES])
DATA = GOOD[8 + HEADER_BYTES :]


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text
    assert "\n" not in text
    assert len(text) < 1200
    return text


def file_of(header: object, data: bytes = DATA) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def changed(**fields: object) -> dict[str, object]:
    return {**HEADER, "a": {**HEADER["a"], **fields}}


def write_shards(folder: Path, shards: dict[str, list[str]]) -> None:
    for file, names in shards.items():
        save_file({name: TENSORS[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_file_gives_back_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in TENSORS.items()}
    save_file(stored, tmp_path / WEIGHTS)
    source = open_safetensors(tmp_path)
    assert source.entries.keys() == stored.keys()
    for name, tensor in stored.items():
        read = source.read(name)
        assert read.dtype == dtype
        assert torch.equal(read, tensor)
        assert source.entries[name].shape == tuple(tensor.shape)


def test_shards_read_as_one(tmp_path: Path) -> None:
    write_shards(tmp_path, {"part-1.safetensors": ["a", "empty"], "part-2.safetensors": ["b", "c.weight"]})
    source = open_safetensors(tmp_path)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in TENSORS.items())


DAMAGED = {
    "empty": b"",
    "five-bytes": GOOD[:5],
    "header-cut": GOOD[:20],
    "data-cut": GOOD[:-3],
    "trailing-bytes": GOOD + b"xx",
    "header-of-1TiB": struct.pack("<Q", 1 << 40) + GOOD[8:],
    "header-of-2**64-1": b"\xff" * 8 + GOOD[8:],
    "header-not-json": file_of(b"hello world"),
    "header-a-list": file_of(b"[1]"),
    "header-zeros": file_of(b"\0" * 100),
    "header-not-utf8": file_of(b'{"\xff\xfe": 1}'),
    "header-nested-deep": file_of(b'{"a":' * 20000),
    "wrong-shape": file_of(changed(shape=[2, 4])),
    "negative-shape": file_of(changed(shape=[-2, -3])),
    "shape-overflows": file_of(changed(shape=[1 << 62, 1 << 62])),
    "shape-of-floats": file_of(changed(shape=[2.0, 3.0])),
    "offsets-past-the-end": file_of(changed(data_offsets=[1 << 40, (1 << 40) + 24])),
    "offsets-reversed": file_of(changed(data_offsets=[24, 0])),
    "offsets-overlap": file_of(changed(data_offsets=[8, 32])),
    "unknown-dtype": file_of(changed(dtype="F5")),
    "no-dtype": file_of({**HEADER, "a": {"shape": [2, 3], "data_offsets": [0, 24]}}),
    "metadata-of-numbers": file_of({**HEADER, "__metadata__": {"x": 1}}),
    "name-twice": file_of(json.dumps(HEADER).encode()[:-1] + b', "a": ' + json.dumps(HEADER["a"]).encode() + b"}"),
    "git-lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "pickle": b"\x80\x02}q\x00.",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_file_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    (tmp_path / WEIGHTS).write_bytes(DAMAGED[damage])
    with pytest.raises(CheckpointError) as caught:
        open_safetensors(tmp_path)
    message = one_line(caught.value)
    assert WEIGHTS in message
    assert any(word in message for word in ("download", "git lfs pull", "write the file again"))


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(GOOD)
    source = open_safetensors(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(GOOD[:30])
    with pytest.raises(CheckpointError, match="cannot read a"):
        source.read("a")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cut=st.integers(0, len(GOOD)) | st.none(),
    flips=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(1, 255)), max_size=3),
)
def test_fuzzed_file_is_refused_or_consistent(tmp_path: Path, cut: int | None, flips: list[tuple[int, int]]) -> None:
    damaged = bytearray(GOOD)
    for at, mask in flips:
        damaged[at] ^= mask
    (tmp_path / WEIGHTS).write_bytes(damaged[:cut])
    try:
        source = open_safetensors(tmp_path)
        read = {name: source.read(name) for name in source.entries}
    except CheckpointError as error:
        one_line(error)
        return
    assert cut is None or cut == len(GOOD), "a shortened file was accepted"
    for name, tensor in read.items():
        assert tuple(tensor.shape) == source.entries[name].shape
    if not any(at < 8 + HEADER_BYTES for at, _ in flips):  # the header is whole: the same names, dtypes and bytes
        assert read.keys() == TENSORS.keys()
        start = 8 + HEADER_BYTES
        for name, tensor in read.items():
            begin, end = HEADER[name]["data_offsets"]
            assert tensor.dtype == TENSORS[name].dtype
            assert bytes(tensor.flatten().view(torch.uint8).tolist()) == bytes(damaged[start + begin : start + end])


BAD_SHARD_NAMES = {
    "parent": "../x.safetensors",
    "hidden-parent": "sub/../../x.safetensors",
    "absolute": "/etc/passwd",
    "backslash": "..\\x.safetensors",
    "drive": "C:x.safetensors",
    "nul": "x\0.safetensors",
    "empty": "",
}


@pytest.mark.parametrize("kind", BAD_SHARD_NAMES)
def test_index_cannot_name_a_path_outside(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, tmp_path / "x.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": BAD_SHARD_NAMES[kind]}}))
    with pytest.raises(CheckpointError, match="not a path inside the checkpoint folder") as caught:
        open_safetensors(folder)
    one_line(caught.value)


def test_index_cannot_reach_outside_by_a_link(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, tmp_path / "secret.safetensors")
    (folder / "shard.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, "shard.safetensors")}))
    with pytest.raises(CheckpointError, match="link that leaves"):
        open_safetensors(folder)


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file(TENSORS, blobs / "0123")
    (snapshot / "shard.safetensors").symlink_to(os.path.join("..", "..", "blobs", "0123"))
    (snapshot / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, "shard.safetensors")}))
    assert torch.equal(open_safetensors(snapshot).read("a"), TENSORS["a"])


BAD_INDEXES = {
    "not-json": ("{", "not valid JSON"),
    "a-list": ("[]", "expected a JSON object"),
    "no-map": ("{}", "weight_map"),
    "empty-map": ('{"weight_map": {}}', "weight_map"),
    "map-of-numbers": ('{"weight_map": {"a": 1}}', "weight_map"),
    "missing-shard": ('{"weight_map": {"a": "gone.safetensors"}}', "1 of 1 shards are missing: gone.safetensors"),
    "tensor-not-there": ('{"weight_map": {"zz": "real.safetensors"}}', "not in the shard the index names: zz"),
    "nested-deep": ('{"a":' * 100_000, "not valid JSON"),
}


@pytest.mark.parametrize("kind", BAD_INDEXES)
def test_damaged_index_is_one_clear_error(tmp_path: Path, kind: str) -> None:
    text, expected = BAD_INDEXES[kind]
    save_file(TENSORS, tmp_path / "real.safetensors")
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=expected) as caught:
        open_safetensors(tmp_path)
    one_line(caught.value)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, {"1.safetensors": ["a", "b"], "2.safetensors": ["b", "c.weight"]})
    with pytest.raises(CheckpointError, match=r"b is in both 1\.safetensors and 2\.safetensors"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize(
    "file, expected",
    [
        ("pytorch_model.bin", "pickled weights .* safetensors"),
        ("model.gguf", "pass the path of the .gguf file"),
        ("other.safetensors", "rename"),
        ("readme.md", "found neither"),
    ],
)
def test_folder_without_weights_says_what_to_do(tmp_path: Path, file: str, expected: str) -> None:
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=expected) as caught:
        open_safetensors(tmp_path)
    one_line(caught.value)


def test_directory_or_nothing_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(CheckpointError, match="no such file"):
        read_header(tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path / "none.json")


# -- GGUF ---------------------------------------------------------------------------------------------------------

gguf = pytest.importorskip("gguf")


def write_gguf(path: Path, quantisation: str = "F32", **metadata: int) -> dict[str, torch.Tensor]:
    """A two-tensor Llama file; returns what dequantising must give."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"embedding_length": 64, "block_count": 1, "context_length": 32, **metadata}.items():
        writer.add_uint32(f"llama.{key}", value)
    for key, value in {"attention.head_count": 4, "attention.head_count_kv": 2, "feed_forward_length": 96}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_token_list(["a", "b", "c"])
    kind = gguf.GGMLQuantizationType[quantisation]
    generator, expected = np.random.default_rng(0), {}
    for name, shape in (("token_embd.weight", (3, 64)), ("blk.0.attn_q.weight", (64, 64))):
        raw = gguf.quants.quantize(generator.standard_normal(shape, dtype=np.float32), kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
        expected[name] = torch.from_numpy(gguf.quants.dequantize(raw, kind).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("quantisation", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
def test_gguf_tensors(tmp_path: Path, quantisation: str) -> None:
    path = tmp_path / "m.gguf"
    expected = write_gguf(path, quantisation)
    file = GgufFile(path)
    for name, tensor in expected.items():
        assert torch.equal(file.read(name), tensor)
    if hasattr(gguf.ReaderField, "contents"):  # the reference reader, where it is new enough, sees the same metadata
        theirs = gguf.GGUFReader(path)
        assert all(theirs.get_field(key).contents() == value for key, value in file.metadata.items())


def test_gguf_projection_rows_return_to_halves(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    expected = write_gguf(path)
    source = LlamaGgufSource(path)
    read, stored = source.read("model.layers.0.self_attn.q_proj.weight"), expected["blk.0.attn_q.weight"]
    # head 0 has 16 rows: neighbours (0, 1) of the file are rows 0 and 8 of Hugging Face's layout
    assert torch.equal(read[0], stored[0])
    assert torch.equal(read[8], stored[1])
    assert torch.equal(read[1], stored[2])
    assert torch.equal(source.read("model.embed_tokens.weight"), expected["token_embd.weight"])
    assert source.config["rms_norm_eps"] == 1e-5
    assert source.config["tie_word_embeddings"] is True


def test_gguf_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="architecture 'mamba', expected 'llama'"):
        LlamaGgufSource(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_gguf_is_refused_or_read(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, "Q8_0")
    raw = bytearray(path.read_bytes())
    header = raw.index(b"blk.0.attn_q.weight") + 60  # flips in the numbers that follow are harmless by design
    for at, mask in data.draw(st.lists(st.tuples(st.integers(0, header), st.integers(1, 255)), max_size=3)):
        raw[at] ^= mask
    cut = data.draw(st.none() | st.integers(0, len(raw)))
    (tmp_path / "damaged.gguf").write_bytes(raw[:cut])
    try:
        source = LlamaGgufSource(tmp_path / "damaged.gguf")
        for name, info in source.entries.items():
            assert tuple(source.read(name).shape) == info.shape
    except (CheckpointError, ConfigError) as error:
        one_line(error)
