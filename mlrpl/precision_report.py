"""Whether reduced precision trains like float32: the runs of a study that are alike in all else, side by side.

Seeds differ, and so does the same seed once rounding does: training is chaotic. What can be asked is whether reduced
precision leaves the range of float32's seeds. If precision made no difference, each of its runs would lie outside the
range of n float32 runs at 2 of n + 1 times: with three seeds, half of the time.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mlrpl.config import Run
from mlrpl.drawing import STEPS, WIDTH, NotebookFigure, add_legend, styled
from mlrpl.figures import CURVES, smoothed

FLOAT32 = "float32"
FLOAT32_COLOUR, REDUCED_COLOUR = "0.55", "black"  # no method's


@dataclass(frozen=True)
class Pair:
    """One training in float32 and in a reduced precision, by the names of the runs, a seed each."""

    reference: str
    title: str
    precision: str
    float32: list[str]
    reduced: list[str]


def pairs(asked: Iterable[Run], runs: pd.DataFrame) -> list[Pair]:
    """Finished runs that differ in nothing but seed and precision, where several seeds were trained in both.

    Args:
        asked: runs of the study.
        runs: a row a finished run, with the precision that it was trained in.
    """
    rows = runs.set_index("run")
    alike: dict[str, dict[str, list[Run]]] = {}
    for run in asked:
        if run.name in rows.index:
            settings = run.settings.model_copy(update={"precision": FLOAT32})
            rest = {"settings": settings, "variant": "", "title": "", "seed": 0, "audit_every": 0, "ablation": ""}
            group = alike.setdefault(run.model_copy(update=rest).model_dump_json(), {})
            group.setdefault(rows.loc[run.name, "precision"], []).append(run)
    return [
        Pair(float32[0].title, others[0].title, precision, _names(float32), _names(others))
        for group in alike.values()
        if len(float32 := group.get(FLOAT32, [])) > 1
        for precision, others in group.items()
        if precision != FLOAT32 and len(others) > 1
    ]


def table(curves: pd.DataFrame, found: Sequence[Pair]) -> pd.DataFrame:
    """Share of training, in percent, that reduced precision spends in the range of float32's seeds.

    Args:
        curves: of `mlrpl.results.Results`.
        found: of `pairs`.

    Returns:
        A row a pair and curve: what its mean over seeds and its single runs spend there, and what single runs would
        if precision made no difference.
    """
    rows = []
    for pair, name, float32, reduced in _each(curves, found):
        low, high = float32.min(axis=1), float32.max(axis=1)
        mean = reduced.mean(axis=1)
        inside = reduced.ge(low, axis=0) & reduced.le(high, axis=0)
        seeds = float32.shape[1]
        rows.append(
            (
                pair.title,
                pair.reference,
                CURVES[name][0].replace("\n", " "),
                f"{100 * mean.between(low, high).mean():.0f}",
                f"{100 * inside.to_numpy().mean():.0f}",
                f"{100 * (seeds - 1) / (seeds + 1):.0f}",
            )
        )
    return pd.DataFrame(
        rows,
        columns=["Trained", "Beside", "Curve", "Mean within (%)", "Runs within (%)", "Expected of runs (%)"],
    )


@styled
def figure(curves: pd.DataFrame, found: Sequence[Pair]) -> Figure | None:
    """Range and mean of float32's seeds, and upon it reduced precision's: seeds thin, their mean bold.

    Args:
        curves: of `mlrpl.results.Results`.
        found: of `pairs`.

    Returns:
        A row a pair, a column a curve; None without pairs.
    """
    if not found:
        return None
    names = [name for name in CURVES if curves[name].notna().any()]
    drawn = NotebookFigure(figsize=(WIDTH, 0.8 + 1.5 * len(found)), layout="constrained")
    grid = drawn.subplots(len(found), len(names), squeeze=False, sharex=True, sharey="col")
    for axes, pair in zip(grid, found, strict=True):
        axes[0].set_ylabel(pair.title, fontweight="bold")
    for pair, name, float32, reduced in _each(curves, found):
        ax = grid[found.index(pair), names.index(name)]
        ax.fill_between(
            float32.index, float32.min(axis=1), float32.max(axis=1), color=FLOAT32_COLOUR, alpha=0.3, linewidth=0
        )
        ax.plot(float32.index, float32.mean(axis=1), color=FLOAT32_COLOUR, linewidth=1.3)
        ax.plot(reduced.index, reduced, color=REDUCED_COLOUR, linewidth=0.5, alpha=0.6)
        ax.plot(reduced.index, reduced.mean(axis=1), color=REDUCED_COLOUR, linewidth=1.3)
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
        ax.set_ylim(bottom=0)
    for ax, name in zip(grid[0], names, strict=True):
        ax.set_title(CURVES[name][0])
    for ax in grid[-1]:
        ax.set_xlabel("iteration")
    add_legend(
        drawn,
        [
            Line2D([], [], color=FLOAT32_COLOUR, label="float32: mean, and range of seeds"),
            Line2D([], [], color=REDUCED_COLOUR, label="reduced precision: mean, and seeds"),
        ],
    )
    return drawn


def _names(runs: Sequence[Run]) -> list[str]:
    return [run.name for run in runs]


def _each(curves: pd.DataFrame, found: Sequence[Pair]) -> Iterator[tuple[Pair, str, pd.DataFrame, pd.DataFrame]]:
    """Each pair, curve, and its smoothed values in float32 and in reduced precision, a column a seed."""
    for pair in found:
        mine = curves[curves["run"].isin([*pair.float32, *pair.reduced])]
        by_run = {run: curve.set_index("iteration").sort_index() for run, curve in mine.groupby("run")}
        for name, (_, scale) in CURVES.items():
            float32, reduced = (
                pd.concat([smoothed(by_run[run][name]) * scale for run in runs if run in by_run], axis=1)
                for runs in (pair.float32, pair.reduced)
            )
            if float32.notna().to_numpy().any():
                yield pair, name, float32, reduced
