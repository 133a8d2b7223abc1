"""From a source to a case store: read, check, sub-sample, write; several cases at a time, all or nothing.

A store grows in `.<folder>.partial` and takes its name when it is whole. A case is finished when its record is there,
so a preparation that was killed goes on with the next case; what it ends with is the same to the last byte.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock

from mlrpl.config import Dataset, validated
from mlrpl.data.brats import Brats
from mlrpl.data.decathlon import Decathlon
from mlrpl.data.la import LeftAtrium
from mlrpl.data.pancreas import Pancreas
from mlrpl.data.phantom import Phantom
from mlrpl.data.source import CaseEntry, Raw, Rejected, Source
from mlrpl.data.store import FORMAT, Store, array_path, fingerprint, open_store
from mlrpl.data.volumes import changed_at, checksum, size
from mlrpl.errors import StudyError
from mlrpl.files import read_json, remove_temporary, write_json
from mlrpl.process import cpu_count

Progress = Callable[[int, int], None]  # cases done, cases in all

SOURCES: dict[str, type[Source]] = {
    "phantom": Phantom,
    "la": LeftAtrium,
    "pancreas": Pancreas,
    "brats": Brats,
    "decathlon": Decathlon,
}
WORKERS = 4  # at most: each holds a few volumes
AS_OPTION = "DATA=/path (make), --data (mlrpl reproduce) or --source (mlrpl prepare)"


def prepare(
    dataset: Dataset,
    source: Path | None,
    folder: Path,
    progress: Progress | None = None,
    workers: int | None = None,
) -> Store:
    """Make the case store of a dataset in `folder`, or open the one that is there and still right.

    A store is right when it was made with the same settings from the same listing (case order, file names, sizes),
    classes and channels, and no file written since it was begun has other bytes; with `source` None (the user gave no
    DATA) the settings alone decide. `folder` is never half-written: a preparation that fails leaves whatever was there
    before, one that is killed goes on where it was.

    Args:
        dataset: what to prepare.
        source: the folder of the data set's own files.
        folder: of the store.
        progress: called with (done, total) after each case.
        workers: cases at a time; default: the processors, four at most. The store does not depend on it.

    Raises:
        StudyError: every case is checked; it names the first problem and how many more there are. A lenient source
            loses faulty cases instead; the store's index lists them.
    """
    if dataset.source not in SOURCES:
        raise StudyError(f"dataset {dataset.name}: unknown source '{dataset.source}'; known: {', '.join(SOURCES)}")
    kind = SOURCES[dataset.source]
    options = validated(kind.Options, dataset.options, f"options of source '{dataset.source}'")
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
            raise StudyError(f"{root}: no such folder; give that of the dataset {dataset.name}, {AS_OPTION}")
    reader = kind(options, root)
    if not any(entry.split == "train" for entry in reader.entries):
        raise StudyError(f"dataset {dataset.name}: no training case; a study needs training cases")
    settings |= {"listing": _listing(reader, root), "classes": list(reader.classes), "channels": reader.channels}
    try:
        if store := _existing(folder, settings, reader, root):
            return store
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(_beside(folder, ".lock")):
            return _existing(folder, settings, reader, root) or _build(
                reader, root, settings, folder, progress, workers or min(WORKERS, cpu_count())
            )
    except OSError as error:  # disk full, read-only, ...: sources turn their own into StudyError
        raise StudyError(f"{folder}: cannot write the case store: {error.strerror or error}") from None


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}{suffix}")


def _open_without_source(name: str, folder: Path, settings: dict[str, Any]) -> Store:
    if not folder.exists():
        raise StudyError(f"dataset {name} is not prepared yet: give the folder that holds its files, {AS_OPTION}")
    store = open_store(folder)
    if any(store.index["settings"].get(key) != value for key, value in settings.items()):
        raise StudyError(
            f"{folder} was prepared with other settings; to prepare dataset {name} again give its folder, {AS_OPTION}"
        )
    return store


def _existing(folder: Path, settings: dict[str, Any], reader: Source, root: Path | None) -> Store | None:
    try:
        store = open_store(folder)
    except StudyError:
        return None
    same = store.index["settings"] == settings and (root is None or _unchanged(store, reader, root))
    return store if same else None


def _unchanged(store: Store, reader: Source, root: Path) -> bool:
    """Whether files that were written after the store was begun hold the bytes that it was made from."""
    begun, index = time.time_ns(), store.folder / "store.json"
    made = index.stat().st_mtime_ns
    recorded = {case["id"]: case["sources"] for case in store.index["cases"]}
    recorded |= {case["case"]: case.get("sources") for case in store.index["rejected"]}
    newer = [
        entry
        for entry in reader.entries
        if any((root / name).exists() and changed_at(root / name) >= made for name in entry.files)
    ]
    if any(recorded.get(entry.id) != _sources(root, entry) for entry in newer):
        return False
    if newer:
        with suppress(OSError):  # so that they need not be read again
            os.utime(index, ns=(begun, begun))
    return True


def _sources(root: Path, entry: CaseEntry) -> list[str] | None:
    """Checksums of a case's files, None where one is missing or may not be read."""
    try:
        return [checksum(root / name) for name in entry.files]
    except (FileNotFoundError, PermissionError):
        return None


