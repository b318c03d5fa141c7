"""Which tiles each Triton attention kernel works on, and why."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from transfuse.ops._triton import INTERPRETED


class Tiles(NamedTuple):
    """BLOCK_M queries against BLOCK_N keys at a time."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


def block_d(head_dim: int) -> int:
    """Columns of a tile that holds head_dim: a power of two that tl.dot takes."""
    return max(16, triton.next_power_of_2(head_dim))


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; Hopper's where no GPU is asked."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def capped(tiles: Tiles, rows: int, columns: int) -> Tiles:
    """No larger than the work: at least 16 either way, which is what tl.dot takes."""
    most = 16 if INTERPRETED else 256  # interpreted tiles stay small, so that small tests cross their edges
    m = min(tiles.BLOCK_M, max(16, triton.next_power_of_2(rows)), most)
    n = min(tiles.BLOCK_N, max(16, triton.next_power_of_2(columns)), 2 * most)
    return tiles._replace(BLOCK_M=m, BLOCK_N=n)
