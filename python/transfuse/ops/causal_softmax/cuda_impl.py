"""Causal softmax on the CUDA kernels of ``csrc/causal_softmax``: outputs from torch's allocator, pointers to ``_C``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from transfuse import _extension
from transfuse.ops import _validate
from transfuse.ops.causal_softmax import rows

_MOST_ROW_DIMS = 7  # after joining
_IN_REGISTERS = 4096  # keys of a row whose sums the kernel keeps in registers, whatever its alignment


def why_not(scores: torch.Tensor, mask: torch.Tensor | None, bias: torch.Tensor | None) -> str | None:
    """Why the kernels cannot take these (validated) arguments, or None."""
    # Joining takes strides that the backward's gradient does not have yet, so the dimensions are counted unjoined.
    found = sum(size != 1 for size in scores.shape[:-1])
    if found > _MOST_ROW_DIMS:
        return f"the CUDA kernel takes up to {_MOST_ROW_DIMS} dimensions before the keys, got {found} (flatten some)"
    return _validate.beyond_kernels("cuda", scores)


def causal_softmax_forward(
    scores: torch.Tensor, scale: float, diagonal: int | None, mask: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """Probabilities, contiguous, like scores (..., q_len, k_len); query i sees the keys up to i + diagonal."""
    out = torch.empty_like(scores, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    shape, dims = scores.shape, scores.dim() - 1
    tensors = [scores, *(None if t is None else t.expand(shape) for t in (mask, bias)), out]
    strides = [*(rows.row_strides(t, dims) for t in tensors), rows.query_strides(dims, diagonal)]
    sizes, joined = rows.join(shape[:-1], strides)
    _extension.kernels().causal_softmax_forward(
        *(_view(t, sizes, s) for t, s in zip(tensors, joined, strict=False)),
        float(scale),
        _query(joined[-1]),
        shape[-1] if diagonal is None else diagonal,
        _extension.target(scores.device),
    )
    return out


def causal_softmax_backward(
    dout: torch.Tensor, out: torch.Tensor, scale: float, diagonal: int | None, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dscores, dbias), contiguous; dbias like bias, summed in fp32 in a fixed order, and empty without a bias."""
    if out.numel() == 0:
        return rows.no_gradients(out, bias)
    dscores = torch.empty_like(out, memory_format=torch.contiguous_format)
    shape, dims = out.shape, out.dim() - 1
    tensors = [dout, out, dscores]
    strides = [*(rows.row_strides(t, dims) for t in tensors), rows.query_strides(dims, diagonal)]
    group, member = (
        rows.join([shape[d] for d in side], [[s[d] for d in side] for s in strides])
        for side in rows.groups_and_members(shape, bias)
    )
    groups, members = math.prod(group.sizes), math.prod(member.sizes)
    a_chunk = rows.members_a_chunk(groups, members)
    chunks = -(-members // a_chunk)
    sums, sums_view = None, None
    if bias is not None:
        sums = rows.new_sums(bias, chunks, in_place=members == 1 or shape[-1] <= _IN_REGISTERS)
        keys = bias.shape[-1] if bias.dim() else 1
        sums_view = _extension.view(sums, (chunks, groups, keys))
    if member.sizes == (1,):  # a dimension that counts nothing would take one of the seven
        group_dims, sizes, joined = len(group.sizes), group.sizes, group.strides
    else:
        group_dims, sizes = len(group.sizes), group.sizes + member.sizes
        joined = [g + m for g, m in zip(group.strides, member.strides, strict=True)]
        if group.sizes == (1,):
            group_dims, sizes, joined = 0, member.sizes, member.strides
    _extension.kernels().causal_softmax_backward(
        *(_view(t, sizes, s) for t, s in zip(tensors, joined, strict=False)),
        sums_view,
        group_dims,
        a_chunk,
        float(scale),
        _query(joined[-1]),
        shape[-1] if diagonal is None else diagonal,
        _extension.target(out.device),
    )
    if bias is None or sums is None:
        return dscores, out.new_empty(0)
    return dscores, rows.bias_gradient(bias, sums)


def _view(t: torch.Tensor | None, sizes: tuple[int, ...], strides: tuple[int, ...]) -> _extension.View | None:
    """(rows..., keys) with its row dimensions joined."""
    whole = _extension.view(t)
    if t is None or whole is None:
        return None
    pointer, dtype, _, _ = whole
    return pointer, dtype, (*sizes, t.shape[-1]), (*strides, t.stride(-1))


def _query(strides: Sequence[int]) -> int:
    """The dimension along which queries are counted, -1 if there is one query or nobody asks."""
    return strides.index(1) if 1 in strides else -1
