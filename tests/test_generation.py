"""Generation: processors and whole texts against transformers', padding, endings, streaming, mistakes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_cases import one_thread  # noqa: F401 (a fixture)
from transfuse import generation
from transfuse.errors import ArgumentError, DeviceError, DtypeError, TransfuseError
from transfuse.generation import generate, processors, stream

transformers = pytest.importorskip("transformers")
V = 61  # vocabulary of every model here


# --- models ---------------------------------------------------------------------------------------------------------


class Wrapped:
    """A transformers model behind the interface that generation asks for."""

    def __init__(self, model, **config):
        self.model = model
        names = ("vocab_size", "is_encoder_decoder", "decoder_start_token_id")
        known = {n: getattr(model.config, n, None) for n in names}
        self.config = SimpleNamespace(**{**known, **config})
        self.lengths, self.encoded, self.rows = [], 0, []

    def new_cache(self, batch, max_length):
        self.lengths.append(max_length)
        if not self.config.is_encoder_decoder:
            return transformers.DynamicCache()
        return transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())

    def __call__(
        self, ids, attention_mask=None, position_ids=None, decoder_input_ids=None, cache=None, last_logits_only=False
    ):
        self.rows.append(ids.shape[0])
        if decoder_input_ids is None:
            return self.model(ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache)
        if not hasattr(cache, "encoded"):
            self.encoded += 1
            cache.encoded = self.model.get_encoder()(ids, attention_mask=attention_mask)
        return self.model(
            attention_mask=attention_mask,
            encoder_outputs=cache.encoded,
            decoder_input_ids=decoder_input_ids,
            past_key_values=cache,
        )


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def decoder(request):
    torch.manual_seed(3)
    if request.param == "gpt2":
        config = transformers.GPT2Config(vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    return Wrapped(_livelier(model))


@pytest.fixture(scope="module")
def seq2seq():
    torch.manual_seed(5)
    config = transformers.T5Config(
        vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return Wrapped(_livelier(transformers.T5ForConditionalGeneration(config)))


def _livelier(model):
    # Freshly initialised models repeat one token; larger weights make texts that differ.
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(3)
    return model.eval()


def padded(lengths, side="left", pad=0):
    """Random prompts of these lengths as (ids, mask)."""
    ids, mask = torch.full((len(lengths), max(lengths)), pad), torch.zeros(len(lengths), max(lengths)).long()
    for i, n in enumerate(lengths):
        where = slice(-n, None) if side == "left" else slice(None, n)
        ids[i, where], mask[i, where] = torch.randint(1, V, (n,)), 1
    return ids, mask


def theirs(wrapped, ids, mask, **knobs):
    """transformers' own generate, told to do what the knobs say and nothing that its defaults add."""
    plain = {"do_sample": False, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "eos_token_id": None, "pad_token_id": 0}
    wrapped.model.generation_config = transformers.GenerationConfig(**{**plain, **knobs})
    if wrapped.config.is_encoder_decoder:
        knobs = {**knobs, "decoder_start_token_id": 0}
    return wrapped.model.generate(ids, attention_mask=mask, **{**plain, **knobs})


# --- processors -----------------------------------------------------------------------------------------------------

WARPERS = {
    "temperature": (processors.scale_temperature, "TemperatureLogitsWarper", [0.1, 0.7, 1.9]),
    "top_k": (processors.keep_top_k, "TopKLogitsWarper", [1, 2, 7, 1000]),
    "top_p": (processors.keep_top_p, "TopPLogitsWarper", [1e-6, 0.3, 0.9, 0.999]),
    "min_p": (processors.keep_min_p, "MinPLogitsWarper", [0.0, 0.05, 0.5, 1.0]),
}


