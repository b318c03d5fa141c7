"""Attention in Triton, in the shapes of the registered ops; what is missing here runs on PyTorch (``registration``)."""

from __future__ import annotations

import torch

from transfuse.ops.attention import triton_backward, triton_decode, triton_forward
from transfuse.ops.attention.torch_chunks import Gradients
from transfuse.ops.attention.triton_scores import Lengths
from transfuse.ops.attention.variant import Variant


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); seed: int64 (2,), read under dropout."""
    if triton_decode.use_splits(q, k):
        return triton_decode.decode_forward(q, k, v, variant, seed)
    return triton_forward.forward(q, k, v, variant, seed, Lengths(), q.shape[2], k.shape[2])


def attention_backward(
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
    """(dq, dk, dv, dbias, dalibi_slopes, dsinks); ``want`` says which of the last three to compute if they exist."""
    rows = (q.shape[2], k.shape[2])
    return triton_backward.backward(dout, dlse, q, k, v, out, lse, variant, seed, want, Lengths(), *rows)


def attention_weights_forward(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, variant: Variant) -> torch.Tensor:
    """P: (batch, heads, q_len, k_len) in q's dtype, zero in rows whose lse is -inf."""
    return triton_forward.weights(q, k, lse, variant)


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
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k)
    out, lse = triton_forward.forward(packed(q), packed(k), packed(v), variant, seed, lengths, max_q, max_k)
    return unpacked(out), lse[0]


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
    """(dq, dk, dv, dbias, dalibi_slopes, dsinks), as in :func:`attention_backward`."""
    dq, dk, dv, *others = triton_backward.backward(
        packed(dout),
        None if dlse is None else dlse[None],
        packed(q),
        packed(k),
        packed(v),
        packed(out),
        lse[None],
        variant,
        seed,
        want,
        Lengths(cu_seqlens_q, cu_seqlens_k),
        max_q,
        max_k,
    )
    return unpacked(dq), unpacked(dk), unpacked(dv), *others  # type: ignore[return-value]


def attention_decode_forward(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
    variant: Variant,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (batch, heads, q_len, v_head_dim), lse (batch, heads, q_len))."""
    if triton_decode.few_rows(q, k_cache):
        return triton_decode.decode_forward(q, k_cache, v_cache, variant, seed, cache_lengths)
    lengths = Lengths(k_lengths=cache_lengths)
    return triton_forward.forward(q, k_cache, v_cache, variant, seed, lengths, q.shape[2], k_cache.shape[2])


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
    """(dq, dk, dv, dbias, dalibi_slopes, dsinks), as in :func:`attention_backward`."""
    lengths = Lengths(k_lengths=cache_lengths)
    rows = (q.shape[2], k_cache.shape[2])
    return triton_backward.backward(dout, dlse, q, k_cache, v_cache, out, lse, variant, seed, want, lengths, *rows)


def packed(t: torch.Tensor) -> torch.Tensor:
    """(total, heads, width) as (1, heads, total, width)."""
    return t.transpose(0, 1)[None]


def unpacked(t: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`packed`."""
    return t[0].transpose(0, 1)
