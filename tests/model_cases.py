"""Small models for the tests, and what to feed them."""

from __future__ import annotations

import pytest
import torch

from transfuse.models import Decoder, Encoder, RopeScaling, Seq2Seq, TransformerConfig

ARCHITECTURES = ["encoder", "decoder", "encoder_decoder"]
POSITIONS = ["none", "learned", "sinusoidal", "rotary", "relative"]

VARIANTS = {
    "grouped": {"num_kv_heads": 2, "position": "rotary"},
    "one-kv-head": {"num_kv_heads": 1},
    "head-dim": {"head_dim": 24},
    "odd-head-dim": {"head_dim": 5},
    "scale": {"attention_scale": 1.0},
    "softcap": {"softcap": 2.0},
    "window": {"window": 3},
    "local-global": {"window": 3, "layer_pattern": ("global", "local"), "num_layers": 4, "num_decoder_layers": 4},
    "no-bias": {"qkv_bias": False, "out_bias": False, "ffn_bias": False, "norm_bias": False},
    "qkv-bias-only": {"out_bias": False, "ffn_bias": False, "num_kv_heads": 2},
    "untied": {"tie_embeddings": False, "lm_head_bias": True},
    "head": {"lm_head_bias": True, "logit_scale": 32**-0.5},
    "embeddings": {"embedding_norm": True, "embedding_scale": 32**0.5, "position_offset": 2},
    "marian-sinusoids": {"position": "sinusoidal", "sinusoidal_layout": "halves"},
    "partial-rotary": {"position": "rotary", "rotary_dim": 4, "rope_theta": 100.0},
    "rope-linear": {"position": "rotary", "rope_scaling": RopeScaling("linear", 4.0)},
    "rope-llama3": {
        "position": "rotary",
        "head_dim": 32,
        "rope_scaling": RopeScaling("llama3", 8.0, original_max_positions=128),
    },
    "few-buckets": {"position": "relative", "relative_buckets": 8, "relative_max_distance": 6},
}


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only lose by a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_config(architecture="encoder", **changes):
    base = {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 40}
    return TransformerConfig(architecture, **{**base, "initializer_range": 0.2, **changes})


def build(config, **options):
    """The model of a configuration, in eval mode, with every parameter random: biases and norms too."""
    kind = {"encoder": Encoder, "decoder": Decoder, "encoder_decoder": Seq2Seq}[config.architecture]
    model = kind(config, **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_meta and (name.endswith("bias") or "norm" in name):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def some_inputs(config, batch=3, length=9, padded=None):
    inputs = {"input_ids": torch.randint(0, 61, (batch, length))}
    if padded is not None:
        inputs["attention_mask"] = padding(batch, length, padded)
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(0, 61, (batch, 7))
    return inputs


def padding(batch, length, side):
    """(batch, length) with 0, 2, 4, ... padded positions in the rows."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        n = 2 * row
        mask[row, length - n :] = 0 if side == "right" else 1
        mask[row, :n] = 0 if side == "left" else mask[row, :n]
    return mask


def build_seeded(config):
    torch.manual_seed(0)
    return build(config)
