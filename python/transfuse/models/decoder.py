"""Decoder: a token sees itself and those before it (GPT-2, Llama, and the second half of an encoder-decoder)."""

from __future__ import annotations

import torch

from transfuse import generation
from transfuse.errors import ArgumentError, ConfigError, DeviceError
from transfuse.models.blocks import BlockInputs
from transfuse.models.cache import KVCache
from transfuse.models.config import TransformerConfig
from transfuse.models.heads import OutputHead
from transfuse.models.outputs import ModelOutput, last_hidden
from transfuse.models.stack import Stack, as_mask


class DecoderBody(Stack):
    """A causal transformer without a head: ids in, one vector for each token out.

    Args:
        config: architecture "decoder", or "encoder_decoder" for that one's decoder alone, with cross-attention.
        device, dtype: of the parameters; device="meta" allocates nothing.

    Raises:
        ConfigError: the configuration is an encoder's, or larger than this machine's memory.

    >>> config = TransformerConfig("decoder", vocab_size=100, hidden_size=32, num_layers=2, num_heads=4)
    >>> DecoderBody(config).eval()(torch.tensor([[5, 6, 7]])).last_hidden_state.shape
    torch.Size([1, 3, 32])
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._check(config, dtype)
        if config.architecture == "encoder":
            name = type(self).__name__
            raise ConfigError(f"{name}: the configuration's architecture is 'encoder'; use transfuse.Encoder")
        super().__init__(config, decoder=True, dtype=dtype)
        self._materialise(device, dtype)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: KVCache | None = None,
        *,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ModelOutput:
        """Reads the tokens, each one in the light of those before it.

        With a cache, ``input_ids`` are the tokens that follow those in it, and no gradient is recorded.

        Args:
            input_ids: (batch, length) int64 or int32.
            attention_mask: 1 = token, 0 = padding; (batch, length), or with a cache also (batch, cached + length).
                None: no padding among the new tokens; the cache remembers earlier padding.
            token_type_ids: (batch, length), for models with token types.
            position_ids: (batch or 1, length); None: each row's tokens are counted from 0, padding left out.
            cache: of :meth:`new_cache`; the new tokens' keys and values are appended.
            encoder_hidden_states: (batch, source_length, hidden_size) to attend to; not needed once the cache has it.
            encoder_attention_mask: (batch, source_length), likewise.
            output_hidden_states, output_attentions: also give these, see :class:`ModelOutput`.

        Returns:
            last_hidden_state (batch, length, hidden_size).

        Raises:
            ArgumentError, DtypeError: a shape, an id or a dtype is wrong, or the cache has no room.
        """
        self.check_cache(cache)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            inputs = BlockInputs(attentions=[] if output_attentions else None)
            if self.config.is_encoder_decoder:
                self._set_context(inputs, encoder_hidden_states, encoder_attention_mask, cache, output_attentions)
            elif encoder_hidden_states is not None:
                raise ArgumentError("encoder_hidden_states: this decoder has no cross-attention; leave it out")
            last, states = self._run(
                input_ids, attention_mask, token_type_ids, position_ids, cache, inputs, output_hidden_states
            )
        return ModelOutput(
            last_hidden_state=last,
            hidden_states=states,
            attentions=None if inputs.attentions is None else tuple(inputs.attentions),
            cross_attentions=None if inputs.cross_attentions is None else tuple(inputs.cross_attentions),
            cache=cache,
        )

    def _set_context(
        self,
        inputs: BlockInputs,
        states: torch.Tensor | None,
        mask: torch.Tensor | None,
        cache: KVCache | None,
        output_attentions: bool,
    ) -> None:
        """What the cross-attention reads: the encoder's states, or what the cache holds of them."""
        inputs.cross_attentions = [] if output_attentions else None
        if cache is not None and cache.has_cross:
            inputs.context_mask = cache.cross_mask
            return
        if states is None:
            raise ArgumentError("encoder_hidden_states: this decoder attends to an encoder's output, got None")
        self._check_context(states)
        inputs.context = states
        tokens = as_mask("encoder_attention_mask", mask, states)
        inputs.context_mask = None if tokens is None else tokens[:, None, None, :]
        if cache is not None:
            cache.cross_mask = inputs.context_mask

    def _check_context(self, states: torch.Tensor) -> None:
        """The encoder's output is (batch, source_length, hidden_size), where and what the parameters are."""
        if not isinstance(states, torch.Tensor) or states.dim() != 3 or states.shape[2] != self.config.hidden_size:
            got = tuple(states.shape) if isinstance(states, torch.Tensor) else type(states).__name__
            wanted = f"(batch, source_length, {self.config.hidden_size})"
            raise ArgumentError(f"encoder_hidden_states: expected shape {wanted}, got {got}")
        table = self.embeddings.token.weight
        if states.device != table.device and table.device.type != "meta":
            raise DeviceError(f"encoder_hidden_states: must be on {table.device} like the model, got {states.device}")

    def check_cache(self, cache: KVCache | None) -> None:
        """Raises ArgumentError unless it is None or a cache of this model's layers."""
        if cache is None:
            return
        if not isinstance(cache, KVCache):
            raise ArgumentError(f"cache: expected what the model's new_cache() gives, got {type(cache).__name__}")
        needed = (len(self.layers), *self._kv_shape())
        if cache.layout != needed:
            raise ArgumentError(
                f"cache: made for (layers, kv_heads, head_dim) = {cache.layout}, this model has {needed}; use its "
                "own new_cache()"
            )

    def _kv_shape(self) -> tuple[int, int]:
        """Key/value heads and their size."""
        c = self.config
        return (c.num_decoder_kv_heads, c.decoder_head_dim) if c.is_encoder_decoder else (c.num_kv_heads, c.head_dim)

    def new_cache(
        self,
        batch: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KVCache:
        """An empty cache for ``batch`` rows of at most ``max_length`` tokens, by default where the parameters are."""
        kv_heads, head_dim = self._kv_shape()
        return KVCache(
            len(self.layers),
            batch,
            kv_heads,
            max_length,
            head_dim,
            self.dtype if dtype is None else dtype,
            self.device if device is None else device,
        )


class Decoder(DecoderBody):
    """A causal transformer with its output head: ids in, scores of the next token out.

    Args:
        config: architecture "decoder", or "encoder_decoder" for that one's decoder alone, with cross-attention.
        device, dtype: of the parameters; device="meta" allocates nothing.

    Raises:
        ConfigError: the configuration is an encoder's, or larger than this machine's memory.

    >>> config = TransformerConfig("decoder", vocab_size=100, hidden_size=32, num_layers=2, num_heads=4,
    ...                            num_kv_heads=2, activation="silu", gated=True, norm="rms", position="rotary")
    >>> model = Decoder(config).eval()
    >>> prompt = torch.tensor([[5, 6, 7]])
    >>> model(prompt).logits.shape
    torch.Size([1, 3, 100])
    >>> model.generate(prompt, max_new_tokens=4).shape
    torch.Size([1, 7])
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, device="meta", dtype=dtype)
        self.lm_head = OutputHead(config, dtype=dtype)
        self._materialise(device, dtype)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: KVCache | None = None,
        *,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        last_logits_only: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ModelOutput:
        """Scores the token after each one; arguments, errors and output as of :meth:`DecoderBody.forward`.

        Returns:
            Also logits (batch, length, vocab_size), with ``last_logits_only`` (batch, 1, vocab_size) of the last
            position alone.
        """
        out = super().forward(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            cache,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        read = last_hidden(out)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            out.logits = self.lm_head(read[:, -1:] if last_logits_only else read, self.embeddings.token.weight)
        return out

    generate = generation.generate
    stream = generation.stream
