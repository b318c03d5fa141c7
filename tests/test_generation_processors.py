"""What happens to scores, against transformers' processors; settings, where they come from; stop strings."""

from __future__ import annotations

import dataclasses
import json
import typing
import warnings

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import transfuse
from generation_cases import EOS, V, expected, pair, prompts, transformers
from model_cases import one_thread  # noqa: F401 (a fixture)
from transfuse.errors import ConfigError
from transfuse.generation import GenerationConfig, Knobs, processors
from transfuse.generation.chain import Chain
from transfuse.generation.prompt import Ids

NEG_INF = float("-inf")


# --- one processor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("typical_p", [1e-6, 0.2, 0.9, 0.999])
def test_typical_equals_transformers(spread, typical_p):
    scores = torch.randn(5, 97) * spread
    scores[0, :50] = NEG_INF
    for least in (1, 3):
        theirs = transformers.TypicalLogitsWarper(typical_p, min_tokens_to_keep=least)(None, scores.clone())
        assert torch.equal(processors.keep_typical(scores, typical_p, least), theirs)


@pytest.mark.parametrize(
    "ours, name, value",
    [
        (processors.keep_top_k, "TopKLogitsWarper", 1),
        (processors.keep_top_p, "TopPLogitsWarper", 1e-6),
        (processors.keep_min_p, "MinPLogitsWarper", 1.0),
    ],
    ids=["top_k", "top_p", "min_p"],
)
def test_the_least_that_remains_equals_transformers(ours, name, value):
    scores = torch.randn(5, 31)
    theirs = getattr(transformers, name)(value, min_tokens_to_keep=4)(None, scores.clone())
    assert torch.equal(ours(scores, value, 4), theirs)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 4, 30])
def test_no_repeated_ngram_equals_transformers(size, length):
    scores, tokens = torch.randn(4, 6), torch.randint(0, 6, (4, length))
    theirs = transformers.NoRepeatNGramLogitsProcessor(size)(tokens, scores.clone())
    assert torch.equal(processors.forbid_repeats(scores, tokens, size), theirs)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("source_length", [1, 2, 20])
def test_no_ngram_of_the_source_equals_transformers(size, source_length):
    scores, tokens = torch.randn(4, 6), torch.randint(0, 6, (4, 5))
    source = torch.randint(0, 6, (4, source_length))
    theirs = transformers.EncoderNoRepeatNGramLogitsProcessor(size, source)(tokens, scores.clone())
    assert torch.equal(processors.forbid_repeats(scores, tokens, size, source), theirs)


def test_forbidden_words_equal_transformers():
    scores, tokens = torch.randn(50, 6), torch.randint(0, 4, (50, 5))
    words = [[3], [5], [0, 1], [2, 4], [1, 1, 2], [0, 0, 0, 0, 0, 0, 1]]
    theirs = transformers.NoBadWordsLogitsProcessor(words)(tokens, scores.clone())
    before = scores.clone()
    ours = processors.by_length(words, scores.device)
    assert torch.equal(processors.forbid_words(scores, tokens, ours), theirs)
    only_long = processors.forbid_words(scores, tokens, ours[1:])
    assert torch.equal(scores, before)
    assert not torch.equal(only_long, before)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 6), st.integers(0, 2**31))
def test_padding_repeats_nothing(size, length, padding, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 4, (3, length), generator=generator)
    scores = torch.randn(3, 4, generator=generator)
    padded = torch.cat([torch.full((3, padding), -1), tokens], 1)
    words = processors.by_length([[1], [2, 3], [0, 0, 1]], tokens.device)
    for function in (
        lambda t: processors.forbid_repeats(scores, t, size),
        lambda t: processors.forbid_words(scores, t, words),
        lambda t: processors.penalize_repetition(scores, t, 1.7),
        lambda t: processors.forbid_repeats(scores, t, size, padded),
    ):
        assert torch.equal(function(padded), function(tokens))


def test_nothing_sorts_a_vocabulary_that_top_k_has_cut(monkeypatch):
    sizes, sort = [], torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda t, *a, **k: sizes.append(t.shape[-1]) or sort(t, *a, **k))
    scores = torch.randn(3, 5000)
    chain(GenerationConfig(top_k=50, top_p=0.9, typical_p=0.9))(scores, torch.zeros(3, 4).long())
    assert set(sizes) == {50}
    chain(GenerationConfig(top_p=0.9))(scores, torch.zeros(3, 4).long())
    assert sizes[-1] == 5000


