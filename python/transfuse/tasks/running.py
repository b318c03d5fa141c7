"""What the tasks share: a model and tokenizer that belong together, batches of like length, a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from transfuse.errors import ArgumentError, CheckpointError
from transfuse.generation.decode import evaluating
from transfuse.generation.prompt import counts_positions
from transfuse.models.outputs import ModelOutput
from transfuse.models.stack import Stack
from transfuse.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tokenizers import Encoding

    from transfuse.models.base import TransformerModel

_MANY = 8  # batches; fewer are over before a bar would help


def check_pair(task: str, model: Any, tokenizer: Any, kinds: tuple[type, ...], remedy: str) -> None:
    """Asks whether a model does the task and the tokenizer is the model's.

    Raises:
        ArgumentError: the model is of another kind, or either is none.
        CheckpointError: the tokenizer knows ids that the model does not.
    """
    if not isinstance(model, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ArgumentError(f"{task}: expected a model of kind {names}, got {_kind(model)}; {remedy}")
    if not isinstance(tokenizer, Tokenizer):
        raise ArgumentError(
            f"{task}: expected the model's tokenizer, got {_kind(tokenizer)}; transfuse.load_tokenizer gives it"
        )
    check_vocabulary(cast("TransformerModel", model), tokenizer)


def check_vocabulary(model: TransformerModel, tokenizer: Tokenizer) -> None:
    """Asks whether the model knows every id that the tokenizer gives.

    A model may know more: vocabularies are often padded to a round size.

    Raises:
        CheckpointError: it does not.
    """
    config = model.config
    sides = [(tokenizer, config.vocab_size)]
    if config.is_encoder_decoder:
        sides.append((tokenizer.target, config.decoder_vocab_size))
    for side, size in sides:
        if side.highest_id >= size:
            raise CheckpointError(
                f"the tokenizer gives ids up to {side.highest_id}, the model's vocabulary has {size} tokens: they are "
                "not of one checkpoint; load both from the same place"
            )


def at_least(task: str, name: str, value: Any, least: int = 1) -> None:
    """Asks for a whole number.

    Raises:
        ArgumentError: it is none, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{task}: {name} must be a whole number of at least {least}, got {value!r}")


def longest(model: TransformerModel, tokenizer: Tokenizer) -> int | None:
    """The longest input that both the tokenizer and the model were made for."""
    limits = [tokenizer.settings.max_length]
    if counts_positions(model.config):
        limits.append(model.config.max_positions)
    return min((n for n in limits if n is not None), default=None)


def batches(lengths: Sequence[int], size: int, label: str, progress: bool | None) -> Iterator[list[int]]:
    """Indices in batches, longest first: texts of like length waste little on padding, and too long ones fail at once.

    Args:
        lengths: of each text, in any measure.
        size: texts of a batch at most.
        label: what a progress bar is called.
        progress: show one on standard error; None: on a terminal, if there are many batches.

    >>> list(batches([3, 9, 1, 7], 2, "", False))
    [[1, 3], [0, 2]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    chosen = [order[start : start + size] for start in range(0, len(order), size)]
    if progress is None:
        progress = len(chosen) > _MANY and sys.stderr is not None and sys.stderr.isatty()
    return iter(_with_bar(chosen, label) if progress else chosen)


def _with_bar(items: Sequence[list[int]], label: str) -> Iterable[list[int]]:
    from rich.console import Console
    from rich.progress import track

    return track(items, label, console=Console(stderr=True), transient=True)


@torch.no_grad()
def run(
    task: str,
    model: TransformerModel,
    tokenizer: Tokenizer,
    encodings: Sequence[Encoding],
    batch_size: int,
    progress: bool | None,
) -> Iterator[tuple[list[int], dict[str, torch.Tensor], ModelOutput]]:
    """(indices of the encodings, the batch that was made of them, what the model gives for it), padding on the right.

    Raises:
        ArgumentError: batch_size is no number of texts.
    """
    at_least(task, "batch_size", batch_size)
    with evaluating(model):
        for chosen in batches([len(e.ids) for e in encodings], batch_size, task, progress):
            batch = tokenizer.pad([encodings[i] for i in chosen], padding_side="right", device=model.device)
            if model.config.is_encoder_decoder and not isinstance(model, Stack):
                batch.pop("token_type_ids", None)  # which BERT's tokenizer gives whatever the model is
            yield chosen, batch, model(**batch)


def _kind(thing: Any) -> str:
    return "None" if thing is None else type(thing).__name__
