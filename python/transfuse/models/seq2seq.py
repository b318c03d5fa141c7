"""Seq2Seq: an encoder and a decoder that attends to it (the 2017 transformer, T5, Marian, BART)."""

from __future__ import annotations

import torch

from transfuse import generation
from transfuse.errors import ArgumentError, ConfigError
from transfuse.models.base import TransformerModel
from transfuse.models.cache import KVCache
from transfuse.models.config import TransformerConfig
from transfuse.models.decoder import Decoder, DecoderBody
from transfuse.models.encoder import Encoder
from transfuse.models.outputs import ModelOutput
from transfuse.models.stack import check_ids


class Seq2SeqBody(TransformerModel):
    """An encoder-decoder without a head: source and target ids in, one vector for each target token out.

    Args:
        config: architecture "encoder_decoder".
        device, dtype: of the parameters; device="meta" allocates nothing.

    Raises:
        ConfigError: the configuration is of another architecture, or larger than this machine's memory.

    >>> config = TransformerConfig("encoder_decoder", vocab_size=100, hidden_size=32, num_layers=2, num_heads=4)
    >>> model = Seq2SeqBody(config).eval()
    >>> model(torch.tensor([[5, 6, 7, 1]]), decoder_input_ids=torch.tensor([[0, 8]])).last_hidden_state.shape
    torch.Size([1, 2, 32])
    """

    decoder_class: type[DecoderBody] = DecoderBody

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._check(config, dtype)
        super().__init__()
        if not config.is_encoder_decoder:
            raise ConfigError(
                f"{type(self).__name__}: architecture must be 'encoder_decoder', got {config.architecture!r}; "
                f"use transfuse.{config.architecture.capitalize()}"
            )
        self.config = config
        self.encoder = Encoder(config, device="meta", dtype=dtype)
        self.decoder = self.decoder_class(config, device="meta", dtype=dtype)
        if config.share_embeddings:
            self.decoder.embeddings.token = self.encoder.embeddings.token
        self._materialise(device, dtype)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
        *,
        decoder_position_ids: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ModelOutput:
        """Reads the source, and the target in the light of it.

        The encoder runs once: not when its output is given, and not when the cache already holds what is needed of it.
        With a cache, ``decoder_input_ids`` are the tokens that follow those in it, and no gradient is recorded.

        Args:
            input_ids: (batch, source_length) of the source; may be None when the encoder need not run.
            attention_mask: (batch, source_length), 1 = token, 0 = padding; None: no padding.
            decoder_input_ids: (batch, length), the target so far, from decoder_start_token_id on.
            decoder_attention_mask: (batch, length), or with a cache also (batch, cached + length).
            cache: of :meth:`new_cache`; the new tokens' keys and values are appended.
            decoder_position_ids: (batch or 1, length); None: each row's tokens are counted from 0.
            encoder_hidden_states: (batch, source_length, hidden_size), from an earlier :meth:`encode`.
            output_hidden_states, output_attentions: also give these, of both halves, see :class:`ModelOutput`.

        Returns:
            last_hidden_state (batch, length, hidden_size), encoder_last_hidden_state.

        Raises:
            ArgumentError, DtypeError: a shape, an id or a dtype is wrong, or the cache has no room.
        """
        return self._read(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            cache,
            decoder_position_ids,
            encoder_hidden_states,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )

    def _read(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        decoder_input_ids: torch.Tensor | None,
        decoder_attention_mask: torch.Tensor | None,
        cache: KVCache | None,
        decoder_position_ids: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | None,
        **options: bool,
    ) -> ModelOutput:
        """Encoder, then decoder; ``options`` are what forward of the decoder takes, of which the encoder takes two."""
        name = type(self).__name__
        if decoder_input_ids is None:
            raise ArgumentError(f"{name}: decoder_input_ids is missing; begin with decoder_start_token_id")
        check_ids("decoder_input_ids", decoder_input_ids, self.decoder.embeddings.token.weight)
        self.decoder.check_cache(cache)
        encoded = ModelOutput(last_hidden_state=encoder_hidden_states)
        if encoder_hidden_states is None and not (cache is not None and cache.has_cross):
            if input_ids is None:
                raise ArgumentError(f"{name}: expected input_ids or encoder_hidden_states, got neither")
            with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
                encoded = self.encode(
                    input_ids,
                    attention_mask,
                    output_hidden_states=options["output_hidden_states"],
                    output_attentions=options["output_attentions"],
                )
        out: ModelOutput = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            position_ids=decoder_position_ids,
            cache=cache,
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=attention_mask,
            **options,
        )
        out.encoder_last_hidden_state = encoded.last_hidden_state
        out.encoder_hidden_states, out.encoder_attentions = encoded.hidden_states, encoded.attentions
        return out

    def shift_right(self, ids: torch.Tensor) -> torch.Tensor:
        """What the decoder reads to predict these ids: decoder_start_token_id, then all but the last.

        -100, which marks a target that no loss counts, becomes pad_token_id. The loss that transformers computes of
        ``labels`` is ``cross_entropy(model(source, decoder_input_ids=model.shift_right(labels)).logits.mT, labels)``.

        Args:
            ids: (batch, length) integers.

        Raises:
            ArgumentError: ids have another shape, or the configuration has no decoder_start_token_id.

        >>> config = TransformerConfig("encoder_decoder", vocab_size=9, hidden_size=8, num_layers=1, num_heads=1,
        ...                            pad_token_id=1, decoder_start_token_id=2)
        >>> Seq2Seq(config).shift_right(torch.tensor([[5, 6, -100, -100]])).tolist()
        [[2, 5, 6, 1]]
        """
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
            got = tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise ArgumentError(f"shift_right: expected token ids (batch, length), got {got}")
        if start is None:
            raise ArgumentError("shift_right: the configuration has no decoder_start_token_id to begin with; set it")
        shifted = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)
        return shifted if pad is None else shifted.masked_fill(shifted == -100, pad)

    def encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ModelOutput:
        """The encoder alone; its last_hidden_state is what ``encoder_hidden_states`` takes."""
        result: ModelOutput = self.encoder(
            input_ids,
            attention_mask,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        return result

    def new_cache(
        self,
        batch: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KVCache:
        """An empty cache for ``batch`` target rows of at most ``max_length`` tokens, for one source."""
        return self.decoder.new_cache(batch, max_length, dtype, device)


class Seq2Seq(Seq2SeqBody):
    """An encoder-decoder with its output head: source and target ids in, scores of the next target token out.

    Args:
        config: architecture "encoder_decoder".
        device, dtype: of the parameters; device="meta" allocates nothing.

    Raises:
        ConfigError: the configuration is of another architecture, or larger than this machine's memory.

    >>> config = TransformerConfig("encoder_decoder", vocab_size=100, hidden_size=32, num_layers=2, num_heads=4,
    ...                            position="sinusoidal", eos_token_id=1, decoder_start_token_id=0)
    >>> model = Seq2Seq(config).eval()
    >>> source = torch.tensor([[5, 6, 7, 1]])
    >>> model(source, decoder_input_ids=torch.tensor([[0, 8]])).logits.shape
    torch.Size([1, 2, 100])
    >>> model.generate(source, max_new_tokens=3, eos_token_id=()).shape
    torch.Size([1, 4])
    """

    decoder_class = Decoder

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
        *,
        decoder_position_ids: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        last_logits_only: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ModelOutput:
        """Scores the target token after each one; arguments, errors and output as of :meth:`Seq2SeqBody.forward`.

        Returns:
            Also logits (batch, length, vocab_size), with ``last_logits_only`` (batch, 1, vocab_size) of the last
            position alone.
        """
        return self._read(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            cache,
            decoder_position_ids,
            encoder_hidden_states,
            last_logits_only=last_logits_only,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )

    generate = generation.generate
    stream = generation.stream
