"""Arguments of another kind than the tasks take: each is one clear error, and what could be meant is taken as meant."""

from __future__ import annotations

import pytest
import torch

import transfuse
from test_tasks import config, decoder, encoder, tokenizer  # noqa: F401 (fixtures)
from transfuse import tasks
from transfuse.errors import ArgumentError
from transfuse.generation import GenerationConfig
from transfuse.models import SpanClassifier, TokenClassifier


def seq2seq(**changes):
    return transfuse.Seq2Seq(config("encoder_decoder", decoder_start_token_id=257, **changes)).eval()


@pytest.mark.parametrize("prompt", [["a", "b"], [], None, 3], ids=repr)
def test_a_stream_has_one_prompt(decoder, tokenizer, prompt):  # noqa: F811
    with pytest.raises(ArgumentError, match=r"expected one prompt, a str, got (list|NoneType|int); generate takes sev"):
        tasks.stream_text(decoder, tokenizer, prompt)


def test_a_stream_has_one_text(decoder, tokenizer):  # noqa: F811
    with pytest.raises(ArgumentError, match="expected num_return_sequences of 1, got 2; see generate"):
        tasks.stream_text(decoder, tokenizer, "a", num_return_sequences=2, do_sample=True)


@pytest.mark.parametrize("given", ["greedy", {}, 0, {"num_beams": 2}, torch.zeros(2)], ids=repr)
def test_settings_of_another_kind(decoder, tokenizer, given):  # noqa: F811
    message = f"generation_config must be a transfuse GenerationConfig, got {type(given).__name__}"
    for call in (tasks.generate, tasks.stream_text):
        with pytest.raises(ArgumentError, match=message):
            call(decoder, tokenizer, "a", generation_config=given)
    with pytest.raises(ArgumentError, match=message):
        decoder.generate(torch.tensor([[1]]), generation_config=given)


@pytest.mark.parametrize("value", [3, ["to x: "], b"x"], ids=repr)
def test_words_that_are_none(tokenizer, value):  # noqa: F811
    model = seq2seq()
    for name in ("prefix", "source", "target"):
        with pytest.raises(
            ArgumentError, match=rf"translate: {name} must be a text \(str\), got {type(value).__name__}"
        ):
            tasks.translate(model, tokenizer, "a", **{name: value})
    with pytest.raises(ArgumentError, match="summarize: prefix must be a text"):
        tasks.summarize(model, tokenizer, "a", prefix=value)


def test_texts_without_a_dimension(encoder, tokenizer):  # noqa: F811
    with pytest.raises(ArgumentError, match="embed: texts: expected a text or several, got Tensor"):
        tasks.embed(encoder, tokenizer, torch.tensor(1))


@pytest.mark.parametrize("value", [None, "yes", 1], ids=repr)
def test_special_tokens_are_added_or_not(decoder, tokenizer, value):  # noqa: F811
    with pytest.raises(ArgumentError, match="add_special_tokens must be True or False, got"):
        tasks.generate(decoder, tokenizer, "a", add_special_tokens=value)
    with pytest.raises(ArgumentError, match="add_special_tokens must be True or False, got"):
        tasks.count_tokens(tokenizer, "a", add_special_tokens=value)


@pytest.mark.parametrize("value", ["x", [3], 1.5, 0], ids=repr)
def test_lengths_of_windows(tokenizer, value):  # noqa: F811
    model, spans = TokenClassifier(config("encoder"), 2), SpanClassifier(config("encoder"))
    with pytest.raises(ArgumentError, match="token_classify: max_length must be a whole number of at least 1"):
        tasks.token_classify(model, tokenizer, "a", max_length=value)
    with pytest.raises(ArgumentError, match="answer: max_length must be a whole number of at least 1"):
        tasks.answer(spans, tokenizer, "a", "b", max_length=value)
    if value != 0:
        with pytest.raises(ArgumentError, match="tokenizer: stride must be from 0 to"):
            tasks.token_classify(model, tokenizer, "a", stride=value)


def test_numbers_beyond_every_text(encoder, tokenizer):  # noqa: F811
    model = SpanClassifier(config("encoder")).eval()
    plain = tasks.answer(model, tokenizer, "a", "b c", max_answer_tokens=30)
    assert tasks.answer(model, tokenizer, "a", "b c", max_answer_tokens=10**30) == plain
    assert torch.equal(tasks.embed(encoder, tokenizer, "a", max_length=10**30), tasks.embed(encoder, tokenizer, "a"))


def test_one_label_to_ignore(tokenizer):  # noqa: F811
    model = TokenClassifier(config("encoder"), 1).eval()
    model.labels = ("NO",)
    assert tasks.token_classify(model, tokenizer, "a", ignore="NO") == [[]]
    assert tasks.token_classify(model, tokenizer, "a", ignore="NONE") != [[]]
    for ignore in (3, b"NO", [None], torch.tensor(1)):
        with pytest.raises(ArgumentError, match="token_classify: ignore must be labels, got "):
            tasks.token_classify(model, tokenizer, "a", ignore=ignore)


@pytest.mark.parametrize("pooling", [["mean"], {}, None], ids=repr)
def test_a_pooling_that_is_none(encoder, tokenizer, pooling):  # noqa: F811
    with pytest.raises(ArgumentError, match="embed: pooling must be one of mean, max, first, last, got"):
        tasks.embed(encoder, tokenizer, "a", pooling=pooling)


def test_a_map_is_of_one_text(encoder, tokenizer):  # noqa: F811
    with pytest.raises(ArgumentError, match=r"attention_maps: text must be one text \(str\), got list"):
        tasks.attention_maps(encoder, tokenizer, ["a", "b"])
    with pytest.raises(ArgumentError, match=r"attention_maps: target must be one text \(str\), got int"):
        tasks.attention_maps(seq2seq(), tokenizer, "a", target=3)


def test_a_map_of_what_a_model_writes_is_greedy_whatever_its_checkpoint_says(tokenizer):  # noqa: F811
    model = seq2seq()
    plain = tasks.attention_maps(model, tokenizer, "a", max_new_tokens=12)["decoder"].tokens
    model.generation_config = GenerationConfig(temperature=50.0, num_beams=3, num_return_sequences=2)
    assert tasks.attention_maps(model, tokenizer, "a", max_new_tokens=12)["decoder"].tokens == plain
