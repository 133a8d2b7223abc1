"""The frames that tables and figures are made from, collected from run folders and from committed results.

metrics.csv  a row a study, method, variant, labelled, seed, selection, output, case and class
runs.csv     a row a run: key, seconds, memory, commit and where its rows come from
curves.csv   the log of each run, thinned
checks.csv   the published protocol's Dice at each check
audit.csv    what audited runs counted (`mlrpl.audit`), pooled over stretches of the run
ablations.csv  which run stands for which variant of which ablation at which seed, and the paper's figure for it

A file without rows is not written. runs.csv comes last: without it the others are what a killed process left.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from mlrpl.config import Ablation
from mlrpl.errors import StudyError
from mlrpl.files import atomic, read_rows
from mlrpl.rows import IDENTITY
from mlrpl.study import Job

CURVE_POINTS = 150  # means over equal stretches of a run: what a figure can show, and small enough to commit
AUDIT_POINTS = 8  # stretches
STEPS_TIMED = 20  # iterations in a stretch whose steps are timed
FOUND_BY = {"metrics": IDENTITY, "runs": ["run", "key", *IDENTITY]}  # columns; in the other files ["run"]
OPTIONAL = ("audit", "ablations")  # files that not every study has


@dataclass(frozen=True)
class Results:
    """One study's rows; see the module's docstring."""

    metrics: pd.DataFrame = field(default_factory=pd.DataFrame)
    runs: pd.DataFrame = field(default_factory=pd.DataFrame)
    curves: pd.DataFrame = field(default_factory=pd.DataFrame)
    checks: pd.DataFrame = field(default_factory=pd.DataFrame)
    audit: pd.DataFrame = field(default_factory=pd.DataFrame)
    ablations: pd.DataFrame = field(default_factory=pd.DataFrame)

    def __len__(self) -> int:
        return len(self.runs)

    def save(self, folder: Path) -> None:
        """Write the files: all are written before the first takes its place, and runs.csv takes its last."""
        with ExitStack() as replacing:  # in the order opposite to this one
            for name, frame in sorted(vars(self).items(), key=lambda item: item[0] != "runs"):
                if frame.empty:
                    (folder / f"{name}.csv").unlink(missing_ok=True)
                else:
                    partial = replacing.enter_context(atomic(folder / f"{name}.csv"))
                    frame.to_csv(partial, index=False, float_format="%.6g")

    @classmethod
    def load(cls, folder: Path) -> "Results":
        """Read what `save` wrote; empty frames where nothing is there, or `save` was killed before its end.

        Raises:
            StudyError: where a file is missing or no table, or a row lacks what it is found by, as do the lines with
                which git marks a conflict.
        """
        if not (folder / "runs.csv").exists():
            return cls()
        paths = {name: folder / f"{name}.csv" for name in cls.__annotations__}
        there = [name for name, path in paths.items() if name not in OPTIONAL or path.exists()]
        return cls(**{name: _rows(paths[name], FOUND_BY.get(name, ["run"])) for name in there})

    def compared(self) -> "Results":
        """Without the runs that only ablations ask for: what the study's methods are compared by."""
        if "ablation" not in self.runs:  # results from before there were ablations
            return self
        ablation = self.runs["ablation"]
        return self.only(self.runs[ablation.isna() | (ablation == "")])

    def only(self, runs: pd.DataFrame) -> "Results":
        """The rows of these runs alone."""
        mine = pd.MultiIndex.from_frame(runs[IDENTITY])
        metrics = self.metrics
        if len(metrics):
            metrics = metrics[pd.MultiIndex.from_frame(metrics[IDENTITY]).isin(mine)]
        named = {
            name: frame[frame["run"].isin(runs["run"])] if len(frame) else frame
            for name, frame in vars(self).items()
            if name not in ("metrics", "runs")
        }
        return Results(metrics, runs, **named)

    def keys(self, classes: Sequence[str]) -> set[str]:
        """Keys of the runs in it whose rows are of these classes, background first."""
        if not len(self.metrics):
            return set()
        rows = self.metrics.groupby(IDENTITY, dropna=False)["class"].agg(set)
        usable = rows.index[rows.map(lambda found: found == set(classes[1:]))]
        return set(self.runs.loc[pd.MultiIndex.from_frame(self.runs[IDENTITY]).isin(usable), "key"])


def _rows(path: Path, found_by: list[str]) -> pd.DataFrame:
    """A file's rows, each of which has something in these columns; raises as `Results.load`."""
    try:
        rows = read_rows(path)
        lacking = rows[found_by].isna().any(axis=1).to_numpy()
    except (OSError, ValueError, KeyError):  # ValueError: no table; KeyError: another one
        problem = f"no table with the columns {', '.join(found_by)}"
    else:
        if not lacking.any():
            return rows
        problem = f"line {lacking.argmax() + 2} is no row of it"
    raise StudyError(f"{path}: {problem}; bring back what was committed, or move {path.parent}/ away")


