"""The command ``transfuse``: doctor, demo, and a command a task.

A user's mistake is one line on stderr and exit status 2, never a traceback; ``TRANSFUSE_DEBUG=1`` shows it anyway.
Status 1 says that something was found wrong (an op over its error budget, a broken backend), 130 that Ctrl-C ended it.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from transfuse._version import __version__
from transfuse.backends import use_backend
from transfuse.cli import reading, writing
from transfuse.cli.options import MAX_SEED, Backend, console
from transfuse.errors import ArgumentError, TransfuseError

OK, WRONG, MISTAKE, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141


class _Group(TyperGroup):
    """Commands whose mistakes end in one line and a status."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False  # mistakes come here as exceptions
        try:
            status = super().main(*args, **kwargs)
        except SystemExit as end:  # what prints help and usage leaves this way when its reader is gone
            status = PIPE_CLOSED if isinstance(end.__context__, BrokenPipeError) else end.code
        except BrokenPipeError:
            _leave_output()
            status = PIPE_CLOSED
        except Exception as error:
            if type(error).__name__ == "Abort":  # Ctrl-C outside a command
                sys.exit(INTERRUPTED)
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
    help="Fused transformer kernels: what runs here, a demo, and what models do with text.",
    epilog="Exit status: 0 fine, 1 something was found wrong, 2 a mistake. TRANSFUSE_DEBUG=1 shows tracebacks.",
)


def main() -> None:
    """The entry point of the command ``transfuse``."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # so it was while the package was imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal of another encoding shows "?" for what it lacks
        sys.stdout.reconfigure(errors="replace")
    app(prog_name="transfuse")


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
        examination.show(report, console())
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
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of everything random.")] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the pictures go.")] = Path(),
    backend: Backend = None,
) -> None:
    """Check and time every op, train a small Shakespeare model, stream from it, draw its attention."""
    from transfuse import demo as show
    from transfuse.demo.shakespeare import Recipe

    if backend is not None:
        use_backend(backend)
    recipe = Recipe() if steps is None else Recipe(steps=steps)
    if not show.run(console(), seed=seed, recipe=recipe, out=out, weights=weights):
        raise typer.Exit(WRONG)


for command in (
    writing.generate,
    writing.translate,
    writing.summarize,
    reading.classify,
    reading.token_classify,
    reading.answer,
    reading.fill_mask,
    reading.embed,
    reading.attention,
    writing.count,
):
    app.command()(command)
