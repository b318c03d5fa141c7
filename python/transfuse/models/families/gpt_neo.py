"""GPT-Neo (Black et al. 2021): GPT-2 with unscaled attention, every other layer local, and q, k and v apart."""

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
    qkv_rows,
    token_ids,
    with_parts,
)
from transfuse.models.families.gpt2 import copies, special_token


def _read_config(values: Mapping[str, Any], task: str) -> TransformerConfig:
    vocab_size, layers = given(values, "vocab_size", 50257), given(values, "num_layers", 24)
    pattern = _pattern(given(values, "attention_types", [[["global", "local"], 12]]), layers)
    return TransformerConfig(
        architecture="decoder",
        family="gpt_neo",
        vocab_size=vocab_size,
        hidden_size=given(values, "hidden_size", 2048),
        num_layers=layers,
        num_heads=given(values, "num_heads", 16),
        intermediate_size=given(values, "intermediate_size", 0),
        activation=activation_from(values, "gelu_new", "activation_function"),
        norm_eps=given(values, "layer_norm_epsilon", 1e-5),
        qkv_bias=False,
        attention_scale=1.0,
        window=given(values, "window_size", 256) if "local" in pattern else None,
        layer_pattern=pattern if len(pattern) > 1 else (),
        max_positions=given(values, "max_position_embeddings", 2048),
        token_types_are_tokens=True,
        tie_embeddings=given(values, "tie_word_embeddings", True),
        hidden_dropout=given(values, "resid_dropout", 0.0),
        embedding_dropout=given(values, "embed_dropout", 0.0),
        attention_dropout=given(values, "attention_dropout", 0.0),
        classifier_dropout=given(values, "classifier_dropout", 0.1),
        pad_token_id=values.get("pad_token_id"),
        bos_token_id=special_token(values, "bos_token_id", vocab_size),
        eos_token_id=special_token(values, "eos_token_id", vocab_size),
        initializer_range=given(values, "initializer_range", 0.02),
    )


def _pattern(types: Any, layers: Any) -> tuple[str, ...]:
    """The shortest pattern that repeats over the layers as [[["global", "local"], 12], ...] says."""
    try:
        fits = 0 < layers <= 4096 and sum(len(group) * times for group, times in types) == layers
        kinds = tuple(kind for group, times in types for kind in list(group) * times) if fits else ()
    except (TypeError, ValueError):
        kinds = ()
    if not kinds or any(kind not in ("global", "local") for kind in kinds):
        raise ConfigError(
            f'config.json: attention_types must hold pairs like [["global", "local"], 12] that make num_layers '
            f"({layers!r}) layers, got {types!r}"
        )
    lengths = (n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds)))
    return kinds[: next(lengths)]


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    dropout, layers = config.hidden_dropout, config.num_layers
    pattern = config.layer_pattern or ("global" if config.window is None else "local",)
    whole = layers % len(pattern) == 0
    types = (
        [[list(pattern), layers // len(pattern)]] if whole else [[[(pattern * layers)[i]], 1] for i in range(layers)]
    )
    return {
        "model_type": "gpt_neo",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": layers,
        "num_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "activation_function": activation_to(config.activation, "gelu_new"),
        "layer_norm_epsilon": config.norm_eps,
        "attention_types": types,
        "window_size": 256 if config.window is None else config.window,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "resid_dropout": dropout,
        "embed_dropout": config.dropout_of_embeddings,
        "attention_dropout": config.attention_dropout,
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
    modules = {"transformer.ln_f": f"{inside}final_norm"}
    for i in range(config.num_layers):
        theirs, ours = f"transformer.h.{i}", f"{inside}layers.{i}"
        q, k, v = (f"{theirs}.attn.attention.{name}_proj.weight" for name in "qkv")
        pairs |= qkv_rows(config, (q, k, v), f"{ours}.attention.qkv.weight")
        modules |= {
            f"{theirs}.ln_1": f"{ours}.attention_norm",
            f"{theirs}.attn.attention.out_proj": f"{ours}.attention.out",
            f"{theirs}.ln_2": f"{ours}.feed_forward_norm",
            f"{theirs}.mlp.c_fc": f"{ours}.feed_forward.up",
            f"{theirs}.mlp.c_proj": f"{ours}.feed_forward.down",
        }
    return pairs | with_parts(modules) | decoder_head(config, task)


FAMILY = Family(
    name="gpt_neo",
    prefix="transformer.",
    heads=("lm_head.", "score.", "classifier.", "qa_outputs."),
    tasks={
        "causal-lm": "GPTNeoForCausalLM",
        "decoder": "GPTNeoModel",
        "sequence-classification": "GPTNeoForSequenceClassification",
        "token-classification": "GPTNeoForTokenClassification",
        "question-answering": "GPTNeoForQuestionAnswering",
    },
    read_config=_read_config,
    write_config=_write_config,
    table=_table,
    copies=copies,
    unused=(".attn.attention.bias", ".attn.attention.masked_bias"),  # old files hold the causal mask
)
