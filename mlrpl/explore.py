"""Looking at single cases: image, reference, prediction, and where and how far the decoders' pseudo-labels are trusted.

In JupyterLab `explorer` shows them in a 3-D viewer with linked slices (NiiVue); `overlays` is the picture of the same
for a page. The maps come from the final weights by sliding window, in evaluation mode: where two decoders disagree,
which of them is the surer one and would teach (WR), and the weight of what it teaches (HR). As in training, HR's
prototypes are those of a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import SimpleITK
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from mlrpl.config import study_names
from mlrpl.data import Case
from mlrpl.devices import find_device
from mlrpl.drawing import (
    add_legend,
    class_colour,
    dark_edge,
    draw_outline,
    image_grid,
    show_slice,
    styled,
    write_fitted,
)
from mlrpl.errors import StudyError
from mlrpl.files import read_rows
from mlrpl.inference import sliding_window
from mlrpl.losses import hard_labels
from mlrpl.metrics import case_metrics
from mlrpl.precision import computing
from mlrpl.reliability import entropy, weigh
from mlrpl.study import Job, Workplace, one_a_key, trained
from mlrpl.tables import case_dice, measures

DECODER_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#56B4E9", "#F0E442")  # the surer decoder: 1, 2, 3 …
DISAGREE_COLOUR = "#CC79A7"


@dataclass(frozen=True)
class Maps:
    """A case as a run sees it; all maps (x, y, z), the last three None where a run has one decoder.

    Attributes:
        case: image and reference.
        prediction: class of decoder 1, uint8.
        disagreement: where the decoders' classes differ, bool.
        teacher: number of the surest decoder, from 1, uint8: WR.
        weight: HR's weight of what that decoder teaches, float32.
    """

    case: Case
    prediction: np.ndarray
    disagreement: np.ndarray | None = None
    teacher: np.ndarray | None = None
    weight: np.ndarray | None = None


def explorable(place: Workplace) -> list[Job]:
    """Runs whose final weights are at hand; of those that coincide the first."""
    return one_a_key(job for job in place.jobs if (job.folder / "last.pt").exists())


def typical(place: Workplace) -> tuple[Job, str]:
    """The run and the test case that an exploration starts with: the reference's first run, its median case by Dice.

    Where none of the reference's is here, a run of the same method, which has the same decoders to show; else any.

    Raises:
        StudyError: where no run of the study is trained here.
    """
    jobs = explorable(place)
    if not jobs:
        raise StudyError(
            f"study {place.study.name}: no trained run in {place.root}/: make reproduce STUDY={place.given}"
        )
    title = place.study.reference_title
    methods = {job.run.method for job in place.jobs if job.run.title == title}
    job = max(jobs, key=lambda job: (job.run.title == title, job.run.method in methods))  # the first of equals
    cases = place.data_of(job.run).ids("test")
    if (job.folder / "metrics.csv").exists():
        cases = case_dice(read_rows(job.folder / "metrics.csv")).index.tolist()
    return job, cases[len(cases) // 2]


def maps(place: Workplace, job: Job, case_id: str, device: str | None = None) -> Maps:
    """What a run's final weights make of a case.

    Raises:
        StudyError: for a run that is not trained, or a case that the store does not have.
    """
    where = find_device(device)
    method, precision = trained(job, place.store, where)
    case = place.store.load(case_id)
    # CCT's other decoders predict nothing; a network of one's own may have heads of its own kind.
    several = "mean" in method.outputs and len(getattr(method.network, "decoders", ())) > 1
    classes = method.num_classes

    def predict(windows: Tensor) -> Tensor:
        windows = windows.to(memory_format=torch.channels_last_3d)
        with computing(where, precision):
            if not several:
                return torch.cat(method.predict(windows, ("decoder1",)), 1)
            logits, features = method.network(windows)
            probabilities = [z.float().softmax(1) for z in logits]
            weights = [
                weigh("mse", p, f, hard_labels(p))[:, None] for p, f in zip(probabilities, features, strict=True)
            ]
        return torch.cat([*probabilities, *weights], 1)

    found = sliding_window(
        predict, torch.from_numpy(case.image).to(where), job.run.settings.patch, job.run.settings.stride
    )
    decoders = len(found) // (classes + several)
    probabilities = found[: decoders * classes].split(classes)
    labels = [hard_labels(p[None])[0] for p in probabilities]
    prediction = labels[0].cpu().numpy().astype(np.uint8)
    if not several:
        return Maps(case, prediction)
    uncertain = torch.stack([entropy(p[None])[0] for p in probabilities])
    teacher = uncertain.argmin(0, keepdim=True)
    weight = found[decoders * classes :].gather(0, teacher)[0]
    disagreement = torch.stack([label != labels[0] for label in labels[1:]]).any(0)
    return Maps(
        case,
        prediction,
        disagreement.cpu().numpy(),
        (teacher[0] + 1).cpu().numpy().astype(np.uint8),
        weight.cpu().numpy(),
    )


def measured(shown: Maps, classes: Sequence[str], distances: str) -> pd.DataFrame:
    """The case's metrics as text, a row a foreground class; without a reference, empty.

    Args:
        shown: the case.
        classes: names, background first.
        distances: "voxels" or "mm".
    """
    case = shown.case
    if case.label is None:
        return pd.DataFrame()
    spacing = case.spacing if distances == "mm" else None
    found = [case_metrics(shown.prediction == c, case.label == c, spacing) for c in range(1, len(classes))]
    return pd.DataFrame({"Class": classes[1:], **measures(pd.DataFrame(found), distances)})


@styled
def overlays(shown: Maps, classes: Sequence[str]) -> Figure:
    """Slices through the middle of the reference: contours, and where there are two decoders the three maps."""
    case = shown.case
    columns = ["prediction"] + ["disagreement", "surer decoder (WR)", "weight (HR)"] * (shown.weight is not None)
    reference = case.label if case.label is not None else shown.prediction
    at = [int((reference > 0).sum(axis=tuple(np.delete(range(3), axis))).argmax()) for axis in range(3)]
    planes = {"x–y": 2, "x–z": 1}
    size = np.multiply(case.image.shape[1:], case.spacing)
    windows = [np.delete(size, axis) for axis in planes.values()]
    figure, grid, panel = image_grid([window[1] / window[0] for window in windows], len(columns))
    limits = np.percentile(case.image[0], (1, 99.5))
    picture = None
    for axes, (name, axis), window in zip(grid, planes.items(), windows, strict=True):
        spacing = np.delete(case.spacing, axis)

        def cut(volume: np.ndarray, axis: int = axis) -> np.ndarray:
            return volume.take(at[axis], axis)

        extent = (0, window[0], window[1], 0)
        for ax, column in zip(axes, columns, strict=True):
            show_slice(ax, cut(case.image[0]), spacing, limits, window / 2, window)
            if column == "prediction":
                for index in range(1, len(classes)):
                    draw_outline(ax, cut(shown.prediction) == index, spacing, class_colour(index), 1)
            elif column == "disagreement":
                _tint(ax, cut(shown.disagreement), DISAGREE_COLOUR, extent)
            elif column.startswith("surer"):
                for number in range(1, int(shown.teacher.max()) + 1):
                    _tint(ax, cut(shown.teacher) == number, DECODER_COLOURS[number - 1], extent)
            else:
                low = float(np.percentile(shown.weight, 1))
                picture = ax.imshow(
                    cut(shown.weight).T, cmap="cividis", vmin=low, vmax=1, extent=extent, interpolation="nearest"
                )
                ax.set(xlim=(0, window[0]), ylim=(window[1], 0))
            if case.label is not None:
                for index in range(1, len(classes)):
                    draw_outline(ax, cut(case.label) == index, spacing, "white", 0.8, halo=True)
            if axis != 2:
                ax.invert_yaxis()
        axes[0].set_ylabel(name)
    write_fitted([ax.set_title for ax in grid[0]], columns, panel)
    if picture is not None:
        figure.colorbar(picture, ax=grid[:, -1], shrink=0.7, aspect=25, extend="min")
    handles: list[Any] = [Line2D([], [], color="white", linewidth=2, path_effects=dark_edge(2), label="reference")]
    handles += [Line2D([], [], color=class_colour(c), label=f"prediction: {n}") for c, n in enumerate(classes) if c]
    if shown.weight is not None:
        handles.append(Patch(color=DISAGREE_COLOUR, label="decoders disagree"))
        numbers = range(1, int(shown.teacher.max()) + 1)
        handles += [Patch(color=DECODER_COLOURS[n - 1], label=f"decoder {n} surer") for n in numbers]
    add_legend(figure, handles)
    return figure


def _tint(ax: Any, mask: np.ndarray, colour: str, extent: tuple[float, ...]) -> None:
    tint = np.zeros((*mask.T.shape, 4))
    tint[mask.T] = to_rgba(colour, 0.55)
    ax.imshow(tint, extent=extent, interpolation="nearest")


# The viewer


def nifti(volume: np.ndarray, spacing: Sequence[float]) -> bytes:
    """A volume (x, y, z) as the bytes of a NIfTI file."""
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(volume.astype(np.float32).transpose(2, 1, 0)))
    image.SetSpacing([float(side) for side in spacing])
    with TemporaryDirectory() as folder:
        path = Path(folder) / "volume.nii"
        SimpleITK.WriteImage(image, str(path))
        return path.read_bytes()


def layers(shown: Maps) -> dict[str, dict[str, Any]]:
    """What the viewer can lay over the image, by name: the volume and how NiiVue colours it."""
    found: dict[str, dict[str, Any]] = {}
    if shown.case.label is not None:
        found["reference"] = {"volume": shown.case.label, "colormap": "green", "cal_min": 0.5, "cal_max": 1.5}
    found["prediction"] = {"volume": shown.prediction, "colormap": "redyell", "cal_min": 0.5, "cal_max": 2}
    if shown.weight is not None:
        found["disagreement"] = {"volume": shown.disagreement, "colormap": "violet", "cal_min": 0.5, "cal_max": 1}
        found["surer decoder (WR)"] = {"volume": shown.teacher, "colormap": "viridis", "cal_min": 0.5, "cal_max": 2}
        low = float(np.percentile(shown.weight, 1))
        found["weight (HR)"] = {"volume": shown.weight, "colormap": "plasma", "cal_min": low, "cal_max": 1}
    return found


def explorer(study: str, runs: str, results: str, device: str | None = None) -> Any:
    """Study, run and case to pick, a 3-D viewer with linked slices, and the case's metrics: an ipywidgets box.

    Raises:
        StudyError: where no run of the study is trained here.
    """
    import ipywidgets
    from ipyniivue import MultiplanarType, NiiVue, ShowRender, SliceType

    places = {study: Workplace(study, runs, results)}
    for name in study_names():
        if name != places[study].study.name and any((Path(runs) / name).glob("*/last.pt")):
            places[name] = Workplace(name, runs, results)
    viewer = NiiVue(
        height=560,
        slice_type=SliceType.MULTIPLANAR,
        multiplanar_layout=MultiplanarType.GRID,
        multiplanar_show_render=ShowRender.ALWAYS,
        crosshair_width=0.3,
    )
    wide = ipywidgets.Layout(width="16rem")
    pick = {name: ipywidgets.Dropdown(description=name, layout=wide) for name in ("Study", "Run", "Case", "Overlay")}
    opacity = ipywidgets.FloatSlider(value=0.5, min=0, max=1, step=0.05, description="Opacity", layout=wide)
    said = ipywidgets.HTML()
    now: dict[str, Maps] = {}

    def choose(name: str, options: Sequence[Any], value: Any) -> None:
        pick[name].unobserve(changed[name], "value")
        pick[name].options = options
        pick[name].value = value
        pick[name].observe(changed[name], "value")

    def study_changed(_: Any = None) -> None:
        place = places[pick["Study"].value]
        job, case = typical(place)
        choose("Run", [(j.run.name, j) for j in explorable(place)], job)
        choose("Case", place.data_of(job.run).ids("test"), case)
        case_changed()

    def run_changed(_: Any = None) -> None:
        cases = places[pick["Study"].value].data_of(pick["Run"].value.run).ids("test")
        choose("Case", cases, pick["Case"].value if pick["Case"].value in cases else cases[0])
        case_changed()

    def case_changed(_: Any = None) -> None:
        place = places[pick["Study"].value]
        said.value = "computing…"
        now["shown"] = shown = maps(place, pick["Run"].value, pick["Case"].value, device)
        names = list(layers(shown))
        choose("Overlay", names, pick["Overlay"].value if pick["Overlay"].value in names else "prediction")
        table = measured(shown, place.store.classes, place.study.distances)
        said.value = table.set_index("Class").T.to_html(border=0) if len(table) else "no reference"
        overlay_changed()

    def overlay_changed(_: Any = None) -> None:
        shown = now["shown"]
        layer = dict(layers(shown)[pick["Overlay"].value])
        low, high = np.percentile(shown.case.image[0], (1, 99.5))
        image = {"data": nifti(shown.case.image[0], shown.case.spacing), "name": "image.nii", "colormap": "gray"}
        over = {"data": nifti(layer.pop("volume"), shown.case.spacing), "name": "overlay.nii", "opacity": opacity.value}
        viewer.load_volumes([{**image, "cal_min": float(low), "cal_max": float(high)}, {**over, **layer}])

    def opacity_changed(_: Any) -> None:
        viewer.volumes[-1].opacity = opacity.value

    changed = {"Study": study_changed, "Run": run_changed, "Case": case_changed, "Overlay": overlay_changed}
    for name, react in changed.items():
        pick[name].observe(react, "value")
    opacity.observe(opacity_changed, "value")
    choose("Study", list(places), study)
    study_changed()
    viewer.on_canvas_attached(overlay_changed)  # what was loaded before there was a canvas may be lost
    side = ipywidgets.VBox([*pick.values(), opacity, said], layout=ipywidgets.Layout(min_width="18rem"))
    viewer.layout.width = "100%"
    return ipywidgets.HBox([side, viewer])
