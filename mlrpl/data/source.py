"""What a source of cases is: the one contract that the case store needs to read any dataset.

A source lists its cases, in order, and reads one at a time; everything after that (checks, sub-sampling,
writing) is the same for all and lives in `mlrpl.data.prepare`. A new dataset is one new file with one such
class and one line in `mlrpl.data.SOURCES`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from mlrpl.config import Model
from mlrpl.data.preparation import Preparation


@dataclass(frozen=True)
class CaseEntry:
    """One case of a source, before it is read; `files` are all it is read from, relative to the root."""

    id: str
    split: str  # "train" | "val" | "test"
    files: tuple[str, ...] = ()  # a folder stands for all files in it


@dataclass(frozen=True)
class Raw:
    """One case as read: image (channels, x, y, z) float32, label (x, y, z) of any number type or None.

    Attributes:
        geometry: what a NIfTI needs beside the spacing (origin and direction); None where it is unknown.
        original: shape, spacing, origin and direction of the file's own grid, where they are known.
        scale: mean and standard deviation that each channel was scaled by, where a new image cannot be scaled by its
            own.
    """

    image: np.ndarray
    label: np.ndarray | None
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)  # mm
    geometry: dict[str, list[float]] | None = None
    original: dict[str, list[float]] | None = None
    scale: list[tuple[float, float]] | None = None


@dataclass(frozen=True)
class Rejected:
    """A case, or a file that makes none, that was left out, and why; of a case the checksums of its files."""

    case: str
    problem: str
    sources: list[str] | None = None  # None where a file is missing


class Source(Protocol):
    """A dataset in the form that people hold it; raises StudyError for whatever it cannot use."""

    Options: ClassVar[type[Model]]
    version: ClassVar[int]  # raise when the source makes other cases of the same input: they are prepared again
    needs_folder: ClassVar[bool]  # False: the source makes its cases itself
    classes: tuple[str, ...]  # background first
    channels: int
    real_spacing: bool
    licence: str
    citation: str
    split: str  # where the splits come from: "published" | "seeded" | "drawn"
    entries: list[CaseEntry]  # training cases in the order of the list: the first n are the labelled ones
    form: str  # what was found, for people: "prepared", "raw", …
    preparation: Preparation  # how a new image is made ready for a network that was trained on this data
    lenient: bool  # whether faulty cases are left out instead of refused as a whole
    rejected: list[Rejected]  # what listing the cases left out already

    def __init__(self, options: Any, root: Path | None) -> None: ...

    def read(self, entry: CaseEntry) -> Raw:
        """Read one case, z-scored where the dataset asks for it; StudyError names the file that is wrong."""
        ...
