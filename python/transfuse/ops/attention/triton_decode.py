"""Attention of few query rows over many keys: the keys are split among programs, whose results are then combined.

    m_s = max_j s_ij    l_s = sum_j e^(s_ij - m_s)    o_s = sum_j D_ij e^(s_ij - m_s) v_j / l_s    over keys of split s
    m = max_s m_s (and the sink)    w_s = l_s e^(m_s - m)    L = sum_s w_s + e^(sink - m)
    out_i = sum_s w_s o_s / L       lse_i = m + log L

Rows of a tile: the queries of all heads that share one key head, r = g * q_len + i, so that keys and values are read
once for all of them. Rows beyond the last repeat it and are not stored.
Program of _attend -> (batch row, key head, split, row tile), row tiles fastest. It cuts what its batch row's queries
can see, [low, high) by window and by the length read on the device, into equal runs of key tiles and takes one run;
where there are fewer tiles than splits some get none and leave l = 0.
Program of _combine -> one query row: a fixed order, so the same bits every time. One split needs no second launch.
m and l are kept, not their lse: where all scores are finfo.min, log l is lost beside m.
Saved for backward: out and lse. The launcher guarantees rows = batch * heads * q_len > 0, heads a multiple of kv_heads,
contiguous outputs and partials, and splits <= MOST_SPLITS.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from transfuse.ops._triton import dot, kept, launch, multiprocessors, precision, rounded
from transfuse.ops._tuning import tuned
from transfuse.ops.attention.splits import MOST_SPLITS, choose_splits, fewest_tiles, most_keys_seen
from transfuse.ops.attention.triton_scores import (
    LN2,
    LOG2E,
    Lengths,
    Strided,
    dropout,
    first_position,
    k_span,
    key_range,
    of_head,
    per_head,
    raised,
    rows_of,
    rule,
    scores,
    strided,
    tile,
)
from transfuse.ops.attention.triton_tiles import Tiles, block_d, capped
from transfuse.ops.attention.variant import Variant

MOST_ROWS = 128
"""heads / kv_heads * q_len up to here go split; beyond, programs of other queries fill the GPU."""
_FORWARD_ROWS = 64  # of one program of the kernel for many queries
_PROGRAMS_PER_SM = 2  # what the tiles' shared memory admits; the second loads while the first computes


class Partial(NamedTuple):
    """What programs leave for _combine: o_s, and m_s (base 2) and l_s, each split by split; None where there is one."""

    out: torch.Tensor | None  # (splits, rows, v_head_dim) fp32
    highest: torch.Tensor | None  # (splits, rows) fp32
    total: torch.Tensor | None  # (splits, rows) fp32


@triton.jit
def _run_of_keys(rule, q_len, length, first, split, splits, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """[start, stop) of one split; start is a multiple of BLOCK_N, so that loads along keys are aligned."""
    low, high = key_range(0, q_len, first, length, rule)
    low = low // BLOCK_N * BLOCK_N
    run = tl.cdiv(tl.cdiv(high - low, BLOCK_N), splits) * BLOCK_N
    start = low + split * run
    return start, tl.minimum(start + run, high)


@triton.jit(
    do_not_specialize=[
        "heads",
        "kv_heads",
        "q_len",
        "k_len",
        "rows",
        "row_tiles",
        "splits",
        "threshold",
        "kept_scale",
    ]
)
def _attend(  # type: ignore[no-untyped-def]
    q,  # Strided, (batch, heads, q_len, head_dim)
    k,  # Strided, (batch, kv_heads, k_len, head_dim)
    v,  # Strided, (batch, kv_heads, k_len, v_head_dim)
    mask,
    bias,
    slopes,
    sinks,  # absent where there are several splits: _combine adds them
    lengths,
    seed,
    out,  # (rows, v_head_dim), rows = (batch, heads, q_len)
    lse,  # (rows,)
    partial,
    rule,
    heads,
    kv_heads,
    q_len,
    k_len,
    rows,
    row_tiles,
    splits,
    threshold,
    kept_scale,  # 1 / (1 - dropout_p)
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    split = program // row_tiles % splits
    kv_head = program // row_tiles // splits % kv_heads
    b = program // row_tiles // splits // kv_heads
    group = heads // kv_heads

    r = program % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = r < group * q_len
    r = tl.minimum(r, group * q_len - 1)
    h = (kv_head * group + r // q_len)[:, None]
    i = (r % q_len)[:, None]
    row = (b.to(tl.int64) * heads + kv_head * group) * q_len + r

    d = tl.arange(0, BLOCK_D)[None, :]
    q_tile = tl.load(tile(q, b, h, i, d), mask=d < HEAD_DIM, other=0.0)  # [BLOCK_M, BLOCK_D]
    slope = None
    if slopes.pointer is not None:
        slope = of_head(slopes, b, h)

    length = k_span(lengths, b, k_len)[1]
    first = first_position(rule, q_len, length)
    start, stop = _run_of_keys(rule, q_len, length, first, split, splits, BLOCK_N)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for j0 in range(start, stop, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        k_tile = rows_of(k, b, kv_head, j[:, None], stop, HEAD_DIM, BLOCK_D, False)  # what stands beyond may be NaN
        dots = dot(q_tile, tl.trans(k_tile), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        # Every tile is taken as an edge: hiding keys costs little beside loading them, and the body stands once.
        s = scores(dots, i, j[None, :], b, h, first, q_len, stop, mask, bias, slope, rule, True)[0]
        m, base, shrink = raised(m, tl.max(s, 1))
        p = tl.exp2(s - base[:, None])  # [BLOCK_M, BLOCK_N]
        l = l * shrink + tl.sum(p, 1)  # noqa: E741
        if seed is not None:
            p = tl.where(kept(seed, row, j0, threshold, BLOCK_N), p, 0.0)
        v_tile = rows_of(v, b, kv_head, j[:, None], stop, V_DIM, BLOCK_DV, False)
        acc = dot(rounded(p, v_tile.dtype), v_tile, acc * shrink[:, None], PRECISION)

    if sinks.pointer is not None:
        sink = tl.reshape(of_head(sinks, b, h), [BLOCK_M]) * LOG2E
        m, base, shrink = raised(m, sink)
        l = l * shrink + tl.exp2(sink - base)  # noqa: E741
        acc = acc * shrink[:, None]

    some = tl.where(l == 0.0, 1.0, l)
    acc = acc * (kept_scale / some)[:, None]
    dv = tl.arange(0, BLOCK_DV)[None, :]
    stored = inside[:, None] & (dv < V_DIM)
    if partial.out is None:
        tl.store(out + row[:, None] * V_DIM + dv, rounded(acc, out.dtype.element_ty), mask=stored)
        tl.store(lse + row, m * LN2 + tl.log(some), mask=inside)
    else:
        place = split.to(tl.int64) * rows + row
        tl.store(partial.out + place[:, None] * V_DIM + dv, acc, mask=stored)
        tl.store(partial.highest + place, m, mask=inside)
        tl.store(partial.total + place, l, mask=inside)


@triton.jit(do_not_specialize=["heads", "q_len", "rows", "splits"])
def _combine(  # type: ignore[no-untyped-def]
    partial,
    sinks,
    out,  # (rows, v_head_dim)
    lse,  # (rows,)
    heads,
    q_len,
    rows,
    splits,
    V_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
):
    program = tl.program_id(0)
    row = program.to(tl.int64)
    each = tl.arange(0, MOST_SPLITS)
    place = each.to(tl.int64) * rows + row
    highest = tl.load(partial.highest + place, mask=each < splits, other=float("-inf"))
    m = tl.max(highest, 0)
    if sinks.pointer is not None:
        sink = of_head(sinks, program // q_len // heads, program // q_len % heads) * LOG2E
        m = tl.maximum(m, sink)
    base = tl.where(m == float("-inf"), 0.0, m)
    total = tl.sum(tl.load(partial.total + place, mask=each < splits, other=0.0) * tl.exp2(highest - base), 0)
    if sinks.pointer is not None:
        total += tl.exp2(sink - base)
    some = tl.where(total == 0.0, 1.0, total)

    dv = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for s0 in range(0, splits, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        one = s.to(tl.int64) * rows + row
        w = tl.load(partial.total + one, mask=s < splits, other=0.0)
        w *= tl.exp2(tl.load(partial.highest + one, mask=s < splits, other=float("-inf")) - base)
        inside = (s < splits)[:, None] & (dv < V_DIM)[None, :]
        o = tl.load(partial.out + one[:, None] * V_DIM + dv[None, :], mask=inside, other=0.0)  # [BLOCK_S, BLOCK_DV]
        acc += tl.sum(w[:, None] * o, 0)
    tl.store(out + row * V_DIM + dv, rounded(acc / some, out.dtype.element_ty), mask=dv < V_DIM)
    tl.store(lse + row, m * LN2 + tl.log(some))


def decode_forward(
    q: torch.Tensor,  # (batch, heads, q_len, head_dim)
    k: torch.Tensor,  # (batch, kv_heads, k_len, head_dim)
    v: torch.Tensor,  # (batch, kv_heads, k_len, v_head_dim)
    variant: Variant,
    seed: torch.Tensor | None = None,
    cache_lengths: torch.Tensor | None = None,  # (batch,) int32 or int64: how many keys of each row count; None: all
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (batch, heads, q_len, v_head_dim), lse (batch, heads, q_len)), for up to MOST_ROWS rows a key head."""
    batch, heads, q_len, head_dim = q.shape
    _, kv_heads, k_len, v_dim = v.shape
    out = q.new_empty(batch, heads, q_len, v_dim)
    lse = q.new_empty(batch, heads, q_len, dtype=torch.float32)
    rows = batch * heads * q_len
    if rows == 0:
        return out, lse
    group_rows = heads // kv_heads * q_len
    slots = _PROGRAMS_PER_SM * multiprocessors(q.device)
    seed, threshold, kept_scale = dropout(variant, seed)

    def run(tiles: Tiles) -> None:
        row_tiles = triton.cdiv(group_rows, tiles.BLOCK_M)
        programs = batch * kv_heads * row_tiles
        key_tiles = triton.cdiv(most_keys_seen(variant, q_len, k_len), tiles.BLOCK_N)
        splits = choose_splits(programs, key_tiles, fewest_tiles(group_rows, k, v, tiles.BLOCK_N), slots)
        partial, sinks = Partial(None, None, None), per_head(variant.sinks)
        if splits > 1:
            partial = Partial(
                q.new_empty(splits, rows, v_dim, dtype=torch.float32),
                *(q.new_empty(splits, rows, dtype=torch.float32) for _ in range(2)),
            )
        launch(
            _attend,
            programs * splits,
            strided(q),
            strided(k),
            strided(v),
            strided(variant.mask),
            strided(variant.bias),
            per_head(variant.alibi_slopes),
            sinks if splits == 1 else per_head(None),
            Lengths(k_lengths=cache_lengths),
            seed,
            out,
            lse,
            partial,
            rule(variant),
            heads,
            kv_heads,
            q_len,
            k_len,
            rows,
            row_tiles,
            splits,
            threshold,
            kept_scale,
            device=q.device,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            HEAD_DIM=head_dim,
            V_DIM=v_dim,
            BLOCK_M=tiles.BLOCK_M,
            BLOCK_N=tiles.BLOCK_N,
            BLOCK_D=block_d(head_dim),
            BLOCK_DV=block_d(v_dim),
            PRECISION=precision(q.dtype),
        )
        if splits > 1:
            _launch_combine(partial, sinks, out, lse, splits)

    chosen = decode_tiles(group_rows, k_len, q.dtype, max(head_dim, v_dim))
    key = (group_rows, batch * kv_heads, triton.next_power_of_2(max(k_len, 1)), head_dim, v_dim, q.dtype)
    tuned("attention_decode", key, chosen, candidates(chosen), run, q.device)
    return out, lse


