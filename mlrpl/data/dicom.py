"""A folder of DICOM slices as a volume: series told apart, slices in the order of their place, values after rescale."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlrpl.data.grid import Volume, simpleitk
from mlrpl.errors import StudyError

SERIES, POSITION, ORIENTATION = "0020|000e", "0020|0032", "0020|0037"
TOLERANCE = 0.01  # of the distance between slices, and of a direction's components


@dataclass(frozen=True)
class Slice:
    """One file: where it lies; nothing of the patient is read."""

    path: Path
    position: tuple[float, ...]  # mm, of its first voxel
    orientation: tuple[float, ...]  # directions of a row and of a column


def find_series(folder: Path) -> list[list[Slice]]:
    """The series in a folder and below, those with most slices first; other files are passed over."""
    found: dict[str, list[Slice]] = defaultdict(list)
    reader = simpleitk().ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    for path in sorted(folder.rglob("*")):
        if path.name.startswith(".") or not path.is_file():
            continue
        reader.SetFileName(str(path))
        try:
            reader.ReadImageInformation()
            position, orientation = (_numbers(reader.GetMetaData(tag)) for tag in (POSITION, ORIENTATION))
            series = reader.GetMetaData(SERIES)
        except (RuntimeError, ValueError):
            continue
        if len(position) == 3 and len(orientation) == 6:
            found[series.strip()].append(Slice(path, position, orientation))
    return sorted(found.values(), key=len, reverse=True)


def read_dicom(folder: Path, name: str, slices: int | None = None) -> Volume:
    """Volume (x, y, z), float32 after rescale slope and intercept (HU in CT), and geometry of a folder's series.

    Args:
        folder: holds the slices in whatever order, possibly of several series.
        name: for messages.
        slices: choose the series with so many; default: the one with most.

    Raises:
        StudyError: where there is no series or more than one to choose from, or slices are missing, doubled or askew.
    """
    series = find_series(folder)
    if not series:
        raise StudyError(f"{name}: no DICOM image with a position in this folder; give the folder of a series")
    chosen = [s for s in series if len(s) == (slices or len(series[0]))] or [
        s for s in series if len(s) == len(series[0])
    ]
    if len(chosen) > 1:
        raise StudyError(f"{name}: {len(chosen)} series of {len(chosen[0])} slices; give a folder with one of them")
    ordered, step, normal = _ordered(chosen[0], name)
    reader = simpleitk().ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetOutputPixelType(simpleitk().sitkFloat32)  # a slice's slope may be a fraction where the first's is none
    reader.SetFileNames([str(s.path) for s in ordered])
    try:
        volume = reader.Execute()
    except RuntimeError:
        raise StudyError(f"{name}: its slices cannot be read as one volume; copy the folder again") from None
    row, column = np.reshape(ordered[0].orientation, (2, 3))
    geometry = {
        "spacing": [*map(float, volume.GetSpacing()[:2]), step],
        "origin": list(ordered[0].position),
        "direction": np.stack([row, column, normal], axis=1).ravel().tolist(),
    }
    return simpleitk().GetArrayFromImage(volume).transpose(), geometry


def _ordered(slices: list[Slice], name: str) -> tuple[list[Slice], float, np.ndarray]:
    """Slices by place along their normal, the distance between them in mm, the normal."""
    orientation = np.array(slices[0].orientation)
    normal = np.cross(orientation[:3], orientation[3:])
    if any(not np.allclose(s.orientation, orientation, rtol=0, atol=TOLERANCE) for s in slices):
        raise StudyError(f"{name}: its slices have different orientations; give a folder with one series")
    places = np.array([normal @ s.position for s in slices])
    order = np.argsort(places, kind="stable")
    if len(slices) < 2:
        raise StudyError(f"{name}: one slice is no volume; give the folder of a whole series")
    steps = np.diff(places[order])
    step = float(np.median(steps))
    if steps.min() < TOLERANCE * step or step <= 0:
        raise StudyError(f"{name}: two slices lie at the same place; remove one of them")
    if np.abs(steps - step).max() > max(TOLERANCE * step, 0.01):
        at = int(np.abs(steps - step).argmax())
        raise StudyError(
            f"{name}: slices {at + 1} and {at + 2} are {steps[at]:.2f} mm apart, others {step:.2f} mm; "
            "slices are missing, so complete the series"
        )
    positions = np.array([slices[i].position for i in order])
    askew = np.abs(positions - positions[0] - np.outer(places[order] - places[order[0]], normal)).max()
    if askew > max(TOLERANCE * step, 0.01):
        raise StudyError(
            f"{name}: its slices are shifted against each other by up to {askew:.2f} mm; resample it first"
        )
    return [slices[i] for i in order], float(steps.mean()), normal


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split("\\"))
