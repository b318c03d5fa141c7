"""Positions that are added: sinusoids on the embeddings, T5's learned bias on the attention scores."""

from __future__ import annotations

import math

import torch
from torch import nn

from transfuse.errors import ArgumentError, ConfigError
from transfuse.nn.rotary import RopeScaling, RotaryEmbedding, apply_rotary, rotary_frequencies

__all__ = [
    "RelativePositionBias",
    "RopeScaling",
    "RotaryEmbedding",
    "SinusoidalPositions",
    "apply_rotary",
    "relative_buckets",
    "rotary_frequencies",
    "sinusoids",
]


def sinusoids(positions: torch.Tensor, dim: int, layout: str = "interleaved") -> torch.Tensor:
    """sin and cos of ``position / 10000 ** (2 i / dim)`` (Vaswani et al. 2017), (*positions.shape, dim), fp32.

    ``interleaved`` alternates sin, cos as the paper does; ``halves`` puts all sines first, as Hugging Face's Marian
    does. Angles are computed in fp64: at position 5000 an fp32 angle is off by 3e-4.

    >>> sinusoids(torch.tensor([0, 1]), 2)
    tensor([[0.0000, 1.0000],
            [0.8415, 0.5403]])
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    angles = positions[..., None].double() / (10000.0**exponents)
    if layout == "halves":
        return torch.cat((angles.sin(), angles.cos()), dim=-1).float()
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).float()


class SinusoidalPositions(nn.Module):
    """The sinusoids of given positions, from a table that is made on demand and never saved.

    Args:
        dim: even embedding size.
        layout: "interleaved" or "halves", see :func:`sinusoids`.

    Raises:
        ConfigError: dim is odd or the layout is unknown.

    >>> SinusoidalPositions(6)(torch.arange(4)[None], limit=4).shape
    torch.Size([1, 4, 6])
    """

    def __init__(self, dim: int, layout: str = "interleaved") -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ConfigError(f"SinusoidalPositions: dim must be even and at least 2, got {dim}")
        if layout not in ("interleaved", "halves"):
            raise ConfigError(f"SinusoidalPositions: layout must be 'interleaved' or 'halves', got {layout!r}")
        self.dim, self.layout = dim, layout
        self._table: torch.Tensor | None = None

    def extra_repr(self) -> str:
        return f"{self.dim}, layout={self.layout!r}"

    def forward(self, positions: torch.Tensor, limit: int | None = None) -> torch.Tensor:
        """(*positions.shape, dim) in fp32. ``limit`` promises that all positions are below it; without it no table."""
        if limit is None or torch.compiler.is_compiling() or type(positions) is not torch.Tensor:
            return sinusoids(positions, self.dim, self.layout)
        table = self._table
        if table is None or table.shape[0] < limit or table.device != positions.device:
            rows = max(64, 1 << (limit - 1).bit_length())
            table = sinusoids(torch.arange(rows), self.dim, self.layout).to(positions.device)
            self._table = table
        return table[positions]


def relative_buckets(
    distances: torch.Tensor, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128
) -> torch.Tensor:
    """T5's buckets of key position minus query position: exact when near, logarithmic up to max_distance.

    Bidirectional: half the buckets are for keys after the query; otherwise those keys all fall in bucket 0
    (Raffel et al. 2020, section 2.1).

    >>> relative_buckets(torch.tensor([-200, -20, -3, 0, 5]), bidirectional=True).tolist()
    [15, 10, 3, 0, 21]
    """
    if bidirectional:
        num_buckets //= 2
        offset = (distances > 0).long() * num_buckets
        distances = distances.abs()
    else:
        offset = torch.zeros_like(distances, dtype=torch.long)
        distances = -distances.clamp(max=0)
    exact = num_buckets // 2
    steps = torch.log(distances.float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    # log(0) is -inf here and its cast is undefined, but those distances are below `exact` and not taken
    large = (exact + steps.clamp(min=0).long()).clamp(max=num_buckets - 1)
    return offset + torch.where(distances < exact, distances, large)


class RelativePositionBias(nn.Module):
    """T5's bias on the scores: one learned number for every head and bucket of distance, shared by all layers.

    Args:
        num_heads: attention heads.
        num_buckets: a multiple of 4.
        max_distance: beyond it all distances share a bucket.
        bidirectional: True in an encoder.

    Raises:
        ConfigError: num_buckets is not a positive multiple of 4.

    >>> bias = RelativePositionBias(2, bidirectional=True)
    >>> bias(q_len=3, k_len=5, past=2).shape
    torch.Size([1, 2, 3, 5])
    """

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        *,
        bidirectional: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_buckets < 4 or num_buckets % 4:
            raise ConfigError(f"RelativePositionBias: num_buckets must be a positive multiple of 4, got {num_buckets}")
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with a standard deviation of 0.02."""
        nn.init.normal_(self.weight, std=0.02)

    def extra_repr(self) -> str:
        return f"heads={self.weight.shape[1]}, buckets={self.num_buckets}, bidirectional={self.bidirectional}"

    def forward(self, q_len: int, k_len: int, past: int = 0) -> torch.Tensor:
        """(1, heads, q_len, k_len) for queries at past, past + 1, ... and keys at 0, 1, ...

        Raises:
            ArgumentError: the last query stands behind the last key.
        """
        if past + q_len > k_len and not self.bidirectional:
            raise ArgumentError(f"RelativePositionBias: {past} + {q_len} query positions exceed {k_len} keys")
        # Only q_len + k_len - 1 distances occur; row i of the bias is the window of them that starts at q_len - 1 - i.
        first = -(past + q_len - 1)
        distances = torch.arange(first, first + q_len + k_len - 1, device=self.weight.device)
        buckets = relative_buckets(distances, self.bidirectional, self.num_buckets, self.max_distance)
        values = self.weight[buckets].T  # (heads, q_len + k_len - 1)
        return values.unfold(1, k_len, 1).flip(1)[None]
