"""Forward and backward of attention outside traces, on flash attention or on blocks, and their autograd functions."""

from __future__ import annotations

import torch

from transfuse.ops.attention import torch_chunks, torch_explicit, torch_flash
from transfuse.ops.attention.torch_chunks import Gradients
from transfuse.ops.attention.variant import Variant


class Flash(torch.autograd.Function):
    """ATen's flash attention with an additive mask, and with a gradient that can itself be differentiated."""

    @staticmethod
    def forward(ctx, q, k, v, added, is_causal, scale):  # type: ignore[no-untyped-def]
        out, lse = torch_flash.flash(q, k, v, 0.0, is_causal, attn_mask=added, scale=scale)
        ctx.save_for_backward(q, k, v, added, out, lse)
        ctx.is_causal, ctx.scale = is_causal, scale
        return out

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        q, k, v, added, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            variant = Variant(bias=added, scale=ctx.scale, right=0 if ctx.is_causal else -1)
            needed = (*ctx.needs_input_grad[:3], False, False, False)
            return *_recompute(needed, dout, None, q, k, v, variant, None)[:3], None, None, None
        grads = torch_flash.gradients(dout, q, k, v, out, lse, added, ctx.is_causal, ctx.scale)
        return *grads, None, None, None


class Attention(torch.autograd.Function):
    """Everything else. The tensors that may want a gradient come first; the variant holds them too, to be read."""

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
    """(out, lse); without ``with_lse`` rows that see nothing may have an lse of 0, which :func:`backward` takes too."""
    if torch_flash.says(q, k, v, variant) and not narrow(q, k, variant):
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
    """(dq, dk, dv, dbias, dalibi_slopes, dsinks); ``want`` says which of the last three to compute if they exist."""
    flash = torch_flash.says(q, k, v, variant) and not narrow(q, k, variant)
    bias, slopes, sinks = (w and t is not None for w, t in zip(want, variant[1:4], strict=True))
    if not flash or bias or slopes:
        return torch_chunks.backward(dout, dlse, q, k, v, lse, variant, keep, want)
    dq, dk, dv = torch_flash.backward(dout, dlse, q, k, v, out, lse, variant)
    dsinks = None
    if sinks and variant.sinks is not None:
        delta = (dout.to(lse.dtype) * out).sum(-1)
        delta = delta if dlse is None else delta - dlse
        dsinks = torch_chunks.sinks_gradient(variant.sinks, lse, delta).to(variant.sinks.dtype)
    return dq, dk, dv, None, None, dsinks


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


def narrow(q: torch.Tensor, k: torch.Tensor, variant: Variant) -> bool:
    """Whether so few keys are inside the window that skipping the others beats a faster kernel on all of them."""
    if variant.left < 0 or variant.right < 0:
        return False
    return 2 * (variant.left + variant.right + torch_chunks.WINDOW_ROWS) < k.shape[2] and q.shape[2] > 1
