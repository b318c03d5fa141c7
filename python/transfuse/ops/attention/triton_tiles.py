"""Which tiles each Triton attention kernel works on, and why."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from transfuse.ops._triton import INTERPRETED
from transfuse.ops.attention.variant import Variant


class Tiles(NamedTuple):
    """BLOCK_M queries against BLOCK_N keys at a time."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


def block_d(head_dim: int) -> int:
    """Columns of a tile that holds head_dim: a power of two that tl.dot takes."""
    return max(16, triton.next_power_of_2(head_dim))


def capped(tiles: Tiles, rows: int, columns: int) -> Tiles:
    """No larger than the work: at least 16 either way, which is what tl.dot takes."""
    most = 16 if INTERPRETED else 256  # interpreted tiles stay small, so that small tests cross their edges
    m = min(tiles.BLOCK_M, max(16, triton.next_power_of_2(rows)), most)
    n = min(tiles.BLOCK_N, max(16, triton.next_power_of_2(columns)), 2 * most)
    return tiles._replace(BLOCK_M=m, BLOCK_N=n)


def forward_tiles(
    q: torch.Tensor, v: torch.Tensor, variant: Variant, q_len: int, k_len: int
) -> tuple[tuple[object, ...], Tiles]:
    """(what the choice hangs on, the choice)."""
    return (), capped(Tiles(64, 64, 4, 2), q_len, k_len)


def forward_candidates(tiles: Tiles) -> list[Tiles]:
    return []


def weights_tiles(q: torch.Tensor, k_len: int) -> Tiles:
    return capped(Tiles(64, 64, 4, 2), q.shape[2], k_len)
