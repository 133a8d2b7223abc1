"""What 01-data says and shows of a case store: how it was prepared, what was left out, its folds, its cases."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.ndimage import gaussian_filter1d

from mlrpl.data import Case, Store
from mlrpl.data.preparation import Normalisation, Window
from mlrpl.drawing import (
    WIDTH,
    NotebookFigure,
    add_legend,
    class_colour,
    class_handles,
    dots_and_box,
    dots_and_box_handles,
    draw_outline,
    image_grid,
    show_slice,
    styled,
    write_fitted,
)

SHOWN = {"train": 3, "val": 1, "test": 1}  # cases of each split in the montage
MEASURED = 12  # cases of each split in the histograms: enough to see a stray one, few enough to hold
SPLIT_COLOURS = {"train": "#0072B2", "val": "#009E73", "test": "#D55E00"}


def splits(store: Store) -> pd.DataFrame:
    """A row a split: cases, cases with a label, range of sizes in voxels, range of spacings in mm."""
    rows = []
    for split in ("train", "val", "test"):
        cases = [case for case in store.index["cases"] if case["split"] == split]
        if not cases:
            continue
        shapes, spacings = ([case[name] for case in cases] for name in ("shape", "spacing"))
        rows.append(
            {
                "Split": split,
                "Cases": len(cases),
                "With label": sum(case["has_label"] for case in cases),
                "Size (voxels)": _range(shapes, "{:.0f}"),
                "Spacing (mm)": _range(spacings, "{:.2f}") if store.real_spacing else "unknown",
            }
        )
    return pd.DataFrame(rows)


def _range(triples: Sequence[Sequence[float]], form: str) -> str:
    """Smallest … largest, by axis."""
    ranges = [(form.format(min(axis)), form.format(max(axis))) for axis in zip(*triples, strict=True)]
    return " × ".join(low if low == high else f"{low}–{high}" for low, high in ranges)


def preparation(store: Store) -> pd.DataFrame:
    """How images became the store's arrays, a line a step."""
    steps, settings = store.preparation, store.index["settings"]
    form = {
        "prepared": "volumes prepared by others, taken as they are",
        "raw": "raw files",
        "NIfTI": "NIfTI files",
        "drawn": "drawn from a seed",
    }[store.index["form"]]
    rows = {"Source": form, "Split": SPLITS[store.index["split"]]}
    if store.index["form"] in ("raw", "NIfTI"):
        turned = "turned to the patient's left, back and head" if steps.axes == "patient" else "as in the file"
        rows["Axes"] = turned
        sides = " × ".join(f"{side:g}" for side in steps.spacing or ())
        rows["Voxels"] = f"resampled to {sides} mm" if sides else "as in the file"
        rows["Intensities"] = "; ".join(dict.fromkeys(map(_described, steps.channels)))
    if settings["step"] > 1:
        rows["Sub-sampling"] = f"one voxel in {settings['step']} along each axis; label: majority of the block"
    rows["Cases left out"] = str(len(store.index["rejected"]))
    rows["Fingerprint"] = store.fingerprint
    return pd.DataFrame({"Step": list(rows), "Preparation": list(rows.values())})


SPLITS = {
    "published": "as published with the data set",
    "seeded": "drawn from a seed: no list came with the data set",
    "drawn": "each case is drawn for its split",
}


def _described(kind: Normalisation) -> str:
    if isinstance(kind, Window):
        scaled = "" if kind.mean is None else f", then (value − {kind.mean:.0f}) / {kind.sd:.0f}"
        return f"clipped to {kind.low:g} … {kind.high:g}{scaled}"
    return {
        "z-score": "z-score of the volume",
        "brain": "clipped at the 99.9th percentile, z-score of the non-zero voxels",
    }[kind]


def rejected(store: Store) -> pd.DataFrame:
    """Cases that were left out, and why."""
    return pd.DataFrame(store.index["rejected"], columns=["case", "problem"]).rename(columns=str.capitalize)


