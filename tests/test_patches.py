"""Batches are pure functions of (seed, iteration), keep image and label aligned, never read unlabelled labels."""

from collections import Counter

import numpy as np
import pytest
import torch

from mlrpl.data import Batches, Case
from mlrpl.data.patches import crop_margin
from mlrpl.errors import StudyError


def make_cases(count, size=(12, 10, 8), first=0, channels=1):
    """Cases whose image holds case number and voxel number, and whose label is the voxel number modulo 7."""
    voxel = np.arange(np.prod(size)).reshape(size)
    return [
        Case(
            f"case-{n}",
            "train",
            np.stack([voxel + 10_000 * (n + 1) + 0.25 * c for c in range(channels)]).astype(np.float32),
            (voxel % 7).astype(np.uint8),
            (1.0, 1.0, 1.0),
        )
        for n in range(first, first + count)
    ]


def numbers(batch):
    """Which case each volume of a batch comes from (patches lie inside the volume)."""
    return [int(volume[0, 0, 0, 0]) // 10_000 - 1 for volume in batch.image]


def test_shapes_types_and_order_of_the_streams():
    batches = Batches(make_cases(3, channels=2), make_cases(5, first=3, channels=2), (6, 4, 5), ["rot90", "flip"], 0)
    for iteration in range(1, 20):
        batch = batches(iteration)
        assert batch.image.shape == (4, 2, 6, 4, 5)
        assert batch.label.shape == (2, 6, 4, 5)
        assert batch.image.dtype == torch.float32
        assert batch.label.dtype == torch.int64
        assert all(number < 3 for number in numbers(batch)[:2])
        assert all(number >= 3 for number in numbers(batch)[2:])


def test_a_batch_depends_on_seed_and_iteration_alone():
    labelled, unlabelled = make_cases(3), make_cases(5, first=3)
    batches = Batches(labelled, unlabelled, (6, 4, 5), ["rot90", "flip"], 7)
    forwards = {k: batches(k) for k in range(1, 13)}
    torch.manual_seed(0)
    again = Batches(labelled, unlabelled, (6, 4, 5), ["flip", "rot90"], 7)
    for k in reversed(range(1, 13)):
        batch = again(k)
        assert torch.equal(batch.image, forwards[k].image)
        assert torch.equal(batch.label, forwards[k].label)
    other = Batches(labelled, unlabelled, (6, 4, 5), ["rot90", "flip"], 8)
    assert not torch.equal(other(1).image, forwards[1].image)
    assert not torch.equal(forwards[2].image, forwards[1].image)


@pytest.mark.parametrize("sizes", [(2, 2), (3, 1), (4, 0)])
def test_each_epoch_visits_each_case_once_in_a_new_order(sizes):
    batches = Batches(make_cases(6), make_cases(4, first=6), (4, 4, 4), [], 0, sizes)
    seen = [numbers(batches(k)) for k in range(1, 61)]
    for part, cases in ((slice(0, sizes[0]), 6), (slice(sizes[0], None), 4)):
        stream = [number for batch in seen for number in batch[part]]
        if not stream:
            continue
        epochs = [tuple(stream[i : i + cases]) for i in range(0, len(stream) - cases + 1, cases)]
        assert all(len(set(epoch)) == cases for epoch in epochs)
        assert len(set(epochs)) > len(epochs) // 4


@pytest.mark.parametrize("augmentation", [[], ["rot90"], ["flip"], ["mirror"], ["rot90", "flip", "mirror"]])
@pytest.mark.parametrize("patch", [(6, 4, 5), (14, 14, 4)])
def test_image_and_label_stay_aligned(augmentation, patch):
    batches = Batches(make_cases(3), make_cases(3), patch, augmentation, 3)
    for k in range(1, 30):
        batch = batches(k)
        image, label = batch.image[:2, 0].long(), batch.label
        inside = image > 0
        assert torch.equal(label[inside], image[inside] % 10_000 % 7)
        assert not label[~inside].any()


def test_unlabelled_labels_are_never_read():
    class Poison:
        def __getattribute__(self, name):
            raise AssertionError("the label of an unlabelled case was read")

    labelled, unlabelled = make_cases(3), make_cases(5, first=3)
    random = np.random.default_rng(0)
    garbage = [
        Case(c.id, c.split, c.image, random.integers(0, 255, c.label.shape, np.uint8), c.spacing) for c in unlabelled
    ]
    poisoned = [Case(c.id, c.split, c.image, Poison(), c.spacing) for c in unlabelled]
    without = [Case(c.id, c.split, c.image, None, c.spacing) for c in unlabelled]
    batches = [
        Batches(labelled, cases, (6, 4, 5), ["rot90", "flip"], 1) for cases in (unlabelled, garbage, poisoned, without)
    ]
    for k in range(1, 10):
        expected, *others = [make(k) for make in batches]
        assert all(torch.equal(expected.image, other.image) for other in others)
        assert all(torch.equal(expected.label, other.label) for other in others)


def orientation(patch):
    """Steps of a ramp 100·x + 10·y + z along the patch's axes: which way the volume was turned and flipped."""
    return tuple(int(patch[step] - patch[0, 0, 0]) for step in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))


