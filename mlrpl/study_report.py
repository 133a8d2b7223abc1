"""A study's report: its page, the executed notebooks as pages, what is kept with them, and the overview of all."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mlrpl import ablations, audit_report, statistics, tables
from mlrpl.comparison import comparison_tables
from mlrpl.config import Run
from mlrpl.evaluation import PREDICTIONS
from mlrpl.execution import execute, notebook_parameters
from mlrpl.explore import explorable
from mlrpl.files import atomic, read_json, read_rows, remove_temporary, write_json
from mlrpl.locks import locked
from mlrpl.provenance import CHANGED, environment
from mlrpl.report import Entry, Link, Picture, Section, notebook_to_html, write_home, write_index
from mlrpl.results import Results
from mlrpl.study import Job, Workplace, first_seeds, one_a_key
from mlrpl.words import counted

STAGE_PAGES = {"02-train": "Training", "03-evaluate": "Evaluation"}
REPORT_PAGES = {
    "04-compare": "Comparison",
    "05-ablate": "Ablations",
    "06-reliability": "Reliability",
    "07-explore": "Exploring",
}

COMPARISON = """*Last*: the weights after the final iteration. *Published*: the weights that did best on the test cases
among regular checks, as the literature reports it, so it is optimistic. Mean over test cases, ± standard deviation over
seeds where there are several. A distance is undefined where a method finds nothing; such a case counts as Dice 0 and is
left out of the distances (the published code averages zeros there)."""
COST = """Seconds are those of an undisturbed step, since runs may share a machine: the tenth percentile over stretches
of 20 iterations, of a method's runs the shortest; memory is the largest of its runs. Runs that shared a GPU from
beginning to end have no undisturbed step. Only steps of one machine compare, and one name may stand for several: the
page *Speed* has all methods side by side. Passes without gradient count as volumes too."""
LARGEST = """Dice (%) and 95HD of decoder 1 as predicted, and with each class's largest connected component alone. It is
no part of the protocol here; much published code evaluates so, and whether the paper's figures were obtained with it is
not known. Islands far off cost little Dice and much distance. Means over the seeds that have rows for it."""
NORMALISATION = """Dice (%) of the final weights, decoder 1. Training normalises each batch by its own statistics, its
unlabelled volumes included; prediction by their running averages, as published. The second column uses the statistics
of the volume that is predicted instead (of its windows, four at a time). The difference is what the averages cost; what
is still missing then, the features lack."""
OPTIMISM = "Points of Dice by which choosing the weights on the test cases exceeds the final weights."
PRECISION = """Runs that differ in nothing but precision and seed. Rounding alone makes runs of one seed part ways, so
curves are compared with the range of float32's seeds: the share of training that reduced precision's mean over seeds,
and its single runs, spend within it, and what single runs would if precision made no difference."""
SURE = """Intervals are bootstrapped over the test cases, each averaged over its seeds. Wilcoxon's signed-rank test
pairs the same cases of a method and MLRPL, over the seeds that both have, with Holm's correction over the methods at
one number of labelled cases. What names a condition in brackets, such as instance norm, is compared with MLRPL under
the same. Final weights, decoder 1."""
SURE_PUBLISHED = """As above, but of the weights of the best check, as published figures compare. Each run was chosen
for doing well on these very cases: its mean is optimistic, and intervals and p know nothing of that."""
OVERVIEW = """Mutual learning with reliable pseudo labels, reproduced: one page a study. The tables: Dice (%) of decoder
1 on the test cases, ± standard deviation over seeds where there are several, of the last weights and of the best check
on the test cases, as the literature selects. For research, not for diagnosis."""
ABLATIONS = "Variants that differ from MLRPL in one thing; the tables are in the notebook. Final weights, decoder 1."
RELIABILITY = "AUROC of each measure of HR as a predictor of a right pseudo-label; 0.5 is chance."
CAPTIONS = {
    "distributions": "Each dot a test case, final weights, decoder 1; grey lines join the same case.",
    "label-efficiency": "Final weights, decoder 1; a bar is the standard deviation over seeds, if there are several.",
    "learning-curves": "Where a collapse would be seen: the pseudo-labelled foreground leaves the share that is right, "
    "towards nothing or towards everything, while the labelled batches' Dice goes on rising; where training is thrown "
    "out, that Dice falls too. Supervised losses are not "
    "on one scale: MLRPL's is the sum of its decoders' Dice losses, V-Net's the mean of Dice loss and cross-entropy.",
    "checks": "Every check on the test cases. Where there are several seeds, faint lines are theirs and the strong one "
    "is their mean; of each seed the best check, which *published* selects, and the end of training are marked.",
    "precision": "Running means over a fortieth of training; bold is the mean over seeds, the band float32's range.",
    "differences": "Paired differences to MLRPL over the test cases, each averaged over its seeds; p after Holm's "
    "correction. Where there are several seeds, each has a mark: what other trainings may do to a difference.",
    "reliability-which": "Share of right pseudo-labels among those that WR keeps and drops, beside the surest of the "
    "same batch, as many as WR keeps of all classes together. The class is the pseudo-label's, the distance "
    "that to the reference's boundary.",
    "reliability-coverage": "Star and diamond keep equally many of each batch: where the star is higher, WR chooses "
    "better than confidence does. Thresholds on the line are the same for all batches.",
    "reliability-how": "How well each measure's weight tells right pseudo-labels from wrong ones; dotted: chance.",
    "reliability-diagram": "Ten groups of equal size, from the lowest weights to the highest, for HR's weight and for "
    "the largest probability.",
    "contours": "Best, median and worst test case by the Dice of MLRPL's first seed (where there is none: of the first "
    "method), on the x–y slice where the reference is largest. Final weights, decoder 1.",
}


def report_notebooks(place: Workplace, found: Results) -> list[str]:
    """The notebooks over all runs that this study has something to show in."""
    apply = {
        "05-ablate": bool(place.study.ablations or place.study.ablations_of),
        "06-reliability": len(found.audit) > 0,
        "07-explore": bool(explorable(place)),
    }
    return [name for name in REPORT_PAGES if apply.get(name, True)]


def write_report(place: Workplace, found: Results, device: str | None) -> None:
    """Write rows, figures, tables and pages of a study into its results.

    Args:
        place: the study.
        found: the rows of all its finished runs.
        device: as typed; where 07-explore runs a network.
    """
    folder = place.results
    found.save(folder)
    title = place.study.title
    notebook_to_html(place.runs / "01-data.ipynb", folder / "01-data.html", f"{title}: data", "index.html")
    for name in report_notebooks(place, found):
        own = {"STATIC": True, "DEVICE": device.split(",")[0] if device else None} if name == "07-explore" else {}
        parameters = notebook_parameters(place, RESULTS=str(place.results.parent), **own)
        execute(name, place.runs / f"{name}.ipynb", **parameters)
        what = f"{title}: {REPORT_PAGES[name].lower()}"
        notebook_to_html(place.runs / f"{name}.ipynb", folder / f"{name}.html", what, "index.html")
    for job in representative(place.jobs):
        for notebook, what in STAGE_PAGES.items():
            if (executed := job.folder / f"{notebook}.ipynb").exists():
                notebook_to_html(
                    executed,
                    page(folder, job, notebook),
                    f"{job.run.title}, {job.run.labelled} labelled: {what}",
                    "../index.html",
                )
    _keep_predictions(place, found)
    before = read_json(folder / "provenance.json").get("runs", {})
    described = {job.run.name: {"key": job.key, **_described(job)} for job in one_a_key(place.jobs)}
    for row in found.runs[found.runs["adopted"]].to_dict("records"):
        described[row["run"]] = before.get(row["run"], described[row["run"]])
    provenance = {
        "study": place.study.name,
        "title": title,
        "data": {name: place.store.index[name] for name in ("name", "licence", "citation", "fingerprint", "split")},
        "report": environment(),
        "runs": described,
        "asked": len(one_a_key(place.jobs)),
    }
    write_json(folder / "provenance.json", provenance)
    _index(place, found, provenance)
    with locked(place.root, "results/index.html: another process is writing it", "overview.", wait=60):
        remove_temporary(folder.parent)  # other studies write here too, so only under the lock
        write_overview(folder.parent)


def _keep_predictions(place: Workplace, found: Results) -> None:
    """Label maps of representative runs go with the results, so that a later sitting can show all methods."""
    shown = {job.run.name for job in representative(place.jobs)} & set(found.runs["run"])
    folder = place.results / "predictions"
    for path in folder.glob("*.npz"):
        if path.stem not in shown:
            path.unlink()
    for job in place.jobs:
        if job.run.name in shown and (job.folder / PREDICTIONS).exists():
            with atomic(folder / f"{job.run.name}.npz") as partial:
                shutil.copyfile(job.folder / PREDICTIONS, partial)


def _described(job: Job) -> dict[str, Any]:
    """A run's stages as provenance.json has them, without their keys."""
    return {
        stage: {k: v for k, v in facts.items() if k != "key"}
        for stage, facts in job.provenance.items()
        if stage != "run"
    }


