"""The sliding window is the plain loop over windows, only in batches."""

import pytest
import torch

from mlrpl.errors import StudyError
from mlrpl.inference import sliding_window


def one_window_at_a_time(predict, image, patch, stride):
    """The published loop, step by step, for volumes at least as large as the patch."""
    _, *size = image.shape
    steps = [-(-(n - p) // s) + 1 for n, p, s in zip(size, patch, stride, strict=True)]
    total, count = 0, torch.zeros(1, *size)
    for i in range(steps[0]):
        x = min(i * stride[0], size[0] - patch[0])
        for j in range(steps[1]):
            y = min(j * stride[1], size[1] - patch[1])
            for k in range(steps[2]):
                z = min(k * stride[2], size[2] - patch[2])
                window = image[:, x : x + patch[0], y : y + patch[1], z : z + patch[2]]
                values = torch.zeros(2, *size)
                values[:, x : x + patch[0], y : y + patch[1], z : z + patch[2]] = predict(window[None])[0]
                count[:, x : x + patch[0], y : y + patch[1], z : z + patch[2]] += 1
                total = total + values
    return total / count


def position_dependent(windows):
    """Two outputs that depend on where a voxel lies in its window, so that averaging matters."""
    depth = torch.linspace(0, 1, windows.shape[-1])
    across = torch.linspace(0, 1, windows.shape[2])[:, None, None]
    return torch.cat([windows * depth + across, windows.mean(dim=(2, 3, 4), keepdim=True) - windows], dim=1)


def image(*size, channels=1):
    return torch.randn(channels, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch", [1, 3, 4, 100])
@pytest.mark.parametrize(
    ("size", "patch", "stride"),
    [
        ((13, 11, 9), (6, 4, 5), (3, 4, 2)),
        ((12, 8, 8), (6, 4, 4), (6, 4, 4)),
        ((7, 7, 7), (7, 7, 7), (2, 2, 2)),
        ((8, 9, 7), (7, 5, 6), (5, 5, 5)),
    ],
)
def test_equals_one_window_at_a_time(size, patch, stride, batch):
    expected = one_window_at_a_time(position_dependent, image(*size), patch, stride)
    torch.testing.assert_close(sliding_window(position_dependent, image(*size), patch, stride, batch), expected)


@pytest.mark.parametrize("size", [(13, 11, 9), (3, 11, 9), (13, 3, 2), (1, 1, 1), (6, 4, 5)])
def test_identity_gives_the_image_back(size):
    volume = image(*size, channels=2)
    result = sliding_window(lambda windows: windows, volume, (6, 4, 5), (2, 3, 5))
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    torch.testing.assert_close(result, volume)


def test_small_volume_is_padded_with_zeros_in_the_centre():
    seen = []
    sliding_window(
        lambda windows: seen.append(windows.clone()) or windows, torch.ones(1, 3, 4, 9), (6, 4, 4), (3, 2, 4)
    )
    windows = torch.cat(seen)
    assert windows.shape == (3, 1, 6, 4, 4)
    profile = torch.tensor([0, 1, 1, 1, 0, 0.0])  # 3 voxels missing: one before, two after
    assert torch.equal(windows, profile[:, None, None].expand(3, 1, 6, 4, 4))


def test_windows_are_the_published_ones():
    firsts = []
    ramp = torch.arange(10.0).reshape(1, 10, 1, 1).expand(1, 10, 4, 4)
    sliding_window(lambda w: firsts.extend(w[:, 0, 0, 0, 0].tolist()) or w, ramp, (4, 4, 4), (4, 4, 4))
    assert firsts == [0, 4, 6]  # the last window is moved back to the border; none comes twice


def test_windows_come_in_batches():
    sizes = []
    sliding_window(lambda w: sizes.append(len(w)) or w, image(10, 4, 4), (4, 4, 4), (1, 4, 4), batch=3)
    assert sizes == [3, 3, 1]


def test_low_precision_predictions_are_averaged_in_float32():
    result = sliding_window(lambda w: torch.full_like(w, 1 / 3).bfloat16(), image(9, 9, 9), (4, 4, 4), (1, 1, 1))
    torch.testing.assert_close(
        result, torch.full_like(result, torch.tensor(1 / 3).bfloat16().item()), rtol=1e-6, atol=0
    )


def test_no_gradients_are_recorded():
    scale = torch.ones(1, requires_grad=True)
    assert not sliding_window(lambda w: w * scale, image(5, 5, 5), (4, 4, 4), (2, 2, 2)).requires_grad


@pytest.mark.parametrize("stride", [(5, 2, 2), (0, 2, 2), (2, 2)])
def test_strides_that_leave_gaps_are_refused(stride):
    with pytest.raises(StudyError, match="stride"):
        sliding_window(lambda w: w, image(9, 9, 9), (4, 4, 4), stride)
