"""One's own data: a study proposed from the images, cross-validated, and predictions on the images' grids."""

import json
import os
import sys

import numpy as np
import pandas as pd
import pytest
import SimpleITK
import yaml
from test_raw import write

from mlrpl import cli, reproduce, verify
from mlrpl.comparison import case_views, parts
from mlrpl.config import Study, load_study, validated
from mlrpl.data import open_store
from mlrpl.data.decathlon import Decathlon, DecathlonOptions
from mlrpl.data.preparation import Preparation, Window
from mlrpl.errors import StudyError
from mlrpl.evaluation import PREDICTIONS
from mlrpl.locks import locked
from mlrpl.proposal import Found, fitted_patch, look, propose, target_spacing
from mlrpl.results import Results
from mlrpl.steps import prepare_study
from mlrpl.study import Workplace

SIZE = (28, 24, 22)
MOMENTS = {
    "iterations: 3000": "iterations: 2",
    "filters: 8": "filters: 2",
    "threads: 2": "threads: 1",
    "  # - {variant: vnet": "  - {variant: vnet",
}
prepare_module = sys.modules["mlrpl.data.prepare"]  # the package's `prepare` is the function
FLIP = np.diag([-1.0, -1, 1])


def cuboid(number):
    """An image (2 channels) with a bright box, and the box."""
    random = np.random.default_rng(number)
    label = np.zeros(SIZE, np.uint8)
    x, y, z = random.integers(4, 9, 3)
    label[x : x + 10, y : y + 9, z : z + 8] = 1
    return [random.normal(20.0 * label, 2).astype(np.float32), random.normal(-9.0 * label, 1).astype(np.float32)], label


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Six images of two channels, labels for four, one of them faulty; every other one flipped; no dataset.json."""
    root = tmp_path / "scans"
    for number in range(6):
        channels, label = cuboid(number)
        direction = FLIP if number % 2 else np.eye(3)
        for index, channel in enumerate(channels):
            write(root / f"imagesTr/scan{number}_000{index}.nii.gz", channel, (1, 1, 1.5), (3, 4, 5), direction)
        if number < 4:
            write(root / f"labelsTr/scan{number}.nii.gz", label, (1, 1, 1.5), (3, 4, 5), direction)
    (root / "labelsTr/scan3.nii.gz").write_bytes(b"broken")
    (root / "imagesTr/.DS_Store").write_bytes(b"Bud1")
    monkeypatch.chdir(tmp_path)
    return root


def command(monkeypatch, *words):
    """Type `mlrpl words…`; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["mlrpl", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_from_a_folder_to_predictions(folder, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, "prepare", "scans", "--source", folder) == 0
    shown = capsys.readouterr().out
    assert "5 cases, 3 with a label" in shown
    assert shown.count("labelsTr/scan3.nii.gz") == 1
    study = load_study("scans")
    assert (study.folds, study.entries[0].labelled, study.distances) == (3, (2,), "mm")
    assert study.dataset.options["classes"] == ["background", "class 1"]
    shortened(tmp_path / "scans.yaml")
    assert command(monkeypatch, "prepare", "scans", "--source", folder) == 0
    assert "iterations: 2\n" in (tmp_path / "scans.yaml").read_text()  # what was edited stays

    assert command(monkeypatch, "evaluate", "scans", "--device", "cpu") == 2
    assert "no run is trained" in capsys.readouterr().err
    assert command(monkeypatch, "train", "scans", "--only", "f1", "--device", "cpu") == 0
    assert command(monkeypatch, "evaluate", "scans", "--device", "cpu") == 0
    assert "Not trained yet, so not in these means: mlrpl-2-s0-f0, mlrpl-2-s0-f2, vnet" in capsys.readouterr().out
    assert command(monkeypatch, "train", "scans", "--device", "cpu") == 0
    assert "4 runs to train, one after the other; mlrpl cost scans" in capsys.readouterr().out
    assert command(monkeypatch, "train", "scans", "--device", "cpu") == 0
    assert capsys.readouterr().out.count("trained already") == 6
    assert command(monkeypatch, "evaluate", "scans", "--device", "cpu") == 0
    assert "Not trained" not in capsys.readouterr().out
    rows = pd.read_csv(tmp_path / "results/scans/metrics.csv")
    last = rows[(rows["selection"] == "last") & (rows["output"] == "mean")]
    assert sorted(last["case"]) == ["scan0", "scan1", "scan2"]  # every labelled case is tested once
    assert sorted(last["fold"]) == [0, 1, 2]

    assert "best checks against rows: 6 compared, all agree" in map(str, verify.verify(Workplace("scans")))
    found = Results.load(tmp_path / "results/scans")
    shown = {part.name: part for part in parts(Workplace("scans"), found) if part.shown}
    assert shown["glance"].text.startswith("A cross-validation in 3 parts: every labelled case is measured by a net")
    assert sorted(shown["cases"].table["Case"]) == ["scan0", "scan1", "scan2"]
    assert shown["cases"].table["Dice (%)"].astype(float).is_monotonic_increasing
    assert "classes" not in shown  # there is one
    assert "statistics-published" in shown and "p" in shown["statistics"].table
    alone = found.only(found.runs[found.runs["method"] == "vnet"])
    shown = {part.name: part for part in parts(Workplace("scans"), alone) if part.shown}
    assert "statistics-published" not in shown and "p" not in shown["statistics"].table  # nothing to compare with

    given = [folder / f"imagesTr/scan5_000{channel}.nii.gz" for channel in range(2)]
    words = ["predict", "scans", *given, "--output", "out", "--probabilities", "--disagreement", "--device", "cpu"]
    assert command(monkeypatch, *words) == 0
    assert "1 of 1 images predicted" in capsys.readouterr().out
    original = SimpleITK.ReadImage(str(given[0]))
    for name in ("scan5", "scan5_probability_class-1", "scan5_disagreement"):
        image = SimpleITK.ReadImage(str(tmp_path / f"out/{name}.nii.gz"))
        assert image.GetSize() == original.GetSize()
        np.testing.assert_allclose(image.GetDirection(), original.GetDirection(), atol=1e-6)
        np.testing.assert_allclose(image.GetOrigin(), original.GetOrigin(), atol=1e-5)
    assert command(monkeypatch, "predict", "scans", given[0], "--output", "out", "--device", "cpu") == 1
    assert "1 channels" in capsys.readouterr().err
    assert command(monkeypatch, "predict", "scans/mlrpl-9", *given, "--output", "out") == 2
    assert "it has mlrpl-2-s0" in capsys.readouterr().err


def test_flipped_images_are_turned_alike(folder):
    prepare_study("scans", str(folder), "runs")
    store = Workplace("scans").store
    channels, label = cuboid(1)
    np.testing.assert_array_equal(store.load("scan1").label, label[::-1, ::-1])
    np.testing.assert_array_equal(store.load("scan2").label, cuboid(2)[1])
    assert store.load("scan1").image.shape == (2, *SIZE)
    assert np.corrcoef(store.load("scan1").image[1].ravel(), channels[1][::-1, ::-1].ravel())[0, 1] > 0.999


def test_folds_share_out_the_labelled_cases(folder):
    prepare_study("scans", str(folder), "runs")
    place = Workplace("scans")
    folds = [place.data_of(job.run) for job in place.jobs]
    tests = [fold.ids("test") for fold in folds]
    assert sorted(case for ids in tests for case in ids) == ["scan0", "scan1", "scan2"]
    for fold in folds:
        train = fold.ids("train")
        assert set(train) | set(fold.ids("test")) == set(place.store.ids("train"))
        assert all(fold.load(case).label is not None for case in train[:2])
        assert train[2:] == ["scan4", "scan5"]
    assert len({fold.fingerprint for fold in folds} | {place.store.fingerprint}) == 4
    assert len({job.key for job in place.jobs}) == 3
    with pytest.raises(StudyError, match="cannot make 4 folds"):
        place.store.fold(0, 4)
    with pytest.raises(StudyError, match="test cases of its own"):
        folds[0].fold(0, 2)


def test_a_study_without_test_cases_or_folds_is_refused(folder, tmp_path):
    prepare_study("scans", str(folder), "runs")
    (tmp_path / "scans.yaml").write_text((tmp_path / "scans.yaml").read_text().replace("folds: 3", "folds: 0"))
    with pytest.raises(StudyError, match="no test case"):
        _ = Workplace("scans").jobs


def test_classes_and_modality_come_from_the_description_where_there_is_one(folder):
    labels = {"background": 0, "left lobe": 1}
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT", "1": "PET"}, "labels": labels}))
    found = look(folder)
    assert (found.classes, found.named, found.images, found.labelled) == (("background", "left lobe"), True, 5, 3)
    assert found.windows[1] is None
    assert 10 < found.windows[0]["low"] < 19 < found.windows[0]["mean"] < 21 < found.windows[0]["high"] < 30
    study = Study.model_validate(yaml.safe_load(propose("scans", found, "cpu")))
    assert study.dataset.options["preparation"]["channels"] == [found.windows[0], "z-score"]
    assert "classes" not in study.dataset.options
    assert study.settings.augmentation == ()  # a mirrored left lobe is a right one
    assert open_store(prepare_study("scans", str(folder), "runs").folder).classes == ("background", "left lobe")


def seen(**changes):
    usual = {
        "classes": ("background", "organ"),
        "counts": (10, 10),
        "named": True,
        "images": 30,
        "labelled": 10,
        "tests": 0,
        "spacings": np.full((30, 3), 1.0),
        "sizes": np.tile((200, 100, 40), (30, 1)),
        "windows": (None,),
    }
    return Found(**usual | changes)


def proposed(device="cpu", **changes):
    return Study.model_validate(yaml.safe_load(propose("mine", seen(**changes), device)))


def test_what_is_proposed():
    study = proposed()
    assert (study.folds, study.entries[0].labelled, study.entries[0].method) == (5, (8,), "mlrpl")
    assert (proposed(labelled=11).entries[0].labelled, proposed(labelled=3).folds) == ((8,), 3)
    assert proposed(labelled=30).entries[0].method == "vnet"  # nothing to learn from without labels
    assert "# - {" not in propose("mine", seen(labelled=30), "cpu")
    text = propose("mine", seen(), "cpu").replace("  # - {", "  - {")
    mlrpl, control, vnet = dict.fromkeys(
        (run.variant, run.settings.beta_max) for run in Study.model_validate(yaml.safe_load(text)).runs()
    )
    assert (mlrpl, control, vnet) == (("mlrpl", 0.1), ("control", 0), ("vnet", 0.1))
    tested = proposed(tests=4)
    assert (tested.folds, tested.entries[0].labelled) == (0, (10,))
    assert np.prod(study.settings.patch) <= 64 * 64 * 32 < np.prod(proposed("cuda").settings.patch) <= 96**3
    assert proposed("cuda").settings.iterations == 15_000
    with pytest.raises(StudyError, match="too few"):
        proposed(labelled=1)


def test_spacing_is_proposed_where_images_differ():
    spacings = np.tile((0.8, 0.8, 2.0), (9, 1))
    assert target_spacing(spacings) is None
    spacings[:4, 2] = 3.0
    assert target_spacing(spacings) == (0.8, 0.8, 2.0)
    study = proposed(spacings=spacings, sizes=np.tile((64, 64, 100), (9, 1)))
    assert study.dataset.options["preparation"]["spacing"] == [0.8, 0.8, 2.0]


@pytest.mark.parametrize("size", [(10, 20, 30), (36, 50, 35), (512, 512, 240), (512, 512, 20)])
@pytest.mark.parametrize("voxels", [64 * 64 * 32, 96**3])
def test_patches_fit(size, voxels):
    patch = fitted_patch(size, voxels)
    assert all(side % 16 == 0 and side >= 32 for side in patch)
    assert np.prod(patch) <= voxels
    assert all(side < n + 16 or side == 32 for side, n in zip(patch, size, strict=True))


def test_what_cannot_be_proposed_is_one_line(folder, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, "prepare", "other") == 2
    assert "--source DIR" in capsys.readouterr().err
    assert command(monkeypatch, "prepare", "other", "--source", tmp_path / "nowhere") == 2
    for path in (folder / "labelsTr").iterdir():
        path.unlink()
    assert command(monkeypatch, "prepare", "other", "--source", folder) == 2
    shown = capsys.readouterr().err
    assert "labelsTr" in shown and shown.strip().count("\n") == 1
    assert not (tmp_path / "other.yaml").exists()


def test_a_name_that_no_study_can_have_is_refused_before_anything_is_written(folder, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, "prepare", "Mine 2", "--source", folder) == 2
    assert "'Mine 2' cannot be a study's name: take small letters" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.yaml"))


def test_a_study_is_proposed_for_the_hardware_that_will_train_it(folder, tmp_path, monkeypatch):
    """Which need not be that of the machine where the data are prepared."""
    for hardware, filters in (("cpu", 8), ("cuda", 16)):
        assert command(monkeypatch, "prepare", f"on-{hardware}", "--source", folder, "--hardware", hardware) == 0
        for run in load_study(f"on-{hardware}.yaml").runs():
            assert run.settings.filters == filters
            assert run.settings.head_dropout == (filters == 16)  # of 8 channels it may leave none


def scans(root, names, values=(0, 1), ending=".nii.gz"):
    """Images of one channel with labels of the same names, no dataset.json."""
    for number, name in enumerate(names):
        channels, label = cuboid(number)
        write(root / f"imagesTr/{name}{ending}", channels[0])
        write(root / f"labelsTr/{name}{ending}", np.array(values, np.uint8)[label])
    return root


def shortened(path):
    """Make a proposed study one of moments, with V-Net beside MLRPL."""
    text = path.read_text()
    for old, new in MOMENTS.items():
        text = text.replace(old, new)
    path.write_text(text)


def test_numbers_as_names_go_through_a_cross_validation_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = scans(tmp_path / "scans", ["001", "002", "003", "004"])
    (root / "labelsTr/004.nii.gz").unlink()
    assert command(monkeypatch, "prepare", "2024", "--source", root) == 0
    shortened(tmp_path / "2024.yaml")
    for step in ("train", "evaluate"):
        assert command(monkeypatch, step, "2024", "--device", "cpu") == 0
    place, found = Workplace("2024"), Results.load(tmp_path / "results/2024")
    assert set(found.metrics["case"]) == {"001", "002", "003"} and len(found.runs) == 6
    views, _ = case_views(place, found)
    assert len(views) == 3 and all(set(view.dice) == {"MLRPL", "V-Net"} for view in views)
    assert all(not finding.wrong for finding in verify.verify(place))
    assert command(monkeypatch, "evaluate", "2024", "--only", "vnet", "--device", "cpu") == 0
    assert len(Results.load(tmp_path / "results/2024").runs) == 6  # the others keep their rows
    capsys.readouterr()
    reproduce._compare_with_committed(found, found)
    assert f"{len(found.metrics)} compared, mean |Δ Dice| 0.000" in capsys.readouterr().out

    assert command(monkeypatch, "train", "2024", "--only", "typo") == 2
    assert "no run with 'typo' in its name: it has mlrpl-2, vnet-2" in capsys.readouterr().err
    assert command(monkeypatch, "train", "2024", "--only", " mlrpl-2 ,") == 0
    assert capsys.readouterr().out.count("trained already") == 3
    for job in place.jobs:  # as when the first fold of one and the second of the other are done
        if job.run.name not in ("mlrpl-2-s0-f0", "vnet-2-s0-f1"):
            (job.folder / PREDICTIONS).unlink()
    assert case_views(place, found) == ([], "No case has a label map of every method.")

    before = {job.run.name: job.key for job in place.jobs}
    study = (tmp_path / "2024.yaml").read_text()
    (tmp_path / "2024.yaml").write_text(study.replace('"class 1"', '"organ"'))
    assert command(monkeypatch, "prepare", "2024", "--source", root) == 0
    renamed = Workplace("2024").jobs
    assert {job.run.name: job.key for job in renamed} == before  # another name is no other training
    assert all(job.finished("train") and not job.finished("evaluate") for job in renamed)
    (tmp_path / "2024.yaml").write_text(study.replace('"class 1"', '"class 1", "class 2"'))
    assert command(monkeypatch, "prepare", "2024", "--source", root) == 0
    assert not any(job.finished("train") for job in Workplace("2024").jobs)  # another class is another network


@pytest.mark.parametrize("names", [["patient_0001", "patient_0002", "patient_0040"], ["a_0000", "b_0000"]])
def test_numbers_at_the_end_of_a_case_are_no_channels(tmp_path, names):
    found = look(scans(tmp_path, names))
    assert (found.images, found.labelled, len(found.windows)) == (len(names), len(names), 1)


def test_label_values_with_gaps_are_refused_in_one_line(tmp_path):
    with pytest.raises(StudyError, match=r"the values 0, 255 \(255 in a, b\); they must be 0 \(background\)") as error:
        look(scans(tmp_path, ["a", "b"], values=(0, 255)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["kidney_left", "Left-Hippocampus", "left lobe", "lung.right"])
def test_a_class_with_a_side_is_not_mirrored(name):
    assert proposed(classes=("background", name)).settings.augmentation == ()
    assert proposed(classes=("background", "cleft")).settings.augmentation == ("mirror",)


def test_a_proposed_window_knows_nothing_of_test_cases(tmp_path):
    root = scans(tmp_path, ["a", "b", "c"])
    window = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}}
    (root / "dataset.json").write_text(json.dumps(window))
    alone = look(root).windows
    channels, label = cuboid(9)
    write(root / "imagesTs/z.nii.gz", channels[0] + 400)
    write(root / "labelsTs/z.nii.gz", label)
    found = look(root)
    assert found.tests == 1 and found.windows == alone


