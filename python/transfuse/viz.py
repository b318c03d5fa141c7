"""Pictures of what a transformer does: attention maps with token labels, grids of heads, position encodings.

Every function takes tensors or arrays and returns a matplotlib ``Figure`` drawn without pyplot: no window, no global
state, safe in threads and on servers. :func:`save` writes it as PNG or SVG (by the file's ending) or PDF.

>>> import torch
>>> figure = attention_heatmap(torch.eye(3), ["The", "cat", "sat"], title="layer 1, head 1")
>>> figure.axes[0].get_xlabel()
'key'
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import east_asian_width

import numpy as np
import torch

from transfuse.errors import ArgumentError, MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = torch.Tensor | np.ndarray

_CELL = 0.21  # inches a token takes: 40 labels of 8.5 pt stand clear of one another
_MAX_SIDE = 26.0  # inches; longer sequences get smaller cells and fewer labels
_MAX_GRID_SIDE = 32.0  # inches: 12 heads side by side keep every label of 20 tokens
_MIN_CELL_FOR_LABEL = 0.125  # inches; below this a 6 pt label would touch the next one
_MAX_LABEL = 18  # characters of one token label
_VISIBLE = {
    " ": "\u2423",
    "\n": "\u21b5",
    "\t": "\u21e5",
    "\r": "\u240d",
    "\u0120": "\u2423",
    "\u010a": "\u21b5",
    "\u2581": "\u2423",
}
# What matplotlib's own font lacks (Chinese, Japanese, Korean, Thai, emoji, ...) is drawn with those of these that are
# installed.
_MORE_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans CJK KR", "Source Han Sans", "IPAexGothic", "IPAGothic",
    "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "Hiragino Sans", "PingFang SC", "Yu Gothic",
    "Microsoft YaHei", "Malgun Gothic", "Arial Unicode MS", "Noto Sans Thai", "Noto Sans Devanagari", "Noto Emoji",
)  # fmt: skip
_WEIGHTS_MAP = "Blues"  # one hue, light to dark: attention is a quantity from 0 up
_SIGNED_MAP = "RdBu_r"  # two hues around zero: sines and biases have a sign


def attention_heatmap(
    weights: Array,
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    *,
    title: str | None = None,
    vmax: float | None = None,
) -> Figure:
    """One attention map: rows are queries, columns are keys, a darker cell is a larger weight.

    Args:
        weights: (q_len, k_len) attention probabilities, any float dtype, on any device.
        tokens: q_len labels of the rows, and of the columns if key_tokens is None. White space is made visible.
        key_tokens: k_len labels of the columns (cross-attention).
        title: text above the map.
        vmax: the weight drawn darkest; the largest weight if None.

    Raises:
        ArgumentError: weights is not a matrix, is empty, or the labels do not fit it.
        MissingDependencyError: matplotlib is not installed.

    >>> attention_heatmap(torch.ones(2, 3) / 3, ["a", "b"], ["x", "y", "z"]).get_size_inches().shape
    (2,)
    """
    matrix = _matrix(weights, "attention_heatmap: weights", 2)
    rows, columns = _labels("attention_heatmap", matrix.shape, tokens, key_tokens)
    cell = min(_CELL, _MAX_SIDE / max(matrix.shape))
    height, width = (max(2.4, n * cell) for n in matrix.shape)
    total_width = max(width + 1.3 + _label_inches(rows), _title_inches(title))
    figure = _figure(total_width, height + 1.0 + _label_inches(columns))
    axes = figure.add_subplot()
    image = axes.imshow(
        matrix, cmap=_WEIGHTS_MAP, vmin=0.0, vmax=_top(matrix, vmax), interpolation="nearest", aspect="auto"
    )
    _label_axis(axes, "x", columns, width / matrix.shape[1])
    _label_axis(axes, "y", rows, height / matrix.shape[0])
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    if title:
        axes.set_title(title, parse_math=False, fontfamily=_fonts())
    _colour_bar(figure, image, axes, "attention weight")
    return figure


def head_grid(
    weights: Array,
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    title: str | None = None,
) -> Figure:
    """All heads of one layer, or all layers and heads, as small maps on one colour scale.

    Args:
        weights: (heads, q_len, k_len), or (layers, heads, q_len, k_len): then one row of maps a layer.
        tokens: q_len labels, drawn on the outer maps only.
        key_tokens: k_len labels of the columns (cross-attention).
        columns: maps a row; about a square if None. Not used with four dimensions.
        title: text above the grid.

    Raises:
        ArgumentError: weights has another number of dimensions, is empty, or the labels do not fit it.
        MissingDependencyError: matplotlib is not installed.

    >>> len(head_grid(torch.ones(4, 3, 3) / 3, ["a", "b", "c"]).axes)  # four maps and a colour bar
    5
    """
    stack = _matrix(weights, "head_grid: weights", 3, 4)
    names = [f"head {h + 1}" for h in range(stack.shape[-3])]
    if stack.ndim == 4:
        columns = stack.shape[1]
        names = [f"layer {i + 1}, {name}" for i in range(stack.shape[0]) for name in names]
        stack = stack.reshape(-1, *stack.shape[2:])
    columns = columns or math.ceil(math.sqrt(len(stack)))
    if columns < 1:
        raise ArgumentError(f"head_grid: columns must be at least 1, got {columns}")
    row_labels, column_labels = _labels("head_grid", stack.shape[1:], tokens, key_tokens)
    grid_rows = math.ceil(len(stack) / columns)
    cell = min(0.16, _MAX_GRID_SIDE / max(stack.shape[1] * grid_rows, stack.shape[2] * columns))
    height, width = (max(1.3, n * cell) for n in stack.shape[1:])
    figure = _figure(
        max(columns * (width + 0.25) + 1.2 + _label_inches(row_labels), _title_inches(title)),
        grid_rows * (height + 0.4) + 0.6 + _label_inches(column_labels),
    )
    maps = figure.subplots(grid_rows, columns, squeeze=False).ravel()
    top = _top(stack, None)
    for index, axes in enumerate(maps):
        if index >= len(stack):
            axes.set_visible(False)
            continue
        image = axes.imshow(stack[index], cmap=_WEIGHTS_MAP, vmin=0.0, vmax=top, interpolation="nearest", aspect="auto")
        axes.set_title(names[index], fontsize=9)
        outer_left, outer_bottom = index % columns == 0, index + columns >= len(stack)
        _label_axis(axes, "x", column_labels if outer_bottom else [], width / stack.shape[2], top=False)
        _label_axis(axes, "y", row_labels if outer_left else [], height / stack.shape[1])
    if title:
        figure.suptitle(title, parse_math=False, fontfamily=_fonts(), fontsize=max(12.0, figure.get_figwidth()))
    _colour_bar(figure, image, list(maps[: len(stack)]), "attention weight")
    return figure


def sinusoidal_plot(table: Array, *, title: str = "Sinusoidal positions") -> Figure:
    """A table of position vectors, as a map, with four of its dimensions as curves below.

    Args:
        table: (positions, dim), such as the weight of ``transfuse.nn``'s sinusoidal positions.
        title: text above the picture.

    Raises:
        ArgumentError: table is not a matrix, or empty.
        MissingDependencyError: matplotlib is not installed.

    >>> len(sinusoidal_plot(torch.randn(16, 8)).axes)  # map, curves, colour bar
    3
    """
    values = _matrix(table, "sinusoidal_plot: table", 2)
    figure = _figure(8.0, 6.5)
    heat, curves = figure.subplots(2, 1, height_ratios=[2, 1], sharex=True)
    limit = float(np.abs(values).max()) or 1.0
    image = heat.imshow(values.T, cmap=_SIGNED_MAP, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    heat.set(title=title, ylabel="dimension")
    for dimension in dict.fromkeys(int(f * (values.shape[1] - 1)) for f in (0.0, 0.25, 0.5, 0.75)):
        curves.plot(values[:, dimension], label=f"dimension {dimension}", linewidth=1.4)
    curves.set(xlabel="position", ylabel="value", xlim=(-0.5, len(values) - 0.5))
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    _colour_bar(figure, image, [heat], "value")
    return figure


def rotary_plot(inverse_frequencies: Array, length: int = 256, *, title: str = "Rotary positions") -> Figure:
    """What rotary positions do: the cosine of each pair's angle, and how a score fades with distance.

    The lower curve is the mean over pairs of cos(distance * frequency): the score of a query and a key that are equal
    before rotation, relative to distance 0 (RoFormer, arXiv 2104.09864, section 3.4.3).

    Args:
        inverse_frequencies: (head_dim / 2,) angle per position of each pair, in radians.
        length: positions shown.
        title: text above the picture.

    Raises:
        ArgumentError: inverse_frequencies is not a vector, or empty, or length is below 1.
        MissingDependencyError: matplotlib is not installed.

    >>> len(rotary_plot(10000.0 ** -torch.arange(0, 1, 1 / 32)).axes)  # map, curve, colour bar
    3
    """
    frequencies = _matrix(inverse_frequencies, "rotary_plot: inverse_frequencies", 1)
    if length < 1:
        raise ArgumentError(f"rotary_plot: length must be at least 1, got {length}")
    cosines = np.cos(np.arange(length)[:, None] * frequencies)
    figure = _figure(8.0, 6.5)
    heat, curve = figure.subplots(2, 1, height_ratios=[2, 1], sharex=True)
    image = heat.imshow(cosines.T, cmap=_SIGNED_MAP, vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    heat.set(title=title, ylabel="pair")
    curve.plot(cosines.mean(axis=1), linewidth=1.4)
    curve.axhline(0.0, color="0.75", linewidth=0.8, zorder=0)
    curve.set(xlabel="distance in tokens", ylabel="relative score", xlim=(-0.5, length - 0.5))
    _colour_bar(figure, image, [heat], "cosine")
    return figure


def bias_plot(bias: Array, *, title: str = "Relative position bias") -> Figure:
    """A learned or fixed score bias by distance (T5, ALiBi): one line a head, against key - query.

    Args:
        bias: (heads, q_len, k_len), added to the scores; it should depend on key - query alone, as T5's does. Where
            a distance occurs several times, the mean is drawn.
        title: text above the picture.

    Raises:
        ArgumentError: bias has another number of dimensions, or is empty.
        MissingDependencyError: matplotlib is not installed.

    >>> figure = bias_plot(torch.arange(3.0)[None, None] - torch.zeros(2, 3, 1))
    >>> len(figure.axes[0].lines)  # one a head, and the upright line at distance 0
    3
    """
    values = _matrix(bias, "bias_plot: bias", 3)
    heads, q_len, k_len = values.shape
    distances = np.arange(-(q_len - 1), k_len)
    lines = np.stack([[np.diagonal(head, d).mean() for d in distances] for head in values])
    figure = _figure(8.0, 4.5)
    axes = figure.add_subplot()
    colours = _colours(heads)
    for head in range(heads):
        axes.plot(distances, lines[head], color=colours[head], linewidth=1.4, label=f"head {head + 1}")
    axes.axvline(0.0, color="0.75", linewidth=0.8, zorder=0)
    axes.set(title=title, xlabel="key position − query position", ylabel="bias", xlim=(distances[0], distances[-1]))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, ncols=math.ceil(heads / 20))
    return figure


def save(figure: Figure, path: str | Path, *, dpi: int = 150) -> Path:
    """Write a figure, whole or not at all; the file's ending gives the format.

    Args:
        figure: from a function above.
        path: a file ending in .png, .svg or .pdf; its folder is made if it is missing.
        dpi: pixels per inch of a PNG.

    Raises:
        ArgumentError: another ending, no name of a file, or no figure.
        OSError: the file cannot be written.

    >>> import tempfile
    >>> save(attention_heatmap(torch.eye(2)), tempfile.mkdtemp() + "/map.svg").name
    'map.svg'
    """
    if not hasattr(figure, "savefig"):
        raise ArgumentError(f"save: expected a figure, got {figure!r}; attention_heatmap, head_grid, ... make them")
    if not isinstance(path, (str, os.PathLike)) or "\0" in str(path):
        raise ArgumentError(f"save: expected the name of a file, got {path!r}")
    path = Path(path)
    check_ending(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as scratch:
        new = Path(scratch) / path.name
        figure.savefig(new, dpi=dpi, facecolor="white")
        new.replace(path)
    return path


def check_ending(path: Path) -> None:
    """Asks whether :func:`save` can write such a file.

    Raises:
        ArgumentError: it cannot.
    """
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ArgumentError(f"save: the file must end in .png, .svg or .pdf, got {path.name!r}")


def readable_token(token: str) -> str:
    """A token as a label: white space visible, control characters escaped, long ones shortened.

    Raises:
        ArgumentError: it is no text.

    >>> readable_token("\\u0120the"), readable_token("\\n"), readable_token("")
    ('␣the', '↵', '∅')
    """
    if not isinstance(token, str):
        raise ArgumentError(f"tokens must be texts, got {token!r}; tokenizer.decode([id]) gives an id's")
    shown = "".join(_VISIBLE.get(c, c) for c in token) or "\u2205"
    shown = "".join(c if c.isprintable() and _has_glyph(c) else f"\\u{ord(c):04x}" for c in shown)
    return shown if len(shown) <= _MAX_LABEL else shown[: _MAX_LABEL - 1] + "…"


def _figure(width: float, height: float) -> Figure:
    _require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"pictures need matplotlib ({error}): pip install matplotlib") from error


def _matrix(values: Array, name: str, *dimensions: int) -> np.ndarray:
    """Values as a float64 array with one of the wanted numbers of dimensions, none of them empty."""
    if isinstance(values, torch.Tensor) and (values.is_meta or values.is_complex()):
        raise ArgumentError(f"{name} must hold real numbers, got a {values.dtype} tensor on {values.device}")
    given = values.detach().to("cpu", torch.float64).numpy() if isinstance(values, torch.Tensor) else values
    try:
        array = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name} must hold numbers, got {type(values).__name__} ({error})") from error
    if array.ndim not in dimensions or 0 in array.shape:
        expected = " or ".join(str(d) for d in dimensions)
        raise ArgumentError(f"{name} must have {expected} dimensions, none of them empty, got shape {array.shape}")
    return array


def _labels(
    function: str, shape: Sequence[int], tokens: Sequence[str] | None, key_tokens: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Readable labels of the rows and of the columns; positions where there are no tokens."""
    q_len, k_len = shape
    if key_tokens is None and tokens is not None and q_len == k_len:
        key_tokens = tokens
    found = []
    for name, given, length in (("tokens", tokens, q_len), ("key_tokens", key_tokens, k_len)):
        if given is not None and len(given) != length:
            raise ArgumentError(
                f"{function}: {name} must have {length} labels for weights of shape {(q_len, k_len)}, got {len(given)}"
            )
        found.append([str(i) for i in range(length)] if given is None else [readable_token(t) for t in given])
    return found[0], found[1]


