"""Figures show what the tables and cases hold, legibly, and are written reproducibly."""

import re
from dataclasses import replace
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib import _pylab_helpers, rc_context, rcParams
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image
from scipy.ndimage import gaussian_filter

from mlrpl.config import load_study, study_names
from mlrpl.data.store import Case
from mlrpl.data_report import case_montage, intensity_histograms, label_volumes
from mlrpl.drawing import METHOD_COLOURS, STYLE, add_legend, colours, save
from mlrpl.figures import (
    CaseView,
    checks,
    contours,
    distributions,
    label_efficiency,
    learning_curves,
    panels,
)
from mlrpl.tables import comparison, per_case

ALL = list(METHOD_COLOURS)
TOUR = {4: ["V-Net", "Control (β = 0)", "MLRPL"], 40: ["V-Net"]}
ITERATIONS = 800


def study(levels, seeds=1, cases=6):
    """Frames of a made-up study: metrics, runs, curves, checks. One of V-Net's distances is undefined."""
    random = np.random.default_rng(0)
    metrics, runs, curves, checked = [], [], [], []
    iteration = np.arange(1, ITERATIONS + 1)
    for labelled, title, seed in [(n, t, s) for n, titles in levels.items() for t in titles for s in range(seeds)]:
        single = title == "V-Net"
        key = {"study": "toy", "method": "vnet" if single else "mlrpl", "variant": "" if single else title}
        key |= {"labelled": labelled, "seed": seed}
        run = f"{title}-{labelled}-s{seed}"
        runs.append({"run": run, "title": title, "iterations": ITERATIONS, **key})
        supervised = 0.1 + np.exp(-iteration / 150) + random.normal(0, 0.03, ITERATIONS)
        mutual, foreground = np.full((2, ITERATIONS), np.nan) if single else (supervised / 2, supervised / 9)
        frame = {"run": run, "iteration": iteration, "supervised": supervised, "mutual": mutual}
        curves.append(pd.DataFrame({**frame, "pseudo_foreground": foreground, "dice": 1 - supervised / 2}))
        values = random.uniform(0.5, 0.8, 4)
        checked.append(pd.DataFrame({"run": run, "iteration": [200, 400, 600, 800], "dice": values}))
        for selection, output in product(["last", "published"], ["decoder1"] if single else ["decoder1", "mean"]):
            for case in range(cases):
                dice = values[-1] + 0.01 * case
                distance = np.nan if single and labelled == 4 and case == 1 else 20 * (1 - dice)
                row = {"selection": selection, "output": output, "case": f"c{case}", "class": "atrium", "dice": dice}
                metrics.append({**key, **row, "jaccard": dice / (2 - dice), "hd95": distance, "asd": distance / 4})
    return pd.DataFrame(metrics), pd.DataFrame(runs), pd.concat(curves), pd.concat(checked)


def blob(seed, size=(30, 24, 16), threshold=0.0):
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=size), 3)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in size], indexing="ij"))
    return (5 * noise + 0.6 - np.sqrt((grid**2).sum(0)) > threshold).astype(np.uint8)


def case(seed, split="train", labelled=True, size=(30, 24, 16), classes=2):
    label = blob(seed, size)
    image = label + np.random.default_rng(seed).normal(0, 0.3, size)
    label[: size[0] // 2] *= classes - 1
    return Case(f"case_{seed:03d}", split, image[None].astype(np.float32), label if labelled else None, (1.0, 1.0, 2.0))


def lines(ax, colour, line="-", thick=True):
    found = [one for one in ax.lines if one.get_color() == colour and one.get_linestyle() == line]
    return [one for one in found if len(one.get_xdata()) > 1 and (one.get_linewidth() > 1) == thick]


def assert_tidy(figure, monkeypatch):
    """All text that is drawn lies within the figure, and no two pieces of it touch."""
    texts, draw = {}, Text.draw
    monkeypatch.setattr(Text, "draw", lambda text, renderer: (texts.update({text: None}), draw(text, renderer)))
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text().strip()]
    assert len(boxes) > 5
    for text, box in boxes:
        inside = min(box.x0, box.y0) >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        assert inside, f"{text!r} is clipped"
    for (one, first), (other, second) in combinations(boxes, 2):
        width = min(first.x1, second.x1) - max(first.x0, second.x0)
        height = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert width <= 1 or height <= 1, f"{one!r} overlaps {other!r}"


# Who is drawn, and how


