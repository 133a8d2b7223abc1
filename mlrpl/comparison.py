"""What a study's runs give side by side: the tables of 04-compare as text, and cases as every method segments them."""

from pathlib import Path

import numpy as np
import pandas as pd

from mlrpl import precision_report, statistics, tables
from mlrpl.config import Run
from mlrpl.evaluation import PREDICTIONS
from mlrpl.figures import CaseView
from mlrpl.methods import METHODS, volumes_a_step
from mlrpl.results import Results
from mlrpl.study import Job, Workplace, first_seeds


def headline(found: Results, place: Workplace) -> pd.DataFrame:
    """The table that matters first: final weights, every output."""
    found = found.compared()
    table = tables.comparison(found.metrics, found.runs, [f.model_dump() for f in place.study.paper])
    return tables.formatted(table[table["selection"] == "last"], place.study.distances)


def comparison_tables(place: Workplace, found: Results) -> dict[str, pd.DataFrame]:
    """The tables of 04-compare as text, by the names of their files; "cost" needs the case store."""
    paper = [figure.model_dump() for figure in place.study.paper]
    rows, reference = (found.metrics, found.runs), place.study.reference_title
    pairs = precision_report.pairs(place.study.runs(), found.runs)
    return {
        "comparison": tables.formatted(tables.comparison(*rows, paper), place.study.distances),
        "statistics": statistics.formatted(statistics.summary(*rows, reference=reference)),
        "statistics-published": statistics.formatted(
            statistics.summary(*rows, selection="published", reference=reference)
        ),
        "optimism": tables.formatted_optimism(*rows),
        "largest": tables.formatted_largest(*rows, paper, place.study.distances),
        "normalisation": tables.formatted_normalisation(*rows),
        **({"cost": cost_table(place, found)} if place.at_hand else {}),
        **({"precision": precision_report.table(found.curves, pairs)} if pairs else {}),
    }


def cost_table(place: Workplace, found: Results) -> pd.DataFrame:
    """What a training step of each method costs: `mlrpl.tables.cost`; without runs that the study no longer has."""
    runs = {job.run.name: job.run for job in place.jobs}
    rows = found.runs[found.runs["run"].isin(runs)]
    sizes = place.store.channels, len(place.store.classes)
    return tables.cost(rows, {name: _volumes(runs[name], *sizes) for name in rows.drop_duplicates("title")["run"]})


def _volumes(run: Run, channels: int, classes: int) -> tuple[int, int]:
    """`volumes_a_step`; zeros where a method of one's own does not take so small a patch: no reason for no report."""
    try:
        return volumes_a_step(run, channels, classes)
    except Exception:
        if run.method in METHODS:
            raise
        return 0, 0


def case_views(place: Workplace, found: Results) -> tuple[list[CaseView], str]:
    """Best, median and worst test case of the reference method, as every method of the first seed segments them.

    Runs without label maps at hand are left out.

    Returns:
        The views, and one sentence that says how the cases were chosen.
    """
    shown_runs = set(found.runs["run"])
    predicted = [job for job in place.jobs if job.run.name in shown_runs and _predictions(place, job).exists()]
    local = first_seeds(predicted)
    if not local:
        return [], "No label maps are at hand."
    reference = next((job for job in local if job.run.title == place.study.reference_title), local[0])
    shown = [job for job in local if job.run.labelled == reference.run.labelled]
    shown += [job for job in local if job.run.labelled == max(j.run.labelled for j in local) and job not in shown]
    rows = found.metrics
    dice = {
        job.run.name: tables.case_dice(
            rows[
                (rows["variant"] == job.run.variant)
                & (rows["labelled"] == job.run.labelled)
                & (rows["seed"] == job.run.seed)
            ]
        )
        for job in shown
    }
    maps = {job.run.name: _label_maps(place, job) for job in shown}
    labels = {job.run.name: _label(job, reference, found) for job in shown}
    at_hand = set.intersection(*(set(files) for files in maps.values()))
    ranked = [case for case in dice[reference.run.name].index if case in at_hand]
    if not ranked:  # as of folds of which each run has another
        return [], "No case has a label map of every method."
    chosen = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}
    views = []
    for rank, case_id in chosen.items():
        case = place.store.load(case_id)
        predictions = {label: _label_map(maps[name][case_id], case_id) for name, label in labels.items()}
        scores = {label: dice[name][case_id] for name, label in labels.items()}
        views.append(CaseView(f"{rank}: {case_id}", case.image[0], case.label, predictions, scores, case.spacing))
    said = f"{reference.run.title}, {reference.run.labelled} labelled, seed {reference.run.seed}"
    return views, f"Chosen by the Dice of {said}: best, median, worst. Final weights of decoder 1."


def _predictions(place: Workplace, job: Job) -> Path:
    """A run's label maps: where it was run, or as they were kept with the results."""
    own = job.folder / PREDICTIONS
    return own if own.exists() else place.results / "predictions" / f"{job.run.name}.npz"


def _label_maps(place: Workplace, job: Job) -> dict[str, Path]:
    """The file that holds each test case's label map of a run; of a cross-validation, all folds' cases."""
    whole = job.run.model_copy(update={"fold": None})
    files: dict[str, Path] = {}
    for fold in place.jobs:
        path = _predictions(place, fold)
        if fold.run.model_copy(update={"fold": None}) == whole and path.exists():
            with np.load(path) as maps:
                files |= dict.fromkeys(maps.files, path)
    return files


def _label_map(file: Path, case_id: str) -> np.ndarray:
    with np.load(file) as maps:
        return maps[case_id]


def _label(job: Job, reference: Job, found: Results) -> str:
    """Its title, with the seed where there are others, and how many cases are labelled where that differs."""
    run, runs = job.run, found.runs
    seeds = runs.loc[(runs["variant"] == run.variant) & (runs["labelled"] == run.labelled), "seed"].nunique()
    other = run.labelled != reference.run.labelled
    return run.title + f", s{run.seed}" * (seeds > 1) + f", {run.labelled} labelled" * other
