"""TransformerConfig: what it derives, how it travels, and one clear error for every impossible value."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest

from model_cases import VARIANTS, make_config
from transfuse.errors import ConfigError
from transfuse.models import Encoder, RopeScaling, Seq2Seq, TransformerConfig

SIZES = {"vocab_size": 100, "hidden_size": 32, "num_layers": 2, "num_heads": 4}


def test_derived_values():
    config = TransformerConfig("encoder_decoder", **SIZES)
    assert (config.num_kv_heads, config.head_dim, config.intermediate_size, config.rotary_dim) == (4, 8, 128, 8)
    assert (config.num_decoder_layers, config.num_decoder_heads) == (2, 4)
    assert (config.decoder_intermediate_size, config.decoder_vocab_size) == (128, 100)
    assert config.is_encoder_decoder
    assert config.decoder_head_dim == 8
    other = TransformerConfig("encoder_decoder", **SIZES, num_decoder_heads=2, decoder_head_dim=16)
    assert other.num_parameters() == Seq2Seq(other, device="meta").num_parameters().total
    assert other.num_parameters() == config.num_parameters(), "as wide, only cut otherwise"
    odd = TransformerConfig("decoder", **{**SIZES, "num_heads": 5}, head_dim=6)
    assert odd.head_dim == 6


def test_replace():
    config = TransformerConfig("decoder", **SIZES)
    deeper = dataclasses.replace(config, num_layers=5, vocab_size=200)
    assert (deeper.num_decoder_layers, deeper.decoder_vocab_size) == (5, 200)
    wider = dataclasses.replace(config, hidden_size=64, head_dim=0, intermediate_size=0, rotary_dim=0)
    assert (wider.head_dim, wider.intermediate_size) == (16, 256)


def test_frozen_and_hashable():
    config = TransformerConfig("decoder", **SIZES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3
    assert len({config, TransformerConfig("decoder", **SIZES)}) == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trips(variant):
    config = make_config("encoder_decoder", **VARIANTS[variant], eos_token_id=[1, 2], pad_token_id=0)
    assert config.eos_token_id == (1, 2)
    assert TransformerConfig.from_dict(config.to_dict()) == config
    assert TransformerConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["vocab_size"] == 61


def test_window_of():
    config = TransformerConfig("decoder", **SIZES, window=3, layer_pattern=("global", "local"))
    assert [config.window_of(i) for i in range(4)] == [None, 3, None, 3]
    assert TransformerConfig("decoder", **SIZES, window=3).window_of(1) == 3
    assert TransformerConfig("decoder", **SIZES).window_of(1) is None


WRONG = {
    "architecture": (
        {"architecture": "both"},
        "architecture must be one of encoder, decoder, encoder_decoder, got 'both'",
    ),
    "activation": ({"activation": "swish"}, "activation must be one of relu, gelu, gelu_tanh, silu, got 'swish'"),
    "position": ({"position": ["rotary"]}, "position must be one of"),
    "negative": ({"num_layers": -1}, "num_layers must be at least 1, got -1"),
    "zero-heads": ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
    "bool": ({"num_layers": True}, "num_layers must be a whole number, got True"),
    "string": ({"hidden_size": "768"}, "hidden_size must be a whole number, got '768'"),
    "float": ({"hidden_size": 768.0}, "hidden_size must be a whole number, got 768.0"),
    "none": ({"hidden_size": None}, "hidden_size must be a whole number, got None"),
    "number-for-bool": ({"gated": 1}, "gated must be true or false, got 1"),
    "huge": ({"rope_theta": 10**400}, "rope_theta must be finite, got 1000"),
    "nan": ({"norm_eps": float("nan")}, "norm_eps must be finite, got nan"),
    "heads": ({"num_heads": 5}, "hidden_size must be a multiple of num_heads, got 32 and 5; give head_dim"),
    "kv-heads": ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
    "more-kv-heads": ({"num_kv_heads": 8}, "num_heads must be a multiple of num_kv_heads, got 4 and 8"),
    "odd-rotary": ({"position": "rotary", "head_dim": 7}, r"rotary_dim must be even and at most head_dim \(7\), got 7"),
    "long-rotary": ({"position": "rotary", "rotary_dim": 10}, r"at most head_dim \(8\), got 10"),
    "odd-sinusoid": (
        {"position": "sinusoidal", "hidden_size": 33, "num_heads": 3},
        "sinusoidal positions need an even hidden_size, got 33",
    ),
    "buckets": ({"position": "relative", "relative_buckets": 6}, "relative_buckets must be a multiple of 4, got 6"),
    "distance": (
        {"position": "relative", "relative_max_distance": 16},
        r"must exceed relative_buckets / 2 \(16\), got 16",
    ),
    "pattern": ({"layer_pattern": ("far",)}, "layer_pattern must hold 'global' and 'local' only"),
    "pattern-type": ({"layer_pattern": "local"}, "layer_pattern must hold 'global' and 'local' only"),
    "no-window": ({"layer_pattern": ("local",)}, "layer_pattern has local layers, which need window"),
    "window": ({"window": 0}, "window must be between 1 and"),
    "dropout": ({"hidden_dropout": 1.0}, "hidden_dropout must be at least 0 and below 1, got 1.0"),
    "dropout-of-a-part": ({"classifier_dropout": -0.1}, "classifier_dropout must be at least 0 and below 1, got -0.1"),
    "eps": ({"norm_eps": 0.0}, "norm_eps must be above 0, got 0.0"),
    "softcap": ({"softcap": -5.0}, "softcap must be above 0, got -5.0"),
    "pad": ({"pad_token_id": 100}, "pad_token_id must be a token id from 0 to 99, got 100"),
    "eos": ({"eos_token_id": (3, -1)}, r"eos_token_id must be a token id from 0 to 99, got \(3, -1\)"),
    "decoder-rotary": (
        {"architecture": "encoder_decoder", "position": "rotary", "decoder_head_dim": 6},
        r"rotary_dim must be even and at most head_dim \(6\), got 8",
    ),
    "wide": ({"wide_residual": True}, "wide_residual needs norm 'rms', norm_placement 'pre' and final_norm"),
    "pooler": ({"architecture": "decoder", "pooler": True}, "pooler belongs to an encoder, got architecture 'decoder'"),
    "shared-vocabularies": (
        {"architecture": "encoder_decoder", "decoder_vocab_size": 90},
        "one vocabulary, got vocab_size 100 and decoder_vocab_size 90; set share_embeddings=False",
    ),
    "rope": ({"rope_scaling": "linear"}, "rope_scaling must be a RopeScaling or None, got 'linear'"),
    "rope-kind": (
        {"rope_scaling": {"kind": "spiral", "factor": 2.0}},
        "kind must be one of linear, llama3, yarn, dynamic, longrope, got 'spiral'",
    ),
    "rope-factors": (
        {"rope_scaling": {"kind": "longrope", "factor": 2.0, "short_factor": [1, 0]}},
        r"short_factor must be positive numbers, got \[1, 0\]",
    ),
    "rope-betas": (
        {"rope_scaling": {"kind": "yarn", "factor": 2.0, "beta_slow": 40}},
        r"beta_fast must be above beta_slow \(40\), got 32.0",
    ),
    "token-types": (
        {"token_types_are_tokens": True, "type_vocab_size": 2},
        "token_types_are_tokens needs no table of types, got type_vocab_size 2",
    ),
    "rope-field": ({"rope_scaling": {"kind": "linear", "factr": 2.0}}, "unknown field 'factr'.*did you mean 'factor'"),
    "vocabulary": ({"vocab_size": 10**12}, "vocab_size must be between 1 and 134217728, got 1000000000000"),
    "layers": ({"num_layers": 10**9}, "num_layers must be between 1 and 4096, got 1000000000"),
    "everything-large": (
        {"vocab_size": 2**27, "hidden_size": 2**18, "num_heads": 2**10, "num_layers": 4096},
        r"these sizes make .* parameters, the limit is 2e\+12; check vocab_size",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_impossible_values(case):
    changes, message = WRONG[case]
    start = time.perf_counter()
    with pytest.raises(ConfigError, match=message):
        TransformerConfig(**{"architecture": "encoder", **SIZES, **changes})
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "spiral", "factor": 2.0}, "kind must be one of linear, .*, got 'spiral'"),
        ({"kind": "linear", "factor": 0.0}, "factor must be a positive number, got 0.0"),
        ({"kind": "linear", "factor": 10**400}, "factor must be a positive number, got 1000"),
        ({"kind": "linear", "factor": True}, "factor must be a positive number, got True"),
        ({"kind": "linear", "factor": "2"}, "factor must be a positive number, got '2'"),
        (
            {"kind": "llama3", "factor": 2.0, "low_freq_factor": 4.0},
            r"high_freq_factor must be above .*\(4.0\), got 4.0",
        ),
    ],
)
def test_impossible_scaling(changes, message):
    with pytest.raises(ConfigError, match=message):
        RopeScaling(**changes)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"architecture": "encoder"}', "missing vocab_size, hidden_size, num_layers, num_heads"),
        ('{"vocabsize": 3}', r"unknown field 'vocabsize' \(did you mean 'vocab_size'\?\)"),
        ('{"zzz": 3}', "unknown field 'zzz'$"),
    ],
)
def test_impossible_json(text, message):
    with pytest.raises(ConfigError, match=message):
        TransformerConfig.from_json(text)


@pytest.mark.parametrize("values", [None, [1], "minilm"], ids=str)
def test_no_mapping(values):
    with pytest.raises(ConfigError, match=f"config: expected a mapping of field to value, got {type(values).__name__}"):
        TransformerConfig.from_dict(values)


def test_large_but_possible():
    """Nothing is allocated for a configuration, however large, nor for its model on the meta device."""
    config = TransformerConfig("decoder", 128256, 16384, 126, 128, num_kv_heads=8, intermediate_size=53248, gated=True,
                               norm="rms", position="rotary", qkv_bias=False, out_bias=False, ffn_bias=False,
                               tie_embeddings=False)  # fmt: skip
    assert config.num_parameters() == 405_853_388_800  # Llama 3.1 405B, as published
    bert = TransformerConfig("encoder", 30522, 768, 12, 12, norm_placement="post", final_norm=False,
                             embedding_norm=True, type_vocab_size=2, pooler=True)  # fmt: skip
    assert bert.num_parameters() == Encoder(bert, device="meta").num_parameters().total == 109_482_240


def test_dropout_of_a_part_is_said_once():
    """One model has one spelling: a part's own rate that is the general one is none."""
    config = TransformerConfig("decoder", 9, 8, 1, 2, hidden_dropout=0.1, embedding_dropout=0.1, classifier_dropout=0.2)
    assert (config.embedding_dropout, config.classifier_dropout) == (None, 0.2)
    assert TransformerConfig.from_json(config.to_json()) == config
