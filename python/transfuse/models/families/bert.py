"""BERT (Devlin et al. 2019): post-norm encoder, learned positions, token types, pooler; MiniLM has this shape too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transfuse.errors import ConfigError
from transfuse.models.config import TransformerConfig
from transfuse.models.families import (
    OLD_NORMS,
    Family,
    Rows,
    activation_from,
    activation_to,
    body_prefix,
    given,
    qkv_rows,
    with_parts,
)

# Tasks whose transformers class reads the pooled first token.
_POOLED = ("encoder", "sequence-classification", "next-sentence-prediction", "pretraining")


def read_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that BERT and RoBERTa read alike.

    Raises:
        ConfigError: the checkpoint is of a decoder, or its positions are not absolute.
    """
    if values.get("is_decoder") or values.get("add_cross_attention"):
        raise ConfigError("config.json: an encoder as a decoder (is_decoder, add_cross_attention) is not supported")
    if (kind := given(values, "position_embedding_type", "absolute")) != "absolute":
        raise ConfigError(f"config.json: position_embedding_type must be 'absolute', got {kind!r}")
    return {
        "architecture": "encoder",
        "vocab_size": given(values, "vocab_size", 30522),
        "hidden_size": given(values, "hidden_size", 768),
        "num_layers": given(values, "num_hidden_layers", 12),
        "num_heads": given(values, "num_attention_heads", 12),
        "intermediate_size": given(values, "intermediate_size", 3072),
        "activation": activation_from(values, "gelu"),
        "norm_placement": "post",
        "norm_eps": given(values, "layer_norm_eps", 1e-12),
        "final_norm": False,
        "max_positions": given(values, "max_position_embeddings", 512),
        "embedding_norm": True,
        "type_vocab_size": given(values, "type_vocab_size", 2),
        "tie_embeddings": given(values, "tie_word_embeddings", True),
        "hidden_dropout": given(values, "hidden_dropout_prob", 0.1),
        "attention_dropout": given(values, "attention_probs_dropout_prob", 0.1),
        "classifier_dropout": values.get("classifier_dropout"),
        "pad_token_id": given(values, "pad_token_id", 0),
        "initializer_range": given(values, "initializer_range", 0.02),
    }


def write_fields(config: TransformerConfig) -> dict[str, Any]:
    """What ``read_fields`` reads."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": activation_to(config.activation),
        "layer_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions + config.position_offset,
        "type_vocab_size": config.type_vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "classifier_dropout": config.classifier_dropout,
        "pad_token_id": config.pad_token_id,
        "initializer_range": config.initializer_range,
        "position_embedding_type": "absolute",
    }


def stack_table(config: TransformerConfig, prefix: str, inside: str) -> dict[str, Rows]:
    """Embeddings and layers, which BERT and RoBERTa name alike; ``inside`` precedes our names of them."""
    pairs = {
        f"{prefix}embeddings.word_embeddings.weight": Rows(f"{inside}embeddings.token.weight"),
        f"{prefix}embeddings.position_embeddings.weight": Rows(f"{inside}embeddings.position.weight"),
    }
    if config.type_vocab_size:
        pairs[f"{prefix}embeddings.token_type_embeddings.weight"] = Rows(f"{inside}embeddings.token_type.weight")
    modules = {f"{prefix}embeddings.LayerNorm": f"{inside}embeddings.norm"}
    for i in range(config.num_layers):
        theirs, ours = f"{prefix}encoder.layer.{i}", f"{inside}layers.{i}"
        for kind in ("weight", "bias"):
            q, k, v = (f"{theirs}.attention.self.{name}.{kind}" for name in ("query", "key", "value"))
            pairs |= qkv_rows(config, (q, k, v), f"{ours}.attention.qkv.{kind}")
        modules |= {
            f"{theirs}.attention.output.dense": f"{ours}.attention.out",
            f"{theirs}.attention.output.LayerNorm": f"{ours}.attention_norm",
            f"{theirs}.intermediate.dense": f"{ours}.feed_forward.up",
            f"{theirs}.output.dense": f"{ours}.feed_forward.down",
            f"{theirs}.output.LayerNorm": f"{ours}.feed_forward_norm",
        }
    return pairs | with_parts(modules)


def _read_config(values: Mapping[str, Any], task: str) -> TransformerConfig:
    return TransformerConfig(family="bert", pooler=task in _POOLED, **read_fields(values))


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    return {"model_type": "bert", **write_fields(config)}


def _table(config: TransformerConfig, task: str) -> dict[str, Rows]:
    inside = body_prefix(config, task)
    pairs = stack_table(config, "bert.", inside)
    modules = {"bert.pooler.dense": f"{inside}pooler"} if config.pooler else {}
    if task in ("masked-lm", "pretraining"):
        modules["cls.predictions.transform.dense"] = "head.dense"
        modules["cls.predictions.transform.LayerNorm"] = "head.norm"
        if config.tie_embeddings:
            pairs["cls.predictions.bias"] = Rows("head.bias")
        else:
            pairs["cls.predictions.decoder.weight"] = Rows("head.decoder.weight")
            pairs["cls.predictions.decoder.bias"] = Rows("head.bias")
    if task in ("next-sentence-prediction", "pretraining"):
        modules["cls.seq_relationship"] = "classifier"
    elif task == "question-answering":
        modules["qa_outputs"] = "classifier"
    elif task in ("sequence-classification", "token-classification"):
        modules["classifier"] = "classifier"
    return pairs | with_parts(modules)


def _copies(config: TransformerConfig, task: str) -> dict[str, str]:
    if task not in ("masked-lm", "pretraining"):
        return {}
    if not config.tie_embeddings:
        return {"cls.predictions.bias": "cls.predictions.decoder.bias"}
    return {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }


FAMILY = Family(
    name="bert",
    prefix="bert.",
    heads=("cls.predictions.", "cls.seq_relationship.", "classifier.", "qa_outputs."),
    tasks={
        "encoder": "BertModel",
        "masked-lm": "BertForMaskedLM",
        "next-sentence-prediction": "BertForNextSentencePrediction",
        "pretraining": "BertForPreTraining",
        "sequence-classification": "BertForSequenceClassification",
        "token-classification": "BertForTokenClassification",
        "question-answering": "BertForQuestionAnswering",
    },
    read_config=_read_config,
    write_config=_write_config,
    table=_table,
    copies=_copies,
    unused=("embeddings.position_ids", "pooler.dense."),
    rename=OLD_NORMS,
)
