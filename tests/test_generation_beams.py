"""Beam search, and greedy texts of every family, against transformers' and against all texts there are; batches."""

from __future__ import annotations

import itertools

import pytest
import torch

import transfuse
from generation_cases import EOS, V, expected, pair, prompts
from model_cases import one_thread  # noqa: F401 (a fixture)
from transfuse.errors import ArgumentError
from transfuse.generation import GenerationConfig, generate, stream

FAMILIES = ["llama", "gpt2", "gpt_neo", "t5", "bart", "marian"]
RULES = [
    {},
    {"no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.5},
    {"forced_eos_token_id": 3},
    {"bad_words_ids": [[3], [7, 8], [11, 12, 13], [40]]},
    {"min_new_tokens": 5},
]
SHAPES = [
    {"num_beams": beams, "length_penalty": penalty, "early_stopping": early, "num_return_sequences": returned}
    for (beams, returned), penalty, early in itertools.product(
        [(2, 1), (4, 3)], [-1.0, 0.0, 1.0, 2.0], [False, True, "never"]
    )
]


def words(value):
    return "-".join(f"{k}={v}" for k, v in value.items()) or "plain"


def same_as_theirs(family, lengths=(6, 6, 6), **knobs):
    ours, theirs = pair(family)
    torch.manual_seed(len(str(knobs)))
    ids, mask = prompts(lengths, family)
    knobs = {"eos_token_id": EOS, "max_new_tokens": 12, "pad_token_id": 3, **knobs}
    got, want = ours.generate(ids, mask, **knobs), expected(theirs, ids, mask, **knobs)
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_equal_transformers(family):
    # Every rule with each family, and every shape with one; the slow test has their product.
    for i, shape in enumerate(SHAPES[FAMILIES.index(family) :: 6]):
        same_as_theirs(family, **shape, **RULES[i % len(RULES)])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", RULES, ids=words)
def test_all_beams_equal_transformers(family, rule):
    for shape in SHAPES:
        same_as_theirs(family, **shape, **rule)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family):
    for rule in [*RULES, {"no_repeat_ngram_size": 1}, {"forced_eos_token_id": [3, 5], "repetition_penalty": 0.8}]:
        same_as_theirs(family, **rule)


@pytest.mark.parametrize("family", ["t5", "bart", "marian"])
def test_encoder_decoders_equal_transformers(family):
    # Padded sources, a first token that is forced, n-grams of the source, lengths that count the first token.
    for knobs in [
        {"forced_bos_token_id": 9, "num_beams": 3},
        {"forced_bos_token_id": 9},
        {"encoder_no_repeat_ngram_size": 1, "num_beams": 2},
        {"encoder_no_repeat_ngram_size": 2},
        {"max_new_tokens": None, "max_length": 9, "min_length": 6, "num_beams": 2},
    ]:
        same_as_theirs(family, (7, 3, 5), **knobs)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("filters", [{"top_k": 9}, {"top_p": 0.6, "typical_p": 0.7}, {"min_p": 0.3}], ids=words)
def test_drawn_beams_equal_transformers(family, filters):
    # Both draw with torch.multinomial, so the same seed gives the same text.
    ours, theirs = pair(family)
    ids, mask = prompts([5, 5], family)
    knobs = {"do_sample": True, "num_beams": 3, "num_return_sequences": 2, "eos_token_id": EOS, "max_new_tokens": 8}
    torch.manual_seed(5)
    want = expected(theirs, ids, mask, **knobs, **filters, pad_token_id=3)
    torch.manual_seed(5)
    assert torch.equal(ours.generate(ids, mask, **knobs, **filters, pad_token_id=3), want)


