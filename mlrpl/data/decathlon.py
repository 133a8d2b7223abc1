"""Own data and the Medical Segmentation Decathlon: the folder that nnU-Net reads too.

    dataset.json                    classes and channels, as the Decathlon or nnU-Net write them
    imagesTr/<case>.nii.gz          one file a case (channels in the fourth axis), or
    imagesTr/<case>_0000.nii.gz     one file a channel: _0000, _0001, …
    labelsTr/<case>.nii.gz          whole numbers 0 … classes - 1; an image without a label is an unlabelled case
    imagesTs/, labelsTs/            with labels: the test cases; images without labels: unlabelled cases

Without labelled imagesTs, `test` labelled cases are kept for testing, drawn by seed. Training cases come in a
seeded order, the unlabelled ones last. By default channels are z-scored per volume and arrays are (x, y, z) as in the
file; options turn the axes, resample and normalise otherwise. Spacing, origin and direction are kept.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from mlrpl.config import Model
from mlrpl.data.grid import Geometry
from mlrpl.data.preparation import Preparation
from mlrpl.data.source import CaseEntry, Raw, Rejected
from mlrpl.data.volumes import NIFTI, channels_of, ending, nifti_files, read_channels, read_label, without_ending
from mlrpl.errors import StudyError


class DecathlonOptions(Model):
    """What a study may set.

    Attributes:
        test: labelled cases kept for testing where imagesTs has no labels; 0: none, for cross-validation.
        seed: draws them, and the order.
        images_ts: whether images without a label in imagesTs are unlabelled cases.
        lenient: leave faulty cases out, and say so, instead of refusing the whole.
        classes: names, background first; default: those of dataset.json, which need not be there then.
        preparation: of the images.
    """

    test: int = Field(60, ge=0)
    seed: int = Field(0, ge=0)
    images_ts: bool = True
    lenient: bool = False
    classes: Annotated[tuple[str, ...], Field(min_length=2, max_length=256)] | None = None
    preparation: Preparation = Preparation()


class Decathlon:
    """Source `decathlon`: any number of classes and channels."""

    Options: ClassVar = DecathlonOptions
    version: ClassVar = 1
    needs_folder: ClassVar = True
    real_spacing = True
    form = "NIfTI"

    def __init__(self, options: DecathlonOptions, root: Path) -> None:
        self.root = root
        self.lenient, self.preparation = options.lenient, options.preparation
        self.rejected: list[Rejected] = []
        description = {} if options.classes and not (root / "dataset.json").exists() else _description(root)
        self.classes = options.classes or _classes(description)
        if len(set(self.classes)) < len(self.classes):
            raise StudyError(f"two classes have one name: {', '.join(self.classes)}; give each its own")
        if "all" in self.classes:
            raise StudyError('a class is called "all", as tables call all classes together; give it another name')
        self.channels = _channels(root, description)
        self.licence = str(description.get("licence") or description.get("license") or "not stated")
        self.citation = str(description.get("reference") or description.get("name") or "not stated")
        self._check_list(description)
        training, testing = (self._cases(part) for part in ("Tr", "Ts"))
        if not training:
            deeper = next((path for path in sorted(root.rglob("*")) if ending(path.name) in NIFTI), None)
            where = f" (there is {deeper.relative_to(root)})" if deeper else ""
            advice = "put images into imagesTr and their labels, under the same names, into labelsTr"
            if deeper and deeper.parent != root:
                advice = "give the folder that holds imagesTr"
            raise StudyError(f"{root}: no NIfTI image in imagesTr{where}; {advice}")
        for folder in sorted(path for path in (root / "imagesTr").iterdir() if path.is_dir()):
            if nifti_files(folder):
                self._reject(folder.name, f"imagesTr/{folder.name}: a folder; put its images into imagesTr itself")
        for case in sorted(training.keys() & testing.keys()):
            self._reject(case, f"imagesTs: case '{case}' is in imagesTr too; remove one of them")
            del testing[case]
        if not options.images_ts:
            testing = {case: files for case, files in testing.items() if files[1]}
        cases = training | testing
        self._labelled = {case for case, (_, label) in cases.items() if label}

        labelled = sorted(training.keys() & self._labelled)
        train = [str(case) for case in np.random.default_rng(options.seed).permutation(labelled)]
        test = sorted(testing.keys() & self._labelled)
        self.split = "published" if test else "seeded"
        if not test and options.test:
            if len(train) <= options.test:
                raise StudyError(
                    f"{root}: {len(train)} labelled cases, of which option 'test' keeps {options.test} "
                    "for testing, leave none to train on; lower 'test' or add labels"
                )
            train, test = train[: -options.test], train[-options.test :]
        train += sorted(cases.keys() - self._labelled)
        self.entries = [
            CaseEntry(case, split, (*cases[case][0], *cases[case][1]))
            for split, ids in (("train", train), ("test", test))
            for case in ids
        ]

    def read(self, entry: CaseEntry) -> Raw:
        """Read one case; StudyError names the file that is cut short or on another grid than the case's first."""
        image, geometry, label = self.read_files(entry)
        prepared = self.preparation.apply(image, geometry, entry.files[0])
        if label is not None:
            label = self.preparation.label(label, geometry, prepared)
        whole, spacing, place = prepared.part((slice(None),) * 3)
        return Raw(whole, label, spacing, place, prepared.source)

    def read_files(self, entry: CaseEntry) -> tuple[np.ndarray, Geometry, np.ndarray | None]:
        """Image (channels, x, y, z), its geometry and its label (x, y, z), if there is one, as the files hold them.

        Raises:
            StudyError: where a file cannot be read or is on another grid than the first, or channels are missing.
        """
        labelled = entry.id in self._labelled
        names = entry.files[:-1] if labelled else entry.files
        image, geometry = read_channels(self.root, names)
        if len(image) != self.channels:
            raise StudyError(
                f"{names[0]}: the image has {len(image)} channels or time points instead of {self.channels}; "
                "take the right ones out of it, or replace the file"
            )
        label = read_label(self.root, entry.files[-1], names[0], (image, geometry)) if labelled else None
        return image, geometry, label

    def _reject(self, case: str, problem: str) -> None:
        """Leave a case out, or refuse the whole where nothing may be left out."""
        if not self.lenient:
            raise StudyError(problem)
        self.rejected.append(Rejected(case, problem))

    def _check_list(self, description: Mapping[str, Any]) -> None:
        """Every file that dataset.json lists has to be there; nnU-Net's newer form lists none."""
        listed = description.get("training")
        for case in listed if isinstance(listed, list) else ():
            for name in case.values() if isinstance(case, dict) else ():
                path = self.root / str(name)
                # nnU-Net's older form lists <case>.nii.gz where the files have a channel number
                numbered = path.with_name(f"{without_ending(path.name)}_0000{ending(path.name)}")
                if not path.is_file() and not numbered.is_file():
                    self._reject(
                        without_ending(path.name),
                        f"dataset.json lists {name}, which is not there; complete the dataset or the list",
                    )

    def _cases(self, part: str) -> dict[str, tuple[list[str], list[str]]]:
        """Case id → (image files, its label file if there is one), names relative to the root; part: "Tr" or "Ts"."""
        images, labels = nifti_files(self.root / f"images{part}"), nifti_files(self.root / f"labels{part}")
        numbered = _numbered(images, labels)
        files: dict[str, list[str]] = {}
        if all(channel < self.channels for _, channel in numbered.values()) and len(numbered) == len(images):
            for name, (case, _) in numbered.items():
                files.setdefault(case, []).append(f"images{part}/{images[name]}")
            for case, names in list(files.items()):
                if len(names) != self.channels:
                    self._reject(
                        case,
                        f"images{part}: case '{case}' has {len(names)} of {self.channels} channel files; "
                        "add the others",
                    )
                    del files[case]
                    labels.pop(case, None)
        else:
            files = {name: [f"images{part}/{file}"] for name, file in images.items()}
        for case, file in labels.items():
            if case not in files:
                self._reject(
                    case,
                    f"labels{part}/{file}: a label without an image in images{part}; add the image or remove the label",
                )
        return {
            case: (names, [f"labels{part}/{labels[case]}"] if case in labels else []) for case, names in files.items()
        }


