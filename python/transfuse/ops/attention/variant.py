"""What an attention call asks for beyond q, k and v, and which keys that lets each query see.

The public functions turn their arguments into one :class:`Variant`; every implementation reads it. The registered ops
carry the same fields, flattened in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Variant(NamedTuple):
    """Everything that shapes the scores and the output of one call.

    The score of query i and key j is ``softcap(scale * q_i.k_j) + bias - slope * |p_i - j|`` with p_i the query's
    position among the keys, and -inf where the mask is False or j lies outside ``[p_i - left, p_i + right]``.
    """

    mask: torch.Tensor | None = None
    """bool, (batch|1, heads|1, q_len|1, k_len|1), True = attend."""
    bias: torch.Tensor | None = None
    """floating, (batch|1, heads|1, q_len|1, k_len|1)."""
    alibi_slopes: torch.Tensor | None = None
    """(heads,) or (batch, heads)."""
    sinks: torch.Tensor | None = None
    """(heads,): one more logit in every row's denominator, with no value."""
    scale: float = 1.0
    left: int = -1
    """How many keys before p_i are visible, -1 for all."""
    right: int = -1
    """How many keys after p_i are visible, -1 for all. Causal attention is right = 0."""
    first: int | None = 0
    """p_0, with p_i = p_0 + i; None for k_len - q_len: the last query stands at the last key."""
    softcap: float = 0.0
    """0 means none."""
    dropout_p: float = 0.0
    deterministic: bool = False


def statistics_dtype(q: torch.Tensor) -> torch.dtype:
    """The dtype of scores' statistics and of lse."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def shift(variant: Variant, q_len: int, k_len: int) -> int:
    """p_0: where the first query stands among the keys."""
    return k_len - q_len if variant.first is None else variant.first


def unlimited(variant: Variant, q_len: int, k_len: int) -> bool:
    """Whether every query may see every key as far as positions go."""
    first = shift(variant, q_len, k_len)
    past = variant.left < 0 or variant.left >= first + q_len - 1
    future = variant.right < 0 or variant.right >= k_len - 1 - first
    return past and future


def visible(q_positions: torch.Tensor, k_positions: torch.Tensor, left: int, right: int) -> torch.Tensor:
    """bool (..., q_len, k_len): key inside the query's window; positions are (..., q_len) and (..., k_len)."""
    distance = k_positions[..., None, :] - q_positions[..., :, None]
    seen = torch.ones_like(distance, dtype=torch.bool) if right < 0 else distance <= right
    return seen if left < 0 else seen & (distance >= -left)


def visible_block(
    variant: Variant, q_len: int, k_len: int, rows: tuple[int, int], columns: tuple[int, int], device: torch.device
) -> torch.Tensor | None:
    """The window as a bool block (rows, columns), or None where it hides nothing there."""
    first = shift(variant, q_len, k_len)
    nearest, farthest = columns[0] - (first + rows[1] - 1), columns[1] - 1 - (first + rows[0])
    if (variant.left < 0 or nearest >= -variant.left) and (variant.right < 0 or farthest <= variant.right):
        return None
    q_positions = torch.arange(first + rows[0], first + rows[1], device=device)
    return visible(q_positions, torch.arange(*columns, device=device), variant.left, variant.right)


def visible_columns(variant: Variant, q_len: int, k_len: int, rows: tuple[int, int]) -> tuple[int, int]:
    """The range of keys outside which these rows see nothing."""
    first = shift(variant, q_len, k_len)
    low = 0 if variant.left < 0 else min(max(first + rows[0] - variant.left, 0), k_len)
    high = k_len if variant.right < 0 else min(max(first + rows[1] + variant.right, 0), k_len)
    return low, max(low, high)


def distances(q_positions: torch.Tensor, k_positions: torch.Tensor) -> torch.Tensor:
    """|p_i - j|, (..., q_len, k_len), that ALiBi multiplies by its slopes."""
    return (k_positions[..., None, :] - q_positions[..., :, None]).abs()


def per_head(slopes: torch.Tensor) -> torch.Tensor:
    """(heads,) or (batch, heads) -> (batch|1, heads, 1, 1)."""
    return slopes[None, :, None, None] if slopes.dim() == 1 else slopes[:, :, None, None]


def rows_of(variant: Variant, rows: slice, q_len: int, k_len: int) -> Variant:
    """The variant of these batch rows alone, their mask and bias cut to q_len rows and k_len columns."""
    slopes = variant.alibi_slopes
    return variant._replace(
        mask=corner(variant.mask, rows, q_len, k_len),
        bias=corner(variant.bias, rows, q_len, k_len),
        alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[rows],
    )


def corner(t: torch.Tensor | None, rows: slice, q_len: int, k_len: int) -> torch.Tensor | None:
    """These batch rows of (batch|1, heads|1, max_q|1, max_k|1), cut to (·, heads|1, q_len|1, k_len|1)."""
    if t is None:
        return None
    some = t if t.shape[0] == 1 else t[rows]
    return some[:, :, : q_len if t.shape[2] > 1 else 1, : k_len if t.shape[3] > 1 else 1]
