"""The embedded dataset: chest volumes drawn by seed, with a left atrium to find.

A case is a stylised cardiac MRI. The atrium is a body with four pulmonary veins and an appendage, joined
smoothly; around it lie structures of the same blood signal (ventricles, right atrium, aorta, pulmonary artery,
caval vein, lung vessels) and others in between (heart muscle, liver, oesophagus, vertebrae). Some touch the
atrium: the wall has a gap at the mitral valve, and the veins run on into the lungs beyond the end of the label,
as in the annotation of real atria. Position, size, shape, directions, contrast, bias field, blur and noise vary
from case to case.

Lengths are in units of 1/64 of the field of view, directions as in an axial slice of a supine patient:
x to the patient's left, y to the back, z to the head.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field
from scipy.ndimage import gaussian_filter

from mlrpl.config import Model
from mlrpl.data.preparation import Preparation, z_score
from mlrpl.data.source import CaseEntry, Raw, Rejected

SPLITS = {"train": 0, "test": 1}
GREY_LEVELS = 1000  # whole grey levels, so that the last bit of a float, which machines differ in, is rounded away

Side = Annotated[int, Field(ge=16, le=1024)]


class PhantomOptions(Model):
    """How many cases of each split, drawn from which seed, of how many voxels."""

    train: int = Field(40, ge=1)
    test: int = Field(10, ge=1)
    seed: int = Field(0, ge=0)
    size: tuple[Side, Side, Side] = (64, 64, 40)


class Phantom:
    """Source `phantom`: needs no folder."""

    Options: ClassVar = PhantomOptions
    version: ClassVar = 2
    needs_folder: ClassVar = False
    classes = ("background", "atrium")
    channels = 1
    real_spacing = False
    licence = "MIT, as this repository"
    citation = "drawn by mlrpl.data.phantom"
    split = "drawn"
    form = "drawn"
    preparation = Preparation()
    lenient = False
    rejected: ClassVar[list[Rejected]] = []

    def __init__(self, options: PhantomOptions, root: Path | None = None) -> None:
        self.options = options
        self.entries = [
            CaseEntry(f"{split}-{number:03d}", split) for split in SPLITS for number in range(getattr(options, split))
        ]

    def read(self, entry: CaseEntry) -> Raw:
        """Draw one case: a function of the seed, its split and its number alone."""
        split, number = entry.id.split("-")
        image, label = draw(np.random.default_rng([self.options.seed, SPLITS[split], int(number)]), self.options.size)
        return Raw(z_score(image[None], entry.id), label)


def draw(random: np.random.Generator, size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """One phantom: image of whole grey levels (float64) and label (uint8, 1 = atrium), both (x, y, z)."""
    points = _anatomical_grid(random, size)
    body, veins, far_veins, appendage = _atrium(random, points)
    atrium = _union(_union(body, veins, 4), appendage, 3)
    tissue = _surroundings(random, points, atrium, far_veins)
    return _scan(random, tissue), (atrium < 0).astype(np.uint8)


def _anatomical_grid(random: np.random.Generator, size: Sequence[int]) -> np.ndarray:
    """Anatomical coordinates (3, x, y, z) of every voxel: moved, turned, scaled and smoothly deformed."""
    unit = min(size[0], size[1], 1.6 * size[2]) / 64  # voxels
    grid = np.stack(np.meshgrid(*((np.arange(n) - (n - 1) / 2) / unit for n in size), indexing="ij"))
    turn, tilt = np.deg2rad(random.normal(0, (8, 5)))
    matrix = _rotation(2, turn) @ _rotation(0, tilt) / random.uniform(1, 1.22)
    moved = grid - random.normal(0, (3, 3, 2)).reshape(3, 1, 1, 1)
    points = np.tensordot(matrix, moved, axes=1)
    return points + np.stack([_smooth_field(random, size, modes=5, amplitude=1.7) for _ in range(3)])


def _atrium(random: np.random.Generator, points: np.ndarray) -> tuple[np.ndarray, ...]:
    """Signed distances of the atrium's body, its veins as labelled, its veins as far as they run, its appendage."""
    radii = random.uniform((11, 7.5, 7.5), (16, 10.5, 11))
    body = _ellipsoid(points, (0, 0, 0), radii, turn=random.normal(0, 0.25))
    near, far = [], []
    for direction in ((-1, 0.1, 0.65), (-1, 0.55, -0.3), (1, 0.15, 0.6), (1, 0.6, -0.25)):
        direction = _unit(np.array(direction) + random.normal(0, 0.22, 3))
        surface = direction / np.linalg.norm(direction / radii)
        radius = random.uniform(2.2, 3.6)
        end = surface + direction * random.uniform(4.5, 7.5)
        onward = end + _unit(direction + random.normal(0, 0.35, 3)) * 22
        near.append(_tube(points, (0.6 * surface, end), (1.15 * radius, radius)))
        far.append(_tube(points, (end, onward), (radius, 0.35 * radius)))
    root = radii * (0.75, -0.55, 0.3)
    bend = root + (_unit(np.array((0.6, -1, 0.3)) + random.normal(0, 0.3, 3))) * random.uniform(3, 6.5)
    tip = bend + (_unit(np.array((-0.1, -1, -0.2)) + random.normal(0, 0.5, 3))) * random.uniform(2, 6)
    appendage = _tube(points, (root, bend, tip), (random.uniform(2.5, 3.6), random.uniform(2, 3.4), 1.2))
    return body, np.minimum.reduce(near), np.minimum.reduce(far), appendage


