"""What may happen to the scores between the model and the choice of the next token: small pure functions.

Each takes scores (batch, vocab) in fp32 and returns new ones; a token is removed by a score of -inf. The names and
the meaning of every knob are those of transformers' GenerationConfig. :func:`compose` puts them in transformers' order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from transfuse.generation.settings import Settings

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(scores (batch, vocab), tokens so far (batch, length)) -> scores."""

NEG_INF = float("-inf")


def scale_temperature(scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Divide by the temperature: below 1 sharpens the distribution, above 1 flattens it.

    >>> scale_temperature(torch.tensor([[1.0, 2.0]]), 0.5)
    tensor([[2., 4.]])
    """
    # Beyond these nothing changes any more, but fp32 would overflow.
    return scores / min(max(temperature, 1e-30), 1e30)


def keep_top_k(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """Keep the top_k highest scores of each row, and whatever ties with the last of them.

    >>> keep_top_k(torch.tensor([[1.0, 3.0, 2.0, 2.0]]), 2)
    tensor([[-inf, 3., 2., 2.]])
    """
    least = scores.topk(min(top_k, scores.shape[-1]), dim=-1).values[:, -1:]
    return scores.masked_fill(scores < least, NEG_INF)


def keep_top_p(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the smallest set of most likely tokens whose probability reaches top_p (Holtzman et al. 2019, nucleus).

    >>> keep_top_p(torch.tensor([[0.1, 0.2, 0.7]]).log(), 0.8).exp()
    tensor([[0.0000, 0.2000, 0.7000]])
    """
    ascending, order = scores.sort(dim=-1)
    remove = ascending.softmax(-1).cumsum(-1) <= 1.0 - top_p
    remove[:, -1] = False
    return scores.masked_fill(torch.empty_like(remove).scatter_(-1, order, remove), NEG_INF)


def keep_min_p(scores: torch.Tensor, min_p: float) -> torch.Tensor:
    """Keep tokens at least min_p times as likely as the likeliest one (Nguyen et al. 2024).

    >>> keep_min_p(torch.tensor([[0.1, 0.2, 0.7]]).log(), 0.2).exp()
    tensor([[0.0000, 0.2000, 0.7000]])
    """
    probabilities = scores.softmax(-1)
    most, likeliest = probabilities.max(-1, keepdim=True)
    remove = (probabilities < min_p * most).scatter_(-1, likeliest, False)
    return scores.masked_fill(remove, NEG_INF)


def penalize_repetition(scores: torch.Tensor, tokens: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make every token of ``tokens`` (batch, length) less likely: a positive score is divided, a negative multiplied.

    From Keskar et al. 2019 (CTRL); once for a token, however often it occurred.

    >>> penalize_repetition(torch.tensor([[4.0, -4.0, 4.0]]), torch.tensor([[0, 1, 1]]), 2.0)
    tensor([[ 2., -8.,  4.]])
    """
    seen = scores.gather(-1, tokens)
    return scores.scatter(-1, tokens, torch.where(seen < 0, seen * penalty, seen / penalty))


def forbid(scores: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Remove the tokens (n,) in every row.

    >>> forbid(torch.tensor([[1.0, 2.0]]), torch.tensor([1]))
    tensor([[1., -inf]])
    """
    return scores.index_fill(-1, token_ids, NEG_INF)


def compose(settings: Settings, eos: torch.Tensor, prompt_length: int) -> list[Processor]:
    """The processors that the settings ask for, in transformers' order; none that would change nothing.

    Args:
        settings: what was asked for.
        eos: (n,) the ids that end a sequence.
        prompt_length: how many of the tokens that a processor will see are the prompt's.
    """
    s = settings
    chain: list[Processor] = []
    if s.repetition_penalty != 1.0:
        chain.append(partial(penalize_repetition, penalty=s.repetition_penalty))
    if s.min_new_tokens > 0 and eos.numel():
        shortest = prompt_length + s.min_new_tokens
        chain.append(lambda scores, tokens: forbid(scores, eos) if tokens.shape[1] < shortest else scores)
    if s.samples:
        chain += [_without_tokens(f) for f in _filters(s)]
    return chain


def _filters(s: Settings) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    chain: list[Callable[[torch.Tensor], torch.Tensor]] = []
    if s.temperature not in (None, 1.0):
        chain.append(partial(scale_temperature, temperature=s.temperature))
    if s.top_k is not None:
        chain.append(partial(keep_top_k, top_k=s.top_k))
    if s.top_p is not None and s.top_p < 1.0:
        chain.append(partial(keep_top_p, top_p=s.top_p))
    if s.min_p:
        chain.append(partial(keep_min_p, min_p=s.min_p))
    return chain


def _without_tokens(function: Callable[[torch.Tensor], torch.Tensor]) -> Processor:
    return lambda scores, tokens: function(scores)
