"""Figures, drawn from the tables of a study and the cases of a store.

One style for all: colours that colour-blind readers tell apart, the same colour for a method in every figure, sizes for
the full width of a two-column page. Figures are matplotlib ``Figure`` objects made without pyplot's global state, so
that they can be drawn anywhere, in any number; :func:`save` writes them.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from itertools import product
from math import ceil
from pathlib import Path
from textwrap import fill
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import AbstractPathEffect, Normal, Stroke
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy.ndimage import gaussian_filter1d

from mlrpl.data.store import Case, Store
from mlrpl.files import atomic
from mlrpl.tables import chosen, comparison, per_case, titled

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
SPARE_COLOURS = ["#332288", "#661100", "#44AA99", "#B8860B", "#AA4466", "#6A7B8C", "#117733"]
CLASS_COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#F0E442"]
SPLIT_COLOURS = {"train": "#0072B2", "val": "#009E73", "test": "#D55E00"}
STEPS = [1, 2, 4, 5, 10]  # between ticks
MOST_COLUMNS = 6  # of methods in a row of contours
COLOURS = 256  # of a PNG
POINTS = 150  # drawn per curve: more cannot be seen, and files would grow large
CURVES = {  # of a run's log: title and scale
    "supervised": ("Supervised loss", 1),
    "mutual": ("Mutual loss", 1),
    "pseudo_foreground": ("Foreground of\npseudo-labels (%)", 100),
    "dice": ("Dice of training\nbatch (%)", 100),
}

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


@dataclass(frozen=True)
class Series:
    """One method at one number of labelled cases, as a figure draws it."""

    title: str
    labelled: int
    name: str
    colour: str
    line: str
    runs: list[str]


def colours(titles: Iterable[str]) -> dict[str, str]:
    """Colour of each title: a method's own; variants take those that no method among the titles uses, then others."""
    titles = list(dict.fromkeys(titles))
    taken = {METHOD_COLOURS[title] for title in titles if title in METHOD_COLOURS}
    free = [colour for colour in METHOD_COLOURS.values() if colour not in taken] + SPARE_COLOURS
    variants = [title for title in titles if title not in METHOD_COLOURS]
    return METHOD_COLOURS | {title: free[i % len(free)] for i, title in enumerate(variants)}


def panels(runs: pd.DataFrame) -> list[tuple[int, list[Series]]]:
    """Series of each number of labelled cases at which titles are compared.

    A title alone at its number, such as V-Net with all labels, is a reference: dashed, in every panel.
    """
    colour = colours(runs["title"])
    groups: dict[int, list[Series]] = {}
    for (labelled, title), same in runs.groupby(["labelled", "title"], sort=False):
        groups.setdefault(labelled, []).append(Series(title, labelled, title, colour[title], "-", same["run"].tolist()))
    compared = {labelled: group for labelled, group in sorted(groups.items()) if len(group) > 1}
    if not compared:
        return sorted(groups.items())
    references = [
        Series(
            alone.title, alone.labelled, f"{alone.title}, {labelled} labelled", alone.colour, (0, (4, 1.5)), alone.runs
        )
        for labelled, (alone, *others) in sorted(groups.items())
        if not others
    ]
    return [(labelled, group + references) for labelled, group in compared.items()]


