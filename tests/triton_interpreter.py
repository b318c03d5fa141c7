"""Makes Triton's interpreter truer for tests: fp32 is rounded to bf16 as the hardware does it."""

from __future__ import annotations

from typing import Any

import numpy as np


def install() -> None:
    """Patch the interpreter of this process; once is enough."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float
    if getattr(original, "exact", False):
        return

    def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            return to_bf16(data)
        if (source, target) == (tl.bfloat16, tl.float32):
            return (data.astype(np.uint32) << 16).view(np.uint32)
        return original(data, source, target, rounding)

    convert.exact = True  # type: ignore[attr-defined]
    interpreter._convert_float = convert


def to_bf16(data: np.ndarray) -> np.ndarray:
    """The bits of fp32 rounded to the nearest bf16, ties to even; NaN stays NaN (the interpreter truncates)."""
    bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), (bits >> 16) | 0x40, rounded).astype(np.uint16)
