"""A study's report: its page, the executed notebooks as pages, what is kept with them, and the overview of all."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from mlrpl import ablations, audit_report, captions, tables
from mlrpl.comparison import Part, outcomes, trainings
from mlrpl.config import Run
from mlrpl.evaluation import PREDICTIONS
from mlrpl.execution import execute, notebook_parameters
from mlrpl.explore import explorable
from mlrpl.files import copy_whole, read_json, read_rows, remove_temporary, write_json, write_text
from mlrpl.locks import locked
from mlrpl.provenance import CHANGED, environment
from mlrpl.report import HomeEntry, Link, Picture, Section, notebook_to_html, write_home, write_index
from mlrpl.results import Results
from mlrpl.study import Job, Workplace, first_seeds, one_a_key
from mlrpl.words import counted

STAGE_PAGES = {"02-train": "Training", "03-evaluate": "Evaluation"}
REPORT_PAGES = {
    "04-compare": "Comparison",
    "05-ablate": "Ablations",
    "06-reliability": "Reliability",
    "07-explore": "Exploring",
}

OVERVIEW = """Mutual learning with reliable pseudo labels, reproduced: one page a study. The tables: Dice (%) of decoder
1 on the test cases, of the last weights and of the best check on the test cases, as the literature selects; of two
seeds both, of more their mean ± standard deviation. For research, not for diagnosis."""


def report_notebooks(place: Workplace, found: Results) -> list[str]:
    """The notebooks over all runs that this study has something to show in."""
    apply = {
        "05-ablate": bool(ablations.shown(place, found).ablations),
        "06-reliability": len(found.audit) > 0,
        "07-explore": bool(explorable(place)),
    }
    return [name for name in REPORT_PAGES if apply.get(name, True)]


def write_report(place: Workplace, found: Results, device: str | None) -> None:
    """Write rows, figures, tables and pages of a study into its results.

    Args:
        place: the study.
        found: the rows of all its finished runs.
        device: as typed; where 07-explore runs a network.
    """
    folder = place.results
    found.save(folder)
    title = place.study.title
    notebook_to_html(place.runs / "01-data.ipynb", folder / "01-data.html", f"{title}: data", "index.html")
    recorded = _recorded(place)
    _keep_predictions(place, found, {key: maps for key, _, maps in recorded if maps.exists()})
    shown = report_notebooks(place, found)
    for name in set(REPORT_PAGES) - {*shown, "07-explore"}:  # of weights that are elsewhere now, the page stays
        (folder / f"{name}.html").unlink(missing_ok=True)
    for name in shown:
        own = {"STATIC": True, "DEVICE": device.split(",")[0] if device else None} if name == "07-explore" else {}
        parameters = notebook_parameters(place, RESULTS=str(place.results.parent), **own)
        execute(name, place.runs / f"{name}.ipynb", **parameters)
        what = f"{title}: {REPORT_PAGES[name].lower()}"
        notebook_to_html(place.runs / f"{name}.ipynb", folder / f"{name}.html", what, "index.html")
    for job in representative(place.jobs):
        for notebook, what in STAGE_PAGES.items():
            if (executed := job.folder / f"{notebook}.ipynb").exists():
                notebook_to_html(
                    executed,
                    page(folder, job, notebook),
                    f"{job.run.title}, {job.run.labelled} labelled: {what}",
                    "../index.html",
                )
    _keep_code(place, found)
    described = {job.run.name: {"key": job.key, **_described(job)} for job in one_a_key(place.jobs)}
    before = {key: facts for key, facts, _ in recorded}
    for row in found.runs[found.runs["adopted"]].to_dict("records"):
        described[row["run"]] = before.get(row["key"], described[row["run"]])
    provenance = {
        "study": place.study.name,
        "title": title,
        "data": {name: place.store.index[name] for name in ("name", "licence", "citation", "fingerprint", "split")},
        "report": environment(),
        "runs": described,
        "asked": len(one_a_key(place.jobs)),
    }
    write_json(folder / "provenance.json", provenance)
    _index(place, found, provenance)
    with locked(place.root, "results/index.html: another process is writing it", "overview.", wait=60):
        remove_temporary(folder.parent)  # other studies write here too, so only under the lock
        write_overview(folder.parent)


def _recorded(place: Workplace) -> list[tuple[str, dict[str, Any], Path]]:
    """Of each run that results hold its key, what they tell of it, and the file of its label maps, if they kept them.

    Rows may be adopted from another study; what our own provenance says comes last, so it counts.
    """
    pages = [*sorted(place.results.parent.glob("*/provenance.json")), place.results / "provenance.json"]
    return [
        (facts.get("key", ""), facts, page.parent / "predictions" / f"{name}.npz")
        for page in pages
        for name, facts in read_json(page).get("runs", {}).items()
        if "train" in facts  # else it was only asked for
    ]


def _keep_predictions(place: Workplace, found: Results, recorded: Mapping[str, Path]) -> None:
    """Label maps of representative runs go with the results, so that a later sitting can show all methods.

    Args:
        place: the study.
        found: the rows of all its finished runs.
        recorded: by key, label maps that results keep.
    """
    folder, finished = place.results / "predictions", set(found.runs["run"])
    kept = {job.run.name: job for job in representative(place.jobs) if job.run.name in finished}
    for path in folder.glob("*.npz"):
        if path.stem not in kept:
            path.unlink()
    for name, job in kept.items():
        own, mine = job.folder / PREDICTIONS, folder / f"{name}.npz"
        maps = own if own.exists() else recorded.get(job.key, mine)
        if maps != mine and maps.exists():
            copy_whole(maps, mine)


def _keep_code(place: Workplace, found: Results) -> None:
    """A commit of this repository does not tell what a method of one's own was: as it was trained, else as it is."""
    folder, code, shown = place.results / "code", {}, set(found.runs["run"])
    for job in place.jobs:
        if job.run.name in shown:
            trained = job.folder / "code"
            texts = {path.relative_to(trained): path.read_text(encoding="utf-8") for path in trained.rglob("*.py")}
            code |= texts or place.own_code(job.run.method)
    for path in folder.rglob("*.p*"):  # what a kill left unfinished, too
        if path.relative_to(folder) not in code and path.is_file():
            path.unlink()
    for path, text in code.items():
        write_text(folder / path, text)


