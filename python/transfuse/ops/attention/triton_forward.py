"""Attention forward in Triton: scores, softmax and output of a tile of queries in one pass over its keys.

With s_ij as in ``triton_scores`` (base 2) and m, l, acc over the keys seen so far (FlashAttention-2, Dao 2023):

    m' = max(m, max_j s_ij)     p_ij = 2^(s_ij - m')     l' = l 2^(m - m') + sum_j p_ij        (l: total)
    acc' = acc 2^(m - m') + (D p) V                      out = acc / l      lse = (m + log2 l) ln 2

One program owns BLOCK_M queries of one head: q [BLOCK_M, BLOCK_D] stays, k [BLOCK_N, BLOCK_D] and v [BLOCK_N, BLOCK_DV]
stream by. The keys that the tile sees are cut in three:

    [low .. inner_low)         left edge of a window
    [inner_low .. inner_high)  every query sees every key: no index is compared, no load of k and v masked
    [inner_high .. high)       diagonal, right edge of a window, last keys

Dense, packed (q_starts, k_starts) and cached rows (k_lengths) differ in ``q_span`` and ``k_span`` alone. Backward needs
q, k, v, out and lse. ``attention_weights`` writes 2^(s - lse log2 e), one program a tile of the probabilities.

The launcher guarantees: head_dim <= BLOCK_D, v_head_dim <= BLOCK_DV, heads a multiple of the key heads, out and lse
filled beforehand where packed rows belong to no sequence, BLOCK_N a multiple of 4 (dropout draws four keys at a time).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from transfuse.ops._triton import dot, kept, launch, precision, rounded
from transfuse.ops._tuning import tuned
from transfuse.ops.attention.triton_scores import (
    LN2,
    LOG2E,
    Lengths,
    dropout,
    first_position,
    inner_key_range,
    k_span,
    key_range,
    of_head,
    per_head,
    q_span,
    raised,
    rows_of,
    rule,
    scores,
    strided,
    tile,
)
from transfuse.ops.attention.triton_tiles import Tiles, block_d, forward_candidates, forward_tiles, step, weights_tiles
from transfuse.ops.attention.variant import Variant

_SHARED_KEYS = 16 << 20
"""Bytes of keys and values that programs side by side may read in turns: well within the L2 of an A100 or later."""


@triton.jit
def _place(q_len, heads, count, section, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """(batch row, head, first query) of this program: section by section, last queries first, then head by head."""
    tiles = tl.cdiv(q_len, BLOCK_M)
    which = tl.program_id(0) // (tiles * section)
    inside = tl.program_id(0) % (tiles * section)
    width = tl.minimum(section, count - which * section)
    of = which * section + inside % width
    return of // heads, of % heads, (tiles - 1 - inside // width) * BLOCK_M


@triton.jit(do_not_specialize=["heads", "group", "q_len", "k_len", "count", "section", "threshold", "grow"])
def attention_forward(  # type: ignore[no-untyped-def]
    q,  # Strided (batch, heads, q_len, HEAD_DIM)
    k,  # Strided (batch, heads // group, k_len, HEAD_DIM)
    v,  # Strided (batch, heads // group, k_len, V_DIM)
    out,  # Strided (batch, heads, q_len, V_DIM)
    lse,  # Strided (batch, heads, q_len, 1), fp32
    mask,  # Strided
    bias,  # Strided
    slopes,  # Strided, of (batch|1, heads)
    sinks,  # Strided, of (heads,)
    lengths,  # Lengths
    rule,  # Rule
    seed,  # int64 (2,), or None without dropout
    heads,
    group,
    q_len,  # of the longest sequence where rows are packed
    k_len,
    count,  # batch * heads
    section,  # how many of those have their tiles side by side in the grid
    threshold,
    grow,  # 1 / (1 - dropout_p)
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    STEP: tl.constexpr,  # columns of q and k in a product; below BLOCK_D q is read at every turn
    PLAIN: tl.constexpr,  # scores are scale * q.k with scale >= 0, where positions hide none
):
    b, h, i_low = _place(q_len, heads, count, section, BLOCK_M)
    q_begin, q_rows = q_span(lengths, b, q_len)
    if i_low >= q_rows:  # of a short sequence
        return
    k_begin, k_rows = k_span(lengths, b, k_len)
    first = first_position(rule, q_rows, k_rows)
    i = i_low + tl.arange(0, BLOCK_M)
    if STEP == BLOCK_D:
        q_tile = rows_of(q, b, h, q_begin + i[:, None], q_begin + q_rows, HEAD_DIM, BLOCK_D, False)
    slope = None
    if slopes.pointer is not None:
        slope = of_head(slopes, b, h)

    i_high = tl.minimum(i_low + BLOCK_M, q_rows)
    low, high = key_range(i_low, i_high, first, k_rows, rule)
    inner_low, inner_high = inner_key_range(i_low, i_high, first, k_rows, rule)
    low = low // BLOCK_N * BLOCK_N
    inner_low = tl.minimum(tl.cdiv(inner_low, BLOCK_N) * BLOCK_N, tl.cdiv(high, BLOCK_N) * BLOCK_N)
    inner_high = tl.maximum(inner_high // BLOCK_N * BLOCK_N, inner_low)
    bounds = (low, inner_low, inner_high, high)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    row = (tl.cast(b, tl.int64) * heads + h) * q_len + i  # as dropout counts them
    for part in tl.static_range(3):
        if part > 0 or rule.left is not None:
            for start in tl.range(bounds[part], bounds[part + 1], BLOCK_N):
                j = start + tl.arange(0, BLOCK_N)
                at = k_begin + j[:, None]
                # S = Q @ K.T [BLOCK_M, BLOCK_N]
                dots = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                if STEP == BLOCK_D:
                    k_tile = rows_of(k, b, h // group, at, k_begin + k_rows, HEAD_DIM, BLOCK_D, part == 1)
                    dots = dot(q_tile, tl.trans(k_tile), dots, PRECISION)
                else:
                    for d in tl.static_range(0, BLOCK_D, STEP):
                        q_tile = rows_of(
                            q, b, h, q_begin + i[:, None], q_begin + q_rows, HEAD_DIM, STEP, False, d, True
                        )
                        k_tile = rows_of(k, b, h // group, at, k_begin + k_rows, HEAD_DIM, STEP, part == 1, d)
                        dots = dot(q_tile, tl.trans(k_tile), dots, PRECISION)
                s, _ = scores(
                    dots, i[:, None], j[None, :], b, h, first, q_rows, k_rows, mask, bias, slope, rule, part != 1
                )
                if part == 1 and PLAIN:  # the largest score is that of the largest product: one less a score
                    highest = tl.max(dots, 1) * (rule.scale * LOG2E)
                else:
                    highest = tl.max(s, 1)
                m, finite, shrink = raised(m, highest)
                p = tl.exp2(s - finite[:, None])
                total = total * shrink + tl.sum(p, 1)
                if seed is not None:
                    p = tl.where(kept(seed, row, start, threshold, BLOCK_N), p, 0.0)
                v_tile = rows_of(v, b, h // group, at, k_begin + k_rows, V_DIM, BLOCK_DV, part == 1)
                # O += P @ V [BLOCK_M, BLOCK_DV]
                acc = dot(rounded(p, v_tile.dtype), v_tile, acc * shrink[:, None], PRECISION)

    if sinks.pointer is not None:
        # One more key, with no value.
        sink = of_head(sinks, b, h) * LOG2E
        m, finite, shrink = raised(m, sink)
        total = total * shrink + tl.exp2(sink - finite)
        acc = acc * shrink[:, None]
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    acc = acc * (grow / total)[:, None]
    column = tl.arange(0, BLOCK_DV)[None, :]
    inside = i < q_rows
    tl.store(
        tile(out, b, h, q_begin + i[:, None], column),
        rounded(acc, out.pointer.dtype.element_ty),
        mask=inside[:, None] & (column < V_DIM),
    )
    natural = tl.where(nothing, float("-inf"), (m + tl.log2(total)) * LN2)
    tl.store(tile(lse, b, h, q_begin + i, i * 0), natural, mask=inside)


@triton.jit(do_not_specialize=["heads", "group", "q_len", "k_len"])
def attention_weights(  # type: ignore[no-untyped-def]
    q,  # Strided (batch, heads, q_len, HEAD_DIM)
    k,  # Strided (batch, heads // group, k_len, HEAD_DIM)
    lse,  # Strided (batch, heads, q_len, 1)
    weights,  # Strided (batch, heads, q_len, k_len)
    mask,  # Strided
    bias,  # Strided
    slopes,  # Strided, of (batch|1, heads)
    rule,  # Rule
    heads,
    group,
    q_len,
    k_len,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STEP: tl.constexpr,
):
    pid = tl.program_id(0)
    across, down = tl.cdiv(k_len, BLOCK_N), tl.cdiv(q_len, BLOCK_M)
    of = pid // (across * down)
    b, h = of // heads, of % heads
    i = pid // across % down * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    j = pid % across * BLOCK_N + tl.arange(0, BLOCK_N)
    first = first_position(rule, q_len, k_len)
    slope = None
    if slopes.pointer is not None:
        slope = of_head(slopes, b, h)
    dots = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for d in tl.static_range(0, BLOCK_D, STEP):
        q_tile = rows_of(q, b, h, i, q_len, HEAD_DIM, STEP, False, d)
        k_tile = rows_of(k, b, h // group, j[:, None], k_len, HEAD_DIM, STEP, False, d)
        dots = dot(q_tile, tl.trans(k_tile), dots, PRECISION)
    j = j[None, :]
    s, _ = scores(dots, i, j, b, h, first, q_len, k_len, mask, bias, slope, rule, True)
    offset = tl.load(tile(lse, b, h, i, i * 0), mask=i < q_len, other=0.0).to(tl.float32) * LOG2E
    offset = tl.where(offset == float("-inf"), 0.0, offset)
    p = tl.exp2(s - offset)
    inside = (i < q_len) & (j < k_len)
    tl.store(tile(weights, b, h, i, j), rounded(p, weights.pointer.dtype.element_ty), mask=inside)


def forward(
    q: torch.Tensor,  # (batch, heads, q_len, head_dim); packed rows: (1, heads, total_q, head_dim)
    k: torch.Tensor,  # (batch, kv_heads, k_len, head_dim), likewise
    v: torch.Tensor,  # (batch, kv_heads, k_len, v_head_dim), likewise
    variant: Variant,
    seed: torch.Tensor | None,
    lengths: Lengths,
    max_q: int,
    max_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out like q but v_head_dim wide, lse (batch, heads, q_len) fp32); max_q, max_k: no row is longer."""
    heads, head_dim, v_dim = q.shape[1], q.shape[3], v.shape[3]
    if lengths.q_starts is None:
        batch = q.shape[0]
        out = q.new_empty(*q.shape[:3], v_dim)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    else:  # rows in memory as they came in; some may belong to no sequence
        batch = lengths.q_starts.shape[0] - 1
        out = q.new_zeros(q.shape[2], heads, v_dim).transpose(0, 1)[None]
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    if batch * heads * max_q == 0:
        return out, lse
    group = heads // k.shape[1]
    seed, threshold, grow = dropout(variant, seed)

    def run(tiles: Tiles) -> None:
        count = batch * heads
        section = _section(variant, k, v, max_k, group, count)
        launch(
            attention_forward,
            triton.cdiv(max_q, tiles.BLOCK_M) * count,
            strided(q),
            strided(k),
            strided(v),
            strided(out),
            strided(lse[..., None]),
            strided(variant.mask),
            strided(variant.bias),
            per_head(variant.alibi_slopes),
            per_head(variant.sinks),
            lengths,
            rule(variant),
            seed,
            heads,
            group,
            max_q,
            max_k,
            count,
            section,
            threshold,
            grow,
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
            STEP=step(q, v, variant),
            PLAIN=variant.scale >= 0 and variant.softcap == 0 and variant[:3] == (None, None, None),
        )

    key, tiles = forward_tiles(q, v, variant, max_q, max_k)
    tuned("attention_forward", key, tiles, forward_candidates(tiles), run, q.device)
    return out, lse


