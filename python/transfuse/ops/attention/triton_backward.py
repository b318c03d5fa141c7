"""Attention backward in Triton: delta, dK and dV, dQ; with them the gradients of sinks, ALiBi slopes and a whole bias.

    delta_i = dO_i.out_i - dlse_i         dV = (D P)^T dO         dK = scale (c dS)^T Q         dQ = scale (c dS) K
    dbias = dS          dslope = -sum dS_ij |p_i - j|             dsink = -sum_i exp(sink - lse_i) delta_i

with P and dS from ``triton_gradients`` and c the derivative of soft capping. Nothing is added to by two programs:

    attention_backward_delta   BLOCK_M queries of a head      delta, a partial dsink
    attention_backward_dkdv    BLOCK_N keys of a kv head      dK, dV: all heads of its group, all queries that see it,
                                                              in tiles of scores that stand keys by queries, so that
                                                              P^T and dS^T are what the tensor cores read
    attention_backward_dq      BLOCK_M queries of a head      dQ: all keys that it sees; the bias gradient where the
                                                              bias has every score's shape; a partial dslope

Partial sums are added up afterwards, always in the same order: the gradients repeat bitwise. Loops run over tiles at
a window's edges and over inner tiles, which need no masks. All accumulation is in fp32; P and dS are rounded to the
inputs' dtype before the tensor cores read them.

The launcher guarantees: any strides, and head_dim up to 256, padded to BLOCK_D with zeros; q_len the longest batch
row's; dK and dV zero already where packed keys belong to no sequence, a bias gradient where tiles are skipped.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from transfuse.ops._triton import dot, kept, launch, rounded
from transfuse.ops._tuning import tuned
from transfuse.ops.attention.torch_chunks import Gradients
from transfuse.ops.attention.triton_backward_tiles import delta_rows, dkdv_tiles, dq_tiles
from transfuse.ops.attention.triton_bias_grad import bias_gradient
from transfuse.ops.attention.triton_gradients import (
    NUMBERS,
    Call,
    base2,
    constants,
    cut,
    like,
    make_call,
    products,
    statistics_of,
    tile_at,
    zeros,
)
from transfuse.ops.attention.triton_scores import (
    LOG2E,
    Lengths,
    first_position,
    inner_key_range,
    inner_query_range,
    k_span,
    key_range,
    of_head,
    per_head,
    q_span,
    query_range,
    rows_of,
    scores,
    strided,
    tile,
)
from transfuse.ops.attention.triton_tiles import Tiles, block_d
from transfuse.ops.attention.variant import Variant


@triton.jit(do_not_specialize=["heads", "q_len", "tiles"])
def attention_backward_delta(  # type: ignore[no-untyped-def]
    dout,  # Strided (batch, heads, q_len, V_DIM)
    out,  # Strided, as dout
    dlse,  # Strided (batch, heads, q_len, 1), or absent
    lse,  # Strided (batch, heads, q_len, 1)
    delta,  # Strided (batch, heads, q_len, 1)
    sinks,  # per head
    dsinks,  # (batch, heads, tiles) fp32, or None
    lengths,
    heads,
    q_len,
    tiles,
    V_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    program = tl.program_id(0)
    h = program // tiles % heads
    b = program // tiles // heads
    begin, length = q_span(lengths, b, q_len)
    i = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    i_at, end = begin + i[:, None], begin + length
    product = rows_of(dout, b, h, i_at, end, V_DIM, BLOCK_DV, False).to(tl.float32)
    product *= rows_of(out, b, h, i_at, end, V_DIM, BLOCK_DV, False).to(tl.float32)
    d = tl.sum(product, 1)
    if dlse.pointer is not None:
        d -= statistics_of(dlse, b, h, begin, i, length, 0.0, True).to(tl.float32)
    tl.store(tile(delta, b, h, begin + i, i * 0), d, mask=i < length)
    if dsinks is not None:
        lse2 = base2(statistics_of(lse, b, h, begin, i, length, float("inf"), True))
        tl.store(dsinks + program, -tl.sum(tl.exp2(of_head(sinks, b, h) * LOG2E - lse2) * d, 0))


@triton.jit(do_not_specialize=[*NUMBERS, "tiles"])
def attention_backward_dkdv(  # type: ignore[no-untyped-def]
    inputs,
    rule,
    lengths,
    seed,
    threshold,
    up,
    heads,
    group,
    q_len,
    k_len,
    dk,  # Strided (batch, kv_heads, k_len, DIM)
    dv,  # Strided (batch, kv_heads, k_len, V_DIM)
    tiles,  # of keys
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    # Under causal attention the first keys are seen most: they come first.
    program = tl.program_id(0)
    j_low = program % tiles * BLOCK_N
    kv_head = program // tiles % (heads // group)
    b = program // tiles // (heads // group)
    q_begin, q_length = q_span(lengths, b, q_len)
    k_begin, k_length = k_span(lengths, b, k_len)
    first = first_position(rule, q_length, k_length)
    j = j_low + tl.arange(0, BLOCK_N)
    j_at, k_end, q_end = k_begin + j[:, None], k_begin + k_length, q_begin + q_length
    if RESIDENT:
        k_tile = rows_of(inputs.k, b, kv_head, j_at, k_end, DIM, BLOCK_D, False)  # [BLOCK_N, BLOCK_D]
        v_tile = rows_of(inputs.v, b, kv_head, j_at, k_end, V_DIM, BLOCK_DV, False)  # [BLOCK_N, BLOCK_DV]
    dk_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_sum = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    j_high = tl.minimum(j_low + BLOCK_N, k_length)
    low, high = query_range(j_low, j_high, first, q_length, rule)
    inner_low, inner_high = inner_query_range(j_low, j_high, first, q_length, rule)
    # Keys beyond the last are hidden by masks alone.
    inner_high = tl.where(j_low + BLOCK_N <= k_length, inner_high, 0)
    high = tl.where(j_low < k_length, high, 0)
    start, before, inner, edges = cut(low, high, inner_low, inner_high, BLOCK_M)

    # All heads of the group in one loop: what does not hang on the head would otherwise be kept in registers all along.
    for EDGE in tl.static_range(2):
        count = edges if EDGE else inner
        for unit in tl.range(0, group * count, num_stages=1 if EDGE else None):
            h = kv_head * group + unit // tl.maximum(count, 1)
            i_low = tile_at(unit % tl.maximum(count, 1), start, before, inner, EDGE) * BLOCK_M
            slope = None
            if inputs.slopes.pointer is not None:
                slope = of_head(inputs.slopes, b, h)
            i = i_low + tl.arange(0, BLOCK_M)
            i_at = q_begin + i[:, None]
            lse2 = base2(statistics_of(inputs.lse, b, h, q_begin, i, q_length, float("inf"), EDGE))
            # S^T = K Q^T [BLOCK_N, BLOCK_M]
            if RESIDENT:
                q_tile = rows_of(inputs.q, b, h, i_at, q_end, DIM, BLOCK_D, not EDGE)  # [BLOCK_M, BLOCK_D]
                dots = dot(k_tile, tl.trans(q_tile), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), PRECISION)
            else:
                dots = products(inputs.k, inputs.q, b, kv_head, h, j_at, k_end, i_at, q_end, DIM, PRECISION)
            s, through = scores(
                dots, i[None, :], j[:, None], b, h, first, q_length, k_length,
                inputs.mask, inputs.bias, slope, rule, EDGE,
            )  # fmt: skip
            p = tl.exp2(s - lse2[None, :])
            dropped = p
            if seed is not None:
                row = (tl.cast(b, tl.int64) * heads + h) * q_len + i
                keep = tl.trans(kept(seed, row, j_low, threshold, BLOCK_N))
                dropped = tl.where(keep, p * up, 0.0)
            dout_tile = rows_of(inputs.dout, b, h, i_at, q_end, V_DIM, BLOCK_DV, not EDGE)
            # dV += (D P)^T dO [BLOCK_N, BLOCK_DV]
            dv_sum = dot(rounded(dropped, dout_tile.dtype), dout_tile, dv_sum, PRECISION)
            # dP^T = V dO^T [BLOCK_N, BLOCK_M]
            if RESIDENT:
                dp = dot(v_tile, tl.trans(dout_tile), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), PRECISION)
            else:
                dp = products(inputs.v, inputs.dout, b, kv_head, h, j_at, k_end, i_at, q_end, V_DIM, PRECISION)
            if seed is not None:
                dp = tl.where(keep, dp * up, 0.0)
            delta = statistics_of(inputs.delta, b, h, q_begin, i, q_length, 0.0, EDGE)
            ds = p * (dp - delta[None, :]) * through
            if not RESIDENT:
                q_tile = rows_of(inputs.q, b, h, i_at, q_end, DIM, BLOCK_D, not EDGE)
            # dK += dS^T Q [BLOCK_N, BLOCK_D]
            dk_sum = dot(rounded(ds, q_tile.dtype), q_tile, dk_sum, PRECISION)

    stored = k_length
    if lengths.k_starts is None:
        stored = k_len  # zeros where a cache is not filled
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (j < stored)[:, None]
    low_dk = rounded(dk_sum * rule.scale, dk.pointer.dtype.element_ty)
    tl.store(tile(dk, b, kv_head, j_at, d), low_dk, mask=inside & (d < DIM))
    d = tl.arange(0, BLOCK_DV)[None, :]
    low_dv = rounded(dv_sum, dv.pointer.dtype.element_ty)
    tl.store(tile(dv, b, kv_head, j_at, d), low_dv, mask=inside & (d < V_DIM))


@triton.jit(do_not_specialize=[*NUMBERS, "tiles"])
def attention_backward_dq(  # type: ignore[no-untyped-def]
    inputs,
    rule,
    lengths,
    seed,
    threshold,
    up,
    heads,
    group,
    q_len,
    k_len,
    dq,  # Strided (batch, heads, q_len, DIM)
    dbias,  # Strided (batch, heads, q_len, k_len), or absent
    dslopes,  # (batch, heads, tiles) fp32, or None
    tiles,  # of queries
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    # Under causal attention the last queries see the most keys: they come first.
    program = tl.program_id(0)
    i_low = (tiles - 1 - program % tiles) * BLOCK_M
    h = program // tiles % heads
    b = program // tiles // heads
    kv_head = h // group
    q_begin, q_length = q_span(lengths, b, q_len)
    k_begin, k_length = k_span(lengths, b, k_len)
    first = first_position(rule, q_length, k_length)
    i = i_low + tl.arange(0, BLOCK_M)
    i_at, q_end, k_end = q_begin + i[:, None], q_begin + q_length, k_begin + k_length
    if RESIDENT:
        q_tile = rows_of(inputs.q, b, h, i_at, q_end, DIM, BLOCK_D, False)  # [BLOCK_M, BLOCK_D]
        dout_tile = rows_of(inputs.dout, b, h, i_at, q_end, V_DIM, BLOCK_DV, False)  # [BLOCK_M, BLOCK_DV]
    lse2 = base2(statistics_of(inputs.lse, b, h, q_begin, i, q_length, float("inf"), True))
    delta = statistics_of(inputs.delta, b, h, q_begin, i, q_length, 0.0, True)
    row = (tl.cast(b, tl.int64) * heads + h) * q_len + i
    slope = None
    if inputs.slopes.pointer is not None:
        slope = of_head(inputs.slopes, b, h)
    dq_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dslope_sum = tl.zeros([BLOCK_M], tl.float32)

    i_high = tl.minimum(i_low + BLOCK_M, q_length)
    low, high = key_range(i_low, i_high, first, k_length, rule)
    inner_low, inner_high = inner_key_range(i_low, i_high, first, k_length, rule)
    high = tl.where(i_low < q_length, high, 0)
    start, before, inner, edges = cut(low, high, inner_low, inner_high, BLOCK_N)

    for EDGE in tl.static_range(2):
        for unit in tl.range(0, edges if EDGE else inner, num_stages=1 if EDGE else None):
            j_low = tile_at(unit, start, before, inner, EDGE) * BLOCK_N
            j = j_low + tl.arange(0, BLOCK_N)
            j_at = k_begin + j[:, None]
            # S = Q K^T [BLOCK_M, BLOCK_N]
            if RESIDENT:
                k_tile = rows_of(inputs.k, b, kv_head, j_at, k_end, DIM, BLOCK_D, not EDGE)  # [BLOCK_N, BLOCK_D]
                dots = dot(q_tile, tl.trans(k_tile), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
            else:
                dots = products(inputs.q, inputs.k, b, h, kv_head, i_at, q_end, j_at, k_end, DIM, PRECISION)
            s, through = scores(
                dots, i[:, None], j[None, :], b, h, first, q_length, k_length,
                inputs.mask, inputs.bias, slope, rule, EDGE,
            )  # fmt: skip
            p = tl.exp2(s - lse2[:, None])
            # dP = dO V^T [BLOCK_M, BLOCK_N]
            if RESIDENT:
                v_tile = rows_of(inputs.v, b, kv_head, j_at, k_end, V_DIM, BLOCK_DV, not EDGE)  # [BLOCK_N, BLOCK_DV]
                dp = dot(dout_tile, tl.trans(v_tile), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
            else:
                dp = products(inputs.dout, inputs.v, b, h, kv_head, i_at, q_end, j_at, k_end, V_DIM, PRECISION)
            if seed is not None:
                dp = tl.where(kept(seed, row, j_low, threshold, BLOCK_N), dp * up, 0.0)
            ds = p * (dp - delta[:, None])
            if dbias.pointer is not None:
                inside = (i < q_length)[:, None] & (j < k_length)[None, :]
                low_ds = rounded(ds, dbias.pointer.dtype.element_ty)
                tl.store(tile(dbias, b, h, i[:, None], j[None, :]), low_ds, mask=inside)
            if dslopes is not None:
                distance = tl.abs(first + i[:, None] - j[None, :]).to(tl.float32)
                dslope_sum += tl.sum(ds * distance, 1)
            if not RESIDENT:
                k_tile = rows_of(inputs.k, b, kv_head, j_at, k_end, DIM, BLOCK_D, not EDGE)
            # dQ += dS K [BLOCK_M, BLOCK_D]
            dq_sum = dot(rounded(ds * through, k_tile.dtype), k_tile, dq_sum, PRECISION)

    if dslopes is not None:
        tl.store(dslopes + program, -tl.sum(dslope_sum, 0))
    d = tl.arange(0, BLOCK_D)[None, :]
    low_dq = rounded(dq_sum * rule.scale, dq.pointer.dtype.element_ty)
    tl.store(tile(dq, b, h, i_at, d), low_dq, mask=(i < q_length)[:, None] & (d < DIM))


def backward(
    dout: torch.Tensor,  # (batch, heads, q_len, v_head_dim); packed rows: (1, heads, total_q, v_head_dim)
    dlse: torch.Tensor | None,  # (batch, heads, q_len), likewise
    q: torch.Tensor,  # (batch, heads, q_len, head_dim), likewise
    k: torch.Tensor,  # (batch, kv_heads, k_len, head_dim), likewise
    v: torch.Tensor,  # (batch, kv_heads, k_len, v_head_dim), likewise
    out: torch.Tensor,
    lse: torch.Tensor,
    variant: Variant,
    seed: torch.Tensor | None,
    want: tuple[bool, bool, bool],
    lengths: Lengths,
    max_q: int,
    max_k: int,
) -> Gradients:
    """(dq, dk, dv, dbias, dalibi_slopes, dsinks), the last three where they are wanted; max_q, max_k: as in forward."""
    wanted = [t if w else None for t, w in zip(variant[1:4], want, strict=True)]
    packed = lengths.q_starts is not None
    batch = q.shape[0] if lengths.q_starts is None else lengths.q_starts.shape[0] - 1
    if batch * q.shape[1] * max_q == 0:
        return tuple(None if t is None else zeros(t) for t in (q, k, v, *wanted))  # type: ignore[return-value]
    delta, dsinks = _delta(dout, dlse, out, lse, wanted[2], lengths, batch, max_q)
    call = make_call(q, k, v, dout, lse, delta, variant, seed, lengths, max_q, max_k)
    dk, dv = _dkdv(call, batch, k, v, like(k, packed), like(v, packed))
    dq, dbias, dslopes = _dq(call, batch, variant, like(q, packed), v, wanted[0], wanted[1])
    if wanted[0] is not None and dbias is None:
        dbias = bias_gradient(call, batch, q, v, wanted[0])
    return dq, dk, dv, dbias, dslopes, dsinks


def _delta(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    sinks: torch.Tensor | None,  # None where no gradient of theirs is wanted
    lengths: Lengths,
    batch: int,
    max_q: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(delta like lse, the gradient of sinks)."""
    heads, width = out.shape[1], out.shape[3]
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    rows, warps = delta_rows(width, max_q)
    tiles = triton.cdiv(max_q, rows)
    partial = None if sinks is None else lse.new_empty(batch, heads, tiles)
    launch(
        attention_backward_delta,
        batch * heads * tiles,
        strided(dout),
        strided(out),
        strided(None if dlse is None else dlse[..., None]),
        strided(lse[..., None]),
        strided(delta[..., None]),
        per_head(sinks),
        partial,
        lengths,
        heads,
        max_q,
        tiles,
        device=out.device,
        num_warps=warps,
        V_DIM=width,
        BLOCK_DV=block_d(width),
        BLOCK_M=rows,
    )
    return delta, None if partial is None or sinks is None else partial.sum((0, 2)).to(sinks.dtype)


