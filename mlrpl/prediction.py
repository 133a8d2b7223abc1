"""Label maps of new images, each on its own grid, from the runs of a study; several folds of one run are averaged.

Memory stays at a few volumes: windows are summed slab by slab, and class after class goes back to the image's grid.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mlrpl.data import Store
from mlrpl.data.grid import other_voxels
from mlrpl.data.preparation import Prepared
from mlrpl.data.volumes import ENDINGS, ending, read_channels, without_ending, write_nifti
from mlrpl.errors import StudyError
from mlrpl.inference import count_windows, sliding_slabs
from mlrpl.masks import keep_largest
from mlrpl.methods import Method
from mlrpl.precision import Precision, computing
from mlrpl.study import Job, Workplace, trained
from mlrpl.words import slug

DATA_FOLDERS = ("imagesTr", "labelsTr", "imagesTs", "labelsTs")  # nothing is to be written over there
NOTICE = "For research, not for diagnosis."
Progress = Callable[[int, int], None]  # windows done, windows in all


@dataclass(frozen=True)
class Ensemble:
    """Trained methods that predict together, and how their data set prepares an image."""

    name: str
    methods: tuple[tuple[Method, Precision], ...]
    store: Store
    device: torch.device

    def unlike(self, image: Prepared) -> str:
        """What of an image's voxels is unlike those that the network learned from; empty where nothing is."""
        usual, spacing = self.store.usual_spacing, np.array(image.geometry["spacing"])
        if usual is None or not other_voxels(spacing, usual):
            return ""
        mine, theirs = (" × ".join(f"{side:.3g}" for side in sides) for sides in (spacing, usual))
        return f"voxels of {mine} mm, but the network learned from {theirs} mm: do not rely on this prediction"

    @property
    def output(self) -> str:
        """The mean of the decoders where there are several."""
        return "mean" if "mean" in self.methods[0][0].outputs else "decoder1"


@dataclass(frozen=True)
class Image:
    """An image to predict: a name for its files, and the files of its channels, which lie in one folder.

    One file may hold all channels; a DICOM folder stands for a file.
    """

    name: str
    files: tuple[Path, ...]


def open_ensemble(run: str, runs: str, device: torch.device) -> Ensemble:
    """The trained runs that `run` names: STUDY for the study's first, STUDY/RUN for another; all folds together.

    Raises:
        StudyError: for an unknown study or run, one that is not trained, or a data set that was not prepared here.
    """
    file = re.fullmatch(r"(.+\.ya?ml)(?:/(.+))?", run)
    study, _, name = run.partition("/") if not file else (file[1], "", file[2] or "")
    place = Workplace(study, runs)
    if (step := place.study.dataset.step) > 1:
        raise StudyError(
            f"study {place.study.name} learned from images with voxels left out (step: {step}); "
            "predict with one of step: 1"
        )
    jobs = _named(place, name)
    if waiting := [job.run.name for job in jobs if not job.finished("train")]:
        raise StudyError(
            f"run {waiting[0]} is not trained yet, or its data or settings have changed since; "
            f"mlrpl train {study} does it"
        )
    store = place.store
    return Ensemble(_group(jobs[0]), tuple(trained(job, store, device) for job in jobs), store, device)


def _group(job: Job) -> str:
    """A run's name without its fold."""
    return job.run.name.removesuffix(f"-f{job.run.fold}")


def _named(place: Workplace, name: str) -> list[Job]:
    if not name:
        name = _group(place.jobs[0])
    jobs = [job for job in place.jobs if name in (job.run.name, _group(job))]
    if not jobs:  # a variant's name will do where it has one run
        jobs = [job for job in place.jobs if name == job.run.variant]
        if len(several := dict.fromkeys(_group(job) for job in jobs)) > 1:
            raise StudyError(f"study {place.study.name}: {name} is several runs, name one: {', '.join(several)}")
    if not jobs:
        known = ", ".join(dict.fromkeys(_group(job) for job in place.jobs))
        raise StudyError(f"study {place.study.name} has no run {name!r}: it has {known}")
    return jobs


