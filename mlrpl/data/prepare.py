"""From a source to a case store: read, check, sub-sample, write, all or nothing."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from mlrpl.data.decathlon import Decathlon
from mlrpl.data.la import LeftAtrium
from mlrpl.data.phantom import Phantom
from mlrpl.data.source import Entry, Raw, Source, parse_options
from mlrpl.data.store import FORMAT, Store, array_path, open_store
from mlrpl.errors import StudyError

if TYPE_CHECKING:
    from mlrpl.config import Dataset

Progress = Callable[[int, int], None]  # cases done, cases in all

SOURCES: dict[str, type[Source]] = {"phantom": Phantom, "la": LeftAtrium, "decathlon": Decathlon}


def prepare(dataset: "Dataset", source: Path | None, folder: Path, progress: Progress | None = None) -> Store:
    """Make the case store of a dataset in `folder`, or open the one that is there and still right.

    A store is right when it was made with the same settings from the same listing (case order, file names,
    sizes); with `source` None (the user gave no DATA) the settings alone decide. It is built in
    `.<folder>.partial` beside it and renamed, so `folder` is never half-written: a preparation that fails or is
    killed leaves whatever was there before, and the next one starts again.

    progress(done, total) is called after each case. Every case is checked; StudyError names the first problem
    and how many more there are.
    """
    if dataset.source not in SOURCES:
        raise StudyError(f"dataset {dataset.name}: unknown source '{dataset.source}'; known: {', '.join(SOURCES)}")
    kind = SOURCES[dataset.source]
    options = parse_options(kind, dataset.source, dataset.options)
    settings = {
        "name": dataset.name,
        "source": dataset.source,
        "version": kind.version,
        "options": options.model_dump(mode="json"),
        "step": dataset.step,
    }
    folder, root = Path(folder), None
    if kind.needs_folder:
        if source is None:
            return _open_without_source(dataset.name, folder, settings)
        root = Path(source)
        if not root.is_dir():
            raise StudyError(f"{root}: no such folder; give the folder of the {dataset.name} dataset as DATA=/path")
    reader = kind(options, root)
    for split in ("train", "test"):
        if not any(entry.split == split for entry in reader.entries):
            raise StudyError(f"dataset {dataset.name}: no {split} case; a study needs both training and test cases")
    settings["listing"] = _listing(reader, root)
    store = _existing(folder, settings)
    if store:
        return store
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(_beside(folder, ".lock")):
            return _existing(folder, settings) or _build(reader, settings, folder, progress)
    except OSError as error:  # disk full, read-only, ...: sources turn their own into StudyError
        raise StudyError(f"{folder}: cannot write the case store: {error.strerror or error}") from None


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}{suffix}")


def _open_without_source(name: str, folder: Path, settings: dict[str, Any]) -> Store:
    if not folder.exists():
        raise StudyError(f"dataset {name} needs DATA=/path: the folder that holds its files")
    store = open_store(folder)
    if any(store.index["settings"].get(key) != value for key, value in settings.items()):
        raise StudyError(
            f"{folder} was prepared with other settings; dataset {name} needs DATA=/path to prepare it again"
        )
    return store


def _existing(folder: Path, settings: dict[str, Any]) -> Store | None:
    try:
        store = open_store(folder)
    except StudyError:
        return None
    return store if store.index["settings"] == settings else None


def _listing(reader: Source, root: Path | None) -> str:
    """Digest of what the source holds: case order, splits, file names and sizes."""
    rows = [
        [entry.id, entry.split, [[name, (root / name).stat().st_size] for name in entry.files]]
        for entry in reader.entries
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _build(reader: Source, settings: dict[str, Any], folder: Path, progress: Progress | None) -> Store:
    partial, previous = _beside(folder, ".partial"), _beside(folder, ".old")
    shutil.rmtree(partial, ignore_errors=True)  # of a preparation that was killed
    try:
        cases = _write_cases(reader, settings["step"], partial, progress)
        index = {
            "format": FORMAT,
            "name": settings["name"],
            "classes": list(reader.classes),
            "channels": reader.channels,
            "real_spacing": reader.real_spacing,
            "licence": reader.licence,
            "citation": reader.citation,
            "split": reader.split,
            "settings": settings,
            "fingerprint": _fingerprint(cases),
            "cases": cases,
        }
        (partial / "store.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            folder.replace(previous)
        partial.replace(folder)
        shutil.rmtree(previous, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return open_store(folder)


def _write_cases(reader: Source, step: int, folder: Path, progress: Progress | None) -> list[dict[str, Any]]:
    cases, problems = [], []
    for done, entry in enumerate(reader.entries, start=1):
        try:
            raw = reader.read(entry)
            check(raw, entry, reader.channels, len(reader.classes))
        except StudyError as error:
            problems.append(str(error))
        if not problems:
            cases.append(_write_case(_subsample(raw, step), entry, folder))
        if progress:
            progress(done, len(reader.entries))
    if problems:
        more = f" (and {len(problems) - 1} more cases have a problem)" if len(problems) > 1 else ""
        raise StudyError(problems[0] + more)
    return cases


def check(raw: Raw, entry: Entry, channels: int, classes: int) -> None:
    """StudyError unless the case is a finite volume with a label of its own shape and of known classes."""
    image, label = raw.image, raw.label
    name = entry.files[0] if entry.files else entry.id
    if image.ndim != 4 or image.shape[0] != channels or not image.size:
        raise StudyError(f"{name}: the image has shape {image.shape}, not ({channels}, x, y, z); replace the file")
    if not np.isfinite(image).all():
        bad = np.count_nonzero(~np.isfinite(image))
        raise StudyError(f"{name}: the image has {bad} voxels that are NaN or infinite; repair or remove the case")
    if label is None:
        return
    name = entry.files[-1] if entry.files else entry.id
    if label.shape != image.shape[1:]:
        raise StudyError(
            f"{name}: the label has shape {label.shape} but its image {image.shape[1:]}; export both on the same grid"
        )
    if not np.isin(label, np.arange(classes)).all():
        unknown = np.setdiff1d(label, np.arange(classes))
        raise StudyError(
            f"{name}: the label has the value {unknown[0]:g}, but the classes are 0 … {classes - 1}; "
            "correct the label or the dataset's list of classes"
        )


def _subsample(raw: Raw, step: int) -> Raw:
    """Every step-th voxel of the image, which keeps the origin; the label by `block_label`."""
    label = None if raw.label is None else block_label(raw.label.astype(np.uint8), step)
    spacing = tuple(float(side) * step for side in raw.spacing)
    return Raw(raw.image[:, ::step, ::step, ::step], label, spacing, raw.geometry)


def block_label(label: np.ndarray, step: int) -> np.ndarray:
    """Per block of step³ voxels (cut off at the border) the foreground class with a share above ½, else background."""
    if step == 1:
        return label
    voxels = _block_sum(np.ones_like(label), step)
    result = np.zeros(voxels.shape, np.uint8)
    for value in np.unique(label[label > 0]):
        result[2 * _block_sum(label == value, step) > voxels] = value
    return result


def _block_sum(mask: np.ndarray, step: int) -> np.ndarray:
    """Sum over blocks; blocks at the far border hold fewer voxels."""
    total = mask.astype(np.int64)
    for axis in range(mask.ndim):
        total = np.add.reduceat(total, np.arange(0, mask.shape[axis], step), axis=axis)
    return total


def _write_case(raw: Raw, entry: Entry, folder: Path) -> dict[str, Any]:
    arrays = {"image": raw.image.astype(np.float32)}
    if raw.label is not None:
        arrays["label"] = raw.label
    written = {}
    for name, array in arrays.items():
        data = io.BytesIO()
        np.save(data, np.ascontiguousarray(array), allow_pickle=False)
        path = array_path(folder, entry.id, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.getbuffer())
        written[name] = {"bytes": data.getbuffer().nbytes, "sha256": hashlib.sha256(data.getbuffer()).hexdigest()}
    return {
        "id": entry.id,
        "split": entry.split,
        "shape": list(raw.image.shape[1:]),
        "spacing": list(raw.spacing),
        "geometry": raw.geometry,
        "has_label": raw.label is not None,
        "arrays": written,
    }


def _fingerprint(cases: list[dict[str, Any]]) -> str:
    rows = [
        [case["id"], case["split"], case["spacing"], [array["sha256"] for array in case["arrays"].values()]]
        for case in cases
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
