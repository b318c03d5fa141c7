"""SentencePiece models (``spiece.model``, ``tokenizer.model``, ``source.spm``) as ``tokenizers.Tokenizer``.

The file is a protocol buffer. The four messages of it that matter are read here: pieces with scores and types, the kind
of model, and how text is normalised first.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from transfuse.errors import CheckpointError
from transfuse.models.gguf_tokenizer import merges_by_score

UNIGRAM, BPE = 1, 2
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # types of pieces; 1 is a normal one
_SPACE = "▁"


@dataclass(frozen=True)
class SentencePiece:
    """What a SentencePiece model says."""

    kind: int  # UNIGRAM | BPE
    pieces: tuple[tuple[str, float, int], ...]  # text, score, type
    charsmap: bytes  # the normalisation of characters, compiled; empty: none
    space_first: bool  # a text begins as if a space stood before it
    single_spaces: bool  # runs of spaces are one, and none are at the ends

    @property
    def unknown(self) -> int:
        """Id of the piece for what no piece spells."""
        return next((i for i, (_, _, type_) in enumerate(self.pieces) if type_ == UNKNOWN), 0)


def read_spm(path: Path) -> SentencePiece:
    """Reads a SentencePiece model.

    Raises:
        CheckpointError: the file cannot be read, is no SentencePiece model, or is of a kind not read (word, char).
    """
    try:
        fields = list(_fields(path.read_bytes()))
        pieces = tuple(_piece(value) for number, value in fields if number == 1)
        trainer = dict(_fields(next((v for n, v in fields if n == 2), b"")))
        rules = dict(_fields(next((v for n, v in fields if n == 3), b"")))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, IndexError, struct.error) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model ({error}); download it again") from error
    kind = trainer.get(3, UNIGRAM)
    if not pieces or kind not in (UNIGRAM, BPE):
        raise CheckpointError(
            f"{path}: expected a SentencePiece model of kind unigram (1) or bpe (2) with pieces, got kind {kind!r} "
            f"with {len(pieces)} pieces"
        )
    return SentencePiece(kind, pieces, rules.get(2, b""), bool(rules.get(3, 1)), bool(rules.get(4, 1)))


def backend_of(model: SentencePiece, path: Path) -> Backend:
    """The tokenizer that cuts as the SentencePiece model does; nothing is added around a text.

    Raises:
        CheckpointError: the pieces contradict one another.
    """
    names = [name for name, _, _ in model.pieces]
    try:
        if model.kind == UNIGRAM:
            backend = Backend(models.Unigram([(n, s) for n, s, _ in model.pieces], model.unknown, _has_bytes(model)))
        else:
            merges = merges_by_score(names, [score for _, score, _ in model.pieces])
            ids = {name: i for i, name in enumerate(names)}
            unknown = names[model.unknown]
            backend = Backend(
                models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=_has_bytes(model))
            )
        backend.normalizer = normalizers.Sequence(_normalizers(model))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: its pieces contradict one another: {str(error)[:200]}") from error
    backend.decoder = spaces_back(r"\A " if model.space_first else "")
    for name, _, type_ in model.pieces:
        if type_ in (UNKNOWN, CONTROL):
            backend.add_special_tokens([AddedToken(name, normalized=False, special=True)])
        elif type_ == USER_DEFINED:
            backend.add_tokens([AddedToken(name, normalized=False)])
    return backend


def spaces_back(left_out: str = r"\A ") -> Any:
    """The decoder of pieces: text with its spaces, bytes put together; what matches ``left_out`` at its ends is not."""
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Replace(Regex(left_out), "")] if left_out else steps)


def _normalizers(model: SentencePiece) -> list[Any]:
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.single_spaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", _SPACE))
    return [*steps, normalizers.Prepend(_SPACE)] if model.space_first else steps


def _has_bytes(model: SentencePiece) -> bool:
    return any(type_ == BYTE for _, _, type_ in model.pieces)


def _piece(message: bytes) -> tuple[str, float, int]:
    values = dict(_fields(message))
    return (
        values[1].decode("utf-8") if 1 in values else "",
        struct.unpack("<f", values.get(2, bytes(4)))[0],
        values.get(3, 1),
    )


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol buffer's message: numbers as int, all else as bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"field of kind {kind} at byte {at}")
        if at + size > len(message):
            raise ValueError(f"it ends {at + size - len(message)} bytes early")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number at a position, seven bits a byte, and the position after it."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError(f"a number without an end at byte {at}")
