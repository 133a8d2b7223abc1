"""Killing a study's steps with SIGKILL, at any moment or aimed at one of writing and renaming.

Processes are forked from a server that has imported everything, or most kills would hit the import of PyTorch. There
the notebooks' cells are executed without Jupyter; test_reproduce.py kills the command with its kernels.
"""

import csv
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml

import mlrpl.execution
import mlrpl.reproduce
import mlrpl.study
import mlrpl.study_report
from mlrpl import training
from mlrpl.files import atomic

SERVER = multiprocessing.get_context("forkserver")
PRELOADED = ["mlrpl.reproduce", "mlrpl.training", "matplotlib.pyplot", "scipy.stats", "IPython.display", "nbformat"]
SERVER.set_forkserver_preload(PRELOADED)
STUDY = {
    "name": "killed", "title": "Killed",
    "dataset": {"name": "drawn", "source": "phantom", "options": {"train": 4, "test": 2, "size": [24, 24, 16]}},
    "settings": {
        "patch": [16, 16, 16], "stride": [8, 8, 16], "filters": 2, "iterations": 24, "ramp_iterations": 150,
        "check_from": 4, "check_every": 4, "precision": "float32",
    },
    "runs": [{"variant": "mlrpl", "method": "mlrpl", "title": "MLRPL", "labelled": 2}],
}  # fmt: skip
RUN = "mlrpl-2-s0"


# The steps. Each goes on where it was killed, and does nothing when all is done.


def prepare() -> None:
    mlrpl.study.Workplace("killed.yaml").prepare()


def run() -> None:
    """Train and evaluate."""
    training.CHECKPOINT_SECONDS = 0.02
    mlrpl.execution.execute_run(mlrpl.study.Workplace("killed.yaml"), RUN, "cpu")


def report() -> None:
    mlrpl.reproduce.reproduce("killed.yaml", report_only=True)


def whole() -> None:
    """The study from nothing to its report."""
    prepare()
    run()
    report()


def execute(notebook: str, destination: Path, **parameters: Any) -> None:
    """Stands in for papermill: what the cells do, in this process; the notebook is written without outputs.

    Of a run's notebooks only what trains or evaluates: the rest draws figures and writes nothing.
    """
    content = nbformat.read(mlrpl.execution.NOTEBOOKS / f"{notebook}.ipynb", as_version=4)
    if "RUN" in parameters:
        place = mlrpl.study.Workplace(parameters["STUDY"], parameters["RUNS"])
        work = {"02-train": place.train, "03-evaluate": place.evaluate}[notebook]
        work(parameters["RUN"], parameters["DEVICE"])
    else:
        names: dict[str, Any] = {"display": lambda *_: None}  # a kernel has it
        for cell in [cell for cell in content.cells if cell.cell_type == "code"]:
            exec(cell.source, names)
            names |= parameters if "parameters" in cell.metadata.get("tags", []) else {}
    with atomic(destination) as partial:
        partial.write_text(nbformat.writes(content), encoding="utf-8")


# Killing.


@dataclass(frozen=True)
class Aim:
    """Die at the number-th event of writing, renaming or removing; `torn`: a file about to be renamed is cut short."""

    number: int
    torn: bool = False


def child(step: Callable[[], None], folder: str, aim: Aim | None, counter: Any) -> None:
    """What a forked process does: the step in the folder."""
    for module in (mlrpl.execution, mlrpl.reproduce, mlrpl.study_report):
        module.execute = execute  # here: in pytest's own process the others need papermill
    os.chdir(folder)
    here = Path.cwd()
    sys.stdout = sys.stderr = said(here).open("w", encoding="utf-8")

    def heard(event: str, arguments: tuple) -> None:
        path = written(event, arguments)
        if path is None or not Path(path).absolute().is_relative_to(here):
            return
        counter.value += 1
        if aim and counter.value == aim.number:
            if aim.torn and event == "os.rename" and Path(path).is_file():
                os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(heard)
    step()


def said(folder: Path) -> Path:
    """What the last process in the folder printed: beside it, so that what is compared stays as it is."""
    return folder.with_suffix(".said")


