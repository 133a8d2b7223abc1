"""A study at a place: the grid of its runs, what of them is finished, and what the notebooks call.

Folders, relative to where the command is typed:

    runs/stores/<dataset>-<hash>/                     case stores, shared by studies
    runs/<study>/<variant>-<labelled>-s<seed>-<key>/  all that one run makes; provenance.json says what is finished
    results/<study>/                                  rows, tables, figures and pages, to be committed

A run is executed by a process of its own (`mlrpl.workers`), which executes two notebooks (`mlrpl.execution`).
"""

import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mlrpl import own_code
from mlrpl.config import Run, Study, load_study, study_file
from mlrpl.data import Store, prepare
from mlrpl.devices import find_device
from mlrpl.errors import StudyError
from mlrpl.evaluation import evaluate, set_weights
from mlrpl.files import read_json, read_rows, remove_temporary, write_json, write_text
from mlrpl.locks import locked
from mlrpl.memory import exhaustion_explained
from mlrpl.methods import METHODS, Method, build, find_method, result_version
from mlrpl.precision import Precision, to_predict_in
from mlrpl.rows import SELECTIONS
from mlrpl.training import Progress, Trainer, load, make_method, split_training

STAGES = {"train": "02-train", "evaluate": "03-evaluate"}  # of a run, with the notebooks that do them
EVALUATION_VERSION = 3  # raise when evaluation changes what it writes
ORPHAN_SECONDS = 30  # within it a kernel whose parent was killed has ended


def relative(path: str) -> str:
    """An absolute path as seen from here: notebooks and pages show it, and must not name this machine's folders."""
    return os.path.relpath(path) if Path(path).is_absolute() else path


@dataclass(frozen=True)
class Job:
    """A run of a study with its key and folder."""

    run: Run
    key: str
    folder: Path
    distances: str
    classes: tuple[str, ...]

    @property
    def provenance(self) -> dict[str, Any]:
        """What provenance.json says; {} for a run that has finished nothing."""
        return read_json(self.folder / "provenance.json")

    def finished(self, stage: str) -> bool:
        """Whether "train" or "evaluate" is done and its files are there."""
        files = {"train": ["last.pt", "published.pt", "log.csv", "checks.csv"], "evaluate": ["metrics.csv"]}[stage]
        facts = self.provenance.get(stage, {})
        done = facts.get("key") == self.stage_key(stage)
        if stage == "evaluate":  # whose rows name the classes; older records say nothing of them
            done = done and facts.get("classes", list(self.classes)) == list(self.classes)
        return done and all((self.folder / name).exists() for name in files)

    @property
    def complete(self) -> bool:
        """Whether both are done."""
        return self.finished("train") and self.finished("evaluate")

    @property
    def executed(self) -> bool:
        """Whether both are done and their notebooks are there: nothing is left for `mlrpl reproduce`."""
        return self.complete and all((self.folder / f"{notebook}.ipynb").exists() for notebook in STAGES.values())

    def stage_key(self, stage: str) -> str:
        """The run's key; evaluation's also names how it was measured."""
        return self.key if stage == "train" else f"{self.key}/{self.distances}/{EVALUATION_VERSION}"

    def record(self, stage: str, **facts: Any) -> None:
        """Write a finished stage into provenance.json."""
        write_json(
            self.folder / "provenance.json",
            {**self.provenance, "run": self.run.name, stage: {"key": self.stage_key(stage), **facts}},
        )


