"""The one block that every model is made of: attention, optional cross-attention, feed-forward, pre- or post-norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from transfuse.models.cache import LayerKeyValues
from transfuse.models.config import TransformerConfig
from transfuse.nn import Attention, FeedForward, LayerNorm, RMSNorm
from transfuse.ops import rms_norm


@dataclass
class BlockInputs:
    """What all layers of one forward pass share, computed once.

    Attributes:
        mask: (batch, 1, 1, keys) bool, True = token; None: no padding.
        bias: (1, heads, length, keys), T5's relative positions.
        rotary: cos and sin at the tokens' positions.
        context: (batch, source_length, hidden_size), the encoder's output.
        context_mask: (batch, 1, 1, source_length) bool.
        attentions, cross_attentions: filled by the layers when not None.
    """

    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    context: torch.Tensor | None = None
    context_mask: torch.Tensor | None = None
    attentions: list[torch.Tensor] | None = None
    cross_attentions: list[torch.Tensor] | None = None


def make_norm(
    config: TransformerConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> LayerNorm | RMSNorm:
    """The configuration's norm over hidden_size."""
    if config.norm == "rms":
        return RMSNorm(config.hidden_size, config.norm_eps, device=device, dtype=dtype)
    return LayerNorm(config.hidden_size, config.norm_eps, bias=config.norm_bias, device=device, dtype=dtype)


class Block(nn.Module):
    """One transformer layer.

    ``pre``: x + f(norm(x)) for each sublayer f (GPT-2, Llama, T5); ``post``: norm(x + f(x)) (the 2017 paper, BERT).
    Every residual addition is fused with the norm that follows it. In a pre-norm block that norm may be the next
    block's, so what goes from block to block is a pair: the last sublayer's output and the stream it is to be added to.

    Args:
        config: the model.
        layer: index in the stack; it decides between local and global attention.
        decoder: causal, and in an encoder_decoder with cross-attention.

    >>> config = TransformerConfig("encoder", vocab_size=10, hidden_size=16, num_layers=1, num_heads=2)
    >>> block = Block(config, layer=0, decoder=False)
    >>> added, stream = block(torch.randn(1, 3, 16), None, BlockInputs())
    >>> (added + stream).shape
    torch.Size([1, 3, 16])
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer: int,
        *,
        decoder: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        c = config
        self.pre = c.norm_placement == "pre"
        self.dropout = c.hidden_dropout
        second = decoder and c.is_encoder_decoder
        self.attention_norm = make_norm(c, device, dtype)
        window = _window(c, layer, decoder)
        self.attention = _attention(c, second, False, decoder, window, _scale(c, layer), device, dtype)
        self.cross_attention_norm: LayerNorm | RMSNorm | None = None
        self.cross_attention: Attention | None = None
        if second:
            self.cross_attention_norm = make_norm(c, device, dtype)
            self.cross_attention = _attention(c, True, True, False, None, _scale(c, layer), device, dtype)
        self.feed_forward_norm = make_norm(c, device, dtype)
        self.feed_forward = FeedForward(
            c.hidden_size,
            c.decoder_intermediate_size if second else c.intermediate_size,
            activation=c.activation,
            gated=c.gated,
            bias=c.ffn_bias,
            dropout=c.ffn_dropout,
            wide=c.wide_residual,
            device=device,
            dtype=dtype,
        )

    def extra_repr(self) -> str:
        return f"{'pre' if self.pre else 'post'}-norm" + (f", dropout={self.dropout}" if self.dropout else "")

    def forward(
        self, x: torch.Tensor, stream: torch.Tensor | None, inputs: BlockInputs, cache: LayerKeyValues | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x: (batch, length, hidden_size); stream: what x is still to be added to, or None. Returns such a pair."""
        if self.pre:
            x, stream = add_norm(self.attention_norm, x, stream)
            x = self._self_attention(x, inputs, cache)
            if self.cross_attention_norm is not None:
                x, stream = add_norm(self.cross_attention_norm, x, stream)
                x = self._cross_attention(x, inputs, cache)
            x, stream = add_norm(self.feed_forward_norm, x, stream)
            return self._drop(self.feed_forward(x)), stream
        x, _ = add_norm(self.attention_norm, self._self_attention(x, inputs, cache), x)
        if self.cross_attention_norm is not None:
            x, _ = add_norm(self.cross_attention_norm, self._cross_attention(x, inputs, cache), x)
        x, _ = add_norm(self.feed_forward_norm, self._drop(self.feed_forward(x)), x)
        return x, None

    def _self_attention(self, x: torch.Tensor, inputs: BlockInputs, cache: LayerKeyValues | None) -> torch.Tensor:
        out, weights = self.attention(
            x,
            mask=inputs.mask,
            bias=inputs.bias,
            rotary=inputs.rotary,
            cache=cache,
            return_weights=inputs.attentions is not None,
        )
        if inputs.attentions is not None:
            inputs.attentions.append(weights)
        return self._drop(out)

    def _cross_attention(self, x: torch.Tensor, inputs: BlockInputs, cache: LayerKeyValues | None) -> torch.Tensor:
        assert self.cross_attention is not None
        out, weights = self.cross_attention(
            x,
            context=inputs.context,
            mask=inputs.context_mask,
            cache=cache,
            return_weights=inputs.cross_attentions is not None,
        )
        if inputs.cross_attentions is not None:
            inputs.cross_attentions.append(weights)
        return self._drop(out)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


def add_norm(
    norm: LayerNorm | RMSNorm, x: torch.Tensor, stream: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + stream), x + stream); without a stream x is the stream.

    An fp32 stream of fp16 weights (``wide_residual``) is normalised in fp32, and the result is fp16 again.
    """
    widest = x if stream is None else stream
    if isinstance(norm, RMSNorm) and (norm.weight.dtype, widest.dtype) == (torch.float16, torch.float32):
        return _norm_wide(norm, x.float(), stream)
    if stream is None:
        return norm(x), x
    if x.dtype != stream.dtype:  # under autocast sublayers give low precision and the stream is fp32
        x = x.to(stream.dtype)
    return norm(x, residual=stream)


def _norm_wide(norm: RMSNorm, x: torch.Tensor, stream: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    assert norm.eps is not None
    weight, eps = norm.weight.float(), norm.eps
    normed, total = (rms_norm(x, weight, eps), x) if stream is None else rms_norm(x, weight, eps, stream)
    return normed.to(norm.weight.dtype), total


def _attention(
    c: TransformerConfig,
    second: bool,
    cross: bool,
    causal: bool,
    window: tuple[int, int] | None,
    scale: float | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Attention:
    return Attention(
        c.hidden_size,
        c.num_decoder_heads if second else c.num_heads,
        num_kv_heads=c.num_decoder_kv_heads if second else c.num_kv_heads,
        head_dim=c.decoder_head_dim if second else c.head_dim,
        cross=cross,
        causal=causal,
        window=window,
        scale=scale,
        softcap=c.softcap,
        qkv_bias=c.qkv_bias,
        out_bias=c.out_bias,
        dropout=c.attention_dropout,
        device=device,
        dtype=dtype,
    )


def _scale(c: TransformerConfig, layer: int) -> float | None:
    if not c.scale_by_layer:
        return c.attention_scale
    return (c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale) / (layer + 1)


def _window(c: TransformerConfig, layer: int, decoder: bool) -> tuple[int, int] | None:
    """(left, right) neighbours: a causal window of w counts the token itself, a two-sided one is w // 2 each way."""
    width = c.window_of(layer)
    if width is None:
        return None
    return (width - 1, 0) if decoder else (width // 2, width // 2)
