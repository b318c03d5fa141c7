"""RoBERTa (Liu et al. 2019), XLM-RoBERTa and CamemBERT: BERT's stack, with positions counted from pad_token_id + 1."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from transfuse.errors import ConfigError
from transfuse.models.config import TransformerConfig
from transfuse.models.families import OLD_NORMS, Family, Rows, body_prefix, given, token_ids, with_parts
from transfuse.models.families.bert import read_fields, stack_table, write_fields


def _read_config(family: str, values: Mapping[str, Any], task: str) -> TransformerConfig:
    fields = read_fields(values)
    pad, rows = given(values, "pad_token_id", 1), fields["max_positions"]
    if not all(isinstance(n, int) and n >= 0 for n in (pad, rows)) or rows <= pad + 1:
        raise ConfigError(
            "config.json: max_position_embeddings must exceed pad_token_id + 1, the rows before the first position, "
            f"got {rows!r} and pad_token_id {pad!r}"
        )
    if task == "masked-lm" and fields["activation"] != "gelu":
        raise ConfigError(
            f"config.json: the masked-lm head of {family} has a gelu whatever the layers have, and here one activation "
            f"serves both; got hidden_act {values['hidden_act']!r}"
        )
    fields |= {
        "vocab_size": given(values, "vocab_size", 30522 if family == "xlm-roberta" else 50265),
        "max_positions": rows - pad - 1,
        "position_offset": pad + 1,
        "pad_token_id": pad,
        "bos_token_id": values.get("bos_token_id", 0),
        "eos_token_id": values.get("eos_token_id", 2),
        "pooler": task in ("encoder", "sequence-classification"),
    }
    return TransformerConfig(family=family, **fields)


def _write_config(family: str, config: TransformerConfig) -> dict[str, Any]:
    return {"model_type": family, **write_fields(config), **token_ids(config)}


def _table(config: TransformerConfig, task: str) -> dict[str, Rows]:
    inside = body_prefix(config, task)
    pairs = stack_table(config, "roberta.", inside)
    modules = {}
    if task == "encoder" and config.pooler:
        modules["roberta.pooler.dense"] = "pooler"
    elif task == "masked-lm":
        modules |= {"lm_head.dense": "head.dense", "lm_head.layer_norm": "head.norm"}
        if config.tie_embeddings:
            pairs["lm_head.bias"] = Rows("head.bias")
        else:
            pairs["lm_head.decoder.weight"] = Rows("head.decoder.weight")
            pairs["lm_head.decoder.bias"] = Rows("head.bias")
    elif task == "sequence-classification":  # its first layer is a pooler by another name
        modules |= {"classifier.dense": f"{inside}pooler", "classifier.out_proj": "classifier"}
    elif task == "token-classification":
        modules["classifier"] = "classifier"
    elif task == "question-answering":
        modules["qa_outputs"] = "classifier"
    return pairs | with_parts(modules)


def _copies(config: TransformerConfig, task: str) -> dict[str, str]:
    if task != "masked-lm":
        return {}
    if not config.tie_embeddings:
        return {"lm_head.bias": "lm_head.decoder.bias"}
    return {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }


def _family(model_type: str, stem: str) -> Family:
    return Family(
        name=model_type,
        prefix="roberta.",
        heads=("lm_head.", "classifier.", "qa_outputs."),
        tasks={
            "encoder": f"{stem}Model",
            "masked-lm": f"{stem}ForMaskedLM",
            "sequence-classification": f"{stem}ForSequenceClassification",
            "token-classification": f"{stem}ForTokenClassification",
            "question-answering": f"{stem}ForQuestionAnswering",
        },
        read_config=partial(_read_config, model_type),
        write_config=partial(_write_config, model_type),
        table=_table,
        copies=_copies,
        unused=("embeddings.position_ids", "embeddings.token_type_ids", "pooler.dense."),
        rename=OLD_NORMS,
    )


FAMILIES = (_family("roberta", "Roberta"), _family("xlm-roberta", "XLMRoberta"), _family("camembert", "Camembert"))
