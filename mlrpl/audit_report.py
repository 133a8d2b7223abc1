"""What an audit found, as tables, figures and sentences: `06-reliability` shows them.

``audit`` is the frame of `mlrpl.results.Results`: the rows of `mlrpl.audit`, pooled over stretches of each run. Shares
are in percent. Numbers are computed run by run, then averaged over the seeds. Tables and sentences are about the later
half of training, when there is something to choose from; the figures show all of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mlrpl.audit import DISTANCE_NAMES, MEASURES, RULES, SCOPES, THRESHOLDS
from mlrpl.drawing import STEPS, WIDTH, NotebookFigure, add_legend, fitted, save, styled
from mlrpl.errors import StudyError
from mlrpl.results import Results
from mlrpl.tables import over_seeds, seed_names

GROUP = ["scope", "class", "distance", "score"]
SCOPE_NAMES = {"all": "all voxels", "disagree": "decoders disagree", "kept": "kept by WR"}
RULE_NAMES = {"wr": "WR", "matched": "the surest, as many"} | {
    f"> {threshold}": f"threshold {threshold}" for threshold in THRESHOLDS
}
MEASURE_COLOURS = {
    "mse": "#D55E00", "sim": "#0072B2", "prob": "#000000", "multiply": "#009E73", "avg": "#CC79A7", "margin": "#56B4E9",
}  # fmt: skip
SEEDS_FROM = 1.3  # linewidth: of fainter lines only the mean is drawn
WR_COLOUR, THRESHOLD_COLOUR = "#D55E00", "#0072B2"
MARKERS = {
    "wr": {"marker": "*", "markersize": 11, "color": WR_COLOUR, "markeredgecolor": "white"},
    "matched": {"marker": "D", "markersize": 7, "color": THRESHOLD_COLOUR, "markerfacecolor": "none"},
}
DIAGRAM = ("mse", "prob")  # of the reliability diagram: the paper's weight beside the plain probability


def subjects(found: Results) -> dict[str, Results]:
    """What tables and figures are about: of each audited variant the runs of one number of labelled cases.

    Returns:
        In the study's order, by what their figures' file names end in: "" for the first, then "-<variant>-<labelled>".

    Raises:
        StudyError: where no run was audited.
    """
    if not len(found.audit):
        raise StudyError("no run of this study was audited: add `audit: {every: 20}` to it and train anew")
    runs = found.runs[found.runs["run"].isin(found.audit["run"])]
    groups = runs.groupby(["variant", "labelled"], sort=False)
    return {
        f"-{variant}-{labelled}" if n else "": found.only(mine) for n, ((variant, labelled), mine) in enumerate(groups)
    }


def together(table: Callable[[Results], pd.DataFrame], subjects: Mapping[str, Results]) -> pd.DataFrame:
    """One of the tables below of all subjects, which a first column tells apart where there are several."""
    tables = [table(found) for found in subjects.values()]
    if len(tables) > 1:
        for made, found in zip(tables, subjects.values(), strict=True):
            made.insert(0, "Audited", _named(found))
    return pd.concat(tables, ignore_index=True)


def drawn(
    figure: Callable[[Results], Figure], subjects: Mapping[str, Results], folder: Path, name: str
) -> Iterator[tuple[str, Figure]]:
    """One of the figures below for each subject, saved as `name` and the subject's ending, with its heading."""
    for ending, found in subjects.items():
        made = figure(found)
        save(made, folder, name + ending)
        yield f"**{described(found)}**", made


def described(found: Results) -> str:
    """Which runs these are, in words."""
    return f"{_named(found)}, {seed_names(found.runs['seed'].unique())}"


def _named(found: Results) -> str:
    run = found.runs.iloc[0]
    return f"{run['title']}, {run['labelled']} labelled"


def later_half(found: Results) -> pd.DataFrame:
    """Rows of the audit after half of each run."""
    end = found.audit["run"].map(found.runs.set_index("run")["iterations"])
    return found.audit[found.audit["iteration"] > end / 2].reset_index(drop=True)


