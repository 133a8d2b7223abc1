"""A study from settings to report: the grid of runs, what is finished, and the notebooks that do the work.

Folders, relative to where the command is typed:

    runs/stores/<dataset>-<hash>/                     case stores, shared by studies
    runs/<study>/<variant>-<labelled>-s<seed>-<key>/  all that one run makes; provenance.json says what is finished
    results/<study>/                                  rows, tables, figures and pages, to be committed

A run is executed by a process of its own (`mlrpl run`), which executes two notebooks with papermill, 02-train and
03-evaluate; `reproduce` starts these processes and watches their progress.json.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout
from tqdm import tqdm

from mlrpl.config import Run, Study, load_study
from mlrpl.data import Store, prepare
from mlrpl.errors import StudyError
from mlrpl.evaluation import SELECTIONS, evaluate
from mlrpl.files import atomic, read_json, write_json
from mlrpl.methods import build, find_method
from mlrpl.training import Progress, Trainer, find_device, load, make_method, split_training

PACKAGE = Path(__file__).parent
NOTEBOOKS = PACKAGE.parent / "notebooks"
EVALUATION_VERSION = 1  # raise when evaluation changes what it writes
POLL_SECONDS = 0.5


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

    @property
    def provenance(self) -> dict[str, Any]:
        """What provenance.json says; {} for a run that has finished nothing."""
        return read_json(self.folder / "provenance.json")

    def finished(self, stage: str) -> bool:
        """Whether "train" or "evaluate" is done and its files are there."""
        files = {"train": ["last.pt", "published.pt", "log.csv", "checks.csv"], "evaluate": ["metrics.csv"]}[stage]
        done = self.provenance.get(stage, {}).get("key") == self.stage_key(stage)
        return done and all((self.folder / name).exists() for name in files)

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
        self.root = Path(relative(runs))
        self.runs = self.root / self.study.name
        self.results = Path(relative(results)) / self.study.name
        self.data = Path(data) if data else None

    def prepare(self, progress: Callable[[int, int], None] | None = None) -> Store:
        """Make the case store, or open the one that is there."""
        dataset = self.study.dataset
        settings = json.dumps(dataset.model_dump(mode="json"), sort_keys=True)
        folder = self.root / "stores" / f"{dataset.name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
        return prepare(dataset, self.data, folder, progress)

    @cached_property
    def store(self) -> Store:
        """The case store."""
        return self.prepare()

    @cached_property
    def jobs(self) -> list[Job]:
        """All runs in the study's order; checked against data and methods, so that nothing fails hours later.

        Raises:
            StudyError: for an unknown method or option, more labelled cases than there are, or mm without spacing.
        """
        if self.study.distances == "mm" and not self.store.real_spacing:
            raise StudyError(f"study {self.study.name}: {self.store.name} has no known spacing: set distances: voxels")
        jobs: list[Job] = []
        folders: dict[str, Path] = {}
        for run in self.study.runs():
            method = find_method(run.method)
            network = build(run, self.store.channels, len(self.store.classes)).network
            if run.audit_every and len(network.decoders) < 2:
                raise StudyError(
                    f"study {self.study.name}: {run.variant} has one decoder, so there is nothing to audit"
                )
            split_training(run, self.store, method.uses_unlabelled)
            key = run.key(self.store.fingerprint, method.result_version, method.options(), method.unused_settings)
            # One key, one folder: runs that coincide share it, whatever the first of them was called.
            folder = folders.get(key) or next(self.runs.glob(f"*-{key[:8]}"), self.runs / f"{run.name}-{key[:8]}")
            folders[key] = folder
            jobs.append(Job(run, key, folder, self.study.distances))
        return jobs

    def job(self, name: str) -> Job:
        """The run of that name.

        Raises:
            StudyError: if the study has none.
        """
        for job in self.jobs:
            if job.run.name == name:
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
        """Train a run to its end, from its checkpoint where there is one; nothing is done for a finished one."""
        job = self.job(name)
        if not job.finished("train"):
            job.folder.mkdir(parents=True, exist_ok=True)
            write_json(job.folder / "config.json", {"key": job.key, **job.run.model_dump(mode="json")})
            trainer = Trainer(job.run, self.store, job.folder, job.key, find_device(device), tensorboard)
            facts = trainer.train(watch)
            job.record("train", data=self.store.fingerprint, threads=job.run.settings.threads, **facts)
        return job

    def evaluate(self, name: str, device: str | None = None) -> pd.DataFrame:
        """Measure a trained run on the test cases; returns the rows."""
        job = self.job(name)
        if not job.finished("evaluate"):
            place = find_device(device)
            method = make_method(job.run, self.store, place)
            started = time.monotonic()
            weights = {selection: load(job.folder / f"{selection}.pt", place) for selection in SELECTIONS}
            evaluate(job.run, self.store, method, weights, job.folder, self.study.distances, place)
            job.record("evaluate", seconds=round(time.monotonic() - started, 1))
        return pd.read_csv(job.folder / "metrics.csv")


# Executing notebooks.


def execute(notebook: str, destination: Path, **parameters: Any) -> None:
    """Execute a notebook of the study with papermill; `destination` appears only when all its cells have run.

    Raises:
        StudyError: with the notebook's own message where a cell fails; the failed notebook is kept as *.failed.ipynb.
    """
    import papermill  # here, since training alone does not need it
    from papermill.exceptions import PapermillExecutionError

    source = NOTEBOOKS / f"{notebook}.ipynb"
    if not source.exists():
        raise StudyError(
            f"notebooks/{notebook}.ipynb is missing: run from a clone of the repository, installed with pip -e"
        )
    failed = destination.with_suffix(".failed.ipynb")
    with atomic(destination) as partial:
        working = partial.with_name(f"{partial.name}.ipynb")
        try:
            shutil.copyfile(source, working)  # papermill notes where a notebook came from
            papermill.execute_notebook(
                str(working),
                str(working),
                parameters=parameters,
                kernel_name="python3",
                progress_bar=False,
                log_output=False,
                start_timeout=300,  # a busy machine takes its time
                extra_arguments=["--IPKernelApp.log_level=ERROR"],
            )
            working.replace(partial)
            failed.unlink(missing_ok=True)
        except PapermillExecutionError as error:
            working.replace(failed)
            reason = error.evalue if error.ename == "StudyError" else f"{error.ename}: {error.evalue}"
            raise StudyError(f"{reason.splitlines()[0]} (see {failed.name})") from None
        except RuntimeError as error:  # the kernel died
            raise StudyError(f"{notebook}: {str(error).splitlines()[0]}; out of memory?") from None
        finally:
            working.unlink(missing_ok=True)


def execute_run(place: Workplace, name: str, device: str | None, tensorboard: bool = False) -> None:
    """What `mlrpl run` does: the two notebooks of one run, each only where needed.

    Raises:
        StudyError: where another process is at this run, or a notebook fails.
    """
    job = place.job(name)
    job.folder.mkdir(parents=True, exist_ok=True)
    common = notebook_parameters(place, RUN=name, DEVICE=device)
    stages = {"train": ("02-train", {**common, "TENSORBOARD": tensorboard}), "evaluate": ("03-evaluate", common)}
    try:
        with FileLock(job.folder / ".lock", timeout=0):
            remove_temporary(job.folder)
            for stage, (notebook, parameters) in stages.items():
                if not (job.finished(stage) and (job.folder / f"{notebook}.ipynb").exists()):
                    execute(notebook, job.folder / f"{notebook}.ipynb", **parameters)
    except Timeout:
        raise StudyError(f"run {name}: another process is training it") from None


def notebook_parameters(place: Workplace, **more: Any) -> dict[str, Any]:
    """The parameters that all notebooks share, and more."""
    return {"STUDY": place.given, "RUNS": str(place.root), **more}


# Watching over many.


@dataclass
class _Worker:
    job: Job
    process: subprocess.Popen[bytes]
    bar: tqdm
    started: float

    def show(self) -> None:
        progress = read_json(self.job.folder / "progress.json")
        if progress.get("iteration", 0) >= self.bar.n:
            self.bar.n = progress.get("iteration", 0)
            if self.bar.n == self.bar.total:
                self.bar.set_description_str(f"{self.job.run.name} (evaluating)", refresh=False)
            if "loss" in progress:
                self.bar.set_postfix_str(f"loss {progress['loss']:.3f}, Dice {progress['dice']:.2f}", refresh=False)
            self.bar.refresh()


def run_all(
    place: Workplace, jobs: list[Job], at_once: int, device: str | None, tensorboard: bool = False
) -> dict[str, str]:
    """Execute the jobs, `at_once` at a time; goes on after a failure.

    Returns:
        The reason of each failed run.
    """
    waiting, working, failures = list(jobs), [], {}
    slots = list(range(max(at_once, 1)))
    try:
        while waiting or working:
            while waiting and slots:
                working.append(_start(place, waiting.pop(0), device, tensorboard, slots.pop(0)))
            time.sleep(POLL_SECONDS)
            for worker in list(working):
                worker.show()
                if worker.process.poll() is None:
                    continue
                working.remove(worker)
                slots.append(worker.bar.pos if worker.bar.pos >= 0 else -worker.bar.pos)
                worker.bar.close()
                minutes = (time.monotonic() - worker.started) / 60
                if worker.process.returncode == 0:
                    tqdm.write(f"  {worker.job.run.name}: finished in {minutes:.1f} min")
                else:
                    failures[worker.job.run.name] = _last_line(worker.job.folder / "worker.log")
                    tqdm.write(f"  {worker.job.run.name}: FAILED: {failures[worker.job.run.name]}")
    finally:
        for worker in working:  # Ctrl-C: the runs resume from their checkpoints
            worker.process.terminate()
            worker.bar.close()
    return failures


def _start(place: Workplace, job: Job, device: str | None, tensorboard: bool, slot: int) -> _Worker:
    job.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mlrpl", "run", place.given, job.run.name, "--runs", str(place.root)]
    command += ["--parent", str(os.getpid())]
    command += ["--tensorboard"] * tensorboard
    if device:
        command += ["--device", device]
    threads = str(job.run.settings.threads)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
    }
    with (job.folder / "worker.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, stdin=subprocess.DEVNULL
        )
    if not sys.stderr.isatty():
        print(f"  {job.run.name}: started", flush=True)
    bar = tqdm(
        total=job.run.settings.iterations,
        desc=job.run.name,
        position=slot,
        leave=False,
        disable=not sys.stderr.isatty(),
        bar_format="  {desc:<24} {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {postfix}",
    )
    return _Worker(job, process, bar, time.monotonic())


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("mlrpl: ") if lines else "it ended without a word"


def pending(place: Workplace, only: str | None, adopted: set[str]) -> Iterator[Job]:
    """Jobs that are asked for and not finished; runs that coincide are one job.

    Args:
        place: the study.
        only: texts separated by commas, one of which the run's name must hold.
        adopted: keys of committed results that count as finished.
    """
    seen = set(adopted)
    for job in place.jobs:
        if only and not any(text in job.run.name for text in only.split(",")):
            continue
        if job.key in seen:
            continue
        seen.add(job.key)
        if not all(job.finished(stage) and (job.folder / name).exists() for stage, name in STAGES):
            yield job


STAGES = (("train", "02-train.ipynb"), ("evaluate", "03-evaluate.ipynb"))


def remove_temporary(folder: Path) -> None:
    """Files that a killed process left half-written; called where nobody writes."""
    for path in folder.glob(".*.partial*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
