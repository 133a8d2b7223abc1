"""Datasets as people hold them: accepted as they are, and whatever is wrong is named in one line."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import SimpleITK

from mlrpl.data import open_store, prepare
from mlrpl.data.decathlon import Decathlon
from mlrpl.data.volumes import read_nifti
from mlrpl.errors import StudyError

SHAPE = (9, 8, 7)
CASES = "2018LA_Seg_Training Set"


def volume(number, shape=SHAPE):
    return np.random.default_rng(number).normal(5, 2, shape).astype(np.float32)


def mask(number, classes=2, shape=SHAPE):
    return np.random.default_rng(100 + number).integers(0, classes, shape, np.uint8)


def prepared(source, root, folder, step=1, **options):
    return prepare(SimpleNamespace(name="dataset", source=source, options=options, step=step), root, folder)


def refused(source, root, tmp_path, *named, **options):
    """The one line that preparation ends with; it names all of `named`, and nothing is left."""
    with pytest.raises(StudyError) as error:
        prepared(source, root, tmp_path / "out" / "store", **options)
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in named), message
    left = [path.name for path in (tmp_path / "out").rglob("*") if path.suffix != ".lock"]
    assert left == []
    return message


# --- left atrium


@pytest.fixture
def la(tmp_path):
    """Six cases in the published layout, the lists in an order of their own."""
    root = tmp_path / "LA"
    for number in range(6):
        write_h5(root, f"case{number}", image=volume(number), label=mask(number))
    write_list(root / "train.list", ["case4", "case1", "case3", "case0"])
    write_list(root / "test.list", ["case5", "case2"])
    return root


def write_h5(root, case, **arrays):
    folder = root / CASES / case
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "mri_norm2.h5", "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip")


def write_list(path, cases):
    path.write_text("".join(f"{case}\n" for case in cases))


def test_cases_and_folders_that_are_links_are_found(la, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for folder in (la / CASES).iterdir():
        (linked / folder.name).symlink_to(folder)
    (linked / "again").symlink_to(linked)  # a loop
    (linked / "second name of case1").symlink_to(linked / "case1")
    (linked / "up").symlink_to(tmp_path)  # where other data may be
    for name in ("train.list", "test.list"):
        (linked / name).symlink_to(la / name)
    stores = [prepared("la", root, tmp_path / f"store-{root.name}") for root in (la, linked)]
    assert stores[0].fingerprint == stores[1].fingerprint


@pytest.mark.parametrize("there", ["train", "test"])
def test_one_list_without_the_other_is_a_mistake(la, tmp_path, there):
    other = {"train": "test", "test": "train"}[there]
    (la / f"{other}.list").rename(la / f"{other[:-1]}.list")
    refused("la", la, tmp_path, f"{there}.list is there, but no {other}.list beside it")


def test_la_is_taken_as_it_is(la, tmp_path):
    store = prepared("la", la, tmp_path / "store")
    assert store.ids("train") == ["case4", "case1", "case3", "case0"]
    assert store.ids("test") == ["case5", "case2"]
    assert store.index["split"] == "published"
    assert (store.classes, store.channels, store.real_spacing) == (("background", "left atrium"), 1, False)
    assert "Xiong" in store.citation
    assert store.licence
    case = store.load("case3")
    np.testing.assert_array_equal(case.image, volume(3)[None])
    np.testing.assert_array_equal(case.label, mask(3))
    assert str(tmp_path) not in (store.folder / "store.json").read_text()


def test_la_lists_are_found_above_and_below(la, tmp_path):
    expected = prepared("la", la, tmp_path / "a").fingerprint
    assert prepared("la", la / CASES, tmp_path / "b").fingerprint == expected
    assert prepared("la", tmp_path, tmp_path / "c").fingerprint == expected


def test_la_without_lists_gets_a_seeded_split_and_says_so(la, tmp_path):
    for name in ("train.list", "test.list"):
        (la / name).unlink()
    store = prepared("la", la, tmp_path / "a")
    assert store.index["split"] == "seeded"
    assert (len(store.ids("train")), len(store.ids("test"))) == (5, 1)
    assert prepared("la", la, tmp_path / "b").fingerprint == store.fingerprint
    assert {prepared("la", la, tmp_path / "b", seed=n).fingerprint for n in range(4)} - {store.fingerprint}


def test_la_another_order_in_the_list_is_noticed(la, tmp_path):
    before = prepared("la", la, tmp_path / "store")
    write_list(la / "train.list", ["case1", "case4", "case3", "case0"])
    after = prepared("la", la, tmp_path / "store")
    assert after.ids("train")[0] == "case1"
    assert after.fingerprint != before.fingerprint


def test_la_truncated_file(la, tmp_path):
    path = la / CASES / "case1" / "mri_norm2.h5"
    path.write_bytes(path.read_bytes()[:-1000])
    refused("la", la, tmp_path, "case1/mri_norm2.h5", "HDF5")


def test_la_empty_file(la, tmp_path):
    (la / CASES / "case1" / "mri_norm2.h5").write_bytes(b"")
    refused("la", la, tmp_path, "case1/mri_norm2.h5")


def test_la_shape_mismatch(la, tmp_path):
    write_h5(la, "case3", image=volume(3), label=mask(3, shape=(9, 8, 6)))
    refused("la", la, tmp_path, "case3/mri_norm2.h5", "(9, 8, 6)", "(9, 8, 7)")


@pytest.mark.parametrize("value", [2, 255])
def test_la_label_outside_the_classes(la, tmp_path, value):
    label = mask(0)
    label[2, 2, 2] = value
    write_h5(la, "case0", image=volume(0), label=label)
    refused("la", la, tmp_path, "case0/mri_norm2.h5", f"value {value}")


@pytest.mark.parametrize("value", [-1, 0.5, np.nan])
def test_la_label_that_is_no_class_at_all(la, tmp_path, value):
    label = mask(0).astype(np.float32)
    label[2, 2, 2] = value
    write_h5(la, "case0", image=volume(0), label=label)
    refused("la", la, tmp_path, "case0/mri_norm2.h5", f"value {value:g}")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_la_voxels_that_are_not_finite(la, tmp_path, value):
    image = volume(2)
    image[1, 1, 1:3] = value
    write_h5(la, "case2", image=image, label=mask(2))
    refused("la", la, tmp_path, "case2/mri_norm2.h5", "2 voxels")


def test_la_file_without_label(la, tmp_path):
    write_h5(la, "case2", image=volume(2))
    refused("la", la, tmp_path, "case2/mri_norm2.h5", "'label'")


def test_la_list_names_an_absent_case(la, tmp_path):
    write_list(la / "train.list", ["case4", "case9"])
    refused("la", la, tmp_path, "train.list", "case9")


def test_la_case_in_both_lists(la, tmp_path):
    write_list(la / "train.list", ["case4", "case5"])
    refused("la", la, tmp_path, "test.list", "case5")


def test_la_empty_list(la, tmp_path):
    write_list(la / "test.list", [])
    refused("la", la, tmp_path, "no test case")


def test_la_case_twice_on_disk(la, tmp_path):
    shutil.copytree(la / CASES / "case1", la / "copy" / "case1")
    refused("la", la, tmp_path, "case1", "copy")


def test_every_case_is_checked_and_the_first_problem_named(la, tmp_path):
    for number in (4, 3, 5):
        write_h5(la, f"case{number}", image=np.full(SHAPE, np.nan, np.float32), label=mask(number))
    refused("la", la, tmp_path, "case4/mri_norm2.h5", "2 more")


def test_a_failed_preparation_leaves_the_previous_store(la, tmp_path):
    before = prepared("la", la, tmp_path / "store").fingerprint
    write_h5(la, "case2", image=volume(2))
    with pytest.raises(StudyError):
        prepared("la", la, tmp_path / "store")
    assert open_store(tmp_path / "store").fingerprint == before


@pytest.mark.parametrize("source", ["la", "decathlon"])
def test_empty_missing_and_no_folder(source, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(source, tmp_path / "empty", tmp_path, str(tmp_path / "empty"))
    refused(source, tmp_path / "nowhere", tmp_path, str(tmp_path / "nowhere"), "DATA=/path")
    refused(source, None, tmp_path, "dataset", "DATA=/path")


def test_without_a_folder_a_prepared_store_is_opened(la, tmp_path):
    store = prepared("la", la, tmp_path / "store")
    assert prepared("la", None, tmp_path / "store").fingerprint == store.fingerprint
    with pytest.raises(StudyError, match="DATA=/path"):
        prepared("la", None, tmp_path / "store", step=2)


# --- decathlon

SPACING, ORIGIN, DIRECTION = (0.5, 0.75, 2.0), (10.0, -20.0, 3.5), (-1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)


def write_nifti(path, array, spacing=SPACING, origin=ORIGIN, direction=DIRECTION):
    """Write an (x, y, z) array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction)
    SimpleITK.WriteImage(image, str(path))


