"""MultiheadAttention: torch.nn's module on the fused attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from transfuse.errors import ArgumentError
from transfuse.ops import attention, attention_varlen, attention_weights


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` on transfuse's kernels: same constructor, parameters, state_dict and results.

    On purpose it differs in four points. A query that may attend to nothing gives 0 (before the output projection), not
    NaN. Weights that are returned are those before dropout. ``is_causal=True`` needs no attn_mask. Bool masks are
    never turned into floats, and of a causal mask nothing is read.

    Raises:
        ArgumentError: a shape is wrong, or an input is a nested tensor. DtypeError, DeviceError: as their names say.

    >>> layer = MultiheadAttention(16, 4, batch_first=True)
    >>> x = torch.randn(2, 5, 16)
    >>> out, weights = layer(x, x, x, key_padding_mask=torch.tensor([[False] * 5, [False] * 3 + [True] * 2]))
    >>> out.shape, weights.shape, weights[1, :, 3:].sum().item()
    (torch.Size([2, 5, 16]), torch.Size([2, 5, 5]), 0.0)
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends from query to key and value.

        Args:
            query: (q_len, batch, embed_dim), with batch_first (batch, q_len, embed_dim), or without a batch (q_len,
                embed_dim).
            key: likewise, (k_len, batch, kdim).
            value: likewise, (k_len, batch, vdim).
            key_padding_mask: (batch, k_len), without a batch (k_len,): bool, True = hidden, or floating, added to the
                scores.
            need_weights: also return the attention weights; without them nothing of their size is stored.
            attn_mask: (q_len, k_len) or (batch * num_heads, q_len, k_len): bool, True = hidden, or floating, added.
            average_attn_weights: the mean of the heads' weights, not each head's.
            is_causal: query i sees keys 0..i; attn_mask, if given, says the same and is not read.

        Returns:
            (output shaped like query, weights (batch, q_len, k_len), (batch, num_heads, q_len, k_len) or None).
        """
        batched = self._check(query, key, value, key_padding_mask, attn_mask)
        one, same = query is key and key is value, key is value
        if not batched or not self.batch_first:
            query, key, value = (x.transpose(0, 1) if batched else x.unsqueeze(0) for x in (query, key, value))
        if same:
            value = key
        if one:
            key = value = query
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        q, k, v = self._project(query, key, value)
        k, v = self._extended(k, self.bias_k), self._extended(v, self.bias_v)
        extra = k.shape[1] - key.shape[1]
        if is_causal and extra and attn_mask is None:
            attn_mask = torch.ones(q.shape[1], key.shape[1], dtype=torch.bool, device=q.device).triu(1)
        is_causal = is_causal and not extra
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        mask, bias = self._masks(None if is_causal else attn_mask, key_padding_mask, q, extra)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, lse = attention(
                q, k, v, causal=is_causal, mask=mask, bias=bias, dropout_p=dropout_p, return_lse=True
            )  # fmt: skip
            weights = attention_weights(q, k, lse, causal=is_causal, mask=mask, bias=bias)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = attention(q, k, v, causal=is_causal, mask=mask, bias=bias, dropout_p=dropout_p)
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def packed(self, x: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
        """Self-attention of sequences that stand one after another.

        Args:
            x: (total, embed_dim).
            cu_seqlens: (sequences + 1,) int32, where each begins and the last ends.
            longest: of all sequences, in tokens.

        Returns:
            (total, embed_dim).
        """
        q, k, v = self._project(x, x, x)
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)) for t in (q, k, v))
        dropout_p = self.dropout if self.training else 0.0
        out = attention_varlen(q, k, v, cu_seqlens, cu_seqlens, longest, longest, dropout_p=dropout_p)
        return F.linear(out.flatten(1), self.out_proj.weight, self.out_proj.bias)

    def _project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each (..., embed_dim); one product for inputs that are one tensor."""
        d, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        elif query is key and key is value:
            q, k, v = F.linear(query, weight, bias).chunk(3, -1)
        elif key is value:
            b_q, b_kv = (None, None) if bias is None else (bias[:d], bias[d:])
            q = F.linear(query, weight[:d], b_q)
            k, v = F.linear(key, weight[d:], b_kv).chunk(2, -1)
        else:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True))
        return q, k, v

    def _extended(self, x: torch.Tensor, learned: torch.Tensor | None) -> torch.Tensor:
        """x (batch, k_len, embed_dim) with the learned key or value and the zeros that torch.nn appends."""
        parts = [x]
        if learned is not None:
            parts.append(learned.to(x.dtype).expand(x.shape[0], 1, -1))
        if self.add_zero_attn:
            parts.append(x.new_zeros(x.shape[0], 1, x.shape[2]))
        return x if len(parts) == 1 else torch.cat(parts, 1)

    def _masks(
        self, attn_mask: torch.Tensor | None, key_padding_mask: torch.Tensor | None, q: torch.Tensor, extra: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(mask, True = attend; bias), each four-dimensional or None, with ``extra`` keys that all see at the end."""
        if attn_mask is not None:
            attn_mask = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, q.shape[:2])
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[:, None, None]
        mask = bias = None
        for given in (attn_mask, key_padding_mask):
            if given is None:
                continue
            if given.dtype == torch.bool:
                seen = F.pad(~given, (0, extra), value=True)
                mask = seen if mask is None else mask & seen
            else:
                more = F.pad(given, (0, extra))
                bias = more if bias is None else bias + more
        if bias is not None and bias.dtype != torch.float32:
            bias = bias.to(q.dtype)
        return mask, bias

    def _check(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None,
        attn_mask: torch.Tensor | None,
    ) -> bool:
        """Whether the inputs have a batch dimension."""
        tensors = {"query": query, "key": key, "value": value}
        for name, x in tensors.items():
            if x.is_nested:
                raise ArgumentError(
                    f"MultiheadAttention: {name} is a nested tensor; give a padded one with key_padding_mask, or call "
                    ".packed()"
                )
            if x.dim() not in (2, 3) or x.dim() != query.dim():
                raise ArgumentError(
                    "MultiheadAttention: query, key and value must have 3 dimensions, or all of them 2, got "
                    + ", ".join(str(tuple(t.shape)) for t in tensors.values())
                )
        batched = query.dim() == 3
        length, batch = (1, 0) if self.batch_first and batched else (0, 1)
        widths = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for name, x in tensors.items():
            if x.shape[-1] != widths[name]:
                raise ArgumentError(
                    f"MultiheadAttention: {name} must end in {widths[name]}, got {tuple(x.shape)}; give kdim and vdim "
                    "to the constructor if they differ from embed_dim"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ArgumentError(
                f"MultiheadAttention: key and value must agree in length and batch, got {tuple(key.shape)} and "
                f"{tuple(value.shape)}"
            )
        rows = query.shape[batch] if batched else 1
        if batched and key.shape[batch] != rows:
            raise ArgumentError(
                f"MultiheadAttention: query and key must have one batch size, got {rows} and {key.shape[batch]}; "
                f"batch_first is {self.batch_first}"
            )
        q_len, k_len = query.shape[length], key.shape[length]
        _check_mask(
            "key_padding_mask (True = hidden)", key_padding_mask, [(rows, k_len) if batched else (k_len,)]
        )  # fmt: skip
        _check_mask("attn_mask (True = hidden)", attn_mask, [(q_len, k_len), (rows * self.num_heads, q_len, k_len)])
        return batched


def _check_mask(name: str, mask: torch.Tensor | None, shapes: list[tuple[int, ...]]) -> None:
    if mask is None:
        return
    if tuple(mask.shape) not in shapes:
        raise ArgumentError(
            f"MultiheadAttention: {name} must have shape {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ArgumentError(f"MultiheadAttention: {name} must be bool or floating, got {mask.dtype}; call .bool()")
