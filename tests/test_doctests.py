"""Every example in a docstring runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import transfuse

MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(transfuse.__path__, "transfuse.")
    if m.name.rsplit(".")[-1] not in ("_C", "__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples fail (see the captured output)"


def test_the_public_names_have_examples():
    finder = doctest.DocTestFinder(exclude_empty=False)
    public = [getattr(transfuse, n) for n in transfuse.__all__ if callable(getattr(transfuse, n))]
    public = [o for o in public if not (isinstance(o, type) and issubclass(o, Exception))]
    without = [o.__name__ for o in public if not any(t.examples for t in finder.find(o, o.__name__))]
    assert not without, f"no example in the docstring of {without}"