def write_description(root, **changes):
    root.mkdir(parents=True, exist_ok=True)
    description = {
        "name": "Organ",
        "reference": "somebody",
        "licence": "CC BY 4.0",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "front", "2": "back"},
    } | changes
    (root / "dataset.json").write_text(json.dumps({key: value for key, value in description.items() if value}))


@pytest.fixture
def decathlon(tmp_path):
    """Six labelled and two unlabelled cases, three classes."""
    root = tmp_path / "Organ"
    write_description(
        root,
        training=[{"image": f"./imagesTr/organ_{n}.nii.gz", "label": f"./labelsTr/organ_{n}.nii.gz"} for n in range(6)],
    )
    for number in range(8):
        write_nifti(root / f"imagesTr/organ_{number}.nii.gz", volume(number))
        if number < 6:
            write_nifti(root / f"labelsTr/organ_{number}.nii.gz", mask(number, 3))
    (root / "imagesTr/._organ_0.nii.gz").write_bytes(b"macOS leaves such files")
    return root


def test_decathlon(decathlon, tmp_path):
    store = prepared("decathlon", decathlon, tmp_path / "store", test=2)
    train, test = store.ids("train"), store.ids("test")
    assert (len(train), len(test)) == (6, 2)
    assert train[-2:] == ["organ_6", "organ_7"]
    assert sorted(train[:-2] + test) == [f"organ_{n}" for n in range(6)]
    assert store.index["split"] == "seeded"
    assert (store.classes, store.channels, store.real_spacing) == (("background", "front", "back"), 1, True)
    assert (store.licence, store.citation) == ("CC BY 4.0", "somebody")
    labelled, unlabelled = store.load("organ_1"), store.load("organ_6")
    expected = volume(1).astype(np.float64)
    np.testing.assert_allclose(labelled.image[0], (expected - expected.mean()) / expected.std(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(labelled.label, mask(1, 3))
    assert labelled.spacing == SPACING
    assert unlabelled.label is None
    assert unlabelled.image.shape == (1, *SHAPE)
    entry = next(case for case in store.index["cases"] if case["id"] == "organ_1")
    assert entry["geometry"] == {"origin": list(ORIGIN), "direction": list(DIRECTION)}
    assert (entry["has_label"], entry["shape"]) == (True, list(SHAPE))


def test_decathlon_seed_draws_the_split(decathlon, tmp_path):
    splits = {tuple(prepared("decathlon", decathlon, tmp_path / "store", test=2, seed=n).ids("test")) for n in range(6)}
    assert len(splits) > 2
    again = prepared("decathlon", decathlon, tmp_path / "store", test=2, seed=0)
    assert prepared("decathlon", decathlon, tmp_path / "other", test=2, seed=0).fingerprint == again.fingerprint


def test_decathlon_half_resolution_keeps_the_origin_and_doubles_the_spacing(decathlon, tmp_path):
    store = prepared("decathlon", decathlon, tmp_path / "store", step=2, test=2)
    assert store.load("organ_1").image.shape == (1, 5, 4, 4)
    assert store.load("organ_1").spacing == (1.0, 1.5, 4.0)
    assert store.index["cases"][0]["geometry"]["origin"] == list(ORIGIN)


def test_channels_in_the_fourth_axis_and_in_files_of_their_own(tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    for root in (one, many):
        write_description(root, modality={"0": "T1", "1": "T2"})
    for number in range(3):
        channels = [volume(number), volume(50 + number)]
        joined = SimpleITK.JoinSeries([SimpleITK.GetImageFromArray(np.ascontiguousarray(c.T)) for c in channels])
        (one / "imagesTr").mkdir(exist_ok=True)
        SimpleITK.WriteImage(joined, str(one / f"imagesTr/o{number}.nii.gz"))
        for root in (one, many):
            write_nifti(root / f"labelsTr/o{number}.nii.gz", mask(number, 3), (1,) * 3, (0,) * 3, np.eye(3).ravel())
        for index, channel in enumerate(channels):
            write_nifti(many / f"imagesTr/o{number}_000{index}.nii.gz", channel, (1,) * 3, (0,) * 3, np.eye(3).ravel())
    stores = [prepared("decathlon", root, tmp_path / f"{root.name}-store", test=1) for root in (one, many)]
    assert stores[0].channels == 2
    assert stores[0].load("o1").image.shape == (2, *SHAPE)
    assert stores[0].fingerprint == stores[1].fingerprint
    (many / "imagesTr/o1_0001.nii.gz").unlink()
    refused("decathlon", many, tmp_path, "imagesTr", "o1", test=1)


def test_nnunet_description_and_four_digit_case_names(decathlon, tmp_path):
    expected = prepared("decathlon", decathlon, tmp_path / "a", test=2)
    write_description(
        decathlon,
        modality=None,
        channel_names={"0": "MRI"},
        file_ending=".nii.gz",
        labels={"background": 0, "front": 1, "back": 2},
    )
    assert prepared("decathlon", decathlon, tmp_path / "b", test=2).fingerprint == expected.fingerprint
    for path in sorted(decathlon.rglob("organ_*")):
        path.rename(path.with_name(path.name.replace("organ_", "organ_000")))
    assert prepared("decathlon", decathlon, tmp_path / "c", test=2).ids("train")[-1] == "organ_0007"


def test_labelled_imagests_are_the_test_cases_and_others_unlabelled(decathlon, tmp_path):
    for number in range(20, 23):
        write_nifti(decathlon / f"imagesTs/organ_{number}.nii.gz", volume(number))
    store = prepared("decathlon", decathlon, tmp_path / "store", test=2)
    assert store.ids("train")[-5:] == ["organ_20", "organ_21", "organ_22", "organ_6", "organ_7"]
    write_nifti(decathlon / "labelsTs/organ_21.nii.gz", mask(21, 3))
    store = prepared("decathlon", decathlon, tmp_path / "store", test=2)
    assert store.ids("test") == ["organ_21"]
    assert len(store.ids("train")) == 10
    assert store.index["split"] == "published"


@pytest.mark.parametrize("part", ["imagesTr", "labelsTr"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.98])
def test_truncated_nifti(decathlon, tmp_path, part, keep, capfd):
    path = decathlon / part / "organ_4.nii.gz"
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    refused("decathlon", decathlon, tmp_path, f"{part}/organ_4.nii.gz", test=2)
    assert capfd.readouterr().err == ""


def test_truncated_uncompressed_nifti(decathlon, tmp_path):
    for case in ("organ_0", "organ_6"):
        (decathlon / f"imagesTr/{case}.nii.gz").unlink()
        write_nifti(decathlon / f"imagesTr/{case}.nii", volume(0))
    write_description(decathlon)
    prepared("decathlon", decathlon, tmp_path / "store", test=2)
    path = decathlon / "imagesTr/organ_6.nii"
    path.write_bytes(path.read_bytes()[:-40])
    refused("decathlon", decathlon, tmp_path, "imagesTr/organ_6.nii", test=2)


def test_axes_that_are_not_at_right_angles_are_no_truncation(tmp_path):
    write_nifti(tmp_path / "sheared.nii", volume(0), (1, 1, 1), (0, 0, 0), np.eye(3).ravel())
    header = bytearray((tmp_path / "sheared.nii").read_bytes())
    struct.pack_into("<2h", header, 252, 0, 1)  # no quaternion, an affine matrix
    struct.pack_into("<12f", header, 280, 1, 0.05, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)
    (tmp_path / "sheared.nii").write_bytes(header)
    with pytest.raises(StudyError, match="axes are not at right angles"):
        read_nifti(tmp_path, "sheared.nii")


def test_label_without_image(decathlon, tmp_path):
    write_nifti(decathlon / "labelsTr/organ_9.nii.gz", mask(9, 3))
    refused("decathlon", decathlon, tmp_path, "labelsTr/organ_9.nii.gz", "without an image", test=2)


@pytest.mark.parametrize("name", ["imagesTr/organ_3.nii.gz", "labelsTr/organ_3.nii.gz"])
def test_list_names_an_absent_file(decathlon, tmp_path, name):
    (decathlon / name).unlink()
    refused("decathlon", decathlon, tmp_path, "dataset.json", name, test=2)


def test_decathlon_label_outside_the_classes(decathlon, tmp_path):
    label = mask(2, 3)
    label[0, 0, 0] = 3
    write_nifti(decathlon / "labelsTr/organ_2.nii.gz", label)
    refused("decathlon", decathlon, tmp_path, "labelsTr/organ_2.nii.gz", "value 3", test=2)


def test_decathlon_shape_mismatch(decathlon, tmp_path):
    write_nifti(decathlon / "labelsTr/organ_2.nii.gz", mask(2, 3, (9, 7, 7)))
    refused("decathlon", decathlon, tmp_path, "labelsTr/organ_2.nii.gz", "(9, 7, 7)", "(9, 8, 7)", test=2)


def test_decathlon_nan(decathlon, tmp_path):
    image = volume(7)
    image[0, 0, 0] = np.nan
    write_nifti(decathlon / "imagesTr/organ_7.nii.gz", image)
    refused("decathlon", decathlon, tmp_path, "imagesTr/organ_7.nii.gz", "NaN", test=2)


def test_decathlon_constant_image(decathlon, tmp_path):
    write_nifti(decathlon / "imagesTr/organ_7.nii.gz", np.ones(SHAPE, np.float32))
    refused("decathlon", decathlon, tmp_path, "imagesTr/organ_7.nii.gz", "same value", test=2)


@pytest.mark.parametrize(
    ("key", "value"),
    [("spacing", (0.5, 0.75, 1.0)), ("origin", (10.0, -20.0, 5.5)), ("direction", (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))],
)
def test_a_label_that_lies_elsewhere(decathlon, tmp_path, key, value):
    write_nifti(decathlon / "labelsTr/organ_2.nii.gz", mask(2, 3), **{key: value})
    refused("decathlon", decathlon, tmp_path, "labelsTr/organ_2.nii.gz", key, test=2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"labels": {"0": "background", "2": "organ"}}, "[0, 2]"),
        ({"labels": {"background": 0, "organ": [1, 2]}}, "regions"),
        ({"labels": {"0": "background"}}, "[0]"),
        ({"labels": None}, "no labels"),
        ({"modality": None}, "channel_names or modality"),
        ({"modality": {"0": "T1", "1": "T2"}}, "the image has 1 channels or time points instead of 2; take"),
    ],
)
def test_wrong_description(decathlon, tmp_path, changes, named):
    write_description(decathlon, **changes)
    refused("decathlon", decathlon, tmp_path, named, test=2)


