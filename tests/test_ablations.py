"""Ablations are a few lines of YAML, coinciding runs are one, and their tables stand beside the paper's figures."""

import re
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mlrpl import results
from mlrpl.ablations import caution, figure, formatted, shown, table
from mlrpl.comparison import parts
from mlrpl.config import load_study
from mlrpl.errors import StudyError
from mlrpl.files import atomic
from mlrpl.methods import find_method
from mlrpl.results import Results, collect

STUDY = """
name: s
title: S
dataset: {name: d, source: phantom}
runs:
  - {variant: mlrpl, method: mlrpl, title: MLRPL, labelled: 4, seeds: [0, 1]}
ablations:
  - name: parts
    title: Parts
    axis: Loss
    paper_on: LA
    labelled: 4
    seeds: [0, 1]
    variants:
      - {variant: none, title: CE, options: {selection: all, weighting: none}}
      - {variant: hr, title: + HR, options: {selection: all}, paper: 88.6}
      - {variant: both, title: both, paper: 89.86}
  - name: tau
    title: Thresholds
    axis: τ
    labelled: 4
    seeds: 0
    variants:
      - {variant: wr, title: WR}
      - {variant: half, title: τ = 0.5, options: {selection: all}, paper: worse}
"""


@pytest.fixture
def study(tmp_path):
    (tmp_path / "s.yaml").write_text(STUDY, encoding="utf-8")
    return load_study(str(tmp_path / "s.yaml"))


def key(run) -> str:
    method = find_method(run.method)
    return run.key("data", method.result_version, method.options(), method.unused_settings)


def test_coinciding_runs_have_one_key(study):
    keys = {run.name: key(run) for run in study.runs()}
    assert len(keys) == 10
    assert len(set(keys.values())) == 6  # three variants at two seeds
    assert keys["mlrpl-4-s0"] == keys["parts-both-4-s0"] == keys["tau-wr-4-s0"]
    assert keys["tau-half-4-s0"] == keys["parts-hr-4-s0"]


def test_runs_of_ablations_come_after_the_studys_own_of_a_seed(study):
    assert [run.ablation for run in study.runs()] == ["", *["parts"] * 3, *["tau"] * 2, "", *["parts"] * 3]


def test_settings_of_an_ablation_are_all_its_variants(tmp_path):
    line = "  - {variant: instance, method: mlrpl, title: I, labelled: 4, settings: {normalisation: instance}}\n"
    text = STUDY.replace("ablations:\n", line + "ablations:\n")
    text = text.replace("    axis: Loss\n", "    axis: Loss\n    settings: {normalisation: instance, filters: 4}\n")
    text = text.replace("title: + HR, options: {selection: all}", "title: narrow, settings: {filters: 2}")
    text = text.replace("settings: {normalisation: instance}}", "settings: {normalisation: instance, filters: 4}}")
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    runs = {run.name: run for run in load_study(str(tmp_path / "s.yaml")).runs()}
    parts = [runs[f"parts-{name}-4-s0"].settings for name in ("none", "hr", "both")]
    assert [(of.normalisation, of.filters) for of in parts] == [("instance", 4), ("instance", 2), ("instance", 4)]
    assert runs["tau-wr-4-s0"].settings.normalisation == "batch"
    assert key(runs["instance-4-s0"]) == key(runs["parts-both-4-s0"]) != key(runs["mlrpl-4-s0"])


@pytest.mark.parametrize("options", ["{}", "{selection: all}"])
def test_an_ablation_has_one_reference(tmp_path, options):
    text = STUDY.replace("title: both, paper", f"title: both, options: {options}, paper")
    text = text.replace("options: {selection: all}, paper: 88.6", "paper: 88.6") if options == "{}" else text
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(StudyError, match="one variant must change nothing"):
        load_study(str(tmp_path / "s.yaml"))


