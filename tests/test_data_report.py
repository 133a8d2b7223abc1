"""What the data page says is what the store holds."""

import numpy as np
import pytest
from test_raw import write

from mlrpl import data_report
from mlrpl.config import Dataset
from mlrpl.data import prepare


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Seven cases, five labelled, of two spacings, resampled; one is faulty."""
    root = tmp_path_factory.mktemp("data")
    for number in range(7):
        random = np.random.default_rng(number)
        label = np.zeros((20, 18, 16), np.uint8)
        label[5:12, 5:12, 4:10] = 1
        spacing = (1, 1, 1 + number % 2)
        write(root / f"imagesTr/c{number}.nii.gz", random.normal(100 * label, 9).astype(np.float32), spacing)
        if number < 5:
            write(root / f"labelsTr/c{number}.nii.gz", label, spacing)
    (root / "imagesTr/bad.nii.gz").write_bytes(b"bad")
    channels = [{"low": -50, "high": 150, "mean": 50, "sd": 25}]
    options = {"test": 0, "lenient": True, "classes": ["background", "organ"]}
    options["preparation"] = {"axes": "patient", "spacing": [1, 1, 1], "channels": channels}
    return prepare(Dataset(name="mine", source="decathlon", options=options), root, root / "store")


def test_preparation_and_what_was_left_out(store):
    said = dict(data_report.preparation(store).itertuples(index=False))
    assert said["Voxels"] == "resampled to 1 × 1 × 1 mm"
    assert said["Intensities"] == "clipped to -50 … 150, then (value − 50) / 25"
    assert said["Cases left out"] == "1"
    assert said["Fingerprint"] == store.fingerprint
    ((case, problem),) = data_report.rejected(store).itertuples(index=False)
    assert case == "bad" and "imagesTr/bad.nii.gz" in problem


def test_folds_measure_every_labelled_case_once(store):
    table = data_report.folds(store, 2)
    assert sorted(", ".join(table["Measured on"]).split(", ")) == [f"c{n}" for n in range(5)]
    assert table["Labelled"].tolist() == [2, 3]
    assert table["Unlabelled"].tolist() == [2, 2]


def test_cases_for_pictures_are_few_and_of_every_split(store):
    fold = store.fold(0, 2)
    assert [case.split for case in data_report.shown_cases(fold)] == ["train"] * 3 + ["test"]
    assert len(data_report.measured_cases(fold)) == 7


def test_grids_are_those_of_the_files(store):
    figure = data_report.grids(store)
    spacing, extent = figure.axes
    values = [
        np.concatenate([line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 7])
        for ax in (spacing, extent)
    ]
    np.testing.assert_allclose(sorted(values[0]), [1] * 18 + [2] * 3)
    np.testing.assert_allclose(sorted(set(values[1])), [16, 18, 20, 32])