def representative(jobs: Sequence[Job]) -> list[Job]:
    """The first seed of every variant and number of labelled cases, ablations aside: their notebooks become pages."""
    return first_seeds([job for job in jobs if not job.run.ablation])


def page(folder: Path, job: Job, notebook: str) -> Path:
    """Where a run's notebook is kept as a page."""
    return folder / "runs" / f"{job.run.name}-{notebook[3:]}.html"


def _index(place: Workplace, found: Results, provenance: dict[str, Any]) -> None:
    study, folder = place.study, place.results
    everything, found = found, found.compared()
    made = comparison_tables(place, found)
    sure = statistics.summary(found.metrics, found.runs)
    sections = [
        Section(
            "Comparison",
            text=remarks([job.run for job in one_a_key(place.jobs)], everything.runs) + COMPARISON,
            table=made["comparison"],
            figures=_pictures(folder, "distributions", "label-efficiency"),
        ),
        Section(
            "How sure is that",
            f"{SURE} {statistics.same_seeds(sure)} {statistics.limits(sure)}",
            made["statistics"],
            figures=_pictures(folder, "differences"),
        ),
        Section("The same by the published selection", SURE_PUBLISHED, made["statistics-published"]),
        Section("What the published selection adds", OPTIMISM, made["optimism"]),
        *_section("What the largest component alone changes", LARGEST, made["largest"]),
        *_section("What BatchNorm's running statistics cost", NORMALISATION, made["normalisation"]),
        *_ablation_section(place),
        *_reliability_section(place, everything),
        *_precision_section(folder, made.get("precision")),
        Section("Learning", figures=_pictures(folder, "learning-curves", "checks")),
        Section("Cost of a training step", COST, made["cost"]),
        Section("Cases", f"Licence of the images: {place.store.licence}.", figures=_pictures(folder, "contours")),
        Section(
            "Notebooks",
            "Every figure above comes from these, executed as they are; code unfolds with a click.",
            _run_table(place, everything),
            links=[
                Link("Data", "01-data.html"),
                *(Link(REPORT_PAGES[name], f"{name}.html") for name in report_notebooks(place, everything)),
            ],
        ),
    ]
    write_index(
        folder / "index.html",
        title=study.title,
        lead=study.about,
        sections=sections,
        provenance=provenance,
        home="../index.html",
    )