@pytest.mark.parametrize("knob", WARPERS)
@pytest.mark.parametrize("spread", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("rounded", [False, True], ids=["continuous", "ties"])
def test_filters_equal_transformers(knob, spread, rounded):
    ours, name, values = WARPERS[knob]
    for value in values:
        scores = torch.randn(5, 97) * spread
        scores = scores.round() if rounded else scores
        expected = getattr(transformers, name)(value)(None, scores.clone())
        assert torch.equal(ours(scores, value), expected), value


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_penalty_equals_transformers(penalty):
    scores, tokens = torch.randn(4, 50), torch.randint(0, 50, (4, 30))
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(tokens, scores.clone())
    assert torch.equal(processors.penalize_repetition(scores, tokens, penalty), expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.floats(0.01, 1.0), st.floats(0.0, 1.0), st.integers(0, 2**31))
def test_something_always_remains_and_nothing_else_changes(top_k, top_p, min_p, seed):
    scores = torch.randn(3, 30, generator=torch.Generator().manual_seed(seed)) * 5
    before, kept = scores.clone(), scores
    for function, value in (
        (processors.keep_top_k, top_k),
        (processors.keep_top_p, top_p),
        (processors.keep_min_p, min_p),
    ):
        kept = function(kept, value)
    assert torch.equal(scores, before)
    assert torch.equal(kept.argmax(-1), scores.argmax(-1))
    assert ((kept == scores) | (kept == float("-inf"))).all()


# --- whole texts against transformers -------------------------------------------------------------------------------

GREEDY = [
    {},
    {"repetition_penalty": 1.4},
    {"eos_token_id": [3, 11, 17, 40, 52], "pad_token_id": 0},
    {"eos_token_id": 9, "pad_token_id": 0, "min_new_tokens": 6},
]


@pytest.mark.parametrize("knobs", GREEDY, ids=str)
def test_greedy_equals_transformers(decoder, knobs):
    ids = torch.randint(1, V, (3, 7))
    assert torch.equal(
        generate(decoder, ids, max_new_tokens=24, **knobs), theirs(decoder, ids, None, max_new_tokens=24, **knobs)
    )


def test_greedy_of_a_padded_batch_equals_transformers(decoder):
    ids, mask = padded([9, 4, 1, 6])
    assert torch.equal(generate(decoder, ids, mask, max_new_tokens=20), theirs(decoder, ids, mask, max_new_tokens=20))


@pytest.mark.parametrize(
    "knobs",
    [
        {"temperature": 0.8},
        {"top_k": 5},
        {"top_p": 0.7, "temperature": 1.7},
        {"min_p": 0.2, "repetition_penalty": 1.2, "top_k": 30},
        {"num_return_sequences": 3},
    ],
    ids=str,
)
def test_samples_equal_transformers(decoder, knobs):
    # Both draw with torch.multinomial, so the same seed gives the same text.
    ids = torch.randint(1, V, (2, 5))
    torch.manual_seed(11)
    expected = theirs(decoder, ids, None, max_new_tokens=16, **{**knobs, "do_sample": True})
    torch.manual_seed(11)
    assert torch.equal(generate(decoder, ids, max_new_tokens=16, do_sample=True, **knobs), expected)


@pytest.mark.parametrize("knobs", GREEDY, ids=str)
def test_encoder_decoder_equals_transformers(seq2seq, knobs):
    ids, mask = padded([8, 3, 5], side="right")
    seq2seq.encoded = 0
    got = generate(seq2seq, ids, mask, max_new_tokens=18, **knobs)
    assert seq2seq.encoded == 1
    assert torch.equal(got, theirs(seq2seq, ids, mask, max_new_tokens=18, **knobs))


def test_encoder_decoder_continues_given_tokens(seq2seq):
    ids = torch.randint(1, V, (2, 6))
    whole = generate(seq2seq, ids, max_new_tokens=10)
    assert torch.equal(generate(seq2seq, ids, max_new_tokens=6, decoder_input_ids=whole[:, :5]), whole)
    assert generate(seq2seq, ids, max_new_tokens=1, decoder_start_token_id=5)[:, 0].tolist() == [5, 5]


# --- this package's models ------------------------------------------------------------------------------------------


def own(architecture, **changes):
    import transfuse

    torch.manual_seed(2)
    settings = {
        "vocab_size": V,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "initializer_range": 0.5,
        **changes,
    }
    config = transfuse.TransformerConfig(architecture, **settings)
    return (transfuse.Decoder if architecture == "decoder" else transfuse.Seq2Seq)(config).eval()


POSITIONS = ["learned", "sinusoidal", "rotary", "relative", "none"]


def without_cache(model, ids, steps):
    """Greedy by the book: the whole sequence read anew each step."""
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("position", POSITIONS)
def test_cached_equals_uncached(position):
    model, ids = own("decoder", position=position, num_kv_heads=2), torch.randint(1, V, (2, 5))
    assert torch.equal(model.generate(ids, max_new_tokens=12), without_cache(model, ids, 12))


@pytest.mark.parametrize("position", POSITIONS)
def test_a_padded_batch_equals_its_prompts_alone(position):
    model = own("decoder", position=position)
    ids, mask = padded([6, 2, 4, 1])
    # Endings of their own for some, so that rows leave the batch on the way.
    together = model.generate(ids, mask, max_new_tokens=14, eos_token_id=[5, 9, 20, 31, 47], pad_token_id=0)
    for row, (prompt, seen) in enumerate(zip(ids, mask, strict=True)):
        alone = model.generate(prompt[seen.bool()][None], max_new_tokens=14, eos_token_id=[5, 9, 20, 31, 47])
        new = alone[0, int(seen.sum()) :]
        assert torch.equal(together[row, 6 : 6 + len(new)], new)
        assert together[row, 6 + len(new) :].eq(0).all()


def test_encoder_decoder_of_a_padded_batch_equals_its_sources_alone():
    model = own("encoder_decoder", position="sinusoidal", decoder_start_token_id=1)
    ids, mask = padded([7, 3, 5, 2], side="right")
    ends = [5, 9, 20, 31, 47]
    together = model.generate(ids, mask, max_new_tokens=12, eos_token_id=ends, pad_token_id=0)
    for row in range(4):
        alone = model.generate(ids[row : row + 1, mask[row].bool()], max_new_tokens=12, eos_token_id=ends)[0]
        assert torch.equal(together[row, : len(alone)], alone)
        assert together[row, len(alone) :].eq(0).all()


def test_dropout_is_off_and_training_mode_is_restored():
    model, ids = own("decoder", hidden_dropout=0.5, ffn_dropout=0.5), torch.randint(1, V, (1, 4))
    expected = model.generate(ids, max_new_tokens=8)
    model.train()
    model.layers[0].eval()
    assert torch.equal(model.generate(ids, max_new_tokens=8), expected)
    assert model.training
    assert not model.layers[0].training
    steps = model.stream(ids, max_new_tokens=8)
    next(steps)
    assert not model.training
    steps.close()
    assert model.training


# --- a model whose text is known ------------------------------------------------------------------------------------


class Successor:
    """Always expects the next number, modulo 10; counts the rows and tokens that it is given."""

    config = SimpleNamespace(vocab_size=10, max_positions=32)

    def __init__(self):
        self.read = []
        self.cache = SimpleNamespace(select=lambda rows: self.read.append(f"keep {rows.tolist()}"))

    def new_cache(self, batch, max_length):
        self.read.append(f"cache {batch}x{max_length}")
        return self.cache

    def __call__(self, ids, attention_mask=None, position_ids=None, cache=None, last_logits_only=False):
        assert last_logits_only
        self.read.append(tuple(ids.shape))
        return SimpleNamespace(logits=torch.nn.functional.one_hot((ids[:, -1:] + 1) % 10, 10).float())


def test_every_token_is_read_once_and_ended_rows_leave():
    model = Successor()
    got = generate(model, torch.tensor([[0, 0], [0, 4], [0, 5], [0, 6]]), max_new_tokens=9, eos_token_id=8)
    assert got[:, 2:].tolist() == [
        [1, 2, 3, 4, 5, 6, 7, 8],
        [5, 6, 7, 8, 8, 8, 8, 8],
        [6, 7, 8, 8, 8, 8, 8, 8],
        [7, 8, 8, 8, 8, 8, 8, 8],
    ]
    assert model.read == [
        "cache 4x10", (4, 2), (4, 1), (4, 1), "keep [0, 1]", (2, 1), "keep [0]", (1, 1), (1, 1), (1, 1), (1, 1),
    ]  # fmt: skip


def test_padding_after_the_end():
    ids = torch.tensor([[1], [5]])
    assert generate(Successor(), ids, max_new_tokens=4, eos_token_id=(7, 9), pad_token_id=0).tolist() == [
        [1, 2, 3, 4, 5],
        [5, 6, 7, 0, 0],
    ]
    # Without an end, to the last token; a pad id that the model does not know is written, never read.
    assert generate(Successor(), ids, max_new_tokens=2, pad_token_id=99).tolist() == [[1, 2, 3], [5, 6, 7]]
    assert generate(Successor(), ids, max_new_tokens=4, eos_token_id=7, pad_token_id=99)[1].tolist() == [
        5,
        6,
        7,
        99,
        99,
    ]


def test_no_end_before_min_new_tokens():
    got = generate(Successor(), torch.tensor([[4]]), max_new_tokens=6, min_new_tokens=3, eos_token_id=5)
    assert got.shape == (1, 1 + 6)
    assert 5 not in got[0, 1:4]


def test_special_ids_of_the_configuration():
    model = Successor()
    model.config = SimpleNamespace(vocab_size=10, eos_token_id=(3, 6), pad_token_id=0)
    assert generate(model, torch.tensor([[1], [4]]), max_new_tokens=8).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert generate(model, torch.tensor([[1]]), max_new_tokens=8, eos_token_id=()).shape == (1, 9)
    assert generate(model, torch.tensor([[1]]), max_new_tokens=8, eos_token_id=5).tolist() == [[1, 2, 3, 4, 5]]


def test_stream_gives_what_generate_gives_step_by_step():
    ids = torch.tensor([[1], [5]])
    model = Successor()
    steps = stream(model, ids, max_new_tokens=6, eos_token_id=8)
    assert model.read == []
    assert next(steps).tolist() == [2, 6]
    assert len(model.read) == 2  # nothing runs ahead
    rest = [s.tolist() for s in steps]
    assert [[2, 6], *rest] == generate(Successor(), ids, max_new_tokens=6, eos_token_id=8)[:, 1:].T.tolist()


def test_stream_leaves_gradients_on_between_steps():
    steps = stream(Successor(), torch.tensor([[1]]), max_new_tokens=3)
    next(steps)
    assert torch.is_grad_enabled()


def test_padding_is_not_penalised(decoder):
    # Token 0 pads; the penalty must treat the padded prompt as the bare one.
    ids, mask = padded([6, 3])
    together = generate(decoder, ids, mask, max_new_tokens=12, repetition_penalty=2.5)
    alone = generate(decoder, ids[1:, 3:], max_new_tokens=12, repetition_penalty=2.5)
    assert torch.equal(together[1:, 3:], alone)


def test_a_generator_makes_samples_repeatable():
    class Even(Successor):
        def __call__(self, ids, **kw):
            return SimpleNamespace(logits=torch.zeros(ids.shape[0], 1, 10))

    draw = lambda seed: generate(  # noqa: E731
        Even(), torch.tensor([[0]]), max_new_tokens=30, do_sample=True, generator=torch.Generator().manual_seed(seed)
    )
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert draw(1)[0].unique().numel() > 5
    greedy = generate(Even(), torch.tensor([[0]]), max_new_tokens=5, do_sample=True, temperature=0.0)
    assert greedy.tolist() == [[0] * 6]


def test_int32_ids_are_fine():
    got = generate(Successor(), torch.tensor([[1]], dtype=torch.int32), max_new_tokens=2)
    assert got.dtype == torch.int64
    assert got.tolist() == [[1, 2, 3]]


# --- mistakes -------------------------------------------------------------------------------------------------------

IDS = torch.tensor([[1, 2], [3, 4]])
MISTAKES = [
    ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
    ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number of at least 1, got 2.5"),
    ({"max_new_tokens": True}, "max_new_tokens must be a whole number"),
    ({"min_new_tokens": -1}, "min_new_tokens must be a whole number of at least 0"),
    ({"min_new_tokens": 9, "max_new_tokens": 8}, r"min_new_tokens must be at most max_new_tokens \(8\), got 9"),
    ({"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
    ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
    ({"temperature": "hot"}, "temperature must be at least 0, got 'hot'"),
    ({"top_k": 0}, "top_k must be a whole number of at least 1, got 0; None keeps every token"),
    ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
    ({"top_p": 1.01}, "top_p must be above 0 and at most 1, got 1.01"),
    ({"min_p": -0.5}, "min_p must be between 0 and 1, got -0.5"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, got 0.0"),
    ({"num_return_sequences": 0}, "num_return_sequences must be a whole number of at least 1"),
    ({"num_return_sequences": 2}, "num_return_sequences = 2 needs sampling"),
    ({"num_return_sequences": 2, "temperature": 0.0, "do_sample": True}, "needs sampling"),
    ({"eos_token_id": 10}, "eos_token_id must be below the vocabulary's size 10, got 10"),
    ({"eos_token_id": [1, -2]}, "eos_token_id must be a token id of at least 0, got -2"),
    ({"pad_token_id": -1}, "pad_token_id must be a token id of at least 0, got -1"),
    ({"input_ids": torch.zeros(2, 0).long()}, r"input_ids must hold at least one token, got shape \(2, 0\)"),
    ({"input_ids": torch.zeros(0, 2).long()}, r"input_ids must hold at least one token, got shape \(0, 2\)"),
    ({"input_ids": torch.tensor([1, 2])}, r"input_ids must have shape \(batch, length\), got \(2,\)"),
    ({"input_ids": torch.tensor([[1, 10]])}, "input_ids must be at least 0 and below the vocabulary's size 10, got 10"),
    ({"input_ids": torch.tensor([[1, -1]])}, "input_ids must be at least 0 .*got -1"),
    ({"input_ids": torch.ones(1, 33).long()}, "the prompt must fit the model's context of 32 tokens, got 33"),
    ({"input_ids": torch.ones(1, 30).long(), "max_new_tokens": 4}, r"got 30 \+ 4: give max_new_tokens of at most 3"),
    ({"attention_mask": torch.ones(2, 3)}, r"attention_mask must have input_ids' shape \(2, 2\), got \(2, 3\)"),
    ({"attention_mask": torch.tensor([[1, 1], [0, 0]])}, "every prompt must hold a token, row 1 is all padding"),
    ({"attention_mask": torch.tensor([[1, 1], [1, 0]])}, "padded on the left .*got row 1 padded on the right"),
    ({"decoder_input_ids": IDS}, "need an encoder-decoder model"),
    ({"do_sample": "no"}, "do_sample must be True, False or None, got 'no'"),
    ({"generator": 3}, "generator must be a torch.Generator, got int"),
    ({"eos_token_id": 2.0}, "eos_token_id must be a token id of at least 0, got 2.0"),
    ({"eos_token_id": "</s>"}, "eos_token_id must be a token id of at least 0, got '</s>'"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES, ids=lambda v: v if isinstance(v, str) else "")
def test_mistakes_are_named_before_anything_runs(arguments, message):
    model = Successor()
    for function in (generate, stream):
        with pytest.raises(ArgumentError, match=message):
            function(model, **{"input_ids": IDS, "max_new_tokens": 8, **arguments})
    assert model.read == []


def test_wrong_types_and_devices():
    with pytest.raises(DtypeError, match="input_ids must be an int64 or int32 tensor, got float32"):
        generate(Successor(), IDS.float())
    with pytest.raises(DtypeError, match="input_ids must be an int64 or int32 tensor, got list"):
        generate(Successor(), [[1, 2]])
    with pytest.raises(DeviceError, match="attention_mask must be on cpu like input_ids, got meta"):
        generate(Successor(), IDS, torch.ones(2, 2, device="meta"))


def test_encoder_decoder_mistakes(seq2seq):
    ids = torch.ones(2, 3).long()
    for arguments, message in [
        ({"decoder_input_ids": ids[:1]}, "decoder_input_ids must have 2 rows like input_ids, got 1"),
        ({"decoder_start_token_id": V}, "decoder_start_token_id must be at least 0 and below"),
        ({"decoder_start_token_id": 1.5}, "decoder_start_token_id must be a token id of at least 0, got 1.5"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            generate(seq2seq, ids, **arguments)
    startless = Wrapped(seq2seq.model, decoder_start_token_id=None)
    with pytest.raises(ArgumentError, match="an encoder-decoder needs a token to start from"):
        generate(startless, ids)


def test_a_prompt_may_fill_the_context():
    # The last new token is never read, so 32 positions carry 30 + 3 tokens.
    assert generate(Successor(), torch.ones(1, 30).long(), max_new_tokens=3).shape == (1, 33)


def test_context_of_an_endless_position_scheme():
    model = Successor()
    model.config = SimpleNamespace(vocab_size=10, max_positions=4, position="relative")
    assert generate(model, torch.ones(1, 9).long(), max_new_tokens=3).shape == (1, 12)


def test_every_error_is_ours():
    assert issubclass(ArgumentError, TransfuseError)
    assert generation.__all__ == ["Generated", "GenerationConfig", "Knobs", "Processor", "generate", "stream"]
