"""Processes that execute runs: how one is started, and how many are watched at a time.

A run's process is `mlrpl run`; here or in a scheduler's job it is the same. What it says goes to its folder's
`WORKER_LOG`, how far it is to progress.json.
"""

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mlrpl.devices import first_device, share_devices
from mlrpl.errors import StudyError
from mlrpl.files import read_json
from mlrpl.process import MALLOC, cpu_count
from mlrpl.study import Job, Workplace
from mlrpl.words import duration

WORKER_LOG = "worker.log"
POLL_SECONDS = 0.5
MOST_JOBS = 4  # at a time on a CPU, unless more are asked for
FINISHING_SECONDS = 120  # for checkpoints, after a request to stop


@dataclass
class _Worker:
    job: Job
    process: subprocess.Popen[bytes]
    bar: tqdm
    started: float
    slot: int

    def show(self) -> None:
        try:
            progress = read_json(self.job.folder / "progress.json")
        except StudyError:  # of a shared file system, for a moment: only the bar waits for it
            return
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
    slots = list(range(len(devices)))
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
                if worker.process.returncode == 0 and worker.job.executed:
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
        print(
            "\n  interrupted: the runs finish their checkpoints or evaluations (Ctrl-C again: end at once)", flush=True
        )
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
    if first_device(device).type == "cuda":
        return torch.cuda.device_count() if named in ([], ["cuda"]) else len(named)
    return max(1, min(cpu_count() // threads, MOST_JOBS))


def command_line(command: str, place: Workplace, *arguments: str) -> list[str]:
    """`mlrpl COMMAND STUDY …` in this interpreter, for this place's runs."""
    return [sys.executable, "-m", "mlrpl", command, place.given, *arguments, "--runs", str(place.root)]


def run_command(place: Workplace, job: Job, device: str | None, tensorboard: bool) -> list[str]:
    """The command line that executes one run, here or in a scheduler's job."""
    options = [*(["--device", device] if device else []), *["--tensorboard"] * tensorboard]
    return [*command_line("run", place, job.run.name), "--key", job.key, *options]


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
        print(f"  {job.run.name}: {'evaluation started' if job.finished('train') else 'started'}", flush=True)
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