def test_titles_of_a_number_share_a_panel_and_a_lone_supervised_one_is_the_dashed_reference_of_all():
    _, runs, _, _ = study({8: ["V-Net", "MLRPL"], **TOUR}, seeds=2)
    drawn = panels(runs)
    assert [labelled for labelled, _ in drawn] == [4, 8]
    for (_, group), names in zip(drawn, [TOUR[4], ["V-Net", "MLRPL"]], strict=True):
        assert [series.name for series in group] == [*names, "V-Net, 40 labelled"]
        assert [series.line == "-" for series in group] == [True] * len(names) + [False]
    assert drawn[0][1][-1].runs == ["V-Net-40-s0", "V-Net-40-s1"]


def test_a_lone_method_that_learns_from_unlabelled_volumes_is_no_reference_but_has_a_panel():
    _, runs, _, _ = study({8: ["MLRPL"], **TOUR})
    assert [(labelled, [series.name for series in group]) for labelled, group in panels(runs)] == [
        (4, [*TOUR[4], "V-Net, 40 labelled"]),
        (8, ["MLRPL", "V-Net, 40 labelled"]),
    ]


def test_lone_references_alone_have_a_panel_each():
    _, runs, _, _ = study({8: ["V-Net"], 4: ["V-Net"]})
    assert [(labelled, len(group), group[0].line) for labelled, group in panels(runs)] == [(4, 1, "-"), (8, 1, "-")]


def test_a_method_keeps_its_colour_and_variants_take_free_ones():
    mixed = colours(["CE", "MLRPL", "CE + WR", "V-Net"])
    assert {title: mixed[title] for title in ALL} == METHOD_COLOURS
    assert len({mixed[title] for title in ["CE", "MLRPL", "CE + WR", "V-Net"]}) == 4
    beside_all = [*ALL, "Control, labelled only", "MLRPL (instance norm)", "V-Net (instance norm)", "another"]
    assert len({colours(beside_all)[title] for title in beside_all}) == len(beside_all)


def test_a_long_legend_takes_nothing_from_the_panels(monkeypatch):
    heights = []
    for titles in (ALL[:3], [*ALL, *(f"A variant with a long title ({n})" for n in range(16))]):
        metrics, runs, _, checked = study({4: titles, 8: titles})
        figure = checks(checked, metrics, runs)
        assert_tidy(figure, monkeypatch)
        heights.append(figure.axes[0].get_window_extent().height / figure.dpi)
    assert heights[1] > 0.8 * heights[0]


@pytest.mark.parametrize("name", study_names())
def test_no_two_methods_of_a_study_have_one_colour(name):
    titles = list(dict.fromkeys(run.title for run in load_study(name).runs() if not run.ablation))
    assert len({colours(titles)[title] for title in titles}) == len(titles)


# Training


def test_learning_curves_are_thin_seeds_and_their_bold_mean():
    _, runs, curves, _ = study({8: ["V-Net", "MLRPL"], **TOUR}, seeds=3)
    figure = learning_curves(curves, runs)
    assert len(figure.axes) == 2 * 4
    ax = figure.axes[3]
    assert "Dice" in ax.get_title()
    assert "%" in ax.get_title()
    (mean,) = lines(ax, METHOD_COLOURS["MLRPL"])
    thin = lines(ax, METHOD_COLOURS["MLRPL"], thick=False)
    assert len(thin) == 3
    assert mean.get_ydata() == pytest.approx(np.mean([one.get_ydata() for one in thin], axis=0))
    assert 90 < mean.get_ydata()[-1] < 99
    assert mean.get_xdata()[[0, -1]].tolist() == [1, ITERATIONS]


def test_learning_curves_are_running_means():
    _, runs, curves, _ = study(TOUR)
    (line,) = lines(learning_curves(curves, runs).axes[0], METHOD_COLOURS["MLRPL"])
    raw = curves[curves["run"] == "MLRPL-4-s0"].set_index("iteration")["supervised"]
    middle = np.flatnonzero(line.get_xdata() > 400)[0]
    at = line.get_xdata()[middle]
    assert line.get_ydata()[middle] == pytest.approx(raw.loc[at - 10 : at + 9].mean(), abs=0.005)


def test_learning_curves_leave_out_what_no_run_has():
    _, runs, curves, _ = study({4: ["V-Net"], 40: ["V-Net"]})
    titles = [ax.get_title() for ax in learning_curves(curves, runs).axes if ax.get_title()]
    assert len(titles) == 2
    assert not [title for title in titles if "utual" in title]


