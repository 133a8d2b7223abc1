"""`mlrpl reproduce`: everything of a study that is not done yet, then its report."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from tqdm import tqdm

from mlrpl import tables
from mlrpl.errors import StudyError
from mlrpl.evaluation import PREDICTIONS
from mlrpl.figures import CaseView
from mlrpl.files import atomic, read_json, write_json
from mlrpl.provenance import environment
from mlrpl.report import Entry, Link, Picture, Section, notebook_to_html, write_home, write_index
from mlrpl.results import Results, collect
from mlrpl.study import (
    NOTEBOOKS,
    PACKAGE,
    Job,
    Workplace,
    execute,
    notebook_parameters,
    pending,
    remove_temporary,
    run_all,
)
from mlrpl.training import find_device

STAGE_PAGES = {"02-train": "Training", "03-evaluate": "Evaluation"}

COMPARISON = """*Last*: the weights after the final iteration. *Published*: the weights that did best on the test cases
among regular checks, as the literature reports it, so it is optimistic. Mean over test cases, ± standard deviation over
seeds where there are several. A distance is undefined where a method finds nothing; such a case counts as Dice 0 and is
left out of the distances (the published code averages zeros there)."""
OPTIMISM = "Points of Dice by which choosing the weights on the test cases exceeds the final weights."
CAPTIONS = {
    "distributions": "Each dot a test case, final weights, decoder 1; grey lines join the same case.",
    "learning-curves": "Where a collapse would be seen: both decoders agreeing on background shows as a mutual loss "
    "and a pseudo-labelled foreground that fall together towards zero.",
    "checks": "The published protocol's checks.",
    "contours": "Best, median and worst test case by the Dice of MLRPL's first seed (where there is none: of the first "
    "method). Final weights, decoder 1.",
}


def reproduce(
    study: str,
    *,
    data: str | None = None,
    jobs: int = 2,
    device: str | None = None,
    only: str | None = None,
    adopt: bool = False,
    tensorboard: bool = False,
    runs: str = "runs",
    results: str = "results",
) -> dict[str, str]:
    """Do what is not done of a study and write its report.

    Args:
        study: name, or path of a .yaml file.
        data: the data set's own folder.
        jobs: runs at a time.
        device: "cpu", "cuda", …; default a GPU where there is one.
        only: see `mlrpl.study.pending`.
        adopt: take committed rows whose key matches as finished.
        tensorboard: also log for TensorBoard.
        runs: folder of runs.
        results: folder of results.

    Returns:
        The reason of each failed run; empty where all is well.

    Raises:
        StudyError: for what concerns the whole study: its settings, its data, its folders, the device.
    """
    started = time.monotonic()
    place = Workplace(study, runs, results, data)
    if device:
        find_device(device)
    _check_writable(place)
    try:
        with FileLock(place.runs / ".lock", timeout=0):
            return _reproduce(place, jobs, device, only, adopt, tensorboard, started)
    except Timeout:
        raise StudyError(f"study {place.study.name}: another process is reproducing it in {place.root}/") from None


def _reproduce(
    place: Workplace,
    at_once: int,
    device: str | None,
    only: str | None,
    adopt: bool,
    tensorboard: bool,
    started: float,
) -> dict[str, str]:
    print(f"Study {place.study.name}: {place.study.title}", flush=True)
    for folder in (place.runs, place.results.parent, place.results, *place.results.glob("*/")):
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
    print(f"  {len(store.index['cases'])} cases; {len(place.jobs)} runs, {len(todo)} to do")
    if left_out := len(store.index["rejected"]):
        print(f"  {left_out} cases were left out; the data page says which and why")
    if adopted_names:
        print(f"  adopted from {place.results}/: {', '.join(adopted_names)}")
    if not (place.runs / "01-data.ipynb").exists() or read_json(place.runs / "data.json") != _data_key(place):
        execute(
            "01-data", place.runs / "01-data.ipynb", **notebook_parameters(place, RESULTS=str(place.results.parent))
        )
        write_json(place.runs / "data.json", _data_key(place))
    failures = run_all(place, todo, at_once, device, tensorboard)
    found = collect(place.jobs, committed, adopt)
    if not len(found):
        _summary(place, failures)
        return failures
    state = _report_key(place, found)
    index = place.results / "index.html"
    if not todo and index.exists() and read_json(place.runs / "report.json") == state:
        print("  nothing to do: every run is finished and the report is up to date")
    else:
        _report(place, found)
        write_json(place.runs / "report.json", state)
        _compare_with_committed(found, committed)
    print()
    print(tables.to_markdown(headline(found, place)))
    print(f"\nReport: {index}  ({(time.monotonic() - started) / 60:.1f} min)")
    _summary(place, failures)
    return failures


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
        print(f"\n{len(failures)} runs failed; the same command tries them again:")
        for name, reason in failures.items():
            print(f"  {name}: {reason}")


def headline(found: Results, place: Workplace) -> pd.DataFrame:
    """The table that matters first: final weights, every output."""
    table = tables.comparison(found.metrics, found.runs, [f.model_dump() for f in place.study.paper])
    return tables.formatted(table[table["selection"] == "last"], place.study.distances)


def _compare_with_committed(found: Results, committed: Results) -> None:
    if not len(committed):
        return
    rows = tables.difference(found.metrics, committed.metrics)
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
    shown = [NOTEBOOKS / "04-compare.ipynb", *sorted((PACKAGE / "templates").rglob("*.*"))]
    shown += [PACKAGE / f"{name}.py" for name in ("figures", "tables", "report", "reproduce", "results")]
    runs = found.runs[["run", "key", "adopted"]].values.tolist()
    return {"key": _hash([runs, place.study.model_dump(), _data_key(place), _source(*shown)])}


def _report(place: Workplace, found: Results) -> None:
    print("  writing the report", flush=True)
    folder = place.results
    found.save(folder)
    compare = place.runs / "04-compare.ipynb"
    execute("04-compare", compare, **notebook_parameters(place, RESULTS=str(place.results.parent)))
    title = place.study.title
    notebook_to_html(place.runs / "01-data.ipynb", folder / "01-data.html", f"{title}: data", "index.html")
    notebook_to_html(compare, folder / "04-compare.html", f"{title}: comparison", "index.html")
    for job in representative(place.jobs):
        for notebook, what in STAGE_PAGES.items():
            if (executed := job.folder / f"{notebook}.ipynb").exists():
                notebook_to_html(
                    executed,
                    page(folder, job, notebook),
                    f"{job.run.title}, {job.run.labelled} labelled: {what}",
                    "../index.html",
                )
    provenance = {
        "study": place.study.name,
        "title": title,
        "data": {name: place.store.index[name] for name in ("name", "licence", "citation", "fingerprint", "split")},
        "report": environment(),
        "runs": {job.run.name: {"key": job.key, **_described(job)} for job in place.jobs},
    }
    write_json(folder / "provenance.json", provenance)
    _index(place, found, provenance)
    write_overview(folder.parent)


def _described(job: Job) -> dict[str, Any]:
    """A run's stages as provenance.json has them, without their keys."""
    return {
        stage: {k: v for k, v in facts.items() if k != "key"}
        for stage, facts in job.provenance.items()
        if stage != "run"
    }


