"""Mistakes in what a model is made of or given: each is one clear error of ours, and nothing is built or changed."""

from __future__ import annotations

import math

import pytest
import torch

import transfuse
from model_cases import build, make_config
from transfuse.errors import ArgumentError, ConfigError, DeviceError, DtypeError
from transfuse.models import Decoder, Encoder, KVCache, MaskedLM, Seq2Seq, SequenceClassifier
from transfuse.nn import RotaryEmbedding

IDS = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize("config", [None, {"architecture": "decoder"}, "minilm"], ids=["None", "dict", "name"])
@pytest.mark.parametrize("kind", [Encoder, Decoder, Seq2Seq, MaskedLM, SequenceClassifier])
def test_something_else_than_a_configuration(kind, config):
    with pytest.raises(
        ConfigError, match=f"{kind.__name__}: expected a TransformerConfig, got {type(config).__name__}"
    ):
        kind(config, 2) if kind is SequenceClassifier else kind(config)


def test_a_family_that_nobody_knows():
    with pytest.raises(ConfigError, match=r"config: family must be one of bart, bert, .*, got 'unknown'"):
        make_config("encoder", family="unknown")
    with pytest.raises(ConfigError, match=r"config: family must be a string, got None"):
        make_config("encoder", family=None)


@pytest.mark.parametrize("arguments", [("a",), (None,), (3,), (0,), (True,), (8, "a"), (8, 0.0)], ids=str)
def test_rotary_positions_of_nothing(arguments):
    with pytest.raises(ConfigError, match=r"RotaryEmbedding: (dim|theta) must be .*, got "):
        RotaryEmbedding(*arguments)


@pytest.mark.parametrize(
    "device", ["nonsense", "cuda:99", object(), 10**30], ids=["nonsense", "cuda:99", "object", "1e30"]
)
def test_devices_that_are_not_there(device, tmp_path):
    with pytest.raises(DeviceError, match="device: expected cpu, meta, cuda, "):
        Decoder(make_config("decoder"), device=device)
    Decoder(make_config("decoder")).save_pretrained(tmp_path)
    with pytest.raises(DeviceError, match="device: expected cpu, meta, cuda, "):
        transfuse.from_pretrained(tmp_path, device=device)


@pytest.mark.parametrize("dtype", ["float32", torch.int8, torch.complex64, float], ids=str)
def test_dtypes_that_parameters_cannot_have(dtype):
    with pytest.raises(DtypeError, match=r"dtype: expected torch\.float64, torch\.float32, "):
        Encoder(make_config("encoder"), dtype=dtype)


@pytest.mark.parametrize("folder", ["", None, 3, ["a"], b"a", "a\0"], ids=repr)
def test_folders_without_a_name(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match="save_pretrained: expected the name of a folder, got "):
        Decoder(make_config("decoder")).save_pretrained(folder)
    assert not list(tmp_path.iterdir())


def test_a_model_without_values_is_not_saved(tmp_path):
    with pytest.raises(ArgumentError, match="on the meta device and has no values"):
        Decoder(make_config("decoder"), device="meta").save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.bool, torch.float32], ids=str)
def test_ids_of_another_type(dtype):
    with pytest.raises(DtypeError, match=r"input_ids: expected an int64 or int32 tensor \(batch, length\), got torch"):
        build(make_config("decoder"))(IDS.to(dtype))


MASKS = {
    "list": ([[1, 1, 1]] * 2, DtypeError, "expected a tensor with 1 = token, 0 = padding, got list"),
    "additive": (torch.tensor([[0.0, 0.0, -math.inf]] * 2), ArgumentError, "got numbers from -inf to 0; a mask to be"),
    "nan": (torch.full((2, 3), math.nan), ArgumentError, "expected 1 = token, 0 = padding, got numbers from nan"),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_that_are_none(case):
    mask, error, message = MASKS[case]
    model = build(make_config("decoder"))
    with pytest.raises(error, match=message):
        model(IDS, mask)
    with pytest.raises(error):
        model.generate(IDS, mask, max_new_tokens=1)


NUMBERS = {
    "list": ([[0, 1, 2]], DtypeError, "got list"),
    "float": (torch.zeros(2, 3), DtypeError, "got torch.float32"),
    "shape": (torch.zeros(2, 1, dtype=torch.long), ArgumentError, r"got \(2, 1\)"),
    "device": (IDS.to("meta"), DeviceError, "must be on cpu like input_ids, got meta"),
}


@pytest.mark.parametrize("name", ["token_type_ids", "position_ids"])
@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_beside_the_ids(name, case):
    value, error, message = NUMBERS[case]
    with pytest.raises(error, match=f"{name}: .*{message}"):
        build(make_config("encoder", type_vocab_size=2))(IDS, **{name: value})


def test_caches_of_something_else():
    decoder, seq2seq = build(make_config("decoder")), build(make_config("encoder_decoder"))
    other = build(make_config("decoder", num_layers=3)).new_cache(2, 5)
    for cache, message in [((1, 2), "got tuple"), (other, r"= \(3, 4, 8\), this model has \(2, 4, 8\)")]:
        with pytest.raises(ArgumentError, match=f"cache: .*{message}"):
            decoder(IDS, cache=cache)
        with pytest.raises(ArgumentError, match=f"cache: .*{message}"):
            seq2seq(IDS, decoder_input_ids=IDS, cache=cache)
    assert other.length == 0


def test_caches_of_impossible_size():
    for sizes in ((1.0, 4), (1, None), (True, 4)):
        with pytest.raises(ArgumentError, match="batch and max_length must be whole numbers of at least 1"):
            build(make_config("decoder")).new_cache(*sizes)
    with pytest.raises(ArgumentError, match=r"KVCache: keys and values of shape .* need .* GiB for all layers"):
        build(make_config("decoder")).new_cache(10**6, 10**25)
    assert KVCache(2, 10**6, 2, 10**6, 8, device="meta").max_length == 10**6


@pytest.mark.parametrize(
    "rows", [[0, 1], torch.tensor([0, 2]), torch.tensor([0, -1])], ids=["list", "beyond", "negative"]
)
def test_rows_that_a_cache_does_not_have(rows):
    cache = build(make_config("decoder")).new_cache(2, 5)
    for method in (cache.reorder, cache.select):
        with pytest.raises(ArgumentError, match=r"row numbers"):
            method(rows)


@pytest.mark.parametrize("states", [None, torch.zeros(2, 3, 8), torch.zeros(2, 32)], ids=["None", "size", "dimensions"])
def test_context_of_another_shape(states):
    with pytest.raises(ArgumentError, match="encoder_hidden_states"):
        build(make_config("encoder_decoder")).decoder(IDS, encoder_hidden_states=states)
