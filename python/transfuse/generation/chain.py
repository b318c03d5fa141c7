"""The processors that a configuration asks for, in transformers' order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from transfuse.generation import processors as p
from transfuse.generation.prompt import Ids, several
from transfuse.generation.settings import GenerationConfig


class Chain:
    """What happens to the scores of one generation; none of it where nothing was asked for.

    Args:
        settings: what was asked for.
        ids: the special tokens.
        prompt_length: how many of the tokens that a processor will see are the prompt's.
        budget: how many may follow them.
        source: (rows, source_length) what encoder_no_repeat_ngram_size looks at.
    """

    def __init__(
        self, settings: GenerationConfig, ids: Ids, prompt_length: int, budget: int, source: torch.Tensor
    ) -> None:
        s, ends, device = settings, ids.eos, source.device
        eos = torch.tensor(ends, dtype=torch.int64, device=device)
        self._source = source
        self._steps: list[p.Processor] = []
        add = self._steps.append
        if s.repetition_penalty != 1.0:
            add(partial(p.penalize_repetition, penalty=float(s.repetition_penalty)))
        if s.no_repeat_ngram_size:
            add(partial(p.forbid_repeats, size=s.no_repeat_ngram_size))
        if s.encoder_no_repeat_ngram_size:
            size = s.encoder_no_repeat_ngram_size
            add(lambda scores, tokens: p.forbid_repeats(scores, tokens, size, self._source))
        if words := [word for word in s.bad_words_ids if not (len(word) == 1 and word[0] in ends)]:
            add(partial(p.forbid_words, words=p.by_length(words, device)))
        if s.min_new_tokens and ends:
            shortest = prompt_length + s.min_new_tokens
            add(lambda scores, tokens: p.forbid(scores, eos) if tokens.shape[1] < shortest else scores)
        elif s.min_length and ends:
            add(partial(_forbid_below, token_ids=eos, length=s.min_length))
        if s.forced_bos_token_id is not None:
            bos = torch.tensor([s.forced_bos_token_id], device=device)
            add(partial(_force_first, token_ids=bos))
        if forced := several(s.forced_eos_token_id):
            last = torch.tensor(forced, device=device)
            longest = prompt_length + budget - 1
            add(lambda scores, tokens: p.force(scores, last) if tokens.shape[1] == longest else scores)
        if s.samples:
            # A beam search that draws needs a token besides those that end the text.
            self._steps += _filters(s, least=1 if s.num_beams == 1 else 1 + max(1, len(ends)))

    def __call__(self, scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """scores: (rows, vocab); tokens: (rows, length) so far, -1 where there is padding."""
        for step in self._steps:
            scores = step(scores, tokens)
        return scores

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone."""
        self._source = self._source[rows]


def _filters(s: GenerationConfig, least: int) -> list[p.Processor]:
    chain: list[p.Processor] = []
    if s.temperature not in (None, 1.0):
        chain.append(_of_scores(partial(p.scale_temperature, temperature=s.temperature)))
    if s.top_k is not None:
        chain.append(_of_scores(partial(p.keep_top_k, top_k=s.top_k, least=least)))
    rest: list[Callable[[torch.Tensor], torch.Tensor]] = []
    if s.top_p is not None and s.top_p < 1.0:
        rest.append(partial(p.keep_top_p, top_p=s.top_p, least=least))
    if s.min_p:
        rest.append(partial(p.keep_min_p, min_p=s.min_p, least=least))
    if s.typical_p is not None and s.typical_p < 1.0:
        rest.append(partial(p.keep_typical, typical_p=s.typical_p, least=least))
    if rest and s.top_k is not None:
        chain.append(lambda scores, tokens: p.among_candidates(scores, partial(_all_of, functions=rest)))
    else:
        chain += [_of_scores(function) for function in rest]
    return chain


def _all_of(scores: torch.Tensor, functions: list[Callable[[torch.Tensor], torch.Tensor]]) -> torch.Tensor:
    for function in functions:
        scores = function(scores)
    return scores


def _of_scores(function: Callable[[torch.Tensor], torch.Tensor]) -> p.Processor:
    return lambda scores, tokens: function(scores)


def _forbid_below(scores: torch.Tensor, tokens: torch.Tensor, token_ids: torch.Tensor, length: int) -> torch.Tensor:
    """Remove the tokens in rows that hold fewer than ``length``, padding not counted."""
    short = (tokens >= 0).sum(1, keepdim=True) < length
    return torch.where(short, p.forbid(scores, token_ids), scores)


def _force_first(scores: torch.Tensor, tokens: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Leave nothing but the tokens in rows that hold one token so far."""
    first = (tokens[:, :-1] < 0).all(1, keepdim=True)
    return torch.where(first, p.force(scores, token_ids), scores)
