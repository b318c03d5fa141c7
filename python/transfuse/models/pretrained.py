"""from_pretrained, save_pretrained, load_tokenizer: between files and models.

Loading decides everything before it allocates anything: the configuration is checked, the model is made on the meta
device, and the names, shapes and dtypes of all tensors are compared with it. Only then does the model get memory, and
each tensor is copied into its place. A failure leaves no half-loaded model behind.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transfuse.errors import ArgumentError, CheckpointError, ConfigError
from transfuse.generation import GenerationConfig
from transfuse.generation.settings import not_heeded
from transfuse.models.base import TransformerModel
from transfuse.models.checkpoint import (
    FLOAT_DTYPES,
    SafetensorsSource,
    TensorSource,
    half_downloaded,
    open_safetensors,
    read_json,
    some,
)
from transfuse.models.checkpoint_writer import write_checkpoint
from transfuse.models.config import TransformerConfig
from transfuse.models.decoder import Decoder, DecoderBody
from transfuse.models.encoder import Encoder
from transfuse.models.families import Family, Rows, find_family, native
from transfuse.models.gguf import LlamaGgufSource
from transfuse.models.locate import locate_model
from transfuse.models.placement import DTYPES, check_dtype, usable_device
from transfuse.models.seq2seq import Seq2Seq, Seq2SeqBody
from transfuse.models.task_heads import (
    MaskedLM,
    NextSentencePredictor,
    Pretraining,
    SequenceClassifier,
    SpanClassifier,
    TokenClassifier,
)
from transfuse.models.tokenizer_files import load_tokenizer

__all__ = ["from_pretrained", "load_tokenizer", "save_pretrained"]

GENERATION = "generation_config.json"

_CLASSES: dict[str, Any] = {
    "encoder": Encoder,
    "decoder": DecoderBody,
    "causal-lm": Decoder,
    "seq2seq": Seq2SeqBody,
    "seq2seq-lm": Seq2Seq,
    "masked-lm": MaskedLM,
    "next-sentence-prediction": NextSentencePredictor,
    "pretraining": Pretraining,
    "sequence-classification": SequenceClassifier,
    "token-classification": TokenClassifier,
    "question-answering": SpanClassifier,
}
_TASK_SETTINGS = ("problem_type", "task_specific_params", "prefix")
_GENERATING = ("causal-lm", "seq2seq-lm")
_CLASSIFIERS = ("sequence-classification", "token-classification")


def from_pretrained(
    path_or_id: str | os.PathLike[str],
    task: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> TransformerModel:
    """A model with the weights of a checkpoint, in evaluation mode.

    Args:
        path_or_id: a folder with ``config.json`` and safetensors weights, a ``.gguf`` file (Llama), a short name
            ("minilm", "smollm2": fetched once, see ``transfuse.weights``), or a model id of the Hugging Face hub, whose
            cache is used first.
        task: which head; by default the one that ``architectures`` in config.json names. Encoders have "encoder",
            "masked-lm", "sequence-classification", "token-classification", "question-answering" (BERT also
            "next-sentence-prediction" and "pretraining"), decoders "causal-lm", "decoder" and the three classifiers,
            encoder-decoders "seq2seq-lm", "seq2seq" and classifiers.
        dtype: of the parameters; by default the checkpoint's own, fp32 for a GGUF file.
        device: where the parameters go; by default torch's default device.
        revision: branch, tag or commit, for hub ids.

    Returns:
        An Encoder, a Decoder, a Seq2Seq, or one of them with the head of the task.

    Raises:
        CheckpointError: files are missing, damaged or unsafe, or their tensors do not fit the model: one message
            counts and names those that are missing, unexpected or of another shape.
        ConfigError: config.json is damaged, impossible, or of an unknown family.
        ArgumentError: the family has no such task. DeviceError, DtypeError: there is no such device or dtype.

    Example:
        >>> import tempfile, transfuse
        >>> config = transfuse.TransformerConfig("decoder", vocab_size=11, hidden_size=8, num_layers=1, num_heads=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     transfuse.Decoder(config).save_pretrained(folder)
        ...     transfuse.from_pretrained(folder).config == config
        True
    """
    check_dtype(dtype)
    where = usable_device(device)
    path = locate_model(path_or_id, revision)
    values, source = _open(path)
    family = find_family(values.get("model_type"))
    if task is None:
        task = family.task_of(values.get("architectures"))
    elif not isinstance(task, str) or task not in family.tasks:
        raise ArgumentError(f"from_pretrained: {family.name} has no task {task!r}; it has {', '.join(family.tasks)}")
    config = family.settle(family.read_config(values, task), task, source)
    labels = _labels(values) if task in _CLASSIFIERS else ()
    match = None if family is native.FAMILY else _match(family, config, task, family.table(config, task), source)
    if match is not None and 2 * len(match.missing) > len(match.table):
        raise match.error([])  # another model altogether: not worth building to compare shapes
    model = _build(task, config, len(labels), dtype or _stored_dtype(values, source))
    model.labels = labels
    if task in _GENERATING:
        model.generation_config = _generation_config(path, values)
    model.task_settings = {name: values[name] for name in _TASK_SETTINGS if values.get(name) is not None}
    plan = _plan(match or _match(family, config, task, native.table_of(model, task), source), model)
    model.to_empty(device=where)
    _fill(model, plan, source)
    return model.eval()


def save_pretrained(
    model: TransformerModel, folder: str | os.PathLike[str], *, max_shard_size: int | str = "50GB"
) -> None:
    """Write ``config.json`` and ``model.safetensors``; transformers reads both for the families it shares.

    A model of no such family is written in transfuse's own form, which ``from_pretrained`` reads. Each file is written
    beside its final name and then renamed, so a crash leaves the old file or the new one, never half of one. Weights
    of an earlier checkpoint in the folder are removed.

    Args:
        model: what ``from_pretrained`` gives, or a class of transfuse.models gives.
        folder: made if it is not there.
        max_shard_size: weights larger than this, in bytes or like "5GB", are written as several files and
            ``model.safetensors.index.json``.

    Raises:
        CheckpointError: the folder cannot be written. ArgumentError: the model is of another kind, or without values;
            max_shard_size is no size.

    >>> import tempfile, transfuse
    >>> config = transfuse.TransformerConfig("encoder", vocab_size=11, hidden_size=8, num_layers=1, num_heads=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pretrained(transfuse.Encoder(config), folder)
    ...     sorted(os.listdir(folder))
    ['config.json', 'model.safetensors']
    """
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder) or "\0" in str(folder):
        raise ArgumentError(f"save_pretrained: expected the name of a folder, got {folder!r}")
    task = _task_of(model)
    if model.device.type == "meta":
        raise ArgumentError(
            "save_pretrained: the model is on the meta device and has no values; load or make them first"
        )
    family, values = _written_config(model.config, task)
    state = model.state_dict()
    table = native.table_of(model, task) if family is native.FAMILY else family.table(model.config, task)
    tensors = {theirs: rows.of(state) for theirs, rows in table.items()}
    if family.writes_copies(model.config):
        tensors |= {copy: tensors[name].clone() for copy, name in family.copies(model.config, task).items()}
    tensors = {family.stored_name(name, task): tensor for name, tensor in tensors.items()}
    values |= dict(model.task_settings)
    values |= {"architectures": [family.tasks[task]], "torch_dtype": str(model.dtype).removeprefix("torch.")}
    if isinstance(model, SequenceClassifier | TokenClassifier):
        count = model.classifier.out_features
        names = list(model.labels) if len(model.labels) == count else [f"LABEL_{i}" for i in range(count)]
        values["id2label"] = {str(i): name for i, name in enumerate(names)}
        values["label2id"] = {name: i for i, name in enumerate(names)}
    files = {"config.json": values}
    if model.generation_config is not None:
        files[GENERATION] = model.generation_config.to_values()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_checkpoint(Path(folder), tensors, files, max_shard_size)


def _open(path: Path) -> tuple[dict[str, Any], TensorSource]:
    """config.json's values and the tensors, from a folder or a GGUF file."""
    if path.is_file():
        gguf = LlamaGgufSource(path)
        return gguf.config, gguf
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}: no config.json{half_downloaded(path)}; pass the folder that holds it beside the weights"
        )
    values = read_json(path / "config.json", ConfigError)
    generation = path / GENERATION
    if generation.is_file() and (eos := read_json(generation, ConfigError).get("eos_token_id")) is not None:
        values["eos_token_id"] = eos  # chat models list here what ends a turn
    return values, open_safetensors(path)


