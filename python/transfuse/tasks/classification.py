"""Classes of texts, and of the tokens in them."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from transfuse.errors import ArgumentError
from transfuse.models import SequenceClassifier, TokenClassifier
from transfuse.models.base import TransformerModel
from transfuse.models.tokenizer import Tokenizer, as_texts
from transfuse.tasks.running import at_least, check_pair, longest, run

if TYPE_CHECKING:
    from tokenizers import Encoding


@dataclass(frozen=True)
class Label:
    """A class of a text, and how likely it is."""

    label: str
    score: float


@dataclass(frozen=True)
class Entity:
    """A stretch of a text and its class: ``text`` is what stands from character ``start`` to before ``end``."""

    label: str
    score: float
    text: str
    start: int
    end: int


def classify(
    model: SequenceClassifier,
    tokenizer: Tokenizer,
    texts: str | Sequence[str],
    pairs: str | Sequence[str] | None = None,
    *,
    top_k: int | None = 1,
    multi_label: bool | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    progress: bool | None = None,
) -> list[list[Label]]:
    """The likeliest classes of each text.

    Args:
        model: a SequenceClassifier; its ``labels`` name the classes, else they are LABEL_0, LABEL_1, ...
        tokenizer: the model's.
        texts: one text or several.
        pairs: a second text for each, for models that judge two.
        top_k: how many classes a text; None: all of them.
        multi_label: each class is there or not, whatever the others are (a sigmoid each), or exactly one of them is (a
            softmax); None: as the checkpoint's problem_type says, and a single class is there or not.
        batch_size: texts at a time; those of like length share a batch.
        max_length: cut longer texts to so many tokens; None: to what tokenizer and model allow.
        progress: show a bar on standard error; None: on a terminal, if there is much to do.

    Returns:
        for each text, in their order, its classes, the likeliest first.

    Raises:
        ArgumentError: the model is of another kind, or an argument out of range.
        CheckpointError: the tokenizer is another model's.

    >>> import transfuse
    >>> from tokenizers import Tokenizer as Backend, models
    >>> tokenizer = transfuse.models.tokenizer.Tokenizer(Backend(models.BPE({"a": 0, "b": 1, "c": 2}, [])))
    >>> config = transfuse.TransformerConfig("encoder", 3, 16, num_layers=1, num_heads=2, pooler=True)
    >>> found = classify(SequenceClassifier(config, 2), tokenizer, ["ab", "c"], top_k=None)
    >>> [len(labels) for labels in found], round(sum(label.score for label in found[0]), 3)
    ([2, 2], 1.0)
    """
    remedy = "transfuse.from_pretrained(..., task='sequence-classification')"
    check_pair("classify", model, tokenizer, (SequenceClassifier,), remedy)
    if top_k is not None:
        at_least("classify", "top_k", top_k)
    texts = as_texts("classify: texts", texts)
    names = labels_of(model, model.classifier.out_features)
    limit = longest(model, tokenizer) if max_length is None else max_length
    encodings = [windows[0] for windows in tokenizer.windows(texts, pairs, max_length=limit)]
    _check_tokens("classify", texts, encodings)
    found: list[list[Label]] = [[] for _ in texts]
    for chosen, _, out in run("classify", model, tokenizer, encodings, batch_size, progress):
        assert out.logits is not None
        scores = _scores(model, out.logits.float(), multi_label)
        values, order = scores.sort(dim=-1, descending=True, stable=True)
        for i, row, indices in zip(chosen, values.tolist(), order.tolist(), strict=True):
            best = zip(indices, row, strict=True)
            found[i] = [Label(names[index], score) for index, score in best][:top_k]
    return found


def token_classify(
    model: TokenClassifier,
    tokenizer: Tokenizer,
    texts: str | Sequence[str],
    *,
    aggregation: str = "simple",
    ignore: Sequence[str] = ("O",),
    batch_size: int = 32,
    max_length: int | None = None,
    stride: int | None = None,
    progress: bool | None = None,
) -> list[list[Entity]]:
    """What each part of a text is: names, places, parts of speech, ...

    A text longer than the model takes is read in overlapping windows; where two of them hold a token, the one that
    shows more of its surroundings decides.

    Args:
        model: a TokenClassifier; its ``labels`` name the classes, else they are LABEL_0, LABEL_1, ...
        tokenizer: the model's.
        texts: one text or several.
        aggregation: "simple": neighbouring tokens of one class are one entity, with their mean score; a label B-x
            starts a new one, and I-x and x continue it. "none": every token is an entity, with its label as it is.
        ignore: labels that are left out.
        batch_size: windows at a time; those of like length share a batch.
        max_length: tokens of a window; None: what tokenizer and model allow.
        stride: tokens that neighbouring windows share; None: a quarter of a window.
        progress: show a bar on standard error; None: on a terminal, if there is much to do.

    Returns:
        for each text, in their order, its entities, as they stand in it.

    Raises:
        ArgumentError: the model is of another kind, or an argument out of range.
        CheckpointError: the tokenizer is another model's.

    >>> import transfuse
    >>> from tokenizers import Tokenizer as Backend, models
    >>> tokenizer = transfuse.models.tokenizer.Tokenizer(Backend(models.BPE({"a": 0, "b": 1, "c": 2}, [])))
    >>> config = transfuse.TransformerConfig("encoder", 3, 16, num_layers=1, num_heads=2)
    >>> model = TokenClassifier(config, 1)
    >>> [(e.label, e.score, e.text, e.start, e.end) for e in token_classify(model, tokenizer, "abc")[0]]
    [('LABEL_0', 1.0, 'abc', 0, 3)]
    """
    remedy = "transfuse.from_pretrained(..., task='token-classification')"
    check_pair("token_classify", model, tokenizer, (TokenClassifier,), remedy)
    if aggregation not in ("simple", "none"):
        raise ArgumentError(f"token_classify: aggregation must be 'simple' or 'none', got {aggregation!r}")
    texts = as_texts("token_classify: texts", texts)
    if isinstance(ignore, str):
        ignore = (ignore,)
    if not isinstance(ignore, Sequence | Set) or not all(isinstance(label, str) for label in ignore):
        raise ArgumentError(f"token_classify: ignore must be labels, got {ignore!r}")
    if max_length is not None:
        at_least("token_classify", "max_length", max_length)
    names = labels_of(model, model.classifier.out_features)
    limit = longest(model, tokenizer) if max_length is None else max_length
    if stride is None:
        stride = 0 if limit is None else limit // 4
    windows = tokenizer.windows(texts, max_length=limit, stride=stride)
    flat = [window for found in windows for window in found]
    _check_tokens("token_classify", texts, [found[0] for found in windows])
    best: list[tuple[list[float], list[int]]] = [([], [])] * len(flat)  # (score, label) of each token
    for chosen, _, out in run("token_classify", model, tokenizer, flat, batch_size, progress):
        assert out.logits is not None
        scores, labels = out.logits.float().softmax(-1).max(-1)
        for i, row, indices in zip(chosen, scores.tolist(), labels.tolist(), strict=True):
            best[i] = (row, indices)
    remaining = iter(best)
    entities = []
    for text, found in zip(texts, windows, strict=True):
        tokens = _tokens(text, found, [next(remaining) for _ in found], names)
        grouped = _grouped(text, tokens) if aggregation == "simple" else tokens
        entities.append([entity for entity in grouped if entity.label not in ignore])
    return entities


def labels_of(model: TransformerModel, count: int) -> list[str]:
    """The names of a classifier's classes."""
    return list(model.labels) if len(model.labels) == count else [f"LABEL_{i}" for i in range(count)]


