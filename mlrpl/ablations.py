"""Ablations as tables and figures: what each part of MLRPL is worth, beside the paper's figures.

Dice of decoder 1 in %, of the final weights; that of the published selection, by which the paper's figures were
obtained, stands beside them. A difference is paired: over the cases, each averaged over the seeds that both variants
have.
"""

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mlrpl.config import Ablation, load_study
from mlrpl.drawing import STEPS, WIDTH, NotebookFigure, add_legend, styled
from mlrpl.figures import plot_seeds, seed_handles
from mlrpl.results import Results
from mlrpl.rows import SELECTIONS
from mlrpl.statistics import compared, each_seed, interval, limits, seeds_above
from mlrpl.study import Workplace
from mlrpl.tables import conditions, rows_of, titled, with_interval

FOLD = re.compile(r"-f\d+$")  # at the end of a run's name

OURS, PAPER = "#D55E00", "#0072B2"


@dataclass(frozen=True)
class Shown:
    """The ablations that a study's report shows, their results, and one line that says where they come from."""

    ablations: tuple[Ablation, ...]
    found: Results
    said: str


def shown(place: Workplace, own: Results | None = None) -> Shown:
    """The study's own ablations as far as they are finished, or the committed ones of the study that it names.

    Args:
        place: the study.
        own: its results; left out, those in its results folder.
    """
    study = place.study
    other = study.ablations_of
    if study.ablations or not other:
        found, ablations = own or Results.load(place.results), study.ablations
        said = "This study has no ablations." if not ablations else ""
        none = "Of no ablation of this study two variants are finished yet, so there is nothing to compare."
    else:
        found, ablations = Results.load(place.results.parent / other), load_study(other).ablations
        said = f"Precomputed: these are the committed results of the study {other}; {study.name} itself runs none."
        none = f"No ablations of the study {other} are committed yet: `make reproduce STUDY={other}` runs them."
    variants = found.ablations.reindex(columns=["ablation", "variant"]).groupby("ablation")["variant"].nunique()
    finished = set(variants[variants > 1].index)  # the reference alone is no ablation
    kept = tuple(ablation for ablation in ablations if ablation.name in finished)
    return Shown(kept, found, none if ablations and not kept else said)


def table(found: Results, ablation: Ablation) -> pd.DataFrame:
    """A row a number of labelled cases and variant.

    Returns:
        ``labelled, variant, reference, dice, low, high, seeds, cases``; ``dice_of_seeds`` and ``published_of_seeds``,
        lists; ``difference`` to the reference and what else `mlrpl.statistics.compared` gives (NaN for the reference
        itself); ``runs``, their names; ``paper``.
    """
    runs = found.ablations[found.ablations["ablation"] == ablation.name]
    runs = runs.drop_duplicates(["labelled", "variant", "seed"])  # a cross-validation's folds together are one
    rows = titled(found.metrics, found.runs)
    dice, published = (_of_runs(rows_of(rows, selection, "decoder1")) for selection in SELECTIONS)

    def of_seeds(some: pd.DataFrame) -> pd.DataFrame:
        return dice[some["run"]].set_axis(some["seed"], axis=1)

    lines = []
    for (labelled, variant), mine in runs.groupby(["labelled", "variant"], sort=False):
        values = of_seeds(mine)
        low, high = interval(values.mean(axis=1))
        line = {
            "labelled": labelled,
            "variant": variant,
            "reference": mine["reference"].iloc[0],
            "dice": values.mean(axis=1).mean(),
            "low": low,
            "high": high,
            "dice_of_seeds": values.mean().to_list(),
            "published_of_seeds": published.reindex(columns=mine["run"]).mean().to_list(),
            "seeds": len(mine),
            "cases": len(values),
        }
        line |= dict.fromkeys(("difference", "difference_low", "difference_high", "higher", "common"), np.nan)
        if not line["reference"]:
            line |= compared(values, of_seeds(runs[(runs["labelled"] == labelled) & runs["reference"]]))
        paper = mine["paper"].iloc[0]
        lines.append(line | {"runs": ", ".join(mine["run"]), "paper": "" if pd.isna(paper) else str(paper)})
    return pd.DataFrame(lines)


def _of_runs(rows: pd.DataFrame) -> pd.DataFrame:
    """Dice in %, a row a case, a column a run: means over classes."""
    return rows.groupby(["run", "case"], observed=True)["dice"].mean().unstack("run") * 100


def caution(rows: pd.DataFrame, runs: pd.DataFrame) -> str:
    """What cannot be concluded from a :func:`table`, in sentences; `runs` are all of the results."""
    named = {FOLD.sub("", name) for name in ", ".join(rows["runs"]).split(", ")}
    mine = runs["run"].str.replace(FOLD, "", regex=True).isin(named)
    return f"{conditions(runs[mine])}{limits(rows.assign(title=rows['variant']))}"


