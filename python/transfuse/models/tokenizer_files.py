"""Builds a Tokenizer from a checkpoint's files: tokenizer.json, vocab.txt, vocab.json with merges.txt, or GGUF."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from transfuse.errors import CheckpointError
from transfuse.models.checkpoint import read_json
from transfuse.models.gguf import GgufFile
from transfuse.models.locate import locate_tokenizer
from transfuse.models.tokenizer import SPECIAL_TOKENS, Tokenizer, TokenizerSettings

# Names that checkpoints without a special_tokens_map use.
_USUAL = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "mask": ("[MASK]", "<mask>"),
    "bos": ("<s>", "<|endoftext|>"),
    "eos": ("</s>", "<|endoftext|>"),
}
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's name of a pre-tokenizer -> (single digits first, the split that follows)
_GGUF_SPLITS = {
    "default": (False, _GPT2_SPLIT),
    "gpt-2": (False, _GPT2_SPLIT),
    "smollm": (True, _GPT2_SPLIT),
    "llama-bpe": (False, _LLAMA3_SPLIT),
    "llama3": (False, _LLAMA3_SPLIT),
}


def load_tokenizer(path_or_id: str | os.PathLike[str], *, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint: the same places as ``from_pretrained``.

    ``tokenizer.json`` is read where there is one, else ``vocab.txt`` (WordPiece) or ``vocab.json`` with ``merges.txt``
    (byte-level BPE), else what a ``.gguf`` file holds.

    Raises:
        CheckpointError: there is no tokenizer, or it is damaged or of an unknown kind.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (pathlib.Path(folder) / "vocab.txt").write_text("[UNK]\\n[CLS]\\n[SEP]\\nhello\\n")
        ...     load_tokenizer(folder).encode("Hello there")
        [1, 3, 0, 2]
    """
    return read_tokenizer(locate_tokenizer(path_or_id, revision))


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, or the one inside a ``.gguf`` file.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of a kind that cannot be read.
    """
    if path.is_file() and path.suffix == ".gguf":
        return _from_gguf(path)
    config = _optional_json(path / "tokenizer_config.json")
    special_map = _optional_json(path / "special_tokens_map.json")
    try:
        backend = _backend(path, config)
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception for every kind of damaged file
        raise CheckpointError(f"{path}: cannot read the tokenizer: {_short(error)}") from error
    special = _special_tokens(backend, {**config, **special_map})
    return Tokenizer(backend, _settings(path, config, special, _has_token_types(backend, config, special)))


def _backend(folder: Path, config: dict[str, Any]) -> Backend:
    if (folder / "tokenizer.json").is_file():
        return Backend.from_file(str(folder / "tokenizer.json"))
    if (folder / "vocab.txt").is_file():
        return _wordpiece(folder / "vocab.txt", config)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _byte_level_bpe(folder, config)
    if found := [n for n in ("tokenizer.model", "spiece.model", "source.spm") if (folder / n).is_file()]:
        raise CheckpointError(
            f"{folder}: {found[0]} is a SentencePiece model, which is not read; write a tokenizer.json with "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    raise CheckpointError(f"{folder}: expected tokenizer.json, vocab.txt, or vocab.json with merges.txt; found none")


def _wordpiece(vocab: Path, config: dict[str, Any]) -> Backend:
    """BERT's tokenizer from its list of pieces, one a line."""
    tokens = vocab.read_text(encoding="utf-8").split("\n")
    ids = {token.rstrip("\r"): i for i, token in enumerate(tokens) if token or i < len(tokens) - 1}
    if missing := [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in ids]:
        raise CheckpointError(f"{vocab}: lacks {', '.join(missing)}; is it a WordPiece vocabulary?")
    backend = Backend(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=bool(config.get("do_lower_case", True)),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([t for role in SPECIAL_TOKENS for t in _USUAL[role] if t.startswith("[") and t in ids])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return backend


def _byte_level_bpe(folder: Path, config: dict[str, Any]) -> Backend:
    """GPT-2's tokenizer; with RoBERTa's <s> ... </s> where the vocabulary is RoBERTa's or BART's."""
    vocab = read_json(folder / "vocab.json")
    lines = [line.rstrip("\r") for line in (folder / "merges.txt").read_text(encoding="utf-8").split("\n")]
    merges = _pairs(folder / "merges.txt", [line for line in lines if line and not line.startswith("#version")])
    prefix_space = bool(config.get("add_prefix_space", False))
    backend = Backend(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    names = ("<s>", "<pad>", "</s>", "<unk>", "<|endoftext|>")
    backend.add_special_tokens([name for name in names if name in vocab])
    if "<mask>" in vocab:  # the mask takes the space before it, as in RoBERTa's own tokenizer
        backend.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    if {"<s>", "</s>"} <= vocab.keys():
        ends = (("</s>", vocab["</s>"]), ("<s>", vocab["<s>"]))
        backend.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=prefix_space)
    else:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _pairs(path: Path, merges: list[Any]) -> list[tuple[str, str]]:
    """The two pieces that each merge joins."""
    pairs = []
    for merge in merges:
        pieces = merge.split(" ") if isinstance(merge, str) else ()
        if len(pieces) != 2:
            raise CheckpointError(f"{path}: expected a merge of two pieces, got {merge!r}")
        pairs.append((pieces[0], pieces[1]))
    return pairs


def _from_gguf(path: Path) -> Tokenizer:
    """The byte-level BPE tokenizer in a GGUF file's metadata, with its chat template."""
    meta = GgufFile(path).metadata
    kind, split = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre", "default")
    tokens, merges = meta.get("tokenizer.ggml.tokens"), meta.get("tokenizer.ggml.merges")
    if kind != "gpt2" or split not in _GGUF_SPLITS:
        raise CheckpointError(
            f"{path}: tokenizer {kind!r} with pre-tokenizer {split!r} is not read; known: 'gpt2' with "
            f"{', '.join(sorted(_GGUF_SPLITS))}; load the original tokenizer.json instead"
        )
    if not isinstance(tokens, list) or not isinstance(merges, list) or not all(isinstance(t, str) for t in tokens):
        raise CheckpointError(f"{path}: the tokenizer's tokens or merges are missing or damaged")
    try:
        backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, _pairs(path, merges)))
    except CheckpointError:
        raise
    except Exception as error:  # bare Exception again: a merge names a piece that is not in the vocabulary
        raise CheckpointError(f"{path}: the tokenizer's merges do not fit its tokens: {_short(error)}") from error
    single_digits, pattern = _GGUF_SPLITS[split]
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    steps += [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    types = meta.get("tokenizer.ggml.token_type") or []
    control = [token for token, kind_of in zip(tokens, types, strict=False) if kind_of == 3]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    special = {
        role: tokens[i]
        for role, key in {**{role: role for role in SPECIAL_TOKENS}, "pad": "padding", "unk": "unknown"}.items()
        if isinstance(i := meta.get(f"tokenizer.ggml.{key}_token_id"), int) and 0 <= i < len(tokens)
    }
    if meta.get("tokenizer.ggml.add_bos_token") is True and "bos" in special:
        bos = special["bos"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, tokens.index(bos))]
        )
    template = meta.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        TokenizerSettings(
            special,
            chat_template=template if isinstance(template, str) else None,
            max_length=meta.get("llama.context_length"),
        ),
    )


