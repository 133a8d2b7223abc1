"""What the explorer shows is what the run predicts; and in a real JupyterLab its viewer draws."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import browser as chromium
import matplotlib.image
import numpy as np
import pytest
import SimpleITK
import torch
import yaml

from mlrpl.errors import StudyError
from mlrpl.evaluation import predict_case
from mlrpl.explore import explorable, layers, maps, measured, nifti, overlays, typical
from mlrpl.precision import Precision
from mlrpl.study import Workplace, trained
from mlrpl.training import load, make_method, save

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY = {
    "name": "tiny",
    "title": "Tiny",
    "dataset": {"name": "drawn", "source": "phantom", "options": {"train": 3, "test": 2, "size": [24, 24, 16]}},
    "settings": {"patch": [16, 16, 16], "stride": [8, 8, 16], "filters": 2, "iterations": 2},
    "runs": [
        {"variant": "vnet", "method": "vnet", "title": "V-Net", "labelled": 1},
        {"variant": "mlrpl", "method": "mlrpl", "title": "MLRPL", "labelled": 1},
        {"variant": "cct", "method": "cct", "title": "CCT", "labelled": 1},
        {"variant": "own", "method": "own_network:Own", "title": "Own", "labelled": 1},
    ],
}

OWN = """
from torch import nn
from mlrpl.methods import Method

