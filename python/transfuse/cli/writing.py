"""The commands that write text: generate, translate, summarize. And count, which says how long texts are."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from transfuse.cli.options import (
    Backend,
    BatchSize,
    Device,
    DtypeOption,
    Format,
    Knob,
    Lines,
    Model,
    OutputFormat,
    Seed,
    Texts,
    knobs_of,
    load,
    many_texts,
    one_text,
    place_of,
    write_lines,
    write_objects,
)
from transfuse.errors import ArgumentError

MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", "-n", help="Stop after so many tokens.", show_default="the model's")
]
NumBeams = Annotated[
    int | None, typer.Option(help="Follow so many continuations at a time.", show_default="the model's")
]


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
        float | None,
        typer.Option(help="Divides the scores before drawing; 0 is greedy.", show_default="the model's, else greedy"),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest that together reach this.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens less likely than this times the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None,
    knob: Knob = None,
    seed: Seed = None,
    backend: Backend = None,
    device: Device = None,
    dtype: DtypeOption = None,
) -> None:
    """Continue a text, streamed as it is made. Greedy, unless a temperature, a top or the model asks for drawing."""
    knobs = knobs_of(
        knob, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty,
    )  # fmt: skip
    if system is not None and not chat:
        raise ArgumentError("--system needs --chat")
    text = one_text(prompt, file)
    place = place_of(backend, device)
    from transfuse import tasks
    from transfuse.generation.settings import settings_of
    from transfuse.models import Decoder, Seq2Seq

    loaded, tokenizer = load(model, place, dtype)
    if not isinstance(loaded, Decoder | Seq2Seq):
        kind = type(loaded).__name__
        raise ArgumentError(f"{model} holds an {kind}, which cannot generate text; try `transfuse embed {model}`")
    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        text = tokenizer.apply_chat_template([*messages, {"role": "user", "content": text}])
    settings = {"add_special_tokens": not chat, "generator": _generator(place, seed), **knobs}
    began, written = time.perf_counter(), ""
    asked = settings_of(loaded, None).replaced(knobs)
    if asked.num_beams == asked.num_return_sequences == 1:
        for piece in tasks.stream_text(loaded, tokenizer, text, **settings):
            written += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    else:  # beams are ranked at the end, and several texts would be mixed
        texts = tasks.generate(loaded, tokenizer, text, **settings)
        written = "\n".join(texts)
        typer.echo(written)
    if sys.stderr.isatty():
        count, seconds = len(tokenizer.encode(written, add_special_tokens=False)), time.perf_counter() - began
        Console(stderr=True, highlight=False).print(f"[dim]{count} tokens, {count / seconds:.1f} a second[/dim]")


def translate(
    model: Model,
    texts: Texts = None,
    file: Lines = None,
    source: Annotated[str | None, typer.Option(help="The texts' language, where the model knows several: en")] = None,
    target: Annotated[str | None, typer.Option(help="The language to translate to: de")] = None,
    prefix: Annotated[
        str | None, typer.Option(help="What to write before every text instead.", show_default="the checkpoint's")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    num_beams: NumBeams = None,
    knob: Knob = None,
    seed: Seed = None,
    as_format: OutputFormat = Format.text,
    batch_size: BatchSize = 32,
    backend: Backend = None,
    device: Device = None,
    dtype: DtypeOption = None,
) -> None:
    """Translate texts, a line each."""
    knobs = knobs_of(knob, max_new_tokens=max_new_tokens, num_beams=num_beams)
    lines = many_texts(texts, file)
    place = place_of(backend, device)
    from transfuse import tasks

    loaded, tokenizer = load(model, place, dtype)
    written = tasks.translate(
        loaded, tokenizer, lines, source=source, target=target, prefix=prefix, batch_size=batch_size,
        generator=_generator(place, seed), **knobs,
    )  # fmt: skip
    _write(lines, written, "translation", as_format)


def summarize(
    model: Model,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT...", help="Texts; none: standard input is one text.")
    ] = None,
    file: Annotated[list[Path] | None, typer.Option(help="Read a text from a file. May be repeated.")] = None,
    prefix: Annotated[
        str | None, typer.Option(help="What to write before every text.", show_default="the checkpoint's")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    num_beams: NumBeams = None,
    knob: Knob = None,
    seed: Seed = None,
    as_format: OutputFormat = Format.text,
    batch_size: BatchSize = 32,
    backend: Backend = None,
    device: Device = None,
    dtype: DtypeOption = None,
) -> None:
    """Summarize texts: each file, or standard input, is one."""
    knobs = knobs_of(knob, max_new_tokens=max_new_tokens, num_beams=num_beams)
    if texts and file:
        raise ArgumentError("give texts as arguments or --file, not both")
    files: list[Path | None] = [*file] if file else [None]
    whole = texts or [one_text(None, path, "texts") for path in files]
    place = place_of(backend, device)
    from transfuse import tasks

    loaded, tokenizer = load(model, place, dtype)
    written = tasks.summarize(
        loaded, tokenizer, whole, prefix=prefix, batch_size=batch_size, generator=_generator(place, seed), **knobs
    )
    _write(whole, written, "summary", as_format)


def count(
    model: Model,
    texts: Texts = None,
    file: Lines = None,
    special: Annotated[bool, typer.Option(help="Count what the model expects around a text too.")] = True,
    as_format: OutputFormat = Format.text,
) -> None:
    """Count the tokens of texts, and of all of them together. Loads the tokenizer alone."""
    lines = many_texts(texts, file)
    from transfuse import tasks
    from transfuse.models import load_tokenizer

    counts = tasks.count_tokens(load_tokenizer(model), lines, add_special_tokens=special)
    if as_format is Format.jsonl:
        write_objects({"text": text, "tokens": number} for text, number in zip(lines, counts, strict=True))
        return
    write_lines(zip(counts, lines, strict=True))
    if len(lines) > 1:
        write_lines([(sum(counts), "total")])


def _generator(place: torch.device, seed: int | None) -> torch.Generator:
    generator = torch.Generator(place)
    return generator.manual_seed(generator.seed() if seed is None else seed)


def _write(texts: list[str], written: list[str], name: str, as_format: Format) -> None:
    """What was written for each text, several ones below one another."""
    copies = len(written) // len(texts)
    groups: list[tuple[str, Any]] = [(text, written[i * copies : (i + 1) * copies]) for i, text in enumerate(texts)]
    if as_format is Format.jsonl:
        write_objects({"text": text, name: group[0] if copies == 1 else group} for text, group in groups)
    else:
        write_lines([line] for _, group in groups for line in group)
