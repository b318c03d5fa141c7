"""patch: the modules of somebody else's model exchanged for transfuse's, in place and reversibly.

No module is rebuilt and no parameter touched: a module's class is exchanged for a subclass of it that computes the same
on the fused ops, and the attention of a Hugging Face model is chosen in its configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from transfuse.errors import ArgumentError
from transfuse.integrations.transformers_attention import NAME, register_with_transformers
from transfuse.integrations.transformers_modules import fused_class
from transfuse.nn.transformer import TWINS

Model = TypeVar("Model", bound=nn.Module)
_RECORD = "_transfuse_patched"


@dataclass
class PatchReport:
    """What :func:`patch` did: by module path, what runs now, and why the rest was left."""

    changed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line a kind of change, one line a reason."""
        return "\n".join([*_grouped("changed", self.changed), *_grouped("left", self.left)])


@dataclass
class _Record:
    """What undoes a patch; on the model, so that copies of the model have their own."""

    classes: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list)
    configs: list[tuple[Any, str | None]] = field(default_factory=list)


def patch(model: nn.Module) -> PatchReport:
    """Makes a model run on transfuse's kernels. Parameters, state_dict, hooks and the model's own code stay.

    torch.nn's LayerNorm, RMSNorm, MultiheadAttention and transformer layers anywhere in the model are exchanged, and in
    Hugging Face models (BERT, RoBERTa, DistilBERT, GPT-2, GPT-Neo, Llama, T5, Marian, BART, ViT) attention, norms,
    feed-forward networks and the additions before norms. Works for training and inference, with gradient checkpointing
    and with caches; a second call changes only what is new. :func:`unpatch` undoes it.

    Args:
        model: any module.

    Returns:
        What changed, and what did not for which reason; print it.

    Raises:
        ArgumentError: model is not a torch.nn.Module.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    >>> print(patch(model))
    changed  LayerNorm -> transfuse.nn.LayerNorm (1)
    left     Linear: nothing in it to fuse (1)
    >>> unpatch(model)
    >>> type(model[1]) is nn.LayerNorm
    True
    """
    report = PatchReport()
    _apply(model, report)
    return report


def unpatch(model: nn.Module) -> None:
    """Undoes :func:`patch`: every module computes what it did before, bit for bit. A model never patched stays.

    >>> model = nn.Sequential(nn.RMSNorm(8))
    >>> _ = patch(model)
    >>> unpatch(model)
    >>> type(model[0]) is nn.RMSNorm
    True
    """
    record = vars(model).pop(_RECORD, None)
    if record is not None:
        _undo(record)


@contextmanager
def patched(model: Model) -> Iterator[Model]:
    """The model patched within a ``with`` block; what was patched before stays so afterwards.

    >>> model = nn.LayerNorm(8)
    >>> with patched(model):
    ...     type(model).__module__
    'transfuse.nn.norm'
    """
    record = _apply(model, PatchReport())
    try:
        yield model
    finally:
        _undo(record)
        earlier = vars(model).get(_RECORD)
        if earlier is not None:
            earlier.classes = [entry for entry in earlier.classes if entry not in record.classes]
            earlier.configs = [entry for entry in earlier.configs if entry not in record.configs]


def _apply(model: nn.Module, report: PatchReport) -> _Record:
    """Change all that can be; returns what this call changed."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    new = _Record()
    try:
        _choose_attention(model, report, new)
        for name, module in model.named_modules():
            _exchange(name, module, report, new)
    except BaseException:
        _undo(new)
        raise
    record = vars(model).setdefault(_RECORD, _Record())
    record.classes += new.classes
    record.configs += new.configs
    return new


def _undo(record: _Record) -> None:
    for module, original in reversed(record.classes):
        module.__class__ = original
    for config, implementation in reversed(record.configs):
        config._attn_implementation = implementation


def _exchange(name: str, module: nn.Module, report: PatchReport, record: _Record) -> None:
    kind = type(module)
    if kind in TWINS.values() or hasattr(kind, "fused_from"):
        return
    twin = TWINS.get(kind)
    words = "" if twin is None else f"transfuse.nn.{twin.__name__}"
    if twin is None:
        found = fused_class(kind)
        if found is None:
            if name not in report.changed and (reason := _why_left(module)) is not None:
                report.left[name] = f"{kind.__name__}: {reason}"
            return
        twin, words = found
    record.classes.append((module, kind))
    module.__class__ = twin
    report.changed[name] = f"{kind.__name__} -> {words}"


def _choose_attention(model: nn.Module, report: PatchReport, record: _Record) -> None:
    """Of every Hugging Face model in there whose attention is dispatched."""
    if "transformers" not in sys.modules:
        return
    from transformers import PreTrainedModel

    parts = [(name, m) for name, m in model.named_modules() if isinstance(m, PreTrainedModel)]
    before = {id(m.config): m.config._attn_implementation for _, m in parts}  # one setting reaches the parts below it
    for name, part in parts:
        was = before[id(part.config)]
        if was == NAME or any(config is part.config for config, _ in record.configs):
            continue
        if not getattr(part, "_can_set_attn_implementation", lambda: False)():
            report.left[name] = f"{type(part).__name__}: its attention is not dispatched by transformers"
            continue
        register_with_transformers()
        record.configs.append((part.config, was))
        part.config._attn_implementation = NAME
        report.changed[name] = f"attention of {type(part).__name__} -> attn_implementation={NAME!r} (was {was!r})"


def _why_left(module: nn.Module) -> str | None:
    """None for what merely holds others."""
    kind = type(module)
    for known in TWINS:
        if isinstance(module, known):
            return f"a subclass of torch.nn.{known.__name__}, whose forward may be another"
    if hasattr(module, "fc1") and hasattr(module, "fc2"):
        return "its feed-forward network is written out in its forward"
    if next(module.children(), None) is None:
        return "nothing in it to fuse" if kind.__module__.startswith("torch.nn.") else "no fused form of it is known"
    return None


def _grouped(title: str, entries: dict[str, str]) -> list[str]:
    counts: dict[str, int] = {}
    for words in entries.values():
        counts[words] = counts.get(words, 0) + 1
    return [f"{title:8} {words} ({count})" for words, count in counts.items()]


__all__ = ["PatchReport", "patch", "patched", "unpatch"]
