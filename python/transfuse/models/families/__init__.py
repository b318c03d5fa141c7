"""Checkpoint families: how Hugging Face describes and names a model, as a TransformerConfig and a table of names.

A family is data and a few small functions, not a model: the modules are Encoder, Decoder and their heads. To add one,
write ``families/<name>.py`` with a ``FAMILY`` and list it in ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from transfuse.errors import ConfigError
from transfuse.models.checkpoint import TensorSource
from transfuse.models.config import TransformerConfig


@dataclass(frozen=True)
class Rows:
    """Where a stored tensor goes: rows ``start`` to ``stop`` of a parameter, all of them by default.

    ``transposed``: the file holds the matrix as (in, out), GPT-2's Conv1D. ``leading``: it holds the vector as (1, n).
    """

    name: str
    start: int = 0
    stop: int | None = None
    transposed: bool = False
    leading: bool = False

    def of(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The view of ``tensors[name]`` that has the stored tensor's shape."""
        part = tensors[self.name][self.start : self.stop]
        if self.leading:
            return part[None]
        return part.T if self.transposed else part


def settle_pooler(config: TransformerConfig, task: str, source: TensorSource) -> TransformerConfig:
    """A bare encoder has a pooler if its checkpoint has: one that was saved from another task has none."""
    if task == "encoder" and config.pooler and not any("pooler." in name for name in source.entries):
        return replace(config, pooler=False)
    return config


@dataclass(frozen=True)
class Family:
    """One checkpoint family.

    Args:
        name: ``model_type`` in config.json.
        prefix: what precedes the backbone's names when a head stands beside it ("bert.", "model.").
        heads: how the heads' names begin; they never carry the prefix.
        tasks: task -> name of the transformers class, the default task first.
        read_config: values of config.json -> configuration for a task.
        write_config: configuration -> values for config.json, without ``architectures``.
        table: (configuration, task) -> stored name -> where it goes. The stored names carry the prefix.
        copies: (configuration, task) -> stored name -> the stored name of the same tensor. A checkpoint may hold either
            or both; both must be equal (but see ``writes_copies``).
        unused: parts of stored names that may be there unread, where the task needs no name with that part: old
            buffers, what only another task reads.
        rename: spelling variants of old checkpoints, (old, new) endings.
        other_prefixes: task -> the prefix, where the class of transformers has another one.
        writes_copies: whether the copies are tensors of their own to transformers, which nobody reads here. Then they
            need not be equal, and are written too.
        settle: (configuration, task, checkpoint) -> configuration, where only the stored tensors tell.
        settled: the fields that ``settle`` may change: config.json need not tell them.
    """

    name: str
    prefix: str
    heads: tuple[str, ...]
    tasks: Mapping[str, str]
    read_config: Callable[[Mapping[str, Any], str], TransformerConfig]
    write_config: Callable[[TransformerConfig], dict[str, Any]]
    table: Callable[[TransformerConfig, str], dict[str, Rows]]
    copies: Callable[[TransformerConfig, str], dict[str, str]]
    unused: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    other_prefixes: Mapping[str, str] = field(default_factory=dict)
    writes_copies: Callable[[TransformerConfig], bool] = lambda config: not config.tie_embeddings
    settle: Callable[[TransformerConfig, str, TensorSource], TransformerConfig] = settle_pooler
    settled: tuple[str, ...] = ("pooler",)

    def task_of(self, architectures: object) -> str:
        """The task that config.json's ``architectures`` names; the family's default where it names none of ours."""
        names = architectures if isinstance(architectures, list) else []
        return next((task for task, name in self.tasks.items() if name in names), next(iter(self.tasks)))

    def canonical(self, names: list[str], table: Mapping[str, Rows]) -> dict[str, str]:
        """Name as ``table`` spells it -> name as stored; unknown names keep their place below the prefix."""
        prefixed = any(name.startswith(self.prefix) for name in names)
        result = {}
        for name in names:
            full = name
            for other in self.other_prefixes.values():
                full = self.prefix + full.removeprefix(other) if full.startswith(other) else full
            for old, new in self.rename:
                full = full.removesuffix(old) + new if full.endswith(old) else full
            if not (prefixed or full in table or full.startswith(self.heads)):
                full = self.prefix + full
            result[full] = name
        return result

    def stored_name(self, name: str, task: str) -> str:
        """How the task's class of transformers spells a name of the table; a bare stack carries no prefix."""
        prefix = self.other_prefixes.get(task, "" if task in ("encoder", "decoder", "seq2seq") else self.prefix)
        inside = name.startswith(self.prefix) and not name.startswith(self.heads)
        return prefix + name.removeprefix(self.prefix) if inside else name