def find_images(given: Iterable[Path], channels: int) -> list[Image]:
    """The images among files and folders: a folder holds NIfTI or NRRD files, or else the slices of a DICOM series.

    Files <case>_0000, <case>_0001, … are the channels of one case where the data set has several.

    Raises:
        StudyError: where something is not there, is no image, or two would get the same name.
    """
    files: list[Path] = []
    images: list[Image] = []
    for path in given:
        if not path.exists():
            raise StudyError(f"{path}: not there; give images, or folders with images")
        inside = sorted(p for p in path.iterdir() if _is_volume(p)) if path.is_dir() else []
        if path.is_dir() and not inside and (deeper := next(filter(_is_volume, path.rglob("*")), None)):
            raise StudyError(f"{path}: its images lie deeper, as in {deeper.parent}; give that folder")
        if inside or not path.is_dir():
            files += inside or [path]
        else:
            images.append(Image(path.resolve().name, (path,)))
    images += _by_channel(files, channels)
    names = [image.name for image in images]
    for image in images:
        if names.count(image.name) > 1:
            raise StudyError(f"{image.files[0].name}: two images would be named '{image.name}'; predict them apart")
    if not images:
        raise StudyError("no image is given")
    return images


def _by_channel(files: Sequence[Path], channels: int) -> list[Image]:
    """Files of one folder that are numbered as all channels of one case, and no others, are one image."""
    grouped: dict[tuple[Path, str], list[Path]] = {}
    images = []
    for path in files:
        numbered = re.fullmatch(r"(.+)_\d{4}", without_ending(path.name))
        grouped.setdefault((path.parent, numbered[1] if numbered else ""), []).append(path)
    for (_, case), paths in grouped.items():
        if case and [without_ending(path.name)[-4:] for path in sorted(paths)] == [f"{c:04d}" for c in range(channels)]:
            images.append(Image(case, tuple(sorted(paths))))
        else:
            images += [Image(without_ending(path.name), (path,)) for path in paths]
    return images


def _is_volume(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".") and ending(path.name) in ENDINGS