def test_description_that_is_not_json(decathlon, tmp_path):
    (decathlon / "dataset.json").write_text("{'labels'")
    refused("decathlon", decathlon, tmp_path, "dataset.json", test=2)


def test_too_many_test_cases(decathlon, tmp_path):
    refused("decathlon", decathlon, tmp_path, "6 labelled cases", "60")


def test_a_killed_preparation_reads_a_changed_file_again(decathlon, tmp_path, monkeypatch):
    read = Decathlon.read
    monkeypatch.setattr(Decathlon, "read", lambda self, entry: stop() if entry.id == "organ_6" else read(self, entry))

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared("decathlon", decathlon, tmp_path / "store", test=2)
    monkeypatch.undo()
    path = decathlon / "imagesTr/organ_1.nii.gz"
    before = path.stat().st_size
    write_nifti(path, volume(1), origin=(11.0, -20.0, 3.5))
    write_nifti(decathlon / "labelsTr/organ_1.nii.gz", mask(1, 3), origin=(11.0, -20.0, 3.5))
    assert path.stat().st_size == before  # only the bytes tell
    store = prepared("decathlon", decathlon, tmp_path / "store", test=2)
    entry = next(case for case in store.index["cases"] if case["id"] == "organ_1")
    assert entry["geometry"]["origin"][0] == 11.0


