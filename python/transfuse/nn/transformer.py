"""torch.nn's transformer layers and stacks on the fused ops.

Each class is a subclass of torch's, which builds its parameters: names, initialisation, random numbers, state_dict,
pickling and ``isinstance`` are torch's. What is computed differs in its steps alone: attention with masks as they were
given, residual addition and norm in one pass, the feed-forward network as one op. Steps in between that somebody hooks
or replaces are taken one by one, as torch takes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from transfuse.nn.multihead import MultiheadAttention
from transfuse.nn.norm import LayerNorm, RMSNorm
from transfuse.ops import ffn

Activation = str | Callable[[torch.Tensor], torch.Tensor]


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer`` on transfuse's kernels: same constructor, state_dict and results.

    A nested tensor comes back as one: its sequences run packed, without padding.

    >>> layer = TransformerEncoderLayer(16, 4, 32, batch_first=True)
    >>> layer(torch.randn(2, 5, 16), src_key_padding_mask=torch.zeros(2, 5, dtype=torch.bool)).shape
    torch.Size([2, 5, 16])
    """

    @functools.wraps(nn.TransformerEncoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        adopt(self)

    def forward(
        self,
        src: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """As in torch; see :class:`MultiheadAttention` for what the masks may be."""
        if src.is_nested:
            return self._nested(src)
        return self._through(src, lambda x: self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal))

    def packed(self, x: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
        """(total, d_model), sequences one after another; see :meth:`MultiheadAttention.packed`."""
        attention: Any = self.self_attn
        return self._through(x, lambda y: self.dropout1(attention.packed(y, cu_seqlens, longest)))

    def _nested(self, src: torch.Tensor) -> torch.Tensor:
        sequences = src.unbind()
        lengths = [len(x) for x in sequences]
        starts = torch.tensor([0, *lengths], device=src.device).cumsum(0, dtype=torch.int32)
        out = self.packed(torch.cat(sequences), starts, max(lengths, default=0))
        return torch.nested.as_nested_tensor(list(out.split(lengths)))

    def _through(self, x: torch.Tensor, attend: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        if self.norm_first:
            y, x = _add_norm(self.norm2, attend(self.norm1(x)), x)
            return x + self._ff_block(y)
        x = _add_norm(self.norm1, attend(x), x)[0]
        return _add_norm(self.norm2, self._ff_block(x), x)[0]

    def _ff_block(self, x: torch.Tensor) -> torch.Tensor:
        inner = _feed_forward(self, x)
        return super()._ff_block(x) if inner is None else self.dropout2(inner)


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """``torch.nn.TransformerDecoderLayer`` on transfuse's kernels: same constructor, state_dict and results.

    >>> layer = TransformerDecoderLayer(16, 4, 32, batch_first=True)
    >>> layer(torch.randn(2, 3, 16), torch.randn(2, 5, 16)).shape
    torch.Size([2, 3, 16])
    """

    @functools.wraps(nn.TransformerDecoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        adopt(self)

    def forward(
        self,
        tgt: torch.Tensor,
        memory: torch.Tensor,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> torch.Tensor:
        """As in torch; see :class:`MultiheadAttention` for what the masks may be."""
        own, other = (
            (tgt_mask, tgt_key_padding_mask, tgt_is_causal),
            (memory_mask, memory_key_padding_mask, memory_is_causal),
        )
        if self.norm_first:
            y, x = _add_norm(self.norm2, self._sa_block(self.norm1(tgt), *own), tgt)
            y, x = _add_norm(self.norm3, self._mha_block(y, memory, *other), x)
            return x + self._ff_block(y)
        x = _add_norm(self.norm1, self._sa_block(tgt, *own), tgt)[0]
        x = _add_norm(self.norm2, self._mha_block(x, memory, *other), x)[0]
        return _add_norm(self.norm3, self._ff_block(x), x)[0]

    def _ff_block(self, x: torch.Tensor) -> torch.Tensor:
        inner = _feed_forward(self, x)
        return super()._ff_block(x) if inner is None else self.dropout3(inner)


class TransformerEncoder(nn.TransformerEncoder):
    """``torch.nn.TransformerEncoder`` that leaves masks as they are and, in inference, padding out.

    Where torch would go through nested tensors (``enable_nested_tensor``, eval mode, no gradients, a
    src_key_padding_mask and no mask), the tokens that are not padding run packed through all layers, on whichever side
    the padding stands, and the outputs at padding are what the final norm makes of 0.

    >>> encoder = TransformerEncoder(TransformerEncoderLayer(16, 4, 32, batch_first=True), num_layers=2).eval()
    >>> with torch.no_grad():
    ...     encoder(torch.randn(1, 3, 16), src_key_padding_mask=torch.tensor([[False, False, True]]))[0, 2].any().item()
    False
    """

    def forward(
        self,
        src: torch.Tensor,
        mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool | None = None,
    ) -> torch.Tensor:
        """As in torch; is_causal None: found out by comparing the mask, but not while it is compiled."""
        x = src
        if src_key_padding_mask is not None and mask is None and not is_causal and self._packs(src):
            x = self._packed(src, src_key_padding_mask)
        else:
            if is_causal is None:
                is_causal = _is_causal(mask, src.shape[1 if self._batch_first() and src.dim() == 3 else 0])
            for layer in self.layers:
                x = layer(x, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal)
        return x if self.norm is None else self.norm(x)

    def _batch_first(self) -> bool:
        return bool(self.layers[0].self_attn.batch_first)

    def _packs(self, src: torch.Tensor) -> bool:
        return (
            getattr(self, "use_nested_tensor", False)
            and not self.layers[0].training
            and src.dim() == 3
            and not src.is_nested
            and not torch.is_autocast_enabled(src.device.type)
            and not torch.compiler.is_compiling()
            and not (torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in self.parameters())))
            and all(
                type(x) is TransformerEncoderLayer
                and type(x.self_attn) is MultiheadAttention
                and not changed(*x.modules())
                for x in self.layers
            )
        )

    def _packed(self, src: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        """src: (batch, length, d_model); padding: (batch, length), True or -inf where it is."""
        keep = (~padding if padding.dtype == torch.bool else padding == 0).flatten()
        starts = F.pad(keep.view_as(padding).sum(1).cumsum(0), (1, 0)).int()
        where = keep.nonzero()[:, 0]
        longest = int((starts[1:] - starts[:-1]).max()) if len(starts) > 1 else 0
        x = src.flatten(0, 1)[where]
        for layer in self.layers:
            x = layer.packed(x, starts, longest)
        return src.new_zeros(keep.numel(), src.shape[2]).index_copy(0, where, x).view_as(src)


class Transformer(nn.Transformer):
    """``torch.nn.Transformer`` on transfuse's kernels: same constructor, state_dict and results (Vaswani et al. 2017).

    >>> model = Transformer(16, 4, 1, 1, 32, batch_first=True)
    >>> model(torch.randn(2, 5, 16), torch.randn(2, 3, 16)).shape
    torch.Size([2, 3, 16])
    """

    @functools.wraps(nn.Transformer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = {id(x) for x in (*args, *kwargs.values())}  # a custom encoder or decoder stays as it is
        for part in (self.encoder, self.decoder):
            if id(part) not in given:
                adopt(part)


TransformerDecoder = nn.TransformerDecoder
"""Torch's own: it only calls its layers."""

TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
    nn.Transformer: Transformer,
}
"""Torch's classes and those that compute the same with the same attributes."""


def adopt(module: nn.Module) -> None:
    """Makes every module of exactly torch's class inside this one, and itself, transfuse's; nothing else changes."""
    for part in module.modules():
        part.__class__ = TWINS.get(type(part), type(part))


def _add_norm(norm: nn.Module, x: torch.Tensor, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + stream), x + stream)."""
    if type(norm) not in (LayerNorm, RMSNorm) or x.dtype != stream.dtype or changed(norm):
        stream = x + stream
        return norm(stream), stream
    y, stream = norm(x, residual=stream)
    return y, stream


def _feed_forward(layer: Any, x: torch.Tensor) -> torch.Tensor | None:
    """linear2(dropout(activation(linear1(x)))) as one op, or None where a step is not torch's own."""
    activation = _name_of(layer.activation)
    steps = [layer.linear1, layer.dropout, layer.linear2]
    steps += [layer.activation] if isinstance(layer.activation, nn.Module) else []
    plain = type(layer.linear1) is nn.Linear and type(layer.linear2) is nn.Linear and type(layer.dropout) is nn.Dropout
    if activation is None or not plain or changed(*steps):
        return None
    first, second = layer.linear1, layer.linear2
    dropout_p = layer.dropout.p if layer.dropout.training else 0.0
    if dropout_p >= 1.0:
        return None
    return ffn(x, first.weight, first.bias, second.weight, second.bias, activation=activation, dropout_p=dropout_p)


def _name_of(activation: Activation) -> str | None:
    """The fused op's name of an activation, None if it has none."""
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    known: dict[Any, str] = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu", F.silu: "silu"}
    classes: dict[type, str] = {nn.ReLU: "relu", nn.SiLU: "silu"}
    return classes.get(type(activation)) or known.get(activation)


def changed(*modules: nn.Module) -> bool:
    """Whether one of these modules has to be called: for its hooks or those of all modules, or for parameters that are
    tensors of another kind (quantized, distributed), which compute in their own way.
    """
    return _has_any_global_hook() or any(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or "forward" in vars(m)
        or any(is_traceable_wrapper_subclass(p) for p in m._parameters.values())
        for m in modules
    )


def _is_causal(mask: torch.Tensor | None, length: int) -> bool:
    """Whether a mask is exactly the causal one; the answer waits for the GPU, as torch's does."""
    if mask is None or mask.shape != (length, length) or torch.compiler.is_compiling():
        return False
    hidden = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, hidden)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill(hidden, -torch.inf))
