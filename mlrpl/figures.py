"""Figures of runs: learning curves, checks, Dice of every case, label efficiency, differences, and contours."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from mlrpl.config import REFERENCE
from mlrpl.drawing import (
    STEPS,
    WIDTH,
    NotebookFigure,
    add_legend,
    class_colour,
    class_handles,
    colours,
    dark_edge,
    dots_and_box,
    dots_and_box_handles,
    draw_outline,
    image_grid,
    panel_width,
    show_slice,
    styled,
    write_fitted,
)
from mlrpl.methods import METHODS
from mlrpl.statistics import probability
from mlrpl.tables import comparison, per_case, rows_of, titled

MOST_COLUMNS = 6  # of methods in a row of contours
SUPERVISED = {name for name, method in METHODS.items() if not method.uses_unlabelled}
CURVES = {  # of a run's log: title and scale
    "supervised": ("Supervised loss", 1),
    "mutual": ("Unsupervised loss", 1),
    "pseudo_foreground": ("Foreground of\npseudo-labels (%)", 100),
    "dice": ("Dice of training\nbatch (%)", 100),
}
REACH = 20  # points of Dice up to which the figure of differences is linear throughout
LINEAR = 5  # and, where a method is further off, in its middle
TICKS = (-50, -20, -10, -5, -2, 0, 2, 5, 10, 20, 50)  # then
SEED_MARK = {"marker": "|", "linestyle": "", "markersize": 7, "markeredgewidth": 1, "color": "0.25", "zorder": 3}


@dataclass(frozen=True)
class Series:
    """One method at one number of labelled cases, as a figure draws it."""

    title: str
    labelled: int
    name: str
    colour: str
    line: str | tuple[int, tuple[float, ...]]  # as Matplotlib takes it
    runs: list[str]


def panels(runs: pd.DataFrame) -> list[tuple[int, list[Series]]]:
    """Series of each number of labelled cases.

    A supervised method alone at its number, V-Net with all labels, is a reference: dashed, in the panels of the others.
    """
    colour = colours(runs["title"])
    groups: dict[int, list[Series]] = {}
    references: dict[int, Series] = {}
    for labelled, titles in runs.groupby("labelled"):
        groups[labelled] = [
            Series(title, labelled, title, colour[title], "-", same["run"].tolist())
            for title, same in titles.groupby("title", sort=False)
        ]
        if len(groups[labelled]) == 1 and set(titles["method"]) <= SUPERVISED:
            (alone,) = groups[labelled]
            references[labelled] = replace(alone, name=f"{alone.title}, {labelled} labelled", line=(0, (4, 1.5)))
    shown = [
        (labelled, group + [*references.values()]) for labelled, group in groups.items() if labelled not in references
    ]
    return shown or list(groups.items())


def smoothed(curve: pd.Series) -> pd.Series:
    """Running mean over a fortieth of the curve."""
    return curve.rolling(max(1, len(curve) // 40), min_periods=1, center=True).mean()


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
    last = rows_of(titled(metrics, runs), "last", "decoder1").groupby("run")["dice"].mean() * 100
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
def distributions(metrics: pd.DataFrame, runs: pd.DataFrame, unit: str = "voxels") -> Figure:
    """Dice and 95HD of every test case, averaged over seeds and classes; lines join the same case across methods.

    Of the final weights, decoder 1.
    """
    rows = panels(runs)
    measures = {"dice": "Dice (%)", "hd95": f"95HD ({unit})"}
    heights = [len(group) for _, group in rows]
    figure = NotebookFigure(figsize=(WIDTH, 0.75 + 0.25 * len(rows) + 0.3 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(rows), 2, squeeze=False, sharex="col", sharey="row", height_ratios=heights)
    for column, (measure, name) in enumerate(measures.items()):
        values = per_case(metrics, runs, measure).set_index(["labelled", "case"])
        for ax, (labelled, group) in zip(grid[:, column], rows, strict=True):
            cases = pd.concat([values[series.title].loc[series.labelled] for series in group], axis=1).to_numpy()
            ax.plot(cases.T, np.arange(len(group)), color="0.8", linewidth=0.5, zorder=1)
            for place, (series, dots) in enumerate(zip(group, cases.T, strict=True)):
                dots_and_box(ax, dots, place, series.colour)
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
    joined = [Line2D([], [], color="0.8", linewidth=0.8, label="the same case")] if max(heights) > 1 else []
    add_legend(figure, [*dots_and_box_handles(), *joined])
    return figure


@styled
def label_efficiency(metrics: pd.DataFrame, runs: pd.DataFrame) -> Figure | None:
    """Dice of final weights, decoder 1, over the number of labelled cases: a line a method, its mean over cases.

    Bars: from the lowest seed to the highest. A method alone at its number is a dashed level; one that was trained at
    a single number among others has no line, and is left out. None where fewer than two methods have a line.
    """
    rows = panels(runs)
    levels = [labelled for labelled, _ in rows]
    drawn = Counter(one.name for _, group in rows for one in group)
    series = [one for one in _once(rows) if one.line != "-" or drawn[one.name] > 1]
    solid = [one for one in series if one.line == "-"]
    if len(solid) < 2:
        return None
    table = comparison(metrics, runs).query("selection == 'last' and output == 'decoder1'")
    table = table.set_index(["title", "labelled"])
    figure = NotebookFigure(figsize=(0.75 * WIDTH, 2.8), layout="constrained")
    ax = figure.subplots()
    dodge = np.linspace(-0.2, 0.2, len(solid))
    for one, shift in zip(solid, dodge, strict=True):
        mine = table.loc[one.title].reindex(levels).dropna(subset="dice")
        places = [levels.index(labelled) + shift for labelled in mine.index]
        style = {"color": one.colour, "markersize": 4, "linewidth": 1, "elinewidth": 0.7}
        ends = [mine["dice"] - mine["dice_seeds"].map(min), mine["dice_seeds"].map(max) - mine["dice"]]
        ax.errorbar(places, mine["dice"], ends, marker="o", **style)
    for one in series:
        if one.line != "-":
            ax.axhline(table.loc[(one.title, one.labelled), "dice"], color=one.colour, linestyle=one.line, linewidth=1)
    ax.set_xticks(range(len(levels)), levels)
    ax.set(xlim=(-0.5, len(levels) - 0.5), xlabel="labelled cases", ylabel="Dice of test cases (%)")
    ax.grid(False, axis="x")
    figure.legend(handles=_line_handles(series), loc="outside right center")
    return figure


def plot_seeds(ax: Axes, values: Sequence[float], place: float) -> None:
    """A small mark a seed, where there are several: what an interval over cases does not tell."""
    if len(values) > 1:
        ax.plot(values, [place] * len(values), **SEED_MARK)


def seed_handles(values: Iterable[Sequence[float]]) -> list[Line2D]:
    """For the legend, if :func:`plot_seeds` drew any."""
    return [Line2D([], [], label="a seed", **SEED_MARK)] if any(len(seeds) > 1 for seeds in values) else []


@styled
def differences(table: pd.DataFrame, reference: str = REFERENCE, titles: Iterable[str] = ()) -> Figure | None:
    """Paired differences to the reference with their 95 % intervals over cases, and p after Holm's correction.

    Where a method is more than `REACH` points off the axis is linear up to `LINEAR` points and logarithmic beyond: one
    that fails must not hide what others differ by. None where there is nothing to compare with it.

    Args:
        table: of `mlrpl.statistics.summary`.
        reference: its title.
        titles: in the order of the study's runs, so that variants have the colours that they have in its other figures.
    """
    rows = table[table["difference"].notna()]
    groups = list(rows.groupby("labelled"))
    if not groups:
        return None
    figure = NotebookFigure(figsize=(0.75 * WIDTH, 0.7 + 0.3 * len(groups) + 0.26 * len(rows)), layout="constrained")
    colour = colours([*titles, *table["title"]])
    heights = [len(group) for _, group in groups]
    far = rows[["difference_low", "difference_high", "difference"]].abs().max(axis=None) > REACH
    axes = figure.subplots(len(groups), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for ax, (labelled, group) in zip(axes, groups, strict=True):
        for place, row in enumerate(group.to_dict("records")):
            style = {"color": colour[row["title"]]}
            ax.plot([row["difference_low"], row["difference_high"]], [place, place], linewidth=1.8, **style)
            ax.plot(row["difference"], place, "o", markersize=5, markeredgecolor="white", **style)
            plot_seeds(ax, row["of_seeds"], place)
            p = f"p (Holm) = {probability(row['p_holm'])}".replace("= <", "< ")
            said = p if pd.notna(row["p_holm"]) else "no test"
            beside = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 6.5, "color": "0.35"}
            ax.annotate(said, (1.02, place), annotation_clip=False, **beside)
        ax.axvline(0, color="0.4", linewidth=0.8)
        ax.set_yticks(range(len(group)), group["title"])
        ax.set_ylim(len(group) - 0.5, -0.5)
        ax.tick_params(axis="y", length=0)
        ax.grid(False, axis="y")
        ax.set_title(f"{labelled} labelled", loc="left")
        if far:
            ax.set_xscale("symlog", linthresh=LINEAR, linscale=0.6)
    under = " under the same condition\n" if rows["reference"].nunique() > 1 else " "
    beyond = f"; logarithmic beyond ±{LINEAR}" if far else ""
    axes[-1].set_xlabel(f"difference to {reference}{under}(points of Dice{beyond})")
    axes[-1].xaxis.set_major_locator(FixedLocator(TICKS) if far else MaxNLocator(8, steps=STEPS))
    axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
    axes[-1].xaxis.set_minor_locator(NullLocator())
    mark = Line2D(
        [], [], color="0.3", linewidth=1.8, marker="o", markeredgecolor="white", label="mean, 95 % interval over cases"
    )
    add_legend(figure, [mark, *seed_handles(rows["of_seeds"])])
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
    predicted = class_handles(classes)
    for handle in predicted:
        handle.set_label(f"prediction: {handle.get_label()}")
    add_legend(figure, [reference, *predicted])
    return figure


def _seeds_and_mean(ax: Axes, seeds: Sequence[pd.Series], series: Series) -> None:
    if not seeds:
        return
    style = {"color": series.colour, "linestyle": series.line}
    if len(seeds) > 1:
        for seed in seeds:
            ax.plot(seed.index, seed, linewidth=0.5, alpha=0.4, **style)
    mean = pd.concat(seeds, axis=1).mean(axis=1)
    ax.plot(mean.index, mean, linewidth=1.3, **style)


def _box_around(view: CaseView, z: int) -> tuple[np.ndarray, np.ndarray]:
    """Low and high corner, in mm, of the box around all contours in a slice, with a margin."""
    drawn = (view.reference[:, :, z] > 0) | np.any([mask[:, :, z] > 0 for mask in view.predictions.values()], axis=0)
    found = np.argwhere(drawn) if drawn.any() else np.array([[0, 0], np.subtract(drawn.shape, 1)])
    spacing = np.array(view.spacing[:2])
    low, high = found.min(axis=0) * spacing, (found.max(axis=0) + 1) * spacing
    margin = 0.12 * (high - low).max()
    return low - margin, high + margin


def _once(rows: Sequence[tuple[int, list[Series]]]) -> list[Series]:
    """Every name's series once, however many panels show it."""
    return list({one.name: one for _, group in rows for one in group}.values())


def _line_handles(series: Iterable[Series]) -> list[Line2D]:
    return [Line2D([], [], color=one.colour, linestyle=one.line, label=one.name) for one in series]