class Workplace:
    """A study at a place: where its runs and results lie.

    Args:
        study: name, or path of a .yaml file.
        runs: folder of runs.
        results: folder of results.
        data: the data set's own folder; None where a store is there already or the study draws its data.
    """

    def __init__(self, study: str, runs: str = "runs", results: str = "results", data: str | None = None) -> None:
        self.given = relative(study)
        self.study: Study = load_study(study)
        self.beside = study_file(study).resolve().parent  # the study's file: where methods of one's own are found
        self.root = Path(relative(runs))
        self.runs = self.root / self.study.name
        self.results = Path(relative(results)) / self.study.name
        self.data = Path(data) if data else None

    @property
    def at_hand(self) -> bool:
        """Whether the case store has been prepared here."""
        return (self._store_folder / "store.json").exists()

    def elsewhere(self, root: Path) -> "Workplace":
        """The same study and data with runs in another folder."""
        other = Workplace(self.given, str(root), str(self.results.parent))
        other.store = self.store
        return other

    @property
    def _store_folder(self) -> Path:
        dataset = self.study.dataset
        settings = json.dumps(dataset.model_dump(mode="json"), sort_keys=True)
        return self.root / "stores" / f"{dataset.name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"

    def prepare(self, progress: Callable[[int, int], None] | None = None) -> Store:
        """Make the case store, or open the one that is there."""
        return prepare(self.study.dataset, self.data, self._store_folder, progress)

    @cached_property
    def store(self) -> Store:
        """The case store."""
        return self.prepare()

    def data_of(self, run: Run) -> Store:
        """The case store as a run sees it: of a cross-validation's fold, its held-out cases as test cases."""
        return self.store if run.fold is None else self.store.fold(run.fold, self.study.folds)

    @cached_property
    def jobs(self) -> list[Job]:
        """All runs in the study's order; checked against data and methods, so that nothing fails hours later.

        Raises:
            StudyError: for an unknown method or option, more labelled cases than there are, no test cases, or mm
                without spacing.
        """
        own_code.look_in(self.beside)  # another study may have been read since
        if self.study.distances == "mm" and not self.store.real_spacing:
            raise StudyError(f"study {self.study.name}: {self.store.name} has no known spacing: set distances: voxels")
        if not (self.study.folds or self.store.ids("test")):
            raise StudyError(f"study {self.study.name}: {self.store.name} has no test case: set folds, or 'test' cases")
        jobs: list[Job] = []
        built: set[str] = set()  # building a network takes a moment, and seeds share it
        folders: dict[str, Path] = {folder.name[-8:]: folder for folder in self.runs.glob("*-????????")}
        elsewhere: dict[str, list[Path]] = defaultdict(list)
        for found in sorted(self.root.glob("*/*-????????")):
            elsewhere[found.name[-8:]].append(found)
        for run in self.study.runs():
            method = find_method(run.method)
            audited, (_, unlabelled) = bool(run.audit_every), method.batch_sizes(run.settings)
            if (network := repr((run.method, run.options, run.settings, audited))) not in built:
                network_of_run = build(run, self.store.channels, len(self.store.classes)).network
                decoders = getattr(network_of_run, "decoders", (None,))  # a network of one's own may have none
                if audited and (len(decoders) < 2 or not unlabelled):
                    lacking = "no unlabelled volumes" if len(decoders) > 1 else "one decoder"
                    raise StudyError(
                        f"study {self.study.name}: {run.variant} has {lacking}, so there is nothing to audit"
                    )
                built.add(network)
            data = self.data_of(run)
            split_training(run, data, unlabelled > 0)
            key = run.key(
                data.fingerprint,
                result_version(method),
                method.options(),
                method.unused_settings,
                self.store.unseen_classes,
            )
            # One key, one folder: runs that coincide share it, whatever the first of them was called.
            folder = folders.setdefault(key[:8], self.runs / f"{run.name}-{key[:8]}")
            job = Job(run, key, folder, self.study.distances, self.store.classes)
            if not folder.exists():  # another study's will do, if finished: so no two write into one folder
                others = (replace(job, folder=other) for other in elsewhere[key[:8]])
                usable = (o for o in others if o.complete and (not audited or (o.folder / "audit.csv").exists()))
                job = next(usable, job)
            jobs.append(job)
        return jobs

    def job(self, name: str, key: str | None = None) -> Job:
        """The run of that name.

        Args:
            name: of the run.
            key: what another process, which this one is a part of, took for its key.

        Raises:
            StudyError: if the study has none, or it has another key by now.
        """
        for job in self.jobs:
            if job.run.name == name:
                if key is not None and key != job.key:
                    raise StudyError(
                        f"run {name}: the study's file, its data or the method's code has changed since this command "
                        "began; undo it, or type the command again to train it as it is now"
                    )
                return job
        raise StudyError(
            f"study {self.study.name} has no run {name!r}: it has {', '.join(j.run.name for j in self.jobs)}"
        )

    # What the notebooks call.

    def train(
        self,
        name: str,
        device: str | None = None,
        watch: Callable[[Progress], None] | None = None,
        tensorboard: bool = False,
    ) -> Job:
        """Train a run to its end, from its checkpoint where there is one; nothing is done for a finished one.

        Raises:
            StudyError: where another process is at this run, memory runs out, or the loss is not finite.
            StoppedError: on Ctrl-C, when the checkpoint is written.
        """
        job = self.job(name)
        with self._working(job):
            if not job.finished("train"):
                write_json(job.folder / "config.json", {"key": job.key, **job.run.model_dump(mode="json")})
                data = self.data_of(job.run)
                for path, text in self.own_code(job.run.method).items():
                    write_text(job.folder / "code" / path, text)
                trainer = Trainer(job.run, data, job.folder, job.key, find_device(device), tensorboard)
                facts = trainer.train(watch)
                job.record("train", data=data.fingerprint, threads=job.run.settings.threads, **facts)
            (job.folder / "checkpoint.pt").unlink(missing_ok=True)  # the largest file, of no more use
        return job

    def own_code(self, method: str) -> dict[Path, str]:
        """Code of a method by path from the study's file; empty for one of the package."""
        own_code.look_in(self.beside)
        return {} if method in METHODS else own_code.texts(find_method(method))

    @contextmanager
    def _working(self, job: Job) -> Iterator[None]:
        """The run's own files are written by one process at a time, be it a notebook of `reproduce` or one by hand."""
        own_code.look_in(self.beside)
        job.folder.mkdir(parents=True, exist_ok=True)
        busy = f"run {job.run.name}: another process is at it"
        with locked(job.folder, busy, "work.", ORPHAN_SECONDS), exhaustion_explained(f"run {job.run.name}"):
            yield

    def evaluate(
        self, name: str, device: str | None = None, watch: Callable[[int, int], None] | None = None
    ) -> pd.DataFrame:
        """Measure a trained run on the test cases; returns the rows. Raises what `train` raises.

        `watch` is called with (done, of) cases.
        """
        job = self.job(name)
        with self._working(job):
            if not job.finished("evaluate"):
                place = find_device(device)
                data = self.data_of(job.run)
                method = make_method(job.run, data, place)
                started = time.monotonic()
                weights = {selection: load(job.folder / f"{selection}.pt", place) for selection in SELECTIONS}
                evaluate(job.run, data, method, weights, job.folder, self.study.distances, place, watch)
                seconds = round(time.monotonic() - started, 1)
                job.record("evaluate", seconds=seconds, classes=list(job.classes))
        return read_rows(job.folder / "metrics.csv")


