"""Tables hold what the rows say: means over cases first, then over seeds."""

import io
import subprocess
import sys
from itertools import product

import numpy as np
import pandas as pd
import pytest

from mlrpl.errors import StudyError
from mlrpl.files import read_rows
from mlrpl.results import step_seconds
from mlrpl.rows import LARGEST, OWN
from mlrpl.tables import (
    by_class,
    comparison,
    cost,
    difference,
    every_case,
    formatted,
    formatted_largest,
    formatted_normalisation,
    glance,
    largest,
    normalisation,
    optimism,
    overview,
    per_case,
    run_list,
    save,
    show,
    titled,
    to_latex,
    to_markdown,
    two_decimals,
    with_interval,
    worst_first,
)

CASES = ["a", "b", "c"]
PAPER = [
    {"title": "MLRPL", "labelled": 8, "dice": 89.86, "hd95": 6.91},
    {"title": "MC-Net", "labelled": 8, "dice": 87.5},
]


def runs_frame():
    """Three methods, in study order; three seeds at 8 labelled, one at 16."""
    methods = [("vnet", "", "V-Net"), ("mlrpl", "control", "Control (β = 0)"), ("mlrpl", "", "MLRPL")]
    rows = [
        ("toy", method, variant, labelled, seed, title, f"{variant or method}-{labelled}-s{seed}")
        for (method, variant, title), (labelled, seed) in product(methods, [(16, 0), (8, 0), (8, 1), (8, 2)])
    ]
    return pd.DataFrame(rows, columns=["study", "method", "variant", "labelled", "seed", "title", "run"])


def metrics_frame(runs):
    """Dice in steps of whole points, so that every mean is known; V-Net has one decoder."""
    rows = []
    for run, selection, output, case in product(runs.itertuples(), ["last", "published"], ["decoder1", "mean"], CASES):
        if run.method == "vnet" and output == "mean":
            continue
        number = CASES.index(case)
        dice = {"V-Net": 0.70, "Control (β = 0)": 0.701, "MLRPL": 0.74}[run.title] + 0.01 * run.seed + 0.02 * number
        dice += 0.03 * (selection == "published") + 0.1 * (output == "mean")
        key = (run.study, run.method, run.variant, run.labelled, run.seed, selection, output, case, "atrium")
        rows.append((*key, dice, dice / (2 - dice), 4.0 + number, 1.0 + run.seed))
    names = ["study", "method", "variant", "labelled", "seed", "selection", "output", "case", "class"]
    return pd.DataFrame(rows, columns=[*names, "dice", "jaccard", "hd95", "asd"])


@pytest.fixture
def runs():
    return runs_frame()


@pytest.fixture
def metrics(runs):
    return metrics_frame(runs)


def row(table, labelled, title, selection="last", output="decoder1"):
    found = table.query("labelled == @labelled and title == @title and selection == @selection and output == @output")
    assert len(found) == 1
    return found.iloc[0]


def test_rows_come_by_labelled_then_in_study_order(metrics, runs):
    table = comparison(metrics.sample(frac=1, random_state=0), runs)
    eight = [
        (8, "V-Net", "last", "decoder1"),
        (8, "V-Net", "published", "decoder1"),
        *[
            (8, t, s, o)
            for t in ("Control (β = 0)", "MLRPL")
            for s in ("last", "published")
            for o in ("decoder1", "mean")
        ],
    ]
    expected = eight + [(16, *rest) for _, *rest in eight]
    assert list(table[["labelled", "title", "selection", "output"]].itertuples(index=False, name=None)) == expected


def test_means_over_cases_then_over_seeds(metrics, runs):
    mlrpl = row(comparison(metrics, runs), 8, "MLRPL")
    assert mlrpl["dice"] == pytest.approx(77)
    assert mlrpl["dice_seeds"] == pytest.approx([76, 77, 78])
    assert mlrpl["hd95"] == pytest.approx(5)
    assert mlrpl["hd95_seeds"] == pytest.approx([5, 5, 5])
    assert mlrpl["asd"] == pytest.approx(2)
    assert mlrpl["asd_seeds"] == pytest.approx([1, 2, 3])
    assert (mlrpl["seeds"], mlrpl["cases"], mlrpl["undefined"], mlrpl["distances"]) == (3, 3, 0, 9)
    jaccard = metrics.query("method == 'mlrpl' and variant == '' and labelled == 8 and selection == 'last'")
    jaccard = jaccard.query("output == 'decoder1'").groupby("seed")["jaccard"].mean() * 100
    assert mlrpl["jaccard"] == pytest.approx(jaccard.mean())
    assert mlrpl["jaccard_seeds"] == pytest.approx(jaccard.to_list())


