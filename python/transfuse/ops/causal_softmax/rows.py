"""What the kernels share on the host: rows of (..., q_len, k_len) tensors as few dimensions and their strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

_PROGRAMS = 1024
"""Rows of sums wanted of a broadcast bias: some 8 a multiprocessor, and a bound of the partial sums' memory."""


class Joined(NamedTuple):
    """Row dimensions as few as they can be: their sizes, and the strides of each tensor along them."""

    sizes: tuple[int, ...]
    strides: list[tuple[int, ...]]


def join(sizes: Sequence[int], strides: Sequence[Sequence[int]]) -> Joined:
    """Leave out dimensions of size 1, join neighbours where every tensor's strides allow it; keep one at least."""
    joined: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for d, size in enumerate(sizes):
        if size == 1:
            continue
        if joined and all(to[-1] == of[d] * size for to, of in zip(steps, strides, strict=True)):
            joined[-1] *= size
            for to, of in zip(steps, strides, strict=True):
                to[-1] = of[d]
        else:
            joined.append(size)
            for to, of in zip(steps, strides, strict=True):
                to.append(of[d])
    return Joined(tuple(joined) or (1,), [tuple(s) or (0,) for s in steps])


def row_strides(t: torch.Tensor | None, dims: int) -> Sequence[int]:
    """t: (..., q_len, k_len), expanded, or absent."""
    return [0] * dims if t is None else t.stride()[:-1]


def query_strides(dims: int, diagonal: int | None) -> Sequence[int]:
    """The query's index as if it were a tensor; without a diagonal nobody asks, and its dimension may be joined."""
    return [0] * (dims - 1) + [0 if diagonal is None else 1]


def groups_and_members(shape: Sequence[int], bias: torch.Tensor | None) -> tuple[list[int], list[int]]:
    """Row dimensions of a (..., q_len, k_len) shape that bias has, and those along which it is broadcast."""
    own = list(shape) if bias is None else [1] * (len(shape) - bias.dim()) + list(bias.shape)
    rows = range(len(shape) - 1)
    return [d for d in rows if own[d] == shape[d]], [d for d in rows if own[d] != shape[d]]


def members_a_chunk(groups: int, members: int) -> int:
    """How many members of a group are summed by one program: at least 4, and more where there are many groups.

    The partial sums, one a chunk, are then no more than a quarter of the scores, and about _PROGRAMS rows of them.
    """
    chunks = max(1, min(members // 4, -(-_PROGRAMS // groups)))
    return -(-members // chunks)


def new_sums(bias: torch.Tensor, chunks: int, in_place: bool) -> torch.Tensor:
    """(chunks, *bias.shape) for the sums of dlogits: in bias's dtype where each is written once, else in fp32."""
    dtype = bias.dtype if in_place and chunks == 1 else torch.float32
    return torch.empty((chunks, *bias.shape), dtype=dtype, device=bias.device)


def bias_gradient(bias: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """The sum of new_sums' chunks. They are few and fp32: torch.sum, whose order is fixed too, does."""
    return (sums[0] if sums.shape[0] == 1 else sums.sum(0)).to(bias.dtype)


def no_gradients(out: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(dscores, dbias) of an empty result."""
    dscores = torch.empty_like(out, memory_format=torch.contiguous_format)
    if bias is None:
        return dscores, out.new_empty(0)
    return dscores, torch.zeros_like(bias, memory_format=torch.contiguous_format)
