"""How sure are the differences? Intervals and tests over cases, each averaged over its seeds.

Cases are what a method is tested on, so they are what varies: never case × seed, which would count one case several
times. What each seed reaches is listed beside it. Bootstrap and Wilcoxon's test are scipy's; all
resampling starts from a fixed seed, so that a report does not change when it is made anew.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from scipy import stats

from mlrpl.config import REFERENCE
from mlrpl.drawing import STEPS, WIDTH, NotebookFigure, add_legend, colours, styled
from mlrpl.tables import per_seed, two_decimals, with_interval

LEVEL = 0.95
RESAMPLES = 9999
FEWEST = 6  # with five pairs the two-sided signed-rank test cannot get below p = 2 / 2⁵ = 0.0625
FEW = {2: "Two", 3: "Three"}  # seeds
REACH = 20  # points of Dice up to which the figure of differences is linear throughout
LINEAR = 5  # and, where a method is further off, in its middle
TICKS = (-50, -20, -10, -5, -2, 0, 2, 5, 10, 20, 50)  # then
SEED_MARK = {"marker": "|", "linestyle": "", "markersize": 7, "markeredgewidth": 1, "color": "0.25", "zorder": 3}


def interval(values: np.ndarray) -> tuple[float, float]:
    """Bootstrap 95 % interval (bias-corrected, accelerated) of the mean; NaN for fewer than two values.

    Args:
        values: one a case; NaN are left out.
    """
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return float("nan"), float("nan")
    if np.ptp(values) <= 1e-12 * np.abs(values).max():  # all alike but for rounding: nothing to resample
        return float(values.mean()), float(values.mean())
    found = stats.bootstrap(
        (values,), np.mean, confidence_level=LEVEL, n_resamples=RESAMPLES, rng=np.random.default_rng(0)
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def wilcoxon(differences: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test of paired differences; NaN below `FEWEST` pairs, 1 if all are 0."""
    differences = np.asarray(differences, float)
    differences = differences[~np.isnan(differences)]
    if len(differences) < FEWEST:
        return float("nan")
    if not differences.any():
        return 1.0
    return float(stats.wilcoxon(differences).pvalue)


def paired(mine: pd.DataFrame, reference: pd.DataFrame) -> pd.Series:
    """Mine − reference, one a case: the mean over the seeds that both have. All NaN without one in common.

    Args:
        mine: a row a case, a column a seed.
        reference: likewise.
    """
    return (mine - reference).mean(axis=1)  # a seed that one of them lacks is NaN, and not in the mean


def compared(mine: pd.DataFrame, reference: pd.DataFrame) -> dict[str, Any]:
    """:func:`paired` in numbers.

    Returns:
        ``difference``, its mean, with the interval ``difference_low`` and ``difference_high`` over the cases;
        ``of_seeds``, a list with the difference of each seed that both have; ``higher``, how many of these ``common``
        seeds are above 0; ``beside``, the reference's mean over them.
    """
    apart = paired(mine, reference)
    low, high = interval(apart)
    of_seeds = (mine - reference).mean().dropna()
    return {
        "difference": apart.mean(),
        "difference_low": low,
        "difference_high": high,
        "of_seeds": of_seeds.to_list(),
        "higher": (of_seeds > 0).sum(),
        "common": len(of_seeds),
        "beside": reference[of_seeds.index].mean(axis=1).mean(),
    }


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979); NaN stay and do not count as tests."""
    p = np.asarray(p, float)
    adjusted = np.full(len(p), np.nan)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN come last
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1) if len(order) else steps
    return adjusted


def reference_of(title: str, titles: Collection[str], reference: str = REFERENCE) -> str | None:
    """What a title is compared with: the reference under the condition that both name in brackets, else the reference.

    None where there is neither.

    >>> reference_of("Control (instance norm)", ["MLRPL", "MLRPL (instance norm)"])
    'MLRPL (instance norm)'
    """
    if title == reference:
        return None
    condition = title[title.rindex(" (") :] if " (" in title else ""
    return next((name for name in (reference + condition, reference) if name in titles and name != title), None)


def summary(
    metrics: pd.DataFrame,
    runs: pd.DataFrame,
    selection: str = "last",
    reference: str = REFERENCE,
) -> pd.DataFrame:
    """A row a number of labelled cases and title: Dice of decoder 1.

    Returns:
        ``labelled, title, mean, low, high, each, seeds, cases``: mean over cases with its interval, and a list of
        each seed's; where there is a ``reference`` at that number (:func:`reference_of`): ``difference`` (title −
        reference), the mean over the cases and seeds that both have, and what else :func:`compared` gives, Wilcoxon's
        ``p``, and ``p_holm`` over the titles compared at that number. Dice and Jaccard in %.
    """
    table = per_seed(metrics, runs, "dice", selection)
    rows = []
    for labelled, cases in table.groupby("labelled"):
        cases = cases.dropna(axis=1, how="all")
        titles = [title for title in dict.fromkeys(runs["title"]) if title in cases]
        for title in titles:
            values = cases[title].mean(axis=1).to_numpy()
            low, high = interval(values)
            row = {"labelled": labelled, "title": title, "mean": np.nanmean(values), "low": low, "high": high}
            each = cases[title].mean().to_list()
            row |= {"each": each, "seeds": len(each), "cases": np.count_nonzero(~np.isnan(values))}
            if other := reference_of(title, titles, reference):
                row |= {"reference": other, **compared(cases[title], cases[other])}
                row["p"] = wilcoxon(paired(cases[title], cases[other]))
            rows.append(row)
    columns = ["reference", "difference", "difference_low", "difference_high"]
    columns += ["of_seeds", "higher", "common", "beside", "p"]
    found = pd.DataFrame(rows)
    found = found.reindex(columns=[*found.columns, *(name for name in columns if name not in found)])
    found["p_holm"] = found.groupby("labelled")["p"].transform(lambda p: holm(p.to_numpy()))
    return found


def formatted(table: pd.DataFrame) -> pd.DataFrame:
    """`summary` as text. The reference's mean over the seeds that both have stands beside its name."""
    rows = table.to_dict("records")
    return pd.DataFrame(
        {
            "Labelled": table["labelled"].astype(str),
            "Method": table["title"],
            "Dice (%) [95 % over cases]": [with_interval(r["mean"], r["low"], r["high"]) for r in rows],
            "Each seed": table["each"].map(each_seed),
            "Difference, seed by seed [95 % over cases]": [
                with_interval(r["difference"], r["difference_low"], r["difference_high"]) for r in rows
            ],
            "Seeds above": seeds_above(table),
            "p": table["p"].map(probability),
            "p (Holm)": table["p_holm"].map(probability),
            "Compared with": [
                "—" if pd.isna(r["reference"]) else f"{r['reference']}: {two_decimals(r['beside'])}" for r in rows
            ],
            "Cases": table["cases"].astype(str),
        }
    )


