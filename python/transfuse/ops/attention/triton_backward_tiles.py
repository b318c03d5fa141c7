"""Which tiles the kernels of attention's backward work on, and why."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from transfuse.ops._triton import INTERPRETED
from transfuse.ops.attention.triton_gradients import Call
from transfuse.ops.attention.triton_tiles import Tiles, block_d, capped

Choice = tuple[tuple[object, ...], Tiles, Sequence[Tiles]]
"""(what it hangs on, the choice, what a measurement tries besides)"""


def delta_rows(width: int, q_len: int) -> tuple[int, int]:
    """(rows of a program, warps): 4096 elements of out, of which a thread of 128 loads 16 bytes several times."""
    rows = max(1, 4096 // block_d(width))
    return (min(rows, 8) if INTERPRETED else rows), 4


def dkdv_tiles(call: Call, k: torch.Tensor, v: torch.Tensor) -> Choice:
    return (), capped(Tiles(64, 64, 4, 2), call.q_len, call.k_len), ()


def dq_tiles(call: Call, q: torch.Tensor, v: torch.Tensor) -> Choice:
    return (), capped(Tiles(64, 64, 4, 2), call.q_len, call.k_len), ()


def dbias_tiles(call: Call, q: torch.Tensor, v: torch.Tensor) -> Choice:
    return (), capped(Tiles(64, 64, 4, 2), call.q_len, call.k_len), ()
