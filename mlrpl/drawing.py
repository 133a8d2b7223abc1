"""How figures are drawn: one style for all, saving, and the parts that several kinds of figures share.

Colours that colour-blind readers tell apart, the same colour for a method in every figure, sizes for the full width of
a two-column page. Figures are matplotlib ``Figure`` objects made without pyplot's global state, so that they can be
drawn anywhere, in any number; :func:`save` writes them.
"""

import io
import re
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from math import ceil
from pathlib import Path
from textwrap import fill
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import AbstractPathEffect, Normal, Stroke
from matplotlib.textpath import TextPath
from PIL import Image

from mlrpl.files import atomic

WIDTH = 7.2  # inches, both columns
HEIGHT = 9.4  # inches, a page
TITLE = 0.3  # inches, above a row of image panels
HINTED = 1.1  # small letters on a screen are wider than their outlines
LETTERS = (7.5, 6.5, 5.5)  # points, of labels that must fit
SCREEN = 130  # pixels an inch where a notebook or a page shows a figure
DPI = 200  # of saved PNGs
STYLE = {
    "text.parse_math": False,  # titles and case names are text, also with a $ in them
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "axes.labelsize": 7.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "savefig.dpi": DPI,
    "savefig.facecolor": "white",
    "svg.hashsalt": "mlrpl",
    "svg.fonttype": "path",
}
# Okabe and Ito's colours, and three of Tol's "muted" ones, as there are ten methods; yellow is too faint for lines.
METHOD_COLOURS = {
    "V-Net": "#000000",
    "Control (β = 0)": "#808080",
    "MLRPL": "#D55E00",
    "UA-MT": "#56B4E9",
    "URPC": "#009E73",
    "CCT": "#999933",
    "MC-Net": "#0072B2",
    "MC-Net+": "#882255",
    "SS-Net": "#CC79A7",
    "AC-MT": "#E69F00",
}
# For variants beside all methods.
SPARE_COLOURS = [
    "#332288", "#661100", "#44AA99", "#B8860B", "#AA4466", "#6A7B8C", "#117733",
    "#C837BE", "#3DB83D", "#3B4CFF", "#E8294F", "#B07CF0", "#E3997C", "#4A4A10", "#8FD0E0",
]  # fmt: skip
CLASS_COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#F0E442"]
STEPS = [1, 2, 4, 5, 10]  # between ticks
COLOURS = 256  # of a PNG
LEGEND_LINES = 3  # that a figure has room for
LEGEND_LINE = 0.157  # inches

P = ParamSpec("P")


