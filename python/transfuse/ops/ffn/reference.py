"""Feed-forward network as formulas: the specification, and what the tests compare every backend with.

    plain:  h = act(x @ w1.T + b1)                          out = dropout(h) @ w2.T + b2
    gated:  h = act(x @ w_gate.T) * (x @ w1.T + b1)         out = dropout(h) @ w2.T + b2

with act one of

    relu       max(z, 0), with gradient 0 at 0
    gelu       z * Phi(z), Phi the standard normal distribution function (Hendrycks and Gimpel, arXiv 1606.08415)
    gelu_tanh  0.5 z (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))), its approximation in the same paper
    silu       z * sigmoid(z)

Everything runs in the dtype of the tensors given; give fp64 for the truth.
"""

from __future__ import annotations

import math

import torch


def activate(z: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation of every element of z."""
    if activation == "relu":
        return torch.where(z > 0.0, z, 0.0)
    if activation == "gelu":
        return 0.5 * z * (1.0 + torch.erf(z / math.sqrt(2.0)))
    if activation == "gelu_tanh":
        return 0.5 * z * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))
    return z * torch.sigmoid(z)


def linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    """x: (..., d_in), w: (d_out, d_in), b: (d_out,) -> (..., d_out)."""
    y = x @ w.T
    return y if b is None else y + b


def linear_act(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, activation: str = "gelu") -> torch.Tensor:
    """act(x @ w.T + b): (..., d_out)."""
    return activate(linear(x, w, b), activation)


def ffn(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str = "gelu",
    w_gate: torch.Tensor | None = None,
    dropout_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x: (..., d) -> (..., d).

    ``dropout_scale`` is the dropout already drawn, (..., d_ff): 0 where an element of h is dropped and
    1 / (1 - p) where it is kept.
    """
    h = linear(x, w1, b1)
    h = activate(h, activation) if w_gate is None else activate(linear(x, w_gate, None), activation) * h
    if dropout_scale is not None:
        h = h * dropout_scale
    return linear(h, w2, b2)
