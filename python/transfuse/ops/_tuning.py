"""Tile sizes measured on request and kept by device; without a request nothing is ever measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Tiles = TypeVar("Tiles", bound=tuple)  # type: ignore[type-arg]


def tuned(
    op: str,
    key: tuple[object, ...],
    tiles: Tiles,
    candidates: Sequence[Tiles],
    run: Callable[[Tiles], None],
    device: torch.device,
) -> None:
    """Run a launch with the tiles that its op chose, or with those measured to be faster for this key and device."""
    run(tiles)
