"""Writes a checkpoint folder: config.json, and the weights in one safetensors file or in shards that an index names.

All files are first written in full beside their final names and then renamed. A crash or a full disk before that leaves
the old checkpoint untouched. A crash among the renames of a single file's checkpoint leaves the old weights or the new
ones; of shards, which cannot be renamed at once, it leaves no index: a folder that says what it lacks, never a mixture.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from transfuse.errors import ArgumentError, CheckpointError
from transfuse.models.checkpoint import INDEX, WEIGHTS

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def write_checkpoint(
    folder: Path, tensors: dict[str, torch.Tensor], files: dict[str, dict[str, Any]], max_shard_size: int | str
) -> None:
    """Write ``files`` (name -> JSON object) and ``tensors`` as the weights, in shards of at most ``max_shard_size``.

    Raises:
        ArgumentError: max_shard_size is no size. CheckpointError: the folder cannot be written.
    """
    shards = _shards(tensors, max_shard_size)
    contents = dict(files)
    if len(shards) > 1:
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        contents = {INDEX: index, **files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
            new = Path(scratch)
            for file, names in shards.items():
                save_file({name: tensors[name] for name in names}, new / file, metadata={"format": "pt"})
            for file, values in contents.items():
                text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
                (new / file).write_text(text, encoding="utf-8")
            if INDEX in contents:
                (folder / INDEX).unlink(missing_ok=True)
            for file in (*shards, *contents):
                (new / file).replace(folder / file)
            _remove_old(folder, {*shards, *contents})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot write the model: {error}") from error


def _shards(tensors: dict[str, torch.Tensor], max_shard_size: int | str) -> dict[str, list[str]]:
    """File name -> the names of its tensors."""
    from huggingface_hub import split_torch_state_dict_into_shards

    size: int | str = max_shard_size
    if isinstance(size, bool) or not isinstance(size, (int, str)) or (isinstance(size, int) and size < 1):
        raise ArgumentError(f"save_pretrained: max_shard_size must be bytes or a string like '5GB', got {size!r}")
    try:
        split = split_torch_state_dict_into_shards(
            tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=size
        )
    except ValueError as error:
        raise ArgumentError(
            f"save_pretrained: max_shard_size must be bytes or a string like '5GB', got {size!r} ({error})"
        ) from None
    return dict(split.filename_to_tensors)


def _remove_old(folder: Path, new: set[str]) -> None:
    """Weights of an earlier checkpoint, which would be read instead or by nobody."""
    for path in folder.iterdir():
        if path.name not in new and (path.name in (WEIGHTS, INDEX) or _SHARD.fullmatch(path.name)):
            path.unlink()
