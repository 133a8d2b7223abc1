"""Tables, computed from per-case rows.

``metrics`` is the tidy frame of a study: ``study, method, variant, labelled, seed, selection, output, case, class,
dice, jaccard, hd95, asd`` (fractions; voxels or mm). ``runs`` has a row a run: ``run, study, method, variant, title,
labelled, seed, …``. Titles are printed in the order in which ``runs`` brings them.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd
from IPython.display import Markdown
from pandas.io.formats.style import Styler

from mlrpl.errors import StudyError
from mlrpl.files import write_text
from mlrpl.provenance import CHANGED
from mlrpl.rows import IDENTITY, LARGEST, OWN, SELECTIONS
from mlrpl.words import counted

ROW = [*IDENTITY, "selection", "output", "case", "class"]
MEASURES = ["dice", "jaccard", "hd95", "asd"]
PAPER = {"dice": "Paper: Dice (%)", "hd95": "Paper: 95HD (voxels)"}  # headings of its figures
OUTPUTS = {"decoder1": "decoder 1", "mean": "mean of decoders"}


def titled(metrics: pd.DataFrame, runs: pd.DataFrame, outputs: Iterable[str] = OUTPUTS) -> pd.DataFrame:
    """Metrics with the run and title of each row; ``title``, ``selection``, ``output`` are categories in print order.

    Rows of other outputs than these are left out.

    Raises:
        StudyError: A row belongs to none of the runs, or one title stands for two variants.
    """
    titles, outputs = list(dict.fromkeys(runs["title"])), list(outputs)
    metrics = metrics[metrics["output"].isin(outputs)]
    # An empty variant comes back from a csv file as NaN.
    metrics, runs = (frame.assign(variant=frame["variant"].fillna("")) for frame in (metrics, runs))
    for (title, labelled), same in runs.groupby(["title", "labelled"], sort=False):
        if len(same[["method", "variant"]].drop_duplicates()) > 1:
            raise StudyError(f"title {title!r} at {labelled} labelled stands for two variants: give each its own title")
    runs = runs.drop_duplicates(IDENTITY) if "fold" in metrics else runs  # together, the folds measure every case once
    rows = metrics.merge(runs[[*IDENTITY, "run", "title"]], on=IDENTITY, how="left", validate="many_to_one")
    unknown = rows.loc[rows["run"].isna(), IDENTITY].drop_duplicates()
    if len(unknown):
        first = ", ".join(f"{name} {value!s}" for name, value in unknown.iloc[0].items())
        raise StudyError(f"metrics of {len(unknown)} run(s) are not in the table of runs ({first}): remake the tables")
    for column, order in {"title": titles, "selection": SELECTIONS, "output": outputs}.items():
        rows[column] = pd.Categorical(rows[column], categories=list(order), ordered=True)
    return rows


def rows_of(rows: pd.DataFrame, selection: str, output: str) -> pd.DataFrame:
    """Rows of one selection and output; a run with one decoder only is its own mean."""
    rows = rows[rows["selection"] == selection]
    averaged = rows.loc[rows["output"] == "mean", IDENTITY].drop_duplicates()
    single = ~pd.MultiIndex.from_frame(rows[IDENTITY]).isin(pd.MultiIndex.from_frame(averaged))
    return rows[(rows["output"] == output) | single & (rows["output"] == "decoder1")]


def comparison(metrics: pd.DataFrame, runs: pd.DataFrame, paper: Iterable[dict] = ()) -> pd.DataFrame:
    """A row a (labelled, title, selection, output): means over cases and classes, then over seeds.

    Args:
        metrics: Per-case rows.
        runs: A row a run.
        paper: The paper's figures, ``{"title", "labelled", "dice" (%), "hd95" (voxels)}``, either measure optional.
            They stand beside the published selection of decoder 1, by which they were obtained.

    Returns:
        ``labelled, title, selection, output``; per measure its mean over the seeds and, as ``<measure>_seeds``, a list
        of what each reaches, ``dice`` and ``jaccard`` in %; ``seeds``; ``cases``; ``undefined``, the number of
        distances that are NaN and so in no mean, of ``distances`` in all; ``paper_dice`` and ``paper_hd95`` if there
        are any.
    """
    rows = titled(metrics, runs)
    key = ["labelled", "title", "selection", "output"]
    seeds = rows.groupby([*key, "seed"], observed=True)[MEASURES].mean()
    seeds[["dice", "jaccard"]] *= 100
    seeds = seeds.groupby(key, observed=True)
    table = seeds.mean().join(seeds.agg(list).add_suffix("_seeds"))
    groups = rows.groupby(key, observed=True)
    table["seeds"] = groups["seed"].nunique()
    table["cases"] = groups["case"].nunique()
    table["undefined"] = groups["hd95"].agg(lambda distances: distances.isna().sum())
    table["distances"] = groups.size()
    table = table.reset_index().astype({"title": str, "selection": str, "output": str})
    paper = list(paper)
    for measure in ("dice", "hd95"):
        figures = {
            (entry["title"], entry["labelled"], "published", "decoder1"): entry[measure]
            for entry in paper
            if measure in entry
        }
        if figures:
            rows = table[["title", "labelled", "selection", "output"]].itertuples(index=False, name=None)
            table[f"paper_{measure}"] = [figures.get(row, float("nan")) for row in rows]
    return table


def formatted(table: pd.DataFrame, unit: str = "voxels") -> pd.DataFrame:
    """The comparison as people read it, in text.

    Args:
        table: What :func:`comparison` returns.
        unit: Of the distances, ``"voxels"`` or ``"mm"``.
    """
    view = pd.DataFrame(
        {
            "Labelled": table["labelled"].astype(str),
            "Method": table["title"],
            "Seeds": table["seeds"].astype(str),
            "Selection": table["selection"],
            "Output": table["output"].map(OUTPUTS),
        }
    )
    for measure, heading in headings(unit).items():
        view[heading] = table[f"{measure}_seeds"].map(over_seeds)
        theirs = f"paper_{measure}"
        if theirs in table and table[theirs].notna().any():
            view[PAPER[measure]] = table[theirs].map(two_decimals)
    return view.assign(**undefined(table["undefined"], table["distances"]), Cases=table["cases"].astype(str))


def glance(table: pd.DataFrame, unit: str = "voxels") -> pd.DataFrame:
    """The comparison at a glance, in text: decoder 1 alone, a row a (labelled, title).

    Final weights; of the published selection Dice, and what the paper's figures stand beside.

    Args:
        table: What :func:`comparison` returns.
        unit: Of the distances, ``"voxels"`` or ``"mm"``.
    """
    rows = table[table["output"] == "decoder1"]
    last, published = (formatted(rows[rows["selection"] == selection], unit) for selection in SELECTIONS)
    published = last[["Labelled", "Method"]].merge(published, how="left").fillna("—")
    beside = {}
    for measure, heading in headings(unit).items():
        theirs = PAPER.get(measure)
        if measure == "dice" or theirs in published:
            beside[f"Published: {heading}"] = published[heading]
        if theirs in published:
            beside[theirs] = published[theirs]
    last = last.drop(columns=["Selection", "Output"]).reset_index(drop=True)
    place = last.columns.get_loc(headings(unit)["asd"]) + 1
    return pd.concat([last.iloc[:, :place], pd.DataFrame(beside), last.iloc[:, place:]], axis=1)


def by_class(metrics: pd.DataFrame, runs: pd.DataFrame, unit: str = "voxels") -> pd.DataFrame:
    """A row a (labelled, title, class) as text: decoder 1, means over cases and seeds.

    Final weights, and Dice of the published selection.
    """
    rows = titled(metrics, runs, ["decoder1"])
    rows = rows.assign(**{"class": pd.Categorical(rows["class"], rows["class"].unique(), ordered=True)})
    key = ["labelled", "title", "class"]
    published = rows.query("selection == 'published'").groupby(key, observed=True)["dice"].mean()
    groups = rows.query("selection == 'last'").groupby(key, observed=True)
    means = groups[["dice", "hd95"]].mean()
    published = (100 * published.reindex(means.index)).map(two_decimals).reset_index(drop=True)
    means = means.reset_index()
    names = {"Labelled": means["labelled"].astype(str), "Method": means["title"].astype(str), "Class": means["class"]}
    lacking = groups["hd95"].agg(lambda distances: distances.isna().sum()).reset_index(drop=True)
    lacking = undefined(lacking, groups.size().reset_index(drop=True))
    beside = {"Published: Dice (%)": published}
    return pd.DataFrame({**names, **measures(means, unit), **beside, **lacking}).astype(str)


def undefined(count: pd.Series, of: pd.Series) -> dict[str, pd.Series]:
    """A column that says how many distances are in no mean, by its heading; none where all are."""
    said = count.astype(str) + " of " + of.astype(str)
    return {"Undefined distances": said.where(count > 0, "0")} if count.any() else {}


def overview(comparison: pd.DataFrame) -> pd.DataFrame:
    """Dice at a glance, from the text of a comparison (:func:`formatted`, as its csv file has it): decoder 1.

    Returns:
        A row a method, for each number of labelled cases a column a selection, and the paper's figures if it has any.
    """
    rows = comparison[comparison["Output"] == OUTPUTS["decoder1"]]
    paper = PAPER["dice"]
    columns = {}
    for labelled, group in rows.groupby("Labelled", sort=False):
        last, best = (group[group["Selection"] == selection].set_index("Method") for selection in SELECTIONS)
        columns[f"{labelled} labelled: last weights"] = last["Dice (%)"]
        columns[f"{labelled} labelled: best check"] = best["Dice (%)"]
        if paper in best and (best[paper] != "—").any():
            columns[f"{labelled} labelled: paper"] = best[paper]
    table = pd.DataFrame(columns).reindex(rows["Method"].drop_duplicates()).fillna("—")
    return table.rename_axis("Method").reset_index()


def case_dice(metrics: pd.DataFrame) -> pd.Series:
    """Dice of each case, final weights, decoder 1, mean over classes and runs: the best case first."""
    rows = metrics[(metrics["selection"] == "last") & (metrics["output"] == "decoder1")]
    return rows.groupby("case")["dice"].mean().sort_values(ascending=False, kind="stable")


def per_seed(
    metrics: pd.DataFrame, runs: pd.DataFrame, measure: str = "dice", selection: str = "last", output: str = "decoder1"
) -> pd.DataFrame:
    """Indexed by (labelled, case), a column a (title, seed): the measure averaged over classes.

    ``dice`` and ``jaccard`` in %, distances as they are; NaN where there is no such run, or no distance.
    """
    rows = rows_of(titled(metrics, runs), selection, output).astype({"title": str})
    table = rows.groupby(["labelled", "case", "title", "seed"])[measure].mean().unstack(["title", "seed"]).sort_index()
    table = table[[title for title in dict.fromkeys(runs["title"]) if title in table]]
    return table * 100 if measure in ("dice", "jaccard") else table


def per_case(
    metrics: pd.DataFrame, runs: pd.DataFrame, measure: str = "dice", output: str = "decoder1"
) -> pd.DataFrame:
    """A row a (labelled, case), a column a title: :func:`per_seed` of the final weights, averaged over the seeds."""
    table = per_seed(metrics, runs, measure, output=output)
    return table.T.groupby(level="title", sort=False).mean().T.reset_index()


def optimism(metrics: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """What selecting on the test cases adds: published minus last, in points of Dice.

    Returns:
        A row a (labelled, title, output), see :func:`_gain`: ``last``, ``published`` and their ``difference``. Runs
        without a published selection are left out.
    """
    return _gain(
        titled(metrics, runs), ["labelled", "title", "output"], "selection", {name: name for name in SELECTIONS}
    )


def formatted_optimism(metrics: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """:func:`optimism` as text, for a page."""
    table = optimism(metrics, runs)
    headings = {"last": "Last", "published": "Published"}
    return _formatted_gain(table, headings, before={"Output": table["output"].map(OUTPUTS)})


def normalisation(metrics: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """What BatchNorm's running statistics cost: Dice of the final weights with them, and with each volume's own.

    Returns:
        A row a (labelled, title), see :func:`_gain`: ``running`` and ``own`` Dice of decoder 1, and their
        ``difference``. Rows from before there was this output are left out.
    """
    rows = titled(metrics, runs, ("decoder1", OWN)).query("selection == 'last'")
    return _gain(rows, ["labelled", "title"], "output", {"decoder1": "running", OWN: "own"})


def formatted_normalisation(metrics: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """:func:`normalisation` as text, for a page."""
    return _formatted_gain(normalisation(metrics, runs), {"running": "Running statistics", "own": "Each volume's own"})


def largest(metrics: pd.DataFrame, runs: pd.DataFrame, measure: str = "dice") -> pd.DataFrame:
    """What keeping each class's largest component alone changes, in Dice or in a distance of decoder 1.

    Returns:
        A row a (labelled, title, selection), see :func:`_gain`: ``all``, ``largest`` and their ``difference``. Rows
        from before there was this output are left out.
    """
    rows = titled(metrics, runs, ("decoder1", LARGEST))
    names = {"decoder1": "all", LARGEST: "largest"}
    return _gain(rows, ["labelled", "title", "selection"], "output", names, measure)


def formatted_largest(
    metrics: pd.DataFrame, runs: pd.DataFrame, paper: Iterable[dict] = (), unit: str = "voxels"
) -> pd.DataFrame:
    """:func:`largest` as text, for a page: Dice and 95HD, the paper's beside the published selection."""
    table = largest(metrics, runs)
    distances = largest(metrics, runs, "hd95").set_index(["labelled", "title", "selection"])
    distances = distances.reindex(pd.MultiIndex.from_frame(table[["labelled", "title", "selection"]]))
    headings = {"all": "All components: Dice (%)", "largest": "Largest alone: Dice (%)"}
    after = {
        heading: distances[name].map(two_decimals).to_list()
        for name, heading in {"all": f"All: 95HD ({unit})", "largest": f"Largest: 95HD ({unit})"}.items()
    }
    figures = {(f["title"], f["labelled"], "published"): f for f in paper}
    found = [figures.get(row, {}) for row in zip(table["title"], table["labelled"], table["selection"], strict=True)]
    for name, heading in PAPER.items():
        if (values := pd.Series([figure.get(name) for figure in found], dtype=float)).notna().any():
            after[heading] = values.map(two_decimals).to_list()
    return _formatted_gain(table, headings, before={"Selection": table["selection"]}, after=after)


