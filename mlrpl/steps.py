"""The steps of a study one at a time, in this process: prepare, train, evaluate, predict. `reproduce` does them all."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path

from tqdm import tqdm

from mlrpl import cost, tables
from mlrpl.comparison import headline
from mlrpl.compilation import not_compiled
from mlrpl.config import SLUG, study_names
from mlrpl.data import Store
from mlrpl.data.grid import other_voxels
from mlrpl.data_report import SPLITS
from mlrpl.devices import find_device, parse_device
from mlrpl.errors import StudyError
from mlrpl.locks import holder, locked
from mlrpl.prediction import NOTICE, predict
from mlrpl.proposal import have_sides, write_study
from mlrpl.results import Results, collect
from mlrpl.study import Workplace, alone, jobs_named
from mlrpl.training import progress_bar
from mlrpl.words import counted

RESULTS_SECONDS = 10  # another evaluation writes its rows in less


def prepare_study(name: str, source: str | None, runs: str, hardware: str | None = None) -> Store:
    """Make a study's case store; for a name that is no study yet, propose one from the data first.

    Args:
        name: of a study, or a new one.
        source: the data set's folder.
        runs: folder of runs.
        hardware: "cpu" or "cuda", what to propose for; default: what is here.

    Raises:
        StudyError: for a name that no study can have, and what is wrong with the data.
    """
    own = name not in study_names() and not name.endswith((".yaml", ".yml"))
    if own and not Path(f"{name}.yaml").exists():
        if source is None:
            raise StudyError(f"no study {name!r} yet: give your data, mlrpl prepare {name} --source DIR")
        if not re.match(SLUG, name):
            raise StudyError(f"{name!r} cannot be a study's name: take small letters, digits, - and _, as in 'mine'")
        with counting_bar("looking at the images", "case") as show:
            path = write_study(name, Path(source), hardware or parse_device().type, show)
        print(f"Wrote {path}: the proposed study. Look at it, and edit it before training.")
    place = Workplace(name, runs, data=source)
    for folder in place.runs.glob("*-????????"):
        if owner := holder(folder, "work."):
            raise StudyError(
                f"study {place.study.name}: process {owner.pid} on {owner.host} is at {folder.name}; "
                "wait for it or stop it before the cases are prepared anew"
            )
    store = prepare_cases(place)
    cases = store.index["cases"]
    labelled = sum(case["has_label"] for case in cases)
    print(f"{store.name}: {len(cases)} cases, {labelled} with a label; classes: {', '.join(store.classes)}")
    tell_split(store)
    for each in store.index["rejected"]:
        print(f"  left out: {each['problem']}")
    for advice in _advice(place):
        print(f"  {advice}")
    return store


def _advice(place: Workplace) -> Iterator[str]:
    """What is worth a second look in a study's data and settings."""
    study, store = place.study, place.store
    empty = [case["id"] for case in store.index["cases"] if case["has_label"] and case.get("highest") == 0]
    if empty:
        yield f"{counted(len(empty), 'label')} without any class, remove what is not drawn yet: {', '.join(empty[:5])}"
    usual = store.usual_spacing
    if usual is not None and (others := [c["id"] for c in store.index["cases"] if other_voxels(c["spacing"], usual)]):
        found = " × ".join(f"{side:.3g}" for side in usual)
        yield f"voxels are {found} mm in most cases, not in {', '.join(others[:5])}: set spacing: of the preparation"
    augmented = {name for run in study.runs() for name in run.settings.augmentation}
    if have_sides(store.classes) and "mirror" in augmented:  # flips are the published studies'
        yield "a class is of the left or the right, but training mirrors images: set augmentation: []"
    if study.folds:
        labelled = sum(case["has_label"] for case in store.index["cases"])
        there = labelled - ceil(labelled / study.folds)
        if (most := max(run.labelled for run in study.runs())) < there:
            yield f"each fold has {there} labelled cases to learn from and {most} are used: set labelled: {there}"
    try:
        now = {job.folder for job in place.jobs}
    except StudyError as error:
        yield f"before training: {error}"
        return
    stale = [path for path in place.runs.glob("*-????????/last.pt") if path.parent not in now]
    if stale:
        yield f"{counted(len(stale), 'trained run')} of other data or settings than now; mlrpl train makes new ones"


def prepare_cases(place: Workplace) -> Store:
    """Make a study's case store, or open the one that is there, with a bar."""
    with counting_bar("preparing", "case") as show:
        place.store = place.prepare(show)
    return place.store


