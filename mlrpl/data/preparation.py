"""From an image as it lies in a file to what a network sees, and from its answer back to the image's own grid.

The same steps serve the case store and prediction: axes turned to the patient's, voxels resampled, channels normalised.
All settings are numbers of the data set as a whole or of the image itself; no label is needed.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from mlrpl.config import Model
from mlrpl.data.grid import (
    Geometry,
    Volume,
    difference,
    from_patient_axes,
    moved,
    resample,
    to_patient_axes,
    with_spacing,
)
from mlrpl.errors import StudyError
from mlrpl.masks import bounding_box

SAME_SPACING = 0.01  # relative difference below which an image keeps its voxels
Millimetres = Annotated[float, Field(gt=0)]
Bound = Annotated[float, Field(allow_inf_nan=True)]  # infinite: nothing is clipped there


class Window(Model):
    """Clip to low … high, then subtract `mean` and divide by `sd`; without these, the image's own after clipping."""

    low: Bound
    high: Bound
    mean: float | None = None
    sd: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def ordered(self) -> "Window":
        """A window has a width."""
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        return self


Normalisation = Literal["z-score", "brain"] | Window


@dataclass(frozen=True)
class Prepared:
    """An image as the network sees it (channels, x, y, z), where it lies, and where it came from."""

    image: np.ndarray
    geometry: Geometry
    original_size: tuple[int, ...]
    original: Geometry
    resampled: bool  # whether voxels were changed, beyond the order of axes

    def part(self, box: tuple[slice, ...]) -> tuple[np.ndarray, tuple[float, ...], Geometry]:
        """Image, spacing, and origin and direction of a box of voxels."""
        place = moved(self.geometry, [side.start or 0 for side in box])
        return self.image[:, *box], tuple(place.pop("spacing")), place

    @property
    def source(self) -> dict[str, list[float]]:
        """Shape and geometry of the original."""
        return {"shape": list(self.original_size), **self.original}


class Preparation(Model):
    """What is done to every image.

    Attributes:
        axes: "file": as stored; "patient": turned to run as nearly as may be to the patient's left, back, head.
        spacing: mm to resample to (in the order of the turned axes), or None to keep each image's own.
        channels: one entry a channel; or one for all. "z-score": mean 0, deviation 1 over the volume; "brain": clipped
            at the 99.9th percentile of the box of non-zero voxels, then mean and deviation of these; or a `Window`.
    """

    axes: Literal["file", "patient"] = "file"
    spacing: tuple[Millimetres, Millimetres, Millimetres] | None = None
    channels: Annotated[tuple[Normalisation, ...], Field(min_length=1)] = ("z-score",)

    def apply(self, image: np.ndarray, geometry: Geometry, name: str) -> Prepared:
        """Prepare an image (channels, x, y, z).

        Args:
            image: of any number type.
            geometry: where it lies.
            name: for messages.

        Raises:
            StudyError: for a channel without contrast, or another number of channels.
        """
        turned, place = self._turned(image, geometry)
        size, target = turned.shape[1:], place
        if self.spacing and not np.allclose(place["spacing"], self.spacing, rtol=SAME_SPACING, atol=0):
            size, target = with_spacing(size, place, self.spacing)
            turned = np.stack([resample(c.astype(np.float32), place, size, target, "bspline") for c in turned])
        return Prepared(self.normalise(turned, name), target, image.shape[1:], geometry, target is not place)

    def label(self, label: np.ndarray, geometry: Geometry, prepared: Prepared) -> np.ndarray:
        """A label (x, y, z) of whole numbers at the voxels of a prepared image, by place in space."""
        turned, place = self._turned(label[None], geometry)
        size = prepared.image.shape[1:]
        if turned.shape[1:] == size and not difference(place, prepared.geometry):
            return turned[0]
        return resample(turned[0], place, size, prepared.geometry, "nearest")

    def _turned(self, array: np.ndarray, geometry: Geometry) -> Volume:
        return (array, geometry) if self.axes == "file" else to_patient_axes(array, geometry)

    def normalise(self, image: np.ndarray, name: str) -> np.ndarray:
        """Each channel of (channels, x, y, z), as float32."""
        if len(self.channels) == 1:
            return _normalised(image, self.channels[0], name)
        if len(self.channels) != len(image):
            raise StudyError(
                f"{name}: {len(image)} channels, but the data set has {len(self.channels)}; give all of them"
            )
        return np.concatenate([_normalised(image[i : i + 1], kind, name) for i, kind in enumerate(self.channels)])

    def scaled(self, scale: list[tuple[float, float]]) -> "Preparation":
        """The same with mean and deviation of each channel where a window has none."""
        channels = [
            kind.model_copy(update={"mean": mean, "sd": deviation})
            if isinstance(kind, Window) and kind.mean is None
            else kind
            for kind, (mean, deviation) in zip(self.channels, scale, strict=True)
        ]
        return self.model_copy(update={"channels": tuple(channels)})

    def restore(self, values: np.ndarray, prepared: Prepared) -> np.ndarray:
        """Values (x, y, z) of any kind that belong to the prepared image's voxels, on the original grid.

        Exact where no voxel was resampled; else by linear interpolation, as float32.
        """
        if prepared.resampled:
            return resample(
                values.astype(np.float32), prepared.geometry, prepared.original_size, prepared.original, "linear"
            )
        return values if self.axes == "file" else from_patient_axes(values, prepared.original)