def _surroundings(random: np.random.Generator, points: np.ndarray, atrium: np.ndarray, veins: np.ndarray) -> np.ndarray:
    """Signal of every voxel (x, y, z), blood about 1, before the scanner: painted from the back to the front."""

    def near(*centre: float) -> np.ndarray:
        return np.array(centre) + random.normal(0, 1.6, 3)

    def sized(*radii: float) -> np.ndarray:
        return np.array(radii) * random.uniform(0.85, 1.15)

    blood, right_blood = 1.0, random.normal(0.92, 0.08)
    muscle, soft, lung = random.uniform(0.4, 0.6), random.uniform(0.3, 0.45), random.uniform(0.1, 0.18)
    size = points.shape[1:]

    signal = np.full(size, lung)
    lung_vessels = gaussian_filter(random.standard_normal(size), 1.2, mode="wrap")
    signal[lung_vessels > 2.1 * lung_vessels.std()] = 0.8
    signal[_ellipsoid(points, near(0, -6, 0), sized(25, 21, 50)) < 0] = soft
    signal[_ellipsoid(points, near(-15, -14, -28), sized(25, 22, 15)) < 0] = random.uniform(0.5, 0.85)  # liver

    up = np.array((0, 0, 60))
    spine = np.array((-3, 29, 0)) + random.normal(0, (2, 1.5, 4))
    disc = np.cos((points[2] - spine[2]) * (2 * np.pi / 15)) > 0.8
    vertebrae = _tube(points, (spine - up, spine + up), (random.uniform(9, 12),) * 2)
    signal[vertebrae < 1.2] = soft
    signal[vertebrae < 0] = random.uniform(0.2, 0.55)
    signal[(vertebrae < 0) & disc] = random.uniform(0.15, 0.7)

    left_ventricle = _ellipsoid(points, near(15, -13, -13), sized(13, 10, 13), turn=random.normal(0.5, 0.2))
    right_ventricle = _ellipsoid(points, near(-1, -27, -13), sized(16, 9, 12), turn=random.normal(0.3, 0.2))
    signal[left_ventricle < random.uniform(2.5, 4.5)] = muscle
    signal[right_ventricle < 1.2] = muscle
    signal[left_ventricle < 0] = blood * random.normal(1, 0.05)
    signal[right_ventricle < 0] = right_blood * random.normal(1, 0.05)
    right_atrium = _ellipsoid(points, near(-17, -12, -7), sized(11, 10, 12))
    caval_vein = _tube(points, (near(-17, -10, 0), near(-16, -10, 30)), sized(3.6, 3.4))
    right_atrium = np.minimum(right_atrium, caval_vein)
    signal[right_atrium < 1] = muscle
    signal[right_atrium < 0] = right_blood * random.normal(1, 0.06)

    oesophagus = near(1, 12.5, 0)
    vessels = (  # signal, points along the axis, radii
        (soft * random.uniform(0.9, 1.5), (oesophagus - up, oesophagus + up), (2.6, 2.6)),
        (right_blood, (near(5, -23, -4), near(7, -13, 11), near(-24, -1, 14)), sized(5, 4.6, 3.4)),  # pulmonary artery
        (right_blood, (near(7, -13, 11), near(22, 5, 15)), sized(4.6, 3.4)),
        (blood, (near(0, -13, -5), near(-6, -18, 8), near(-7, -18, 30)), sized(5.5, 5.5, 5.2)),  # ascending aorta
        (blood, (near(8, 17, -30), near(9, 16, 30)), sized(5, 4.8)),  # descending aorta
    )
    for value, axis, radii in vessels:
        distance = _tube(points, axis, radii)
        signal[(distance < 0.8) & (signal > lung)] = muscle
        signal[distance < 0] = value * random.normal(1, 0.05)
    signal[veins < 0] = blood

    # the atrium's wall, with scar of bright signal here and there and a gap at the mitral valve
    wall = (atrium >= 0) & (atrium < random.uniform(0.8, 1.4)) & (veins >= 0)
    scar = _smooth_field(random, size, modes=7, amplitude=1) > random.uniform(1, 2)
    valve = left_ventricle < random.uniform(1.5, 4)
    signal[wall] = muscle
    signal[wall & scar] = 1.2 * blood
    signal[wall & valve] = blood * random.uniform(0.8, 1)
    signal[atrium < 0] = blood * random.normal(1, 0.04)
    return signal


