"""A library's sliding window, MONAI's, over the same windows as the package's. Needs `pip install monai`."""

from collections.abc import Callable, Sequence

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor


@torch.inference_mode()
def sliding_window(
    predict: Callable[[Tensor], Tensor], image: Tensor, patch: Sequence[int], stride: Sequence[int], batch: int = 4
) -> Tensor:
    """Mean of overlapping windows: `image` (1, channels, x, y, z) -> (1, K, x, y, z)."""
    # MONAI wants the share of a window that the next one covers, and rounds the step that remains down.
    overlap = [1 - (step + 0.5) / side for step, side in zip(stride, patch, strict=True)]
    return sliding_window_inference(image, patch, batch, predict, overlap)