@pytest.mark.parametrize(
    ("augmentation", "turns", "flips"),
    [
        ([], [0], [None]),
        (["rot90"], [0, 1, 2, 3], [None]),
        (["flip"], [0], [0, 1]),  # always one flip, of x or of y
        (["mirror"], [0], [None, 0]),
        (["rot90", "flip"], [0, 1, 2, 3], [0, 1]),
    ],
)
def test_distribution_of_augmentation(augmentation, turns, flips):
    x, y, z = np.indices((6, 5, 4))
    ramp = (100 * x + 10 * y + z).astype(np.float32)
    case = Case("ramp", "train", ramp[None], ramp.astype(np.uint8), (1.0, 1.0, 1.0))
    batches = Batches([case], [], (3, 3, 3), augmentation, 0, (4, 0))
    draws = 800
    found = Counter(orientation(patch[0].numpy()) for k in range(1, draws // 4 + 1) for patch in batches(k).image)
    possible = [
        np.rot90(ramp, turn) if flip is None else np.flip(np.rot90(ramp, turn), flip)
        for turn in turns
        for flip in flips
    ]
    expected = {key: share * draws / len(possible) for key, share in Counter(map(orientation, possible)).items()}
    assert found.keys() == expected.keys()
    assert all(abs(found[key] - expected[key]) < 4 * np.sqrt(expected[key]) for key in expected)


def test_crops_reach_every_place():
    case = make_cases(1, size=(8, 7, 6))
    batches = Batches(case, [], (6, 6, 5), [], 0, (1, 0))
    starts = {np.unravel_index(int(batches(k).image[0, 0, 0, 0, 0]) % 10_000, (8, 7, 6)) for k in range(1, 200)}
    assert starts == {(x, y, z) for x in range(3) for y in range(2) for z in range(2)}


@pytest.mark.parametrize(
    ("size", "patch", "margin"),
    [
        ((12, 10, 8), (6, 4, 5), (0, 0, 0)),
        ((12, 10, 8), (6, 9, 8), (0, 2, 3)),  # one axis equal to the patch: every axis gets what the rule gives
        ((12, 10, 8), (6, 4, 9), (0, 0, 3)),
        ((100, 100, 60), (112, 112, 80), (9, 9, 13)),
        ((121, 89, 80), (112, 112, 80), (0, 14, 3)),
    ],
)
def test_padding_rule(size, patch, margin):
    assert crop_margin(size, patch) == margin


def test_a_patch_larger_than_the_volume_is_padded_with_zeros():
    case = make_cases(1, size=(5, 6, 4))[0]
    batches = Batches([case], [], (9, 8, 10), [], 0, (1, 0))
    padded = np.pad(case.image[0], [(m, m) for m in crop_margin((5, 6, 4), (9, 8, 10))])
    windows = {w.tobytes() for w in np.lib.stride_tricks.sliding_window_view(padded, (9, 8, 10)).reshape(-1, 9, 8, 10)}
    seen = {batches(k).image[0, 0].numpy().tobytes() for k in range(1, 100)}
    assert len(seen) > 10
    assert seen <= windows


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([], make_cases(2), (4, 4, 4), [], 0), "labelled"),
        ((make_cases(2), [], (4, 4, 4), [], 0), "unlabelled"),
        ((make_cases(2), make_cases(2), (4, 4, 4), ["twist"], 0), "twist"),
        (
            (
                [Case("bare", "train", np.zeros((1, 4, 4, 4), np.float32), None, (1.0,) * 3)],
                make_cases(2),
                (4, 4, 4),
                [],
                0,
            ),
            "bare",
        ),
    ],
)
def test_wrong_input_is_named(arguments, named):
    with pytest.raises(StudyError, match=named) as error:
        Batches(*arguments)
    assert "\n" not in str(error.value)
