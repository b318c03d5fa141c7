"""What a kernel backend of attention is: three functions over rows of any kind, in the shapes of the registered ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from transfuse.ops.attention.torch_chunks import Gradients
from transfuse.ops.attention.variant import Variant


class Rows(NamedTuple):
    """Where each batch row's queries and keys stand: dense rows but for what is given."""

    max_q: int
    max_k: int
    q_starts: torch.Tensor | None = None
    """(batch + 1): packed rows, as are the keys."""
    k_starts: torch.Tensor | None = None
    k_lengths: torch.Tensor | None = None
    """(batch,): how many keys of each row's cache count."""


class Kernels(NamedTuple):
    """A backend's functions, and from them the ops'. Packed rows come as one batch row (1, heads, total, width)."""

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    """(q, k, v, variant, seed, rows) -> (out, lse)"""
    backward: Callable[..., Gradients]
    """(dout, dlse, q, k, v, out, lse, variant, seed, want, rows)"""
    weights: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Variant], torch.Tensor]
    """(q, k, lse, variant)"""

    def attention_forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, seed: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse); seed: int64 (2,), read under dropout."""
        return self.forward(q, k, v, variant, seed, Rows(q.shape[2], k.shape[2]))

    def attention_backward(
        self,
        dout: torch.Tensor,
        dlse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        variant: Variant,
        seed: torch.Tensor | None,
        want: tuple[bool, bool, bool] = (True, True, True),
    ) -> Gradients:
        """(dq, dk, dv, dbias, dalibi_slopes, dsinks); want: which of the last three to compute, if they exist."""
        return self.backward(dout, dlse, q, k, v, out, lse, variant, seed, want, Rows(q.shape[2], k.shape[2]))

    def attention_weights_forward(
        self, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, variant: Variant
    ) -> torch.Tensor:
        """P: (batch, heads, q_len, k_len) in q's dtype, zero in rows whose lse is -inf."""
        return self.weights(q, k, lse, variant)

    def attention_varlen_forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_q: int,
        max_k: int,
        variant: Variant,
        seed: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out (total_q, heads, v_head_dim), lse (heads, total_q))."""
        rows = Rows(max_q, max_k, cu_seqlens_q, cu_seqlens_k)
        out, lse = self.forward(_packed(q), _packed(k), _packed(v), variant, seed, rows)
        return _unpacked(out), lse[0]

    def attention_varlen_backward(
        self,
        dout: torch.Tensor,
        dlse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_q: int,
        max_k: int,
        variant: Variant,
        seed: torch.Tensor | None,
        want: tuple[bool, bool, bool],
    ) -> Gradients:
        """(dq, dk, dv, dbias, dalibi_slopes, dsinks), as in :meth:`attention_backward`."""
        dlse = None if dlse is None else dlse[None]
        rows = Rows(max_q, max_k, cu_seqlens_q, cu_seqlens_k)
        dq, dk, dv, *others = self.backward(
            _packed(dout), dlse, _packed(q), _packed(k), _packed(v), _packed(out), lse[None], variant, seed, want, rows
        )
        return _unpacked(dq), _unpacked(dk), _unpacked(dv), *others  # type: ignore[return-value]

    def attention_decode_forward(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        cache_lengths: torch.Tensor,
        variant: Variant,
        seed: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out (batch, heads, q_len, v_head_dim), lse (batch, heads, q_len))."""
        rows = Rows(q.shape[2], k_cache.shape[2], k_lengths=cache_lengths)
        return self.forward(q, k_cache, v_cache, variant, seed, rows)

    def attention_decode_backward(
        self,
        dout: torch.Tensor,
        dlse: torch.Tensor | None,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        cache_lengths: torch.Tensor,
        variant: Variant,
        seed: torch.Tensor | None,
        want: tuple[bool, bool, bool],
    ) -> Gradients:
        """(dq, dk, dv, dbias, dalibi_slopes, dsinks), as in :meth:`attention_backward`."""
        rows = Rows(q.shape[2], k_cache.shape[2], k_lengths=cache_lengths)
        return self.backward(dout, dlse, q, k_cache, v_cache, out, lse, variant, seed, want, rows)


def _packed(t: torch.Tensor) -> torch.Tensor:
    """(total, heads, width) as (1, heads, total, width)."""
    return t.transpose(0, 1)[None]


def _unpacked(t: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`_packed`."""
    return t[0].transpose(0, 1)
