"""Metrics are MedPy's, to the last bit, and defined where MedPy's are not."""

import numpy as np
import pytest
from medpy.metric import binary
from scipy.ndimage import binary_dilation, gaussian_filter, shift

from mlrpl import metrics
from mlrpl.errors import StudyError
from mlrpl.metrics import case_metrics

SPACINGS = [None, (1.0, 1.0, 1.0), (0.625, 0.625, 1.25), (1.25, 0.7, 3.3), (2, 1, 1)]


def medpy(prediction, reference, spacing=None):
    return {
        "dice": binary.dc(prediction, reference),
        "jaccard": binary.jc(prediction, reference),
        "hd95": binary.hd95(prediction, reference, voxelspacing=spacing),
        "asd": binary.asd(prediction, reference, voxelspacing=spacing),
    }


def assert_like_medpy(prediction, reference, spacing=None):
    ours, theirs = case_metrics(prediction, reference, spacing), medpy(prediction, reference, spacing)
    if spacing is None:
        assert ours == theirs
    else:
        assert ours == pytest.approx(theirs, rel=0, abs=1e-6)


def box(shape, *ranges):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*r) for r in ranges)] = True
    return mask


def atrium(seed, size=(44, 38, 26)):
    """A rough blob with holes in it and specks beside it."""
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in size], indexing="ij"))
    body = 0.6 - np.sqrt((grid**2).sum(0))
    return body + 2.5 * gaussian_filter(random.normal(size=size), 2.5) > 0


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("density", [0.003, 0.1, 0.5, 0.97])
def test_random_masks(density, spacing):
    random = np.random.default_rng(int(density * 1000))
    for shape in [(9, 7, 5), (12, 10, 8), (5, 1, 6)]:
        prediction, reference = random.random((2, *shape)) < density
        prediction[tuple(random.integers(shape))] = reference[tuple(random.integers(shape))] = True
        assert_like_medpy(prediction, reference, spacing)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_irregular_mask_shifted_grown_and_swapped(spacing):
    reference = atrium(1)
    for prediction in (
        reference,
        atrium(2),
        binary_dilation(reference, iterations=2),
        shift(reference.astype(np.uint8), (3, -2, 1), order=0),
        reference & atrium(3),
    ):
        assert_like_medpy(prediction, reference, spacing)
        assert_like_medpy(reference, prediction, spacing)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("crowded", [-1, 1])
def test_tree_and_transform_find_the_same_distances(monkeypatch, crowded, spacing):
    monkeypatch.setattr(metrics, "CROWDED", crowded)  # -1: always the transform; 1: always the tree
    random = np.random.default_rng(0)
    for prediction, reference in [(atrium(1), atrium(2)), random.random((2, 12, 10, 8)) < 0.3]:
        assert_like_medpy(prediction, reference, spacing)


def test_equal_to_the_last_bit_with_spacing_on_irregular_masks():
    assert case_metrics(atrium(4), atrium(5), (0.625, 0.7, 1.3)) == medpy(atrium(4), atrium(5), (0.625, 0.7, 1.3))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        pytest.param(((0, 4), (0, 4), (0, 4)), ((6, 10), (5, 8), (3, 6)), id="opposite corners"),
        pytest.param(((0, 10), (0, 8), (0, 6)), ((2, 5), (2, 5), (2, 5)), id="full volume"),
        pytest.param(((0, 10), (3, 5), (2, 4)), ((0, 10), (0, 8), (0, 2)), id="bar from border to border"),
        pytest.param(((4, 5), (4, 5), (3, 4)), ((4, 5), (4, 5), (3, 4)), id="the same voxel"),
        pytest.param(((0, 1), (0, 1), (0, 1)), ((9, 10), (7, 8), (5, 6)), id="voxels in opposite corners"),
        pytest.param(((0, 10), (4, 5), (3, 4)), ((5, 6), (0, 8), (3, 4)), id="crossing lines"),
    ],
)
def test_masks_at_borders_single_voxels_and_thin_ones(prediction, reference, spacing):
    assert_like_medpy(box((10, 8, 6), *prediction), box((10, 8, 6), *reference), spacing)


def test_known_distances():
    prediction, reference = box((20, 5, 5), (2, 3), (2, 3), (2, 3)), box((20, 5, 5), (9, 10), (2, 3), (2, 3))
    measured = case_metrics(prediction, reference)
    assert measured == {"dice": 0, "jaccard": 0, "hd95": 7, "asd": 7}
    assert {type(value) for value in measured.values()} == {float}
    assert case_metrics(prediction, reference, (0.5, 1, 1))["hd95"] == 3.5


def test_asd_is_directed_from_prediction_to_reference():
    small, large = box((20, 5, 5), (2, 3), (2, 3), (2, 3)), box((20, 5, 5), (2, 12), (2, 3), (2, 3))
    assert case_metrics(small, large)["asd"] == 0
    assert case_metrics(large, small)["asd"] == 4.5


def test_any_integer_type_counts_non_zero_as_foreground():
    mask = atrium(6)
    assert case_metrics(mask.astype(np.uint8) * 255, mask.astype(np.int64)) == case_metrics(mask, mask)


def test_inputs_are_not_changed():
    prediction, reference = atrium(7), atrium(8)
    copies = prediction.copy(), reference.copy()
    case_metrics(prediction, reference)
    assert np.array_equal(prediction, copies[0])
    assert np.array_equal(reference, copies[1])


@pytest.mark.parametrize(("predicted", "referred", "overlap"), [(True, False, 0), (False, True, 0), (False, False, 1)])
def test_empty_masks_have_no_distances(predicted, referred, overlap):
    prediction, reference = np.full((4, 4, 4), predicted), np.full((4, 4, 4), referred)
    measured = case_metrics(prediction, reference, (1, 1, 2))
    assert measured == pytest.approx({"dice": overlap, "jaccard": overlap, "hd95": np.nan, "asd": np.nan}, nan_ok=True)


def test_shapes_must_agree():
    with pytest.raises(StudyError, match="differ in shape"):
        case_metrics(np.ones((4, 4, 4)), np.ones((4, 4, 5)))


@pytest.mark.parametrize("spacing", [(1, 1), (1, 0, 1), (1, 1, -2), (1, float("nan"), 1), (1, float("inf"), 1)])
def test_spacing_must_be_positive(spacing):
    with pytest.raises(StudyError, match="spacing"):
        case_metrics(np.ones((4, 4, 4)), np.ones((4, 4, 4)), spacing)