@pytest.fixture
def found(study, tmp_path) -> Results:
    """All runs finished, Dice by options: +0.1 with WR, +0.05 with HR, a little by case and seed."""
    jobs = []
    for run in study.runs():
        folder = tmp_path / key(run)
        folder.mkdir(exist_ok=True)
        state = {"finished": lambda stage: True, "complete": True, "classes": ("background", "a")}
        jobs.append(SimpleNamespace(run=run, key=key(run), folder=folder, **state))
        gain = 0.1 * ("selection" not in run.options) + 0.05 * ("weighting" not in run.options)
        identity = {name: getattr(run, name) for name in ("study", "method", "variant", "labelled", "seed")}
        rows = [
            {**identity, "selection": selection, "output": "decoder1", "case": f"c{n}", "class": "a",
             "dice": 0.6 + gain + 0.01 * n + 0.02 * run.seed + more, "jaccard": 0.5, "hd95": 1, "asd": 1}
            for selection, more in {"last": 0, "published": 0.01}.items()
            for n in range(6)
        ]  # fmt: skip
        pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)
        log = {"iteration": [1], "total": [1.0], "learning_rate": [0.1], "seconds": [1.0]}
        pd.DataFrame(log).to_csv(folder / "log.csv", index=False)
        pd.DataFrame({"iteration": [1], "dice": [0.5]}).to_csv(folder / "checks.csv", index=False)
        facts = dict.fromkeys(
            ("precision", "device", "threads", "parameters", "seconds", "peak_memory_mb", "commit"), 1
        )
        jobs[-1].provenance = {"train": facts, "evaluate": {"seconds": 1}}
    return collect(jobs, Results(), study.ablations)


def test_each_coinciding_run_has_one_row_and_every_variant_finds_it(found):
    assert sorted(found.runs["run"]) == sorted(
        f"{name}-4-s{seed}" for name in ("mlrpl", "parts-none", "parts-hr") for seed in (0, 1)
    )
    assert len(found.metrics) == 6 * 2 * 6
    stand = found.ablations.set_index(["ablation", "variant", "seed"])["run"]
    assert stand["tau", "τ = 0.5", 0] == "parts-hr-4-s0"
    assert stand["parts", "both", 1] == "mlrpl-4-s1"


def test_comparisons_leave_ablations_out(found):
    compared = found.compared()
    assert compared.runs["run"].tolist() == ["mlrpl-4-s0", "mlrpl-4-s1"]
    assert set(compared.metrics["variant"]) == {"mlrpl"}
    assert set(compared.curves["run"]) == {"mlrpl-4-s0", "mlrpl-4-s1"}


def test_a_study_with_ablations_runs_alone_says_so_instead_of_comparing(found):
    alone = found.only(found.runs[found.runs["ablation"] != ""]).compared()
    assert len(found.runs) > len(alone) == 0
    part, *more = parts(SimpleNamespace(), alone)
    assert not more and part.shown and part.table is None and not part.figures
    assert part.text == "No run of the methods is finished yet, only runs of the ablations."


def test_results_come_back_from_their_files(found, tmp_path):
    found.save(tmp_path)
    again = Results.load(tmp_path)
    assert again.compared().runs["run"].tolist() == found.compared().runs["run"].tolist()
    assert not (tmp_path / "audit.csv").exists()
    rows = [table(results, load_study(str(tmp_path / "s.yaml")).ablations[0]) for results in (found, again)]
    assert rows[0]["dice"].to_numpy() == pytest.approx(rows[1]["dice"].to_numpy())


CONFLICT = ["<<<<<<< HEAD", "=======", ">>>>>>> theirs"]


@pytest.mark.parametrize("name", ["metrics", "runs", "curves", "checks", "ablations"])
@pytest.mark.parametrize("harm", [
    lambda lines: [CONFLICT[0], *lines, CONFLICT[1], *lines, CONFLICT[2]],
    lambda lines: [lines[0], CONFLICT[0], lines[1], CONFLICT[1], lines[1], CONFLICT[2], *lines[2:]],
    lambda lines: ["a,b", "1,2"],
    lambda lines: [],
])  # fmt: skip
def test_results_that_are_not_whole_are_refused_in_one_line(found, tmp_path, name, harm):
    found.save(tmp_path)
    path = tmp_path / f"{name}.csv"
    path.write_text("\n".join(harm(path.read_text().splitlines())))
    with pytest.raises(StudyError) as refused:
        Results.load(tmp_path)
    said = rf"{path}: (no table with the columns|line 2 is no row of it).*; bring back what was committed"
    assert re.match(said, str(refused.value))


