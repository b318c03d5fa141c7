"""Answers to questions, as spans of a text that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from transfuse.errors import ArgumentError
from transfuse.models import SpanClassifier
from transfuse.models.tokenizer import Tokenizer, as_texts
from transfuse.tasks.running import at_least, check_pair, longest, run

if TYPE_CHECKING:
    from tokenizers import Encoding

_WINDOW = 384  # tokens, as SQuAD's models are trained; and how many of them neighbouring windows share
_STRIDE = 128


@dataclass(frozen=True)
class Answer:
    """``text`` stands in the context from character ``start`` to before ``end``; empty: there is no answer in it."""

    score: float
    text: str
    start: int
    end: int


def answer(
    model: SpanClassifier,
    tokenizer: Tokenizer,
    questions: str | Sequence[str],
    contexts: str | Sequence[str],
    *,
    top_k: int = 1,
    max_answer_tokens: int = 15,
    no_answer: bool = False,
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 32,
    progress: bool | None = None,
) -> list[list[Answer]]:
    """The parts of a context that answer a question best.

    A context longer than the model takes is read in overlapping windows. In each, a span's score is the probability of
    its start times that of its end, among the window's tokens. Spans begin and end with words; spans of the same words
    are one answer, with the sum of their scores (as in transformers' question-answering pipeline).

    Args:
        model: a SpanClassifier.
        tokenizer: the model's.
        questions: one question or several.
        contexts: the text that each question is about; one text is for all of them.
        top_k: how many answers a question, at most.
        max_answer_tokens: the length of an answer, at most.
        no_answer: also judge that the context holds no answer: an Answer with empty text. For models trained on such
            questions.
        max_length: tokens of a window, the question included; None: 384, or what tokenizer and model allow.
        stride: tokens that neighbouring windows share; None: 128, or half a window.
        batch_size: windows at a time; those of like length share a batch.
        progress: show a bar on standard error; None: on a terminal, if there is much to do.

    Returns:
        for each question, in their order, its answers, the best first.

    Raises:
        ArgumentError: the model is of another kind, a question is empty or leaves no room for its context, or an
            argument is out of range.
        CheckpointError: the tokenizer is another model's.

    >>> import transfuse
    >>> from tokenizers import Tokenizer as Backend, models, pre_tokenizers
    >>> backend = Backend(models.WordLevel({"who": 0, "she": 1, "sings": 2}, unk_token="who"))
    >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> config = transfuse.TransformerConfig("encoder", 3, 16, num_layers=1, num_heads=2)
    >>> tokenizer = transfuse.models.tokenizer.Tokenizer(backend)
    >>> found = answer(SpanClassifier(config), tokenizer, "who sings", "she sings", top_k=3)[0]
    >>> sorted(answer.text for answer in found)
    ['she', 'she sings', 'sings']
    """
    check_pair(
        "answer", model, tokenizer, (SpanClassifier,), "transfuse.from_pretrained(..., task='question-answering')"
    )
    at_least("answer", "top_k", top_k)
    at_least("answer", "max_answer_tokens", max_answer_tokens)
    questions = as_texts("answer: questions", questions)
    contexts = [contexts] * len(questions) if isinstance(contexts, str) else as_texts("answer: contexts", contexts)
    if len(contexts) != len(questions):
        raise ArgumentError(f"answer: expected a context for each question, got {len(questions)} and {len(contexts)}")
    if max_length is None:
        max_length = min(_WINDOW, longest(model, tokenizer) or _WINDOW)
    at_least("answer", "max_length", max_length)
    stride = min(_STRIDE, max_length // 2) if stride is None else stride
    _check_room(tokenizer, questions, max_length, stride)
    windows = tokenizer.windows(questions, contexts, max_length=max_length, stride=stride)
    flat = [window for found in windows for window in found]
    logits: list[tuple[torch.Tensor, torch.Tensor]] = [(torch.empty(0), torch.empty(0))] * len(flat)
    for chosen, _, out in run("answer", model, tokenizer, flat, batch_size, progress):
        assert out.start_logits is not None
        assert out.end_logits is not None
        starts, ends = out.start_logits.float().cpu(), out.end_logits.float().cpu()
        for i, start, end in zip(chosen, starts, ends, strict=True):
            logits[i] = start[: len(flat[i].ids)], end[: len(flat[i].ids)]
    remaining = iter(logits)
    first = {i for i in (tokenizer.cls_token_id, tokenizer.bos_token_id) if i is not None}
    return [
        _best(context, found, [next(remaining) for _ in found], first, top_k, max_answer_tokens, no_answer)
        for context, found in zip(contexts, windows, strict=True)
    ]


def _check_room(tokenizer: Tokenizer, questions: list[str], max_length: int, stride: int) -> None:
    """Asks that each question leaves more room than neighbouring windows share."""
    at_least("answer", "stride", stride, least=0)
    for i, question in enumerate(questions):
        if not question.strip():
            raise ArgumentError(f"answer: every question must hold a word, questions[{i}] is {question!r}")
        taken = len(tokenizer.encode(question, ""))
        if taken + stride >= max_length:
            raise ArgumentError(
                f"answer: questions[{i}] takes {taken} of a window's {max_length} tokens and windows share {stride}: "
                "nothing is left for the context; give a shorter question, a smaller stride or a larger max_length"
            )


def _best(
    context: str,
    windows: Sequence[Encoding],
    logits: Sequence[tuple[torch.Tensor, torch.Tensor]],
    first: set[int],
    top_k: int,
    max_answer_tokens: int,
    no_answer: bool,
) -> list[Answer]:
    """The best answers in the windows of one context."""
    found: dict[str, Answer] = {}
    nothing = 1.0  # how likely it is that no window holds an answer: as likely as in the one that says so least
    for window, (start, end) in zip(windows, logits, strict=True):
        inside = torch.tensor([sequence == 1 for sequence in window.sequence_ids])
        allowed = inside.clone()
        allowed[0] |= window.ids[0] in first  # the first token's place is where models point that find no answer
        start, end = (side.masked_fill(~allowed, -torch.inf).softmax(0) for side in (start, end))
        if allowed[0] and not inside[0]:
            nothing = min(nothing, float(start[0] * end[0]))
        # Words may hold several spans, so more spans are looked at than answers are wanted.
        for score, at, to in _spans(start, end, inside, 2 * top_k + 10, max_answer_tokens):
            begin, stop = _characters(context, window, at, to)
            text = context[begin:stop].strip()  # byte-level words begin with their space
            if not text:
                continue
            begin = context.index(text, begin)
            stop = begin + len(text)
            known = found.get(text.lower())
            found[text.lower()] = (
                Answer(score, text, begin, stop) if known is None else replace(known, score=known.score + score)
            )
    answers = list(found.values())
    if no_answer:
        answers.append(Answer(nothing, "", 0, 0))
    return sorted(answers, key=lambda a: -a.score)[:top_k]


def _spans(
    start: torch.Tensor, end: torch.Tensor, inside: torch.Tensor, count: int, longest_span: int
) -> list[tuple[float, int, int]]:
    """(score, first token, last token) of the best spans of a window; start, end, inside: (length,)."""
    # (length, length): how likely it is that the answer goes from the row's token to the column's
    scores = torch.outer(start * inside, end * inside).triu().tril(min(longest_span, len(inside)) - 1)
    best = scores.flatten().topk(min(count, scores.numel()))
    length = len(inside)
    rows = ((s, i // length, i % length) for s, i in zip(best.values.tolist(), best.indices.tolist(), strict=True))
    return [(score, at, to) for score, at, to in rows if inside[at] and inside[to] and at <= to < at + longest_span]


def _characters(context: str, window: Encoding, at: int, to: int) -> tuple[int, int]:
    """Where the words of a span begin and end in the context."""
    return _word(context, window, at)[0], _word(context, window, to)[1]


def _word(context: str, window: Encoding, at: int) -> tuple[int, int]:
    """Where the word of a token begins and ends, or the token, where the tokenizer does not tell words apart."""
    number = window.token_to_word(at)
    found = None if number is None else window.word_to_chars(number, 1)
    if found is not None and len(context[found[0] : found[1]].split()) == 1:
        return found
    start, end = window.offsets[at]
    return start, end
