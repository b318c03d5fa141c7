"""Attention maps of a text: what every head of every layer looks at, as numbers, as pictures, and for bertviz."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from transfuse import generation, viz
from transfuse.errors import ArgumentError
from transfuse.generation.decode import evaluating
from transfuse.models.base import TransformerModel
from transfuse.models.decoder import DecoderBody
from transfuse.models.seq2seq import Seq2Seq
from transfuse.models.stack import Stack
from transfuse.models.task_heads import ModelWithHead
from transfuse.models.tokenizer import Tokenizer
from transfuse.tasks.running import at_least, check_pair

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class AttentionMap:
    """The probabilities of all heads of one kind of attention.

    Attributes:
        name: "encoder", "decoder" or "cross".
        weights: (layers, heads, q_len, k_len) fp32 on the CPU; each row sums to 1.
        tokens: q_len tokens, as a person would write them.
        key_tokens: k_len tokens that they look at; another text's in cross-attention.
    """

    name: str
    weights: torch.Tensor
    tokens: list[str]
    key_tokens: list[str]

    def figure(self, layer: int | None = None, head: int | None = None) -> Figure:
        """A picture of one head, of all heads of a layer, or of all layers and heads.

        Args:
            layer: counted from 1; None: all of them.
            head: counted from 1, of a layer; None: all of them.

        Raises:
            ArgumentError: there is no such layer or head, or a head is given without its layer.
            MissingDependencyError: matplotlib is not installed.

        >>> attention = AttentionMap("encoder", torch.ones(2, 4, 3, 3) / 3, ["a", "b", "c"], ["a", "b", "c"])
        >>> len(attention.figure().axes), len(attention.figure(layer=2).axes), len(attention.figure(2, 4).axes)
        (9, 5, 2)
        """
        layers, heads = self.weights.shape[:2]
        for name, given, count in (("layer", layer, layers), ("head", head, heads)):
            if given is not None:
                at_least("attention", name, given)
                if given > count:
                    raise ArgumentError(f"attention: {name} must be from 1 to {count}, got {given}")
        labels = self.tokens, self.key_tokens
        what = {"cross": "cross-attention"}.get(self.name, f"{self.name} attention")
        if layer is None:
            if head is not None:
                raise ArgumentError(f"attention: head {head} of which layer? give a layer from 1 to {layers}")
            return viz.head_grid(self.weights, *labels, title=what)
        if head is None:
            return viz.head_grid(self.weights[layer - 1], *labels, title=f"{what}, layer {layer}")
        title = f"{what}, layer {layer}, head {head}"
        return viz.attention_heatmap(self.weights[layer - 1, head - 1], *labels, title=title)


@torch.no_grad()
def attention_maps(
    model: TransformerModel,
    tokenizer: Tokenizer,
    text: str,
    *,
    target: str | None = None,
    max_new_tokens: int = 40,
) -> dict[str, AttentionMap]:
    """What every token of a text attends to, in every layer and head.

    Probabilities are computed for this call only: a model's other calls never make them.

    Args:
        model: any model of this package.
        tokenizer: the model's.
        text: what the model reads.
        target: what an encoder-decoder writes; None: what it writes by itself, greedily (a classifier: the text again).
        max_new_tokens: how much of that, at most.

    Returns:
        an encoder's {"encoder": ...}, a decoder's {"decoder": ...}, an encoder-decoder's {"encoder": ...,
        "decoder": ..., "cross": ...}. A row of the decoder's is a token that it has read: it predicts the next.

    Raises:
        ArgumentError: the model is none, the text has no token or is too long, or target is given to a model that
            writes no text of its own.
        CheckpointError: the tokenizer is another model's.

    >>> import transfuse
    >>> from tokenizers import Tokenizer as Backend, models
    >>> tokenizer = Tokenizer(Backend(models.BPE({"a": 0, "b": 1, "c": 2}, [])))
    >>> model = transfuse.Decoder(transfuse.TransformerConfig("decoder", 3, 16, num_layers=2, num_heads=4))
    >>> attention = attention_maps(model, tokenizer, "abc")["decoder"]
    >>> attention.weights.shape, attention.tokens
    (torch.Size([2, 4, 3, 3]), ['a', 'b', 'c'])
    """
    check_pair("attention_maps", model, tokenizer, (TransformerModel,), "transfuse.from_pretrained loads one")
    body = model.body if isinstance(model, ModelWithHead) else model
    for name, value in (("text", text), ("target", "" if target is None else target)):
        if not isinstance(value, str):
            raise ArgumentError(f"attention_maps: {name} must be one text (str), got {type(value).__name__}")
    batch = tokenizer(text, device=model.device)
    if batch["input_ids"].numel() == 0:
        raise ArgumentError(f"attention_maps: the text must hold a token, got {text!r}")
    ids = batch["input_ids"]
    with evaluating(model):
        if isinstance(body, Stack):
            if target is not None:
                raise ArgumentError(f"attention_maps: target needs an encoder-decoder, got {type(model).__name__}")
            name = "decoder" if isinstance(body, DecoderBody) else "encoder"
            return {name: _map(name, body(**batch, output_attentions=True).attentions, tokenizer, ids, tokenizer, ids)}
        written = _target_ids(body, tokenizer, ids, target, max_new_tokens)
        out = body(ids, decoder_input_ids=written, output_attentions=True)
    side = tokenizer.target
    return {
        "encoder": _map("encoder", out.encoder_attentions, tokenizer, ids, tokenizer, ids),
        "decoder": _map("decoder", out.attentions, side, written, side, written),
        "cross": _map("cross", out.cross_attentions, side, written, tokenizer, ids),
    }


def head_view_arguments(maps: Mapping[str, AttentionMap]) -> dict[str, Any]:
    """What :func:`attention_maps` gives, as the arguments of bertviz' ``head_view`` and ``model_view``.

    Args:
        maps: of one text.

    Returns:
        ``attention`` and ``tokens`` of an encoder or a decoder; ``encoder_attention``, ``decoder_attention``,
        ``cross_attention``, ``encoder_tokens`` and ``decoder_tokens`` of an encoder-decoder. Each attention is a list,
        of a tensor (1, heads, q_len, k_len) a layer.

    >>> tokens = ["a", "b", "c"]
    >>> attention = AttentionMap("decoder", torch.ones(2, 4, 3, 3) / 3, tokens, tokens)
    >>> arguments = head_view_arguments({"decoder": attention})
    >>> arguments["tokens"], [tuple(layer.shape) for layer in arguments["attention"]]
    (['a', 'b', 'c'], [(1, 4, 3, 3), (1, 4, 3, 3)])
    """
    layers = {name: list(found.weights[:, None]) for name, found in maps.items()}
    if "cross" not in maps:
        name = next(iter(maps))
        return {"attention": layers[name], "tokens": maps[name].tokens}
    tokens = {f"{name}_tokens": maps[name].tokens for name in ("encoder", "decoder")}
    return {f"{name}_attention": layers[name] for name in ("encoder", "decoder", "cross")} | tokens


def readable_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The tokens of a vocabulary as a person would write them.

    Byte-level vocabularies spell every byte as some letter: here it is the text again, and bytes in hexadecimal where a
    token is a part of a character.

    >>> from tokenizers import Tokenizer as Backend, decoders, models
    >>> backend = Backend(models.BPE({"\u0120caf\u00c3\u00a9": 0, "\u00c3": 1}, []))
    >>> backend.decoder = decoders.ByteLevel()
    >>> readable_tokens(Tokenizer(backend), [0, 1])
    [' café', '\\\\xc3']
    """
    tokens = tokenizer.tokens(ids)
    decoder = tokenizer.backend.decoder
    if decoder is None or b"ByteLevel" not in decoder.__getstate__():
        return tokens
    return [
        bytes(_BYTES[letter] for letter in token).decode(errors="backslashreplace")
        if set(token) <= _BYTES.keys()
        else token
        for token in tokens
    ]