def formatted(rows: pd.DataFrame, ablation: Ablation) -> pd.DataFrame:
    """:func:`table` as text."""
    view = pd.DataFrame(
        {
            ablation.axis: [
                f"{v} (reference)" if r else v for v, r in zip(rows["variant"], rows["reference"], strict=True)
            ],
            "Dice (%) [95 % over cases]": [with_interval(*r) for r in rows[["dice", "low", "high"]].to_numpy()],
            "Each seed": rows["dice_of_seeds"].map(each_seed),
            "Difference, seed by seed [95 % over cases]": [
                with_interval(*r) for r in rows[["difference", "difference_low", "difference_high"]].to_numpy()
            ],
            "Seeds above": seeds_above(rows),
            "Published: each seed": rows["published_of_seeds"].map(each_seed),
            "Runs": rows["runs"].map(_briefly),
        }
    )
    if rows["labelled"].nunique() > 1:
        view.insert(0, "Labelled", rows["labelled"].astype(str))
    heading = f"Paper{f', {ablation.paper_on}' if ablation.paper_on else ''}: Dice (%)"
    view.insert(len(view.columns) - 1, heading, [_paper_text(text) or "—" for text in rows["paper"]])
    return view


def _briefly(names: str) -> str:
    """Runs that differ in seed and fold alone, by one name: "wr-4-s0, wr-4-s1" is "wr-4-s0, s1"."""
    seeds: dict[str, list[str]] = {}
    for name in names.split(", "):
        stem, _, seed = FOLD.sub("", name).rpartition("-")
        seeds.setdefault(stem, []).append(seed)
    return "; ".join(f"{stem}-{', '.join(found)}" for stem, found in seeds.items())


def _say(ax: Axes, place: int, text: str) -> None:
    """What is known of the paper's figure: the number beside its mark, or words in the middle."""
    style = {"va": "center", "fontsize": 6.5, "color": "0.35"}
    number = pd.to_numeric(text, errors="coerce")
    if pd.notna(number):
        ax.annotate(f"{number:.2f}", (number, place), (6, 0), textcoords="offset points", **style)
    else:
        ax.annotate(text or "not known", (0.5, place), xycoords=("axes fraction", "data"), ha="center", **style)


def _paper_text(text: str) -> str:
    number = pd.to_numeric(text, errors="coerce")
    return text if pd.isna(number) else f"{number:.2f}"


@styled
def figure(rows: pd.DataFrame, ablation: Ablation) -> Figure:
    """Our Dice with its interval over cases, and beside it the paper's where it is known."""
    groups = list(rows.groupby("labelled"))
    numbers = pd.to_numeric(rows["paper"], errors="coerce")
    panels = 2 if numbers.notna().any() and (rows["paper"] != "").sum() > 1 else 1  # one figure alone compares nothing
    size = (WIDTH if panels == 2 else 0.7 * WIDTH, 0.75 + 0.2 * len(groups) + 0.26 * len(rows))
    canvas = NotebookFigure(figsize=size, layout="constrained")
    heights = [len(group) for _, group in groups]
    grid = canvas.subplots(
        len(groups),
        panels,
        squeeze=False,
        sharex="col",
        sharey="row",
        height_ratios=heights,
        width_ratios=[2, 1][:panels],
    )
    for axes, (labelled, group) in zip(grid, groups, strict=True):
        places = np.arange(len(group))
        mean = group.loc[group["reference"], "dice"]
        if len(mean):
            axes[0].axvline(mean.item(), color="0.6", linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
        for place, row in zip(places, group.to_dict("records"), strict=True):
            axes[0].plot([row["low"], row["high"]], [place, place], color=OURS, linewidth=1.8)
            fill = OURS if row["reference"] else "white"
            axes[0].plot(row["dice"], place, "o", markersize=6, color=OURS, markerfacecolor=fill)
            plot_seeds(axes[0], row["dice_of_seeds"], place)
        axes[0].set_yticks(places, group["variant"])
        axes[0].set_ylim(len(group) - 0.5, -0.6)
        axes[0].set_title(f"{ablation.title}, {labelled} labelled", loc="left")
        if panels == 2:
            axes[1].plot(numbers[group.index], places, "D", markersize=5.5, color=PAPER)
            for place, text in zip(places, group["paper"], strict=True):
                _say(axes[1], place, text)
            axes[1].set_title(f"Paper: {ablation.paper_on}" if ablation.paper_on else "Paper", loc="left")
        for ax in axes:
            ax.tick_params(axis="y", length=0)
            ax.grid(False, axis="y")
    for ax in grid[-1]:
        ax.set_xlabel("Dice (%)")
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        ax.margins(x=0.15)
    handles = [
        Line2D(
            [],
            [],
            color=OURS,
            linewidth=1.8,
            marker="o",
            markerfacecolor="white",
            markersize=6,
            label="mean, 95 % interval over cases",
        ),
        Line2D([], [], color=OURS, linestyle="", marker="o", markersize=6, label="reference"),
        Line2D([], [], color="0.6", linewidth=0.8, linestyle=(0, (4, 2)), label="its mean"),
    ]
    add_legend(canvas, [*handles, *seed_handles(rows["dice_of_seeds"])])
    return canvas