def _channels(root: Path, description: Mapping[str, Any]) -> int:
    """As dataset.json says; without one, from the numbers in the file names, else as the first file has."""
    if description:
        return len(_mapping(description, "channel_names", "modality"))
    images = nifti_files(root / "imagesTr")
    numbered = _numbered(images, nifti_files(root / "labelsTr"))
    if images and len(numbered) == len(images):
        return 1 + max(channel for _, channel in numbered.values())
    return channels_of(root / "imagesTr" / next(iter(images.values()))) if images else 1


def _numbered(images: Iterable[str], labels: Collection[str]) -> dict[str, tuple[str, int]]:
    """Case and channel of the images whose names end in _0000, _0001, …; of none if these numbers are the cases'."""
    matches = {name: re.fullmatch(r"(.+)_(\d{4})", name) for name in images}
    numbered = {name: (match[1], int(match[2])) for name, match in matches.items() if match}
    of_cases = any(name in labels for name in images) and not any(case in labels for case, _ in numbered.values())
    return {} if of_cases else numbered


def _description(root: Path) -> dict[str, Any]:
    try:
        description = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(f"{root}: no dataset.json here; give the folder that holds dataset.json, imagesTr") from None
    except (OSError, ValueError) as error:
        raise StudyError(f"dataset.json: not readable as JSON ({error}); correct it") from None
    if not isinstance(description, dict):
        raise StudyError("dataset.json: must be an object with 'labels' and 'modality' or 'channel_names'; correct it")
    return description


def _mapping(description: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    for key in keys:
        value = description.get(key)
        if isinstance(value, dict) and value:
            return value
    raise StudyError(f"dataset.json: no {' or '.join(keys)} with at least one entry; add it as nnU-Net describes")


def _classes(description: Mapping[str, Any]) -> tuple[str, ...]:
    """Class names by value; the Decathlon writes {"0": "background"}, nnU-Net {"background": 0}."""
    labels = _mapping(description, "labels")
    decathlon = all(key.isdecimal() for key in labels)
    pairs = [(key, name) if decathlon else (name, key) for key, name in labels.items()]
    try:
        names = {int(value): str(name) for value, name in pairs}
    except (TypeError, ValueError):
        raise StudyError("dataset.json: 'labels' must give one whole number a class (no regions); correct it") from None
    if len(names) < len(pairs) or sorted(names) != list(range(len(names))) or not 2 <= len(names) <= 256:
        raise StudyError(
            f"dataset.json: the label values are {sorted(names)}; they must be 0 (background), 1, … "
            "without gaps, so renumber them"
        )
    return tuple(names[value] for value in range(len(names)))
