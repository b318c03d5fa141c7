"""Whether torch.autocast is on for a tensor; each op says in its own words which dtype that means."""

from __future__ import annotations

import torch


def active(x: torch.Tensor) -> bool:
    """Autocast is on where x stands. Devices that have no autocast (meta) answer False instead of raising."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)