def _generation_config(path: Path, values: Mapping[str, Any]) -> GenerationConfig | None:
    """The checkpoint's defaults for generation, which old ones keep in config.json; None: it sets none."""
    file = path / GENERATION
    if file.is_file():
        values = read_json(file, ConfigError)
    else:  # special ids are the configuration's
        values = {name: value for name, value in values.items() if name not in TransformerConfig.__dataclass_fields__}
    try:
        read = GenerationConfig.from_values(values)
    except ArgumentError as error:
        raise ConfigError(f"{file if file.is_file() else 'config.json'}: {error}") from None
    if unknown := not_heeded(values):
        asked = ", ".join(f"{name}={values[name]!r:.60}" for name in unknown)
        name = file if file.is_file() else path / "config.json"
        warnings.warn(f"{name} asks for {asked}: transfuse has no such knob, and writes text without it", stacklevel=3)
    return None if read == GenerationConfig(do_sample=False) else read


def _labels(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a classification head's classes; transformers writes the names, or at least their number."""
    given = values.get("id2label")
    names = given if isinstance(given, dict) else {}
    count = len(names) or values.get("num_labels", 2)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1 << 24:
        raise ConfigError(f"config.json: num_labels must be a number of classes, got {count!r}")
    return tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(count))


def _stored_dtype(values: Mapping[str, Any], source: TensorSource) -> torch.dtype:
    """What the checkpoint says it is, else what most of its numbers are, else fp32 (quantised files)."""
    said = values.get("dtype", values.get("torch_dtype"))
    if isinstance(said, str) and said.removeprefix("torch.") in DTYPES:
        return DTYPES[said.removeprefix("torch.")]
    counts = dict.fromkeys(FLOAT_DTYPES.values(), 0)
    if isinstance(source, SafetensorsSource):
        for info in source.entries.values():
            if info.dtype in FLOAT_DTYPES:
                counts[FLOAT_DTYPES[info.dtype]] += math.prod(info.shape)
    return max(counts, key=lambda dtype: counts[dtype]) if any(counts.values()) else torch.float32


