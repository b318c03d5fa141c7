"""The command ``transfuse``: doctor, demo, generate, embed.

A user's mistake is one line on stderr and exit status 2, never a traceback; ``TRANSFUSE_DEBUG=1`` shows it anyway.
Status 1 says that something was found wrong (an op over its error budget, a broken backend), 130 that Ctrl-C ended it.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from transfuse._version import __version__
from transfuse.backends import NAMES, use_backend
from transfuse.errors import ArgumentError, TransfuseError

_TABLE_TEXTS = 16  # similarities of more do not fit a line
OK, WRONG, MISTAKE, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141
_MAX_SEED = 2**63 - 1


class _Group(TyperGroup):
    """Commands whose mistakes end in one line and a status."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False  # mistakes come here as exceptions
        try:
            status = super().main(*args, **kwargs)
        except Exception as error:
            # typer either depends on click or carries a copy of it: its usage errors are known by what they can do.
            if not hasattr(error, "format_message"):
                raise
            status = _say_mistake(error.format_message(), error)
        sys.exit(status if isinstance(status, int) else OK)

    def invoke(self, ctx: Any) -> Any:
        try:
            if sys.stdout is None:
                raise ArgumentError("standard output is closed")
            super().invoke(ctx)
            sys.stdout.flush()
        except TransfuseError as error:
            raise typer.Exit(_say_mistake(str(error), error)) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(INTERRUPTED) from error
        except BrokenPipeError as error:
            _leave_output()
            raise typer.Exit(PIPE_CLOSED) from error
        except OSError as error:
            _leave_output()
            raise typer.Exit(_say_mistake(f"cannot go on: {error}", error)) from error


def _leave_output() -> None:
    """Write what is pending; where that cannot be, the interpreter's own flush at exit must not complain about it."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say_mistake(message: str, error: BaseException) -> int:
    """Print one line; returns the exit status of a user's mistake."""
    if os.environ.get("TRANSFUSE_DEBUG") == "1":
        raise error
    if message:  # without a command typer shows the help and has nothing to add
        console = Console(stderr=True, highlight=False)
        console.print(f"[red]error:[/red] {escape(' '.join(message.split()))}", soft_wrap=True)
    return MISTAKE


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fused transformer kernels: what runs here, a demo, text and embeddings.",
    epilog="Exit status: 0 fine, 1 something was found wrong, 2 a mistake. TRANSFUSE_DEBUG=1 shows tracebacks.",
)


def main() -> None:
    """The entry point of the command ``transfuse``."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal of another encoding shows "?" for what it lacks
        sys.stdout.reconfigure(errors="replace")
    app(prog_name="transfuse")


class Dtype(str, Enum):
    """What ``--dtype`` takes."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Format(str, Enum):
    """What ``embed --format`` takes."""

    jsonl = "jsonl"
    table = "table"


class Pooling(str, Enum):
    """What ``embed --pooling`` takes."""

    mean = "mean"
    max = "max"
    first = "first"
    last = "last"


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"transfuse {__version__}")
        raise typer.Exit(OK)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Options of the command itself."""


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


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Which backends work here, exactly why the others do not, and what to do about it."""
    from transfuse import doctor as examination

    report = examination.examine()
    if as_json:
        typer.echo(json.dumps(report, indent=2, default=str))
    else:
        examination.show(report, _console())
    if not examination.healthy(report):
        raise typer.Exit(WRONG)


