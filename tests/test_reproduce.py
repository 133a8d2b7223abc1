"""A whole study by the command: what it leaves, what it does not do twice, and what it does after trouble.

Every `reproduce` starts several Jupyter kernels, so two tiny studies are reproduced once for all tests, and tests that
change something do so in a copy.
"""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
import yaml

import mlrpl.reproduce
from mlrpl.comparison import case_views
from mlrpl.errors import StudyError
from mlrpl.execution import execute_run
from mlrpl.files import read_json, write_json
from mlrpl.results import Results, collect, run_frames
from mlrpl.rows import LARGEST
from mlrpl.study import Workplace, pending
from mlrpl.training import load

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY = {
    "name": "tiny",
    "title": "A tiny study",
    "about": "To be read by a test.",
    "dataset": {"name": "drawn", "source": "phantom", "options": {"train": 3, "test": 1, "size": [24, 24, 16]}},
    "settings": {
        "patch": [16, 16, 16], "stride": [8, 8, 16], "filters": 2, "iterations": 6, "ramp_iterations": 150,
        "check_from": 2, "check_every": 2,
    },
    "audit": {"every": 2},
    "ablations_of": "phantom-full",
    "runs": [
        {"variant": "vnet", "method": "vnet", "title": "V-Net", "labelled": 1},
        {"variant": "mlrpl", "method": "mlrpl", "title": "MLRPL", "labelled": 1},
    ],
}  # fmt: skip

# Methods that are not part of the package. PAUSE slows training down, and lets every iteration end in a checkpoint.
OWN_METHODS = """
import os
import time
from mlrpl import training
from torch import nn
from mlrpl.methods import Method
from mlrpl.methods.mlrpl import MLRPL

PAUSE = float(os.environ.get("PAUSE", 0))
if PAUSE:
    training.CHECKPOINT_SECONDS = float(os.environ.get("EVERY", -1))

class Own(MLRPL):
    terms = ("sharpened",)

    def __init__(self, settings, in_channels, num_classes, sharpness: float = 2.0):
        super().__init__(settings, in_channels, num_classes, weighting="none")
        self.sharpness = sharpness

    def loss(self, batch, step):
        time.sleep(PAUSE)
        terms = super().loss(batch, step)
        terms["total"] = terms["sharpened"] = terms["supervised"] ** self.sharpness
        return terms

class Broken(MLRPL):
    def loss(self, batch, step):
        raise RuntimeError("this method is broken\\nand says so on two lines")

class Plain(Method):
    outputs = ("decoder1",)

    def __init__(self, settings, in_channels, num_classes):
        super().__init__(settings, in_channels, num_classes)
        self.network = nn.Sequential(
            nn.Conv3d(in_channels, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv3d(8, num_classes, 1)
        )

    def loss(self, batch, step):
        loss = nn.functional.cross_entropy(self.network(batch.image)[: len(batch.label)].float(), batch.label.long())
        return {"total": loss, "supervised": loss}

    def predict(self, image, outputs):
        return [self.network(image).float().softmax(1)]
"""
# The README's: a file, and a line of a study.
TENTH = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").split("tenth method", 1)[1]
ENTROPY = re.search(r"```python\n(.*?)```", TENTH, re.DOTALL)[1]
(ENTROPY_RUN,) = yaml.safe_load(re.search(r"```yaml\n(.*?)```", TENTH, re.DOTALL)[1])
OWN = {
    **TINY, "name": "own", "title": "Own methods", "audit": None, "ablations_of": None,
    "settings": {**TINY["settings"], "iterations": 30},
    "runs": [
        {"variant": "broken", "method": "own_methods:Broken", "title": "Broken", "labelled": 1},
        {"variant": "own", "method": "own_methods:Own", "title": "Own", "labelled": 1, "options": {"sharpness": 1.5}},
        {**ENTROPY_RUN, "labelled": 1},
        {"variant": "plain", "method": "own_methods:Plain", "title": "Plain", "labelled": 1},
    ],
}  # fmt: skip
REPORTS = ("04-compare", "06-reliability", "07-explore")


def write(folder: Path, study: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{study['name']}.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    (folder / "own_methods.py").write_text(OWN_METHODS)
    (folder / "entmin.py").write_text(ENTROPY, encoding="utf-8")
    return f"{study['name']}.yaml"


def command(*arguments: str, cwd: Path, **environment: str) -> dict[str, Any]:
    """Arguments for subprocess; methods of one's own lie beside the study's file."""
    return {
        "args": [sys.executable, "-m", "mlrpl", "reproduce", *arguments, "--device", "cpu"],
        "cwd": cwd, "env": {**os.environ, **environment}, "text": True,
        "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL,
    }  # fmt: skip


def reproduce(*arguments: str, cwd: Path, code: int = 0, **environment: str) -> str:
    """What the command prints; its exit code is checked."""
    done = subprocess.run(**command(*arguments, cwd=cwd, **environment), timeout=1200)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and bytes of every file but locks."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock" and path.suffix != ".lock"
    }


