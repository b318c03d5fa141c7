"""The attention sublayer: projections around the fused attention op, self or cross, with a key/value cache."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from transfuse.errors import ArgumentError, DtypeError
from transfuse.ops import _autocast, attention, attention_weights
from transfuse.ops.rotary import in_one, rotate_heads


class LayerCache(Protocol):
    """What one attention layer needs of a cache; :class:`transfuse.models.KVCache` hands these out."""

    cross: tuple[torch.Tensor, torch.Tensor] | None

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new keys and values (batch, kv_heads, length, head_dim); returns all that are stored."""
        ...

    def append_turned(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Turns q and k (batch, length, heads, head_dim), stores k and v; returns q and all that are stored."""
        ...


class Attention(nn.Module):
    """Multi-head attention of x to itself, or with ``cross=True`` to a context (Vaswani et al. 2017).

    One matrix makes queries, keys and values: ``qkv`` holds the rows of q, k, v in this order. Cross-attention has
    ``q`` and ``kv``. ``split_sizes`` gives the row counts.

    Args:
        hidden_size: size of input and output.
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of num_heads; None: num_heads.
        head_dim: None: hidden_size / num_heads.
        cross: attend to ``context`` instead of x.
        context_size: size of the context; None: hidden_size.
        causal: a token sees itself and those before it; with a cache, all that are stored.
        window: (left, right) tokens that are seen besides the token itself, -1 for all; None: no limit.
        scale: times the scores; None: 1 / sqrt(head_dim).
        softcap: ``softcap * tanh(score / softcap)``; None: none.
        qkv_bias, out_bias: biases of the projections.
        dropout: on the attention probabilities, in training mode.

    Raises:
        ArgumentError: sizes do not fit, x or the context has another shape, or the context is missing or unexpected.
        DtypeError: x or the context has another dtype than the weights, outside autocast.

    >>> layer = Attention(32, 4, num_kv_heads=2, causal=True)
    >>> out, weights = layer(torch.randn(2, 5, 32), return_weights=True)
    >>> out.shape, weights.shape
    (torch.Size([2, 5, 32]), torch.Size([2, 4, 5, 5]))
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        cross: bool = False,
        context_size: int | None = None,
        causal: bool = False,
        window: tuple[int, int] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_sizes(hidden_size, num_heads, kv_heads, head_dim, causal and cross)
        dim = hidden_size // num_heads if head_dim is None else head_dim
        self.hidden_size, self.context_size = hidden_size, context_size or hidden_size
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, kv_heads, dim
        self.cross, self.causal, self.window = cross, causal, window
        self.scale, self.softcap, self.dropout = scale, softcap, dropout
        q_rows, kv_rows = num_heads * dim, kv_heads * dim
        self.split_sizes = (q_rows, kv_rows, kv_rows)
        if cross:
            self.q = nn.Linear(hidden_size, q_rows, qkv_bias, device=device, dtype=dtype)
            self.kv = nn.Linear(self.context_size, 2 * kv_rows, qkv_bias, device=device, dtype=dtype)
        else:
            self.qkv = nn.Linear(hidden_size, q_rows + 2 * kv_rows, qkv_bias, device=device, dtype=dtype)
        self.out = nn.Linear(q_rows, hidden_size, out_bias, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        kind = "cross" if self.cross else "causal" if self.causal else "bidirectional"
        heads = f"{self.num_heads} heads" + (f" ({self.num_kv_heads} kv)" if self.num_kv_heads < self.num_heads else "")
        return f"{kind}, {heads} of {self.head_dim}" + (f", window={self.window}" if self.window else "")

    def forward(
        self,
        x: torch.Tensor,
        *,
        context: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: LayerCache | None = None,
        return_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends, and gives (output, probabilities or None).

        Args:
            x: (batch, q_len, hidden_size).
            context: (batch, k_len, context_size) for cross-attention; may be None once the cache holds its keys.
            mask: bool, True = attend, broadcastable to (batch, heads, q_len, k_len).
            bias: added to the scaled scores, broadcastable likewise.
            rotary: (cos, sin) of :class:`transfuse.nn.RotaryEmbedding` at x's positions; self-attention only.
            cache: keys and values of earlier tokens; the new ones are appended.
            return_weights: also give the probabilities (batch, heads, q_len, k_len), without dropout.
        """
        if context is not None and not self.cross:
            raise ArgumentError(
                "Attention: context belongs to cross-attention; leave it out, or make it with cross=True"
            )
        q, k, v = self._cross_qkv(x, context, cache) if self.cross else self._self_qkv(x, rotary, cache)
        # Rows that share a source (beams) are so many more queries on its keys.
        shared = q.shape[0] // k.shape[0] if self.cross and context is None and k.shape[0] else 1
        if shared > 1:
            q = q.unflatten(0, (-1, shared)).transpose(1, 2).flatten(2, 3)
        causal: bool | str = False
        window = self.window
        q_len, k_len = q.shape[2], k.shape[2]
        if q_len == 1 and cache is not None and not self.cross:  # the newest token: everything kept is in its past
            if window is not None and 0 <= window[0] < k_len - 1:
                keep = window[0] + 1
                k, v = k[:, :, -keep:], v[:, :, -keep:]
                mask, bias = _last_keys(mask, keep), _last_keys(bias, keep)
            window = None
        elif self.causal:
            causal = True if q_len == k_len else "lower_right"
        out, weights = self._attend(q, k, v, causal, mask, bias, window, return_weights)
        if weights is not None and weights.shape[-1] < k_len:  # keys before the window have no weight
            weights = F.pad(weights, (k_len - weights.shape[-1], 0))
        if shared > 1:
            out = _unshare(out, shared)
            weights = None if weights is None else _unshare(weights, shared)
        return self.out(out.transpose(1, 2).flatten(2)), weights

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool | str,
        mask: torch.Tensor | None,
        bias: torch.Tensor | None,
        window: tuple[int, int] | None,
        return_weights: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        same: dict[str, Any] = {
            "causal": causal,
            "mask": mask,
            "bias": bias,
            "window": window,
            "softcap": self.softcap,
            "scale": self.scale,
        }
        p = self.dropout if self.training else 0.0
        if not return_weights:
            return attention(q, k, v, dropout_p=p, **same), None
        out, lse = attention(q, k, v, dropout_p=p, return_lse=True, **same)
        return out, attention_weights(q, k, lse, **same)

    def _self_qkv(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None, cache: LayerCache | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q (batch, heads, q_len, head_dim); k, v (batch, kv_heads, k_len, head_dim), cached ones included."""
        h, g = self.num_heads, self.num_kv_heads
        _check_input("x", x, self.hidden_size, self.qkv)
        # heads of q, k and v side by side: (batch, length, h + 2 g, head_dim)
        qkv = self.qkv(x).unflatten(-1, (h + 2 * g, self.head_dim))
        if rotary is None:
            q, k, v = qkv.split((h, g, g), dim=2)
        elif cache is not None and in_one(qkv):
            q, k, v = qkv.split((h, g, g), dim=2)
            q, k, v = cache.append_turned(q, k, v, *rotary)
            return q.transpose(1, 2), k, v
        else:
            qk, v = qkv.split((h + g, g), dim=2)
            q, k = rotate_heads(qk, *rotary).split((h, g), dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        return q, k, v

    def _cross_qkv(
        self, x: torch.Tensor, context: torch.Tensor | None, cache: LayerCache | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        _check_input("x", x, self.hidden_size, self.q)
        q = self.q(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        if cache is not None and cache.cross is not None:
            return q, *cache.cross
        if context is None:
            raise ArgumentError("Attention: cross-attention needs context (batch, k_len, context_size), got None")
        _check_input("context", context, self.context_size, self.kv)
        kv = self.kv(context).unflatten(-1, (2 * self.num_kv_heads, self.head_dim)).transpose(1, 2)
        k, v = kv.chunk(2, dim=1)
        if cache is not None:
            k, v = k.contiguous(), v.contiguous()  # read at every step: rows of a head side by side
            cache.cross = (k, v)
        return q, k, v


def _check_input(name: str, x: torch.Tensor, size: int, linear: nn.Module) -> None:
    """x (batch, length, size), of the dtype that ``linear`` multiplies it in."""
    if not isinstance(x, torch.Tensor) or x.dim() != 3 or x.shape[2] != size:
        got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ArgumentError(f"Attention: {name} must have shape (batch, length, {size}), got {got}")
    # A layer that was put in its place (LoRA, quantised) may take what it likes.
    if type(linear) is nn.Linear and x.dtype != linear.weight.dtype and not _autocast.active(x):
        raise DtypeError(
            f"Attention: {name} must be {linear.weight.dtype} like the weights, got {x.dtype}; cast one of them or use "
            "torch.autocast"
        )


def _unshare(x: torch.Tensor, rows: int) -> torch.Tensor:
    """(batch, heads, rows * q_len, n) -> (batch * rows, heads, q_len, n)."""
    return x.unflatten(2, (rows, -1)).transpose(1, 2).flatten(0, 1)


def _last_keys(x: torch.Tensor | None, keep: int) -> torch.Tensor | None:
    """The last ``keep`` keys of a mask or bias, which may also be broadcast over them."""
    return x if x is None or x.shape[-1] == 1 else x[..., -keep:]


def _check_sizes(hidden_size: int, heads: int, kv_heads: int, head_dim: int | None, causal_cross: bool) -> None:
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ArgumentError(f"Attention: num_heads must be a multiple of num_kv_heads, got {heads} and {kv_heads}")
    if head_dim is None and hidden_size % heads:
        raise ArgumentError(
            f"Attention: hidden_size must be a multiple of num_heads, got {hidden_size} and {heads}; or give head_dim"
        )
    if causal_cross:
        raise ArgumentError("Attention: cross-attention cannot be causal; leave out causal or cross")
