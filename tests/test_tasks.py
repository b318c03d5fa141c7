"""Tasks on tiny models: embeddings against a computation by hand, text in and out, streaming of partial characters."""

from __future__ import annotations

import pytest
import torch

import transfuse
from transfuse import tasks
from transfuse.errors import ArgumentError
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
