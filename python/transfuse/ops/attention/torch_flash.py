"""Attention on ATen's flash attention for CPUs.

It takes one additive mask in q's dtype or fp32, read by stride in the batch and head dimensions, and ``is_causal``
(top left). What it does not do is done around it here:

- lse of a row that sees nothing comes out as 0, ours is -inf;
- sinks: out * exp(lse - lse'), lse' = log(exp(lse) + exp(sink)); its backward is exact when handed out and lse';
- a gradient of lse: columns of ones in v and of dlse in dO make its dO V^T into dO V^T + dlse;
- v narrower or wider than q and k: zero columns;
- one query row: heads that share keys become rows of one head, so the keys are read once;
- in low precision its backward would add up the heads that share keys in that precision: they get their own copy.

It reads past the end of a last dimension with a stride, and divides by zero on empty ones: neither reaches it.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from transfuse.ops.attention.variant import Variant, distances, per_head, shift, statistics_dtype, unlimited, visible

flash = torch._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@functools.cache
def shares_keys() -> bool:
    """Whether this torch's kernel takes fewer key heads than query heads; tried where a wrong read does no harm."""
    keys = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    try:
        out, _ = flash(torch.ones(1, 2, 1, 1), keys[:, :1], keys[:, :1], 0.0, False, attn_mask=None, scale=1.0)
    except RuntimeError:
        return False
    return out.eq(1).all().item() is True


def says(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant) -> bool:
    """Whether ATen's flash attention can compute this call."""
    # a negative or zero scale turns the -inf that ATen hides keys with into +inf or NaN
    if q.device.type != "cpu" or variant.softcap > 0 or variant.dropout_p > 0 or variant.scale <= 0:
        return False
    if k.shape[1] != q.shape[1] and not shares_keys():
        return False
    return not (0 in q.shape or 0 in k.shape or 0 in v.shape)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); without ``with_lse`` rows that see nothing keep an lse of 0, which :func:`backward` takes too."""
    need_lse = with_lse or variant.sinks is not None
    added, is_causal = additive(q, k, variant, need_lse)
    wide = max(q.shape[3], v.shape[3])
    queries, keys, values = _columns(q, wide), _columns(k, wide), _columns(v, wide)
    grouped = q.shape[2] == 1 and k.shape[1] < q.shape[1]
    if grouped:
        rows = (k.shape[1], q.shape[1] // k.shape[1])
        queries = queries.reshape(q.shape[0], *rows, wide)
        mask = added if added is None or added.shape[1] == 1 else added.reshape(added.shape[0], *rows, added.shape[3])
    else:
        mask = added
    out, lse = flash(queries, keys, values, 0.0, is_causal, attn_mask=mask, scale=variant.scale)
    if grouped:
        out, lse = out.reshape(*q.shape[:3], wide), lse.reshape(q.shape[:3])
    if wide > v.shape[3]:
        out = out[..., : v.shape[3]].contiguous()
    if need_lse and added is not None:
        lse = lse.masked_fill((added == -torch.inf).all(-1), -torch.inf)
    if variant.sinks is not None:
        total = torch.logaddexp(lse, per_head(variant.sinks).squeeze(-1).to(lse.dtype))
        out *= (lse - total.masked_fill(total == -torch.inf, 0)).exp()[..., None]
        lse = total
    return out, lse


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    variant: Variant,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), given the lse with sinks, if any."""
    added, is_causal = additive(q, k, variant)
    lse = lse.masked_fill(lse == -torch.inf, 0)
    v_width = v.shape[3]
    if dlse is not None:
        dlse = dlse.unsqueeze(-1)
        high = dlse.to(v.dtype)  # dlse is fp32: what rounding it takes away travels in a column of its own
        dout = torch.cat([dout, high, (dlse - high).to(v.dtype)], -1)
        v, out = torch.cat([v, v.new_ones(*v.shape[:3], 2)], -1), F.pad(out, (0, 2))
    wide = max(q.shape[3], v.shape[3])
    dout, queries, keys, v, out = (_columns(x, wide) for x in (dout, q, k, v, out))
    dq, dk, dv = gradients(dout, queries, keys, v, out, lse, added, is_causal, variant.scale)
    return dq[..., : q.shape[3]], dk[..., : q.shape[3]], dv[..., :v_width]


def gradients(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    added: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) for equally wide tensors; lse is finite."""
    dout = steppable(dout)
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    if group == 1 or q.dtype in (torch.float32, torch.float64):
        dq, dk, dv = _flash_backward(dout, q, k, v, out, lse, 0.0, is_causal, attn_mask=added, scale=scale)
        return dq, dk, dv
    dq, dk, dv = _flash_backward(
        dout,
        q,
        k.repeat_interleave(group, 1),
        v.repeat_interleave(group, 1),
        out,
        lse,
        0.0,
        is_causal,
        attn_mask=added,
        scale=scale,
    )
    dk, dv = (x.unflatten(1, (kv_heads, group)).sum(2, dtype=torch.float32).to(k.dtype) for x in (dk, dv))
    return dq, dk, dv


def additive(
    q: torch.Tensor, k: torch.Tensor, variant: Variant, with_mask: bool = False
) -> tuple[torch.Tensor | None, bool]:
    """(one additive mask (batch|1, heads|1, q_len|1, k_len|1) or None, is_causal).

    ``with_mask``: where there is a mask, causality goes into it, so that it tells which rows see nothing.
    """
    q_len, k_len = q.shape[2], k.shape[2]
    first = shift(variant, q_len, k_len)
    bias, seen, slopes = variant.bias, variant.mask, variant.alibi_slopes
    if bias is not None and bias.dtype != q.dtype and (bias.dtype != torch.float32 or q.dtype == torch.float64):
        bias = bias.to(q.dtype)
    limited, is_causal = not unlimited(variant, q_len, k_len), False
    top_left = first == 0 and variant.right == 0 and (variant.left < 0 or variant.left >= q_len - 1)
    alone = bias is None and seen is None and slopes is None
    if limited and top_left and q_len > 1 and (alone or not with_mask):
        limited, is_causal = False, True
    if slopes is not None or limited:
        q_positions = torch.arange(first, first + q_len, device=q.device)
        k_positions = torch.arange(k_len, device=q.device)
        if slopes is not None:
            slant = -per_head(slopes).to(statistics_dtype(q)) * distances(q_positions, k_positions)
            bias = slant if bias is None else slant + bias
        if limited:
            near = visible(q_positions, k_positions, variant.left, variant.right)[None, None]
            seen = near if seen is None else seen & near
    if seen is None:
        return bias, is_causal
    if bias is None:
        bias = q.new_zeros(())
    return torch.where(seen, bias, -torch.inf), is_causal


def _columns(x: torch.Tensor, width: int) -> torch.Tensor:
    """x with zero columns up to this width, and rows that a matrix product can step through."""
    if x.shape[3] < width:
        return F.pad(x, (0, width - x.shape[3]))
    return steppable(x)


def steppable(x: torch.Tensor) -> torch.Tensor:
    """x with rows that a matrix product can step through."""
    return x.contiguous() if x.stride(3) != 1 or x.stride(2) < x.shape[3] else x
