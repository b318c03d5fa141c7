"""BART (Lewis et al. 2020): post-norm encoder-decoder, learned positions from row 2 on, a norm on the embeddings.

Marian (``marian.py``) has the same layers under the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from transfuse.errors import ConfigError
from transfuse.models.checkpoint import TensorSource
from transfuse.models.config import TransformerConfig
from transfuse.models.families import (
    Family,
    Rows,
    activation_from,
    activation_to,
    cross_rows,
    given,
    qkv_rows,
    with_parts,
)

_HEADS = ("sequence-classification", "question-answering")
_ENCODER, _DECODER, _SHARED = (f"model.{n}.weight" for n in ("encoder.embed_tokens", "decoder.embed_tokens", "shared"))


def read_common(values: Mapping[str, Any], task: str) -> dict[str, Any]:
    """The fields that BART and Marian read alike."""
    hidden, heads = given(values, "d_model", 1024), given(values, "decoder_attention_heads", 16)
    whole = isinstance(hidden, int) and isinstance(heads, int)
    if not whole or heads < 1 or hidden % heads:
        raise ConfigError(
            f"config.json: d_model must be a multiple of decoder_attention_heads, got {hidden!r} and {heads!r}"
        )
    return {
        "architecture": "encoder_decoder",
        "hidden_size": hidden,
        "num_layers": given(values, "encoder_layers", 12),
        "num_heads": given(values, "encoder_attention_heads", 16),
        "intermediate_size": given(values, "encoder_ffn_dim", 4096),
        "num_decoder_layers": given(values, "decoder_layers", 12),
        "num_decoder_heads": heads,
        "decoder_head_dim": hidden // heads,
        "decoder_intermediate_size": given(values, "decoder_ffn_dim", 4096),
        "activation": activation_from(values, "gelu", "activation_function"),
        "norm_placement": "post",
        "final_norm": False,
        "max_positions": given(values, "max_position_embeddings", 1024),
        "embedding_scale": hidden**0.5 if given(values, "scale_embedding", False) else 1.0,
        "tie_embeddings": given(values, "tie_word_embeddings", True),
        "lm_head_bias": task == "seq2seq-lm",
        "hidden_dropout": given(values, "dropout", 0.1),
        "attention_dropout": given(values, "attention_dropout", 0.0),
        "ffn_dropout": given(values, "activation_dropout", 0.0),
        "initializer_range": given(values, "init_std", 0.02),
    }


def write_common(config: TransformerConfig) -> dict[str, Any]:
    """What ``read_common`` reads, and the special tokens."""
    eos = config.eos_token_id
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "encoder_layers": config.num_layers,
        "encoder_attention_heads": config.num_heads,
        "encoder_ffn_dim": config.intermediate_size,
        "decoder_layers": config.num_decoder_layers,
        "decoder_attention_heads": config.num_decoder_heads,
        "decoder_ffn_dim": config.decoder_intermediate_size,
        "activation_function": activation_to(config.activation),
        "max_position_embeddings": config.max_positions,
        "scale_embedding": config.embedding_scale != 1.0,
        "tie_word_embeddings": config.tie_embeddings,
        "dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.ffn_dropout,
        "init_std": config.initializer_range,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "decoder_start_token_id": config.decoder_start_token_id,
    }


def _read_config(values: Mapping[str, Any], task: str) -> TransformerConfig:
    return TransformerConfig(
        **read_common(values, task),
        family="bart",
        vocab_size=given(values, "vocab_size", 50265),
        embedding_norm=True,
        position_offset=2,
        classifier_dropout=given(values, "classifier_dropout", 0.0),
        pad_token_id=values.get("pad_token_id", 1),
        bos_token_id=values.get("bos_token_id", 0),
        eos_token_id=values.get("eos_token_id", 2),
        decoder_start_token_id=values.get("decoder_start_token_id", 2),
    )


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    return {
        "model_type": "bart",
        **write_common(config),
        "classifier_dropout": config.dropout_of_classifier,
    }


def table(config: TransformerConfig, task: str) -> dict[str, Rows]:
    """Stored name -> where it goes, of BART and of Marian."""
    inside = "seq2seq." if task in _HEADS else ""
    tokens = {_SHARED if config.tie_embeddings and config.share_embeddings else _ENCODER: "encoder"}
    if not config.share_embeddings:
        tokens[_DECODER] = "decoder"
    pairs = {name: Rows(f"{inside}{stack}.embeddings.token.weight") for name, stack in tokens.items()}
    for stack in ("encoder", "decoder"):
        pairs |= _stack(config, f"model.{stack}", f"{inside}{stack}", decoder=stack == "decoder")
    if task == "seq2seq-lm" and config.lm_head_bias:
        pairs["final_logits_bias"] = Rows("decoder.lm_head.bias", leading=True)
    if task == "seq2seq-lm" and not config.tie_embeddings:
        pairs["lm_head.weight"] = Rows("decoder.lm_head.weight")
    if task == "sequence-classification":
        heads = {"classification_head.dense": "pooler", "classification_head.out_proj": "classifier"}
        pairs |= with_parts(heads)
    if task == "question-answering":
        pairs |= with_parts({"qa_outputs": "classifier"})
    return pairs


def _stack(config: TransformerConfig, theirs: str, ours: str, *, decoder: bool) -> dict[str, Rows]:
    pairs, modules = {}, {}
    if config.position == "learned":
        pairs[f"{theirs}.embed_positions.weight"] = Rows(f"{ours}.embeddings.position.weight")
    if config.embedding_norm:
        modules[f"{theirs}.layernorm_embedding"] = f"{ours}.embeddings.norm"
    for i in range(config.num_decoder_layers if decoder else config.num_layers):
        stored, layer = f"{theirs}.layers.{i}", f"{ours}.layers.{i}"
        for kind in ("weight", "bias"):
            q, k, v = (f"{stored}.self_attn.{name}_proj.{kind}" for name in "qkv")
            pairs |= qkv_rows(config, (q, k, v), f"{layer}.attention.qkv.{kind}", decoder=decoder)
            if decoder:
                q, k, v = (f"{stored}.encoder_attn.{name}_proj.{kind}" for name in "qkv")
                pairs |= cross_rows(config, (q, k, v), f"{layer}.cross_attention", kind)
        modules |= {
            f"{stored}.self_attn.out_proj": f"{layer}.attention.out",
            f"{stored}.self_attn_layer_norm": f"{layer}.attention_norm",
            f"{stored}.fc1": f"{layer}.feed_forward.up",
            f"{stored}.fc2": f"{layer}.feed_forward.down",
            f"{stored}.final_layer_norm": f"{layer}.feed_forward_norm",
        }
        if decoder:
            modules[f"{stored}.encoder_attn.out_proj"] = f"{layer}.cross_attention.out"
            modules[f"{stored}.encoder_attn_layer_norm"] = f"{layer}.cross_attention_norm"
    return pairs | with_parts(modules)


def copies(config: TransformerConfig, task: str) -> dict[str, str]:
    """One table under several names. Untied, transformers has a ``shared`` that it does not read."""
    if not config.tie_embeddings:
        return {_SHARED: _ENCODER} | ({_DECODER: _ENCODER} if config.share_embeddings else {})
    own = {_ENCODER: _SHARED, _DECODER: _SHARED} if config.share_embeddings else {}
    head = _SHARED if config.share_embeddings else _DECODER
    return own | ({"lm_head.weight": head} if task == "seq2seq-lm" else {})


def settle(config: TransformerConfig, task: str, source: TensorSource) -> TransformerConfig:
    """No bias of the head stands for zeros; in an untied model the tables of both stacks may differ."""
    names = [name for name in source.entries if name.endswith((_ENCODER[6:], _DECODER[6:]))]
    apart = len(names) == 2 and not torch.equal(source.read(names[0]), source.read(names[1]))
    return replace(
        config,
        lm_head_bias=config.lm_head_bias and "final_logits_bias" in source.entries,
        share_embeddings=config.share_embeddings and (config.tie_embeddings or not apart),
    )


FAMILY = Family(
    name="bart",
    prefix="model.",
    heads=("lm_head.", "final_logits_bias", "classification_head.", "qa_outputs."),
    tasks={
        "seq2seq-lm": "BartForConditionalGeneration",
        "seq2seq": "BartModel",
        "sequence-classification": "BartForSequenceClassification",
        "question-answering": "BartForQuestionAnswering",
    },
    read_config=_read_config,
    write_config=_write_config,
    table=table,
    copies=copies,
    unused=("encoder.version", "decoder.version"),
    settle=settle,
    settled=("lm_head_bias", "share_embeddings"),
)
