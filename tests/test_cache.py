"""The key/value cache: cached results equal uncached ones, however the tokens arrive, and rows can be moved about."""

from __future__ import annotations

import copy

import pytest
import torch

from model_cases import POSITIONS, VARIANTS, build, make_config, one_thread, padding  # noqa: F401 (a fixture)
from transfuse.errors import ArgumentError
from transfuse.models import KVCache

LENGTH = 11
CHUNKS = {"steps": [1] * LENGTH, "prompt-and-steps": [6, 1, 1, 1, 1, 1], "chunks": [4, 3, 3, 1], "whole": [LENGTH]}
CASES = {
    **{p: {"position": p} for p in POSITIONS},
    **{n: v for n, v in VARIANTS.items() if n not in ("head", "untied", "no-bias", "embeddings")},
    "post": {"norm_placement": "post", "final_norm": False, "embedding_norm": True},
    "post-window-grouped": {"norm_placement": "post", "window": 4, "num_kv_heads": 1, "position": "rotary"},
}


def decoder_and_inputs(architecture, changes):
    if architecture == "decoder":
        changes = {k: v for k, v in changes.items() if k != "num_decoder_layers"}
    config = make_config(architecture, **changes)
    model = build(config).double()
    inputs = {}
    if architecture == "encoder_decoder":
        inputs = {"input_ids": torch.randint(0, 61, (3, 8)), "attention_mask": padding(3, 8, "right")}
    return model, torch.randint(0, 61, (3, LENGTH)), inputs


def call(model, ids, mask, inputs, cache=None):
    """The model on target ids; a Seq2Seq with its source."""
    if not inputs:
        return model(ids, mask, cache=cache)
    return model(**inputs, decoder_input_ids=ids, decoder_attention_mask=mask, cache=cache)


def feed(model, ids, inputs, chunks, masks):
    """Logits of all tokens, fed in chunks through one cache."""
    cache = model.new_cache(ids.shape[0], ids.shape[1])
    parts, start = [], 0
    for i, n in enumerate(chunks):
        source = inputs if not inputs or i == 0 else {"input_ids": None}  # the cache holds what is needed of it
        parts.append(call(model, ids[:, start : start + n], masks(start, n), source or inputs, cache).logits)
        start += n
        assert cache.length == start
    return torch.cat(parts, 1)