def run_folder(folder: Path, run: str) -> Path:
    (found,) = (folder / "runs").glob(f"*/{run}-????????")
    return found


def assert_same_result(first: Path, second: Path, run: str) -> None:
    """Weights, rows and checks are equal to the last bit, the log but for its seconds."""
    a, b = run_folder(first, run), run_folder(second, run)
    assert a.name == b.name
    for name in ("metrics.csv", "checks.csv"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    for name in ("last.pt", "published.pt"):
        ours, theirs = load(a / name, CPU), load(b / name, CPU)
        assert ours["iteration"] == theirs["iteration"]
        assert ours["method"].keys() == theirs["method"].keys()
        assert all(torch.equal(ours["method"][key], theirs["method"][key]) for key in ours["method"])
    logs = [pd.read_csv(folder / "log.csv", dtype=str).drop(columns="seconds") for folder in (a, b)]
    pd.testing.assert_frame_equal(*logs)
    assert list(logs[0]["iteration"].astype(int)) == list(range(1, len(logs[0]) + 1))


def assert_says_nothing_of_this_machine(*folders: Path, where: Path) -> None:
    """No file names one of these folders, the repository's, the environment's or the user's."""
    secrets = [str(p) for p in (where, *folders, ROOT, Path(sys.prefix), Path.home()) if len(p.parts) > 1]
    for path in where.rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".yaml"):
            data = path.read_bytes()
            assert not [s for s in secrets if re.search(re.escape(s.encode()) + rb"\b", data)], path


@dataclass
class Done:
    """A reproduced study; not to be changed."""

    folder: Path
    said: str

    def copy(self, folder: Path, *names: str) -> Path:
        for name in names or [path.name for path in self.folder.iterdir()]:
            source = self.folder / name
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, folder / name)
        return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Done:
    folder = tmp_path_factory.mktemp("tiny")
    return Done(folder, reproduce(write(folder, TINY), cwd=folder))


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Done:
    folder = tmp_path_factory.mktemp("own")
    return Done(folder, reproduce(write(folder, OWN), cwd=folder, code=1))


# What a study leaves.


def test_the_command_says_where_the_report_is_and_prints_the_table(tiny):
    assert "4 cases; 2 runs, 2 to do" in tiny.said
    assert "Report: results/tiny/index.html" in tiny.said
    rows = [line for line in tiny.said.splitlines() if line.startswith("|")]
    assert [("V-Net" in row, "MLRPL" in row) for row in rows[2:]] == [(True, False), (False, True), (False, True)]


def test_all_that_computes_has_the_device_that_was_asked_for(tiny):
    """Also the report, which computes a case's maps: another GPU may be full, or another's alone."""
    notebooks = [*(tiny.folder / "runs/tiny").rglob("0[237]-*.ipynb")]
    assert {path.stem for path in notebooks} == {"02-train", "03-evaluate", "07-explore"}
    for path in notebooks:
        assert read_json(path)["metadata"]["papermill"]["parameters"]["DEVICE"] == "cpu"
    assert "on cpu; runs at a time: " in tiny.said


def test_the_results_folder_holds_rows_tables_figures_and_pages(tiny):
    made = set(files(tiny.folder / "results"))
    assert {f"tiny/{name}.csv" for name in ("metrics", "runs", "curves", "checks", "audit")} <= made
    tables = ("comparison", "optimism", "statistics", "statistics-published", "reliability-which", "reliability-how")
    assert {f"tiny/tables/{name}.{kind}" for name in tables for kind in ("csv", "md", "tex")} <= made
    figures = ("montage", "intensities", "volumes", "distributions", "learning-curves", "checks", "contours")
    figures += ("differences", "reliability-which", "reliability-how", "reliability-diagram", "overlays")
    assert {f"tiny/figures/{name}.png" for name in figures} <= made
    pages = {"index", "01-data", *REPORTS, *(f"runs/{run}-1-s0-{stage}" for run in ("vnet", "mlrpl")
                                                 for stage in ("train", "evaluate"))}  # fmt: skip
    assert {f"tiny/{page}.html" for page in pages} | {"index.html"} == {name for name in made if name.endswith("html")}
    assert {"tiny/provenance.json"} <= made
    index = (tiny.folder / "results/tiny/index.html").read_text(encoding="utf-8")
    assert "No ablations of the study phantom-full are committed yet" in index
    assert "Which pseudo-labels are reliable?" in index
    assert "test cases are too few for a test" in index
    assert [name for name in made if "/." in name or name.endswith((".ipynb", ".pt"))] == []
    kept = {f"tiny/predictions/{run}-1-s0.npz" for run in ("vnet", "mlrpl")}
    assert {name for name in made if name.endswith(".npz")} == kept


