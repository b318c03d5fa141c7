"""What a caller may ask of generation, checked once. Names and meanings are those of transformers' GenerationConfig."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transfuse.errors import ArgumentError


@dataclass(frozen=True)
class Settings:
    """The knobs of one generation. None leaves a knob out.

    Raises:
        ArgumentError: a value is out of its range, or two do not go together.

    >>> Settings(top_p=0.9).samples, Settings().samples, Settings(temperature=0.0).samples
    (True, False, False)
    >>> Settings(top_p=0.0)
    Traceback (most recent call last):
    transfuse.errors.ArgumentError: generate: top_p must be above 0 and at most 1, got 0.0
    """

    max_new_tokens: int = 20
    min_new_tokens: int = 0
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        _whole("max_new_tokens", self.max_new_tokens, least=1)
        _whole("min_new_tokens", self.min_new_tokens, least=0)
        _whole("num_return_sequences", self.num_return_sequences, least=1)
        if self.top_k is not None:
            _whole("top_k", self.top_k, least=1, remedy="; None keeps every token")
        if self.do_sample is not None and not isinstance(self.do_sample, bool):
            raise ArgumentError(f"generate: do_sample must be True, False or None, got {self.do_sample!r}")
        _within("temperature", self.temperature, "at least 0", lambda v: 0.0 <= v < math.inf)
        _within("top_p", self.top_p, "above 0 and at most 1", lambda v: 0.0 < v <= 1.0)
        _within("min_p", self.min_p, "between 0 and 1", lambda v: 0.0 <= v <= 1.0)
        _within("repetition_penalty", self.repetition_penalty, "above 0", lambda v: 0.0 < v < math.inf)
        if self.min_new_tokens > self.max_new_tokens:
            raise ArgumentError(
                f"generate: min_new_tokens must be at most max_new_tokens ({self.max_new_tokens}), "
                f"got {self.min_new_tokens}"
            )
        if self.num_return_sequences > 1 and not self.samples:
            raise ArgumentError(
                f"generate: num_return_sequences = {self.num_return_sequences} needs sampling, since greedy sequences "
                "would all be the same: give do_sample=True or a temperature above 0"
            )

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
        return any(v is not None for v in (self.temperature, self.top_k, self.top_p, self.min_p))


def _whole(name: str, value: int, least: int, remedy: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"generate: {name} must be a whole number of at least {least}, got {value!r}{remedy}")


def _within(name, value, words, test) -> None:  # type: ignore[no-untyped-def]
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not test(value):
        raise ArgumentError(f"generate: {name} must be {words}, got {value!r}")
