"""`mlrpl verify`: do tables follow from rows, rows from runs, and runs from the code?

Everything that is at hand is recomputed: table entries from per-case rows, rows from the predicted label maps and the
case store, keys from the study's settings. On request a run is trained anew and its weights compared bit for bit.
"""

import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mlrpl import ablations, audit_report, tables
from mlrpl.comparison import comparison_tables
from mlrpl.devices import device_name, find_device
from mlrpl.errors import StudyError
from mlrpl.evaluation import PREDICTIONS
from mlrpl.files import read_rows
from mlrpl.methods import METHODS
from mlrpl.metrics import case_metrics
from mlrpl.provenance import CHANGED, environment
from mlrpl.results import Results
from mlrpl.rows import IDENTITY, SELECTIONS, run_name
from mlrpl.study import Job, Workplace
from mlrpl.training import check_cases, load
from mlrpl.words import counted

NONE_AT_HAND = "no run that is finished here"
ROW_TOLERANCE = 1e-5  # rows are written with six significant digits
CHECK_TOLERANCE = 5e-4  # of Dice: weights may be evaluated on another device than the one that checked them


@dataclass(frozen=True)
class Finding:
    """One comparison: what was compared, how many values, the differences found, and remarks that are no error."""

    what: str
    compared: int
    wrong: tuple[str, ...] = ()
    remark: str = ""

    def __str__(self) -> str:
        verdict = f"{len(self.wrong)} WRONG: {self.wrong[0]}" if self.wrong else "all agree"
        parts = [f"{self.compared} compared, {verdict}"] * bool(self.compared or self.wrong) + [self.remark]
        return f"{self.what}: {'; '.join(part for part in parts if part)}"


def verify(place: Workplace, retrain: str | None = None) -> list[Finding]:
    """Recompute what a study's results claim.

    Args:
        place: the study; its runs and store are used where they are at hand.
        retrain: name of a run to train anew on the CPU.

    Raises:
        StudyError: where there are no results or these are not whole, or the run to train is not at hand.
    """
    found = Results.load(place.results)
    if not len(found):
        raise StudyError(f"{place.results}: no rows here; type mlrpl reproduce {place.given}")
    findings = [*_tables(place, found), _commits(place, found)]
    if place.at_hand:
        jobs = [job for job in place.jobs if job.finished("evaluate")]
        findings += [_keys(place, found), _rows(jobs, found), _predictions(place, jobs)]
        if check_cases(place.store) == place.store.ids(
            "test"
        ):  # else the checks were made on other cases than the rows
            findings.append(_checks(found))
    else:
        findings.append(Finding("runs", 0, remark="no case store here, so only tables were recomputed"))
    if retrain:
        findings += _retrained(place, place.job(retrain))
    return findings


def _made(place: Workplace, found: Results) -> dict[str, pd.DataFrame]:
    """Every table of the report, from the rows."""
    made = comparison_tables(place, found.compared())
    shown = ablations.shown(place)
    for ablation in shown.ablations:
        made[f"ablation-{ablation.name}"] = ablations.formatted(ablations.table(shown.found, ablation), ablation)
    if len(found.audit):
        subjects = audit_report.subjects(found)
        made["reliability-which"] = audit_report.together(audit_report.choice_table, subjects)
        made["reliability-how"] = audit_report.together(audit_report.predictor_table, subjects)
    return made


def _tables(place: Workplace, found: Results) -> Iterator[Finding]:
    """Every entry of the tables, in all forms, anew from the rows."""
    for name, table in _made(place, found).items():
        committed = place.results / "tables" / f"{name}.csv"
        if not committed.exists():
            if len(table):
                yield Finding(f"tables/{name}", 0, remark="not there")
            continue
        expected = pd.read_csv(io.StringIO(table.to_csv(index=False)), dtype=str, keep_default_na=False)
        shown = pd.read_csv(committed, dtype=str, keep_default_na=False)
        wrong = _different_cells(shown, expected)
        for ending, text_of in tables.FORMS.items():
            form = committed.with_suffix(ending)
            if form == committed:
                continue
            if not form.exists() or form.read_text(encoding="utf-8").strip() != text_of(table).strip():
                wrong.append(f"{form.name} differs from what the rows give")
        yield Finding(f"tables/{name}", expected.size, tuple(wrong))


def _different_cells(shown: pd.DataFrame, expected: pd.DataFrame) -> list[str]:
    if list(shown.columns) != list(expected.columns) or len(shown) != len(expected):
        return [f"its shape or columns are not those that the rows give ({shown.shape} instead of {expected.shape})"]
    return [
        f"row {row + 1}, {column}: {shown[column][row]!r} instead of {expected[column][row]!r}"
        for column in expected
        for row in range(len(expected))
        if shown[column][row] != expected[column][row]
    ]


def _checks(found: Results) -> Finding:
    """The best of each run's checks, made while it trained, against the rows that its weights of then were given."""
    best = found.checks.groupby("run")["dice"].max()
    rows = found.metrics.query("selection == 'published' and output == 'decoder1'")
    parts = [rows[name] for name in ("variant", "labelled", "seed", "fold") if name in rows]
    measured = rows.groupby([run_name(*run) for run in zip(*parts, strict=True)])["dice"].mean()
    measured = measured.reindex(found.runs["run"])
    apart = (measured - best.reindex(measured.index)).abs()
    wrong = [
        f"{run}: the best check's Dice is not that of its rows"
        for run in apart.index[~(apart <= CHECK_TOLERANCE)]  # a missing one, too
    ]
    return Finding("best checks against rows", len(measured), tuple(wrong))


