"""How many threads a small training runs on: all of torch's, or one, whichever is faster at the moment.

On matrices as small as the demo's, two threads on two idle cores gain 1.4 times over one; on busy cores they wait for
one another and lose 5 times (29.9, 21.4 and 4.1 thousand tokens a second, measured). What is computed does not change:
weights after 60 steps were equal bit for bit with one thread, with two, and with both in turns.
"""

from __future__ import annotations

import statistics
from types import TracebackType

import torch


class Threads:
    """A context in which ``step`` is told the time of every step and sets torch's threads for the next one.

    Both settings are tried at first; then the faster one runs. Its time is known afresh after every few steps, so a
    machine that gets busy is noticed; the other setting is tried again from time to time. Leaving restores the setting.

    Args:
        window: steps from one decision to the next.
        retry: decisions from one trial of the slower setting to the next.

    >>> with Threads(window=2) as threads:
    ...     for seconds in (1.0, 1.0):
    ...         threads.step(seconds)
    """

    def __init__(self, window: int = 5, retry: int = 40) -> None:
        self._window, self._retry = window, retry
        self._before = torch.get_num_threads()
        self._settings = list(dict.fromkeys((1, self._before)))
        self._seconds: dict[int, float] = {}  # median step time of each setting, where it was last seen
        self._current: list[float] = []
        self._decisions = 0

    def __enter__(self) -> Threads:
        torch.set_num_threads(1)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        torch.set_num_threads(self._before)

    def step(self, seconds: float) -> None:
        """Note how long a step took; perhaps decide anew."""
        self._current.append(seconds)
        if len(self._current) < self._window:
            return
        self._seconds[torch.get_num_threads()] = statistics.median(self._current)
        self._current = []
        self._decisions += 1
        torch.set_num_threads(self._choose())

    def _choose(self) -> int:
        untried = [setting for setting in self._settings if setting not in self._seconds]
        if untried:
            return untried[0]
        ranked = sorted(self._settings, key=self._seconds.__getitem__)
        return ranked[-1] if self._decisions % self._retry == 0 else ranked[0]