def test_seeds_weigh_the_same_whatever_their_number_of_defined_distances(metrics, runs):
    mine = (metrics["method"] == "vnet") & (metrics["labelled"] == 8) & (metrics["selection"] == "last")
    metrics.loc[mine, "hd95"] = 10.0
    metrics.loc[mine & (metrics["seed"] == 0), "hd95"] = [np.nan, np.nan, 40.0]
    vnet = row(comparison(metrics, runs), 8, "V-Net")
    assert vnet["hd95"] == pytest.approx((40 + 10 + 10) / 3)  # neither averaged as 0 nor weighted down
    assert vnet["undefined"] == 2
    shown = formatted(comparison(metrics, runs))
    assert shown["Undefined distances"].iloc[0] == "2 of 9"
    assert shown["Undefined distances"].iloc[1] == "0"


def test_a_title_whose_distances_are_all_undefined_shows_a_dash(metrics, runs):
    metrics.loc[metrics["method"] == "vnet", ["hd95", "asd"]] = np.nan
    shown = formatted(comparison(metrics, runs)).iloc[0]
    assert shown["95HD (voxels)"] == shown["ASD (voxels)"] == "—"
    assert shown["Undefined distances"] == "9 of 9"


def test_classes_are_averaged(metrics, runs):
    second = metrics.assign(**{"class": "vein", "dice": metrics["dice"] - 0.2})
    table = comparison(pd.concat([metrics, second]), runs)
    assert row(table, 8, "MLRPL")["dice"] == pytest.approx(67)
    assert row(table, 8, "MLRPL")["cases"] == 3


def test_one_and_two_seeds_are_printed_as_they_are(metrics, runs):
    table = comparison(metrics, runs)
    two = comparison(metrics[metrics["seed"] < 2], runs[runs["seed"] < 2])
    assert formatted(two).query("Labelled == '8' and Method == 'MLRPL'")["Dice (%)"].iloc[0] == "76.00, 77.00"
    shown = formatted(table).query("Labelled == '16' and Method == 'MLRPL'")
    assert shown["Dice (%)"].iloc[0] == "76.00"
    assert shown["Seeds"].iloc[0] == "1"


def test_the_overview_has_a_row_a_method_and_the_papers_figures(metrics, runs):
    shown = overview(formatted(comparison(metrics, runs, PAPER))).set_index("Method")
    assert shown.index.to_list() == list(dict.fromkeys(runs["title"]))
    text = formatted(comparison(metrics, runs)).query("Labelled == '8' and Method == 'MLRPL' and Output == 'decoder 1'")
    assert shown.loc["MLRPL", "8 labelled: last weights"] == text.query("Selection == 'last'")["Dice (%)"].item()
    assert shown.loc["MLRPL", "8 labelled: best check"] == text.query("Selection == 'published'")["Dice (%)"].item()
    assert shown.loc["MLRPL", "8 labelled: paper"] == "89.86"
    assert not any("paper" in column for column in overview(formatted(comparison(metrics, runs))))


def test_at_a_glance_a_method_has_one_row_with_the_paper_beside_the_published_selection(metrics, runs):
    table = comparison(metrics, runs, PAPER)
    shown = glance(table)
    assert shown[["Labelled", "Method"]].drop_duplicates().equals(shown[["Labelled", "Method"]])
    mine = shown.query("Labelled == '8' and Method == 'MLRPL'").iloc[0]
    text = formatted(table).query("Labelled == '8' and Method == 'MLRPL' and Output == 'decoder 1'")
    last, published = (text[text["Selection"] == selection].iloc[0] for selection in ("last", "published"))
    for name in ("Seeds", "Dice (%)", "Jaccard (%)", "95HD (voxels)", "ASD (voxels)", "Cases"):
        assert mine[name] == last[name]
    for name in ("Dice (%)", "95HD (voxels)"):
        assert mine[f"Published: {name}"] == published[name]
    assert (mine["Paper: Dice (%)"], mine["Paper: 95HD (voxels)"]) == ("89.86", "6.91")
    assert (shown["Paper: Dice (%)"] != "—").sum() == 1
    without = glance(comparison(metrics[metrics["selection"] == "last"], runs))
    assert len(without) == len(shown) and set(without["Published: Dice (%)"]) == {"—"}
    assert not any("Paper" in name or "Published: 95HD" in name for name in without)


