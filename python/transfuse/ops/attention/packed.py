"""attention_varlen: sequences of different lengths packed one after another, without padding."""

from __future__ import annotations

import itertools
from typing import Literal, overload

import torch

from transfuse.backends import OF_PRODUCTS, choose
from transfuse.errors import ArgumentError, DtypeError
from transfuse.ops import _philox, _validate
from transfuse.ops.attention import arguments, reference, registration, torch_sequences
from transfuse.ops.attention.variant import Variant


@overload
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_q: int,
    max_k: int,
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
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_q: int,
    max_k: int,
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
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_q: int,
    max_k: int,
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
    """:func:`attention` inside each of many sequences that lie one after another, without padding between them.

    Args:
        q: (total_q, heads, head_dim).
        k: (total_k, kv_heads, head_dim).
        v: (total_k, kv_heads, v_head_dim).
        cu_seqlens_q: (batch + 1,), int32 or int64: sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1]. The first
            is 0. Rows after the last belong to no sequence.
        cu_seqlens_k: (batch + 1,), the same for k and v.
        max_q, max_k: no sequence is longer. They are given so that nothing has to be read back from a GPU.
        mask, bias: broadcastable to (batch, heads, max_q, max_k); each sequence reads its top left corner.
        causal, window, alibi_slopes: positions count inside each sequence, and "lower_right" aligns each by its own
            lengths. The others as for :func:`attention`.

    Returns:
        out (total_q, heads, v_head_dim) and if asked lse (heads, total_q). Rows of no sequence are 0, with lse -inf,
        and what stands in them is never read.

    Raises:
        ArgumentError: a shape or value is wrong; the contents of cu_seqlens are checked on CPUs only. DtypeError,
            DeviceError, BackendError: as their names say.

    >>> import torch
    >>> q = torch.randn(7, 2, 16)
    >>> ends = torch.tensor([0, 3, 7], dtype=torch.int32)
    >>> attention_varlen(q, q, q, ends, ends, 4, 4, causal=True).shape
    torch.Size([7, 2, 16])
    """
    op = "attention_varlen"
    if arguments.autocasting(op, q):
        q, k, v = arguments.autocast(q, k, v)
        with torch.autocast(q.device.type, enabled=False):
            return attention_varlen(  # type: ignore[call-overload, misc]
                q,
                k,
                v,
                cu_seqlens_q,
                cu_seqlens_k,
                max_q,
                max_k,
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
    _check(op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    variant = arguments.make_variant(
        op,
        q,
        (cu_seqlens_q.shape[0] - 1, q.shape[1], max_q, max_k),
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
    name = choose(op, q.device, backend, lambda b: registration.why_not(b, op, q, k, v, variant), OF_PRODUCTS)
    where = (cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    if name == "torch":
        out, lse = torch_sequences.attention_varlen(q, k, v, *where, variant, return_lse)
    elif name == "reference":
        keep = _keep(variant, q, cu_seqlens_q.shape[0] - 1, max_q, max_k)
        out, lse = reference.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, variant, keep)
    else:
        seed = _philox.draw_seed(q.device) if dropout_p > 0 else None
        out, lse = torch.ops.transfuse.attention_varlen(q, k, v, *where, *variant, seed, name)
    return (out, lse) if return_lse else out  # type: ignore[return-value]


def _keep(variant: Variant, q: torch.Tensor, batch: int, max_q: int, max_k: int) -> torch.Tensor | None:
    if variant.dropout_p == 0:
        return None
    return _philox.keep_mask(_philox.draw_seed(q.device), variant.dropout_p, batch, q.shape[1], max_q, max_k, q.device)


def _check(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_q: int,
    max_k: int,
) -> None:
    arguments.check_alike(op, "k", k, q)
    arguments.check_alike(op, "v", v, q)
    if q.dim() != 3:
        raise ArgumentError(f"{op}: q must have shape (total_q, heads, head_dim), got {tuple(q.shape)}")
    if k.dim() != 3 or k.shape[2] != q.shape[2]:
        raise ArgumentError(f"{op}: k must have shape (total_k, kv_heads, {q.shape[2]}), got {tuple(k.shape)}")
    if v.dim() != 3 or v.shape[:2] != k.shape[:2]:
        expected = f"({k.shape[0]}, {k.shape[1]}, v_head_dim)"
        raise ArgumentError(f"{op}: v must have shape {expected} like k, got {tuple(v.shape)}")
    arguments.check_heads(op, q.shape[1], k.shape[1], "k")
    for name, longest in (("max_q", max_q), ("max_k", max_k)):
        if not _validate.within(longest, lambda length: length >= 0):
            raise ArgumentError(f"{op}: {name} must be an integer of at least 0, got {longest!r}")
    _check_bounds(op, "cu_seqlens_q", cu_seqlens_q, q, "q", max_q, "max_q")
    _check_bounds(op, "cu_seqlens_k", cu_seqlens_k, k, "k", max_k, "max_k")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ArgumentError(
            f"{op}: cu_seqlens_k must have shape {tuple(cu_seqlens_q.shape)} like cu_seqlens_q, "
            f"got {tuple(cu_seqlens_k.shape)}"
        )


def _check_bounds(
    op: str, name: str, bounds: torch.Tensor, x: torch.Tensor, x_name: str, longest: int, longest_name: str
) -> None:
    if not isinstance(bounds, torch.Tensor) or bounds.dtype not in (torch.int32, torch.int64):
        got = str(bounds.dtype).removeprefix("torch.") if isinstance(bounds, torch.Tensor) else type(bounds).__name__
        raise DtypeError(f"{op}: {name} must be an int32 or int64 tensor, got {got}")
    _validate.same_device(op, name, bounds, x, x_name)
    if bounds.dim() != 1 or bounds.shape[0] == 0:
        raise ArgumentError(f"{op}: {name} must have shape (batch + 1,), got {tuple(bounds.shape)}")
    if bounds.device.type != "cpu" or torch.compiler.is_compiling():
        return  # reading them would make the host wait
    values = bounds.tolist()
    lengths = [high - low for low, high in itertools.pairwise(values)]
    if values[0] != 0 or min(lengths, default=0) < 0 or values[-1] > x.shape[0]:
        raise ArgumentError(
            f"{op}: {name} must start at 0, never fall, and end at {x.shape[0]} ({x_name}'s rows) at most, got {values}"
        )
    if max(lengths, default=0) > longest:
        raise ArgumentError(
            f"{op}: {longest_name} must be at least the longest sequence of {name}, {max(lengths)}, got {longest}"
        )
