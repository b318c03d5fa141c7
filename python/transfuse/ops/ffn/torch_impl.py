"""Feed-forward network on ATen: the CPU default, and the fallback everywhere else.

``ffn`` and ``linear_act`` are plain differentiable functions. The ``*_forward`` and ``*_backward`` functions are the
same in the shape of the registered ops: they keep the pre-activations alone, one tensor (..., d_ff) or two when gated,
and compute the activation again in backward, where autograd would keep two or four.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from transfuse.ops._philox import keep_mask

aten = torch.ops.aten


def ffn(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str,
    w_gate: torch.Tensor | None,
    dropout_p: float,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """x: (..., d) -> (..., d); dropout drawn by torch, or replayed from a seed."""
    h = F.linear(x, w1, b1)
    h = _hidden(h, None if w_gate is None else F.linear(x, w_gate), activation)
    if dropout_p > 0.0:
        h = F.dropout(h, dropout_p) if seed is None else h * _kept(seed, dropout_p, h)
    return F.linear(h, w2, b2)


def linear_act(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, activation: str) -> torch.Tensor:
    """x: (..., d_in) -> (..., d_out)."""
    return _activate(F.linear(x, w, b), activation)


def ffn_forward(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str,
    w_gate: torch.Tensor | None,
    dropout_p: float,
    seed: torch.Tensor | None,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, up, gate): up = x @ w1.T + b1 and gate = x @ w_gate.T, (..., d_ff), empty where absent or not saved."""
    up = F.linear(x, w1, b1).contiguous()
    gate = None if w_gate is None else F.linear(x, w_gate).contiguous()
    kept_up, kept_gate = (up, gate) if save else (None, None)
    h = _hidden(up.clone() if save else up, gate.clone() if save and gate is not None else gate, activation)
    if dropout_p > 0.0:
        h = h * _kept(seed, dropout_p, h)
    return F.linear(h, w2, b2).contiguous(), _or_empty(kept_up, x), _or_empty(kept_gate, x)


def ffn_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    w_gate: torch.Tensor | None,
    up: torch.Tensor,
    gate: torch.Tensor,
    activation: str,
    dropout_p: float,
    seed: torch.Tensor | None,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dw1, db1, dw2, db2, dw_gate), each empty unless ``needs`` says so."""
    need_x, need_w1, need_b1, need_w2, need_b2, need_gate = needs
    keep = _kept(seed, dropout_p, up) if dropout_p > 0.0 else None
    dh = (_rows(dout) @ w2).view(up.shape)
    if keep is not None:
        dh = dh * keep
    if w_gate is None:
        dup, dgate = _activation_backward(dh, up, activation), None
    else:
        dup, dgate = dh * _activate(gate.clone(), activation), _activation_backward(dh * up, gate, activation)
    dx = _rows(dup) @ w1 if need_x else None
    if dx is not None and dgate is not None and w_gate is not None:
        dx = dx.addmm_(_rows(dgate), w_gate)
    dw2 = None
    if need_w2:
        h = _hidden(up.clone(), None if w_gate is None else gate.clone(), activation)
        dw2 = _outer(dout, h if keep is None else h * keep)
    return (
        _or_empty(None if dx is None else dx.view(x.shape), x),
        _or_empty(_outer(dup, x) if need_w1 else None, x),
        _or_empty(_rows(dup).sum(0) if need_b1 else None, x),
        _or_empty(dw2, x),
        _or_empty(_rows(dout).sum(0) if need_b2 else None, x),
        _or_empty(_outer(dgate, x) if need_gate and dgate is not None else None, x),
    )


def linear_act_forward(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, activation: str, save: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, z): z = x @ w.T + b, (..., d_out), empty unless saved."""
    z = F.linear(x, w, b).contiguous()
    return _activate(z.clone() if save else z, activation), _or_empty(z if save else None, x)


def linear_act_backward(
    dout: torch.Tensor, x: torch.Tensor, w: torch.Tensor, z: torch.Tensor, activation: str, needs: Sequence[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dw, db), each empty unless ``needs`` says so."""
    dz = _activation_backward(dout, z, activation)
    return (
        _or_empty((_rows(dz) @ w).view(x.shape) if needs[0] else None, x),
        _or_empty(_outer(dz, x) if needs[1] else None, x),
        _or_empty(_rows(dz).sum(0) if needs[2] else None, x),
    )


def _hidden(up: torch.Tensor, gate: torch.Tensor | None, activation: str) -> torch.Tensor:
    """act(up), or act(gate) * up; may overwrite either where no graph needs it."""
    if gate is None:
        return _activate(up, activation)
    gate = _activate(gate, activation)
    return gate.mul_(up) if _may_overwrite(gate, up) else gate * up


def _activate(z: torch.Tensor, activation: str) -> torch.Tensor:
    """act(z); overwrites z, which must be nobody else's, unless a graph needs it."""
    if activation == "relu":
        return F.relu_(z)  # its gradient is known from its result
    in_place = _may_overwrite(z)
    if activation == "silu":
        return F.silu(z, inplace=in_place)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    # torch._C._nn.gelu_ is F.gelu's in-place sibling; torch.ops.aten.gelu_ is the same at 3 us more a call
    if in_place:
        return torch._C._nn.gelu_(z, approximate=approximate)  # type: ignore[attr-defined]
    return F.gelu(z, approximate=approximate)


def _activation_backward(dout: torch.Tensor, z: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "relu":
        return aten.threshold_backward(dout, z, 0)
    if activation == "silu":
        return aten.silu_backward(dout, z)
    return aten.gelu_backward(dout, z, approximate="tanh" if activation == "gelu_tanh" else "none")


def _kept(seed: torch.Tensor | None, p: float, h: torch.Tensor) -> torch.Tensor:
    """0 where an element of h (..., d_ff) is dropped and 1 / (1 - p) where it is kept, in h's dtype."""
    assert seed is not None
    keep = keep_mask(seed, p, 1, 1, h.numel() // max(h.shape[-1], 1), h.shape[-1], h.device)
    return keep.view(h.shape).to(h.dtype).div_(1.0 - p)


def _may_overwrite(*tensors: torch.Tensor) -> bool:
    """Whether no graph needs these values and no transform or compiler, which fuses anyway, is at work."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def _rows(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1, t.shape[-1])


def _outer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(..., m), (..., n) -> (m, n), summed over the rows."""
    return _rows(a).T @ _rows(b)


def _or_empty(t: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    # A registered op has no optional outputs: an absent one is an empty tensor.
    return like.new_empty(0) if t is None else t
