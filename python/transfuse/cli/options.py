"""What the commands share: their options, where text comes from, and the model with its tokenizer."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from transfuse.backends import NAMES, use_backend
from transfuse.errors import ArgumentError

MAX_SEED = 2**63 - 1


class Dtype(str, Enum):
    """What ``--dtype`` takes."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Format(str, Enum):
    """What ``--format`` takes."""

    text = "text"
    jsonl = "jsonl"


Backend = Annotated[str | None, typer.Option(help=f"Force a backend: {', '.join(NAMES)}.", show_default="automatic")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="a GPU if there is one")]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Of the weights.", show_default="the checkpoint's")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a .gguf file, a Hugging Face id, or a pinned model: minilm, smollm2.",
        show_default=False,
    ),
]
Texts = Annotated[
    list[str] | None, typer.Argument(metavar="TEXT...", help="Texts; none: a text a line of standard input.")
]
Lines = Annotated[Path | None, typer.Option(help="Read a text a line from a file. Empty lines are skipped.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts at a time.")]
OutputFormat = Annotated[
    Format, typer.Option("--format", help="text: lines for people, tabs between fields. jsonl: an object a text.")
]
Seed = Annotated[int | None, typer.Option(min=0, max=MAX_SEED, help="Of the drawing.", show_default="a new one")]
Knob = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Any other knob of GenerationConfig, such as num_beams=4 or no_repeat_ngram_size=3. May be repeated.",
        show_default=False,
    ),
]


class _Console(Console):
    """A console that leaves a closed pipe to the command's own handling."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console() -> Console:
    """Standard output; wide enough for tables where it is no terminal."""
    terminal = sys.stdout.isatty() or os.environ.get("COLUMNS")
    return _Console(highlight=False, width=None if terminal else 120)


def place_of(backend: str | None, device: str | None) -> torch.device:
    """Force the backend, and say where the model goes."""
    if backend is not None:
        use_backend(backend)
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ArgumentError(f"--device: expected cpu, cuda or cuda:N, got {device!r}") from error
    if place.type not in ("cpu", "cuda"):
        raise ArgumentError(f"--device: expected cpu, cuda or cuda:N, got {device!r}")
    if place.type == "cuda" and (place.index or 0) >= (torch.cuda.device_count() if torch.cuda.is_available() else 0):
        raise ArgumentError(f"--device: there is no GPU {place.index or 0} here; `transfuse doctor` tells why")
    return place


def load(name: str, device: torch.device, dtype: Dtype | None) -> tuple[Any, Any]:
    """A model, with the head that its checkpoint has, and its tokenizer."""
    from transfuse.models import from_pretrained, load_tokenizer

    tokenizer = load_tokenizer(name)
    wanted = None if dtype is None else getattr(torch, dtype.value)
    return from_pretrained(name, dtype=wanted, device=device), tokenizer


def knobs_of(given: list[str] | None, **named: Any) -> dict[str, Any]:
    """The knobs of generation that options name, checked before a model is fetched or loaded.

    Raises:
        ArgumentError: there is no such knob, it is given twice, or a value is out of its range.
    """
    from transfuse.generation import GenerationConfig

    knobs = {name: value for name, value in named.items() if value is not None}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not equals or name in knobs:
            raise ArgumentError(f"--knob: expected NAME=VALUE, each name once, got {text!r}")
        try:
            knobs[name] = json.loads(value)
        except ValueError:
            knobs[name] = value
    GenerationConfig().replaced(knobs)
    return knobs


def one_text(given: str | None, file: Path | None, option: str = "--prompt") -> str:
    """One text: an option or argument, a file, or standard input."""
    if given is not None and file is not None:
        raise ArgumentError(f"give {option} or --file, not both")
    text = given if given is not None else _read(file, f"{option} or --file")
    if given is None:
        text = text.removesuffix("\n")
    if not text.strip():
        name = "prompt" if option == "--prompt" else "text"
        raise ArgumentError(f"the {name} is empty; give {option}, --file, or text on standard input")
    return text


def many_texts(given: list[str] | None, file: Path | None) -> list[str]:
    """The texts: arguments, or the lines of a file or of standard input that are not empty."""
    if given and file is not None:
        raise ArgumentError("give texts as arguments or --file, not both")
    lines = given or [line for line in _read(file, "texts or --file").splitlines() if line.strip()]
    if not any(line.strip() for line in lines):
        raise ArgumentError("there is no text; give texts as arguments, --file, or lines on standard input")
    return lines


def write_objects(objects: Iterable[dict[str, Any]]) -> None:
    """An object a line."""
    for values in objects:
        typer.echo(json.dumps(values, ensure_ascii=False))


def write_lines(rows: Iterable[Iterable[object]]) -> None:
    """A row a line, tabs between its fields; white space inside a field is one space."""
    for row in rows:
        typer.echo("\t".join(" ".join(_field(value).split()) for value in row))


def _field(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _read(file: Path | None, instead: str) -> str:
    """A UTF-8 file, or standard input if there is none."""
    if file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise ArgumentError(f"give {instead}, or pipe text in")
    name = "standard input" if file is None else str(file)
    try:
        data = sys.stdin.buffer.read() if file is None else file.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise ArgumentError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{name} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}") from error
