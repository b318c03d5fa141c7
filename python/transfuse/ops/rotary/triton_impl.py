"""Rotary positions and the cache's write in Triton: one launch for queries and keys, keys and values, or all three.

    y_lo = x_lo cos_lo + x_hi sin_lo        y_hi = x_hi cos_hi + x_lo sin_hi        in fp32, rounded once

Program of _rotate -> one token and HEADS of its heads, first those of q, then those of k: [HEADS, BLOCK_HALF] pairs,
the token's cosines read once for them. Backward is the same kernel: the transposed map has sin_lo and sin_hi swapped,
which for a turn is the turn back. Saved for backward: cos and sin alone.
With v they are both at once: keys and values go to places of a cache, the values' heads counted after those of k.
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
def _cast(x, y):  # type: ignore[no-untyped-def]
    """x in y's dtype."""
    if x.dtype != y.pointer.dtype.element_ty:
        x = rounded(x.to(tl.float32), y.pointer.dtype.element_ty)
    return x


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    x,
    y,
    cos,
    sin,
    b,
    i,
    to,
    first_head,
    heads,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """HEADS heads of x[b, i], turned, to y[b, to]: rounded to x's dtype and then to y's."""
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
        TYPE: tl.constexpr = x.pointer.dtype.element_ty
        tl.store(_tile(y, b, to, h, low), _cast(rounded(y_low, TYPE), y), mask=inside)
        tl.store(_tile(y, b, to, h, high), _cast(rounded(y_high, TYPE), y), mask=inside)
    if REST > 0:
        rest = tl.arange(0, BLOCK_REST)[None, :]
        inside_rest = (h < heads) & (rest < REST)
        kept = tl.load(_tile(x, b, i, h, 2 * HALF + rest), mask=inside_rest)
        tl.store(_tile(y, b, to, h, 2 * HALF + rest), _cast(kept, y), mask=inside_rest)


