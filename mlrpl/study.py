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
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from mlrpl.config import Run, Study, load_study
from mlrpl.data import Store, prepare
from mlrpl.errors import StoppedError, StudyError
from mlrpl.evaluation import SELECTIONS, evaluate
from mlrpl.files import atomic, read_json, remove_temporary, write_json
from mlrpl.interrupt import passed_on, stop_requests
from mlrpl.locks import locked
from mlrpl.memory import ADVICE, exhaustion_explained
from mlrpl.methods import build, find_method, result_version
from mlrpl.process import MALLOC, import_jsonschema
from mlrpl.training import Progress, Trainer, find_device, load, make_method, name_device, split_training
from mlrpl.words import duration

PACKAGE = Path(__file__).parent
NOTEBOOKS = PACKAGE.parent / "notebooks"
WORKER_LOG = "worker.log"
EVALUATION_VERSION = 3  # raise when evaluation changes what it writes
POLL_SECONDS = 0.5
MOST_JOBS = 4  # at a time on a CPU, unless more are asked for
ORPHAN_SECONDS = 30  # within it a kernel whose parent was killed has ended
FINISHING_SECONDS = 120  # for checkpoints, after a request to stop


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

    @property
    def complete(self) -> bool:
        """Whether both are done."""
        return self.finished("train") and self.finished("evaluate")

    @property
    def executed(self) -> bool:
        """Whether both are done and their notebooks are there: nothing is left for `mlrpl reproduce`."""
        return self.complete and all((self.folder / notebook).exists() for _, notebook in STAGES)

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
                decoders = build(run, self.store.channels, len(self.store.classes)).network.decoders
                if audited and (len(decoders) < 2 or not unlabelled):
                    lacking = "no unlabelled volumes" if len(decoders) > 1 else "one decoder"
                    raise StudyError(
                        f"study {self.study.name}: {run.variant} has {lacking}, so there is nothing to audit"
                    )
                built.add(network)
            data = self.data_of(run)
            split_training(run, data, unlabelled > 0)
            key = run.key(data.fingerprint, result_version(method), method.options(), method.unused_settings)
            # One key, one folder: runs that coincide share it, whatever the first of them was called.
            folder = folders.setdefault(key[:8], self.runs / f"{run.name}-{key[:8]}")
            job = Job(run, key, folder, self.study.distances)
            if not folder.exists():  # another study's will do, if finished: so no two write into one folder
                others = (replace(job, folder=other) for other in elsewhere[key[:8]])
                usable = (o for o in others if o.complete and (not audited or (o.folder / "audit.csv").exists()))
                job = next(usable, job)
            jobs.append(job)
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
                trainer = Trainer(job.run, data, job.folder, job.key, find_device(device), tensorboard)
                facts = trainer.train(watch)
                job.record("train", data=data.fingerprint, threads=job.run.settings.threads, **facts)
        return job

    @contextmanager
    def _working(self, job: Job) -> Iterator[None]:
        """The run's own files are written by one process at a time, be it a notebook of `reproduce` or one by hand."""
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
                job.record("evaluate", seconds=round(time.monotonic() - started, 1))
        return pd.read_csv(job.folder / "metrics.csv")


# Executing notebooks.


def execute(notebook: str, destination: Path, **parameters: Any) -> None:
    """Execute a notebook of the study with papermill; `destination` appears only when all its cells have run.

    Raises:
        StudyError: with the notebook's own message where a cell fails; the failed notebook is kept as *.failed.ipynb.
        StoppedError: where the notebook ended on request.
    """
    import_jsonschema()
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
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # what goes wrong in a cell is in the notebook
            )
            working.replace(partial)
            failed.unlink(missing_ok=True)
        except PapermillExecutionError as error:
            if error.ename in (StoppedError.__name__, KeyboardInterrupt.__name__):
                raise StoppedError(error.evalue or f"{notebook}: interrupted; the same command goes on") from None
            working.replace(failed)
            reason = error.evalue if error.ename == "StudyError" else f"{error.ename}: {error.evalue}"
            raise StudyError(f"{reason.splitlines()[0]} (see {failed.name})") from None
        except RuntimeError as error:  # the kernel died
            raise StudyError(f"{notebook}: {str(error).splitlines()[0]}; if for want of memory: {ADVICE}") from None
        finally:
            working.unlink(missing_ok=True)


def execute_run(place: Workplace, name: str, device: str | None, tensorboard: bool = False) -> None:
    """What `mlrpl run` does: the two notebooks of one run, each only where needed.

    Raises:
        StudyError: where another process is at this run, or a notebook fails.
        StoppedError: on Ctrl-C or SIGTERM; training has finished its checkpoint then.
    """
    with stop_requests() as asked, passed_on(asked):
        try:
            _execute_run(place, place.job(name), device, tensorboard)
        except (Exception, KeyboardInterrupt) as error:
            if not asked.is_set() or isinstance(error, StoppedError):
                raise
            raise StoppedError(f"run {name}: interrupted; the same command goes on from its checkpoint") from None


