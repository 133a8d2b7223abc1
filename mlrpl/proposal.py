"""A study of one's own data: its settings proposed from the images, and written as a file to edit."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path

import numpy as np

from mlrpl.data.decathlon import Decathlon, DecathlonOptions
from mlrpl.data.grid import to_patient_axes
from mlrpl.data.prepare import check
from mlrpl.data.source import Raw
from mlrpl.errors import StudyError
from mlrpl.files import read_json, write_text
from mlrpl.networks import STRIDE

VOXELS = {"cpu": 64 * 64 * 32, "cuda": 96**3}  # of a patch: what memory and patience allow
FOLDS = 5
VARYING = 0.05  # relative difference of spacings from which on images are resampled
AIR = -500  # HU: no MRI has a first percentile below
SIDES = ("left", "right", "links", "rechts", "linke", "rechte", "gauche", "droite", "l", "r", "lh", "rh")
SAMPLE = 20_000  # labelled voxels a case and channel, for a CT's window


@dataclass(frozen=True)
class Found:
    """What was seen of the images: axes are the patient's."""

    classes: tuple[str, ...]
    counts: tuple[int, ...]  # labels that hold each class
    named: bool  # whether dataset.json names the classes
    images: int
    labelled: int
    tests: int
    spacings: np.ndarray  # (cases, 3), mm
    sizes: np.ndarray  # (cases, 3), voxels
    windows: tuple[dict[str, float] | None, ...]  # of each channel: a CT's, None for other images


def look(root: Path, progress: Callable[[int, int], None] | None = None) -> Found:
    """Look at a data set; images that cannot be read are passed over: preparing them says what is wrong.

    Raises:
        StudyError: where the folder holds no usable labelled images.
    """
    named = (root / "dataset.json").exists()
    placeholder = None if named else ("background", "structure")
    reader = Decathlon(DecathlonOptions(test=0, lenient=True, classes=placeholder), root)
    count = len(reader.classes) if named else 256
    spacings, sizes, inside, problems = [], [], [], [each.problem for each in reader.rejected]
    holders: dict[int, list[str]] = {0: []}  # of each value of the labels, the cases
    labelled = {"train": 0, "test": 0}
    for done, entry in enumerate(reader.entries, start=1):
        try:  # checked as preparing it will check it
            image, geometry, label = reader.read_files(entry)
            check(Raw(image, label), entry, reader.channels, count)
        except StudyError as error:
            problems.append(str(error))
            continue
        turned, place = to_patient_axes(image, geometry)
        spacings.append(place["spacing"])
        sizes.append(turned.shape[1:])
        if label is not None:
            labelled[entry.split] += 1
            for value in np.unique(label).astype(int).tolist():
                holders.setdefault(value, []).append(entry.id)
            if entry.split == "train" and label.any():
                inside.append(_sampled(image, label))
        if progress:
            progress(done, len(reader.entries))
    if not inside:
        why = f" ({problems[0]})" if problems else ""
        raise StudyError(f"{root}: no image with a usable label{why}; put labels into labelsTr, named as their images")
    if not named and (beyond := [value for value in sorted(holders) if value >= len(holders)]):
        where = "; ".join(f"{value} in {', '.join(holders[value][:3])}" for value in beyond[:3])
        raise StudyError(
            f"{root}: the labels hold the values {', '.join(map(str, sorted(holders)))} ({where}); they must be "
            "0 (background), 1, … without gaps, so correct or renumber them"
        )
    classes = reader.classes if named else ("background", *(f"class {value}" for value in range(1, len(holders))))
    return Found(
        classes=classes,
        counts=tuple(len(holders.get(value, [])) for value in range(len(classes))),
        named=named,
        images=len(spacings),
        labelled=labelled["train"],
        tests=labelled["test"],
        spacings=np.array(spacings),
        sizes=np.array(sizes),
        windows=_windows(root, inside, reader.channels),
    )


