"""Rotary positions and the cache's write in Triton: each one launch for queries and keys, or keys and values.

    y_lo = x_lo cos_lo + x_hi sin_lo        y_hi = x_hi cos_hi + x_lo sin_hi        in fp32, rounded once

Program of _rotate -> one token and HEADS of its heads, first those of q, then those of k: [HEADS, BLOCK_HALF] pairs,
the token's cosines read once for them. Backward is the same kernel: the transposed map has sin_lo and sin_hi swapped,
which for a turn is the turn back. Saved for backward: cos and sin alone.
Program of _append -> ROWS of one batch row's (head, new position) rows, of k and of v. A position outside the cache is
not written. The launcher guarantees sizes that agree and contiguous outputs of _rotate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from transfuse.ops import _validate
from transfuse.ops._triton import INTERPRETED, launch, rounded

_WIDEST = 1024
_PAIRS = 1024  # of one program: eight a thread of four warps, which is 16 bytes of half precision


class Strided(NamedTuple):
    """A four-dimensional tensor in a kernel, None if absent, and its strides in elements, in its own order."""

    pointer: torch.Tensor | None
    first: int
    second: int
    third: int
    fourth: int


def _strided(t: torch.Tensor | None) -> Strided:
    if t is None:
        return Strided(None, 0, 0, 0, 0)
    return Strided(t, *(0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)))


@triton.jit
def _tile(t, a, b, c, d):  # type: ignore[no-untyped-def]
    """Pointers to t[a, b, c, d], ready to broadcast; in 64 bits: a product may pass 2^31."""
    start = t.pointer + tl.cast(a, tl.int64) * t.first + tl.cast(b, tl.int64) * t.second
    return start + tl.cast(c, tl.int64) * t.third + tl.cast(d, tl.int64) * t.fourth


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    x,
    y,
    cos,
    sin,
    b,
    i,
    first_head,
    heads,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """HEADS heads of x[b, i], turned, to y[b, i]."""
    h = (first_head + tl.arange(0, HEADS))[:, None]
    low = tl.arange(0, BLOCK_HALF)[None, :]
    high = low + HALF
    pair = low < HALF
    inside = (h < heads) & pair
    if HALF > 0:
        x_low = tl.load(_tile(x, b, i, h, low), mask=inside, other=0.0).to(tl.float32)
        x_high = tl.load(_tile(x, b, i, h, high), mask=inside, other=0.0).to(tl.float32)
        cos_low = tl.load(_tile(cos, b, i, 0, low), mask=pair, other=0.0).to(tl.float32)
        cos_high = tl.load(_tile(cos, b, i, 0, high), mask=pair, other=0.0).to(tl.float32)
        sin_low = tl.load(_tile(sin, b, i, 0, high if INVERSE else low), mask=pair, other=0.0).to(tl.float32)
        sin_high = tl.load(_tile(sin, b, i, 0, low if INVERSE else high), mask=pair, other=0.0).to(tl.float32)
        y_low = x_low * cos_low + x_high * sin_low
        y_high = x_high * cos_high + x_low * sin_high
        tl.store(_tile(y, b, i, h, low), rounded(y_low, y.pointer.dtype.element_ty), mask=inside)
        tl.store(_tile(y, b, i, h, high), rounded(y_high, y.pointer.dtype.element_ty), mask=inside)
    if REST > 0:
        rest = tl.arange(0, BLOCK_REST)[None, :]
        inside_rest = (h < heads) & (rest < REST)
        kept = tl.load(_tile(x, b, i, h, 2 * HALF + rest), mask=inside_rest)
        tl.store(_tile(y, b, i, h, 2 * HALF + rest), kept, mask=inside_rest)


@triton.jit(do_not_specialize=["length", "q_heads", "k_heads", "q_tiles", "tiles"])
def _rotate(  # type: ignore[no-untyped-def]
    q,  # Strided, (batch, length, heads, head_dim), as are all
    k,
    q_out,
    k_out,
    cos,  # (batch|1, length, 1, rotary_dim)
    sin,
    length,
    q_heads,
    k_heads,
    q_tiles,
    tiles,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program % tiles
    i = program // tiles % length
    b = program // tiles // length
    if k.pointer is None:
        _turn(q, q_out, cos, sin, b, i, tile * HEADS, q_heads, INVERSE, HEADS, HALF, BLOCK_HALF, REST, BLOCK_REST)
    else:
        if tile < q_tiles:
            _turn(q, q_out, cos, sin, b, i, tile * HEADS, q_heads, INVERSE, HEADS, HALF, BLOCK_HALF, REST, BLOCK_REST)
        else:
            first = (tile - q_tiles) * HEADS
            _turn(k, k_out, cos, sin, b, i, first, k_heads, INVERSE, HEADS, HALF, BLOCK_HALF, REST, BLOCK_REST)


def rotary_embedding(
    q: torch.Tensor,  # (batch, length, heads, head_dim)
    k: torch.Tensor | None,  # (batch, length, kv_heads, head_dim)
    cos: torch.Tensor,  # (batch|1, length, 1, rotary_dim)
    sin: torch.Tensor,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q and k, turned (back, with ``inverse``), contiguous."""
    batch, length, heads, head_dim = q.shape
    kv_heads = 0 if k is None else k.shape[2]
    q_out = q.new_empty(q.shape)
    k_out = None if k is None else k.new_empty(k.shape)
    if q.numel() == 0 and (k is None or k.numel() == 0):
        return q_out, k_out
    half = cos.shape[3] // 2
    rest = head_dim - 2 * half
    block_half, block_rest = (int(triton.next_power_of_2(max(size, 1))) for size in (half, rest))
    # Several tiles in the interpreter's small tests too.
    most = 4 if INTERPRETED else max(1, _PAIRS // max(block_half, block_rest // 2))
    block_heads = min(most, int(triton.next_power_of_2(max(heads, kv_heads))))
    q_tiles, k_tiles = triton.cdiv(heads, block_heads), triton.cdiv(kv_heads, block_heads)
    launch(
        _rotate,
        batch * length * (q_tiles + k_tiles),
        _strided(q),
        _strided(k),
        _strided(q_out),
        _strided(k_out),
        _strided(cos),
        _strided(sin),
        length,
        heads,
        kv_heads,
        q_tiles,
        q_tiles + k_tiles,
        device=q.device,
        num_warps=_warps(block_heads * max(block_half, block_rest // 2), q),
        INVERSE=inverse,
        HEADS=block_heads,
        HALF=half,
        BLOCK_HALF=block_half,
        REST=rest,
        BLOCK_REST=block_rest,
    )
    return q_out, k_out


def _warps(elements: int, like: torch.Tensor) -> int:
    """As many as can each load 16 bytes a thread, up to four."""
    return min(4, max(1, elements * like.element_size() // 512))


@triton.jit
def _copy(x, cache, b, h, i, position, inside, DIM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """x[b, h, i] to cache[b, h, position], in the cache's dtype; h, i, position, inside: [ROWS, 1]."""
    d = tl.arange(0, BLOCK)[None, :]
    mask = inside & (d < DIM)
    new = tl.load(_tile(x, b, h, i, d), mask=mask)
    TYPE: tl.constexpr = cache.pointer.dtype.element_ty
    if new.dtype != TYPE:
        new = rounded(new.to(tl.float32), TYPE)
    tl.store(_tile(cache, b, h, position, d), new, mask=mask)


@triton.jit(do_not_specialize=["start", "rows", "new", "room", "tiles"])
def _append(  # type: ignore[no-untyped-def]
    k,  # Strided, (batch, kv_heads, new, head_dim)
    v,  # Strided, (batch, kv_heads, new, v_head_dim)
    k_cache,  # Strided, (batch, kv_heads, room, head_dim)
    v_cache,
    starts,  # (batch,) or None: then start
    start,
    rows,  # kv_heads * new
    new,
    room,
    tiles,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    V_DIM: tl.constexpr,
    V_BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    b = program // tiles
    r = (program % tiles * ROWS + tl.arange(0, ROWS))[:, None]
    h, i = r // new, r % new
    first = start.to(tl.int64)
    if starts.pointer is not None:
        first = tl.load(starts.pointer + b.to(tl.int64) * starts.first).to(tl.int64)
    position = first + i
    inside = (r < rows) & (position >= 0) & (position < room)
    _copy(k, k_cache, b, h, i, position, inside, DIM, BLOCK)
    _copy(v, v_cache, b, h, i, position, inside, V_DIM, V_BLOCK)


def cache_append(
    k: torch.Tensor,  # (batch, kv_heads, new, head_dim)
    v: torch.Tensor,  # (batch, kv_heads, new, v_head_dim)
    k_cache: torch.Tensor,  # (batch, kv_heads, max_length, head_dim), written
    v_cache: torch.Tensor,  # (batch, kv_heads, max_length, v_head_dim), written
    start: int | torch.Tensor,  # or (batch,)
) -> None:
    """Writes k and v behind ``start``, read on the device where it is a tensor."""
    batch, heads, new, dim = k.shape
    if k.numel() + v.numel() == 0:
        return
    each = isinstance(start, torch.Tensor)
    starts = Strided(start, start.stride(0), 0, 0, 0) if isinstance(start, torch.Tensor) else _strided(None)
    block, v_block = (int(triton.next_power_of_2(max(size, 1))) for size in (dim, v.shape[3]))
    most = 4 if INTERPRETED else max(1, 2 * _PAIRS // max(block, v_block))
    rows = min(most, int(triton.next_power_of_2(heads * new)))
    tiles = triton.cdiv(heads * new, rows)
    launch(
        _append,
        batch * tiles,
        _strided(k),
        _strided(v),
        _strided(k_cache),
        _strided(v_cache),
        starts,
        0 if each else start,
        heads * new,
        new,
        k_cache.shape[2],
        tiles,
        device=k.device,
        num_warps=_warps(rows * max(block, v_block), k),
        ROWS=rows,
        DIM=dim,
        BLOCK=block,
        V_DIM=v.shape[3],
        V_BLOCK=v_block,
    )


def why_not(op: str, *tensors: torch.Tensor) -> str | None:
    """Why the kernels cannot take these (validated) tensors, with the remedy, or None."""
    for t in tensors:
        if t.shape[3] > _WIDEST:
            return f"{op}'s Triton kernel takes a head_dim up to {_WIDEST}, got {t.shape[3]} (use backend='torch')"
    return _validate.beyond_kernels("triton", *tensors)
