"""Marian (Junczys-Dowmunt et al. 2018; OPUS-MT): BART's layers, sinusoids, one vocabulary or one for each language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transfuse.models.config import TransformerConfig
from transfuse.models.families import Family, bart, given


def _read_config(values: Mapping[str, Any], task: str) -> TransformerConfig:
    vocab = given(values, "vocab_size", 58101)
    return TransformerConfig(
        **bart.read_common(values, task),
        family="marian",
        vocab_size=vocab,
        decoder_vocab_size=given(values, "decoder_vocab_size", vocab),
        position="sinusoidal",
        sinusoidal_layout="halves",
        share_embeddings=given(values, "share_encoder_decoder_embeddings", True),
        pad_token_id=values.get("pad_token_id", 58100),
        bos_token_id=values.get("bos_token_id"),
        eos_token_id=values.get("eos_token_id", 0),
        decoder_start_token_id=values.get("decoder_start_token_id", 58100),
    )


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    return {
        "model_type": "marian",
        **bart.write_common(config),
        "decoder_vocab_size": config.decoder_vocab_size,
        "share_encoder_decoder_embeddings": config.share_embeddings,
    }


def _copies(config: TransformerConfig, task: str) -> dict[str, str]:
    # unlike BART's, a model of transformers whose languages have a table each has no shared one beside them
    apart = not config.tie_embeddings and not config.share_embeddings
    return {} if apart else bart.copies(config, task)


FAMILY = Family(
    name="marian",
    prefix="model.",
    heads=("lm_head.", "final_logits_bias"),
    tasks={"seq2seq-lm": "MarianMTModel"},
    read_config=_read_config,
    write_config=_write_config,
    table=bart.table,
    copies=_copies,
    unused=("embed_positions.weight", "model.shared.weight"),  # sinusoids are computed
    settle=bart.settle,
    settled=("lm_head_bias", "share_embeddings"),
)
