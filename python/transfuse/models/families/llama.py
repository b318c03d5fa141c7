"""Llama (Touvron et al. 2023): pre-norm decoder, RMS norm, rotary positions, grouped queries, SwiGLU. SmolLM2 too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transfuse.errors import ConfigError
from transfuse.models.config import RopeScaling, TransformerConfig
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
from transfuse.nn.rotary import KINDS

# What a scaling of each kind has besides its factor, by transformers' names, which are ours too.
_SCALING = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "truncate"),
    "longrope": ("attention_factor", "short_factor", "long_factor"),
}


def _read_config(values: Mapping[str, Any], task: str) -> TransformerConfig:
    max_positions = given(values, "max_position_embeddings", 2048)
    theta, scaling = _read_rope(values, max_positions)
    heads = given(values, "num_attention_heads", 32)
    bias = given(values, "attention_bias", False)
    pad = values.get("pad_token_id")
    return TransformerConfig(
        architecture="decoder",
        family="llama",
        vocab_size=given(values, "vocab_size", 32000),
        hidden_size=given(values, "hidden_size", 4096),
        num_layers=given(values, "num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=given(values, "num_key_value_heads", heads),
        head_dim=given(values, "head_dim", 0),
        intermediate_size=given(values, "intermediate_size", 11008),
        activation=activation_from(values, "silu"),
        gated=True,
        norm="rms",
        norm_eps=given(values, "rms_norm_eps", 1e-6),
        qkv_bias=bias,
        out_bias=bias,
        ffn_bias=given(values, "mlp_bias", False),
        position="rotary",
        max_positions=max_positions,
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=given(values, "tie_word_embeddings", False),
        attention_dropout=given(values, "attention_dropout", 0.0),
        classifier_dropout=given(values, "classifier_dropout", 0.1),
        pad_token_id=None if pad == -1 else pad,  # -1 was Llama 1's way of having none
        bos_token_id=values.get("bos_token_id", 1),
        eos_token_id=values.get("eos_token_id", 2),
        initializer_range=given(values, "initializer_range", 0.02),
    )


def _read_rope(values: Mapping[str, Any], max_positions: Any) -> tuple[Any, RopeScaling | None]:
    """Base and scaling, from ``rope_parameters`` (transformers 5) or ``rope_theta`` with ``rope_scaling`` (4)."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"config.json: rope_scaling must be an object, got {rope!r}")
    theta = given(rope, "rope_theta", given(values, "rope_theta", 10000.0))
    kind = given(rope, "rope_type", given(rope, "type", "default"))
    if given(rope, "partial_rotary_factor", given(values, "partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError("config.json: a Llama whose heads rotate partly (partial_rotary_factor) is not supported")
    if kind == "default":
        return theta, None
    if kind not in KINDS:
        raise ConfigError(f"config.json: rope_type {kind!r} is not supported; known: default, {', '.join(KINDS)}")
    numbers = {name: rope[name] for name in _SCALING.get(kind, ()) if rope.get(name) is not None}
    trained = max_positions  # "dynamic" starts from it
    factor: Any = rope.get("factor")
    if kind in _SCALING:
        inside = given(rope, "original_max_position_embeddings", max_positions)
        trained = given(values, "original_max_position_embeddings", inside)
    try:
        if factor is None and kind in ("yarn", "longrope"):
            factor = max_positions / trained
        if kind == "yarn" and "attention_factor" not in numbers and rope.get("mscale") and rope.get("mscale_all_dim"):
            one, all_dim = (0.1 * rope[m] * math.log(max(1.0, factor)) + 1 for m in ("mscale", "mscale_all_dim"))
            numbers["attention_factor"] = one / all_dim
    except (TypeError, ZeroDivisionError):
        raise ConfigError(f"config.json: rope_scaling must hold positive numbers, got {dict(rope)!r}") from None
    if kind != "linear":
        numbers["original_max_positions"] = trained
    return theta, RopeScaling(kind, 1.0 if factor is None else factor, **numbers)


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    scaling: dict[str, Any] | None = None
    if (rope := config.rope_scaling) is not None:
        scaling = {"rope_type": rope.kind, "factor": rope.factor}
        if rope.kind in _SCALING:
            scaling["original_max_position_embeddings"] = rope.original_max_positions
        for name in _SCALING.get(rope.kind, ()):
            value = getattr(rope, name)
            scaling[name] = list(value) if isinstance(value, tuple) else value
    values: dict[str, Any] = {}
    if rope is not None and rope.kind == "longrope":  # where transformers 4 looks for it
        values["original_max_position_embeddings"] = rope.original_max_positions
    return values | {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": activation_to(config.activation),
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.ffn_bias,
        "max_position_embeddings": config.max_positions,
        # transformers 4 reads these two, transformers 5 converts them
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": config.attention_dropout,
        "classifier_dropout": 0.0 if config.classifier_dropout is None else config.classifier_dropout,
        "initializer_range": config.initializer_range,
        **token_ids(config),
    }


def _table(config: TransformerConfig, task: str) -> dict[str, Rows]:
    inside = body_prefix(config, task)
    pairs = {"model.embed_tokens.weight": Rows(f"{inside}embeddings.token.weight")}
    norms = {"model.norm": f"{inside}final_norm"}
    for i in range(config.num_layers):
        theirs, ours = f"model.layers.{i}", f"{inside}layers.{i}"
        norms[f"{theirs}.input_layernorm"] = f"{ours}.attention_norm"
        norms[f"{theirs}.post_attention_layernorm"] = f"{ours}.feed_forward_norm"
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            q, k, v = (f"{theirs}.self_attn.{name}_proj.{kind}" for name in "qkv")
            pairs |= qkv_rows(config, (q, k, v), f"{ours}.attention.qkv.{kind}")
            pairs[f"{theirs}.self_attn.o_proj.{kind}"] = Rows(f"{ours}.attention.out.{kind}")
        for kind in ("weight", "bias") if config.ffn_bias else ("weight",):
            for name in ("gate", "up", "down"):
                pairs[f"{theirs}.mlp.{name}_proj.{kind}"] = Rows(f"{ours}.feed_forward.{name}.{kind}")
    return pairs | with_parts(norms, ("weight",)) | decoder_head(config, task, token_classifier="score")


def _copies(config: TransformerConfig, task: str) -> dict[str, str]:
    tied = task == "causal-lm" and config.tie_embeddings
    return {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}


FAMILY = Family(
    name="llama",
    prefix="model.",
    heads=("lm_head.", "score.", "qa_outputs."),
    tasks={
        "causal-lm": "LlamaForCausalLM",
        "decoder": "LlamaModel",
        "sequence-classification": "LlamaForSequenceClassification",
        "token-classification": "LlamaForTokenClassification",
        "question-answering": "LlamaForQuestionAnswering",
    },
    read_config=_read_config,
    write_config=_write_config,
    table=_table,
    copies=_copies,
    unused=("rotary_emb.inv_freq",),
    other_prefixes={"question-answering": "transformer."},
)
