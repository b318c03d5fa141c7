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

from transfuse.ops import _philox
from transfuse.ops.attention import torch_eager, torch_explicit, torch_flash
from transfuse.ops.attention.torch_chunks import Gradients
from transfuse.ops.attention.variant import Variant, shift, unlimited, visible_columns

_FEW_SCORES = 1 << 23
"""Up to here (32 MB in fp32) keeping P for backward is faster than computing it again."""
_FEW_LOW_SCORES = 1 << 21
"""Up to here ATen's flash attention in low precision is slower, forward and backward together."""
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
    if torch.compiler.is_compiling() and not with_lse and _sdpa_says(q, k, v, variant):
        return _sdpa(q, k, v, variant), None
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return torch_explicit.attention(q, k, v, variant, draw_keep(q, k, variant), with_lse)
    differentiable = torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or _requires_grad(*variant[1:4])
    )
    if _prefers_explicit(q, k, v, variant, differentiable):
        return torch_explicit.attention(q, k, v, variant, draw_keep(q, k, variant), with_lse)
    if not with_lse and variant.sinks is None and _aten_says(q, k, v, variant, differentiable):
        return _aten(q, k, v, variant, differentiable), None
    keep = draw_keep(q, k, variant)
    if not differentiable:
        return torch_eager.forward(q, k, v, variant, keep, with_lse)
    out, lse = torch_eager.Attention.apply(
        q, k, v, variant.bias, variant.alibi_slopes, variant.sinks, keep, variant, with_lse
    )
    return out, lse if with_lse else None


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); seed: int64 (2,), read under dropout."""
    return torch_eager.forward(q, k, v, variant, keep_of(variant, seed, q, k), True)


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
    return torch_eager.backward(dout, dlse, q, k, v, out, lse, variant, keep_of(variant, seed, q, k), want)


def keep_of(variant: Variant, seed: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """The dropout mask that a seed stands for."""
    if variant.dropout_p == 0 or seed is None:
        return None
    return _philox.keep_mask(seed, variant.dropout_p, q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)


def draw_keep(q: torch.Tensor, k: torch.Tensor, variant: Variant) -> torch.Tensor | None:
    """A dropout mask from torch's own generator: much faster here than Philox out of tensor ops."""
    if variant.dropout_p == 0:
        return None
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return torch.empty(shape, dtype=torch.bool, device=q.device).bernoulli_(1 - variant.dropout_p)


def attention_weights(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, variant: Variant) -> torch.Tensor:
    """P: (batch, heads, q_len, k_len) in q's dtype, zero in rows whose lse is -inf; differentiable."""
    s = torch_explicit.scores(q, k, variant, exact=True)
    return (s - lse.masked_fill(lse == -torch.inf, 0)[..., None].to(s.dtype)).exp().to(q.dtype)


def attention_weights_forward(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, variant: Variant) -> torch.Tensor:
    """As :func:`attention_weights`."""
    return attention_weights(q, k, lse, variant)


def _aten_says(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, differentiable: bool) -> bool:
    """Whether one op of ATen's is the whole answer."""
    if q.device.type != "cpu":
        return _sdpa_says(q, k, v, variant)
    if not torch_flash.says(q, k, v, variant) or torch_eager.narrow(q, k, variant):
        return False
    if not differentiable:
        return True
    return q.shape[3] == v.shape[3] and not _requires_grad(variant.bias, variant.alibi_slopes)


def _aten(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, differentiable: bool) -> torch.Tensor:
    if q.device.type != "cpu":
        return _sdpa(q, k, v, variant)
    if differentiable:
        added, is_causal = torch_flash.additive(q, k, variant)
        q, k, v = torch_flash.steppable(q), torch_flash.steppable(k), torch_flash.steppable(v)
        out: torch.Tensor = torch_eager.Flash.apply(q, k, v, added, is_causal, variant.scale)
        return out
    if q.shape[2] == 1 and k.shape[1] != q.shape[1] and _same_for_heads(variant):
        return _folded_sdpa(q, k, v, variant)
    if variant.alibi_slopes is not None or (
        variant.right == 0 and (variant.mask is not None or variant.bias is not None)
    ):
        return torch_flash.forward(q, k, v, variant, False)[0]
    return _sdpa(q, k, v, variant)  # the same kernel at the lowest cost of a call


def _same_for_heads(variant: Variant) -> bool:
    mask, bias = variant.mask, variant.bias
    no_head = (mask is None or mask.shape[1] == 1) and (bias is None or bias.shape[1] == 1)
    return no_head and variant.alibi_slopes is None


def _folded_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant) -> torch.Tensor:
    """One query: heads that share keys become rows of one head, so that the keys are read once."""
    batch, heads, _, head_dim = q.shape
    rows = q.reshape(batch, k.shape[1], heads // k.shape[1], head_dim)
    # what the window hides from a single query has been cut off already
    out = _sdpa(rows, k, v, variant._replace(left=-1, right=-1))
    return out.reshape(batch, heads, 1, v.shape[3])


def _sdpa_says(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant) -> bool:
    """Whether F.scaled_dot_product_attention computes this call, exactly."""
    empty = 0 in q.shape or 0 in k.shape or 0 in v.shape
    if variant.scale <= 0 or (variant.deterministic and q.device.type != "cpu"):
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


def _prefers_explicit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, differentiable: bool
) -> bool:
    """Whether keeping every score beats the alternatives."""
    low = q.dtype in (torch.bfloat16, torch.float16)
    if (not low and not differentiable) or q.device.type != "cpu":
        return False
    count = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if not torch_flash.says(q, k, v, variant) or (
        differentiable and _requires_grad(variant.bias, variant.alibi_slopes)
    ):
        return count <= _FEW_SCORES
    if differentiable:
        return low and count <= _FEW_LOW_SCORES
    return count <= _FEW_SCORES and q.shape[2] * q.shape[1] <= _FEW_ROWS * k.shape[1]


def _requires_grad(*tensors: torch.Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)