def written(event: str, arguments: tuple) -> str | None:
    """The path that an audit event is about to change."""
    if event == "open":
        path, mode, flags = arguments
        writes = any(letter in mode for letter in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return os.fspath(path) if writes and isinstance(path, str | os.PathLike) else None
    if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate"):
        return os.fspath(arguments[0]) if isinstance(arguments[0], str | os.PathLike) else None
    return None


def start(step: Callable[[], None], folder: Path, aim: Aim | None = None) -> tuple[Any, Any]:
    counter = SERVER.Value("i", 0, lock=False)
    process = SERVER.Process(target=child, args=(step, str(folder), aim, counter))
    process.start()
    return process, counter


def undisturbed(step: Callable[[], None], folder: Path) -> tuple[float, int]:
    """Seconds that the step takes, and its events."""
    process, counter = start(step, folder)
    started = time.monotonic()
    process.join(600)
    assert process.exitcode == 0, (
        f"{step.__name__} in {folder}: exit code {process.exitcode}\n{said(folder).read_text()}"
    )
    return time.monotonic() - started, counter.value


def killed(step: Callable[[], None], folder: Path, aim: Aim | None, after: float) -> bool:
    """Whether the process was killed before it ended: at the aim, or after that many seconds."""
    process, _ = start(step, folder, aim)
    process.join(600 if aim else after)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), (
        f"exit code {process.exitcode} in {folder}\n{said(folder).read_text()}"
    )
    return process.exitcode != 0


# What must be the same.


def content(folder: Path) -> dict[str, str]:
    """Digest of every file but locks, logs without their seconds."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(timeless(path)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in (".lock", ".yaml")
    }


def timeless(path: Path) -> bytes:
    """A file's bytes without what measures time, memory or a process, and without the commit that it was made at."""
    measured = {"seconds", "seconds_evaluate", "peak_memory_mb", "seconds_left", "commit", "continued_with"}
    if path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
        return json.dumps([{k: v for k, v in row.items() if k not in measured} for row in rows]).encode()
    if path.suffix == ".json":

        def cleaned(value: Any) -> Any:
            return {k: cleaned(v) for k, v in value.items() if k not in measured} if isinstance(value, dict) else value

        return json.dumps(cleaned(json.loads(path.read_text(encoding="utf-8")))).encode()
    return path.read_bytes()


@dataclass
class Stage:
    """A step with the folder it begins in, and what two undisturbed executions of it agree on."""

    step: Callable[[], None]
    base: Path
    scratch: Path
    seconds: float = 0.0
    events: int = 0

    def __post_init__(self) -> None:
        first, second = self._fresh("first"), self._fresh("second")
        self.seconds, self.events = undisturbed(self.step, first)
        undisturbed(self.step, second)
        ours, theirs = content(first), content(second)
        assert ours.keys() == theirs.keys()
        self.names = set(ours)
        self.same = {name: digest for name, digest in ours.items() if theirs[name] == digest}
        self.done = first

    def _fresh(self, name: str) -> Path:
        return Path(shutil.copytree(self.base, self.scratch / name))

    def kill(self, times: int, rng: random.Random) -> int:
        """Chains of kills, each ended undisturbed and compared; returns the number of chains that ended wrong."""
        done = lost = 0
        while done < times:
            folder, told = self._fresh("chain"), []
            for _ in range(min(rng.randint(1, 6), times - done)):
                aim = Aim(rng.randint(1, self.events), rng.random() < 0.5) if done % 2 else None
                after = rng.uniform(0, self.seconds)
                told.append(aim or round(after, 3))
                if not killed(self.step, folder, aim, after):
                    break
                done += 1
            lost += self._ends_wrong(folder, told)
        return lost

    def kill_at_each_event(self) -> int:
        """A kill at each event of writing, renaming or removing; returns the number of those that ended wrong.

        Progress is written by the clock, so the last few events may not come.
        """
        lost = done = 0
        for number in range(1, self.events + 1):
            folder, aim = self._fresh("chain"), Aim(number)
            done += killed(self.step, folder, aim, 0)
            lost += self._ends_wrong(folder, [aim])
        assert done > 0.9 * self.events, f"{done} kills at {self.events} events"
        return lost

    def _ends_wrong(self, folder: Path, told: list[Aim | float]) -> bool:
        """Go on undisturbed where kills left a folder, and compare."""
        undisturbed(self.step, folder)
        found = content(folder)
        wrong = [name for name in self.same if found.get(name) != self.same[name]] + list(set(found) ^ self.names)
        if wrong:
            print(f"{self.step.__name__}: killed at {told}, wrong: {wrong}")
            folder.rename(self.scratch / f"lost-{time.monotonic_ns()}")
        else:
            shutil.rmtree(folder)
        return bool(wrong)


def write_study(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "killed.yaml").write_text(yaml.safe_dump({**STUDY, **changes}))
    return folder
