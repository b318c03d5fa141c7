"""Text in, text out: prompts continued by a decoder, or answered, translated, summarised by an encoder-decoder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch

from transfuse import generation
from transfuse.errors import ArgumentError
from transfuse.generation.settings import GenerationConfig, Knobs, settings_of
from transfuse.models import Decoder, Seq2Seq
from transfuse.models.checkpoint import some
from transfuse.models.tokenizer import Tokenizer, as_texts
from transfuse.tasks.running import at_least, batches, check_pair

if TYPE_CHECKING:
    from typing_extensions import Unpack


def generate(
    model: Decoder | Seq2Seq,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    add_special_tokens: bool = True,
    batch_size: int = 32,
    progress: bool | None = None,
    generation_config: GenerationConfig | None = None,
    generator: torch.Generator | None = None,
    assistant_model: Any = None,
    **knobs: Unpack[Knobs],
) -> list[str]:
    """What the model writes after each prompt, without the prompt.

    Args:
        model: a Decoder or a Seq2Seq.
        tokenizer: the model's.
        prompts: one text or several.
        add_special_tokens: add what the model expects around a text; False for text from a chat template.
        batch_size: prompts at a time; those of like length share a batch.
        progress: show a bar on standard error; None: on a terminal, if there is much to do.
        generation_config, generator, assistant_model: as for :func:`transfuse.generation.generate`.
        **knobs: those of :class:`transfuse.generation.GenerationConfig`: max_new_tokens, temperature, num_beams, ...
            Where neither they nor the model say which token ends a text, the tokenizer does.

    Returns:
        num_return_sequences texts for each prompt, those of one prompt next to one another; special tokens left out.

    Raises:
        ArgumentError: as :func:`transfuse.generation.generate`; the model is of another kind; no prompt, or one without
            tokens.
        CheckpointError: the tokenizer is another model's.

    >>> import transfuse
    >>> from tokenizers import Tokenizer as Backend, models
    >>> tokenizer = transfuse.models.tokenizer.Tokenizer(Backend(models.BPE({"a": 0, "b": 1, "c": 2}, [])))
    >>> model = transfuse.Decoder(transfuse.TransformerConfig("decoder", 3, 16, num_layers=1, num_heads=2))
    >>> [len(text.split()) for text in generate(model, tokenizer, ["ab", "c"], max_new_tokens=4)]
    [4, 4]
    """
    check_pair("generate", model, tokenizer, (Decoder, Seq2Seq), "encoders write no text")
    at_least("generate", "batch_size", batch_size)
    texts = as_texts("generate: prompts", prompts)
    if not texts:
        raise ArgumentError("generate: expected at least one prompt, got none")
    encodings = [windows[0] for windows in tokenizer.windows(texts, add_special_tokens=add_special_tokens)]
    _check_prompts(texts, [len(encoding.ids) for encoding in encodings])
    settings, ends = _settings(model, tokenizer, generation_config, knobs)
    written: list[list[str]] = [[] for _ in texts]
    for chosen in batches([len(encoding.ids) for encoding in encodings], batch_size, "generate", progress):
        batch = tokenizer.pad([encodings[i] for i in chosen], padding_side="left", device=model.device)
        tokens = generation.generate(
            model, batch["input_ids"], batch["attention_mask"], settings,
            generator=generator, tokenizer=tokenizer, assistant_model=assistant_model,
        )  # fmt: skip
        # An encoder-decoder's own tokens begin with the one it starts from.
        first = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
        rows = [tokenizer.decode(_until(row, ends)) for row in tokens[:, first:].tolist()]
        copies = len(rows) // len(chosen)
        for at, i in enumerate(chosen):
            written[i] = rows[at * copies : (at + 1) * copies]
    return [text for group in written for text in group]


def stream_text(
    model: Decoder | Seq2Seq,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    add_special_tokens: bool = True,
    generation_config: GenerationConfig | None = None,
    generator: torch.Generator | None = None,
    assistant_model: Any = None,
    **knobs: Unpack[Knobs],
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
    check_pair("generate", model, tokenizer, (Decoder, Seq2Seq), "encoders write no text")
    if not isinstance(prompt, str):
        raise ArgumentError(
            f"stream_text: expected one prompt, a str, got {type(prompt).__name__}; generate takes several"
        )
    batch = tokenizer(prompt, add_special_tokens=add_special_tokens, device=model.device)
    _check_prompts([prompt], batch["attention_mask"].sum(1).tolist())
    settings, ends = _settings(model, tokenizer, generation_config, knobs)
    if settings.num_return_sequences > 1:
        raise ArgumentError(
            f"stream_text: expected num_return_sequences of 1, got {settings.num_return_sequences}; see generate"
        )
    steps = generation.stream(
        model, batch["input_ids"], batch["attention_mask"], settings,
        generator=generator, tokenizer=tokenizer, assistant_model=assistant_model,
    )  # fmt: skip
    return _pieces(tokenizer, steps, ends)


def translate(
    model: Seq2Seq,
    tokenizer: Tokenizer,
    texts: str | Sequence[str],
    *,
    source: str | None = None,
    target: str | None = None,
    prefix: str | None = None,
    batch_size: int = 32,
    progress: bool | None = None,
    generator: torch.Generator | None = None,
    **knobs: Unpack[Knobs],
) -> list[str]:
    """Each text in another language.

    A model of one pair of languages (Marian's) needs to be told nothing. One of several takes ``target`` (a token such
    as ``>>de<<`` in its vocabulary) or both ``source`` and ``target`` (T5, whose config.json has a prefix and knobs for
    each pair).

    Args:
        model: a Seq2Seq.
        tokenizer: the model's.
        texts: one text or several.
        source, target: languages, by the names that the checkpoint uses ("en", "de", "pt_BR").
        prefix: what stands before every text instead, such as "translate English to German: ".
        batch_size, progress, generator: as for :func:`generate`.
        **knobs: as for :func:`generate`, instead of those in config.json.

    Returns:
        num_return_sequences texts for each text, those of one text next to one another.

    Raises:
        ArgumentError: as :func:`generate`, or the checkpoint does not know the languages.
        CheckpointError: the tokenizer is another model's.

    >>> import transfuse
    >>> from tokenizers import Tokenizer as Backend, models
    >>> tokenizer = transfuse.models.tokenizer.Tokenizer(Backend(models.BPE({"a": 0, "b": 1, "c": 2}, [])))
    >>> config = transfuse.TransformerConfig("encoder_decoder", 3, 16, num_layers=1, num_heads=2, bos_token_id=0)
    >>> [len(text.split()) for text in translate(transfuse.Seq2Seq(config), tokenizer, ["ab", "c"], max_new_tokens=4)]
    [4, 4]
    """
    check_pair("translate", model, tokenizer, (Seq2Seq,), "it needs an encoder-decoder (T5, Marian, BART)")
    _check_words("translate", source=source, target=target)
    settings: Mapping[str, Any] = {}
    if prefix is None:
        settings, prefix = _translation(model, tokenizer, source, target)
    _check_words("translate", prefix=prefix)
    given = as_texts("translate: texts", texts)
    return _rewrite(model, tokenizer, given, prefix, settings, batch_size, progress, generator, knobs)


def summarize(
    model: Seq2Seq,
    tokenizer: Tokenizer,
    texts: str | Sequence[str],
    *,
    prefix: str | None = None,
    batch_size: int = 32,
    progress: bool | None = None,
    generator: torch.Generator | None = None,
    **knobs: Unpack[Knobs],
) -> list[str]:
    """Each text in short.

    Args:
        model: a Seq2Seq.
        tokenizer: the model's.
        texts: one text or several.
        prefix: what stands before every text; None: what config.json has for the task ("summarize: " in T5's).
        batch_size, progress, generator: as for :func:`generate`.
        **knobs: as for :func:`generate`, instead of those in config.json.

    Returns:
        num_return_sequences texts for each text, those of one text next to one another.

    Raises:
        ArgumentError: as :func:`generate`. CheckpointError: the tokenizer is another model's.

    >>> import transfuse
    >>> from tokenizers import Tokenizer as Backend, models
    >>> tokenizer = transfuse.models.tokenizer.Tokenizer(Backend(models.BPE({"a": 0, "b": 1, "c": 2}, [])))
    >>> config = transfuse.TransformerConfig("encoder_decoder", 3, 16, num_layers=1, num_heads=2, bos_token_id=0)
    >>> len(summarize(transfuse.Seq2Seq(config), tokenizer, "abc", max_new_tokens=4))
    1
    """
    check_pair("summarize", model, tokenizer, (Seq2Seq,), "it needs an encoder-decoder (T5, BART)")
    settings = _task_params(model).get("summarization", {})
    if prefix is None:
        prefix = _prefix(model, settings)
    _check_words("summarize", prefix=prefix)
    given = as_texts("summarize: texts", texts)
    return _rewrite(model, tokenizer, given, prefix, settings, batch_size, progress, generator, knobs)


def count_tokens(tokenizer: Tokenizer, texts: str | Sequence[str], *, add_special_tokens: bool = True) -> list[int]:
    """How many tokens each text is for the model.

    Args:
        tokenizer: the model's.
        texts: one text or several.
        add_special_tokens: count what the model expects around a text too.

    Raises:
        ArgumentError: there is no tokenizer, or a text is none.

    >>> import transfuse
    >>> from tokenizers import Tokenizer as Backend, models
    >>> tokenizer = transfuse.models.tokenizer.Tokenizer(Backend(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])))
    >>> count_tokens(tokenizer, ["abab", "ba", ""])
    [2, 2, 0]
    """
    if not isinstance(tokenizer, Tokenizer):
        raise ArgumentError(f"count_tokens: expected a tokenizer, got {type(tokenizer).__name__}")
    windows = tokenizer.windows(as_texts("count_tokens: texts", texts), add_special_tokens=add_special_tokens)
    return [len(found[0].ids) for found in windows]


def _rewrite(
    model: Seq2Seq,
    tokenizer: Tokenizer,
    texts: list[str],
    prefix: str,
    settings: Mapping[str, Any],
    batch_size: int,
    progress: bool | None,
    generator: torch.Generator | None,
    knobs: Knobs,
) -> list[str]:
    """What the model writes for each text behind the prefix."""
    for i, text in enumerate(texts):
        if not text.strip():
            raise ArgumentError(f"every text must hold a word, texts[{i}] is {text!r}")
    known = {name: v for name, v in settings.items() if name in Knobs.__annotations__ and v is not None}
    if {"max_length", "max_new_tokens"} & knobs.keys():  # the checkpoint's own lengths would contradict the caller's
        known = {name: value for name, value in known.items() if not name.startswith(("max_", "min_"))}
    config = settings_of(model, None).replaced(known)
    return generate(
        model, tokenizer, [prefix + text for text in texts], batch_size=batch_size, progress=progress,
        generation_config=config, generator=generator, **knobs,
    )  # fmt: skip


def _translation(
    model: Seq2Seq, tokenizer: Tokenizer, source: str | None, target: str | None
) -> tuple[Mapping[str, Any], str]:
    """What the checkpoint says of a pair of languages: knobs, and what to write before a text.

    Raises:
        ArgumentError: it knows pairs, but not this one.
    """
    pairs = {name: params for name, params in _task_params(model).items() if name.startswith("translation_")}
    params = pairs.get(f"translation_{source}_to_{target}")
    if params is None and source is None and target is None and len(pairs) == 1:
        params = next(iter(pairs.values()))
    if params is not None:
        return params, _prefix(model, params)
    if pairs:
        known = ", ".join(name.removeprefix("translation_") for name in pairs)
        raise ArgumentError(
            f"translate: the checkpoint translates {known}; got source {source!r} and target {target!r}: give one of "
            "these pairs, or prefix="
        )
    if target is None:
        return {}, _prefix(model, {})
    targets = sorted(token[2:-2] for token in tokenizer.backend.get_vocab() if re.fullmatch(">>.+<<", token))
    if targets and target not in targets:
        raise ArgumentError(f"translate: the checkpoint translates to {some(targets)}; got target {target!r}")
    return {}, f">>{target}<< " if targets else _prefix(model, {})


def _task_params(model: Seq2Seq) -> Mapping[str, Any]:
    """task_specific_params of config.json, where it is what it should be."""
    given = model.task_settings.get("task_specific_params")
    return {name: v for name, v in given.items() if isinstance(v, Mapping)} if isinstance(given, Mapping) else {}


def _check_words(task: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None and not isinstance(value, str):
            raise ArgumentError(f"{task}: {name} must be a text (str), got {type(value).__name__}")


def _prefix(model: Seq2Seq, params: Mapping[str, Any]) -> str:
    """What the checkpoint puts before a text."""
    given = params.get("prefix", model.task_settings.get("prefix"))
    return given if isinstance(given, str) else ""


def _pieces(tokenizer: Tokenizer, steps: Iterator[torch.Tensor], ends: tuple[int, ...]) -> Iterator[str]:
    decoder = tokenizer.stream()
    with closing(steps):  # type: ignore[type-var]  # it is a generator
        for tokens in steps:
            token = int(tokens)
            if token not in ends and (piece := decoder.put(token)):
                yield piece
    if rest := decoder.end():
        yield rest


def _check_prompts(prompts: list[str], lengths: list[int]) -> None:
    for prompt, (i, length) in zip(prompts, enumerate(lengths), strict=True):
        if length == 0:
            raise ArgumentError(f"generate: every prompt must hold a token, prompts[{i}] is {prompt!r}")


def _settings(
    model: Decoder | Seq2Seq, tokenizer: Tokenizer, config: GenerationConfig | None, knobs: Knobs
) -> tuple[GenerationConfig, tuple[int, ...]]:
    """The knobs with what the tokenizer knows, and the tokens that end a text."""
    settings = settings_of(model, config).replaced(knobs)
    found = (settings.eos_token_id, model.config.eos_token_id, tokenizer.target.eos_token_id)
    ends = next((ids for ids in found if ids is not None), ())
    pad = tokenizer.target.pad_token_id if settings.pad_token_id is None else settings.pad_token_id
    settings = settings.replaced({"eos_token_id": ends, "pad_token_id": pad})
    return settings, (ends,) if isinstance(ends, int) else tuple(ends)


def _until(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    """The tokens before the first end."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]
