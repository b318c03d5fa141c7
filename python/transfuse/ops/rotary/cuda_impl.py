"""Rotary positions and the cache's write on the CUDA kernel of ``csrc/rotary``, which does either or both at once."""

from __future__ import annotations

import torch

from transfuse import _extension
from transfuse.ops import _validate


def why_not(op: str, *tensors: torch.Tensor) -> str | None:
    """Why the kernel cannot take these (validated) tensors, with the remedy, or None."""
    return _validate.beyond_kernels("cuda", *tensors)


def rotary_embedding(
    q: torch.Tensor,  # (batch, length, heads, head_dim)
    k: torch.Tensor | None,  # (batch, length, kv_heads, head_dim)
    cos: torch.Tensor,  # (batch|1, length, 1, rotary_dim)
    sin: torch.Tensor,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q and k, turned (back, with ``inverse``), contiguous."""
    q_out = q.new_empty(q.shape)
    if k is None:  # any heads go where those of k would
        _launch(None, q, None, cos, sin, None, q_out, None, 0, inverse)
        return q_out, None
    k_out = k.new_empty(k.shape)
    _launch(q, k, None, cos, sin, q_out, k_out, None, 0, inverse)
    return q_out, k_out


def cache_append(
    k: torch.Tensor,  # (batch, kv_heads, new, head_dim)
    v: torch.Tensor,  # (batch, kv_heads, new, v_head_dim)
    k_cache: torch.Tensor,  # (batch, kv_heads, max_length, head_dim), written
    v_cache: torch.Tensor,  # (batch, kv_heads, max_length, v_head_dim), written
    start: int | torch.Tensor,  # or (batch,)
) -> None:
    """Writes k and v behind ``start``, read on the device where it is a tensor."""
    k, v, k_cache, v_cache = (t.transpose(1, 2) for t in (k, v, k_cache, v_cache))  # token by token
    if k.dtype == v.dtype:
        _launch(None, k, v, None, None, None, k_cache, v_cache, start)
    else:
        _launch(None, k, None, None, None, None, k_cache, None, start)
        _launch(None, v, None, None, None, None, v_cache, None, start)


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
    """q turned, contiguous; k turned and v go into the caches."""
    q_out = q.new_empty(q.shape)
    _launch(q, k, v, cos, sin, q_out, k_cache.transpose(1, 2), v_cache.transpose(1, 2), start)
    return q_out


def _launch(
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    q_out: torch.Tensor | None,
    k_out: torch.Tensor,
    v_out: torch.Tensor | None,
    start: int | torch.Tensor,
    inverse: bool = False,
) -> None:
    view = _extension.view
    starts, place = (start, 0) if isinstance(start, torch.Tensor) else (None, start)
    inputs = (view(q), view(k), view(v), view(cos), view(sin))
    outputs = (view(q_out), view(k_out), view(v_out))
    target = _extension.target(k.device)
    _extension.kernels().rotary_append(*inputs, *outputs, view(starts), place, inverse, target)
