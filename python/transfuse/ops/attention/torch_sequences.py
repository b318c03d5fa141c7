"""Packed sequences and attention over a cache, on PyTorch alone.

On a CPU, every run of neighbouring sequences with equal lengths is one call of the dense op on views: exactly the
work there is. Inside a trace, and on devices where reading the lengths would make the host wait, sequences are padded
to the given maximum and masked, after whatever stands in the padding has been replaced by zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from transfuse.ops.attention import torch_eager, torch_explicit, torch_impl
from transfuse.ops.attention.torch_chunks import Gradients
from transfuse.ops.attention.variant import Variant, corner, distances, per_head, rows_of, statistics_dtype, visible

_CALL = 1 << 16
"""Reading so many elements of a cache costs about as much as one more call."""

Dense = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""(q, k, v, variant, dropout mask or None, with_lse) -> (out, lse or None), each four-dimensional."""


class Packed(NamedTuple):
    """Neighbouring sequences of equal lengths in packed tensors, seen as (sequences, heads, length, ·)."""

    rows: slice
    q_range: tuple[int, int]
    k_range: tuple[int, int]
    q_len: int
    k_len: int

    def q(self, x: torch.Tensor) -> torch.Tensor:
        return _as_dense(x[slice(*self.q_range)], self.rows.stop - self.rows.start, self.q_len)

    def k(self, x: torch.Tensor) -> torch.Tensor:
        return _as_dense(x[slice(*self.k_range)], self.rows.stop - self.rows.start, self.k_len)

    def lse(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, slice(*self.q_range)].unflatten(1, (-1, self.q_len)).transpose(0, 1)


class Cached(NamedTuple):
    """Neighbouring batch rows whose caches hold equally many keys."""

    rows: slice
    q_len: int
    k_len: int

    def q(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.rows]

    def k(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.rows, :, : self.k_len]

    def lse(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.rows]


Part = Packed | Cached