# --- the chain of them ----------------------------------------------------------------------------------------------


def chain(config, eos=(), prompt_length=4, budget=9, source=None):
    return Chain(
        config, Ids(tuple(eos), 0), prompt_length, budget, torch.zeros(1, 1).long() if source is None else source
    )


def chain_of_theirs(config, eos, prompt_length, budget, source):
    """transformers' processors in the order that its generate puts them."""
    t, c = transformers, config
    theirs = t.LogitsProcessorList()
    add = lambda on, name, *args, **kw: theirs.append(getattr(t, name)(*args, **kw)) if on else None  # noqa: E731
    add(c.repetition_penalty != 1, "RepetitionPenaltyLogitsProcessor", c.repetition_penalty)
    add(c.no_repeat_ngram_size, "NoRepeatNGramLogitsProcessor", c.no_repeat_ngram_size)
    size = c.encoder_no_repeat_ngram_size
    add(size, "EncoderNoRepeatNGramLogitsProcessor", size, source)
    add(c.bad_words_ids, "NoBadWordsLogitsProcessor", [list(w) for w in c.bad_words_ids], eos)
    add(c.min_length, "MinLengthLogitsProcessor", c.min_length, eos)
    add(c.min_new_tokens, "MinNewTokensLengthLogitsProcessor", prompt_length, c.min_new_tokens, eos)
    add(c.forced_bos_token_id is not None, "ForcedBOSTokenLogitsProcessor", c.forced_bos_token_id)
    add(c.forced_eos_token_id, "ForcedEOSTokenLogitsProcessor", prompt_length + budget, c.forced_eos_token_id)
    if c.samples:
        least = 1 if c.num_beams == 1 else len(eos) + 1
        add(c.temperature, "TemperatureLogitsWarper", c.temperature)
        add(c.top_k, "TopKLogitsWarper", c.top_k, min_tokens_to_keep=least)
        add(c.top_p, "TopPLogitsWarper", c.top_p, min_tokens_to_keep=least)
        add(c.min_p, "MinPLogitsWarper", c.min_p, min_tokens_to_keep=least)
        add(c.typical_p, "TypicalLogitsWarper", c.typical_p, min_tokens_to_keep=least)
    return theirs


CHAINS = [
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.02, "typical_p": 0.9},
    {"temperature": 1.9, "top_p": 0.5, "min_p": 0.3},
    {"temperature": 0.3, "typical_p": 0.4, "top_k": 40, "num_beams": 3},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[3], [7], [1, 2]], "top_k": 9},
    {"encoder_no_repeat_ngram_size": 1, "min_new_tokens": 3, "repetition_penalty": 0.7},
    {"min_length": 6, "forced_bos_token_id": 5, "bad_words_ids": [[7]]},
    {"forced_eos_token_id": [7, 8], "no_repeat_ngram_size": 3},
]


@pytest.mark.parametrize("knobs", CHAINS, ids=lambda k: "-".join(k))
def test_chains_equal_transformers(knobs):
    config, eos, source = GenerationConfig(**knobs), [7, 30], torch.randint(0, V, (6, 5))
    for length, prompt_length in [(1, 1), (4, 4), (6, 4), (12, 4)]:
        ours = chain(config, eos, prompt_length, 9, source)
        theirs = chain_of_theirs(config, eos, prompt_length, 9, source)
        scores, tokens = torch.randn(6, V) * 4, torch.randint(2, V, (6, length))
        if length > 1:
            tokens[::2, -1] = 1  # begins a forbidden word
        assert torch.equal(ours(scores.clone(), tokens), theirs(tokens, scores.clone())), length


# --- settings -------------------------------------------------------------------------------------------------------


def test_keyword_arguments_are_the_fields():
    fields = {f.name: f.type for f in dataclasses.fields(GenerationConfig)}
    assert list(Knobs.__annotations__) == list(fields)
    for name, written in Knobs.__annotations__.items():
        stated = written.__forward_arg__ if isinstance(written, typing.ForwardRef) else written
        assert stated == fields[name] if "None" in fields[name] else stated == f"{fields[name]} | None", name
    for text in (GenerationConfig.__doc__, transfuse.generation.generate.__doc__):
        assert [name for name in fields if name not in text] == []


