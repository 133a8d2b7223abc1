"""BraTS-2019: FLAIR MRI of gliomas; the whole tumour is to be found.

    <root>/data/<case>.h5                             prepared, with train.txt, val.txt, test.txt, or
    <root>/**/{HGG,LGG}/<case>/<case>_flair.nii.gz, <case>_seg.nii.gz        raw, as the challenge gives it out

Raw volumes are cropped to the voxels that are not zero, clipped at the 99.9th percentile, and scaled by the mean and
the standard deviation of the voxels that are not zero.
"""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from mlrpl.data.preparation import Preparation, nonzero_box
from mlrpl.data.published import Files, Published, by_case
from mlrpl.data.source import CaseEntry, Raw

IMAGE, LABEL = "_flair.nii", "_seg.nii"


class Brats(Published):
    """Source `brats`: one channel, background and whole tumour."""

    classes = ("background", "whole tumour")
    shares: ClassVar = {"val": 25 / 335, "test": 60 / 335}
    looked_for: ClassVar = "neither data/<case>.h5 nor <case>/<case>_flair.nii.gz"
    preparation = Preparation(channels=("brain",))
    licence = "terms of the BraTS challenge: for research, cite its papers"
    citation = (
        "Menze et al., The multimodal brain tumor image segmentation benchmark (BRATS), IEEE TMI 34 (2015) 1993; "
        "Bakas et al., Advancing The Cancer Genome Atlas glioma MRI collections, Scientific Data 4 (2017) 170117"
    )

    def prepared_files(self, root: Path) -> Files:
        return {case: (name,) for case, name in by_case(root, "*.h5", lambda path: path.stem).items()}

    def raw_files(self, root: Path) -> Files:
        images = by_case(root, f"*{IMAGE}*", lambda path: path.name.partition(IMAGE)[0])
        return {case: (name, name.replace(IMAGE, LABEL)) for case, name in images.items()}

    def read_prepared(self, name: str) -> Raw:
        raw = super().read_prepared(name)
        return replace(raw, label=(raw.label > 0).astype(np.uint8))

    def read_raw(self, entry: CaseEntry) -> Raw:
        name = entry.files[0]
        image, geometry, label = self.read_files(entry)
        prepared = self.preparation.apply(image, geometry, name)
        box = nonzero_box(image[0], name)
        cropped, spacing, place = prepared.part(box)
        return Raw(cropped, (label > 0).astype(np.uint8)[box], spacing, place, prepared.source)
