"""The paper's data sets raw: recognised, aligned in space, prepared as published, without a patient's trace."""

import contextlib
import locale
import re
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import SimpleITK

from mlrpl.data import prepare
from mlrpl.data.dicom import read_dicom
from mlrpl.data.published import around_label
from mlrpl.data.volumes import read_volume
from mlrpl.errors import StudyError

STRAIGHT = np.eye(3)
OBLIQUE = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1.0]])


def prepared(source, root, folder, **options):
    return prepare(SimpleNamespace(name="dataset", source=source, options=options, step=1), root, folder)


def refused(source, root, folder, *named):
    with pytest.raises(StudyError) as error:
        prepared(source, root, folder)
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in named), message


def write(path, array, spacing=(1, 1, 1), origin=(0, 0, 0), direction=STRAIGHT):
    """Write an (x, y, z) array in the format of the path's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(spacing)
    image.SetOrigin(np.asarray(origin, dtype=float))
    image.SetDirection(np.asarray(direction, dtype=float).ravel())
    SimpleITK.WriteImage(image, str(path))


def write_series(
    folder,
    hounsfield,
    spacing=(1, 1, 1),
    origin=(0, 0, 0),
    direction=STRAIGHT,
    series="1.2.3.4",
    names=None,
):
    """A CT series of (x, y, z) HU, a file a slice, under names in an order of their own; stored as HU + 1024."""
    folder.mkdir(parents=True, exist_ok=True)
    count = hounsfield.shape[2]
    names = names if names is not None else np.random.default_rng(0).permutation(count)
    for z in range(count):
        image = SimpleITK.GetImageFromArray(hounsfield[:, :, z].astype(np.int16).T[None])
        image.SetSpacing(spacing)
        place = np.asarray(origin) + np.asarray(direction) @ (0, 0, z * spacing[2])
        tags = {
            "0008|0060": "CT",
            "0010|0010": "Doe^Jane",
            "0010|0020": "PATIENT-4711",
            "0020|000e": series,
            "0020|000d": "1.2.3",
            "0008|0018": f"{series}.{z}",
            "0020|0032": "\\".join(f"{value:.6f}" for value in place),
            "0020|0037": "\\".join(f"{value:.6f}" for value in np.asarray(direction)[:, :2].T.ravel()),
            "0028|1052": "-1024",
            "0028|1053": "1",
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer = SimpleITK.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"slice{names[z]:03d}.dcm"))
        with same_locale():
            writer.Execute(image)


@contextlib.contextmanager
def same_locale():
    """ITK's DICOM writer sets the whole process's locale to C, and text that later tests read is no longer UTF-8."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


def body(size=(40, 36, 30)):
    """HU of a body of fat with a soft organ off its middle, and the organ's mask: no axis may be taken for another."""
    x, y, z = np.indices(size)
    organ = ((x - 12) / 6) ** 2 + ((y - 22) / 4) ** 2 + ((z - 18) / 8) ** 2 < 1
    hounsfield = np.full(size, -600.0)
    hounsfield[organ] = 60 + (x + 2 * y + 3 * z)[organ]
    return hounsfield, organ.astype(np.uint8)


# --- DICOM


def test_a_series_is_sorted_by_place_and_rescaled(tmp_path):
    hounsfield, _ = body()
    write_series(tmp_path / "s", hounsfield, (0.8, 0.8, 2.5), (-10, 5, 100), OBLIQUE)
    (tmp_path / "s" / "notes.txt").write_text("not an image")
    volume, geometry = read_dicom(tmp_path / "s", "s")
    np.testing.assert_array_equal(volume, hounsfield)
    np.testing.assert_allclose(geometry["spacing"], (0.8, 0.8, 2.5), rtol=1e-4)
    np.testing.assert_allclose(geometry["origin"], (-10, 5, 100), atol=1e-4)
    np.testing.assert_allclose(np.reshape(geometry["direction"], (3, 3)), OBLIQUE, atol=1e-5)


