"""Connected components of label maps."""

import numpy as np
from scipy import ndimage


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
