"""Overlap and surface-distance metrics of one binary mask against its reference, as MedPy defines them."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from scipy.spatial import KDTree

from mlrpl.errors import StudyError
from mlrpl.masks import bounding_box

CROWDED = 0.08  # share of surface voxels above which a distance transform is faster than a tree


def case_metrics(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float] | None = None
) -> dict[str, float]:
    """Measure a predicted mask against its reference.

    The numbers are those of ``medpy.metric.binary`` (``dc``, ``jc``, ``hd95``, ``asd``; connectivity 1) on the whole
    volume, but each surface and each directed distance is computed once, and only inside the box around both masks.

    Args:
        prediction: Mask (x, y, z); non-zero is foreground.
        reference: Mask of the same shape.
        spacing: Size of a voxel in mm along each axis; distances are in voxels without it.

    Returns:
        ``dice`` and ``jaccard`` as fractions; ``hd95``, the 95th percentile of the distances of both surfaces to the
        other one, pooled; ``asd``, the mean distance from the prediction's surface to the reference's. Where a mask is
        empty the distances are NaN and the overlap is 0, or 1 if both are.

    Raises:
        StudyError: The shapes differ, or the spacing is not one positive number an axis.
    """
    prediction = np.asarray(prediction).astype(bool, copy=False)
    reference = np.asarray(reference).astype(bool, copy=False)
    if prediction.shape != reference.shape:
        raise StudyError(
            f"prediction {prediction.shape} and reference {reference.shape} differ in shape: "
            "measure masks on the same voxel grid"
        )
    if spacing is not None and (len(spacing) != prediction.ndim or not all(0 < step < np.inf for step in spacing)):
        raise StudyError(
            f"spacing {tuple(spacing)} is wrong: give one positive number for each of {prediction.ndim} axes"
        )

    box = bounding_box(prediction | reference)
    if box is None:
        return {"dice": 1.0, "jaccard": 1.0, "hd95": np.nan, "asd": np.nan}
    prediction, reference = prediction[box], reference[box]
    intersection = int(np.count_nonzero(prediction & reference))
    total = int(np.count_nonzero(prediction) + np.count_nonzero(reference))
    overlap = {"dice": 2.0 * intersection / total, "jaccard": intersection / (total - intersection)}
    if not prediction.any() or not reference.any():
        return overlap | {"hd95": np.nan, "asd": np.nan}

    predicted_surface, reference_surface = _surface(prediction), _surface(reference)
    forth = _distances(predicted_surface, reference_surface, spacing)
    back = _distances(reference_surface, predicted_surface, spacing)
    return overlap | {"hd95": float(np.percentile(np.concatenate([forth, back]), 95)), "asd": float(forth.mean())}


def _surface(mask: np.ndarray) -> np.ndarray:
    """Foreground voxels with a face neighbour outside the mask.

    What lies outside the array counts as background. That is MedPy's rule at the volume's border, and true at the
    border of the box around both masks, so the crop needs no margin.
    """
    padded = np.pad(mask, 1)
    interior = mask.copy()
    for axis in range(mask.ndim):
        for start in (0, 2):
            neighbour = [slice(1, -1)] * mask.ndim
            neighbour[axis] = slice(start, start + mask.shape[axis])
            interior &= padded[tuple(neighbour)]
    return mask & ~interior


def _distances(surface: np.ndarray, target: np.ndarray, spacing: Sequence[float] | None) -> np.ndarray:
    """Distance of each surface voxel, in array order, to the nearest voxel of the target surface.

    A tree of the target's voxels says which is nearest, or a distance transform where surfaces fill much of the box.
    Lengths are worked out in the order of operations of ``scipy.ndimage.distance_transform_edt``, which keeps them
    equal to its own to the last bit; in mm two voxels may be nearest to within rounding.
    """
    step = np.ones(surface.ndim) if spacing is None else np.asarray(spacing, dtype=float)
    points = np.argwhere(surface)
    if len(points) + np.count_nonzero(target) > CROWDED * target.size:
        transform = distance_transform_edt(~target, sampling=spacing, return_distances=False, return_indices=True)
        nearest = transform[:, surface].T
    else:
        nearest, apart = points.copy(), ~target[surface]
        others = np.argwhere(target)
        # Balancing the tree takes longer than it saves in so few queries.
        tree = KDTree(others * step, leafsize=32, compact_nodes=False, balanced_tree=False)
        nearest[apart] = others[tree.query(points[apart] * step, workers=torch.get_num_threads())[1]]
    offsets = ((nearest - points) * step).T
    return np.sqrt((offsets * offsets).sum(axis=0))
