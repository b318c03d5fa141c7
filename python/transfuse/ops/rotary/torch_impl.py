"""Rotary positions and the cache's write in plain PyTorch: the CPU default."""

from __future__ import annotations

import torch


def rotary_embedding(
    q: torch.Tensor,  # (batch, length, heads, head_dim)
    k: torch.Tensor | None,  # (batch, length, kv_heads, head_dim)
    cos: torch.Tensor,  # (batch|1, length, 1, rotary_dim)
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q and k, turned, in their own dtype."""
    turned_q = turned(q, cos, sin)
    turned_k = None if k is None else turned(k, cos, sin)
    if turned_q.dtype != q.dtype:  # low-precision heads, fp32 angles
        turned_q = turned_q.to(q.dtype)
        turned_k = turned_k if turned_k is None or k is None else turned_k.to(k.dtype)
    return turned_q, turned_k


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x with its leading ``cos.shape[-1]`` dimensions turned, in the dtype that x and cos promote to."""
    dim = cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat((turned(x[..., :dim], cos, sin), x[..., dim:]), dim=-1)
    return torch.addcmul(x * cos, x.roll(dim // 2, -1), sin)


def transposed(sin: torch.Tensor) -> torch.Tensor:
    """The sines of the transposed map, which for a turn is the turn back."""
    return sin.roll(sin.shape[-1] // 2, -1)


def cache_append(
    k: torch.Tensor,  # (batch, kv_heads, new, head_dim)
    v: torch.Tensor,  # (batch, kv_heads, new, v_head_dim)
    k_cache: torch.Tensor,  # (batch, kv_heads, max_length, head_dim), written
    v_cache: torch.Tensor,  # (batch, kv_heads, max_length, v_head_dim), written
    start: int | torch.Tensor,  # or (batch,)
) -> None:
    """Writes k and v behind ``start``."""
    if not isinstance(start, torch.Tensor):
        write_at(k, v, k_cache, v_cache, start)
        return
    position = start[:, None] + torch.arange(k.shape[2], device=k.device)  # (batch, new)
    row = torch.arange(k.shape[0], device=k.device)[:, None]
    k_cache[row, :, position] = k.transpose(1, 2).to(k_cache.dtype)
    v_cache[row, :, position] = v.transpose(1, 2).to(v_cache.dtype)


def rotary_append(
    q: torch.Tensor,  # (batch, new, heads, head_dim)
    k: torch.Tensor,  # (batch, new, kv_heads, head_dim)
    v: torch.Tensor,  # (batch, new, kv_heads, v_head_dim)
    cos: torch.Tensor,  # (batch|1, new, 1, rotary_dim)
    sin: torch.Tensor,
    k_cache: torch.Tensor,  # (batch, kv_heads, max_length, head_dim), written
    v_cache: torch.Tensor,  # (batch, kv_heads, max_length, v_head_dim), written
    start: int | torch.Tensor,  # or (batch,)
) -> torch.Tensor:
    """q turned; k turned and v behind ``start``."""
    turned_q, turned_k = rotary_embedding(q, k, cos, sin)
    assert turned_k is not None
    cache_append(turned_k.transpose(1, 2), v.transpose(1, 2), k_cache, v_cache, start)
    return turned_q


def write_at(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, start: int) -> None:
    """:func:`cache_append` at one place."""
    stop = start + k.shape[2]
    k_cache[:, :, start:stop] = k
    v_cache[:, :, start:stop] = v
