"""A small character-level decoder, trained on the plays that ship with the package.

The sizes were chosen by measurement: on two cores of a 2-core machine the whole training takes about half a minute and
reaches a validation loss of 1.65 nats a character. The attention window equals the training length, so that text
of any length can be streamed with relative distances that were all seen in training.
"""

from __future__ import annotations

import gzip
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files

import torch
import torch.nn.functional as F

from transfuse import generation
from transfuse.demo.threads import Threads
from transfuse.errors import ArgumentError
from transfuse.models import Decoder, TransformerConfig


@dataclass(frozen=True)
class Recipe:
    """Sizes of the model and of its training."""

    steps: int = 1200
    batch: int = 16
    length: int = 64
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    learning_rate: float = 3e-3  # reached after the warm-up, then straight down to 0
    warmup: int = 30
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ArgumentError(f"demo: steps must be at least 1, got {self.steps}")


@dataclass(frozen=True)
class Progress:
    """Where training stands after a step; loss is in nats a character."""

    step: int
    loss: float
    validation_loss: float | None
    tokens_per_second: float


class Corpus:
    """The plays as ids: one id a character, the last twentieth kept for validation.

    >>> corpus = Corpus()
    >>> corpus.decode(corpus.encode("To be, or not to be"))
    'To be, or not to be'
    >>> len(corpus.characters), len(corpus.train) > 800_000
    (63, True)
    """

    def __init__(self) -> None:
        packed = files("transfuse").joinpath("data", "shakespeare.txt.gz").read_bytes()
        text = gzip.decompress(packed).decode("ascii")
        self.characters = sorted(set(text))
        self._ids = {character: i for i, character in enumerate(self.characters)}
        ids = torch.tensor(self.encode(text), dtype=torch.uint8)
        split = len(ids) * 19 // 20
        self.train, self.validation = ids[:split], ids[split:]

    def encode(self, text: str) -> list[int]:
        """The ids of a text whose characters all occur in the plays."""
        unknown = sorted(set(text) - set(self._ids))
        if unknown:
            raise ArgumentError(f"demo: the plays have no character {unknown[0]!r}")
        return [self._ids[character] for character in text]

    def decode(self, ids: list[int]) -> str:
        """The text of some ids."""
        return "".join(self.characters[i] for i in ids)


def make_model(recipe: Recipe, corpus: Corpus, device: torch.device) -> Decoder:
    """A pre-norm decoder with RMS norm, rotary positions and SwiGLU, initialised by torch's current seed."""
    config = TransformerConfig(
        "decoder",
        vocab_size=len(corpus.characters),
        hidden_size=recipe.hidden_size,
        num_layers=recipe.num_layers,
        num_heads=recipe.num_heads,
        intermediate_size=recipe.hidden_size * 8 // 3 // 32 * 32,
        activation="silu",
        gated=True,
        norm="rms",
        norm_eps=1e-6,
        position="rotary",
        max_positions=1 << 20,
        window=recipe.length,
        qkv_bias=False,
        out_bias=False,
        ffn_bias=False,
    )
    return Decoder(config, device=device)


def train(
    model: Decoder, corpus: Corpus, recipe: Recipe, seed: int, threads: Threads, report: Callable[[Progress], None]
) -> tuple[float, float]:
    """Train in place.

    Args:
        model: of :func:`make_model`.
        corpus: what it reads.
        recipe: how long and how.
        seed: of the order in which pieces are read.
        threads: entered; it is told the time of every step.
        report: called after every step; the validation loss is there ten times on the way.

    Returns:
        (validation loss over the whole held-out text, tokens a second of training alone).
    """
    device = model.device
    train_ids = corpus.train.to(device, torch.long)
    offsets = torch.arange(recipe.length + 1, device=device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
    parameters = list(model.parameters())
    spent = 0.0
    every = max(1, recipe.steps // 10)
    model.train()
    for step in range(1, recipe.steps + 1):
        began = time.perf_counter()
        starts = torch.randint(len(train_ids) - recipe.length, (recipe.batch, 1), generator=generator).to(device)
        piece = train_ids[starts + offsets]  # (batch, length + 1)
        loss = _loss(model, piece)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        schedule.step()
        value = loss.item()  # waits for the device, so the clock below is honest
        seconds = time.perf_counter() - began
        threads.step(seconds)
        spent += seconds
        speed = step * recipe.batch * recipe.length / spent
        quick = validation_loss(model, corpus, recipe.length, pieces=64) if step % every == 0 else None
        report(Progress(step, value, quick, speed))
    return validation_loss(model, corpus, recipe.length), speed


@torch.no_grad()
def validation_loss(model: Decoder, corpus: Corpus, length: int, pieces: int | None = None) -> float:
    """Nats a character over the held-out text, read in pieces of ``length`` that know nothing of one another."""
    ids = corpus.validation.to(model.device, torch.long)
    table = ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1)[:pieces]
    training = model.training
    model.eval()
    total = sum(_loss(model, part).item() * len(part) for part in table.split(128))
    model.train(training)
    return total / len(table)


def sample(model: Decoder, corpus: Corpus, prompt: str, count: int, temperature: float, seed: int) -> Iterator[str]:
    """Stream ``count`` characters that follow the prompt."""
    ids = torch.tensor([corpus.encode(prompt)], device=model.device)
    generator = torch.Generator(model.device).manual_seed(seed)
    for token in generation.stream(model, ids, max_new_tokens=count, temperature=temperature, generator=generator):
        yield corpus.characters[int(token)]


@torch.no_grad()
def attention_maps(model: Decoder, corpus: Corpus, text: str) -> torch.Tensor:
    """(layers, heads, length, length): what each character of a text looks back at."""
    ids = torch.tensor([corpus.encode(text)], device=model.device)
    attentions = model.eval()(ids, output_attentions=True).attentions
    assert attentions is not None
    return torch.stack([layer[0] for layer in attentions]).float().cpu()


def far_sighted_head(maps: torch.Tensor) -> tuple[int, int]:
    """(layer, head) that most tells tokens further away than the neighbour apart: the one worth a picture.

    That is the attention's mass there times the mutual information of query and key in it; so neither a head that looks
    at its neighbour wins, nor one that looks at the same key from everywhere.

    Args:
        maps: (layers, heads, length, length).

    >>> neighbour, same, third = torch.eye(9).roll(-1, 1), torch.eye(9)[:1].expand(9, 9), torch.eye(9).roll(-3, 1)
    >>> far_sighted_head(torch.stack([neighbour, same, third])[None])
    (0, 2)
    """
    far = maps.tril(-2) + maps.triu(2)
    mass = far.sum((-2, -1))  # (layers, heads)
    joint = far / mass.clamp_min(1e-9)[..., None, None]
    apart = joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)
    information = torch.xlogy(joint, joint / apart.clamp_min(1e-30)).sum((-2, -1))
    best = int((mass * information).argmax())
    return best // maps.shape[1], best % maps.shape[1]


def _loss(model: Decoder, piece: torch.Tensor) -> torch.Tensor:
    logits = model(piece[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), piece[:, 1:].flatten())


def _optimizer(model: Decoder, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.99), fused=True)


def _rate(step: int, recipe: Recipe) -> float:
    """The part of the learning rate for a step counted from 0."""
    rising = min(1.0, (step + 1) / min(recipe.warmup, recipe.steps))
    return rising * (1 - step / recipe.steps)


def uniform_loss(corpus: Corpus) -> float:
    """Nats a character of a model that knows nothing but the alphabet."""
    return math.log(len(corpus.characters))
