"""Guessed tokens: the text is the plain loop's, greedy or drawn, alone or in a batch, for fewer runs of the model."""

from __future__ import annotations

import pytest
import torch

import transfuse
from generation_cases import EOS, expected, pair, prompts
from model_cases import one_thread  # noqa: F401 (a fixture)
from test_generation_beams import Watched, tiny
from transfuse.errors import ArgumentError
from transfuse.generation import generate, stream
from transfuse.generation.speculative import PromptLookup

FAMILIES = ["llama", "gpt2", "gpt_neo", "t5", "bart", "marian"]
KNOBS = [
    {},
    {"no_repeat_ngram_size": 3, "repetition_penalty": 1.2},
    {"eos_token_id": EOS, "min_new_tokens": 4},
    {"do_sample": True, "top_k": 8, "num_return_sequences": 2, "eos_token_id": EOS},
    {"temperature": 0.1, "num_return_sequences": 2, "eos_token_id": range(15), "forced_eos_token_id": 3},
]


def assistant_of(model, noise=0.03):
    """A model that mostly, and not always, says what ``model`` says."""
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p) * noise * p.std().nan_to_num(0.1))
    return other


def both(model, ids, mask, ways, **knobs):
    """The text of the plain loop, and with guesses, each with the same random numbers."""
    knobs = {"eos_token_id": (), "max_new_tokens": 24, "pad_token_id": 0, **knobs}
    seeded = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    plain = generate(model, ids, mask, generator=seeded(), **knobs)
    return plain, [generate(model, ids, mask, generator=seeded(), **knobs, **way) for way in ways]


@pytest.mark.parametrize("family", FAMILIES)
def test_guessing_changes_no_text(family):
    model = pair(family)[0]
    helper = assistant_of(model)
    ways = [{"prompt_lookup_num_tokens": 3}, {"assistant_model": helper}, {"assistant_model": model}]
    # Rows of their own lengths, which end at different steps and leave.
    ids, mask = prompts([7, 2, 5, 1], family)
    for knobs in KNOBS:
        plain, guessed = both(model, ids, mask, ways, **knobs)
        for text in guessed:
            assert torch.equal(text, plain), knobs


def test_guessing_equals_transformers():
    ours, theirs = pair("llama")
    ids, _ = prompts([6])
    knobs = {"max_new_tokens": 20, "pad_token_id": 0}
    want = expected(theirs, ids, prompt_lookup_num_tokens=3, **knobs)
    assert torch.equal(ours.generate(ids, eos_token_id=(), prompt_lookup_num_tokens=3, **knobs), want)


def test_an_assistant_saves_runs():
    model = pair("llama")[0]
    ids, _ = prompts([6])
    for guesses, runs in [(1, 13), (4, 6), (30, 2)]:
        watched = Watched(model)
        text = generate(
            watched, ids, max_new_tokens=25, eos_token_id=(), assistant_model=model, num_assistant_tokens=guesses
        )
        assert torch.equal(text, model.generate(ids, max_new_tokens=25, eos_token_id=()))
        assert len(watched.rows) == runs  # one for the prompt, then so many guesses and one token more each


def test_a_text_that_repeats_itself_is_looked_up():
    class Counting:
        """Says 1, 2, ..., 6, 0, 1, ... for ever."""

        config = None

        def __init__(self):
            self.runs = 0
            self.cache = type("Cache", (), {"crop": lambda self, length: None})()

        def new_cache(self, batch, max_length):
            return self.cache

        def __call__(self, ids, **kw):
            self.runs += 1
            return type("Out", (), {"logits": torch.nn.functional.one_hot((ids + 1) % 7, 9).float()})

    model, ids = Counting(), torch.arange(8)[None] % 7
    text = generate(model, ids, max_new_tokens=30, prompt_lookup_num_tokens=5)
    assert text[0].tolist() == [i % 7 for i in range(38)]
    assert model.runs == 6  # the prompt with 1 token, then 6, 6, 6, 6 and 5 at a time


