"""DistilBERT (Sanh et al. 2019): BERT's block without token types and pooler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    token_ids,
    with_parts,
)


def _read_config(values: Mapping[str, Any], task: str) -> TransformerConfig:
    classifies = task == "sequence-classification"
    return TransformerConfig(
        architecture="encoder",
        family="distilbert",
        vocab_size=given(values, "vocab_size", 30522),
        hidden_size=given(values, "dim", 768),
        num_layers=given(values, "n_layers", 6),
        num_heads=given(values, "n_heads", 12),
        intermediate_size=given(values, "hidden_dim", 3072),
        activation=activation_from(values, "gelu", "activation"),
        norm_placement="post",
        norm_eps=1e-12,  # transformers has no other
        final_norm=False,
        # sinusoidal_pos_embds only says what the table was filled with
        max_positions=given(values, "max_position_embeddings", 512),
        embedding_norm=True,
        tie_embeddings=given(values, "tie_word_embeddings", True),
        pooler=classifies,
        pooler_activation="relu" if classifies else "tanh",
        hidden_dropout=given(values, "dropout", 0.1),
        attention_dropout=given(values, "attention_dropout", 0.1),
        classifier_dropout=given(values, "seq_classif_dropout", 0.2) if classifies else None,
        pad_token_id=given(values, "pad_token_id", 0),
        bos_token_id=values.get("bos_token_id"),
        eos_token_id=values.get("eos_token_id"),
        initializer_range=given(values, "initializer_range", 0.02),
    )


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    dropout = config.hidden_dropout
    return {
        "model_type": "distilbert",
        "vocab_size": config.vocab_size,
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "hidden_dim": config.intermediate_size,
        "activation": activation_to(config.activation),
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "dropout": dropout,
        "attention_dropout": config.attention_dropout,
        "seq_classif_dropout": config.dropout_of_classifier,
        "initializer_range": config.initializer_range,
        **token_ids(config),
    }


def _table(config: TransformerConfig, task: str) -> dict[str, Rows]:
    inside = body_prefix(config, task)
    embeddings = "distilbert.embeddings"
    pairs = {
        f"{embeddings}.word_embeddings.weight": Rows(f"{inside}embeddings.token.weight"),
        f"{embeddings}.position_embeddings.weight": Rows(f"{inside}embeddings.position.weight"),
    }
    modules = {f"{embeddings}.LayerNorm": f"{inside}embeddings.norm"}
    for i in range(config.num_layers):
        theirs, ours = f"distilbert.transformer.layer.{i}", f"{inside}layers.{i}"
        for kind in ("weight", "bias"):
            q, k, v = (f"{theirs}.attention.{name}_lin.{kind}" for name in "qkv")
            pairs |= qkv_rows(config, (q, k, v), f"{ours}.attention.qkv.{kind}")
        modules |= {
            f"{theirs}.attention.out_lin": f"{ours}.attention.out",
            f"{theirs}.sa_layer_norm": f"{ours}.attention_norm",
            f"{theirs}.ffn.lin1": f"{ours}.feed_forward.up",
            f"{theirs}.ffn.lin2": f"{ours}.feed_forward.down",
            f"{theirs}.output_layer_norm": f"{ours}.feed_forward_norm",
        }
    if task == "masked-lm":
        modules |= {"vocab_transform": "head.dense", "vocab_layer_norm": "head.norm"}
        pairs["vocab_projector.bias"] = Rows("head.bias")
        if not config.tie_embeddings:
            pairs["vocab_projector.weight"] = Rows("head.decoder.weight")
    elif task == "sequence-classification":
        modules |= {"pre_classifier": f"{inside}pooler", "classifier": "classifier"}
    elif task == "token-classification":
        modules["classifier"] = "classifier"
    elif task == "question-answering":
        modules["qa_outputs"] = "classifier"
    return pairs | with_parts(modules)


def _copies(config: TransformerConfig, task: str) -> dict[str, str]:
    tied = task == "masked-lm" and config.tie_embeddings
    return {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"} if tied else {}


FAMILY = Family(
    name="distilbert",
    prefix="distilbert.",
    heads=(
        "vocab_transform.",
        "vocab_layer_norm.",
        "vocab_projector.",
        "pre_classifier.",
        "classifier.",
        "qa_outputs.",
    ),
    tasks={
        "encoder": "DistilBertModel",
        "masked-lm": "DistilBertForMaskedLM",
        "sequence-classification": "DistilBertForSequenceClassification",
        "token-classification": "DistilBertForTokenClassification",
        "question-answering": "DistilBertForQuestionAnswering",
    },
    read_config=_read_config,
    write_config=_write_config,
    table=_table,
    copies=_copies,
    unused=("embeddings.position_ids",),
    rename=OLD_NORMS,
)