def test_none_is_the_default():
    assert GenerationConfig(**dict.fromkeys(Knobs.__annotations__)) == GenerationConfig()


def test_settings_survive_a_file():
    config = GenerationConfig(
        num_beams=3, bad_words_ids=[[3], [4, 5]], early_stopping="never", stop_strings="x", temperature=0.5, min_p=0.1
    )
    values = json.loads(json.dumps(config.to_values()))
    assert GenerationConfig.from_values(values) == dataclasses.replace(config, do_sample=True)
    theirs = transformers.GenerationConfig.from_dict(values)
    assert (theirs.num_beams, theirs.bad_words_ids, theirs.do_sample) == (3, [[3], [4, 5]], True)


def test_a_file_asks_for_what_transformers_reads_in_it():
    assert not GenerationConfig.from_values({"temperature": 0.6, "top_p": 0.9}).samples
    drawn = GenerationConfig.from_values({"do_sample": True, "temperature": 0.6})
    assert drawn.samples
    assert drawn.top_k == 50
    assert GenerationConfig.from_values({"do_sample": True, "top_k": 0}).top_k is None
    # A sampling knob of the caller's asks for sampling, whatever the file says.
    assert GenerationConfig.from_values({}).replaced({"top_p": 0.9}).samples
    assert not drawn.replaced({"do_sample": False}).samples


def test_a_length_stands_in_place_of_the_other_way_to_give_it():
    said = GenerationConfig(max_new_tokens=7, min_length=5)
    changed = said.replaced({"max_length": 20, "min_new_tokens": 0})
    assert (changed.max_new_tokens, changed.max_length) == (None, 20)
    assert (changed.min_new_tokens, changed.min_length) == (0, 0)
    both = said.replaced({"max_new_tokens": 3, "max_length": 9})
    assert (both.max_new_tokens, both.max_length) == (3, 9)


@pytest.fixture
def checkpoint(tmp_path):
    """A function that writes a checkpoint with these defaults, and gives (ours, theirs) loaded from it."""

    def make(family, **values):
        theirs = pair(family)[1]
        theirs.save_pretrained(tmp_path)
        (tmp_path / "generation_config.json").write_text(json.dumps({"pad_token_id": 0, **values}))
        return transfuse.from_pretrained(tmp_path), type(theirs).from_pretrained(tmp_path)

    return make


@pytest.mark.parametrize(
    "family, values",
    [
        ("llama", {"num_beams": 3, "eos_token_id": EOS, "max_new_tokens": 9, "length_penalty": 2.0}),
        ("llama", {"eos_token_id": EOS, "max_length": 15, "repetition_penalty": 1.4, "bad_words_ids": [[8], [9, 10]]}),
        ("t5", {"num_beams": 2, "eos_token_id": 3, "decoder_start_token_id": 4, "forced_eos_token_id": 3,
                "no_repeat_ngram_size": 2, "max_length": 10, "min_length": 6, "early_stopping": True}),
    ],
)  # fmt: skip
def test_a_checkpoint_sets_the_defaults(checkpoint, family, values):
    ours, theirs = checkpoint(family, **values)
    ids, mask = prompts([6, 6], family)
    with torch.no_grad():
        assert ours.generate(ids, mask).tolist() == theirs.generate(ids, attention_mask=mask).tolist()
        explicit = {"max_new_tokens": 4, "num_beams": 1, "repetition_penalty": 1.0}
        assert (
            ours.generate(ids, mask, **explicit).tolist()
            == theirs.generate(ids, attention_mask=mask, **explicit).tolist()
        )
    # A configuration of the caller's stands in place of the whole file.
    config = GenerationConfig(
        max_new_tokens=3, eos_token_id=(), decoder_start_token_id=values.get("decoder_start_token_id")
    )
    assert ours.generate(ids, mask, config).shape[1] == (9 if family == "llama" else 4)


def test_a_checkpoint_of_old_keeps_them_in_its_configuration(checkpoint, tmp_path):
    checkpoint("llama")
    (tmp_path / "generation_config.json").unlink()
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_beams": 4, "length_penalty": 0.5}))
    model = transfuse.from_pretrained(tmp_path)
    assert model.generation_config == GenerationConfig(num_beams=4, length_penalty=0.5, do_sample=False)
    model.save_pretrained(tmp_path / "again")
    assert transfuse.from_pretrained(tmp_path / "again").generation_config == model.generation_config
    (tmp_path / "generation_config.json").write_text('{"top_p": 7}')
    with pytest.raises(
        ConfigError, match=r"generation_config.json: generate: top_p must be above 0 and at most 1, got 7"
    ):
        transfuse.from_pretrained(tmp_path)