def _gain(
    rows: pd.DataFrame, by: list[str], column: str, names: Mapping[str, str], measure: str = "dice"
) -> pd.DataFrame:
    """What the second of two values of a column adds to the first's Dice, or distance.

    Returns:
        A row a group of ``by``: Dice in % (or the distance) of both, as ``names`` calls them, means over seeds;
        ``difference``, the mean over seeds of second − first; ``difference_seeds``, a list; ``seeds``, "s0, s1". Runs
        that lack one of the two are left out.
    """
    values = rows.pivot_table(measure, [*by, "seed"], column, aggfunc="mean", observed=True)
    values = values.reindex(columns=list(names)).dropna().set_axis(list(names.values()), axis=1)
    values *= 100 if measure == "dice" else 1
    first, second = names.values()
    values["difference"] = values[second] - values[first]
    groups = values.groupby(by, observed=True)
    table = groups.mean()
    table["difference_seeds"] = groups["difference"].agg(list)
    table["seeds"] = values.reset_index("seed").groupby(by, observed=True)["seed"].agg(seed_names)
    return table.reset_index().astype({name: str for name in by if name != "labelled"})


def seed_names(seeds: Iterable[int]) -> str:
    """Seeds as runs name them: "s0, s1"."""
    return ", ".join(f"s{seed}" for seed in seeds)