def test_a_window_may_be_open_at_one_end_and_has_a_width():
    image = np.linspace(-1000, 1000, 4**3).reshape(1, 4, 4, 4)
    open_window = Preparation.model_validate({"channels": [{"low": -np.inf, "high": 0}]})
    expected = Preparation(channels=(Window(low=-2000, high=0),))
    np.testing.assert_array_equal(open_window.normalise(image, "x"), expected.normalise(image, "x"))
    for low in (0, 1, np.nan):
        with pytest.raises(StudyError, match="must be below high 0"):
            validated(Window, {"low": low, "high": 0}, "here")


def test_corrected_files_of_the_same_size_are_prepared_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = scans(tmp_path / "scans", ["a", "b"], ending=".nii")
    made = prepare_study("scans", str(root), "runs")
    written = made.folder / "store.json"
    (root / "labelsTr/a.nii").touch()  # newer, but the same
    inode = written.stat().st_ino
    assert prepare_study("scans", str(root), "runs").fingerprint == made.fingerprint
    assert written.stat().st_ino == inode
    write(tmp_path / "corrected.nii", 1 - cuboid(0)[1])
    os.utime(tmp_path / "corrected.nii", (0, 0))
    (tmp_path / "corrected.nii").replace(root / "labelsTr/a.nii")  # whose time is of 1970
    corrected = prepare_study("scans", str(root), "runs")
    assert corrected.fingerprint != made.fingerprint
    np.testing.assert_array_equal(corrected.load("a").label, 1 - cuboid(0)[1])


