"""Rotary positions as formulas, in any precision: the specification.

With half = rotary_dim / 2, for every pair of head dimensions i and i + half, i < half:

    y_i      = x_i      cos_i      + x_{i+half} sin_i
    y_{i+half} = x_{i+half} cos_{i+half} + x_i      sin_{i+half}

and y = x beyond rotary_dim. For positions cos_i = cos_{i+half} = cos a and -sin_i = sin_{i+half} = sin a: a turn by a.
"""

from __future__ import annotations

import torch


def rotary_embedding(
    q: torch.Tensor,  # (batch, length, heads, head_dim)
    k: torch.Tensor | None,  # (batch, length, kv_heads, head_dim)
    cos: torch.Tensor,  # (batch|1, length, 1, rotary_dim)
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q and k, turned, in their own dtype."""
    return _turned(q, cos, sin), None if k is None else _turned(k, cos, sin)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    dim = cos.shape[-1]
    half = dim // 2
    low, high, rest = x[..., :half], x[..., half:dim], x[..., dim:]
    turned_low = low * cos[..., :half] + high * sin[..., :half]
    turned_high = high * cos[..., half:] + low * sin[..., half:]
    return torch.cat((turned_low.to(x.dtype), turned_high.to(x.dtype), rest), -1)


def cache_append(
    k: torch.Tensor,  # (batch, kv_heads, new, head_dim)
    v: torch.Tensor,  # (batch, kv_heads, new, v_head_dim)
    k_cache: torch.Tensor,  # (batch, kv_heads, max_length, head_dim), written
    v_cache: torch.Tensor,  # (batch, kv_heads, max_length, v_head_dim), written
    start: int | torch.Tensor,
) -> None:
    """Row after row, what fits."""
    batch, _, new, _ = k.shape
    starts = start.tolist() if isinstance(start, torch.Tensor) else [start] * batch
    for b, first in enumerate(starts):
        for i in range(new):
            if 0 <= first + i < k_cache.shape[2]:
                k_cache[b, :, first + i] = k[b, :, i]
                v_cache[b, :, first + i] = v[b, :, i]


def rotary_append(
    q: torch.Tensor,  # (batch, new, heads, head_dim)
    k: torch.Tensor,  # (batch, new, kv_heads, head_dim)
    v: torch.Tensor,  # (batch, new, kv_heads, v_head_dim)
    cos: torch.Tensor,  # (batch|1, new, 1, rotary_dim)
    sin: torch.Tensor,
    k_cache: torch.Tensor,  # (batch, kv_heads, max_length, head_dim), written
    v_cache: torch.Tensor,  # (batch, kv_heads, max_length, v_head_dim), written
    start: int | torch.Tensor,
) -> torch.Tensor:
    """q turned; k turned and v behind ``start``."""
    cache_append(_turned(k, cos, sin).transpose(1, 2), v.transpose(1, 2), k_cache, v_cache, start)
    return _turned(q, cos, sin)