@pytest.mark.parametrize("family", ["llama", "bart"])
@pytest.mark.parametrize("penalty", [0.5, 1.0])
def test_scores_equal_transformers(family, penalty):
    ours, theirs = pair(family)
    ids, mask = prompts([6, 6], family)
    knobs = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": penalty, "eos_token_id": EOS}
    knobs |= {"max_new_tokens": 10, "pad_token_id": 3}
    got = ours.generate(ids, mask, output_scores=True, **knobs)
    want = expected(theirs, ids, mask, output_scores=True, return_dict_in_generate=True, **knobs)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores, rtol=1e-4, atol=0)
    each = theirs.compute_transition_scores(want.sequences, want.scores, want.beam_indices)
    torch.testing.assert_close(got.scores, each, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("knobs", [{}, {"do_sample": True, "top_k": 7}], ids=words)
def test_scores_without_beams_equal_transformers(knobs):
    ours, theirs = pair("gpt2")
    ids, _ = prompts([6, 6])
    knobs = {**knobs, "eos_token_id": EOS, "max_new_tokens": 10, "pad_token_id": 0}
    torch.manual_seed(1)
    got = ours.generate(ids, output_scores=True, **knobs)
    torch.manual_seed(1)
    want = expected(theirs, ids, output_scores=True, return_dict_in_generate=True, **knobs)
    assert torch.equal(got.sequences, want.sequences)
    each = theirs.compute_transition_scores(want.sequences, want.scores, normalize_logits=True)
    for row, tokens in enumerate(got.sequences[:, 6:].tolist()):
        n = next((i + 1 for i, token in enumerate(tokens) if token in EOS), len(tokens))
        torch.testing.assert_close(got.scores[row, :n], each[row, :n], rtol=1e-4, atol=1e-5)
        assert got.scores[row, n:].eq(0).all()
        torch.testing.assert_close(got.sequences_scores[row], each[row, :n].sum() / n, rtol=1e-4, atol=0)


# --- without transformers -------------------------------------------------------------------------------------------


def tiny(architecture="decoder", **changes):
    torch.manual_seed(4)
    settings = {"vocab_size": 5, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "initializer_range": 1.0}
    settings |= {"decoder_start_token_id": 0} if architecture == "encoder_decoder" else {}
    config = transfuse.TransformerConfig(architecture, **settings, **changes)
    return (transfuse.Decoder if architecture == "decoder" else transfuse.Seq2Seq)(config).eval()


def log_probabilities(model, source, texts):
    """(texts,): of all tokens but the first, the whole text read at once."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            logits = model(source.expand(len(texts), -1), decoder_input_ids=texts).logits
        else:
            logits = model(texts).logits
    return logits[:, :-1].log_softmax(-1).gather(-1, texts[:, 1:, None]).sum((1, 2))


@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_beams_enough_for_all_texts_find_the_best(architecture):
    model, source = tiny(architecture), torch.tensor([[3, 1, 4, 2]])
    start = torch.tensor([[0]])
    tails = torch.tensor(list(itertools.product(range(5), repeat=3)))
    texts = torch.cat([start.expand(len(tails), -1), tails], 1)
    scores = log_probabilities(model, source, texts)
    best = scores.topk(3)
    ids = source if architecture == "encoder_decoder" else start
    found = model.generate(
        ids, num_beams=25, num_return_sequences=3, max_new_tokens=3, eos_token_id=(), output_scores=True
    )
    assert torch.equal(found.sequences, texts[best.indices])
    torch.testing.assert_close(found.sequences_scores, best.values / 3, rtol=1e-5, atol=0)


@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"no_repeat_ngram_size": 2, "length_penalty": 0.0},
        {"early_stopping": True, "min_length": 8, "eos_token_id": range(40)},
        {"encoder_no_repeat_ngram_size": 1, "eos_token_id": range(20)},
        {"encoder_no_repeat_ngram_size": 1, "eos_token_id": range(20), "num_beams": 1, "num_return_sequences": 1},
    ],
    ids=words,
)
def test_a_batch_equals_its_prompts_alone(architecture, knobs):
    # Rows end at different steps, so that some leave the batch on the way.
    family = "llama" if architecture == "decoder" else "t5"
    model, lengths = pair(family)[0], [6, 3, 1, 5, 2]
    ids, mask = prompts(lengths, family)
    knobs = {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": EOS, "max_new_tokens": 12, **knobs}
    together = model.generate(ids, mask, **knobs, pad_token_id=0)
    for row, n in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, mask[row].bool()], **knobs, pad_token_id=0)
        skip = (6, n) if family == "llama" else (0, 0)
        new, got = alone[:, skip[1] :], together[row * len(alone) : (row + 1) * len(alone), skip[0] :]
        assert torch.equal(got[:, : new.shape[1]], new)
        assert got[:, new.shape[1] :].eq(0).all()


class Watched:
    """A model that notes the rows it is given and the cache it made."""

    def __init__(self, model):
        self.model, self.config, self.rows, self.caches = model, model.config, [], []

    def new_cache(self, batch, max_length):
        self.caches.append(self.model.new_cache(batch, max_length))
        return self.caches[-1]

    def __call__(self, *args, **kw):
        out = self.model(*args, **kw)
        self.rows.append(out.logits.shape[0])
        return out


def test_beams_share_what_they_can():
    model = Watched(pair("t5")[0])
    ids, mask = prompts([4, 4], "t5")
    generate(model, ids, mask, num_beams=3, max_new_tokens=4, eos_token_id=())
    assert model.rows == [2, 6, 6, 6]  # the prompt is read once a row
    (cache,) = model.caches
    assert cache.batch == 6
    assert cache.layers[0].cross[0].shape[0] == 2


def test_ended_rows_leave_with_all_their_beams():
    model = Watched(pair("t5")[0])
    ids, mask = prompts([6, 3, 1, 5, 2, 4, 4], "t5")
    knobs = {"num_beams": 3, "eos_token_id": list(range(2, 30)), "max_new_tokens": 30, "early_stopping": True}
    generate(model, ids, mask, **knobs)
    assert model.rows[-1] < 21
    assert all(rows % 3 == 0 for rows in model.rows[1:])
    (cache,) = model.caches
    assert cache.layers[0].cross[0].shape[0] == cache.batch // 3


def test_several_draws_read_the_prompt_once():
    model = Watched(pair("t5")[0])
    ids, mask = prompts([4, 3], "t5")
    torch.manual_seed(0)
    knobs = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 9, "eos_token_id": list(range(20))}
    draws = generate(model, ids, mask, num_return_sequences=4, **knobs)
    assert draws.shape[0] == 8
    assert model.rows[:2] == [2, 8]
    assert model.rows[-1] < 8
    # The same rows given one by one draw the same: sharing changes nothing.
    torch.manual_seed(0)
    copies = [t.repeat_interleave(4, 0) for t in (ids, mask)]
    assert torch.equal(pair("t5")[0].generate(*copies, **knobs), draws)


def test_beams_of_a_prompt_in_the_decoder():
    ours, _ = pair("t5")
    ids, _ = prompts([5, 5], "t5")
    start = torch.tensor([[4, 9, 8], [4, 7, 8]])
    found = ours.generate(ids, decoder_input_ids=start, num_beams=2, max_new_tokens=4)
    assert torch.equal(found[:, :3], start)


# --- mistakes -------------------------------------------------------------------------------------------------------

MISTAKES = [
    ({"num_beams": 0}, "num_beams must be a whole number of at least 1, got 0"),
    ({"num_beams": 10**12}, "num_beams must be at most 65536, got 1000000000000"),
    ({"num_return_sequences": 10**12, "do_sample": True}, "num_return_sequences must be at most 65536, got 1000"),
    ({"num_beams": 2, "num_return_sequences": 3}, r"num_return_sequences must be at most num_beams \(2\), got 3"),
    ({"num_return_sequences": 2}, "needs sampling, .* give do_sample=True, a temperature above 0, or .* num_beams"),
    ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping must be True, False or 'never', got 'soon'"),
    ({"num_beams": 2, "length_penalty": float("inf")}, "length_penalty must be between -50 and 50, got inf"),
    ({"num_beams": 2, "prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens needs num_beams=1"),
    ({"num_beam": 2}, "unknown argument 'num_beam'; did you mean 'num_beams'?"),
    ({"beans": 2}, "unknown argument 'beans'; there are max_new_tokens, max_length,"),
    ({"generation_config": {"num_beams": 2}}, "generation_config must be a transfuse GenerationConfig, got dict"),
    ({"bad_words_ids": [[V]]}, "bad_words_ids must be below the vocabulary's size 61, got 61"),
    ({"bad_words_ids": [3]}, r"bad_words_ids must be a list of lists of token ids, got \(3,\)"),
    ({"bad_words_ids": [[]]}, "bad_words_ids must be a list of lists of token ids"),
    ({"forced_bos_token_id": V}, "forced_bos_token_id must be below the vocabulary's size 61"),
    ({"eos_token_id": [1, None]}, "eos_token_id must be a token id of at least 0, got None"),
    ({"stop_strings": 3}, "stop_strings must be texts of at least a character, got 3"),
    ({"bad_words_ids": [[None]]}, "bad_words_ids must be a token id of at least 0, got None"),
    ({"forced_eos_token_id": "end"}, "forced_eos_token_id must be a token id of at least 0, got 'end'"),
    ({"max_length": 2}, "the prompt's 3 tokens leave no room in max_length = 2; give max_new_tokens"),
    ({"decoder_start_token_id": 1}, "decoder_start_token_id need an encoder-decoder model"),
    ({"stop_strings": "x"}, r"stop_strings need tokenizer=, something with decode\(ids\), got none"),
    ({"stop_strings": [""]}, "stop_strings must be texts of at least a character"),
    ({"top_k": 10**12}, "top_k must be at most 2147483648, got 1000000000000; None keeps every token"),
    ({"typical_p": 0.0}, "typical_p must be above 0 and at most 1, got 0.0"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES, ids=lambda v: v if isinstance(v, str) else "")
def test_mistakes_are_named_before_anything_runs(arguments, message):
    model = Watched(pair("llama")[0])
    for function in (generate, stream):
        with pytest.raises(ArgumentError, match=message):
            function(model, torch.tensor([[5, 6, 7]]), **arguments)
    assert model.caches == []


def test_a_stream_has_no_beams():
    with pytest.raises(ArgumentError, match="stream: a beam search knows its text only at the end, got num_beams=2"):
        stream(pair("llama")[0], torch.tensor([[5]]), generation_config=GenerationConfig(num_beams=2))


def test_a_cache_that_cannot_reorder():
    class Plain:
        def new_cache(self, batch, max_length):
            return object()

    with pytest.raises(ArgumentError, match="needs a key/value cache with reorder, object of Plain has none"):
        generate(Plain(), torch.tensor([[5]]), num_beams=2)


@pytest.mark.parametrize("beams", [1, 3])
def test_rules_that_leave_no_token(beams):
    with pytest.raises(ArgumentError, match="some token must remain, but bad_words_ids, no_repeat_ngram_size or"):
        tiny().generate(torch.tensor([[0]]), num_beams=beams, no_repeat_ngram_size=1, max_new_tokens=9)
