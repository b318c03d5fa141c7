"""Feed-forward network as kernels compute it: products whose end does the rest, forward and backward.

    forward   u = x w1^T + b1, g = x w_gate^T          one kernel: reads x once, writes h = k act(g) u, saves u and g
              out = h w2^T + b2
    backward  [du, dg, h, db1] from dh = dout w2       one kernel: dh itself is never written
              dx = du w1 + dg w_gate                   one kernel, one accumulator, gated; plain, a product
              dw1 = du^T x, dw_gate = dg^T x, dw2 = dout^T h

A backend gives the products (:class:`Products`); the ops' shapes and the order of steps stand here once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Ends(NamedTuple):
    """What the end of a product reads and writes, None where absent; columns contiguous."""

    out: torch.Tensor | None = None
    """(M, N) written: the result forward, du backward."""
    bias: torch.Tensor | None = None
    """(N,) read."""
    up: torch.Tensor | None = None
    """(M, N) u: written forward, read backward."""
    gate: torch.Tensor | None = None
    """(M, N) g: written forward, read backward."""
    dgate: torch.Tensor | None = None
    """(M, N) dg: written backward."""
    hidden: torch.Tensor | None = None
    """(M, N) k h: written backward."""
    sums: torch.Tensor | None = None
    """(groups of rows, N) fp32, contiguous, sums of du over each: written backward."""
    seed: torch.Tensor | None = None
    """int64 (2,) of the dropout."""


class Products(NamedTuple):
    """What a backend computes; the op's four functions are methods here."""

    product: Callable[..., torch.Tensor | None]
    """(a, b, ends, *, b_gate, activation, backward, dropout_p, sums): a @ b with its end; du summed if asked."""
    combine: Callable[..., torch.Tensor | None]
    """(c, g, ends, *, activation, backward, dropout_p, sums): the end of products that are there, (1, M, N)."""
    matmul: Callable[..., torch.Tensor]
    """(a, b, bias=None, second=None): a @ b + bias, or a @ b plus the second pair's product, rounded once."""
    empty: Callable[[torch.Tensor, int, int], torch.Tensor]
    """(like, rows, columns): room for what one product writes and the next reads."""

    def ffn_forward(
        self,
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
        rows, d_ff = _rows(x), w1.shape[0]
        up = x.new_empty(rows.shape[0], d_ff) if save else None
        gate = x.new_empty(rows.shape[0], d_ff) if save and w_gate is not None else None
        h = self.empty(x, rows.shape[0], d_ff)
        ends = Ends(out=h, bias=_packed(b1), up=up, gate=gate, seed=_seed(seed, x))
        b_gate = None if w_gate is None else w_gate.T
        self.product(rows, w1.T, ends, b_gate=b_gate, activation=activation, dropout_p=dropout_p)
        out = self.matmul(h, w2.T, _packed(b2)).view(*x.shape[:-1], w2.shape[0])
        shape = (*x.shape[:-1], d_ff)
        return (
            out,
            _or_empty(None if up is None else up.view(shape), x),
            _or_empty(None if gate is None else gate.view(shape), x),
        )

    def ffn_backward(
        self,
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
        x_rows, dout_rows, seed = _rows(x), _rows(dout), _seed(seed, x)
        u, g = _rows(up).contiguous(), None if w_gate is None else _rows(gate).contiguous()
        h = self.empty(u, *u.shape) if need_w2 else None
        du = dg = db1 = None
        if need_x or need_w1 or need_b1 or need_gate:
            du, dg = self.empty(u, *u.shape), None if g is None else self.empty(u, *u.shape)
            ends = Ends(out=du, up=u, gate=g, dgate=dg, hidden=h, seed=seed)
            db1 = self.product(
                dout_rows, w2, ends, activation=activation, backward=True, dropout_p=dropout_p, sums=need_b1
            )
        elif h is not None:
            g_parts = None if g is None else g[None]
            self.combine(u[None], g_parts, Ends(out=h, seed=seed), activation=activation, dropout_p=dropout_p)
        dx = None
        if need_x and du is not None:
            dx = self.matmul(du, w1, second=None if dg is None or w_gate is None else (dg, w_gate)).view(x.shape)
        return (
            _or_empty(dx, x),
            _or_empty(self._outer(du, x_rows) if need_w1 else None, x),
            _or_empty(None if db1 is None else db1.to(x.dtype), x),
            _or_empty(self._outer(dout_rows, h) if need_w2 else None, x),
            _or_empty(dout_rows.sum(0) if need_b2 else None, x),
            _or_empty(self._outer(dg, x_rows) if need_gate else None, x),
        )

    def linear_act_forward(
        self,
        x: torch.Tensor,  # (..., d_in)
        w: torch.Tensor,  # (d_out, d_in)
        b: torch.Tensor | None,  # (d_out,)
        activation: str,
        save: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, z): z = x @ w.T + b, (..., d_out), empty unless saved."""
        rows, shape = _rows(x), (*x.shape[:-1], w.shape[0])
        out = x.new_empty(rows.shape[0], w.shape[0])
        z = torch.empty_like(out) if save else None
        self.product(rows, w.T, Ends(out=out, bias=_packed(b), up=z), activation=activation)
        return out.view(shape), x.new_empty(0) if z is None else z.view(shape)

    def linear_act_backward(
        self,
        dout: torch.Tensor,  # (..., d_out)
        x: torch.Tensor,
        w: torch.Tensor,
        z: torch.Tensor,
        activation: str,
        needs: Sequence[bool],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dx, dw, db), each empty unless ``needs`` says so."""
        z = _rows(z).contiguous()
        dz = self.empty(z, *z.shape) if needs[0] or needs[1] else None
        db = self.combine(
            _rows(dout)[None], None, Ends(out=dz, up=z), activation=activation, backward=True, sums=needs[2]
        )
        return (
            _or_empty(self.matmul(dz, w).view(x.shape) if needs[0] and dz is not None else None, x),
            _or_empty(self._outer(dz, _rows(x)) if needs[1] else None, x),
            _or_empty(None if db is None else db.to(x.dtype), x),
        )

    def _outer(self, a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
        """(rows, m), (rows, n) -> (m, n), summed over the rows."""
        return None if a is None or b is None else self.matmul(a.T, b)


def _rows(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])  # not (-1, ...): that is ambiguous for a width of 0


def _packed(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


def _seed(seed: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    return None if seed is None else seed.to(x.device).contiguous()


def _or_empty(t: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    # A registered op has no optional outputs: an absent one is an empty tensor.
    return like.new_empty(0) if t is None else t