def test_usable_cases_are_used_and_every_problem_is_named_once(decathlon, tmp_path):
    """Unlabelled images, a label without an image, mismatched grids, a corrupt gzip, a .DS_Store."""
    write_nifti(decathlon / "labelsTr/organ_9.nii.gz", mask(9, 3))
    write_nifti(decathlon / "labelsTr/organ_2.nii.gz", mask(2, 3), spacing=(0.5, 0.75, 1.0))
    write_nifti(decathlon / "labelsTr/organ_3.nii.gz", mask(3, 3, (9, 7, 7)))
    path = decathlon / "imagesTr/organ_4.nii.gz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    (decathlon / "imagesTr/.DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (decathlon / "labelsTr/.DS_Store").write_bytes(b"\0\0\0\1Bud1")
    write_description(decathlon)
    refused("decathlon", decathlon, tmp_path, "labelsTr/organ_9.nii.gz", test=0)
    store = prepared("decathlon", decathlon, tmp_path / "store", test=0, lenient=True)
    assert sorted(store.ids("train")[:3]) == ["organ_0", "organ_1", "organ_5"]
    assert store.ids("train")[-2:] == ["organ_6", "organ_7"]
    problems = {each["case"]: each["problem"] for each in store.index["rejected"]}
    assert sorted(problems) == ["organ_2", "organ_3", "organ_4", "organ_9"]
    assert len(store.index["rejected"]) == 4
    assert "spacing" in problems["organ_2"] and "export both on the same grid" in problems["organ_2"]
    assert "(9, 7, 7)" in problems["organ_3"]
    assert "organ_4.nii.gz" in problems["organ_4"] and "copy it again" in problems["organ_4"]
    assert "remove the label" in problems["organ_9"]
    assert sorted(path.name for path in (store.folder / "cases").iterdir()) == sorted(store.ids("train"))
    assert str(tmp_path) not in (store.folder / "store.json").read_text()


def test_nothing_usable_is_refused_also_when_lenient(decathlon, tmp_path):
    for path in (decathlon / "imagesTr").glob("organ*"):
        path.write_bytes(b"nothing")
    refused("decathlon", decathlon, tmp_path, "organ_", "more cases", test=0, lenient=True)


def test_imagests_may_be_left_alone(decathlon, tmp_path):
    expected = prepared("decathlon", decathlon, tmp_path / "store", test=2)
    write_nifti(decathlon / "imagesTs/organ_20.nii.gz", volume(20))
    assert "organ_20" in prepared("decathlon", decathlon, tmp_path / "store", test=2).ids("train")
    without = prepared("decathlon", decathlon, tmp_path / "store", test=2, images_ts=False)
    assert without.fingerprint == expected.fingerprint


def test_training_needs_no_simpleitk():
    code = "import sys; sys.modules['SimpleITK'] = None; import mlrpl.data, mlrpl.training, mlrpl.study"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
