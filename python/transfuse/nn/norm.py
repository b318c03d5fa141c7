"""LayerNorm and RMSNorm: torch's constructors and state_dict, plus a fused residual addition."""

from __future__ import annotations

from typing import overload

import torch
from torch import nn

from transfuse.errors import ArgumentError
from transfuse.ops import layer_norm, rms_norm


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` on transfuse's kernels: same constructor, state_dict and results.

    Called with ``residual`` it returns ``(norm(x + residual), x + residual)`` from one pass.

    Raises:
        ArgumentError: the trailing dimensions of the input are not ``normalized_shape``.

    >>> norm = LayerNorm(8)
    >>> x, r = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    >>> y, summed = norm(x, residual=r)
    >>> torch.equal(summed, x + r), torch.allclose(y, torch.nn.functional.layer_norm(x + r, (8,)), atol=1e-5)
    (True, True)
    """

    @overload
    def forward(self, input: torch.Tensor, residual: None = None) -> torch.Tensor: ...
    @overload
    def forward(self, input: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
    def forward(
        self, input: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """input, residual: (..., *normalized_shape)."""
        if len(self.normalized_shape) == 1:
            return layer_norm(input, self.weight, self.bias, self.eps, residual)
        _check_shape("LayerNorm", input, self.normalized_shape)
        weight = None if self.weight is None else self.weight.flatten()
        bias = None if self.bias is None else self.bias.flatten()
        start = -len(self.normalized_shape)
        if residual is None:
            return layer_norm(input.flatten(start), weight, bias, self.eps).view(input.shape)
        y, summed = layer_norm(input.flatten(start), weight, bias, self.eps, residual.flatten(start))
        return y.view(input.shape), summed.view(input.shape)


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` on transfuse's kernels: same constructor, state_dict and results.

    Called with ``residual`` it returns ``(norm(x + residual), x + residual)`` from one pass. As in torch, eps=None
    means the machine epsilon of the precision that the statistics are computed in.

    Raises:
        ArgumentError: the trailing dimensions of the input are not ``normalized_shape``.

    >>> RMSNorm(4)(torch.tensor([3.0, 3.0, 3.0, 3.0])).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """

    @overload
    def forward(self, input: torch.Tensor, residual: None = None) -> torch.Tensor: ...
    @overload
    def forward(self, input: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
    def forward(
        self, input: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """input, residual: (..., *normalized_shape)."""
        eps = _epsilon(input.dtype) if self.eps is None else self.eps
        if len(self.normalized_shape) == 1:
            return rms_norm(input, self.weight, eps, residual)
        _check_shape("RMSNorm", input, self.normalized_shape)
        weight = None if self.weight is None else self.weight.flatten()
        start = -len(self.normalized_shape)
        if residual is None:
            return rms_norm(input.flatten(start), weight, eps).view(input.shape)
        y, summed = rms_norm(input.flatten(start), weight, eps, residual.flatten(start))
        return y.view(input.shape), summed.view(input.shape)


def _epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _check_shape(name: str, x: torch.Tensor, normalized_shape: tuple[int, ...]) -> None:
    if tuple(x.shape[-len(normalized_shape) :]) != tuple(normalized_shape):
        raise ArgumentError(f"{name}: input must end in shape {tuple(normalized_shape)}, got {tuple(x.shape)}")