@pytest.mark.parametrize("how", CHUNKS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
@torch.no_grad()
def test_cached_equals_uncached(architecture, case, how):
    model, ids, inputs = decoder_and_inputs(architecture, CASES[case])
    expected = call(model, ids, None, inputs).logits
    got = feed(model, ids, inputs, CHUNKS[how], lambda start, n: None)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("masks", ["first-only", "new", "all-so-far"])
@pytest.mark.parametrize("how", ["prompt-and-steps", "chunks"])
@pytest.mark.parametrize("case", ["learned", "rotary", "relative", "sinusoidal", "window", "local-global", "grouped"])
@torch.no_grad()
def test_left_padding(case, how, masks):
    """However the mask is handed over, a row equals the row alone."""
    model, ids, inputs = decoder_and_inputs("decoder", CASES[case])
    mask = padding(3, LENGTH, "left")
    give = {
        "first-only": lambda start, n: mask[:, :n] if start == 0 else None,
        "new": lambda start, n: mask[:, start : start + n],
        "all-so-far": lambda start, n: mask[:, : start + n],
    }[masks]
    got = feed(model, ids, inputs, CHUNKS[how], give)
    assert got.isfinite().all()
    for row in range(3):
        pad = 2 * row
        alone = model(ids[row : row + 1, pad:]).logits[0]
        torch.testing.assert_close(got[row, pad:], alone, rtol=0, atol=1e-12)


@torch.no_grad()
def test_masks_in_the_middle():
    """A row may take part in a step or not (its token is padding then): rows of a batch need not keep step."""
    model, ids, _ = decoder_and_inputs("decoder", {"position": "rotary"})
    cache = model.new_cache(2, 8)
    model(ids[:2, :3], cache=cache)
    model(ids[:2, 3:4], torch.tensor([[1], [0]]), cache=cache)  # the second row's token does not count
    got = model(ids[:2, 4:6], cache=cache).logits
    torch.testing.assert_close(got[0], model(ids[:1, :6]).logits[0, 4:], rtol=0, atol=1e-12)
    skipped = torch.cat([ids[1:2, :3], ids[1:2, 4:6]], 1)
    torch.testing.assert_close(got[1], model(skipped).logits[0, 3:], rtol=0, atol=1e-12)


@torch.no_grad()
def test_fp32_step_equals_whole():
    """In fp32 too, within the rounding of the two orders of summation."""
    config = make_config("decoder", position="rotary", norm="rms", gated=True, activation="silu", num_kv_heads=2)
    model = build(config)
    ids = torch.randint(0, 61, (2, 40))
    whole = model(ids).logits
    cache = model.new_cache(2, 40)
    steps = torch.cat([model(ids[:, i : i + 1], cache=cache).logits for i in range(40)], 1)
    exact = copy.deepcopy(model).double()(ids).logits
    error = (whole - exact).abs().max()
    assert (steps - exact).abs().max() <= 2 * error + 8 * torch.finfo(torch.float32).eps * exact.abs().max()


@torch.no_grad()
def test_attention_maps_of_a_step():
    model, ids, inputs = decoder_and_inputs("encoder_decoder", {"num_kv_heads": 2})
    whole = model(**inputs, decoder_input_ids=ids, output_attentions=True)
    cache = model.new_cache(3, LENGTH)
    model(**inputs, decoder_input_ids=ids[:, :-1], cache=cache)
    step = model(decoder_input_ids=ids[:, -1:], cache=cache, output_attentions=True)
    for got, expected in zip(step.attentions, whole.attentions, strict=True):
        torch.testing.assert_close(got, expected[:, :, -1:])
    for got, expected in zip(step.cross_attentions, whole.cross_attentions, strict=True):
        torch.testing.assert_close(got, expected[:, :, -1:])


@torch.no_grad()
def test_window_in_attention_maps():
    """A step of a local layer reads, and shows, only the keys in its window."""
    model, ids, _ = decoder_and_inputs("decoder", {"window": 3})
    cache = model.new_cache(3, LENGTH)
    model(ids[:, :-1], cache=cache)
    weights = model(ids[:, -1:], cache=cache, output_attentions=True).attentions[0]
    expected = model(ids, output_attentions=True).attentions[0][:, :, -1:]
    assert weights.shape == expected.shape
    torch.testing.assert_close(weights, expected)


@torch.no_grad()
def test_encoder_runs_once():
    model, ids, inputs = decoder_and_inputs("encoder_decoder", {})
    runs = []
    model.encoder.register_forward_hook(lambda *a: runs.append(1))
    kv_runs = []
    model.decoder.layers[0].cross_attention.kv.register_forward_hook(lambda *a: kv_runs.append(1))
    cache = model.new_cache(3, LENGTH)
    for i in range(4):
        out = model(**inputs, decoder_input_ids=ids[:, i : i + 1], cache=cache)
        assert (out.encoder_last_hidden_state is None) == (i > 0)
    assert (len(runs), len(kv_runs)) == (1, 1)
    states = model.encode(**inputs).last_hidden_state
    given = model(
        attention_mask=inputs["attention_mask"], decoder_input_ids=ids[:, :4], encoder_hidden_states=states
    ).logits
    torch.testing.assert_close(out.logits, given[:, 3:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
@torch.no_grad()
def test_reorder_and_select(architecture, padded):
    """Afterwards every row continues as the row it was copied from would."""
    model, ids, inputs = decoder_and_inputs(architecture, {"position": "rotary"})
    mask = padding(3, LENGTH, "left") if padded else None
    for rows, method in (([2, 0, 2], "reorder"), ([1], "select"), ([0, 0, 1, 1, 2, 2], "select"), ([2, 1], "select")):
        index = torch.tensor(rows)
        cache = model.new_cache(3, LENGTH)
        call(model, ids[:, :7], None if mask is None else mask[:, :7], inputs, cache)
        getattr(cache, method)(index)
        assert cache.batch == len(rows)
        got = call(model, ids[index, 7:], None, {"input_ids": None} if inputs else inputs, cache).logits
        moved = {k: v[index] for k, v in inputs.items()}
        expected = call(model, ids[index], None if mask is None else mask[index], moved).logits[:, 7:]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
@torch.no_grad()
def test_widened_rows_share_their_source(architecture, padded):
    """Three prompts with two copies each; afterwards every row continues as one with a source of its own would."""
    model, ids, inputs = decoder_and_inputs(architecture, {"position": "rotary"})
    mask = padding(3, LENGTH, "left") if padded else None
    twice = torch.arange(3).repeat_interleave(2)
    tails = torch.randint(0, 61, (6, 4))
    for method, rows, sources in [
        ("select", [0, 1, 4, 5], 2),  # a prompt leaves with both copies: they go on sharing
        ("select", [5, 4, 1, 0], 2),
        ("select", [0, 3, 4], 3),  # they part: a source each
        ("select", [1, 2], 2),
        ("reorder", [1, 1, 2, 3, 5, 4], 3),  # beams change places among themselves
        ("reorder", [2, 3, 0, 0, 4, 4], 3),
        ("reorder", [0, 2, 2, 3, 4, 5], 6),  # one becomes another prompt's
    ]:
        cache = model.new_cache(3, LENGTH + 4)
        call(model, ids[:, :7], None if mask is None else mask[:, :7], inputs, cache)
        cache.widen(2)
        none = {"input_ids": None} if inputs else inputs
        call(model, tails[:, :2], None, none, cache)
        index = torch.tensor(rows)
        getattr(cache, method)(index)
        assert cache.batch == len(rows)
        got = call(model, tails[index, 2:], None, none, cache).logits
        whole = torch.cat([ids[twice[index], :7], tails[index]], 1)
        seen = None if mask is None else torch.cat([mask[twice[index], :7], torch.ones(len(rows), 4)], 1)
        moved = {k: v[twice[index]] for k, v in inputs.items()}
        torch.testing.assert_close(got, call(model, whole, seen, moved).logits[:, 9:], rtol=0, atol=1e-12)
        if inputs:
            assert cache.layers[0].cross[0].shape[0] == sources


@torch.no_grad()
def test_rows_share_a_source_only_when_they_were_widened():
    model, ids, inputs = decoder_and_inputs("encoder_decoder", {})
    states = model.encode(**inputs).last_hidden_state
    with pytest.raises(ArgumentError, match=r"k must have shape .6, kv_heads, k_len, 8. for q"):
        model.decoder(ids.repeat(2, 1), cache=model.new_cache(6, LENGTH), encoder_hidden_states=states)


@torch.no_grad()
def test_a_reorder_leaves_what_rows_have_in_common():
    model, ids, _ = decoder_and_inputs("decoder", {"position": "rotary"})
    cache = model.new_cache(1, LENGTH)
    model(ids[:1, :7], cache=cache)
    cache.widen(3)
    model(ids[:, 7:8], cache=cache)
    cache.layers[0].keys[1, :, :7].fill_(float("nan"))  # would travel if it were moved
    cache.reorder(torch.tensor([1, 1, 0]), 7)
    assert cache.layers[0].keys[[0, 2]].isfinite().all()
    assert torch.equal(cache.layers[0].keys[0, :, 7], cache.layers[0].keys[1, :, 7])


@torch.no_grad()
def test_cross_attention_maps_of_rows_that_share_their_source():
    model, ids, inputs = decoder_and_inputs("encoder_decoder", {})
    cache = model.new_cache(3, LENGTH)
    call(model, ids[:, :7], None, inputs, cache)
    cache.widen(2)
    got = model(decoder_input_ids=ids.repeat_interleave(2, 0)[:, 7:9], cache=cache, output_attentions=True)
    expected = model(**inputs, decoder_input_ids=ids[:, :9], output_attentions=True)
    for ours, alone in zip(got.cross_attentions, expected.cross_attentions, strict=True):
        torch.testing.assert_close(ours, alone[:, :, 7:].repeat_interleave(2, 0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@torch.no_grad()
def test_crop(padded):
    """Rejected tokens leave no trace."""
    model, ids, _ = decoder_and_inputs("decoder", {"position": "rotary"})
    mask = padding(3, LENGTH, "left") if padded else torch.ones(3, LENGTH)
    cache = model.new_cache(3, LENGTH)
    model(ids[:, :6], mask[:, :6], cache=cache)
    model(60 - ids[:, 6:9], torch.tensor([[0, 1, 0]] * 3), cache=cache)
    cache.crop(6)
    assert cache.length == 6
    got = model(ids[:, 6:], cache=cache).logits
    expected = model(ids, mask).logits[:, 6:]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    cache.crop(0)
    torch.testing.assert_close(model(ids, cache=cache).logits, model(ids).logits, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_copied_cache_branches():
    model, ids, _ = decoder_and_inputs("decoder", {})
    cache = model.new_cache(3, LENGTH)
    model(ids[:, :5], cache=cache)
    twin = copy.deepcopy(cache)
    a = model(ids[:, 5:8], cache=cache).logits
    model(60 - ids[:, 5:7], cache=twin)
    twin.crop(5)
    assert torch.equal(model(ids[:, 5:8], cache=twin).logits, a)


def test_a_step_allocates_no_cache():
    """The buffers stay where they are."""
    model, ids, _ = decoder_and_inputs("decoder", {})
    cache = model.new_cache(3, LENGTH)
    before = [t.data_ptr() for layer in cache.layers for t in (layer.keys, layer.values)]
    for i in range(LENGTH):
        model(ids[:, i : i + 1], cache=cache)
    assert [t.data_ptr() for layer in cache.layers for t in (layer.keys, layer.values)] == before
    assert cache.bytes() == 2 * 2 * 3 * 32 * LENGTH * 8


def test_no_gradient_through_a_cache():
    model, ids, _ = decoder_and_inputs("decoder", {})
    out = model(ids, cache=model.new_cache(3, LENGTH))
    assert not out.logits.requires_grad
    assert model(ids).logits.requires_grad


def test_a_failed_call_leaves_the_cache_as_it_was():
    model, ids, _ = decoder_and_inputs("decoder", {})
    cache = model.new_cache(3, LENGTH)
    model(ids[:, :4], cache=cache)
    with pytest.raises(ArgumentError):
        model(ids[:, 4:5] * 0 + 61, cache=cache)
    assert cache.length == 4
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, 4:], cache=cache).logits, model(ids).logits[:, 4:])


@pytest.mark.parametrize("position", POSITIONS)
def test_inference_mode(position):
    """Nothing that is kept between calls and was made in inference mode gets in the way of training afterwards."""
    model, ids, _ = decoder_and_inputs("decoder", {"position": position})
    with torch.inference_mode():
        cache = model.new_cache(3, LENGTH)
        got = torch.cat([model(ids[:, i : i + 1], cache=cache).logits for i in range(LENGTH)], 1)
    out = model(ids).logits
    torch.testing.assert_close(got.clone(), out)
    out.sum().backward()


def test_dtype_and_repr():
    model = build(make_config("decoder", num_kv_heads=2), dtype=torch.bfloat16)
    cache = model.new_cache(2, 5)
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert tuple(cache.layers[0].keys.shape) == (2, 2, 5, 8)
    assert model.new_cache(2, 5, dtype=torch.float32).layers[0].keys.dtype == torch.float32
    assert model.new_cache(2, 5, device="meta").layers[0].keys.is_meta
    assert "length=0 of 5" in repr(cache)


def test_errors():
    model = build(make_config("decoder"))
    ids = torch.zeros(2, 4).long()
    cache = model.new_cache(2, 5)
    model(ids, cache=cache)
    with pytest.raises(
        ArgumentError, match="2 more positions do not fit, 4 of 5 are filled; make it with max_length=6"
    ):
        model(ids[:, :2], cache=cache)
    with pytest.raises(ArgumentError, match="made for 2 rows, got a batch of 1"):
        model(ids[:1, :1], cache=cache)
    with pytest.raises(ArgumentError, match=r"expected shape \(2, 1\) or \(2, 5\) .*, got \(2, 3\)"):
        model(ids[:, :1], torch.ones(2, 3), cache=cache)
    with pytest.raises(ArgumentError, match="length must be between 0 and 4, got 5"):
        cache.crop(5)
    with pytest.raises(ArgumentError, match=r"index must have shape \(2,\), got \(1,\)"):
        cache.reorder(torch.tensor([0]))
    with pytest.raises(ArgumentError, match=r"expected row numbers \(n,\), int64 or int32"):
        cache.select(torch.tensor([True, False]))
    with pytest.raises(ArgumentError, match="at least 1, got 0 and 5"):
        KVCache(1, 0, 2, 5, 8)