def test_rows_are_tidy_and_complete(tiny):
    results = Results.load(tiny.folder / "results" / "tiny")
    assert list(results.metrics.columns) == [
        "study", "method", "variant", "labelled", "seed", "selection", "output", "case", "class",
        "dice", "jaccard", "hd95", "asd",
    ]  # fmt: skip
    found = set(results.metrics[["variant", "selection", "output", "case", "class"]].itertuples(index=False, name=None))
    assert found == {
        (variant, selection, output, "test-000", "atrium")
        for variant, outputs in (("vnet", ["decoder1", LARGEST]), ("mlrpl", ["decoder1", "mean", LARGEST]))
        for output in outputs
        for selection in ("last", "published")
    }
    assert len(results.metrics) == len(found)
    assert results.metrics["dice"].between(0, 1).all()
    assert list(results.runs["run"]) == ["vnet-1-s0", "mlrpl-1-s0"]
    assert list(results.runs["title"]) == ["V-Net", "MLRPL"]
    assert not results.runs["adopted"].any()
    for run, curve in results.curves.groupby("run"):
        assert list(curve["iteration"]) == list(range(1, 7)), run
        assert curve["mutual"].isna().all() == curve["beta"].isna().all() == (run == "vnet-1-s0")
    assert list(results.checks["iteration"]) == [2, 4, 6] * 2


def test_the_published_selections_dice_is_its_best_check(tiny):
    results = Results.load(tiny.folder / "results" / "tiny")
    best = results.checks.groupby("run")["dice"].max()
    rows = results.metrics.query("selection == 'published' and output == 'decoder1'").set_index("variant")["dice"]
    for variant, dice in rows.items():
        assert dice == pytest.approx(best[f"{variant}-1-s0"], abs=1e-5)