def packed_parts(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> list[Packed]:
    """Sequences without queries are left out."""
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    parts: list[Packed] = []
    for b in range(len(q) - 1):
        lengths = (q[b + 1] - q[b], k[b + 1] - k[b])
        last = parts[-1] if parts else None
        if last is not None and last.rows.stop == b and (last.q_len, last.k_len) == lengths:
            rows = slice(last.rows.start, b + 1)
            parts[-1] = Packed(rows, (last.q_range[0], q[b + 1]), (last.k_range[0], k[b + 1]), *lengths)
        elif lengths[0] > 0:
            parts.append(Packed(slice(b, b + 1), (q[b], q[b + 1]), (k[b], k[b + 1]), *lengths))
    return parts


def cached_parts(cache_lengths: torch.Tensor, q_len: int) -> list[Cached]:
    parts: list[Cached] = []
    for b, length in enumerate(cache_lengths.tolist()):
        if parts and parts[-1].k_len == length:
            parts[-1] = Cached(slice(parts[-1].rows.start, b + 1), q_len, length)
        else:
            parts.append(Cached(slice(b, b + 1), q_len, length))
    return parts


def attention_varlen(
    q: torch.Tensor,  # (total_q, heads, head_dim)
    k: torch.Tensor,  # (total_k, kv_heads, head_dim)
    v: torch.Tensor,  # (total_k, kv_heads, v_head_dim)
    cu_seqlens_q: torch.Tensor,  # (batch + 1,)
    cu_seqlens_k: torch.Tensor,
    max_q: int,
    max_k: int,
    variant: Variant,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out (total_q, heads, v_head_dim), lse (heads, total_q) or None), differentiable."""
    if q.device.type != "cpu" or _transformed():
        return _padded(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, variant, with_lse)
    parts = packed_parts(cu_seqlens_q, cu_seqlens_k)
    return packed(q, k, v, parts, variant, None, with_lse, _dense)


def packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    parts: Sequence[Packed],
    variant: Variant,
    keep: torch.Tensor | None,  # bool (batch, heads, max_q, max_k)
    with_lse: bool,
    dense: Dense,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The dense op on every part; differentiable if it is."""
    # split, not slices: the gradient of each slice would be a tensor as large as the whole
    queries = _split(q, [part.q_range for part in parts])
    keys, values = (_split(x, [part.k_range for part in parts]) for x in (k, v))
    outs: list[torch.Tensor] = []
    lses: list[torch.Tensor] = []
    end = 0
    for part, q_part, k_part, v_part in zip(parts, queries, keys, values, strict=True):
        n = part.rows.stop - part.rows.start
        out, lse = dense(
            _as_dense(q_part, n, part.q_len),
            _as_dense(k_part, n, part.k_len),
            _as_dense(v_part, n, part.k_len),
            rows_of(variant, part.rows, part.q_len, part.k_len),
            corner(keep, part.rows, part.q_len, part.k_len),
            with_lse,
        )
        outs += out.transpose(1, 2).unbind()
        lses += [] if lse is None else lse.unbind()
        end = part.q_range[1]
    if not parts:
        return _no_sequence(q, k, v, with_lse)
    rest = q.shape[0] - end
    outs.append(q.new_zeros(rest, q.shape[1], v.shape[2]))
    if not with_lse:
        return torch.cat(outs), None
    lses.append(q.new_full((q.shape[1], rest), -torch.inf, dtype=lses[0].dtype))
    return torch.cat(outs), torch.cat(lses, 1)


def attention_decode(
    q: torch.Tensor,  # (batch, heads, q_len, head_dim)
    k_cache: torch.Tensor,  # (batch, kv_heads, max_len, head_dim)
    v_cache: torch.Tensor,  # (batch, kv_heads, max_len, v_head_dim)
    cache_lengths: torch.Tensor,  # (batch,)
    variant: Variant,  # first is None
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out (batch, heads, q_len, v_head_dim), lse (batch, heads, q_len) or None), differentiable."""
    if q.device.type != "cpu" or _transformed():
        return _masked(q, k_cache, v_cache, cache_lengths, variant, with_lse)
    parts = cached_parts(cache_lengths, q.shape[2])
    longest = max((part.k_len for part in parts), default=0)
    if parts and longest < k_cache.shape[2]:
        k_cache, v_cache = k_cache[:, :, :longest], v_cache[:, :, :longest]
        variant = rows_of(variant, slice(0, q.shape[0]), q.shape[2], longest)
    if len(parts) == 1:  # every row holds equally many keys
        return torch_impl.attention(q, k_cache, v_cache, variant, with_lse)
    if _better_together(parts, k_cache, v_cache):
        placed = _positioned(variant, cache_lengths - q.shape[2], cache_lengths, q.shape[2], longest)
        out, lse = torch_impl.attention(q, k_cache, v_cache, placed, with_lse)
        # what stands after a row's keys has weight 0: it shows, as NaN, only if it is not finite
        if not math.isnan(out.detach().sum().item()):
            return out, lse
    return cached(q, k_cache, v_cache, parts, variant, None, with_lse, _dense)


def _better_together(parts: Sequence[Cached], k_cache: torch.Tensor, v_cache: torch.Tensor) -> bool:
    """Whether one masked call for all rows beats a call for each part: it reads what the others do not."""
    needless = sum((k_cache.shape[2] - part.k_len) * (part.rows.stop - part.rows.start) for part in parts)
    return needless * k_cache.shape[1] * (k_cache.shape[3] + v_cache.shape[3]) < _CALL * (len(parts) - 1)


def cached(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    parts: Sequence[Cached],
    variant: Variant,
    keep: torch.Tensor | None,  # bool (batch, heads, q_len, max_len)
    with_lse: bool,
    dense: Dense,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The dense op on every part; differentiable if it is."""
    if not parts:
        return dense(q, k_cache, v_cache, variant, keep, with_lse)
    results = [
        dense(
            part.q(q),
            part.k(k_cache),
            part.k(v_cache),
            rows_of(variant, part.rows, part.q_len, part.k_len),
            corner(keep, part.rows, part.q_len, part.k_len),
            with_lse,
        )
        for part in parts
    ]
    out = torch.cat([o for o, _ in results])
    return out, torch.cat([lse for _, lse in results if lse is not None]) if with_lse else None


# --- in the shape of the registered ops -----------------------------------------------------------------------------


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    parts: Sequence[Part],
    variant: Variant,
    keep: torch.Tensor | None,
    lse_shape: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); rows in no part are 0 and -inf."""
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = q.new_full(lse_shape, -torch.inf, dtype=statistics_dtype(q))
    for part in parts:
        some = rows_of(variant, part.rows, part.q_len, part.k_len)
        mask = corner(keep, part.rows, part.q_len, part.k_len)
        part_out, part_lse = torch_eager.forward(part.q(q), part.k(k), part.k(v), some, mask, True)
        part.q(out).copy_(part_out)
        part.lse(lse).copy_(part_lse)
    return out, lse


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    parts: Sequence[Part],
    variant: Variant,
    keep: torch.Tensor | None,
    want: tuple[bool, bool, bool],
) -> Gradients:
    """(dq, dk, dv, dbias, dalibi_slopes, dsinks); rows and keys in no part get 0."""
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dbias, dslopes, dsinks = (
        torch.zeros_like(t, dtype=statistics_dtype(q)) if w and t is not None else None
        for w, t in zip(want, variant[1:4], strict=True)
    )
    for part in parts:
        size = (part.rows, part.q_len, part.k_len)
        grads = torch_eager.backward(
            part.q(dout),
            None if dlse is None else part.lse(dlse),
            part.q(q),
            part.k(k),
            part.k(v),
            part.q(out),
            part.lse(lse),
            rows_of(variant, *size),
            corner(keep, *size),
            want,
        )
        part.q(dq).copy_(grads[0])
        part.k(dk).copy_(grads[1])
        part.k(dv).copy_(grads[2])
        _add(corner(dbias, *size), grads[3])
        _add(dslopes if dslopes is None or dslopes.dim() == 1 else dslopes[part.rows], grads[4])
        _add(dsinks, grads[5])
    low = (
        x if x is None or t is None else x.to(t.dtype)
        for x, t in zip((dbias, dslopes, dsinks), variant[1:4], strict=True)
    )
    return dq, dk, dv, *low  # type: ignore[return-value]


def explicit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    variant: Variant,
    keep: torch.Tensor | None,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A Dense that can be differentiated any number of times."""
    return torch_explicit.attention(q, k, v, variant, keep, with_lse)