def test_a_checkpoint_is_told_which_of_its_knobs_there_are_none_of(checkpoint, tmp_path):
    idle = {"guidance_scale": 1.0, "diversity_penalty": 0.0, "suppress_tokens": [], "num_beam_groups": 1, "top_h": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint("llama", **idle, num_beams=2, use_cache=True)
    with pytest.warns(UserWarning, match="no such knob") as told:
        checkpoint("llama", suppress_tokens=[7, 8], guidance_scale=2.5, num_beams=2)
    (warning,) = told
    assert f"{tmp_path / 'generation_config.json'} asks for guidance_scale=2.5, suppress_tokens=[7, 8]: " in str(
        warning.message
    )
    assert warning.filename == __file__


def test_the_default_budget_is_what_the_context_leaves():
    model = pair("gpt2")[0]
    room = model.config.max_positions
    assert model.generate(prompts([5])[0], eos_token_id=()).shape[1] == 25
    assert model.generate(prompts([room - 3])[0], eos_token_id=()).shape[1] == room + 1


# --- stop strings ---------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer whose token n is the n-th letter; like many, it drops a space at the start of a text."""

    def decode(self, ids):
        return "".join(" " if i == 60 else chr(65 + i) for i in ids).removeprefix(" ")


@pytest.mark.parametrize("beams", [1, 3])
def test_strings_end_their_row(beams):
    model, letters = pair("llama")[0], Letters()
    ids, mask = prompts([5, 2, 4])
    free = model.generate(ids, mask, max_new_tokens=20, eos_token_id=())[:, 5:].tolist()
    stop = [letters.decode(free[0][3:5]), letters.decode(free[2][6:7])]
    got = model.generate(
        ids, mask, max_new_tokens=20, eos_token_id=(), stop_strings=stop, tokenizer=letters, pad_token_id=0,
        num_beams=beams,
    )[:, 5:]  # fmt: skip
    for row, tokens in enumerate(got.tolist()):
        text = letters.decode(tokens)
        ends = [text.find(s) + len(s) for s in stop if s in text]
        end = min(ends, default=20)
        assert all(token == 0 for token in tokens[end:])
        if beams == 1:
            assert tokens[:end] == free[row][:end]
    if beams == 1:
        assert got.shape[1] < 20 or not all(any(s in letters.decode(t) for s in stop) for t in got.tolist())
        assert 0 in got[0].tolist()


class Spaces:
    """Says: space, A, space, A, ..."""

    config = None

    def new_cache(self, batch, max_length):
        return None

    def __call__(self, ids, **kw):
        logits = torch.zeros(*ids.shape, 61)
        logits[..., 60] = (ids != 60).float()
        logits[..., 0] = (ids == 60).float()
        return type("Out", (), {"logits": logits})


def test_a_stop_string_may_begin_with_a_space_and_span_tokens():
    generate = transfuse.generation.generate
    ids = torch.tensor([[0, 60, 0]])

    def say(*stop):
        return generate(Spaces(), ids, max_new_tokens=12, stop_strings=stop, tokenizer=Letters())[0, 3:].tolist()

    assert say(" A") == [60, 0]  # the prompt's own does not count
    assert say("A A") == [60, 0, 60, 0]
    assert say("nothing", "A") == [60, 0]
    assert len(say("AA")) == 12


def test_a_string_ends_a_text_like_transformers():
    ours, theirs = pair("gpt2")
    vocabulary = {chr(65 + i): i for i in range(V)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    ids, _ = prompts([5])
    free = ours.generate(ids, max_new_tokens=20, eos_token_id=())[0, 5:].tolist()
    stop = chr(65 + free[7])
    want = expected(theirs, ids, max_new_tokens=20, stop_strings=[stop], tokenizer=tokenizer)
    got = ours.generate(ids, max_new_tokens=20, eos_token_id=(), stop_strings=stop, tokenizer=tokenizer)
    assert torch.equal(got, want)