def each_seed(values: Iterable[float]) -> str:
    """What each seed reaches, as text."""
    return ", ".join(two_decimals(value) for value in values)


def seeds_above(table: pd.DataFrame) -> list[str]:
    """In how many of the common seeds each row is above the reference (:func:`compared`), as text."""
    pairs = zip(table["higher"], table["common"], strict=True)
    return [f"{higher:.0f} of {common:.0f}" if common > 0 else "—" for higher, common in pairs]


def probability(p: float) -> str:
    """A p value as it is printed."""
    return "—" if pd.isna(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def limits(table: pd.DataFrame, reference: str = REFERENCE) -> str:
    """What cannot be concluded from a `summary`, in sentences; empty where nothing stands against it."""
    said = []
    if table["difference"].isna().all():
        if any(title == reference or title.startswith(f"{reference} (") for title in table["title"]):
            return f"There is no other method to compare {reference} with."
        return f"{reference} is not among the methods, so nothing is compared: the study may name another `reference`."
    if (table["seeds"] == 1).all():
        said.append(
            "Each was trained with one seed: another seed may change a difference's size and its sign. "
            "Intervals and tests speak of other cases, not of other trainings."
        )
    elif (table["seeds"] == 1).any():
        said.append("With one seed a difference may be the seed's.")
    if len(table) and (few := FEW.get(table["seeds"].max())):
        said.append(f"{few} seeds are too few to tell how far seeds spread.")
    apart = (table["difference_low"] > 0) | (table["difference_high"] < 0)
    divided = apart & table["higher"].between(0, table["common"], inclusive="neither")
    if divided.any():
        said.append(
            "Intervals and tests speak of other cases, not of other trainings: the interval of the difference leaves "
            f"out 0, but one seed is above the reference and another below: {_named(table, divided)}."
        )
    fewest = table["cases"].min() if len(table) else 0
    if fewest < FEWEST:
        said.append(f"{fewest} test cases are too few for a test: even if all agree, p cannot fall below 0.05.")
    elif fewest < 20:
        said.append(f"With {fewest} test cases only large and consistent differences can be significant.")
    return " ".join(said)


def _named(table: pd.DataFrame, chosen: pd.Series) -> str:
    """The titles of these rows, with the number of labelled cases where a table has several; "all" for all at one."""
    parts = []
    for labelled, rows in table.groupby("labelled", sort=False):
        mine = rows.loc[chosen[rows.index], "title"]
        names = "all" if 1 < len(mine) == len(rows) else ", ".join(mine)
        if len(mine):
            parts.append(names + (f" at {labelled} labelled" if table["labelled"].nunique() > 1 else ""))
    return "; ".join(parts)


def plot_seeds(ax: Axes, values: Sequence[float], place: float) -> None:
    """A small mark a seed, where there are several: what an interval over cases does not tell."""
    if len(values) > 1:
        ax.plot(values, [place] * len(values), **SEED_MARK)


def seed_handles(values: Iterable[Sequence[float]]) -> list[Line2D]:
    """For the legend, if :func:`plot_seeds` drew any."""
    return [Line2D([], [], label="a seed", **SEED_MARK)] if any(len(seeds) > 1 for seeds in values) else []


@styled
def differences(table: pd.DataFrame, reference: str = REFERENCE) -> Figure | None:
    """Paired differences to the reference with their 95 % intervals over cases, and p after Holm's correction.

    Where a method is more than `REACH` points off the axis is linear up to `LINEAR` points and logarithmic beyond: one
    that fails must not hide what others differ by. None where there is nothing to compare with it.
    """
    rows = table[table["difference"].notna()]
    groups = list(rows.groupby("labelled"))
    if not groups:
        return None
    figure = NotebookFigure(figsize=(0.75 * WIDTH, 0.7 + 0.3 * len(groups) + 0.26 * len(rows)), layout="constrained")
    colour = colours(table["title"])
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
