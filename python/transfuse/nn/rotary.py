"""Rotary positions (Su et al. 2021): pairs of head dimensions turn by an angle that grows with the position."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from transfuse.errors import ConfigError
from transfuse.ops.rotary import torch_impl


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies stretch beyond the trained length: by one factor, or by wavelength as in Llama 3.

    ``linear`` divides every frequency by ``factor`` (Chen et al. 2023). ``llama3`` divides those whose wavelength
    exceeds ``original_max_positions / low_freq_factor``, keeps those below ``original_max_positions /
    high_freq_factor`` and blends between (Llama 3.1). Schemes whose frequencies follow the current length ("dynamic")
    are refused: keys already in a cache would carry other frequencies than new ones.

    Raises:
        ConfigError: the kind is unknown or a number is out of range.

    >>> RopeScaling("llama3", factor=8.0).original_max_positions
    8192
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ConfigError(f"rope_scaling: kind must be 'linear' or 'llama3', got {self.kind!r}")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_positions"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e300:
                raise ConfigError(f"rope_scaling: {name} must be a positive number, got {repr(value)[:40]}")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"rope_scaling: high_freq_factor must be above low_freq_factor ({self.low_freq_factor}), "
                f"got {self.high_freq_factor}"
            )


def rotary_frequencies(
    dim: int, theta: float = 10000.0, scaling: RopeScaling | None = None, device: torch.device | None = None
) -> torch.Tensor:
    """Radians per position of each pair: ``theta ** (-2 i / dim)``, (dim / 2,), fp32.

    >>> rotary_frequencies(4, theta=100.0)
    tensor([1.0000, 0.1000])
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim
    frequencies = 1.0 / (theta**exponents)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    return _llama3(frequencies, scaling)


def _llama3(frequencies: torch.Tensor, s: RopeScaling) -> torch.Tensor:
    """Long wavelengths stretch, short ones stay, those between are blended."""
    wavelengths = 2 * math.pi / frequencies
    keep = (s.original_max_positions / wavelengths - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / s.factor


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the leading ``cos.shape[-1]`` dimensions of every head; dimension i is paired with i + half.

    In plain PyTorch, on every device; :func:`transfuse.ops.rotary_embedding` has kernels.

    Args:
        x: (batch, length, heads, head_dim).
        cos, sin: (batch or 1, length, 1, rotary_dim), as :class:`RotaryEmbedding` gives them: sin with the sign of
            the first half already negative, so that the turn is ``x * cos + roll(x, half) * sin``.

    >>> cos, sin = RotaryEmbedding(4)(torch.tensor([[0, 1]]))
    >>> x = torch.randn(1, 2, 3, 4)
    >>> y = apply_rotary(x, cos, sin)
    >>> torch.equal(y[:, 0], x[:, 0]), torch.allclose(y.norm(dim=-1), x.norm(dim=-1))
    (True, True)
    """
    return torch_impl.turned(x, cos, sin)


class RotaryEmbedding(nn.Module):
    """The cosines and sines of given positions, computed once a forward pass and shared by all layers.

    It has no parameters and no buffers: nothing to load, nothing that ``.half()`` could round.

    Args:
        dim: head dimensions that rotate, even.
        theta: base of the wavelengths.
        scaling: see :class:`RopeScaling`.

    Raises:
        ConfigError: dim is odd or below 2.

    >>> cos, sin = RotaryEmbedding(8)(torch.arange(5)[None])
    >>> cos.shape
    torch.Size([1, 5, 1, 8])
    """

    def __init__(self, dim: int, theta: float = 10000.0, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ConfigError(f"RotaryEmbedding: dim must be even and at least 2, got {dim}")
        self.dim, self.theta, self.scaling = dim, theta, scaling
        self._frequencies: torch.Tensor | None = None

    def extra_repr(self) -> str:
        return f"{self.dim}, theta={self.theta}" + (f", scaling={self.scaling}" if self.scaling else "")

    def forward(self, positions: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin of ``positions`` (batch or 1, length): each (batch or 1, length, 1, dim) in dtype.

        Angles are fp32 (fp64 for fp64 results); dtype defaults to fp32.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        angles = positions[..., None, None].to(wide) * self.frequencies(positions.device)
        cos, sin = angles.cos(), angles.sin()
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cos.to(dtype or wide), sin.to(dtype or wide)

    def frequencies(self, device: torch.device) -> torch.Tensor:
        """(dim / 2,) fp32, kept for the next call on the same device."""
        if torch.compiler.is_compiling():
            return rotary_frequencies(self.dim, self.theta, self.scaling, device)
        found = self._frequencies
        if found is None or found.device != device:
            found = rotary_frequencies(self.dim, self.theta, self.scaling, device)
            if type(found) is torch.Tensor:  # a fake tensor must not outlive its mode
                self._frequencies = found
        return found