@pytest.mark.parametrize("written", range(5))
def test_what_a_kill_left_of_results_does_not_count(found, tmp_path, monkeypatch, written):
    """kill -9 after so many of the files, of the first that a study has."""
    files = iter(range(written))

    @contextmanager
    def atomic_until_killed(path):
        with atomic(path) as partial:
            yield partial
            if next(files, None) is None:
                raise KeyboardInterrupt

    monkeypatch.setattr(results, "atomic", atomic_until_killed)
    with pytest.raises(KeyboardInterrupt):
        found.save(tmp_path)
    assert len([*tmp_path.glob("*.csv")]) == written
    left = Results.load(tmp_path)
    assert (len(left), len(left.metrics), left.keys(["background", "a"])) == (0, 0, set())
    monkeypatch.undo()
    found.save(tmp_path)
    assert Results.load(tmp_path).keys(["background", "a"]) == set(found.runs["key"])


def test_the_table_pairs_seeds_and_prints_the_papers_figures(found, study):
    rows = table(found, study.ablations[0]).set_index("variant")
    assert rows["dice"].to_numpy() == pytest.approx([63.5, 68.5, 78.5])
    assert rows["difference"].to_numpy()[:2] == pytest.approx([-15, -10])
    assert np.isnan(rows.loc["both", "difference"]) and rows.loc["both", "reference"]
    assert [np.ptp(each) for each in rows["dice_of_seeds"]] == pytest.approx([2, 2, 2])
    text = formatted(rows.reset_index(), study.ablations[0])
    assert text["Paper, LA: Dice (%)"].tolist() == ["—", "88.60", "89.86"]
    assert text["Loss"].tolist() == ["CE", "+ HR", "both (reference)"]
    assert text["Seeds above"].tolist() == ["0 of 2", "0 of 2", "—"]
    assert text["Each seed"].iloc[1] == "67.50, 69.50"
    assert text["Published: each seed"].iloc[1] == "68.50, 70.50"
    assert text["Runs"].iloc[1] == "parts-hr-4-s0, s1"
    rows = rows.reset_index()
    assert "Two seeds are too few" in caution(rows, found.runs)
    assert "With one seed a difference" in caution(rows.assign(seeds=[1, 3, 3]), found.runs)
    assert "precision" not in caution(rows, found.runs)
    on_gpu = found.runs["run"] == "parts-hr-4-s0"
    mixed = found.runs.assign(precision=on_gpu.map({True: "bfloat16", False: "float32"}))
    assert "different precisions** (5 runs: float32; 1 run: bfloat16)" in caution(rows, mixed)
    other = table(found, study.ablations[1])
    assert formatted(other, study.ablations[1])["Paper: Dice (%)"].tolist() == ["—", "worse"]


def test_the_folds_of_a_cross_validation_are_one_run(found, study):
    def folds(frame):
        return pd.concat([frame.assign(run=frame["run"] + f"-f{fold}") for fold in range(2)])

    cases = found.metrics["case"].rank(method="dense")
    metrics = found.metrics.assign(fold=(cases % 2).astype(int))
    runs = folds(found.runs)
    runs["precision"] = runs["run"].str.endswith("-f1").map({True: "bfloat16", False: "float32"})
    folded = replace(found, metrics=metrics, runs=runs, ablations=folds(found.ablations))
    rows, whole = (table(results, study.ablations[0]) for results in (folded, found))
    pd.testing.assert_frame_equal(rows.drop(columns="runs"), whole.drop(columns="runs"))
    assert formatted(rows, study.ablations[0])["Runs"].iloc[1] == "parts-hr-4-s0, s1"
    assert "6 runs: bfloat16" in caution(rows, folded.runs)


def test_the_figure_has_the_papers_panel_only_where_there_is_a_number(found, study):
    first, second = (figure(table(found, ablation), ablation) for ablation in study.ablations)
    assert len(first.axes) == 2 and len(second.axes) == 1
    assert "not known" in [text.get_text() for text in first.axes[1].texts]


def test_another_studys_ablations_are_shown_as_precomputed(found, study, tmp_path):
    place = SimpleNamespace(study=study.model_copy(update={"ablations": (), "ablations_of": "phantom-full"}),
                            results=tmp_path / "results" / "tour")  # fmt: skip
    nothing = shown(place)
    assert nothing.ablations == () and "`make reproduce STUDY=phantom-full` runs them" in nothing.said
    renamed = Results(**{**vars(found), "ablations": found.ablations.replace({"parts": "components"})})
    renamed.save(tmp_path / "results" / "phantom-full")
    there = shown(place)
    assert [ablation.name for ablation in there.ablations] == ["components"]
    assert there.said.startswith("Precomputed")
