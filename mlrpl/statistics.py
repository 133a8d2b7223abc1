"""How sure are the differences? Intervals and tests over cases, each averaged over its seeds.

Cases are what a method is tested on, so they are what varies: never case × seed, which would count one case several
times. What each seed reaches is listed beside it. Bootstrap and Wilcoxon's test are scipy's; all
resampling starts from a fixed seed, so that a report does not change when it is made anew.
"""

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import pandas as pd

from mlrpl.config import REFERENCE
from mlrpl.tables import per_seed, two_decimals, with_interval

LEVEL = 0.95
RESAMPLES = 9999
FEWEST = 6  # with five pairs the two-sided signed-rank test cannot get below p = 2 / 2⁵ = 0.0625
FEW = {2: "Two", 3: "Three"}  # seeds


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
    from scipy import stats  # here, since it takes long to import and most notebooks test nothing

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
    from scipy import stats

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
    """`summary` as text. The reference's mean over the seeds that both have stands beside its name.

    Where nothing is compared, without the columns that would say with what.
    """
    rows = table.to_dict("records")
    text = pd.DataFrame(
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
    compared = ["Difference, seed by seed [95 % over cases]", "Seeds above", "p", "p (Holm)", "Compared with"]
    return text.drop(columns=compared) if table["reference"].isna().all() else text


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
