"""What can be wrong around a study: one clear line, an exit code, and nothing half-written."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from filelock import FileLock

from mlrpl import cli, steps, training
from mlrpl.config import study_names
from mlrpl.errors import StudyError
from mlrpl.execution import execute_run
from mlrpl.methods import METHODS
from mlrpl.methods.vnet import SupervisedVNet
from mlrpl.study import Workplace
from mlrpl.training import Trainer

SETTINGS = {
    "patch": [16, 16, 16], "stride": [8, 8, 16], "filters": 2, "iterations": 4, "ramp_iterations": 150,
    "check_from": 2, "check_every": 2, "precision": "float32",
}  # fmt: skip
DRAWN = {"name": "drawn", "source": "phantom", "options": {"train": 3, "test": 1, "size": [24, 24, 16]}}
OWN = {"name": "own", "source": "la"}
VNET = {"variant": "vnet", "method": "vnet", "title": "V-Net", "labelled": 1}


def write(folder: Path, name: str = "small", **changes: Any) -> str:
    study = {"name": name, "title": "Small", "dataset": DRAWN, "settings": SETTINGS, "runs": [VNET], **changes}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(study))
    return f"{name}.yaml"


def volumes(root: Path, size: tuple[int, int, int] = (20, 18, 17)) -> Path:
    """Five cases in the published layout of the left atrium's data."""
    random = np.random.default_rng(0)
    for n in range(5):
        label = np.zeros(size, np.uint8)
        label[5:12, 4:13, 6:11] = 1
        write_case(root / f"case{n}", random.normal(size=size).astype(np.float32) + label, label)
    (root / "train.list").write_text("case0\ncase1\ncase2\ncase3\n")
    (root / "test.list").write_text("case4\n")
    return root


def write_case(folder: Path, image: np.ndarray, label: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "mri_norm2.h5", "w") as file:
        file["image"], file["label"] = image, label