@contextmanager
def alone(job: Job) -> Iterator[None]:
    """Hold a run's folder, without what a killed process left half-written there.

    A notebook by hand may be at the run's own files all the same: it holds the lock of `Workplace._working` alone.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    busy = f"run {job.run.name}: another process is at it"
    with locked(job.folder, busy):
        with locked(job.folder, busy, "work.", ORPHAN_SECONDS):
            remove_temporary(job.folder)
        yield


def trained(job: Job, store: Store, device: torch.device) -> tuple[Method, Precision]:
    """A method with the run's final weights, ready to predict, and the precision to do so in.

    Raises:
        StudyError: where they cannot be read, or are not those of this network.
    """
    method = make_method(job.run, store, device)
    content = load(job.folder / "last.pt", device)
    set_weights(method, content, job.run)
    return method.eval(), to_predict_in(content["precision"], device)


def jobs_named(place: Workplace, only: str | None) -> list[Job]:
    """Jobs whose run's name holds one of the texts, which commas separate, as whole parts; all without any.

    "vnet-8" is in "vnet-8-s0" but not in "vnet-80-s0".

    Raises:
        StudyError: if there is none.
    """
    if not only:
        return place.jobs
    texts = [text for part in only.split(",") if (text := part.strip(" -"))]
    jobs = [job for job in place.jobs if any(f"-{text}-" in f"-{job.run.name}-" for text in texts)]
    if not jobs:
        known = ", ".join(dict.fromkeys(f"{job.run.variant}-{job.run.labelled}" for job in place.jobs))
        raise StudyError(f"study {place.study.name} has no run with {only!r} in its name: it has {known}")
    return jobs


def one_a_key(jobs: Iterable[Job]) -> list[Job]:
    """Of jobs whose runs coincide the first."""
    first: dict[str, Job] = {}
    for job in jobs:
        first.setdefault(job.key, job)
    return list(first.values())


def first_seeds(jobs: Sequence[Job]) -> list[Job]:
    """The first seed of every variant and number of labelled cases."""
    first: dict[tuple[str, int], Job] = {}
    for job in jobs:
        first.setdefault((job.run.variant, job.run.labelled), job)
    return list(first.values())


def pending(place: Workplace, only: str | None, adopted: set[str]) -> Iterator[Job]:
    """Jobs that are asked for and not finished; runs that coincide are one job.

    Args:
        place: the study.
        only: see `jobs_named`.
        adopted: keys of committed results that count as finished.
    """
    for job in one_a_key(jobs_named(place, only)):
        if not job.executed and job.key not in adopted:
            yield job
