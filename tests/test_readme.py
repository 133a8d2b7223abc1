"""The tables in the two READMEs follow from the committed rows, to the digits that are printed.

Not their running text, nor times that have no row: the compiled step's and whole runs'.
"""

import re
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mlrpl.audit_report import choices, later_half, predictors, subjects
from mlrpl.results import Results
from mlrpl.rows import LARGEST, OWN, SELECTIONS
from mlrpl.statistics import interval, summary

ROOT = Path(__file__).parents[1]
METHODS = ("mlrpl", "control", "control-labelled", "vnet")
KEPT = ("mlrpl-kept", "control-kept", None, "vnet-kept")
INSTANCE = ("mlrpl-instance", "control-instance", None, "vnet-instance")
INSTANCE_KEPT = ("mlrpl-instance-kept", "control-instance-kept", None, "vnet-instance-kept")
SELECTED = (("published", "decoder1"), ("last", "decoder1"), ("last", OWN))


@cache
def results(study: str) -> Results:
    return Results.load(ROOT / "results" / study)


@cache
def measured(
    study: str, variant: str, labelled: int, selection: str = "last", output: str = "decoder1", measure: str = "dice"
) -> pd.DataFrame:
    """A column a seed. Dice in %, mean over the classes: a row a case; of a distance, a row a case and class."""
    rows = results(study).metrics
    rows = rows[(rows["variant"] == variant) & (rows["labelled"] == labelled)]
    rows = rows[(rows["selection"] == selection) & (rows["output"] == output)]
    table = rows.pivot_table(measure, ["case", "class"], "seed")
    return 100 * table.groupby("case").mean() if measure == "dice" else table


def apart(study: str, one: str, other: str, labelled: int, selection: str = "last", output: str = "decoder1"):
    """Differences, a row a case, a column a seed; where the other has one seed, each of the first is held to it."""
    mine, theirs = (measured(study, variant, labelled, selection, output) for variant in (one, other))
    return mine.sub(theirs.iloc[:, 0], axis=0) if theirs.shape[1] == 1 else (mine - theirs).dropna(axis=1)


