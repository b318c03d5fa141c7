"""Causal softmax on ATen: the CPU default, and the fallback everywhere else.

On an eager CPU -inf is added to the scores where they are hidden, in the pass that scales them: a vectorized addition
takes a quarter of masked_fill's time, and needs no mask in backward, since a hidden score's probability is 0 and with
it the gradient. Adding differs from selecting in two rare cases, and both leave NaN in their row: a hidden score of
+inf or NaN, and a row with nothing to see. So a NaN sends the call to the selecting form, which is exact always, and
which compilers, transforms and GPUs get at once since it looks at no values.

``causal_softmax`` is a plain differentiable function. ``*_forward`` and ``*_backward`` are the same in the shape of the
registered ops, where only the result is saved: dlogits = out * (dout - sum_k(out * dout)).
"""

from __future__ import annotations

import math

import torch

NEG_INF = float("-inf")


def causal_softmax(
    scores: torch.Tensor, scale: float, diagonal: int | None, mask: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """Probabilities like scores (..., q_len, k_len); query i sees the keys up to i + diagonal, all of them if None."""
    if scores.device.type != "cpu" or scores.numel() == 0 or _is_traced(scores):
        return _selecting(scores, scale, diagonal, mask, bias)
    out = _adding(scores, scale, diagonal, mask, bias)
    # One NaN makes its whole row NaN, so the first column tells; probabilities cannot overflow the sum.
    if math.isnan(out.detach().select(-1, 0).sum().item()):
        return _selecting(scores, scale, diagonal, mask, bias)
    return out


def causal_softmax_forward(
    scores: torch.Tensor, scale: float, diagonal: int | None, mask: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """The same, contiguous."""
    return causal_softmax(scores, scale, diagonal, mask, bias).contiguous()


def causal_softmax_backward(
    dout: torch.Tensor, out: torch.Tensor, scale: float, diagonal: int | None, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dscores, dbias), dbias empty without a bias. Probabilities of 0 stand for the diagonal."""
    dlogits = torch._softmax_backward_data(dout, out, -1, out.dtype)
    dbias = out.new_empty(0) if bias is None else dlogits.sum_to_size(bias.shape).to(bias.dtype, copy=True)
    return dlogits.mul_(scale), dbias.contiguous()


def _adding(
    scores: torch.Tensor, scale: float, diagonal: int | None, mask: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """Hide by adding -inf, in fp32 (fp64 for fp64); NaN in a row with nothing to see."""
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    hiding = _hiding(scores, diagonal, mask, wide)
    terms = [t for t in (bias, hiding) if t is not None]
    if not terms and scale == 1.0:
        return torch.softmax(scores, -1).to(scores.dtype)
    # Scaling and addition save nothing for backward, so all but the first step may be in place.
    if scores.dtype != wide:
        logits = scores.to(wide).mul_(scale)
    elif terms:
        logits = torch.add(terms.pop(0), scores, alpha=scale)
    else:
        logits = scores * scale
    for term in terms:
        logits.add_(term)
    return torch.softmax(logits, -1).to(scores.dtype)


def _hiding(
    scores: torch.Tensor, diagonal: int | None, mask: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """0 where a key may be seen and -inf where not, broadcast to scores; None where everything may."""
    if mask is None:
        if diagonal is None:
            return None
        return torch.full(scores.shape[-2:], NEG_INF, dtype=dtype).triu_(diagonal + 1)
    if diagonal is not None:
        mask = mask.expand(*mask.shape[:-2], *scores.shape[-2:]).tril(diagonal)
    # 1 - 1/1 = 0 and 1 - 1/0 = -inf: vectorized, three times as fast as torch.where with two numbers
    return 1.0 - mask.to(dtype).reciprocal_()


def _selecting(
    scores: torch.Tensor, scale: float, diagonal: int | None, mask: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """Hide by selection: exact for every value."""
    # On a GPU low precision halves the traffic, but in fp16 a bias of finfo.min plus a score would overflow.
    low = scores.dtype in (torch.float16, torch.bfloat16)
    wide = low and (scores.device.type == "cpu" or (bias is not None and scores.dtype == torch.float16))
    logits = (scores.float() if wide else scores) * scale
    if bias is not None:
        logits = logits + bias
    if diagonal is not None:
        logits = logits.masked_fill(~_visible(scores, diagonal), NEG_INF)
    if mask is not None:
        logits = logits.masked_fill(~mask, NEG_INF)
    if scores.shape[-1] == 0:
        return torch.softmax(logits, -1).to(scores.dtype)
    nothing = logits.amax(-1, keepdim=True) == NEG_INF
    out = torch.softmax(logits.masked_fill(nothing, 0.0), -1)
    return out.masked_fill(nothing, 0.0).to(scores.dtype)


def _visible(scores: torch.Tensor, diagonal: int) -> torch.Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(diagonal)


def _is_traced(scores: torch.Tensor) -> bool:
    """True where values may not be looked at: compilers, vmap, tracing modes, fake tensors and other subclasses."""
    return (
        torch.compiler.is_compiling()
        or type(scores) not in (torch.Tensor, torch.nn.Parameter)
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )
