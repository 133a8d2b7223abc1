"""The page and the figures of a bench."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.ticker as ticker
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlrpl.bench.methods import PLAIN
from mlrpl.bench.works import Size
from mlrpl.compilation import COMPILED_FROM
from mlrpl.drawing import METHOD_COLOURS, WIDTH, NotebookFigure, save, styled
from mlrpl.methods import METHODS
from mlrpl.report import Link, Picture, Section, write_index

GROWTH = {
    "patch": "voxels of a patch",
    "batch": "volumes of a batch",
    "decoders": "decoders",
    "classes": "classes",
    "cases": "cases of a check",
}
NAMES = {"memory_gb": "memory (GB)", "cudnn": "cuDNN", "cuda": "CUDA", "torch": "PyTorch", "cpu": "CPU"}  # of facts
LONGEST = 80  # characters of an operation's name
OURS, YARDSTICK = METHOD_COLOURS["MLRPL"], METHOD_COLOURS["Control (β = 0)"]

LEAD = """The package beside the plain formulation, `benchmarks/plain.py`: float32, contiguous tensors, loops over
the samples in the loss, one window at a time through all decoders, MedPy on whole volumes. Both ran alternately in one
process on the same weights and data. Results are compared in float32, a step's gradients in double precision."""
MAIN = """Medians of alternate repeats, lowest and highest in brackets; the ratio is the median of the pairs' ratios.
A goal set for hardware with bf16 instructions is *not applicable* without them. *Differ by*: the largest relative
difference of the results; in voxels, metrics must be equal to the last bit. In one process, on a CPU, the plain
formulation runs with the package's memory settings (freed memory is kept); the last two rows tell what a step takes
where each has a process of its own, the plain one with the system's settings: the fastest of the repeats, and peak
memory."""
COSTS = f"""One training step of each method, a process each, so that peak memory (of the whole process on a CPU, of
PyTorch's allocations on a GPU) is its own. *Volumes* counts those that went through an encoder, teachers' and perturbed
passes included: a batch has four. The plain step is the one with the system's memory settings, in float32. None is
compiled; on a GPU runs of {COMPILED_FROM:,} iterations or more are, and their steps are shorter (see below)."""


def write_page(folder: Path, tables: Mapping[str, pd.DataFrame], provenance: Mapping[str, Any], size: Size) -> Path:
    """Write figure and index.html of a bench; returns the page.

    Args:
        folder: of the bench.
        tables: "bench", "growth", "methods" and "profile".
        provenance: as written beside it.
        size: of the methods' steps.
    """
    drawn = {"growth": growth_figure, "methods": costs_figure}
    for name, draw in drawn.items():
        if len(tables[name]):
            save(draw(tables[name]), folder / "figures", name)
    pictures = {name: folder / "figures" / f"{name}.svg" for name in drawn}
    machine = provenance["machine"]
    facts = "; ".join(f"{NAMES.get(name, name.replace('_', ' '))}: {_text(value)}" for name, value in machine.items())
    sections = [Section("Goals", f"{facts}.\n\n{MAIN}", _main_table(tables["bench"]))]
    if len(tables["growth"]):
        sections.append(
            Section(
                "Growth",
                "How a step's time grows with what it depends on, a check's with the cases; bars: lowest to highest.",
                figures=[Picture(pictures["growth"], "Both axes are logarithmic.", "growth of time with size")],
            )
        )
    if len(tables["methods"]):
        sections.append(
            Section(
                f"Methods, {size.setting}",
                COSTS,
                _methods_table(tables["methods"]),
                figures=[Picture(pictures["methods"], "Time and peak memory of one step.", "cost of a step by method")],
            )
        )
    sections.append(
        Section(
            "Where a step's time goes",
            _machine_text(provenance["speed"]),
            _profile_table(tables["profile"]),
            links=[Link("Timeline of one step", "step-trace.json.gz")],
        )
    )
    page = folder / "index.html"
    write_index(
        page,
        title=f"{provenance['title']} ({machine['device']})",
        lead=LEAD,
        sections=sections,
        provenance=provenance,
        home="../index.html",
    )
    return page


def _machine_text(speed: Mapping[str, Mapping[str, Any]]) -> str:
    step, ceiling, compiled = speed["step"], speed["ceiling"], speed.get("compiled")
    text = (
        f"A step of MLRPL computes {step['step_tflop']:.3g} TFLOP and moves about {step['step_gb']:.3g} GB (each "
        f"operation's tensors counted once): {step['tflops']:.3g} TFLOP/s and {step['gb_per_s']:,.0f} GB/s. A "
        f"large matrix product reaches {ceiling['tflops']:.3g} TFLOP/s here, a large copy "
        f"{ceiling['gb_per_s']:,.0f} GB/s. Below, the costliest operations of one step; the timeline opens in "
        "ui.perfetto.dev."
    )
    if compiled and "note" in compiled:
        text += f" {compiled['note']}."
    elif compiled:
        text += (
            f" With torch.compile, as in runs of {COMPILED_FROM:,} iterations or more, a step takes "
            f"{_amount(compiled['step_s'])} ({step['step_tflop'] / compiled['step_s']:.3g} TFLOP/s), after a first one "
            f"of {_amount(compiled['first_s'])}."
        )
    return text


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _amount(amount: float, *spread: float, unit: str = "s") -> str:
    """Three digits, seconds below a tenth in milliseconds: 39.7 ms (39.6–40.0)."""
    factor, unit = (1000, "ms") if unit == "s" and amount < 0.1 else (1, unit)
    middle, *ends = (f"{factor * value:#.3g}".rstrip(".") for value in (amount, *spread))
    return f"{middle} {unit}" + (f" ({'–'.join(ends)})" if ends else "")


def _main_table(rows: pd.DataFrame) -> pd.DataFrame:
    def amount(row: pd.Series, side: str) -> str:
        ends = [row[f"{side}_{end}_s"] for end in ("low", "high")]
        return _amount(row[f"{side}_s"], *(e for e in ends if e == e), unit="GB" if "(GB)" in row["work"] else "s")

    return pd.DataFrame(
        {
            "Work": rows["work"].str.removesuffix(" (GB)"),
            "Size": rows["setting"],
            "Ours": [amount(row, "ours") for _, row in rows.iterrows()],
            "Plain": [amount(row, "plain") for _, row in rows.iterrows()],
            "Ratio": [f"{ratio:.2f}" for ratio in rows["ratio"]],
            "Goal": [
                "" if pd.isna(goal) else f"{goal:.3g}: {said}"
                for goal, said in zip(rows["goal"], rows["verdict"], strict=True)
            ],
            "Differ by": ["" if pd.isna(d) else f"{d:.0e}" if d else "0" for d in rows["difference"]],
        }
    )


def _title(method: str) -> str:
    return f"{METHODS['mlrpl'].title}, plain" if method == PLAIN else METHODS[method].title


def _methods_table(methods: pd.DataFrame) -> pd.DataFrame:
    def number(value: float, text: str) -> str:
        return "—" if pd.isna(value) else format(value, text)

    table = pd.DataFrame(
        {
            "Method": methods["method"].map(_title),
            "Step (s)": [number(v, "#.3g") for v in methods["seconds"]],
            "× V-Net": [number(v, ".2f") for v in methods["ratio_to_vnet"]],
            "Peak memory (GB)": [number(v / 1000, ".2f") for v in methods["peak_memory_mb"]],
            "Parameters": [number(v, ",.0f") for v in methods["parameters"]],
            "Forward passes": [number(v, ".0f") for v in methods["passes"]],
            "Volumes": [number(v, ".0f") for v in methods["volumes"]],
            "Precision": methods["precision"].fillna("—"),
            "Note": methods["note"],
        }
    )
    return table if methods["note"].any() else table.drop(columns="Note")


def _profile_table(profile: pd.DataFrame) -> pd.DataFrame:
    if not len(profile):
        return profile
    return pd.DataFrame(
        {
            "Operation": [_short(name) for name in profile["operation"]],
            "Calls": profile["calls"].astype(str),
            "Milliseconds": [f"{value:,.1f}" for value in profile["milliseconds"]],
            "Share (%)": [f"{value:.1f}" for value in profile["share_percent"]],
        }
    )


def _short(operation: str) -> str:
    """An operation's or a kernel's name without what all have in common, and without its end where it is long."""
    name = re.sub(r"^void |\bat::native::|\(anonymous namespace\)::|\bc10::|\bcuda::std::(__4::)?", "", operation)
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


@styled
def growth_figure(rows: pd.DataFrame) -> Figure:
    """Seconds over what grows, one panel each, both formulations, logarithmic; of what was measured."""
    measured = {what: label for what, label in GROWTH.items() if what in set(rows["grows"])}
    figure = NotebookFigure(figsize=(0.4 + (WIDTH - 0.4) * len(measured) / len(GROWTH), 2.3), layout="constrained")
    axes = figure.subplots(1, len(measured), sharey=True, squeeze=False)[0]
    for ax, (what, label) in zip(axes, measured.items(), strict=True):
        points = rows[rows["grows"] == what]
        for side, colour, name in (("plain", YARDSTICK, "plain"), ("ours", OURS, "package")):
            middle = points[f"{side}_s"]
            spread = [middle - points[f"{side}_low_s"], points[f"{side}_high_s"] - middle]
            ax.errorbar(
                points["value"], middle, spread, color=colour, marker="o", markersize=3, linewidth=1.2, label=name
            )
        ax.set(xscale="log", yscale="log", xlabel=label)
        ax.set_xticks(points["value"], [f"{v / 1000:.0f}k" if v >= 1000 else f"{v:.0f}" for v in points["value"]])
        ax.xaxis.set_minor_locator(ticker.NullLocator())
        ax.tick_params(axis="x", labelsize=6.5)
    axes[0].set_ylabel("seconds")
    axes[0].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter(ticker.NullFormatter())
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


@styled
def costs_figure(methods: pd.DataFrame) -> Figure:
    """Seconds and peak memory of a step by method, cheapest first."""
    measured = methods.dropna(subset=["seconds"]).sort_values("seconds", ascending=False)
    figure = NotebookFigure(figsize=(WIDTH, 0.7 + 0.2 * len(measured)), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    names = list(map(_title, measured["method"]))
    colours = [METHOD_COLOURS.get(name, YARDSTICK) for name in names]
    _bars(time, names, measured["seconds"], colours, "seconds a step")
    _bars(memory, names, measured["peak_memory_mb"] / 1000, colours, "peak memory (GB)")
    return figure


def _bars(ax: Axes, names: list[str], values: pd.Series, colours: list[str], label: str) -> None:
    bars = ax.barh(names, values, color=colours, height=0.7)
    ax.bar_label(bars, [f"{value:#.3g}".rstrip(".") for value in values], padding=2, fontsize=6.5)
    ax.set_xlabel(label)
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.12)
