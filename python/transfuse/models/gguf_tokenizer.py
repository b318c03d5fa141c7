"""The tokenizer in a GGUF file: byte-level BPE ("gpt2") or SentencePiece's BPE ("llama"), with its chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from transfuse.errors import CheckpointError
from transfuse.models.gguf import GgufFile
from transfuse.models.tokenizer import SPECIAL_TOKENS, Tokenizer, TokenizerSettings

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's name of a pre-tokenizer -> (single digits first, the split that follows, whole words before merges)
_SPLITS = {
    "default": (False, _GPT2_SPLIT, False),
    "gpt-2": (False, _GPT2_SPLIT, False),
    "smollm": (True, _GPT2_SPLIT, False),
    "llama-bpe": (False, _LLAMA3_SPLIT, True),
    "llama3": (False, _LLAMA3_SPLIT, True),
}
# llama.cpp's token types
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


def read_gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in the metadata of a ``.gguf`` file.

    Raises:
        CheckpointError: the file or its tokenizer is damaged, or the tokenizer is of a kind that is not read.
    """
    meta = GgufFile(path).metadata
    kind, split = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre", "default")
    tokens = meta.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or (kind == "gpt2" and split not in _SPLITS):
        raise CheckpointError(
            f"{path}: tokenizer {kind!r} with pre-tokenizer {split!r} is not read; known: 'llama', and 'gpt2' with "
            f"{', '.join(sorted(_SPLITS))}; load the original tokenizer.json instead"
        )
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"{path}: the tokenizer's tokens are missing or damaged")
    try:
        backend = _byte_level(path, meta, tokens, split) if kind == "gpt2" else _sentencepiece(path, meta, tokens)
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception: a merge names a piece that is not there
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: the tokenizer's merges do not fit its tokens: {reason}") from error
    types = meta.get("tokenizer.ggml.token_type") or []
    for token, type_ in zip(tokens, types, strict=False):
        if type_ in (_UNKNOWN, _CONTROL):
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif type_ == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])
    special = _special_tokens(meta, tokens)
    if "bos" in special and meta.get("tokenizer.ggml.add_bos_token", kind == "llama") is True:
        bos = special["bos"]
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, tokens.index(bos))]
        )
    template, longest = meta.get("tokenizer.chat_template"), meta.get("llama.context_length")
    return Tokenizer(
        backend,
        TokenizerSettings(
            special,
            chat_template=template if isinstance(template, str) else None,
            max_length=longest if isinstance(longest, int) else None,
        ),
    )


def _byte_level(path: Path, meta: dict[str, Any], tokens: list[str], split: str) -> Backend:
    merges = meta.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise CheckpointError(f"{path}: the tokenizer's merges are missing")
    single_digits, pattern, whole_words = _SPLITS[split]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab, pairs_of(path, merges), ignore_merges=whole_words))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    steps += [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(path: Path, meta: dict[str, Any], tokens: list[str]) -> Backend:
    scores = meta.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError(f"{path}: the tokenizer's scores are missing or not one for each token")
    unknown = meta.get("tokenizer.ggml.unknown_token_id", 0)
    unknown_token = tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None
    ids = {token: i for i, token in enumerate(tokens)}
    backend = Backend(
        models.BPE(ids, merges_by_score(tokens, scores), unk_token=unknown_token, fuse_unk=True, byte_fallback=True)
    )
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if meta.get("tokenizer.ggml.add_space_prefix", True) is not False:
        steps.insert(0, normalizers.Prepend("▁"))
        undo.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(undo)
    return backend


def merges_by_score(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece keeps a score for each piece in place of merges: two neighbours join if the piece they make has the
    best score. As merges: every way to split a piece in two pieces, by falling score of the whole."""
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [
        (-scores[i], ids[token[:cut]], ids[token[cut:]])
        for token, i in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [(tokens[left], tokens[right]) for _, left, right in sorted(merges)]


def _special_tokens(meta: dict[str, Any], tokens: list[str]) -> dict[str, str]:
    """Role -> token, by the ids that the file gives."""
    keys = {**{role: role for role in SPECIAL_TOKENS}, "pad": "padding", "unk": "unknown", "sep": "seperator"}
    given = {role: meta.get(f"tokenizer.ggml.{key}_token_id") for role, key in keys.items()}
    return {role: tokens[i] for role, i in given.items() if isinstance(i, int) and 0 <= i < len(tokens)}


def pairs_of(path: Path, merges: list[Any]) -> list[tuple[str, str]]:
    """The two pieces that each merge joins, from lines such as ``th e``.

    Raises:
        CheckpointError: a merge is not two pieces.
    """
    pairs = []
    for merge in merges:
        pieces = merge.split(" ") if isinstance(merge, str) else ()
        if len(pieces) != 2:
            raise CheckpointError(f"{path}: expected a merge of two pieces, got {merge!r}")
        pairs.append((pieces[0], pieces[1]))
    return pairs
