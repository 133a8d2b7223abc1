"""`mlrpl reproduce`: everything of a study that is not done yet, then its report."""

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from mlrpl import ablations, audit_report, precision_report, statistics, tables
from mlrpl.config import Run
from mlrpl.errors import StudyError
from mlrpl.evaluation import PREDICTIONS
from mlrpl.explore import explorable
from mlrpl.figures import CaseView
from mlrpl.files import atomic, read_json, remove_temporary, write_json
from mlrpl.locks import holder, locked
from mlrpl.methods import volumes_a_step
from mlrpl.provenance import CHANGED, environment
from mlrpl.report import Entry, Link, Picture, Section, notebook_to_html, write_home, write_index
from mlrpl.results import Results, collect
from mlrpl.slurm import Resources, minutes, submit
from mlrpl.study import (
    NOTEBOOKS,
    PACKAGE,
    WORKER_LOG,
    Job,
    Workplace,
    execute,
    last_line,
    notebook_parameters,
    one_a_key,
    pending,
    run_all,
    usual_jobs,
)
from mlrpl.training import name_device
from mlrpl.words import counted, duration

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
not known. Islands far off cost little Dice and much distance."""
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
ABLATIONS = "Variants that differ from MLRPL in one thing; the tables are in the notebook. Final weights, decoder 1."
RELIABILITY = "AUROC of each measure of HR as a predictor of a right pseudo-label; 0.5 is chance."
REPORTING = (
    "ablations",
    "audit_report",
    "explore",
    "figures",
    "precision_report",
    "report",
    "reproduce",
    "results",
    "statistics",
    "tables",
)
CAPTIONS = {
    "distributions": "Each dot a test case, final weights, decoder 1; grey lines join the same case.",
    "label-efficiency": "Final weights, decoder 1; a bar is the standard deviation over seeds, if there are several.",
    "learning-curves": "Where a collapse would be seen: the pseudo-labelled foreground leaves the share that is right, "
    "towards nothing or towards everything, while the labelled batches' Dice goes on rising. Supervised losses are not "
    "on one scale: MLRPL's is the sum of its decoders' Dice losses, V-Net's the mean of Dice loss and cross-entropy.",
    "checks": "The published protocol's checks.",
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


def reproduce(
    study: str,
    *,
    data: str | None = None,
    jobs: int | None = None,
    device: str | None = None,
    only: str | None = None,
    adopt: bool = False,
    tensorboard: bool = False,
    runs: str = "runs",
    results: str = "results",
    slurm: Resources | None = None,
    report_only: bool = False,
) -> dict[str, str]:
    """Do what is not done of a study and write its report.

    Args:
        study: name, or path of a .yaml file.
        data: the data set's own folder.
        jobs: runs at a time; None: `mlrpl.study.usual_jobs`.
        device: "cpu", "cuda", …; default a GPU where there is one.
        only: see `mlrpl.study.pending`.
        adopt: take committed rows whose key matches as finished, and do not train those runs again.
        tensorboard: also log for TensorBoard.
        runs: folder of runs.
        results: folder of results.
        slurm: queue the runs and the report as Slurm jobs instead of running them here.
        report_only: run nothing, write the report of what is finished.

    Returns:
        The reason of each failed run; empty where all is well.

    Raises:
        StudyError: for what concerns the whole study: its settings, its data, its folders, the device.
    """
    started = time.monotonic()
    if slurm:
        minutes(slurm.time)  # before anything is prepared
    place = Workplace(study, runs, results, data)
    for name in device.split(",") if device and not slurm else ():  # a node that only queues may have no GPU
        name_device(name)
    _check_writable(place)
    with locked(place.runs, f"study {place.study.name}: another process is reproducing it in {place.root}/"):
        return _reproduce(place, jobs, device, only, adopt, tensorboard, slurm, report_only, started)


def _reproduce(
    place: Workplace,
    at_once: int | None,
    device: str | None,
    only: str | None,
    adopt: bool,
    tensorboard: bool,
    slurm: Resources | None,
    report_only: bool,
    started: float,
) -> dict[str, str]:
    print(f"Study {place.study.name}: {place.study.title}", flush=True)
    for folder in (place.runs, place.results, *place.results.glob("*/")):
        remove_temporary(folder)
    with tqdm(desc="  preparing cases", unit="case", leave=False, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        store = place.store = place.prepare(show)
    committed = Results.load(place.results)
    adopted = committed.keys() if adopt else set()
    todo = list(pending(place, only, adopted))
    adopted_names = [job.run.name for job in place.jobs if job.key in adopted and not job.finished("evaluate")]
    runs = counted(len({job.key for job in place.jobs}), "run")
    print(f"  {len(store.index['cases'])} cases; {runs}, {len(todo)} to do")
    if left_out := len(store.index["rejected"]):
        print(f"  {left_out} cases were left out; the data page says which and why")
    if adopted_names:
        print(f"  adopted from {place.results}/: {', '.join(adopted_names)}")
    if not (place.runs / "01-data.ipynb").exists() or read_json(place.runs / "data.json") != _data_key(place):
        execute(
            "01-data", place.runs / "01-data.ipynb", **notebook_parameters(place, RESULTS=str(place.results.parent))
        )
        write_json(place.runs / "data.json", _data_key(place))
    if slurm:
        print(f"  {submit(place, todo, slurm, device, tensorboard, adopt)}")
        print(f"  mlrpl status {place.given} shows where they stand, mlrpl cancel {place.given} takes them back")
        return {}
    if report_only:
        failures = _unfinished(todo)
    else:
        threads = max((job.run.settings.threads for job in todo), default=1)
        at_once = at_once or usual_jobs(device, threads)
        if todo:
            print(f"  on {device or _usual_device()}; runs at a time: {at_once}")
        failures = run_all(place, _free(todo), at_once, device, tensorboard)
    found = collect(place.jobs, committed, place.study.ablations)
    if not len(found):
        _summary(place, failures)
        return failures
    state = _report_key(place, found)
    index = place.results / "index.html"
    if not todo and index.exists() and read_json(place.runs / "report.json") == state:
        print("  nothing to do: every run is finished and the report is up to date")
    else:
        _report(place, found, device)
        write_json(place.runs / "report.json", state)
        _compare_with_committed(found, committed)
    print()
    print(tables.to_markdown(headline(found, place)))
    print(f"\nReport: {index}  ({duration(time.monotonic() - started)})")
    _summary(place, failures)
    return failures


def _usual_device() -> str:
    kind = name_device().type
    return "cpu, since PyTorch finds no GPU that it can use" if kind == "cpu" else kind


def _free(jobs: Sequence[Job]) -> list[Job]:
    """Without those that another process is at: a Slurm job, or another study's command."""
    taken = [job for job in jobs if holder(job.folder)]
    if taken:
        print(f"  left to the processes that are at them: {', '.join(job.run.name for job in taken)}")
    return [job for job in jobs if job not in taken]


