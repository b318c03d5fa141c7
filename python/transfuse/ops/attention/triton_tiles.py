"""Which tiles each Triton attention kernel works on, and why."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from transfuse.ops._triton import INTERPRETED, capability
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
    # Interpreted tiles stay small with small work, so that small tests cross their edges.
    most = 256 if not INTERPRETED else 16 if rows <= 128 else 64
    m = min(tiles.BLOCK_M, max(16, triton.next_power_of_2(rows)), most)
    n = min(tiles.BLOCK_N, max(16, triton.next_power_of_2(columns)), 2 * most)
    return tiles._replace(BLOCK_M=m, BLOCK_N=n)


_SHARED = {(8, 0): 163 << 10, (8, 7): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10, (10, 3): 227 << 10}
_SHARED_ELSEWHERE = 99 << 10


def shared_memory(target: tuple[int, int]) -> int:
    """Bytes that a program may have on a GPU of this capability."""
    return _SHARED.get(target, _SHARED_ELSEWHERE)


def forward_tiles(
    q: torch.Tensor, v: torch.Tensor, variant: Variant, q_len: int, k_len: int
) -> tuple[tuple[object, ...], Tiles]:
    """(what the choice hangs on, the choice).

    Registers decide first: a thread holds its part of O, of S and P, and of q where the tensor cores read it from
    there (before Hopper), and what a mask, a bias or dropout brings. Shared memory decides how many stages fit.
    """
    width = max(block_d(q.shape[3]), block_d(v.shape[3]))
    target = capability(q.device)
    extras = _extras(q, v, variant)
    key = (target, q.dtype, block_d(q.shape[3]), block_d(v.shape[3]), *extras)
    choose = _fp32 if q.dtype == torch.float32 else _half
    tiles = choose(width, target >= (9, 0), any(extras))
    if sum(extras) > 2:  # each holds its part of a tile
        tiles = tiles._replace(BLOCK_N=min(tiles.BLOCK_N, 32))
    tiles = _fitting(tiles, q, v, variant, target)
    return key, capped(tiles, q_len, k_len)


def _extras(q: torch.Tensor, v: torch.Tensor, variant: Variant) -> tuple[bool, ...]:
    """What needs registers besides plain or causal attention."""
    some = (variant.mask, variant.bias, variant.alibi_slopes)
    padded = q.shape[3] != block_d(q.shape[3]) or v.shape[3] != block_d(v.shape[3])
    return (*(t is not None for t in some), variant.left >= 0, variant.softcap > 0, variant.dropout_p > 0, padded)


def _half(width: int, hopper: bool, extras: bool) -> Tiles:
    if hopper:
        # Two warp groups of 64 queries each; one instruction takes 64 queries, so fewer would leave a group idle or
        # split the keys between groups. q and k are read from shared memory: registers hold O, S and P alone, which
        # 128 keys fill, with nothing left for extras.
        if width <= 128:
            return Tiles(128, 64, 8, 3) if extras else Tiles(128, 128, 8, 2)
        return Tiles(64, 32, 8, 2) if extras else Tiles(128, 64, 8, 2)
    if width <= 64:
        # 32 queries a warp read every fragment of k and v half as often as 16 do; extras leave no room for them.
        return Tiles(64, 64, 8, 3) if extras else Tiles(128, 64, 4, 3)
    if width <= 128:
        return Tiles(64, 64, 8, 3) if extras else Tiles(128, 64, 8, 3)
    return Tiles(32, 32, 8, 2) if extras else Tiles(64, 64, 8, 2)


def _fp32(width: int, hopper: bool, extras: bool) -> Tiles:
    # Three tf32 products take the operands' high and low parts: twice the registers of the numbers themselves.
    if width <= 64:
        return Tiles(64, 32, 4, 2) if hopper else Tiles(32, 32, 8, 2)
    if extras:
        return Tiles(16, 16, 4, 2)
    return Tiles(32, 32, 8, 2) if width <= 128 else Tiles(32, 16, 8, 2)


def step(q: torch.Tensor, v: torch.Tensor, variant: Variant) -> int:
    """Columns of q and k in one product: all, unless the parts of a wide fp32 q would fill the registers."""
    width = max(block_d(q.shape[3]), block_d(v.shape[3]))
    extras = any(_extras(q, v, variant))
    whole = q.dtype != torch.float32 or width <= 64 or (width <= 128 and not extras)
    return block_d(q.shape[3]) if whole else min(32, block_d(q.shape[3]))


def _fitting(tiles: Tiles, q: torch.Tensor, v: torch.Tensor, variant: Variant, target: tuple[int, int]) -> Tiles:
    """With fewer stages, then fewer keys, then fewer queries, until shared memory holds them."""
    room = shared_memory(target)
    while _shared(tiles, q, v, variant, target) > room and max(tiles[:2]) > 16:
        if tiles.num_stages > 2:
            tiles = tiles._replace(num_stages=tiles.num_stages - 1)
        elif tiles.BLOCK_N > 32 or tiles.BLOCK_M <= 16:
            tiles = tiles._replace(BLOCK_N=tiles.BLOCK_N // 2)
        else:
            tiles = tiles._replace(BLOCK_M=tiles.BLOCK_M // 2)
    return tiles


def _shared(tiles: Tiles, q: torch.Tensor, v: torch.Tensor, variant: Variant, target: tuple[int, int]) -> int:
    """Bytes of shared memory, at most."""
    m, n, _, stages = tiles
    size, d, d_v = q.element_size(), block_d(q.shape[3]), block_d(v.shape[3])
    of_tile = sum(t.element_size() for t in (variant.mask, variant.bias) if t is not None)
    of_tile = of_tile * (stages - 1) + (4 if variant.dropout_p > 0 else 0)  # Philox's words change places
    staying = m * d * size if target >= (9, 0) else 0
    return staying + stages * n * (d + d_v) * size + m * n * of_tile


def forward_candidates(tiles: Tiles) -> list[Tiles]:
    """What a measurement tries besides; a candidate that does not fit is skipped there."""
    found = [
        Tiles(m, n, warps, stages)
        for m, n, warps in (
            (128, 128, 8),
            (128, 64, 8),
            (128, 64, 4),
            (64, 128, 4),
            (64, 64, 4),
            (64, 64, 8),
            (64, 32, 4),
        )
        for stages in (2, 3, 4)
    ]
    within = (t for t in found if t.BLOCK_M <= 2 * tiles.BLOCK_M and t.BLOCK_N <= 2 * tiles.BLOCK_N)
    return [t for t in within if t != tiles]


def weights_tiles(q: torch.Tensor, k_len: int) -> Tiles:
    """One product a program and a tile of probabilities to write: as large as registers hold with every extra."""
    return capped(Tiles(32, 32, 8, 1) if q.dtype == torch.float32 else Tiles(64, 64, 4, 1), q.shape[2], k_len)
