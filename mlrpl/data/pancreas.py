"""Pancreas-CT: abdominal CT of the National Institutes of Health's Clinical Center, from The Cancer Imaging Archive.

    <root>/Pancreas_h5/<case>_norm.h5                 prepared, or
    <root>/**/PANCREAS_0001/**/*.dcm                  raw: DICOM series, possibly several in a folder, and
    <root>/**/label0001.nii.gz                        their labels
    train.list, test.list                             one case a line: image0001, in either form

Raw series are brought to Hounsfield units and to 1 mm (B-spline), labels to the same voxels by their place in space
(nearest): the order of their axes differs from the series'. Then −125 … 275 HU to 0 … 1, a crop in x and y to the
label's box and 25 voxels a side, and a z-score.
"""

import re
from pathlib import Path
from typing import ClassVar

import numpy as np

from mlrpl.data.dicom import read_dicom
from mlrpl.data.grid import Geometry, difference, to_patient_axes
from mlrpl.data.preparation import Preparation, Prepared, Window, moments, z_score
from mlrpl.data.published import Files, Published, around_label, by_case
from mlrpl.data.source import CaseEntry, Raw
from mlrpl.data.volumes import below, read_nifti
from mlrpl.errors import StudyError

LOW, HIGH = -125, 275  # HU
MARGIN = 25  # voxels of 1 mm
LEAST = (96, 96)  # voxels in x and y: the published patch
# To 0 … 1; the z-score of the crop follows. A new image has no crop: it is scaled as the training cases on average.
RAW = Preparation(axes="patient", spacing=(1, 1, 1), channels=(Window(low=LOW, high=HIGH, mean=LOW, sd=HIGH - LOW),))
LOST = 0.05  # share of a label's volume that may lie outside of the series


class Pancreas(Published):
    """Source `pancreas`: one channel, background and pancreas."""

    classes = ("background", "pancreas")
    shares: ClassVar = {"test": 20 / 82}
    looked_for: ClassVar = "neither Pancreas_h5/<case>_norm.h5 nor PANCREAS_0001 with DICOM files and label0001.nii.gz"
    preparation = Preparation(axes="patient", spacing=(1, 1, 1), channels=(Window(low=LOW, high=HIGH),))
    licence = "CC BY 3.0, The Cancer Imaging Archive"
    citation = (
        "Roth et al., Data from Pancreas-CT, The Cancer Imaging Archive (2016), "
        "https://doi.org/10.7937/K9/TCIA.2016.tNB1kqBU"
    )

    def prepared_files(self, root: Path) -> Files:
        files = by_case(root, "*_norm.h5", lambda path: path.stem.removesuffix("_norm"))
        return {case: (name,) for case, name in files.items()}

    def raw_files(self, root: Path) -> Files:
        """Cases with a label; the folder of a series is found by its number."""
        labels = by_case(root, "label*.nii*", lambda path: re.sub(r"\D", "", path.name.split(".")[0]))
        folders = {
            re.sub(r"\D", "", path.name): path.relative_to(root).as_posix()
            for path in below(root, "PANCREAS_*")
            if path.is_dir()
        }
        for number in sorted(labels.keys() ^ folders.keys()):
            has, lacks = ("label", "series") if number in labels else ("series", "label")
            raise StudyError(
                f"{(labels | folders)[number]}: a {has} without its {lacks}; complete the case or remove it"
            )
        return {f"image{number}": (folders[number], labels[number]) for number in sorted(labels)}

    def read_raw(self, entry: CaseEntry) -> Raw:
        folder, label_name = entry.files
        label, place = read_nifti(self.root, label_name)
        label = (label[0] > 0).astype(np.uint8)
        image, geometry = read_dicom(self.root / folder, folder, slices=label.shape[2])
        place = _placed(label, place, image, geometry)
        prepared = RAW.apply(image[None], geometry, folder)
        aligned = RAW.label(label, place, prepared)
        _check_label(label, place, aligned, prepared, label_name)
        box = around_label(aligned, [(MARGIN, MARGIN)] * 2, LEAST, label_name)
        crop, spacing, at = prepared.part(box)
        mean, deviation = (float(value.item()) for value in moments(crop))
        scale = [(LOW + mean * (HIGH - LOW), deviation * (HIGH - LOW))]
        return Raw(z_score(crop, folder), aligned[box], spacing, at, prepared.source, scale)


def _placed(label: np.ndarray, place: Geometry, image: np.ndarray, geometry: Geometry) -> Geometry:
    """Where the label lies; a header without an origin says how its axes run, and its grid is then the series' own."""
    if any(place["origin"]) or not any(geometry["origin"]):
        return place
    (turned, mine), (other, theirs) = to_patient_axes(label[None], place), to_patient_axes(image[None], geometry)
    moved_there = {**mine, "origin": theirs["origin"]}
    if turned.shape != other.shape or difference(moved_there, theirs):
        return place
    return {**place, "origin": (np.array(place["origin"]) + theirs["origin"] - np.array(mine["origin"])).tolist()}


def _check_label(label: np.ndarray, place: Geometry, aligned: np.ndarray, prepared: Prepared, name: str) -> None:
    """StudyError where the label lies beside the series, or on what cannot be pancreas."""
    before, after = (
        np.count_nonzero(mask) * np.prod(spacing)
        for mask, spacing in ((label, place["spacing"]), (aligned, prepared.geometry["spacing"]))
    )
    if after < (1 - LOST) * before:
        raise StudyError(
            f"{name}: {100 * (1 - after / before):.0f} % of the label lie outside of its series; "
            "check its header, or whether both are of one case"
        )
    if not aligned.any():
        return  # the crop names it
    tissue = float(np.median(prepared.image[0][aligned > 0]))
    if not 0 < tissue < 1:
        raise StudyError(
            f"{name}: half of the label lies on {f'less than {LOW}' if tissue <= 0 else f'more than {HIGH}'} HU, "
            "which is no pancreas; check the orientation in its header"
        )
