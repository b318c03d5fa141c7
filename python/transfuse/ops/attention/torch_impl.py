"""Attention on PyTorch alone: the CPU default, and the fallback everywhere else.

What runs, for a call outside a trace:

- on a CPU, ATen's flash attention (``torch_flash``) wherever it can say the call;
- on other devices F.scaled_dot_product_attention, likewise;
- otherwise, and where it is faster, plain ops (``torch_explicit``) for few scores and blocks (``torch_chunks``) for
  many: soft capping, dropout, gradients of bias and ALiBi slopes, narrow windows.

Inside a trace or a function transform: F.scaled_dot_product_attention or plain ops. ``attention_forward`` and
``attention_backward`` are the same in the shape of the registered ops.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from transfuse.ops.attention import philox, torch_chunks, torch_explicit, torch_flash
from transfuse.ops.attention.variant import Variant, shift, unlimited, visible_columns

Gradients = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None
]

_FEW_SCORES = 1 << 23
"""Up to here (32 MB in fp32) keeping P for backward is faster than computing it again."""
_FEW_ROWS = 16
"""Up to here ATen's flash attention in low precision spends its time converting keys."""


def attention(
    q: torch.Tensor,  # (batch, heads, q_len, head_dim)
    k: torch.Tensor,  # (batch, kv_heads, k_len, head_dim)
    v: torch.Tensor,  # (batch, kv_heads, k_len, v_head_dim)
    variant: Variant,
    with_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse or None), differentiable; dropout draws from torch's generator."""
    if variant.left >= 0 or variant.right >= 0:
        k, v, variant = _hide_unseen(q, k, v, variant)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _traced(q, k, v, variant, with_lse)
    differentiable = torch.is_grad_enabled() and _requires_grad(q, k, v, *variant[:4])
    if _prefers_explicit(q, k, v, variant, differentiable):
        return torch_explicit.attention(q, k, v, variant, draw_keep(q, k, variant), with_lse)
    if q.device.type != "cpu" and not with_lse and _sdpa_says(q, k, v, variant):
        return _sdpa(q, k, v, variant), None
    if not differentiable:
        return forward(q, k, v, variant, draw_keep(q, k, variant), with_lse)
    keep = draw_keep(q, k, variant)
    out, lse = _Attention.apply(q, k, v, variant.bias, variant.alibi_slopes, variant.sinks, keep, variant, with_lse)
    return out, lse if with_lse else None


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); seed: int64 (2,), read under dropout."""
    return forward(q, k, v, variant, keep_of(variant, seed, q, k), True)


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
    return backward(dout, dlse, q, k, v, out, lse, variant, keep_of(variant, seed, q, k), want)


def keep_of(variant: Variant, seed: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """The dropout mask that a seed stands for."""
    if variant.dropout_p == 0 or seed is None:
        return None
    return philox.keep_mask(seed, variant.dropout_p, q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)


def draw_keep(q: torch.Tensor, k: torch.Tensor, variant: Variant) -> torch.Tensor | None:
    """A dropout mask from torch's own generator: much faster here than Philox out of tensor ops."""
    if variant.dropout_p == 0:
        return None
    shape = (*q.shape[:3], k.shape[2])
    return torch.empty(shape, dtype=torch.bool, device=q.device).bernoulli_(1 - variant.dropout_p)


def attention_weights(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, variant: Variant) -> torch.Tensor:
    """P: (batch, heads, q_len, k_len) in q's dtype, zero in rows whose lse is -inf; differentiable."""
    s = torch_explicit.scores(q, k, variant)
    return (s - lse.masked_fill(lse == -torch.inf, 0)[..., None].to(s.dtype)).exp().to(q.dtype)


def attention_weights_forward(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, variant: Variant) -> torch.Tensor:
    """As :func:`attention_weights`."""
    return attention_weights(q, k, lse, variant)


class _Attention(torch.autograd.Function):
    """The tensors that may want a gradient come first; the variant holds them too, for reading alone."""

    @staticmethod
    def forward(ctx, q, k, v, bias, slopes, sinks, keep, variant, with_lse):  # type: ignore[no-untyped-def]
        out, lse = forward(q, k, v, variant, keep, with_lse)
        ctx.save_for_backward(q, k, v, bias, slopes, sinks, variant.mask, keep, out, lse)
        ctx.variant = variant._replace(mask=None, bias=None, alibi_slopes=None, sinks=None)
        ctx.set_materialize_grads(False)
        if not with_lse:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):  # type: ignore[no-untyped-def]
        q, k, v, bias, slopes, sinks, mask, keep, out, lse = ctx.saved_tensors
        variant = ctx.variant._replace(mask=mask, bias=bias, alibi_slopes=slopes, sinks=sinks)
        if dout is None and dlse is None:
            return (None,) * 9
        if torch.is_grad_enabled():
            grads = _recompute(ctx.needs_input_grad[:6], dout, dlse, q, k, v, variant, keep)
            return *grads, None, None, None
        dout = torch.zeros_like(out) if dout is None else dout
        grads = backward(dout, dlse, q, k, v, out, lse, variant, keep, ctx.needs_input_grad[3:6])
        return *grads, None, None, None


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, keep: torch.Tensor | None, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if torch_flash.why_not(q, k, v, variant) is None and not _narrow(q, k, variant):
        return torch_flash.forward(q, k, v, variant, with_lse)
    return torch_chunks.forward(q, k, v, variant, keep)


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    variant: Variant,
    keep: torch.Tensor | None,
    want: tuple[bool, bool, bool],
) -> Gradients:
    bias, slopes = want[0] and variant.bias is not None, want[1] and variant.alibi_slopes is not None
    dbias = dslopes = None
    if bias or slopes or torch_flash.why_not(q, k, v, variant) is not None or _narrow(q, k, variant):
        dq, dk, dv, dbias, dslopes = torch_chunks.backward(dout, dlse, q, k, v, out, lse, variant, keep, bias, slopes)
        dbias = None if dbias is None else dbias.to(variant.bias.dtype)  # type: ignore[union-attr]
        dslopes = None if dslopes is None else dslopes.to(variant.alibi_slopes.dtype)  # type: ignore[union-attr]
    else:
        dq, dk, dv = torch_flash.backward(dout, dlse, q, k, v, out, lse, variant)
    return dq, dk, dv, dbias, dslopes, _sinks_gradient(dout, dlse, out, lse, variant.sinks) if want[2] else None