def remarks(asked: Sequence[Run], runs: pd.DataFrame) -> str:
    """What a reader must know of a study's runs before comparing them, in Markdown; empty where there is nothing.

    Args:
        asked: runs of the study.
        runs: a row a finished run.
    """
    said = ""
    if len(runs) < len(asked):
        said += f"{len(runs)} of {counted(len(asked), 'run')} finished. "
        begun = set(zip(runs["title"], runs["labelled"], strict=True))
        missing: dict[int, list[str]] = {}
        for run in asked:
            if not run.ablation and (run.title, run.labelled) not in begun:
                missing.setdefault(run.labelled, []).append(run.title)
        if missing:
            groups = (f"with {n} labelled {', '.join(dict.fromkeys(titles))}" for n, titles in missing.items())
            said += f"None yet of these: {'; '.join(groups)}. "
    if dirty := runs["commit"].astype(str).str.endswith(CHANGED).sum():
        said += f"**{counted(dirty, 'run')} made with uncommitted changes** to the code; the list below marks them. "
    return said + tables.conditions(runs)


def _section(title: str, text: str, table: pd.DataFrame) -> list[Section]:
    return [Section(title, text, table)] if len(table) else []


def _precision_section(folder: Path, table: pd.DataFrame | None) -> list[Section]:
    if table is None:
        return []
    return [Section("Does reduced precision train alike", PRECISION, table, figures=_pictures(folder, "precision"))]