def _scores(model: SequenceClassifier, logits: torch.Tensor, multi_label: bool | None) -> torch.Tensor:
    """(batch, labels) scores of logits; those of a regression are the result itself."""
    problem = model.task_settings.get("problem_type")
    if multi_label is None and problem == "regression":
        return logits
    if multi_label is None:
        multi_label = problem == "multi_label_classification" or logits.shape[-1] == 1
    return logits.sigmoid() if multi_label else logits.softmax(-1)


def _check_tokens(task: str, texts: list[str], encodings: Sequence[Encoding]) -> None:
    for i, encoding in enumerate(encodings):
        if not encoding.ids:
            raise ArgumentError(f"{task}: every text must hold a token, texts[{i}] is {texts[i]!r}")


def _tokens(
    text: str, windows: Sequence[Encoding], best: Sequence[tuple[list[float], list[int]]], names: list[str]
) -> list[Entity]:
    """Every token of a text once, as an entity of its own."""
    # offsets -> (distance to the nearer end of the window, entity); one character's bytes may be several tokens
    chosen: dict[tuple[int, int, int], tuple[int, Entity]] = {}
    for window, (scores, labels) in zip(windows, best, strict=True):
        seen: dict[tuple[int, int], int] = {}
        for at, ((start, end), special) in enumerate(zip(window.offsets, window.special_tokens_mask, strict=True)):
            if special:
                continue
            nth = seen[start, end] = seen.get((start, end), -1) + 1
            sight = min(at, len(window.ids) - 1 - at)
            entity = Entity(names[labels[at]], scores[at], text[start:end], start, end)
            if sight > chosen.get((start, end, nth), (-1, None))[0]:
                chosen[start, end, nth] = (sight, entity)
    return [chosen[key][1] for key in sorted(chosen)]


def _grouped(text: str, tokens: list[Entity]) -> list[Entity]:
    """Neighbouring tokens of one class as one entity each."""
    groups: list[list[Entity]] = []
    for token in tokens:
        begins = token.label.startswith("B-")
        if groups and not begins and _class(token.label) == _class(groups[-1][0].label):
            groups[-1].append(token)
        else:
            groups.append([token])
    return [
        Entity(
            _class(group[0].label),
            sum(token.score for token in group) / len(group),
            text[group[0].start : group[-1].end],
            group[0].start,
            group[-1].end,
        )
        for group in groups
    ]


def _class(label: str) -> str:
    """A label without the mark of where in an entity a token stands."""
    return label[2:] if label.startswith(("B-", "I-")) else label
