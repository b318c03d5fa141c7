"""Attention maps: the model's own probabilities with readable tokens, pictures of them, and what bertviz takes."""

from __future__ import annotations

import pytest
import torch

import transfuse
from transfuse import tasks
from transfuse.errors import ArgumentError
from transfuse.models import SequenceClassifier
from transfuse.models.tokenizer import Tokenizer, TokenizerSettings

tokenizers = pytest.importorskip("tokenizers")
LETTERS = {letter: i for i, letter in enumerate("abcdefgh>")}
WHAT = ("encoder", "decoder", "cross")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(LETTERS, []))
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A >", special_tokens=[(">", 8)])
    return Tokenizer(backend, TokenizerSettings({"eos": ">"}))


def build(architecture: str, **changes: object) -> torch.nn.Module:
    sizes = {"vocab_size": 9, "hidden_size": 24, "num_layers": 2, "num_heads": 3, "initializer_range": 0.4}
    kind = {"encoder": transfuse.Encoder, "decoder": transfuse.Decoder, "encoder_decoder": transfuse.Seq2Seq}
    config = transfuse.TransformerConfig(architecture, **{**sizes, **changes})
    return kind[architecture](config).eval()


@pytest.mark.parametrize("architecture", ["encoder", "decoder"])
def test_one_stack_gives_one_map(architecture: str, tokenizer: Tokenizer) -> None:
    model = build(architecture)
    maps = tasks.attention_maps(model, tokenizer, "badcafe")
    assert list(maps) == [architecture]
    found = maps[architecture]
    assert found.tokens == found.key_tokens == [*"badcafe", ">"]
    expected = model(torch.tensor([tokenizer.encode("badcafe")]), output_attentions=True).attentions
    assert torch.equal(found.weights, torch.cat(expected))
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(2, 3, 8))
    assert model(torch.tensor([[1, 2]])).attentions is None, "nobody asked for them"


@pytest.mark.parametrize("target", ["bad", None])
def test_an_encoder_decoder_gives_three(target: str | None, tokenizer: Tokenizer) -> None:
    model = build("encoder_decoder", num_decoder_layers=3, num_decoder_heads=2, head_dim=8, decoder_start_token_id=8)
    maps = tasks.attention_maps(model, tokenizer, "face", target=target, max_new_tokens=4)
    written = torch.tensor([[8, 1, 0, 3]])
    if target is None:
        written = model.generate(torch.tensor([tokenizer.encode("face")]), max_new_tokens=4)[:, :-1]
    read = torch.tensor([tokenizer.encode("face")])
    out = model(read, decoder_input_ids=written, output_attentions=True)
    names = [">abcdefgh"[(i + 1) % 9] for i in written[0].tolist()]
    assert maps["encoder"].tokens == maps["cross"].key_tokens == [*"face", ">"]
    assert maps["decoder"].tokens == maps["cross"].tokens == names
    for name, expected in zip(WHAT, (out.encoder_attentions, out.attentions, out.cross_attentions), strict=True):
        assert torch.equal(maps[name].weights, torch.cat(expected)), name
    assert maps["cross"].weights.shape == (3, 2, written.shape[1], 5)


def test_a_model_with_a_head_shows_its_stack(tokenizer: Tokenizer) -> None:
    config = transfuse.TransformerConfig("encoder", 9, 24, num_layers=2, num_heads=3, pooler=True)
    model = SequenceClassifier(config, 2).eval()
    maps = tasks.attention_maps(model, tokenizer, "face")
    assert torch.equal(
        maps["encoder"].weights, tasks.attention_maps(model.encoder, tokenizer, "face")["encoder"].weights
    )


def test_the_decoder_of_a_classifier_reads_the_text_again(tokenizer: Tokenizer) -> None:
    config = build("encoder_decoder", decoder_start_token_id=0, eos_token_id=8).config
    model = SequenceClassifier(config, 2).eval()
    maps = tasks.attention_maps(model, tokenizer, "face")
    assert maps["cross"].tokens == [*"aface"]
    assert maps["cross"].key_tokens == [*"face", ">"]
    ids = torch.tensor([tokenizer.encode("face")])
    assert torch.equal(maps["cross"].weights, torch.cat(model(ids, output_attentions=True).cross_attentions))


