"""`mlrpl status`: where every run of a study stands, read from its folder, its lock and Slurm's queue."""

from collections import Counter
from dataclasses import dataclass, replace

from mlrpl import slurm
from mlrpl.errors import StudyError
from mlrpl.files import read_json
from mlrpl.locks import holder
from mlrpl.results import Results
from mlrpl.study import Job, Workplace, one_a_key
from mlrpl.words import counted, duration
from mlrpl.workers import WORKER_LOG, last_line


@dataclass(frozen=True)
class Standing:
    """One run and what is known of it.

    Its state is "finished", "trained", "running", "queued", "stopped", "failed", "committed" (not run here, but its
    rows are among the results) or "waiting".
    """

    run: str
    state: str
    detail: str = ""


def standings(place: Workplace) -> list[Standing]:
    """Of every run, in the study's order; runs that coincide are one, which bears the first's name.

    Raises:
        StudyError: where nothing of the study has been run here, or its results are not whole.
    """
    if not place.runs.is_dir():
        said = f"study {place.study.name}: nothing in {place.root}/ yet"
        if committed := len(Results.load(place.results)):
            said += f"; {place.results}/ holds rows of {counted(committed, 'run')}, which --adopt takes as finished"
        raise StudyError(f"{said}; type mlrpl train or mlrpl reproduce {place.given}")
    jobs = read_json(place.runs / "slurm.json").get("runs", {})
    queued = slurm.queue() if jobs else {}
    submitted = {job.key: jobs[job.run.name] for job in place.jobs if job.run.name in jobs}
    committed = Results.load(place.results).keys(place.store.classes)
    reproducing, found = holder(place.runs) is not None, []
    for job in one_a_key(place.jobs):
        standing = _standing(job, queued.get(submitted.get(job.key, "")), reproducing)
        if standing.state == "waiting" and job.key in committed:
            standing = replace(standing, state="committed", detail=f"in {place.results}/; --adopt takes it as finished")
        found.append(standing)
    return found


def described(place: Workplace) -> str:
    """The same as text: how many are in each state, then a line a run."""
    found = standings(place)
    counts = Counter(standing.state for standing in found)
    states = ", ".join(f"{n} {state}" for state, n in counts.items())
    head = f"Study {place.study.name}: {counted(len(found), 'run')}: {states}"
    width = max(len(standing.run) for standing in found)
    return "\n".join([head, *(f"  {s.run:<{width}}  {s.state:<9}  {s.detail}".rstrip() for s in found)])


def _standing(job: Job, slurm_job: tuple[str, str] | None, reproducing: bool) -> Standing:
    name, folder = job.run.name, job.folder
    if not folder.is_dir():
        return Standing(name, "queued", slurm_job[1]) if slurm_job else Standing(name, "waiting")
    if (owner := holder(folder)) is not None:
        return Standing(name, "running", f"{_progress(job)}; process {owner.pid} on {owner.host}")
    if job.complete:  # whatever an older log says: it may have been finished by hand
        return Standing(name, "finished", f"in {duration(job.provenance['train'].get('seconds', 0))} of training")
    if slurm_job:
        state, reason = slurm_job
        running = state in ("RUNNING", "COMPLETING")
        return Standing(name, "running" if running else "queued", "starting" if running else reason)
    log = folder / WORKER_LOG
    if not log.exists():
        return _by_hand(job)
    if reproducing and not log.stat().st_size:  # its process has not come to the run's lock yet
        return Standing(name, "running", "starting")
    reason = last_line(log)
    state = "stopped" if "the same command goes on" in reason else "failed"
    return Standing(name, state, f"{reason} ({log})")


def _by_hand(job: Job) -> Standing:
    """Of an unfinished run that no `reproduce` has begun; `mlrpl train` may have."""
    if job.finished("train"):
        return Standing(job.run.name, "trained", "not evaluated yet")
    begun = (job.folder / "checkpoint.pt").exists()
    return Standing(job.run.name, "stopped", _progress(job)) if begun else Standing(job.run.name, "waiting")


def _progress(job: Job) -> str:
    progress = read_json(job.folder / "progress.json")
    done, of = progress.get("iteration", 0), job.run.settings.iterations
    if done >= of:
        return "evaluating"
    return f"iteration {done} of {of}, {duration(progress.get('seconds_left', 0))} left" if done else "starting"