# Until 2019 norms' parameters were called as in the paper.
OLD_NORMS = ((".gamma", ".weight"), (".beta", ".bias"))


def with_parts(modules: Mapping[str, str], parts: tuple[str, ...] = ("weight", "bias")) -> dict[str, Rows]:
    """Stored name -> where it goes, of the weight and the bias of whole modules.

    >>> with_parts({"ln_f": "final_norm"}, ("weight",))
    {'ln_f.weight': Rows(name='final_norm.weight', start=0, stop=None, transposed=False, leading=False)}
    """
    return {f"{theirs}.{part}": Rows(f"{ours}.{part}") for theirs, ours in modules.items() for part in parts}


def qkv_rows(
    config: TransformerConfig, names: tuple[str, str, str], ours: str, *, decoder: bool = False
) -> dict[str, Rows]:
    """The three projections a checkpoint keeps apart, as row ranges of the fused ``ours``.

    ``decoder``: they are of an encoder_decoder's decoder.
    """
    c = config
    heads, dim = (c.num_heads, c.num_kv_heads), c.head_dim
    if decoder:
        heads, dim = (c.num_decoder_heads, c.num_decoder_kv_heads), c.decoder_head_dim
    q, kv = (n * dim for n in heads)
    bounds = (0, q, q + kv, q + 2 * kv)
    return {name: Rows(ours, bounds[i], bounds[i + 1]) for i, name in enumerate(names)}


def cross_rows(config: TransformerConfig, names: tuple[str, str, str], ours: str, kind: str) -> dict[str, Rows]:
    """Likewise of cross-attention: q, and the fused k and v, below ``ours``; ``kind``: weight or bias."""
    kv = config.num_decoder_kv_heads * config.decoder_head_dim
    targets = (Rows(f"{ours}.q.{kind}"), Rows(f"{ours}.kv.{kind}", 0, kv), Rows(f"{ours}.kv.{kind}", kv, 2 * kv))
    return dict(zip(names, targets, strict=True))


def body_prefix(config: TransformerConfig, task: str) -> str:
    """What precedes our names of the stack: nothing where the task is the stack itself or its output head."""
    return "" if task in ("encoder", "decoder", "causal-lm") else f"{config.architecture}."


def decoder_head(config: TransformerConfig, task: str, token_classifier: str = "classifier") -> dict[str, Rows]:
    """What a decoder's task adds to its stack, by transformers' names."""
    if task == "causal-lm":
        return {} if config.tie_embeddings else {"lm_head.weight": Rows("lm_head.weight")}
    if task == "sequence-classification":
        return {"score.weight": Rows("classifier.weight")}
    names = {"token-classification": token_classifier, "question-answering": "qa_outputs"}
    return with_parts({names[task]: "classifier"}) if task in names else {}


def given(values: Mapping[str, Any], key: str, default: Any) -> Any:
    """``values[key]``, or ``default`` where it is missing or null."""
    value = values.get(key)
    return default if value is None else value


ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


def activation_from(values: Mapping[str, Any], default: str, key: str = "hidden_act") -> str:
    """Our name of ``values[key]``.

    Raises:
        ConfigError: it is one that the feed-forward network does not have.
    """
    name = given(values, key, default)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ConfigError(f"config.json: {key} must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def activation_to(name: str, gelu_tanh: str = "gelu_pytorch_tanh") -> str:
    """The name that transformers gives an activation of ours; that of the tanh GELU is the family's choice."""
    return gelu_tanh if name == "gelu_tanh" else name


def token_ids(config: TransformerConfig) -> dict[str, Any]:
    """The special tokens, for config.json."""
    eos = config.eos_token_id
    return {
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
    }


def _families() -> dict[str, Family]:
    from transfuse.models.families import bart, bert, distilbert, gpt2, gpt_neo, llama, marian, native, roberta, t5

    found = (bart, bert, distilbert, gpt2, gpt_neo, llama, marian, native, t5)
    return {family.name: family for family in (*(module.FAMILY for module in found), *roberta.FAMILIES)}


def family_names() -> list[str]:
    """What a configuration's ``family`` may be."""
    return sorted(_families())


def find_family(model_type: object) -> Family:
    """The family called ``model_type``.

    Raises:
        ConfigError: it is not a known one.

    >>> find_family("llama").tasks["causal-lm"]
    'LlamaForCausalLM'
    >>> find_family("mamba")
    Traceback (most recent call last):
    transfuse.errors.ConfigError: config.json: model_type 'mamba' is not a known family; known: bart, ...
    """
    families = _families()
    if not isinstance(model_type, str) or model_type not in families:
        raise ConfigError(
            f"config.json: model_type {model_type!r} is not a known family; known: {', '.join(family_names())}"
        )
    return families[model_type]
