"""What 01-data says of a case store: how it was prepared, what was left out, which cases are shown, its folds."""

import pandas as pd

from mlrpl.data import Case, Store
from mlrpl.data.preparation import Normalisation, Window

SHOWN = {"train": 3, "val": 1, "test": 1}  # cases of each split in the montage
MEASURED = 12  # cases of each split in the histograms: enough to see a stray one, few enough to hold


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
