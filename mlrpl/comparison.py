"""What a study's runs give side by side: the parts of 04-compare, and cases as every method segments them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from mlrpl import captions, drawing, figures, precision_report, statistics, tables
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


@dataclass(frozen=True)
class Part:
    """What 04-compare and the study's page show under one heading; nothing where its table has no rows.

    Attributes:
        heading: plain text.
        text: Markdown, above the table.
        name: of the table's files.
        table: as text.
        figures: by the names of their files, what draws them, or gives None where there is nothing to draw.
    """

    heading: str
    text: str = ""
    name: str = ""
    table: pd.DataFrame | None = None
    figures: Mapping[str, Callable[[], Figure | None]] = field(default_factory=dict)

    @property
    def shown(self) -> bool:
        """Whether there is something to show."""
        return self.table is None or len(self.table) > 0

    def written(self, results: Path) -> list[Any]:
        """Write table and figures into a study's results; returns what a notebook displays."""
        said: list[Any] = [Markdown(f"## {self.heading}\n\n{self.text}")]
        if self.table is not None:
            tables.save(self.table, results / "tables", self.name)
            said.append(tables.show(self.table))
        for name, draw in self.figures.items():
            figure = draw()
            drawing.save(figure, results / "figures", name)
            said += [figure, Markdown(captions.CAPTIONS[name])] if figure else []
        return said if self.shown else []


def parts(place: Workplace, found: Results) -> list[Part]:
    """The parts of 04-compare, in order."""
    return [*outcomes(place, found), *trainings(place, found)]


def outcomes(place: Workplace, found: Results) -> list[Part]:
    """What the runs reach on the test cases, and how sure it is."""
    if not len(found):
        return [Part("Comparison", "No run of the methods is finished yet, only runs of the ablations.")]
    rows, paper = (found.metrics, found.runs), [figure.model_dump() for figure in place.study.paper]
    unit, reference, folds = place.study.distances, place.study.reference_title, place.study.folds
    first, several = found.runs["title"].iloc[0], found.runs["title"].nunique() > 1
    compared = tables.comparison(*rows, paper)
    sure = statistics.summary(*rows, reference=reference)
    published = statistics.summary(*rows, selection="published", reference=reference)
    return [
        Part(
            "Comparison",
            (captions.FOLDS.format(folds) if folds else "") + captions.COMPARISON,
            "glance",
            tables.glance(compared, unit),
            {
                "distributions": partial(figures.distributions, *rows, unit),
                "label-efficiency": partial(figures.label_efficiency, *rows),
            },
        ),
        Part("Every selection and output", captions.EVERY, "comparison", tables.formatted(compared, unit)),
        Part(
            "Class by class",
            captions.BY_CLASS,
            "classes",
            tables.by_class(*rows, unit) if found.metrics["class"].nunique() > 1 else pd.DataFrame(),
        ),
        Part(
            "Case by case",
            captions.BY_CASE.format(first),
            "cases",
            tables.worst_first(*rows, first, unit) if folds else pd.DataFrame(),
        ),
        Part(
            "How sure is that",
            f"{captions.SURE if several else captions.SURE_ALONE} {statistics.limits(sure, reference)}",
            "statistics",
            statistics.formatted(sure),
            {"differences": partial(figures.differences, sure, reference, found.runs["title"])},
        ),
        Part(
            "The same by the published selection",
            captions.SURE_PUBLISHED,
            "statistics-published",
            statistics.formatted(published if several else published.iloc[:0]),
        ),
        Part("What the published selection adds", captions.OPTIMISM, "optimism", tables.formatted_optimism(*rows)),
        Part(
            "What the largest component alone changes",
            captions.LARGEST,
            "largest",
            tables.formatted_largest(*rows, paper, unit),
        ),
        Part(
            "What BatchNorm's running statistics cost",
            captions.NORMALISATION,
            "normalisation",
            tables.formatted_normalisation(*rows),
        ),
    ]


def trainings(place: Workplace, found: Results) -> list[Part]:
    """How the runs trained, and at what cost, which needs the case store."""
    if not len(found):
        return []
    pairs = precision_report.pairs(place.study.runs(), found.runs)
    parts = [
        Part(
            "Does reduced precision train alike",
            captions.PRECISION,
            "precision",
            precision_report.table(found.curves, pairs),
            {"precision": partial(precision_report.figure, found.curves, pairs)},
        ),
        Part(
            "Learning",
            figures={
                "learning-curves": partial(figures.learning_curves, found.curves, found.runs),
                "checks": partial(figures.checks, found.checks, found.metrics, found.runs),
            },
        ),
    ]
    if place.at_hand:
        parts.append(Part("Cost of a training step", captions.COST, "cost", cost_table(place, found)))
    return parts


def comparison_tables(place: Workplace, found: Results) -> dict[str, pd.DataFrame]:
    """The tables of 04-compare as text, by the names of their files; "cost" needs the case store."""
    return {part.name: part.table for part in parts(place, found) if part.table is not None}


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
