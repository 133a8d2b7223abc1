"""Intervals and tests over cases: known values, and what they refuse to say."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mlrpl import statistics
from mlrpl.drawing import colours
from mlrpl.figures import differences
from mlrpl.statistics import formatted, holm, interval, limits, probability, summary, wilcoxon


def study(dice: dict[str, list[float]], seeds: int = 1) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Metrics and runs of methods with these Dice per case; each seed adds 0.1 to odd and takes it from even ones."""
    metrics, runs = [], []
    for title, values in dice.items():
        for seed in range(seeds):
            key = {"study": "s", "method": title, "variant": title, "labelled": 4, "seed": seed}
            runs.append({"run": f"{title}-{seed}", "title": title, **key})
            shift = 0 if seeds == 1 else 0.1 * (1 if seed % 2 else -1)
            for n, value in enumerate(values):
                row = {**key, "selection": "last", "output": "decoder1", "case": f"c{n:02d}", "class": "a"}
                metrics.append({**row, "dice": value + shift, "jaccard": 0.5, "hd95": 1.0, "asd": 1.0})
    return pd.DataFrame(metrics), pd.DataFrame(runs)


def test_holm_is_the_textbooks():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.5, 0.9])).tolist() == [1.0, 1.0]
    with_gap = holm(np.array([0.02, np.nan, 0.01]))
    assert with_gap[[0, 2]] == pytest.approx([0.02, 0.02]) and np.isnan(with_gap[1])
    assert np.isnan(holm(np.array([np.nan]))).all()


def test_interval_covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    inside = [low <= 5 <= high for low, high in (interval(random.normal(5, 2, 20)) for _ in range(40))]
    assert 33 <= sum(inside) <= 40


def test_interval_of_little():
    assert np.isnan(interval([1.0])).all()
    assert interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    assert interval([1.0, np.nan, 3.0]) == interval([1.0, 3.0])
    assert interval([1.0, 2.0, 4.0]) == interval([1.0, 2.0, 4.0])  # a report does not change when it is made anew


def test_wilcoxon_needs_pairs_that_could_be_significant():
    assert np.isnan(wilcoxon(np.ones(5)))
    assert wilcoxon(np.arange(1.0, 7.0)) == pytest.approx(2 / 2**6)
    assert wilcoxon(np.zeros(8)) == 1.0


def test_cases_are_averaged_over_seeds_before_anything_is_tested():
    """Twice the seeds are not twice the cases."""
    random = np.random.default_rng(1)
    ours = random.uniform(0.7, 0.9, 8)
    theirs = ours - random.uniform(0.01, 0.05, 8)
    one, two = (summary(*study({"MLRPL": ours, "Other": theirs}, seeds)) for seeds in (1, 2))
    for table in (one, two):
        row = table.set_index("title").loc["Other"]
        assert row["cases"] == 8
        assert row["difference"] == pytest.approx(100 * (theirs - ours).mean())
        assert row["p"] == pytest.approx(stats.wilcoxon(theirs - ours).pvalue)
        assert row["p_holm"] == row["p"]
        assert row["difference_low"] < row["difference"] < row["difference_high"] < 0
    assert [len(each) for each in one["each"]] == [1, 1] and formatted(one)["Each seed"][
        0
    ] == f"{100 * ours.mean():.2f}"
    assert two["each"][0] == pytest.approx([100 * ours.mean() - 10, 100 * ours.mean() + 10])
    assert pd.isna(one.set_index("title").loc["MLRPL", "p"])


def test_a_difference_is_over_the_seeds_that_both_have():
    """MLRPL's second and third seed are 0.2 better than its first: the other was not there to be."""
    ours, theirs = np.linspace(0.5, 0.7, 8), np.linspace(0.45, 0.6, 8)
    metrics, runs = study({"MLRPL": ours, "Other": theirs}, seeds=3)
    metrics.loc[(metrics["method"] == "MLRPL") & (metrics["seed"] > 0), "dice"] += 0.2
    alone = summary(metrics[metrics["seed"] == 0], runs[runs["seed"] == 0]).set_index("title").loc["Other"]
    metrics, runs = (frame[(frame["method"] == "MLRPL") | (frame["seed"] == 0)] for frame in (metrics, runs))
    rows = summary(metrics, runs).set_index("title")
    assert rows.loc["MLRPL", "seeds"] == 3 and rows.loc["MLRPL", "mean"] > 100 * ours.mean() + 9
    for column in ("difference", "difference_low", "difference_high", "p"):
        assert rows.loc["Other", column] == pytest.approx(alone[column]), column
    apart = runs[(runs["method"] == "MLRPL") == (runs["seed"] > 0)]
    metrics = metrics.merge(apart[["method", "seed"]])
    assert np.isnan(summary(metrics, apart).set_index("title").loc["Other", ["difference", "p"]].astype(float)).all()


