"""torch.nn.functional with transfuse's scaled_dot_product_attention in it; everything else is torch's own."""

from __future__ import annotations

from typing import Any

from torch.nn import functional as _functional

from transfuse.ops import scaled_dot_product_attention

__all__ = ["scaled_dot_product_attention"]


def __getattr__(name: str) -> Any:
    return getattr(_functional, name)


def __dir__() -> list[str]:
    return sorted({*dir(_functional), *globals()})
