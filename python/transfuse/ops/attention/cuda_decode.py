"""Few queries over many keys on the CUDA kernel of ``csrc/attention/decode``, and attention's probabilities."""

from __future__ import annotations

import functools

import torch

from transfuse import _extension
from transfuse.ops.attention.cuda_arguments import aligned, shaping
from transfuse.ops.attention.kernels import Rows
from transfuse.ops.attention.splits import choose_splits, fewest_tiles, most_keys_seen
from transfuse.ops.attention.variant import Variant

MOST_ROWS = 64
"""heads / kv_heads * q_len up to here go split; beyond, blocks of other queries fill the GPU."""
_BLOCK_ROWS = 16
_TILE = 64  # keys that a block takes at a time, where it has four warps
_SHARED = 73 << 10  # bytes that a block takes of its multiprocessor, at most


def decode_forward(
    q: torch.Tensor,  # (batch, heads, q_len, head_dim)
    k: torch.Tensor,  # (batch, kv_heads, k_len, head_dim)
    v: torch.Tensor,  # (batch, kv_heads, k_len, v_head_dim)
    variant: Variant,
    seed: torch.Tensor | None = None,
    cache_lengths: torch.Tensor | None = None,  # (batch,) int32 or int64: how many keys of each row count; None: all
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (batch, heads, q_len, v_head_dim), lse (batch, heads, q_len)), for up to MOST_ROWS rows a key head."""
    (batch, heads, q_len, _), v_dim = q.shape, v.shape[3]
    kv_heads, k_len = k.shape[1:3]
    if kv_heads == 0:
        return q.new_zeros(*q.shape[:3], v_dim), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    q, k, v = aligned(q), aligned(k), aligned(v)
    group_rows = heads // kv_heads * q_len
    programs = batch * kv_heads * -(-group_rows // _BLOCK_ROWS)
    key_tiles = -(-most_keys_seen(variant, q_len, k_len) // _TILE)
    splits = choose_splits(programs, key_tiles, fewest_tiles(group_rows, k, v, _TILE), _slots(q.device))
    out = q.new_empty(batch, heads, q_len, v.shape[3])
    lse = q.new_empty(batch, heads, q_len, dtype=torch.float32)
    partial: list[torch.Tensor | None] = [None, None, None]
    if splits > 1:
        sizes = (splits, lse.numel(), v.shape[3])
        partial = [q.new_empty(shape, dtype=torch.float32) for shape in (sizes, sizes[:2], sizes[:2])]
    arguments, held = shaping(variant, seed, Rows(q_len, k_len, k_lengths=cache_lengths), q.device)
    views = (_extension.view(t) for t in (q, k, v, out, lse[..., None], *partial))
    _extension.kernels().attention_decode(*views, *arguments)
    del held
    return (out if v_dim == v.shape[3] else out[..., :v_dim]), lse


def weights(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, variant: Variant) -> torch.Tensor:
    """P: (batch, heads, q_len, k_len) in q's dtype, zero in rows whose lse is -inf."""
    q_len, k_len = q.shape[2], k.shape[2]
    p = q.new_empty(*q.shape[:3], k_len)
    if p.numel() == 0:
        return p
    q, k = aligned(q), aligned(k)
    arguments, held = shaping(variant._replace(sinks=None), None, Rows(q_len, k_len), q.device)
    views = (_extension.view(t) for t in (q, k, lse[..., None], p))
    _extension.kernels().attention_weights(*views, *arguments)
    del held
    return p


def few_rows(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether the queries that share a key head are few enough for decode_forward."""
    return k.shape[1] == 0 or q.shape[1] // k.shape[1] * q.shape[2] <= MOST_ROWS


def use_splits(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether a dense call of these shapes should come here instead of to the kernel for many queries.

    Yes where one tile holds all rows of a key head: there a block's warps share the keys, while in the other kernel,
    whose warps share 64 queries, most would have none. Yes for more where that kernel would leave the GPU idle.
    """
    batch, heads, q_len, _ = q.shape
    if not few_rows(q, k):
        return False
    one_tile = k.shape[1] == 0 or heads // k.shape[1] * q_len <= _BLOCK_ROWS
    return one_tile or (k.shape[2] >= 2 * _TILE and 2 * batch * heads < _slots(q.device))


@functools.cache
def _slots(device: torch.device) -> int:
    """How many blocks the device runs at once; an H100's where there is no GPU."""
    if device.type != "cuda":
        return 3 * 132
    found = torch.cuda.get_device_properties(device)
    return int(found.multi_processor_count * max(1, found.shared_memory_per_multiprocessor // _SHARED))
