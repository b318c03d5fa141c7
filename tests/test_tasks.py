"""Tasks on tiny models: embeddings against a computation by hand, text in and out, streaming of partial characters."""

from __future__ import annotations

import re

import pytest
import torch

import transfuse
from transfuse import tasks
from transfuse.errors import ArgumentError, CheckpointError
from transfuse.models import MaskedLM, SequenceClassifier, SpanClassifier, TokenClassifier
from transfuse.models.tokenizer import Tokenizer, TokenizerSettings

tokenizers = pytest.importorskip("tokenizers")
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
TEXTS = ["a cat", "hi", "", "the longest text of them all", "a cat", "é", "some words more"]


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, then <pad>, <s>, </s>; every text is wrapped in <s> and </s>."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(BYTES)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<s>", "</s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 257), ("</s>", 258)]
    )
    return Tokenizer(backend, TokenizerSettings({"pad": "<pad>", "bos": "<s>", "eos": "</s>"}))


def config(architecture, **changes):
    sizes = {"vocab_size": 259, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "initializer_range": 0.3}
    return transfuse.TransformerConfig(architecture, **{**sizes, "max_positions": 128, **changes})


@pytest.fixture
def encoder():
    return transfuse.Encoder(config("encoder")).eval()


@pytest.fixture
def decoder():
    return transfuse.Decoder(config("decoder")).eval()


# --- embed ----------------------------------------------------------------------------------------------------------


def by_hand(model, tokenizer, text, pooling):
    with torch.no_grad():
        hidden = model(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0]
    return {"mean": hidden.mean(0), "max": hidden.amax(0), "first": hidden[0], "last": hidden[-1]}[pooling]


@pytest.mark.parametrize("pooling", ["mean", "max", "first", "last"])
@pytest.mark.parametrize("architecture", ["encoder", "decoder"])
def test_embed_equals_each_text_alone(tokenizer, architecture, pooling):
    model = (transfuse.Encoder if architecture == "encoder" else transfuse.Decoder)(config(architecture)).eval()
    expected = torch.stack([by_hand(model, tokenizer, t, pooling) for t in TEXTS])
    for batch_size in (1, 3, 100):
        got = tasks.embed(model, tokenizer, TEXTS, batch_size=batch_size, pooling=pooling, normalize=False)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_embed_normalizes(encoder, tokenizer):
    got = tasks.embed(encoder, tokenizer, TEXTS)
    torch.testing.assert_close(got.norm(dim=-1), torch.ones(len(TEXTS)))
    plain = tasks.embed(encoder, tokenizer, TEXTS, normalize=False)
    torch.testing.assert_close(got, plain / plain.norm(dim=-1, keepdim=True))
    assert not got.requires_grad


def test_embed_takes_texts_of_like_length_together(encoder, tokenizer, monkeypatch):
    shapes, forward = [], encoder.forward

    def counted(**batch):
        shapes.append(tuple(batch["input_ids"].shape))
        return forward(**batch)

    monkeypatch.setattr(encoder, "forward", counted)
    tasks.embed(encoder, tokenizer, ["x" * n for n in (1, 30, 2, 29)], batch_size=2)
    assert shapes == [(2, 32), (2, 4)]


def test_embed_of_one_text_and_of_none(encoder, tokenizer):
    assert torch.equal(tasks.embed(encoder, tokenizer, "hi"), tasks.embed(encoder, tokenizer, ["hi"]))
    assert tasks.embed(encoder, tokenizer, []).shape == (0, 32)


def test_embed_cuts_what_the_model_cannot_hold(encoder, tokenizer):
    long = "x" * 500
    limited = tasks.embed(encoder, tokenizer, [long])
    assert torch.equal(limited, tasks.embed(encoder, tokenizer, [long], max_length=128))
    short = tasks.embed(encoder, tokenizer, [long, "xxxx"], max_length=6)
    torch.testing.assert_close(short[0], short[1])