def smoothed(curve: pd.Series) -> pd.Series:
    """Running mean over a fortieth of the curve, thinned out to what can be seen."""
    smooth = curve.rolling(max(1, len(curve) // 40), min_periods=1, center=True).mean()
    kept = np.unique(np.linspace(0, len(curve) - 1, POINTS).round().astype(int))
    return smooth.iloc[kept]


@styled
def learning_curves(curves: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """Losses, pseudo-labelled foreground and batch Dice over iterations; a row a number of labelled cases.

    Running means over a fortieth of the run; several seeds are thin, their mean bold. What no run has is left out.
    """
    quantities = {name: curve for name, curve in CURVES.items() if curves[name].notna().any()}
    rows = panels(runs)
    figure = NotebookFigure(figsize=(WIDTH, 0.8 + 1.5 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(quantities), squeeze=False, sharex=True, sharey="col")
    by_run = {run: curve.set_index("iteration").sort_index() for run, curve in curves.groupby("run")}
    for axes, (labelled, group) in zip(grid, rows, strict=True):
        for ax, (name, (title, scale)) in zip(axes, quantities.items(), strict=True):
            for series in group:
                seeds = [smoothed(by_run[run][name]) * scale for run in series.runs if run in by_run]
                _seeds_and_mean(ax, [seed for seed in seeds if seed.notna().any()], series)
            if ax in grid[0]:
                ax.set_title(title)
            if ax in grid[-1]:
                ax.set_xlabel("iteration")
            ax.xaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
            ax.set_ylim(bottom=0)
        axes[0].set_ylabel(f"{labelled} labelled", fontweight="bold")
    add_legend(figure, _line_handles(_once(rows)))
    return figure


@styled
def checks(checks: pd.DataFrame, metrics: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """Test Dice of decoder 1 at each check, the best one that *published* selects, and where *last* ends."""
    rows = panels(runs)
    figure = NotebookFigure(figsize=(WIDTH if len(rows) > 1 else 0.6 * WIDTH, 3.0), layout="constrained")
    axes = figure.subplots(1, len(rows), squeeze=False, sharey=True)[0]
    last = chosen(titled(metrics, runs), "last", "decoder1").groupby("run")["dice"].mean() * 100
    end = runs.set_index("run")["iterations"]
    by_run = {run: curve.set_index("iteration")["dice"].sort_index() * 100 for run, curve in checks.groupby("run")}
    for ax, (labelled, group) in zip(axes, rows, strict=True):
        for series in group:
            seeds = {run: by_run[run] for run in series.runs if run in by_run}
            _seeds_and_mean(ax, list(seeds.values()), series)
            mark = {"linestyle": "", "color": series.colour, "markeredgecolor": "white", "markeredgewidth": 0.5}
            if series.line != "-":
                mark |= {"markerfacecolor": "white", "markeredgecolor": series.colour, "markeredgewidth": 0.8}
            for run, curve in seeds.items():
                ax.plot(curve.idxmax(), curve.max(), marker="*", markersize=8, zorder=5, **mark)
                if run in last:
                    ax.plot(end[run], last[run], marker="o", markersize=4, zorder=4, clip_on=False, **mark)
        ax.set_title(f"{labelled} labelled")
        ax.set_xlabel("iteration")
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    axes[0].set_ylabel("Dice of test cases (%)")
    marks = [
        Line2D([], [], linestyle="", marker="*", markersize=8, color="0.3", label="best check (published)"),
        Line2D([], [], linestyle="", marker="o", markersize=4, color="0.3", label="final weights (last)"),
    ]
    add_legend(figure, _line_handles(_once(rows)) + marks)
    return figure


@styled
def distributions(
    metrics: pd.DataFrame,
    runs: pd.DataFrame,
    selection: str = "last",
    output: str = "decoder1",
    unit: str = "voxels",
) -> Figure:
    """Dice and 95HD of every test case, averaged over seeds and classes; lines join the same case across methods."""
    rows = panels(runs)
    measures = {"dice": "Dice (%)", "hd95": f"95HD ({unit})"}
    heights = [len(group) for _, group in rows]
    figure = NotebookFigure(figsize=(WIDTH, 0.75 + 0.25 * len(rows) + 0.3 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(rows), 2, squeeze=False, sharex="col", sharey="row", height_ratios=heights)
    for column, (measure, name) in enumerate(measures.items()):
        values = per_case(metrics, runs, measure, selection, output).set_index(["labelled", "case"])
        for ax, (labelled, group) in zip(grid[:, column], rows, strict=True):
            cases = pd.concat([values[series.title].loc[series.labelled] for series in group], axis=1).to_numpy()
            ax.plot(cases.T, np.arange(len(group)), color="0.8", linewidth=0.5, zorder=1)
            for place, (series, dots) in enumerate(zip(group, cases.T, strict=True)):
                _dots_and_box(ax, dots, place, series.colour)
            ax.set_yticks(range(len(group)), [series.name for series in group])
            ax.set_ylim(len(group) - 0.5, -0.55)
            ax.tick_params(axis="y", length=0)
            ax.grid(False, axis="y")
            if ax in grid[-1]:
                ax.set_xlabel(name)
            if column == 0:
                ax.set_title(f"{labelled} labelled", loc="left")
        grid[0, column].xaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
    grid[0, 1].set_xlim(left=0)
    add_legend(figure, [*_dots_and_box_handles(), Line2D([], [], color="0.8", linewidth=0.8, label="the same case")])
    return figure


@styled
def label_efficiency(metrics: pd.DataFrame, runs: pd.DataFrame) -> Figure | None:
    """Dice of final weights, decoder 1, over the number of labelled cases: a line a method, its mean over cases.

    Bars: standard deviation over seeds, where there are several. A method alone at its number is a dashed level; one
    that was trained at a single number among others has no line, and is left out. None where no method has a line.
    """
    rows = panels(runs)
    levels = [labelled for labelled, _ in rows]
    drawn = Counter(one.name for _, group in rows for one in group)
    series = [one for one in _once(rows) if one.line != "-" or drawn[one.name] > 1]
    solid = [one for one in series if one.line == "-"]
    if not solid:
        return None
    table = comparison(metrics, runs).query("selection == 'last' and output == 'decoder1'")
    table = table.set_index(["title", "labelled"])
    figure = NotebookFigure(figsize=(0.75 * WIDTH, 2.8), layout="constrained")
    ax = figure.subplots()
    dodge = np.linspace(-0.2, 0.2, len(solid)) if len(solid) > 1 else [0.0]
    for one, shift in zip(solid, dodge, strict=True):
        mine = table.loc[one.title].reindex(levels).dropna(subset="dice")
        places = [levels.index(labelled) + shift for labelled in mine.index]
        style = {"color": one.colour, "markersize": 4, "linewidth": 1, "elinewidth": 0.7}
        ax.errorbar(places, mine["dice"], mine["dice_sd"].fillna(0), marker="o", **style)
    for one in series:
        if one.line != "-":
            ax.axhline(table.loc[(one.title, one.labelled), "dice"], color=one.colour, linestyle=one.line, linewidth=1)
    ax.set_xticks(range(len(levels)), levels)
    ax.set(xlim=(-0.5, len(levels) - 0.5), xlabel="labelled cases", ylabel="Dice of test cases (%)")
    ax.grid(False, axis="x")
    figure.legend(handles=_line_handles(series), loc="outside right center")
    return figure


@dataclass(frozen=True)
class CaseView:
    """A test case and what methods predict for it: a row of :func:`contours`.

    ``image`` (x, y, z); ``reference`` and, by title, ``predictions``, class indices (x, y, z); ``spacing`` in mm,
    or ones; ``dice`` by title, as a fraction; ``name`` is printed beside the row.
    """

    name: str
    image: np.ndarray
    reference: np.ndarray
    predictions: Mapping[str, np.ndarray]
    dice: Mapping[str, float] = field(default_factory=dict)
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)


@styled
def contours(views: Sequence[CaseView], classes: Sequence[str]) -> Figure:
    """Contours of reference and prediction on the x-y slice with the largest reference area.

    A row a case, or several where there are many methods, a column a method; the window is the same for all cases, in
    mm, and holds all that is drawn.

    Args:
        views: The cases, all with predictions of the same titles.
        classes: Names of the classes, background first.
    """
    titles = list(views[0].predictions)
    slices = [int((view.reference > 0).sum(axis=(0, 1)).argmax()) for view in views]
    boxes = [_box_around(view, z) for view, z in zip(views, slices, strict=True)]
    sizes = [np.multiply(view.image.shape[:2], view.spacing[:2]) for view in views]
    window = np.minimum(np.max([high - low for low, high in boxes], axis=0), np.max(sizes, axis=0))
    ratio = window[1] / window[0]
    lines = 1
    if len(titles) > MOST_COLUMNS:  # as many as make the panels largest
        lines = max((2, 3), key=lambda n: panel_width([ratio] * len(views) * n, ceil(len(titles) / n), len(views) * n))
    named = len(views) * lines if lines > 1 else 1
    figure, grid, panel = image_grid([ratio] * len(views) * lines, ceil(len(titles) / lines), named)
    weight = min(1, 0.3 + panel / 2)  # of lines and letters in small panels
    blocks = grid.reshape(len(views), -1)
    for row, (axes, view, z, (low, high), size) in enumerate(zip(blocks, views, slices, boxes, sizes, strict=True)):
        half = np.minimum(window, size) / 2
        centre = np.clip((low + high) / 2, half, size - half)
        limits = np.percentile(view.image, (1, 99.5))
        for ax, title in zip(axes, titles, strict=False):
            show_slice(ax, view.image[:, :, z], view.spacing[:2], limits, centre, window)
            for index in range(1, len(classes)):
                draw_outline(ax, view.reference[:, :, z] == index, view.spacing, "white", 1.5 * weight, halo=True)
            for index in range(1, len(classes)):
                mask = view.predictions[title][:, :, z] == index
                draw_outline(ax, mask, view.spacing, class_colour(index), weight)
            if title in view.dice:
                style = {"color": "white", "fontsize": 8 * weight, "path_effects": dark_edge(1.7)}
                ax.text(0.03, 0.03, f"Dice {100 * view.dice[title]:.1f} %", transform=ax.transAxes, **style)
        if row == 0 or lines > 1:
            write_fitted([ax.set_title for ax in axes[: len(titles)]], titles, panel)
        for ax in axes[len(titles) :]:
            ax.set_axis_off()
    write_fitted([axes[0].set_ylabel for axes in blocks], [view.name for view in views], ratio * panel)
    reference = Line2D([], [], color="white", linewidth=2, path_effects=dark_edge(2), label="reference")
    predicted = _class_handles(classes)
    for handle in predicted:
        handle.set_label(f"prediction: {handle.get_label()}")
    add_legend(figure, [reference, *predicted])
    return figure


@styled
def case_montage(cases: Sequence[Case], classes: Sequence[str]) -> Figure:
    """Three orthogonal slices of each case, where the label is largest, with its contours; a column a case.

    Cases are shown at one scale a row, z upwards; the others' missing borders are black.
    """
    planes = {"x–y": 2, "x–z": 1, "y–z": 0}
    sizes = np.array([np.multiply(case.image.shape[1:], case.spacing) for case in cases])
    windows = [np.delete(sizes.max(axis=0), axis) for axis in planes.values()]
    figure, grid, panel = image_grid([window[1] / window[0] for window in windows], len(cases))
    for axes, (name, axis), window in zip(grid, planes.items(), windows, strict=True):
        for ax, case, size in zip(axes, cases, sizes, strict=True):
            spacing = np.delete(case.spacing, axis)
            label = case.label if case.label is not None else np.zeros(case.image.shape[1:], np.uint8)
            areas = (label > 0).sum(axis=tuple(np.delete(range(3), axis)))
            at = int(areas.argmax()) if areas.any() else len(areas) // 2
            limits = np.percentile(case.image[0], (1, 99.5))
            show_slice(ax, case.image[0].take(at, axis), spacing, limits, np.delete(size, axis) / 2, window)
            for index in range(1, len(classes)):
                draw_outline(ax, label.take(at, axis) == index, spacing, class_colour(index), width=1)
            if axis != 2:
                ax.invert_yaxis()
        axes[0].set_ylabel(name)
    names = [case.id if case.label is not None else f"{case.id}\n(no label)" for case in cases]
    write_fitted([ax.set_title for ax in grid[0]], names, panel)
    add_legend(figure, _class_handles(classes))
    return figure


@styled
def intensity_histograms(cases: Sequence[Case], classes: Sequence[str]) -> Figure:
    """Intensities of each case, and of each class pooled over the labelled cases; a row a channel."""
    channels = len(cases[0].image)
    figure = NotebookFigure(figsize=(WIDTH, 0.5 + 1.7 * channels), layout="constrained")
    grid = figure.subplots(channels, 2, squeeze=False, sharex="row")
    splits = [split for split in SPLIT_COLOURS if any(case.split == split for case in cases)]
    for channel, (whole, by_class) in enumerate(grid):
        ends = np.array([np.percentile(case.image[channel], (0.2, 99.8)) for case in cases])
        bins = np.linspace(ends[:, 0].min(), ends[:, 1].max(), 81)
        middles = (bins[1:] + bins[:-1]) / 2
        for case in cases:
            whole.plot(
                middles, _density(case.image[channel], bins), color=SPLIT_COLOURS[case.split], linewidth=0.6, alpha=0.5
            )
        labelled = [case for case in cases if case.label is not None]
        for index, name in enumerate(classes):
            values = np.concatenate([case.image[channel][case.label == index] for case in labelled])
            colour = class_colour(index) if index else "0.6"
            by_class.fill_between(middles, _density(values, bins), color=colour, alpha=0.3, linewidth=0)
            by_class.plot(middles, _density(values, bins), color=colour, linewidth=1.2, label=name)
        for ax in (whole, by_class):
            ax.set(xlabel="intensity (z-score)", ylim=(0, None))
        whole.set_ylabel("density" if channels == 1 else f"density, channel {channel + 1}")
    grid[0, 0].set_title("Each case")
    grid[0, 0].legend(handles=[Line2D([], [], color=SPLIT_COLOURS[split], label=split) for split in splits])
    grid[0, 1].set_title("Each class")
    grid[0, 1].legend()
    return figure


@styled
def grids(store: Store) -> Figure:
    """Voxel size and field of view of every case as it came, by axis and split; where the size is unknown, voxels."""
    known = store.real_spacing
    rows: dict[str, list[dict]] = {split: [] for split in SPLIT_COLOURS}
    for case in store.index["cases"]:
        rows[case["split"]].append(case["original"] or case)
    splits = [split for split, cases in rows.items() if cases]
    size = (WIDTH if known else 0.6 * WIDTH, 0.9 + 0.33 * 3 * len(splits))
    figure = NotebookFigure(figsize=size, layout="constrained")
    axes = figure.subplots(1, 2 if known else 1, squeeze=False, sharey=True)[0]
    for ax, what in zip(axes[::-1], ("extent", "spacing"), strict=False):
        for place, (axis, split) in enumerate(product(range(3), splits)):
            spacing = np.array([case["spacing"][axis] for case in rows[split]], dtype=float)
            extent = np.array([case["shape"][axis] for case in rows[split]]) * (spacing if known else 1)
            values = spacing if what == "spacing" else extent
            _dots_and_box(ax, values, place, SPLIT_COLOURS[split], jitter=0.12)
        ax.set(ylim=(3 * len(splits) - 0.5, -0.6), xlim=(0, None))
        ax.tick_params(axis="y", length=0)
        ax.grid(False, axis="y")
        unit = "mm" if known else "voxels"
        ax.set_xlabel(f"field of view ({unit})" if what == "extent" else "voxel size (mm)")
    axes[0].set_yticks(range(3 * len(splits)), [f"{axis}, {split}" for axis in "xyz" for split in splits])
    add_legend(figure, _dots_and_box_handles())
    return figure


@styled
def label_volumes(store: Store) -> Figure:
    """Volume of every foreground class in every case with a label; a panel a class, a line a split."""
    classes = store.classes[1:]
    unit, scale = ("ml", 1e-3) if store.real_spacing else ("thousand voxels", 1e-3)
    volumes: dict[str, list[np.ndarray]] = {split: [] for split in SPLIT_COLOURS}
    for split, found in volumes.items():
        for case in map(store.load, store.ids(split)):
            if case.label is not None:
                voxel = np.prod(case.spacing) if store.real_spacing else 1
                found.append(np.bincount(case.label.ravel(), minlength=len(classes) + 1)[1:] * voxel * scale)
    splits = [split for split, found in volumes.items() if found]
    figure = NotebookFigure(
        figsize=(WIDTH if len(classes) > 1 else 0.6 * WIDTH, 0.8 + 0.4 * len(splits)), layout="constrained"
    )
    axes = figure.subplots(1, len(classes), squeeze=False, sharey=True)[0]
    for index, (ax, name) in enumerate(zip(axes, classes, strict=True)):
        for place, split in enumerate(splits):
            _dots_and_box(ax, np.array(volumes[split])[:, index], place, SPLIT_COLOURS[split], jitter=0.12)
        ax.set(title=name, xlabel=f"volume ({unit})", xlim=(0, None), ylim=(len(splits) - 0.5, -0.6))
        ax.set_yticks(range(len(splits)), [f"{split} ({len(volumes[split])})" for split in splits])
        ax.tick_params(axis="y", length=0)
        ax.grid(False, axis="y")
    add_legend(figure, _dots_and_box_handles())
    return figure


def _density(values: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Histogram, smoothed over neighbouring bins: scanners give whole numbers, which bins would catch unevenly."""
    return gaussian_filter1d(np.histogram(values, bins, density=True)[0], 1.5)


def _seeds_and_mean(ax: Axes, seeds: Sequence[pd.Series], series: Series) -> None:
    if not seeds:
        return
    style = {"color": series.colour, "linestyle": series.line}
    if len(seeds) > 1:
        for seed in seeds:
            ax.plot(seed.index, seed, linewidth=0.5, alpha=0.4, **style)
    mean = pd.concat(seeds, axis=1).mean(axis=1)
    ax.plot(mean.index, mean, linewidth=1.3, **style)


def _dots_and_box(ax: Axes, values: np.ndarray, place: float, colour: str, jitter: float = 0.0) -> None:
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


def _dots_and_box_handles() -> list[Line2D]:
    grey = {"color": "0.3", "linestyle": ""}
    return [
        Line2D([], [], marker="o", markersize=3.5, label="case", **grey),
        Line2D([], [], color="0.3", linewidth=3.5, alpha=0.4, label="middle half of the cases"),
        Line2D([], [], marker="|", markersize=7, markeredgewidth=1.6, label="median", **grey),
    ]


def _box_around(view: CaseView, z: int) -> tuple[np.ndarray, np.ndarray]:
    """Low and high corner, in mm, of the box around all contours in a slice, with a margin."""
    drawn = (view.reference[:, :, z] > 0) | np.any([mask[:, :, z] > 0 for mask in view.predictions.values()], axis=0)
    found = np.argwhere(drawn) if drawn.any() else np.array([[0, 0], np.subtract(drawn.shape, 1)])
    spacing = np.array(view.spacing[:2])
    low, high = found.min(axis=0) * spacing, (found.max(axis=0) + 1) * spacing
    margin = 0.12 * (high - low).max()
    return low - margin, high + margin


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


def class_colour(index: int) -> str:
    """Colour of a class by its index, from 1; 0 is background."""
    return CLASS_COLOURS[(index - 1) % len(CLASS_COLOURS)]


def _class_handles(classes: Sequence[str]) -> list[Line2D]:
    return [Line2D([], [], color=class_colour(index), label=name) for index, name in enumerate(classes) if index]


def _once(rows: Sequence[tuple[int, list[Series]]]) -> list[Series]:
    """Every name's series once, however many panels show it."""
    return list({one.name: one for _, group in rows for one in group}.values())


def _line_handles(series: Iterable[Series]) -> list[Line2D]:
    return [Line2D([], [], color=one.colour, linestyle=one.line, label=one.name) for one in series]


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
    """One legend below the figure, in as many columns as fit its width."""
    lengths = [0.65 + _length(handle.get_label(), 7.5) for handle in handles]
    columns = len(handles)
    while columns > 1:
        lines = ceil(len(handles) / columns)
        if sum(max(lengths[i : i + lines]) for i in range(0, len(handles), lines)) < figure.get_figwidth():
            break
        columns -= 1
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