def read_case(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    with h5py.File(folder / "mri_norm2.h5") as file:
        return file["image"][()], file["label"][()]


def left_behind(folder: Path) -> list[str]:
    """Files under runs/ and results/ but locks."""
    return sorted(
        path.relative_to(folder).as_posix()
        for name in ("runs", "results")
        for path in (folder / name).rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    )


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd) -> Callable[..., str]:
    """Type `mlrpl reproduce …` in a fresh folder: it must end with exit code 2 and one line, which is returned."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["mlrpl", "reproduce", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said, errors = capfd.readouterr()
        assert end.value.code == 2
        assert "started" not in said
        (line,) = errors.splitlines()
        return line.removeprefix("mlrpl: ")

    return run


# The study, its data, its device.


def test_wrong_study_name(refused, tmp_path):
    message = refused("hipocampus")
    assert message.startswith("no study 'hipocampus': choose one of ")
    assert all(name in message for name in study_names())
    assert list(tmp_path.iterdir()) == []


def test_wrong_setting(refused, tmp_path):
    message = refused(write(tmp_path, settings={**SETTINGS, "iteration": 3}))
    assert message == "study file small.yaml: settings.iteration: there is no such setting, did you mean iterations?"
    assert left_behind(tmp_path) == []


def test_missing_data(refused, tmp_path):
    study = write(tmp_path, dataset=OWN)
    assert refused(study).startswith("dataset own is not prepared yet: give the folder")
    assert "nowhere: no such folder" in refused(study, "--data", "nowhere")
    (tmp_path / "empty").mkdir()
    assert "neither <case>/mri_norm2.h5 nor <case>/lgemri.nrrd is in this folder" in refused(study, "--data", "empty")
    assert left_behind(tmp_path) == []


def truncate(folder: Path) -> None:
    path = folder / "mri_norm2.h5"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def crop_label(folder: Path) -> None:
    image, label = read_case(folder)
    write_case(folder, image, label[:-1])


def unknown_label(folder: Path) -> None:
    image, label = read_case(folder)
    label[3, 3, 3] = 2
    write_case(folder, image, label)


def nan_voxels(folder: Path) -> None:
    image, label = read_case(folder)
    image[0, :2, 0] = np.nan
    write_case(folder, image, label)


@pytest.mark.parametrize(("harm", "said"), [
    (truncate, "cannot be read as HDF5, it may be cut short; copy it again"),
    (crop_label, "the label has shape (19, 18, 17) but its image (20, 18, 17); export both on the same grid"),
    (unknown_label, "the label has the value 2, but the classes are 0 … 1"),
    (nan_voxels, "the image has 2 voxels that are NaN or infinite; repair or remove the case"),
])  # fmt: skip
def test_a_case_that_is_wrong_is_named_before_anything_is_trained(refused, tmp_path, harm, said):
    harm(volumes(tmp_path / "data") / "case2")
    study = write(tmp_path, dataset=OWN)
    assert refused(study, "--data", "data").startswith(f"case2/mri_norm2.h5: {said}")
    assert left_behind(tmp_path) == []


def test_more_labelled_cases_than_exist(refused, tmp_path):
    study = write(tmp_path, runs=[VNET, {**VNET, "variant": "more", "labelled": 4}])
    asked = "run more-4-s0: 4 labelled cases asked, but drawn has 3 for training; set labelled: 3 or less"
    assert refused(study) == asked
    method = {**VNET, "method": "mlrpl", "labelled": 3}
    assert "all 3 training cases are labelled" in refused(write(tmp_path, runs=[method]))
    assert [name for name in left_behind(tmp_path) if not name.startswith("runs/stores/")] == []


@pytest.mark.parametrize(("change", "said"), [
    ({"method": "unet"}, "no method 'unet': choose one of vnet, "),
    ({"method": "nowhere:Mine"}, "method 'nowhere:Mine': No module named 'nowhere'"),
    ({"method": "mlrpl", "options": {"gama": 1}}, "run vnet-1-s0: mlrpl has no option 'gama'"),
    ({"method": "mlrpl", "options": {"selection": "best"}}, "run vnet-1-s0: unknown selection 'best'"),
])  # fmt: skip
def test_a_wrong_method_is_named_before_anything_is_trained(refused, tmp_path, change, said):
    assert refused(write(tmp_path, runs=[VNET | change])).startswith(said)
    assert [name for name in left_behind(tmp_path) if not name.startswith("runs/stores/")] == []


def test_distances_in_mm_need_a_spacing(refused, tmp_path):
    assert "drawn has no known spacing: set distances: voxels" in refused(write(tmp_path, distances="mm"))


def test_invalid_device(refused, tmp_path):
    assert refused(write(tmp_path), "--device", "abacus").startswith("device 'abacus' cannot be used: ")
    assert refused(write(tmp_path), "--device", "cuda:99").startswith("device 'cuda:99' cannot be used: ")
    assert left_behind(tmp_path) == []


@pytest.mark.fault("a second process at a run")
def test_a_second_reproduce_of_the_same_study_is_refused(refused, tmp_path):
    study = write(tmp_path)
    (tmp_path / "runs/small").mkdir(parents=True)
    with FileLock(tmp_path / "runs/small/.lock"):
        assert refused(study) == "study small: another process is reproducing it in runs/"
    assert left_behind(tmp_path) == []


@pytest.mark.fault("a second process at a run")
def test_a_run_that_another_process_trains_is_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    job = Workplace(write(tmp_path)).job("vnet-1-s0")
    job.folder.mkdir(parents=True)
    with FileLock(job.folder / ".lock"):
        monkeypatch.setattr(sys, "argv", ["mlrpl", "run", "small.yaml", "vnet-1-s0"])
        with pytest.raises(SystemExit, match="2"):
            cli.main()
    assert capfd.readouterr().err == "mlrpl: run vnet-1-s0: another process is at it\n"
    assert left_behind(tmp_path / "runs/small") == []


@pytest.mark.parametrize("step", ["train", "evaluate"])
def test_a_run_that_a_notebook_by_hand_is_at_keeps_its_half_written_files(tmp_path, monkeypatch, step):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlrpl.study.ORPHAN_SECONDS", 0.2)
    study = write(tmp_path)
    job = Workplace(study).job("vnet-1-s0")
    if step == "evaluate":
        steps.train_study(study, None, "cpu", "runs")
    job.folder.mkdir(parents=True, exist_ok=True)
    writing = job.folder / ".checkpoint.pt.1.partial"
    writing.write_text("half")
    arguments = {"train": (), "evaluate": ("results",)}[step]
    with (
        FileLock(job.folder / ".work.lock"),
        pytest.raises(StudyError, match="run vnet-1-s0: another process is at it"),
    ):
        getattr(steps, f"{step}_study")(study, None, "cpu", "runs", *arguments)
    assert writing.read_text() == "half"


def test_rows_are_written_by_one_process_at_a_time(tmp_path, monkeypatch):
    """Else two evaluations read the same rows, and the second to write loses what the first has added."""
    monkeypatch.chdir(tmp_path)
    study = write(tmp_path)
    steps.train_study(study, None, "cpu", "runs")
    monkeypatch.setattr("mlrpl.steps.RESULTS_SECONDS", 0.2)
    with FileLock(tmp_path / "runs/small/.lock"), pytest.raises(StudyError, match="will write these rows"):
        steps.evaluate_study(study, None, "cpu", "runs", "results")
    assert not (tmp_path / "results").exists()
    steps.evaluate_study(study, None, "cpu", "runs", "results")
    assert (tmp_path / "results/small/metrics.csv").exists()


class Exhausting(SupervisedVNet):
    """Asks PyTorch for more memory than any machine has."""

    def loss(self, batch, step):
        return {"total": torch.empty(2**60).sum()}


@pytest.mark.fault("out of memory")
def test_out_of_memory_says_which_setting_to_lower(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(METHODS, "exhausting", Exhausting)
    place = Workplace(write(tmp_path, runs=[VNET | {"method": "exhausting"}]))
    with pytest.raises(StudyError, match="run vnet-1-s0: out of memory; lower the study's batch, patch or filters"):
        place.train("vnet-1-s0", "cpu")


DYING = """
import os
import signal
from mlrpl.methods.vnet import SupervisedVNet

