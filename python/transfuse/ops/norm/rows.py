"""How every kernel takes its tensors: rows at any distance, of neighbouring columns."""

from __future__ import annotations

from typing import overload

import torch


@overload
def row_strided(t: torch.Tensor) -> torch.Tensor: ...
@overload
def row_strided(t: None) -> None: ...
def row_strided(t: torch.Tensor | None) -> torch.Tensor | None:
    """t itself if contiguous, else (rows, hidden) with contiguous columns: a view where strides allow, or a copy."""
    if t is None or t.is_contiguous():
        return t
    rows = t.reshape(t.shape[:-1].numel(), t.shape[-1])  # not (-1, hidden): that is ambiguous when hidden is 0
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


def packed(t: torch.Tensor | None) -> torch.Tensor | None:
    """t, contiguous."""
    return None if t is None else t.contiguous()