def _scan(random: np.random.Generator, signal: np.ndarray) -> np.ndarray:
    """What the scanner makes of it: texture, contrast, bias field, blur, Rician noise; whole grey levels."""
    size = signal.shape
    signal = signal * (1 + 0.06 * _smooth_field(random, size, modes=9, amplitude=1))
    signal = signal ** random.uniform(0.85, 1.2)
    signal = gaussian_filter(signal, (*[random.uniform(0.45, 0.8)] * 2, random.uniform(0.5, 1)))
    signal = signal * np.exp(_smooth_field(random, size, modes=3, amplitude=random.uniform(0.05, 0.15)))
    noise = random.uniform(0.05, 0.11)
    real, imaginary = random.normal(0, noise, (2, *size))
    return np.rint(GREY_LEVELS * np.hypot(signal + real, imaginary))


def _smooth_field(random: np.random.Generator, size: Sequence[int], modes: int, amplitude: float) -> np.ndarray:
    """Random field (x, y, z) of the lowest cosine modes, mean 0, standard deviation about `amplitude`."""
    index = np.arange(modes)
    weights = random.standard_normal((modes,) * 3) / (1 + sum(np.ix_(index**2, index**2, index**2)))
    weights[0, 0, 0] = 0
    weights *= amplitude * np.sqrt(8) / np.linalg.norm(weights)
    for n in size:  # separable: one axis after the other, each moved to the end
        cosines = np.cos(np.pi * np.outer(index, (np.arange(n) + 0.5) / n))
        weights = np.tensordot(weights, cosines, axes=(0, 0))
    return weights


def _ellipsoid(points: np.ndarray, centre: Sequence[float], radii: Sequence[float], turn: float = 0.0) -> np.ndarray:
    """About the signed distance (negative inside) to an ellipsoid turned about z by `turn` radians."""
    matrix = _rotation(2, turn) / np.asarray(radii)[:, None]
    local = np.tensordot(matrix, points - np.reshape(centre, (3, 1, 1, 1)), axes=1)
    return (np.sqrt(np.einsum("ixyz,ixyz->xyz", local, local)) - 1) * min(radii)


def _tube(points: np.ndarray, axis: Sequence[np.ndarray], radii: Sequence[float]) -> np.ndarray:
    """Signed distance (negative inside) to a tube along a polyline, its radius linear between the vertices."""
    distances = []
    for start, end, first, last in zip(axis[:-1], axis[1:], radii[:-1], radii[1:], strict=True):
        along = np.asarray(end) - start
        offset = points - np.reshape(start, (3, 1, 1, 1))
        share = np.clip(np.tensordot(along / (along @ along), offset, axes=1), 0, 1)
        offset -= along.reshape(3, 1, 1, 1) * share
        distances.append(np.sqrt(np.einsum("ixyz,ixyz->xyz", offset, offset)) - (first + (last - first) * share))
    return np.minimum.reduce(distances)


def _union(a: np.ndarray, b: np.ndarray, width: float) -> np.ndarray:
    """Union of two signed distances, rounded where they meet over `width`."""
    overlap = np.maximum(width - np.abs(a - b), 0) / width
    return np.minimum(a, b) - overlap * overlap * width / 4


def _rotation(axis: int, angle: float) -> np.ndarray:
    matrix = np.eye(3)
    i, j = (k for k in range(3) if k != axis)
    matrix[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    return matrix


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)