def test_each_slice_has_its_own_slope(tmp_path):
    hounsfield, _ = body((12, 12, 8))
    write_series(tmp_path / "s", hounsfield, names=range(8))
    for z in range(4, 8):  # the tag's value "1 " becomes ".5"
        path = tmp_path / f"s/slice{z:03d}.dcm"
        content, changes = re.subn(rb"(\x28\x00\x53\x10.{4})1 ", rb"\1.5", path.read_bytes(), flags=re.DOTALL)
        assert changes == 1
        path.write_bytes(content)
    hounsfield[:, :, 4:] = 0.5 * (hounsfield[:, :, 4:] + 1024) - 1024
    np.testing.assert_array_equal(read_dicom(tmp_path / "s", "s")[0], hounsfield)


def test_of_several_series_the_largest_or_the_asked_one(tmp_path):
    hounsfield, _ = body()
    write_series(tmp_path / "s", hounsfield, series="1.2.3.4")
    write_series(tmp_path / "s", hounsfield[:, :, :3], series="1.2.3.5", names=range(100, 103))
    assert read_dicom(tmp_path / "s", "s")[0].shape == hounsfield.shape
    assert read_dicom(tmp_path / "s", "s", slices=3)[0].shape[2] == 3
    write_series(tmp_path / "s", hounsfield, series="1.2.3.6", names=range(200, 230))
    with pytest.raises(StudyError, match="2 series of 30 slices"):
        read_dicom(tmp_path / "s", "s")


def test_missing_doubled_and_no_slices(tmp_path):
    hounsfield, _ = body((8, 8, 9))
    write_series(tmp_path / "s", hounsfield, spacing=(1, 1, 2), names=range(9))
    (tmp_path / "s" / "slice004.dcm").unlink()
    with pytest.raises(StudyError, match=r"slices 4 and 5 are 4\.00 mm apart"):
        read_dicom(tmp_path / "s", "s")
    write_series(tmp_path / "t", hounsfield, names=range(9))
    (tmp_path / "t" / "again.dcm").write_bytes((tmp_path / "t" / "slice003.dcm").read_bytes())
    with pytest.raises(StudyError, match="same place"):
        read_dicom(tmp_path / "t", "t")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudyError, match="no DICOM"):
        read_dicom(tmp_path / "empty", "empty")


# --- Pancreas-CT


@pytest.fixture
def pancreas(tmp_path):
    """Three raw cases, the labels with other axes than the series."""
    root = tmp_path / "Pancreas-CT"
    for number in (1, 2, 7):
        hounsfield, organ = body()
        spacing, origin = (1.5, 1.5, 2.0), np.array((-100.0, -80.0, 30.0 * number))
        write_series(root / f"PANCREAS_{number:04d}/study/series", hounsfield, spacing, origin)
        last = origin + np.multiply(spacing, np.array(organ.shape) - 1)
        flipped = organ[:, ::-1, ::-1]
        write(
            root / f"labels/label{number:04d}.nii.gz",
            flipped,
            spacing,
            (origin[0], last[1], last[2]),
            np.diag([1.0, -1, -1]),
        )
    return root


def test_pancreas_labels_are_aligned_in_space(pancreas, tmp_path):
    store = prepared("pancreas", pancreas, tmp_path / "store")
    assert sorted(store.ids("train") + store.ids("test")) == ["image0001", "image0002", "image0007"]
    assert store.index["form"] == "raw"
    case = store.load("image0007")
    assert case.spacing == (1, 1, 1)
    assert case.image.shape == (1, 60, 54, 60)
    _, organ = body()
    assert abs(case.label.sum() / (organ.sum() * 1.5 * 1.5 * 2) - 1) < 0.05
    inside, outside = case.image[0][case.label == 1], case.image[0][case.label == 0]
    assert np.median(inside) > 2 > 0 > np.median(outside)  # a label that lies elsewhere would see air
    np.testing.assert_allclose([case.image.mean(), case.image.std()], [0, 1], atol=1e-4)
    preparation = store.preparation.channels[0]
    assert preparation.mean is not None and -125 < preparation.mean < 275


def test_pancreas_label_without_an_origin_and_one_that_is_flipped(pancreas, tmp_path):
    expected = prepared("pancreas", pancreas, tmp_path / "a").load("image0002").label
    _, organ = body()
    name = pancreas / "labels/label0002.nii.gz"
    write(name, organ[:, ::-1, ::-1], (1.5, 1.5, 2.0), direction=np.diag([1.0, -1, -1]))
    np.testing.assert_array_equal(prepared("pancreas", pancreas, tmp_path / "b").load("image0002").label, expected)
    write(name, organ[:, ::-1, ::-1], (1.5, 1.5, 2.0))
    refused("pancreas", pancreas, tmp_path / "c", "label0002.nii.gz", "-125 HU")
    write(name, organ, (1.5, 1.5, 2.0), (-50, -80, 60))
    refused("pancreas", pancreas, tmp_path / "c", "label0002.nii.gz", "outside")