def test_holm_counts_the_methods_at_one_number_of_labelled_cases():
    random = np.random.default_rng(2)
    ours = random.uniform(0.7, 0.9, 8)
    table = summary(*study({"MLRPL": ours, "A": ours - 0.1 * random.uniform(0.5, 1, 8), "B": ours + 0.001}))
    rows = table.set_index("title")
    assert rows.loc["A", "p_holm"] == pytest.approx(2 * rows.loc["A", "p"])


def test_it_says_what_cannot_be_concluded():
    few = summary(*study({"MLRPL": [0.8, 0.9], "Other": [0.7, 0.8]}))
    assert "one seed" in limits(few) and "2 test cases are too few" in limits(few)
    assert formatted(few)["p (Holm)"].tolist() == ["—", "—"]
    many = summary(*study({"MLRPL": np.linspace(0.6, 0.9, 25), "Other": np.linspace(0.5, 0.8, 25)}, seeds=5))
    assert limits(many) == ""
    assert "too few to tell how far seeds spread" in limits(
        summary(*study({"MLRPL": [0.8] * 7, "Other": [0.7] * 7}, seeds=3))
    )


def test_it_tells_where_seeds_contradict_a_small_p():
    random = np.random.default_rng(4)
    ours = random.uniform(0.6, 0.8, 12)
    metrics, runs = study({"MLRPL": ours, "Fickle": ours - 0.1, "Steady": ours - 0.1 - random.random(12) / 50}, seeds=3)
    metrics.loc[(metrics["method"] == "Fickle") & (metrics["seed"] == 1), "dice"] += 0.15
    table = summary(metrics, runs)
    assert (table["p_holm"].dropna() < 0.05).all()
    assert formatted(table)["Seeds above"].tolist() == ["—", "1 of 3", "0 of 3"]
    assert "one seed is above the reference and another below: Fickle." in limits(table)
    (axes,) = differences(table).axes
    seeds = [line for line in axes.lines if line.get_marker() == "|"]
    assert [len(line.get_xdata()) for line in seeds] == [3, 3]
    assert max(seeds[0].get_xdata()) > 0 > max(seeds[1].get_xdata())
    assert "Fickle" not in limits(table[table["title"] != "Fickle"])
    eight = table.assign(labelled=8, seeds=1)
    both = limits(pd.concat([table, eight.assign(higher=0)], ignore_index=True))
    assert "With one seed a difference may be the seed's." in both and "another below: Fickle at 4 labelled." in both


def test_a_method_with_fewer_seeds_is_compared_with_the_same_ones():
    ours = np.linspace(0.7, 0.9, 9)
    metrics, runs = study({"MLRPL": ours, "Other": ours - 0.05})
    again = metrics[metrics["variant"] == metrics["variant"].iloc[0]].assign(seed=1)
    again["dice"] -= 0.6
    more = runs.iloc[[0]].assign(seed=1, run="again")
    table = summary(pd.concat([metrics, again]), pd.concat([runs, more]))
    other = table.set_index("title").loc["Other"]
    assert other["difference"] == pytest.approx(-5) and other["beside"] == pytest.approx(80)
    text = formatted(table)
    assert text["Compared with"].tolist() == ["—", "MLRPL: 80.00"]
    assert text["Each seed"].tolist() == ["80.00, 20.00", "75.00"]


def test_without_the_reference_nothing_is_compared():
    table = summary(*study({"A": [0.8, 0.7, 0.6], "B": [0.7, 0.6, 0.5]}))
    assert table["difference"].isna().all()
    assert differences(table) is None
    assert limits(table).startswith("MLRPL is not among the methods")
    alone = summary(*study({"MLRPL": [0.8, 0.7, 0.6]}))
    assert limits(alone) == "There is no other method to compare MLRPL with."


