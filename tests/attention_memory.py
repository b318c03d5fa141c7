"""How many bytes a computation holds at its height, counted on meta tensors: shapes, no data, nothing launched."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """Counts the bytes of the storages that were made inside and are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.height = self.largest = 0
        self._tensors: dict[int, int] = {}  # of each storage, how many tensors are known to hold it

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(found):
            if isinstance(t, torch.Tensor):
                self._hold(t, t.untyped_storage()._cdata in given)
        return found

    def _hold(self, t: torch.Tensor, is_given: bool) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._tensors:
            if is_given:
                return  # a view of what was there before
            self._tensors[key] = 0
            self.now += size
            self.height, self.largest = max(self.height, self.now), max(self.largest, size)
        self._tensors[key] += 1
        weakref.finalize(t, self._let_go, key, size)

    def _let_go(self, key: int, size: int) -> None:
        self._tensors[key] -= 1
        if self._tensors[key] == 0:
            del self._tensors[key]
            self.now -= size


@contextmanager
def nothing_launched(patch: Callable[..., None]) -> Iterator[None]:
    """Inside, Triton's host code runs on meta tensors and its launches do nothing; ``patch`` is monkeypatch.setattr."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from transfuse.ops import _triton

    for kind in (InterpretedFunction, JITFunction):
        patch(kind, "run", lambda self, *args, **kwargs: None)
    with _triton.compiling():
        yield