def _unfinished(jobs: Sequence[Job]) -> dict[str, str]:
    """Why each of these runs is not finished."""
    logs = {job.run.name: job.folder / WORKER_LOG for job in jobs}
    return {name: last_line(log) if log.exists() else "not started" for name, log in logs.items()}


def _check_writable(place: Workplace) -> None:
    """Before hours of work: can runs and results be written?"""
    for folder in (place.runs, place.results):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic(folder / ".writable") as partial:
                partial.write_bytes(b"\0" * 4096)
            (folder / ".writable").unlink()
        except OSError as error:
            raise StudyError(f"{folder}: cannot be written ({error.strerror}); make room or allow writing") from None


def _summary(place: Workplace, failures: dict[str, str]) -> None:
    if failures:
        print(f"\n{counted(len(failures), 'run')} failed; the same command tries them again:")
        for name, reason in failures.items():
            print(f"  {name}: {reason}")


def headline(found: Results, place: Workplace) -> pd.DataFrame:
    """The table that matters first: final weights, every output."""
    found = found.compared()
    table = tables.comparison(found.metrics, found.runs, [f.model_dump() for f in place.study.paper])
    return tables.formatted(table[table["selection"] == "last"], place.study.distances)


def _compare_with_committed(found: Results, committed: Results) -> None:
    if not len(committed):
        return
    own = found.runs.loc[~found.runs["adopted"], tables.RUN]
    rows = tables.difference(found.metrics.merge(own, on=tables.RUN), committed.metrics)
    rows = rows[rows["compared"] > 0]
    if len(rows):
        worst = rows.loc[rows["max"].idxmax()]
        print(
            f"\nAgainst the rows that were in results/: {int(rows['compared'].sum())} compared, mean |Δ Dice| "
            f"{np.average(rows['mean'], weights=rows['compared']):.3f} points, largest {worst['max']:.2f} "
            f"({worst['variant']}, {worst['labelled']} labelled, seed {worst['seed']})"
        )


# The report.


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _source(*files: Path) -> list[str]:
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def _data_key(place: Workplace) -> dict[str, str]:
    return {
        "key": _hash([place.store.fingerprint, place.study.dataset.model_dump(), _source(NOTEBOOKS / "01-data.ipynb")])
    }


