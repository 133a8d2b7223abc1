"""What a source of cases is: the one contract that the case store needs to read any dataset.

A source lists its cases, in order, and reads one at a time; everything after that (checks, sub-sampling,
writing) is the same for all and lives in `mlrpl.data.prepare`. A new dataset is one new file with one such
class and one line in `mlrpl.data.SOURCES`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from mlrpl.errors import StudyError


class Options(BaseModel):
    """Base of a source's options: validated, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Entry:
    """One case of a source, before it is read; `files` are all it is read from, relative to the root."""

    id: str
    split: str  # "train" | "val" | "test"
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Raw:
    """One case as read: image (channels, x, y, z) float32, label (x, y, z) of any number type or None.

    `geometry` holds what a NIfTI needs beside the spacing (origin and direction); None where it is unknown.
    """

    image: np.ndarray
    label: np.ndarray | None
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)  # mm
    geometry: dict[str, list[float]] | None = None


class Source(Protocol):
    """A dataset in the form that people hold it; raises StudyError for whatever it cannot use."""

    Options: ClassVar[type[Options]]
    version: ClassVar[int]  # raise when the source makes other cases of the same input: they are prepared again
    needs_folder: ClassVar[bool]  # False: the source makes its cases itself
    classes: tuple[str, ...]  # background first
    channels: int
    real_spacing: bool
    licence: str
    citation: str
    split: str  # where the splits come from: "published" | "seeded" | "drawn"
    entries: list[Entry]  # training cases in the order of the list: the first n are the labelled ones

    def __init__(self, options: Any, root: Path | None) -> None: ...

    def read(self, entry: Entry) -> Raw:
        """Read one case, z-scored where the dataset asks for it; StudyError names the file that is wrong."""
        ...


def parse_options(source: type[Source], name: str, options: Mapping[str, Any]) -> Options:
    """Validate a source's options; StudyError names the first option that is wrong."""
    try:
        return source.Options(**options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        known = ", ".join(source.Options.model_fields) or "none"
        raise StudyError(f"dataset option '{where}' of source '{name}': {first['msg']}; known: {known}") from None


def z_score(image: np.ndarray, name: str) -> np.ndarray:
    """Each channel of (channels, x, y, z) to mean 0 and standard deviation 1, as float32."""
    axes = tuple(range(1, image.ndim))
    image = image.astype(np.float64)
    deviation = image.std(axis=axes, keepdims=True)
    if not deviation.all():
        raise StudyError(f"{name}: every voxel of a channel has the same value; replace or remove the image")
    return ((image - image.mean(axis=axes, keepdims=True)) / deviation).astype(np.float32)
