"""Generation where it could go silently wrong: one model used twice at a time, scores that overflow or are NaN."""

from __future__ import annotations

import threading

import pytest
import torch

from model_cases import build, make_config, one_thread  # noqa: F401 (a fixture)
from transfuse.errors import ArgumentError, DeviceError
from transfuse.generation import generate
from transfuse.generation.processors import scale_temperature

IDS = torch.tensor([[3, 1, 4, 1]])


def dropping_model():
    """A model whose every call would differ in training mode, in training mode."""
    model = build(make_config("decoder", hidden_dropout=0.5, ffn_dropout=0.5))
    return model, model.generate(IDS, max_new_tokens=8)[0, 4:].tolist(), model.train()


def test_two_streams_of_one_model_in_training_mode():
    model, expected, _ = dropping_model()
    first, second = model.stream(IDS, max_new_tokens=8), model.stream(IDS, max_new_tokens=8)
    read = [next(first), next(second)]
    first.close()
    assert not model.training
    assert [int(t) for t in (read[1], *second)] == expected
    assert all(module.training for module in model.modules())


def test_threads_share_a_model_in_training_mode():
    model, expected, _ = dropping_model()
    found = []

    def run():
        found.extend(model.generate(IDS, max_new_tokens=8)[0, 4:].tolist() for _ in range(5))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 20
    assert model.training


@pytest.mark.parametrize("temperature", [1e-45, 5e-324, 1e300])
def test_any_temperature_draws(temperature):
    model = build(make_config("decoder"))
    tokens = model.generate(IDS, max_new_tokens=4, temperature=temperature)
    if temperature < 1:
        assert torch.equal(tokens, model.generate(IDS, max_new_tokens=4))
    scores = torch.tensor([[-100.0, 3.0, 60.0, float("-inf")]])
    assert not scale_temperature(scores, temperature).isnan().any()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_say_nothing(value, options):
    model = build(make_config("decoder"))
    with torch.no_grad():
        model.final_norm.bias.fill_(value)
    with pytest.raises(ArgumentError, match="scores must be finite, got nan; the weights are damaged, or too large"):
        model.generate(IDS, max_new_tokens=2, **options)


def test_a_penalty_that_overflows():
    with pytest.raises(ArgumentError, match="scores must be finite, got inf"):
        build(make_config("decoder")).generate(IDS, max_new_tokens=30, repetition_penalty=1e-300)


@pytest.mark.parametrize("number", [10**30, 10**400], ids=["1e30", "1e400"])
def test_numbers_larger_than_a_tensor_holds(number):
    model = build(make_config("decoder"))
    for name, words in (
        ("pad_token_id", "must be a token id, at most"),
        ("eos_token_id", "must be a token id, at most"),
    ):
        with pytest.raises(ArgumentError, match=f"{name} {words}"):
            model.generate(IDS, **{name: number})
    for name in ("temperature", "repetition_penalty"):
        if number < 1e300:
            assert model.generate(IDS, max_new_tokens=2, **{name: number}).shape == (1, 6)
        else:
            with pytest.raises(ArgumentError, match=f"{name} must be"):
                model.generate(IDS, **{name: number})


@pytest.mark.parametrize("value", [[], (3, 4), b"ab", "a"], ids=repr)
@pytest.mark.parametrize("name", ["forced_bos_token_id", "pad_token_id", "decoder_start_token_id"])
def test_one_id_where_one_is_meant(name, value):
    with pytest.raises(ArgumentError, match=f"{name} must be a token id of at least 0, got "):
        build(make_config("decoder")).generate(IDS, **{name: value})


def test_bytes_are_no_ids():
    with pytest.raises(ArgumentError, match="eos_token_id must be a token id of at least 0, got b'ab'"):
        build(make_config("decoder")).generate(IDS, eos_token_id=b"ab")


def test_ids_without_values():
    with pytest.raises(DeviceError, match="input_ids must hold values, got a tensor on the meta device"):
        build(make_config("decoder")).generate(IDS.to("meta"))


@pytest.mark.parametrize("model", [None, torch.nn.Linear(2, 2)], ids=["None", "Linear"])
def test_what_cannot_generate(model):
    with pytest.raises(
        ArgumentError, match=f"expected a model with new_cache, such as a Decoder, got {type(model).__name__}"
    ):
        generate(model, IDS)