def _described(job: Job) -> dict[str, Any]:
    """A run's stages as provenance.json has them, without their keys."""
    return {
        stage: {k: v for k, v in facts.items() if k != "key"}
        for stage, facts in job.provenance.items()
        if stage != "run"
    }


def representative(jobs: Sequence[Job]) -> list[Job]:
    """The first seed of every variant and number of labelled cases, ablations aside: their notebooks become pages."""
    return first_seeds([job for job in jobs if not job.run.ablation])


def page(folder: Path, job: Job, notebook: str) -> Path:
    """Where a run's notebook is kept as a page."""
    return folder / "runs" / f"{job.run.name}-{notebook[3:]}.html"


def _index(place: Workplace, found: Results, provenance: dict[str, Any]) -> None:
    study, folder = place.study, place.results
    everything, found = found, found.compared()
    first, *others = outcomes(place, found)
    first = replace(first, text=remarks([job.run for job in one_a_key(place.jobs)], everything.runs) + first.text)
    shown = [name for name in REPORT_PAGES if (folder / f"{name}.html").exists()]
    sections = [
        *_sections([first, *others], folder),
        *_ablation_section(place),
        *_reliability_section(place, everything),
        *_sections(trainings(place, found), folder),
        Section("Cases", f"Licence of the images: {place.store.licence}.", figures=_pictures(folder, "contours")),
        Section("Terms", captions.TERMS),
        Section(
            "Notebooks",
            "Every figure above comes from these, executed as they are; code unfolds with a click.",
            _run_table(place, everything),
            links=[
                Link("Data", "01-data.html"),
                *(Link(REPORT_PAGES[name], f"{name}.html") for name in shown),
                *(Link(path.name, path.relative_to(folder).as_posix()) for path in sorted(folder.glob("code/**/*.py"))),
            ],
        ),
    ]
    write_index(
        folder / "index.html",
        title=study.title,
        lead=study.about,
        sections=sections,
        provenance=provenance,
        home="../index.html",
    )


