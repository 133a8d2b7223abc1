"""Predictions come back on the image's own grid, to the voxel, whatever the format, the axes and the spacing."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK
import torch
import yaml
from test_raw import OBLIQUE, write, write_series

import mlrpl
from mlrpl import prediction
from mlrpl.config import Settings
from mlrpl.data.grid import from_patient_axes, to_patient_axes
from mlrpl.data.preparation import Preparation, Window
from mlrpl.errors import StudyError
from mlrpl.masks import keep_largest
from mlrpl.methods import Method
from mlrpl.precision import Precision
from mlrpl.prediction import Ensemble, Image, find_images, open_ensemble, predict, predict_image

CPU = torch.device("cpu")
FLIPPED = np.array([[0, 0, -1.0], [1, 0, 0], [0, -1, 0]])  # axes permuted and flipped
MIXED = OBLIQUE @ FLIPPED


class Threshold(Method):
    """A "network" that is right: what is brighter than `level` is class 1. Its second decoder is unsure."""

    def __init__(self, level, patch=(32, 32, 32), stride=(16, 16, 16)):
        super().__init__(Settings(patch=patch, stride=stride), 1, 2)
        self.level = level

    def predict(self, image, outputs):
        inside = torch.sigmoid(40 * (image[:, :1] - self.level))
        unsure = torch.full_like(inside, 0.5)
        made = {
            "mean": torch.cat([1 - inside, inside], 1),
            "disagreement": (inside - unsure).abs(),
        }
        return [made[name] for name in outputs]


def ensemble(preparation, level, **settings):
    store = SimpleNamespace(channels=1, classes=("background", "left organ"), preparation=preparation)
    return Ensemble("test", ((Threshold(level, **settings), Precision("float32")),), store, CPU)


def shape(size, spacing):
    """A solid of an ellipsoid and a box that looks like none of its mirror images, about 40 mm wide; HU-like values."""
    x, y, z = (np.indices(size) + 0.5) * np.reshape(spacing, (3, 1, 1, 1))
    wide = np.multiply(size, spacing)
    solid = ((x - 0.4 * wide[0]) / 12) ** 2 + ((y - 0.5 * wide[1]) / 9) ** 2 + ((z - 0.45 * wide[2]) / 10) ** 2 < 1
    box = (abs(x - 0.4 * wide[0]) < 20) & (abs(y - 0.5 * wide[1]) < 6)
    solid |= box & (z > 0.45 * wide[2]) & (z < 0.45 * wide[2] + 12)
    return np.where(solid, 100, -50), solid


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def read(path):
    image = SimpleITK.ReadImage(str(path))
    return SimpleITK.GetArrayFromImage(image).T, image


def assert_same_grid(path, original):
    _, image = read(path)
    assert image.GetSize() == original.GetSize()
    for ours, theirs in (
        (image.GetOrigin(), original.GetOrigin()),
        (image.GetSpacing(), original.GetSpacing()),
        (image.GetDirection(), original.GetDirection()),
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def convert_to_big_endian(path):
    """Rewrite an uncompressed little-endian NIfTI-1 of int16 voxels with its bytes the other way round."""
    data = bytearray(path.read_bytes())
    fields = [(0, 4, 1), (32, 4, 1), (36, 2, 1), (40, 2, 8), (56, 4, 3), (68, 2, 4), (76, 4, 8), (108, 4, 3)]
    fields += [(120, 2, 1), (124, 4, 4), (140, 4, 2), (252, 2, 2), (256, 4, 18), (352, 2, (len(data) - 352) // 2)]
    for start, width, count in fields:
        for at in range(start, start + width * count, width):
            data[at : at + width] = data[at : at + width][::-1]
    path.write_bytes(data)


@pytest.mark.parametrize(
    "direction", [np.eye(3), OBLIQUE, FLIPPED, MIXED], ids=["straight", "oblique", "flipped", "both"]
)
@pytest.mark.parametrize("axes", ["file", "patient"])
def test_without_resampling_every_voxel_comes_back(tmp_path, direction, axes):
    size, spacing = (44, 40, 52), (1.0, 1.2, 1.1)
    values, solid = shape(size, spacing)
    write(tmp_path / "in.nii.gz", values.astype(np.int16), spacing, (-20, 30, 11), direction)
    files = predict_image(
        ensemble(Preparation(axes=axes), 1.0), Image("in", (tmp_path / "in.nii.gz",)), tmp_path / "out"
    )
    labels, image = read(files[0])
    assert image.GetPixelID() == SimpleITK.sitkUInt8
    np.testing.assert_array_equal(labels == 1, solid)
    assert_same_grid(files[0], read(tmp_path / "in.nii.gz")[1])


@pytest.mark.parametrize("direction", [np.eye(3), MIXED], ids=["straight", "both"])
@pytest.mark.parametrize(("spacing", "target"), [((0.8, 0.7, 2.0), (1, 1, 1)), ((1, 1, 1), (1.2, 1.2, 1.6))])
def test_with_resampling_the_shape_comes_back(tmp_path, direction, spacing, target):
    size = tuple(int(56 / side) for side in spacing)
    values, solid = shape(size, spacing)
    write(tmp_path / "in.nii.gz", values.astype(np.float32), spacing, (-20, 30, 11), direction)
    window = Window(low=-50, high=100, mean=25, sd=75)
    preparation = Preparation(axes="patient", spacing=target, channels=(window,))
    files = predict_image(
        ensemble(preparation, 0.0), Image("in", (tmp_path / "in.nii.gz",)), tmp_path / "out", probabilities=True
    )
    labels, _ = read(files[0])
    assert dice(labels == 1, solid) > 0.97
    for path in files:
        assert_same_grid(path, read(tmp_path / "in.nii.gz")[1])
    probability, _ = read(files[1])
    np.testing.assert_array_equal(probability > 0.5, labels == 1)


@pytest.mark.parametrize("direction", [np.eye(3), OBLIQUE, MIXED], ids=["straight", "oblique", "both"])
@pytest.mark.parametrize("target", [None, (1, 1, 1)])
def test_labels_go_through_preparation_and_back(direction, target):
    size, spacing = (40, 50, 30), (1.3, 0.9, 1.7)
    values, solid = shape(size, spacing)
    geometry = {"spacing": list(spacing), "origin": [4.0, -5, 6], "direction": direction.ravel().tolist()}
    preparation = Preparation(axes="patient", spacing=target)
    prepared = preparation.apply(values[None].astype(np.float32), geometry, "in")
    label = preparation.label(solid.astype(np.uint8), geometry, prepared)
    assert label.shape == prepared.image.shape[1:]
    back = preparation.restore(label, prepared) > 0.5
    assert dice(back, solid) == 1 if target is None else dice(back, solid) > 0.97


@pytest.mark.parametrize("direction", [np.eye(3), OBLIQUE, FLIPPED, MIXED])
def test_turning_axes_keeps_every_voxel_at_its_place(direction):
    array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    geometry = {"spacing": [1.0, 2.0, 3.0], "origin": [7.0, 8.0, 9.0], "direction": direction.ravel().tolist()}
    turned, place = to_patient_axes(array, geometry)

    def where(shape, geometry):
        points = np.indices(shape).reshape(3, -1) * np.reshape(geometry["spacing"], (3, 1))
        return (np.reshape(geometry["direction"], (3, 3)) @ points).T + geometry["origin"]

    def at(array, geometry):
        return {
            tuple(p): v for p, v in zip(where(array.shape[1:], geometry).round(6) + 0.0, array[0].ravel(), strict=True)
        }

    assert at(turned, place) == at(array, geometry)
    assert (np.diag(np.reshape(place["direction"], (3, 3))) > 0.7).all()
    np.testing.assert_array_equal(from_patient_axes(turned, geometry), array)


@pytest.mark.parametrize("form", ["float.nii", "big.nii", "other.nrrd", "dicom"])
def test_formats(tmp_path, form):
    size, spacing, direction = (40, 36, 34), (1.0, 1.1, 1.2), np.diag([1.0, -1, -1])
    values, solid = shape(size, spacing)
    path = tmp_path / form
    if form == "dicom":
        write_series(path, values, spacing, (-20, 30, 11), direction)
    else:
        write(path, values.astype(np.float32 if form == "float.nii" else np.int16), spacing, (-20, 30, 11), direction)
    if form == "big.nii":
        before = read(path)[0]
        convert_to_big_endian(path)
        np.testing.assert_array_equal(read(path)[0], before)
    (image,) = find_images([path], 1)
    files = predict_image(ensemble(Preparation(axes="patient"), 1.0), image, tmp_path / "out")
    assert files[0].name == f"{form.partition('.')[0]}.nii.gz"
    labels, _ = read(files[0])
    np.testing.assert_array_equal(labels == 1, solid)
    if form != "dicom":
        assert_same_grid(files[0], read(path)[1])


def test_what_else_can_be_written(tmp_path):
    values, solid = shape((40, 36, 34), (1, 1, 1))
    values[2, 2, 2] = 100  # a speck
    write(tmp_path / "in.nii.gz", values.astype(np.int16))
    windows = []
    files = predict_image(
        ensemble(Preparation(), 1.0),
        Image("in", (tmp_path / "in.nii.gz",)),
        tmp_path / "out",
        probabilities=True,
        disagreement=True,
        largest=True,
        watch=lambda *done: windows.append(done),
    )
    assert [path.name for path in files] == ["in.nii.gz", "in_probability_left-organ.nii.gz", "in_disagreement.nii.gz"]
    labels, probability, apart = (read(path)[0] for path in files)
    np.testing.assert_array_equal(labels == 1, solid)
    assert probability[2, 2, 2] > 0.5
    np.testing.assert_allclose(apart, abs(probability - 0.5), atol=2e-3)
    assert windows[-1][0] == windows[-1][1] == 2 * 2 * 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in files)


def test_several_runs_are_averaged(tmp_path):
    values, _ = shape((40, 36, 34), (1, 1, 1))
    write(tmp_path / "in.nii.gz", values.astype(np.int16))
    always = SimpleNamespace(outputs=("decoder1",), predict=lambda image, _: [torch.cat([0 * image, 0 * image + 1], 1)])
    one = ensemble(Preparation(), 1.0)
    both = Ensemble("both", (*one.methods, (always, Precision("float32"))), one.store, CPU)
    image = Image("in", (tmp_path / "in.nii.gz",))
    alone, averaged = (
        read(predict_image(e, image, tmp_path / name, probabilities=True)[1])[0]
        for name, e in (("a", one), ("b", both))
    )
    np.testing.assert_allclose(averaged, (alone + 1) / 2, atol=1e-3)


def test_the_largest_component_of_each_class():
    labels = np.zeros((9, 9, 9), np.uint8)
    labels[:3, :3, :3] = 1
    labels[3, 3, 3] = 1  # touches by a corner
    labels[6:8, 6:8, 6] = 1
    labels[0, 0, 8] = 2
    expected = labels.copy()
    expected[6:8, 6:8, 6] = 0
    keep_largest(labels, 4)
    np.testing.assert_array_equal(labels, expected)


def test_finding_images(tmp_path):
    for name in ("a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz", "._a_0000.nii.gz", "notes.txt"):
        (tmp_path / name).touch()
    found = find_images([tmp_path], 2)
    assert [(image.name, [path.name for path in image.files]) for image in found] == [
        ("a", ["a_0000.nii.gz", "a_0001.nii.gz"]),
        ("b", ["b_0000.nii.gz", "b_0001.nii.gz"]),
    ]
    assert [image.name for image in find_images([tmp_path / "b_0000.nii.gz"], 1)] == ["b"]
    (tmp_path / "more").mkdir()
    (tmp_path / "more/b_0000.nii.gz").touch()
    with pytest.raises(StudyError, match="would be named 'b'"):
        find_images([tmp_path / "b_0000.nii.gz", tmp_path / "more"], 1)
    with pytest.raises(StudyError, match="not there"):
        find_images([tmp_path / "c.nii"], 1)


def test_a_variant_of_several_runs_is_answered_with_their_names(tmp_path):
    study = yaml.safe_load((Path(mlrpl.__file__).parent / "studies/smoke.yaml").read_text(encoding="utf-8"))
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**study, "name": "s", "seeds": [0, 1]}))
    with pytest.raises(StudyError, match="study s: mlrpl is several runs, name one: mlrpl-2-s0, mlrpl-2-s1"):
        open_ensemble(f"{tmp_path}/s.yaml/mlrpl", str(tmp_path / "runs"), CPU)


def test_a_study_of_images_with_voxels_left_out_does_not_predict(tmp_path):
    with pytest.raises(StudyError, match=r"voxels left out \(step: 2\); predict with one of step: 1"):
        open_ensemble("la-half", str(tmp_path), CPU)


def test_what_cannot_be_predicted_is_named_and_leaves_nothing(tmp_path):
    (tmp_path / "broken.nii.gz").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "photo.png").touch()
    values = np.zeros((2, 8, 8, 8), np.float32)
    two = SimpleITK.JoinSeries([SimpleITK.GetImageFromArray(v) for v in values])
    SimpleITK.WriteImage(two, str(tmp_path / "two.nii.gz"))
    for name, match in (
        ("broken.nii.gz", r"broken\.nii\.gz"),
        ("empty", "no DICOM"),
        ("photo.png", "neither NIfTI"),
        ("two.nii.gz", "2 channels"),
    ):
        (image,) = find_images([tmp_path / name], 1)
        with pytest.raises(StudyError, match=match):
            predict_image(ensemble(Preparation(), 1.0), image, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_channels_of_other_grids_are_refused(tmp_path):
    one, other = tmp_path / "p_0000.nii.gz", tmp_path / "p_0001.nii.gz"
    write(one, np.zeros((8, 8, 8), np.float32))
    for size, spacing, differs in (((8, 8, 9), (1, 1, 1), "shape"), ((8, 8, 8), (1, 1, 2), "spacing")):
        write(other, np.zeros(size, np.float32), spacing)
        with pytest.raises(StudyError, match=rf"p_0001.nii.gz: its {differs} \(.*\) is not that of p_0000"):
            predict_image(ensemble(Preparation(), 1.0), Image("p", (one, other)), tmp_path / "out")


@pytest.mark.parametrize(("files", "channels", "names"), [
    (["p_0000", "p_0001"], 2, {"p": 2}),
    (["p_0000", "p_0001", "p_0002"], 2, {"p_0000": 1, "p_0001": 1, "p_0002": 1}),  # cases of four axes
    (["a/p_0000", "b/p_0001"], 2, {"p_0000": 1, "p_0001": 1}),  # of two patients
    (["p_0001"], 2, {"p_0001": 1}),
    (["p_0000"], 1, {"p": 1}),
    (["p_0000", "p_0001"], 1, {"p_0000": 1, "p_0001": 1}),
])  # fmt: skip
def test_files_are_channels_only_where_all_are_there_and_no_other(tmp_path, files, channels, names):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.nii.gz").touch()
    found = find_images([tmp_path / f"{name}.nii.gz" for name in files], channels)
    assert {image.name: len(image.files) for image in found} == names


def test_neither_images_nor_labels_are_written_over(tmp_path, monkeypatch):
    monkeypatch.setattr(prediction, "open_ensemble", lambda *_: ensemble(Preparation(), 50))
    values, _ = shape((30, 30, 30), (1, 1, 1))
    write(tmp_path / "scans/p.nii.gz", values.astype(np.float32))
    before = (tmp_path / "scans/p.nii.gz").read_bytes()
    for output in ("scans", "labelsTr"):
        with pytest.raises(StudyError, match="into a folder of their own"):
            predict("x", [tmp_path / "scans"], tmp_path / output, runs="", device=CPU, bar=lambda _: None)
    assert (tmp_path / "scans/p.nii.gz").read_bytes() == before
    (tmp_path / "labels").mkdir()
    for name, more in (("p.nii.gz", {}), ("p_probability_left-organ.nii.gz", {"probabilities": True})):
        (there := tmp_path / "labels" / name).write_bytes(b"drawn by hand")
        ask = partial(predict, "x", [tmp_path / "scans"], there.parent, runs="", device=CPU, bar=lambda _: None, **more)
        with pytest.raises(StudyError, match=rf"{name}: is there already; .* add --overwrite"):
            ask()
        assert [(path.name, path.read_bytes()) for path in there.parent.iterdir()] == [(name, b"drawn by hand")]
        assert ask(overwrite=True) == {} and there.read_bytes() != b"drawn by hand"
        for path in there.parent.iterdir():
            path.unlink()
    with pytest.raises(StudyError, match=r"its images lie deeper, as in .*scans; give that folder"):
        find_images([tmp_path], 1)


def test_a_label_map_that_is_not_whole_takes_no_files_place(tmp_path, monkeypatch):
    values, _ = shape((30, 30, 30), (1, 1, 1))
    write(tmp_path / "p.nii.gz", values.astype(np.float32))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/p.nii.gz").write_bytes(b"before")
    save = SimpleITK.WriteImage

    def cut(image, path, **how):  # as on a full disk, where ITK says nothing
        save(image, path, **how)
        Path(path).write_bytes(Path(path).read_bytes()[:-20])

    monkeypatch.setattr(SimpleITK, "WriteImage", cut)
    with pytest.raises(StudyError, match="could not be written to its end"):
        predict_image(ensemble(Preparation(), 50), Image("p", (tmp_path / "p.nii.gz",)), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["p.nii.gz"]
    assert (tmp_path / "out/p.nii.gz").read_bytes() == b"before"


def test_classes_whose_names_differ_in_signs_alone_have_a_map_each(tmp_path):
    values, _ = shape((30, 30, 30), (1, 1, 1))
    write(tmp_path / "p.nii.gz", values.astype(np.float32))
    signs = ensemble(Preparation(), 50)
    signs.store.classes = ("Tumor +", "Tumor -")
    written = predict_image(signs, Image("p", (tmp_path / "p.nii.gz",)), tmp_path / "out", probabilities=True)
    assert [path.name for path in written] == ["p.nii.gz", "p_probability_1.nii.gz"]


def test_voxels_unlike_those_that_were_learnt_from_are_noted(tmp_path):
    values, _ = shape((30, 30, 30), (1, 1, 1))
    taught, notes = ensemble(Preparation(), 50), []
    taught.store.usual_spacing = np.array([1, 1, 1.2])
    for name, thick in (("like", 1.3), ("unlike", 3)):
        write(tmp_path / f"{name}.nii.gz", values.astype(np.float32), (1, 1, thick))
        predict_image(taught, Image(name, (tmp_path / f"{name}.nii.gz",)), tmp_path / "out", note=notes.append)
    assert len(notes) == 1 and notes[0].startswith(
        "unlike: voxels of 1 × 1 × 3 mm, but the network learned from 1 × 1 × 1.2 mm"
    )
