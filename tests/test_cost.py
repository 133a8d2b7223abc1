"""`mlrpl cost`: the time of a study's runs from a few of their steps."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from mlrpl import cli, cost
from mlrpl.cost import Cost, costs
from mlrpl.errors import StudyError
from mlrpl.steps import cost_study
from mlrpl.study import Workplace

STUDY = {
    "name": "priced", "title": "Priced", "seeds": [0, 1],
    "dataset": {"name": "drawn", "source": "phantom", "options": {"train": 3, "test": 2, "size": [24, 24, 16]}},
    "settings": {
        "patch": [16, 16, 16], "stride": [8, 8, 16], "filters": 2, "iterations": 40, "check_from": 10,
        "check_every": 10, "ramp_iterations": 8, "precision": "float32",
    },
    "audit": {"every": 2},
    "ablations": [{"name": "gamma", "title": "Weight", "axis": "γ", "labelled": 1, "variants": [
        {"variant": "0.5", "title": "γ = 0.5"}, {"variant": "1.0", "title": "γ = 1.0", "options": {"gamma": 1.0}},
    ]}],
    "runs": [
        {"variant": "vnet", "method": "vnet", "title": "V-Net", "labelled": [1, 3]},
        {"variant": "mlrpl", "method": "mlrpl", "title": "MLRPL", "labelled": 1},
    ],
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch) -> Workplace:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cost, "SECONDS", 0.1)
    Path("priced.yaml").write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    return Workplace("priced.yaml")


def test_runs_of_one_kind_are_measured_once(place):
    vnet, mlrpl, gamma = costs(place, device="cpu")
    assert (vnet.title, vnet.runs, vnet.left) == ("V-Net", 4, 4)
    assert (mlrpl.title, mlrpl.runs, mlrpl.left) == ("MLRPL", 2, 2)  # the ablation's reference coincides with them
    assert (gamma.title, gamma.runs) == ("Weight: γ = 1.0", 2)
    assert 0 < vnet.step_s < mlrpl.step_s  # twice the volumes through twice the decoders
    assert not list(place.runs.glob("*")), "nothing of a measurement may be taken for a run"


def test_parts_follow_from_steps_and_windows(place, monkeypatch):
    monkeypatch.setattr(cost, "_step_seconds", lambda step, device: 0.5)
    monkeypatch.setattr(cost, "seconds", lambda step, device: 7.0)  # of the first step, which may compile
    monkeypatch.setattr(cost, "_window_seconds", lambda method, case, outputs, device, precision: float(len(outputs)))
    mlrpl = next(found for found in costs(place, device="cpu") if found.title == "MLRPL")
    windows = 2 * 4  # two cases of 24×24×16 voxels, windows of 16×16×16 at a stride of 8×8×16
    assert mlrpl.train_s == 7 + 39 * 0.5
    assert mlrpl.check_s == 4 * windows
    assert mlrpl.test_s == windows * 2 * 2
    assert mlrpl.run_s == mlrpl.train_s + 4 * windows + 4 * windows


@pytest.mark.parametrize(("normalisation", "passes"), [("batch", 2 * 2 + 1), ("instance", 2 * 2)])
def test_each_volumes_own_statistics_cost_a_pass_where_there_are_some(place, monkeypatch, normalisation, passes):
    monkeypatch.setattr(cost, "_step_seconds", lambda step, device: 0.5)
    monkeypatch.setattr(cost, "_window_seconds", lambda method, case, outputs, device, precision: float(len(outputs)))
    settings = {**STUDY["settings"], "patch": [32, 16, 16], "normalisation": normalisation}
    Path("priced.yaml").write_text(yaml.safe_dump({**STUDY, "settings": settings}), encoding="utf-8")
    mlrpl = next(found for found in costs(Workplace("priced.yaml"), device="cpu") if found.title == "MLRPL")
    assert mlrpl.test_s == passes * 2 * 2  # two cases of 24×24×16 voxels, two windows each


def test_finished_runs_are_not_to_do(place):
    place.train("vnet-1-s0", "cpu")
    place.evaluate("vnet-1-s0", "cpu")
    for notebook in ("02-train", "03-evaluate"):
        (place.job("vnet-1-s0").folder / f"{notebook}.ipynb").touch()
    (vnet,) = costs(place, only="vnet-1", device="cpu")
    assert (vnet.runs, vnet.left) == (2, 1)


def test_the_total_counts_all_and_what_is_left():
    one = Cost("V-Net", 3, 2, step_s=0.1, train_s=3000, check_s=300, test_s=300, precision="float32")
    text = cost.total([one, replace(one, runs=1, left=0, precision="bfloat16")], torch.device("cpu"))
    assert text.startswith("4 runs, one at a time (CPU")
    assert "bfloat16 and float32): 4.0 h; 2 to do: 2.0 h" in text


def test_the_command_prints_a_line_a_kind(place, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mlrpl", "cost", "priced.yaml", "--device", "cpu", "--only", "vnet"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| V-Net | 4 |") for line in lines) == 1
    assert lines[-1].startswith("4 runs, one at a time")


def test_an_unknown_run_is_one_line(place):
    with pytest.raises(StudyError, match="no run with 'unet' in its name: it has vnet-1, vnet-3, mlrpl-1"):
        cost_study("priced.yaml", None, "unet", "cpu", "runs")
