"""Text from a model, token by token: greedy, drawn or by beam search, one code path for decoders and encoder-decoders.

A model is anything with

* ``config`` (or not): ``vocab_size``, ``max_positions``, ``eos_token_id``, ``is_encoder_decoder``, ... count;
* ``generation_config`` (or not): a :class:`GenerationConfig`, the defaults of its checkpoint;
* ``new_cache(batch, max_length)``: a key/value cache for that many rows and positions. With ``cache.select(rows)``,
  rows that have ended leave the batch; with ``widen(copies)``, the prompt of several sequences is read once; guessed
  tokens need ``crop(length)``, and beams ``widen`` and ``reorder(rows, start)``;
* ``model(input_ids, attention_mask=, position_ids=, cache=, last_logits_only=)`` for a decoder. ``attention_mask``
  covers what is in the cache and what comes, (batch, past + new); it and ``position_ids`` are None without padding, the
  latter also where ``config.position`` is "relative" or "none";
* ``model(input_ids, attention_mask=, decoder_input_ids=, cache=, last_logits_only=)`` for an encoder-decoder, which
  runs its encoder only while the cache holds nothing of it;
* ``.logits`` (batch, 1 or new, vocab) in what it returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from transfuse.errors import ArgumentError, DeviceError
from transfuse.generation.beams import beam_search
from transfuse.generation.decode import decode
from transfuse.generation.processors import Processor
from transfuse.generation.prompt import Ids, Prompt, check_assistant, prepare, special_ids
from transfuse.generation.reader import evaluating
from transfuse.generation.results import Generated
from transfuse.generation.settings import GenerationConfig, Knobs, settings_of
from transfuse.generation.stopping import Ends

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Generated", "GenerationConfig", "Knobs", "Processor", "generate", "stream"]


@overload
def generate(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    decoder_input_ids: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    tokenizer: Any = None,
    assistant_model: Any = None,
    output_scores: Literal[False] = False,
    **knobs: Unpack[Knobs],
) -> torch.Tensor: ...


@overload
def generate(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    decoder_input_ids: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    tokenizer: Any = None,
    assistant_model: Any = None,
    output_scores: Literal[True],
    **knobs: Unpack[Knobs],
) -> Generated: ...


def generate(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    decoder_input_ids: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    tokenizer: Any = None,
    assistant_model: Any = None,
    output_scores: bool = False,
    **knobs: Unpack[Knobs],
) -> torch.Tensor | Generated:
    """Continue each prompt. Names and meanings as in transformers' GenerationConfig.

    Args:
        model: see the module's text. Put into eval mode for the duration.
        input_ids: (batch, length) int64 or int32. Prompts of unequal length are padded on the left (a decoder) or on
            either side (an encoder-decoder, where this is the encoder's input).
        attention_mask: (batch, length), 1 = token, 0 = padding; None: no padding.
        generation_config: the knobs; None: those of the model's checkpoint, if it has any.
        decoder_input_ids: (batch, n) what the decoder of an encoder-decoder continues; None: decoder_start_token_id.
        generator: the source of randomness, on the model's device; None: torch's own.
        tokenizer: what ``stop_strings`` are read with: anything whose ``decode(ids)`` gives text.
        assistant_model: a smaller model of the same vocabulary that guesses ahead; the text stays the same.
        output_scores: also give the scores, see :class:`Generated`.
        **knobs: the fields of :class:`GenerationConfig`, which describes them, each in place of generation_config's:
            max_new_tokens, max_length, min_new_tokens, min_length, do_sample, temperature, top_k, top_p, min_p,
            typical_p, repetition_penalty, no_repeat_ngram_size, encoder_no_repeat_ngram_size, bad_words_ids,
            forced_bos_token_id, forced_eos_token_id, num_beams, length_penalty, early_stopping, num_return_sequences,
            eos_token_id, pad_token_id, decoder_start_token_id, stop_strings, prompt_lookup_num_tokens,
            num_assistant_tokens.

    Returns:
        (batch * num_return_sequences, length + new) int64: prompt and continuation (an encoder-decoder: the decoder's
        tokens), as long as the longest row, ended rows filled with pad_token_id. Rows of one prompt are next to one
        another; those of a beam search are sorted, best first.

    Raises:
        ArgumentError: a knob is unknown or out of range, the prompt is empty, too long for the context or padded on the
            right, or an id is outside the vocabulary; or, while it runs, the model's scores are NaN or infinite.
        DtypeError, DeviceError: as their names say.

    >>> import torch, transfuse
    >>> config = transfuse.TransformerConfig("decoder", vocab_size=50, hidden_size=16, num_layers=1, num_heads=2)
    >>> model = transfuse.Decoder(config)
    >>> generate(model, torch.tensor([[3, 1, 4]]), max_new_tokens=5).shape
    torch.Size([1, 8])
    >>> generate(model, torch.tensor([[3, 1, 4]]), num_beams=3, num_return_sequences=2, max_new_tokens=5).shape
    torch.Size([2, 8])
    """
    request = _check(
        model, input_ids, attention_mask, generation_config, knobs, decoder_input_ids, generator, tokenizer,
        assistant_model,
    )  # fmt: skip
    prompt, settings, ids, ends = request
    with evaluating(model), evaluating(assistant_model):
        if settings.num_beams > 1:
            found = beam_search(model, prompt, settings, ids, ends, generator)
            return found if output_scores else found.sequences
        steps = list(decode(model, *request, generator, assistant_model, scored=output_scores))
    tokens = torch.stack([token for token, _ in steps], 1)
    sequences = torch.cat([prompt.tokens.repeat_interleave(settings.num_return_sequences, 0), tokens], 1)
    if not output_scores:
        return sequences
    scores = torch.stack([score for _, score in steps if score is not None], 1)  # NaN behind the end
    made = (~scores.isnan()).sum(1)
    return Generated(sequences, scores.nan_to_num_(0.0), scores.nansum(1) / made**settings.length_penalty)


def stream(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    decoder_input_ids: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    tokenizer: Any = None,
    assistant_model: Any = None,
    **knobs: Unpack[Knobs],
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
    request = _check(
        model, input_ids, attention_mask, generation_config, knobs, decoder_input_ids, generator, tokenizer,
        assistant_model,
    )  # fmt: skip
    if (beams := request[1].num_beams) > 1:
        raise ArgumentError(
            f"stream: a beam search knows its text only at the end, got num_beams={beams}; give num_beams=1, or call "
            "generate"
        )
    return _evaluated(model, assistant_model, decode(model, *request, generator, assistant_model))


def _evaluated(
    model: Any, assistant: Any, steps: Iterator[tuple[torch.Tensor, torch.Tensor | None]]
) -> Iterator[torch.Tensor]:
    with evaluating(model), evaluating(assistant):
        for tokens, _ in steps:
            yield tokens


def _check(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    generation_config: GenerationConfig | None,
    knobs: Knobs,
    decoder_input_ids: torch.Tensor | None,
    generator: torch.Generator | None,
    tokenizer: Any,
    assistant: Any,
) -> tuple[Prompt, GenerationConfig, Ids, Ends]:
    """Everything that can be wrong, asked before anything runs."""
    for role, m in (("", model), ("as assistant_model ", assistant)):
        if not hasattr(m, "new_cache") and (m is not None or not role):
            raise ArgumentError(
                f"generate: expected {role}a model with new_cache, such as a Decoder, got {type(m).__name__}"
            )
    config = getattr(model, "config", None)
    settings = settings_of(model, generation_config).replaced(knobs)
    if knobs.get("decoder_start_token_id") is not None and not getattr(config, "is_encoder_decoder", False):
        raise ArgumentError("generate: decoder_input_ids and decoder_start_token_id need an encoder-decoder model")
    prompt = prepare(config, input_ids, attention_mask, decoder_input_ids, settings)
    ids = special_ids(config, settings)
    ends = Ends(ids.eos, settings.stop_strings, tokenizer)
    if assistant is not None:
        if settings.num_beams > 1 or settings.prompt_lookup_num_tokens is not None:
            raise ArgumentError("generate: assistant_model needs num_beams=1 and no prompt_lookup_num_tokens")
        check_assistant(config, getattr(assistant, "config", None), prompt)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ArgumentError(
            f"generate: generator must be a torch.Generator, got {type(generator).__name__}; "
            "torch.Generator().manual_seed(n) makes one"
        )
    if generator is not None and generator.device.type != input_ids.device.type:
        raise DeviceError(f"generate: generator must be on {input_ids.device} like input_ids, got {generator.device}")
    return prompt, settings, ids, ends