def _section(variant: Variant, k: torch.Tensor, v: torch.Tensor, k_len: int, group: int, count: int) -> int:
    """How many heads have their tiles side by side.

    Where later queries see more keys the last tiles of many heads start together, so that no long one is left for the
    end; as many heads as have their keys in L2 at a time. Otherwise head by head, which shares keys best.
    """
    if variant.right < 0:
        return 1
    of_one = k_len * (k.shape[3] + v.shape[3]) * k.element_size()
    return min(count, max(1, _SHARED_KEYS // max(of_one, 1)) * group)


def weights(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, variant: Variant) -> torch.Tensor:
    """P: (batch, heads, q_len, k_len) in q's dtype, zero in rows whose lse is -inf."""
    (batch, heads, q_len, head_dim), k_len = q.shape, k.shape[2]
    p = q.new_empty(batch, heads, q_len, k_len)
    if p.numel() == 0:
        return p
    tiles = weights_tiles(q, k_len)
    programs = triton.cdiv(q_len, tiles.BLOCK_M) * triton.cdiv(k_len, tiles.BLOCK_N) * batch * heads
    launch(
        attention_weights,
        programs,
        strided(q),
        strided(k),
        strided(lse[..., None]),
        strided(p),
        strided(variant.mask),
        strided(variant.bias),
        per_head(variant.alibi_slopes),
        rule(variant),
        heads,
        heads // k.shape[1],
        q_len,
        k_len,
        device=q.device,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        HEAD_DIM=head_dim,
        BLOCK_M=tiles.BLOCK_M,
        BLOCK_N=tiles.BLOCK_N,
        BLOCK_D=block_d(head_dim),
        PRECISION=precision(q.dtype),
        STEP=min(64, block_d(head_dim)),
    )
    return p