@triton.jit(do_not_specialize=["length", "q_heads", "k_heads", "q_tiles", "k_tiles", "tiles", "start", "room"])
def _rotate(  # type: ignore[no-untyped-def]
    q,  # Strided, (batch, length, heads, head_dim), as are all
    k,
    v,  # absent: k_out is like k
    q_out,
    k_out,  # (batch, room, kv_heads, head_dim)
    v_out,
    cos,  # (batch|1, length, 1, rotary_dim)
    sin,
    starts,  # (batch,) or absent: then start
    start,
    length,
    room,
    q_heads,
    k_heads,
    q_tiles,
    k_tiles,
    tiles,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    V_DIM: tl.constexpr,
    V_BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program % tiles
    i = program // tiles % length
    b = program // tiles // length
    if k.pointer is None:
        _turn(q, q_out, cos, sin, b, i, i, tile * HEADS, q_heads, INVERSE, HEADS, HALF, BLOCK_HALF, REST, BLOCK_REST)
    else:
        to = _place(starts, start, b) + i
        if tile < q_tiles:
            first = tile * HEADS
            _turn(q, q_out, cos, sin, b, i, i, first, q_heads, INVERSE, HEADS, HALF, BLOCK_HALF, REST, BLOCK_REST)
        elif (to >= 0) & (to < room):
            first = (tile - q_tiles) * HEADS
            if tile < q_tiles + k_tiles:
                _turn(k, k_out, cos, sin, b, i, to, first, k_heads, INVERSE, HEADS, HALF, BLOCK_HALF, REST, BLOCK_REST)
            elif v.pointer is not None:
                h = (first - k_tiles * HEADS + tl.arange(0, HEADS))[:, None]
                _copy(v, v_out, b, i, h, b, to, h, h < k_heads, V_DIM, V_BLOCK)


@triton.jit
def _place(starts, start, b):  # type: ignore[no-untyped-def]
    """Where row b's first new position goes."""
    place = start.to(tl.int64)
    if starts.pointer is not None:
        place = tl.load(starts.pointer + b.to(tl.int64) * starts.first).to(tl.int64)
    return place


def rotary_embedding(
    q: torch.Tensor,  # (batch, length, heads, head_dim)
    k: torch.Tensor | None,  # (batch, length, kv_heads, head_dim)
    cos: torch.Tensor,  # (batch|1, length, 1, rotary_dim)
    sin: torch.Tensor,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q and k, turned (back, with ``inverse``), contiguous."""
    q_out, k_out = q.new_empty(q.shape), None if k is None else k.new_empty(k.shape)
    _launch_rotate(q, k, None, cos, sin, q_out, k_out, None, 0, inverse)
    return q_out, k_out


def rotary_append(
    q: torch.Tensor,  # (batch, new, heads, head_dim)
    k: torch.Tensor,  # (batch, new, kv_heads, head_dim)
    v: torch.Tensor,  # (batch, new, kv_heads, v_head_dim)
    cos: torch.Tensor,  # (batch|1, new, 1, rotary_dim)
    sin: torch.Tensor,
    k_cache: torch.Tensor,  # (batch, kv_heads, max_length, head_dim), written
    v_cache: torch.Tensor,  # (batch, kv_heads, max_length, v_head_dim), written
    start: int | torch.Tensor,  # or (batch,)
) -> torch.Tensor:
    """q turned, contiguous; k turned and v go into the caches."""
    q_out = q.new_empty(q.shape)
    _launch_rotate(q, k, v, cos, sin, q_out, k_cache.transpose(1, 2), v_cache.transpose(1, 2), start, False)
    return q_out


def _launch_rotate(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor | None,
    v_out: torch.Tensor | None,
    start: int | torch.Tensor,
    inverse: bool,
) -> None:
    batch, length, heads, head_dim = q.shape
    kv_heads = 0 if k is None else k.shape[2]
    v_dim = 0 if v is None else v.shape[3]
    if sum(t.numel() for t in (q, k, v) if t is not None) == 0:
        return
    half = cos.shape[3] // 2
    rest = head_dim - 2 * half
    block_half, block_rest, v_block = (int(triton.next_power_of_2(max(size, 1))) for size in (half, rest, v_dim))
    wide = max(block_half, block_rest // 2, v_block // 2)
    # Several tiles in the interpreter's small tests too.
    most = 4 if INTERPRETED else max(1, _PAIRS // wide)
    block_heads = min(most, int(triton.next_power_of_2(max(heads, kv_heads, 1))))
    q_tiles, k_tiles = triton.cdiv(heads, block_heads), triton.cdiv(kv_heads, block_heads)
    tiles = q_tiles + k_tiles * (1 if v is None else 2)
    starts, place = (start, 0) if isinstance(start, torch.Tensor) else (None, start)
    launch(
        _rotate,
        batch * length * tiles,
        _strided(q),
        _strided(k),
        _strided(v),
        _strided(q_out),
        _strided(k_out),
        _strided(v_out),
        _strided(cos),
        _strided(sin),
        _starts(starts),
        place,
        length,
        length if k_out is None else k_out.shape[1],
        heads,
        kv_heads,
        q_tiles,
        k_tiles,
        tiles,
        device=q.device,
        num_warps=_warps(block_heads * wide, q),
        INVERSE=inverse,
        HEADS=block_heads,
        HALF=half,
        BLOCK_HALF=block_half,
        REST=rest,
        BLOCK_REST=block_rest,
        V_DIM=v_dim,
        V_BLOCK=v_block,
    )


def _starts(starts: torch.Tensor | None) -> Strided:
    return Strided(None, 0, 0, 0, 0) if starts is None else Strided(starts, starts.stride(0), 0, 0, 0)


def _warps(elements: int, like: torch.Tensor) -> int:
    """As many as can each load 16 bytes a thread, up to four."""
    return min(4, max(1, elements * like.element_size() // 512))


@triton.jit
def _copy(  # type: ignore[no-untyped-def]
    x, y, a, b, c, to_a, to_b, to_c, inside, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """x[a, b, c] to y[to_a, to_b, to_c], in y's dtype; what is not one number is [ROWS, 1]."""
    d = tl.arange(0, BLOCK)[None, :]
    mask = inside & (d < DIM)
    new = tl.load(_tile(x, a, b, c, d), mask=mask)
    tl.store(_tile(y, to_a, to_b, to_c, d), _cast(new, y), mask=mask)


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
    position = _place(starts, start, b) + i
    inside = (r < rows) & (position >= 0) & (position < room)
    _copy(k, k_cache, b, h, i, b, h, position, inside, DIM, BLOCK)
    _copy(v, v_cache, b, h, i, b, h, position, inside, V_DIM, V_BLOCK)


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
    starts, place = (start, 0) if isinstance(start, torch.Tensor) else (None, start)
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
        _starts(starts),
        place,
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