def _execute_run(place: Workplace, job: Job, device: str | None, tensorboard: bool) -> None:
    name = job.run.name
    job.folder.mkdir(parents=True, exist_ok=True)
    common = notebook_parameters(place, RUN=name, DEVICE=device)
    stages = {"train": ("02-train", {**common, "TENSORBOARD": tensorboard}), "evaluate": ("03-evaluate", common)}
    with locked(job.folder, f"run {name}: another process is training it"):
        with locked(job.folder, f"run {name}: another process is at it", "work.", ORPHAN_SECONDS):
            remove_temporary(job.folder)
        for stage, (notebook, parameters) in stages.items():
            if not (job.finished(stage) and (job.folder / f"{notebook}.ipynb").exists()):
                execute(notebook, job.folder / f"{notebook}.ipynb", **parameters)


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
    slot: int

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

    Raises:
        KeyboardInterrupt: on Ctrl-C, when the runs have finished their checkpoints.
    """
    waiting, working, failures = list(jobs), [], {}
    devices = share_devices(device, max(at_once, 1))
    slots = list(range(max(at_once, 1)))
    try:
        while waiting or working:
            while waiting and slots:
                slot = slots.pop(0)
                working.append(_start(place, waiting.pop(0), devices[slot], tensorboard, slot))
            time.sleep(POLL_SECONDS)
            for worker in list(working):
                worker.show()
                if worker.process.poll() is None:
                    continue
                working.remove(worker)
                slots.append(worker.slot)
                worker.bar.close()
                took = duration(time.monotonic() - worker.started)
                if worker.process.returncode == 0:
                    tqdm.write(f"  {worker.job.run.name}: finished in {took}")
                else:
                    failures[worker.job.run.name] = last_line(worker.job.folder / WORKER_LOG)
                    tqdm.write(f"  {worker.job.run.name}: FAILED: {failures[worker.job.run.name]}")
    except KeyboardInterrupt:
        _finish(working)
        raise
    finally:
        for worker in working:
            worker.process.kill()
            worker.bar.close()
    return failures


def _finish(working: list[_Worker]) -> None:
    """Ask the runs to end and wait for their checkpoints; a second Ctrl-C does not wait."""
    for worker in working:
        worker.process.terminate()
        worker.bar.close()
    if working:
        print("\n  interrupted: the runs finish their checkpoints (Ctrl-C again: end at once)", flush=True)
    deadline = time.monotonic() + FINISHING_SECONDS
    for worker in working:
        with suppress(subprocess.TimeoutExpired):
            worker.process.wait(max(0.0, deadline - time.monotonic()))
            print(f"  {last_line(worker.job.folder / WORKER_LOG)}", flush=True)


def usual_jobs(device: str | None, threads: int) -> int:
    """Runs at a time where nobody says: one a GPU, or what the cores suffice for, at most four for the memory's sake.

    Args:
        device: as typed.
        threads: of a run.
    """
    named = device.split(",") if device else []
    if name_device(named[0] if named else None).type == "cuda":
        return torch.cuda.device_count() if named in ([], ["cuda"]) else len(named)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // threads, MOST_JOBS))


def share_devices(device: str | None, at_once: int) -> list[str | None]:
    """The device of each of the runs that go on at a time: every GPU in turn where none or just "cuda" is asked for.

    Args:
        device: as typed; several may be named, separated by commas.
        at_once: runs at a time.
    """
    given: list[str | None] = list(device.split(",")) if device else [None]
    if given in ([None], ["cuda"]) and (count := torch.cuda.device_count()) > 1:
        given = [f"cuda:{number}" for number in range(count)]
    return [given[slot % len(given)] for slot in range(at_once)]


def command_line(command: str, place: Workplace, *arguments: str) -> list[str]:
    """`mlrpl COMMAND STUDY …` in this interpreter, for this place's runs."""
    return [sys.executable, "-m", "mlrpl", command, place.given, *arguments, "--runs", str(place.root)]


def run_command(place: Workplace, job: Job, device: str | None, tensorboard: bool) -> list[str]:
    """The command line that executes one run, here or in a scheduler's job."""
    options = [*(["--device", device] if device else []), *["--tensorboard"] * tensorboard]
    return [*command_line("run", place, job.run.name), *options]


def run_environment(job: Job) -> dict[str, str]:
    """What that command needs beside the environment: threads are fixed, so that results depend on no engine."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**dict.fromkeys(names, str(job.run.settings.threads)), **MALLOC}


def start_run(place: Workplace, job: Job, device: str | None, tensorboard: bool) -> subprocess.Popen[bytes]:
    """Start the process that executes one run; what it says goes to `WORKER_LOG` in the run's folder.

    It leads a session of its own, so that Ctrl-C reaches `reproduce` alone, which asks its runs in order.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / WORKER_LOG).open("wb") as log:
        return subprocess.Popen(
            [*run_command(place, job, device, tensorboard), "--parent", str(os.getpid())],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **run_environment(job)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def _start(place: Workplace, job: Job, device: str | None, tensorboard: bool, slot: int) -> _Worker:
    process = start_run(place, job, device, tensorboard)
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
    return _Worker(job, process, bar, time.monotonic(), slot)


def last_line(log: Path) -> str:
    """The reason that a run's process gave for its end."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("mlrpl: ") if lines else "it ended without a word"


def chosen(place: Workplace, only: str | None) -> Iterator[Job]:
    """Jobs whose run's name holds one of the texts, which commas separate; all without any."""
    texts = only.split(",") if only else [""]
    return (job for job in place.jobs if any(text in job.run.name for text in texts))


def one_a_key(jobs: Iterable[Job]) -> list[Job]:
    """Of jobs whose runs coincide the first."""
    first: dict[str, Job] = {}
    for job in jobs:
        first.setdefault(job.key, job)
    return list(first.values())


def pending(place: Workplace, only: str | None, adopted: set[str]) -> Iterator[Job]:
    """Jobs that are asked for and not finished; runs that coincide are one job.

    Args:
        place: the study.
        only: see `chosen`.
        adopted: keys of committed results that count as finished.
    """
    for job in one_a_key(chosen(place, only)):
        if not job.executed and job.key not in adopted:
            yield job


STAGES = (("train", "02-train.ipynb"), ("evaluate", "03-evaluate.ipynb"))
