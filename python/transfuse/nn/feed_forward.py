"""The feed-forward sublayer, plain or gated, on the fused ffn op."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from transfuse.errors import ArgumentError
from transfuse.ops import _autocast, ffn, linear_act

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


class FeedForward(nn.Module):
    """``down(act(up(x)))``, or gated ``down(act(gate(x)) * up(x))`` (Shazeer 2020: GeGLU, SwiGLU).

    Args:
        hidden_size: size of input and output.
        intermediate_size: size between them.
        activation: relu, gelu, gelu_tanh or silu.
        gated: adds the ``gate`` projection.
        bias: biases of all projections. The fused op has none on the gate, so a gate with one runs unfused.
        dropout: on the inner activations, in training mode.
        wide: in fp16, what comes out is fp32: the inner activations and ``down`` are computed in it. Such sums pass
            fp16's largest number, 65504, in T5.

    Raises:
        ArgumentError: the activation is unknown.

    >>> ffn = FeedForward(16, 64, activation="silu", gated=True, bias=False)
    >>> ffn(torch.randn(2, 5, 16)).shape, sorted(ffn.state_dict())
    (torch.Size([2, 5, 16]), ['down.weight', 'gate.weight', 'up.weight'])
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        wide: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ArgumentError(f"FeedForward: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.activation, self.dropout, self.wide = activation, dropout, wide
        self.gate: nn.Module | None = None
        if gated:
            self.gate = nn.Linear(hidden_size, intermediate_size, bias, device=device, dtype=dtype)
        self.up = nn.Linear(hidden_size, intermediate_size, bias, device=device, dtype=dtype)
        self.down = nn.Linear(intermediate_size, hidden_size, bias, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        parts = [f"activation={self.activation!r}"]
        parts += [f"dropout={self.dropout}"] * bool(self.dropout) + ["wide=True"] * self.wide
        return ", ".join(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., hidden_size) -> (..., hidden_size)."""
        p = self.dropout if self.training else 0.0
        up, down, gate = self.up, self.down, self.gate
        if self.wide and _is_plain(down) and _compute_dtype(x) == torch.float16:
            return self._wide(x, p)
        if not (_is_plain(up) and _is_plain(down) and (gate is None or (_is_plain(gate) and gate.bias is None))):
            return self._unfused(x, p)
        return ffn(
            x,
            up.weight,
            up.bias,
            down.weight,
            down.bias,
            activation=self.activation,
            w_gate=None if gate is None else gate.weight,
            dropout_p=p,
        )

    def _unfused(self, x: torch.Tensor, p: float) -> torch.Tensor:
        """The same through the submodules: replaced (LoRA, quantisation), with hooks, or with a bias on the gate."""
        if self.gate is None:
            h = _ACTIVATE[self.activation](self.up(x))
        else:
            h = _ACTIVATE[self.activation](self.gate(x)) * self.up(x)
        return self.down(F.dropout(h, p) if p else h)

    def _wide(self, x: torch.Tensor, p: float) -> torch.Tensor:
        """The same, from fp16 to fp32: products of the matrices alone are narrow."""
        down, up = self.down, self.up(x)
        if self.gate is None:
            h = _ACTIVATE[self.activation](up).float()
        else:
            h = _ACTIVATE[self.activation](self.gate(x)).float() * up.float()
        h = F.dropout(h, p) if p else h
        with torch.autocast(x.device.type, enabled=False) if _autocast.active(x) else nullcontext():
            return F.linear(h, down.weight.float(), None if down.bias is None else down.bias.float())


_ACTIVATE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
}


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What matrices are multiplied in."""
    return torch.get_autocast_dtype(x.device.type) if _autocast.active(x) else x.dtype


def _is_plain(module: nn.Module) -> bool:
    """Whether using the weights directly is the same as calling the module."""
    return type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks


class ActivatedLinear(nn.Linear):
    """A linear layer with its activation in one op: ``act(x W^T + b)``; torch.nn.Linear's state_dict.

    >>> ActivatedLinear(4, 2, activation="relu")(torch.randn(3, 4)).min().item() >= 0
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ArgumentError(
                f"ActivatedLinear: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.activation = activation

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (..., in_features) -> (..., out_features)."""
        return linear_act(input, self.weight, self.bias, self.activation)
