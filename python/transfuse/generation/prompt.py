"""The prompt, checked and made ready: rows of tokens padded on the left, with their positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from transfuse.errors import ArgumentError, DeviceError, DtypeError
from transfuse.generation.settings import Settings


@dataclass(frozen=True)
class Prompt:
    """What the decode loop starts from; one row a returned sequence."""

    tokens: torch.Tensor  # (rows, length): what the decoder continues
    mask: torch.Tensor | None  # (rows, length) int64, 1 = token; None where nothing is padded
    source: torch.Tensor | None  # (rows, source_length): the encoder's input, encoder-decoder only
    source_mask: torch.Tensor | None  # (rows, source_length), 1 = token


@dataclass(frozen=True)
class Ids:
    """The special tokens of one generation."""

    eos: tuple[int, ...]  # any of them ends a sequence
    pad: int  # follows the end


def special_ids(config: Any, eos: int | Sequence[int] | None, pad: int | None) -> Ids:
    """The ids asked for, else the configuration's; padding falls back on the first eos, then 0.

    Raises:
        ArgumentError: an id is outside the vocabulary.
    """
    given = getattr(config, "eos_token_id", None) if eos is None else eos
    ends: tuple[Any, ...] = () if given is None else (given,)
    if isinstance(given, Sequence) and not isinstance(given, str):
        ends = tuple(given)
    pad = getattr(config, "pad_token_id", None) if pad is None else pad
    if pad is None:
        pad = ends[0] if ends else 0
    vocabulary = _decoder_vocabulary(config)
    for name, value in [("eos_token_id", e) for e in ends] + [("pad_token_id", pad)]:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ArgumentError(f"generate: {name} must be a token id of at least 0, got {value!r}")
        # A pad id above the vocabulary is only ever written, never read by the model.
        if name == "eos_token_id" and vocabulary is not None and value >= vocabulary:
            raise ArgumentError(f"generate: {name} must be below the vocabulary's size {vocabulary}, got {value}")
    return Ids(ends, pad)


def prepare(
    config: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    decoder_input_ids: torch.Tensor | None,
    decoder_start_token_id: int | None,
    settings: Settings,
) -> Prompt:
    """Check a prompt against the model's configuration and lay it out.

    Raises:
        ArgumentError: empty, too long, ids outside the vocabulary, padding on the wrong side, mask of another shape.
        DtypeError: ids are not integers. DeviceError: the mask is elsewhere.
    """
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    _check_ids("input_ids", input_ids, getattr(config, "vocab_size", None))
    mask = _check_mask(attention_mask, input_ids)
    copies = settings.num_return_sequences
    if not encoder_decoder:
        if decoder_input_ids is not None or decoder_start_token_id is not None:
            raise ArgumentError("generate: decoder_input_ids and decoder_start_token_id need an encoder-decoder model")
        if mask is not None and not bool(mask[:, -1].all()):
            raise ArgumentError(
                "generate: prompts of unequal length must be padded on the left (attention_mask ends in 1), "
                f"got row {int(mask[:, -1].argmin())} padded on the right"
            )
        _check_room(config, input_ids.shape[1], settings.max_new_tokens)
        return Prompt(_repeat(input_ids.long(), copies), _repeat(mask, copies), None, None)
    tokens = _decoder_tokens(config, input_ids, decoder_input_ids, decoder_start_token_id)
    _check_room(config, input_ids.shape[1], 0)
    _check_room(config, tokens.shape[1], settings.max_new_tokens)
    return Prompt(_repeat(tokens, copies), None, _repeat(input_ids, copies), _repeat(mask, copies))


def _check_ids(name: str, ids: torch.Tensor, vocabulary: int | None) -> None:
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = str(ids.dtype).removeprefix("torch.") if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise DtypeError(f"generate: {name} must be an int64 or int32 tensor, got {got}")
    if ids.dim() != 2:
        raise ArgumentError(f"generate: {name} must have shape (batch, length), got {tuple(ids.shape)}")
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


def _check_room(config: Any, length: int, new: int) -> None:
    context = _context(config)
    if context is None:
        return
    if length > context:
        raise ArgumentError(f"generate: the prompt must fit the model's context of {context} tokens, got {length}")
    # The last new token is never read by the model, so it needs no position.
    if length + new - 1 > context:
        raise ArgumentError(
            f"generate: prompt and new tokens must fit the model's context of {context} tokens, got {length} + {new}: "
            f"give max_new_tokens of at most {context - length + 1}, or a shorter prompt"
        )


def counts_positions(config: Any) -> bool:
    """Whether the model gives every token a numbered position, so that it takes position_ids and has a context."""
    return getattr(config, "position", None) not in ("relative", "none")


def _context(config: Any) -> int | None:
    """How many positions the model knows; None where its position scheme has no end."""
    return getattr(config, "max_positions", None) if counts_positions(config) else None


def _decoder_vocabulary(config: Any) -> int | None:
    return getattr(config, "decoder_vocab_size", None) or getattr(config, "vocab_size", None)


def _decoder_tokens(config: Any, source: torch.Tensor, given: torch.Tensor | None, start: int | None) -> torch.Tensor:
    if given is not None:
        _check_ids("decoder_input_ids", given, _decoder_vocabulary(config))
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
    _check_ids("decoder_start_token_id", tokens, _decoder_vocabulary(config))
    return tokens


def _repeat(t: Any, copies: int) -> Any:
    return t if t is None or copies == 1 else t.repeat_interleave(copies, 0)
