"""Left atrium (LA): late-gadolinium MRI of the 2018 Atrial Segmentation Challenge.

    <root>/**/<case>/mri_norm2.h5                     prepared, as the semi-supervised literature shares it, or
    <root>/**/<case>/lgemri.nrrd, laendo.nrrd         raw, as the challenge gives it out (255 = left atrium)
    train.list, test.list                             one case a line; in the root, one level below or above

Prepared volumes are taken as they are; their voxel spacing is not recorded, so distances are in voxels. Raw ones are
z-scored, then cropped in x and y to the label's box and 10 to 19 voxels a side, drawn from the case's name.
"""

from pathlib import Path
from typing import ClassVar

import numpy as np

from mlrpl.data.preparation import Preparation
from mlrpl.data.published import Files, Published, around_label, by_case, drawn
from mlrpl.data.source import CaseEntry, Raw

PREPARED, IMAGE, LABEL = "mri_norm2.h5", "lgemri.nrrd", "laendo.nrrd"
LEAST = (112, 112)  # voxels in x and y: the published patch
ATRIUM = 255  # in laendo.nrrd


class LeftAtrium(Published):
    """Source `la`: one channel, background and left atrium."""

    classes = ("background", "left atrium")
    shares: ClassVar = {"test": 0.2}
    looked_for: ClassVar = f"neither <case>/{PREPARED} nor <case>/{IMAGE}"
    preparation = Preparation()
    licence = "terms of the 2018 Atrial Segmentation Challenge: for research, cite the challenge"
    citation = (
        "Xiong et al., A global benchmark of algorithms for segmenting the left atrium from late "
        "gadolinium-enhanced cardiac magnetic resonance imaging, Medical Image Analysis 67 (2021) 101832"
    )

    def prepared_files(self, root: Path) -> Files:
        return {case: (name,) for case, name in by_case(root, PREPARED, lambda path: path.parent.name).items()}

    def raw_files(self, root: Path) -> Files:
        images = by_case(root, IMAGE, lambda path: path.parent.name)
        # The published 100 cases are the challenge's training set; its testing set came out later.
        training = {case: name for case, name in images.items() if "testing set" not in name.lower()}
        return {case: (name, name.replace(IMAGE, LABEL)) for case, name in (training or images).items()}

    def read_raw(self, entry: CaseEntry) -> Raw:
        name, label_name = entry.files
        image, geometry, label = self.read_files(entry)
        prepared = self.preparation.apply(image, geometry, name)
        label = np.where(label == ATRIUM, 1, label)
        random = drawn(entry.id)
        margins = [tuple(random.integers(10, 20, 2).tolist()) for _ in LEAST]
        box = around_label(label, margins, LEAST, label_name)
        cropped, spacing, place = prepared.part(box)
        return Raw(cropped, label[box], spacing, place, prepared.source)
