"""The frames that tables and figures are made from, collected from run folders and from committed results.

metrics.csv  a row a study, method, variant, labelled, seed, selection, output, case and class
runs.csv     a row a run: key, seconds, memory, commit and where its rows come from
curves.csv   the log of each run, thinned
checks.csv   the published protocol's Dice at each check
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mlrpl.files import atomic
from mlrpl.study import Job

CURVE_POINTS = 150  # means over equal stretches of a run: what a figure can show, and small enough to commit
IDENTITY = ("study", "method", "variant", "labelled", "seed")


@dataclass(frozen=True)
class Results:
    """One study's rows; see the module's docstring."""

    metrics: pd.DataFrame
    runs: pd.DataFrame
    curves: pd.DataFrame
    checks: pd.DataFrame

    def __len__(self) -> int:
        return len(self.runs)

    def save(self, folder: Path) -> None:
        """Write the four files."""
        for name, frame in vars(self).items():
            with atomic(folder / f"{name}.csv") as partial:
                frame.to_csv(partial, index=False, float_format="%.6g")

    @classmethod
    def load(cls, folder: Path) -> "Results":
        """Read what `save` wrote; empty frames where nothing is there."""
        frames = {}
        for name in cls.__annotations__:
            path = folder / f"{name}.csv"
            frames[name] = pd.read_csv(path, dtype={"key": str, "commit": str}) if path.exists() else pd.DataFrame()
        return cls(**frames)

    def keys(self) -> set[str]:
        """Keys of the runs in it."""
        return set(self.runs["key"]) if len(self.runs) else set()


def collect(jobs: Sequence[Job], committed: Results) -> Results:
    """All finished runs of a study, in its order.

    Args:
        jobs: the study's runs.
        committed: results from an earlier sitting. Runs that are not finished here but whose key is there keep those
            rows, marked as adopted.
    """
    keys = committed.keys()
    parts: list[Results] = []
    for job in jobs:
        if job.finished("train") and job.finished("evaluate"):
            parts.append(run_frames(job))
        elif job.key in keys:
            parts.append(_adopted(job, committed))
    if not parts:
        return Results(*(pd.DataFrame() for _ in range(4)))
    return Results(*(pd.concat([vars(p)[name] for p in parts], ignore_index=True) for name in Results.__annotations__))


def run_frames(job: Job) -> Results:
    """The frames of one trained run; without rows as long as it is not evaluated."""
    run, facts = job.run, job.provenance
    evaluated = job.finished("evaluate")
    metrics = pd.read_csv(job.folder / "metrics.csv").assign(**_identity(job)) if evaluated else pd.DataFrame()
    row: dict[str, Any] = {
        "run": run.name,
        **_identity(job),
        "title": run.title,
        "key": job.key,
        "iterations": run.settings.iterations,
        **{name: facts["train"][name] for name in ("precision", "device", "threads", "parameters", "seconds")},
        "seconds_evaluate": facts["evaluate"]["seconds"] if evaluated else None,
        "peak_memory_mb": facts["train"]["peak_memory_mb"],
        "commit": facts["train"]["commit"],
        "adopted": False,
    }
    log = pd.read_csv(job.folder / "log.csv").drop(columns="learning_rate")
    stretches = log.index // max(1, -(-len(log) // CURVE_POINTS))
    curves = log.groupby(stretches).mean().assign(iteration=log.groupby(stretches)["iteration"].last())
    return Results(
        metrics,
        pd.DataFrame([row]),
        curves.assign(run=run.name),
        pd.read_csv(job.folder / "checks.csv").assign(run=run.name),
    )


def _identity(job: Job) -> dict[str, Any]:
    """A run that stands in for a coinciding one gets that one's names."""
    return {name: getattr(job.run, name) for name in IDENTITY}


def _adopted(job: Job, committed: Results) -> Results:
    row = committed.runs[committed.runs["key"] == job.key].iloc[:1]
    name = row["run"].item()
    old = row[list(IDENTITY)].iloc[0]
    metrics = committed.metrics
    mine = (metrics[list(IDENTITY)] == old).all(axis=1)
    return Results(
        metrics[mine].assign(**_identity(job)),
        row.assign(run=job.run.name, title=job.run.title, adopted=True, **_identity(job)),
        committed.curves[committed.curves["run"] == name].assign(run=job.run.name),
        committed.checks[committed.checks["run"] == name].assign(run=job.run.name),
    )
