"""The loop: read, process, choose, append; for decoders and encoder-decoders, plain and with guessed tokens, alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from transfuse.errors import ArgumentError
from transfuse.generation.chain import Chain
from transfuse.generation.prompt import Ids, Prompt
from transfuse.generation.reader import Reader, evaluating
from transfuse.generation.settings import GenerationConfig
from transfuse.generation.speculative import make_drafter
from transfuse.generation.stopping import Ends

__all__ = ["check_scores", "choose", "decode", "evaluating"]


@torch.no_grad()
def decode(
    model: Any,
    prompt: Prompt,
    settings: GenerationConfig,
    ids: Ids,
    ends: Ends,
    generator: torch.Generator | None,
    assistant: Any = None,
    scored: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Yield each step's tokens (rows,), ``ids.pad`` for rows that have ended, until all have or the budget is spent.

    With each come the tokens' log-probabilities (rows,), NaN for rows that have ended, if ``scored``.

    An assistant's guesses, or prompt lookup's, are read together with the newest token; every one that is what would
    have been chosen anyway saves a step. So the text is that of the plain loop, drawn or not: the same choices in the
    same order.
    """
    copies, length = settings.num_return_sequences, prompt.tokens.shape[1]
    drafter = make_drafter(model, assistant, prompt, settings, ids)
    reader = Reader(model, prompt, copies, needs=("crop",) if drafter else ())
    logits = reader.begin()  # (rows, 1, vocab)
    chain = Chain(settings, ids, length, prompt.budget, reader.encoder_tokens())
    history = prompt.history().repeat_interleave(copies, 0)  # (rows, length so far)
    draft = history[:, :0]  # (rows, guesses)
    rows = _Rows(history.shape[0], history.device)
    while True:
        for i in range(draft.shape[1] + 1):
            scores = rows.quieted(chain(logits[:, i], history))
            tokens = choose(scores, settings.samples, generator)
            found = scores.log_softmax(-1).gather(-1, tokens[:, None])[:, 0] if scored else None
            yield rows.padded(tokens, ids.pad), None if found is None else rows.padded(found, float("nan"))
            history = torch.cat([history, tokens[:, None]], 1)
            made = history.shape[1] - length
            if made == prompt.budget or (ends and rows.end(ends.reached(history, made))):
                return
            kept = rows.worth_keeping()
            if kept is not None or i == draft.shape[1] or not rows.agree(tokens, draft[:, i]):
                break
        reader.crop(history.shape[1] - 1)
        if kept is not None and reader.keep(kept):
            for part in (rows, chain, drafter):
                if part is not None:
                    part.keep(kept)
            history = history[kept]
        draft = drafter.guess(history, prompt.budget - made - 1) if drafter else history[:, :0]
        logits = reader.read(torch.cat([history[:, reader.length :], draft], 1))


def choose(scores: torch.Tensor, sample: bool, generator: torch.Generator | None) -> torch.Tensor:
    """The next token of each row, (rows,), from processed scores (rows, vocab): drawn, or the likeliest.

    Raises:
        ArgumentError: a row's highest score is NaN or infinite, so that no token means anything.
    """
    highest, likeliest = scores.max(-1)
    check_scores(highest)
    if not sample:
        return likeliest
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


def check_scores(highest: torch.Tensor) -> None:
    """Raises ArgumentError unless the highest processed score of every row is a finite number."""
    if bool(highest.isfinite().all()):
        return
    worst = float(highest[~highest.isfinite()][0])
    if worst == float("-inf"):
        raise ArgumentError(
            "generate: some token must remain, but bad_words_ids, no_repeat_ngram_size or min_new_tokens leave none"
        )
    raise ArgumentError(
        f"generate: the model's scores must be finite, got {worst}; the weights are damaged, or too large for this "
        "dtype (float16 ends at 65504: take bfloat16 or float32) or for repetition_penalty"
    )


class _Rows:
    """Which rows still run. Ended ones go on as padding until half of the batch has ended, and then leave it."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._total = self._count = count
        self._running = torch.ones(count, dtype=torch.bool, device=device)  # (rows in the batch,)
        self._numbers: torch.Tensor | None = None  # (rows in the batch,) which row each is; None: all are there

    def padded(self, values: torch.Tensor, fill: float) -> torch.Tensor:
        """A step's values (rows in the batch,) as (all rows,), with ``fill`` in those that have ended."""
        values = values.masked_fill(~self._running, fill)
        if self._numbers is None:
            return values
        return values.new_full((self._total,), fill).index_copy_(0, self._numbers, values)

    def quieted(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores that cannot fail in rows that have ended: what they would say next is of no interest."""
        return scores if self._count == self._running.shape[0] else scores.masked_fill(~self._running[:, None], 0.0)

    def agree(self, tokens: torch.Tensor, guesses: torch.Tensor) -> bool:
        """Whether every running row's token was guessed right."""
        return bool(((tokens == guesses) | ~self._running).all())

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
