"""What `transfuse demo` runs: every op checked and timed, a small model trained, text streamed, a picture drawn."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from transfuse import viz
from transfuse.backends import AUTOMATIC, forced, why_not
from transfuse.demo.cases import cases
from transfuse.demo.checks import run_case
from transfuse.demo.printing import check_table, write_stream
from transfuse.demo.shakespeare import (
    Corpus,
    Recipe,
    attention_maps,
    far_sighted_head,
    make_model,
    sample,
    train,
    uniform_loss,
    validation_loss,
)
from transfuse.demo.shakespeare import Progress as TrainingProgress
from transfuse.demo.threads import Threads
from transfuse.errors import ArgumentError, BackendError
from transfuse.models import Decoder

__all__ = ["run"]

_PROMPT = "MACBETH.\n"
_PICTURED = "MACBETH.\nWhat, will the line stretch out"


def run(console: Console, *, seed: int, recipe: Recipe, out: Path, weights: bool) -> bool:
    """The whole demo.

    Args:
        console: where it prints.
        seed: of everything random.
        recipe: of the small model.
        out: folder of the pictures, made if it is missing.
        weights: show real models (fetched once) instead of training a small one.

    Returns:
        Whether every op was within its error budget.

    Raises:
        ArgumentError: the folder cannot be written. BackendError: a backend that was asked for cannot run.
    """
    began = time.perf_counter()
    _writable(out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    backend = _why_this_backend(device)
    torch.manual_seed(seed)
    console.print(f"[bold]transfuse demo[/bold] on {_where(device)}")
    console.print(backend, soft_wrap=True)
    ok = _check_ops(console, device, dtype, seed)
    if weights:
        from transfuse.demo.real_models import show_real_models

        pictures = show_real_models(console, device, out)
    else:
        pictures = _shakespeare(console, device, recipe, seed, out)
    for picture in pictures:
        console.print(f"wrote {escape(str(picture))}", soft_wrap=True)
    verdict = "[green]every op is within its budget[/green]" if ok else "[red]an op exceeds its error budget[/red]"
    console.print(f"done in {time.perf_counter() - began:.0f} s; {verdict}")
    return ok


def _writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"demo: cannot make the folder {out}: {error.strerror}; give another --out") from error
    if not os.access(out, os.W_OK):
        raise ArgumentError(f"demo: the folder {out} is not writable; give another --out")


def _where(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU, {torch.get_num_threads()} threads"


def _why_this_backend(device: torch.device) -> str:
    asked = forced()
    if asked is not None:
        if (reason := why_not(asked, device)) is not None:
            raise BackendError(f"demo: backend {asked!r} cannot run here: {reason}")
        return f"backend: [bold]{escape(asked)}[/bold], because it was asked for"
    reasons: list[str] = []
    for name in AUTOMATIC:
        reason = why_not(name, device)
        if reason is None:
            return f"backend: [bold]{name}[/bold], the first that can run here" + "".join(reasons)
        reasons.append(f"\n  not {name}: {escape(reason)}")
    raise AssertionError("the torch backend runs everywhere")


def _check_ops(console: Console, device: torch.device, dtype: torch.dtype, seed: int) -> bool:
    name = str(dtype).removeprefix("torch.")
    console.print(f"\n[bold]Every op against fp64[/bold], {name}; time of one forward and backward")
    results = []
    with Progress(TextColumn("checking {task.description}"), BarColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=10)
        for case in cases(device, dtype, seed):
            progress.update(task, description=case.name)
            results.append(run_case(case))
            progress.advance(task)
    console.print(check_table(results))
    for result in results:
        if not result.ok:
            worst = result.backward if result.forward.ok else result.forward
            console.print(f"[red]{result.name}: error {worst.error:.3e} exceeds the budget {worst.budget:.3e}[/red]")
    return all(result.ok for result in results)


def _shakespeare(console: Console, device: torch.device, recipe: Recipe, seed: int, out: Path) -> list[Path]:
    corpus = Corpus()
    torch.manual_seed(seed)  # the model is the same whatever ran before
    model = make_model(recipe, corpus, device)
    console.print(
        f"\n[bold]A character model on Shakespeare[/bold]: {recipe.num_layers} layers, "
        f"{model.num_parameters().total:,} parameters, {len(corpus.train):,} characters of plays"
    )
    console.print(
        f"loss in nats a character: {uniform_loss(corpus):.2f} would be guessing, "
        f"{validation_loss(model, corpus, recipe.length, pieces=16):.2f} is the untrained model"
    )
    with Threads() as threads:
        loss, speed = _train(console, model, corpus, recipe, seed, threads)
        console.print(
            f"validation loss [bold]{loss:.3f}[/bold] on {len(corpus.validation):,} held-out characters, "
            f"trained at {speed:,.0f} tokens/s"
        )
        console.print("\n[bold]It writes[/bold] (temperature 0.8):")
        write_stream(console, _PROMPT, sample(model, corpus, _PROMPT, 400, temperature=0.8, seed=seed), "characters")
    console.print()
    maps = attention_maps(model, corpus, _PICTURED)
    layer, head = far_sighted_head(maps)
    where = f"layer {layer + 1}, head {head + 1}"
    one = viz.attention_heatmap(maps[layer, head], list(_PICTURED), title=f"{where}: what each character looks back at")
    every = viz.head_grid(maps, list(_PICTURED), title="every head of the small model")
    return [
        viz.save(one, out / "transfuse-attention.png"),
        viz.save(every, out / "transfuse-attention-heads.png", dpi=100),
    ]


def _train(
    console: Console, model: Decoder, corpus: Corpus, recipe: Recipe, seed: int, threads: Threads
) -> tuple[float, float]:
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.2f}  {task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=recipe.steps, loss=float("nan"), speed=0.0)

        def report(now: TrainingProgress) -> None:
            progress.update(task, completed=now.step, loss=now.loss, speed=now.tokens_per_second)
            if now.validation_loss is not None:
                console.print(
                    f"  step {now.step:>{len(str(recipe.steps))}}  loss {now.loss:.2f}  "
                    f"validation {now.validation_loss:.2f}  {now.tokens_per_second:,.0f} tokens/s"
                )

        return train(model, corpus, recipe, seed, threads, report)