def _launch_combine(partial: Partial, sinks: Strided, out: torch.Tensor, lse: torch.Tensor, splits: int) -> None:
    _, heads, q_len, v_dim = out.shape
    block = block_d(v_dim)
    launch(
        _combine,
        lse.numel(),
        partial,
        sinks,
        out,
        lse,
        heads,
        q_len,
        lse.numel(),
        splits,
        device=out.device,
        num_warps=1 if block <= 64 else 2,
        num_stages=2,
        V_DIM=v_dim,
        BLOCK_DV=block,
        BLOCK_S=max(1, 1024 // block),  # a thread holds 16 to 32 numbers of a step
        MOST_SPLITS=MOST_SPLITS,
    )


def decode_tiles(group_rows: int, k_len: int, dtype: torch.dtype, dim: int) -> Tiles:
    """Tiles of _attend, which mostly waits for keys: enough of them under way, and what is computed kept in registers.

    BLOCK_N: two stages of keys and values in at most 64 KiB, so that two programs share an SM. BLOCK_M: the rows there
    are; not more than fit beside the accumulator, as q stays in registers too, in fp32 as three tf32 parts. Other tiles
    of rows read the same keys from L2. Four warps issue the loads; eight share the registers of the widest heads.
    """
    width, wide = block_d(dim), dtype.itemsize == 4
    rows = (32 if width <= 64 else 16) if wide else (64 if width <= 64 else 32)
    keys = min(max((1 << 15) // (2 * width * dtype.itemsize), 16), 32 if wide else 64)
    return capped(Tiles(rows, keys, num_warps=4 if width <= 128 else 8, num_stages=2), group_rows, k_len)


def candidates(chosen: Tiles) -> list[Tiles]:
    """What is worth measuring instead of the chosen tiles."""
    found = [chosen._replace(BLOCK_N=max(16, chosen.BLOCK_N // 2)), chosen._replace(BLOCK_N=2 * chosen.BLOCK_N)]
    found += [chosen._replace(num_stages=3), chosen._replace(num_warps=2), chosen._replace(num_warps=8)]
    return found


def few_rows(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether the queries that share a key head are few enough for decode_forward."""
    return k.shape[1] == 0 or q.shape[1] // k.shape[1] * q.shape[2] <= MOST_ROWS


def use_splits(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether a dense call of these shapes should come here instead of to the kernel for many queries.

    Yes for few rows whose keys would else be read once a head of the group, or whose programs would leave most of the
    GPU idle; no where a program would have too few keys to share.
    """
    batch, heads, q_len, _ = q.shape
    kv_heads, k_len = k.shape[1], k.shape[2]
    if not few_rows(q, k) or k_len < 128:
        return False
    unsplit = batch * heads * triton.cdiv(q_len, _FORWARD_ROWS)
    return (heads > kv_heads and q_len <= 16) or 2 * unsplit < _PROGRAMS_PER_SM * multiprocessors(q.device)
