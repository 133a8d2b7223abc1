"""Volumes from NIfTI files, axes x, y, z as in the file, with the geometry that writing a prediction back needs."""

import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import SimpleITK

from mlrpl.data.bounds import TRAILING, check_nifti, read_bounded
from mlrpl.errors import StudyError

ENDINGS = (".nii.gz", ".nii")
FLOATS = {16: "f4", 64: "f8"}  # of NIfTI's data types
HEADER_SIZES = (348, 540)  # NIfTI-1 and 2; read with the wrong byte order they are other numbers
Geometry = dict[str, list[float]]  # spacing (3, mm), origin (3, mm), direction (9, row by row)


def read_nifti(root: Path, name: str) -> tuple[np.ndarray, Geometry]:
    """Volume (channels, x, y, z) and geometry of <root>/<name>; StudyError when it is unreadable or cut short."""
    try:
        size = check_nifti(root / name, name)
        volume = SimpleITK.ReadImage(str(root / name))
        stored = _stored_voxels(root / name, volume, size)
    except (RuntimeError, OSError, EOFError, ValueError, zlib.error):
        raise StudyError(f"{name}: cannot be read as NIfTI, it may be cut short; copy it again") from None
    bad = np.count_nonzero(~np.isfinite(stored))
    if bad:
        raise StudyError(f"{name}: {bad} voxels are NaN or infinite; repair or remove the case")
    array = SimpleITK.GetArrayFromImage(volume)  # (z, y, x), (channel, z, y, x) or (z, y, x, component)
    if volume.GetNumberOfComponentsPerPixel() > 1:
        array = np.moveaxis(array, -1, 0)
    elif volume.GetDimension() == 3:
        array = array[None]
    if volume.GetDimension() not in (3, 4) or array.ndim != 4:
        raise StudyError(f"{name}: a volume of {volume.GetDimension()} dimensions; it must have 3, or 4 with channels")
    direction = np.reshape(volume.GetDirection(), (volume.GetDimension(),) * 2)[:3, :3]
    geometry = {"spacing": volume.GetSpacing()[:3], "origin": volume.GetOrigin()[:3], "direction": direction.ravel()}
    return array.transpose(0, 3, 2, 1), {key: [float(v) for v in value] for key, value in geometry.items()}


def check_same_grid(
    name: str, geometry: Mapping[str, list[float]], other: str, expected: Mapping[str, list[float]]
) -> None:
    """StudyError unless both lie alike in space, to a tenth of a voxel: a flipped label would train without a word."""
    voxel = min(expected["spacing"])
    for key, tolerance in (("spacing", 0.01 * voxel), ("origin", 0.1 * voxel), ("direction", 0.01)):
        if not np.allclose(geometry[key], expected[key], rtol=0, atol=tolerance):
            raise StudyError(
                f"{name}: its {key} {_short(geometry[key])} is not that of {other}, "
                f"{_short(expected[key])}; export both on the same grid"
            )


def nifti_files(folder: Path) -> dict[str, str]:
    """NIfTI files of a folder by name without ending; hidden files (macOS leaves some) are not data."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    files: dict[str, str] = {}
    for name in names:
        if not name.startswith(".") and name.endswith(ENDINGS):
            case = name.removesuffix(ending(name))
            if case in files:
                raise StudyError(f"{folder.name}: both {files[case]} and {name}; remove one of them")
            files[case] = name
    return files


def ending(name: str) -> str:
    """The NIfTI ending of a file name, empty where it has none."""
    return next((known for known in ENDINGS if name.endswith(known)), "")


def _stored_voxels(path: Path, volume: SimpleITK.Image, size: int) -> np.ndarray:
    """The numbers as they lie in the file; whole numbers as bytes, since they need no look.

    ITK reads a file that is cut short as zeros, and NaN as zero, without a word: hence this look at the file. Raises
    ValueError when it is shorter than its header says, and gzip's errors.
    """
    data = read_bounded(path, size + TRAILING)
    header = {key: int(float(volume.GetMetaData(key))) for key in ("vox_offset", "bitpix", "datatype", "dim[0]")}
    count = math.prod(int(volume.GetMetaData(f"dim[{axis + 1}]")) for axis in range(header["dim[0]"]))
    order = "<" if int.from_bytes(data[:4], "little") in HEADER_SIZES else ">"
    dtype = f"{order}{FLOATS[header['datatype']]}" if header["datatype"] in FLOATS else f"V{header['bitpix'] // 8}"
    stored = np.frombuffer(data, dtype, count, header["vox_offset"])
    return stored if header["datatype"] in FLOATS else stored.view(np.uint8)


def _short(values: list[float]) -> str:
    return "(" + ", ".join(f"{value:.3g}" for value in values) + ")"
