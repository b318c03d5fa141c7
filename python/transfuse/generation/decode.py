"""The loop: score, process, choose, append; one step a token, for decoders and encoder-decoders alike."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from transfuse.errors import ArgumentError
from transfuse.generation.processors import compose
from transfuse.generation.prompt import Ids, Prompt, counts_positions
from transfuse.generation.settings import Settings

# Module -> (how many use it in eval mode now, whether it goes back to training mode after the last of them).
_in_use: WeakKeyDictionary[torch.nn.Module, tuple[int, bool]] = WeakKeyDictionary()
_in_use_lock = threading.RLock()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in eval mode, and every part of it back in training mode afterwards if that is where it was.

    Where several threads or streams use a model at a time, afterwards is when the last of them is done.
    """
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    with _in_use_lock:
        for module in modules:
            users, trains = _in_use.get(module, (0, False))
            _in_use[module] = (users + 1, trains or module.training)
            module.training = False
    try:
        yield
    finally:
        with _in_use_lock:
            for module in modules:
                users, trains = _in_use.pop(module)
                if users > 1:
                    _in_use[module] = (users - 1, trains)
                elif trains:
                    module.training = True


@torch.no_grad()
def decode(
    model: Any, prompt: Prompt, settings: Settings, ids: Ids, generator: torch.Generator | None
) -> Iterator[torch.Tensor]:
    """Yield each step's tokens (rows,), ``ids.pad`` for rows that have ended, until all have or the budget is spent."""
    length = prompt.tokens.shape[1]
    eos = torch.tensor(ids.eos, dtype=torch.int64, device=prompt.tokens.device)
    chain = compose(settings, eos, length)
    reader = _Reader(model, prompt, length + settings.max_new_tokens - 1)  # the last new token is never read
    rows = _Rows(prompt.tokens, ids.pad)
    history = _without_padding(prompt)  # (rows, length so far): what the processors see
    tokens = prompt.tokens
    for step in range(settings.max_new_tokens):
        scores = reader.scores(tokens).float()
        for process in chain:
            scores = process(scores, history)
        tokens = choose(scores, settings.samples, generator)
        yield rows.padded(tokens)
        if step + 1 == settings.max_new_tokens or (ids.eos and rows.end(torch.isin(tokens, eos))):
            return
        tokens = tokens[:, None]
        history = torch.cat([history, tokens], 1)
        kept = rows.worth_keeping()
        if kept is not None and reader.keep(kept):
            rows.keep(kept)
            tokens, history = tokens[kept], history[kept]


def choose(scores: torch.Tensor, sample: bool, generator: torch.Generator | None) -> torch.Tensor:
    """The next token of each row, (rows,), from processed scores (rows, vocab): drawn, or the likeliest.

    Raises:
        ArgumentError: a row's highest score is NaN or infinite, so that no token means anything.
    """
    highest, likeliest = scores.max(-1)
    if not bool(highest.isfinite().all()):
        raise ArgumentError(
            f"generate: the model's scores must be finite, got {float(highest[~highest.isfinite()][0])}; the weights "
            "are damaged, or too large for this dtype (float16 ends at 65504: take bfloat16 or float32) or for "
            "repetition_penalty"
        )
    if not sample:
        return likeliest
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


class _Rows:
    """Which rows still run. Ended ones go on as padding until half of the batch has ended, and then leave it."""

    def __init__(self, tokens: torch.Tensor, pad: int) -> None:
        self._padding = torch.full_like(tokens[:, 0], pad)  # (all rows,)
        self._running = torch.ones_like(tokens[:, 0], dtype=torch.bool)  # (rows in the batch,)
        self._numbers: torch.Tensor | None = None  # (rows in the batch,) which row each is; None: all are there
        self._count = tokens.shape[0]

    def padded(self, tokens: torch.Tensor) -> torch.Tensor:
        """The step's tokens (rows in the batch,) as (all rows,), with padding in those that have ended."""
        if self._numbers is None:
            return torch.where(self._running, tokens, self._padding)
        tokens = torch.where(self._running, tokens, self._padding[: tokens.shape[0]])
        return self._padding.index_copy(0, self._numbers, tokens)

    def end(self, ended: torch.Tensor) -> bool:
        """Note the rows that end with this step; True if none is left."""
        self._running = self._running & ~ended
        self._count = int(self._running.sum())
        return self._count == 0

    def worth_keeping(self) -> torch.Tensor | None:
        """The rows to go on with, if dropping the others is worth a copy of the cache."""
        return None if 2 * self._count > self._running.shape[0] else self._running.nonzero()[:, 0]

    def keep(self, kept: torch.Tensor) -> None:
        """Drop the others."""
        self._numbers = kept if self._numbers is None else self._numbers[kept]
        self._running = self._running[kept]


class _Reader:
    """Feeds tokens to the model, each once, and gives the scores of what follows them."""

    def __init__(self, model: Any, prompt: Prompt, length: int) -> None:
        self._model = model
        self._source, self._source_mask = prompt.source, prompt.source_mask
        self._mask = prompt.mask
        self._counts = counts_positions(getattr(model, "config", None))
        self._cache = model.new_cache(prompt.tokens.shape[0], length)

    def scores(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: (rows, n), those not read before -> (rows, vocab)."""
        if self._source is not None:
            out = self._model(
                self._source,
                attention_mask=self._source_mask,
                decoder_input_ids=tokens,
                cache=self._cache,
                last_logits_only=True,
            )
            return out.logits[:, -1]
        mask, positions = self._mask, None
        if mask is not None:
            # Padding on the left takes no positions: a row means the same in a batch and alone.
            if self._counts:
                positions = (mask.cumsum(1) - 1).clamp_min_(0)[:, -tokens.shape[1] :]
            self._mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
        out = self._model(tokens, attention_mask=mask, position_ids=positions, cache=self._cache, last_logits_only=True)
        return out.logits[:, -1]

    def keep(self, rows: torch.Tensor) -> bool:
        """Go on with these rows alone; False if the model's cache cannot."""
        if not hasattr(self._cache, "select"):
            return False
        self._cache.select(rows)
        self._mask, self._source, self._source_mask = (
            None if t is None else t[rows] for t in (self._mask, self._source, self._source_mask)
        )
        return True


def _without_padding(prompt: Prompt) -> torch.Tensor:
    """The prompt's tokens with its padding replaced by its last token, which is a real one."""
    if prompt.mask is None:
        return prompt.tokens
    return torch.where(prompt.mask.bool(), prompt.tokens, prompt.tokens[:, -1:])