class NotebookFigure(Figure):
    """A figure that a notebook shows without pyplot, sharp and in its own size."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return _png(self), {"width": round(SCREEN * self.get_figwidth())}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in the common style, whatever the notebook's own settings are."""

    @wraps(draw)
    def draw_in_style(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context():
            mpl.rcdefaults()
            mpl.rcParams.update(STYLE)
            return draw(*args, **kwargs)

    return draw_in_style


def save(figure: Figure | None, folder: Path | str, name: str) -> None:
    """Write ``<folder>/<name>.svg`` and ``.png``, or remove them where there is nothing to show.

    The same figure gives the same bytes.
    """
    folder = Path(folder)
    if figure is None:
        for kind in ("svg", "png"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
        return
    with mpl.rc_context(STYLE):
        _settle(figure)
        for kind, content in {"svg": _svg(figure), "png": _png(figure)}.items():
            with atomic(folder / f"{name}.{kind}") as partial:
                partial.write_bytes(content)


def _svg(figure: Figure) -> bytes:
    """A figure as SVG, coordinates to a hundredth of a point: the other digits, half of a file, cannot be seen."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})

    def rounded(attribute: re.Match[str]) -> str:
        return re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", " ".join(attribute[0].split()))

    return re.sub(r'(?<= )(d|x|y|width|height)="[^"]*"', rounded, buffer.getvalue()).encode()


def _png(figure: Figure) -> bytes:
    """A figure as PNG of 256 colours: less than half of the bytes, without a visible difference.

    The colours are chosen to cover all that the figure has, however rare, so that colour bars stay smooth.
    """
    buffer, small = io.BytesIO(), io.BytesIO()
    with mpl.rc_context(STYLE):  # where ticks go depends on the letters' size
        figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    picture = Image.open(buffer).convert("RGB")
    few = picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    few.save(small, "png", optimize=True)
    return small.getvalue()


def _settle(figure: Figure) -> None:
    """Lay a figure out for good, on round positions: the layout's solver varies in the last digits by chance."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        axes.set_position(np.round(axes.get_position(original=True).bounds, 4))


def colours(titles: Iterable[str]) -> dict[str, str]:
    """Colour of each title: a method's own; variants take spare ones, then those of methods not among the titles."""
    titles = list(dict.fromkeys(titles))
    taken = {METHOD_COLOURS[title] for title in titles if title in METHOD_COLOURS}
    free = SPARE_COLOURS + [colour for colour in METHOD_COLOURS.values() if colour not in taken]
    variants = [title for title in titles if title not in METHOD_COLOURS]
    return METHOD_COLOURS | {title: free[i % len(free)] for i, title in enumerate(variants)}


def class_colour(index: int) -> str:
    """Colour of a class by its index, from 1; 0 is background."""
    return CLASS_COLOURS[(index - 1) % len(CLASS_COLOURS)]


def class_handles(classes: Sequence[str]) -> list[Line2D]:
    """Of a legend: a line a class but the background."""
    return [Line2D([], [], color=class_colour(index), label=name) for index, name in enumerate(classes) if index]


def dots_and_box(ax: Axes, values: np.ndarray, place: float, colour: str, jitter: float = 0.0) -> None:
    """Values as dots on one line, their quartiles just above it, and how many are NaN at the right."""
    defined = values[~np.isnan(values)]
    heights = place + jitter * np.random.default_rng(0).uniform(-1, 1, len(defined))
    ax.plot(
        defined, heights, "o", markersize=3.5, color=colour, markeredgecolor="white", markeredgewidth=0.3, alpha=0.85
    )
    if len(defined):
        low, median, high = np.percentile(defined, (25, 50, 75))
        above = place - 0.27 - jitter
        ax.plot([low, high], [above, above], color=colour, linewidth=3.5, alpha=0.4, solid_capstyle="butt")
        ax.plot(median, above, marker="|", markersize=7, markeredgewidth=1.6, color=colour)
    if missing := len(values) - len(defined):
        beside = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 6.5, "color": "0.35"}
        ax.annotate(f"{missing} undefined", (1.02, place), annotation_clip=False, **beside)


def dots_and_box_handles() -> list[Line2D]:
    """Of a legend: what :func:`dots_and_box` draws."""
    grey = {"color": "0.3", "linestyle": ""}
    return [
        Line2D([], [], marker="o", markersize=3.5, label="case", **grey),
        Line2D([], [], color="0.3", linewidth=3.5, alpha=0.4, label="middle half of the cases"),
        Line2D([], [], marker="|", markersize=7, markeredgewidth=1.6, label="median", **grey),
    ]


def panel_width(ratios: Sequence[float], columns: int, named: int = 1) -> float:
    """Inches; ``ratios``: height by width in each row; ``named``: of the rows, those with titles above them."""
    return min((WIDTH - 0.3) / columns, 2.4, (HEIGHT - 0.6 - TITLE * named) / sum(ratios))


def image_grid(ratios: Sequence[float], columns: int, named: int = 1) -> tuple[Figure, np.ndarray, float]:
    """A figure of image panels, its axes and their :func:`panel_width`."""
    width = panel_width(ratios, columns, named)
    size = (0.3 + width * columns, 0.6 + TITLE * named + width * sum(ratios))
    figure = NotebookFigure(figsize=size, layout="compressed")
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
    return figure, figure.subplots(len(ratios), columns, squeeze=False, height_ratios=ratios), width


def show_slice(
    ax: Axes,
    plane: np.ndarray,
    spacing: Sequence[float],
    limits: Sequence[float],
    centre: Sequence[float],
    window: Sequence[float],
) -> None:
    """A window, in mm, of a slice in grey: its first axis to the right, its second downwards."""
    extent = (0, plane.shape[0] * spacing[0], plane.shape[1] * spacing[1], 0)
    ax.imshow(plane.T, cmap="gray", vmin=limits[0], vmax=limits[1], extent=extent, interpolation="nearest")
    left, top = np.subtract(centre, np.divide(window, 2))
    ax.set(xlim=(left, left + window[0]), ylim=(top + window[1], top), xticks=[], yticks=[], facecolor="black")
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def draw_outline(
    ax: Axes, mask: np.ndarray, spacing: Sequence[float], colour: str, width: float, halo: bool = False
) -> None:
    """Contour of a mask of a slice, in mm, ``width`` in points; a halo sets it off from a bright image."""
    if not mask.any():
        return
    padded = np.pad(mask, 1).astype(float)  # closes contours at the image's border
    x, y = ((np.arange(-1, n + 1) + 0.5) * step for n, step in zip(mask.shape, spacing[:2], strict=True))
    lines = ax.contour(x, y, padded.T, levels=[0.5], colors=[colour], linewidths=width)
    if halo:
        lines.set_path_effects(dark_edge(width))


def dark_edge(width: float) -> list[AbstractPathEffect]:
    """Sets a line or text of a width in points off from a bright image."""
    return [Stroke(linewidth=width + 0.8, foreground="black"), Normal()]


def fitted(texts: Sequence[str], room: float) -> tuple[list[str], float]:
    """Labels no longer than there is room, in inches, all in the same letters, in points.

    Those that are too long are broken, first after commas and before brackets.
    """
    for size in LETTERS:
        most = max(1, int(0.93 * room / _length("x", size)))
        broken = [text if len(text) <= most else _broken(text, most) for text in texts]
        if all(text.count("\n") < 3 for text in broken) and max(_length(text, size) for text in broken) <= room:
            return broken, size
    return broken, size * min(1, 0.93 * room / max(_length(text, size) for text in broken))


def _broken(text: str, most: int) -> str:
    parts = re.split(r"(?<=,) | (?=\()|\n", text)
    return "\n".join(fill(part, most, break_long_words=False, break_on_hyphens=False) for part in parts)


def write_fitted(writes: Iterable[Callable[..., Any]], texts: Sequence[str], room: float) -> None:
    """Write labels as :func:`fitted` has them, each with its own of ``writes``."""
    labels, size = fitted(texts, room)
    for write, label in zip(writes, labels, strict=True):
        write(label, fontsize=size, fontweight="normal")


def _length(text: str, size: float) -> float:
    """Length of the longest line of a text in inches, at most; ``size`` in points."""
    lines = [line for line in text.split("\n") if line.strip()]
    outlines = (TextPath((0, 0), line, size).get_extents().width for line in lines)
    return HINTED * max(outlines, default=0.0) / 72


def add_legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """One legend below the figure, in as many columns as fit its width; for a long one the figure grows."""
    lengths = [0.65 + _length(handle.get_label(), 7.5) for handle in handles]
    for lines in range(1, len(handles) + 1):
        columns = np.array_split(lengths, ceil(len(handles) / lines))  # as Matplotlib deals them out
        if sum(column.max() for column in columns) < figure.get_figwidth():
            break
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * max(lines - LEGEND_LINES, 0))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(columns))
