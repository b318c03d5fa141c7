"""Pictures: every label inside the figure and clear of its neighbours, files of a sane size, clear errors."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from transfuse import viz
from transfuse.errors import ArgumentError, MissingDependencyError

WORDS = "[CLS] the quick brown fox jumps over the lazy dog and un ##believ ##ably runs away from it . [SEP]"
SENTENCE = WORDS.split()


def causal_weights(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(*shape, generator=generator)
    return scores.masked_fill(torch.ones(shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1)


def texts(figure) -> list[Text]:
    figure.canvas.draw()
    hidden = set()
    for axes in figure.axes:
        if not axes.get_visible():
            hidden |= set(axes.findobj(Text))
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low <= tick.get_loc() <= high:  # matplotlib keeps such ticks and does not draw them
                    hidden |= {tick.label1, tick.label2}
    return [t for t in figure.findobj(Text) if t not in hidden and t.get_visible() and t.get_text().strip()]


def assert_no_clipped_text(figure) -> None:
    width, height = figure.bbox.width, figure.bbox.height
    for text in texts(figure):
        box = text.get_window_extent()
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        assert inside, f"{text.get_text()!r} at {box} leaves the figure of {width} x {height}"


def assert_no_overlapping_labels(axes) -> None:
    for axis, low, high in ((axes.xaxis, "x0", "x1"), (axes.yaxis, "y0", "y1")):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
        boxes.sort(key=lambda box: getattr(box, low))
        for left, right in itertools.pairwise(boxes):
            assert getattr(left, high) <= getattr(right, low) + 0.5, f"labels touch: {left} {right}"


@pytest.mark.parametrize("length", [1, 2, 12, 40, 90, 300], ids=lambda n: f"L{n}")
@pytest.mark.parametrize("kind", ["characters", "words"])
def test_heatmap_labels_are_legible(length, kind):
    letters = "DUKE SENIOR.\nStay, $Jaques$, stay.\nPROSPERO.\n"
    source = list(letters) if kind == "characters" else SENTENCE
    tokens = [source[i % len(source)] for i in range(length)]
    figure = viz.attention_heatmap(causal_weights(length, length), tokens, title="layer 1, head 1: $what$ it looks at")
    assert_no_clipped_text(figure)
    assert_no_overlapping_labels(figure.axes[0])
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    if length <= 90:
        assert shown == [viz.readable_token(token) for token in tokens]


def test_heatmap_draws_the_given_weights():
    weights = causal_weights(5, 5)
    image = viz.attention_heatmap(weights).axes[0].images[0]
    np.testing.assert_array_equal(image.get_array(), weights.double().numpy())
    assert image.get_clim() == (0.0, pytest.approx(float(weights.max())))


def test_cross_attention_labels_rows_and_columns():
    figure = viz.attention_heatmap(torch.full((2, 4), 0.25), ["ein", "Hund"], ["a", "small", "brown", "dog"])
    assert_no_clipped_text(figure)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["ein", "Hund"]
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["a", "small", "brown", "dog"]


@pytest.mark.parametrize("shape", [(1, 5, 5), (6, 20, 20), (5, 40, 40), (2, 3, 12, 12), (4, 12, 20, 20)], ids=str)
def test_head_grid_is_legible(shape):
    tokens = [SENTENCE[i % len(SENTENCE)] for i in range(shape[-1])]
    figure = viz.head_grid(causal_weights(*shape), tokens, title="every head")
    assert_no_clipped_text(figure)
    maps = [axes for axes in figure.axes if axes.images]
    assert len(maps) == int(np.prod(shape[:-2]))
    for axes in maps:
        assert_no_overlapping_labels(axes)
    assert len({axes.images[0].get_clim() for axes in maps}) == 1, "one colour scale for all heads"


def test_position_pictures_are_legible():
    frequencies = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    angles = torch.arange(128.0)[:, None] * frequencies
    distance = (torch.arange(40.0)[None] - torch.arange(40.0)[:, None]).abs()
    figures = [
        viz.sinusoidal_plot(torch.cat([angles.sin(), angles.cos()], dim=1)),
        viz.rotary_plot(frequencies),
        viz.bias_plot(-distance * torch.tensor([0.5**h for h in range(32)])[:, None, None]),
    ]
    for figure in figures:
        assert_no_clipped_text(figure)


def test_bias_plot_reads_the_bias_along_the_diagonals():
    bias = (torch.arange(5.0)[None] - torch.arange(3.0)[:, None])[None] * 0.5
    line = viz.bias_plot(bias).axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), 0.5 * np.arange(-2, 5))


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_save_writes_the_format_of_the_ending(tmp_path, ending):
    figure = viz.attention_heatmap(causal_weights(20, 20), SENTENCE)
    path = viz.save(figure, tmp_path / "new" / f"map{ending}")
    head = path.read_bytes()[:300]
    assert {".png": b"\x89PNG", ".svg": b"<svg", ".pdf": b"%PDF"}[ending] in head
    assert 4_000 < path.stat().st_size < 2_000_000


def test_save_refuses_other_endings(tmp_path):
    with pytest.raises(ArgumentError, match=r"must end in \.png, \.svg or \.pdf, got 'map\.docx'"):
        viz.save(viz.attention_heatmap(torch.eye(2)), tmp_path / "map.docx")


@pytest.mark.parametrize("path", [None, 3, "a\0.png"], ids=repr)
def test_save_refuses_what_names_no_file(path):
    with pytest.raises(ArgumentError, match="save: expected the name of a file, got "):
        viz.save(viz.attention_heatmap(torch.eye(2)), path)


def test_save_writes_a_whole_file_or_none(tmp_path):
    class Torn:
        def savefig(self, path, **options):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    old = viz.save(viz.attention_heatmap(torch.eye(2)), tmp_path / "map.svg").read_bytes()
    for name in ("map.svg", "new.png"):
        with pytest.raises(OSError, match="No space left"):
            viz.save(Torn(), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["map.svg"]
    assert (tmp_path / "map.svg").read_bytes() == old


@pytest.mark.parametrize("figure", [None, "map", torch.eye(2)], ids=["None", "text", "tensor"])
def test_save_refuses_what_is_no_figure(tmp_path, figure):
    with pytest.raises(ArgumentError, match="save: expected a figure, got "):
        viz.save(figure, tmp_path / "map.png")
    assert not list(tmp_path.iterdir())


def test_characters_without_a_glyph_are_escaped_and_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = viz.attention_heatmap(torch.eye(4), ["漢字", "\x00", "▁the", "a" * 50])
        figure.canvas.draw()
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown[1:3] == ["\\u0000", "␣the"]
    assert len(shown[3]) == 18
    assert shown[3].endswith("…")


def test_glyphs_of_further_fonts_are_used(monkeypatch):
    """STIX, which comes with matplotlib, has letters that its default font lacks."""
    letter = "\u2a0a"  # a sum over an integral
    caches = (viz._fonts, viz._has_glyph)
    for fonts, shown in (((), "\\u2a0a"), (("STIXGeneral",), letter)):
        monkeypatch.setattr(viz, "_MORE_FONTS", fonts)
        for cached in caches:
            cached.cache_clear()
        assert viz.readable_token(letter) == shown
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            viz.attention_heatmap(torch.eye(2), [letter, "a"], title="one").canvas.draw()
    for cached in caches:
        cached.cache_clear()


def test_a_long_title_widens_a_small_map():
    title = "layer 12, head 12: what the last of all the words looks back at, and how far"
    assert_no_clipped_text(viz.attention_heatmap(torch.eye(2), title=title))
    assert_no_clipped_text(viz.head_grid(torch.eye(2)[None], title=title))


def test_masked_rows_and_nan_are_drawn():
    assert_no_clipped_text(viz.attention_heatmap(torch.zeros(3, 3)))
    weights = torch.eye(3)
    weights[1] = torch.nan
    assert viz.attention_heatmap(weights).axes[0].images[0].get_clim() == (0.0, 1.0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: viz.attention_heatmap(torch.ones(2, 3, 4)), r"must have 2 dimensions.*got shape \(2, 3, 4\)"),
        (lambda: viz.attention_heatmap(torch.ones(0, 3)), r"none of them empty, got shape \(0, 3\)"),
        (lambda: viz.attention_heatmap(torch.eye(3), ["a"]), r"tokens must have 3 labels .* got 1"),
        (lambda: viz.attention_heatmap(torch.ones(2, 3), ["a", "b"], ["c"]), r"key_tokens must have 3 labels .* got 1"),
        (lambda: viz.head_grid(torch.eye(3)), r"must have 3 or 4 dimensions"),
        (lambda: viz.head_grid(torch.ones(2, 3, 3), columns=-1), r"columns must be at least 1, got -1"),
        (lambda: viz.rotary_plot(torch.ones(4), length=0), r"length must be at least 1, got 0"),
        (lambda: viz.sinusoidal_plot(torch.ones(4)), r"must have 2 dimensions"),
        (lambda: viz.bias_plot(torch.ones(4, 4)), r"must have 3 dimensions"),
        (lambda: viz.attention_heatmap("map"), "weights must hold numbers, got str"),
        (lambda: viz.attention_heatmap(torch.eye(3, device="meta")), "must hold real numbers, got .* on meta"),
        (lambda: viz.attention_heatmap(torch.eye(2), [1, 2]), "tokens must be texts, got 1"),
    ],
    ids=[
        "heatmap-3d",
        "heatmap-empty",
        "tokens",
        "key-tokens",
        "grid-2d",
        "columns",
        "rotary",
        "sinusoid",
        "bias",
        "text",
        "meta",
        "ids",
    ],
)
def test_wrong_input_says_what_was_expected(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


def test_missing_matplotlib_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match="pip install matplotlib"):
        viz.attention_heatmap(torch.eye(2))


def test_importing_viz_imports_no_matplotlib():
    code = "import sys, transfuse.viz; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pyplot_stays_out():
    code = (
        "import sys, torch, transfuse.viz as viz; viz.attention_heatmap(torch.eye(2));"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
