"""Arguments as the launchers of ``csrc/attention`` take them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from transfuse import _extension
from transfuse.ops.attention.kernels import Rows
from transfuse.ops.attention.variant import Variant

_FARTHEST = 2**30
"""A window or position beyond this is no different from one at it; the kernels add two of them in 32 bits."""


def shaping(
    variant: Variant, seed: torch.Tensor | None, rows: Rows, device: torch.device
) -> tuple[list[object], list[torch.Tensor | None]]:
    """(the last arguments of every launcher, from mask on, tensors to be held until after the launch).

    A view holds no reference, and the memory of a copy dropped before the launch would be used again.
    """
    per_head = [None if t is None else t.float().reshape(-1, t.shape[-1], 1, 1) for t in variant[2:4]]
    integers = [None if t is None else t.to(torch.int32).contiguous() for t in rows[2:]]
    drops = variant.dropout_p > 0 and seed is not None
    held = [variant.mask, variant.bias, *per_head, *integers, seed if drops else None]
    numbers = (
        rows.max_q,
        rows.max_k,
        variant.scale,
        min(variant.left, _FARTHEST),
        min(variant.right, _FARTHEST),
        variant.first,
        variant.softcap,
        variant.dropout_p,
        _extension.target(device),
    )
    return [*(_extension.view(t) for t in held), *numbers], held


def aligned(t: torch.Tensor) -> torch.Tensor:
    """t with whole 16-byte chunks in every row: itself where it has them, else a copy, widened with zeros."""
    chunk = 16 // t.element_size()
    strides_fit = all(
        size <= 1 or stride % chunk == 0 for size, stride in zip(t.shape[:3], t.stride()[:3], strict=True)
    )
    if t.shape[3] % chunk == 0 and t.shape[3] > 0 and t.stride(3) == 1 and strides_fit and t.data_ptr() % 16 == 0:
        return t
    return F.pad(t, (0, (-t.shape[3]) % chunk if t.shape[3] else chunk)).contiguous()