def test_embed_keeps_the_models_dtype(tokenizer):
    model = transfuse.Encoder(config("encoder"), dtype=torch.bfloat16).eval()
    assert tasks.embed(model, tokenizer, TEXTS).dtype == torch.bfloat16


def test_embed_runs_in_eval_mode(tokenizer):
    model = transfuse.Encoder(config("encoder", hidden_dropout=0.5)).train()
    first, second = (tasks.embed(model, tokenizer, TEXTS) for _ in range(2))
    assert torch.equal(first, second)
    assert model.training


def test_embed_mistakes(encoder, tokenizer):
    bare = Tokenizer(tokenizer.backend.from_str(tokenizer.backend.to_str()))
    bare.backend.post_processor = tokenizers.processors.Sequence([])
    seq2seq = transfuse.Seq2Seq(config("encoder_decoder"))
    for call, message in [
        (lambda: tasks.embed(encoder, tokenizer, TEXTS, pooling="cls"), "one of mean, max, first, last, got 'cls'"),
        (lambda: tasks.embed(encoder, tokenizer, TEXTS, batch_size=0), "batch_size must be a whole .* got 0"),
        (lambda: tasks.embed(encoder, tokenizer, TEXTS, batch_size=1.5), "batch_size must be a whole .* got 1.5"),
        (lambda: tasks.embed(encoder, tokenizer, TEXTS, max_length=2), "max_length must be .* at least 3, got 2"),
        (lambda: tasks.embed(encoder, tokenizer, None), "embed: texts: expected a text or several, got NoneType"),
        (lambda: tasks.embed(encoder, tokenizer, ["a", 2]), r"embed: texts: expected texts \(str\), got int"),
        (lambda: tasks.embed(encoder, bare, ["a", "", "b"]), r"every text must hold a token, texts\[1\] is ''"),
        (lambda: tasks.embed(encoder, bare, [""]), r"every text must hold a token, texts\[0\] is ''"),
        (lambda: tasks.embed(seq2seq, tokenizer, TEXTS), "expected an Encoder or a Decoder, got an encoder-decoder"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            call()


# --- text -----------------------------------------------------------------------------------------------------------


def script(model, text, monkeypatch):
    """Make a model write this text's bytes after any prompt, then </s>."""
    ids = [BYTES.index(c) for c, _ in tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
           for c in c] + [258]  # fmt: skip
    forward, written = model.forward, []

    def scripted(*a, **kw):
        out = forward(*a, **kw)
        out.logits[:, -1] = -100.0
        out.logits[:, -1, ids[min(len(written), len(ids) - 1)]] = 100.0
        written.append(1)
        return out

    monkeypatch.setattr(model, "forward", scripted)


def test_generate_gives_the_continuations_alone(decoder, tokenizer):
    got = tasks.generate(decoder, tokenizer, ["one", "and another"], max_new_tokens=12)
    for prompt, text in zip(["one", "and another"], got, strict=True):
        ids = torch.tensor([tokenizer.encode(prompt)])
        alone = decoder.generate(ids, max_new_tokens=12, eos_token_id=258)[0, ids.shape[1] :].tolist()
        alone = alone[: alone.index(258)] if 258 in alone else alone
        assert text == tokenizer.decode(alone)


def test_generate_stops_at_the_end(decoder, tokenizer, monkeypatch):
    script(decoder, "naïve, 日本", monkeypatch)
    assert tasks.generate(decoder, tokenizer, "x", max_new_tokens=50) == ["naïve, 日本"]


@pytest.mark.parametrize("ends", [{}, {"eos_token_id": 258}], ids=["tokenizer", "config"])
def test_nothing_is_written_after_the_end(ends, tokenizer, monkeypatch):
    model = transfuse.Decoder(config("decoder", **ends)).eval()
    script(model, "end", monkeypatch)
    forward, calls = model.forward, []
    monkeypatch.setattr(model, "forward", lambda *a, **kw: (calls.append(1), forward(*a, **kw))[1])
    assert tasks.generate(model, tokenizer, "x", max_new_tokens=50) == ["end"]
    assert len(calls) == 4


def test_several_samples_a_prompt(decoder, tokenizer):
    draw = lambda: tasks.generate(  # noqa: E731
        decoder, tokenizer, ["a", "b"], max_new_tokens=9, temperature=1.0, num_return_sequences=3,
        generator=torch.Generator().manual_seed(4),
    )  # fmt: skip
    assert len(draw()) == 6
    assert draw() == draw()
    assert len(set(draw())) > 2


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語 🙂🙃", "a\n b"])
def test_stream_never_splits_a_character(text, decoder, tokenizer, monkeypatch):
    script(decoder, text, monkeypatch)
    pieces = list(tasks.stream_text(decoder, tokenizer, "x", max_new_tokens=60))
    assert "".join(pieces) == text
    assert all("�" not in piece and piece for piece in pieces)
    assert len(pieces) == len(text)


def test_stream_cut_inside_a_character_shows_that_it_was(decoder, tokenizer, monkeypatch):
    script(decoder, "aé", monkeypatch)
    assert list(tasks.stream_text(decoder, tokenizer, "x", max_new_tokens=2)) == ["a", "�"]


def test_stream_equals_generate(decoder, tokenizer):
    knobs = {"max_new_tokens": 30, "top_k": 20, "repetition_penalty": 1.1}
    torch.manual_seed(1)
    whole = tasks.generate(decoder, tokenizer, "Once", **knobs)
    torch.manual_seed(1)
    assert "".join(tasks.stream_text(decoder, tokenizer, "Once", **knobs)) == whole[0]


def test_stream_may_be_left_early(tokenizer):
    model = transfuse.Decoder(config("decoder")).train()
    pieces = tasks.stream_text(model, tokenizer, "x", max_new_tokens=60)
    next(pieces)
    pieces.close()
    assert model.training


def test_encoder_decoder_writes_its_own_text(tokenizer):
    model = transfuse.Seq2Seq(config("encoder_decoder", decoder_start_token_id=257)).eval()
    got = tasks.generate(model, tokenizer, ["one", "and another"], max_new_tokens=7)
    for prompt, text in zip(["one", "and another"], got, strict=True):
        tokens = model.generate(torch.tensor([tokenizer.encode(prompt)]), max_new_tokens=7, eos_token_id=258)[0, 1:]
        assert text == tokenizer.decode(tokens)
    assert "".join(tasks.stream_text(model, tokenizer, "one", max_new_tokens=7)) == got[0]


def test_text_mistakes(decoder, tokenizer):
    for call, message in [
        (lambda f: f(decoder, tokenizer, "x", max_new_tokens=0), "max_new_tokens must be a whole number of at least 1"),
        (lambda f: f(decoder, tokenizer, "x", temperature=-1.0), "temperature must be at least 0, got -1.0"),
        (lambda f: f(decoder, tokenizer, "", add_special_tokens=False), r"must hold a token, prompts\[0\] is ''"),
        (lambda f: f(decoder, tokenizer, "x" * 300), "the prompt must fit the model's context of 128 tokens, got 302"),
    ]:
        for function in (tasks.generate, tasks.stream_text):
            with pytest.raises(ArgumentError, match=message):
                call(function)
    with pytest.raises(ArgumentError, match="generate: prompts: expected a text or several, got NoneType"):
        tasks.generate(decoder, tokenizer, None)
    with pytest.raises(ArgumentError, match="expected at least one prompt, got none"):
        tasks.generate(decoder, tokenizer, [])


# --- batches --------------------------------------------------------------------------------------------------------


def test_batches_are_of_like_length_and_results_in_order(decoder, tokenizer, monkeypatch):
    prompts = ["a longer prompt than others", "x", "some words", "é", "y"]
    alone = [tasks.generate(decoder, tokenizer, prompt, max_new_tokens=6)[0] for prompt in prompts]
    shapes, generate = [], transfuse.generation.generate

    def counted(model, ids, *args, **kw):
        shapes.append(tuple(ids.shape))
        return generate(model, ids, *args, **kw)

    monkeypatch.setattr(tasks.text.generation, "generate", counted)
    assert tasks.generate(decoder, tokenizer, prompts, max_new_tokens=6, batch_size=2) == alone
    assert shapes == [(2, 29), (2, 4), (1, 3)]
    two = tasks.generate(
        decoder, tokenizer, prompts, max_new_tokens=6, batch_size=2, num_beams=3, num_return_sequences=2
    )
    assert len(two) == 10
    best = tasks.generate(decoder, tokenizer, prompts[2], max_new_tokens=6, num_beams=3)
    assert two[4] == best[0]


def test_a_bar_is_shown_on_a_terminal_only_and_only_for_long_input(encoder, tokenizer, monkeypatch, capsys):
    texts = ["text"] * 20
    tasks.embed(encoder, tokenizer, texts, batch_size=1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    tasks.embed(encoder, tokenizer, texts, batch_size=10)
    assert capsys.readouterr().err == "", "two batches are over before a bar would help"
    tasks.embed(encoder, tokenizer, texts, batch_size=1, progress=False)
    assert capsys.readouterr().err == ""
    tasks.embed(encoder, tokenizer, texts, batch_size=1)
    captured = capsys.readouterr()
    assert "embed" in captured.err
    assert captured.out == ""


# --- classes, answers, gaps -----------------------------------------------------------------------------------------


def test_entities_of_a_text_longer_than_the_model_takes(tokenizer):
    """A classifier that sees one byte: what it says of each must not depend on where windows begin."""
    model = TokenClassifier(config("encoder", num_layers=1, position="none", max_positions=24), 2).eval()
    model.labels = ("O", "I-VOWEL")
    with torch.no_grad():
        block = model.encoder.layers[0]
        block.attention.out.weight.zero_()
        block.feed_forward.down.weight.zero_()
        vowels = [BYTES.index(c) for c in "aeiou"]
        table = model.encoder.embeddings.token.weight
        table.zero_()
        table[:, 0], table[:, 1] = 1.0, -1.0
        table[vowels, 0], table[vowels, 1] = -1.0, 1.0
        model.classifier.weight.zero_()
        model.classifier.weight[0, 0] = model.classifier.weight[1, 1] = 9.0
        model.classifier.bias.zero_()
    text = "queueing beautiful audio, " * 9 + "é aeo"
    expected = [[m.start(), m.end()] for m in re.finditer("[aeiou]+", text)]
    for settings in ({"max_length": 24}, {"max_length": 11, "stride": 0}, {"max_length": 11, "stride": 8}, {}):
        found = tasks.token_classify(model, Tokenizer(tokenizer.backend, tokenizer.settings), [text, "b"], **settings)
        assert [[e.start, e.end] for e in found[0]] == expected
        assert {e.label for e in found[0]} == {"VOWEL"}
        assert found[1] == []


def test_of_two_windows_the_one_that_shows_more_decides(tokenizer):
    windows = tokenizer.windows("abcdefghij", max_length=8, stride=4)[0]  # <s> and </s> stand in each
    assert [w.offsets[1][0] for w in windows] == [0, 2, 4]
    best = [([0.5] * 8, [n] * 8) for n in range(3)]  # each window gives its number
    tokens = tasks.classification._tokens("abcdefghij", windows, best, ["0", "1", "2"])
    assert "".join(token.label for token in tokens) == "0000112222"
    assert "".join(token.text for token in tokens) == "abcdefghij"


def test_an_answer_is_found_wherever_it_stands_in_a_long_context(tokenizer):
    """A model that points at "Z": the windows must cover the whole context, and offsets be those of the text."""
    model = SpanClassifier(config("encoder", num_layers=1, position="none")).eval()
    with torch.no_grad():
        model.encoder.layers[0].attention.out.weight.zero_()
        model.encoder.layers[0].feed_forward.down.weight.zero_()
        table = model.encoder.embeddings.token.weight
        table.zero_()
        table[:, 0], table[:, 1] = 1.0, -1.0
        table[BYTES.index("Z"), 0], table[BYTES.index("Z"), 1] = -1.0, 1.0
        model.classifier.weight.zero_()
        model.classifier.weight[:, 1] = 9.0
    for before in (0, 1, 37, 90, 150):
        context = "ab cd " * (before // 6) + "é" * (before % 6) + " xZy " + "ef " * 30
        for knobs in ({}, {"max_length": 30, "stride": 10}, {"max_length": 30, "stride": 0}):
            best = tasks.answer(model, tokenizer, "where?", context, **knobs)[0][0]
            assert best.text == "xZy" == context[best.start : best.end], (before, knobs)


def test_wrong_models_and_tokenizers(encoder, decoder, tokenizer):
    heads = {
        tasks.classify: (SequenceClassifier(config("encoder", pooler=True), 2), ["a"]),
        tasks.token_classify: (TokenClassifier(config("encoder"), 2), ["a"]),
        tasks.answer: (SpanClassifier(config("encoder")), ["a", "b"]),
        tasks.fill_mask: (MaskedLM(config("encoder")), ["a"]),
        tasks.generate: (decoder, ["a"]),
        tasks.stream_text: (decoder, ["a"]),
        tasks.embed: (encoder, ["a"]),
        tasks.translate: (transfuse.Seq2Seq(config("encoder_decoder", bos_token_id=1)), ["a"]),
        tasks.summarize: (transfuse.Seq2Seq(config("encoder_decoder", bos_token_id=1)), ["a"]),
    }
    large = tokenizers.Tokenizer(tokenizers.models.BPE({str(i): i for i in range(300)}, []))
    for task, (model, texts) in heads.items():
        for wrong in (None, "minilm", torch.nn.Linear(2, 2), SpanClassifier):
            with pytest.raises(ArgumentError, match=r": expected a model of kind .*, got (None|str|Linear|type); "):
                task(wrong, tokenizer, *texts)
        for wrong in (None, "minilm", tokenizer.backend):
            with pytest.raises(ArgumentError, match=r"expected the model's tokenizer, got (None|str|Tokenizer); "):
                task(model, wrong, *texts)
        with pytest.raises(CheckpointError, match=r"gives ids up to 299, the model's vocabulary has 259 tokens"):
            task(model, Tokenizer(large), *texts)
        other = encoder if task in (tasks.generate, tasks.stream_text) else decoder
        if task is not tasks.embed:
            with pytest.raises(ArgumentError, match=rf"expected a model of kind .*, got {type(other).__name__}; "):
                task(other, tokenizer, *texts)
    with pytest.raises(ArgumentError, match="count_tokens: expected a tokenizer, got NoneType"):
        tasks.count_tokens(None, "a")


def test_mistakes_of_the_reading_tasks(tokenizer):
    bare = Tokenizer(tokenizer.backend.from_str(tokenizer.backend.to_str()))
    bare.backend.post_processor = tokenizers.processors.Sequence([])
    classifier = SequenceClassifier(config("encoder", pooler=True), 2)
    tagger, spans = TokenClassifier(config("encoder"), 2), SpanClassifier(config("encoder"))
    filler = MaskedLM(config("encoder"))
    masked = Tokenizer(tokenizer.backend, TokenizerSettings({"pad": "<pad>", "mask": "<s>"}))
    for call, message in [
        (lambda: tasks.classify(classifier, bare, ["a", ""]), r"every text must hold a token, texts\[1\] is ''"),
        (lambda: tasks.classify(classifier, tokenizer, "a", top_k=0), "classify: top_k must be .* at least 1, got 0"),
        (lambda: tasks.classify(classifier, tokenizer, ["a"], ["b", "c"]), "got 1 texts and 2 pairs"),
        (lambda: tasks.classify(classifier, tokenizer, ["a"], batch_size=0), "batch_size must be .* got 0"),
        (lambda: tasks.classify(classifier, tokenizer, 3), "classify: texts: expected a text or several, got int"),
        (
            lambda: tasks.token_classify(tagger, tokenizer, "a", aggregation="max"),
            "must be 'simple' or 'none', got 'max'",
        ),
        (lambda: tasks.token_classify(tagger, tokenizer, "a", stride=200), "stride must be from 0 to 125, got 200"),
        (lambda: tasks.answer(spans, tokenizer, ["a", "b"], ["c"]), "a context for each question, got 2 and 1"),
        (
            lambda: tasks.answer(spans, tokenizer, "x" * 200, "b"),
            "takes 200 of a window's 128 tokens and windows share 64",
        ),
        (lambda: tasks.answer(spans, tokenizer, "", "b"), r"every question must hold a word, questions\[0\] is ''"),
        (lambda: tasks.answer(spans, tokenizer, "a", "b", max_answer_tokens=0), "max_answer_tokens must be"),
        (lambda: tasks.fill_mask(filler, tokenizer, "a"), "the tokenizer has no mask token"),
        (lambda: tasks.fill_mask(filler, masked, "x" * 200), r"texts\[0\] has 202 tokens, the model takes 128"),
        (lambda: tasks.fill_mask(filler, masked, "a", targets=["bc"]), "'bc' is b, c"),
        (lambda: tasks.fill_mask(filler, masked, "a", targets=[]), "at least one target, got none"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            call()


def test_an_empty_context_holds_no_answer(tokenizer):
    model = SpanClassifier(config("encoder")).eval()
    assert tasks.answer(model, tokenizer, "who", "") == [[]]
    assert [a.text for a in tasks.answer(model, tokenizer, "who", "", no_answer=True)[0]] == [""]


def test_no_texts_give_no_results(tokenizer):
    assert tasks.classify(SequenceClassifier(config("encoder", pooler=True), 2), tokenizer, []) == []
    assert tasks.token_classify(TokenClassifier(config("encoder"), 2), tokenizer, []) == []
    assert tasks.answer(SpanClassifier(config("encoder")), tokenizer, [], "a") == []
    assert tasks.count_tokens(tokenizer, []) == []


def test_a_translation_starts_with_what_the_checkpoint_or_the_caller_says(tokenizer):
    model = transfuse.Seq2Seq(config("encoder_decoder", decoder_start_token_id=257)).eval()

    def expected(text):
        return tasks.generate(model, tokenizer, text, max_new_tokens=5)

    assert tasks.translate(model, tokenizer, "cat", max_new_tokens=5) == expected("cat")
    assert tasks.translate(model, tokenizer, "cat", prefix="to x: ", max_new_tokens=5) == expected("to x: cat")
    model.task_settings = {"prefix": "p "}
    assert tasks.summarize(model, tokenizer, "cat", max_new_tokens=5) == expected("p cat")
    pair = {"prefix": "one ", "max_length": 4}
    model.task_settings = {"task_specific_params": {"translation_a_to_b": pair}}
    assert tasks.translate(model, tokenizer, "cat", max_new_tokens=5) == expected("one cat")
    short = tasks.generate(model, tokenizer, "one cat", max_new_tokens=3)
    assert tasks.translate(model, tokenizer, "cat") == short, "the checkpoint's max_length counts the start"
    with pytest.raises(ArgumentError, match="the checkpoint translates a_to_b; got source 'b' and target 'a'"):
        tasks.translate(model, tokenizer, "cat", source="b", target="a")
    with pytest.raises(ArgumentError, match=r"every text must hold a word, texts\[1\] is ' '"):
        tasks.translate(model, tokenizer, ["cat", " "])


def test_a_vocabulary_with_codes_of_languages(tokenizer):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(BYTES)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", ">>de<<", "</s>"])
    coded = Tokenizer(backend, TokenizerSettings({"pad": "<pad>", "eos": "</s>"}))
    model = transfuse.Seq2Seq(config("encoder_decoder", decoder_start_token_id=256)).eval()
    expected = tasks.generate(model, coded, ">>de<< cat", max_new_tokens=6)
    assert tasks.translate(model, coded, "cat", target="de", max_new_tokens=6) == expected
    with pytest.raises(ArgumentError, match="the checkpoint translates to de; got target 'fr'"):
        tasks.translate(model, coded, "cat", target="fr")