def _formatted_gain(
    table: pd.DataFrame,
    headings: Mapping[str, str],
    before: Mapping[str, Sequence] | None = None,
    after: Mapping[str, Sequence] | None = None,
) -> pd.DataFrame:
    """`_gain` as text, with further columns before and after its own."""
    return pd.DataFrame(
        {
            "Labelled": table["labelled"].astype(str),
            "Method": table["title"],
            **(before or {}),
            **{heading: table[name].map(two_decimals) for name, heading in headings.items()},
            "Difference": table["difference_seeds"].map(over_seeds),
            **(after or {}),
            "Seeds": table["seeds"],  # by name: fewer than of the comparison where rows are older
        }
    )


def cost(runs: pd.DataFrame, volumes: Mapping[str, tuple[int, int]]) -> pd.DataFrame:
    """What a method's training step costs, in text: a row a title and kind of device (CPUs, or a GPU by its name).

    No ratios: runs of one study may come from several machines. `mlrpl bench` times all methods side by side.

    Args:
        runs: A row a run, with ``step_seconds`` (:func:`mlrpl.results.step_seconds`; the shortest of several runs is
            the least disturbed), ``device``, ``peak_memory_mb`` and ``parameters``.
        volumes: By run, see :func:`mlrpl.methods.volumes_a_step`.
    """
    runs = runs.assign(
        title=pd.Categorical(runs["title"], runs["title"].unique()),
        kind=runs["device"].mask(runs["device"].str.startswith("CPU"), "CPU"),
    )
    first = runs.drop_duplicates("title").set_index("title")["run"]
    groups = runs.sort_values("step_seconds").groupby(["title", "kind"], observed=True)
    table = groups.agg(
        {"step_seconds": "first", "device": "first", "peak_memory_mb": "max", "parameters": "first"}
    ).reset_index()
    return pd.DataFrame(
        {
            "Method": table["title"].astype(str),
            "Seconds a step": table["step_seconds"].map("{:.3f}".format),
            "Measured on": table["device"],
            "Peak memory (MB)": table["peak_memory_mb"].map("{:.0f}".format),
            "Parameters": table["parameters"].map("{:,}".format),
            # A network of one's own may have neither part.
            "Volumes through encoders": [str(volumes[first[title]][0] or "—") for title in table["title"]],
            "Volumes through decoders": [str(volumes[first[title]][1] or "—") for title in table["title"]],
        }
    )