def test_names_come_back_from_a_file_as_they_were(tmp_path):
    names = pd.DataFrame({"case": ["001", "1e5", "NA"], "class": ["None", "2", "null"], "variant": ["a", "", "inf"]})
    names.assign(dice=[0.5, np.nan, 1.0]).to_csv(tmp_path / "rows.csv", index=False)
    rows = read_rows(tmp_path / "rows.csv")
    pd.testing.assert_frame_equal(rows[["case", "class"]], names[["case", "class"]], check_dtype=False)
    assert rows["variant"].fillna("").tolist() == ["a", "", "inf"]
    assert rows["dice"].isna().tolist() == [False, True, False]


def test_formatted_names_units_and_protocol(metrics, runs):
    shown = formatted(comparison(metrics, runs), unit="mm")
    assert {"95HD (mm)", "ASD (mm)", "Dice (%)", "Jaccard (%)"} <= set(shown)
    assert shown["Dice (%)"].iloc[0] == "73.00 ± 1.00"
    assert shown["Selection"].iloc[:2].tolist() == ["last", "published"]
    assert set(shown["Output"]) == {"decoder 1", "mean of decoders"}


def test_undefined_distances_are_counted_where_there_are_any(metrics, runs):
    table = comparison(metrics.fillna({"hd95": 1.0, "asd": 1.0}), runs)
    assert "Undefined distances" not in formatted(table)
    table.loc[0, "undefined"] = 3
    assert formatted(table)["Undefined distances"].iloc[:2].tolist() == [f"3 of {table['distances'].iloc[0]}", "0"]


def test_every_case_of_a_run_is_told_with_units(metrics):
    shown = every_case(metrics, "mm")
    assert list(shown) == ["Case", "Class", "Dice (%)", "Jaccard (%)", "95HD (mm)", "ASD (mm)"]
    rows = metrics[(metrics["selection"] == "last") & (metrics["output"] == "decoder1")]
    assert shown["Dice (%)"].tolist() == [f"{100 * dice:.2f}" for dice in rows["dice"]]


def test_paper_stands_beside_the_published_selection_of_decoder_1_only(metrics, runs):
    table = comparison(metrics, runs, PAPER)
    assert row(table, 8, "MLRPL", "published")["paper_dice"] == 89.86
    assert row(table, 8, "MLRPL", "published")["paper_hd95"] == 6.91
    assert table["paper_dice"].notna().sum() == 1
    assert formatted(table)["Paper: Dice (%)"].value_counts()["—"] == len(table) - 1


@pytest.mark.parametrize("paper", [(), PAPER[1:]])
def test_no_paper_column_without_figures_for_these_rows(metrics, runs, paper):
    assert not [name for name in formatted(comparison(metrics, runs, paper)) if "Paper" in name]


def test_empty_variants_survive_a_csv_file(metrics, runs):
    again = [pd.read_csv(io.StringIO(frame.to_csv(index=False))) for frame in (metrics, runs)]
    pd.testing.assert_frame_equal(comparison(*again), comparison(metrics, runs))


def test_metrics_without_their_run_are_refused(metrics, runs):
    with pytest.raises(StudyError, match=r"1 run.*mlrpl.*control.*labelled 16"):
        titled(metrics, runs[runs["run"] != "control-16-s0"])


def test_one_title_for_two_variants_is_refused(metrics, runs):
    with pytest.raises(StudyError, match="two variants"):
        titled(metrics, runs.replace({"title": {"Control (β = 0)": "MLRPL"}}))


def test_per_case_pairs_titles_and_averages_seeds(metrics, runs):
    table = per_case(metrics, runs, output="mean")
    assert list(table) == ["labelled", "case", "V-Net", "Control (β = 0)", "MLRPL"]
    assert list(table["case"]) == CASES * 2
    assert table.loc[0, "MLRPL"] == pytest.approx(85)
    assert table.loc[0, "V-Net"] == pytest.approx(71)
    assert per_case(metrics, runs, measure="hd95")["MLRPL"].tolist() == [4, 5, 6] * 2


def test_optimism_is_published_minus_last_in_points(metrics, runs):
    table = optimism(metrics, runs)
    assert table["difference"].to_numpy() == pytest.approx(3)
    first = table.iloc[0]
    assert (first["labelled"], first["title"], first["output"], first["seeds"]) == (
        8,
        "V-Net",
        "decoder1",
        "s0, s1, s2",
    )
    assert first["last"] == pytest.approx(73)
    assert first["difference_seeds"] == pytest.approx([3, 3, 3])
    assert optimism(metrics[metrics["selection"] == "last"], runs).empty


