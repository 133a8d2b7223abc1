"""The paper's data sets: as prepared downloads hold them (HDF5) or raw, recognised by themselves.

What the three share lives here: which form a folder holds, published lists or a seeded split, HDF5 files, the crop
around the label. Where a folder holds both forms (the usual scripts write one beside the other) the prepared one is
taken.
"""

import hashlib
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import ClassVar

import h5py
import numpy as np
from pydantic import Field

from mlrpl.config import Model
from mlrpl.data.bounds import H5_ERRORS, read_h5
from mlrpl.data.grid import Geometry
from mlrpl.data.preparation import Preparation
from mlrpl.data.source import CaseEntry, Raw, Rejected
from mlrpl.data.volumes import below, read_label, read_volume
from mlrpl.errors import StudyError
from mlrpl.masks import bounding_box

LISTS = (".list", ".txt")
Files = dict[str, tuple[str, ...]]  # of each case, relative to the root


class PublishedOptions(Model):
    """`seed` draws the split where there are no list files."""

    seed: int = Field(0, ge=0)


class Published:
    """Base of the sources `la`, `pancreas` and `brats`. A subclass says where files lie and how a raw case is read."""

    Options: ClassVar = PublishedOptions
    version: ClassVar = 1
    needs_folder: ClassVar = True
    channels = 1
    real_spacing = False
    lenient = False
    shares: ClassVar[dict[str, float]]  # of the cases that are for "val" and "test" where there are no lists
    looked_for: ClassVar[str]  # for messages: what a folder should hold
    preparation: Preparation

    def __init__(self, options: PublishedOptions, root: Path) -> None:
        self.root = root
        self.rejected: list[Rejected] = []
        files = self.prepared_files(root)
        self.form = "prepared" if files else "raw"
        files = files or self.raw_files(root)
        if not files:
            raise StudyError(f"{root}: {self.looked_for} is in this folder; give the folder of the data set")
        self.real_spacing = self.form == "raw"
        splits = _published(root, files)
        self.split = "published" if splits else "seeded"
        self.entries = [
            CaseEntry(case, split, files[case])
            for split, cases in (splits or _seeded(files, self.shares, options.seed)).items()
            for case in cases
        ]

    def prepared_files(self, root: Path) -> Files:
        """Each case's HDF5 file, as prepared downloads lay them out; empty where there is none."""
        raise NotImplementedError

    def raw_files(self, root: Path) -> Files:
        """Each case's files as the data set is published; empty where there is none."""
        raise NotImplementedError

    def read(self, entry: CaseEntry) -> Raw:
        """Read one case; StudyError when a file is cut short or lacks something."""
        return self.read_prepared(entry.files[0]) if self.form == "prepared" else self.read_raw(entry)

    def read_prepared(self, name: str) -> Raw:
        """The datasets image and label of an HDF5 file, as they are."""
        try:
            with h5py.File(self.root / name) as file:
                image, label = read_h5(file, "image", name), read_h5(file, "label", name)
        except H5_ERRORS as error:
            raise StudyError(
                f"{name}: cannot be read as HDF5, it may be cut short; copy it again "
                f"({str(error).splitlines()[0][:80]})"
            ) from None
        return Raw(image[None].astype(np.float32), label)

    def read_files(self, entry: CaseEntry) -> tuple[np.ndarray, Geometry, np.ndarray]:
        """Image (channels, x, y, z), its geometry and its label (x, y, z) as the files of a raw case hold them.

        Raises:
            StudyError: where the label is missing or on another grid, or a file cannot be read.
        """
        name, label_name = entry.files
        if not (self.root / label_name).is_file():
            raise StudyError(f"{label_name}: not there; complete the case or remove it")
        image, geometry = read_volume(self.root, name)
        return image, geometry, read_label(self.root, label_name, name, (image, geometry))

    def read_raw(self, entry: CaseEntry) -> Raw:
        """Read and prepare one case as the paper does."""
        raise NotImplementedError