def _add(total: torch.Tensor | None, part: torch.Tensor | None) -> None:
    if total is not None and part is not None:
        total += part


# --- padded ---------------------------------------------------------------------------------------------------------


def _padded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_q: int,
    max_k: int,
    variant: Variant,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    batch = cu_seqlens_q.shape[0] - 1
    if batch == 0 or max_q == 0:
        return _no_sequence(q, k, v, with_lse)
    q_lengths, k_lengths = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    queries = _pad(q, cu_seqlens_q, q_lengths, max_q)
    keys, values = _pad(k, cu_seqlens_k, k_lengths, max_k), _pad(v, cu_seqlens_k, k_lengths, max_k)
    first = k_lengths - q_lengths if variant.first is None else torch.zeros_like(q_lengths)
    variant = _positioned(variant, first, k_lengths, max_q, max_k)
    out, lse = torch_impl.attention(queries, keys, values, variant, with_lse)
    token = torch.arange(q.shape[0], device=q.device)
    sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous(), token, right=True).clamp(max=batch - 1)
    place = token - cu_seqlens_q[sequence]
    outside = place >= q_lengths[sequence]  # rows after the last sequence
    place = place.clamp(max=max_q - 1)
    packed_out = out.transpose(1, 2)[sequence, place].masked_fill(outside[:, None, None], 0)
    if lse is None:
        return packed_out, None
    return packed_out, lse.transpose(1, 2)[sequence, place].masked_fill(outside[:, None], -torch.inf).mT


def _masked(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
    variant: Variant,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    q_len, max_len = q.shape[2], k_cache.shape[2]
    unused = torch.arange(max_len, device=q.device) >= cache_lengths[:, None]
    keys = k_cache.masked_fill(unused[:, None, :, None], 0)
    values = v_cache.masked_fill(unused[:, None, :, None], 0)
    variant = _positioned(variant, cache_lengths - q_len, cache_lengths, q_len, max_len)
    return torch_impl.attention(q, keys, values, variant, with_lse)


def _positioned(variant: Variant, first: torch.Tensor, k_lengths: torch.Tensor, max_q: int, max_k: int) -> Variant:
    """The variant with every row's own position and length told by its mask and bias; first, k_lengths: (batch,)."""
    q_positions = first[:, None, None] + torch.arange(max_q, device=first.device)  # (batch, 1, max_q)
    k_positions = torch.arange(max_k, device=first.device)
    seen = k_positions < k_lengths[:, None, None, None]
    if variant.left >= 0 or variant.right >= 0:
        seen = seen & visible(q_positions, k_positions, variant.left, variant.right)
    bias = variant.bias
    if variant.alibi_slopes is not None:
        slant = -per_head(variant.alibi_slopes) * distances(q_positions, k_positions)
        bias = slant if bias is None else bias + slant
    return variant._replace(
        mask=seen if variant.mask is None else variant.mask & seen,
        bias=bias,
        alibi_slopes=None,
        left=-1,
        right=-1,
        first=0,
    )


def _pad(x: torch.Tensor, cu_seqlens: torch.Tensor, lengths: torch.Tensor, longest: int) -> torch.Tensor:
    """(total, heads, n) -> (batch, heads, longest, n), zeros where a sequence has ended."""
    place = torch.arange(longest, device=x.device)
    x = F.pad(x, (0, 0, 0, 0, 0, 1)) if x.shape[0] == 0 else x  # something for the index to point at
    index = (cu_seqlens[:-1, None] + place).clamp(max=x.shape[0] - 1)
    ended = place >= lengths[:, None]
    return x[index].masked_fill(ended[:, :, None, None], 0).transpose(1, 2)


def _as_dense(x: torch.Tensor, n: int, length: int) -> torch.Tensor:
    """(n * length, heads, ·) -> (n, heads, length, ·), a view."""
    return x.unflatten(0, (n, length)).transpose(1, 2)


def _no_sequence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    nought = q[..., :0].sum() + k[..., :0].sum() + v[..., :0].sum()  # so that a gradient can be asked for
    out = q.new_zeros(*q.shape[:2], v.shape[2]) + nought
    if not with_lse:
        return out, None
    return out, q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=statistics_dtype(q)) + nought


def _split(x: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    sizes, kept, end = [], [], 0
    for low, high in ranges:
        if low > end:  # sequences without queries have keys that nobody reads
            sizes.append(low - end)
        kept.append(len(sizes))
        sizes.append(high - low)
        end = high
    sizes.append(x.shape[0] - end)
    pieces = x.split(sizes)
    return [pieces[i] for i in kept]


def _transformed() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, keep: torch.Tensor | None, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch_impl.attention(q, k, v, variant, with_lse)