def test_difference_names_each_run_and_its_largest_change(metrics):
    changed = metrics.copy()
    changed.loc[changed.query("method == 'vnet' and labelled == 8 and seed == 1").index[0], "dice"] += 0.06
    table = difference(changed, metrics).set_index(["method", "labelled", "seed"])
    assert table.loc[("vnet", 8, 1), "max"].item() == pytest.approx(6)
    assert table.loc[("vnet", 8, 1), "mean"].item() == pytest.approx(1)
    assert (table["max"] > 1e-9).sum() == 1
    assert not table["unmatched"].any()


def test_difference_counts_rows_in_one_only(metrics):
    table = difference(metrics[metrics["case"] != "c"], metrics[metrics["labelled"] == 8]).set_index(
        ["variant", "labelled"]
    )
    assert table.loc[("control", 16), "compared"].item() == 0
    assert table.loc[("control", 16), "unmatched"].item() == 8
    assert np.isnan(table.loc[("control", 16), "max"].item())
    assert table.loc[("control", 8), "compared"].tolist() == [8, 8, 8]
    assert table.loc[("control", 8), "unmatched"].tolist() == [4, 4, 4]


def test_markdown_is_aligned_and_escaped():
    table = pd.DataFrame({"name": ["a|b", "c"], "value": [1.0, np.nan], "count": [3, 12], "p": ["<0.001", "0.2"]})
    assert to_markdown(table) == (
        "| name | value | count |      p |\n| ---- | ----: | ----: | -----: |\n"
        "| a\\|b |  1.00 |     3 | <0.001 |\n| c    |     — |    12 |    0.2 |\n"
    )


def test_markdown_of_the_whole_comparison(metrics, runs):
    lines = to_markdown(formatted(comparison(metrics, runs, PAPER))).splitlines()
    assert len(lines) == 2 + 20
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[2].split("|")[1:6]] == ["8", "V-Net", "3", "last", "decoder 1"]
    assert lines[2].split("|")[6].strip() == "73.00 ± 1.00"


def test_cost_is_a_row_a_method_with_the_machine_that_was_fastest(runs):
    seconds = runs["title"].map({"V-Net": 0.3, "Control (β = 0)": 0.6, "MLRPL": 0.75}) + runs["seed"] / 100
    runs = runs.assign(step_seconds=seconds, peak_memory_mb=500 + runs["seed"], parameters=9_448_866)
    runs["device"] = runs["seed"].map({0: "CPU: new", 1: "CPU: old", 2: "CPU: old"})
    table = cost(runs, dict.fromkeys(runs["run"], (4, 8))).set_index("Method")
    assert list(table.index) == ["V-Net", "Control (β = 0)", "MLRPL"]
    assert list(table["Seconds a step"]) == ["0.300", "0.600", "0.750"]
    assert set(table["Measured on"]) == {"CPU: new"}
    assert set(table["Peak memory (MB)"]) == {"502"}
    assert set(table["Parameters"]) == {"9,448,866"}
    assert set(table["Volumes through decoders"]) == {"8"}
    late = cost(runs[runs["seed"] > 0], dict.fromkeys(runs["run"], (4, 8)))
    assert list(late["Seconds a step"]) == ["0.310", "0.610", "0.760"]
    assert set(late["Measured on"]) == {"CPU: old"}


def test_cost_keeps_gpus_apart_from_cpus(runs):
    """A GPU's seconds beside a CPU's memory would be nobody's cost."""
    on_gpu = runs["seed"] == 2
    runs = runs.assign(step_seconds=on_gpu.map({True: 0.04, False: 0.9}), parameters=9_448_866)
    runs = runs.assign(peak_memory_mb=on_gpu.map({True: 300, False: 700}))
    runs["device"] = on_gpu.map({True: "NVIDIA H200", False: "CPU: any (AVX2)"})
    table = cost(runs, dict.fromkeys(runs["run"], (4, 8)))
    rows = table[["Method", "Seconds a step", "Measured on", "Peak memory (MB)"]].values.tolist()
    assert rows[:2] == [["V-Net", "0.900", "CPU: any (AVX2)", "700"], ["V-Net", "0.040", "NVIDIA H200", "300"]]
    assert len(rows) == 6