def run_list(runs: pd.DataFrame) -> pd.DataFrame:
    """Every run and how it came about, as text."""
    return pd.DataFrame(
        {
            "Run": runs["run"],
            "Key": runs["key"].str[:8],
            "Precision": runs["precision"],
            "Trained on": runs["device"],
            "Minutes": (runs["seconds"] / 60).map("{:.1f}".format),
            "Memory (MB)": runs["peak_memory_mb"].astype(str),
            "Commit": runs["commit"].astype(str).str.replace(CHANGED, " with uncommitted changes", regex=False),
            "Rows": ["adopted" if adopted else "own" for adopted in runs["adopted"]],
        }
    )


def conditions(runs: pd.DataFrame) -> str:
    """In what runs differ besides what is compared, precision and hardware, in Markdown; empty where in nothing."""
    said = ""
    if runs["precision"].nunique() > 1:
        kinds = _kinds(runs["precision"])
        said += f"**Trained in different precisions** ({kinds}), which may be part of what differs. "
    if runs["device"].nunique() > 1:
        kinds = _kinds(runs["device"])
        said += f"Runs name different hardware ({kinds}), which alone can change a run as much as another seed. "
    return said


def _kinds(column: pd.Series) -> str:
    return "; ".join(f"{counted(number, 'run')}: {name}" for name, number in column.value_counts().items())


