"""Where voxels lie: geometry of a volume, its axes turned to the patient's, its voxels resampled, and both undone.

A geometry is {"spacing": 3 numbers in mm, "origin": 3 in mm, "direction": 9, row by row}, in the patient's frame of
DICOM (x to the left, y to the back, z to the head). Arrays are (channels, x, y, z).
"""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from mlrpl.errors import StudyError

if TYPE_CHECKING:
    import SimpleITK

Geometry = dict[str, list[float]]
Volume = tuple[np.ndarray, Geometry]  # an array and where it lies
UNUSUAL = 1.25  # sides of voxels


def difference(geometry: Mapping[str, list[float]], expected: Mapping[str, list[float]]) -> str | None:
    """In what two grids of one size differ by more than about a tenth of a voxel; None where they lie alike."""
    voxel = min(expected["spacing"])
    for key, tolerance in (("spacing", 0.01 * voxel), ("origin", 0.1 * voxel), ("direction", 0.01)):
        if not np.allclose(geometry[key], expected[key], rtol=0, atol=tolerance):
            return key
    return None


def check_same_grid(name: str, volume: Volume, other: str, expected: Volume) -> None:
    """StudyError unless both are of one size and lie alike in space: a flipped label would train without a word."""
    mine, theirs = ({"shape": array.shape[1:], **geometry} for array, geometry in (volume, expected))
    key = "shape" if mine["shape"] != theirs["shape"] else difference(mine, theirs)
    if key:
        raise StudyError(
            f"{name}: its {key} {_short(mine[key])} is not that of {other}, {_short(theirs[key])}; "
            "export both on the same grid"
        )


def to_patient_axes(array: np.ndarray, geometry: Geometry) -> Volume:
    """The same voxels, axes as near as may be to the patient's left, back and head: permuted and flipped, a view."""
    axes, signs = _axes(geometry)
    direction, spacing = np.reshape(geometry["direction"], (3, 3)), np.array(geometry["spacing"])
    size = array.shape[-3:]
    origin = np.array(geometry["origin"], dtype=float)
    for axis, sign in zip(axes, signs, strict=True):
        if sign < 0:
            origin += direction[:, axis] * spacing[axis] * (size[axis] - 1)
    turned = array.transpose(0, *(axis + 1 for axis in axes))
    turned = turned[(slice(None), *(slice(None, None, sign) for sign in signs))]
    columns = direction[:, axes] * signs
    return turned, _geometry(spacing[axes], origin, columns)


def from_patient_axes(array: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Undo `to_patient_axes` on an array (…, x, y, z); `geometry` is the one that it was given."""
    axes, signs = _axes(geometry)
    flipped = array[(..., *(slice(None, None, sign) for sign in signs))]
    leading = range(array.ndim - 3)
    return flipped.transpose(*leading, *(np.argsort(axes) + array.ndim - 3))


def _axes(geometry: Mapping[str, list[float]]) -> tuple[list[int], list[int]]:
    """For each of the patient's axes the array's axis that is nearest to it, and whether it points the same way."""
    from scipy.optimize import linear_sum_assignment  # here, since training alone does not need it

    direction = np.reshape(geometry["direction"], (3, 3))
    axes = linear_sum_assignment(-np.abs(direction))[1].tolist()
    return axes, [1 if direction[i, axis] > 0 else -1 for i, axis in enumerate(axes)]


def with_spacing(size: Sequence[int], geometry: Geometry, spacing: Sequence[float]) -> tuple[tuple[int, ...], Geometry]:
    """Size and geometry of a grid over the same field of view, with another spacing."""
    old, new = np.array(geometry["spacing"]), np.array(spacing, dtype=float)
    count = np.maximum(np.rint(np.array(size) * old / new), 1).astype(int)
    direction = np.reshape(geometry["direction"], (3, 3))
    centre = np.array(geometry["origin"]) + direction @ ((np.array(size) - 1) / 2 * old)
    origin = centre - direction @ ((count - 1) / 2 * new)
    return tuple(count.tolist()), _geometry(new, origin, direction)


def resample(
    array: np.ndarray, geometry: Geometry, size: Sequence[int], target: Geometry, interpolation: str
) -> np.ndarray:
    """Values of one volume (x, y, z) at the voxels of another grid, by place in space.

    Args:
        array: float32, or uint8 for labels.
        geometry: where it lies.
        size: of the other grid.
        target: its geometry.
        interpolation: "bspline" (order 3), "linear" or "nearest". Outside of the volume, "bspline" and "linear" go on
            with the border's value and "nearest" is 0.
    """
    itk = simpleitk()
    kinds = {"bspline": itk.sitkBSpline, "linear": itk.sitkLinear, "nearest": itk.sitkNearestNeighbor}
    resampler = itk.ResampleImageFilter()
    resampler.SetInterpolator(kinds[interpolation])
    resampler.SetSize([int(n) for n in size])
    resampler.SetOutputSpacing(target["spacing"])
    resampler.SetOutputOrigin(target["origin"])
    resampler.SetOutputDirection(target["direction"])
    resampler.SetUseNearestNeighborExtrapolator(interpolation != "nearest")
    return itk.GetArrayFromImage(resampler.Execute(to_itk(array, geometry))).transpose()


def simpleitk() -> ModuleType:
    """SimpleITK, imported where it is first used: training must do without, since clusters may lack it."""
    import SimpleITK

    return SimpleITK


def to_itk(array: np.ndarray, geometry: Geometry) -> "SimpleITK.Image":
    """An ITK image of a volume (x, y, z)."""
    image = simpleitk().GetImageFromArray(np.ascontiguousarray(array.transpose()))
    image.SetSpacing(geometry["spacing"])
    image.SetOrigin(geometry["origin"])
    image.SetDirection(geometry["direction"])
    return image


def moved(geometry: Geometry, start: Sequence[int]) -> Geometry:
    """The geometry of a part of the volume that begins at voxel `start`."""
    direction = np.reshape(geometry["direction"], (3, 3))
    origin = np.array(geometry["origin"]) + direction @ (np.array(start) * np.array(geometry["spacing"]))
    return _geometry(geometry["spacing"], origin, direction)


def _geometry(spacing: Sequence[float], origin: np.ndarray, direction: np.ndarray) -> Geometry:
    parts = {"spacing": spacing, "origin": origin, "direction": direction}
    # + 0.0 turns -0.0 into 0.0
    return {key: (np.asarray(value, dtype=float).ravel() + 0.0).tolist() for key, value in parts.items()}


def _short(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in values) + ")"


def other_voxels(spacing: Sequence[float] | np.ndarray, usual: Sequence[float] | np.ndarray) -> bool:
    """Whether a side of a voxel (mm) is a quarter longer or shorter than usual: a network sees such shapes anew."""
    return bool(np.abs(np.log(np.asarray(spacing) / np.asarray(usual))).max() > np.log(UNUSUAL))
