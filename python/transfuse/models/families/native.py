"""transfuse's own form, for configurations that no other family describes: our fields, our names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transfuse.models.config import TransformerConfig
from transfuse.models.families import Family, Rows

if TYPE_CHECKING:
    from transfuse.models.base import TransformerModel

# What config.json holds beside the configuration's fields.
_BESIDE = (
    "model_type", "architectures", "torch_dtype", "dtype", "id2label", "label2id", "num_labels", "problem_type",
    "task_specific_params", "prefix",
)  # fmt: skip


def _read_config(values: Mapping[str, Any], task: str) -> TransformerConfig:
    return TransformerConfig.from_dict({name: value for name, value in values.items() if name not in _BESIDE})


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    return {"model_type": "transfuse", **config.to_dict()}


def table_of(model: TransformerModel, task: str) -> dict[str, Rows]:
    """Every parameter under its own name, a shared one once.

    The same part of a model has one name in every task: a bare encoder's as they are below a head, those of a decoder
    below a head as the bare one's, and so with the two of an encoder-decoder.
    """
    names = {name: Rows(name) for name, _ in model.named_parameters()}
    if task == "encoder":
        return {FAMILY.prefix + name: rows for name, rows in names.items()}
    body = "seq2seq." if model.config.is_encoder_decoder else "decoder."
    return {name.removeprefix(body): rows for name, rows in names.items()}


def _no_table(config: TransformerConfig, task: str) -> dict[str, Rows]:
    raise NotImplementedError("the native table follows from a model: table_of")


def _no_copies(config: TransformerConfig, task: str) -> dict[str, str]:
    return {}


FAMILY = Family(
    name="transfuse",
    prefix="encoder.",
    heads=("head.", "classifier.", "lm_head.", "decoder."),
    tasks={
        "encoder": "Encoder",
        "decoder": "DecoderBody",
        "causal-lm": "Decoder",
        "seq2seq-lm": "Seq2Seq",
        "seq2seq": "Seq2SeqBody",
        "masked-lm": "MaskedLM",
        "next-sentence-prediction": "NextSentencePredictor",
        "pretraining": "Pretraining",
        "sequence-classification": "SequenceClassifier",
        "token-classification": "TokenClassifier",
        "question-answering": "SpanClassifier",
    },
    read_config=_read_config,
    write_config=_write_config,
    table=_no_table,
    copies=_no_copies,
    unused=("pooler.", "decoder.lm_head."),
    other_prefixes={"seq2seq": "encoder."},  # a bare one begins with "encoder." and "decoder." all the same
)
