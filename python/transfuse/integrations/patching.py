"""patch: the modules of somebody else's model exchanged for transfuse's, in place and reversibly.

No module is rebuilt and no parameter touched: a module's class is exchanged for a subclass of it that computes the same
on the fused ops, and the attention of a Hugging Face model is chosen in its configuration.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from transfuse.errors import ArgumentError
from transfuse.integrations.transformers_attention import NAME, register_with_transformers
from transfuse.integrations.transformers_modules import fused_class
from transfuse.nn.transformer import TWINS

Model = TypeVar("Model", bound=nn.Module)
# What undoes a patch stands on each module, so that copies, parts and parts of copies can be undone by themselves.
_CLASS = "_transfuse_class_before"
_ATTENTION = "_transfuse_attention_before"
_LOCK = threading.RLock()
_BLOCKS: dict[int, _Block] = {}


@dataclass
class PatchReport:
    """What :func:`patch` did: by module path, what runs now, and why the rest was left."""

    changed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line a kind of change, one line a reason."""
        return "\n".join([*_grouped("changed", self.changed), *_grouped("left", self.left)])


@dataclass
class _Block:
    """The ``with patched(model)`` blocks that one model is in now."""

    entered: int = 0
    modules: list[nn.Module] = field(default_factory=list)


def patch(model: nn.Module) -> PatchReport:
    """Makes a model run on transfuse's kernels. Parameters, state_dict, hooks and the model's own code stay.

    torch.nn's LayerNorm, RMSNorm, MultiheadAttention and transformer layers anywhere in the model are exchanged, and in
    Hugging Face models (BERT, RoBERTa, DistilBERT, GPT-2, GPT-Neo, Llama, T5, Marian, BART, ViT) attention, norms,
    feed-forward networks and the additions before norms. Works for training and inference, with gradient checkpointing
    and with caches; a second call changes only what is new. :func:`unpatch` undoes it. A model that is to be
    compiled or wrapped by FSDP is patched before that.

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
    with _LOCK:
        _apply(model, report)
    return report


def unpatch(model: nn.Module) -> None:
    """Undoes :func:`patch` in a model, a part or a copy: every module computes what it did before, bit for bit.

    >>> model = nn.Sequential(nn.RMSNorm(8))
    >>> _ = patch(model)
    >>> unpatch(model)
    >>> type(model[0]) is nn.RMSNorm
    True
    """
    with _LOCK:
        _undo(model.modules())


@contextmanager
def patched(model: Model) -> Iterator[Model]:
    """The model patched within a ``with`` block; what was patched before stays so afterwards.

    Threads may be in such blocks of one model at a time: the last to leave undoes the patch.

    >>> model = nn.LayerNorm(8)
    >>> with patched(model):
    ...     type(model).__module__
    'transfuse.nn.norm'
    """
    with _LOCK:
        modules = _apply(model, PatchReport())
        block = _BLOCKS.setdefault(id(model), _Block())
        block.entered += 1
        block.modules += modules
    try:
        yield model
    finally:
        with _LOCK:
            block.entered -= 1
            if not block.entered:
                del _BLOCKS[id(model)]
                _undo(block.modules)


def _apply(model: nn.Module, report: PatchReport) -> list[nn.Module]:
    """Change all that can be; returns the modules that this call changed, outer ones first."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    modules: list[nn.Module] = []
    try:
        _choose_attention(model, report, modules)
        for name, module in model.named_modules():
            _exchange(name, module, report, modules)
    except BaseException:
        _undo(modules)
        raise
    return modules


def _undo(modules: Iterable[nn.Module]) -> None:
    """Outer modules first: what a configuration is set to reaches those inside it, which then set their own."""
    for module in list(modules):
        if (kind := vars(module).pop(_CLASS, None)) is not None:
            module.__class__ = _restored(type(module), kind)
        if (implementation := vars(module).pop(_ATTENTION, module)) is not module:
            module.config._attn_implementation = implementation  # type: ignore[union-attr]


def _restored(kind: type, original: type) -> type:
    """kind with ``original`` in the place of our class, before which parametrizations and FSDP put one of theirs."""
    if _is_ours(kind):
        return original
    bases = tuple(_restored(b, original) if any(map(_is_ours, b.__mro__)) else b for b in kind.__bases__)
    return kind if bases == kind.__bases__ else type(kind)(kind.__name__, bases, dict(vars(kind)))


def _is_ours(kind: type) -> bool:
    return kind in TWINS.values() or "fused_from" in vars(kind)


def _exchange(name: str, module: nn.Module, report: PatchReport, modules: list[nn.Module]) -> None:
    kind = type(module)
    if any(map(_is_ours, kind.__mro__)):
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
    modules.append(module)
    vars(module)[_CLASS] = kind
    module.__class__ = twin
    report.changed[name] = f"{kind.__name__} -> {words}"


def _choose_attention(model: nn.Module, report: PatchReport, modules: list[nn.Module]) -> None:
    """Of every Hugging Face model in there whose attention is dispatched."""
    if "transformers" not in sys.modules:
        return
    from transformers import PreTrainedModel

    parts = [(name, m) for name, m in model.named_modules() if isinstance(m, PreTrainedModel)]
    before = {id(m.config): m.config._attn_implementation for _, m in parts}  # one setting reaches the parts below it
    chosen: set[int] = set()
    for name, part in parts:
        was, config = before[id(part.config)], part.config
        if not getattr(part, "_can_set_attn_implementation", lambda: False)():
            report.left[name] = f"{type(part).__name__}: its attention is not dispatched by transformers"
            if id(config) not in chosen and config._attn_implementation != was:
                config._attn_implementation = was
        elif was != NAME:
            register_with_transformers()
            modules.append(part)
            vars(part)[_ATTENTION] = was
            config._attn_implementation = NAME
            if id(config) not in chosen:
                report.changed[name] = (
                    f"attention of {type(part).__name__} -> attn_implementation={NAME!r} (was {was!r})"
                )
            chosen.add(id(config))


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