def _build(task: str, config: TransformerConfig, labels: int, dtype: torch.dtype) -> TransformerModel:
    """The model of a task, on the meta device."""
    if task in _CLASSIFIERS:
        return _CLASSES[task](config, labels, device="meta", dtype=dtype)
    return _CLASSES[task](config, device="meta", dtype=dtype)


def _task_of(model: TransformerModel) -> str:
    for task, kind in _CLASSES.items():
        if type(model) is kind:
            return task
    raise ArgumentError(f"save_pretrained: expected a model of transfuse.models, got {type(model).__name__}")


def _written_config(config: TransformerConfig, task: str) -> tuple[Family, dict[str, Any]]:
    """The family that a model is written as, and config.json's values: its own where that says all there is to say."""
    family = find_family(config.family)
    if task in family.tasks:
        values = family.write_config(config)
        settled = {name: getattr(config, name) for name in family.settled}
        if dataclasses.replace(family.read_config(values, task), **settled) == config:
            return family, values
    return native.FAMILY, native.FAMILY.write_config(config)


@dataclass(frozen=True)
class _Match:
    """The names a model needs against those a checkpoint has.

    ``table``: needed name -> where it goes; ``found``: needed name -> name as stored; ``missing``: needed, not stored;
    ``unexpected``: stored, not needed; ``tied``: stored name of a copy -> stored name of what it must equal.
    """

    source: TensorSource
    what: str
    table: dict[str, Rows]
    found: dict[str, str]
    missing: list[str]
    unexpected: list[str]
    tied: dict[str, str]

    def error(self, misfits: list[str]) -> CheckpointError:
        groups = ((self.missing, "missing"), (self.unexpected, "unexpected"), (misfits, "that do not fit"))
        problems = "; ".join(f"{len(names)} {kind} ({some(names)})" for names, kind in groups if names)
        return CheckpointError(
            f"{self.source.path}: its tensors are not those of config.json ({self.what}): {problems}"
        )


def _match(
    family: Family, config: TransformerConfig, task: str, table: dict[str, Rows], source: TensorSource
) -> _Match:
    copies = family.copies(config, task)
    stored = family.canonical(list(source.entries), table)
    copies_of: dict[str, list[str]] = {}
    for copy, original in copies.items():
        copies_of.setdefault(original, []).append(copy)
    found = {}
    for name in table:
        if hit := next((n for n in (name, *copies_of.get(name, ())) if n in stored), None):
            found[name] = stored[hit]
    # Another task's head, or what only another task reads, may lie in the file; anything else unknown may not.
    passed_over = tuple(head for head in family.heads if not any(name.startswith(head) for name in table))
    unused = [part for part in family.unused if not any(part in name for name in table)]
    unexpected = [
        original
        for name, original in stored.items()
        if not (name in table or name in copies or name.startswith(passed_over))
        and not any(part in name for part in unused)
    ]
    equal = {} if family.writes_copies(config) else copies
    tied = {stored[c]: stored[n] for c, n in equal.items() if c in stored and n in stored}
    missing = [name for name in table if name not in found]
    return _Match(source, f"{family.name}, {task}", table, found, missing, unexpected, tied)


def _plan(match: _Match, model: TransformerModel) -> dict[str, Rows]:
    """Name as stored -> where it goes, once every tensor's name, shape and dtype was found to fit.

    Raises:
        CheckpointError: some do not; the message counts and names them.
    """
    source, parameters = match.source, dict(model.named_parameters())
    misfits = []
    for name, stored in match.found.items():
        rows, info = match.table[name], source.entries[stored]
        expected = tuple(rows.of(parameters).shape)
        if info.shape != expected:
            misfits.append(f"{name}: file {info.shape}, model {expected}")
        elif info.dtype not in source.readable:
            misfits.append(f"{name}: dtype {info.dtype}, expected one of {', '.join(source.readable)}")
    if match.missing or match.unexpected or misfits:
        raise match.error(misfits)
    for copy, original in match.tied.items():  # else half of what was trained would be dropped in silence
        if not torch.equal(source.read(copy), source.read(original)):
            raise CheckpointError(
                f"{source.path}: config.json ties {copy} to {original}, but they differ; set tie_word_embeddings to "
                "false if the checkpoint is not tied"
            )
    return {stored: match.table[name] for name, stored in match.found.items()}


@torch.no_grad()
def _fill(model: TransformerModel, plan: Mapping[str, Rows], source: TensorSource) -> None:
    """Copy every tensor into its rows. It is a copy also where dtypes agree: what was read may map the file."""
    parameters = dict(model.named_parameters())
    for stored, rows in plan.items():
        rows.of(parameters).copy_(source.read(stored))