def predict_image(
    ensemble: Ensemble,
    image: Image,
    output: Path,
    *,
    probabilities: bool = False,
    disagreement: bool = False,
    largest: bool = False,
    watch: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write an image's label map on its own grid: <output>/<name>.nii.gz, and what else is asked for.

    Args:
        ensemble: predicts.
        image: to be predicted.
        output: folder; made where it is missing.
        probabilities: also <name>_probability_<class>.nii.gz of each foreground class (its number where two names
            differ in signs alone).
        disagreement: also <name>_disagreement.nii.gz, how far the decoders are apart, 0 … 1.
        largest: of each class keep the largest connected component alone.
        watch: called with (done, of) windows.
        note: called with what speaks against the prediction.

    Returns:
        The files, the label map first.

    Raises:
        StudyError: where the image is unreadable or of another number of channels, or the disagreement is asked of a
            method with one decoder.
    """
    method = ensemble.methods[0][0]
    if disagreement and "mean" not in method.outputs:
        raise StudyError(f"{ensemble.name} has one decoder: there is no disagreement; leave --disagreement out")
    classes = ensemble.store.classes
    prepared = _prepare(ensemble, image)
    if note and (said := ensemble.unlike(prepared)):
        note(f"{image.name}: {said}")
    outputs = (ensemble.output, *(["disagreement"] if disagreement else []))
    labels = np.empty(prepared.image.shape[1:], np.uint8)
    keep = probabilities or disagreement or prepared.resampled
    values = np.empty((len(classes) + disagreement, *labels.shape), np.float16) if keep else None
    for start, slab in _slabs(ensemble, prepared, outputs, watch):
        planes = slice(start, start + slab.shape[1])
        labels[planes] = slab[: len(classes)].argmax(0).to(torch.uint8).cpu().numpy()
        if values is not None:
            values[:, planes] = slab.cpu().numpy()
    preparation, geometry = ensemble.store.preparation, prepared.original
    restored = _restored_labels(ensemble, prepared, labels, values)
    if largest:
        keep_largest(restored, len(classes))
    label_map, *maps = _files(image, output, classes, probabilities, disagreement)
    write_nifti(label_map, restored, geometry)
    channels = range(1 if probabilities else len(classes), len(classes) + disagreement)
    for path, channel in zip(maps, channels, strict=True):
        write_nifti(path, preparation.restore(values[channel], prepared).astype(np.float32), geometry)
    return [label_map, *maps]


def _files(image: Image, output: Path, classes: Sequence[str], probabilities: bool, disagreement: bool) -> list[Path]:
    """What is written of an image: the label map, then each foreground class's probability, then the disagreement."""
    slugs = [slug(name) for name in classes]
    alone = len(set(slugs)) == len(slugs)
    wanted = [f"_probability_{slugs[c] if alone else c}" for c in range(1, len(classes)) if probabilities]
    wanted += ["_disagreement"] * disagreement
    return [output / f"{image.name}{what}.nii.gz" for what in ("", *wanted)]


def _prepare(ensemble: Ensemble, image: Image) -> Prepared:
    name = image.files[0].name
    array, geometry = read_channels(image.files[0].parent, [path.name for path in image.files])
    if len(array) != ensemble.store.channels:
        raise StudyError(f"{name}: {len(array)} channels, but {ensemble.name} learned from {ensemble.store.channels}")
    if not np.isfinite(array).all():
        raise StudyError(f"{name}: some voxels are NaN or infinite; repair the image")
    return ensemble.store.preparation.apply(array, geometry, name)


def _slabs(
    ensemble: Ensemble, prepared: Prepared, outputs: tuple[str, ...], watch: Progress | None
) -> Iterable[tuple[int, Tensor]]:
    settings, device = ensemble.methods[0][0].settings, ensemble.device
    total = count_windows(prepared.image.shape[1:], settings.patch, settings.stride)
    done = 0

    def predict(windows: Tensor) -> Tensor:
        nonlocal done
        windows = windows.to(device, memory_format=torch.channels_last_3d)
        values = 0.0
        for method, precision in ensemble.methods:
            with computing(device, precision):
                values = values + torch.cat(method.predict(windows, outputs), dim=1)
        done += len(windows)
        if watch:
            watch(done, total)
        return values / len(ensemble.methods)

    volume = torch.from_numpy(np.ascontiguousarray(prepared.image)).to(device)
    return sliding_slabs(predict, volume, settings.patch, settings.stride)


def _restored_labels(
    ensemble: Ensemble, prepared: Prepared, labels: np.ndarray, values: np.ndarray | None
) -> np.ndarray:
    """The label map on the image's own grid: of interpolated probabilities where voxels were resampled."""
    if not prepared.resampled:
        return np.ascontiguousarray(ensemble.store.preparation.restore(labels, prepared))
    best, found = None, None
    for c in range(len(ensemble.store.classes)):
        restored = ensemble.store.preparation.restore(values[c], prepared)
        if best is None:
            best, found = restored, np.zeros(restored.shape, np.uint8)
        else:
            higher = restored > best
            found[higher] = c
            np.maximum(best, restored, out=best)
    return found


def predict(
    run: str,
    given: Sequence[Path],
    output: Path,
    *,
    runs: str,
    device: torch.device,
    bar: Callable[[str], Progress],
    note: Callable[[str], None] | None = None,
    overwrite: bool = False,
    **options: bool,
) -> dict[str, str]:
    """Predict all images; one that cannot be is named and the others go on.

    Args:
        run: as for `open_ensemble`.
        given: files and folders.
        output: folder of the predictions.
        runs: folder of runs.
        device: where to predict.
        bar: makes a progress callback for an image's name.
        note: see `predict_image`.
        overwrite: whether files that are there already, but no images, may be replaced.
        options: of `predict_image`.

    Returns:
        The problem of each image that was not predicted.

    Raises:
        StudyError: where a prediction would take a file's place, and what `open_ensemble` and `find_images` raise.
    """
    ensemble = open_ensemble(run, runs, device)
    images, problems = find_images(given, ensemble.store.channels), {}
    if output.resolve().name in DATA_FOLDERS:
        raise StudyError(f"{output}: holds a data set; write predictions into a folder of their own")
    maps = {name: options.get(name, False) for name in ("probabilities", "disagreement")}
    targets = [path for image in images for path in _files(image, output, ensemble.store.classes, **maps)]
    given_files = {path.resolve() for image in images for path in image.files}
    for target in targets:
        if target.resolve() in given_files:
            raise StudyError(f"{target}: is one of the images; write predictions into a folder of their own")
        if target.exists() and not overwrite:
            raise StudyError(f"{target}: is there already; name another folder, or add --overwrite to replace it")
    for image in images:
        try:
            predict_image(ensemble, image, output, watch=bar(image.name), note=note, **options)
        except StudyError as error:
            problems[image.name] = str(error)
    return problems
