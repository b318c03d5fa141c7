"""How tokens reach the model, each once: prompt and source first, then one or several at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from transfuse.errors import ArgumentError
from transfuse.generation.prompt import Prompt, counts_positions

# Module -> (how many use it in eval mode now, whether it goes back to training mode after the last of them).
_in_use: WeakKeyDictionary[torch.nn.Module, tuple[int, bool]] = WeakKeyDictionary()
_in_use_lock = threading.RLock()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in eval mode, and every part of it back in training mode afterwards if that is where it was.

    Where several threads or streams use a model at a time, afterwards is when the last of them is done.
    """
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    with _in_use_lock:
        for module in modules:
            users, trains = _in_use.get(module, (0, False))
            _in_use[module] = (users + 1, trains or module.training)
            module.training = False
    try:
        yield
    finally:
        with _in_use_lock:
            for module in modules:
                users, trains = _in_use.pop(module)
                if users > 1:
                    _in_use[module] = (users - 1, trains)
                elif trains:
                    module.training = True


class Reader:
    """One model, its cache, and what it has read.

    Args:
        model: see :mod:`transfuse.generation`.
        prompt: what it begins with.
        copies: rows that continue each prompt; the prompt is read once for all of them if the cache can ``widen``.
        needs: methods that the cache must have.

    Raises:
        ArgumentError: the cache lacks one.
    """

    def __init__(self, model: Any, prompt: Prompt, copies: int = 1, needs: tuple[str, ...] = ()) -> None:
        self._model, self._prompt, self._copies = model, prompt, copies
        self._counts = counts_positions(getattr(model, "config", None))
        self._cache = self._new_cache()
        self.length = 0  # positions read, the same in every row
        for name in needs:
            if not hasattr(self._cache, name):
                raise ArgumentError(
                    f"generate: this needs a key/value cache with {name}, {type(self._cache).__name__} of "
                    f"{type(model).__name__} has none"
                )

    def begin(self) -> torch.Tensor:
        """Read source and prompt: (rows * copies, 1, vocab), the scores of what follows."""
        if self._copies > 1 and not hasattr(self._cache, "widen"):
            self._prompt, self._copies = self._prompt.repeated(self._copies), 1
            self._cache = self._new_cache()
        logits = self.read(self._prompt.tokens, every=False)
        if self._copies > 1:
            self._cache.widen(self._copies)
            self._prompt = self._prompt.repeated(self._copies)
        return logits.repeat_interleave(self._copies, 0)

    def read(self, tokens: torch.Tensor, every: bool = True) -> torch.Tensor:
        """Read tokens (rows, n) behind those read: (rows, n, vocab), what follows each, or (rows, 1, vocab), the last.

        Scores are in fp32.
        """
        n = tokens.shape[1]
        if self._prompt.source is not None:
            out = self._model(
                self._prompt.source,
                attention_mask=self._prompt.source_mask,
                decoder_input_ids=tokens,
                cache=self._cache,
                last_logits_only=n == 1 or not every,
            )
        else:
            mask, positions = self._mask_of(n)
            out = self._model(
                tokens,
                attention_mask=mask,
                position_ids=positions,
                cache=self._cache,
                last_logits_only=n == 1 or not every,
            )
        self.length += n
        logits: torch.Tensor = out.logits
        return (logits[:, -n:] if every else logits[:, -1:]).float()

    def crop(self, length: int) -> None:
        """Forget what was read from position ``length`` on."""
        if length < self.length:
            self._cache.crop(length)
            self.length = length

    def reorder(self, rows: torch.Tensor) -> None:
        """Row i goes on from what row ``rows[i]`` has read behind the prompt, which they share."""
        self._cache.reorder(rows, self._prompt.tokens.shape[1])

    def keep(self, rows: torch.Tensor) -> bool:
        """Go on with these rows alone; False if the model's cache cannot."""
        if not hasattr(self._cache, "select"):
            return False
        self._cache.select(rows)
        self._prompt = self._prompt.rows(rows)
        return True

    def encoder_tokens(self) -> torch.Tensor:
        """(rows, source_length): what the encoder reads for each row there is, see Prompt.read_by_encoder."""
        return self._prompt.read_by_encoder()

    def _new_cache(self) -> Any:
        rows, length = self._prompt.tokens.shape
        return self._model.new_cache(rows, length + self._prompt.budget - 1)  # the last new token is never read

    def _mask_of(self, n: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Mask (rows, read + n) and positions (rows, n) of the next n tokens; None where nothing is padded."""
        mask = self._prompt.mask
        if mask is None:
            return None, None
        more = self.length + n - mask.shape[1]
        if more > 0:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], more)], 1)
        # Padding on the left takes no positions: a row means the same in a batch and alone.
        return mask, (mask.cumsum(1) - 1).clamp_min_(0)[:, -n:] if self._counts else None
