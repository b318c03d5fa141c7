"""Every example in a docstring runs, and the code that README.md and the pages on models and building show."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import transfuse
from transfuse import weights

ROOT = Path(__file__).parents[1]
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


@pytest.mark.parametrize("page", ["README.md", "docs/models.md", "docs/building.md"])
def test_the_code_of_a_page_runs(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        if "smollm2" not in block or weights.is_cached("smollm2"):  # a test fetches nothing
            exec(compile(block, page, "exec"), names)


def test_links_between_the_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
