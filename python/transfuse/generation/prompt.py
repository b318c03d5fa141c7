"""The prompt, checked and made ready: rows of tokens padded on the left, with their positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from transfuse.errors import ArgumentError, DeviceError, DtypeError
from transfuse.generation.settings import GenerationConfig

PADDING = -1  # in histories: a position of a row that holds no token


@dataclass(frozen=True)
class Prompt:
    """What the decode loop starts from; one row a prompt."""

    tokens: torch.Tensor  # (rows, length): what the decoder continues
    mask: torch.Tensor | None  # (rows, length) int64, 1 = token; None where nothing is padded
    source: torch.Tensor | None  # (rows, source_length): the encoder's input, encoder-decoder only
    source_mask: torch.Tensor | None  # (rows, source_length), 1 = token
    budget: int  # how many tokens may be added

    def history(self) -> torch.Tensor:
        """(rows, length): the tokens, PADDING where there is none."""
        return _marked(self.tokens, self.mask)

    def read_by_encoder(self) -> torch.Tensor:
        """(rows, source_length): likewise, of the source; a decoder's source is its prompt."""
        return self.history() if self.source is None else _marked(self.source, self.source_mask)

    def repeated(self, copies: int) -> Prompt:
        """Every row ``copies`` times, next to one another."""
        if copies == 1:
            return self
        return self.rows(torch.arange(self.tokens.shape[0], device=self.tokens.device).repeat_interleave(copies))

    def rows(self, which: torch.Tensor) -> Prompt:
        """These rows (n,) alone; repeats are fine."""
        mask, source, source_mask = (
            None if t is None else t[which] for t in (self.mask, self.source, self.source_mask)
        )
        return Prompt(self.tokens[which], mask, source, source_mask, self.budget)


@dataclass(frozen=True)
class Ids:
    """The special tokens of one generation."""

    eos: tuple[int, ...]  # any of them ends a sequence
    pad: int  # follows the end


def special_ids(config: Any, settings: GenerationConfig) -> Ids:
    """The ids asked for, else the configuration's; padding falls back on the first eos, then 0.

    Raises:
        ArgumentError: an id is outside the vocabulary.
    """
    s = settings
    ends = several(getattr(config, "eos_token_id", None) if s.eos_token_id is None else s.eos_token_id)
    pad = getattr(config, "pad_token_id", None) if s.pad_token_id is None else s.pad_token_id
    if pad is None:
        pad = ends[0] if ends else 0
    _check_known("eos_token_id", ends, config)
    _check_known("forced_bos_token_id", several(s.forced_bos_token_id), config)
    _check_known("forced_eos_token_id", several(s.forced_eos_token_id), config)
    for word in s.bad_words_ids:
        _check_known("bad_words_ids", word, config)
    return Ids(ends, pad)  # a pad id above the vocabulary is only ever written, never read by the model


def prepare(
    config: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    decoder_input_ids: torch.Tensor | None,
    settings: GenerationConfig,
) -> Prompt:
    """Check a prompt against the model's configuration and lay it out.

    Raises:
        ArgumentError: empty, too long, ids outside the vocabulary, padding on the wrong side, mask of another shape.
        DtypeError: ids are not integers. DeviceError: the mask is elsewhere.
    """
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    _check_ids("input_ids", input_ids, getattr(config, "vocab_size", None))
    mask = _check_mask(attention_mask, input_ids)
    if not encoder_decoder:
        if decoder_input_ids is not None:
            raise ArgumentError("generate: decoder_input_ids and decoder_start_token_id need an encoder-decoder model")
        if mask is not None and not bool(mask[:, -1].all()):
            raise ArgumentError(
                "generate: prompts of unequal length must be padded on the left (attention_mask ends in 1), "
                f"got row {int(mask[:, -1].argmin())} padded on the right"
            )
        return Prompt(input_ids.long(), mask, None, None, _budget(config, input_ids.shape[1], settings))
    tokens = _decoder_tokens(config, input_ids, decoder_input_ids, settings.decoder_start_token_id)
    _check_length(config, input_ids.shape[1])
    return Prompt(tokens, None, input_ids, mask, _budget(config, tokens.shape[1], settings))


def check_assistant(config: Any, assistant: Any, prompt: Prompt) -> None:
    """Whether a second model, with the configuration ``assistant``, can guess what the first one writes.

    Raises:
        ArgumentError: its kind or its vocabulary is another, or its context too short.
    """
    first, second = (bool(getattr(c, "is_encoder_decoder", False)) for c in (config, assistant))
    if first != second:
        kinds = ("a decoder", "an encoder-decoder")
        raise ArgumentError(f"generate: assistant_model must be {kinds[first]} like the model, got {kinds[second]}")
    known, guessed = decoder_vocabulary(config), decoder_vocabulary(assistant)
    if known != guessed:
        raise ArgumentError(f"generate: assistant_model must have the model's vocabulary of {known}, got {guessed}")
    for t in (prompt.tokens, prompt.source):
        if t is not None:
            _check_length(assistant, t.shape[1], "assistant_model")
    _check_length(assistant, prompt.tokens.shape[1] + prompt.budget - 1, "assistant_model", "prompt and new tokens")