def table(file: str, after: str) -> list[list[str]]:
    """Cells of the rows of the first table behind a text."""
    anywhere_broken = r"\s+".join(map(re.escape, after.split()))
    lines = re.split(anywhere_broken, (ROOT / file).read_text(encoding="utf-8"), maxsplit=1)[1].splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("|---"))
    rows = []
    for line in lines[first + 1 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def numbers(cell: str) -> list[str]:
    return re.findall(r"[−-]?\d+(?:\.\d+)?", re.sub(r"\(paper[^)]*\)", "", cell))


def printed(value: float, like: str) -> str:
    decimals = len(like.partition(".")[2])
    return f"{value:.{decimals}f}".replace("-", "−")


def says(cell: str, *values: float) -> bool:
    """Whether these are a cell's numbers, to the digits that it has."""
    found = numbers(cell)
    return len(found) == len(values) and all(
        printed(value, like) == like for value, like in zip(values, found, strict=True)
    )


def each_or_mean(cell: str, frame: pd.DataFrame) -> bool:
    """Whether a cell gives each seed's mean over the cases, or their mean ± standard deviation."""
    seeds = frame.mean()
    return says(cell, *seeds) or (len(seeds) > 1 and says(cell, seeds.mean(), seeds.std()))


def with_interval(cell: str, frame: pd.DataFrame) -> bool:
    difference = frame.mean(axis=1)
    return says(cell, difference.mean(), *interval(difference))


def titles(study: str, labelled: int) -> dict[str, str]:
    """Variants by title, as the READMEs shorten it, among the runs with so many labelled cases."""
    runs = results(study).runs
    runs = runs[runs["labelled"] == labelled]
    return dict(zip(runs["title"].str.replace("(β = 0)", "").str.strip(), runs["variant"], strict=True))


RESULTS = [
    ("la", 8, "published", METHODS),
    ("la", 8, "last", METHODS),
    ("la", 16, "published", METHODS),
    ("la-half", 8, "last", METHODS),
    ("la-half", 8, "last", KEPT),
    ("la-half", 8, "last", ("mlrpl-instance", "control-instance", None, None)),
    ("hippocampus", 20, "last", METHODS),
    ("hippocampus", 20, "last", KEPT),
    ("hippocampus", 5, "last", METHODS),
    ("hippocampus", 5, "last", INSTANCE),
    ("hippocampus", 5, "last", INSTANCE_KEPT),
    ("phantom-full", 4, "last", METHODS),
    ("phantom-full", 4, "last", INSTANCE),
]


@pytest.mark.parametrize(("number", "row"), list(enumerate(RESULTS)))
def test_the_table_of_results(number, row):
    study, labelled, selection, variants = row
    cells = table("README.md", "says in words what they show")
    assert len(cells) == len(RESULTS)
    for cell, variant in zip(cells[number][3:], variants, strict=True):
        frame = measured(study, variant, labelled, selection) if variant else pd.DataFrame()
        assert each_or_mean(cell, frame) if len(frame) else cell == "", (variant, cell)


THREE_TIMES = [
    ("phantom-full", "mlrpl", "control", 4),
    ("phantom-precision", "mlrpl", "control", 4),
    ("phantom-precision", "mlrpl-bf16", "control-bf16", 4),
]
DIFFERENCES = [
    [("la", "mlrpl", "control", 8, "published")],
    [("la", "mlrpl", "control", 8)],
    [("la-half", "mlrpl", "control", 8)],
    [("la-half", "mlrpl-kept", "control-kept", 8)],
    [("la-half", "mlrpl-instance", "control-instance", 8)],
    [("hippocampus", "mlrpl", "control", 20)],
    [("hippocampus", "mlrpl-kept", "control-kept", 20)],
    [("hippocampus", "mlrpl", "control", 5)],
    [("hippocampus", "mlrpl-instance", "control-instance", 5)],
    [("hippocampus", "mlrpl-instance-kept", "control-instance-kept", 5)],
    THREE_TIMES,
    [("phantom-full", "mlrpl-instance", "control-instance", 4)],
]


@pytest.mark.parametrize(("number", "pairs"), list(enumerate(DIFFERENCES)))
def test_the_table_of_differences(number, pairs):
    cells = table("README.md", "**What the mutual loss adds**")
    assert len(cells) == len(DIFFERENCES)
    _, difference, ahead = cells[number]
    frames = [apart(*pair) for pair in pairs]
    seeds = pd.concat([frame.mean() for frame in frames])
    if len(frames) > 1:
        assert says(difference, *(frame.mean(axis=None) for frame in frames))
    else:
        assert with_interval(difference, frames[0]) or says(difference, *seeds), difference
    assert says(ahead, (seeds > 0).sum(), len(seeds)), ahead


HALF = (
    "mlrpl", "control", "vnet", "control-labelled", "mlrpl-instance", "control-instance", "mlrpl-one", "mlrpl-one-kept",
    "mlrpl-kept", "control-kept",
)  # fmt: skip


def test_left_atrium_at_half_resolution():
    """Each seed and, of several, mean ± sd; with instance normalisation there are no statistics of one's own."""
    cells = table("results/README.md", "## Left atrium (`la-half`)")
    for variant, (_, *row) in zip(HALF, cells, strict=True):
        for (each, mean), chosen in zip(
            (row[:2], row[2:4], row[4:]), (SELECTED[1], SELECTED[2], SELECTED[0]), strict=True
        ):
            seeds = measured("la-half", variant, 8, *chosen).mean()
            assert says(each, *seeds) if len(seeds) else each == "", (variant, each)
            assert says(mean, seeds.mean(), seeds.std()) if len(seeds) > 1 else mean == "", (variant, mean)


@pytest.mark.parametrize(
    ("study", "labelled", "kind", "after", "rows"),
    [
        ("hippocampus", 20, "", "All nine methods and the controls with 20 labelled cases", 16),
        ("hippocampus-kept", 20, "", "All nine methods and the control, none with the published dropout", 10),
        ("hippocampus-kept", 5, " (instance norm)", "The same with 5 labelled cases and instance normalisation", 11),
    ],
)
def test_hippocampus_method_by_method(study, labelled, kind, after, rows):
    found, variants = results(study).compared(), titles(study, labelled)
    sure = summary(found.metrics, found.runs)
    sure = sure[sure["labelled"] == labelled].set_index("title").rename({"Control (β = 0)": "Control"})
    cells = table("results/README.md", after)
    assert len(cells) == rows
    for name, last, best, distance, difference, p in cells:
        row = sure.loc[title := name.removesuffix(" (one seed)") + kind]
        assert says(last, *measured(study, variants[title], labelled).mean()), name
        assert says(best, *measured(study, variants[title], labelled, "published").mean()), name
        assert says(distance, measured(study, variants[title], labelled, measure="hd95").mean().mean()), name
        if name != "MLRPL":
            low, high = row["difference_low"], row["difference_high"]
            assert says(difference.replace("+", ""), row["difference"], low, high), name
            assert (p == "< 0.001" and row["p_holm"] < 0.001) or says(p, row["p_holm"]), name


def test_phantoms():
    variants = titles("phantom-full", 4)
    cells = table("results/README.md", "and at 8 labelled, one seed:")
    instance = [name for name, *_ in cells].index("**with instance instead of batch normalisation**")
    for n, (name, *row) in enumerate(cells):
        if n == instance:
            continue
        variant = variants[name + " (instance norm)" * (n > instance)]
        *each, mean, best, eight = row
        seeds, published = (measured("phantom-full", variant, 4, selection).mean() for selection in SELECTIONS)
        assert says(" ".join(each), *seeds), (name, each)
        if len(seeds) > 1:
            assert says(mean, seeds.mean(), seeds.std()), (name, mean)
            assert says(best, published.mean(), published.std()), (name, best)
        more = measured("phantom-full", variant, 8)
        assert says(eight, *more.mean()) if len(more) else eight == "", (name, eight)


def test_left_atrium():
    cells = {name.partition(":")[0]: row for name, *row in table("results/README.md", "## Left atrium at full size")}
    columns = {0: ("mlrpl", 8, 0), 1: ("mlrpl", 8, 1), 3: ("control", 8, 0), 4: ("vnet", 8, 0), 6: ("mlrpl", 16, 0)}
    checks = results("la").checks
    for column, (variant, labelled, seed) in columns.items():

        def of(selection: str = "last", output: str = "decoder1", measure: str = "dice") -> float:
            return measured("la", variant, labelled, selection, output, measure)[seed].mean()  # noqa: B023

        best = cells["best of 72 checks on the 20 test cases, as the literature selects"]
        assert says(best[column], of("published"))
        assert says(cells["its 95HD (voxels)"][column], of("published", measure="hd95"))
        assert says(cells["last weights"][column], of(), of(measure="hd95"))
        assert says(cells["last weights, each volume normalised by its own statistics"][column], of(output=OWN))
        largest = cells["of each prediction the largest connected component alone"][column]
        if (variant, labelled, seed) == ("mlrpl", 8, 0):  # measured beside the package's evaluation
            rows = pd.read_csv(ROOT / "results/la/largest-component.csv")
            assert says(largest, 100 * rows["dice_largest"].mean(), rows["hd95_largest"].mean())
        else:
            assert says(largest, of("published", LARGEST), of("published", LARGEST, "hd95"))
        mine = 100 * checks.loc[checks["run"] == f"{variant}-{labelled}-s{seed}"].set_index("iteration")["dice"]
        assert says(cells["at iteration"][column].replace(",", ""), mine.idxmax())
        late = mine[mine.index > 13_000]
        ten = cells["mean of the last ten checks, over 2,000 iterations (range)"][column]
        assert says(ten, late.mean(), late.min(), late.max())


def test_left_atrium_against_its_control():
    cells = table("results/README.md", "Points by which each is ahead of it")
    control = [measured("la", "control", 8, *chosen) for chosen in SELECTED]
    for (_, *row), of_control, chosen in zip(cells, control, SELECTED, strict=True):
        for cell, (variant, seed) in zip(row, (("mlrpl", 0), ("mlrpl", 1), ("vnet", 0)), strict=True):
            assert with_interval(cell, measured("la", variant, 8, *chosen)[[seed]].sub(of_control[0], axis=0)), cell


def test_spikes_and_the_dropout_before_the_heads():
    rows = pd.read_csv(ROOT / "results/la/kept-channels.csv")
    whole, drawn = rows.loc[rows["draw"] == 0, "mutual"], rows.loc[rows["draw"] > 0, "mutual"]
    trained = pd.read_csv(ROOT / "results/la/mutual-end.csv")["mutual"]
    lines = table("results/README.md", "## The dropout before the heads")
    for cells, mutual in zip(lines, (whole, drawn, trained), strict=True):
        figures = [*mutual.quantile([0.5, 0.9, 0.98]), mutual.max(), 100 * (mutual > 0.1).mean()]
        for cell, figure in zip(cells[1:], figures, strict=True):
            assert says(cell, figure) or cell == "", cells
    kept = pd.read_csv(ROOT / "results/la-half/kept-channels.csv").pivot(index="kept", columns="run")
    mlrpl, control = "mlrpl-instance-8-s1", "control-instance-8-s1"
    for fewest, iterations, *cells in table("results/README.md", "(`la-half/kept-channels.csv`)"):
        row = kept.loc[int(fewest)]
        assert says(iterations.replace(",", ""), row["n", mlrpl]) and row["n", mlrpl] == row["n", control]
        losses = row["mutual_median", mlrpl], row["mutual_median", control]
        dice = 100 * row["dice_10", mlrpl], 100 * row["dice_10", control]
        assert all(says(cell, figure) for cell, figure in zip(cells, (*losses, *dice), strict=True)), fewest


def test_the_first_iterations_without_the_dropout_before_the_heads():
    variants = titles("hippocampus-start", 20)
    cells = table("results/README.md", "(`hippocampus-start`)")
    assert {name for name, *_ in cells} == set(variants)
    for name, *row in cells:
        seeds = measured("hippocampus-start", variants[name], 20).mean()
        assert says(" ".join(row), *seeds), name


def test_hippocampus_without_the_dropout_before_the_heads():
    variants = {"MLRPL": "mlrpl", "Control": "control", "V-Net": "vnet"}
    cells = table("results/README.md", "To the end, with the dropout and without it")
    assert [name for name, *_ in cells] == list(variants)
    for name, *row in cells:
        for cell, labelled, suffix in zip(
            row, (20, 20, 5, 5), ("", "-kept", "-instance", "-instance-kept"), strict=True
        ):
            seeds = measured("hippocampus", variants[name] + suffix, labelled)
            assert says(cell, *seeds.mean()) if len(seeds) else cell == "", (name, suffix)


def test_hippocampus_with_5_labelled():
    variants = titles("hippocampus", 5)
    for name, last, own, best, distance in table("results/README.md", "Seed 0 of each; three were trained on another"):
        variant = variants[name.removesuffix(" (GPU, bf16)")]
        for cell, chosen in ((last, ("last",)), (own, ("last", OWN)), (best, ("published",))):
            assert says(cell, measured("hippocampus", variant, 5, *chosen)[0].mean()), (name, cell)
        assert says(distance, measured("hippocampus", variant, 5, measure="hd95")[0].mean()), name
    for name, *row in table("results/README.md", "**A second seed of three of them**"):
        seeds = [measured("hippocampus", variants[name], 5, "last", output).mean() for output in ("decoder1", OWN)]
        assert says(" ".join(row), seeds[0][0], seeds[1][0], seeds[0][1], seeds[1][1]), name


STUCK = [
    [("uamt", 20)],
    [("acmt", 20)],
    [("control-one", 20)],
    [("control-one-instance", 20)],
    [("uamt", 5), ("acmt", 5)],
    [("vnet", 20), ("vnet", 5)],
    [("vnet-instance", 5)],
    [("vnet-two", 20)],
    [("vnet", 200)],
]


def test_runs_that_are_stuck():
    """Throughout, the Dice of their batches is below 40 %; the curves' points are means over stretches."""
    highest = results("hippocampus").curves.groupby("run")["dice"].max()
    for (*_, cell), variants in zip(table("results/README.md", "**Runs that are stuck.**"), STUCK, strict=True):
        counts = []
        for variant, labelled in variants:
            stuck = highest[highest.index.str.fullmatch(rf"{variant}-{labelled}-s\d")] < 0.4
            counts += [stuck.sum(), len(stuck)]
        assert says(cell, *counts), variants


def test_parts_and_measures_with_instance_normalisation():
    ablations = results("hippocampus").ablations
    runs = results("hippocampus").runs.set_index("run")["variant"]
    variants = {row["variant"]: runs[row["run"]] for row in ablations.to_dict("records")}
    on_gpu = pd.read_csv(ROOT / "results/hippocampus/components-on-gpu.csv").set_index(["selection", "run"])["dice"]
    whole = measured("hippocampus", variants["+ WR + HR"], 5)
    for name, *row in table("results/README.md", "The parts of MLRPL, three seeds"):
        title = "CE" if name == "cross-entropy alone (CPS)" else name
        *each, mean, against, best, gpu = row
        frame = measured("hippocampus", variants[title], 5)
        seeds, published = frame.mean(), measured("hippocampus", variants[title], 5, "published").mean()
        assert says(" ".join([*each, mean]), *seeds, seeds.mean(), seeds.std()), name
        assert says(best, published.mean()), name
        if title != "+ WR + HR":
            assert with_interval(against, frame - whole), name
            assert says(gpu, *(100 * on_gpu["last"][f"{variants[title]}-5-s{seed}"] for seed in (0, 1))), name
    for name, *row in table("results/README.md", "The measures of HR:"):
        variant = variants[name.removesuffix(" (the paper's)")]
        pairs = [measured("hippocampus", variant, 5, selection).mean()[:2] for selection in SELECTIONS]
        assert says(" ".join(row), *pd.concat(pairs)), name


def test_phantoms_trained_three_times():
    cells = table("results/README.md", "trained anew the same pair comes out")
    for (_, *row), pair in zip(cells, THREE_TIMES, strict=True):
        *each, ahead, count = row
        frames = [measured(pair[0], variant, 4) for variant in pair[1:3]]
        difference = apart(*pair)
        assert says(" ".join(each), *pd.concat(frames, axis=1).mean().sort_index(kind="stable"))
        assert with_interval(ahead, difference) or says(ahead, difference.mean(axis=None)), ahead
        assert says(count, (difference.mean() > 0).sum(), 3)


AUDITED = [("la", "mlrpl", 8), ("la-half", "mlrpl", 8), ("hippocampus", "mlrpl", 20)]
AUDITED += [("hippocampus", "mlrpl-instance", 5), ("phantom-full", "mlrpl", 4)]


@pytest.mark.parametrize(("column", "audited"), list(enumerate(AUDITED)))
def test_the_audit(column, audited):
    study, *which = audited
    (found,) = (s for s in subjects(results(study)).values() if list(s.runs[["variant", "labelled"]].iloc[0]) == which)
    audit = later_half(found)
    audit = audit[audit["distance"] == "all"]
    chosen = choices(audit[audit["class"] == "all"]).groupby(["scope", "score"])[["kept", "dropped"]].mean()
    weighed = predictors(audit[audit["scope"] == "kept"])
    mean = weighed.loc[(weighed["class"] == "all") & (weighed["score"] == "mse"), "weight"].mean()
    weighed["part"] = np.where(weighed["class"] == "all", "all", "foreground")
    weighed = weighed[weighed["class"] != "background"].groupby(["part", "score"])["auroc"].mean()
    expected = [
        *chosen.loc[("all", "wr")],
        chosen.loc[("all", "matched"), "kept"],
        chosen.loc[("disagree", "wr"), "kept"],
        chosen.loc[("disagree", "matched"), "kept"],
        mean,
        *(weighed[part, score] for part in ("all", "foreground") for score in ("mse", "prob")),
    ]
    cells = [row[1 + column] for row in table("results/README.md", "## The audit")]
    assert says(" ".join(cells), *expected)


def test_ablations_on_phantoms():
    ablations = results("phantom-full").ablations
    variants = results("phantom-full").runs.set_index("run")["variant"]
    cells = table("results/README.md", "The five ablations")
    for (name, rows), (_, cell) in zip(ablations.groupby("ablation", sort=False), cells, strict=True):
        figures = re.findall(r"([\d.]+(?: ± [\d.]+)?)(?:,|$)", cell)
        for title, mine in rows.groupby("variant"):
            frame = measured("phantom-full", variants[mine["run"].iloc[0]], 4)[mine["seed"]]
            right = [figure for figure in figures if each_or_mean(figure, frame)]
            assert right, (name, title, frame.mean())
            figures.remove(right[0])
        assert figures == [], name


SPEED = {
    "training step": ["training step"],
    "training step, both in one process": ["training step"],
    "training step, a process each, as it is run": ["training step, a process each"],
    "training step, replayed": ["training step"],
    "peak memory of a step": ["peak memory of a step (GB)"],
    "mutual loss": ["mutual loss"],
    "mutual loss, not compiled": ["mutual loss"],
    "sliding window, one decoder asked for": ["sliding window, one decoder", "sliding window beside MONAI's"],
    "sliding window, both decoders": ["sliding window, both decoders"],
    "metrics": ["metrics in voxels"],
    "metrics, in voxels and in mm": ["metrics in voxels", "metrics in mm"],
}


@pytest.mark.parametrize(
    ("file", "after", "benches", "columns", "rows"),
    [
        ("README.md", "Time (or memory) of the plain formulation for one", ["bench", "bench-cuda"], 1, 6),
        ("results/README.md", "they are for two CPU cores with bf16", ["bench"], 1, 7),
        ("results/README.md", "`make bench DEVICE=cuda` on an H200", ["bench-cuda"], 3, 5),
    ],
)
def test_speed(file, after, benches, columns, rows):
    """Each number is a ratio, a time in seconds or milliseconds, or a memory in GB of the benchmark's rows."""
    known = [(SPEED[name], row) for name, *row in table(file, after) if name in SPEED]
    assert len(known) == rows
    for works, row in known:
        for number, bench in enumerate(benches):
            times = pd.read_csv(ROOT / f"results/{bench}/bench.csv").set_index("work").reindex(works)
            values = [
                *times["ratio"],
                *(scale * t for scale in (1, 1000) for t in (*times["ours_s"], *times["plain_s"])),
            ]
            for found in numbers(" ".join(row[number : number + columns])):
                assert any(printed(value, found) == found for value in values), (works, row)