def difference(new: pd.DataFrame, old: pd.DataFrame) -> pd.DataFrame:
    """How far new metrics are from old ones.

    Returns:
        A row a run that is in either: ``study, method, variant, labelled, seed``; ``compared``, the number of rows in
        both; ``unmatched``, of rows in one only; ``mean`` and ``max`` absolute difference in points of Dice.
    """
    new, old = (frame.assign(variant=frame["variant"].fillna(""))[[*ROW, "dice"]] for frame in (new, old))
    both = new.merge(old, on=ROW, how="outer", suffixes=("_new", "_old"), indicator=True, validate="one_to_one")
    both["compared"] = both["_merge"] == "both"
    both["unmatched"] = ~both["compared"]
    both["mean"] = both["max"] = (both["dice_new"] - both["dice_old"]).abs() * 100
    summary = {"compared": "sum", "unmatched": "sum", "mean": "mean", "max": "max"}
    return both.groupby(IDENTITY, sort=False).agg(summary).reset_index()


def to_markdown(table: pd.DataFrame) -> str:
    """A GitHub table, aligned in plain text too; numbers to the right, floats with two decimals, NaN as a dash."""
    cells = _cells(table)
    columns = [[text.replace("|", "\\|") for text in (name, *column)] for name, column in cells.items()]
    widths = [max(3, *map(len, column)) for column in columns]
    numeric = list(map(_of_numbers, cells.values()))

    def line(cells: Iterable[str]) -> str:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(cells, widths, numeric, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, numeric, strict=True)]
    header, *body = zip(*columns, strict=True)
    return "\n".join([line(header), line(rule), *map(line, body)]) + "\n"