def _commits(place: Workplace, found: Results) -> Finding:
    dirty = found.runs.loc[found.runs["commit"].astype(str).str.endswith(CHANGED), "run"]
    remark = f"made with uncommitted changes: {', '.join(dirty)}" if len(dirty) else "all of a committed working tree"
    if own := sorted(set(found.runs["method"]) - METHODS.keys()):
        kept = f"{place.results}/code"
        remark += f"; no commit tells of {', '.join(own)}: {kept if Path(kept).is_dir() else 'not kept here'}"
    return Finding("commits of runs", 0, remark=f"{counted(len(found.runs), 'run')}, {remark}")


def _keys(place: Workplace, found: Results) -> Finding:
    """Are the rows those of the study as its file, its data and its methods are now?"""
    now = {job.run.name: job.key for job in place.jobs}
    wrong = [
        f"{run}: {'no such run in the study' if run not in now else 'settings, data or method have changed since'}"
        for run, key in zip(found.runs["run"], found.runs["key"], strict=True)
        if now.get(run) != key
    ]
    return Finding("keys of runs", len(found.runs), tuple(wrong))


def _rows(jobs: list[Job], found: Results) -> Finding:
    """The committed rows of each run against its own folder's."""
    compared, wrong = 0, []
    keys = dict(zip(found.runs["run"], found.runs["key"], strict=True))
    for job in jobs:
        if keys.get(job.run.name) != job.key:
            continue
        names = {name: getattr(job.run, name) for name in IDENTITY}
        if job.run.fold is not None:
            names["fold"] = job.run.fold
        committed = found.metrics[(found.metrics[list(names)] == pd.Series(names)).all(axis=1)]
        own = read_rows(job.folder / "metrics.csv").assign(**names)
        compared += len(own)
        both = own.merge(committed, on=tables.ROW, how="outer", suffixes=("_own", ""), indicator=True)
        if (both["_merge"] != "both").any():
            wrong.append(f"{job.run.name}: rows are missing or too many")
        for measure in tables.MEASURES:
            if not np.allclose(both[measure], both[f"{measure}_own"], rtol=ROW_TOLERANCE, atol=1e-9, equal_nan=True):
                wrong.append(f"{job.run.name}: {measure} is not what the run measured")
    return Finding("rows against runs/", compared, tuple(wrong), "" if compared else NONE_AT_HAND)


def _predictions(place: Workplace, jobs: list[Job]) -> Finding:
    """Metrics of the final weights, decoder 1, anew from label maps and references."""
    compared, wrong = 0, []
    reference = cache(place.store.label)  # a byte a voxel, and the same for every run
    spacings = {case["id"]: case["spacing"] for case in place.store.index["cases"]}
    for job in jobs:
        if not (job.folder / PREDICTIONS).exists():
            continue
        rows = read_rows(job.folder / "metrics.csv").query("selection == 'last' and output == 'decoder1'")
        with np.load(job.folder / PREDICTIONS) as maps:
            for row in rows.to_dict("records"):
                case, c = row["case"], job.classes.index(row["class"])
                spacing = spacings[case] if job.distances == "mm" else None
                measured = case_metrics(maps[case] == c, reference(case) == c, spacing)
                compared += 1
                if not all(
                    np.isclose(measured[m], row[m], rtol=ROW_TOLERANCE, equal_nan=True) for m in tables.MEASURES
                ):
                    wrong.append(f"{job.run.name}, {case}, {row['class']}: the label map gives other metrics")
    return Finding("rows against predicted label maps", compared, tuple(wrong), "" if compared else NONE_AT_HAND)


def _retrained(place: Workplace, job: Job) -> Iterator[Finding]:
    """Train and evaluate the run in a folder of its own, on the CPU."""
    if not job.finished("evaluate"):
        raise StudyError(f"run {job.run.name}: not finished in {place.root}/, so there is nothing to compare with")
    before, cpu = job.provenance["train"], find_device("cpu")
    now = {**environment(), "device": device_name(cpu)}
    other = [name for name in ("device", "packages", "commit") if before.get(name) != now[name]]
    remark = f"another {', '.join(other)}: a difference may be no fault" if other else "same CPU, same code"
    with tempfile.TemporaryDirectory(prefix="mlrpl-verify-") as folder:
        again = place.elsewhere(Path(folder))
        fresh = again.train(job.run.name, "cpu")
        rows = again.evaluate(job.run.name, "cpu")
        compared, wrong = 0, []
        for selection in SELECTIONS:
            ours, theirs = (load(at.folder / f"{selection}.pt", cpu)["method"] for at in (fresh, job))
            compared += len(ours)
            wrong += [
                f"{selection}.pt: {name} differs"
                for name in ours
                if name not in theirs or not torch.equal(ours[name], theirs[name])
            ]
        yield Finding(f"weights of {job.run.name}, trained anew", compared, tuple(wrong), remark)
        same = rows.to_csv(index=False) == read_rows(job.folder / "metrics.csv").to_csv(index=False)
        yield Finding(f"rows of {job.run.name}, trained anew", len(rows), () if same else ("they differ",), remark)
