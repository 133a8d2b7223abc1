"""`mlrpl reproduce`: everything of a study that is not done yet, then its report where one is due."""

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mlrpl import tables
from mlrpl.comparison import headline
from mlrpl.compilation import not_compiled
from mlrpl.config import is_packaged, study_names
from mlrpl.devices import first_device, parse_device
from mlrpl.errors import StudyError
from mlrpl.execution import NOTEBOOKS, execute, notebook_parameters
from mlrpl.files import atomic, read_json, remove_temporary, write_json
from mlrpl.locks import holder, locked
from mlrpl.results import Results, collect
from mlrpl.rows import IDENTITY
from mlrpl.slurm import Resources, minutes, one_device, submit
from mlrpl.steps import prepare_cases, tell_split
from mlrpl.study import Job, Workplace, pending
from mlrpl.study_report import report_notebooks, write_report
from mlrpl.words import counted, duration
from mlrpl.workers import WORKER_LOG, last_line, run_all, usual_jobs

PACKAGE = Path(__file__).parent


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
        jobs: runs at a time; None: `mlrpl.workers.usual_jobs`.
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
        StudyError: for what concerns the whole study: its settings, its data, its folders, its results, the device.
    """
    started = time.monotonic()
    if slurm and report_only:
        raise StudyError("--report-only runs nothing, and --engine slurm queues every run: leave one of them out")
    if slurm:  # before anything is prepared
        minutes(slurm.time)
        one_device(device)
    place = Workplace(study, runs, results, data)
    for name in device.split(",") if device and not slurm else ():  # a node that only queues may have no GPU
        parse_device(name)
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
    store = prepare_cases(place)
    committed = Results.load(place.results)
    _check_name(place, committed)
    elsewhere = _other_results(place) if adopt else {}
    adopted: dict[str, Path] = {}  # by key: the results that hold it
    for folder, results in {place.results: committed, **elsewhere}.items() if adopt else ():
        adopted = dict.fromkeys(results.keys(store.classes), folder) | adopted
    todo = list(pending(place, only, set(adopted)))
    runs = counted(len({job.key for job in place.jobs}), "run")
    trained = sum(job.finished("train") for job in todo)
    done = f", {trained} of them trained already" if trained else ""
    print(f"  {len(store.index['cases'])} cases; {runs}, {len(todo)} to do{done}")
    tell_split(store)
    if left_out := len(store.index["rejected"]):
        print(f"  {left_out} cases were left out; the data page says which and why")
    for folder in dict.fromkeys(adopted.values()):
        mine = [j for j in place.jobs if adopted.get(j.key) == folder and not j.finished("evaluate")]
        if mine:
            print(f"  adopted from {folder}/: {', '.join(job.run.name for job in mine)}")
    if not (place.runs / "01-data.ipynb").exists() or read_json(place.runs / "data.json") != _data_key(place):
        execute(
            "01-data", place.runs / "01-data.ipynb", **notebook_parameters(place, RESULTS=str(place.results.parent))
        )
        write_json(place.runs / "data.json", _data_key(place))
    if slurm:
        print(f"  {submit(place, todo, slurm, device, tensorboard, adopt)}")
        print(f"  mlrpl status {place.given} shows where they stand, mlrpl cancel {place.given} takes them back")
        return {}
    said = "not finished" if report_only else "failed; the same command tries them again"
    if report_only:
        failures = _unfinished(todo)
    else:
        threads = max((job.run.settings.threads for job in todo), default=1)
        at_once = at_once or usual_jobs(device, threads)
        if todo:
            print(f"  on {device or _usual_device()}; runs at a time: {at_once}")
            if note := not_compiled(first_device(device), (job.run.settings.iterations for job in todo)):
                print(f"  {note}")
        failures = run_all(place, _free(todo), at_once, device, tensorboard)
    found = collect(place.jobs, committed, place.study.ablations, list(elsewhere.values()))
    if not len(found):
        _summary(failures, said)
        return failures
    state = _report_key(place, found)
    index = place.results / "index.html"
    if not todo and index.exists() and read_json(place.runs / "report.json") == {**state, "page": _source(index)}:
        print(f"  nothing to do: every run{' asked for' if only else ''} is finished and the report is up to date")
    else:
        print("  writing the report", flush=True)
        write_report(place, found, device)
        write_json(place.runs / "report.json", {**state, "page": _source(index)})  # git may bring back an older page
        _compare_with_committed(found, committed)
    if len(table := headline(found, place)):
        print(f"\n{tables.to_markdown(table)}")
    print(f"\nReport: {index}  ({duration(time.monotonic() - started)})")
    _summary(failures, said)
    return failures


def _usual_device() -> str:
    kind = parse_device().type
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


def _summary(failures: dict[str, str], said: str) -> None:
    if failures:
        print(f"\n{counted(len(failures), 'run')} {said}:")
        for name, reason in failures.items():
            print(f"  {name}: {reason}")


def _other_results(place: Workplace) -> dict[Path, Results]:
    """By folder: what other studies have beside this one's results, as far as it can be read."""
    found = {}
    for path in sorted(place.results.parent.glob("*/runs.csv")):
        if path.parent != place.results:
            with suppress(StudyError):
                found[path.parent] = Results.load(path.parent)
    return found


def _check_name(place: Workplace, committed: Results) -> None:
    """Results of a study of the package are not lost to another one that took its name along with its file."""
    if not len(committed) or place.study.name not in study_names() or is_packaged(place.given):
        return
    lost = sorted(set(committed.runs["key"]) - {job.key for job in place.jobs})
    if lost:
        raise StudyError(
            f"{place.results}/ holds {counted(len(lost), 'run')} that this study does not have: "
            f"{place.study.name} is the name of a study of the package; give yours a name of its own"
        )


def _compare_with_committed(found: Results, committed: Results) -> None:
    if not len(committed):
        return
    own = found.runs.loc[~found.runs["adopted"], IDENTITY].drop_duplicates()  # of a cross-validation's folds one
    rows = tables.difference(found.metrics.merge(own, on=IDENTITY), committed.metrics)
    rows = rows[rows["compared"] > 0]
    if len(rows):
        worst = rows.loc[rows["max"].idxmax()]
        print(
            f"\nAgainst the rows that were in results/: {int(rows['compared'].sum())} compared, mean |Δ Dice| "
            f"{np.average(rows['mean'], weights=rows['compared']):.3f} points, largest {worst['max']:.2f} "
            f"({worst['variant']}, {worst['labelled']} labelled, seed {worst['seed']})"
        )


# Whether a report is due.


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _source(*files: Path) -> list[str]:
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def _data_key(place: Workplace) -> dict[str, str]:
    """What 01-data depends on, and where it puts its figures; of the code all, since any of it may be imported."""
    sources = NOTEBOOKS / "01-data.ipynb", *sorted(PACKAGE.rglob("*.py"))
    settings = place.study.dataset.model_dump(), str(place.results.parent)
    return {"key": _hash([place.store.fingerprint, place.store.classes, settings, _source(*sources)])}


def _report_key(place: Workplace, found: Results) -> dict[str, str]:
    """What the report depends on: rows, the study's words, notebooks and templates, and with the data the code."""
    sources = [NOTEBOOKS / f"{name}.ipynb" for name in report_notebooks(place, found)]
    sources += sorted((PACKAGE / "templates").rglob("*.*"))
    if place.study.ablations_of:
        sources += sorted((place.results.parent / place.study.ablations_of).glob("*.csv"))
    runs = found.runs[["run", "key", "adopted"]].values.tolist()
    return {"key": _hash([runs, place.study.model_dump(), _data_key(place), _source(*sources)])}