def test_what_is_looked_up():
    lookup = PromptLookup(3)
    history = torch.tensor([[1, 2, 3, 9, 1, 2, 4, 5, 1, 2], [7, 7, 7, 7, 7, 7, 7, 7, 7, 7]])
    assert lookup.guess(history, 9)[0].tolist() == [4, 5, 1]  # the latest
    assert lookup.guess(history, 2)[0].tolist() == [4, 5]
    assert lookup.guess(torch.tensor([[1, 2, 3]]), 9).shape == (1, 0)
    assert lookup.guess(torch.tensor([[-1, -1, 3]]), 9).shape == (1, 0)
    longest = torch.tensor([[1, 2, 3, 8, 9, 3, 0, 1, 2, 3]])
    assert lookup.guess(longest, 9)[0].tolist() == [8, 9, 3]  # three tokens match, not one
    source = PromptLookup(2, torch.tensor([[5, 6, 7, 8]]))
    assert source.guess(torch.tensor([[0, 6]]), 9)[0].tolist() == [7, 8]


def test_streams_guess_too():
    model = pair("gpt2")[0]
    ids, _ = prompts([6])
    plain = [int(t) for t in stream(model, ids, max_new_tokens=15, eos_token_id=())]
    helper = assistant_of(model).train()
    steps = stream(model, ids, max_new_tokens=15, eos_token_id=(), assistant_model=helper)
    first = int(next(steps))
    assert not helper.training
    assert [first, *(int(t) for t in steps)] == plain
    assert helper.training


def test_scores_of_guessed_tokens():
    model = pair("llama")[0]
    ids, mask = prompts([6, 3])
    knobs = {"max_new_tokens": 12, "eos_token_id": EOS, "output_scores": True}
    plain = model.generate(ids, mask, **knobs)
    guessed = model.generate(ids, mask, prompt_lookup_num_tokens=4, **knobs)
    assert torch.equal(guessed.sequences, plain.sequences)
    torch.testing.assert_close(guessed.scores, plain.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make, knobs, message",
    [
        (lambda: torch.nn.Linear(2, 2), {}, "expected as assistant_model a model with new_cache.* got Linear"),
        (lambda: pair("t5")[0], {}, "assistant_model must be a decoder like the model, got an encoder-decoder"),
        (lambda: tiny(), {}, "assistant_model must have the model's vocabulary of 61, got 5"),
        (
            lambda: pair("llama")[0],
            {"num_beams": 2},
            "assistant_model needs num_beams=1 and no prompt_lookup_num_tokens",
        ),
        (
            lambda: pair("llama")[0],
            {"prompt_lookup_num_tokens": 2},
            "assistant_model needs num_beams=1 and no prompt_l",
        ),
        (lambda: short(4), {}, "the prompt must fit assistant_model's context of 4 tokens, got 5"),
        (lambda: short(9), {}, "prompt and new tokens must fit assistant_model's context of 9 tokens, got 24"),
    ],
    ids=["no-model", "kind", "vocabulary", "beams", "lookup", "prompt", "context"],
)
def test_mistakes(make, knobs, message):
    with pytest.raises(ArgumentError, match=message):
        generate(pair("llama")[0], prompts([5])[0], assistant_model=make(), max_new_tokens=20, **knobs)


def short(context):
    config = transfuse.TransformerConfig("decoder", 61, 16, num_layers=1, num_heads=2, max_positions=context)
    return transfuse.Decoder(config)


def test_a_cache_that_cannot_crop():
    class Plain:
        config = None

        def new_cache(self, batch, max_length):
            return object()

    with pytest.raises(ArgumentError, match="needs a key/value cache with crop, object of Plain has none"):
        generate(Plain(), torch.tensor([[5]]), prompt_lookup_num_tokens=2)