def _greek(letter: str) -> str:
    name = unicodedata.name(letter).split()[-1].replace("LAMDA", "LAMBDA").capitalize()
    return name if letter.isupper() else name.lower()


# What LaTeX does not know as a letter of its own.
LATEX = {
    "—": "--", "–": "--", "−": "$-$", "±": r"$\pm$", "×": r"$\times$", "≥": r"$\geq$", "≤": r"$\leq$", "<": "$<$",
    ">": "$>$", "…": r"\dots{}", "→": r"$\to$", "≈": r"$\approx$", "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}", "²": "$^2$", "³": "$^3$",
    **{letter: f"$\\{_greek(letter)}$" for letter in "αβγδεζηθικλμνξπρστφχψωΓΔΘΛΞΠΣΦΨΩ"},
}  # fmt: skip


def to_latex(table: pd.DataFrame) -> str:
    """A booktabs tabular, numbers to the right; what is special to LaTeX is escaped."""
    columns = _cells(table)
    text = pd.DataFrame({_latex(name): list(map(_latex, cells)) for name, cells in columns.items()})
    sides = "".join("r" if _of_numbers(cells) else "l" for cells in columns.values())
    return text.style.hide(axis="index").to_latex(hrules=True, column_format=sides)


def _cells(table: pd.DataFrame) -> dict[str, list[str]]:
    """By heading the column's cells as text."""
    return {
        str(name): [two_decimals(value) if isinstance(value, float) else str(value) for value in values]
        for name, values in table.items()
    }


def _of_numbers(cells: Sequence[str]) -> bool:
    """Whether a column goes to the right."""
    return all(cell[:1].isdigit() or cell[:1] in "-−—<" for cell in cells)


def _latex(text: str) -> str:
    escaped = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", r"\textbackslash "))
    escaped = re.sub(r"(?<![\w.])-(?=\d)", "−", escaped)  # a minus, no hyphen
    return "".join(LATEX.get(letter, letter) for letter in escaped)


def headings(unit: str) -> dict[str, str]:
    """Of the measures, with their units; ``unit``: of the distances, ``"voxels"`` or ``"mm"``."""
    return {"dice": "Dice (%)", "jaccard": "Jaccard (%)", "hd95": f"95HD ({unit})", "asd": f"ASD ({unit})"}


