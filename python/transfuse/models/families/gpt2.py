"""GPT-2 (Radford et al. 2019): pre-norm decoder, learned positions; its matrices are stored as (in, out)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transfuse.errors import ConfigError
from transfuse.models.config import TransformerConfig
from transfuse.models.families import (
    Family,
    Rows,
    activation_from,
    activation_to,
    body_prefix,
    decoder_head,
    given,
    token_ids,
    with_parts,
)

END_OF_TEXT = 50256


def special_token(values: Mapping[str, Any], name: str, vocab_size: object) -> Any:
    """``values[name]``; transformers writes its default, the end of text, for smaller vocabularies too."""
    value = values.get(name, END_OF_TEXT)
    return None if value == END_OF_TEXT and isinstance(vocab_size, int) and vocab_size <= END_OF_TEXT else value


def _read_config(values: Mapping[str, Any], task: str) -> TransformerConfig:
    if values.get("add_cross_attention"):
        raise ConfigError("config.json: a GPT-2 that attends to an encoder (add_cross_attention) is not supported")
    vocab_size = given(values, "vocab_size", 50257)
    return TransformerConfig(
        architecture="decoder",
        family="gpt2",
        vocab_size=vocab_size,
        hidden_size=given(values, "n_embd", 768),
        num_layers=given(values, "n_layer", 12),
        num_heads=given(values, "n_head", 12),
        intermediate_size=given(values, "n_inner", 0),
        activation=activation_from(values, "gelu_new", "activation_function"),
        norm_eps=given(values, "layer_norm_epsilon", 1e-5),
        attention_scale=None if given(values, "scale_attn_weights", True) else 1.0,
        scale_by_layer=given(values, "scale_attn_by_inverse_layer_idx", False),
        max_positions=given(values, "n_positions", 1024),
        token_types_are_tokens=True,
        tie_embeddings=given(values, "tie_word_embeddings", True),
        hidden_dropout=given(values, "resid_pdrop", 0.1),
        embedding_dropout=given(values, "embd_pdrop", 0.1),
        attention_dropout=given(values, "attn_pdrop", 0.1),
        classifier_dropout=given(values, "classifier_dropout", 0.1),
        pad_token_id=values.get("pad_token_id"),
        bos_token_id=special_token(values, "bos_token_id", vocab_size),
        eos_token_id=special_token(values, "eos_token_id", vocab_size),
        initializer_range=given(values, "initializer_range", 0.02),
    )


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    dropout = config.hidden_dropout
    return {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.intermediate_size,
        "activation_function": activation_to(config.activation, "gelu_new"),
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": config.attention_scale is None,
        "scale_attn_by_inverse_layer_idx": config.scale_by_layer,
        "n_positions": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "resid_pdrop": dropout,
        "embd_pdrop": config.dropout_of_embeddings,
        "attn_pdrop": config.attention_dropout,
        "classifier_dropout": config.dropout_of_classifier,
        "initializer_range": config.initializer_range,
        **token_ids(config),
    }


def _table(config: TransformerConfig, task: str) -> dict[str, Rows]:
    inside = body_prefix(config, task)
    pairs = {
        "transformer.wte.weight": Rows(f"{inside}embeddings.token.weight"),
        "transformer.wpe.weight": Rows(f"{inside}embeddings.position.weight"),
    }
    norms = {"transformer.ln_f": f"{inside}final_norm"}
    for i in range(config.num_layers):
        theirs, ours = f"transformer.h.{i}", f"{inside}layers.{i}"
        norms |= {f"{theirs}.ln_1": f"{ours}.attention_norm", f"{theirs}.ln_2": f"{ours}.feed_forward_norm"}
        linears = {
            f"{theirs}.attn.c_attn": f"{ours}.attention.qkv",
            f"{theirs}.attn.c_proj": f"{ours}.attention.out",
            f"{theirs}.mlp.c_fc": f"{ours}.feed_forward.up",
            f"{theirs}.mlp.c_proj": f"{ours}.feed_forward.down",
        }
        pairs |= {f"{name}.weight": Rows(f"{target}.weight", transposed=True) for name, target in linears.items()}
        pairs |= with_parts(linears, ("bias",))
    return pairs | with_parts(norms) | decoder_head(config, task)


def copies(config: TransformerConfig, task: str) -> dict[str, str]:
    """The output head, where it is the token table."""
    tied = task == "causal-lm" and config.tie_embeddings
    return {"lm_head.weight": "transformer.wte.weight"} if tied else {}


FAMILY = Family(
    name="gpt2",
    prefix="transformer.",
    heads=("lm_head.", "score.", "classifier.", "qa_outputs.", "multiple_choice_head."),
    tasks={
        "causal-lm": "GPT2LMHeadModel",
        "decoder": "GPT2Model",
        "sequence-classification": "GPT2ForSequenceClassification",
        "token-classification": "GPT2ForTokenClassification",
        "question-answering": "GPT2ForQuestionAnswering",
    },
    read_config=_read_config,
    write_config=_write_config,
    table=_table,
    copies=copies,
    unused=(".attn.bias", ".attn.masked_bias"),  # old files hold the causal mask
)
