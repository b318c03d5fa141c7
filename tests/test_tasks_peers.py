"""The tasks against transformers' pipelines on the same seeded weights and tokenizers."""

from __future__ import annotations

import io
import json
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


SPM_TEXT = [
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "Ein schneller Fuchs springt über den faulen Hund.",
]


def test_marian_translates_as_in_transformers(tmp_path: Path) -> None:
    """Two vocabularies, beams, a bad word and a forced end, all from the checkpoint's files."""
    spm = pytest.importorskip("sentencepiece")
    pieces: dict[str, int] = {"</s>": 0, "<unk>": 1}
    for name, text in zip(("source.spm", "target.spm"), SPM_TEXT, strict=True):
        written = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter([text] * 20), model_writer=written, vocab_size=60, hard_vocab_limit=False,
            minloglevel=2, bos_id=-1, eos_id=0, unk_id=1,
        )  # fmt: skip
        (tmp_path / name).write_bytes(written.getvalue())
        model = spm.SentencePieceProcessor(model_proto=written.getvalue())
        for i in range(model.vocab_size()):
            pieces.setdefault(model.id_to_piece(i), len(pieces))
    pieces["<pad>"] = len(pieces)
    (tmp_path / "vocab.json").write_text(json.dumps(pieces))
    (tmp_path / "tokenizer_config.json").write_text('{"source_lang": "en", "target_lang": "de"}')
    pad = pieces["<pad>"]
    config = transformers.MarianConfig(
        vocab_size=len(pieces), d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, init_std=0.5,
        pad_token_id=pad, eos_token_id=0, decoder_start_token_id=pad, forced_eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    theirs = transformers.MarianMTModel(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # the same numbers whatever the version draws first
        for _, parameter in sorted(theirs.named_parameters()):
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    theirs.generation_config.update(num_beams=3, max_length=12, bad_words_ids=[[pad]], forced_eos_token_id=0)
    theirs.save_pretrained(tmp_path)
    tokenizer = transformers.MarianTokenizer.from_pretrained(str(tmp_path))
    texts = ["The quick fox.", "the lazy dog jumps over it, doesn't it?", "a"]
    expected = []
    for text in texts:
        ids = theirs.generate(**tokenizer(text, return_tensors="pt"))[0]
        expected.append(tokenizer.decode(ids, skip_special_tokens=True))
    assert len(set(expected)) > 1
    for batch_size in (1, 3):
        assert tasks.translate(*ours(tmp_path), texts, batch_size=batch_size) == expected


def test_t5_translates_and_summarizes_by_its_prefixes(tmp_path: Path, vocabulary: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([*SPM_TEXT, "translate English to German: summarize:"] * 20), model_writer=written,
        vocab_size=110, hard_vocab_limit=False, minloglevel=2, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(written.getvalue())
    torch.manual_seed(2)
    params = {
        "translation_en_to_de": {"prefix": "translate English to German: ", "num_beams": 2, "max_length": 9},
        "summarization": {"prefix": "summarize: ", "max_length": 14, "min_length": 6, "no_repeat_ngram_size": 2},
    }
    config = transformers.T5Config(
        vocab_size=256, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, initializer_factor=2.0,
        decoder_start_token_id=0, task_specific_params=params,
    )  # fmt: skip
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    model, tokenizer = ours(tmp_path)

    def expected(text: str, params: dict[str, Any]) -> str:
        knobs = {name: value for name, value in params.items() if name != "prefix"}
        ids = torch.tensor([tokenizer.encode(params["prefix"] + text)])
        return tokenizer.decode(theirs.generate(ids, do_sample=False, **knobs)[0])

    texts = ["The quick fox.", "the lazy dog jumps"]
    german = tasks.translate(model, tokenizer, texts, source="en", target="de")
    assert german == [expected(text, params["translation_en_to_de"]) for text in texts]
    short = tasks.summarize(model, tokenizer, texts)
    assert short == [expected(text, params["summarization"]) for text in texts]
    model.save_pretrained(tmp_path / "again")
    again = transfuse.from_pretrained(tmp_path / "again")
    assert tasks.summarize(again, tokenizer, texts) == short


def test_classify_with_an_encoder_decoder_and_a_decoder(tmp_path: Path, vocabulary: Path) -> None:
    tokenizer = transformers.BertTokenizerFast(str(vocabulary / "vocab.txt"), model_max_length=64)
    size, ids = len(tokenizer), {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    torch.manual_seed(4)
    models = [
        transformers.BartForSequenceClassification(
            transformers.BartConfig(
                vocab_size=size, d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=3,
                decoder_attention_heads=3, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
                num_labels=3, init_std=0.5, decoder_start_token_id=3, forced_eos_token_id=None, **ids,
            )
        ),
        transformers.GPT2ForSequenceClassification(
            transformers.GPT2Config(vocab_size=size, n_embd=24, n_layer=2, n_head=3, n_positions=64, num_labels=3,
                                    initializer_range=0.4, **ids)
        ),
    ]  # fmt: skip
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    for i, model in enumerate(models):
        folder = tmp_path / str(i)
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if i == 1:  # GPT-2 would take types for tokens; an encoder-decoder is given none whatever the files say
            settings = json.loads((folder / "tokenizer_config.json").read_text())
            settings["model_input_names"] = tokenizer.model_input_names
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        expected = pipeline("text-classification", (model, tokenizer), top_k=None)(TEXTS)
        got = tasks.classify(*ours(folder), TEXTS, top_k=None, batch_size=3)
        assert [[label.label for label in row] for row in got] == [[e["label"] for e in row] for row in expected]
        scores = torch.tensor([[e["score"] for e in row] for row in expected])
        torch.testing.assert_close(torch.tensor([[label.score for label in row] for row in got]), scores, **CLOSE)