def test_bertviz_gets_what_its_head_view_takes(tokenizer: Tokenizer) -> None:
    one = tasks.head_view_arguments(tasks.attention_maps(build("decoder"), tokenizer, "face"))
    assert one["tokens"] == [*"face", ">"]
    assert [tuple(layer.shape) for layer in one["attention"]] == [(1, 3, 5, 5)] * 2
    model = build("encoder_decoder", decoder_start_token_id=8)
    two = tasks.head_view_arguments(tasks.attention_maps(model, tokenizer, "face", target="bad"))
    shapes = {"encoder": (1, 3, 5, 5), "decoder": (1, 3, 4, 4), "cross": (1, 3, 4, 5)}
    for name, shape in shapes.items():
        assert [tuple(layer.shape) for layer in two[f"{name}_attention"]] == [shape] * 2
    assert (two["encoder_tokens"], two["decoder_tokens"]) == ([*"face", ">"], [*">bad"])
    assert len(two) == 5
    bertviz = pytest.importorskip("bertviz")
    for arguments in (one, two):
        html = bertviz.head_view(**arguments, html_action="return").data
        assert "Cross" in html or "cross_attention" not in arguments
        assert bertviz.model_view(**arguments, html_action="return").data


def test_byte_level_tokens_are_spelled_as_text() -> None:
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({"\u0120caf\u00c3\u00a9": 0, "\u00e6\u0139": 1, "\u010a": 2, "<|end|>": 3}, [])
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    assert tasks.maps.readable_tokens(Tokenizer(backend), [0, 1, 2, 3, 4]) == [
        " café", "\\xe6\\x97", "\n", "<|end|>", "<id 4>",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "layer, head, count, title",
    [
        (None, None, 7, "cross-attention"),
        (2, None, 5, "cross-attention, layer 2"),
        (1, 3, 2, "cross-attention, layer 1, head 3"),
    ],
)
def test_figures(layer: int | None, head: int | None, count: int, title: str) -> None:
    weights = torch.rand(2, 3, 4, 5).softmax(-1)
    figure = tasks.AttentionMap("cross", weights, [*"abcd"], [*"vwxyz"]).figure(layer, head)
    assert len(figure.axes) == count
    assert title in (figure.get_suptitle(), figure.axes[0].get_title())
    if head is not None:
        assert torch.equal(torch.tensor(figure.axes[0].images[0].get_array()), weights[0, 2].double())


def test_mistakes(tokenizer: Tokenizer) -> None:
    found = tasks.AttentionMap("encoder", torch.ones(2, 3, 1, 1), ["a"], ["a"])
    bare = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE(LETTERS, [])))
    for call, message in [
        (lambda: found.figure(3), "layer must be from 1 to 2, got 3"),
        (lambda: found.figure(0), "layer must be a whole number of at least 1, got 0"),
        (lambda: found.figure(1, 4), "head must be from 1 to 3, got 4"),
        (lambda: found.figure(None, 1), "head 1 of which layer"),
        (lambda: tasks.attention_maps(None, tokenizer, "a"), "expected a model of kind TransformerModel, got None"),
        (lambda: tasks.attention_maps(build("encoder"), None, "a"), "expected the model's tokenizer, got None"),
        (lambda: tasks.attention_maps(build("encoder"), bare, ""), "the text must hold a token, got ''"),
        (lambda: tasks.attention_maps(build("decoder"), tokenizer, "a", target="b"), "target needs an encoder-decoder"),
        (
            lambda: tasks.attention_maps(build("encoder_decoder"), tokenizer, "a", target="b"),
            "no decoder_start_token_id to begin the target with",
        ),
    ]:
        with pytest.raises(ArgumentError, match=message):
            call()