def choices(audit: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """How each rule chooses, by run, scope, class and distance.

    Args:
        audit: rows.
        by: further columns not to pool over, such as "iteration".

    Returns:
        ``coverage``, the share of pseudo-labels kept; ``kept`` and ``dropped``, the shares of them that are right, all
        in %; NaN where there are none.
    """
    rows = audit[audit["bin"].isin(["kept", "dropped"])]
    counts = rows.pivot_table(["voxels", "correct"], ["run", *by, *GROUP], "bin", aggfunc="sum", observed=True)
    counts = counts.reindex(columns=pd.MultiIndex.from_product([["voxels", "correct"], ["kept", "dropped"]])).fillna(0)
    voxels = counts["voxels"]
    right = counts["correct"] / voxels.where(voxels > 0)
    share = voxels["kept"] / voxels.sum(axis=1)
    return (100 * right.assign(coverage=share)).reset_index()


def predictors(audit: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """How well each measure's weight tells right from wrong, by run, scope, class and distance.

    Returns:
        ``auroc``, averaged over the audits; ``weight``, mean; ``right``, the share of pseudo-labels that are, in %;
        ``gap``, the mean distance of weight and share over the groups of the reliability diagram, where there is one.
    """
    key = ["run", *by, *GROUP]
    rows = audit[audit["score"].isin(MEASURES)]
    rows = rows.assign(mass=rows["weight"] * rows["voxels"])
    whole = rows[rows["bin"] == "all"].groupby(key, observed=True)
    sums = whole[["voxels", "correct", "mass"]].sum()
    table = pd.DataFrame(
        {
            "auroc": whole["auroc"].mean(),
            "weight": sums["mass"] / sums["voxels"],
            "right": 100 * sums["correct"] / sums["voxels"],
        }
    )
    bins = rows[rows["bin"] != "all"].groupby([*key, "bin"], observed=True)[["voxels", "correct", "mass"]].sum()
    bins["off"] = (bins["mass"] - bins["correct"]).abs()
    sums = bins.groupby(key, observed=True)[["off", "voxels"]].sum()
    return table.assign(gap=sums["off"] / sums["voxels"]).reset_index()


def _text(frame: pd.DataFrame, key: list[str], columns: Sequence[str], digits: int) -> pd.DataFrame:
    """What the runs have, as text (:func:`mlrpl.tables.over_seeds`)."""
    groups = frame.groupby(key, sort=False, observed=True)[list(columns)]
    return groups.agg(lambda values: over_seeds(values, digits)).reset_index()


def _groups(audit: pd.DataFrame) -> list[tuple[str, str, str]]:
    """(name, scope, class) of the groups of tables: all voxels, each class, where the decoders disagree."""
    classes = [name for name in audit["class"].unique() if name != "all"]
    return [
        ("all", "all", "all"),
        *((f"pseudo-label {name}", "all", name) for name in classes),
        ("decoders disagree", "disagree", "all"),
        *((f"disagree, pseudo-label {name}", "disagree", name) for name in classes),
    ]


def choice_table(found: Results) -> pd.DataFrame:
    """A row a group of voxels and rule: coverage and precision in the later half of training, as text."""
    audit = later_half(found)
    table = choices(audit[audit["distance"] == "all"])
    parts = []
    for name, scope, of_class in _groups(audit):
        mine = table[(table["scope"] == scope) & (table["class"] == of_class)]
        rules = RULES if "all" in (scope, of_class) else RULES[:2]
        text = _text(mine, ["score"], ["coverage", "kept", "dropped"], 1).set_index("score").reindex(rules).dropna()
        text.insert(0, "Pseudo-labels", name)
        parts.append(text.reset_index())
    shown = pd.concat(parts, ignore_index=True)
    shown["score"] = shown["score"].map(RULE_NAMES)
    headings = {
        "score": "Rule",
        "coverage": "Kept (%)",
        "kept": "Right of the kept (%)",
        "dropped": "Right of the dropped (%)",
    }
    return shown[["Pseudo-labels", *headings]].rename(columns=headings)


def predictor_table(found: Results) -> pd.DataFrame:
    """A row a measure: AUROC by group, mean weight and calibration in the later half of training, as text."""
    audit = later_half(found)
    table = predictors(audit[audit["distance"] == "all"])
    classes = [name for name in audit["class"].unique() if name != "all"]
    groups = {
        "AUROC, all": ("all", "all"),
        **{f"AUROC, pseudo-label {name}": ("all", name) for name in classes},
        "AUROC, kept by WR": ("kept", "all"),
        **{f"AUROC, kept by WR, {name}": ("kept", name) for name in _foreground(audit)},
        "AUROC, decoders disagree": ("disagree", "all"),
    }
    shown = pd.DataFrame({"Measure": MEASURES})
    for heading, (scope, of_class) in groups.items():
        mine = table[(table["scope"] == scope) & (table["class"] == of_class)]
        shown[heading] = shown["Measure"].map(_text(mine, ["score"], ["auroc"], 3).set_index("score")["auroc"])
    mine = table[(table["scope"] == "kept") & (table["class"] == "all")]
    text = _text(mine, ["score"], ["weight", "gap"], 3).set_index("score")
    shown["Mean weight, kept by WR"] = shown["Measure"].map(text["weight"])
    shown["Weight against share right, mean gap"] = shown["Measure"].map(text["gap"])
    shown["Measure"] = shown["Measure"].replace("mse", "mse (HR)")
    return shown.fillna("—")


def cost_table(found: Results) -> pd.DataFrame:
    """A row a run: seconds of training and of the audits in it."""
    runs = found.runs
    share = 100 * runs["seconds_audit"] / runs["seconds"]
    return pd.DataFrame(
        {
            "Run": runs["run"],
            "Training (s)": runs["seconds"].round().astype(int),
            "Audits (s)": runs["seconds_audit"].map("{:.1f}".format),
            "Share (%)": share.map("{:.2f}".format),
        }
    )


def answers(found: Results) -> str:
    """The paper's two questions, answered in Markdown with this audit's numbers, below a heading with the runs."""
    audit = later_half(found)
    audit = audit[audit["distance"] == "all"]
    foreground = predictors(audit[audit["class"].isin(_foreground(audit)) & (audit["scope"] == "kept")])
    audit = audit[audit["class"] == "all"]
    chosen = choices(audit).groupby(["scope", "score"])[["coverage", "kept", "dropped"]].mean()
    weighed = predictors(audit).groupby(["scope", "score"])[["auroc", "weight"]].mean()
    wr, matched = chosen.loc[("all", "wr")], chosen.loc[("all", "matched")]
    which = (
        f"**Which pseudo-labels are reliable?** WR keeps {wr['coverage']:.1f} % of them: {wr['kept']:.1f} % of these "
        f"are right, and {wr['dropped']:.1f} % of those that it drops. Of as many, the surest of each batch, "
        f"{matched['kept']:.1f} % are right."
    )
    if ("disagree", "wr") in chosen.index:
        wr, matched = chosen.loc[("disagree", "wr")], chosen.loc[("disagree", "matched")]
        course = choices(audit, ["iteration"])
        course = course[(course["scope"] == "disagree") & (course["score"] == "wr")].groupby("iteration")["kept"].mean()
        which += (
            f" Where the decoders disagree, the pseudo-label that WR keeps is right in {wr['kept']:.1f} % of the "
            f"voxels, the one that it drops in {wr['dropped']:.1f} %, and of the surest as many in "
            f"{matched['kept']:.1f} %. In the course of that time WR is right in between {course.min():.0f} and "
            f"{course.max():.0f} % of them, at the end in {course.iloc[-1]:.0f} %."
        )
    hr = weighed.loc[("kept", "mse")]
    ranking = weighed.loc["kept"]["auroc"].sort_values(ascending=False)
    how = (
        f"**How reliable are they?** Among what WR keeps, HR's weight averages {hr['weight']:.3f} and tells right from "
        f"wrong with an AUROC of {hr['auroc']:.3f} (0.5 is chance); the largest probability alone reaches "
        f"{weighed.loc[('kept', 'prob'), 'auroc']:.3f}, and the measures lie between {ranking.iloc[-1]:.3f} "
        f"(*{ranking.index[-1]}*) and {ranking.iloc[0]:.3f} (*{ranking.index[0]}*)."
    )
    if len(foreground):
        means = foreground.groupby("score")["auroc"].mean()
        classes = ", mean over classes" if foreground["class"].nunique() > 1 else ""
        how += (
            f" Background dominates these: among the kept pseudo-labels of foreground alone{classes}, HR's "
            f"AUROC is {means['mse']:.3f}, the largest probability's {means['prob']:.3f}."
        )
    if ("disagree", "mse") in weighed.index:
        how += f" Where the decoders disagree, HR's AUROC is {weighed.loc[('disagree', 'mse'), 'auroc']:.3f}."
    return f"### {described(found)}\n\nThe later half of training.\n\n{which}\n\n{how}"


# Figures


def _panels(found: Results) -> list[tuple[str, str, str]]:
    return [
        ("All voxels", "all", "all"),
        ("Decoders disagree", "disagree", "all"),
        *((f"Pseudo-label {name}", "all", name) for name in _foreground(found.audit)),
    ]


def _foreground(audit: pd.DataFrame) -> list[str]:
    """Classes but the first, background."""
    return [name for name in audit["class"].unique() if name != "all"][1:]


def _mean_lines(ax: Axes, rows: pd.DataFrame, x: str, y: str, order: Sequence | None = None, **style: object) -> None:
    """Each run thin where there are several, their mean bold."""
    wide = rows.pivot_table(y, x, "run", observed=True)
    if order is not None:
        wide = wide.reindex([name for name in order if name in wide.index])
    places = np.arange(len(wide)) if order is not None else wide.index.to_numpy()
    if wide.shape[1] > 1 and style["linewidth"] >= SEEDS_FROM:
        ax.plot(places, wide.to_numpy(), **(style | {"linewidth": 0.5, "alpha": 0.4, "marker": ""}))
    ax.plot(places, wide.mean(axis=1), **style)


def _label_axes(grid: np.ndarray) -> None:
    for ax in grid[0]:
        ax.set_xlabel("iteration")
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
    for ax in grid[-1]:
        ax.set_xticks(range(len(DISTANCE_NAMES)), DISTANCE_NAMES)
        ax.set_xlabel("distance (voxels)")


@styled
def choice_figure(found: Results) -> Figure:
    """Share of right pseudo-labels among those that WR keeps and drops, and among as many of the surest and the rest.

    Above over iterations, below over the distance to the reference's boundary (later half of training).
    """
    columns = _panels(found)
    figure = NotebookFigure(figsize=(WIDTH, 4.0), layout="constrained")
    grid = figure.subplots(2, len(columns), squeeze=False)
    time = choices(found.audit, ["iteration"])
    place = choices(later_half(found))
    styles = {
        ("wr", "kept"): {"color": WR_COLOUR, "linestyle": "-", "label": "WR keeps"},
        ("wr", "dropped"): {"color": WR_COLOUR, "linestyle": (0, (3, 1.5)), "label": "WR drops"},
        ("matched", "kept"): {"color": THRESHOLD_COLOUR, "linestyle": "-", "label": "the surest, as many"},
        ("matched", "dropped"): {"color": THRESHOLD_COLOUR, "linestyle": (0, (3, 1.5)), "label": "the less sure"},
    }
    for axes, (title, scope, of_class) in zip(grid.T, columns, strict=True):
        for (rule, part), style in styles.items():
            style = {**style, "linewidth": 1.4}
            rows = time[(time["scope"] == scope) & (time["class"] == of_class) & (time["score"] == rule)]
            _mean_lines(axes[0], rows[rows["distance"] == "all"], "iteration", part, **style)
            rows = place[(place["scope"] == scope) & (place["score"] == rule) & (place["distance"] != "all")]
            if of_class == "all":
                _mean_lines(axes[1], rows, "distance", part, DISTANCE_NAMES, marker="o", markersize=3, **style)
        axes[0].set_title(title)
    _label_axes(grid)
    for ax in grid[:, 0]:
        ax.set_ylabel("right pseudo-labels (%)")
    for ax in grid[1, 2:]:  # counted by distance for all classes together
        ax.set_axis_off()
    handles = [Line2D([], [], linewidth=1.4, **style) for style in styles.values()]
    if len(columns) > 2:
        grid[1, 2].legend(handles=handles, loc="center")
    else:  # no pseudo-label is foreground
        add_legend(figure, handles)
    return figure


@styled
def coverage_figure(found: Results) -> Figure:
    """Precision of what is kept against its share: WR beside confidence thresholds (later half of training)."""
    columns = _panels(found)
    figure = NotebookFigure(figsize=(WIDTH, 2.6), layout="constrained")
    axes = figure.subplots(1, len(columns), squeeze=False)[0]
    audit = later_half(found)
    table = choices(audit[audit["distance"] == "all"])
    table = table.groupby(["scope", "class", "score"], observed=True)[["coverage", "kept"]].mean()
    for ax, (title, scope, of_class) in zip(axes, columns, strict=True):
        ax.set_title(title)
        ax.set_xlabel("kept (%)")
        if (scope, of_class) not in {index[:2] for index in table.index}:
            continue
        mine = table.loc[(scope, of_class)]
        curve = mine.reindex([f"> {threshold}" for threshold in THRESHOLDS]).dropna()
        ax.plot(curve["coverage"], curve["kept"], color=THRESHOLD_COLOUR, marker="o", markersize=3.5, linewidth=1.2)
        for name, point in curve.iloc[[0, -1]].iterrows():
            place = {"xytext": (3, -9)} if name == curve.index[0] else {"xytext": (0, 4), "ha": "center"}
            text = name.removeprefix("> ")
            ax.annotate(text, point, textcoords="offset points", fontsize=6.5, color="0.35", **place)
        for rule in ("matched", "wr"):
            if rule in mine.index:
                ax.plot(*mine.loc[rule, ["coverage", "kept"]], linestyle="", zorder=4, **MARKERS[rule])
        ax.margins(0.12)
    axes[0].set_ylabel("right of the kept (%)")
    add_legend(
        figure,
        [
            Line2D([], [], linestyle="", label="WR", **MARKERS["wr"]),
            Line2D([], [], color=THRESHOLD_COLOUR, marker="o", markersize=3.5, label="confidence threshold 0.5 … 0.95"),
            Line2D([], [], linestyle="", label="the surest, as many as WR keeps", **MARKERS["matched"]),
        ],
    )
    return figure


@styled
def predictor_figure(found: Results) -> Figure:
    """AUROC of every measure's weight as a predictor of a right pseudo-label; above over iterations, below over the
    distance to the reference's boundary (later half of training).
    """
    figure = NotebookFigure(figsize=(WIDTH, 4.0), layout="constrained")
    grid = figure.subplots(2, len(SCOPES), squeeze=False, sharey=True)
    time = predictors(found.audit, ["iteration"])
    place = predictors(later_half(found))
    for axes, scope in zip(grid.T, SCOPES, strict=True):
        for measure in reversed(MEASURES):
            style = _measure_style(measure)
            rows = time[(time["scope"] == scope) & (time["score"] == measure) & (time["class"] == "all")]
            _mean_lines(axes[0], rows[rows["distance"] == "all"], "iteration", "auroc", **style)
            rows = place[(place["scope"] == scope) & (place["score"] == measure) & (place["distance"] != "all")]
            _mean_lines(axes[1], rows, "distance", "auroc", DISTANCE_NAMES, marker="o", markersize=3, **style)
        for ax in axes:
            ax.axhline(0.5, color="0.5", linewidth=0.7, linestyle=(0, (1, 1.5)))
        axes[0].set_title(SCOPE_NAMES[scope].capitalize().replace("wr", "WR"))
    _label_axes(grid)
    for ax in grid[:, 0]:
        ax.set_ylabel("AUROC")
    add_legend(
        figure,
        [*_measure_handles(), Line2D([], [], color="0.5", linewidth=0.7, linestyle=(0, (1, 1.5)), label="chance")],
    )
    return figure


@styled
def reliability_diagram(found: Results) -> Figure:
    """HR's mean weight, and the largest probability, against the share of right pseudo-labels: ten groups of equal size
    each (later half of training).
    """
    columns = [*_panels(found), ("Kept by WR", "kept", "all")]
    audit = later_half(found)
    rows = audit[(audit["distance"] == "all") & audit["score"].isin(DIAGRAM) & (audit["bin"] != "all")]
    rows = rows.assign(mass=rows["weight"] * rows["voxels"], bin=rows["bin"].astype(int))
    sums = rows.groupby([*GROUP, "bin"], observed=True)[["voxels", "correct", "mass"]].sum().reset_index()
    sums = sums.assign(x=sums["mass"] / sums["voxels"], y=100 * sums["correct"] / sums["voxels"])
    figure = NotebookFigure(figsize=(WIDTH, 2.6), layout="constrained")
    axes = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
    line = {"color": "0.5", "linewidth": 0.7, "linestyle": (0, (1, 1.5))}
    titles, letters = fitted([title for title, _, _ in columns], 0.85 * WIDTH / len(columns))
    for ax, title, (_, scope, of_class) in zip(axes, titles, columns, strict=True):
        for measure in reversed(DIAGRAM):
            mine = sums[(sums["scope"] == scope) & (sums["class"] == of_class) & (sums["score"] == measure)]
            ax.plot(mine["x"], mine["y"], marker="o", markersize=2.5, **_measure_style(measure))
        ax.plot([0, 1], [0, 100], **line)
        ax.set_title(title, fontsize=letters)
        ax.set(xlabel="weight", ylim=(-3, 103))
    axes[0].set_ylabel("right pseudo-labels (%)")
    add_legend(figure, [*_measure_handles(DIAGRAM), Line2D([], [], label="weight = share right", **line)])
    return figure


def _measure_style(measure: str) -> dict[str, object]:
    return {"color": MEASURE_COLOURS[measure], "linewidth": 1.9 if measure == "mse" else 1.0}


def _measure_handles(measures: Sequence[str] = MEASURES) -> list[Line2D]:
    names = {"mse": "mse (HR)"}
    return [Line2D([], [], label=names.get(measure, measure), **_measure_style(measure)) for measure in measures]