def _sampled(image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each channel: values of some labelled voxels (channels, n), and the first percentile of all."""
    inside = image[:, label > 0]
    step = max(1, inside.shape[1] // SAMPLE)
    return inside[:, ::step].astype(np.float64), np.percentile(image[:, ::4, ::4, ::4], 1, axis=(1, 2, 3))


def _windows(root: Path, values: Sequence[tuple[np.ndarray, np.ndarray]], channels: int) -> tuple:
    description = read_json(root / "dataset.json")
    names = description.get("channel_names") or description.get("modality") or {}
    found: list[dict[str, float] | None] = []
    for channel, name in zip(range(channels), [*names.values(), *[""] * channels], strict=False):
        lowest = float(np.median([low[channel] for _, low in values]))
        if not (str(name).upper() == "CT" if name else lowest < AIR):
            found.append(None)
            continue
        inside = np.concatenate([inside[channel] for inside, _ in values])
        low, high = np.percentile(inside, (0.5, 99.5))
        window = {"low": low, "high": max(high, low + 1), "mean": inside.mean(), "sd": max(inside.std(), 1.0)}
        found.append({key: round(float(value), 1) for key, value in window.items()})
    return tuple(found)


def target_spacing(spacings: np.ndarray) -> tuple[float, ...] | None:
    """The images' median (mm), or None where all are about alike."""
    median = np.median(spacings, axis=0)
    return None if np.allclose(spacings, median, rtol=VARYING, atol=0) else tuple(float(f"{v:.3g}") for v in median)


def fitted_patch(size: Sequence[float], voxels: int) -> tuple[int, ...]:
    """Sides divisible by 16 that cover an image of this size, cut where the patch would hold more than `voxels`."""
    patch = [max(2, ceil(side / STRIDE)) * STRIDE for side in size]
    while prod(patch) > voxels and max(patch) > 2 * STRIDE:
        patch[int(np.argmax(patch))] -= STRIDE
    return tuple(patch)


def have_sides(classes: Sequence[str]) -> bool:
    """Whether a class is of the left or the right, by its name: mirrored, its label would be wrong."""
    return any(word in SIDES for label in classes for word in re.split(r"[\W_]+", label.lower()))


def propose(name: str, found: Found, device: str) -> str:
    """The study file's text; `device`: "cpu" or "cuda", what it will be trained on.

    Raises:
        StudyError: for too few labelled cases.
    """
    if found.labelled + found.tests < 2 or not found.labelled:
        raise StudyError(f"{found.labelled + found.tests} labelled image is too few: one to learn from, one to test on")
    folds = 0 if found.tests else min(FOLDS, found.labelled)
    labelled = found.labelled - (ceil(found.labelled / folds) if folds else 0)
    unlabelled = found.images - found.labelled - found.tests
    spacing = target_spacing(found.spacings)
    sizes = found.sizes * found.spacings / spacing if spacing else found.sizes
    patch = fitted_patch(np.median(sizes, axis=0), VOXELS[device])
    short = device == "cpu"
    sided = have_sides(found.classes)
    channels = [window or "z-score" for window in found.windows]
    runs = {
        "mlrpl": f"{{variant: mlrpl, method: mlrpl, title: MLRPL, labelled: {labelled}}}",
        "control": f'{{variant: control, method: mlrpl, title: "Control (β = 0)", labelled: {labelled}, '
        "settings: {beta_max: 0}}  # what MLRPL is without learning from unlabelled images: compare",
        "vnet": f"{{variant: vnet, method: vnet, title: V-Net, labelled: {labelled}}}",
    }
    first, *others = runs.values() if unlabelled else [runs["vnet"]]  # without unlabelled images there is no choice
    seen = f"in {', '.join(map(str, found.counts[1:]))} of {found.labelled + found.tests} labels"
    lines = {
        "classes": ""
        if found.named
        else f"    classes: {_yaml(found.classes)}  # your names, background first; {seen}\n",
        "test": "labelled imagesTs are the test cases" if found.tests else "cross-validation instead of test cases",
        "spacing": "the median, mm" if spacing else "all images are about alike: each keeps its voxels",
        "mirror": "classes have a side" if sided else "left and right, at even odds; [] if a class is of one side",
        "dropout": "of 8 channels the published dropout may leave none" if short else "as published",
        "beta": "short runs need a low weight of the mutual loss" if short else "as published",
    }
    return f"""\
# Proposed from the images by `mlrpl prepare`. Edit it as you like; `mlrpl prepare {name} --source DIR` follows it then.
name: {_yaml(name)}
title: {_yaml(name)}
about: Images of your own; the settings were proposed from them. What was done to the images is on the page *Data*.
dataset:
  name: {_yaml(name)}
  source: decathlon
  options:
    test: 0  # {lines["test"]}
    lenient: true  # faulty cases are left out and named
{lines["classes"]}    preparation:
      axes: patient  # turned to left, back, head; predictions are turned back
      spacing: {_yaml(spacing)}  # {lines["spacing"]}
      channels: {_yaml(channels)}  # z-score, or a CT's window with mean and sd of the voxels with a label
folds: {folds}  # of the cross-validation over the labelled cases; predict averages them
distances: mm
settings:
  patch: {_yaml(patch)}  # voxels, each side divisible by {STRIDE}
  stride: {_yaml([side // 2 for side in patch])}
  augmentation: {"[]" if sided else "[mirror]"}  # {lines["mirror"]}
  filters: {8 if short else 16}
  head_dropout: {_yaml(not short)}  # {lines["dropout"]}
  normalisation: instance  # batch is as published; with few labels its running averages may fit no volume
  iterations: {3000 if short else 15000}
  beta_max: {0.1 if short else 1.0}  # {lines["beta"]}
  ramp_iterations: {1200 if short else 6000}
  check_from: {300 if short else 1500}
  check_every: {300 if short else 1500}
  threads: {2 if short else 4}
seeds: [0]
runs:
  - {first}
""" + "".join(f"  # - {line}\n" for line in others)


def _yaml(value: object) -> str:
    """JSON is YAML."""
    return json.dumps(value, ensure_ascii=False)


def write_study(name: str, root: Path, device: str, progress: Callable[[int, int], None] | None = None) -> Path:
    """Look at the data and write <name>.yaml into the working folder.

    Raises:
        StudyError: where the folder is missing or holds too little.
    """
    if not root.is_dir():
        raise StudyError(f"{root}: no such folder; give the folder that holds imagesTr and labelsTr")
    text = propose(name, look(root, progress), device)
    path = Path(f"{name}.yaml")
    write_text(path, text)
    return path
