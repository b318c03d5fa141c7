"""Feed-forward network on Triton: products with their activation, gate and dropout in one kernel, forward and backward.

    forward   u = x w1^T + b1, g = x w_gate^T          one kernel: reads x once, writes h = k act(g) u, saves u and g
              out = h w2^T + b2
    backward  [du, dg, h, db1] from dh = dout w2       one kernel: dh itself is never written
              dx = du w1 + dg w_gate                   one kernel, one accumulator, gated; plain, a product
              dw1 = du^T x, dw_gate = dg^T x, dw2 = dout^T h

Kernels and their launch stand in ``triton_gemm``. Products with nothing to fuse go to torch's matmul where
:func:`use_cublas` says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from transfuse.backends import ahead
from transfuse.ops import _validate
from transfuse.ops._triton import precision
from transfuse.ops.ffn.triton_gemm import Ends, combine, product


def why_not(op: str, *tensors: torch.Tensor | None) -> str | None:
    """Why the kernels cannot take these (validated) arguments, or None."""
    return _validate.beyond_kernels("triton", *tensors)


def use_cublas(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a product (M, K) @ (K, N) that has nothing to fuse but a bias goes to torch's matmul.

    By rule, not by measurement: where it computes just what our kernel would, the vendor's is the one to beat. Not

    - off the GPU, where there is none;
    - in fp32 with ``precision`` "tf32x3", which it does not offer: its fp32 leaves tensor cores unused;
    - under torch.use_deterministic_algorithms, where its order of sums hangs on a variable of the environment.
    """
    target = ahead()
    if device.type != "cuda" and (target is None or target.gpu is None):
        return False
    return precision(dtype) != "tf32x3" and not torch.are_deterministic_algorithms_enabled()


def ffn_forward(
    x: torch.Tensor,  # (..., d)
    w1: torch.Tensor,  # (d_ff, d)
    b1: torch.Tensor | None,  # (d_ff,)
    w2: torch.Tensor,  # (d, d_ff)
    b2: torch.Tensor | None,  # (d,)
    activation: str,
    w_gate: torch.Tensor | None,  # (d_ff, d)
    dropout_p: float,
    seed: torch.Tensor | None,  # int64 (2,)
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, up, gate): up = x @ w1.T + b1 and gate = x @ w_gate.T, (..., d_ff), empty where absent or not saved."""
    inner = (*x.shape[:-1], w1.shape[0])
    up = x.new_empty(inner) if save else None
    gate = x.new_empty(inner) if save and w_gate is not None else None
    h = x.new_empty((x.shape[:-1].numel(), w1.shape[0]))
    ends = Ends(out=h, bias=_packed(b1), up=up, gate=gate, seed=_seed(seed, x))
    b_gate = None if w_gate is None else w_gate.T
    product(_rows(x), w1.T, ends, b_gate=b_gate, activation=activation, dropout_p=dropout_p)
    return _matmul(h, w2.T, b2).view(*x.shape[:-1], w2.shape[0]), _or_empty(up, x), _or_empty(gate, x)


def ffn_backward(
    dout: torch.Tensor,  # (..., d)
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    w_gate: torch.Tensor | None,
    up: torch.Tensor,  # (..., d_ff)
    gate: torch.Tensor,  # (..., d_ff), empty unless gated
    activation: str,
    dropout_p: float,
    seed: torch.Tensor | None,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dw1, db1, dw2, db2, dw_gate), each empty unless ``needs`` says so."""
    need_x, need_w1, need_b1, need_w2, need_b2, need_gate = needs
    x_rows, dout_rows = _rows(x), _rows(dout)
    up, saved_gate = _rows(up).contiguous(), None if w_gate is None else _rows(gate).contiguous()
    h = torch.empty_like(up) if need_w2 else None
    dup = dgate = db1 = None
    if need_x or need_w1 or need_b1 or need_gate:
        dup, dgate = torch.empty_like(up), None if saved_gate is None else torch.empty_like(up)
        ends = Ends(out=dup, up=up, gate=saved_gate, dgate=dgate, hidden=h, seed=_seed(seed, x))
        db1 = product(dout_rows, w2, ends, activation=activation, backward=True, dropout_p=dropout_p, sums=need_b1)
    elif h is not None:
        ends = Ends(out=h, seed=_seed(seed, x))
        combine(up[None], None if saved_gate is None else saved_gate[None], ends, activation, dropout_p=dropout_p)
    dx = None
    if need_x and dup is not None:
        second = None if dgate is None or w_gate is None else (dgate, w_gate)
        dx = _matmul(dup, w1, second=second).view(x.shape)
    return (
        _or_empty(dx, x),
        _or_empty(_outer(dup, x_rows) if need_w1 else None, x),
        _or_empty(None if db1 is None else db1.to(x.dtype), x),
        _or_empty(_outer(dout_rows, h) if need_w2 else None, x),
        _or_empty(dout_rows.sum(0) if need_b2 else None, x),
        _or_empty(_outer(dgate, x_rows) if need_gate else None, x),
    )


def linear_act_forward(
    x: torch.Tensor,  # (..., d_in)
    w: torch.Tensor,  # (d_out, d_in)
    b: torch.Tensor | None,  # (d_out,)
    activation: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, z): z = x @ w.T + b, (..., d_out), empty unless saved."""
    out = x.new_empty((*x.shape[:-1], w.shape[0]))
    z = torch.empty_like(out) if save else None
    product(_rows(x), w.T, Ends(out=out, bias=_packed(b), up=z), activation=activation)
    return out, _or_empty(z, x)


def linear_act_backward(
    dout: torch.Tensor,  # (..., d_out)
    x: torch.Tensor,
    w: torch.Tensor,
    z: torch.Tensor,
    activation: str,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dw, db), each empty unless ``needs`` says so."""
    z = _rows(z).contiguous()
    dz = torch.empty_like(z) if needs[0] or needs[1] else None
    db = combine(_rows(dout)[None], None, Ends(out=dz, up=z), activation, backward=True, sums=needs[2])
    return (
        _or_empty(_matmul(dz, w).view(x.shape) if needs[0] and dz is not None else None, x),
        _or_empty(_outer(dz, _rows(x)) if needs[1] else None, x),
        _or_empty(None if db is None else db.to(x.dtype), x),
    )


def _matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    second: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """a @ b + bias, or a @ b plus the second pair's product, rounded once."""
    if second is None and use_cublas(a.shape[0], b.shape[1], a.shape[1], a.dtype, a.device):
        return a @ b if bias is None else torch.addmm(bias, a, b)
    out = a.new_empty((a.shape[0], b.shape[1]))
    product(a, b, Ends(out=out, bias=_packed(bias)), second=second)
    return out


def _outer(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    """(rows, m), (rows, n) -> (m, n), summed over the rows."""
    return None if a is None or b is None else _matmul(a.T, b)


def _rows(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])  # not (-1, ...): that is ambiguous for a width of 0


def _packed(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


def _seed(seed: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    return None if seed is None else seed.to(x.device).contiguous()


def _or_empty(t: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    # A registered op has no optional outputs: an absent one is an empty tensor.
    return like.new_empty(0) if t is None else t
