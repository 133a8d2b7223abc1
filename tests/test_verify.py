"""`mlrpl verify`: it agrees with results as they are, and names what was touched."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from mlrpl import tables
from mlrpl.comparison import comparison_tables
from mlrpl.data import Store
from mlrpl.results import Results, collect
from mlrpl.study import Workplace
from mlrpl.training import load
from mlrpl.verify import Finding, verify

CPU = torch.device("cpu")
STUDY = {
    "name": "small", "title": "Small",
    "dataset": {"name": "drawn", "source": "phantom", "options": {"train": 3, "test": 1, "size": [24, 24, 16]}},
    "settings": {
        "patch": [16, 16, 16], "stride": [8, 8, 16], "filters": 2, "iterations": 6, "ramp_iterations": 150,
        "check_from": 2, "check_every": 2, "precision": "float32",
    },
    "runs": [
        {"variant": "vnet", "method": "vnet", "title": "V-Net", "labelled": 1},
        {"variant": "mlrpl", "method": "mlrpl", "title": "MLRPL", "labelled": 1},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A study with its rows and tables; without notebooks and pages, which nothing here looks at."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("small.yaml").write_text(yaml.safe_dump(STUDY), encoding="utf-8")
        place = Workplace("small.yaml")
        for job in place.jobs:
            place.train(job.run.name, "cpu")
            place.evaluate(job.run.name, "cpu")
        collect(place.jobs, Results.load(place.results)).save(place.results)
        found = Results.load(place.results)
        for name, table in comparison_tables(place, found).items():
            tables.save(table, place.results / "tables", name)
    return folder


@pytest.fixture
def verified(finished, tmp_path, monkeypatch) -> Workplace:
    """A copy to harm."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Workplace("small.yaml")


def wrong(findings: list[Finding]) -> dict[str, tuple[str, ...]]:
    return {finding.what: finding.wrong for finding in findings if finding.wrong}


def test_verify_agrees_with_an_unharmed_study_trained_anew_too(verified):
    findings = {finding.what: finding for finding in verify(verified, "mlrpl-1-s0")}
    assert wrong(list(findings.values())) == {}
    assert findings["tables/comparison"].compared == 6 * 11
    assert all(findings[f"tables/{name}"].compared for name in ("statistics", "optimism", "cost"))
    assert findings["best checks against rows"].compared == 2
    assert findings["rows against runs/"].compared == 10
    assert findings["rows against predicted label maps"].compared == findings["keys of runs"].compared == 2
    assert findings["weights of mlrpl-1-s0, trained anew"].compared > 100
    assert findings["rows of mlrpl-1-s0, trained anew"].compared == 6


def test_of_the_cases_only_the_references_are_read_and_each_of_them_once(verified, monkeypatch):
    read, original = [], Store._read
    monkeypatch.setattr(Store, "_read", lambda store, *what: (read.append(what), original(store, *what))[1])
    findings = {finding.what: finding for finding in verify(verified)}
    assert findings["rows against predicted label maps"].compared == 2
    assert read == [("test-000", "label")]


def test_without_runs_and_cases_the_tables_are_recomputed(verified):
    shutil.rmtree("runs")
    findings = {finding.what: finding for finding in verify(Workplace("small.yaml"))}
    assert findings["tables/comparison"].compared == 6 * 11
    assert "only tables were recomputed" in findings["runs"].remark
    assert not any(finding.wrong for finding in findings.values())
    assert not Path("runs").exists()  # nothing was drawn for it


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_verify_finds_what_was_touched(verified):
    results, run = Path("results/small"), verified.job("mlrpl-1-s0").folder
    table = pd.read_csv(results / "tables/comparison.csv", dtype=str)
    edit(results / "tables/comparison.csv", table["Dice (%)"][0], "99.99")
    edit(results / "tables/optimism.md", "decoder 1", "decoder 7")
    edit(results / "tables/largest.tex", "MLRPL", "MRLPL")
    assert wrong(verify(verified)) == {
        "tables/comparison": (f"row 1, Dice (%): '99.99' instead of {table['Dice (%)'][0]!r}",),
        "tables/optimism": ("optimism.md differs from what the rows give",),
        "tables/largest": ("largest.tex differs from what the rows give",),
    }
    edit(results / "runs.csv", run.name[-8:], "00000000")
    assert "mlrpl-1-s0: settings, data or method have changed since" in wrong(verify(verified))["keys of runs"]
    with np.load(run / "predictions.npz") as maps:
        np.savez(run / "predictions.npz", **{name: 1 - volume for name, volume in maps.items()})
    (found,) = wrong(verify(verified))["rows against predicted label maps"]
    assert found.startswith("mlrpl-1-s0, test-000, atrium")


def test_verify_finds_rows_and_weights_that_are_not_the_runs(verified):
    run = verified.job("vnet-1-s0").folder
    rows = pd.read_csv(run / "metrics.csv")
    rows.assign(dice=rows["dice"] + 0.01).to_csv(run / "metrics.csv", index=False)
    assert "vnet-1-s0: dice is not what the run measured" in wrong(verify(verified))["rows against runs/"]
    state = load(run / "last.pt", CPU)
    next(iter(state["method"].values())).view(-1)[0] += 1e-6
    torch.save(state, run / "last.pt")
    assert len(wrong(verify(verified, "vnet-1-s0"))["weights of vnet-1-s0, trained anew"]) == 1


def test_verify_finds_a_best_check_that_is_not_that_of_the_rows(verified):
    checks = pd.read_csv("results/small/checks.csv")
    of_vnet = checks["run"] == "vnet-1-s0"
    checks.assign(dice=checks["dice"] + 0.001 * of_vnet).to_csv("results/small/checks.csv", index=False)
    found = wrong(verify(verified))
    assert found["best checks against rows"] == ("vnet-1-s0: the best check's Dice is not that of its rows",)
    checks[of_vnet].to_csv("results/small/checks.csv", index=False)
    assert wrong(verify(verified))["best checks against rows"] == (
        "mlrpl-1-s0: the best check's Dice is not that of its rows",
    )


def test_checks_on_validation_cases_are_not_held_against_rows_of_test_cases(verified, monkeypatch):
    ids = Store.ids
    monkeypatch.setattr(Store, "ids", lambda store, split: ["val-000"] if split == "val" else ids(store, split))
    assert "best checks against rows" not in {finding.what for finding in verify(verified)}


def test_rows_of_a_run_that_the_study_no_longer_has_are_named(verified):
    edit(Path("small.yaml"), "variant: mlrpl", "variant: ours")
    found = wrong(verify(Workplace("small.yaml")))
    assert found["keys of runs"] == ("mlrpl-1-s0: no such run in the study",)
    assert "tables/cost" in found  # which then has a row too many
    edit(Path("small.yaml"), "variant: vnet", "variant: other")
    assert len(wrong(verify(Workplace("small.yaml")))["keys of runs"]) == 2


def test_results_of_a_dirty_working_tree_are_marked(verified):
    runs = pd.read_csv("results/small/runs.csv", dtype=str)
    runs.assign(commit=["0123456789ab+changes", "0123456789ab"]).to_csv("results/small/runs.csv", index=False)
    remarks = {finding.what: finding.remark for finding in verify(verified)}
    assert remarks["commits of runs"] == "2 runs, made with uncommitted changes: vnet-1-s0"