def every_case(metrics: pd.DataFrame, unit: str = "voxels") -> pd.DataFrame:
    """One run's test cases as text: final weights, decoder 1."""
    rows = metrics[(metrics["selection"] == "last") & (metrics["output"] == "decoder1")].reset_index(drop=True)
    return pd.DataFrame({"Case": rows["case"], "Class": rows["class"], **measures(rows, unit)})


def worst_first(metrics: pd.DataFrame, runs: pd.DataFrame, title: str, unit: str = "voxels") -> pd.DataFrame:
    """:func:`every_case` of all runs of a title, the case with the lowest Dice first."""
    rows = titled(metrics, runs)
    rows = rows[rows["title"] == title]
    rank = {case: place for place, case in enumerate(reversed(case_dice(rows).index))}
    return every_case(rows.sort_values("case", key=lambda cases: cases.map(rank), kind="stable"), unit)


def measures(rows: pd.DataFrame, unit: str = "voxels") -> dict[str, pd.Series]:
    """By heading the measures among the rows' columns, as text."""
    scale = {"dice": 100, "jaccard": 100}
    shown = {name: heading for name, heading in headings(unit).items() if name in rows}
    return {heading: (rows[name] * scale.get(name, 1)).map(two_decimals) for name, heading in shown.items()}


def facts(values: Mapping[str, object]) -> pd.DataFrame:
    """Settings or provenance, nested ones by dotted names, one a row."""
    rows: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows |= {f"{name}.{inner}": as_in_a_study(v) for inner, v in value.items()}
        elif value not in ("", None):
            rows[name] = as_in_a_study(value)
    return pd.DataFrame({"Setting": list(rows), "Value": list(rows.values())})


def as_in_a_study(value: object) -> str:
    """A setting's value as the study's file spells it.

    >>> as_in_a_study(("mirror",)), as_in_a_study(False)
    ('[mirror]', 'false')
    """
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_in_a_study, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def show(table: pd.DataFrame) -> Styler | Markdown:
    """A table as a notebook displays it: without its numbered index, floats with two decimals; in words if empty."""
    if table.empty:
        return Markdown("No finished run has figures for this table.")
    return (
        table.style.hide(axis="index")
        .format(precision=2, na_rep="—", escape="html")
        .format_index(escape="html", axis=1)
        .set_table_attributes('class="dataframe"')  # as pandas' own: the page's script finds it by that
        .set_uuid("")
    )


FORMS = {
    ".csv": lambda table: table.to_csv(index=False),
    ".md": lambda table: to_markdown(table) + "\n",
    ".tex": to_latex,
}


def save(table: pd.DataFrame, folder: Path | str, name: str) -> None:
    """Write `<name>.csv`, `<name>.md` and `<name>.tex`; of a table without rows none is there."""
    for ending, text_of in FORMS.items():
        path = Path(folder) / f"{name}{ending}"
        if table.empty:
            path.unlink(missing_ok=True)
        else:
            write_text(path, text_of(table))


def two_decimals(value: float) -> str:
    """A number as tables have it: two decimals, never "-0.00"; a dash for NaN."""
    return "—" if pd.isna(value) else f"{value:z.2f}"


def with_interval(value: float, low: float, high: float) -> str:
    """A number with its interval, "82.20 [80.81, 83.23]"; alone where there is none (NaN)."""
    return two_decimals(value) if pd.isna(low) else f"{two_decimals(value)} [{two_decimals(low)}, {two_decimals(high)}]"


def over_seeds(values: Iterable[float], digits: int = 2) -> str:
    """What trainings of several seeds reach: one or two as they are, of more the mean ± standard deviation.

    >>> over_seeds([71.884, 88.261])
    '71.88, 88.26'
    """
    known = pd.Series([*values], dtype=float).dropna()
    if len(known) > 2:
        return f"{known.mean():z.{digits}f} ± {known.std(ddof=1):.{digits}f}"
    return ", ".join(f"{value:z.{digits}f}" for value in known) or "—"
