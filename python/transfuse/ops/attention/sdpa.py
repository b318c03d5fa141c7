"""scaled_dot_product_attention: torch's own signature and semantics over the same kernels."""

from __future__ import annotations

import torch

from transfuse.errors import ArgumentError
from transfuse.ops import _validate
from transfuse.ops.attention.dense import attention


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention`, on transfuse's backends.

    Args:
        query: (..., heads, q_len, head_dim) of any number of leading dimensions, none included.
        key: (..., kv_heads, k_len, head_dim). Leading dimensions broadcast.
        value: (..., kv_heads, k_len, v_head_dim).
        attn_mask: broadcastable to (..., heads, q_len, k_len); bool, True = attend, or floating, added to the scores,
            with a gradient.
        dropout_p: applied whatever the training flag, as in torch.
        is_causal: aligned top left.
        scale: 1 / sqrt(head_dim) by default.
        enable_gqa: key and value may have fewer heads, a divisor of query's.
        backend: see :func:`transfuse.use_backend`.

    Returns:
        (..., heads, q_len, v_head_dim). A row that sees nothing is 0.

    Raises:
        ArgumentError: a shape or value is wrong, or attn_mask and is_causal came together (torch's backends disagree on
            what that means). DtypeError, DeviceError, BackendError: as their names say.

    >>> import torch
    >>> q = torch.randn(3, 5, 8)
    >>> torch.allclose(scaled_dot_product_attention(q, q, q), torch.softmax(q @ q.mT / 8**0.5, -1) @ q, atol=1e-6)
    True
    """
    op = "scaled_dot_product_attention"
    for name, x in (("query", query), ("key", key), ("value", value)):
        _validate.floating(op, name, x)
        if x.dim() < 2:
            raise ArgumentError(f"{op}: {name} must have at least two dimensions, got {tuple(x.shape)}")
    mask = bias = None
    if attn_mask is not None:
        if is_causal:
            raise ArgumentError(
                f"{op}: attn_mask and is_causal exclude each other, got both; "
                "use transfuse.attention(mask=..., causal=True) to have both apply"
            )
        if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == torch.bool:
            mask = attn_mask
        else:
            _validate.floating(op, "attn_mask", attn_mask)
            bias = attn_mask
    plain = query.dim() == key.dim() == value.dim() == 4 and query.shape[0] == key.shape[0] == value.shape[0]
    if not plain or (not enable_gqa and not query.shape[1] == key.shape[1] == value.shape[1]):
        return _broadcast(op, query, key, value, mask, bias, dropout_p, is_causal, scale, enable_gqa, backend)
    if attn_mask is not None:
        _validate.broadcasts(op, "attn_mask", attn_mask, (*query.shape[:3], key.shape[2]))
    return attention(
        query,
        key,
        value,
        causal=is_causal,
        mask=mask,
        bias=bias,
        scale=scale,
        dropout_p=dropout_p,
        backend=backend,
    )


def _broadcast(
    op: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str | None,
) -> torch.Tensor:
    """Any leading dimensions as (batch, heads), and back."""
    kept = 3 if enable_gqa else 2  # trailing dimensions that are not leading ones
    if enable_gqa and min(query.dim(), key.dim(), value.dim()) < 3:
        raise ArgumentError(f"{op}: enable_gqa needs a dimension of heads, got query {tuple(query.shape)}")
    try:
        lead = torch.broadcast_shapes(query.shape[:-kept], key.shape[:-kept], value.shape[:-kept])
    except RuntimeError:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        hint = "" if enable_gqa else " (fewer key heads than query heads need enable_gqa=True)"
        raise ArgumentError(
            f"{op}: leading dimensions of query, key and value must broadcast, got {shapes}{hint}"
        ) from None
    q, k, v = (x.expand(*lead, *x.shape[-kept:]) for x in (query, key, value))
    added = mask if bias is None else bias
    if added is not None:
        target = (*q.shape[:-1], k.shape[-2])
        _validate.broadcasts(op, "attn_mask", added, target)
        added = _flatten(added[(None,) * (len(target) - added.dim())], target)
    out = attention(
        _flatten(q, q.shape),
        _flatten(k, k.shape),
        _flatten(v, v.shape),
        causal=is_causal,
        mask=None if mask is None else added,
        bias=None if bias is None else added,
        scale=scale,
        dropout_p=dropout_p,
        backend=backend,
    )
    return out.reshape(*q.shape[:-1], v.shape[-1])


def _flatten(x: torch.Tensor, target: tuple[int, ...]) -> torch.Tensor:
    """(..., heads, a, b) -> (batch, heads, a, b); one size of 1 in front stays so if all of them are 1."""
    while x.dim() < 4:
        x, target = x[None], (1, *target)
    if x.dim() == 4:
        return x
    if any(n != 1 for n in x.shape[:-3]):
        x = x.expand(*target[:-3], *x.shape[-3:])
    return x.flatten(0, -4)
