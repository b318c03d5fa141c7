"""Builds a Tokenizer from a checkpoint's files: tokenizer.json, WordPiece, byte-level BPE, SentencePiece, GGUF."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from transfuse.errors import CheckpointError
from transfuse.models.checkpoint import half_downloaded, read_json
from transfuse.models.gguf_tokenizer import pairs_of, read_gguf_tokenizer
from transfuse.models.locate import locate_tokenizer
from transfuse.models.spm import backend_of, read_spm, spaces_back
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


def load_tokenizer(path_or_id: str | os.PathLike[str], *, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint: the same places as ``from_pretrained``.

    ``tokenizer.json`` is read where there is one, else ``vocab.txt`` (WordPiece), ``vocab.json`` with ``merges.txt``
    (byte-level BPE), ``vocab.json`` with ``source.spm`` and ``target.spm`` (Marian), ``spiece.model`` (T5) or
    ``tokenizer.model`` (Llama), else what a ``.gguf`` file holds.

    Args:
        path_or_id: a folder, a ``.gguf`` file, a short name or a hub id.
        revision: branch, tag or commit, for hub ids.

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
        return read_gguf_tokenizer(path)
    config = _optional_json(path / "tokenizer_config.json")
    special_map = _optional_json(path / "special_tokens_map.json")
    try:
        if (path / "source.spm").is_file() and not (path / "tokenizer.json").is_file():
            return _marian(path, config, special_map)
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
    if (folder / "spiece.model").is_file():
        return _t5(folder / "spiece.model", config)
    if (folder / "tokenizer.model").is_file():
        return _llama(folder / "tokenizer.model", config)
    raise CheckpointError(
        f"{folder}: expected tokenizer.json, vocab.txt, vocab.json with merges.txt, vocab.json with source.spm and "
        f"target.spm, spiece.model or tokenizer.model; found none{half_downloaded(folder)}"
    )


def _t5(file: Path, config: dict[str, Any]) -> Backend:
    """T5's tokenizer: </s> after every text; the sentinels <extra_id_0>, ... are the last ids, counted backwards."""
    model = read_spm(file)
    names = {name for name, _, _ in model.pieces}
    if "</s>" not in names or names & {"[CLS]", "<cls>"}:
        raise CheckpointError(f"{file}: is not T5's; write a tokenizer.json with transformers' AutoTokenizer")
    backend = backend_of(model, file)
    count = config.get("extra_ids", 100)
    sentinels = [f"<extra_id_{i}>" for i in range(count if isinstance(count, int) else 100)]
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in reversed(sentinels)])
    backend.post_processor = _around(backend, last="</s>")
    return backend


def _llama(file: Path, config: dict[str, Any]) -> Backend:
    """Llama's tokenizer: <s> before a text, and </s> after it where the configuration says so."""
    backend = backend_of(read_spm(file), file)
    first = "<s>" if config.get("add_bos_token", True) else None
    backend.post_processor = _around(backend, first, "</s>" if config.get("add_eos_token", False) else None)
    return backend


def _around(backend: Backend, first: str | None = None, last: str | None = None) -> Any:
    """The step that puts a token before and one after a text, and around each of a pair."""
    single = [name for name in (first, "$A", last) if name is not None]
    pair = single + [name for name in (first, "$B", last) if name is not None]
    ids = {name: backend.token_to_id(name) for name in (first, last) if name is not None}
    if absent := [name for name, i in ids.items() if i is None]:
        raise CheckpointError(f"tokenizer: the vocabulary lacks {', '.join(absent)}")
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(ids.items()))


def _marian(folder: Path, config: dict[str, Any], special_map: dict[str, Any]) -> Tokenizer:
    """Marian's two tokenizers: SentencePiece models cut the text, vocab.json has the ids; each language has its own.

    The target's ids are in the same vocab.json, or in a target_vocab.json. What the model writes is the target's, so
    the source's tokenizer decodes by it.
    """
    names = [n for n in ("source.spm", "target.spm", "vocab.json", "target_vocab.json") if (folder / n).is_file()]
    if absent := {"source.spm", "target.spm", "vocab.json"} - set(names):
        raise CheckpointError(f"{folder}: lacks {', '.join(sorted(absent))}, which a Marian tokenizer needs")
    source = read_json(folder / "vocab.json")
    target = read_json(folder / "target_vocab.json") if "target_vocab.json" in names else source
    files = {name: (folder / name).read_bytes() for name in names}

    def tokenizer(vocab: dict[str, Any], spm: str, written: Tokenizer | None) -> Tokenizer:
        if absent := [name for name in ("</s>", "<unk>") if name not in vocab]:
            raise CheckpointError(f"{folder}: the vocabulary lacks {', '.join(absent)}; is it Marian's?")
        backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
        backend.add_special_tokens([name for name in ("</s>", "<unk>", "<pad>") if name in vocab])
        backend.decoder = spaces_back(r"\A +| +\z")
        cutter = backend_of(read_spm(folder / spm), folder / spm)
        codes = [name for name in vocab if name.startswith(">>") and name.endswith("<<")]  # the language to write in
        cutter.add_special_tokens([AddedToken(name, normalized=False) for name in codes])
        cutter.post_processor = _around(cutter, last="</s>")
        special = _special_tokens(backend, {**config, **special_map})
        settings = _settings(folder, config, special, token_types=False)
        return Tokenizer(backend, settings, cutter=cutter, target=written, files=files)

    return tokenizer(source, "source.spm", tokenizer(target, "target.spm", None))


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
    merges = pairs_of(folder / "merges.txt", [line for line in lines if line and not line.startswith("#version")])
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