def remarks(asked: Sequence[Run], runs: pd.DataFrame) -> str:
    """What a reader must know of a study's runs before comparing them, in Markdown; empty where there is nothing.

    Args:
        asked: runs of the study.
        runs: a row a finished run.
    """
    said = ""
    if len(runs) < len(asked):
        said += f"{len(runs)} of {counted(len(asked), 'run')} finished. "
        begun = set(zip(runs["title"], runs["labelled"], strict=True))
        missing: dict[int, list[str]] = {}
        for run in asked:
            if not run.ablation and (run.title, run.labelled) not in begun:
                missing.setdefault(run.labelled, []).append(run.title)
        if missing:
            groups = (f"with {n} labelled {', '.join(dict.fromkeys(titles))}" for n, titles in missing.items())
            said += f"None yet of these: {'; '.join(groups)}. "
    if dirty := runs["commit"].astype(str).str.endswith(CHANGED).sum():
        said += f"**{counted(dirty, 'run')} made with uncommitted changes** to the code; the list below marks them. "
    return said + tables.conditions(runs)


def _sections(parts: Sequence[Part], folder: Path) -> list[Section]:
    return [
        Section(part.heading, part.text, part.table, figures=_pictures(folder, *part.figures))
        for part in parts
        if part.shown
    ]


def _ablation_section(place: Workplace) -> list[Section]:
    if not (place.study.ablations or place.study.ablations_of):
        return []
    shown = ablations.shown(place)
    names = [f"ablation-{ablation.name}" for ablation in shown.ablations]
    text = f"{shown.said} {captions.ABLATIONS}" if names else shown.said
    return [Section("Ablations", text, figures=_pictures(place.results, *names))]


def _reliability_section(place: Workplace, found: Results) -> list[Section]:
    if not len(found.audit):
        return []
    subjects = audit_report.subjects(found)
    names = [name for name in captions.CAPTIONS if name.startswith("reliability-")]
    first = f" Pictures: {audit_report.described(subjects[''])}; the others are on the page *Reliability*."
    return [
        Section(
            "Reliability of the pseudo-labels",
            "\n\n".join(audit_report.answers(subject) for subject in subjects.values()),
            audit_report.together(audit_report.predictor_table, subjects),
            captions.RELIABILITY + (first if len(subjects) > 1 else ""),
            figures=_pictures(place.results, *names),
        )
    ]


def _pictures(folder: Path, *names: str) -> list[Picture]:
    """Saved figures for a page: SVG, or PNG where that is less than half as large; of voxels an SVG shows no more."""
    pictures = []
    for name in names:
        vector, pixels = (folder / "figures" / f"{name}.{kind}" for kind in ("svg", "png"))
        if vector.exists():
            path = pixels if 2 * pixels.stat().st_size < vector.stat().st_size else vector
            pictures.append(Picture(path, captions.CAPTIONS.get(name, ""), name.replace("-", " ")))
    return pictures


def _run_table(place: Workplace, found: Results) -> pd.DataFrame:
    """`tables.run_list`, with links to the runs' executed notebooks where they are kept."""
    table = tables.run_list(found.runs)
    jobs = {job.run.name: job for job in place.jobs}
    for notebook, what in STAGE_PAGES.items():
        pages = [page(place.results, jobs[run], notebook) for run in table["Run"]]
        table[what] = [Link(what.lower(), f"runs/{path.name}") if path.exists() else "" for path in pages]
    return table


def _progress(finished: int, asked: int) -> str:
    return counted(asked, "run") if finished == asked else f"{finished} of {counted(asked, 'run')}"


def write_overview(results: Path) -> None:
    """`results/index.html`: the studies with what they found, the paper's first; whatever else has a page there."""
    studies, others = [], []
    for index in sorted(results.glob("*/index.html")):
        facts = read_json(index.parent / "provenance.json")
        title, href = facts.get("title", index.parent.name), f"{index.parent.name}/index.html"
        runs, table = index.parent / "runs.csv", index.parent / "tables" / "comparison.csv"
        if runs.exists() and table.exists():
            comparison, finished = pd.read_csv(table, dtype=str, keep_default_na=False), len(read_rows(runs))
            cases = comparison["Cases"].astype(int).max()  # fewer where folds of a cross-validation are missing
            text = f"{counted(cases, 'test case')}; {_progress(finished, facts.get('asked', finished))}"
            studies.append(HomeEntry(title, href, text, tables.overview(comparison)))
        else:
            others.append(HomeEntry(title, href, facts.get("summary", "")))
    studies.sort(key=lambda study: not any("paper" in heading for heading in study.table))
    write_home(results / "index.html", title="MLRPL: results", lead=OVERVIEW, entries=[*studies, *others])
