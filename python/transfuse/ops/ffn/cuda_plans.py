"""Which tiles a product of ffn takes on the CUDA kernel, and when torch's matmul computes it: one table, with reasons.

What :func:`choose` says is reasoned, not measured. ``transfuse.autotune`` times every plan of :func:`candidates` on the
GPU that is here, and what it finds takes the place of the choice.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from transfuse._extension import multiprocessors

CUBLAS = -1
"""In the place of a tile: torch's matmul, and what stands at the product's end as a kernel of its own."""

FORWARD, INPUT, WEIGHT = 0, 1, 2
"""How a product's operands lie in memory: x w^T, dy w, dy^T x (csrc/ffn/product.cuh)."""

_TILES_16 = ((128, 128, 32), (64, 64, 64), (16, 64, 64))
_TILES_32 = ((128, 64, 16), (64, 64, 32), (16, 64, 32))
_MOST_SPLITS = 16


class Plan(NamedTuple):
    """How one product is computed; splits: ranges of K whose sums are added in a second pass."""

    tile: int
    splits: int


def tiles(dtype: torch.dtype) -> Sequence[tuple[int, int, int]]:
    """(BLOCK_M, BLOCK_N, BLOCK_K) by number, as csrc/ffn/product_tiles.cuh has them."""
    return _TILES_32 if dtype == torch.float32 else _TILES_16


@functools.lru_cache(4096)
def choose(
    M: int, N: int, K: int, dtype: torch.dtype, kind: str, layout: int, device: torch.device, cublas: bool
) -> Plan:
    """For (M, K) @ (K, N); kind: "plain" (a bias at most), "end" (or an activation), "gated" (two), "backward".

    ``cublas`` is what :func:`cublas_may` says.
    """
    if cublas and (kind == "plain" or (M > 64 and _fuses_up_to(device) < K)):
        return Plan(CUBLAS, 1)
    processors = multiprocessors(device)
    tile = 0 if layout == WEIGHT else 2 if M <= 16 else 1
    if tile == 1 and M > 64 and _blocks(M, N, dtype, kind, 0) >= processors:
        tile = 0
    # Two blocks a multiprocessor, one of which multiplies while the other waits or writes. A split writes and reads 8 M
    # bytes of partial sums for a column of B, of which it reads 2 depth in 16 bits: 16 M deep they are a quarter of it.
    # With many rows it is arithmetic, not B, that takes the time.
    depth = max(256, min(16 * M, 1024)) if device.type == "cuda" else 32
    splits = min(2 * processors // max(_blocks(M, N, dtype, kind, tile), 1), K // depth, _MOST_SPLITS)
    return Plan(tile, max(1, splits))


@functools.lru_cache(256)
def candidates(chosen: Plan, layout: int, cublas: bool) -> Sequence[Plan]:
    """What measuring may try in place of the choice: all tiles, unsplit and split about as much, torch's matmul."""
    counts = sorted({1, 2, 4, 8, chosen.splits})
    found = [Plan(tile, s) for tile in range(1 if layout == WEIGHT else 3) for s in counts]
    return [*found, Plan(CUBLAS, 1)] if cublas else found


def cublas_may(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's matmul may compute a product at all. Not

    - off the GPU, where the kernels run for their tests;
    - in fp32, unless torch is told to take tf32 or ieee: its fp32 leaves tensor cores unused;
    - under torch.use_deterministic_algorithms, where its order of sums hangs on a variable of the environment.
    """
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return False
    return dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision in ("ieee", "tf32")


def _fuses_up_to(device: torch.device) -> int:
    """The K up to which a product with its end in one kernel should beat torch's matmul and a kernel for the end.

    The second kernel reads and writes M N 16-bit elements, 4 bytes / bandwidth each; the one kernel takes 2 K
    operations longer than the vendor's for each. By the data sheets and what mma.sync should reach: an A100 some 1.5
    TB/s and 220 against 270 TFLOP/s, so about 1600; an H100, whose wgmma the kernel does not use, some 3 TB/s and 400
    against 700, so about 600.
    """
    return 512 if torch.cuda.get_device_capability(device) >= (9, 0) else 1536


def _blocks(M: int, N: int, dtype: torch.dtype, kind: str, tile: int) -> int:
    block_m, block_n, _ = tiles(dtype)[tile]
    return -(-M // block_m) * -(-N // (block_n // 2 if kind == "gated" else block_n))
