"""transfuse::attention_varlen and transfuse::attention_decode, their gradients and the gradients of those.

A kernel backend drops in with torch_impl-shaped ``attention_varlen_forward`` and ``attention_varlen_backward``
(``attention_decode_...``) of the functions below; what it lacks runs on PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from transfuse.ops import _philox, _registry
from transfuse.ops.attention import torch_sequences
from transfuse.ops.attention.registration import (
    FIELDS,
    N,
    contiguous_like,
    implementation,
    join_variant,
    or_empty,
    split_variant,
    wants,
)
from transfuse.ops.attention.torch_chunks import Gradients
from transfuse.ops.attention.torch_sequences import Cached, Packed
from transfuse.ops.attention.variant import Variant, statistics_dtype


def attention_varlen_forward(
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
    parts, keep = _varlen(q, cu_seqlens_q, cu_seqlens_k, max_q, max_k, variant, seed)
    return torch_sequences.forward(q, k, v, parts, variant, keep, (q.shape[1], q.shape[0]))


def attention_decode_forward(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
    variant: Variant,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (batch, heads, q_len, v_head_dim), lse (batch, heads, q_len))."""
    parts, keep = _decode(q, k_cache, cache_lengths, variant, seed)
    return torch_sequences.forward(q, k_cache, v_cache, parts, variant, keep, tuple(q.shape[:3]))