def by_case(root: Path, pattern: str, case: Callable[[Path], str]) -> dict[str, str]:
    """Files below the root by the name of their case; StudyError where one case has two."""
    files: dict[str, str] = {}
    for path in below(root, pattern):
        if path.name.startswith("."):
            continue
        name, found = path.relative_to(root).as_posix(), case(path.absolute())
        if found in files:
            raise StudyError(f"{name}: case '{found}' is in {files[found]} too; remove one of them")
        files[found] = name
    return files


def around_label(
    label: np.ndarray, margins: Sequence[tuple[int, int]], least: Sequence[int], name: str
) -> tuple[slice, ...]:
    """The label's box (x, y, z) and margins, no smaller than `least` as far as the volume goes.

    Args:
        label: the foreground is all that is not zero.
        margins: voxels before and after, for the first axes; the other axes are taken whole.
        least: sides in voxels.
        name: for messages.

    Raises:
        StudyError: where the label is empty.
    """
    if (tight := bounding_box(label)) is None:
        raise StudyError(f"{name}: the label is empty; replace or remove the case")
    box = [slice(0, size) for size in label.shape]
    for axis, (before, after) in enumerate(margins):
        found, size, side = tight[axis], label.shape[axis], least[axis]
        missing = max(side - (found.stop - found.start), 0)
        start = max(found.start - before - missing // 2, 0)
        stop = min(found.stop + after + missing - missing // 2, size)
        start = max(min(start, stop - side), 0)  # where the border cut one side short, the other one gives
        box[axis] = slice(start, min(max(stop, start + side), size))
    return tuple(box)


def drawn(case: str) -> np.random.Generator:
    """Randomness that belongs to a case, the same on every machine."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(case.encode()).digest()[:8]))


def _published(root: Path, files: Files) -> dict[str, list[str]] | None:
    """Cases of the list files by split; None where there are none."""
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
    if all(names[0].count("/") < 2 for names in files.values()):  # the root holds the cases: the lists may be above it
        folders.append(root.resolve().parent)
    for folder in folders:
        for suffix in LISTS:
            lists = {split: folder / f"{split}{suffix}" for split in ("train", "val", "test")}
            lists = {split: path for split, path in lists.items() if path.is_file()}
            if {"train", "test"} <= lists.keys():
                return _listed(lists, files)
    for suffix, (split, other) in product(LISTS, [("train", "test"), ("test", "train")]):
        if (root / f"{split}{suffix}").is_file():
            raise StudyError(
                f"{split}{suffix} is there, but no {other}{suffix} beside it: add it, or remove the one list for a "
                "split drawn from a seed"
            )
    return None


def _listed(lists: dict[str, Path], files: Files) -> dict[str, list[str]]:
    splits, seen = {}, set()
    for split, path in lists.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        splits[split] = [line.split(",")[0].strip() for line in lines if line.strip()]
        if not splits[split]:
            raise StudyError(f"{path.name}: no {split} case is listed; complete the list")
        for case in splits[split]:
            if case not in files:
                raise StudyError(
                    f"{path.name} names case '{case}', but this folder has no file of it; "
                    "complete the dataset or correct the list"
                )
            if case in seen:
                raise StudyError(f"{path.name} names case '{case}', which was listed before; correct the lists")
            seen.add(case)
    return splits


def _seeded(files: Files, shares: dict[str, float], seed: int) -> dict[str, list[str]]:
    cases = [str(case) for case in np.random.default_rng(seed).permutation(sorted(files))]
    counts = {split: max(1, round(share * len(cases))) for split, share in shares.items()}
    splits: dict[str, list[str]] = {"train": cases[: len(cases) - sum(counts.values())]}
    rest = cases[len(splits["train"]) :]
    for split, count in counts.items():
        splits[split], rest = rest[:count], rest[count:]
    return splits