class Dying(SupervisedVNet):
    def loss(self, batch, step):
        if step.iteration == 3 and os.getpid() != int(os.environ["SPARED"]):
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel's out-of-memory killer does
        return super().loss(batch, step)
"""


@pytest.mark.fault("a notebook kernel dies")
def test_a_notebook_kernel_that_dies_is_told_and_harms_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SPARED", str(os.getpid()))
    (tmp_path / "dying.py").write_text(DYING)
    place = Workplace(write(tmp_path, runs=[VNET | {"method": "dying:Dying"}]))
    with pytest.raises(StudyError, match=r"02-train: Kernel died; if for want of memory: lower the study's batch") as e:
        execute_run(place, "vnet-1-s0", "cpu")
    assert "\n" not in str(e.value)
    folder = place.job("vnet-1-s0").folder
    assert not {path.name for path in folder.iterdir()} & {"last.pt", "02-train.ipynb", "provenance.json"}
    assert [path.name for path in folder.rglob("*.partial*")] == []
    place.train("vnet-1-s0", "cpu")
    assert len(pd.read_csv(folder / "log.csv")) == 4


def test_ctrl_c_says_how_to_go_on(monkeypatch, capfd):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlrpl.reproduce.reproduce", interrupted)
    monkeypatch.setattr(sys, "argv", ["mlrpl", "reproduce", "smoke"])
    with pytest.raises(SystemExit, match="130"):
        cli.main()
    assert "interrupted; the same command goes on" in capfd.readouterr().err


# A patch larger than the volume is no fault: it is padded, as the field does.


@pytest.mark.parametrize("method", ["vnet", "mlrpl"])
def test_a_patch_larger_than_the_volume_trains_and_predicts(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    volumes(tmp_path / "data")  # 20 × 18 × 17
    settings = {**SETTINGS, "patch": [32, 16, 32], "stride": [16, 16, 16]}
    study = write(tmp_path, dataset=OWN, settings=settings, runs=[VNET | {"method": method}])
    place = Workplace(study, data="data")
    job = place.train("vnet-1-s0", "cpu")
    assert len(pd.read_csv(job.folder / "log.csv")) == 4
    rows = place.evaluate("vnet-1-s0", "cpu")
    assert set(rows["case"]) == {"case4"}
    with np.load(job.folder / "predictions.npz") as predictions:
        assert predictions["case4"].shape == (20, 18, 17)


# Places that cannot be written.


@pytest.fixture
def small_disk() -> Iterator[Callable[[str], Path]]:
    """Mount a tmpfs of a size, to be filled."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="mlrpl-disk-"))
        if os.geteuid() != 0 or not shutil.which("mount"):
            folder.rmdir()
            pytest.skip("only root can mount the small file system that this test fills")
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
        )
        if made.returncode:
            folder.rmdir()
            pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.fault("full disk")
def test_disk_full_while_preparing(refused, tmp_path, small_disk):
    disk = small_disk("500k")
    study = write(tmp_path, dataset={**DRAWN, "options": {"train": 9, "test": 1, "size": [32, 32, 16]}})
    paths = "--runs", str(disk / "runs"), "--results", str(tmp_path / "results")
    message = refused(study, *paths)
    assert "cannot write the case store: No space left on device" in message
    assert left_behind(disk) == []
    assert [path for path in (disk / "runs/stores").iterdir() if path.is_dir()] == []


@pytest.mark.fault("full disk")
def test_disk_full_from_the_start(refused, tmp_path, small_disk):
    disk = small_disk("64k")
    fill(disk / "other.bin")
    message = refused(write(tmp_path), "--runs", str(disk / "runs"))
    assert message.endswith("small: cannot be written (No space left on device); make room or allow writing")
    assert left_behind(disk) == left_behind(tmp_path) == []