def _report_key(place: Workplace, found: Results) -> dict[str, str]:
    """What the report depends on: rows, the study's words and the code that shows them."""
    sources = [NOTEBOOKS / f"{name}.ipynb" for name in report_notebooks(place, found)]
    sources += sorted((PACKAGE / "templates").rglob("*.*"))
    sources += [PACKAGE / f"{name}.py" for name in REPORTING]
    if place.study.ablations_of:
        sources += sorted((place.results.parent / place.study.ablations_of).glob("*.csv"))
    runs = found.runs[["run", "key", "adopted"]].values.tolist()
    return {"key": _hash([runs, place.study.model_dump(), _data_key(place), _source(*sources)])}


def report_notebooks(place: Workplace, found: Results) -> list[str]:
    """The notebooks over all runs that this study has something to show in."""
    apply = {
        "05-ablate": bool(place.study.ablations or place.study.ablations_of),
        "06-reliability": len(found.audit) > 0,
        "07-explore": bool(explorable(place)),
    }
    return [name for name in REPORT_PAGES if apply.get(name, True)]


def _report(place: Workplace, found: Results, device: str | None) -> None:
    print("  writing the report", flush=True)
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


def _predictions(place: Workplace, job: Job) -> Path:
    """A run's label maps: where it was run, or as they were kept with the results."""
    own = job.folder / PREDICTIONS
    return own if own.exists() else place.results / "predictions" / f"{job.run.name}.npz"


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


def first_seeds(jobs: Sequence[Job]) -> list[Job]:
    """The first seed of every variant and number of labelled cases."""
    first: dict[tuple[str, int], Job] = {}
    for job in jobs:
        first.setdefault((job.run.variant, job.run.labelled), job)
    return list(first.values())


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
            f"{SURE} {statistics.limits(sure)}",
            made["statistics"],
            figures=_pictures(folder, "differences"),
        ),
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
    """`results/index.html`: the studies, and whatever else has a page there."""
    entries = []
    for index in sorted(results.glob("*/index.html")):
        facts, everything = read_json(index.parent / "provenance.json"), Results.load(index.parent)
        text = facts.get("summary", "")
        if len(everything):
            runs = everything.compared().runs
            methods = "; ".join(dict.fromkeys(runs["title"]))
            counts = ", ".join(map(str, sorted(set(runs["labelled"]))))
            finished = len(everything)
            text = f"{methods}; {counts} labelled cases; {_progress(finished, facts.get('asked', finished))}"
        entries.append(Entry(facts.get("title", index.parent.name), f"{index.parent.name}/index.html", text))
    lead = "Mutual learning with reliable pseudo labels, reproduced: one page a study. For research, not for diagnosis."
    write_home(results / "index.html", title="MLRPL: results", lead=lead, entries=entries)


# What notebook 04 shows beyond the rows.


def comparison_tables(place: Workplace, found: Results) -> dict[str, pd.DataFrame]:
    """The tables of 04-compare as text, by the names of their files; the last needs the case store."""
    paper = [figure.model_dump() for figure in place.study.paper]
    rows = found.metrics, found.runs
    pairs = precision_report.pairs(place.study.runs(), found.runs)
    return {
        "comparison": tables.formatted(tables.comparison(*rows, paper), place.study.distances),
        "statistics": statistics.formatted(statistics.summary(*rows)),
        "optimism": tables.formatted_optimism(*rows),
        "largest": tables.formatted_largest(*rows, paper, place.study.distances),
        "normalisation": tables.formatted_normalisation(*rows),
        **({"cost": cost_table(place, found)} if place.at_hand else {}),
        **({"precision": precision_report.table(found.curves, pairs)} if pairs else {}),
    }


def cost_table(place: Workplace, found: Results) -> pd.DataFrame:
    """What a training step of each method costs: `mlrpl.tables.cost`."""
    first = found.runs.drop_duplicates("title")["run"]
    sizes = place.store.channels, len(place.store.classes)
    return tables.cost(found.runs, {name: volumes_a_step(place.job(name).run, *sizes) for name in first})


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
    reference = next((job for job in local if job.run.variant == "mlrpl"), local[0])
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
    at_hand = set.intersection(*(set(files) for files in maps.values()))
    ranked = [case for case in dice[reference.run.name].index if case in at_hand]
    chosen = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}
    views = []
    for rank, case_id in chosen.items():
        case = place.store.load(case_id)
        predictions = {_label(job, reference): _label_map(maps[job.run.name][case_id], case_id) for job in shown}
        scores = {_label(job, reference): dice[job.run.name][case_id] for job in shown}
        views.append(CaseView(f"{rank}: {case_id}", case.image[0], case.label, predictions, scores, case.spacing))
    said = f"{reference.run.title}, {reference.run.labelled} labelled, seed {reference.run.seed}"
    return views, f"Chosen by the Dice of {said}: best, median, worst."


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


def _label(job: Job, reference: Job) -> str:
    same = job.run.labelled == reference.run.labelled
    return job.run.title if same else f"{job.run.title}, {job.run.labelled} labelled"