def _normalised(image: np.ndarray, kind: Normalisation, name: str) -> np.ndarray:
    if kind == "z-score":
        return z_score(image, name)
    if kind == "brain":
        return np.stack([_brain_score(channel, name) for channel in image])
    clipped = np.clip(image, kind.low, kind.high, dtype=np.float32)
    if kind.mean is None or kind.sd is None:
        return z_score(clipped, name)
    clipped -= np.float32(kind.mean)
    clipped /= np.float32(kind.sd)
    return clipped


def z_score(image: np.ndarray, name: str) -> np.ndarray:
    """Each channel of (channels, x, y, z) to mean 0 and standard deviation 1, as float32."""
    mean, deviation = moments(image)
    if not deviation.all():
        raise StudyError(f"{name}: every voxel of a channel has the same value; replace or remove the image")
    scaled = np.empty_like(image, dtype=np.float32)
    for z in range(image.shape[-1]):  # slice by slice, so that no second volume of float64 is held
        scaled[..., z : z + 1] = (image[..., z : z + 1].astype(np.float64) - mean) / deviation
    return scaled


def moments(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel (channels, 1, 1, 1), as numpy's `mean` and `std` to the last bit."""
    axes = tuple(range(1, image.ndim))
    work = image.astype(np.float64)
    mean = work.mean(axis=axes, keepdims=True)
    work -= mean
    np.multiply(work, work, out=work)
    return mean, np.sqrt(work.sum(axis=axes, keepdims=True) / (work.size // len(work)))


def nonzero_box(channel: np.ndarray, name: str) -> tuple[slice, ...]:
    """The smallest box around the non-zero voxels of (x, y, z); StudyError where there is none."""
    if (box := bounding_box(channel)) is None:
        raise StudyError(f"{name}: every voxel is zero; replace or remove the image")
    return box


def _brain_score(channel: np.ndarray, name: str) -> np.ndarray:
    """BraTS-2019's normalisation of (x, y, z): the skull was stripped, so that what is not zero is brain."""
    inside = channel[nonzero_box(channel, name)].astype(np.float32)
    top = np.percentile(inside, 99.9)
    brain = np.minimum(inside[inside != 0], top).astype(np.float64)
    if not brain.std():
        raise StudyError(f"{name}: every voxel of the brain has the same value; replace or remove the image")
    return ((np.minimum(channel, top).astype(np.float64) - brain.mean()) / brain.std()).astype(np.float32)