def _dkdv(
    call: Call, batch: int, k: torch.Tensor, v: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dk, dv), written."""

    def run(tiles: Tiles) -> None:
        count = triton.cdiv(call.k_len, tiles.BLOCK_N)
        launch(
            attention_backward_dkdv,
            batch * k.shape[1] * count,
            *call,
            strided(dk),
            strided(dv),
            count,
            device=k.device,
            **constants(tiles, k, v),
        )

    key, tiles, candidates = dkdv_tiles(call, k, v)
    tuned("attention_backward_dkdv", key, tiles, candidates, run, k.device)
    return dk, dv


def _dq(
    call: Call,
    batch: int,
    variant: Variant,
    dq: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,  # None where no gradient of it is wanted
    slopes: torch.Tensor | None,  # likewise
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dq, dbias, dslopes), the second None unless the bias has every score's shape."""
    dbias: torch.Tensor | None = None
    partial: torch.Tensor | None = None
    if bias is not None and bias.shape == (batch, call.heads, call.q_len, call.k_len):
        unlimited = variant.left < 0 and variant.right < 0 and call.lengths == Lengths()
        dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if unlimited else zeros(bias)

    def run(tiles: Tiles) -> None:
        nonlocal partial
        count = triton.cdiv(call.q_len, tiles.BLOCK_M)
        if slopes is not None:
            partial = torch.empty(batch, call.heads, count, dtype=torch.float32, device=dq.device)
        launch(
            attention_backward_dq,
            batch * call.heads * count,
            *call,
            strided(dq),
            strided(dbias),
            partial,
            count,
            device=dq.device,
            **constants(tiles, dq, v),
        )

    key, tiles, candidates = dq_tiles(call, dq, v)
    tuned("attention_backward_dq", key, tiles, candidates, run, dq.device)
    if slopes is None or partial is None:
        return dq, dbias, None
    return dq, dbias, partial.sum(-1).sum_to_size(slopes.shape).to(slopes.dtype)