def test_learning_curves_go_without_a_run_that_has_not_started():
    _, runs, curves, _ = study(TOUR)
    figure = learning_curves(curves[curves["run"] != "MLRPL-4-s0"], runs)
    assert not lines(figure.axes[0], METHOD_COLOURS["MLRPL"])
    assert lines(figure.axes[0], METHOD_COLOURS["V-Net"])


def test_checks_mark_the_best_check_and_the_end():
    metrics, runs, _, checked = study(TOUR)
    ax = checks(checked, metrics, runs).axes[0]
    mine = checked[checked["run"] == "MLRPL-4-s0"].set_index("iteration")["dice"] * 100
    marks = {line.get_marker(): line for line in ax.lines if line.get_color() == METHOD_COLOURS["MLRPL"]}
    assert (marks["*"].get_xdata()[0], marks["*"].get_ydata()[0]) == (mine.idxmax(), mine.max())
    expected = metrics.query(
        "method == 'mlrpl' and variant == 'MLRPL' and selection == 'last' and output == 'decoder1'"
    )
    assert marks["o"].get_xdata()[0] == ITERATIONS
    assert marks["o"].get_ydata()[0] == pytest.approx(expected["dice"].mean() * 100)


# Test cases


def test_distributions_show_each_case_once_and_count_undefined_distances():
    metrics, runs, _, _ = study(TOUR, seeds=2)
    metrics.loc[metrics["output"] == "mean", "dice"] -= 0.1
    figure = distributions(metrics, runs, "mm")
    dice, distance = figure.axes
    assert [label.get_text() for label in dice.get_yticklabels()] == [*TOUR[4], "V-Net, 40 labelled"]
    assert distance.get_xlabel() == "95HD (mm)"
    table = per_case(metrics, runs)
    dots = [line for line in dice.lines if line.get_marker() == "o"]
    for place, title in enumerate(TOUR[4]):
        assert dots[place].get_xdata() == pytest.approx(table.loc[table["labelled"] == 4, title].to_numpy())
    notes = [text.get_text() for text in distance.texts]
    assert notes == ["1 undefined"]
    assert not dice.texts


def test_distributions_join_the_same_case():
    metrics, runs, _, _ = study(TOUR)
    dice = distributions(metrics, runs).axes[0]
    joined = [line for line in dice.lines if line.get_marker() == "None" and len(line.get_xdata()) == 4]
    dots = np.array([line.get_xdata() for line in dice.lines if line.get_marker() == "o"])
    assert np.array([line.get_xdata() for line in joined]) == pytest.approx(dots.T)


def test_a_legend_names_only_what_is_drawn():
    named = {}
    for titles in (["MLRPL"], ["V-Net", "MLRPL"]):
        metrics, runs, _, _ = study({4: titles})
        named[len(titles)] = [text.get_text() for text in distributions(metrics, runs).legends[0].get_texts()]
    assert named[2] == [*named[1], "the same case"]


def test_label_efficiency_shows_means_over_cases_with_the_spread_over_seeds(monkeypatch):
    levels = {4: ALL, 8: ALL[:3], 40: ["V-Net"]}
    metrics, runs, _, _ = study(levels, seeds=3)
    figure = label_efficiency(metrics, runs)
    (ax,) = figure.axes
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["4", "8"]
    table = comparison(metrics, runs).query("selection == 'last' and output == 'decoder1'")
    table = table.set_index(["title", "labelled"])
    assert len(ax.containers) == 3  # the others were trained with 4 alone
    for title in ALL[:3]:
        expected = [table.loc[(title, labelled)] for labelled in (4, 8)]
        (bars,) = [c for c in ax.containers if c.lines[0].get_color() == METHOD_COLOURS[title]]
        assert bars.lines[0].get_ydata() == pytest.approx([row["dice"] for row in expected])
        spread = [high - low for (_, low), (_, high) in bars.lines[2][0].get_segments()]
        assert spread == pytest.approx([np.ptp(row["dice_seeds"]) for row in expected])
    (level,) = [one for one in ax.lines if one.get_linestyle() == "--"]
    assert level.get_ydata() == pytest.approx([table.loc[("V-Net", 40), "dice"]] * 2)
    assert_tidy(figure, monkeypatch)


