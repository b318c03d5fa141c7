"""Beam search: several continuations of each prompt side by side, and the best texts that have ended."""

from __future__ import annotations

from typing import Any

import torch

from transfuse.generation.chain import Chain
from transfuse.generation.decode import check_scores
from transfuse.generation.prompt import Ids, Prompt
from transfuse.generation.reader import Reader
from transfuse.generation.results import Generated
from transfuse.generation.settings import GenerationConfig
from transfuse.generation.stopping import Ends

# The score of a beam that does not exist: finite, so that sums of it are numbers.
_NONE = -1.0e9


@torch.no_grad()
def beam_search(
    model: Any, prompt: Prompt, settings: GenerationConfig, ids: Ids, ends: Ends, generator: torch.Generator | None
) -> Generated:
    """The ``num_return_sequences`` best texts of each prompt, best first.

    A step extends every beam by every token and keeps the best of all these; those that end a text are put aside with
    their final score. The prompt is read once for all of its beams, and they share the encoder's output.
    """
    width, length = settings.num_beams, prompt.tokens.shape[1]
    reader = Reader(model, prompt, width, needs=("reorder", "widen"))
    logits = reader.begin()[:, -1]  # (rows * width, vocab)
    chain = Chain(settings, ids, length, prompt.budget, reader.encoder_tokens())
    beams = _Beams(prompt.history(), prompt.budget, settings, ids.pad)
    found: list[Generated | None] = [None] * prompt.tokens.shape[0]
    numbers = torch.arange(len(found))  # which prompt each row of the search is
    while True:
        scores = chain(logits.log_softmax(-1), beams.history.flatten(0, 1))
        check_scores(scores.unflatten(0, (-1, width)).amax((1, 2)))
        parents = beams.extend(scores.unflatten(0, (-1, width)), ends, generator)
        done = beams.done.cpu()
        if bool(done.all()) or beams.made == prompt.budget:
            break
        reader.reorder(parents)
        if 2 * int(done.sum()) >= done.shape[0]:
            kept = (~done).nonzero()[:, 0].to(parents.device)
            rows = (kept[:, None] * width + torch.arange(width, device=kept.device)).flatten()
            if reader.keep(rows):
                for row in done.nonzero()[:, 0].tolist():
                    found[int(numbers[row])] = beams.result(row)
                numbers = numbers[~done]
                beams.keep(kept)
                chain.keep(rows)
        logits = reader.read(beams.history.flatten(0, 1)[:, -1:])[:, -1]
    for row, number in enumerate(numbers.tolist()):
        found[number] = beams.result(row)
    return _together(prompt.tokens, [f for f in found if f is not None], ids.pad)


