"""Tables and streamed text on a rich console."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterable, Sequence

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from transfuse.demo.checks import Error, Result


def plain_table() -> Table:
    """A table without lines, which reads well on a terminal and in a file."""
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")


def check_table(results: Sequence[Result]) -> Table:
    """Errors, budgets and times of ops; red where an error exceeds its budget."""
    table = plain_table()
    table.add_column("op", no_wrap=True)
    table.add_column("error ≤ budget", no_wrap=True)
    table.add_column("of gradients", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("PyTorch", justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result.name,
            _error(result.forward),
            _error(result.backward),
            f"{result.milliseconds:.2f}",
            f"{result.torch_milliseconds:.2f}",
            style=None if result.ok else "red",
        )
    return table


def _error(error: Error) -> str:
    return f"{error.error:.0e} {'≤' if error.ok else '>'} {error.budget:.0e}"


def similarity_table(texts: Sequence[str], vectors: torch.Tensor) -> Table:
    """Cosine similarities of texts, each known by its number; above 0.5 in bold.

    Args:
        texts: n of them.
        vectors: (n, dim), of length 1.
    """
    similar = (vectors.double() @ vectors.double().T).tolist()
    table = plain_table()
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("text", overflow="fold")
    for number in range(1, len(texts) + 1):
        table.add_column(str(number), justify="right", no_wrap=True)
    for number, (text, row) in enumerate(zip(texts, similar, strict=True), start=1):
        cells = [f"[bold]{s:.2f}[/bold]" if s > 0.5 and i != number else f"{s:.2f}" for i, s in enumerate(row, start=1)]
        table.add_row(str(number), escape(textwrap.shorten(text, 36, placeholder=" …")), *cells)
    return table


def write_stream(console: Console, opening: str, pieces: Iterable[str], unit: str) -> None:
    """Write pieces of text as they come, then how many of them came and how fast.

    Args:
        opening: written first.
        pieces: text to write; raw, nothing in it is markup.
        unit: what to call the pieces.
    """
    began, count = time.perf_counter(), 0
    console.file.write(opening)
    for piece in pieces:
        console.file.write(piece)
        console.file.flush()
        count += 1
    console.file.write("\n")
    console.print(f"[dim]{count} {unit} at {count / (time.perf_counter() - began):,.0f} a second[/dim]")