def test_a_file_corrected_while_it_is_prepared_is_prepared_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = scans(tmp_path / "scans", ["a", "b"], ending=".nii")
    save = prepare_module._save

    def late(raw, entry, folder):
        if entry.id == "a":
            write(root / "labelsTr/a.nii", 1 - cuboid(0)[1])
        return save(raw, entry, folder)

    monkeypatch.setattr(prepare_module, "_save", late)
    made = prepare_study("scans", str(root), "runs")
    monkeypatch.setattr(prepare_module, "_save", save)
    assert prepare_study("scans", str(root), "runs").fingerprint != made.fingerprint


def test_a_rejected_case_is_looked_at_again_when_its_files_have_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = scans(tmp_path / "scans", ["a", "b", "c"], ending=".nii")
    whole = (root / "labelsTr/c.nii").read_bytes()
    (root / "labelsTr/c.nii").write_bytes(whole[:100].ljust(len(whole), b"x"))
    store = prepare_study("scans", str(root), "runs")
    assert [each["case"] for each in store.index["rejected"]] == ["c"]
    inode = (store.folder / "store.json").stat().st_ino
    (root / "labelsTr/c.nii").touch()
    prepare_study("scans", str(root), "runs")
    assert (store.folder / "store.json").stat().st_ino == inode
    (root / "labelsTr/c.nii").write_bytes(whole)
    assert prepare_study("scans", str(root), "runs").index["rejected"] == []
    (root / "imagesTr/c.nii").unlink()
    (root / "imagesTr/c.nii").symlink_to("nowhere")
    (root / "labelsTr/c.nii").touch()
    assert [each["case"] for each in prepare_study("scans", str(root), "runs").index["rejected"]] == ["c"]