def folds(store: Store, number: int) -> pd.DataFrame:
    """A row a fold of the cross-validation: how many it learns from, and which it is measured on."""
    rows = []
    for fold in range(number):
        part = store.fold(fold, number)
        train, test = part.ids("train"), part.ids("test")
        labelled = {case["id"] for case in store.index["cases"] if case["has_label"]}
        rows.append(
            {
                "Fold": fold,
                "Labelled": len(labelled.intersection(train)),
                "Unlabelled": len(set(train) - labelled),
                "Measured on": ", ".join(test),
            }
        )
    return pd.DataFrame(rows)


def shown_cases(store: Store) -> list[Case]:
    """The first cases of each split, for pictures."""
    return [store.load(case) for split, count in SHOWN.items() for case in store.ids(split)[:count]]


def measured_cases(store: Store) -> list[Case]:
    """Cases of each split at equal distances in the list, for histograms; bounded, so that memory is."""
    chosen = []
    for split in SHOWN:
        ids = store.ids(split)
        chosen += ids[:: max(1, -(-len(ids) // MEASURED))]
    return [store.load(case) for case in chosen]


@styled
def case_montage(cases: Sequence[Case], classes: Sequence[str]) -> Figure:
    """Three orthogonal slices of each case, where the label is largest, with its contours; a column a case.

    Cases are shown at one scale a row, z upwards; the others' missing borders are black.
    """
    planes = {"x–y": 2, "x–z": 1, "y–z": 0}
    sizes = np.array([np.multiply(case.image.shape[1:], case.spacing) for case in cases])
    windows = [np.delete(sizes.max(axis=0), axis) for axis in planes.values()]
    figure, grid, panel = image_grid([window[1] / window[0] for window in windows], len(cases))
    for axes, (name, axis), window in zip(grid, planes.items(), windows, strict=True):
        for ax, case, size in zip(axes, cases, sizes, strict=True):
            spacing = np.delete(case.spacing, axis)
            label = case.label if case.label is not None else np.zeros(case.image.shape[1:], np.uint8)
            areas = (label > 0).sum(axis=tuple(np.delete(range(3), axis)))
            at = int(areas.argmax()) if areas.any() else len(areas) // 2
            limits = np.percentile(case.image[0], (1, 99.5))
            show_slice(ax, case.image[0].take(at, axis), spacing, limits, np.delete(size, axis) / 2, window)
            for index in range(1, len(classes)):
                draw_outline(ax, label.take(at, axis) == index, spacing, class_colour(index), width=1)
            if axis != 2:
                ax.invert_yaxis()
        axes[0].set_ylabel(name)
    names = [f"{case.id}\n({case.split}{'' if case.label is not None else ', no label'})" for case in cases]
    write_fitted([ax.set_title for ax in grid[0]], names, panel)
    add_legend(figure, class_handles(classes))
    return figure


@styled
def intensity_histograms(cases: Sequence[Case], classes: Sequence[str]) -> Figure:
    """Intensities of each case, and of each class pooled over the labelled cases; a row a channel."""
    channels = len(cases[0].image)
    figure = NotebookFigure(figsize=(WIDTH, 0.5 + 1.7 * channels), layout="constrained")
    grid = figure.subplots(channels, 2, squeeze=False, sharex="row")
    splits = [split for split in SPLIT_COLOURS if any(case.split == split for case in cases)]
    for channel, (whole, by_class) in enumerate(grid):
        ends = np.array([np.percentile(case.image[channel], (0.2, 99.8)) for case in cases])
        bins = np.linspace(ends[:, 0].min(), ends[:, 1].max(), 81)
        middles = (bins[1:] + bins[:-1]) / 2
        for case in cases:
            whole.plot(
                middles, _density(case.image[channel], bins), color=SPLIT_COLOURS[case.split], linewidth=0.6, alpha=0.5
            )
        labelled = [case for case in cases if case.label is not None]
        for index, name in enumerate(classes):
            values = np.concatenate([case.image[channel][case.label == index] for case in labelled])
            colour = class_colour(index) if index else "0.6"
            by_class.fill_between(middles, _density(values, bins), color=colour, alpha=0.3, linewidth=0)
            by_class.plot(middles, _density(values, bins), color=colour, linewidth=1.2, label=name)
        for ax in (whole, by_class):
            ax.set(xlabel="intensity (z-score)", ylim=(0, None))
        whole.set_ylabel("density" if channels == 1 else f"density, channel {channel + 1}")
    grid[0, 0].set_title("Each case")
    grid[0, 0].legend(handles=[Line2D([], [], color=SPLIT_COLOURS[split], label=split) for split in splits])
    grid[0, 1].set_title("Each class")
    grid[0, 1].legend()
    return figure


@styled
def grids(store: Store) -> Figure:
    """Voxel size and field of view of every case as it came, by axis and split; where the size is unknown, voxels."""
    known = store.real_spacing
    rows: dict[str, list[dict]] = {split: [] for split in SPLIT_COLOURS}
    for case in store.index["cases"]:
        rows[case["split"]].append(case["original"] or case)
    splits = [split for split, cases in rows.items() if cases]
    size = (WIDTH if known else 0.6 * WIDTH, 0.9 + 0.33 * 3 * len(splits))
    figure = NotebookFigure(figsize=size, layout="constrained")
    axes = figure.subplots(1, 2 if known else 1, squeeze=False, sharey=True)[0]
    for ax, what in zip(axes[::-1], ("extent", "spacing"), strict=False):
        for place, (axis, split) in enumerate(product(range(3), splits)):
            spacing = np.array([case["spacing"][axis] for case in rows[split]], dtype=float)
            extent = np.array([case["shape"][axis] for case in rows[split]]) * (spacing if known else 1)
            values = spacing if what == "spacing" else extent
            dots_and_box(ax, values, place, SPLIT_COLOURS[split], jitter=0.12)
        ax.set(ylim=(3 * len(splits) - 0.5, -0.6), xlim=(0, None))
        ax.tick_params(axis="y", length=0)
        ax.grid(False, axis="y")
        unit = "mm" if known else "voxels"
        ax.set_xlabel(f"field of view ({unit})" if what == "extent" else "voxel size (mm)")
    axes[0].set_yticks(range(3 * len(splits)), [f"{axis}, {split}" for axis in "xyz" for split in splits])
    add_legend(figure, dots_and_box_handles())
    return figure


@styled
def label_volumes(store: Store) -> Figure:
    """Volume of every foreground class in every case with a label; a panel a class, a line a split."""
    classes = store.classes[1:]
    unit = "ml" if store.real_spacing else "thousand voxels"
    volumes: dict[str, list[np.ndarray]] = {split: [] for split in SPLIT_COLOURS}
    for split, found in volumes.items():
        for case in map(store.load, store.ids(split)):
            if case.label is not None:
                voxel = np.prod(case.spacing) if store.real_spacing else 1
                found.append(np.bincount(case.label.ravel(), minlength=len(classes) + 1)[1:] * voxel / 1000)
    splits = [split for split, found in volumes.items() if found]
    figure = NotebookFigure(
        figsize=(WIDTH if len(classes) > 1 else 0.6 * WIDTH, 0.8 + 0.4 * len(splits)), layout="constrained"
    )
    axes = figure.subplots(1, len(classes), squeeze=False, sharey=True)[0]
    for index, (ax, name) in enumerate(zip(axes, classes, strict=True)):
        for place, split in enumerate(splits):
            dots_and_box(ax, np.array(volumes[split])[:, index], place, SPLIT_COLOURS[split], jitter=0.12)
        ax.set(title=name, xlabel=f"volume ({unit})", xlim=(0, None), ylim=(len(splits) - 0.5, -0.6))
        ax.set_yticks(range(len(splits)), [f"{split} ({len(volumes[split])})" for split in splits])
        ax.tick_params(axis="y", length=0)
        ax.grid(False, axis="y")
    add_legend(figure, dots_and_box_handles())
    return figure


def _density(values: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Histogram, smoothed over neighbouring bins: scanners give whole numbers, which bins would catch unevenly."""
    return gaussian_filter1d(np.histogram(values, bins, density=True)[0], 1.5)
