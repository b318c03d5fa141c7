"""Where a checkpoint is: a local path, a short name of pinned weights, or a model of the Hugging Face hub.

What is on this machine is always used first. The network is asked only for a hub model that the hub's cache does not
hold completely, and never when ``HF_HUB_OFFLINE`` is set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from transfuse import weights
from transfuse.errors import CheckpointError
from transfuse.models.checkpoint import INDEX, PICKLE_REMEDY, PICKLE_SUFFIXES, WEIGHTS, read_json

SHORT_NAMES = ("minilm", "smollm2")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "source.spm",
    "target.spm",
    "target_vocab.json",
)
_MODEL_FILES = ("config.json", "generation_config.json", INDEX, WEIGHTS)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def locate_model(path_or_id: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local folder or ``.gguf`` file of a model, fetched first where it is not on this machine yet.

    Raises:
        CheckpointError: it cannot be found or fetched; the message says where it was looked for.
    """
    path = _local(path_or_id)
    if path is None:
        return _from_hub(str(path_or_id), revision, (*_MODEL_FILES, *TOKENIZER_FILES), _model_is_complete)
    if path.is_file():
        if path.suffix in PICKLE_SUFFIXES:
            raise CheckpointError(f"{path}: pickled weights are not read; {PICKLE_REMEDY}")
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path}: expected a folder with config.json or a .gguf file, got another file")
    return path


def locate_tokenizer(path_or_id: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local folder of a tokenizer's files, or the ``.gguf`` file that holds one; see ``locate_model``."""
    path = _local(path_or_id)
    if path is None:
        return _from_hub(str(path_or_id), revision, TOKENIZER_FILES, _tokenizer_is_complete)
    if path.is_file() and path.suffix != ".gguf":
        raise CheckpointError(f"{path}: expected a folder with tokenizer files or a .gguf file, got another file")
    return path


def _local(path_or_id: str | os.PathLike[str]) -> Path | None:
    """The path as given, or that of pinned weights; None where it can only be a hub id."""
    text = os.fspath(path_or_id) if isinstance(path_or_id, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise CheckpointError(f"expected a path, a short name or a hub id, got {path_or_id!r}")
    path = Path(os.path.expanduser(text))  # unlike Path.expanduser it leaves an unknown user's ~ alone
    try:
        if path.exists():
            return path
    except OSError as error:  # a name too long, a folder that may not be entered
        raise CheckpointError(f"{text[:200]}: cannot be looked up: {error.strerror}") from error
    if text in SHORT_NAMES:
        return weights.fetch(text)
    if isinstance(path_or_id, os.PathLike) or not _HUB_ID.fullmatch(text) or path.suffix in (".gguf", *PICKLE_SUFFIXES):
        raise CheckpointError(
            f"{text}: no such file or folder; give a local path, a short name ({', '.join(SHORT_NAMES)}) or a hub id "
            "such as 'owner/name'"
        )
    return None


def _model_is_complete(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    return (folder / WEIGHTS).is_file() or ((folder / INDEX).is_file() and not _missing_shards(folder))


def _missing_shards(folder: Path) -> list[str]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    named = weight_map.values() if isinstance(weight_map, dict) else ()
    return sorted({name for name in named if isinstance(name, str) and not (folder / name).is_file()})


def _tokenizer_is_complete(folder: Path) -> bool:
    whole = ("tokenizer.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "target.spm")
    return any((folder / name).is_file() for name in whole)


def _from_hub(model: str, revision: str | None, files: tuple[str, ...], complete: Callable[[Path], bool]) -> Path:
    from huggingface_hub import constants

    cached = _snapshot(model, revision, files, local_only=True)
    if isinstance(cached, Path) and complete(cached):
        return cached
    looked = f"{model}: no such local path, not a short name ({', '.join(SHORT_NAMES)}), not in the hub's cache"
    looked += f" ({constants.HF_HUB_CACHE})"
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise CheckpointError(f"{looked}, and HF_HUB_OFFLINE is set; unset it, or run `hf download {model}` elsewhere")
    folder = _snapshot(model, revision, files, local_only=False)
    if isinstance(folder, Path) and (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        folder = _snapshot(model, revision, (*files, *_missing_shards(folder)), local_only=False)
    if isinstance(folder, str):
        raise CheckpointError(f"{looked}, and the hub did not give it ({folder}); check the name and the network")
    if not complete(folder):
        raise CheckpointError(
            f"{model}: the hub has this model, but not all of what is needed (config.json and safetensors weights, or "
            f"tokenizer.json); pickled weights are not read: {PICKLE_REMEDY}"
        )
    return folder


def _snapshot(model: str, revision: str | None, files: tuple[str, ...], *, local_only: bool) -> Path | str:
    """The hub's local folder of a model with ``files``, or in one line why there is none."""
    from huggingface_hub import errors, snapshot_download

    # The client's own exceptions have no common base; those of its HTTP library are among them as HTTPError.
    kinds = (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception))
    theirs: tuple[type[Exception], ...] = (OSError, *kinds)
    try:
        folder = snapshot_download(model, revision=revision, allow_patterns=list(files), local_files_only=local_only)
    except theirs as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return Path(folder)
