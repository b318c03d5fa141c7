"""Tokenizer: text to padded id tensors and back, chat templates, and text streamed token by token.

The work is done by the ``tokenizers`` library; this module adds what models need around it. Where the pieces come from
(tokenizer.json, vocab.txt, vocab.json + merges.txt, a GGUF file) is in ``tokenizer_files``.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from transfuse.errors import ArgumentError, CheckpointError
from transfuse.models.chat import render as render_chat
from transfuse.models.placement import usable_device

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend

_encoding_lock = threading.Lock()
_LONGEST = 1 << 31  # tokens; more fit no machine, and not the library's integers

SPECIAL_TOKENS = ("pad", "bos", "eos", "unk", "cls", "sep", "mask")


@dataclass(frozen=True)
class TokenizerSettings:
    """What stands beside a vocabulary.

    Args:
        special: role ("pad", "bos", "eos", "unk", "cls", "sep", "mask") -> the token's text.
        padding_side: where a shorter text is filled up, "left" or "right".
        chat_template: the jinja template that turns a conversation into a prompt.
        max_length: the longest input the model was made for; nothing is cut unless a call asks for it.
        token_types: whether the model tells the two texts of a pair apart by type ids.

    >>> TokenizerSettings({"pad": "[PAD]"}, padding_side="left").special["pad"]
    '[PAD]'
    """

    special: dict[str, str] = field(default_factory=dict)
    padding_side: str = "right"
    chat_template: str | None = None
    max_length: int | None = None
    token_types: bool = False


class Tokenizer:
    """A ``tokenizers.Tokenizer`` with padding into tensors, special ids, chat templates and incremental decoding.

    ``backend`` must not pad or truncate by itself; both are asked for per call.

    Args:
        backend: the vocabulary: it knows the model's ids, and makes text of them again.
        settings: what stands beside the vocabulary.
        cutter: cuts text into the backend's tokens, where another file than the vocabulary says how (Marian); None: the
            backend does that too.
        target: see :attr:`target`.
        files: name -> content of the files that it came from, where ``tokenizer.json`` cannot say what they say.

    Raises:
        CheckpointError: the settings are impossible.

    >>> from tokenizers import Tokenizer as Backend, models, pre_tokenizers
    >>> backend = Backend(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "hello": 2, "world": 3}, unk_token="[UNK]"))
    >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = Tokenizer(backend, TokenizerSettings({"pad": "[PAD]", "unk": "[UNK]"}))
    >>> tokenizer.encode("hello there"), tokenizer.tokens([2, 1])
    ([2, 1], ['hello', '[UNK]'])
    >>> batch = tokenizer(["hello world", "world"])
    >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
    ([[2, 3], [3, 0]], [[1, 1], [1, 0]])
    """

    def __init__(
        self,
        backend: Backend,
        settings: TokenizerSettings | None = None,
        *,
        cutter: Backend | None = None,
        target: Tokenizer | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        self.backend = backend
        self.settings = settings or TokenizerSettings()
        if self.settings.padding_side not in ("left", "right"):
            raise CheckpointError(f"tokenizer: padding_side must be left or right, got {self.settings.padding_side!r}")
        self._cutter = backend if cutter is None else cutter
        self._cutter.no_padding()
        self._cutter.no_truncation()
        self._target = target
        self._files = files
        self._ids = {role: backend.token_to_id(token) for role, token in self.settings.special.items()}
        # A vocabulary without a padding token can still be padded: the mask hides what is there.
        self.pad_token_id = next((i for r in ("pad", "eos") if (i := self._ids.get(r)) is not None), 0)

    @property
    def target(self) -> Tokenizer:
        """What encodes the text that the model is to write: another one in Marian, where each language has its own."""
        return self if self._target is None else self._target

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that opens a text, None where there is none."""
        return self._ids.get("bos")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text."""
        return self._ids.get("eos")

    @property
    def unk_token_id(self) -> int | None:
        """Id that stands for what the vocabulary cannot spell."""
        return self._ids.get("unk")

    @property
    def cls_token_id(self) -> int | None:
        """Id of BERT's first token."""
        return self._ids.get("cls")

    @property
    def sep_token_id(self) -> int | None:
        """Id of BERT's separator."""
        return self._ids.get("sep")

    @property
    def mask_token_id(self) -> int | None:
        """Id of the token that a masked language model fills in."""
        return self._ids.get("mask")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.backend.get_vocab_size())

    @property
    def highest_id(self) -> int:
        """The largest id that a text can become; tokens that were added for a role no text spells do not count."""
        special = (i for i in self._ids.values() if i is not None)
        return max(int(self.backend.get_vocab_size(with_added_tokens=False)) - 1, *special, 0)

    def encode(self, text: str, pair: str | None = None, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of one text (or of a pair, as the model joins pairs)."""
        for given in (text,) if pair is None else (text, pair):
            _check_text("tokenizer: text", given)
        with _encoding():
            return self.ids_of(self._cutter.encode(text, pair, add_special_tokens=add_special_tokens))

    def ids_of(self, encoding: Encoding) -> list[int]:
        """The model's ids in what :meth:`windows` gives."""
        if self._cutter is self.backend:
            return list(encoding.ids)
        found = (self.backend.token_to_id(token) for token in encoding.tokens)
        return [(self.unk_token_id or 0) if i is None else i for i in found]

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own name of each id, such as ``##ing`` or ``▁the``; an id that it lacks is ``<id 7>``."""
        names = (self.backend.id_to_token(int(i)) for i in ids)
        return [f"<id {i}>" if name is None else name for i, name in zip(ids, names, strict=True)]

    def decode(self, ids: Sequence[int] | torch.Tensor, *, skip_special_tokens: bool = True) -> str:
        """The text of a sequence of ids: a list, or a 1-D integer tensor. Unknown ids give nothing."""
        try:
            values = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
            if any(isinstance(value, list) for value in values):
                raise ArgumentError("decode: expected one sequence of ids, got several; use batch_decode")
            return str(self.target.backend.decode(values, skip_special_tokens=skip_special_tokens))
        except (TypeError, OverflowError) as error:
            raise ArgumentError(f"decode: expected a sequence of token ids, got {repr(ids)[:80]} ({error})") from error

    def batch_decode(
        self, rows: Sequence[Sequence[int]] | torch.Tensor, *, skip_special_tokens: bool = True
    ) -> list[str]:
        """The text of each row of ids: a list of lists, or a (batch, length) tensor."""
        values = rows.tolist() if isinstance(rows, torch.Tensor) else rows
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in values]

    def __call__(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        add_special_tokens: bool = True,
        device: torch.device | str | None = None,
    ) -> dict[str, torch.Tensor]:
        """Encode texts into one padded batch: the keyword arguments that a model's forward takes.

        Args:
            texts: one text or several.
            pairs: a second text for each, for models that read two.
            max_length: cut longer inputs to this many tokens, special ones included; None cuts nothing.
            padding_side: "left" or "right"; by default the tokenizer's own. Generation pads on the left.
            pad_to_multiple_of: round the batch's length up to a multiple of this.
            add_special_tokens: add what the model expects around a text ([CLS], <s>, ...).
            device: where the tensors go.

        Returns:
            ``input_ids`` and ``attention_mask`` (1 = token), for models with token types also ``token_type_ids``:
            each (batch, length) int64.

        Raises:
            ArgumentError: the arguments do not fit together.
        """
        windows = self.windows(texts, pairs, max_length=max_length, add_special_tokens=add_special_tokens)
        encodings = [found[0] for found in windows]
        return self.pad(encodings, padding_side=padding_side, pad_to_multiple_of=pad_to_multiple_of, device=device)

    def windows(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        stride: int | None = None,
        add_special_tokens: bool = True,
    ) -> list[list[Encoding]]:
        """Encode texts without padding; a text that is too long gives several overlapping windows.

        Args:
            texts, pairs, add_special_tokens: as for a call.
            max_length: tokens of a window at most, special ones included; None: a text is one window.
            stride: tokens that neighbouring windows of a text share; of a pair only the second text is then cut.
                None: the first window is all that is wanted.

        Returns:
            for each text its windows, encodings of the ``tokenizers`` library (``offsets``, ``special_tokens_mask``,
            ``word_ids``, ``sequence_ids``); :meth:`ids_of` gives their ids, :meth:`pad` makes a batch of them.

        Raises:
            ArgumentError: the arguments do not fit together.
        """
        texts = as_texts("tokenizer: texts", texts)
        pairs = None if pairs is None else as_texts("tokenizer: pairs", pairs)
        if pairs is not None and len(pairs) != len(texts):
            raise ArgumentError(f"tokenizer: expected one pair per text, got {len(texts)} texts and {len(pairs)} pairs")
        if not isinstance(add_special_tokens, bool):
            raise ArgumentError(f"tokenizer: add_special_tokens must be True or False, got {add_special_tokens!r}")
        inputs: list[Any] = texts if pairs is None else list(zip(texts, pairs, strict=True))
        if max_length is None:
            with _encoding():
                return [[e] for e in self._cutter.encode_batch(inputs, add_special_tokens=add_special_tokens)]
        extra = self._cutter.num_special_tokens_to_add(pairs is not None) if add_special_tokens else 0
        least = 1 + extra
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < least:
            raise ArgumentError(f"tokenizer: max_length must be a whole number of at least {least}, got {max_length!r}")
        max_length = min(max_length, _LONGEST)
        if stride is not None and (not isinstance(stride, int) or not 0 <= stride < max_length - extra):
            raise ArgumentError(f"tokenizer: stride must be from 0 to {max_length - extra - 1}, got {stride!r}")
        strategy = "only_second" if pairs is not None and stride is not None else "longest_first"
        with _encoding():
            self._cutter.enable_truncation(max_length, stride=stride or 0, strategy=strategy)
            try:
                found = self._cutter.encode_batch(inputs, add_special_tokens=add_special_tokens)
            finally:
                self._cutter.no_truncation()
        return [[e] if stride is None else [e, *e.overflowing] for e in found]

    def pad(
        self,
        encodings: Sequence[Encoding],
        *,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, torch.Tensor]:
        """One batch of what :meth:`windows` gives; arguments and result as of a call."""
        where = None if device is None else usable_device(device)
        side = padding_side or self.settings.padding_side
        if side not in ("left", "right"):
            raise ArgumentError(f"tokenizer: padding_side must be 'left' or 'right', got {side!r}")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ArgumentError(f"tokenizer: pad_to_multiple_of must be at least 1, got {pad_to_multiple_of}")
        length = max((len(encoding.ids) for encoding in encodings), default=0)
        if pad_to_multiple_of:
            length = -(-length // pad_to_multiple_of) * pad_to_multiple_of

        def table(rows: list[list[int]], fill: int) -> torch.Tensor:
            out = torch.full((len(rows), length), fill, dtype=torch.long)
            for row, values in zip(out, rows, strict=True):
                row[length - len(values) if side == "left" else 0 :][: len(values)] = torch.tensor(values)
            return out if where is None else out.to(where)

        batch = {
            "input_ids": table([self.ids_of(e) for e in encodings], self.pad_token_id),
            "attention_mask": table([[1] * len(e.ids) for e in encodings], 0),
        }
        if self.settings.token_types:
            batch["token_type_ids"] = table([e.type_ids for e in encodings], 0)
        return batch

    def stream(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """A fresh incremental decoder: ``put`` each new id, print what it returns, ``end`` for the rest."""
        return StreamDecoder(self, skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt text for a conversation; encode it with ``add_special_tokens=False``.

        Args:
            messages: dicts with ``role`` ("system", "user", "assistant") and ``content``.
            add_generation_prompt: end with the opening of the assistant's turn.

        Raises:
            CheckpointError: the tokenizer has no chat template, or it is broken.
            ArgumentError: the template refuses these messages.
        """
        if self.settings.chat_template is None:
            raise CheckpointError("this tokenizer has no chat template; encode the prompt's text directly")
        return render_chat(self.settings.chat_template, list(messages), add_generation_prompt, self.settings.special)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which transformers reads too; Marian's own files."""
        folder = Path(folder)
        settings = self.settings
        config: dict[str, Any] = {f"{role}_token": token for role, token in settings.special.items()}
        kind = "PreTrainedTokenizerFast" if self._files is None else "MarianTokenizer"
        config |= {"tokenizer_class": kind, "padding_side": settings.padding_side}
        config["model_input_names"] = ["input_ids", "attention_mask", *["token_type_ids"] * settings.token_types]
        if settings.max_length is not None:
            config["model_max_length"] = settings.max_length
        if settings.chat_template is not None:
            config["chat_template"] = settings.chat_template
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._files is None:
                self.backend.save(str(folder / "tokenizer.json"))
            for name, content in (self._files or {}).items():
                (folder / name).write_bytes(content)
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot write the tokenizer: {error.strerror or error}") from error


@contextmanager
def _encoding() -> Iterator[None]:
    """Around the library's encoding. Truncation is a state of its tokenizer: no thread may cut the texts of another."""
    try:
        with _encoding_lock:
            yield
    except Exception as error:
        if type(error) is not Exception:  # the library raises that one for a vocabulary that contradicts itself
            raise
        raise CheckpointError(f"tokenizer: cannot encode: {error}") from error


def as_texts(name: str, texts: str | Sequence[str]) -> list[str]:
    """One text or several, as a list.

    Raises:
        ArgumentError: it is something else, or a text is no valid Unicode.

    >>> as_texts("texts", "one"), as_texts("texts", ("a", "b"))
    (['one'], ['a', 'b'])
    """
    given: Any = [texts] if isinstance(texts, str) else texts
    if not isinstance(given, Iterable) or isinstance(given, bytes):
        raise ArgumentError(f"{name}: expected a text or several, got {type(texts).__name__}")
    try:
        found = list(given)
    except TypeError as error:  # an array or a tensor without dimensions
        raise ArgumentError(f"{name}: expected a text or several, got {type(texts).__name__}") from error
    for text in found:
        _check_text(name, text)
    return found


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise ArgumentError(f"{name}: expected texts (str), got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        character = ascii(text[error.start])
        raise ArgumentError(f"{name}: not valid Unicode, character {error.start} is {character}") from error


class StreamDecoder:
    """Turns ids into text as they come, never showing half a character.

    Byte-level vocabularies split a character over several tokens; text is held back until it decodes completely.
    The pieces joined are ``decode`` of all ids.

    >>> from tokenizers import Tokenizer as Backend, decoders, models
    >>> vocab = {character: i for i, character in enumerate("Ã©a")}  # the byte-level names of é's two bytes, and a
    >>> backend = Backend(models.BPE(vocab, []))
    >>> backend.decoder = decoders.ByteLevel()
    >>> stream = Tokenizer(backend).stream()
    >>> [stream.put(i) for i in (2, 0, 1)], stream.end()
    (['a', '', 'é'], '')
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []  # the ids of the last piece shown (context for spaces), then those not yet shown
        self._shown = 0

    def put(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty while a character is still incomplete."""
        self._ids.append(int(token_id))
        return self._advance(hold=True)

    def end(self) -> str:
        """What was held back, with U+FFFD where the bytes are no character; afterwards the decoder is as new."""
        rest = self._advance(hold=False)
        self._ids, self._shown = [], 0
        return rest

    def _advance(self, *, hold: bool) -> str:
        before = self._decode(self._ids[: self._shown])
        now = self._decode(self._ids)
        if len(now) <= len(before) or (hold and now.endswith("�")):
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)