def collect(
    jobs: Sequence[Job], committed: Results, ablations: Sequence[Ablation] = (), elsewhere: Sequence[Results] = ()
) -> Results:
    """All finished runs of a study, in its order; of ablations' runs only those that coincide with none before them.

    Args:
        jobs: the study's runs.
        committed: results from an earlier sitting. Runs that are not finished here but whose key is there keep those
            rows, marked as adopted.
        ablations: the study's.
        elsewhere: other studies' results, in which the same runs may be.
    """
    by_key: dict[str, Results] = {}
    for results in (committed, *elsewhere) if jobs else ():
        by_key = dict.fromkeys(results.keys(jobs[0].classes), results) | by_key
    parts: list[Results] = []
    names: dict[str, str] = {}  # by key: the first run of it
    for job in jobs:
        if job.key in names and job.run.ablation:
            continue
        if job.complete:
            parts.append(run_frames(job))
        elif job.key in by_key:
            parts.append(_adopted(job, by_key[job.key]))
        else:
            continue
        names.setdefault(job.key, job.run.name)
    if not parts:
        return Results()
    frames = (
        pd.concat([frame for part in parts if len(frame := vars(part)[name])] or [pd.DataFrame()])
        for name in Results.__annotations__
    )
    found = Results(*(frame.reset_index(drop=True) for frame in frames))
    return replace(found, ablations=_ablations(ablations, jobs, names))


def _ablations(ablations: Sequence[Ablation], jobs: Sequence[Job], names: dict[str, str]) -> pd.DataFrame:
    """A row a finished run of an ablation, in the study's order."""
    rows = []
    for ablation in ablations:
        for entry, variant in zip(ablation.entries(), ablation.variants, strict=True):
            for job in jobs:
                if job.run.variant == entry.variant and job.key in names:
                    rows.append(
                        {
                            "ablation": ablation.name,
                            "variant": variant.title,
                            "reference": not variant.settings and not variant.options,
                            "labelled": job.run.labelled,
                            "seed": job.run.seed,
                            "run": names[job.key],
                            "paper": "" if variant.paper is None else str(variant.paper),
                        }
                    )
    return pd.DataFrame(rows)


def run_frames(job: Job) -> Results:
    """The frames of one trained run; without rows as long as it is not evaluated."""
    run, facts = job.run, job.provenance
    evaluated = job.finished("evaluate")
    metrics = read_rows(job.folder / "metrics.csv").assign(**_identity(job)) if evaluated else pd.DataFrame()
    log = pd.read_csv(job.folder / "log.csv").drop(columns="learning_rate")
    row: dict[str, Any] = {
        "run": run.name,
        **_identity(job),
        "title": run.title,
        "key": job.key,
        "iterations": run.settings.iterations,
        **{name: facts["train"][name] for name in ("precision", "device", "threads", "parameters", "seconds")},
        "step_seconds": step_seconds(log["seconds"]),
        "seconds_audit": facts["train"].get("audit_seconds"),
        "seconds_evaluate": facts["evaluate"]["seconds"] if evaluated else None,
        "peak_memory_mb": facts["train"]["peak_memory_mb"],
        "commit": facts["train"]["commit"],
        "ablation": run.ablation,
        "adopted": False,
    }
    stretches = log.index // max(1, -(-len(log) // CURVE_POINTS))
    curves = log.groupby(stretches).mean().assign(iteration=log.groupby(stretches)["iteration"].last())
    return Results(
        metrics,
        pd.DataFrame([row]),
        curves.assign(run=run.name),
        pd.read_csv(job.folder / "checks.csv").assign(run=run.name),
        pooled_audit(job.folder / "audit.csv", run.settings.iterations).assign(run=run.name),
    )


def step_seconds(elapsed: pd.Series) -> float:
    """Seconds of an undisturbed step: the tenth percentile of the means over stretches of `STEPS_TIMED` iterations.

    Checks on test cases, a suspended process and other work on the machine make stretches longer, never shorter.

    Args:
        elapsed: seconds of training by the end of each iteration.
    """
    marks = pd.concat([pd.Series([0.0]), elapsed])
    length = min(STEPS_TIMED, len(elapsed))
    return float((marks.iloc[::length].diff() / length).quantile(0.1))


def pooled_audit(path: Path, iterations: int) -> pd.DataFrame:
    """An audit's rows over `AUDIT_POINTS` equal stretches of a run.

    Counts are summed, weights averaged over their voxels, AUROCs over the audits.

    Args:
        path: a run's audit.csv; where there is none, the frame is empty.
        iterations: the run's.
    """
    if not path.exists():
        return pd.DataFrame()
    rows = read_rows(path)
    length = -(-iterations // AUDIT_POINTS)
    rows["iteration"] = (-(-rows["iteration"] // length) * length).clip(upper=iterations)
    rows["weight"] *= rows["voxels"]
    key = ["iteration", "scope", "class", "distance", "score", "bin"]
    pooled = rows.groupby(key, sort=False).agg(
        {"voxels": "sum", "correct": "sum", "weight": lambda w: w.sum(min_count=1), "auroc": "mean"}
    )
    pooled["weight"] /= pooled["voxels"]
    return pooled.reset_index()


def _identity(job: Job) -> dict[str, Any]:
    """A run that stands in for a coinciding one gets that one's names."""
    return {name: getattr(job.run, name) for name in IDENTITY}


def _adopted(job: Job, committed: Results) -> Results:
    row = committed.runs[committed.runs["key"] == job.key].iloc[:1]
    mine = committed.only(row)
    metrics = mine.metrics
    if job.run.fold is not None:
        metrics = metrics[metrics["fold"] == job.run.fold]
    return Results(
        metrics.assign(**_identity(job)),
        row.assign(run=job.run.name, title=job.run.title, adopted=True, ablation=job.run.ablation, **_identity(job)),
        *(frame.assign(run=job.run.name) for frame in (mine.curves, mine.checks, mine.audit)),
    )