def _listing(reader: Source, root: Path | None) -> str:
    """Digest of what the source holds: case order, splits, file names and sizes."""
    rows = [
        [entry.id, entry.split, [[name, size(root / name)] for name in entry.files if (root / name).exists()]]
        for entry in reader.entries
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _build(
    reader: Source, root: Path | None, settings: dict[str, Any], folder: Path, progress: Progress | None, workers: int
) -> Store:
    partial, previous = _beside(folder, ".partial"), _beside(folder, ".old")
    begun = time.time_ns()
    if read_json(partial / "settings.json") != settings:  # of another preparation that was killed
        shutil.rmtree(partial, ignore_errors=True)
    remove_temporary(partial)
    try:
        write_json(partial / "settings.json", settings)
        cases, rejected = _write_cases(reader, root, settings["step"], partial, progress, workers)
        scales = [case.pop("scale") for case in cases]
        trained = [scale for case, scale in zip(cases, scales, strict=True) if scale and case["split"] == "train"]
        preparation = reader.preparation.scaled(np.mean(trained, axis=0).tolist()) if trained else reader.preparation
        index = {
            "format": FORMAT,
            "name": settings["name"],
            "classes": list(reader.classes),
            "channels": reader.channels,
            "real_spacing": reader.real_spacing,
            "licence": reader.licence,
            "citation": reader.citation,
            "split": reader.split,
            "form": reader.form,
            "preparation": preparation.model_dump(mode="json"),
            "settings": settings,
            "fingerprint": fingerprint(cases),
            "rejected": [asdict(each) for each in [*reader.rejected, *rejected]],
            "cases": cases,
        }
        (partial / "settings.json").unlink()
        shutil.rmtree(partial / "records")
        (partial / "store.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        os.utime(partial / "store.json", ns=(begun, begun))  # what is written from here on is newer
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            folder.replace(previous)
        partial.replace(folder)
        shutil.rmtree(previous, ignore_errors=True)
    except Exception:  # an interruption leaves what is finished
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return open_store(folder)


def _write_cases(
    reader: Source, root: Path | None, step: int, folder: Path, progress: Progress | None, workers: int
) -> tuple[list[dict[str, Any]], list[Rejected]]:
    """Records of the usable cases and the rejected ones, in the source's order."""
    found: dict[str, dict[str, Any] | Rejected] = {}
    # Threads: reading, resampling and NumPy's work on whole volumes leave the interpreter to the others.
    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(_write_case, reader, root, step, folder, entry): entry for entry in reader.entries}
        try:
            for done, future in enumerate(as_completed(waiting), start=1):
                found[waiting[future].id] = future.result()
                if progress:
                    progress(done, len(waiting))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    ordered = [found[entry.id] for entry in reader.entries]
    rejected = [each for each in ordered if isinstance(each, Rejected)]
    cases = [each for each in ordered if not isinstance(each, Rejected)]
    if rejected and not (reader.lenient and any(case["split"] == "train" for case in cases)):
        more = f" (and {len(rejected) - 1} more cases have a problem)" if len(rejected) > 1 else ""
        raise StudyError(rejected[0].problem + more)
    for each in rejected:
        shutil.rmtree(array_path(folder, each.case, "image").parent, ignore_errors=True)
    return cases, rejected


def _write_case(
    reader: Source, root: Path | None, step: int, folder: Path, entry: CaseEntry
) -> dict[str, Any] | Rejected:
    """Prepare one case; its record is written last, and a record that is there of the same files is taken as it is."""
    record, sources = folder / "records" / f"{entry.id}.json", None
    try:
        sources = _sources(root, entry)
        finished = read_json(record)
        if finished and finished["sources"] == sources:
            return finished
        raw = reader.read(entry)
        check(raw, entry, reader.channels, len(reader.classes))
    except StudyError as error:
        return Rejected(entry.id, str(error), sources)
    case = {**_save(_subsample(raw, step), entry, folder), "sources": sources, "scale": raw.scale}
    write_json(record, case)
    return case


def check(raw: Raw, entry: CaseEntry, channels: int, classes: int) -> None:
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
            f"{name}: the label has the value {unknown[0]:.9g}, but the classes are 0 … {classes - 1}; "
            "correct the label or the dataset's list of classes"
        )


def _subsample(raw: Raw, step: int) -> Raw:
    """Every step-th voxel of the image, which keeps the origin; the label by `block_label`."""
    label = None if raw.label is None else block_label(raw.label.astype(np.uint8), step)
    spacing = tuple(float(side) * step for side in raw.spacing)
    return replace(raw, image=raw.image[:, ::step, ::step, ::step], label=label, spacing=spacing)


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


class _Hashing:
    """A file that knows what was written to it; NumPy hands it pieces, and a full disk is then told as such."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.bytes += len(data)


def _save(raw: Raw, entry: CaseEntry, folder: Path) -> dict[str, Any]:
    arrays = {"image": raw.image.astype(np.float32)}
    if raw.label is not None:
        arrays["label"] = raw.label
    written = {}
    for name, array in arrays.items():
        path = array_path(folder, entry.id, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            hashing = _Hashing(file)
            np.save(hashing, np.ascontiguousarray(array), allow_pickle=False)
        written[name] = {"bytes": hashing.bytes, "sha256": hashing.sha256.hexdigest()}
    return {
        "id": entry.id,
        "split": entry.split,
        "shape": list(raw.image.shape[1:]),
        "spacing": list(raw.spacing),
        "geometry": raw.geometry,
        "original": raw.original,
        "has_label": raw.label is not None,
        "highest": 0 if raw.label is None else int(raw.label.max()),
        "arrays": written,
    }