def tell_split(store: Store) -> None:
    """Say so where the split was drawn from a seed."""
    if store.index["split"] == "seeded" and store.ids("test"):
        print(f"  the split is {SPLITS['seeded']}")


def cost_study(name: str, data: str | None, only: str | None, device: str | None, runs: str) -> list[cost.Cost]:
    """Measure what each run of a study takes here, and print it line by line as it is known."""
    place = Workplace(name, runs, data=data)
    prepare_cases(place)
    if note := not_compiled(find_device(device), (job.run.settings.iterations for job in jobs_named(place, only))):
        print(f"{note}\n")
    print(
        "A few steps and windows of each kind of run: seconds each, on a CPU at the size of `la` minutes.\n", flush=True
    )
    print(cost.HEAD, flush=True)
    found = []
    for each in cost.costs(place, only, device):
        print(cost.line(each), flush=True)
        found.append(each)
    print(f"\n{cost.total(found, find_device(device))}")
    return found


def train_study(name: str, only: str | None, device: str | None, runs: str) -> None:
    """Train a study's runs one after the other, each from its checkpoint; finished ones are skipped."""
    place = Workplace(name, runs)
    todo = []
    for job in jobs_named(place, only):
        if job.finished("train"):
            print(f"{job.run.name}: trained already")
        else:
            todo.append(job)
    if len(todo) > 1:
        print(f"{len(todo)} runs to train, one after the other; mlrpl cost {place.given} tells how long they take")
    for job in todo:
        with alone(job), progress_bar(job.run) as watch:
            place.train(job.run.name, device, watch)
    print(f"All are trained: mlrpl evaluate {place.given} measures them")


def evaluate_study(name: str, only: str | None, device: str | None, runs: str, results: str) -> Results:
    """Measure the trained runs on their test cases, print the means and write the rows into <results>/<study>."""
    place = Workplace(name, runs, results)
    jobs = [job for job in jobs_named(place, only) if job.finished("train")]
    if not jobs:
        raise StudyError(f"study {place.study.name}: no run is trained yet; mlrpl train {name} does it")
    for job in jobs:
        with alone(job), counting_bar(job.run.name, "case") as show:
            place.evaluate(job.run.name, device, show)
    busy = f"study {place.study.name}: another process is reproducing it, and will write these rows into its report"
    with locked(place.runs, busy, wait=RESULTS_SECONDS):
        committed = Results.load(place.results)
        collect(place.jobs, committed, place.study.ablations).save(place.results)  # others keep their rows
    found = collect(jobs, committed)
    print(tables.to_markdown(headline(found, place)))
    if len(place.store.classes) > 2:
        print(tables.to_markdown(tables.by_class(found.metrics, found.runs, place.study.distances)))
    if untrained := [job.run.name for job in jobs_named(place, only) if not job.finished("train")]:
        print(f"Not trained yet, so not in these means: {', '.join(untrained)}")
    print(f"Rows: {place.results / 'metrics.csv'}")
    return found


def predict_images(
    run: str, images: list[str], output: str, device: str | None, runs: str, **options: bool
) -> dict[str, str]:
    """Predict images with a trained run; returns the problem of each image that was not predicted."""
    bars, notes = [], []

    def bar(name: str) -> Callable[[int, int], None]:
        for finished in bars:
            finished.close()
        bars.append(tqdm(desc=name, unit="window", file=sys.stderr))
        return lambda done, total: _show(bars[-1], done, total)

    try:
        problems = predict(
            run,
            [Path(i) for i in images],
            Path(output),
            runs=runs,
            device=find_device(device),
            bar=bar,
            note=notes.append,
            **options,
        )
    finally:
        for each in bars:
            each.close()
    for note in notes:
        print(note, file=sys.stderr)
    for name, problem in problems.items():
        print(f"{name}: {problem}", file=sys.stderr)
    print(f"{len(bars) - len(problems)} of {len(bars)} images predicted, in {output}. {NOTICE}")
    return problems


@contextmanager
def counting_bar(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, gone at the end; yields what tells it (done, of)."""
    with tqdm(desc=what, unit=unit, leave=False, disable=None) as bar:
        yield lambda done, total: _show(bar, done, total)


def _show(bar: tqdm, done: int, total: int) -> None:
    bar.total, bar.n = total, done
    bar.refresh()