@pytest.mark.parametrize("levels", [{4: ALL, 40: ["V-Net"]}, {4: ALL[:2], 8: ALL[2:4]}, {4: ALL[:3], 8: ALL[:1]}])
def test_without_two_methods_at_several_numbers_of_labelled_cases_there_is_no_label_efficiency(levels, tmp_path):
    metrics, runs, _, _ = study(levels)
    (tmp_path / "curve.png").write_bytes(b"of an earlier report")
    save(label_efficiency(metrics, runs), tmp_path, "curve")
    assert list(tmp_path.iterdir()) == []


def view(reference, predictions, **kwargs):
    image = np.arange(reference.size, dtype=float).reshape(reference.shape)
    return CaseView("median: c1", image, reference, predictions, dict.fromkeys(predictions, 0.5), **kwargs)


def test_contours_show_the_slice_with_most_reference_x_right_and_y_down():
    reference = np.zeros((30, 20, 9), np.uint8)
    reference[4:8, 5:8, 2] = 1
    reference[4:18, 5:12, 6] = 1
    shown = view(reference, {"V-Net": np.roll(reference, 3, axis=0), "MLRPL": reference}, spacing=(1.0, 2.0, 5.0))
    figure = contours([shown], ["background", "atrium"])
    first, second = figure.axes
    assert [first.get_title(), second.get_title()] == ["V-Net", "MLRPL"]
    assert np.array_equal(first.images[0].get_array(), shown.image[:, :, 6].T)
    assert first.get_xlim()[0] < first.get_xlim()[1]
    assert first.get_ylim()[0] > first.get_ylim()[1]
    assert first.get_aspect() == 1
    assert first.images[0].get_extent() == [0, 30, 40, 0]  # mm

    prediction = [c for c in first.findobj(ContourSet) if c.get_edgecolor()[0][:3].tolist() != [1, 1, 1]]
    path = prediction[0].get_paths()[0].vertices
    assert path.min(axis=0).tolist() == [7, 10]
    assert path.max(axis=0).tolist() == [21, 24]


def test_contours_window_holds_every_contour_at_one_scale():
    small, large = (np.zeros((40, 40, 4), np.uint8) for _ in range(2))
    small[30:34, 30:34, 1] = 1
    large[2:20, 4:12, 2] = 1
    stray = small.copy()
    stray[5, 5, 1] = 1  # a false positive far away is not cropped off
    figure = contours([view(small, {"MLRPL": stray}), view(large, {"MLRPL": large})], ["background", "atrium"])
    spans = set()
    for ax in figure.axes:
        (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
        spans.add((round(right - left, 6), round(bottom - top, 6)))
        for contour in ax.findobj(ContourSet):
            corners = np.concatenate([path.vertices for path in contour.get_paths()])
            assert left < corners[:, 0].min()
            assert right > corners[:, 0].max()
            assert top < corners[:, 1].min()
            assert bottom > corners[:, 1].max()
    assert len(spans) == 1


def test_contours_window_is_no_larger_than_the_largest_image():
    full = np.ones((30, 20, 4), np.uint8)
    ax = contours([view(full, {"MLRPL": full}), view(full[:20], {"MLRPL": full[:20]})], ["background", "atrium"]).axes[
        0
    ]
    assert ax.get_xlim() == (0, 30)
    assert ax.get_ylim() == (20, 0)


def test_contours_of_several_classes_and_of_an_empty_prediction():
    reference = blob(1)
    reference[:15] *= 2
    figure = contours([view(reference, {"MLRPL": reference, "V-Net": 0 * reference})], ["background", "head", "body"])
    assert [len(ax.findobj(ContourSet)) for ax in figure.axes] == [4, 2]
    assert [text.get_text() for text in figure.legends[0].get_texts()][1:] == ["prediction: head", "prediction: body"]


@pytest.mark.parametrize("width", [2.5, 4.5, 7.2])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 7, 11])
def test_a_legend_fits_its_figure_in_columns_of_about_one_length(width, count):
    labels = ["mean, 95 % interval over cases", "reference", "its mean", "a seed"]
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 3), layout="constrained")
        figure.subplots()
        add_legend(figure, [Line2D([], [], label=labels[n % 4]) for n in range(count)])
        figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= width * figure.dpi
    texts = [text.get_window_extent() for text in figure.legends[0].get_texts()]
    columns = [sum(round(text.x0) == start for text in texts) for start in sorted({round(text.x0) for text in texts})]
    assert sum(columns) == count
    assert max(columns) - min(columns) <= 1
    assert len(columns) == np.ceil(count / max(columns))  # no more of them than its lines need


