"""The case store: prepared volumes on disk, read by every later step.

    <folder>/store.json                 what the dataset is, how images are prepared, what was rejected and, per case,
                                        split, shape, spacing, geometry, highest value of its label, SHA-256 of arrays
                                        and of the files behind them
    <folder>/cases/<id>/image.npy       float32 (channels, x, y, z)
    <folder>/cases/<id>/label.npy       uint8 (x, y, z); absent for a case without reference

The same input gives the same bytes, and `fingerprint` names them: it depends on arrays, spacings, splits and
order, not on the machine or the time.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlrpl.data.preparation import Preparation
from mlrpl.errors import StudyError

FORMAT = 2  # raise when what is written changes: older stores are then prepared again


@dataclass(frozen=True)
class Case:
    """One prepared volume; image float32 (channels, x, y, z), label uint8 (x, y, z), spacing in mm."""

    id: str
    split: str  # "train" | "val" | "test"
    image: np.ndarray
    label: np.ndarray | None  # None for a case without reference
    spacing: tuple[float, float, float]  # voxels of the source instead, where Store.real_spacing is False


class Store:
    """Read side of a case store; made by `open_store` or `mlrpl.data.prepare.prepare`.

    >>> store = open_store("stores/phantom")            # doctest: +SKIP
    >>> labelled = [store.load(i) for i in store.ids("train")[:4]]   # doctest: +SKIP
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        self.index = index
        self.name: str = index["name"]
        self.classes: tuple[str, ...] = tuple(index["classes"])  # background first
        self.channels: int = index["channels"]
        self.real_spacing: bool = index["real_spacing"]  # False: unknown, distances mean voxels only
        self.licence: str = index["licence"]
        self.citation: str = index["citation"]
        self.fingerprint: str = index["fingerprint"]
        self.preparation = Preparation.model_validate(index["preparation"])  # of a new image, for prediction
        self._cases: dict[str, dict[str, Any]] = {case["id"]: case for case in index["cases"]}

    def ids(self, split: str) -> list[str]:
        """Case ids of "train", "val" or "test" in list order; in training the first n are the labelled ones."""
        return [case["id"] for case in self.index["cases"] if case["split"] == split]

    def fold(self, number: int, folds: int) -> "Store":
        """This store with every `folds`-th labelled training case, from `number` on, as a test case.

        Raises:
            StudyError: where there are fewer labelled cases than folds, or test cases already.
        """
        labelled = [case["id"] for case in self.index["cases"] if case["split"] == "train" and case["has_label"]]
        if self.ids("test"):
            raise StudyError(f"{self.name} has test cases of its own: set folds: 0, or leave them out of the data set")
        if len(labelled) < max(folds, 2):
            raise StudyError(f"{self.name}: {len(labelled)} labelled cases cannot make {folds} folds; lower 'folds'")
        held = set(labelled[number::folds])
        cases = [case | {"split": "test"} if case["id"] in held else case for case in self.index["cases"]]
        return Store(self.folder, self.index | {"cases": cases, "fingerprint": fingerprint(cases)})

    @property
    def unseen_classes(self) -> int:
        """Classes beyond the highest value of any label: what `fingerprint` does not tell of their number."""
        seen = max(case.get("highest", len(self.classes) - 1) for case in self.index["cases"])  # older stores lack it
        return len(self.classes) - 1 - seen

    @property
    def usual_spacing(self) -> np.ndarray | None:
        """Median of the cases' (mm) where each kept its own; None where all were resampled to one, or none is known."""
        if self.preparation.spacing or not self.real_spacing:
            return None
        return np.median([case["spacing"] for case in self.index["cases"]], axis=0)

    def size(self, case_ids: list[str]) -> int:
        """Bytes of these cases in memory."""
        return sum(entry["bytes"] for case in case_ids for entry in self._cases[case]["arrays"].values())

    def load(self, case_id: str) -> Case:
        """Read one case and check its bytes; StudyError when it is not in the store or damaged."""
        image, label = self._read(case_id, "image"), self.label(case_id)
        case = self._cases[case_id]
        return Case(case_id, case["split"], image, label, tuple(case["spacing"]))

    def label(self, case_id: str) -> np.ndarray | None:
        """Read one case's reference alone, None where it has none; raises as `load`."""
        return self._read(case_id, "label")

    def _read(self, case_id: str, name: str) -> np.ndarray | None:
        if case_id not in self._cases:
            raise StudyError(f"{self.folder}: no case '{case_id}' in this store")
        if name not in self._cases[case_id]["arrays"]:
            return None
        path = array_path(self.folder, case_id, name)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _damaged(self.folder, path, error.strerror or "cannot be read") from None
        if hashlib.sha256(data).hexdigest() != self._cases[case_id]["arrays"][name]["sha256"]:
            raise _damaged(self.folder, path, "its bytes have changed since it was prepared")
        return np.load(io.BytesIO(data), allow_pickle=False)


def open_store(folder: Path | str) -> Store:
    """Open a prepared store; StudyError when it is missing, unfinished or a file of it is missing or cut short.

    Only sizes are looked at here; the bytes of a case are checked when it is loaded.
    """
    folder = Path(folder)
    try:
        index = json.loads((folder / "store.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(f"{folder}: no case store here (store.json is missing); prepare the dataset first") from None
    except (OSError, ValueError):
        raise _damaged(folder, folder / "store.json", "it cannot be read") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise StudyError(f"{folder}: this case store has another format than {FORMAT}; prepare the dataset again")
    try:
        store = Store(folder, index)
        sizes = {
            array_path(folder, case["id"], name): entry["bytes"]
            for case in index["cases"]
            for name, entry in case["arrays"].items()
        }
    except (KeyError, TypeError):
        raise _damaged(folder, folder / "store.json", "it lacks an entry") from None
    for path, size in sizes.items():
        if not path.is_file():
            raise _damaged(folder, path, "it is missing")
        if path.stat().st_size != size:
            raise _damaged(folder, path, f"it has {path.stat().st_size} bytes instead of {size}")
    return store


def fingerprint(cases: list[dict[str, Any]]) -> str:
    """Names what a training depends on: case order, splits, spacings and arrays."""
    rows = [
        [case["id"], case["split"], case["spacing"], [array["sha256"] for array in case["arrays"].values()]]
        for case in cases
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def array_path(folder: Path, case_id: str, name: str) -> Path:
    """Where an array ("image" or "label") of a case lies."""
    return folder / "cases" / case_id / f"{name}.npy"


def _damaged(folder: Path, path: Path, what: str) -> StudyError:
    return StudyError(
        f"{folder}: the case store is damaged at {path.relative_to(folder)}: {what}; "
        "delete the folder and prepare the dataset again"
    )
