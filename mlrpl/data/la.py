"""Left atrium (LA): the prepared volumes of the 2018 challenge as the semi-supervised literature shares them.

    <root>/**/<case>/mri_norm2.h5     datasets image (float, z-scored) and label (0, 1), both (x, y, z)
    train.list, test.list             one case a line; beside the cases, or up to one level above or below the root

The arrays are taken as they are. Their voxel spacing is not recorded, so distances are in voxels.
"""

from pathlib import Path
from typing import ClassVar

import h5py
import numpy as np
from pydantic import Field

from mlrpl.data.bounds import read_h5
from mlrpl.data.source import Entry, Options, Raw
from mlrpl.errors import StudyError

FILE = "mri_norm2.h5"
TEST_SHARE = 0.2  # of the cases, when there are no list files


class LeftAtriumOptions(Options):
    """`seed` draws the split where there are no list files."""

    seed: int = Field(0, ge=0)


class LeftAtrium:
    """Source `la`: one channel, background and left atrium."""

    Options: ClassVar = LeftAtriumOptions
    version: ClassVar = 1
    needs_folder: ClassVar = True
    classes = ("background", "left atrium")
    channels = 1
    real_spacing = False
    licence = "terms of the 2018 Atrial Segmentation Challenge: for research, cite the challenge"
    citation = (
        "Xiong et al., A global benchmark of algorithms for segmenting the left atrium from late "
        "gadolinium-enhanced cardiac magnetic resonance imaging, Medical Image Analysis 67 (2021) 101832"
    )

    def __init__(self, options: LeftAtriumOptions, root: Path) -> None:
        self.root = root
        files: dict[str, str] = {}
        for path in sorted(root.rglob(FILE)):
            name = path.relative_to(root).as_posix()
            case = path.absolute().parent.name
            if case in files:
                raise StudyError(f"{name}: case '{case}' is in {files[case]} too; remove one of them")
            files[case] = name
        if not files:
            raise StudyError(f"{root}: no <case>/{FILE} in this folder; give the folder of the published LA volumes")
        splits = _published(root, files)
        self.split = "published" if splits else "seeded"
        self.entries = [
            Entry(case, split, (files[case],))
            for split, cases in (splits or _seeded(files, options.seed)).items()
            for case in cases
        ]

    def read(self, entry: Entry) -> Raw:
        """Read one case; StudyError when the file is cut short or lacks a dataset."""
        name = entry.files[0]
        try:
            with h5py.File(self.root / name) as file:
                image, label = read_h5(file, "image", name), read_h5(file, "label", name)
        except (OSError, RuntimeError) as error:
            raise StudyError(
                f"{name}: cannot be read as HDF5, it may be cut short; copy it again "
                f"({str(error).splitlines()[0][:80]})"
            ) from None
        return Raw(image[None].astype(np.float32), label)


def _published(root: Path, files: dict[str, str]) -> dict[str, list[str]] | None:
    """Cases of the list files by split; None where there are none."""
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
    if all(name.count("/") < 2 for name in files.values()):  # the root holds the cases: the lists may be above it
        folders.append(root.resolve().parent)
    for folder in folders:
        lists = {split: folder / f"{split}.list" for split in ("train", "val", "test")}
        lists = {split: path for split, path in lists.items() if path.is_file()}
        if {"train", "test"} <= lists.keys():
            break
    else:
        return None
    splits = {split: path.read_text(encoding="utf-8").split() for split, path in lists.items()}
    seen: set[str] = set()
    for split, cases in splits.items():
        for case in cases:
            if case not in files:
                raise StudyError(
                    f"{split}.list names case '{case}', but there is no {case}/{FILE}; "
                    "complete the dataset or correct the list"
                )
            if case in seen:
                raise StudyError(f"{split}.list names case '{case}', which was listed before; correct the lists")
            seen.add(case)
    return splits


def _seeded(files: dict[str, str], seed: int) -> dict[str, list[str]]:
    cases = [str(case) for case in np.random.default_rng(seed).permutation(sorted(files))]
    test = max(1, round(TEST_SHARE * len(cases)))
    return {"train": cases[:-test], "test": cases[-test:]}