@app.command()
def demo(
    weights: Annotated[
        bool,
        typer.Option("--weights", help="Real models, MiniLM and SmolLM2 (fetched once, 180 MB), instead of training."),
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps.", show_default="1200, half a minute")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=_MAX_SEED, help="Of everything random.")] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the pictures go.")] = Path(),
    backend: Backend = None,
) -> None:
    """Check and time every op, train a small Shakespeare model, stream from it, draw its attention."""
    from transfuse import demo as show
    from transfuse.demo.shakespeare import Recipe

    if backend is not None:
        use_backend(backend)
    recipe = Recipe() if steps is None else Recipe(steps=steps)
    if not show.run(_console(), seed=seed, recipe=recipe, out=out, weights=weights):
        raise typer.Exit(WRONG)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The text to continue.", show_default="standard input")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from a file.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a question: use the model's chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: who the model is to be.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Stop after so many tokens.")] = 100,
    temperature: Annotated[
        float | None, typer.Option(help="Divides the scores before drawing; 0 is greedy.", show_default="greedy")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest that together reach this.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens less likely than this times the likeliest.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: repeat less.")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(min=0, max=_MAX_SEED, help="Of the drawing.", show_default="a new one")
    ] = None,
    backend: Backend = None,
    device: Device = None,
    dtype: DtypeOption = None,
) -> None:
    """Continue a text, streamed as it is made. Greedy, unless a temperature or a top is given."""
    from transfuse.generation.settings import Settings

    # Mistakes in the options are told before a model is fetched or loaded.
    Settings(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty,
    )  # fmt: skip
    if system is not None and not chat:
        raise ArgumentError("--system needs --chat")
    text = _one_text(prompt, file)
    place = _prepare(backend, device)
    from transfuse import tasks
    from transfuse.models import Decoder, Seq2Seq

    loaded, tokenizer = _load(model, place, dtype)
    if not isinstance(loaded, Decoder | Seq2Seq):
        kind = type(loaded).__name__
        raise ArgumentError(f"{model} holds an {kind}, which cannot generate text; try `transfuse embed {model}`")
    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        text = tokenizer.apply_chat_template([*messages, {"role": "user", "content": text}])
    generator = torch.Generator(place)
    generator.manual_seed(generator.seed() if seed is None else seed)
    pieces = tasks.stream_text(
        loaded, tokenizer, text, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, repetition_penalty=repetition_penalty, generator=generator, add_special_tokens=not chat,
    )  # fmt: skip
    began, written = time.perf_counter(), ""
    for piece in pieces:
        written += piece
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    if sys.stderr.isatty():
        count, seconds = len(tokenizer.encode(written, add_special_tokens=False)), time.perf_counter() - began
        Console(stderr=True, highlight=False).print(f"[dim]{count} tokens, {count / seconds:.1f} a second[/dim]")


@app.command()
def embed(
    model: Model,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT...", help="Texts; none: a text a line of standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read a text a line from a file. Empty lines are skipped.")] = None,
    as_format: Annotated[
        Format, typer.Option("--format", help="jsonl: an object a text. table: cosine similarities.")
    ] = Format.jsonl,
    pooling: Annotated[
        Pooling, typer.Option(help="What stands for a text: over its tokens, or one of them.")
    ] = Pooling.mean,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at a time.")] = 32,
    backend: Backend = None,
    device: Device = None,
    dtype: DtypeOption = None,
) -> None:
    """Turn texts into vectors of length 1, whose dot product is their similarity."""
    lines = _many_texts(texts, file)
    if as_format is Format.table and len(lines) > _TABLE_TEXTS:
        raise ArgumentError(f"a table holds at most {_TABLE_TEXTS} texts, got {len(lines)}; use --format jsonl")
    place = _prepare(backend, device)
    from transfuse import tasks

    loaded, tokenizer = _load(model, place, dtype)
    vectors = tasks.embed(loaded, tokenizer, lines, batch_size=batch_size, pooling=pooling.value).float().cpu()
    if as_format is Format.table:
        from transfuse.demo.printing import similarity_table

        _console().print(similarity_table(lines, vectors))
        return
    for text, vector in zip(lines, vectors.tolist(), strict=True):
        typer.echo(json.dumps({"text": text, "embedding": vector}, ensure_ascii=False))


class _Console(Console):
    """A console that leaves a closed pipe to :class:`_Group`."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _console() -> Console:
    """Standard output; wide enough for tables where it is no terminal."""
    terminal = sys.stdout.isatty() or os.environ.get("COLUMNS")
    return _Console(highlight=False, width=None if terminal else 120)


def _prepare(backend: str | None, device: str | None) -> torch.device:
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


def _load(name: str, device: torch.device, dtype: Dtype | None) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    from transfuse.models import from_pretrained, load_tokenizer

    tokenizer = load_tokenizer(name)
    return from_pretrained(name, dtype=None if dtype is None else getattr(torch, dtype.value), device=device), tokenizer


def _one_text(given: str | None, file: Path | None) -> str:
    """The prompt: an option, a file, or standard input."""
    if given is not None and file is not None:
        raise ArgumentError("give --prompt or --file, not both")
    text = given if given is not None else _read(file, "--prompt or --file")
    if given is None:
        text = text.removesuffix("\n")
    if not text.strip():
        raise ArgumentError("the prompt is empty; give --prompt, --file, or text on standard input")
    return text


def _many_texts(given: list[str] | None, file: Path | None) -> list[str]:
    """The texts: arguments, or the lines of a file or of standard input that are not empty."""
    if given and file is not None:
        raise ArgumentError("give texts as arguments or --file, not both")
    lines = given or [line for line in _read(file, "texts or --file").splitlines() if line.strip()]
    if not any(line.strip() for line in lines):
        raise ArgumentError("there is no text; give texts as arguments, --file, or lines on standard input")
    return lines


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
