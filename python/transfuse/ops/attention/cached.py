"""attention_decode: a few new queries against a long cache of keys and values."""

from __future__ import annotations

from typing import Literal, overload

import torch

from transfuse.backends import OF_PRODUCTS, choose
from transfuse.errors import ArgumentError, DtypeError
from transfuse.ops import _philox, _validate
from transfuse.ops.attention import arguments, reference, registration, torch_impl, torch_sequences


@overload
def attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
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
def attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
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
def attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
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
    """:func:`attention` of the newest queries over a cache that may have room left, each batch row by its own length.

    Args:
        q: (batch, heads, q_len, head_dim): query i stands at position cache_lengths[b] - q_len + i.
        k_cache: (batch, kv_heads, max_len, head_dim), the new keys already in it.
        v_cache: (batch, kv_heads, max_len, v_head_dim).
        cache_lengths: (batch,), int32 or int64: how many keys of each row are valid, the new ones included. What stands
            after them is never read into a result, be it NaN.
        causal: True or "lower_right", the same here: a query sees keys up to its own position. False: all valid keys.
        mask, bias: broadcastable to (batch, heads, q_len, max_len).
        window, alibi_slopes: count from the position above. The others as for :func:`attention`.

    Returns:
        out (batch, heads, q_len, v_head_dim) and if asked lse (batch, heads, q_len).

    Raises:
        ArgumentError: a shape or value is wrong; the values of cache_lengths are checked on CPUs only. DtypeError,
            DeviceError, BackendError: as their names say.

    >>> import torch
    >>> cache = torch.full((2, 1, 64, 16), torch.nan)
    >>> cache[0, :, :5], cache[1, :, :9] = 1.0, 2.0
    >>> out = attention_decode(torch.randn(2, 4, 1, 16), cache, cache, torch.tensor([5, 9]))
    >>> out[:, 0, 0, 0].tolist()
    [1.0, 2.0]
    """
    op = "attention_decode"
    if arguments.autocasting(op, q):
        q, k_cache, v_cache = arguments.autocast(q, k_cache, v_cache)
        with torch.autocast(q.device.type, enabled=False):
            return attention_decode(  # type: ignore[call-overload, misc]
                q,
                k_cache,
                v_cache,
                cache_lengths,
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
    arguments.check_qkv(op, q, k_cache, v_cache, "q k_cache v_cache")
    _check_lengths(op, q, k_cache, cache_lengths)
    variant = arguments.make_variant(
        op,
        q,
        (q.shape[0], q.shape[1], q.shape[2], k_cache.shape[2]),
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
        lower_right=True,
    )
    name = choose(
        op, q.device, backend, lambda b: registration.why_not(b, op, q, k_cache, v_cache, variant), OF_PRODUCTS
    )
    if name == "torch":
        out, lse = torch_sequences.attention_decode(q, k_cache, v_cache, cache_lengths, variant, return_lse)
    else:
        seed = _philox.draw_seed(q.device) if dropout_p > 0 else None
        if name == "reference":
            keep = torch_impl.keep_of(variant, seed, q, k_cache)
            out, lse = reference.attention_decode(q, k_cache, v_cache, cache_lengths, variant, keep)
        else:
            out, lse = torch.ops.transfuse.attention_decode(q, k_cache, v_cache, cache_lengths, *variant, seed, name)
    return (out, lse) if return_lse else out  # type: ignore[return-value]


def _check_lengths(op: str, q: torch.Tensor, k_cache: torch.Tensor, lengths: torch.Tensor) -> None:
    if not isinstance(lengths, torch.Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        got = str(lengths.dtype).removeprefix("torch.") if isinstance(lengths, torch.Tensor) else type(lengths).__name__
        raise DtypeError(f"{op}: cache_lengths must be an int32 or int64 tensor, got {got}")
    _validate.same_device(op, "cache_lengths", lengths, q, "q")
    _validate.shape(op, "cache_lengths", lengths, q.shape[:1])
    if lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return  # reading them would make the host wait
    room = k_cache.shape[2]
    for length in lengths.tolist():
        if not 0 <= length <= room:
            raise ArgumentError(f"{op}: cache_lengths must be from 0 to {room} (k_cache's length), got {length}")
