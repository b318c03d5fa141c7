"""The commands that read text and tell about it: classify, token-classify, answer, fill-mask, embed, attention."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from transfuse.cli.options import (
    Backend,
    BatchSize,
    Device,
    DtypeOption,
    Format,
    Lines,
    Model,
    OutputFormat,
    Texts,
    console,
    load,
    many_texts,
    one_text,
    place_of,
    write_lines,
    write_objects,
)
from transfuse.errors import ArgumentError

_TABLE_TEXTS = 16  # similarities of more do not fit a line


class EmbedFormat(str, Enum):
    """What ``embed --format`` takes."""

    jsonl = "jsonl"
    table = "table"


class Pooling(str, Enum):
    """What ``embed --pooling`` takes."""

    mean = "mean"
    max = "max"
    first = "first"
    last = "last"


class Kind(str, Enum):
    """What ``attention --kind`` takes."""

    encoder = "encoder"
    decoder = "decoder"
    cross = "cross"


def classify(
    model: Model,
    texts: Texts = None,
    file: Lines = None,
    top_k: Annotated[int, typer.Option(min=1, help="Classes of a text at most.")] = 1,
    multi_label: Annotated[
        bool | None,
        typer.Option(
            "--multi-label/--one-label", help="Each class by itself, or one of them.", show_default="the model's"
        ),
    ] = None,
    as_format: OutputFormat = Format.text,
    batch_size: BatchSize = 32,
    backend: Backend = None,
    device: Device = None,
    dtype: DtypeOption = None,
) -> None:
    """Tell the likeliest classes of texts: class, score, text."""
    lines = many_texts(texts, file)
    place = place_of(backend, device)
    from transfuse import tasks

    loaded, tokenizer = load(model, place, dtype)
    found = tasks.classify(loaded, tokenizer, lines, top_k=top_k, multi_label=multi_label, batch_size=batch_size)
    both = list(zip(lines, found, strict=True))
    if as_format is Format.jsonl:
        write_objects({"text": text, "labels": [asdict(label) for label in labels]} for text, labels in both)
    else:
        write_lines((label.label, label.score, text) for text, labels in both for label in labels)


def token_classify(
    model: Model,
    texts: Texts = None,
    file: Lines = None,
    each: Annotated[
        bool, typer.Option("--each", help="Every token by itself, not those of one thing together.")
    ] = False,
    as_format: OutputFormat = Format.text,
    batch_size: BatchSize = 32,
    backend: Backend = None,
    device: Device = None,
    dtype: DtypeOption = None,
) -> None:
    """Find names, places, ... in texts: number of the text, class, score, start, end, what stands there."""
    lines = many_texts(texts, file)
    place = place_of(backend, device)
    from transfuse import tasks

    loaded, tokenizer = load(model, place, dtype)
    aggregation = "none" if each else "simple"
    found = tasks.token_classify(loaded, tokenizer, lines, aggregation=aggregation, batch_size=batch_size)
    if as_format is Format.jsonl:
        both = zip(lines, found, strict=True)
        write_objects({"text": text, "entities": [asdict(entity) for entity in entities]} for text, entities in both)
    else:
        write_lines(
            (i, e.label, e.score, e.start, e.end, e.text) for i, entities in enumerate(found, 1) for e in entities
        )


def answer(
    model: Model,
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION...", help="About the text.", show_default=False)],
    context: Annotated[
        str | None, typer.Option("--context", "-c", help="The text.", show_default="standard input")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read the text from a file.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Answers of a question at most.")] = 1,
    max_answer_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer at most.")] = 15,
    no_answer: Annotated[
        bool, typer.Option("--no-answer", help="The text may hold no answer: an empty one then.")
    ] = False,
    as_format: OutputFormat = Format.text,
    batch_size: BatchSize = 32,
    backend: Backend = None,
    device: Device = None,
    dtype: DtypeOption = None,
) -> None:
    """Answer questions from a text: number of the question, score, start, end, answer."""
    text = one_text(context, file, "--context")
    place = place_of(backend, device)
    from transfuse import tasks

    loaded, tokenizer = load(model, place, dtype)
    found = tasks.answer(
        loaded, tokenizer, questions, text, top_k=top_k, max_answer_tokens=max_answer_tokens, no_answer=no_answer,
        batch_size=batch_size,
    )  # fmt: skip
    if as_format is Format.jsonl:
        both = zip(questions, found, strict=True)
        write_objects({"question": question, "answers": [asdict(a) for a in answers]} for question, answers in both)
    else:
        write_lines((i, a.score, a.start, a.end, a.text) for i, answers in enumerate(found, 1) for a in answers)


def fill_mask(
    model: Model,
    texts: Texts = None,
    file: Lines = None,
    top_k: Annotated[int, typer.Option(min=1, help="Words of a gap at most.")] = 5,
    target: Annotated[
        list[str] | None, typer.Option(help="Choose among such words only. May be repeated.", show_default=False)
    ] = None,
    as_format: OutputFormat = Format.text,
    batch_size: BatchSize = 32,
    backend: Backend = None,
    device: Device = None,
    dtype: DtypeOption = None,
) -> None:
    """Fill the gaps ([MASK], <mask>) in texts: number of the text and of the gap in it, score, word, text."""
    lines = many_texts(texts, file)
    place = place_of(backend, device)
    from transfuse import tasks

    loaded, tokenizer = load(model, place, dtype)
    found = tasks.fill_mask(loaded, tokenizer, lines, top_k=top_k, targets=target or None, batch_size=batch_size)
    if as_format is Format.jsonl:
        both = zip(lines, found, strict=True)
        write_objects({"text": text, "gaps": [[asdict(f) for f in gap] for gap in gaps]} for text, gaps in both)
    else:
        write_lines(
            (i, n, f.score, f.token, f.text)
            for i, gaps in enumerate(found, 1)
            for n, gap in enumerate(gaps, 1)
            for f in gap
        )


def embed(
    model: Model,
    texts: Texts = None,
    file: Lines = None,
    as_format: Annotated[
        EmbedFormat, typer.Option("--format", help="jsonl: an object a text. table: cosine similarities.")
    ] = EmbedFormat.jsonl,
    pooling: Annotated[
        Pooling, typer.Option(help="What stands for a text: over its tokens, or one of them.")
    ] = Pooling.mean,
    batch_size: BatchSize = 32,
    backend: Backend = None,
    device: Device = None,
    dtype: DtypeOption = None,
) -> None:
    """Turn texts into vectors of length 1, whose dot product is their similarity."""
    lines = many_texts(texts, file)
    if as_format is EmbedFormat.table and len(lines) > _TABLE_TEXTS:
        raise ArgumentError(f"a table holds at most {_TABLE_TEXTS} texts, got {len(lines)}; use --format jsonl")
    place = place_of(backend, device)
    from transfuse import tasks

    loaded, tokenizer = load(model, place, dtype)
    vectors = tasks.embed(loaded, tokenizer, lines, batch_size=batch_size, pooling=pooling.value).float().cpu()
    if as_format is EmbedFormat.table:
        from transfuse.demo.printing import similarity_table

        console().print(similarity_table(lines, vectors))
        return
    write_objects({"text": text, "embedding": v} for text, v in zip(lines, vectors.tolist(), strict=True))


def attention(
    model: Model,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="What the model reads; none: standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read the text from a file.")] = None,
    target: Annotated[
        str | None,
        typer.Option(help="What an encoder-decoder is to write.", show_default="what it writes by itself"),
    ] = None,
    kind: Annotated[
        Kind | None, typer.Option(help="Which attention of an encoder-decoder.", show_default="cross")
    ] = None,
    layer: Annotated[int | None, typer.Option(min=1, help="Counted from 1.", show_default="all")] = None,
    head: Annotated[int | None, typer.Option(min=1, help="Counted from 1, of a layer.", show_default="all")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="A .png, .svg or .pdf file.")] = Path(
        "attention.png"
    ),
    backend: Backend = None,
    device: Device = None,
    dtype: DtypeOption = None,
) -> None:
    """Draw what every token of a text attends to: one head, a layer's heads, or all of them."""
    from transfuse import tasks, viz

    viz.check_ending(output)
    if head is not None and layer is None:
        raise ArgumentError("--head needs --layer")
    given = one_text(text, file, "TEXT")
    loaded, tokenizer = load(model, place_of(backend, device), dtype)
    maps = tasks.attention_maps(loaded, tokenizer, given, target=target)
    name = kind.value if kind is not None else list(maps)[-1]
    if name not in maps:
        raise ArgumentError(f"--kind: {model} has {', '.join(maps)} attention, not {name}")
    viz.save(maps[name].figure(layer, head), output)
    typer.echo(str(output))