def test_pancreas_case_without_its_other_half(pancreas, tmp_path):
    (pancreas / "labels/label0002.nii.gz").unlink()
    refused("pancreas", pancreas, tmp_path / "store", "PANCREAS_0002", "label")


def test_no_trace_of_a_patient_or_a_path(pancreas, tmp_path):
    folder = prepared("pancreas", pancreas, tmp_path / "store").folder
    content = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    names = " ".join(str(path.relative_to(folder)) for path in folder.rglob("*"))
    for trace in ("Doe", "Jane", "4711", str(tmp_path), "slice0", "1.2.3.4"):
        assert trace.encode() not in content
        assert trace not in names


def test_pancreas_prepared_form(tmp_path):
    for number in (1, 2, 3):
        path = tmp_path / f"Pancreas_h5/image{number:04d}_norm.h5"
        path.parent.mkdir(exist_ok=True)
        with h5py.File(path, "w") as file:
            file["image"], file["label"] = np.zeros((4, 5, 6)) + number, np.ones((4, 5, 6), np.uint8)
    (tmp_path / "train.list").write_text("image0003\nimage0001\n")
    (tmp_path / "test.list").write_text("image0002")
    for given in (tmp_path, tmp_path / "Pancreas_h5"):
        store = prepared("pancreas", given, tmp_path / f"store-{given.name}")
        assert (store.ids("train"), store.ids("test")) == (["image0003", "image0001"], ["image0002"])
        assert (store.index["form"], store.real_spacing, store.index["split"]) == ("prepared", False, "published")


# --- left atrium


@pytest.fixture
def atria(tmp_path):
    root = tmp_path / "LA"
    for number in range(3):
        image = np.random.default_rng(number).integers(0, 255, (150, 140, 10)).astype(np.uint8)
        label = np.zeros(image.shape, np.uint8)
        label[60:80, 70:75, 3:6] = 255
        write(root / f"Training Set/case{number}/lgemri.nrrd", image, (0.6, 0.6, 1.2), (5, 6, 7))
        write(root / f"Training Set/case{number}/laendo.nrrd", label, (0.6, 0.6, 1.2), (5, 6, 7))
    write(root / "Testing Set/later/lgemri.nrrd", np.zeros((9, 9, 9), np.uint8))
    return root


def test_raw_atria_are_scored_then_cropped_by_margins_of_their_own(atria, tmp_path):
    store = prepared("la", atria, tmp_path / "store")
    assert sorted(store.ids("train") + store.ids("test")) == ["case0", "case1", "case2"]
    assert store.real_spacing
    for number in range(3):
        case = store.load(f"case{number}")
        whole = np.random.default_rng(number).integers(0, 255, (150, 140, 10)).astype(np.float64)
        _, x, y, z = case.image.shape
        assert z == 10 and 112 + 20 <= x <= 112 + 38 and 112 + 20 <= y <= 140
        assert (case.label == 1).sum() == 20 * 5 * 3
        entry = next(entry for entry in store.index["cases"] if entry["id"] == case.id)
        start = np.rint((np.array(entry["geometry"]["origin"]) - (5, 6, 7)) / (0.6, 0.6, 1.2)).astype(int)
        scored = (whole - whole.mean()) / whole.std()
        part = scored[start[0] : start[0] + x, start[1] : start[1] + y]
        np.testing.assert_allclose(case.image[0], part, rtol=1e-5, atol=1e-6)
        assert entry["original"]["shape"] == [150, 140, 10]
        assert len(entry["sources"]) == 2
    assert len({store.load(f"case{n}").image.shape for n in range(3)}) > 1
    assert prepared("la", atria, tmp_path / "again").fingerprint == store.fingerprint


def test_the_prepared_form_is_taken_where_both_are_there(atria, tmp_path):
    for number in range(3):
        with h5py.File(atria / f"Training Set/case{number}/mri_norm2.h5", "w") as file:
            file["image"], file["label"] = np.ones((4, 4, 4)) * number, np.zeros((4, 4, 4), np.uint8)
    store = prepared("la", atria, tmp_path / "store")
    assert store.index["form"] == "prepared"
    assert store.load("case1").image.shape == (1, 4, 4, 4)


