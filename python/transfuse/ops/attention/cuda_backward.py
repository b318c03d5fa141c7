"""Attention's backward on the CUDA kernels of ``csrc/attention``: what surrounds their one launcher."""

from __future__ import annotations

import torch

from transfuse import _extension
from transfuse.ops.attention.cuda_arguments import aligned, shaping
from transfuse.ops.attention.kernels import Rows
from transfuse.ops.attention.torch_chunks import Gradients
from transfuse.ops.attention.variant import Variant

_TILE_M, _TILE_N = 64, 32
"""The tiles of scores that splits of a bias gradient are counted in."""
_BLOCKS = 512
"""Splits go on until about so many blocks run: four for each multiprocessor of the largest devices."""
_SHORTEST_RUN = 4
"""Tiles of scores that a split should at least add up: each split's partial is written and read once more."""
_PARTIAL_ROWS = 32
"""The fewest queries of a tile, which has a partial sum of the gradients of slopes and sinks."""


def backward(
    dout: torch.Tensor,  # like out
    dlse: torch.Tensor | None,  # like lse
    q: torch.Tensor,  # (batch, heads, q_len, head_dim); packed rows: (1, heads, total_q, head_dim)
    k: torch.Tensor,  # (batch, kv_heads, k_len, head_dim), likewise
    v: torch.Tensor,  # (batch, kv_heads, k_len, v_head_dim), likewise
    out: torch.Tensor,  # (batch, heads, q_len, v_head_dim), likewise
    lse: torch.Tensor,  # (batch, heads, q_len), likewise
    variant: Variant,
    seed: torch.Tensor | None,
    want: tuple[bool, bool, bool],
    rows: Rows,
) -> Gradients:
    """(dq, dk, dv, dbias, dalibi_slopes, dsinks), the last three where they are wanted."""
    bias, slopes, sinks = (t if w else None for t, w in zip(variant[1:4], want, strict=True))
    batch, heads = q.shape[0] if rows.q_starts is None else rows.q_starts.shape[0] - 1, q.shape[1]
    if batch * heads * rows.max_q == 0:
        return tuple(None if t is None else _zeros(t) for t in (q, k, v, bias, slopes, sinks))  # type: ignore[return-value]
    widths = q.shape[3], k.shape[3], v.shape[3]
    q, k, v, out, dout = (aligned(t) for t in (q, k, v, out, dout))
    dq, dk, dv = (_gradient_of(t, rows) for t in (q, k, v))
    statistics = q.new_empty(*q.shape[:3], 2, dtype=torch.float32)
    tiles = (batch, heads, -(-rows.max_q // _PARTIAL_ROWS), 1)
    dslopes, dsinks = (None if t is None else q.new_zeros(tiles, dtype=torch.float32) for t in (slopes, sinks))
    dbias, partial = _bias_gradient(bias, variant, batch, heads, rows)
    arguments, held = shaping(variant, seed, rows, q.device)
    dlse = None if dlse is None else dlse[..., None]
    written = dbias if rows.max_k else None  # without keys it is zeros already
    tensors = (q, k, v, out, lse[..., None], dout, dlse, statistics, dq, dk, dv, written, partial, dslopes, dsinks)
    _extension.kernels().attention_backward(*(_extension.view(t) for t in tensors), *arguments)
    del held
    if bias is not None and partial is not None:
        dbias = partial[0] if partial.shape[0] == 1 else partial.sum(0).to(bias.dtype)
    if slopes is not None and dslopes is not None:
        dslopes = dslopes.sum((2, 3)).sum_to_size(slopes.shape).to(slopes.dtype)
    if sinks is not None and dsinks is not None:
        dsinks = dsinks.sum((0, 2, 3)).to(sinks.dtype)
    dq, dk, dv = (t if t.shape[3] == w else t[..., :w] for t, w in zip((dq, dk, dv), widths, strict=True))
    return dq, dk, dv, dbias, dslopes, dsinks


def _bias_gradient(
    bias: torch.Tensor | None, variant: Variant, batch: int, heads: int, rows: Rows
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(the gradient of a bias of each score's own, partials (splits, *bias.shape) of any other), to be written."""
    if bias is None:
        return None, None
    if rows.max_k == 0 or bias.numel() == 0:
        return _zeros(bias), None
    if bias.shape == (batch, heads, rows.max_q, rows.max_k):
        unlimited = variant.left < 0 and variant.right < 0 and all(t is None for t in rows[2:])
        return (torch.empty_like(bias, memory_format=torch.contiguous_format) if unlimited else _zeros(bias)), None
    q_tiles, k_tiles = -(-rows.max_q // _TILE_M), -(-rows.max_k // _TILE_N)
    owners = (q_tiles if bias.shape[2] > 1 else 1) * (k_tiles if bias.shape[3] > 1 else 1)
    owners *= bias.shape[0] * bias.shape[1]
    looped = batch * heads * q_tiles * k_tiles // owners
    splits = max(1, min(_BLOCKS // owners, looped // _SHORTEST_RUN))
    dtype = bias.dtype if splits == 1 else torch.float32
    return None, torch.empty(splits, *bias.shape, dtype=dtype, device=bias.device)


def _gradient_of(t: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Where t's gradient goes: packed rows in memory as they came in, zero if some may belong to no sequence."""
    if rows.q_starts is None:
        return torch.empty_like(t, memory_format=torch.contiguous_format)
    return t.new_zeros(t.shape[2], t.shape[1], t.shape[3]).transpose(0, 1)[None]


def _zeros(t: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(t, memory_format=torch.contiguous_format)
