"""Guesses at the tokens that come next, for the loop to check several at a time (Leviathan et al. 2023).

A guess never changes the text, only how many tokens one run of the model adds to it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from transfuse.generation.chain import Chain
from transfuse.generation.prompt import Ids, Prompt, decoder_vocabulary
from transfuse.generation.reader import Reader
from transfuse.generation.settings import GenerationConfig

_LONGEST_MATCH = 3  # tokens; more rarely recur, fewer recur by chance


class Drafter(Protocol):
    """Something that guesses."""

    def guess(self, history: torch.Tensor, most: int) -> torch.Tensor:
        """What may follow history (rows, length): (rows, at most ``most``), possibly no column."""

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone."""


def make_drafter(model: Any, assistant: Any, prompt: Prompt, settings: GenerationConfig, ids: Ids) -> Drafter | None:
    """What guesses for this generation; None: nothing does."""
    if assistant is not None:
        return Assistant(assistant, prompt, settings, ids)
    if settings.prompt_lookup_num_tokens is None:
        return None
    config = getattr(model, "config", None)
    shared = prompt.source is not None and decoder_vocabulary(config) == getattr(config, "vocab_size", None)
    source = prompt.read_by_encoder().repeat_interleave(settings.num_return_sequences, 0) if shared else None
    return PromptLookup(settings.prompt_lookup_num_tokens, source)


class PromptLookup:
    """Guesses that what followed the last few tokens before will follow them again (prompt lookup, Saxena 2023).

    Args:
        tokens: how many to guess.
        source: (rows, source_length) to look in too, an encoder's input; None: the text itself alone.

    >>> PromptLookup(2).guess(torch.tensor([[5, 6, 7, 8, 5, 6]]), 9)
    tensor([[7, 8]])
    """

    def __init__(self, tokens: int, source: torch.Tensor | None = None) -> None:
        self._tokens, self._source = tokens, source

    def guess(self, history: torch.Tensor, most: int) -> torch.Tensor:
        """Per row the continuation of the latest of the longest matches; columns as long as some row has one."""
        text = history if self._source is None else torch.cat([self._source, history], 1)
        rows, length = text.shape
        start = torch.full((rows,), length, device=text.device)  # where the guess begins; length: nowhere
        for size in range(1, min(_LONGEST_MATCH, history.shape[1], length - 1) + 1):
            runs = text.unfold(1, size, 1)[:, :-1]  # all but the last, which is what is looked for
            matches = (runs == text[:, None, -size:]).all(-1)
            latest = torch.where(matches, torch.arange(size, size + runs.shape[1], device=text.device), -1).amax(1)
            start = torch.where(latest > 0, latest, start)
        count = min(self._tokens, most, length - int(start.min()))
        columns = start[:, None] + torch.arange(count, device=text.device)
        return text.gather(1, columns.clamp_max(length - 1)).clamp_min(0)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone."""
        self._source = None if self._source is None else self._source[rows]


class Assistant:
    """Guesses what a smaller model would write. Both read the prompt at the start.

    Args:
        model: of the same vocabulary.
        prompt, settings, ids: of the generation; the same processors for both models make for better guesses.
    """

    def __init__(self, model: Any, prompt: Prompt, settings: GenerationConfig, ids: Ids) -> None:
        self._tokens = settings.num_assistant_tokens
        self._reader = Reader(model, prompt, settings.num_return_sequences, needs=("crop",))
        self._reader.begin()
        self._chain = Chain(settings, ids, prompt.tokens.shape[1], prompt.budget, self._reader.encoder_tokens())

    def guess(self, history: torch.Tensor, most: int) -> torch.Tensor:
        """The likeliest continuation, (rows, tokens or most)."""
        reader, known = self._reader, history.shape[1]
        reader.crop(known - 1)  # guesses that turned out wrong
        for _ in range(min(self._tokens, most)):
            logits = reader.read(history[:, reader.length :], every=False)[:, 0]
            history = torch.cat([history, self._chain(logits, history).argmax(-1, keepdim=True)], 1)
        return history[:, known:]

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone."""
        self._reader.keep(rows)
        self._chain.keep(rows)
