"""Reduced precision beside float32: which runs make a pair, and how much of training lies in float32's range."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from mlrpl import precision_report
from mlrpl.config import load_study

ITERATIONS = np.arange(1, 101)


@pytest.fixture(scope="module")
def asked():
    return list(load_study("phantom-precision").runs())


def runs_frame(asked, precision=lambda run: run.settings.precision):
    return pd.DataFrame([{"run": run.name, "precision": precision(run)} for run in asked])


def curves_frame(runs, value):
    """`value(run, iteration)` is the supervised loss; pseudo-labels are not logged."""
    rows = [(run, i, value(run, i), 0.5, np.nan, 0.9) for run, i in product(runs["run"], ITERATIONS)]
    return pd.DataFrame(rows, columns=["run", "iteration", "supervised", "mutual", "pseudo_foreground", "dice"])


def seed(run):
    return int(run[-1])


def test_what_differs_in_precision_alone_is_a_pair(asked):
    mlrpl, control = precision_report.pairs(asked, runs_frame(asked))
    assert (mlrpl.reference, mlrpl.title, mlrpl.precision) == ("MLRPL (float32)", "MLRPL (bf16)", "bfloat16")
    assert mlrpl.float32 == ["mlrpl-4-s0", "mlrpl-4-s1", "mlrpl-4-s2"]
    assert mlrpl.reduced == ["mlrpl-bf16-4-s0", "mlrpl-bf16-4-s1", "mlrpl-bf16-4-s2"]
    assert control.float32 == ["control-4-s0", "control-4-s1", "control-4-s2"]


def test_the_precision_that_was_used_counts(asked):
    """Where the check refused bf16, float32 was beside float32."""
    assert precision_report.pairs(asked, runs_frame(asked, lambda run: "float32")) == []


def test_one_seed_has_no_range(asked):
    assert precision_report.pairs(asked, runs_frame([run for run in asked if run.seed == 0])) == []


def test_a_study_in_one_precision_has_no_pairs():
    asked = list(load_study("phantom-full").runs())
    assert precision_report.pairs(asked, runs_frame(asked, lambda run: "float32")) == []


def test_shares_count_what_lies_in_the_range(asked):
    runs = runs_frame(asked)
    found = precision_report.pairs(asked, runs)

    def value(run, iteration):  # float32 from 1 to 3; of bf16 one within, one above, one within in the second half
        if "bf16" not in run:
            return 1.0 + seed(run)
        return [2.0, 3.5, 2.0 if iteration > 50 else 0.5][seed(run)]

    table = precision_report.table(curves_frame(runs, value), found).set_index(["Trained", "Curve"])
    loss = table.loc[("MLRPL (bf16)", "Supervised loss")]
    assert loss["Mean within (%)"] == "100"
    assert float(loss["Runs within (%)"]) == pytest.approx(50, abs=1)
    assert loss["Expected of runs (%)"] == "50"
    assert table.loc[("MLRPL (bf16)", "Unsupervised loss"), "Runs within (%)"] == "100"
    assert "Foreground of pseudo-labels (%)" not in table.index.get_level_values("Curve")


def test_expectation_is_what_chance_gives():
    """Runs of one kind: the table's expectation is the share that lies in the range of three others."""
    values = np.random.default_rng(0).normal(size=(20_000, 4))
    inside = (values[:, 3] > values[:, :3].min(axis=1)) & (values[:, 3] < values[:, :3].max(axis=1))
    assert 100 * inside.mean() == pytest.approx(100 * (3 - 1) / (3 + 1), abs=1)


def test_figure_has_a_row_a_pair_and_the_range_as_a_band(asked):
    runs = runs_frame(asked)
    curves = curves_frame(runs, lambda run, iteration: 1.0 + seed(run) + ("bf16" in run))
    figure = precision_report.figure(curves, precision_report.pairs(asked, runs))
    titles = [ax.get_title() for ax in figure.axes[:3]]
    assert titles == ["Supervised loss", "Unsupervised loss", "Dice of training\nbatch (%)"]
    assert [ax.get_ylabel() for ax in figure.axes[::3]] == ["MLRPL (bf16)", "Control (bf16)"]
    (band,) = figure.axes[0].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (1, 3)
    mean, *seeds, bold = figure.axes[0].get_lines()
    assert set(mean.get_ydata()) == {2}
    assert [set(line.get_ydata()) for line in seeds] == [{2}, {3}, {4}]
    assert set(bold.get_ydata()) == {3}


def test_no_figure_without_pairs(asked):
    assert precision_report.figure(curves_frame(runs_frame(asked), lambda run, iteration: 1.0), []) is None