def _sinks_gradient(
    dout: torch.Tensor, dlse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor | None:
    """The sink is a key with a value of 0, so dS = P * (0 - delta) with P = exp(sink - lse)."""
    if sinks is None:
        return None
    statistic = torch_chunks.delta(dout, dlse, out, lse.dtype)
    p = (sinks.to(lse.dtype)[:, None] - lse.masked_fill(lse == -torch.inf, torch.inf)).exp()
    return -(p * statistic).sum((0, 2)).to(sinks.dtype)


def _recompute(
    needed: tuple[bool, ...],
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    variant: Variant,
    keep: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """First gradients that can themselves be differentiated."""
    inputs = (q, k, v, variant.bias, variant.alibi_slopes, variant.sinks)
    fresh = [t.view_as(t) if t is not None and n else t for t, n in zip(inputs, needed, strict=True)]
    variant = variant._replace(bias=fresh[3], alibi_slopes=fresh[4], sinks=fresh[5])
    with_lse = dlse is not None
    outputs = torch_explicit.attention(*fresh[:3], variant, keep, with_lse)  # type: ignore[call-arg, arg-type]
    pairs = [(o, g) for o, g in zip(outputs, (dout, dlse), strict=True) if o is not None and g is not None]
    wanted = [t for t, n in zip(fresh, needed, strict=True) if n and t is not None]
    found = iter(
        torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True)
    )
    return tuple(next(found) if n else None for n in needed)


def _traced(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not with_lse and _sdpa_says(q, k, v, variant):
        return _sdpa(q, k, v, variant), None
    keep = None
    if variant.dropout_p > 0:
        keep = torch.rand((*q.shape[:3], k.shape[2]), device=q.device) >= variant.dropout_p
    return torch_explicit.attention(q, k, v, variant, keep, with_lse)


def _sdpa_says(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant) -> bool:
    """Whether F.scaled_dot_product_attention computes this call, exactly."""
    empty = 0 in q.shape or 0 in k.shape or 0 in v.shape
    if variant.deterministic and q.device.type != "cpu":
        return False
    return not empty and variant.softcap == 0 and variant.sinks is None and variant.alibi_slopes is None


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant) -> torch.Tensor:
    added: torch.Tensor | None
    if variant.bias is None and variant.mask is not None and unlimited(variant, q.shape[2], k.shape[2]):
        added, is_causal = variant.mask, False
    else:
        # F.scaled_dot_product_attention takes a mask or is_causal, not both
        added, is_causal = torch_flash.additive(q, k, variant, True)
    added = added if added is None or added.dtype == torch.bool else added.to(q.dtype)
    grouped = False
    if k.shape[1] != q.shape[1]:  # a branch: under dynamic shapes the comparison itself is a symbol
        grouped = True
    return F.scaled_dot_product_attention(
        q, k, v, added, variant.dropout_p, is_causal, scale=variant.scale, enable_gqa=grouped
    )


def _hide_unseen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant
) -> tuple[torch.Tensor, torch.Tensor, Variant]:
    """Without the keys at either end that no query sees."""
    q_len, k_len = q.shape[2], k.shape[2]
    low, high = visible_columns(variant, q_len, k_len, (0, q_len))
    if low == 0 and high == k_len:
        return k, v, variant
    mask, bias = variant.mask, variant.bias
    variant = variant._replace(
        mask=mask if mask is None or mask.shape[3] == 1 else mask[..., low:high],
        bias=bias if bias is None or bias.shape[3] == 1 else bias[..., low:high],
        first=shift(variant, q_len, k_len) - low,
    )
    return k[:, :, low:high], v[:, :, low:high], variant


def _narrow(q: torch.Tensor, k: torch.Tensor, variant: Variant) -> bool:
    """Whether so few keys are inside the window that skipping the others beats a faster kernel on all of them."""
    if variant.left < 0 or variant.right < 0:
        return False
    return 2 * (variant.left + variant.right + torch_chunks.WINDOW_ROWS) < k.shape[2] and q.shape[2] > 1


def _prefers_explicit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, differentiable: bool
) -> bool:
    count = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if count > _FEW_SCORES:
        return False
    if torch_flash.why_not(q, k, v, variant) is not None:
        return q.device.type == "cpu"
    if differentiable and _requires_grad(variant.bias, variant.alibi_slopes):
        return True
    low = q.dtype in (torch.bfloat16, torch.float16)
    return low and (differentiable or q.shape[2] * q.shape[1] <= _FEW_ROWS * k.shape[1])


def _requires_grad(*tensors: torch.Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)