def test_a_killed_preparation_is_not_gone_on_with_for_other_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = scans(tmp_path / "scans", ["a", "b"], values=(0, 2))
    description = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "organ": 1, "tumour": 2}}
    (root / "dataset.json").write_text(json.dumps(description))
    monkeypatch.setattr(prepare_module.shutil, "rmtree", lambda *_, **__: None)
    monkeypatch.setattr(prepare_module, "fingerprint", lambda _: 1 / 0)  # when both cases are written
    with pytest.raises(ZeroDivisionError):
        prepare_study("scans", str(root), "runs")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    del description["labels"]["tumour"]
    (root / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(StudyError, match="the label has the value 2"):
        prepare_study("scans", str(root), "runs")


def test_one_label_with_a_channels_number_leaves_the_channels_as_they_are(folder):
    (folder / "labelsTr/scan2.nii.gz").rename(folder / "labelsTr/scan2_0000.nii.gz")
    found = look(folder)
    assert (found.images, len(found.windows)) == (5, 2)


def test_an_edited_description_is_followed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = scans(tmp_path / "scans", ["a", "b"])
    description = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "organ": 1}}
    (root / "dataset.json").write_text(json.dumps(description))
    assert prepare_study("scans", str(root), "runs").classes == ("background", "organ")
    description["labels"]["tumour"] = 2
    (root / "dataset.json").write_text(json.dumps(description))
    assert prepare_study("scans", str(root), "runs").classes == ("background", "organ", "tumour")


