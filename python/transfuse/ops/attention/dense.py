"""attention and attention_weights: queries, keys and values as four-dimensional tensors."""

from __future__ import annotations

from typing import Literal, overload

import torch

from transfuse.backends import OF_PRODUCTS, choose
from transfuse.ops import _philox, _validate
from transfuse.ops.attention import arguments, reference, registration, torch_impl
from transfuse.ops.attention.variant import Variant


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool | str = ...,
    mask: torch.Tensor | None = ...,
    bias: torch.Tensor | None = ...,
    alibi_slopes: torch.Tensor | None = ...,
    window: tuple[int, int] | None = ...,
    softcap: float | None = ...,
    sinks: torch.Tensor | None = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[False] = ...,
    deterministic: bool | None = ...,
    backend: str | None = ...,
) -> torch.Tensor: ...
@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool | str = ...,
    mask: torch.Tensor | None = ...,
    bias: torch.Tensor | None = ...,
    alibi_slopes: torch.Tensor | None = ...,
    window: tuple[int, int] | None = ...,
    softcap: float | None = ...,
    sinks: torch.Tensor | None = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[True],
    deterministic: bool | None = ...,
    backend: str | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool | str = False,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``softmax(scale * q k^T + bias) v``, scores never stored whole (Dao et al. 2022, FlashAttention).

    Args:
        q: (batch, heads, q_len, head_dim), fp32, fp16, bf16 or fp64, any strides.
        k: (batch, kv_heads, k_len, head_dim); heads is a multiple of kv_heads, head h reads key head h // (heads //
            kv_heads).
        v: (batch, kv_heads, k_len, v_head_dim).
        causal: True: query i sees keys 0..i, whatever the lengths (top left, as in torch). "lower_right": query i
            stands at position i + k_len - q_len, so that the last query sees the last key.
        mask: bool, True = attend, broadcastable to (batch, heads, q_len, k_len). What else hides a key still does.
        bias: added to the scaled and capped scores, broadcastable likewise, q's dtype or fp32, with a gradient. -inf
            hides a key.
        alibi_slopes: (heads,) or (batch, heads); the score loses slope * |position of i - j|. With a gradient.
        window: (left, right): a query sees that many keys before and after its position, -1 for all.
        softcap: scores become softcap * tanh(score / softcap), before the bias.
        sinks: (heads,): one more logit in each row's denominator, with no value and with a gradient.
        scale: 1 / sqrt(head_dim) by default.
        dropout_p: probability of dropping a weight, whatever the training flag of whoever calls.
        return_lse: also return log(sum(exp(scores))) of every row, sink included; differentiable.
        deterministic: bitwise the same gradients every time; None asks torch.are_deterministic_algorithms_enabled().
        backend: see :func:`transfuse.use_backend`.

    Returns:
        out (batch, heads, q_len, v_head_dim) in q's dtype (autocast's, under autocast), and if asked lse (batch, heads,
        q_len) in fp32 (fp64 for fp64). A query that sees no key has out = 0, no gradient, and lse = -inf (= its sink).
        A hidden key may hold any finite number.

    Raises:
        ArgumentError: a shape or value is wrong. DtypeError, DeviceError, BackendError: as their names say.

    >>> import torch
    >>> q = torch.randn(2, 4, 5, 16)
    >>> k = v = torch.randn(2, 2, 7, 16)
    >>> out, lse = attention(q, k, v, causal="lower_right", return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([2, 4, 5, 16]), torch.Size([2, 4, 5]))
    """
    if arguments.autocasting("attention", q):
        q, k, v = arguments.autocast(q, k, v)
        with torch.autocast(q.device.type, enabled=False):
            return attention(  # type: ignore[call-overload, misc]
                q,
                k,
                v,
                causal=causal,
                mask=mask,
                bias=bias,
                alibi_slopes=alibi_slopes,
                window=window,
                softcap=softcap,
                sinks=sinks,
                scale=scale,
                dropout_p=dropout_p,
                return_lse=return_lse,
                deterministic=deterministic,
                backend=backend,
            )
    arguments.check_qkv("attention", q, k, v)
    variant = arguments.make_variant(
        "attention",
        q,
        (q.shape[0], q.shape[1], q.shape[2], k.shape[2]),
        causal=causal,
        mask=mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        window=window,
        softcap=softcap,
        sinks=sinks,
        scale=scale,
        dropout_p=dropout_p,
        deterministic=deterministic,
    )
    name = choose(
        "attention",
        q.device,
        backend,
        lambda b: registration.why_not(b, "attention", q, k, v, variant),
        OF_PRODUCTS,
    )
    out, lse = _run(name, q, k, v, variant, return_lse)
    return (out, lse) if return_lse else out  # type: ignore[return-value]


def _run(
    name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if name == "torch":
        return torch_impl.attention(q, k, v, variant, with_lse)
    seed = _philox.draw_seed(q.device) if variant.dropout_p > 0 else None
    if name == "reference":
        return reference.attention(q, k, v, variant, torch_impl.keep_of(variant, seed, q, k))
    out, lse = torch.ops.transfuse.attention(q, k, v, *variant, seed, name)
    return out, lse


def attention_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool | str = False,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The probabilities of an :func:`attention` call, recomputed from its lse: ``exp(scores - lse)``.

    Args as for :func:`attention`, with lse (batch, heads, q_len) as that call returned it. Sinks are in lse already,
    and the probabilities are those before dropout.

    Returns:
        (batch, heads, q_len, k_len) in q's dtype (autocast's, under autocast), differentiable. Rows add up to 1, less
        the sink's share; a query that sees no key has a row of 0.

    Raises:
        ArgumentError: a shape or value is wrong. DtypeError, DeviceError, BackendError: as their names say.

    >>> import torch
    >>> q = k = torch.randn(1, 2, 3, 8)
    >>> _, lse = attention(q, k, k, causal=True, return_lse=True)
    >>> attention_weights(q, k, lse, causal=True)[0, 0].gt(0).sum(-1).tolist()
    [1, 2, 3]
    """
    op = "attention_weights"
    if arguments.autocasting(op, q):
        q, k = arguments.autocast(q, k)
        with torch.autocast(q.device.type, enabled=False):
            return attention_weights(
                q,
                k,
                lse,
                causal=causal,
                mask=mask,
                bias=bias,
                alibi_slopes=alibi_slopes,
                window=window,
                softcap=softcap,
                scale=scale,
                backend=backend,
            )
    arguments.check_qkv(op, q, k, k)
    _validate.floating(op, "lse", lse)
    _validate.same_device(op, "lse", lse, q, "q")
    _validate.shape(op, "lse", lse, q.shape[:3])
    variant = arguments.make_variant(
        op,
        q,
        (q.shape[0], q.shape[1], q.shape[2], k.shape[2]),
        causal=causal,
        mask=mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        window=window,
        softcap=softcap,
        sinks=None,
        scale=scale,
        dropout_p=0.0,
        deterministic=None,
    )
    name = choose(op, q.device, backend, lambda b: registration.why_not(b, op, q, k, k, variant), OF_PRODUCTS)
    if name == "torch":
        return torch_impl.attention_weights(q, k, lse, variant)
    if name == "reference":
        return reference.attention_weights(q, k, lse, variant)
    weights: torch.Tensor = torch.ops.transfuse.attention_weights(q, k, lse, *variant, name)
    return weights