def _ablation_section(place: Workplace) -> list[Section]:
    if not (place.study.ablations or place.study.ablations_of):
        return []
    shown = ablations.shown(place)
    names = [f"ablation-{ablation.name}" for ablation in shown.ablations]
    text = f"{shown.said} {ABLATIONS}" if names else shown.said
    return [Section("Ablations", text, figures=_pictures(place.results, *names))]


def _reliability_section(place: Workplace, found: Results) -> list[Section]:
    if not len(found.audit):
        return []
    subjects = audit_report.subjects(found)
    names = [name for name in CAPTIONS if name.startswith("reliability-")]
    first = f" Pictures: {audit_report.described(subjects[''])}; the others are on the page *Reliability*."
    return [
        Section(
            "Reliability of the pseudo-labels",
            "\n\n".join(audit_report.answers(subject) for subject in subjects.values()),
            audit_report.together(audit_report.predictor_table, subjects),
            RELIABILITY + (first if len(subjects) > 1 else ""),
            figures=_pictures(place.results, *names),
        )
    ]


def _pictures(folder: Path, *names: str) -> list[Picture]:
    """Saved figures for a page: SVG, or PNG where that is less than half as large; of voxels an SVG shows no more."""
    pictures = []
    for name in names:
        vector, pixels = (folder / "figures" / f"{name}.{kind}" for kind in ("svg", "png"))
        if vector.exists():
            path = pixels if 2 * pixels.stat().st_size < vector.stat().st_size else vector
            pictures.append(Picture(path, CAPTIONS.get(name, ""), name.replace("-", " ")))
    return pictures


def _run_table(place: Workplace, found: Results) -> pd.DataFrame:
    """`tables.run_list`, with links to the runs' executed notebooks where they are kept."""
    table = tables.run_list(found.runs)
    jobs = {job.run.name: job for job in place.jobs}
    for notebook, what in STAGE_PAGES.items():
        pages = [page(place.results, jobs[run], notebook) for run in table["Run"]]
        table[what] = [Link(what.lower(), f"runs/{path.name}") if path.exists() else "" for path in pages]
    return table


def _progress(finished: int, asked: int) -> str:
    return counted(asked, "run") if finished == asked else f"{finished} of {counted(asked, 'run')}"


def write_overview(results: Path) -> None:
    """`results/index.html`: the studies with what they found, then whatever else has a page there."""
    studies, others = [], []
    for index in sorted(results.glob("*/index.html")):
        facts = read_json(index.parent / "provenance.json")
        title, href = facts.get("title", index.parent.name), f"{index.parent.name}/index.html"
        runs, table = index.parent / "runs.csv", index.parent / "tables" / "comparison.csv"
        if runs.exists() and table.exists():
            comparison, finished = pd.read_csv(table, dtype=str, keep_default_na=False), len(read_rows(runs))
            cases = comparison["Cases"].astype(int).max()  # fewer where folds of a cross-validation are missing
            text = f"{counted(cases, 'test case')}; {_progress(finished, facts.get('asked', finished))}"
            studies.append(Entry(title, href, text, tables.overview(comparison)))
        else:
            others.append(Entry(title, href, facts.get("summary", "")))
    write_home(results / "index.html", title="MLRPL: results", lead=OVERVIEW, entries=[*studies, *others])
