"""Which tiles the kernels of attention's backward work on, and why.

Registers decide: a thread holds its part of the sums (dK and dV, or dQ), of S and dP, and where the tensor cores read
their operands from registers (before Hopper, and on it for tiles of fewer than 64 rows) of the tiles that stay. A mask,
a bias, soft capping and dropout bring more: with one of them tiles are smaller, with several smaller again. fp32 has
high and low parts as operands (three tf32 products): rows wider than 64 come a part at a time, from L1 or L2, in one
stage. All sizes are the largest of those tried that compile without spilling, with the features that they are for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from transfuse.ops._triton import INTERPRETED, capability
from transfuse.ops.attention.triton_gradients import Call
from transfuse.ops.attention.triton_tiles import Tiles, block_d, capped, shared_memory

Choice = tuple[tuple[object, ...], Tiles, Sequence[Tiles]]
"""(what it hangs on, the choice, what a measurement tries besides)"""


def delta_rows(width: int, q_len: int) -> tuple[int, int]:
    """(rows of a program, warps): 4096 elements of out, of which a thread of 128 loads 16 bytes several times."""
    rows = max(1, 4096 // block_d(width))
    return (min(rows, 8) if INTERPRETED else rows), 4


def dkdv_tiles(call: Call, q: torch.Tensor, v: torch.Tensor) -> Choice:
    """Tiles stand keys by queries: a thread of a Hopper warp group also holds lse and delta of every other query."""
    width, extras, hopper = _facts(call, q, v)
    if q.dtype == torch.float32:
        tiles = _dkdv_fp32(width, extras, hopper)
    elif width <= 64:
        # Eight warps stand below one another here, 16 keys each: fewer than 128 would be computed twice.
        light = Tiles(64 if hopper else 32, 128, 8, 2)
        tiles = (light, Tiles(32, 128, 8, 2), Tiles(32, 32, 4, 2))[extras]
    elif width <= 128:
        # On Hopper 128 keys are a warp group's 64 rows twice; before it 64 leave room for k and v in registers.
        light = Tiles(32, 128, 8, 2) if hopper else Tiles(64, 64, 8, 2)
        tiles = (light, Tiles(32, 64, 8, 2), Tiles(32, 32, 8, 2))[extras]
    else:
        # dK and dV of 32 keys: 64 registers of a thread. More would need smaller tiles of queries than pay.
        tiles = (Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2), Tiles(32, 32, 8, 2))[extras]
    return _choice(call, q, v, tiles)


def _dkdv_fp32(width: int, extras: int, hopper: bool) -> Tiles:
    if width <= 64:
        return Tiles(32, 32, 8, 2) if extras == 0 else Tiles(16, 32, 8, 2)
    if width <= 128:
        return Tiles(32, 32, 8, 1) if extras == 0 and hopper else Tiles(16, 32, 8, 1)
    return Tiles(16, 32, 8, 1) if extras == 0 and hopper else Tiles(16, 16, 8, 1)


def dq_tiles(call: Call, q: torch.Tensor, v: torch.Tensor) -> Choice:
    """As forward's, with one more product and one more tile of keys: 128 queries are two warp groups."""
    width, extras, hopper = _facts(call, q, v)
    if q.dtype == torch.float32:
        tiles = _dq_fp32(width, extras, hopper)
    elif width <= 64:
        tiles = Tiles(128, 64, 8, 2) if extras == 0 or (hopper and extras == 1) else Tiles(128, 32, 8, 2)
    elif width <= 128:
        tiles = Tiles(128, 64, 8, 2) if hopper and extras == 0 else Tiles(128, 32, 8, 2)
    elif hopper:
        tiles = Tiles(128, 16, 8, 2) if extras == 0 else Tiles(32, 32, 8, 2)
    else:
        tiles = Tiles(64, 32, 8, 2)
    return _choice(call, q, v, tiles)


def _dq_fp32(width: int, extras: int, hopper: bool) -> Tiles:
    if width <= 64:
        return Tiles(64, 32, 8, 2) if extras == 0 and hopper else Tiles(32, 32, 8, 2)
    return Tiles(32, 32, 8, 1) if extras == 0 else Tiles(16, 32, 8, 1)


def dbias_tiles(call: Call, q: torch.Tensor, v: torch.Tensor) -> Choice:
    """No sum but that of dS; its tile is what a program writes."""
    width, extras, hopper = _facts(call, q, v)
    if q.dtype == torch.float32:
        narrow = Tiles(32, 32, 8, 2) if extras <= 1 else Tiles(16, 32, 8, 2)
        tiles = narrow if width <= 64 else Tiles(32, 32, 8, 1)
    elif extras <= 1 and width <= (128 if hopper else 64):
        tiles = Tiles(64, 64, 8, 2)
    else:
        tiles = Tiles(64, 32, 8, 2) if width <= 128 else Tiles(32, 32, 8, 2)
    return _choice(call, q, v, tiles)


def _facts(call: Call, q: torch.Tensor, v: torch.Tensor) -> tuple[int, int, bool]:
    """(the wider head dimension, what costs registers: 0 nothing, 1 one thing, 2 more, whether the GPU has wgmma)."""
    views = (call.inputs.mask, call.inputs.bias, call.inputs.slopes)
    costly = (*(t.pointer for t in views), call.rule.softcap, call.seed)
    width = max(block_d(q.shape[3]), block_d(v.shape[3]))
    return width, min(2, sum(x is not None for x in costly)), capability(q.device) == (9, 0)


def _choice(call: Call, q: torch.Tensor, v: torch.Tensor, tiles: Tiles) -> Choice:
    _, extras, _ = _facts(call, q, v)
    # One stage where two would not leave room for all that is loaded: on GPUs with 99 KB of shared memory.
    rows = tiles.BLOCK_M + tiles.BLOCK_N + max(tiles.BLOCK_M, tiles.BLOCK_N)
    if rows * (block_d(q.shape[3]) + block_d(v.shape[3])) * q.element_size() > shared_memory(capability(q.device)):
        tiles = tiles._replace(num_stages=1)
    key = (capability(q.device), q.dtype, block_d(q.shape[3]), block_d(v.shape[3]), extras)
    return key, capped(tiles, call.q_len, call.k_len), _candidates(tiles)


def _candidates(tiles: Tiles) -> list[Tiles]:
    """Neighbours: other warps and stages, half and twice as many queries or keys."""
    m, n, warps, _ = tiles
    sizes = ((m, n), (m // 2, n), (m * 2, n), (m, n // 2), (m, n * 2))
    found = [
        Tiles(*size, w, stages) for size in sizes if min(size) >= 16 for w in {warps, 4, 8} for stages in (1, 2, 3)
    ]
    return [t for t in found if t != tiles]
