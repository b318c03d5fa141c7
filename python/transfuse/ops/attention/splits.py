"""Into how many runs the keys of a few queries are cut, for the kernels that split over keys."""

from __future__ import annotations

import functools

import torch

from transfuse.ops.attention.variant import Variant

MOST_SPLITS = 128


def most_keys_seen(variant: Variant, q_len: int, k_len: int) -> int:
    """How many keys the queries of one batch row can see, as far as the host knows."""
    if variant.left < 0 or variant.right < 0:
        return k_len
    return min(k_len, variant.left + q_len + variant.right)


def fewest_tiles(group_rows: int, k: torch.Tensor, v: torch.Tensor, block_n: int) -> int:
    """Key tiles that a split must have, for its fp32 result, written and read, to be a quarter of its keys at most."""
    result = 2 * 4 * group_rows * v.shape[3]
    keys = block_n * (k.shape[3] + v.shape[3]) * k.element_size()
    return max(1, -(-4 * result // max(keys, 1)))


@functools.lru_cache(maxsize=4096)
def choose_splits(programs: int, key_tiles: int, fewest_tiles: int, slots: int) -> int:
    """The fewest splits that keep the GPU at least 85% as busy as the best number of them would.

    ``programs`` of one split each go through ``key_tiles``; ``slots`` run at once. n splits take
    ceil(programs n / slots) waves of ceil(key_tiles / n) steps. Fewer splits mean less to combine.

    >>> choose_splits(programs=8, key_tiles=64, fewest_tiles=1, slots=264), choose_splits(264, 64, 1, 264)
    (32, 1)
    """
    most = max(1, min(MOST_SPLITS, key_tiles // fewest_tiles))
    steps = [-(-programs * n // slots) * -(-key_tiles // n) for n in range(1, most + 1)]
    enough = min(steps) / 0.85
    return next(n for n, taken in enumerate(steps, 1) if taken <= enough)