def attention_varlen_backward(
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
    """(dq, dk, dv, dbias, dalibi_slopes, dsinks); ``want`` says which of the last three to compute."""
    parts, keep = _varlen(q, cu_seqlens_q, cu_seqlens_k, max_q, max_k, variant, seed)
    return torch_sequences.backward(dout, dlse, q, k, v, out, lse, parts, variant, keep, want)


def attention_decode_backward(
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
    """As :func:`attention_varlen_backward`."""
    parts, keep = _decode(q, k_cache, cache_lengths, variant, seed)
    return torch_sequences.backward(dout, dlse, q, k_cache, v_cache, out, lse, parts, variant, keep, want)


def _varlen(
    q: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_q: int,
    max_k: int,
    variant: Variant,
    seed: torch.Tensor | None,
) -> tuple[list[Packed], torch.Tensor | None]:
    keep = None
    if variant.dropout_p > 0 and seed is not None:
        batch = cu_seqlens_q.shape[0] - 1
        keep = _philox.keep_mask(seed, variant.dropout_p, batch, q.shape[1], max_q, max_k, q.device)
    return torch_sequences.packed_parts(cu_seqlens_q, cu_seqlens_k), keep


def _decode(
    q: torch.Tensor, k_cache: torch.Tensor, cache_lengths: torch.Tensor, variant: Variant, seed: torch.Tensor | None
) -> tuple[list[Cached], torch.Tensor | None]:
    keep = None
    if variant.dropout_p > 0 and seed is not None:
        keep = _philox.keep_mask(
            seed, variant.dropout_p, q.shape[0], q.shape[1], q.shape[2], k_cache.shape[2], q.device
        )
    return torch_sequences.cached_parts(cache_lengths, q.shape[2]), keep


_DEFAULTS: dict[str, Callable[..., Any]] = {
    "attention_varlen_forward": attention_varlen_forward,
    "attention_varlen_backward": attention_varlen_backward,
    "attention_decode_forward": attention_decode_forward,
    "attention_decode_backward": attention_decode_backward,
}


def _function(backend: str, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(implementation(backend), name, _DEFAULTS[name])
    return found


class _Op:
    """Both ops are called (q, k, v, *where, *variant, seed, backend): all is written once, over what ``where`` is.

    where: (cu_seqlens_q, cu_seqlens_k, max_q, max_k) or (cache_lengths,), told by ``schema``: ``count`` arguments, of
    which the first ``tensors`` are tensors.
    """

    def __init__(self, name: str, schema: str, tensors: int, count: int) -> None:
        self.name, self.tensors, self.count = name, tensors, count
        qkv = "Tensor q, Tensor k, Tensor v"
        rest = f"{schema}, {FIELDS}, Tensor? seed"
        _registry.define(
            name, f"({qkv}, {rest}, str backend) -> (Tensor out, Tensor lse)", self.forward, self.forward_fake
        )
        _registry.define(
            f"{name}_backward",
            f"(Tensor dout, Tensor? dlse, {qkv}, Tensor out, Tensor lse, {rest}, bool[] want, str backend)"
            " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dalibi_slopes, Tensor dsinks)",
            self.backward,
            self.backward_fake,
        )
        _registry.autograd(name, self.setup, self.grad)
        _registry.autograd(f"{name}_backward", self.backward_setup, self.double)

    def split(self, rest):  # type: ignore[no-untyped-def]
        """(where, variant, what follows)."""
        return rest[: self.count], Variant(*rest[self.count : self.count + N]), rest[self.count + N :]

    def forward(self, q, k, v, *rest):  # type: ignore[no-untyped-def]
        where, variant, (seed, backend) = self.split(rest)
        out, lse = _function(backend, f"{self.name}_forward")(q, k, v, *where, variant, seed)
        return out.contiguous(), lse.contiguous()

    def forward_fake(self, q, k, v, *rest):  # type: ignore[no-untyped-def]
        lse_shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else q.shape[:3]
        return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(lse_shape, dtype=statistics_dtype(q))

    def setup(self, ctx, inputs, output):  # type: ignore[no-untyped-def]
        where, variant, (seed, ctx.backend) = self.split(inputs[3:])
        of_variant, ctx.rest = split_variant(variant)
        ctx.integers = where[self.tensors :]
        ctx.save_for_backward(*inputs[:3], *output, *where[: self.tensors], *of_variant, seed)
        ctx.set_materialize_grads(False)

    def grad(self, ctx, dout, dlse):  # type: ignore[no-untyped-def]
        q, k, v, out, lse, *saved, seed = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * (3 + self.count + N + 2)
        dout = torch.zeros_like(out) if dout is None else dout
        where, of_variant = (*saved[: self.tensors], *ctx.integers), tuple(saved[self.tensors :])
        want = wants(of_variant, ctx.needs_input_grad[4 + self.count : 7 + self.count])
        variant = join_variant(of_variant, ctx.rest)
        backward = getattr(torch.ops.transfuse, f"{self.name}_backward")
        dq, dk, dv, *others = backward(dout, dlse, q, k, v, out, lse, *where, *variant, seed, want, ctx.backend)
        of_tensors = [g if w else None for g, w in zip(others, want, strict=True)]
        return dq, dk, dv, *(None,) * (self.count + 1), *of_tensors, *(None,) * (N - 4 + 2)

    def backward(self, dout, dlse, q, k, v, out, lse, *rest):  # type: ignore[no-untyped-def]
        where, variant, (seed, want, backend) = self.split(rest)
        function = _function(backend, f"{self.name}_backward")
        grads = function(dout, dlse, q, k, v, out, lse, *where, variant, seed, tuple(want))
        return tuple(or_empty(g, q) for g in grads)

    def backward_fake(self, dout, dlse, q, k, v, out, lse, *rest):  # type: ignore[no-untyped-def]
        _, variant, (_, want, _) = self.split(rest)
        others = [contiguous_like(t) if w else q.new_empty(0) for t, w in zip(variant[1:4], want, strict=True)]
        return contiguous_like(q), contiguous_like(k), contiguous_like(v), *others

    def backward_setup(self, ctx, inputs, output):  # type: ignore[no-untyped-def]
        where, variant, (seed, ctx.want, _) = self.split(inputs[7:])
        of_variant, ctx.rest = split_variant(variant)
        ctx.integers = where[self.tensors :]
        ctx.save_for_backward(*inputs[:5], *where[: self.tensors], *of_variant, seed)
        ctx.set_materialize_grads(False)

    def double(self, ctx, *grad_grads):  # type: ignore[no-untyped-def]
        dout, dlse, q, k, v, *where, mask, bias, slopes, sinks, seed = ctx.saved_tensors
        contract = [*grad_grads[:3], *(g if w else None for g, w in zip(grad_grads[3:], ctx.want, strict=True))]
        if all(g is None for g in contract):
            return (None,) * (7 + self.count + N + 3)

        def function(q, k, v, bias, slopes, sinks):  # type: ignore[no-untyped-def]
            variant = join_variant((mask, bias, slopes, sinks), ctx.rest)
            return self.differentiable(q, k, v, (*where, *ctx.integers), variant, seed)

        found, (g_dout, g_dlse) = _registry.double_backward(
            function, (q, k, v, bias, slopes, sinks), (dout, dlse), contract
        )
        nothing = (None,) * (2 + self.count + 1)  # out, lse, where, mask
        return g_dout, g_dlse, *found[:3], *nothing, *found[3:], *(None,) * (N - 4 + 3)

    def differentiable(self, q, k, v, where, variant, seed):  # type: ignore[no-untyped-def]
        """(out, lse) in ops that can be differentiated any number of times."""
        if self.name == "attention_varlen":
            parts, keep = _varlen(q, *where, variant, seed)  # type: ignore[call-arg]
            return torch_sequences.packed(q, k, v, parts, variant, keep, True, torch_sequences.explicit)
        rows, keep = _decode(q, k, *where, variant, seed)  # type: ignore[call-arg]
        return torch_sequences.cached(q, k, v, rows, variant, keep, True, torch_sequences.explicit)


_Op("attention_varlen", "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_q, SymInt max_k", tensors=2, count=4)
_Op("attention_decode", "Tensor cache_lengths", tensors=1, count=1)
