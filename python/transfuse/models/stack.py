"""Embeddings, blocks and final norm: the body that Encoder and Decoder share."""

from __future__ import annotations

import torch
from torch import nn

from transfuse.errors import ArgumentError, DeviceError, DtypeError
from transfuse.models.base import TransformerModel
from transfuse.models.blocks import Block, BlockInputs, add_norm, make_norm
from transfuse.models.cache import KVCache
from transfuse.models.config import TransformerConfig
from transfuse.models.embeddings import Embeddings
from transfuse.nn import RelativePositionBias, RotaryEmbedding


class Stack(TransformerModel):
    """The layers of one encoder or decoder, from ids to the last hidden state."""

    def __init__(self, config: TransformerConfig, *, decoder: bool, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        second = decoder and config.is_encoder_decoder
        layers = config.num_decoder_layers if second else config.num_layers
        self.config = config
        self.embeddings = Embeddings(
            config, config.decoder_vocab_size if second else config.vocab_size, device="meta", dtype=dtype
        )
        self.rotary: RotaryEmbedding | None = None
        self.relative_position: RelativePositionBias | None = None
        if config.position == "rotary":
            self.rotary = RotaryEmbedding(config.rotary_dim, config.rope_theta, config.rope_scaling)
        elif config.position == "relative":
            self.relative_position = RelativePositionBias(
                config.num_decoder_heads if second else config.num_heads,
                config.relative_buckets,
                config.relative_max_distance,
                bidirectional=not decoder,
                device="meta",
                dtype=dtype,
            )
        self.layers = nn.ModuleList(
            Block(config, i, decoder=decoder, device="meta", dtype=dtype) for i in range(layers)
        )
        self.final_norm = make_norm(config, "meta", dtype) if config.final_norm else None

    def _run(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: KVCache | None,
        inputs: BlockInputs,
        output_hidden_states: bool,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """(last hidden state, hidden states or None); ``inputs`` gets the fields that follow from ids and mask."""
        check_ids("input_ids", input_ids, self.embeddings.token.weight)
        batch, new = input_ids.shape
        past = 0
        if cache is not None:
            cache.check_room(batch, new)
            past = cache.length
        padded = cache is not None and cache.mask is not None  # then there is nothing to find out
        if token_type_ids is not None:
            _check_like("token_type_ids", token_type_ids, input_ids, ((batch, new),))
        tokens = as_mask("attention_mask", attention_mask, input_ids, past, look=not padded)
        if cache is not None:
            tokens = cache.remember_mask(tokens, new)
        positions, limit = self._positions(input_ids, position_ids, tokens, past)
        x = self.embeddings(input_ids, positions, limit, token_type_ids)
        if self.config.wide_residual and x.dtype == torch.float16:
            x = x.float()
        inputs.mask = None if tokens is None else tokens[:, None, None, :]
        if self.rotary is not None:
            assert positions is not None
            inputs.rotary = self.rotary(positions, x.dtype)
        if self.relative_position is not None:
            inputs.bias = self.relative_position(new, past + new, past)
        x, states = self._layers(x, inputs, cache, output_hidden_states)
        if cache is not None:
            cache.advance(new)
        return x, states

    def _layers(
        self, x: torch.Tensor, inputs: BlockInputs, cache: KVCache | None, output_hidden_states: bool
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        states: list[torch.Tensor] = []
        stream: torch.Tensor | None = None  # what x is still to be added to: see Block
        for i, layer in enumerate(self.layers):
            if output_hidden_states:
                x, stream = (x if stream is None else x + stream), None
                states.append(x)
            x, stream = layer(x, stream, inputs, None if cache is None else cache.layers[i])
        if self.final_norm is None:
            x = x if stream is None else x + stream
        else:
            x, _ = add_norm(self.final_norm, x, stream)
        return x, (*states, x) if output_hidden_states else None

    def _positions(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, tokens: torch.Tensor | None, past: int
    ) -> tuple[torch.Tensor | None, int | None]:
        """Positions (batch or 1, length) and a bound on them; with padding the n-th token of a row is at n."""
        if self.config.position in ("none", "relative"):
            if position_ids is not None:
                raise ArgumentError(f"position_ids: positions here are {self.config.position!r}; leave it out")
            return None, None
        batch, new = input_ids.shape
        if position_ids is not None:
            _check_like("position_ids", position_ids, input_ids, ((batch, new), (1, new), (new,)))
            return (position_ids[None] if position_ids.dim() == 1 else position_ids), None
        if tokens is None:
            return torch.arange(past, past + new, device=input_ids.device)[None], past + new
        return (tokens.long().cumsum(1) - 1).clamp_min(0)[:, past:], past + new


def check_ids(name: str, ids: torch.Tensor, table: torch.Tensor) -> None:
    """Token ids are integers, (batch, length), where the model is."""
    _check_integers(name, ids, "(batch, length)")
    if ids.dim() != 2:
        raise ArgumentError(f"{name}: expected shape (batch, length), got {tuple(ids.shape)}; one row needs ids[None]")
    if ids.device != table.device and table.device.type != "meta":  # meta: offloaded, it arrives when it is needed
        raise DeviceError(f"{name}: must be on {table.device} like the model, got {ids.device}; move it there")


def check_not_empty(x: torch.Tensor) -> None:
    """One token of each row is to be read: x (batch, length, ...) has some."""
    if x.shape[1] == 0:
        raise ArgumentError(f"input_ids: expected at least one token a row, got shape {tuple(x.shape[:2])}")


def _check_like(name: str, x: torch.Tensor, ids: torch.Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Numbers that go with token ids: integers of one of these shapes, where the ids are."""
    wanted = " or ".join(str(s) for s in dict.fromkeys(shapes))
    _check_integers(name, x, wanted)
    if x.shape not in shapes:
        raise ArgumentError(f"{name}: expected shape {wanted}, got {tuple(x.shape)}")
    if x.device != ids.device:
        raise DeviceError(f"{name}: must be on {ids.device} like input_ids, got {x.device}; move it there")


def _check_integers(name: str, x: torch.Tensor, shape: str) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype not in (torch.int64, torch.int32):
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise DtypeError(f"{name}: expected an int64 or int32 tensor {shape}, got {got}")


def as_mask(
    name: str, mask: torch.Tensor | None, masked: torch.Tensor, past: int = 0, look: bool = True
) -> torch.Tensor | None:
    """The mask of ``masked`` (batch, new, ...) as bool, or None where every position is a token: the fast path.

    Telling costs one look at the mask, on a GPU a wait. While compiling or capturing a graph nobody can look: it stays.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise DtypeError(f"{name}: expected a tensor with 1 = token, 0 = padding, got {type(mask).__name__}")
    batch, new = masked.shape[:2]
    shapes = ((batch, new), (batch, past + new))
    if mask.shape not in shapes:
        wanted = " or ".join(str(s) for s in dict.fromkeys(shapes))
        raise ArgumentError(f"{name}: expected shape {wanted} with 1 = token, 0 = padding, got {tuple(mask.shape)}")
    if mask.device != masked.device:
        raise DeviceError(f"{name}: must be on {masked.device} like what it masks, got {mask.device}; move it there")
    tokens = mask.bool()
    if not look or torch.compiler.is_compiling() or mask.device.type == "meta":
        return tokens
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return tokens
    if mask.is_floating_point() and not torch.equal(tokens.to(mask.dtype), mask):
        raise ArgumentError(
            f"{name}: expected 1 = token, 0 = padding, got numbers from {mask.min():g} to {mask.max():g}; a mask to be "
            "added to scores becomes one by `mask == 0`"
        )
    return None if bool(tokens.all()) else tokens
