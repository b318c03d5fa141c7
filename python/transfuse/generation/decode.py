"""The loop: score, process, choose, append; one step a token, for decoders and encoder-decoders alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from transfuse.generation.processors import compose
from transfuse.generation.prompt import Ids, Prompt
from transfuse.generation.settings import Settings


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in eval mode, and every part of it back in training mode afterwards if that is where it was."""
    modules = [m for m in model.modules() if m.training] if isinstance(model, torch.nn.Module) else []
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


@torch.no_grad()
def decode(
    model: Any, prompt: Prompt, settings: Settings, ids: Ids, generator: torch.Generator | None
) -> Iterator[torch.Tensor]:
    """Yield each step's tokens (rows,), ``ids.pad`` for rows that have ended, until all have or the budget is spent."""
    rows, length = prompt.tokens.shape
    eos = torch.tensor(ids.eos, dtype=torch.int64, device=prompt.tokens.device)
    chain = compose(settings, eos, length)
    reader = _Reader(model, prompt, length + settings.max_new_tokens)
    history = _without_padding(prompt)  # (rows, length so far): what the processors see
    tokens = prompt.tokens
    alive = torch.ones(rows, dtype=torch.bool, device=tokens.device)
    for _ in range(settings.max_new_tokens):
        scores = reader.scores(tokens).float()
        for process in chain:
            scores = process(scores, history)
        tokens = choose(scores, settings.samples, generator)
        if ids.eos:
            tokens = torch.where(alive, tokens, ids.pad)
        yield tokens
        if ids.eos:
            alive = alive & ~torch.isin(tokens, eos)
            if not bool(alive.any()):
                return
        tokens = tokens[:, None]
        history = torch.cat([history, tokens], 1)


def choose(scores: torch.Tensor, sample: bool, generator: torch.Generator | None) -> torch.Tensor:
    """The next token of each row, (rows,), from processed scores (rows, vocab): drawn, or the likeliest."""
    if not sample:
        return scores.argmax(-1)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


class _Reader:
    """Feeds tokens to the model, each once, and gives the scores of what follows them."""

    def __init__(self, model: Any, prompt: Prompt, length: int) -> None:
        self._model = model
        self._source, self._source_mask = prompt.source, prompt.source_mask
        self._mask = prompt.mask
        self._cache = model.new_cache(prompt.tokens.shape[0], length - 1)  # the last token is never read

    def scores(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: (rows, n), those not read before -> (rows, vocab)."""
        if self._source is not None:
            out = self._model(
                self._source, attention_mask=self._source_mask, decoder_input_ids=tokens, cache=self._cache
            )
            return out.logits[:, -1]
        mask, positions = self._mask, None
        if mask is not None:
            # Padding on the left takes no positions: a row means the same in a batch and alone.
            positions = (mask.cumsum(1) - 1).clamp_min_(0)[:, -tokens.shape[1] :]
            self._mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
        out = self._model(tokens, attention_mask=mask, position_ids=positions, cache=self._cache)
        return out.logits[:, -1]


def _without_padding(prompt: Prompt) -> torch.Tensor:
    """The prompt's tokens with its padding replaced by its last token, which is a real one."""
    if prompt.mask is None:
        return prompt.tokens
    return torch.where(prompt.mask.bool(), prompt.tokens, prompt.tokens[:, -1:])
