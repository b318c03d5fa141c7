"""Rotary positions (Su et al. 2021): pairs of head dimensions turn by an angle that grows with the position."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from transfuse.errors import ConfigError
from transfuse.ops.rotary import torch_impl

KINDS = ("linear", "llama3", "yarn", "dynamic", "longrope")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies stretch beyond the trained length.

    - ``linear`` divides every frequency by ``factor`` (Chen et al. 2023).
    - ``llama3`` divides those whose wavelength exceeds ``original_max_positions / low_freq_factor``, keeps those below
      ``original_max_positions / high_freq_factor`` and blends between (Llama 3.1).
    - ``yarn`` divides those that turn less than ``beta_slow`` times over the trained length, keeps those that turn more
      than ``beta_fast`` times and blends between; it multiplies cos and sin by ``attention_factor`` (Peng et al. 2023).
    - ``dynamic`` raises theta once a text is longer than ``original_max_positions`` (NTK-aware).
    - ``longrope`` divides each frequency by a number of its own: of ``short_factor`` up to ``original_max_positions``
      tokens, of ``long_factor`` beyond; cos and sin as with yarn (Ding et al. 2024).

    The frequencies of the last two follow a row's length so far, its last position. Keys in a cache keep those that
    they were written with: beyond ``original_max_positions`` a cached step differs from a pass over the whole text, as
    in transformers. Up to there they are equal.

    Args:
        attention_factor: 0: the paper's, ``0.1 ln(factor) + 1`` (yarn), ``sqrt(1 + ln(factor) /
            ln(original_max_positions))`` (longrope), else 1.
        truncate: yarn's bounds are whole dimensions.

    Raises:
        ConfigError: the kind is unknown or a number is out of range.

    >>> RopeScaling("llama3", factor=8.0).original_max_positions
    8192
    >>> round(RopeScaling("yarn", factor=4.0).attention_factor, 4)
    1.1386
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    attention_factor: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()  # longrope: one for each pair of dimensions
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"rope_scaling: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if not isinstance(factors, (list, tuple)) or not all(map(_is_positive, factors)):
                raise ConfigError(f"rope_scaling: {name} must be positive numbers, got {repr(factors)[:40]}")
            object.__setattr__(self, name, tuple(factors))
        for name in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_positions",
            "beta_fast",
            "beta_slow",
        ):
            if not _is_positive(value := getattr(self, name)):
                raise ConfigError(f"rope_scaling: {name} must be a positive number, got {repr(value)[:40]}")
        for upper, lower in (("high_freq_factor", "low_freq_factor"), ("beta_fast", "beta_slow")):
            least, value = getattr(self, lower), getattr(self, upper)
            if value <= least:
                raise ConfigError(f"rope_scaling: {upper} must be above {lower} ({least}), got {value}")
        if not isinstance(self.truncate, bool):
            raise ConfigError(f"rope_scaling: truncate must be true or false, got {self.truncate!r}")
        if self.attention_factor == 0:
            object.__setattr__(self, "attention_factor", self._attention_factor())
        if not _is_positive(self.attention_factor):
            raise ConfigError(
                f"rope_scaling: attention_factor must be a positive number, got {self.attention_factor!r}"
            )

    @property
    def follows_length(self) -> bool:
        """Whether the frequencies depend on how long the text is."""
        return self.kind in ("dynamic", "longrope")

    def _attention_factor(self) -> float:
        if self.kind == "yarn":
            return 0.1 * math.log(max(1.0, self.factor)) + 1.0
        if self.kind == "longrope" and self.factor > 1 and self.original_max_positions > 1:
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_positions))
        return 1.0


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e300


def rotary_frequencies(
    dim: int, theta: float = 10000.0, scaling: RopeScaling | None = None, device: torch.device | None = None
) -> torch.Tensor:
    """Radians per position of each pair: ``theta ** (-2 i / dim)``, (dim / 2,), fp32.

    With the scaling "longrope" (2, dim / 2), for short texts and for long ones; with "dynamic" those of short texts.

    >>> rotary_frequencies(4, theta=100.0)
    tensor([1.0000, 0.1000])
    """
    frequencies = 1.0 / (theta ** _exponents(dim, device))
    if scaling is None or scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling)
    if scaling.kind == "yarn":
        return _yarn(frequencies, theta, scaling)
    return frequencies / torch.tensor([scaling.short_factor, scaling.long_factor], dtype=torch.float32, device=device)


def _exponents(dim: int, device: torch.device | None) -> torch.Tensor:
    return torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim


def _dynamic(dim: int, theta: float, s: RopeScaling, lengths: torch.Tensor) -> torch.Tensor:
    """(rows, dim / 2) for lengths (rows, 1): a larger theta for longer rows."""
    trained = s.original_max_positions
    stretch = (s.factor * lengths.clamp_min(trained) / trained - (s.factor - 1)) ** (dim / (dim - 2))
    return 1.0 / (theta * stretch) ** _exponents(dim, lengths.device)


def _llama3(frequencies: torch.Tensor, s: RopeScaling) -> torch.Tensor:
    """Long wavelengths stretch, short ones stay, those between are blended."""
    wavelengths = 2 * math.pi / frequencies
    keep = (s.original_max_positions / wavelengths - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / s.factor


def _yarn(frequencies: torch.Tensor, theta: float, s: RopeScaling) -> torch.Tensor:
    """Pairs that turn often over the trained length stay, those that turn seldom stretch, a ramp between."""
    dim = 2 * frequencies.shape[0]

    def pair_that_turns(times: float) -> float:
        return dim * math.log(s.original_max_positions / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(s.beta_fast), pair_that_turns(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = 0.001 if low == high else high - low
    stretch = ((torch.arange(dim // 2, dtype=torch.float32, device=frequencies.device) - low) / width).clamp(0.0, 1.0)
    return stretch * frequencies / s.factor + (1 - stretch) * frequencies


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
        ConfigError: dim is odd or below 2, or does not suit the scaling.

    >>> cos, sin = RotaryEmbedding(8)(torch.arange(5)[None])
    >>> cos.shape
    torch.Size([1, 5, 1, 8])
    """

    def __init__(self, dim: int, theta: float = 10000.0, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 2 or dim % 2:
            raise ConfigError(f"RotaryEmbedding: dim must be even and at least 2, got {dim!r}")
        if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
            raise ConfigError(f"RotaryEmbedding: theta must be a number above 0, got {theta!r}")
        if scaling is not None and scaling.kind == "dynamic" and dim < 4:
            raise ConfigError(f"RotaryEmbedding: dynamic scaling needs a dim of 4 or more, got {dim}")
        if scaling is not None and scaling.kind == "yarn" and theta <= 1:
            raise ConfigError(f"RotaryEmbedding: yarn scaling needs a theta above 1, got {theta}")
        if scaling is not None and scaling.kind == "longrope":
            counts = (len(scaling.short_factor), len(scaling.long_factor))
            if counts != (dim // 2, dim // 2):
                raise ConfigError(
                    f"RotaryEmbedding: longrope needs {dim // 2} short_factor and long_factor for dim {dim}, got "
                    f"{counts[0]} and {counts[1]}"
                )
        self.dim, self.theta, self.scaling = dim, theta, scaling
        self._frequencies: torch.Tensor | None = None

    def extra_repr(self) -> str:
        return f"{self.dim}, theta={self.theta}" + (f", scaling={self.scaling}" if self.scaling else "")

    def forward(self, positions: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin of ``positions`` (batch or 1, length): each (batch or 1, length, 1, dim) in dtype.

        Angles are fp32 (fp64 for fp64 results); dtype defaults to fp32.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        angles = positions[..., None, None].to(wide) * self._frequencies_of(positions)
        cos, sin = angles.cos(), angles.sin()
        if self.scaling is not None and self.scaling.attention_factor != 1.0:
            cos, sin = cos * self.scaling.attention_factor, sin * self.scaling.attention_factor
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cos.to(dtype or wide), sin.to(dtype or wide)

    def _frequencies_of(self, positions: torch.Tensor) -> torch.Tensor:
        """(dim / 2,), or for scalings that follow the length (batch or 1, 1, 1, dim / 2)."""
        found, s = self.frequencies(positions.device), self.scaling
        if s is None or not s.follows_length:
            return found
        # an empty text is a short one
        lengths = F.pad(positions, (1, 0), value=-1).amax(1, keepdim=True) + 1
        if s.kind == "longrope":
            found = torch.where(lengths > s.original_max_positions, found[1], found[0])
        else:
            found = _dynamic(self.dim, self.theta, s, lengths)
        return found[:, None, None]

    def frequencies(self, device: torch.device) -> torch.Tensor:
        """What :func:`rotary_frequencies` gives, kept for the next call on the same device."""
        if torch.compiler.is_compiling():
            return rotary_frequencies(self.dim, self.theta, self.scaling, device)
        found = self._frequencies
        if found is None or found.device != device:
            found = rotary_frequencies(self.dim, self.theta, self.scaling, device)
            if type(found) is torch.Tensor:  # a fake tensor must not outlive its mode
                self._frequencies = found
        return found