def _special_tokens(backend: Backend, config: dict[str, Any]) -> dict[str, str]:
    """Role -> token, from the files where they say so, else by the usual names that the vocabulary holds."""
    special = {}
    for role in SPECIAL_TOKENS:
        given = config.get(f"{role}_token")
        token = given.get("content") if isinstance(given, dict) else given
        candidates = (token,) if isinstance(token, str) else _USUAL[role]
        found = next((name for name in candidates if backend.token_to_id(name) is not None), None)
        if found is not None:
            special[role] = found
    return special


def _has_token_types(backend: Backend, config: dict[str, Any], special: dict[str, str]) -> bool:
    """Whether the model reads type ids: as its files say, else whether a pair is joined in BERT's way."""
    if isinstance(names := config.get("model_input_names"), list):
        return "token_type_ids" in names
    if str(config.get("tokenizer_class", "")).startswith("DistilBert"):  # BERT's tokenizer, no type embeddings
        return False
    return {"cls", "sep"} <= special.keys() and 1 in backend.encode("a", "b").type_ids


def _settings(folder: Path, config: dict[str, Any], special: dict[str, str], token_types: bool) -> TokenizerSettings:
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates: the default one
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    longest = config.get("model_max_length")
    return TokenizerSettings(
        special,
        padding_side="left" if config.get("padding_side") == "left" else "right",
        chat_template=template if isinstance(template, str) else None,
        # transformers writes 1e30 for "no limit"
        max_length=longest if isinstance(longest, int) and 0 < longest < 1 << 31 else None,
        token_types=token_types,
    )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
