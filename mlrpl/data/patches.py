"""Random patches and the two-stream batches of semi-supervised training.

Every batch is a pure function of (seed, iteration): sample number p of a stream is case
permutation(seed, stream, p // cases)[p % cases], cropped and augmented with the generator of (seed, stream, p).
A run that is killed and resumed therefore sees the batches that it would have seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mlrpl.data.store import Case
from mlrpl.errors import StudyError

AUGMENTATIONS = ("rot90", "flip", "mirror")
LABELLED, UNLABELLED = 0, 1  # streams
ORDER, SAMPLE = 0, 1  # what randomness is for


@dataclass
class Batch:
    """Volumes of one iteration, the labelled ones first."""

    image: torch.Tensor  # float32 (N, channels, *patch)
    label: torch.Tensor  # int64 (n_labelled, *patch): of the labelled half alone


class Batches:
    """The batches of a training run, by iteration.

    labelled, unlabelled: cases in memory; a label of an unlabelled case is never read.
    patch: (x, y, z) voxels; a smaller volume is padded with zeros.
    augmentation: of "rot90" (k·90° in x-y, k drawn from 0…3), "flip" (always one flip, of x or y at random) and
        "mirror" (x flipped or not, at even odds: for anatomy that has a left and a right twin); all act on image and
        label alike, before the crop.
    sizes: how many labelled and unlabelled volumes a batch has.

    Raises StudyError when a stream that is asked for has no cases, a labelled case no label, or an augmentation
    is unknown.

    >>> batches = Batches(labelled, unlabelled, (48, 48, 32), ["flip"], seed=0)   # doctest: +SKIP
    >>> batches(1).image.shape                                                     # doctest: +SKIP
    torch.Size([4, 1, 48, 48, 32])
    """

    def __init__(
        self,
        labelled: Sequence[Case],
        unlabelled: Sequence[Case],
        patch: Sequence[int],
        augmentation: Sequence[str],
        seed: int,
        sizes: tuple[int, int] = (2, 2),
    ) -> None:
        self.streams = (tuple(labelled), tuple(unlabelled))
        self.patch = tuple(patch)
        self.augmentation = frozenset(augmentation)
        self.seed = seed
        self.sizes = sizes
        for cases, size, what in zip(self.streams, sizes, ("labelled", "unlabelled"), strict=True):
            if size and not cases:
                raise StudyError(f"a batch needs {size} {what} volumes, but the study has no {what} training case")
        for case in self.streams[LABELLED]:
            if case.label is None:
                raise StudyError(f"case '{case.id}' is to be a labelled one but has no label; ask for fewer labelled")
        for name in sorted(self.augmentation.difference(AUGMENTATIONS)):
            raise StudyError(f"unknown augmentation '{name}'; known: {', '.join(AUGMENTATIONS)}")

    def __call__(self, iteration: int) -> Batch:
        """The batch of one iteration, counted from 1."""
        volumes = sum(self.sizes)
        channels = next(case for cases in self.streams for case in cases).image.shape[0]
        image = np.zeros((volumes, channels, *self.patch), np.float32)
        label = np.zeros((self.sizes[LABELLED], *self.patch), np.int64)
        row = 0
        for stream in (LABELLED, UNLABELLED):
            for position in self._positions(stream, iteration):
                case = self._case(stream, position)
                arrays, patches = [case.image], [image[row]]
                if stream == LABELLED:
                    arrays, patches = [*arrays, case.label], [*patches, label[row]]
                self._fill(arrays, patches, self._random(stream, position))
                row += 1
        return Batch(torch.from_numpy(image), torch.from_numpy(label))

    def unlabelled_crops(
        self, iteration: int, arrays: Mapping[str, np.ndarray], outside: int
    ) -> list[np.ndarray | None]:
        """What an audit asks for: other arrays of the unlabelled cases, cropped and turned as the batch's images are.

        Args:
            iteration: counted from 1.
            arrays: (x, y, z) by case id.
            outside: value where a crop reaches beyond its volume.

        Returns:
            (*patch) for each unlabelled volume of the batch; None for a case not in `arrays`.
        """
        crops: list[np.ndarray | None] = []
        for position in self._positions(UNLABELLED, iteration):
            array = arrays.get(self._case(UNLABELLED, position).id)
            crops.append(None if array is None else np.full(self.patch, outside, array.dtype))
            if array is not None:
                self._fill([array], [crops[-1]], self._random(UNLABELLED, position))
        return crops

    def _positions(self, stream: int, iteration: int) -> range:
        return range((iteration - 1) * self.sizes[stream], iteration * self.sizes[stream])

    def _random(self, stream: int, position: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SAMPLE, stream, position])

    def _case(self, stream: int, position: int) -> Case:
        cases = self.streams[stream]
        epoch, place = divmod(position, len(cases))
        order = np.random.default_rng([self.seed, ORDER, stream, epoch]).permutation(len(cases))
        return cases[order[place]]

    def _fill(self, arrays: list[np.ndarray], patches: list[np.ndarray], random: np.random.Generator) -> None:
        """Augment and crop arrays (..., x, y, z) alike into patches; only what lies inside the volume is written."""
        if "rot90" in self.augmentation:
            turns = int(random.integers(4))
            arrays = [np.rot90(array, turns, axes=(-3, -2)) for array in arrays]
        if "flip" in self.augmentation:
            axis = int(random.integers(2)) - 3
            arrays = [np.flip(array, axis) for array in arrays]
        if "mirror" in self.augmentation and random.integers(2):
            arrays = [np.flip(array, -3) for array in arrays]
        size = arrays[0].shape[-3:]
        margin = crop_margin(size, self.patch)
        start = [int(random.integers(s + 2 * m - p + 1)) - m for s, p, m in zip(size, self.patch, margin, strict=True)]
        # the part of the patch that lies inside the volume; what is outside stays as it is
        inside = [(max(a, 0), min(a + p, s)) for a, p, s in zip(start, self.patch, size, strict=True)]
        source = (..., *(slice(low, high) for low, high in inside))
        target = (..., *(slice(low - a, high - a) for (low, high), a in zip(inside, start, strict=True)))
        for array, patch in zip(arrays, patches, strict=True):
            patch[target] = array[source]


def crop_margin(size: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Voxels of zero padding a side before a random crop, per axis, as the published loaders pad.

    Where any axis of the volume is not larger than the patch, every axis gets max((patch - size) // 2 + 3, 0).
    """
    if all(s > p for s, p in zip(size, patch, strict=True)):
        return tuple(0 for _ in size)
    return tuple(max((p - s) // 2 + 3, 0) for s, p in zip(size, patch, strict=True))