def test_raw_atrium_with_missing_label_and_truncated_image(atria, tmp_path):
    label = atria / "Training Set/case1/laendo.nrrd"
    label.rename(tmp_path / "kept")
    refused("la", atria, tmp_path / "store", "case1/laendo.nrrd", "not there")
    (tmp_path / "kept").rename(label)
    image = atria / "Training Set/case2/lgemri.nrrd"
    image.write_bytes(image.read_bytes()[:-5000])
    refused("la", atria, tmp_path / "store", "case2/lgemri.nrrd", "NRRD")


@pytest.mark.parametrize(
    ("at", "size", "least", "expected"),
    [
        (50, 100, 1, (47, 53)),
        (50, 100, 18, (39, 62)),
        (3, 100, 20, (0, 20)),
        (97, 100, 20, (80, 100)),
        (7, 15, 20, (0, 15)),
    ],
)
def test_the_crop_has_its_margins_and_is_at_least_the_patch(at, size, least, expected):
    label = np.zeros((size, 4, 4), np.uint8)
    label[at] = 1
    x, y, _ = around_label(label, [(3, 2)], (least,), "label")
    assert (x.start, x.stop) == expected
    assert (y.start, y.stop) == (0, 4)


# --- BraTS-2019


@pytest.fixture
def tumours(tmp_path):
    root = tmp_path / "MICCAI_BraTS_2019_Data_Training"
    for number in range(6):
        random = np.random.default_rng(number)
        image = np.zeros((30, 28, 26), np.int16)
        image[5:25, 4:20, 3:23] = random.integers(50, 1000, (20, 16, 20))
        label = np.zeros(image.shape, np.int16)
        label[8:14, 8:12, 9:15] = random.choice([1, 2, 4], (6, 4, 6))
        folder = root / ("HGG" if number % 2 else "LGG") / f"BraTS19_{number}"
        write(folder / f"BraTS19_{number}_flair.nii.gz", image)
        write(folder / f"BraTS19_{number}_t1.nii.gz", image)
        write(folder / f"BraTS19_{number}_seg.nii.gz", label)
    return root


def test_raw_tumours(tumours, tmp_path):
    store = prepared("brats", tumours, tmp_path / "store")
    assert [len(store.ids(split)) for split in ("train", "val", "test")] == [4, 1, 1]
    case = store.load("BraTS19_3")
    assert case.image.shape == (1, 20, 16, 20)
    assert np.unique(case.label).tolist() == [0, 1]
    assert case.label.sum() == 6 * 4 * 6
    np.testing.assert_allclose([case.image.mean(), case.image.std()], [0, 1], atol=1e-4)
    assert case.image.max() < 2.5


def test_a_label_on_another_grid_than_its_image_is_refused(tumours, tmp_path):
    path = tumours / "HGG/BraTS19_3/BraTS19_3_seg.nii.gz"
    label, _ = read_volume(path.parent, path.name)
    for harmed, differs in (
        ({"array": label[0, 1:]}, "its shape (29, 28, 26) is not that of HGG/BraTS19_3/BraTS19_3_flair.nii.gz, (30, "),
        ({"array": label[0], "direction": np.diag([-1.0, 1, 1])}, "its direction"),
    ):
        write(path, **harmed)
        refused("brats", tumours, tmp_path / "store", "HGG/BraTS19_3/BraTS19_3_seg.nii.gz", differs)


def test_prepared_tumours_with_their_lists(tmp_path):
    (tmp_path / "data").mkdir()
    for case in "abc":
        with h5py.File(tmp_path / f"data/{case}.h5", "w") as file:
            file["image"], file["label"] = np.ones((4, 4, 4)), np.full((4, 4, 4), 4)
    for split, case in (("train", "b"), ("val", "c"), ("test", "a")):
        (tmp_path / f"{split}.txt").write_text(f"{case},more\n")
    store = prepared("brats", tmp_path, tmp_path / "store")
    assert [store.ids(split) for split in ("train", "val", "test")] == [["b"], ["c"], ["a"]]
    assert store.load("a").label.max() == 1
