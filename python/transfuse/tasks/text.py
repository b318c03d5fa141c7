"""Text in, text out: prompts continued by a decoder, or answered by an encoder-decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import torch

from transfuse import generation
from transfuse.errors import ArgumentError
from transfuse.models.tokenizer import Tokenizer, as_texts

if TYPE_CHECKING:
    from transfuse.models import Decoder, Seq2Seq


def generate(
    model: Decoder | Seq2Seq,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 20,
    min_new_tokens: int = 0,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    num_return_sequences: int = 1,
    generator: torch.Generator | None = None,
    add_special_tokens: bool = True,
) -> list[str]:
    """What the model writes after each prompt, without the prompt; all prompts in one batch.

    Args:
        model, max_new_tokens, ..., generator: as for :func:`transfuse.generation.generate`.
        tokenizer: the model's.
        prompts: one text or several.
        eos_token_id: None: the model's configuration's, else the tokenizer's.
        add_special_tokens: add what the model expects around a text; False for text from a chat template.

    Returns:
        num_return_sequences texts for each prompt, those of one prompt next to one another; special tokens left out.

    Raises:
        ArgumentError: as :func:`transfuse.generation.generate`; no prompt, or one without tokens.

    >>> import transfuse
    >>> from tokenizers import Tokenizer as Backend, models
    >>> tokenizer = transfuse.models.tokenizer.Tokenizer(Backend(models.BPE({"a": 0, "b": 1, "c": 2}, [])))
    >>> model = transfuse.Decoder(transfuse.TransformerConfig("decoder", 3, 16, num_layers=1, num_heads=2))
    >>> [len(text.split()) for text in generate(model, tokenizer, ["ab", "c"], max_new_tokens=4)]
    [4, 4]
    """
    batch = _encode(model, tokenizer, as_texts("generate: prompts", prompts), add_special_tokens)
    ends = _ends(model, tokenizer, eos_token_id)
    tokens = generation.generate(
        model,
        batch["input_ids"],
        batch["attention_mask"],
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        num_return_sequences=num_return_sequences,
        generator=generator,
    )
    # An encoder-decoder's own tokens begin with the one it starts from.
    written = tokens[:, 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1] :]
    return [tokenizer.decode(_until(row, ends)) for row in written.tolist()]


def stream_text(
    model: Decoder | Seq2Seq,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 20,
    min_new_tokens: int = 0,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    add_special_tokens: bool = True,
) -> Iterator[str]:
    """As :func:`generate` for one prompt, but piece by piece as the text is made: join them for the whole.

    A character whose bytes come in several tokens is held back until it is complete, so every piece can be printed.
    The arguments are checked at once, not at the first piece.

    >>> import transfuse
    >>> from tokenizers import Tokenizer as Backend, models
    >>> tokenizer = transfuse.models.tokenizer.Tokenizer(Backend(models.BPE({"a": 0, "b": 1, "c": 2}, [])))
    >>> model = transfuse.Decoder(transfuse.TransformerConfig("decoder", 3, 16, num_layers=1, num_heads=2))
    >>> pieces = list(stream_text(model, tokenizer, "ab", max_new_tokens=4))
    >>> "".join(pieces) == generate(model, tokenizer, "ab", max_new_tokens=4)[0]
    True
    """
    batch = _encode(model, tokenizer, [prompt], add_special_tokens)
    ends = _ends(model, tokenizer, eos_token_id)
    steps = generation.stream(
        model,
        batch["input_ids"],
        batch["attention_mask"],
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        generator=generator,
    )
    return _pieces(tokenizer, steps, ends)


def _pieces(tokenizer: Tokenizer, steps: Iterator[torch.Tensor], ends: tuple[int, ...]) -> Iterator[str]:
    decoder = tokenizer.stream()
    with closing(steps):  # type: ignore[type-var]  # it is a generator
        for tokens in steps:
            token = int(tokens)
            if token not in ends and (piece := decoder.put(token)):
                yield piece
    if rest := decoder.end():
        yield rest


def _encode(
    model: Decoder | Seq2Seq, tokenizer: Tokenizer, prompts: list[str], add_special_tokens: bool
) -> dict[str, torch.Tensor]:
    if not prompts:
        raise ArgumentError("generate: expected at least one prompt, got none")
    batch = tokenizer(prompts, padding_side="left", add_special_tokens=add_special_tokens, device=model.device)
    lengths = batch["attention_mask"].sum(1).tolist()
    for i, length in enumerate(lengths):
        if length == 0:
            raise ArgumentError(f"generate: every prompt must hold a token, prompts[{i}] is {prompts[i]!r}")
    return batch


def _ends(model: Decoder | Seq2Seq, tokenizer: Tokenizer, given: int | Sequence[int] | None) -> tuple[int, ...]:
    for ids in (given, model.config.eos_token_id, tokenizer.eos_token_id):
        if ids is not None:
            return (ids,) if isinstance(ids, int) else tuple(ids)
    return ()


def _until(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    """The tokens before the first end."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]