@pytest.mark.parametrize(("count", "lines", "columns"), [(6, 1, 6), (7, 2, 4), (10, 2, 5)])
def test_contours_of_many_methods_take_several_lines_a_case(count, lines, columns, monkeypatch):
    reference = blob(1)
    titles = ALL[:count]
    shown = [view(np.roll(reference, n, axis=0), dict.fromkeys(titles, reference)) for n in range(2)]
    figure = contours(shown, ["background", "atrium"])
    rows = len(shown) * lines
    assert {ax.get_subplotspec().get_gridspec().get_geometry() for ax in figure.axes} == {(rows, columns)}
    drawn = [ax for ax in figure.axes if ax.images]
    assert len(drawn) == 2 * count
    named = [ax.get_title().replace("\n", " ") for ax in drawn]
    assert named == titles + (titles if lines > 1 else [""] * count)
    assert_tidy(figure, monkeypatch)


def test_contours_of_many_variants_have_room_for_long_titles(monkeypatch):
    reference = blob(1)
    variants = [f"{name} (instance norm)" for name in ("MLRPL", "Control", "Control, one decoder", "V-Net")]
    titles = [*ALL, *variants, "Control, labelled only", "Control, one decoder", "V-Net, 40 labelled"]
    shown = [view(np.roll(reference, n, axis=0), dict.fromkeys(titles, reference)) for n in range(3)]
    figure = contours(shown, ["background", "atrium"])
    drawn = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title().replace("\n", " ") for ax in drawn] == 3 * titles
    assert len({ax.title.get_fontsize() for ax in drawn}) == 1
    assert drawn[0].title.get_fontsize() >= 5.5
    assert figure.get_figheight() <= 9.5
    assert_tidy(figure, monkeypatch)
    assert drawn[0].get_window_extent().width / figure.dpi > 0.6


# Data


def test_montage_shows_the_largest_slice_of_three_planes_with_or_without_label():
    cases = [case(0), case(1, labelled=False), case(2, size=(20, 30, 10))]
    figure = case_montage(cases, ["background", "atrium"])
    grid = np.array(figure.axes).reshape(3, 3)
    largest = cases[0].label.sum(axis=(0, 1)).argmax()
    assert np.array_equal(grid[0, 0].images[0].get_array(), cases[0].image[0, :, :, largest].T)
    largest = cases[0].label.sum(axis=(1, 2)).argmax()
    assert np.array_equal(grid[2, 0].images[0].get_array(), cases[0].image[0, largest].T)
    assert grid[1, 0].get_ylim()[0] < grid[1, 0].get_ylim()[1]  # z upwards
    assert [len(ax.findobj(ContourSet)) for ax in grid[:, 1]] == [0, 0, 0]
    assert "no label" in grid[0, 1].get_title()
    assert np.array_equal(grid[0, 1].images[0].get_array(), cases[1].image[0, :, :, 8].T)


def test_histograms_are_densities_of_every_case_and_class():
    cases = [case(0), case(1, "test"), case(2, labelled=False)]
    whole, by_class = intensity_histograms(cases, ["background", "atrium"]).axes
    assert len(whole.lines) == 3
    background, atrium = by_class.lines
    assert np.trapezoid(atrium.get_ydata(), atrium.get_xdata()) == pytest.approx(1, abs=0.03)
    assert background.get_xdata()[background.get_ydata().argmax()] == pytest.approx(0, abs=0.15)
    assert atrium.get_xdata()[atrium.get_ydata().argmax()] == pytest.approx(1, abs=0.15)


def test_histograms_have_a_row_a_channel():
    one = case(0)
    two = Case(one.id, one.split, np.concatenate([one.image, one.image * 2]), one.label, one.spacing)
    assert len(intensity_histograms([two], ["background", "atrium"]).axes) == 4


def store(cases, real_spacing=True, classes=("background", "atrium")):
    by_id = {one.id: one for one in cases}
    ids = {split: [one.id for one in cases if one.split == split] for split in ("train", "val", "test")}
    return SimpleNamespace(classes=classes, real_spacing=real_spacing, ids=ids.__getitem__, load=by_id.__getitem__)


@pytest.mark.parametrize(("real", "scale", "unit"), [(True, 2e-3, "ml"), (False, 1e-3, "thousand voxels")])
def test_label_volumes_count_voxels_or_millilitres(real, scale, unit):
    cases = [case(0), case(1), case(2, "test"), case(3, labelled=False)]
    (ax,) = label_volumes(store(cases, real)).axes
    train, test = (line.get_xdata() for line in ax.lines if line.get_marker() == "o")
    assert train == pytest.approx([cases[0].label.sum() * scale, cases[1].label.sum() * scale])
    assert test == pytest.approx([cases[2].label.sum() * scale])
    assert unit in ax.get_xlabel()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["train (2)", "test (1)"]


