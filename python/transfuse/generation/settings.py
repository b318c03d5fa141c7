"""What a caller may ask of generation, checked once. Names and meanings are those of transformers' GenerationConfig."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from transfuse.errors import ArgumentError

if TYPE_CHECKING:
    from typing_extensions import Self

# Larger counts are slips of the hand; refusing them here is clearer than an allocation that fails later.
_MOST_ROWS = 1 << 16
_MOST_TOKENS = 1 << 31
_SAME = (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length"))  # two ways to say one thing
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_MOST_ID = (1 << 63) - 1  # of an int64 tensor
# What generation_config.json may also ask for, and the values of each, None aside, that ask for nothing.
_UNKNOWN: dict[str, tuple[Any, ...]] = {
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_decoder_ids": ([],),
    "guidance_scale": (1,),
    "max_time": (),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "renormalize_logits": (False,),
    "sequence_bias": ([], {}),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "top_h": (),
    "watermarking_config": (),
}


class Knobs(TypedDict, total=False):
    """The keyword arguments of ``generate`` and ``stream`` for type checkers: :class:`GenerationConfig`'s fields."""

    max_new_tokens: int | None
    max_length: int | None
    min_new_tokens: int | None
    min_length: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    bad_words_ids: Sequence[Sequence[int]] | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | Sequence[int] | None
    num_beams: int | None
    length_penalty: float | None
    early_stopping: bool | Literal["never"] | None
    num_return_sequences: int | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    decoder_start_token_id: int | None
    stop_strings: str | Sequence[str] | None
    prompt_lookup_num_tokens: int | None
    num_assistant_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """The knobs of one generation. A knob that is None is left out, or has the value that its line names.

    Args:
        max_new_tokens: how many tokens to add at most; None: up to max_length, else 20 or what the context leaves.
        max_length: the same with the prompt (an encoder-decoder: with what its decoder starts from) counted in.
        min_new_tokens: no end before that many.
        min_length: the same with the prompt counted in; min_new_tokens goes before it.
        do_sample: draw tokens (True) or take the likeliest (False); None: draw if one of the next five is given.
        temperature: divides the scores; 0 is greedy.
        top_k: draw among the k likeliest only.
        top_p: draw among the likeliest that together reach this probability only.
        min_p: draw among tokens at least this many times as likely as the likeliest only.
        typical_p: draw among the tokens whose surprise is nearest to the expected one, up to this probability.
        repetition_penalty: above 1 makes tokens that occurred (padding does not count) less likely.
        no_repeat_ngram_size: no n tokens in a row occur twice, the prompt included; 0: they may.
        encoder_no_repeat_ngram_size: no n tokens in a row of the source (a decoder: the prompt) are written.
        bad_words_ids: sequences of ids that are never written.
        forced_bos_token_id: what follows the one token that the decoder starts from.
        forced_eos_token_id: the last token if nothing else has ended the text before.
        num_beams: how many continuations are followed at a time; 1: no beam search.
        length_penalty: beams are ranked by log-probability / tokens ** length_penalty; above 0 favours long ones.
        early_stopping: a beam search ends with num_beams complete texts (True), once better ones are unlikely (False),
            or once they are impossible ("never").
        num_return_sequences: how many texts a prompt: draws, or the best of the beams.
        eos_token_id: one id or several, each ends its row; None: the model's; () for none.
        pad_token_id: fills ended rows; None: the model's, else the first eos_token_id, else 0.
        decoder_start_token_id: the token that an encoder-decoder's output starts from; None: the model's.
        stop_strings: one text or several, each ends its row; needs the tokenizer.
        prompt_lookup_num_tokens: how many tokens to guess at a time from what the text repeats; it stays the same.
        num_assistant_tokens: how many tokens an assistant model guesses at a time.

    Raises:
        ArgumentError: a value is out of its range, or two do not go together.

    >>> GenerationConfig(top_p=0.9).samples, GenerationConfig().samples, GenerationConfig(temperature=0.0).samples
    (True, False, False)
    >>> GenerationConfig(top_p=0.0)
    Traceback (most recent call last):
    transfuse.errors.ArgumentError: generate: top_p must be above 0 and at most 1, got 0.0
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    stop_strings: str | Sequence[str] = ()
    prompt_lookup_num_tokens: int | None = None
    num_assistant_tokens: int = 5

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value is None:
                object.__setattr__(self, f.name, f.default)
            elif isinstance(value, list):
                object.__setattr__(self, f.name, tuple(value))
        if isinstance(self.stop_strings, str):
            object.__setattr__(self, "stop_strings", (self.stop_strings,))
        self._check_ranges()
        self._check_ids()
        self._check_together()

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """The defaults that a checkpoint's generation_config.json sets, read as transformers reads them.

        Names that mean nothing here are passed over, see :func:`not_heeded`. A checkpoint that asks for sampling and
        names no top_k gets 50, and one that does not ask for it decodes greedily, whatever its temperature.

        >>> GenerationConfig.from_values({"temperature": 0.6, "num_beams": 4, "use_cache": True}).samples
        False
        """
        names = {f.name for f in dataclasses.fields(cls)} - {"num_assistant_tokens"}
        known = {name: value for name, value in values.items() if name in names and value is not None}
        known["do_sample"] = known.get("do_sample", False)
        if known["do_sample"] is True:
            known.setdefault("top_k", 50)
        for name in ("top_k", "prompt_lookup_num_tokens"):
            known[name] = known.get(name) or None  # 0 leaves them out there
        return cls(**known)

    def to_values(self) -> dict[str, Any]:
        """What :meth:`from_values` and transformers read back: the knobs that are not at their defaults."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        plain["do_sample"] = self.samples
        if self.samples:
            plain.setdefault("top_k", 0)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    def replaced(self, knobs: Mapping[str, Any]) -> Self:
        """These settings with some knobs changed.

        A sampling knob among them asks for sampling, and a length stands in place of the other way to give it.

        Raises:
            ArgumentError: there is no such knob, or a value is out of its range.

        >>> GenerationConfig(do_sample=False, num_beams=4).replaced({"top_p": 0.9}).samples
        True
        >>> GenerationConfig().replaced({"max_new_token": 3})
        Traceback (most recent call last):
        transfuse.errors.ArgumentError: generate: unknown argument 'max_new_token'; did you mean 'max_new_tokens'?
        """
        names = [f.name for f in dataclasses.fields(self)]
        for name in knobs:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
                hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"
                raise ArgumentError(f"generate: unknown argument {name!r}; {hint}")
        if "do_sample" not in knobs and any(knobs.get(name) is not None for name in _SAMPLING):
            knobs = {**knobs, "do_sample": None}
        for pair in _SAME:
            for given, other in (pair, pair[::-1]):
                if knobs.get(given) is not None and other not in knobs:
                    knobs = {**knobs, other: None}
        return dataclasses.replace(self, **knobs)

    @property
    def samples(self) -> bool:
        """True if tokens are drawn, False if the likeliest is taken.

        ``do_sample`` decides; left at None, giving any of the sampling knobs asks for sampling. Temperature 0 is the
        limit of sampling, and that is greedy.
        """
        if self.temperature == 0.0:
            return False
        if self.do_sample is not None:
            return self.do_sample
        return any(getattr(self, name) is not None for name in _SAMPLING)

    def _check_ranges(self) -> None:
        for name in ("max_new_tokens", "max_length", "prompt_lookup_num_tokens"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1, _MOST_TOKENS)
        _whole("num_assistant_tokens", self.num_assistant_tokens, 1, _MOST_TOKENS)
        for name in ("min_new_tokens", "min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"):
            _whole(name, getattr(self, name), 0, _MOST_TOKENS)
        for name in ("num_return_sequences", "num_beams"):
            _whole(name, getattr(self, name), 1, _MOST_ROWS)
        if self.top_k is not None:
            _whole("top_k", self.top_k, 1, _MOST_TOKENS, remedy="; None keeps every token")
        if self.do_sample is not None and not isinstance(self.do_sample, bool):
            raise ArgumentError(f"generate: do_sample must be True, False or None, got {self.do_sample!r}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ArgumentError(f"generate: early_stopping must be True, False or 'never', got {self.early_stopping!r}")
        _within("temperature", self.temperature, "at least 0", lambda v: 0.0 <= v < math.inf)
        _within("top_p", self.top_p, "above 0 and at most 1", lambda v: 0.0 < v <= 1.0)
        _within("min_p", self.min_p, "between 0 and 1", lambda v: 0.0 <= v <= 1.0)
        _within("typical_p", self.typical_p, "above 0 and at most 1", lambda v: 0.0 < v <= 1.0)
        _within("repetition_penalty", self.repetition_penalty, "above 0", lambda v: 0.0 < v < math.inf)
        _within("length_penalty", self.length_penalty, "between -50 and 50", lambda v: -50.0 <= v <= 50.0)

    def _check_ids(self) -> None:
        for name in (name for name in Knobs.__annotations__ if name.endswith("_token_id")):
            value = getattr(self, name)
            several = isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and "eos" in name
            for i in value if several else () if value is None else (value,):
                _id(name, i)
        words: Any = self.bad_words_ids
        if not isinstance(words, tuple) or not all(isinstance(word, (list, tuple)) and word for word in words):
            raise ArgumentError(f"generate: bad_words_ids must be a list of lists of token ids, got {words!r}")
        for word in words:
            for i in word:
                _id("bad_words_ids", i)
        if not isinstance(self.stop_strings, Sequence) or any(
            not isinstance(text, str) or not text for text in self.stop_strings
        ):
            raise ArgumentError(
                f"generate: stop_strings must be texts of at least a character, got {self.stop_strings}"
            )

    def _check_together(self) -> None:
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ArgumentError(
                f"generate: min_new_tokens must be at most max_new_tokens ({self.max_new_tokens}), "
                f"got {self.min_new_tokens}"
            )
        if self.num_beams > 1:
            if self.num_return_sequences > self.num_beams:
                raise ArgumentError(
                    f"generate: num_return_sequences must be at most num_beams ({self.num_beams}), "
                    f"got {self.num_return_sequences}"
                )
            if self.prompt_lookup_num_tokens is not None:
                raise ArgumentError(
                    f"generate: prompt_lookup_num_tokens needs num_beams=1, got num_beams={self.num_beams}; "
                    "guessed tokens are checked against one continuation"
                )
        elif self.num_return_sequences > 1 and not self.samples:
            raise ArgumentError(
                f"generate: num_return_sequences = {self.num_return_sequences} needs sampling, since greedy sequences "
                "would all be the same: give do_sample=True, a temperature above 0, or at least as many num_beams"
            )


def settings_of(model: Any, given: GenerationConfig | None) -> GenerationConfig:
    """The knobs that are given, else those of the model's checkpoint, else the defaults.

    Raises:
        ArgumentError: they are no GenerationConfig.
    """
    settings = getattr(model, "generation_config", None) if given is None else given
    if settings is not None and not isinstance(settings, GenerationConfig):
        raise ArgumentError(
            f"generate: generation_config must be a transfuse GenerationConfig, got {type(settings).__name__}"
        )
    return settings or GenerationConfig()


def not_heeded(values: Mapping[str, Any]) -> list[str]:
    """The knobs in a checkpoint's values that would change the text, and that there are none of here.

    >>> not_heeded({"suppress_tokens": [7, 8], "guidance_scale": 1.0, "num_beams": 4, "use_cache": True})
    ['suppress_tokens']
    """
    return [name for name, idle in _UNKNOWN.items() if values.get(name) is not None and values[name] not in idle]


def _whole(name: str, value: Any, least: int, most: int, remedy: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"generate: {name} must be a whole number of at least {least}, got {value!r}{remedy}")
    if value > most:
        raise ArgumentError(f"generate: {name} must be at most {most}, got {value}{remedy}")


def _within(name: str, value: Any, words: str, test: Callable[[float], bool]) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not test(_as_float(value)):
        raise ArgumentError(f"generate: {name} must be {words}, got {value!r}")


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number that fp64 cannot hold
        return math.inf


def _id(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ArgumentError(f"generate: {name} must be a token id of at least 0, got {value!r}")
    if value > _MOST_ID:
        raise ArgumentError(f"generate: {name} must be a token id, at most {_MOST_ID}, got {value}")
