"""Prediction of a whole volume, window by window."""

from collections.abc import Callable, Sequence
from itertools import product
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional

from mlrpl.errors import StudyError


@torch.inference_mode()
def sliding_window(
    predict: Callable[[Tensor], Tensor], image: Tensor, patch: Sequence[int], stride: Sequence[int], batch: int = 4
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
    size = image.shape[1:]
    if not len(patch) == len(stride) == len(size) or not all(0 < s <= p for s, p in zip(stride, patch, strict=True)):
        raise StudyError(f"windows of {tuple(patch)} at a stride of {tuple(stride)} leave gaps: take strides 1 … patch")

    before = [max(p - n, 0) // 2 for p, n in zip(patch, size, strict=True)]
    after = [max(p - n, 0) - b for p, n, b in zip(patch, size, before, strict=True)]
    padding = [width for pair in zip(reversed(before), reversed(after), strict=True) for width in pair]
    padded = functional.pad(image, padding)
    starts = [_starts(n, p, s) for n, p, s in zip(padded.shape[1:], patch, stride, strict=True)]
    windows = [(..., *(slice(c, c + p) for c, p in zip(corner, patch, strict=True))) for corner in product(*starts)]

    total = None
    count = padded.new_zeros(padded.shape[1:], dtype=torch.float32)
    for first in range(0, len(windows), batch):
        group = windows[first : first + batch]
        values = predict(torch.stack([padded[window] for window in group])).to(count)
        if total is None:
            total = count.new_zeros(values.shape[1], *count.shape)
        for window, value in zip(group, values, strict=True):
            total[window] += value
            count[window] += 1
    inside = (..., *(slice(b, b + n) for b, n in zip(before, size, strict=True)))
    return total.div_(count)[inside].contiguous()


def _starts(size: int, patch: int, stride: int) -> list[int]:
    """First voxels of the windows along one axis."""
    return [min(i * stride, size - patch) for i in range(ceil((size - patch) / stride) + 1)]
