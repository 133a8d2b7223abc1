"""Prediction of a whole volume, window by window.

MONAI's sliding window takes the same time (`make bench`), but holds every class's sums of the whole volume. Here they
are held for the planes of one patch, so that a CT of 512³ voxels is predicted in a laptop's memory.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import ceil, prod

import torch
from torch import Tensor
from torch.nn import functional

from mlrpl.errors import StudyError

Predict = Callable[[Tensor], Tensor]


def sliding_window(
    predict: Predict, image: Tensor, patch: Sequence[int], stride: Sequence[int], batch: int = 4
) -> Tensor:
    """Average the predictions of overlapping windows over a volume.

    A volume smaller than the patch is padded with zeros, as much before as after; windows start at every multiple of
    the stride, the last one at the far border; each voxel gets the plain mean of the windows that see it.

    Args:
        predict: Maps windows (n, channels, *patch), n ≤ batch, to values (n, K, *patch) such as class probabilities;
            several outputs may be stacked along K.
        image: Volume (channels, x, y, z). Sums are kept on its device, in float32.
        patch: Size of a window in voxels.
        stride: Steps between windows in voxels, none larger than the patch.
        batch: Windows predicted at once.

    Returns:
        Values (K, x, y, z), float32.

    Raises:
        StudyError: The patch or the stride does not fit.

    Example:
        >>> sliding_window(lambda windows: windows.softmax(1), torch.zeros(2, 9, 9, 5), (4, 4, 4), (2, 2, 2)).shape
        torch.Size([2, 9, 9, 5])
    """
    whole = None
    for start, values in sliding_slabs(predict, image, patch, stride, batch):
        if whole is None:
            whole = values.new_empty(len(values), *image.shape[1:])
        whole[:, start : start + values.shape[1]] = values
    return whole


@torch.inference_mode()
def sliding_slabs(
    predict: Predict, image: Tensor, patch: Sequence[int], stride: Sequence[int], batch: int = 4
) -> Iterator[tuple[int, Tensor]]:
    """What `sliding_window` returns, slab by slab along x as soon as no further window sees it.

    Sums are held for as many planes as a patch is wide, so that memory does not grow with the volume's length.

    Yields:
        The slab's first plane, and its values (K, n, y, z).
    """
    size = image.shape[1:]
    starts = window_starts(size, patch, stride)
    before = [max(p - n, 0) // 2 for p, n in zip(patch, size, strict=True)]
    after = [max(p - n, 0) - b for p, n, b in zip(patch, size, before, strict=True)]
    padding = [width for pair in zip(reversed(before), reversed(after), strict=True) for width in pair]
    padded = functional.pad(image, padding) if any(padding) else image  # padding copies, also by nothing
    corners = list(product(*starts))

    total = None
    count = padded.new_zeros(patch[0], *padded.shape[2:], dtype=torch.float32)
    inside = tuple(slice(b, b + n) for b, n in zip(before[1:], size[1:], strict=True))
    base = 0  # the padded volume's plane that comes first in the sums
    for first in range(0, len(corners), batch):
        group = corners[first : first + batch]
        windows = [padded[(..., *(slice(c, c + p) for c, p in zip(corner, patch, strict=True)))] for corner in group]
        values = predict(torch.stack(windows)).to(count)
        if total is None:
            total = count.new_zeros(values.shape[1], *count.shape)
        for (x, *corner), value in zip(group, values, strict=True):
            if x > base:
                yield base, (total[:, : x - base] / count[: x - base])[(..., *inside)]
                total, count = _moved_on(total, x - base), _moved_on(count, x - base)
                base = x
            window = (..., *(slice(c, c + p) for c, p in zip(corner, patch[1:], strict=True)))
            total[window] += value
            count[window] += 1
    planes = slice(before[0], before[0] + min(size[0], patch[0]))
    yield base, total.div_(count)[(slice(None), planes, *inside)]


def window_starts(size: Sequence[int], patch: Sequence[int], stride: Sequence[int]) -> list[list[int]]:
    """First voxels of the windows along each axis, the volume padded to the patch where it is smaller.

    Raises:
        StudyError: The patch or the stride does not fit.
    """
    if not len(patch) == len(stride) == len(size):
        raise StudyError(
            f"a volume of {len(size)} axes with a patch of {len(patch)} and a stride of {len(stride)}: "
            "give an image (channels, x, y, z), and three sides of each"
        )
    if not all(0 < s <= p for s, p in zip(stride, patch, strict=True)):
        raise StudyError(f"windows of {tuple(patch)} at a stride of {tuple(stride)} leave gaps: take strides 1 … patch")
    return [_starts(max(n, p), p, s) for n, p, s in zip(size, patch, stride, strict=True)]


def count_windows(size: Sequence[int], patch: Sequence[int], stride: Sequence[int]) -> int:
    """How many windows a volume takes; raises what `window_starts` raises."""
    return prod(map(len, window_starts(size, patch, stride)))


def _moved_on(sums: Tensor, planes: int) -> Tensor:
    """Sums (…, x, y, z) without the first planes, with zeros for as many that come."""
    return functional.pad(sums[..., planes:, :, :], (0, 0, 0, 0, 0, planes))


def _starts(size: int, patch: int, stride: int) -> list[int]:
    """First voxels of the windows along one axis."""
    return [min(i * stride, size - patch) for i in range(ceil((size - patch) / stride) + 1)]