@pytest.mark.fault("full disk")
def test_disk_full_at_a_checkpoint_keeps_the_last_one(tmp_path, monkeypatch, small_disk):
    """With room for small files but not for weights; torch.save alone would speak of an unexpected position."""
    disk = small_disk("8m")
    monkeypatch.chdir(disk)
    place = Workplace(write(disk))
    job, step = place.job("vnet-1-s0"), Trainer.step
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1)

    def stepped(self, iteration):
        if iteration == 3:
            fill(disk / "other.bin")
            os.truncate(disk / "other.bin", (disk / "other.bin").stat().st_size - 100_000)
        return step(self, iteration)

    monkeypatch.setattr(Trainer, "step", stepped)
    with pytest.raises(OSError, match="No space left on device"):
        place.train("vnet-1-s0", "cpu")
    assert training.load(job.folder / "checkpoint.pt", torch.device("cpu"))["iteration"] == 2
    assert not (job.folder / "last.pt").exists()
    assert [path.name for path in disk.rglob("*.partial*")] == []
    monkeypatch.setattr(Trainer, "step", step)
    (disk / "other.bin").unlink()
    place.train("vnet-1-s0", "cpu")
    assert len(pd.read_csv(job.folder / "log.csv")) == 4


FILLING = """
import os
from mlrpl import training
from mlrpl.methods.vnet import SupervisedVNet

training.CHECKPOINT_SECONDS = 0  # one an iteration

class Filling(SupervisedVNet):
    def loss(self, batch, step):
        if step.iteration == 3 and os.environ.get("FILL"):
            with open(os.environ["FILL"], "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
        return super().loss(batch, step)
"""


def reproduce(study: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlrpl", "reproduce", study, "--device", "cpu"], cwd=cwd, capture_output=True,
        encoding="utf-8", env={**os.environ, "PYTHONPATH": str(cwd), **environment}, stdin=subprocess.DEVNULL,
        timeout=1200,
    )  # fmt: skip


@pytest.mark.fault("full disk")
def test_disk_full_while_training(small_disk):
    disk = small_disk("16m")
    (disk / "filling.py").write_text(FILLING)
    study = write(disk, runs=[VNET | {"method": "filling:Filling"}])
    done = reproduce(study, disk, FILL=str(disk / "other.bin"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    last = done.stdout.rstrip().splitlines()[-1]
    assert last.startswith("  vnet-1-s0: ")
    assert "No space left on device" in last
    (folder,) = (disk / "runs/small").glob("vnet-1-s0-*")
    whole = {path.name for path in folder.iterdir() if path.stat().st_size}
    assert not whole & {"last.pt", "02-train.ipynb", "metrics.csv", "provenance.json"}
    assert training.load(folder / "checkpoint.pt", torch.device("cpu"))["iteration"] == 2  # the last that fitted
    json.loads((folder / "config.json").read_text())
    json.loads((folder / "progress.json").read_text())
    assert [path.name for path in disk.rglob("*.partial*")] == []
    assert left_behind(disk) == sorted(name for name in left_behind(disk) if not name.startswith("results/small/runs"))

    (disk / "other.bin").unlink()
    again = reproduce(study, disk)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(pd.read_csv(folder / "log.csv")) == 4


BOUND_BY_MODES = """
import ctypes, os, sys
if os.geteuid() == 0:  # whom mode bits do not bind while it has these two capabilities
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        assert ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) == 0  # PR_CAPBSET_DROP
os.execv(sys.executable, [sys.executable, "-m", "mlrpl", *sys.argv[1:]])
"""


@pytest.fixture
def lockable_folder(tmp_path) -> Iterator[Path]:
    yield tmp_path
    for path in [tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())]:
        path.chmod(0o755)


@pytest.mark.parametrize("locked", [".", "runs", "results"])
@pytest.mark.fault("read-only folder")
def test_read_only_output(lockable_folder, locked):
    study = write(lockable_folder)
    if locked != ".":
        for name in ("runs", "results"):
            (lockable_folder / name).mkdir()
    (lockable_folder / locked).chmod(0o555)
    done = subprocess.run(
        [sys.executable, "-c", BOUND_BY_MODES, "reproduce", study], cwd=lockable_folder, capture_output=True,
        encoding="utf-8", timeout=1200,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    place = "runs" if locked == "." else locked
    assert done.stderr == f"mlrpl: {place}/small: cannot be written (Permission denied); make room or allow writing\n"
    assert done.stdout == ""
    assert left_behind(lockable_folder) == []