def _marked(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return tokens.long() if mask is None else tokens.long().masked_fill(mask == 0, PADDING)


def several(ids: Any) -> tuple[Any, ...]:
    """One id, several or none, as a tuple."""
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, Sequence) and not isinstance(ids, str) else (ids,)


def _check_known(name: str, ids: Sequence[int], config: Any) -> None:
    vocabulary = decoder_vocabulary(config)
    for i in ids:
        if vocabulary is not None and i >= vocabulary:
            raise ArgumentError(f"generate: {name} must be below the vocabulary's size {vocabulary}, got {i}")


def _check_ids(name: str, ids: torch.Tensor, vocabulary: int | None) -> None:
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = str(ids.dtype).removeprefix("torch.") if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise DtypeError(f"generate: {name} must be an int64 or int32 tensor, got {got}")
    if ids.dim() != 2:
        raise ArgumentError(f"generate: {name} must have shape (batch, length), got {tuple(ids.shape)}")
    if ids.device.type == "meta":
        raise DeviceError(f"generate: {name} must hold values, got a tensor on the meta device")
    if ids.numel() == 0:
        raise ArgumentError(f"generate: {name} must hold at least one token, got shape {tuple(ids.shape)}")
    least, most = (int(v) for v in ids.aminmax())
    if least < 0 or (vocabulary is not None and most >= vocabulary):
        limit = "" if vocabulary is None else f" and below the vocabulary's size {vocabulary}"
        raise ArgumentError(f"generate: {name} must be at least 0{limit}, got {least if least < 0 else most}")


def _check_mask(mask: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor | None:
    """The mask in int64, or None if it hides nothing."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise DtypeError(
            f"generate: attention_mask must be a tensor, 1 = token, 0 = padding, got {type(mask).__name__}"
        )
    if mask.shape != ids.shape:
        raise ArgumentError(
            f"generate: attention_mask must have input_ids' shape {tuple(ids.shape)}, got {tuple(mask.shape)}"
        )
    if mask.device != ids.device:
        raise DeviceError(f"generate: attention_mask must be on {ids.device} like input_ids, got {mask.device}")
    seen = mask != 0
    if mask.is_floating_point() and bool((mask != seen).any()):
        raise ArgumentError(
            f"generate: attention_mask must be 1 = token, 0 = padding, got numbers from {mask.min():g} to "
            f"{mask.max():g}; a mask to be added to scores becomes one by `mask == 0`"
        )
    if bool(seen.all()):
        return None
    tokens = seen.sum(1)
    if int(tokens.min()) == 0:
        raise ArgumentError(f"generate: every prompt must hold a token, row {int(tokens.argmin())} is all padding")
    return seen.long()


def _check_length(config: Any, length: int, whose: str = "the model", what: str = "the prompt") -> None:
    context = _context(config)
    if context is not None and length > context:
        raise ArgumentError(f"generate: {what} must fit {whose}'s context of {context} tokens, got {length}")


def _budget(config: Any, length: int, settings: GenerationConfig) -> int:
    """How many tokens may follow ``length`` ones: what was asked for, or what there is room for."""
    _check_length(config, length)
    context, new = _context(config), settings.max_new_tokens
    if new is None and settings.max_length is not None:
        new = settings.max_length - length
        if new < 1:
            raise ArgumentError(
                f"generate: the prompt's {length} tokens leave no room in max_length = {settings.max_length}; "
                "give max_new_tokens"
            )
    if context is None:
        return 20 if new is None else new
    room = context - length + 1  # the last new token is never read by the model, so it needs no position
    if settings.max_new_tokens is not None and settings.max_new_tokens > room:
        raise ArgumentError(
            f"generate: prompt and new tokens must fit the model's context of {context} tokens, got {length} + {new}: "
            f"give max_new_tokens of at most {room}, or a shorter prompt"
        )
    return min(20 if new is None else new, room)


def counts_positions(config: Any) -> bool:
    """Whether the model gives every token a numbered position, so that it takes position_ids and has a context."""
    return getattr(config, "position", None) not in ("relative", "none")


def _context(config: Any) -> int | None:
    """How many positions the model knows; None where its position scheme has no end."""
    return getattr(config, "max_positions", None) if counts_positions(config) else None


def decoder_vocabulary(config: Any) -> int | None:
    return getattr(config, "decoder_vocab_size", None) or getattr(config, "vocab_size", None)


def _decoder_tokens(config: Any, source: torch.Tensor, given: torch.Tensor | None, start: int | None) -> torch.Tensor:
    if given is not None:
        _check_ids("decoder_input_ids", given, decoder_vocabulary(config))
        if given.shape[0] != source.shape[0]:
            raise ArgumentError(
                f"generate: decoder_input_ids must have {source.shape[0]} rows like input_ids, got {given.shape[0]}"
            )
        return given.long()
    for name in ("decoder_start_token_id", "bos_token_id"):
        start = getattr(config, name, None) if start is None else start
    if start is None:
        raise ArgumentError(
            "generate: an encoder-decoder needs a token to start from: give decoder_start_token_id or decoder_input_ids"
        )
    if isinstance(start, bool) or not isinstance(start, int):
        raise ArgumentError(f"generate: decoder_start_token_id must be a token id, got {start!r}")
    tokens = torch.full((source.shape[0], 1), start, dtype=torch.int64, device=source.device)
    _check_ids("decoder_start_token_id", tokens, decoder_vocabulary(config))
    return tokens
