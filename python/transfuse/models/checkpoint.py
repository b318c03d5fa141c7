"""Reads safetensors checkpoints: one file, or shards named by an index. Headers first, tensors only when asked.

Everything about a checkpoint that can be wrong is found out from the headers, before a byte of a tensor is read:
the ``safetensors`` library checks each file (header length, JSON, dtypes, shapes, offsets, no holes, no trailing bytes)
and this module checks what lies between files (duplicate names, missing shards, paths that leave the folder).
Pickled weights are refused: unpickling runs whatever code the file holds.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from transfuse.errors import CheckpointError, TransfuseError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_JSON_BYTES = 100 << 20  # the bound that the safetensors format itself sets for a header

# safetensors' names of the dtypes that a floating-point parameter may be stored in.
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor. ``dtype`` is the file's own name for it: "F32", "BF16", "Q4_1", ..."""

    shape: tuple[int, ...]
    dtype: str


class TensorSource(ABC):
    """A checkpoint that is open for reading: names, shapes and dtypes at once, tensors one at a time."""

    path: Path
    entries: Mapping[str, TensorInfo]
    readable: Collection[str]  # the dtypes, as entries name them, that a parameter may be stored in

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """The tensor called ``name`` on the CPU, in the dtype that it is stored in (fp32 where it is quantised)."""


class SafetensorsSource(TensorSource):
    """The tensors of one or more safetensors files, each name in exactly one of them.

    Raises:
        CheckpointError: a file is missing, damaged or repeats a name.
    """

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path = path
        self.readable: Collection[str] = FLOAT_DTYPES
        self.entries: dict[str, TensorInfo] = {}
        self._file_of: dict[str, Path] = {}
        self._opened: dict[Path, Any] = {}
        for file in files:
            for name, info in read_header(file).items():
                if name in self._file_of:
                    raise CheckpointError(f"{path}: {name} is in both {self._file_of[name].name} and {file.name}")
                self.entries[name] = info
                self._file_of[name] = file

    def read(self, name: str) -> torch.Tensor:
        """The tensor called ``name``, on the CPU. It may map the file: copy it before the file can change.

        Raises:
            CheckpointError: the file changed or disappeared since its header was read.
        """
        file = self._file_of[name]
        try:
            if file not in self._opened:
                self._opened[file] = safe_open(file, framework="pt", device="cpu")
            return self._opened[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: cannot read {name}: {error}") from error


def open_safetensors(folder: Path) -> SafetensorsSource:
    """Open the weights of a checkpoint folder: ``model.safetensors``, else the shards that its index names.

    Raises:
        CheckpointError: there are no weights, they are pickled, or a file or the index is damaged or unsafe.
    """
    if (folder / WEIGHTS).is_file():
        return SafetensorsSource(folder / WEIGHTS, [folder / WEIGHTS])
    if (folder / INDEX).is_file():
        return _open_shards(folder)
    raise _no_weights(folder)


def _open_shards(folder: Path) -> SafetensorsSource:
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: expected an object 'weight_map' of tensor name to file name")
    files = {shard: _shard_path(folder, shard) for shard in sorted(set(weight_map.values()))}
    if absent := [shard for shard, file in files.items() if not file.is_file()]:
        raise CheckpointError(
            f"{index}: {len(absent)} of {len(files)} shards are missing: {some(absent)}"
            f"{half_downloaded(folder)}; download the checkpoint again"
        )
    source = SafetensorsSource(index, list(files.values()))
    wrong = [name for name, shard in weight_map.items() if source._file_of.get(name) != files[shard]]
    if wrong:
        raise CheckpointError(f"{index}: {len(wrong)} tensors are not in the shard the index names: {some(wrong)}")
    return source


def _shard_path(folder: Path, shard: str) -> Path:
    """The path of a shard, which must lie in the folder (or, in the hub's cache, be a link into its blobs)."""
    pure = PurePosixPath(shard)
    if not shard or pure.is_absolute() or ".." in pure.parts or "\\" in shard or ":" in shard or "\0" in shard:
        raise CheckpointError(f"{folder / INDEX}: shard {shard!r} is not a path inside the checkpoint folder")
    path = folder / pure
    allowed = [folder.resolve()]
    if folder.parent.name == "snapshots":
        allowed.append((folder.parent.parent / "blobs").resolve())
    if not any(path.resolve().is_relative_to(root) for root in allowed):
        raise CheckpointError(f"{folder / INDEX}: shard {shard!r} is a link that leaves the checkpoint folder")
    return path


def _no_weights(folder: Path) -> CheckpointError:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    expected = f"{folder}: expected {WEIGHTS} or {INDEX}"
    if pickled := [name for name in names if name.endswith(PICKLE_SUFFIXES)]:
        return CheckpointError(f"{expected}, found only pickled weights ({pickled[0]}); {PICKLE_REMEDY}")
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return CheckpointError(f"{expected}, found {some(ggufs)}; pass the path of the .gguf file itself")
    if others := [name for name in names if name.endswith(".safetensors")]:
        return CheckpointError(f"{expected}, found {some(others)}; rename a single file to {WEIGHTS}")
    return CheckpointError(
        f"{expected}, found neither{half_downloaded(folder)}; pass the folder that holds the weights and config.json"
    )


def half_downloaded(folder: Path) -> str:
    """What to add to an error about a missing file: that a download into the folder was not finished, if it was not."""
    places = (folder, folder / ".cache" / "huggingface" / "download")
    parts = sorted(path.name for place in places if place.is_dir() for path in place.glob("*.incomplete"))
    return f" ({some(parts, 3)}: a download was cut off; start it again)" if parts else ""


PICKLE_REMEDY = (
    "a pickle can run any code when it is read, so convert it once where you trust it: "
    "transformers' AutoModel.from_pretrained(...).save_pretrained(folder) writes safetensors"
)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of the tensors in one safetensors file, from its header alone.

    Raises:
        CheckpointError: the file is missing or is not a valid safetensors file.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            entries = {n: TensorInfo(tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise CheckpointError(_damaged(file, str(error))) from error
    _refuse_duplicates(file)
    return entries


def _refuse_duplicates(file: Path) -> None:
    """The library keeps the last of two entries with one name; which one was meant nobody can know."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length)
    seen: set[str] = set()

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, value in pairs:
            if isinstance(value, dict) and key != "__metadata__":
                if key in seen:
                    raise CheckpointError(f"{file}: the header names {key} twice; write the file again")
                seen.add(key)
        return dict(pairs)

    try:
        json.loads(header, object_pairs_hook=once)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(_damaged(file, str(error))) from error


def _damaged(file: Path, reason: str) -> str:
    with file.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(b"version https://git-lfs"):
        return f"{file}: is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
    size = file.stat().st_size
    return f"{file}: not a valid safetensors file ({size} bytes: {reason.splitlines()[0][:200]}); download it again"


def read_json(file: Path, error_type: type[TransfuseError] = CheckpointError) -> dict[str, Any]:
    """A JSON object from ``file``.

    Raises:
        CheckpointError: (or ``error_type``) the file is missing, too large, not JSON or not an object.
    """
    try:
        if (size := file.stat().st_size) > MAX_JSON_BYTES:
            raise error_type(f"{file}: {size} bytes, expected at most {MAX_JSON_BYTES} for a JSON file")
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise error_type(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise error_type(f"{file}: not valid JSON: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise error_type(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def some(names: list[str], limit: int = 10) -> str:
    """The first names of a list and how many more there are: an error stays readable for any checkpoint."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