def test_prepare_says_what_is_worth_a_second_look(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = scans(tmp_path / "scans", ["a", "b", "c"])
    assert command(monkeypatch, "prepare", "mine", "--source", root) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2  # nothing
    shortened(tmp_path / "mine.yaml")
    text = (tmp_path / "mine.yaml").read_text().replace("  - {variant: mlrpl", "  # - {variant: mlrpl")
    (tmp_path / "mine.yaml").write_text(text)
    assert command(monkeypatch, "train", "mine", "--only", "f0", "--device", "cpu") == 0
    assert command(monkeypatch, "predict", "mine/vnet", root / "imagesTr", "--output", "out") == 2
    assert "run vnet-2-s0-f1 is not trained yet" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text(text.replace('"class 1"', '"left lobe"'))
    for number, name in enumerate("de", start=3):
        channels, label = cuboid(number)
        write(root / f"imagesTr/{name}.nii.gz", channels[0])
        write(root / f"labelsTr/{name}.nii.gz", label * (name == "d"))
    write(root / "imagesTr/f.nii.gz", channels[0], (1, 1, 3))
    assert command(monkeypatch, "prepare", "mine", "--source", root) == 0
    empty, thick, sided, more, stale = capsys.readouterr().out.splitlines()[1:]
    assert "1 label without any class" in empty and empty.endswith(": e")
    assert "voxels are 1 × 1 × 1 mm in most cases, not in f" in thick
    assert "set augmentation: []" in sided
    assert "each fold has 3 labelled cases to learn from and 2 are used: set labelled: 3" in more
    assert "1 trained run of other data" in stale


def test_cases_are_not_prepared_anew_under_a_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = scans(tmp_path / "scans", ["a", "b"])
    prepare_study("mine", str(root), "runs")
    busy = tmp_path / "runs/mine/vnet-1-s0-f0-01234567"
    busy.mkdir(parents=True)
    with locked(busy, "busy", "work."), pytest.raises(StudyError, match="is at vnet-1-s0-f0-01234567; wait for it"):
        prepare_study("mine", str(root), "runs")


def test_the_reason_why_no_label_is_usable_is_said(tmp_path):
    root = scans(tmp_path, ["a", "b"])
    for name in "ab":
        write(root / f"labelsTr/{name}.nii.gz", cuboid(0)[1], origin=(0, 0, 9))
    with pytest.raises(StudyError, match=r"no image with a usable label \(labelsTr/[ab].nii.gz: .*; put labels"):
        look(root)


def test_channels_in_the_fourth_axis_need_no_description(tmp_path):
    for name in "ab":
        channels, label = cuboid(ord(name))
        both = SimpleITK.JoinSeries([SimpleITK.GetImageFromArray(np.ascontiguousarray(c.T)) for c in channels])
        (tmp_path / "imagesTr").mkdir(exist_ok=True)
        SimpleITK.WriteImage(both, str(tmp_path / f"imagesTr/{name}.nii.gz"))
        (tmp_path / f"imagesTr/{name}.nii.gz").rename(tmp_path / f"imagesTr/{name}.NII.GZ")
        write(tmp_path / f"labelsTr/{name}.nii.gz", label)
    found = look(tmp_path)
    assert (found.labelled, len(found.windows)) == (2, 2)


def test_images_in_other_folders_are_pointed_at(tmp_path):
    root = scans(tmp_path / "one/level", ["a", "b"])
    with pytest.raises(StudyError, match=r"no NIfTI image in imagesTr \(there is level/imagesTr/a.nii.gz\)"):
        look(root.parent)
    (root / "imagesTr/more").mkdir()
    write(root / "imagesTr/more/c.nii.gz", cuboid(0)[0][0])
    with pytest.raises(StudyError, match="imagesTr/more: a folder"):
        Decathlon(DecathlonOptions(test=0, classes=("background", "organ")), root)
    with pytest.raises(StudyError, match="two classes have one name"):
        Decathlon(DecathlonOptions(test=0, classes=("background", "organ", "organ"), lenient=True), root)
    with pytest.raises(StudyError, match='a class is called "all"'):
        Decathlon(DecathlonOptions(test=0, classes=("background", "all"), lenient=True), root)
