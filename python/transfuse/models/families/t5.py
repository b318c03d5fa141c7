"""T5 (Raffel et al. 2020): pre-norm encoder-decoder, RMS norm, relative positions, no biases, unscaled attention.

Version 1.0 has relu, and a head tied to the token table that reads hidden states times ``hidden_size ** -0.5``. Version
1.1 (Flan-T5 too) is gated, with a head of its own and no scale. In fp16 the sums of both pass 65504: ``wide_residual``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from transfuse.errors import ConfigError
from transfuse.models.checkpoint import TensorSource
from transfuse.models.config import TransformerConfig
from transfuse.models.families import Family, Rows, activation_from, cross_rows, given, qkv_rows, with_parts

_OF_ENCODER = ("encoder", "token-classification")
_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# "gated-gelu" is the tanh form; the exact one has a name of its own.
_PROJECTIONS = {
    (True, "gelu_tanh"): "gated-gelu",
    (True, "gelu"): "gated-gelu_python",
    (False, "gelu_tanh"): "gelu_new",
}


def _read_config(values: Mapping[str, Any], task: str) -> TransformerConfig:
    kind = given(values, "feed_forward_proj", "relu")
    if not isinstance(kind, str):
        raise ConfigError(f"config.json: feed_forward_proj must be a name, got {kind!r}")
    inner = "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
    hidden, layers = given(values, "d_model", 512), given(values, "num_layers", 6)
    tied = given(values, "tie_word_embeddings", True)
    # transformers 5 says so, before it was said by tying
    scaled = given(values, "scale_decoder_outputs", tied) and isinstance(hidden, int) and hidden > 0
    dropout, pad = given(values, "dropout_rate", 0.1), values.get("pad_token_id", 0)
    encodes = task in _OF_ENCODER
    return TransformerConfig(
        architecture="encoder" if encodes else "encoder_decoder",
        family="t5",
        vocab_size=given(values, "vocab_size", 32128),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=given(values, "num_heads", 8),
        head_dim=given(values, "d_kv", 64),
        intermediate_size=given(values, "d_ff", 2048),
        num_decoder_layers=given(values, "num_decoder_layers", layers),
        activation=activation_from({"feed_forward_proj": inner}, "relu", "feed_forward_proj"),
        gated=kind.startswith("gated-"),
        norm="rms",
        norm_eps=given(values, "layer_norm_epsilon", 1e-6),
        qkv_bias=False,
        out_bias=False,
        ffn_bias=False,
        wide_residual=True,
        attention_scale=1.0,
        position="relative",
        relative_buckets=given(values, "relative_attention_num_buckets", 32),
        relative_max_distance=given(values, "relative_attention_max_distance", 128),
        tie_embeddings=tied,
        logit_scale=hidden**-0.5 if scaled else 1.0,
        hidden_dropout=dropout,
        attention_dropout=dropout,
        ffn_dropout=dropout,
        classifier_dropout=given(values, "classifier_dropout", 0.0),
        pad_token_id=pad,
        eos_token_id=values.get("eos_token_id", 1),
        decoder_start_token_id=given(values, "decoder_start_token_id", pad),
        initializer_range=given(values, "initializer_range", 0.02),
    )


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    name = f"gated-{config.activation}" if config.gated else config.activation
    eos = config.eos_token_id
    return {
        "model_type": "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "d_ff": config.intermediate_size,
        "feed_forward_proj": _PROJECTIONS.get((config.gated, config.activation), name),
        "layer_norm_epsilon": config.norm_eps,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.logit_scale != 1.0,
        "dropout_rate": config.hidden_dropout,
        "classifier_dropout": config.dropout_of_classifier,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "decoder_start_token_id": config.decoder_start_token_id,
        "initializer_range": config.initializer_range,
    }


def _table(config: TransformerConfig, task: str) -> dict[str, Rows]:
    inside = "" if task in ("encoder", "token-classification", "seq2seq-lm", "seq2seq") else "seq2seq."
    encoder = "" if task == "encoder" else f"{inside}encoder."
    pairs = {"shared.weight": Rows(f"{encoder}embeddings.token.weight"), **_stack(config, encoder, decoder=False)}
    if task not in _OF_ENCODER:
        pairs |= _stack(config, f"{inside}decoder.", decoder=True)
    if task == "seq2seq-lm" and not config.tie_embeddings:
        pairs["lm_head.weight"] = Rows("decoder.lm_head.weight")
    elif task == "sequence-classification":
        heads = {"classification_head.dense": "pooler", "classification_head.out_proj": "classifier"}
        pairs |= with_parts(heads)
    elif task == "token-classification":
        pairs |= with_parts({"classifier": "classifier"})
    elif task == "question-answering":
        pairs |= with_parts({"qa_outputs": "classifier"})
    return pairs


def _stack(config: TransformerConfig, inside: str, *, decoder: bool) -> dict[str, Rows]:
    stored = "decoder" if decoder else "encoder"
    pairs = {
        f"{stored}.block.0.layer.0.SelfAttention.relative_attention_bias.weight": Rows(
            f"{inside}relative_position.weight"
        )
    }
    modules = {f"{stored}.final_layer_norm": f"{inside}final_norm"}
    for i in range(config.num_decoder_layers if decoder else config.num_layers):
        theirs, ours = f"{stored}.block.{i}.layer", f"{inside}layers.{i}"
        q, k, v = (f"{theirs}.0.SelfAttention.{name}.weight" for name in "qkv")
        pairs |= qkv_rows(config, (q, k, v), f"{ours}.attention.qkv.weight", decoder=decoder)
        if decoder:
            q, k, v = (f"{theirs}.1.EncDecAttention.{name}.weight" for name in "qkv")
            pairs |= cross_rows(config, (q, k, v), f"{ours}.cross_attention", "weight")
            modules[f"{theirs}.1.EncDecAttention.o"] = f"{ours}.cross_attention.out"
            modules[f"{theirs}.1.layer_norm"] = f"{ours}.cross_attention_norm"
        last = f"{theirs}.{1 + decoder}"
        modules |= {
            f"{theirs}.0.SelfAttention.o": f"{ours}.attention.out",
            f"{theirs}.0.layer_norm": f"{ours}.attention_norm",
            f"{last}.DenseReluDense.wo": f"{ours}.feed_forward.down",
            f"{last}.layer_norm": f"{ours}.feed_forward_norm",
        }
        if config.gated:
            modules[f"{last}.DenseReluDense.wi_0"] = f"{ours}.feed_forward.gate"
        modules[f"{last}.DenseReluDense.{'wi_1' if config.gated else 'wi'}"] = f"{ours}.feed_forward.up"
    return pairs | with_parts(modules, ("weight",))


def _copies(config: TransformerConfig, task: str) -> dict[str, str]:
    names = list(_EMBEDDINGS[1:2] if task in _OF_ENCODER else _EMBEDDINGS[1:])
    names += ["lm_head.weight"] if task == "seq2seq-lm" and config.tie_embeddings else []
    return dict.fromkeys(names, "shared.weight")


def _settle(config: TransformerConfig, task: str, source: TensorSource) -> TransformerConfig:
    """transformers 5 writes that every T5 is tied; where the head is a matrix of its own, it is not."""
    table = next((name for name in _EMBEDDINGS if name in source.entries), None)
    if task != "seq2seq-lm" or config.logit_scale != 1.0 or table is None or "lm_head.weight" not in source.entries:
        return config
    return replace(config, tie_embeddings=torch.equal(source.read("lm_head.weight"), source.read(table)))


FAMILY = Family(
    name="t5",
    prefix="",
    heads=("lm_head.", "classification_head.", "classifier.", "qa_outputs."),
    tasks={
        "seq2seq-lm": "T5ForConditionalGeneration",
        "seq2seq": "T5Model",
        "encoder": "T5EncoderModel",
        "sequence-classification": "T5ForSequenceClassification",
        "token-classification": "T5ForTokenClassification",
        "question-answering": "T5ForQuestionAnswering",
    },
    read_config=_read_config,
    write_config=_write_config,
    table=_table,
    copies=_copies,
    unused=("decoder.", ".EncDecAttention.relative_attention_bias."),
    other_prefixes={"sequence-classification": "transformer.", "token-classification": "transformer."},
    writes_copies=lambda config: False,
    settle=_settle,
    settled=("tie_embeddings",),
)
