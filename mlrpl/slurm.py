"""A study's runs as an array of Slurm jobs, with the report as a job that waits for them.

Each job runs the same process as on one machine (`mlrpl run`), so that results do not depend on the engine. Before a
preemption or the time limit the job finishes its checkpoint and is queued again. runs/<study>/slurm.json says which job
is which run's.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlrpl.errors import StudyError
from mlrpl.files import read_json, write_json
from mlrpl.slurm_job import ANNOUNCED_SECONDS, Command
from mlrpl.study import Job, Workplace
from mlrpl.words import counted
from mlrpl.workers import WORKER_LOG, command_line, run_command, run_environment

TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
REPORT_MINUTES = 60
RESTARTS = 1000  # by the time limit; preemptions are not counted
ALIVE = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "SUSPENDED", "REQUEUE_HOLD", "STOPPED")


@dataclass(frozen=True)
class Resources:
    """What each job asks of Slurm; None leaves it to the cluster's default."""

    partition: str | None = None
    gpus: int = 0
    time: str = "24:00:00"
    memory: str | None = None
    account: str | None = None
    qos: str | None = None
    at_once: int | None = None

    def parameters(self, minutes: int) -> dict[str, Any]:
        """As submitit names them."""
        asked = {"partition": self.partition, "mem": self.memory, "account": self.account, "qos": self.qos}
        return {"time": minutes, **{name: value for name, value in asked.items() if value}}


def minutes(text: str) -> int:
    """Slurm's way to write a time: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    Raises:
        StudyError: for anything else, or no time at all.
    """
    found = TIME.fullmatch(text)
    if not found:
        raise StudyError(f"time {text!r}: write minutes, hours:minutes:seconds or days-hours")
    days, *rest = found.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None:
        parts += [0] * (3 - len(parts))
    elif len(parts) == 1:
        parts = [0, *parts, 0]
    elif len(parts) == 2:
        parts = [0, *parts]
    hours, mins, seconds = parts
    total = (int(days or 0) * 24 + hours) * 60 + mins + (seconds > 0)
    if not total:
        raise StudyError(f"time {text!r}: must be at least a minute")
    return total


def one_device(device: str | None) -> None:
    """StudyError for several: each run is a job of its own, which finds its GPU."""
    if device and "," in device:
        raise StudyError(f"device {device!r}: on Slurm each run is a job of its own; name one device, or none")


def submit(
    place: Workplace, jobs: Sequence[Job], resources: Resources, device: str | None, tensorboard: bool, adopt: bool
) -> str:
    """Queue the runs that are not queued yet, and the report behind all of them.

    Args:
        place: the study, its store prepared.
        jobs: the runs that are not finished.
        resources: what each asks for.
        device: for each run; None: a GPU where Slurm gives one.
        tensorboard: also log for TensorBoard.
        adopt: for the report: see `mlrpl.reproduce.reproduce`.

    Returns:
        A sentence that says what was queued.

    Raises:
        StudyError: where Slurm is not at hand, or refuses.
    """
    import submitit

    _require_slurm()
    record = read_json(place.runs / "slurm.json")
    waiting, now = queue(), {job.run.name: job.key for job in jobs}
    queued = {name: job for name, job in record.get("runs", {}).items() if job in waiting}
    before = record.get("keys", now)  # records of before there were keys have none
    # What was queued before a method or a setting changed would refuse to run.
    stale = [name for name in queued if name in now and before.get(name) != now[name]]
    keys = before | now  # a part of the runs may be asked for, while others wait
    if stale:
        _slurm("scancel", *(queued.pop(name) for name in stale))
    new = [job for job in jobs if job.run.name not in queued]
    folder, limit = place.runs / "slurm", minutes(resources.time)

    def executor(parameters: Mapping[str, Any], task: str) -> submitit.SlurmExecutor:
        made = submitit.SlurmExecutor(folder, max_num_timeout=RESTARTS)
        made.update_parameters(
            job_name=f"mlrpl-{place.study.name}-{task}",
            signal_delay_s=ANNOUNCED_SECONDS + 20,
            stderr_to_stdout=True,
            additional_parameters={"requeue": True},
            **parameters,
        )
        return made

    try:
        for start in range(0, len(new), size := _largest_array()):
            part = new[start : start + size]
            runs = executor(
                {
                    **resources.parameters(limit),
                    "cpus_per_task": max(job.run.settings.threads for job in part),
                    "array_parallelism": resources.at_once or len(part),
                    **({"gpus_per_node": resources.gpus} if resources.gpus else {}),
                },
                "runs",
            )
            with runs.batch():
                submitted = [
                    runs.submit(
                        Command(
                            run_command(place, job, device, tensorboard),
                            str(job.folder / WORKER_LOG),
                            run_environment(job),
                        )
                    )
                    for job in part
                ]
            queued |= {job.run.name: sent.job_id for job, sent in zip(part, submitted, strict=True)}
            write_json(place.runs / "slurm.json", {"runs": queued, "keys": keys, "report": record.get("report")})
        if (old := record.get("report")) and old in queue():
            _slurm("scancel", old)
        first = sorted({job.partition("_")[0] for job in queued.values()})
        waits = {"dependency": f"afterany:{':'.join(first)}"} if first else {}
        report = executor({**resources.parameters(REPORT_MINUTES), **waits}, "report").submit(
            Command(
                [*command_line("reproduce", place), "--results", str(place.results.parent), "--report-only"]
                + ["--adopt"] * adopt,
                str(place.runs / "report.log"),
                {},
            )
        )
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise StudyError(f"Slurm refused: {' '.join(str(error).split())[-300:]}") from None
    write_json(place.runs / "slurm.json", {"runs": queued, "keys": keys, "report": report.job_id})
    known = f", {len(queued) - len(new)} were queued before" if len(queued) > len(new) else ""
    return (
        f"{counted(len(new), 'run')} queued as Slurm job {', '.join(first) or '—'}{known}; report: job {report.job_id}"
    )


def queue() -> dict[str, tuple[str, str]]:
    """State and reason of this user's jobs in Slurm's queue, by id (array tasks as <job>_<task>); {} without Slurm."""
    if not shutil.which("squeue"):
        return {}
    rows = [line.split("|") for line in _slurm("squeue", "--me", "-h", "-r", "-o", "%i|%T|%r").splitlines()]
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3 and row[1] in ALIVE}


def cancel(place: Workplace) -> int:
    """Take the study's jobs out of the queue; running ones finish their checkpoints first. Returns how many."""
    record = read_json(place.runs / "slurm.json")
    there = queue() if record else {}
    ours = [job for job in [record.get("report"), *record.get("runs", {}).values()] if job in there]
    for start in range(0, len(ours), 500):
        _slurm("scancel", *ours[start : start + 500])
    return len(ours)


def _require_slurm() -> None:
    if not shutil.which("sbatch"):
        raise StudyError("no sbatch on this machine: type the command on a node of the cluster that can submit jobs")


def _largest_array() -> int:
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _slurm("scontrol", "show", "config"), re.M)
    return int(found[1]) if found and int(found[1]) else 1000


def _slurm(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise StudyError(f"{command[0]}: {' '.join((done.stderr or done.stdout).split())[:300]}")
    return done.stdout