class Links(HTMLParser):
    """Targets of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("href", "src") and value]


def test_pages_link_to_one_another_and_load_nothing_from_a_network(tiny):
    linked = set()
    for page in (tiny.folder / "results").rglob("*.html"):
        for link in Links(page).found:
            if not link.startswith(("#", "data:", "https://", "http://", "mailto:")):
                target = (page.parent / link.partition("#")[0]).resolve()
                assert target.is_file(), (page.name, link)
                linked.add(target)
    pages = {path.resolve() for path in (tiny.folder / "results").rglob("*.html")}
    assert pages <= linked  # every page can be reached


def test_the_report_shows_the_studys_words_and_numbers(tiny):
    text = (tiny.folder / "results/tiny/index.html").read_text(encoding="utf-8")
    for words in ("A tiny study", "To be read by a test.", "V-Net", "MLRPL", "drawn by mlrpl.data.phantom"):
        assert words in text, words
    row = Results.load(tiny.folder / "results/tiny").metrics.query("variant == 'mlrpl' and output == 'mean'").iloc[0]
    assert f"{100 * row['dice']:.2f}" in text


def test_executed_notebooks_are_those_of_the_repository(tiny):
    page = (tiny.folder / "results/tiny/runs/mlrpl-1-s0-train.html").read_text(encoding="utf-8")
    assert "mlrpl-1-s0" in page
    assert "place.train" in re.sub(r"<[^>]+>", "", page)


def test_nothing_names_a_folder_of_this_machine(tiny):
    assert_says_nothing_of_this_machine(where=tiny.folder)


def test_provenance_says_what_the_results_were_made_with(tiny):
    provenance = yaml.safe_load((tiny.folder / "results/tiny/provenance.json").read_text(encoding="utf-8"))
    assert provenance["data"]["fingerprint"]
    for run in ("vnet-1-s0", "mlrpl-1-s0"):
        facts = provenance["runs"][run]
        assert facts["key"][:8] == run_folder(tiny.folder, run).name[-8:]
        assert {"commit", "device", "packages", "precision", "seconds", "threads"} <= facts["train"].keys()


# What is not done twice.


def test_the_same_command_does_nothing_the_second_time_and_says_so(tiny, tmp_path):
    folder = tiny.copy(tmp_path)
    before = {name: files(folder / name) for name in ("results", "runs")}
    for place in ("runs/tiny", "results/tiny", "results/tiny/figures"):  # of a process that was killed
        (folder / place / ".report.json.1.partial").write_text("{half")
    said = reproduce("tiny.yaml", cwd=folder)
    assert "2 runs, 0 to do" in said
    assert "nothing to do: every run is finished and the report is up to date" in said
    assert "Report: results/tiny/index.html" in said
    assert {name: files(folder / name) for name in ("results", "runs")} == before


def test_a_changed_setting_runs_what_it_affects_and_nothing_else(tiny, tmp_path):
    folder = tiny.copy(tmp_path)
    vnet, mlrpl = TINY["runs"]
    write(folder, {**TINY, "runs": [vnet, {**mlrpl, "settings": {"beta_max": 0.5}}]})
    of_before = folder / "results/tiny/05-ablate.html"  # as if there had been ablations
    of_before.write_text("older")
    before = files(folder / "runs")
    said = reproduce("tiny.yaml", cwd=folder)
    assert "2 runs, 1 to do" in said
    assert "mlrpl-1-s0: finished" in said
    assert not of_before.exists()
    assert "Against the rows that were in results/" in said
    after = files(folder / "runs")
    touched = {name for name in after if after[name] != before.get(name)}
    new = {name.split("/")[1] for name in touched if name.count("/") > 1}
    assert len(new) == 1 and new.pop().startswith("mlrpl-1-s0-")
    assert {name for name in touched if name.count("/") == 1} <= {
        *(f"tiny/{name}.ipynb" for name in REPORTS),
        "tiny/report.json",
    }
    assert before.keys() <= after.keys()  # the old run stays, should the setting be changed back
    old, now = (Results.load(at / "results/tiny").runs.set_index("variant")["key"] for at in (tiny.folder, folder))
    assert old["vnet"] == now["vnet"]
    assert old["mlrpl"] != now["mlrpl"]


def test_a_changed_title_runs_nothing_but_renews_the_report(tiny, tmp_path):
    folder = tiny.copy(tmp_path)
    (folder / "results/phantom-full").mkdir()  # its committed ablations are shown, now that they are there
    for rows in (ROOT / "results/phantom-full").glob("*.csv"):
        shutil.copy2(rows, folder / "results/phantom-full")
    write(folder, {**TINY, "title": "Another headline"})
    before = files(folder / "runs")
    said = reproduce("tiny.yaml", cwd=folder)
    assert "2 runs, 0 to do" in said
    assert "nothing to do" not in said
    index = (folder / "results/tiny/index.html").read_text(encoding="utf-8")
    assert "Another headline" in index
    assert "Precomputed: these are the committed results of the study phantom-full" in index
    assert 'href="05-ablate.html"' in index
    after = files(folder / "runs")
    assert {n for n in after if after[n] != before.get(n)} == {
        *(f"tiny/{name}.ipynb" for name in (*REPORTS, "05-ablate")),
        "tiny/report.json",
    }
    assert (folder / "results/tiny/metrics.csv").read_bytes() == (tiny.folder / "results/tiny/metrics.csv").read_bytes()


@pytest.fixture
def place(tiny, tmp_path, monkeypatch):
    """What is to do in a copy of the tiny study after a change, without doing it."""
    folder = tiny.copy(tmp_path)
    monkeypatch.chdir(folder)

    def to_do(only: str | None = None, adopted: frozenset[str] = frozenset(), **changes) -> list[str]:
        write(folder, {**TINY, **changes})
        return [job.run.name for job in pending(Workplace("tiny.yaml"), only, set(adopted))]

    to_do.folder = folder
    return to_do


def test_what_is_to_do_follows_the_settings(place):
    vnet, mlrpl = TINY["runs"]
    both = ["vnet-1-s0", "mlrpl-1-s0"]
    assert place() == []
    assert place(title="Other", about="Other", distances="voxels") == []
    assert place(audit=None, runs=[{**vnet, "title": "U-Net"}, {**mlrpl, "variant": "ours"}]) == []
    assert place(runs=[vnet, {**mlrpl, "options": {"gamma": 0.5}}]) == []  # the default, spelled out
    assert place(runs=[vnet, {**mlrpl, "options": {"gamma": 0.4}}]) == ["mlrpl-1-s0"]
    assert place(runs=[vnet, mlrpl, {**mlrpl, "variant": "two", "labelled": 2}]) == ["two-2-s0"]
    assert place(seeds=[0, 1]) == ["vnet-1-s1", "mlrpl-1-s1"]
    assert place(settings={**TINY["settings"], "iterations": 7}) == both
    assert place(settings={**TINY["settings"], "beta_max": 0.5}) == ["mlrpl-1-s0"]  # V-Net has no β
    assert place(dataset={**TINY["dataset"], "options": {**TINY["dataset"]["options"], "seed": 1}}) == both


def test_an_older_page_that_git_brought_back_is_written_anew(place, monkeypatch):
    place()
    written: list[Workplace] = []
    monkeypatch.setattr("mlrpl.reproduce.write_report", lambda at, *_: written.append(at))
    mlrpl.reproduce.reproduce("tiny.yaml", device="cpu")
    assert written == []
    page = Path("results/tiny/index.html")
    page.write_text(page.read_text(encoding="utf-8") + "<!-- older -->", encoding="utf-8")
    mlrpl.reproduce.reproduce("tiny.yaml", device="cpu")
    assert len(written) == 1


@pytest.mark.parametrize(("changed", "anew"), [
    ("words.py", ["01-data", "report"]), ("data/store.py", ["01-data", "report"]), ("templates/style.css", ["report"]),
])  # fmt: skip
def test_pages_are_made_anew_after_any_change_of_the_code(place, monkeypatch, changed, anew):
    place()
    made: list[str] = []
    monkeypatch.setattr("mlrpl.reproduce.write_report", lambda *_: made.append("report"))
    monkeypatch.setattr("mlrpl.reproduce.execute", lambda notebook, *_, **__: made.append(notebook))
    copy = shutil.copytree(mlrpl.reproduce.PACKAGE, "package", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr("mlrpl.reproduce.PACKAGE", Path(copy))
    mlrpl.reproduce.reproduce("tiny.yaml", device="cpu")
    assert made == []
    with (Path(copy) / changed).open("a") as file:
        file.write("\n")
    mlrpl.reproduce.reproduce("tiny.yaml", device="cpu")
    assert made == anew


def test_other_results_get_pictures_of_the_data_too(place, monkeypatch):
    place()
    page = Path("elsewhere/tiny/index.html")
    monkeypatch.setattr("mlrpl.reproduce.write_report", lambda *_: page.write_text("written"))
    mlrpl.reproduce.reproduce("tiny.yaml", device="cpu", results="elsewhere")
    assert (page.parent / "figures/montage.svg").exists()


def test_two_runs_of_one_key_are_one_job(place):
    mlrpl = TINY["runs"][1]
    twin = {**mlrpl, "variant": "twin", "title": "Twin", "labelled": 2}
    assert place(runs=[{**mlrpl, "labelled": 2}, twin]) == ["mlrpl-2-s0"]


def test_the_notebook_of_a_later_seed_shows_its_own_cases(place):
    place(seeds=[0, 1])
    at = Workplace("tiny.yaml")
    first, later = at.job("mlrpl-1-s0"), at.job("mlrpl-1-s1")
    shutil.copytree(first.folder, later.folder)
    later.record("train", **{k: v for k, v in first.provenance["train"].items() if k != "key"})
    later.record("evaluate", seconds=0)
    views, said = case_views(at, run_frames(later))
    assert "seed 1" in said
    assert [list(view.predictions) for view in views] == [["MLRPL"]] * 3
    views, said = case_views(at, collect([first, later], Results.load(at.results)))
    assert "seed 0" in said
    assert [list(view.predictions) for view in views] == [["MLRPL, s0"]] * 3  # a run of several says which


def test_the_notebook_of_an_ablations_run_shows_its_own_cases(place):
    variants = [{"variant": "all", "title": "All"}, {"variant": "ce", "title": "CE", "options": {"weighting": "none"}}]
    place(ablations=[{"name": "parts", "title": "Parts", "axis": "Part", "labelled": 1, "variants": variants}])
    at = Workplace("tiny.yaml")
    trained, job = at.job("mlrpl-1-s0"), at.job("parts-ce-1-s0")
    shutil.copytree(trained.folder, job.folder)
    job.record("train", **{k: v for k, v in trained.provenance["train"].items() if k != "key"})
    job.record("evaluate", seconds=0)
    views, _ = case_views(at, run_frames(job))
    assert [list(view.predictions) for view in views] == [["Parts: CE"]] * 3


def test_a_twin_has_the_rows_of_its_run_under_its_own_name(place):
    mlrpl = TINY["runs"][1]
    assert place(runs=[mlrpl, {**mlrpl, "variant": "twin", "title": "Twin"}]) == []
    found = collect(Workplace("tiny.yaml").jobs, Results.load(Path("results/tiny")))
    assert set(found.metrics["variant"]) == {"mlrpl", "twin"}
    rows = [group.drop(columns="variant").reset_index(drop=True) for _, group in found.metrics.groupby("variant")]
    pd.testing.assert_frame_equal(*rows)
    assert list(found.runs["title"]) == ["MLRPL", "Twin"]


def test_only_chooses_by_any_of_several_texts(place):
    settings = {**TINY["settings"], "iterations": 7}
    assert place("mlrpl", settings=settings) == ["mlrpl-1-s0"]
    assert place("vnet,mlrpl", settings=settings) == ["vnet-1-s0", "mlrpl-1-s0"]
    assert place("s0,nothing", settings=settings) == ["vnet-1-s0", "mlrpl-1-s0"]
    assert place(" mlrpl ,", settings=settings) == ["mlrpl-1-s0"]
    assert place("1-s0", settings=settings) == ["vnet-1-s0", "mlrpl-1-s0"]
    with pytest.raises(StudyError, match="no run with 'mlrpl-1-s'"):  # or "vnet-8" would be "vnet-80" too
        place("mlrpl-1-s", settings=settings)
    with pytest.raises(StudyError, match="no run with 'nothing' in its name: it has vnet-1, mlrpl-1"):
        place("nothing", settings=settings)


@pytest.mark.parametrize("lost", [
    "last.pt", "published.pt", "log.csv", "checks.csv", "metrics.csv", "provenance.json", "02-train.ipynb",
])  # fmt: skip
def test_a_run_that_lost_a_file_is_not_finished(place, lost):
    (run_folder(place.folder, "mlrpl-1-s0") / lost).unlink()
    assert place() == ["mlrpl-1-s0"]


def test_a_method_of_a_newer_result_version_is_run_again(place, monkeypatch):
    from mlrpl.methods.mlrpl import MLRPL

    monkeypatch.setattr(MLRPL, "result_version", MLRPL.result_version + 1)
    assert place() == ["mlrpl-1-s0"]


def test_jobs_do_not_change_results_and_absolute_paths_are_not_shown(tiny, tmp_path):
    """One run at a time, typed in another folder with absolute paths."""
    write(tmp_path / "place", TINY)
    (tmp_path / "place/elsewhere").mkdir()
    paths = [str(tmp_path / "place" / name) for name in ("tiny.yaml", "runs", "results")]
    reproduce(paths[0], "--jobs", "1", "--runs", paths[1], "--results", paths[2], cwd=tmp_path / "place/elsewhere")
    for run in ("vnet-1-s0", "mlrpl-1-s0"):
        assert_same_result(tmp_path / "place", tiny.folder, run)
    rows = "results/tiny/metrics.csv"
    assert (tmp_path / "place" / rows).read_bytes() == (tiny.folder / rows).read_bytes()
    assert_says_nothing_of_this_machine(tmp_path, where=tmp_path / "place")


def test_adopted_rows_are_taken_as_finished_and_marked(tiny, tmp_path):
    folder = tiny.copy(tmp_path, "results", "tiny.yaml")
    said = reproduce("tiny.yaml", "--adopt", cwd=folder)
    assert "2 runs, 0 to do" in said
    assert "adopted from results/tiny/: vnet-1-s0, mlrpl-1-s0" in said
    assert [path for path in folder.rglob("*") if path.name in ("log.csv", "checkpoint.pt", "last.pt")] == []
    first, adopted = (Results.load(place / "results/tiny") for place in (tiny.folder, folder))
    pd.testing.assert_frame_equal(adopted.metrics, first.metrics)
    pd.testing.assert_frame_equal(adopted.checks, first.checks)
    assert adopted.runs["adopted"].all()
    assert list(adopted.runs["key"]) == list(first.runs["key"])
    assert "adopted" in (folder / "results/tiny/index.html").read_text(encoding="utf-8")
    before = files(folder / "results")
    assert "nothing to do" in reproduce("tiny.yaml", "--adopt", cwd=folder)
    assert files(folder / "results") == before


def test_a_copy_adopts_what_the_original_has_committed(tiny, tmp_path):
    folder = tiny.copy(tmp_path, "results")
    write(folder, {**TINY, "name": "copied", "audit": None})
    original = read_json(folder / "results/tiny/provenance.json")["runs"]
    asked = {run: {"key": facts["key"]} for run, facts in original.items()}  # as a report of no run says it
    write_json(folder / "results/copied/provenance.json", {"runs": asked})
    said = reproduce("copied.yaml", "--adopt", cwd=folder)
    assert "adopted from results/tiny/: vnet-1-s0, mlrpl-1-s0" in said
    first, copied = (Results.load(folder / "results" / name) for name in ("tiny", "copied"))
    assert set(copied.metrics["study"]) == {"copied"}
    pd.testing.assert_frame_equal(copied.metrics.drop(columns="study"), first.metrics.drop(columns="study"))
    assert copied.runs["adopted"].all()
    before, now = (read_json(folder / "results" / name / "provenance.json")["runs"] for name in ("tiny", "copied"))
    assert now == before
    for run in ("vnet-1-s0", "mlrpl-1-s0"):  # and can be shown beside a run of the copy's own
        maps = [folder / "results" / name / f"predictions/{run}.npz" for name in ("tiny", "copied")]
        assert maps[0].read_bytes() == maps[1].read_bytes()
    assert "contours.svg" in {path.name for path in (folder / "results/copied/figures").iterdir()}


def test_results_of_a_packaged_study_are_not_lost_to_one_of_its_name(tiny, tmp_path, monkeypatch):
    folder = tiny.copy(tmp_path)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("mlrpl.reproduce.study_names", lambda: ["tiny"])
    mlrpl.reproduce.reproduce("tiny.yaml", device="cpu")  # it has all that is there
    write(folder, {**TINY, "runs": TINY["runs"][1:]})
    with pytest.raises(StudyError, match="results/tiny/ holds 1 run that this study does not have"):
        mlrpl.reproduce.reproduce("tiny.yaml", device="cpu")


def test_a_run_that_changed_while_its_command_was_under_way_is_refused(place):
    place(runs=[{**TINY["runs"][1], "options": {"gamma": 0.4}}])
    at = Workplace("tiny.yaml")
    assert at.job("mlrpl-1-s0", at.jobs[0].key) == at.jobs[0]
    with pytest.raises(StudyError, match="run mlrpl-1-s0: the study's file, its data or the method's code has changed"):
        execute_run(at, "mlrpl-1-s0", "cpu", key="0123456789abcdef")
    assert not at.jobs[0].folder.exists()


def test_only_rows_of_the_same_key_are_adopted(place):
    committed = Results.load(Path("results/tiny"))
    shutil.rmtree("runs/tiny")
    classes = Workplace("tiny.yaml").store.classes
    keys = frozenset(committed.keys(classes))
    assert place(adopted=keys) == []
    assert committed.keys((classes[0], "another name")) == set()
    vnet, mlrpl = TINY["runs"]
    assert place(adopted=keys, runs=[vnet, {**mlrpl, "settings": {"beta_max": 0}}]) == ["mlrpl-1-s0"]
    found = collect(Workplace("tiny.yaml").jobs, committed)
    assert list(found.runs["run"]) == ["vnet-1-s0"]
    assert set(found.metrics["variant"]) == {"vnet"}
    assert found.runs["adopted"].all()


def test_a_sitting_that_does_some_runs_keeps_the_rows_and_pictures_of_the_others(tiny, tmp_path):
    folder = tiny.copy(tmp_path, "results", "tiny.yaml")
    before = Results.load(folder / "results/tiny")
    facts = json.loads((folder / "results/tiny/provenance.json").read_text(encoding="utf-8"))
    said = reproduce("tiny.yaml", "--only", "vnet", cwd=folder)
    assert "2 runs, 1 to do" in said
    after = Results.load(folder / "results/tiny")
    pd.testing.assert_frame_equal(after.metrics, before.metrics)
    assert dict(zip(after.runs["run"], after.runs["adopted"], strict=True)) == {"vnet-1-s0": False, "mlrpl-1-s0": True}
    kept = json.loads((folder / "results/tiny/provenance.json").read_text(encoding="utf-8"))["runs"]
    assert kept["mlrpl-1-s0"] == facts["runs"]["mlrpl-1-s0"]
    count = len(before.metrics[before.metrics["variant"] == "vnet"])
    assert f"{count} compared, mean |Δ Dice| 0.000" in said
    page = (folder / "runs/tiny/04-compare.ipynb").read_text(encoding="utf-8")
    assert "image/png" in page
    assert "No label maps" not in page


# Trouble.


def test_a_failing_run_is_listed_and_the_others_go_on(own):
    """The other one, a method defined outside the package, is trained and reported."""
    assert "1 run failed" in own.said
    failed = run_folder(own.folder, "broken-1-s0")
    line = next(n for n, text in enumerate(OWN_METHODS.splitlines(), 1) if "this method is broken" in text)
    where = f"(own_methods.py, line {line}) (see {failed.relative_to(own.folder)}/02-train.failed.ipynb)"
    assert own.said.rstrip().splitlines()[-1].strip() == f"broken-1-s0: RuntimeError: this method is broken {where}"
    assert not (failed / "last.pt").exists()
    assert not (failed / "02-train.ipynb").exists()
    assert "this method is broken" in (failed / "02-train.failed.ipynb").read_text(encoding="utf-8")
    results = Results.load(own.folder / "results/own")
    assert list(results.runs["run"]) == ["own-1-s0", "entropy-1-s0", "plain-1-s0"]
    assert set(results.metrics["method"]) == {"own_methods:Own", "entmin:EntropyMinimisation", "own_methods:Plain"}
    page = (own.folder / "results/own/index.html").read_text(encoding="utf-8")
    assert "3 of 4 runs finished" in page
    for name in ("own_methods.py", "entmin.py"):  # no commit tells what they were
        assert (own.folder / "results/own/code" / name).read_text() == (own.folder / name).read_text()
        assert f'href="code/{name}"' in page
    assert_says_nothing_of_this_machine(own.folder, where=own.folder / "results")
    arguments = [sys.executable, "-m", "mlrpl", "verify", "own.yaml"]
    said = subprocess.run(arguments, cwd=own.folder, text=True, capture_output=True, check=True).stdout
    own_ones = "entmin:EntropyMinimisation, own_methods:Own, own_methods:Plain"
    assert f"no commit tells of {own_ones}: results/own/code" in said


def test_a_method_from_outside_trains_with_its_options(own):
    log = pd.read_csv(run_folder(own.folder, "own-1-s0") / "log.csv")
    assert len(log) == 30
    assert list(log["total"]) == pytest.approx(list(log["supervised"] ** 1.5), rel=1e-5)
    assert log["sharpened"].equals(log["total"])


def test_what_cannot_be_adopted_is_left(tiny, tmp_path, monkeypatch):
    folder = tiny.copy(tmp_path)
    monkeypatch.chdir(folder)
    for name, text in {"empty": "", "foreign": "a,b\n1,2\n"}.items():
        (folder / "results" / name).mkdir()
        (folder / "results" / name / "runs.csv").write_text(text)
    shutil.copytree("results/tiny", "results/partly")
    Path("results/partly/checks.csv").unlink()
    shutil.copytree("results/tiny", "results/whole")
    assert list(mlrpl.reproduce._other_results(Workplace("tiny.yaml"))) == [Path("results/whole")]


def test_a_finished_run_keeps_the_code_of_a_method_from_outside_and_no_checkpoint(own):
    folder = run_folder(own.folder, "own-1-s0")
    assert (folder / "code/own_methods.py").read_text() == OWN_METHODS
    assert not (folder / "checkpoint.pt").exists()


def test_the_readmes_tenth_method_is_compared_with_the_others(own):
    log = pd.read_csv(run_folder(own.folder, "entropy-1-s0") / "log.csv")
    assert log["mutual"].between(0, math.log(2)).all()
    assert list(log["total"]) == pytest.approx(list(log["supervised"] + 0.2 * math.exp(-5) * log["mutual"]), rel=1e-5)
    rows = [row.split("|")[2].strip() for row in own.said.splitlines() if row.startswith("|")]
    assert rows[2:] == ["Own", "Own", "Entropy", "Plain"]  # with one decoder there is no mean of several


@pytest.mark.fault("kill -9 of the whole command")
def test_killed_with_its_runs_it_goes_on_where_they_were(own, tmp_path):
    """kill -9 of the command alone, while a run trains: its processes end, and the next command resumes."""
    write(tmp_path, OWN)
    process = subprocess.Popen(**command("own.yaml", "--only", "own", cwd=tmp_path, PAUSE="0.2"))
    folder, children = None, []
    try:
        deadline = time.monotonic() + 600
        while process.poll() is None and time.monotonic() < deadline:
            folder = next((tmp_path / "runs/own").glob("own-1-s0-*"), None)
            if folder and (folder / "checkpoint.pt").exists() and load(folder / "checkpoint.pt", CPU)["iteration"] >= 3:
                break
            time.sleep(0.05)
        assert process.poll() is None, process.communicate()
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2  # the run and its kernel
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
    done = load(folder / "checkpoint.pt", CPU)["iteration"]
    assert 3 <= done < 30
    before = pd.read_csv(io.StringIO((folder / "log.csv").read_text()), dtype=str).head(done)

    said = reproduce("own.yaml", "--only", "own", cwd=tmp_path)
    assert "own-1-s0: finished" in said
    assert not list((tmp_path / "runs").glob("own/broken-*"))
    log = pd.read_csv(folder / "log.csv", dtype=str)
    pd.testing.assert_frame_equal(log.head(done), before)  # the seconds too: these iterations were not done again
    assert_same_result(tmp_path, own.folder, "own-1-s0")
    rows, undisturbed = (Results.load(at / "results/own").metrics for at in (tmp_path, own.folder))
    pd.testing.assert_frame_equal(rows, undisturbed[undisturbed["variant"] == "own"].reset_index(drop=True))
    assert [path.name for path in tmp_path.rglob("*.partial*")] == []


@pytest.mark.fault("Ctrl-C or SIGTERM")
def test_ctrl_c_ends_every_process_with_a_checkpoint_and_the_run_goes_on(own, tmp_path, monkeypatch):
    """SIGINT for the command alone, as Ctrl-C would reach it; no checkpoint is due by the clock."""
    write(tmp_path, OWN)
    process = subprocess.Popen(
        **command("own.yaml", "--only", "own", cwd=tmp_path, PAUSE="0.2", EVERY="1000"),
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    children, progress = [], {}
    try:
        deadline = time.monotonic() + 600
        while process.poll() is None and time.monotonic() < deadline and progress.get("iteration", 0) < 3:
            folder = next((tmp_path / "runs/own").glob("own-1-s0-*"), None)
            progress = read_json(folder / "progress.json") if folder else {}
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, said + errors
    assert "Traceback" not in said + errors
    assert errors.rstrip().endswith("mlrpl: interrupted; the same command goes on")
    at = load(folder / "checkpoint.pt", CPU)["iteration"]
    assert 3 <= at < 30
    assert f"run own-1-s0: interrupted, its checkpoint is at iteration {at} of 30; the same command goes on" in said
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    assert [path.name for path in folder.iterdir() if "ipynb" in path.name or "partial" in path.name] == []
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    place = Workplace("own.yaml")
    place.train("own-1-s0", "cpu")
    place.evaluate("own-1-s0", "cpu")
    assert_same_result(tmp_path, own.folder, "own-1-s0")
