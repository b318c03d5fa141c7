"""How the products of ffn and linear_act are cut into tiles: one function, with its reasons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from transfuse.ops._triton import INTERPRETED, capability, multiprocessors


class Tiles(NamedTuple):
    """How one product is cut; splits: ranges of K whose sums are added in a second pass."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    splits: int
    num_warps: int
    num_stages: int


_MOST_SPLITS = 16


def choose(M: int, N: int, K: int, dtype: torch.dtype, kind: str, device: torch.device) -> Tiles:
    """For (M, K) @ (K, N); kind: "one" accumulator, "gated" (two), "backward" (one, and what was saved)."""
    if INTERPRETED:  # small, so that small tests have several tiles and splits
        return Tiles(32, 64, 32, 2 if M <= 16 and K >= 64 else 1, 4, 1)
    processors = multiprocessors(device)
    block_m, block_n, block_k, num_warps, num_stages = _blocks(M, dtype, kind, capability(device))
    block_n, block_k = min(block_n, power_of_2(N)), min(block_k, power_of_2(K))
    programs = -(-M // block_m) * -(-N // block_n)
    while programs < processors and block_n > 64:  # a smaller tile reads more, a processor without one does nothing
        block_n //= 2
        programs = -(-M // block_m) * -(-N // block_n)
    # Then ranges of K. A split writes and reads 8 M bytes of partial sums for a column of B, of which it reads 2 depth
    # in 16 bits: 16 M deep they are a quarter of it. With many rows it is arithmetic, not B, that takes the time.
    depth = max(256, min(16 * M, 1024), 2 * block_k)
    splits = max(1, min(processors // max(programs, 1), K // depth, _MOST_SPLITS))
    return Tiles(block_m, block_n, block_k, splits, num_warps, num_stages)


def _blocks(M: int, dtype: torch.dtype, kind: str, gpu: tuple[int, int]) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages) of a product with N and K without end."""
    gated = kind == "gated"
    large = gpu in ((8, 0), (9, 0), (10, 0), (10, 3))  # 160 KiB and more of shared memory a block; others 99 KiB
    if dtype == torch.float32:
        if M <= 64:
            return max(16, power_of_2(M)), 32 if gated else 64, 32, 4, 3
        # Each operand of three tf32 products is held twice in registers, so tiles are half as large as in 16 bits.
        return (128, 64, 32, 8, 3) if large and not gated else (64, 64, 32, 4, 3) if not gated else (64, 32, 32, 4, 3)
    if M <= 32:
        # All time goes into reading B: rows as few as there are, long stretches of K, many loads on their way.
        return max(16, power_of_2(M)), 32 if gated else 64, 128 if large else 64, 4, 4
    if M <= 64:
        return 64, 64, 64, 4, 4 if large and not gated else 3
    if gpu >= (9, 0) and large:
        # wgmma reads both operands from shared memory: two warpgroups of 64 rows, 128 fp32 sums a thread at most.
        # The saved tensors of the backward take the registers of half the sums.
        return (128, 128, 64, 8, 3) if kind != "one" else (128, 256, 64, 8, 3)
    # mma.sync: 64 fp32 sums a thread leave room for the operands, which also go through registers.
    return (128, 64, 32, 8, 4) if gated else (128, 128, 32, 8, 4)


def parts(tiles: Tiles, kind: str, activation: str, dropout: bool) -> int:
    """In how many stretches of columns a tile's end is done where it computes: more values at once spill registers."""
    if INTERPRETED or activation == "":
        return 1
    elements = 32 if kind == "one" and not dropout else 16  # a thread
    return max(1, min(tiles.BLOCK_M * tiles.BLOCK_N // (32 * tiles.num_warps * elements), tiles.BLOCK_N // 16))


def power_of_2(size: int) -> int:
    """The power of 2 at or above a size, at least 16, which is the least that tl.dot takes."""
    return max(16, 1 << max(size - 1, 0).bit_length())


def candidates(chosen: Tiles) -> Sequence[Tiles]:
    """What measuring may try in place of the choice: other shapes of about its size, depths, stages and splits."""
    m, n, k, splits, warps, stages = chosen
    shapes = [(m, n // 2), (m // 2, n), (m // 2, n * 2), (m * 2, n // 2)]
    found = [chosen._replace(BLOCK_M=bm, BLOCK_N=bn) for bm, bn in shapes if bm >= 16 and 16 <= bn <= 256]
    found += [chosen._replace(BLOCK_K=bk) for bk in (k // 2, k * 2) if bk >= 16]
    found += [chosen._replace(num_warps=12 - warps), chosen._replace(num_stages=stages + 1)]
    found += [chosen._replace(splits=s) for s in (1, splits // 2, splits * 2) if s not in (0, splits)]
    return found
