"""The tasks against transformers' pipelines on the same seeded weights and tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import transfuse
from transfuse import tasks
from transfuse.models.tokenizer_files import load_tokenizer

transformers = pytest.importorskip("transformers")
WORDS = (
    "the quick fox jump over a dog , . ! who was it ? paris is in france berlin lies ger many and runs to day yes no"
)
TEXTS = [
    "The quick fox jumps over the dog, Paris is in France.",
    "Berlin lies in Germany!",
    "Who was it? Yes, no; and today runs unknown zebras.",
    "a",
]
SIZES: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
    "max_position_embeddings": 64, "initializer_range": 0.6,
}  # fmt: skip
# fp32: the tasks read logits that agree within 1e-4 of their size, and probabilities move by no more than that.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS.split(),
        *letters,
        *(f"##{c}" for c in letters),
        "##s",
        ";",
    ]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)) + "\n")
    return folder


def saved(folder: Path, kind: str, vocabulary: Path, **config: Any) -> tuple[Any, Any]:
    """transformers' model and tokenizer, saved where ours are read from."""
    tokenizer = transformers.BertTokenizerFast(str(vocabulary / "vocab.txt"), model_max_length=64)
    torch.manual_seed(3)
    model = getattr(transformers, kind)(transformers.BertConfig(vocab_size=len(tokenizer), **SIZES, **config)).eval()
    with torch.no_grad():  # a head that says something
        for name, parameter in model.named_parameters():
            if name.startswith(("classifier", "qa_outputs")):
                parameter.normal_(std=1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def pipeline(task: str, pair: tuple[Any, Any], **options: Any) -> Any:
    return transformers.pipeline(task, model=pair[0], tokenizer=pair[1], **options)


def ours(folder: Path) -> tuple[Any, Any]:
    return transfuse.from_pretrained(folder), load_tokenizer(folder)


@pytest.mark.parametrize(
    "problem, labels", [(None, 3), ("single_label_classification", 2), ("multi_label_classification", 4), (None, 1),
                        ("regression", 1)],
    ids=str,
)  # fmt: skip
def test_classify(tmp_path: Path, vocabulary: Path, problem: str | None, labels: int) -> None:
    names = {i: f"class {i}" for i in range(labels)}
    config = {"problem_type": problem, "id2label": names, "label2id": {v: k for k, v in names.items()}}
    pair = saved(tmp_path, "BertForSequenceClassification", vocabulary, **config)
    peer = pipeline("text-classification", pair, top_k=None)
    expected = peer(TEXTS)
    for batch_size in (1, 3):
        got = tasks.classify(*ours(tmp_path), TEXTS, top_k=None, batch_size=batch_size)
        assert [[label.label for label in row] for row in got] == [
            [label["label"] for label in row] for row in expected
        ]
        for row, theirs in zip(got, expected, strict=True):
            scores = torch.tensor([label["score"] for label in theirs])
            torch.testing.assert_close(torch.tensor([label.score for label in row]), scores, **CLOSE)
    assert [row[:1] for row in got] == tasks.classify(*ours(tmp_path), TEXTS, batch_size=3)


def test_classify_pairs(tmp_path: Path, vocabulary: Path) -> None:
    peer = pipeline("text-classification", saved(tmp_path, "BertForSequenceClassification", vocabulary))
    expected = peer([{"text": text, "text_pair": TEXTS[0]} for text in TEXTS])
    got = tasks.classify(*ours(tmp_path), TEXTS, [TEXTS[0]] * len(TEXTS))
    assert [row[0].label for row in got] == [label["label"] for label in expected]
    scores = torch.tensor([label["score"] for label in expected])
    torch.testing.assert_close(torch.tensor([row[0].score for row in got]), scores, **CLOSE)


@pytest.mark.parametrize("aggregation", ["simple", "none"])
def test_token_classify(tmp_path: Path, vocabulary: Path, aggregation: str) -> None:
    names = dict(enumerate(["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC"]))
    config = {"id2label": names, "label2id": {v: k for k, v in names.items()}}
    pair = saved(tmp_path, "BertForTokenClassification", vocabulary, **config)
    peer = pipeline("token-classification", pair, aggregation_strategy=aggregation)
    got = tasks.token_classify(*ours(tmp_path), TEXTS, aggregation=aggregation, batch_size=3)
    assert {entity.label.split("-")[-1] for row in got for entity in row} >= {"LOC", "MISC"}
    assert any(" " in entity.text for row in got for entity in row) == (aggregation == "simple")
    for text, row, theirs in zip(TEXTS, got, peer(TEXTS), strict=True):
        key = "entity_group" if aggregation == "simple" else "entity"
        assert [(e.label, e.start, e.end) for e in row] == [(e[key], e["start"], e["end"]) for e in theirs]
        assert all(entity.text == text[entity.start : entity.end] for entity in row)
        scores = torch.tensor([float(e["score"]) for e in theirs])
        torch.testing.assert_close(torch.tensor([e.score for e in row]), scores, **CLOSE)


def test_fill_mask(tmp_path: Path, vocabulary: Path) -> None:
    peer = pipeline("fill-mask", saved(tmp_path, "BertForMaskedLM", vocabulary), top_k=4)
    texts = ["the [MASK] fox .", "[MASK] runs", "who [MASK] it , [MASK] or no ?"]
    got = tasks.fill_mask(*ours(tmp_path), texts, top_k=4)
    for gaps, theirs in zip(got, [peer(text) for text in texts], strict=True):
        theirs = theirs if isinstance(theirs[0], list) else [theirs]
        assert len(gaps) == len(theirs)
        for fillings, expected in zip(gaps, theirs, strict=True):
            assert [f.token_id for f in fillings] == [f["token"] for f in expected]
            assert [f.token for f in fillings] == [f["token_str"] for f in expected]
            assert [f.text for f in fillings] == [f["sequence"] for f in expected]
            scores = torch.tensor([f["score"] for f in expected])
            torch.testing.assert_close(torch.tensor([f.score for f in fillings]), scores, **CLOSE)
    chosen = tasks.fill_mask(*ours(tmp_path), texts[0], targets=["fox", "dog"])[0][0]
    expected = peer(texts[0], targets=["fox", "dog"])
    assert [f.token for f in chosen] == [f["token_str"] for f in expected]
    torch.testing.assert_close(chosen[0].score, expected[0]["score"], **CLOSE)


CONTEXT = " ".join(TEXTS * 4)
QUESTIONS = ["Who was it?", "Is Paris in France?", "Who jumps over the dog today?"]


def spans_by_hand(model: Any, tokenizer: Any, question: str, top_k: int, longest: int, no_answer: bool) -> list[tuple]:
    """What the question-answering pipeline of transformers 4 gives: it is gone from later versions.

    Its answers to these questions were compared with this function's: same spans, same scores.
    """
    encoded = tokenizer(question, CONTEXT, truncation="only_second", max_length=48, stride=12,
                        return_overflowing_tokens=True, return_offsets_mapping=True)  # fmt: skip
    found, nothing = [], 1e6
    for i, ids in enumerate(encoded["input_ids"]):
        types = torch.tensor([encoded["token_type_ids"][i]])
        with torch.no_grad():
            out = model(torch.tensor([ids]), token_type_ids=types)
        outside = torch.tensor([s != 1 for s in encoded.sequence_ids(i)])
        outside[0] = False
        start, end = (logits[0].masked_fill(outside, -1e4).softmax(0) for logits in (out.start_logits, out.end_logits))
        nothing = min(nothing, float(start[0] * end[0]))
        start[0] = end[0] = 0.0
        scores = (start[:, None] * end).triu().tril(longest - 1)
        for index in scores.flatten().argsort(descending=True)[: 2 * top_k + 10].tolist():
            s, e = divmod(index, len(ids))
            if outside[s] or outside[e]:
                continue
            first, last = encoded[i].token_to_word(s), encoded[i].token_to_word(e)
            if first is None:  # the first token, with a score of 0
                continue
            begin, stop = encoded[i].word_to_chars(first, 1)[0], encoded[i].word_to_chars(last, 1)[1]
            same = next((f for f in found if CONTEXT[f[1] : f[2]].lower() == CONTEXT[begin:stop].lower()), None)
            if same:
                same[0] += float(scores[s, e])
            else:
                found.append([float(scores[s, e]), begin, stop])
    if no_answer:
        found.append([nothing, 0, 0])
    return sorted(found, key=lambda f: -f[0])[:top_k]


@pytest.mark.parametrize("top_k, longest, no_answer", [(1, 15, False), (5, 4, False), (4, 15, True)])
def test_answer(tmp_path: Path, vocabulary: Path, top_k: int, longest: int, no_answer: bool) -> None:
    model, tokenizer = saved(tmp_path, "BertForQuestionAnswering", vocabulary)
    knobs = {"top_k": top_k, "max_answer_tokens": longest, "no_answer": no_answer, "max_length": 48, "stride": 12}
    got = tasks.answer(*ours(tmp_path), QUESTIONS, CONTEXT, batch_size=4, **knobs)
    alone = [tasks.answer(*ours(tmp_path), question, CONTEXT, batch_size=1, **knobs)[0] for question in QUESTIONS]
    assert [[(a.start, a.end) for a in answers] for answers in got] == [[(a.start, a.end) for a in b] for b in alone]
    for question, answers in zip(QUESTIONS, got, strict=True):
        expected = spans_by_hand(model, tokenizer, question, top_k, longest, no_answer)
        assert [(a.start, a.end) for a in answers] == [(start, end) for _, start, end in expected]
        scores = torch.tensor([score for score, _, _ in expected])
        torch.testing.assert_close(torch.tensor([a.score for a in answers]), scores, **CLOSE)
        assert all(a.text == CONTEXT[a.start : a.end] for a in answers)
    if "question-answering" in transformers.pipelines.SUPPORTED_TASKS:
        peer = pipeline("question-answering", (model, tokenizer))
        for question, answers in zip(QUESTIONS, got, strict=True):
            theirs = peer(question=question, context=CONTEXT, top_k=top_k, max_answer_len=longest, max_seq_len=48,
                          doc_stride=12, handle_impossible_answer=no_answer)  # fmt: skip
            theirs = theirs if isinstance(theirs, list) else [theirs]
            assert [(a.start, a.end, a.text) for a in answers] == [(a["start"], a["end"], a["answer"]) for a in theirs]
            scores = torch.tensor([a["score"] for a in theirs])
            torch.testing.assert_close(torch.tensor([a.score for a in answers]), scores, **CLOSE)