def test_a_study_may_name_another_reference():
    rows = study({"MLRPL": [0.8, 0.7, 0.6], "Mine": [0.9, 0.8, 0.7]})
    table = summary(*rows, reference="Mine").set_index("title")
    assert table.loc["MLRPL", "difference"] == pytest.approx(-10)
    assert table.loc["MLRPL", "reference"] == "Mine" and np.isnan(table.loc["Mine", "difference"])
    (axes,) = differences(table.reset_index(), reference="Mine").axes
    assert axes.get_xlabel().startswith("difference to Mine")


def test_the_figure_shows_every_difference_with_its_p():
    random = np.random.default_rng(3)
    ours = random.uniform(0.7, 0.9, 9)
    table = summary(*study({"MLRPL": ours, "A": ours - 0.05 + 0.01 * random.random(9), "B": ours[::-1]}))
    (axes,) = differences(table).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A", "B"]
    assert axes.texts[0].get_text() == f"p (Holm) = {probability(table.iloc[1]['p_holm'])}"


def test_a_method_that_fails_does_not_hide_what_others_differ_by():
    random = np.random.default_rng(3)
    ours = random.uniform(0.7, 0.9, 9)
    near = ours - 0.02 + 0.01 * random.random(9)
    figure = differences(summary(*study({"MLRPL": ours, "Near": near, "Failed": ours - 0.6 + 0.01 * random.random(9)})))
    (axes,) = figure.axes
    place, zero = (axes.transData.transform((x, 0))[0] for x in (100 * (near - ours).mean(), 0))
    assert zero - place > 0.05 * axes.bbox.width


def test_what_is_not_far_apart_is_drawn_to_one_scale():
    ours = np.linspace(0.7, 0.9, 9)
    table = summary(*study({"MLRPL": ours, "A": ours - 0.04, "B": ours - 0.12}))
    (axes,) = differences(table).axes
    zero, near, far = (axes.transData.transform((x, 0))[0] for x in (0, -4, -12))
    assert zero - far == pytest.approx(3 * (zero - near))
    assert "logarithmic" not in axes.get_xlabel()


def test_variants_have_the_colours_of_the_studys_other_figures():
    ours = np.linspace(0.7, 0.9, 9)
    table = summary(*study({"MLRPL": ours, "A": ours - 0.04, "B": ours - 0.12}))
    (axes,) = differences(table, titles=["MLRPL", "B", "A"]).axes
    drawn = [line.get_color() for line in axes.lines if line.get_marker() == "o"]
    assert drawn == [colours(["B", "A"])[title] for title in ("A", "B")] != [colours("AB")[title] for title in "AB"]


def test_p_is_printed_as_journals_do():
    assert [probability(p) for p in (0.0001, 0.0312, np.nan)] == ["<0.001", "0.031", "—"]
    assert statistics.REFERENCE == "MLRPL"


def test_a_condition_in_brackets_is_compared_with_mlrpl_under_the_same():
    random = np.random.default_rng(0)
    base = random.uniform(0.3, 0.5, 9)
    titles = {
        "MLRPL": base,
        "V-Net": base + 0.05,
        "Control (β = 0)": base + 0.01,
        "MLRPL (instance norm)": base + 0.3,
        "V-Net (instance norm)": base + 0.1 * random.uniform(0.5, 1, 9),
    }
    table = summary(*study(titles)).set_index("title")
    reference = dict(zip(titles, [None, "MLRPL", "MLRPL", "MLRPL", "MLRPL (instance norm)"], strict=True))
    assert {
        title: found if isinstance(found, str) else None for title, found in table["reference"].items()
    } == reference
    assert table.loc["V-Net (instance norm)", "difference"] < 0 < table.loc["V-Net", "difference"]
    assert table.loc["MLRPL (instance norm)", "difference"] == pytest.approx(30)
    shown = formatted(table.reset_index())
    references = [text.split(":")[0] for text in shown["Compared with"]]
    assert references == ["—", "MLRPL", "MLRPL", "MLRPL", "MLRPL (instance norm)"]
    (axes,) = differences(table.reset_index()).axes
    assert "under the same condition" in axes.get_xlabel()