def representative(jobs: Sequence[Job]) -> list[Job]:
    """The first seed of every variant and number of labelled cases: their notebooks are kept as pages."""
    first: dict[tuple[str, int], Job] = {}
    for job in jobs:
        first.setdefault((job.run.variant, job.run.labelled), job)
    return list(first.values())


def page(folder: Path, job: Job, notebook: str) -> Path:
    """Where a run's notebook is kept as a page."""
    return folder / "runs" / f"{job.run.name}-{notebook[3:]}.html"


def _index(place: Workplace, found: Results, provenance: dict[str, Any]) -> None:
    study, folder = place.study, place.results
    comparison = tables.comparison(found.metrics, found.runs, [f.model_dump() for f in study.paper])
    done = f"{len(found)} of {len(place.jobs)} runs are finished. " if len(found) < len(place.jobs) else ""
    sections = [
        Section(
            "Comparison",
            text=done + COMPARISON,
            table=tables.formatted(comparison, study.distances),
            figures=_pictures(folder, "distributions"),
        ),
        Section("What the published selection adds", OPTIMISM, tables.formatted_optimism(found.metrics, found.runs)),
        Section("Learning", figures=_pictures(folder, "learning-curves", "checks")),
        Section("Cases", place.store.licence, figures=_pictures(folder, "contours")),
        Section(
            "Notebooks",
            "Every figure above comes from these, executed as they are; code unfolds with a click.",
            _run_table(place, found),
            links=[Link("Data", "01-data.html"), Link("Comparison", "04-compare.html")],
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


def _pictures(folder: Path, *names: str) -> list[Picture]:
    paths = [folder / "figures" / f"{name}.svg" for name in names]
    return [Picture(path, CAPTIONS[path.stem], path.stem.replace("-", " ")) for path in paths if path.exists()]


def _run_table(place: Workplace, found: Results) -> pd.DataFrame:
    rows = []
    jobs = {job.run.name: job for job in place.jobs}
    for run in found.runs.to_dict("records"):
        links = {
            what: Link(what.lower(), f"runs/{path.name}")
            for notebook, what in STAGE_PAGES.items()
            if (path := page(place.results, jobs[run["run"]], notebook)).exists()
        }
        rows.append(
            {
                "Run": run["run"],
                "Key": run["key"][:8],
                "Precision": run["precision"],
                "Minutes": f"{run['seconds'] / 60:.1f}",
                "Memory (MB)": str(run["peak_memory_mb"]),
                "Commit": run["commit"],
                "Rows": "adopted" if run["adopted"] else "own",
                **{what: links.get(what, "") for what in STAGE_PAGES.values()},
            }
        )
    return pd.DataFrame(rows)


def write_overview(results: Path) -> None:
    """`results/index.html`: the studies that have a page."""
    entries = []
    for index in sorted(results.glob("*/index.html")):
        facts, runs = read_json(index.parent / "provenance.json"), Results.load(index.parent).runs
        methods = ", ".join(dict.fromkeys(runs["title"]))
        counts = ", ".join(map(str, sorted(set(runs["labelled"]))))
        text = f"{methods}; {counts} labelled cases; {len(runs)} runs"
        entries.append(Entry(facts.get("title", index.parent.name), f"{index.parent.name}/index.html", text))
    lead = "Mutual learning with reliable pseudo labels, reproduced: one page a study. For research, not for diagnosis."
    write_home(results / "index.html", title="MLRPL: results", lead=lead, entries=entries)


# What notebook 04 shows of single cases.


def case_views(place: Workplace, found: Results) -> tuple[list[CaseView], str]:
    """Best, median and worst test case of the reference method, as every method of the first seed segments them.

    Runs without predictions at hand (adopted ones) are left out.

    Returns:
        The views, and one sentence that says how the cases were chosen.
    """
    shown_runs = set(found.runs["run"])
    at_hand = [job for job in place.jobs if job.run.name in shown_runs and (job.folder / PREDICTIONS).exists()]
    local = representative(at_hand)
    if not local:
        return [], "No predictions are at hand: all rows were adopted."
    reference = next((job for job in local if job.run.variant == "mlrpl"), local[0])
    shown = [job for job in local if job.run.labelled == reference.run.labelled]
    shown += [job for job in local if job.run.labelled == max(j.run.labelled for j in local) and job not in shown]
    rows = found.metrics[(found.metrics["selection"] == "last") & (found.metrics["output"] == "decoder1")]
    dice = {
        job.run.name: rows[
            (rows["variant"] == job.run.variant)
            & (rows["labelled"] == job.run.labelled)
            & (rows["seed"] == job.run.seed)
        ]
        .groupby("case")["dice"]
        .mean()
        for job in shown
    }
    ranked = dice[reference.run.name].sort_values(ascending=False, kind="stable")
    chosen = {"best": ranked.index[0], "median": ranked.index[len(ranked) // 2], "worst": ranked.index[-1]}
    views = []
    for rank, case_id in chosen.items():
        case = place.store.load(case_id)
        predictions = {}
        for job in shown:
            with np.load(job.folder / PREDICTIONS) as maps:
                predictions[_label(job, reference)] = maps[case_id]
        scores = {_label(job, reference): dice[job.run.name][case_id] for job in shown}
        views.append(CaseView(f"{rank}: {case_id}", case.image[0], case.label, predictions, scores, case.spacing))
    said = f"{reference.run.title}, {reference.run.labelled} labelled, seed {reference.run.seed}"
    return views, f"Chosen by the Dice of {said}: best, median, worst."


def _label(job: Job, reference: Job) -> str:
    same = job.run.labelled == reference.run.labelled
    return job.run.title if same else f"{job.run.title}, {job.run.labelled} labelled"