class _Beams:
    """The running beams of each row and its best ended texts. Of B rows, W beams and n new tokens so far."""

    def __init__(self, history: torch.Tensor, budget: int, settings: GenerationConfig, pad: int) -> None:
        rows, device, width = history.shape[0], history.device, settings.num_beams
        self._settings, self._budget, self._pad = settings, budget, pad
        self._length = history.shape[1]
        self.made = 0
        self.history = history[:, None].expand(-1, width, -1)  # (B, W, length + n): prompt and new tokens
        self._each = torch.zeros(rows, width, 0, device=device)  # (B, W, n): what each new token added to its beam
        self._running = torch.full((rows, width), _NONE, device=device)  # (B, W): log-probability of each beam
        self._running[:, 0] = 0.0  # they are all the same as yet, and only one counts
        self._best = torch.full((rows, width), _NONE, device=device)  # (B, W): final scores, best first
        self._ended = torch.zeros(rows, width, dtype=torch.bool, device=device)  # (B, W): whether there is a text
        self._texts = torch.full((rows, width, budget), pad, device=device)  # (B, W, budget)
        self._text_scores = torch.zeros(rows, width, budget, device=device)
        self._lengths = torch.zeros(rows, width, dtype=torch.int64, device=device)
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)  # (B,): nothing better can come

    def extend(self, scores: torch.Tensor, ends: Ends, generator: torch.Generator | None) -> torch.Tensor:
        """One token more; scores: (B, W, vocab) of each beam's next. Returns (B * W,): which beam each came from."""
        width, vocabulary = scores.shape[1:]
        totals = (scores + self._running[..., None]).flatten(1)  # (B, W * vocab)
        # Enough of them that W remain when others end.
        count = min((1 + max(1, len(ends.eos))) * width, totals.shape[1])
        if self._settings.samples:
            index = torch.multinomial(totals.softmax(-1), count, generator=generator)
            totals = totals.gather(1, index)
        else:
            totals, index = totals.topk(count, dim=1)
        parents, tokens = index // vocabulary, index % vocabulary  # (B, count)
        history = torch.cat([_take(self.history, parents), tokens[..., None]], 2)
        each = torch.cat([_take(self._each, parents), scores.flatten(1).gather(1, index)[..., None]], 2)
        self.made += 1
        ended = torch.ones_like(index, dtype=torch.bool)
        if self.made < self._budget:
            ended = ends.reached(history.flatten(0, 1), self.made).view_as(index)
        self._put_aside(totals, ended, history[..., self._length :], each)
        self._running, going = (totals + ended * _NONE).topk(width, dim=1)
        self.history, self._each = _take(history, going), _take(each, going)
        self._judge()
        first = torch.arange(index.shape[0], device=index.device)[:, None] * width
        return (parents.gather(1, going) + first).flatten()

    def _put_aside(self, totals: torch.Tensor, ended: torch.Tensor, texts: torch.Tensor, each: torch.Tensor) -> None:
        """Keep the W best of the ended texts and those (B, count) that end now among the W best candidates."""
        width = self._settings.num_beams
        new = ended[:, :width] & ~self.done[:, None]
        final = totals[:, :width] / self.made**self._settings.length_penalty
        merged = torch.cat([self._best, final.where(new, 2 * _NONE)], 1)  # (B, 2 W)
        self._best, which = merged.topk(width, dim=1)
        self._ended = torch.cat([self._ended, new], 1).gather(1, which)
        lengths = torch.full_like(new, self.made, dtype=torch.int64)
        self._lengths = torch.cat([self._lengths, lengths], 1).gather(1, which)
        self._texts = _take(torch.cat([self._texts, self._filled(texts, width, self._pad)], 1), which)
        self._text_scores = _take(torch.cat([self._text_scores, self._filled(each, width, 0.0)], 1), which)

    def _filled(self, values: torch.Tensor, width: int, fill: float) -> torch.Tensor:
        """(B, count, n) -> (B, W, budget), the first W of them."""
        return torch.nn.functional.pad(values[:, :width], (0, self._budget - values.shape[2]), value=fill)

    def _judge(self) -> None:
        """Note the rows in which no running beam is likely to become better than the worst text that has ended."""
        s = self._settings
        # What the best beam might score: if long texts are favoured and nothing may be missed, at its longest.
        length = self._budget if s.early_stopping == "never" and s.length_penalty > 0 else self.made
        possible = self._running[:, :1] / length**s.length_penalty
        worst = self._best.amin(1, keepdim=True).where(self._ended, _NONE)
        self.done = self.done | ~(possible > worst).any(1)
        if s.early_stopping is True:
            self.done = self.done | self._ended.all(1)

    def result(self, row: int) -> Generated:
        """The texts of one row, new tokens only."""
        n = self._settings.num_return_sequences
        most = int(self._lengths[row, :n].max())
        return Generated(self._texts[row, :n, :most], self._text_scores[row, :n, :most], self._best[row, :n])

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone."""
        for name in ("history", "_each", "_running", "_best", "_ended", "_texts", "_text_scores", "_lengths", "done"):
            setattr(self, name, getattr(self, name)[rows])


def _take(values: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """values (B, n, length), which (B, m) -> (B, m, length)."""
    return values.gather(1, which[..., None].expand(-1, -1, values.shape[2]))


def _together(prompts: torch.Tensor, found: list[Generated], pad: int) -> Generated:
    """The texts of all rows behind their prompts, filled to the longest."""
    most = max(f.sequences.shape[1] for f in found)

    def filled(values: torch.Tensor, fill: float) -> torch.Tensor:
        return torch.nn.functional.pad(values, (0, most - values.shape[1]), value=fill)

    new = torch.cat([filled(f.sequences, pad) for f in found])
    return Generated(
        torch.cat([prompts.repeat_interleave(new.shape[0] // len(found), 0), new], 1),
        torch.cat([filled(f.scores, 0.0) for f in found]),
        torch.cat([f.sequences_scores for f in found]),
    )
