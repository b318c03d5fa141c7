"""Text from a model, token by token: greedy or sampled, one code path for decoders and encoder-decoders.

A model is anything with

* ``config`` (or not): ``vocab_size``, ``max_positions``, ``eos_token_id``, ``is_encoder_decoder``, ... count;
* ``new_cache(batch, max_length)``: a key/value cache for that many rows and positions. With ``cache.select(rows)``,
  rows that have ended leave the batch;
* ``model(input_ids, attention_mask=, position_ids=, cache=, last_logits_only=)`` for a decoder. ``attention_mask``
  covers what is in the cache and what comes, (batch, past + new); it and ``position_ids`` are None without padding, the
  latter also where ``config.position`` is "relative" or "none";
* ``model(input_ids, attention_mask=, decoder_input_ids=, cache=, last_logits_only=)`` for an encoder-decoder, which
  runs its encoder only while the cache holds nothing of it;
* ``.logits`` (batch, 1 or new, vocab) in what it returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from transfuse.errors import ArgumentError, DeviceError
from transfuse.generation.decode import decode, evaluating
from transfuse.generation.processors import Processor
from transfuse.generation.prompt import Ids, Prompt, prepare, special_ids
from transfuse.generation.settings import Settings

__all__ = ["Processor", "generate", "stream"]


def generate(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int = 20,
    min_new_tokens: int = 0,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    num_return_sequences: int = 1,
    generator: torch.Generator | None = None,
    decoder_input_ids: torch.Tensor | None = None,
    decoder_start_token_id: int | None = None,
) -> torch.Tensor:
    """Continue each prompt. Names and meanings as in transformers' GenerationConfig.

    Args:
        model: see the module's text. Put into eval mode for the duration.
        input_ids: (batch, length) int64 or int32. Prompts of unequal length are padded on the left (a decoder) or on
            either side (an encoder-decoder, where this is the encoder's input).
        attention_mask: (batch, length), 1 = token, 0 = padding; None: no padding.
        max_new_tokens: how many tokens to add at most.
        min_new_tokens: no end before that many.
        do_sample: draw tokens (True) or take the likeliest (False); None: draw if one of the next four is given.
        temperature: divides the scores; 0 is greedy.
        top_k: draw among the k likeliest only.
        top_p: draw among the likeliest that together reach this probability only.
        min_p: draw among tokens at least this many times as likely as the likeliest only.
        repetition_penalty: above 1 makes tokens that occurred (padding does not count) less likely.
        eos_token_id: one id or several, each ends its row; None: the configuration's; () for none.
        pad_token_id: fills ended rows; None: the configuration's, else the first eos_token_id, else 0.
        num_return_sequences: draws a prompt; rows of one prompt are next to one another.
        generator: the source of randomness, on the model's device; None: torch's own.
        decoder_input_ids: (batch, n) what the decoder of an encoder-decoder continues.
        decoder_start_token_id: or the one token it starts from; None: the configuration's.

    Returns:
        (batch * num_return_sequences, length + new) int64: prompt and continuation (an encoder-decoder: the decoder's
        tokens), as long as the longest row, ended rows filled with pad_token_id.

    Raises:
        ArgumentError: a knob is out of range, the prompt is empty, too long for the context or padded on the right, or
            an id is outside the vocabulary; or, while it runs, the model's scores are NaN or infinite. DtypeError,
            DeviceError: as their names say.

    >>> import torch, transfuse
    >>> config = transfuse.TransformerConfig("decoder", vocab_size=50, hidden_size=16, num_layers=1, num_heads=2)
    >>> model = transfuse.Decoder(config)
    >>> generate(model, torch.tensor([[3, 1, 4]]), max_new_tokens=5).shape
    torch.Size([1, 8])
    """
    prompt, settings, ids = _check(
        model, input_ids, attention_mask, max_new_tokens, min_new_tokens, do_sample, temperature, top_k, top_p, min_p,
        repetition_penalty, eos_token_id, pad_token_id, num_return_sequences, generator, decoder_input_ids,
        decoder_start_token_id,
    )  # fmt: skip
    with evaluating(model):
        new = list(decode(model, prompt, settings, ids, generator))
    return torch.cat([prompt.tokens, torch.stack(new, 1)], 1)


def stream(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int = 20,
    min_new_tokens: int = 0,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    num_return_sequences: int = 1,
    generator: torch.Generator | None = None,
    decoder_input_ids: torch.Tensor | None = None,
    decoder_start_token_id: int | None = None,
) -> Iterator[torch.Tensor]:
    """As :func:`generate`, but an iterator: the new tokens of each step, (batch * num_return_sequences,) int64.

    The arguments are checked at once, not at the first step; the prompt itself is not repeated. Stop whenever you
    like: nothing runs ahead. The model stays in eval mode until the iterator ends or is closed.

    >>> import torch, transfuse
    >>> config = transfuse.TransformerConfig("decoder", vocab_size=50, hidden_size=16, num_layers=1, num_heads=2)
    >>> model = transfuse.Decoder(config)
    >>> len([int(token) for token in stream(model, torch.tensor([[3, 1, 4]]), max_new_tokens=5)])
    5
    """
    prompt, settings, ids = _check(
        model, input_ids, attention_mask, max_new_tokens, min_new_tokens, do_sample, temperature, top_k, top_p, min_p,
        repetition_penalty, eos_token_id, pad_token_id, num_return_sequences, generator, decoder_input_ids,
        decoder_start_token_id,
    )  # fmt: skip
    return _evaluated(model, decode(model, prompt, settings, ids, generator))


def _evaluated(model: Any, steps: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    with evaluating(model):
        yield from steps


def _check(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    max_new_tokens: int,
    min_new_tokens: int,
    do_sample: bool | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    num_return_sequences: int,
    generator: torch.Generator | None,
    decoder_input_ids: torch.Tensor | None,
    decoder_start_token_id: int | None,
) -> tuple[Prompt, Settings, Ids]:
    settings = Settings(
        max_new_tokens, min_new_tokens, do_sample, temperature, top_k, top_p, min_p, repetition_penalty,
        num_return_sequences,
    )  # fmt: skip
    if not hasattr(model, "new_cache"):
        raise ArgumentError(f"generate: expected a model with new_cache, such as a Decoder, got {type(model).__name__}")
    config = getattr(model, "config", None)
    prompt = prepare(config, input_ids, attention_mask, decoder_input_ids, decoder_start_token_id, settings)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ArgumentError(
            f"generate: generator must be a torch.Generator, got {type(generator).__name__}; "
            "torch.Generator().manual_seed(n) makes one"
        )
    if generator is not None and generator.device.type != input_ids.device.type:
        raise DeviceError(f"generate: generator must be on {input_ids.device} like input_ids, got {generator.device}")
    return prompt, settings, special_ids(config, eos_token_id, pad_token_id)