# All of them

RANKS = ("best", "median", "worst")


def every_figure():
    small = study(TOUR, seeds=2)
    large = study({4: ALL, 16: ALL, 80: ["V-Net"]})
    for name, (metrics, runs, curves, checked) in {"small": small, "large": large}.items():
        yield f"learning curves, {name}", lambda r=runs, c=curves: learning_curves(c, r)
        yield f"checks, {name}", lambda m=metrics, r=runs, k=checked: checks(k, m, r)
        yield f"distributions, {name}", lambda m=metrics, r=runs: distributions(m, r)
    classes = ["background", "anterior", "posterior"]
    cases = [case(seed, split, classes=3) for seed, split in enumerate(["train", "train", "val", "test", "test"])]
    long = Case("06SR5RBREL16DQ6M8LWS", *(getattr(cases[0], name) for name in ("split", "image", "label", "spacing")))
    for titles in (["V-Net", "MLRPL"], ALL):
        views = [
            CaseView(
                f"{rank}: {one.id}", one.image[0], one.label, dict.fromkeys(titles, one.label), dict.fromkeys(titles, 1)
            )
            for rank, one in zip(RANKS, [long, *cases], strict=False)
        ]
        yield f"contours, {len(titles)}", lambda v=views: contours(v, classes)
    wide = [view(np.tile(blob(1), (2, 1, 1)), {"MLRPL": np.tile(blob(1), (2, 1, 1))})] * 3
    wide = [replace(one, name=f"{rank}: VIXBEFTNVHZWKAKURJBN") for rank, one in zip(RANKS, wide, strict=True)]
    yield "contours, wide names", lambda: contours(wide, classes[:2])
    yield "montage, 1", lambda: case_montage([long], classes)
    yield "montage, 5", lambda: case_montage([long, *cases[1:]], classes)
    yield "histograms", lambda: intensity_histograms(cases, classes)
    yield "volumes", lambda: label_volumes(store(cases, classes=classes))


@pytest.mark.parametrize("draw", [pytest.param(draw, id=name) for name, draw in every_figure()])
def test_figures_are_tidy_fit_the_page_and_leave_no_trace(draw, monkeypatch):
    monkeypatch.setitem(rcParams, "font.size", 20)  # a notebook's own taste
    before = rcParams.copy()
    figure = draw()
    assert rcParams == before
    assert not _pylab_helpers.Gcf.figs
    assert figure.get_figwidth() <= 7.25
    assert figure.get_figheight() <= 9.5
    assert_tidy(figure, monkeypatch)


def test_saved_figures_are_the_same_bytes_again(tmp_path):
    metrics, runs, _, _ = study(TOUR)
    for folder in ("one", "two"):
        save(distributions(metrics, runs), tmp_path / folder, "cases")
    save(distributions(metrics, runs), tmp_path / "two", "cases")  # over what is there
    for folder in ("one", "two"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["cases.png", "cases.svg"]
    for name in ("cases.png", "cases.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "dc:date" not in (tmp_path / "one" / "cases.svg").read_text(encoding="utf-8")


def test_saved_figures_are_small_and_look_as_drawn(tmp_path):
    metrics, runs, _, _ = study(TOUR)
    figure = distributions(metrics, runs)
    save(figure, tmp_path, "cases")
    png, drawn = tmp_path / "cases.png", tmp_path / "drawn.png"
    figure.savefig(drawn, dpi=STYLE["savefig.dpi"])
    assert png.stat().st_size < 0.6 * drawn.stat().st_size
    seen, meant = (np.asarray(Image.open(path).convert("RGB"), float) for path in (png, drawn))
    assert seen.shape == meant.shape
    assert np.abs(seen - meant).max() < 16  # of 255
    svg = (tmp_path / "cases.svg").read_text(encoding="utf-8")
    paths = re.findall(r' d="([^"]*)"', svg)
    assert paths
    assert not any(re.search(r"\.\d{3}|\n", path) for path in paths)
    assert "scale(0.015625)" in svg  # of letters: not a coordinate


def test_notebooks_show_figures_by_themselves():
    metrics, runs, _, _ = study(TOUR)
    data, metadata = distributions(metrics, runs)._repr_png_()
    assert data.startswith(b"\x89PNG")
    assert metadata == {"width": 936}
