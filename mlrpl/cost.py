"""`mlrpl cost`: what a study takes on this machine, told beforehand from steps and windows that are really run.

Runs that differ only in seed, labelled cases or fold take the same time, so one of them is measured for all. Left out
is what is small beside the rest: distances of the test cases, notebooks and the report.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from mlrpl.data import Case, Store
from mlrpl.devices import device_name, find_device, seconds, synchronise
from mlrpl.evaluation import has_own_statistics, predict_case
from mlrpl.inference import count_windows
from mlrpl.memory import exhaustion_explained
from mlrpl.methods import Method
from mlrpl.precision import Precision
from mlrpl.rows import SELECTIONS
from mlrpl.study import Job, Workplace, jobs_named, pending
from mlrpl.training import Trainer, check_cases
from mlrpl.words import counted, duration

STEPS, SECONDS = 3, 5.0  # at least so many steps, for at least so long


@dataclass(frozen=True)
class Cost:
    """Of runs that take the same time, one of which was measured.

    Attributes:
        title: as tables print it.
        runs: how many there are.
        left: how many of them are not finished.
        step_s: seconds of a training step.
        train_s: of all steps of a run, compilation included where there is one.
        check_s: of a run's checks, the published protocol's.
        test_s: of predicting the test cases with both selections' weights.
        precision: that they train in.
    """

    title: str
    runs: int
    left: int
    step_s: float
    train_s: float
    check_s: float
    test_s: float
    precision: str

    @property
    def run_s(self) -> float:
        """Seconds of a whole run."""
        return self.train_s + self.check_s + self.test_s


def costs(place: Workplace, only: str | None = None, device: str | None = None) -> Iterator[Cost]:
    """Measure each kind of run of a study, in the study's order.

    Args:
        place: the study; its data are prepared.
        only: as `mlrpl reproduce` takes it.
        device: where; by default a GPU where there is one.

    Raises:
        StudyError: for a device that is not there, or where memory does not suffice.
    """
    target = find_device(device)
    left = {job.key for job in pending(place, only, set())}
    kinds: dict[str, dict[str, Job]] = {}  # runs that coincide are one
    for job in jobs_named(place, only):
        run = job.run
        kinds.setdefault(repr((run.method, run.options, run.settings)), {}).setdefault(job.key, job)
    for jobs in kinds.values():
        first, *_ = jobs.values()
        with exhaustion_explained(f"run {first.run.name}"):
            measured = _measured(place.data_of(first.run), first, len(jobs), len(left & jobs.keys()), target)
        yield measured


def _measured(store: Store, job: Job, runs: int, left: int, device: torch.device) -> Cost:
    run = job.run
    with TemporaryDirectory() as folder:
        trainer = Trainer(run, store, Path(folder), job.key, device)
        last = run.settings.iterations
        first = min(run.settings.ramp_iterations, (last + 1) // 2)  # when every term is at work
        begun_s = seconds(lambda: trainer.step(first), device)  # on a GPU it may compile first
        after = max(last - first, 1)  # of a short run, these again and again
        step_s = _step_seconds(lambda done: trainer.step(min(first + 1 + done % after, last)), device)
    settings, method = run.settings, trainer.method
    test, checked = _windows(store, store.ids("test"), method), _windows(store, check_cases(store), method)
    case = store.load(store.ids("test")[0])
    one = _window_seconds(method, case, ("decoder1",), device, trainer.precision)
    every = _window_seconds(method, case, method.outputs, device, trainer.precision)
    checks = sum(map(settings.is_check, range(1, settings.iterations + 1))) or 1
    return Cost(
        title=run.title,
        runs=runs,
        left=left,
        step_s=step_s,
        train_s=begun_s + step_s * (settings.iterations - 1),
        check_s=one * checked * checks,
        test_s=test * (one * has_own_statistics(method) + len(SELECTIONS) * every),
        precision=trainer.precision.name,
    )


def _step_seconds(step: Callable[[int], object], device: torch.device) -> float:
    synchronise(device)
    started, done = time.perf_counter(), 0
    while done < STEPS or time.perf_counter() - started < SECONDS:
        step(done)
        done += 1
    synchronise(device)
    return (time.perf_counter() - started) / done


def _windows(store: Store, cases: list[str], method: Method) -> int:
    settings = method.settings
    shapes = {case["id"]: case["shape"] for case in store.index["cases"]}
    return sum(count_windows(shapes[case], settings.patch, settings.stride) for case in cases)


def _window_seconds(
    method: Method, case: Case, outputs: tuple[str, ...], device: torch.device, precision: Precision
) -> float:
    settings = method.settings
    windows = count_windows(case.image.shape[1:], settings.patch, settings.stride)
    if device.type == "cuda":  # cuDNN tries its algorithms at the first batch of each size
        predict_case(method, case, outputs, device, precision)
    return seconds(lambda: predict_case(method, case, outputs, device, precision), device) / windows


HEAD = "| runs | number | a step | training | checks | test | one run |\n|---|---:|---:|---:|---:|---:|---:|"


def line(cost: Cost) -> str:
    """A row below `HEAD`."""
    times = map(duration, (cost.train_s, cost.check_s, cost.test_s, cost.run_s))
    return f"| {cost.title} | {cost.runs} | {cost.step_s:.3f} s | {' | '.join(times)} |"


def total(found: list[Cost], device: torch.device) -> str:
    """The sum, and what of it is not done yet."""
    runs, left = sum(cost.runs for cost in found), sum(cost.left for cost in found)
    whole, rest = (duration(sum(getattr(cost, name) * cost.run_s for cost in found)) for name in ("runs", "left"))
    precisions = " and ".join(sorted({cost.precision for cost in found}))
    where = f"{device_name(device)}, {precisions}"
    return f"{counted(runs, 'run')}, one at a time ({where}): {whole}; {left} to do: {rest}"