class Own(Method):
    def __init__(self, settings, in_channels, num_classes):
        super().__init__(settings, in_channels, num_classes)
        self.network = nn.Conv3d(in_channels, num_classes, 1)

    def loss(self, batch, step):
        raise NotImplementedError

    def predict(self, image, outputs):
        return [self.network(image).float().softmax(1) for _ in outputs]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A study whose runs have weights, as good as none: they are where they started."""
    folder = tmp_path_factory.mktemp("explored")
    (folder / "own_network.py").write_text(OWN)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    place = Workplace(str(folder / "tiny.yaml"), str(folder / "runs"), str(folder / "results"))
    for job in place.jobs:
        job.folder.mkdir(parents=True)
        weights = make_method(job.run, place.store, CPU).state_dict()
        save(job.folder / "last.pt", {"key": job.key, "iteration": 2, "precision": "float32", "method": weights})
    return folder


@pytest.fixture
def place(folder) -> Workplace:
    return Workplace(str(folder / "tiny.yaml"), str(folder / "runs"), str(folder / "results"))


def test_weights_of_another_network_are_refused_in_one_line(place, tmp_path):
    job = replace(place.jobs[0], folder=tmp_path)
    content = load(place.jobs[0].folder / "last.pt", CPU)
    first, *others = content["method"].items()
    for method in (
        dict(others),
        {**content["method"], "network.encoder.more": first[1]},
        {"encoder.ups.0.weight": first[1]},
    ):
        save(tmp_path / "last.pt", {**content, "method": method})
        with pytest.raises(
            StudyError, match=f"run {job.run.name}: its weights are of another network than this version"
        ):
            trained(job, place.store, CPU)


def test_maps_are_those_of_the_prediction(place):
    job = place.job("mlrpl-1-s0")
    shown = maps(place, job, place.store.ids("test")[0], "cpu")
    method = make_method(job.run, place.store, CPU)
    expected = predict_case(method, shown.case, ("decoder1", "mean"), CPU, Precision("float32"))
    assert (shown.prediction == expected[0].argmax(0).numpy()).all()
    second = 2 * expected[1] - expected[0]
    assert (shown.disagreement == (expected[0].argmax(0) != second.argmax(0)).numpy()).mean() > 0.999
    entropy = [-(p * (p + 1e-6).log()).sum(0) for p in (expected[0], second)]
    assert ((shown.teacher == 2) == (entropy[1] < entropy[0]).numpy()).mean() > 0.999
    assert 0 < shown.weight.min() <= shown.weight.max() <= 1


@pytest.mark.parametrize("run", ["vnet-1-s0", "cct-1-s0", "own-1-s0"])
def test_one_decoder_has_a_prediction_and_no_maps(place, run):
    shown = maps(place, place.job(run), place.store.ids("test")[1], "cpu")
    assert shown.weight is None and shown.teacher is None
    assert list(layers(shown)) == ["reference", "prediction"]
    assert len(overlays(shown, place.store.classes).axes) == 2


def test_the_picture_has_every_map(place):
    shown = maps(place, place.job("mlrpl-1-s0"), place.store.ids("test")[0], "cpu")
    titles = [ax.get_title().replace("\n", " ") for ax in overlays(shown, place.store.classes).axes]
    assert titles[:4] == ["prediction", "disagreement", "surer decoder (WR)", "weight (HR)"]
    table = measured(shown, place.store.classes, "voxels")
    assert table["Class"].tolist() == list(place.store.classes[1:])


def test_a_volume_survives_as_nifti(tmp_path):
    volume = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    (tmp_path / "v.nii").write_bytes(nifti(volume, (0.5, 1.0, 2.0)))
    image = SimpleITK.ReadImage(str(tmp_path / "v.nii"))
    assert image.GetSpacing() == (0.5, 1.0, 2.0)
    assert (SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0) == volume).all()


def test_without_a_trained_run_it_says_what_to_do(tmp_path, folder):
    place = Workplace(str(folder / "tiny.yaml"), str(tmp_path / "runs"), str(tmp_path / "results"))
    assert explorable(place) == []
    with pytest.raises(StudyError, match="no trained run"):
        typical(place)


def test_it_starts_with_mlrpl(place):
    assert typical(place)[0].run.name == "mlrpl-1-s0"


def test_where_mlrpl_is_elsewhere_it_starts_with_a_variant_that_has_its_decoders(tmp_path, folder):
    wide = {**TINY["runs"][1], "variant": "mlrpl-kept", "title": "All channels", "settings": {"head_dropout": False}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "runs": [*TINY["runs"], wide]}))
    place = Workplace(str(tmp_path / "tiny.yaml"), str(tmp_path / "runs"), str(folder / "results"))
    for variant in ("vnet", "mlrpl-kept"):
        place.job(f"{variant}-1-s0").folder.mkdir(parents=True)
        (place.job(f"{variant}-1-s0").folder / "last.pt").touch()
    shutil.copytree(folder / "runs" / "stores", tmp_path / "runs" / "stores", dirs_exist_ok=True)
    assert typical(place)[0].run.name == "mlrpl-kept-1-s0"


# In JupyterLab


@pytest.fixture
def lab(folder, tmp_path):
    """`make lab` in a folder with the study and the notebook; the address of the notebook in it."""
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    notebook = json.loads((ROOT / "notebooks/07-explore.ipynb").read_text(encoding="utf-8"))
    (parameters,) = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    parameters["source"] = "".join(parameters["source"]).replace('"phantom"', '"../tiny.yaml"')
    (folder / "notebooks").mkdir()
    (folder / "notebooks/07-explore.ipynb").write_text(json.dumps(notebook))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    programs = str(Path(sys.executable).parent)
    options = "--no-browser --allow-root --ip=127.0.0.1 --LabApp.expose_app_in_browser=True"
    environment = os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": str(Path(programs).parent),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "JUPYTER_TOKEN": "t", "JUPYTER_PORT": str(port), "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
    }  # fmt: skip
    with (tmp_path / "lab.log").open("wb") as log:
        server = subprocess.Popen(
            ["make", "-f", str(ROOT / "Makefile"), "lab", "ENV=active", f"LAB={options}"], cwd=folder, env=environment,
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"{address}/api?token=t", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, (tmp_path / "lab.log").read_text()
                time.sleep(0.5)
        yield f"{address}/lab/tree/07-explore.ipynb?token=t"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


@pytest.mark.slow
def test_the_viewer_draws_in_jupyterlab(lab, tmp_path):
    program = chromium.find()
    if program is None:
        pytest.skip("no Chromium on this machine: the viewer is not tried in a browser")
    browser = chromium.Browser(program, tmp_path / "profile", chromium.WEBGL)
    try:
        browser.visit(lab, width=1400, height=1000)
        browser.wait("window.jupyterapp && jupyterapp.commands.hasCommand('notebook:run-all-cells')")
        browser.wait("document.querySelectorAll('.jp-Notebook .jp-Cell').length > 3")
        browser.wait("jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
        browser.evaluate("(jupyterapp.commands.execute('notebook:run-all-cells'), 0)")  # ends when the notebook does
        browser.wait("document.querySelector('.jp-OutputArea-output canvas')")
        place = "(() => { const c = document.querySelector('.jp-OutputArea-output canvas');"
        place += " c.scrollIntoView({block: 'center'}); const b = c.getBoundingClientRect();"
        place += " return [b.x, b.y, b.width, b.height]; })()"
        end = time.monotonic() + 240
        while True:
            x, y, width, height = browser.evaluate(place)
            if width > 300 and height > 300:
                browser.screenshot(tmp_path / "canvas.png", (x, y, width, height))
                picture = matplotlib.image.imread(tmp_path / "canvas.png")[..., :3]
                grey = np.ptp(picture, axis=2) < 0.02
                if (picture.std() > 0.05) and (~grey).mean() > 0.002:  # the image in grey, the overlay in colour
                    break
            assert time.monotonic() < end, f"the canvas stays blank ({width} × {height})"
            time.sleep(1)
        names = browser.evaluate("[...document.querySelectorAll('.widget-dropdown label')].map(l => l.textContent)")
        assert names == ["Study", "Run", "Case", "Overlay"]
        browser.wait(
            "document.querySelectorAll('.jp-OutputArea-output img').length > 0"
        )  # the picture that stands alone
        browser.screenshot(tmp_path / "page.png")
    finally:
        browser.close()