def test_a_step_is_timed_where_nothing_disturbed_it():
    """Two seconds a step, but for a third of them beside other work, for checks, and for a night of suspension."""
    steps = np.full(800, 2.0)
    steps[100:367] = 3.5
    steps[199::200] += 30
    steps[500] += 30_000
    assert step_seconds(pd.Series(steps.cumsum())) == pytest.approx(2)
    assert step_seconds(pd.Series([0.5])) == 0.5
    assert step_seconds(pd.Series([1.0, 2.0, 3.0])) == 1


def test_class_by_class_in_the_order_of_the_rows(metrics, runs):
    vein = metrics.assign(**{"class": "vein"}, dice=metrics["dice"] - 0.2, hd95=np.nan)
    table = by_class(pd.concat([metrics, vein]), runs)
    assert list(table[["Labelled", "Method", "Class"]].iloc[:3].itertuples(index=False, name=None)) == [
        ("8", "V-Net", "atrium"), ("8", "V-Net", "vein"), ("8", "Control (β = 0)", "atrium"),
    ]  # fmt: skip
    mine = (metrics["labelled"] == 8) & (metrics["selection"] == "last") & (metrics["output"] == "decoder1")
    expected = 100 * metrics.loc[mine & (metrics["method"] == "vnet"), "dice"].mean()
    assert float(table["Dice (%)"][0]) == pytest.approx(expected, abs=0.006)
    assert float(table["Dice (%)"][1]) == pytest.approx(expected - 20, abs=0.006)
    best = (metrics["labelled"] == 8) & (metrics["selection"] == "published") & (metrics["output"] == "decoder1")
    expected = 100 * metrics.loc[best & (metrics["method"] == "vnet"), "dice"].mean()
    assert float(table["Published: Dice (%)"][1]) == pytest.approx(expected - 20, abs=0.006)
    assert table["95HD (voxels)"][1] == "—"
    assert table["Undefined distances"].tolist()[:2] == ["0", "9 of 9"]


def test_the_worst_case_comes_first(metrics, runs):
    table = worst_first(metrics.sample(frac=1, random_state=0), runs, "V-Net")
    assert list(dict.fromkeys(table["Case"])) == CASES  # their Dice rises in this order


def test_latex_is_escaped_and_set_with_rules():
    table = pd.DataFrame({"β & more": ["a_b", "τ = 0.5"], "Dice (%)": ["81.25 ± 0.10", "—"], "p": ["<0.001", "0.030"]})
    assert to_latex(table) == (
        "\\begin{tabular}{lrr}\n\\toprule\n$\\beta$ \\& more & Dice (\\%) & p \\\\\n\\midrule\n"
        "a\\_b & 81.25 $\\pm$ 0.10 & $<$0.001 \\\\\n$\\tau$ = 0.5 & -- & 0.030 \\\\\n\\bottomrule\n\\end{tabular}\n"
    )


def test_latex_of_powers_minus_signs_and_greek_letters():
    table = pd.DataFrame({"Method": ["U-Net^2", "λ = 0.1 ~ Δ"], "Difference": ["-0.93 [-1.32, -0.62]", "0.10"]})
    text = to_latex(table)
    assert r"U-Net\textasciicircum{}2 & $-$0.93 [$-$1.32, $-$0.62]" in text
    assert r"$\lambda$ = 0.1 \textasciitilde{} $\Delta$" in text


def test_latex_of_the_whole_comparison_has_no_letter_that_latex_lacks(metrics, runs, tmp_path):
    save(formatted(comparison(metrics, runs, PAPER)), tmp_path, "comparison")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".md", ".tex"]
    assert (tmp_path / "comparison.tex").read_text(encoding="utf-8").isascii()


def test_an_empty_table_is_shown_in_words(metrics, runs):
    assert "MLRPL" in show(comparison(metrics, runs)).to_html()
    assert show(comparison(metrics[:0], runs[:0])).data == "No finished run has figures for this table."


def test_the_list_of_runs_says_how_each_came_about():
    row = {"run": "mlrpl-8-s0", "key": "0123456789", "precision": "bfloat16", "device": "NVIDIA H200", "seconds": 90.0}
    rows = [
        {**row, "peak_memory_mb": 3108, "commit": "c0ffee", "adopted": True},
        {**row, "peak_memory_mb": 12, "commit": "c0ffee+changes", "adopted": False},
    ]
    found = run_list(pd.DataFrame(rows))
    assert found["Key"].eq("01234567").all()
    assert found["Minutes"].eq("1.5").all()
    assert found["Trained on"].eq("NVIDIA H200").all()
    assert found["Memory (MB)"].to_list() == ["3108", "12"]
    assert found["Commit"].to_list() == ["c0ffee", "c0ffee with uncommitted changes"]
    assert found["Rows"].to_list() == ["adopted", "own"]


