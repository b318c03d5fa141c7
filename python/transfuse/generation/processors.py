"""What may happen to the scores between the model and the choice of the next token: small pure functions.

Each takes scores (rows, vocab) in fp32 and returns new ones; a token is removed by a score of -inf. The names and the
meaning of every knob are those of transformers' GenerationConfig. :mod:`transfuse.generation.chain` strings them
together. Tokens are (rows, length), -1 where a row is padded: padding neither repeats nor matches anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(scores (rows, vocab), tokens so far (rows, length)) -> scores."""

NEG_INF = float("-inf")


def scale_temperature(scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Divide by the temperature: below 1 sharpens the distribution, above 1 flattens it.

    >>> scale_temperature(torch.tensor([[1.0, 2.0]]), 0.5)
    tensor([[2., 4.]])
    """
    # Beyond these nothing changes any more, but fp32 would overflow.
    return scores / float(min(max(temperature, 1e-30), 1e30))


def keep_top_k(scores: torch.Tensor, top_k: int, least: int = 1) -> torch.Tensor:
    """Keep the top_k highest scores of each row, and whatever ties with the last of them; ``least`` at least.

    >>> keep_top_k(torch.tensor([[1.0, 3.0, 2.0, 2.0]]), 2)
    tensor([[-inf, 3., 2., 2.]])
    """
    lowest = scores.topk(min(max(top_k, least), scores.shape[-1]), dim=-1).values[:, -1:]
    return scores.masked_fill(scores < lowest, NEG_INF)


def keep_top_p(scores: torch.Tensor, top_p: float, least: int = 1) -> torch.Tensor:
    """Keep the smallest set of most likely tokens whose probability reaches top_p (Holtzman et al. 2019, nucleus).

    >>> keep_top_p(torch.tensor([[0.1, 0.2, 0.7]]).log(), 0.8).exp()
    tensor([[0.0000, 0.2000, 0.7000]])
    """
    ascending, order = scores.sort(dim=-1)
    remove = ascending.softmax(-1).cumsum(-1) <= 1.0 - top_p
    remove[:, -least:] = False
    return scores.masked_fill(torch.empty_like(remove).scatter_(-1, order, remove), NEG_INF)


def keep_min_p(scores: torch.Tensor, min_p: float, least: int = 1) -> torch.Tensor:
    """Keep tokens at least min_p times as likely as the likeliest one (Nguyen et al. 2024).

    >>> keep_min_p(torch.tensor([[0.1, 0.2, 0.7]]).log(), 0.2).exp()
    tensor([[0.0000, 0.2000, 0.7000]])
    """
    probabilities = scores.softmax(-1)
    likeliest = probabilities.topk(min(least, scores.shape[-1]), dim=-1)
    remove = (probabilities < min_p * likeliest.values[:, :1]).scatter_(-1, likeliest.indices, False)
    return scores.masked_fill(remove, NEG_INF)


def keep_typical(scores: torch.Tensor, typical_p: float, least: int = 1) -> torch.Tensor:
    """Keep the tokens whose surprise, -log p, is nearest to its mean, until they reach typical_p (Meister et al. 2022).

    >>> keep_typical(torch.tensor([[0.1, 0.3, 0.6]]).log(), 0.25).exp()
    tensor([[0.0000, 0.3000, 0.0000]])
    """
    log_p = scores.log_softmax(-1)
    entropy = -(log_p * log_p.exp()).nansum(-1, keepdim=True)  # 0 * -inf: a removed token adds nothing
    strangeness = (log_p + entropy).abs()
    ordered, order = strangeness.sort(dim=-1)
    before = scores.gather(-1, order).softmax(-1).cumsum(-1) < typical_p
    last = before.sum(-1, keepdim=True).clamp_max_(scores.shape[-1] - 1)
    remove = (strangeness > ordered.gather(-1, last)).scatter_(-1, order[:, :least], False)
    return scores.masked_fill(remove, NEG_INF)


def among_candidates(scores: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Apply a function of scores to the tokens that are left alone: nothing sorts a vocabulary that top_k has cut.

    >>> among_candidates(torch.tensor([[1.0, NEG_INF, 3.0, NEG_INF, NEG_INF]]), lambda s: s * s.shape[-1])
    tensor([[2., -inf, 6., -inf, -inf]])
    """
    left = int((scores > NEG_INF).sum(-1).max())
    if not 0 < 2 * left < scores.shape[-1]:
        return function(scores)
    where = scores.topk(left, dim=-1).indices.sort(dim=-1).values
    return torch.full_like(scores, NEG_INF).scatter_(-1, where, function(scores.gather(-1, where)))


def penalize_repetition(scores: torch.Tensor, tokens: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make every token of ``tokens`` (rows, length) less likely: a positive score is divided, a negative multiplied.

    From Keskar et al. 2019 (CTRL); once for a token, however often it occurred.

    >>> penalize_repetition(torch.tensor([[4.0, -4.0, 4.0]]), torch.tensor([[-1, 0, 1, 1]]), 2.0)
    tensor([[ 2., -8.,  4.]])
    """
    tokens = torch.where(tokens < 0, tokens[:, -1:], tokens)  # the newest one is never padding
    seen = scores.gather(-1, tokens)
    return scores.scatter(-1, tokens, torch.where(seen < 0, seen * penalty, seen / penalty))


def forbid_repeats(
    scores: torch.Tensor, tokens: torch.Tensor, size: int, source: torch.Tensor | None = None
) -> torch.Tensor:
    """Remove every token that would complete ``size`` tokens in a row that occurred in ``tokens`` before.

    Args:
        scores: (rows, vocab).
        tokens: (rows, length).
        size: 1 forbids every token that occurred.
        source: (rows, source_length) where they must not have occurred instead.

    >>> forbid_repeats(torch.zeros(1, 3), torch.tensor([[0, 1, 2, 0]]), 2)
    tensor([[0., -inf, 0.]])
    """
    text = tokens if source is None else source
    if min(tokens.shape[1] + 1, text.shape[1]) < size:
        return scores
    begun = tokens[:, tokens.shape[1] - size + 1 :]  # (rows, size - 1)
    runs = text.unfold(1, size, 1)  # (rows, length - size + 1, size)
    repeats = (runs[..., :-1] == begun[:, None]).all(-1) & (runs >= 0).all(-1)
    return _remove(scores, runs[..., -1], repeats)


def by_length(words: Sequence[Sequence[int]], device: torch.device) -> list[torch.Tensor]:
    """The sequences of ids as tensors (n, length), one a length: what :func:`forbid_words` takes.

    >>> [t.tolist() for t in by_length([[3], [0, 1, 2], [4]], torch.device("cpu"))]
    [[[3], [4]], [[0, 1, 2]]]
    """
    lengths = dict.fromkeys(len(word) for word in words)
    return [torch.tensor([list(w) for w in words if len(w) == length], device=device) for length in lengths]


def forbid_words(scores: torch.Tensor, tokens: torch.Tensor, words: Sequence[torch.Tensor]) -> torch.Tensor:
    """Remove every token that would complete one of these sequences of ids, of :func:`by_length`.

    >>> words = by_length([[3], [0, 1, 2]], torch.device("cpu"))
    >>> forbid_words(torch.zeros(2, 4), torch.tensor([[0, 1], [1, 0]]), words)
    tensor([[0., 0., -inf, -inf],
            [0., 0., 0., -inf]])
    """
    for same in words:  # (n, length)
        start = tokens.shape[1] - same.shape[1] + 1
        if start >= 0:
            begun = (tokens[:, None, start:] == same[:, :-1]).all(-1)  # (rows, n)
            scores = _remove(scores, same[:, -1].expand_as(begun), begun)
    return scores


def _remove(scores: torch.Tensor, ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Remove the ids (rows, n) that ``where`` (rows, n) names; ids that the vocabulary lacks are nobody's."""
    vocabulary = scores.shape[-1]
    target = ids.where(where & (ids < vocabulary), vocabulary)  # the others: a column of their own, behind it
    remove = torch.zeros(scores.shape[0], vocabulary + 1, dtype=torch.bool, device=scores.device)
    return scores.masked_fill(remove.scatter_(-1, target, True)[:, :-1], NEG_INF)


def forbid(scores: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Remove the tokens (n,) in every row.

    >>> forbid(torch.tensor([[1.0, 2.0]]), torch.tensor([1]))
    tensor([[1., -inf]])
    """
    return scores.index_fill(-1, token_ids, NEG_INF)


def force(scores: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Leave nothing but the tokens (n,), all equally likely, in every row.

    >>> force(torch.tensor([[1.0, 2.0]]), torch.tensor([1]))
    tensor([[-inf, 0.]])
    """
    return torch.full_like(scores, NEG_INF).index_fill_(-1, token_ids, 0.0)