def _label_axis(axes: Axes, which: str, labels: list[str], cell: float, *, top: bool = True) -> None:
    """Put labels beside the cells, at a size that keeps them apart; every n-th where cells are too small."""
    step = max(1, math.ceil(_MIN_CELL_FOR_LABEL / cell))
    size = min(8.5, 72 * cell * step * 0.62)
    axis = axes.xaxis if which == "x" else axes.yaxis
    if which == "x" and top:
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
    rotation = 90 if which == "x" and any(len(label) > 1 for label in labels) else 0
    shown = list(range(0, len(labels), step))
    names = [labels[i] for i in shown]
    axis.set_ticks(shown, names, fontsize=size, fontfamily=_fonts(), rotation=rotation, parse_math=False)
    axis.set_tick_params(length=2 if labels else 0, pad=2)


def _label_inches(labels: list[str]) -> float:
    return 0.085 * max((len(label) + sum(east_asian_width(c) in "WF" for c in label) for label in labels), default=0)


def _title_inches(title: str | None) -> float:
    return 0.11 * max((len(line) for line in (title or "").splitlines()), default=0) + 0.8


def _top(values: np.ndarray, vmax: float | None) -> float:
    """The value drawn darkest; never 0, so that a fully masked map is white and not dark."""
    if vmax is not None:
        return vmax
    finite = values[np.isfinite(values)]
    return float(finite.max(initial=0.0)) or 1.0


def _colour_bar(figure: Figure, image: Any, axes: Any, label: str) -> None:
    tallest = figure.get_size_inches()[1]
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=max(12.0, tallest / 0.2))
    bar.set_label(label)
    bar.outline.set_visible(False)


def _colours(count: int) -> Any:
    """Colours in the order of the heads, without matplotlib's ten-colour cycle repeating."""
    import matplotlib

    return matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, count))


@cache
def _fonts() -> list[str]:
    """The fonts that a label may need: the configured one, then the installed ones of _MORE_FONTS."""
    _require_matplotlib()
    from matplotlib.font_manager import FontProperties, fontManager

    installed = {font.name for font in fontManager.ttflist}
    return [*FontProperties().get_family(), *(name for name in _MORE_FONTS if name in installed)]


@cache
def _has_glyph(character: str) -> bool:
    """Whether one of the fonts can draw it; what they cannot draw would be an empty box and a warning."""
    _require_matplotlib()
    from matplotlib.font_manager import FontProperties, findfont, get_font

    files = (findfont(FontProperties(family=[name])) for name in _fonts())
    return any(get_font(file).get_char_index(ord(character)) != 0 for file in files)
