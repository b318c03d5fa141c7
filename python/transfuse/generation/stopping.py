"""Where a text ends: a token that ends it, or a string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from transfuse.errors import ArgumentError
from transfuse.generation.prompt import PADDING

_CONTEXT = 4  # tokens of the prompt decoded with the new ones: a tokenizer may drop the first one's space
_TOKENS_A_CHARACTER = 4  # at most, in byte-level vocabularies


class Ends:
    """Tells which rows have ended with their newest token.

    Args:
        eos: ids that end a row.
        stop_strings: texts that do, once they occur among the new tokens' text.
        tokenizer: something whose ``decode(ids)`` gives text; needed for stop_strings alone.

    Raises:
        ArgumentError: stop_strings without a tokenizer.
    """

    def __init__(self, eos: Sequence[int], stop_strings: Sequence[str], tokenizer: Any) -> None:
        if stop_strings and not hasattr(tokenizer, "decode"):
            raise ArgumentError(
                "generate: stop_strings need tokenizer=, something with decode(ids), "
                f"got {'none' if tokenizer is None else type(tokenizer).__name__}"
            )
        self.eos, self._stops, self._tokenizer = tuple(eos), tuple(stop_strings), tokenizer
        self._tail = _TOKENS_A_CHARACTER * max((len(stop) for stop in stop_strings), default=0) + _CONTEXT

    def __bool__(self) -> bool:
        return bool(self.eos or self._stops)

    def reached(self, history: torch.Tensor, new: int) -> torch.Tensor:
        """(rows,) bool. history: (rows, length), prompt and new tokens, of which there are ``new``."""
        last = history[:, -1]
        ended = torch.zeros_like(last, dtype=torch.bool)
        for eos in self.eos:
            ended |= last == eos
        if self._stops:
            rows = history[:, -(min(new, self._tail) + _CONTEXT) :].tolist()
            found = [self._stopped(row, min(new, self._tail)) for row in rows]
            ended |= torch.tensor(found, device=ended.device)
        return ended

    def _stopped(self, tokens: list[int], new: int) -> bool:
        before = [t for t in tokens[:-new] if t != PADDING]
        text = self._tokenizer.decode([*before, *tokens[-new:]])
        text = text[len(self._tokenizer.decode(before)) :] if before else text
        return any(stop in text for stop in self._stops)