def _byte_of_letter() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary is: itself if it can be seen, else the next from 256 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(unseen)}


_BYTES = _byte_of_letter()


def _map(
    name: str,
    attentions: Sequence[torch.Tensor] | None,
    tokenizer: Tokenizer,
    ids: torch.Tensor,
    key_tokenizer: Tokenizer,
    key_ids: torch.Tensor,
) -> AttentionMap:
    assert attentions is not None
    weights = torch.cat(list(attentions)).float().cpu()  # (layers, heads, q_len, k_len): the batch is one text
    tokens, keys = readable_tokens(tokenizer, ids[0].tolist()), readable_tokens(key_tokenizer, key_ids[0].tolist())
    return AttentionMap(name, weights, tokens, keys)


def _target_ids(
    model: Any, tokenizer: Tokenizer, ids: torch.Tensor, target: str | None, max_new_tokens: int
) -> torch.Tensor:
    """(1, length): what the decoder reads: its first token, then the target without the token that ends it."""
    at_least("attention_maps", "max_new_tokens", max_new_tokens)
    if target is None and not isinstance(model, Seq2Seq):  # a classifier's decoder reads the text again
        shifted: torch.Tensor = model.shift_right(ids)
        return shifted
    if target is None:
        return generation.generate(
            model, ids, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, num_return_sequences=1
        )[:, :-1]
    first = model.config.decoder_start_token_id
    first = model.config.bos_token_id if first is None else first
    if first is None:
        raise ArgumentError("attention_maps: the configuration has no decoder_start_token_id to begin the target with")
    written = tokenizer.target.encode(target)
    written = [token for token in written if token != tokenizer.target.eos_token_id]
    return torch.tensor([[first, *written]], device=ids.device)