def test_of_a_table_without_rows_no_file_stays(tmp_path):
    table = pd.DataFrame({"Method": ["MLRPL"]})
    save(table, tmp_path, "some")
    assert len([*tmp_path.iterdir()]) == 3
    save(table.iloc[:0], tmp_path, "some")
    assert not [*tmp_path.iterdir()]


def test_normalisation_sets_each_volumes_own_statistics_beside_the_running_ones(metrics, runs):
    own = metrics.query("selection == 'last' and output == 'decoder1'").assign(output=OWN)
    own["dice"] += 0.2 + 0.01 * own["seed"]
    both = pd.concat([metrics, own])
    table = normalisation(both, runs).set_index(["labelled", "title"])
    assert len(table) == 6
    first = table.loc[(8, "MLRPL")]
    assert first["running"] == pytest.approx(row(comparison(metrics, runs), 8, "MLRPL")["dice"])
    assert first["difference"] == pytest.approx(21)  # seeds 0, 1, 2
    assert first["difference_seeds"] == pytest.approx([20, 21, 22])
    assert first["own"] == pytest.approx(first["running"] + 21)
    assert table.loc[(16, "MLRPL"), "difference_seeds"] == pytest.approx([20])
    pd.testing.assert_frame_equal(comparison(both, runs), comparison(metrics, runs))  # the others know nothing of it
    pd.testing.assert_frame_equal(optimism(both, runs), optimism(metrics, runs))
    assert len(normalisation(metrics, runs)) == 0
    assert len(formatted_normalisation(metrics, runs)) == 0
    text = formatted_normalisation(both, runs)
    assert text["Difference"].str.contains("±").sum() == 3
    assert text["Seeds"].to_list() == table["seeds"].to_list()
    later = both[(both["output"] != OWN) | (both["seed"] > 0)]
    assert set(normalisation(later, runs)["seeds"]) == {"s1, s2"}  # a run with one seed has no row then


def test_the_largest_component_stands_beside_all_in_dice_and_distance(metrics, runs):
    alone = metrics.query("output == 'decoder1'").assign(output=LARGEST)
    alone["dice"] += 0.05
    alone["hd95"] -= 0.5
    both = pd.concat([metrics, alone])
    table = largest(both, runs).set_index(["labelled", "title", "selection"])
    assert len(table) == 12
    first = table.loc[(8, "MLRPL", "published")]
    assert first["all"] == pytest.approx(row(comparison(metrics, runs), 8, "MLRPL", "published")["dice"])
    assert first["difference"] == pytest.approx(5)
    distances = largest(both, runs, "hd95")
    assert distances["difference"].to_numpy() == pytest.approx(-0.5)
    shown = formatted_largest(both, runs, PAPER, "mm").set_index(["Labelled", "Method", "Selection"])
    line = shown.loc[("8", "MLRPL", "published")]
    assert line["Paper: Dice (%)"] == "89.86"
    assert line["Seeds"] == "s0, s1, s2"
    assert line["Paper: 95HD (voxels)"] == "6.91"
    assert float(line["All: 95HD (mm)"]) - float(line["Largest: 95HD (mm)"]) == pytest.approx(0.5, abs=0.011)
    assert shown.loc[("8", "MLRPL", "last"), "Paper: Dice (%)"] == "—"
    pd.testing.assert_frame_equal(comparison(both, runs), comparison(metrics, runs))  # the others know nothing of it
    dice_alone = [{**figure, "hd95": None} for figure in PAPER]  # as a study file without distances has them
    assert "Paper: 95HD (voxels)" not in formatted_largest(both, runs, dice_alone, "mm")
    assert len(formatted_largest(metrics, runs, PAPER)) == 0


def test_a_difference_of_almost_nothing_has_no_sign():
    assert two_decimals(-0.001) == "0.00"
    assert two_decimals(float("nan")) == "—"
    assert with_interval(-0.001, -0.37, 0.38) == "0.00 [-0.37, 0.38]"
    assert with_interval(82.2, float("nan"), float("nan")) == "82.20"


def test_rows_are_read_without_pytorch():
    script = "import sys, mlrpl.tables; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
