"""The transformers of 2017 by name: their sizes, and their outputs against torch.nn and the formulas of the paper."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from transfuse import Decoder, Seq2Seq, TransformerConfig
from transfuse.errors import ConfigError


def test_sizes_are_the_papers() -> None:
    base, big = (TransformerConfig.preset(name, 37000) for name in ("transformer", "transformer-big"))
    assert (base.num_layers, base.num_decoder_layers, base.hidden_size, base.intermediate_size) == (6, 6, 512, 2048)
    assert (big.hidden_size, big.intermediate_size, big.num_heads, big.hidden_dropout) == (1024, 4096, 16, 0.3)
    assert base.num_parameters() == Seq2Seq(base, device="meta").num_parameters().total
    assert 2.1e8 < big.num_parameters() < 2.2e8  # the paper says 213 million
    alone = TransformerConfig.preset("transformer-decoder", 37000, num_layers=3)
    assert (alone.architecture, alone.num_layers, alone.embedding_scale) == ("decoder", 3, 512**0.5)
    with pytest.raises(ConfigError, match="preset must be one of transformer, transformer-big, transformer-decoder"):
        TransformerConfig.preset("base", 10)
    with pytest.raises(ConfigError, match="hidden_size must be a multiple of num_heads"):
        TransformerConfig.preset("transformer", 10, hidden_size=20)


def positions(length: int, size: int) -> torch.Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i + 1) = cos of the same."""
    angles = torch.arange(length).double()[:, None] / 10000.0 ** (torch.arange(0, size, 2).double() / size)
    table = torch.empty(length, size, dtype=torch.float64)
    table[:, 0::2], table[:, 1::2] = angles.sin(), angles.cos()
    return table


def torch_layer(block: Any, decodes: bool) -> Any:
    """One of torch.nn's post-norm relu layers with a block's weights."""
    size, inner = block.feed_forward.down.weight.shape
    kind = nn.TransformerDecoderLayer if decodes else nn.TransformerEncoderLayer
    layer = kind(size, block.attention.num_heads, inner, dropout=0.0, batch_first=True).double().eval()
    pairs = [(layer.self_attn.out_proj, block.attention.out), (layer.linear1, block.feed_forward.up)]
    pairs += [(layer.linear2, block.feed_forward.down), (layer.norm1, block.attention_norm)]
    pairs += [(layer.norm3 if decodes else layer.norm2, block.feed_forward_norm)]
    attentions = [(layer.self_attn, [block.attention.qkv])]
    if decodes:
        cross = block.cross_attention
        attentions.append((layer.multihead_attn, [cross.q, cross.kv]))
        pairs += [(layer.multihead_attn.out_proj, cross.out), (layer.norm2, block.cross_attention_norm)]
    with torch.no_grad():
        for theirs, ours in pairs:
            theirs.weight.copy_(ours.weight), theirs.bias.copy_(ours.bias)
        for theirs, parts in attentions:
            theirs.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
            theirs.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
    return layer


@torch.no_grad()
def randomised(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.normal_(0.1, 0.3)
    return model.double().eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformer", "transformer-decoder"])
def test_equals_torch_nn(name: str) -> None:
    torch.manual_seed(0)
    config = TransformerConfig.preset(name, 41, hidden_size=24, num_layers=2, num_heads=4)
    model = randomised(Seq2Seq(config) if config.is_encoder_decoder else Decoder(config))
    source, target = torch.randint(0, 41, (2, 7)), torch.randint(0, 41, (2, 5))
    decoder = model.decoder if config.is_encoder_decoder else model
    table = decoder.embeddings.token.weight
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    y = table[target] * 24**0.5 + positions(5, 24)
    if config.is_encoder_decoder:
        x = table[source] * 24**0.5 + positions(7, 24)
        for block in model.encoder.layers:
            x = torch_layer(block, False)(x)
        for block in decoder.layers:
            y = torch_layer(block, True)(y, x, tgt_mask=causal)
        got = model(source, decoder_input_ids=target).logits
    else:
        for block in decoder.layers:
            y = torch_layer(block, False)(y, src_mask=causal)
        got = model(target).logits
    torch.testing.assert_close(got, y @ table.T, rtol=1e-6, atol=1e-6)  # the sinusoids are fp32 numbers


def test_learns_to_copy() -> None:
    """A loss through encoder, decoder and the shared table falls."""
    torch.manual_seed(0)
    config = TransformerConfig.preset("transformer", 13, hidden_size=32, num_layers=1, num_heads=4)
    model = Seq2Seq(replace(config, decoder_start_token_id=0, hidden_dropout=0.0)).train()
    ids = torch.randint(1, 13, (16, 6))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        logits = model(ids, decoder_input_ids=model.shift_right(ids)).logits
        loss = nn.functional.cross_entropy(logits.mT, ids)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
