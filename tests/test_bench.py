"""The bench: both formulations agree and a difference is seen, rows and verdicts, the whole command at tiny size."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from mlrpl.bench import hardware, run, works
from mlrpl.bench.methods import measure
from mlrpl.bench.page import costs_figure
from mlrpl.bench.timing import compare, verdict
from mlrpl.bench.works import Size
from mlrpl.errors import StudyError
from mlrpl.methods import METHODS

CPU = torch.device("cpu")
TINY = Size((32, 32, 16), 2)
COLUMNS = ["work", "setting", "ours_s", "plain_s", "ratio", "goal", "verdict", "difference", "tolerance", "equal",
           "repeats", "ours_low_s", "ours_high_s", "plain_low_s", "plain_high_s"]  # fmt: skip


@pytest.mark.parametrize("change", [
    {}, {"upsamplings": ("deconv",)}, {"upsamplings": ("deconv", "nearest", "trilinear")}, {"classes": 3},
], ids=str)  # fmt: skip
def test_a_step_is_the_same_in_both_formulations(change):
    work = works.training_step(replace(TINY, **change), CPU)
    assert work.difference() <= work.tolerance


def test_loss_windows_check_and_metrics_are_the_same_in_both_formulations():
    small = [works.mutual_losses(TINY, CPU), *works.metrics((40, 36, 24), 1)]
    small += [*works.sliding_windows(TINY, (40, 36, 17), (16, 16, 8), CPU)]
    small += [works.published_check(TINY, (40, 36, 17), 1, CPU)]
    assert {work.name: work.difference() <= work.tolerance for work in small} == {work.name: True for work in small}
    assert {work.tolerance for work in small if "voxels" in work.name} == {0.0}


def test_a_librarys_sliding_window_gives_the_same():
    pytest.importorskip("monai", reason="MONAI is not installed; the bench leaves its row out then")
    work = works.library_window(TINY, (47, 53, 17), (9, 10, 7), CPU)
    assert work.difference() <= work.tolerance


@pytest.mark.parametrize(("what", "wrong"), [
    ("mutual_loss", lambda original: lambda z, f: 1.001 * original(z, f)),
    ("dice_loss", lambda original: lambda p, y: 1.001 * original(p, y)),
])  # fmt: skip
def test_a_yardstick_that_differs_is_seen(monkeypatch, what, wrong):
    monkeypatch.setattr(works.yardstick(), what, wrong(getattr(works.yardstick(), what)))
    work = works.training_step(TINY, CPU)
    assert work.difference() > work.tolerance


def test_a_row_has_medians_spread_and_verdict():
    calls = []
    work = works.Work("sum", "small", lambda: calls.append("ours"), lambda: calls.append("plain"), lambda: 0.5)
    row = compare(work, 3, CPU, "float32")
    assert list(row) == COLUMNS
    assert calls == ["ours", "plain"] * 3
    assert row["ours_low_s"] <= row["ours_s"] <= row["ours_high_s"]
    assert not row["equal"]


def test_goals_for_bf16_are_not_judged_without_it():
    assert verdict(2, 5, True, "float32") == "not applicable"
    assert verdict(2, 5, True, "bfloat16") == verdict(2, 5, False, "float32") == "missed"
    assert verdict(6, 5, True, "bfloat16") == "met"
    assert verdict(6, None, True, "bfloat16") == ""


def test_the_cost_of_a_method_counts_teachers_and_perturbed_passes():
    passes = {"vnet": (1, 4), "mlrpl": (1, 4), "uamt": (6, 22), "acmt": (2, 6), "ssnet": (4, 16)}
    for method, expected in passes.items():
        cost = measure(method, TINY, CPU, 1)
        assert (cost["passes"], cost["volumes"]) == expected, method
        assert cost["seconds"] > 0 and cost["peak_memory_mb"] > 0
    plain, ours = measure("plain", TINY, CPU, 1), measure("mlrpl", TINY, CPU, 1)
    assert plain["parameters"] == ours["parameters"]


def test_a_method_that_is_added_has_its_bar(monkeypatch):
    monkeypatch.setitem(METHODS, "added", type("Added", (METHODS["mlrpl"],), {}))
    rows = pd.DataFrame({"method": ["plain", "vnet", "added"], "seconds": [1.0, 2, 3], "peak_memory_mb": [7, 8, 9]})
    time, _ = costs_figure(rows).axes
    assert [label.get_text() for label in time.get_yticklabels()] == ["Added", "V-Net", "MLRPL, plain"]


def test_peak_memory_of_a_process_is_its_own():
    """getrusage would tell what this process held when it started the other one."""
    large = np.ones(150_000_000)
    code = "import torch; from mlrpl.devices import peak_memory_mb; print(peak_memory_mb(torch.device('cpu')))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < large.nbytes / 1e6


def test_flops_and_bytes_of_a_product_are_counted():
    a, b = torch.zeros(64, 32), torch.zeros(32, 16)
    counted = hardware.achieved(lambda: a @ b, 0.5)
    assert counted["tflops"] == pytest.approx(2 * 64 * 32 * 16 / 1e12 / 0.5)
    assert counted["step_gb"] == pytest.approx((64 * 32 + 32 * 16 + 64 * 16) * 4 / 1e9)


def test_masks_are_not_trivial():
    mask = works.blob((40, 36, 24), 0)
    assert 0.1 < mask.mean() < 0.6
    assert not any(np.take(mask, [0, -1], axis).any() for axis in range(3))


@pytest.fixture
def one_of_each(monkeypatch):
    """The whole bench with two points of growth and two methods."""

    def growth(base, quick, device):
        yield "patch", 32 * 32 * 16, works.training_step(base, device)
        yield "cases", 1, works.published_check(base, (40, 36, 17), 1, device)

    monkeypatch.setattr(run, "growth", growth)
    costs = run.costs
    monkeypatch.setattr(run, "costs", lambda *a: costs(*a, methods=["plain", "vnet", "mlrpl"]))


@pytest.mark.slow
def test_the_command_writes_tables_figures_and_page(tmp_path, one_of_each):
    said = []
    page = run.bench(str(tmp_path), "cpu", quick=True, say=said.append)
    assert page == tmp_path / "bench" / "index.html"
    rows = pd.read_csv(tmp_path / "bench" / "bench.csv")
    assert list(rows.columns) == COLUMNS
    assert rows["equal"].all()
    assert (rows["ratio"] > 0).all()
    methods = pd.read_csv(tmp_path / "bench" / "methods.csv").set_index("method")
    assert methods.loc["vnet", "ratio_to_vnet"] == 1
    assert set(methods.index) - {"plain"} <= set(METHODS)
    alone = rows.set_index("work").loc["training step, a process each"]
    assert alone["ratio"] == pytest.approx(methods.loc["plain", "seconds"] / methods.loc["mlrpl", "seconds"], rel=1e-4)
    text = page.read_text()
    assert "precision: " in text
    assert str(tmp_path) not in text
    assert (tmp_path / "bench" / "step-trace.json.gz").stat().st_size > 1000
    assert any(line.startswith("mutual loss") for line in said)


@pytest.mark.slow
def test_a_difference_ends_the_command_with_one_line(tmp_path, one_of_each, monkeypatch):
    original = works.yardstick().mutual_loss
    monkeypatch.setattr(works.yardstick(), "mutual_loss", lambda z, f: 1.01 * original(z, f))
    with pytest.raises(StudyError, match="differ in: training step, mutual loss"):
        run.bench(str(tmp_path), "cpu", quick=True, say=lambda _: None)
    assert not pd.read_csv(tmp_path / "bench" / "bench.csv")["equal"].all()


@pytest.mark.slow
def test_short_of_time_the_page_holds_what_was_measured(tmp_path, one_of_each):
    page = run.bench(str(tmp_path), "cpu", quick=True, say=lambda _: None, minutes=0)
    folder = tmp_path / "bench"
    assert list(pd.read_csv(folder / "bench.csv")["work"]) == ["training step"]
    assert list(pd.read_csv(folder / "methods.csv")["method"]) == ["plain"]
    assert not (folder / "growth.csv").exists()
    text = page.read_text()
    assert "Methods, 32" in text
    assert "<h2>Growth" not in text
