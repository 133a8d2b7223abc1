"""From a trained method to one row a case, class, selection and output.

Beside a method's own outputs there is `LARGEST`: decoder 1, of each class the largest connected component alone. It is
no part of the protocol, but much published code evaluates so (its option is called nms), and few say whether a figure
was obtained with it.

Where a network has BatchNorm there is one more for the final weights, `OWN`: decoder 1 with BatchNorm normalising a
volume by its own statistics, those of up to four windows at a time. In training every batch is normalised by its own,
in prediction by running averages of them, over labelled and unlabelled volumes alike. Where the two differ much, the
averages are to blame for what a prediction lacks, not what was learnt; the reports show both.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlrpl.config import Run
from mlrpl.data import Case, Store
from mlrpl.errors import StudyError
from mlrpl.files import atomic
from mlrpl.inference import sliding_window
from mlrpl.losses import hard_labels
from mlrpl.masks import keep_largest
from mlrpl.memory import is_exhaustion
from mlrpl.methods import Method
from mlrpl.metrics import case_metrics
from mlrpl.networks import STRIDE, in_present_names
from mlrpl.precision import Precision, computing, to_predict_in
from mlrpl.rows import IDENTITY, LARGEST, OWN

PREDICTIONS = "predictions.npz"  # label maps of the test cases: last weights, decoder 1
OWN_WINDOWS = 4
WINDOWS = defaultdict(lambda: OWN_WINDOWS, cuda=8)  # predicted at once, by kind of device


@contextmanager
def own_statistics(method: Method) -> Iterator[None]:
    """Within, BatchNorm normalises by what it is given: the windows of one volume that are predicted together."""
    norms = _batch_norms(method)
    running = [(norm.running_mean, norm.running_var) for norm in norms]
    for norm in norms:
        norm.running_mean = norm.running_var = None
    try:
        yield
    finally:
        for norm, (mean, variance) in zip(norms, running, strict=True):
            norm.running_mean, norm.running_var = mean, variance


def _batch_norms(method: Method) -> list[nn.BatchNorm3d]:
    return [module for module in method.modules() if isinstance(module, nn.BatchNorm3d)]


@contextmanager
def evaluating(method: Method) -> Iterator[None]:
    """Within, all of a method is in evaluation mode; afterwards each module is in the mode that it was in."""
    training = [module for module in method.modules() if module.training]
    method.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def predicting(
    method: Method, outputs: Sequence[str], device: torch.device, precision: Precision
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within, the method is in evaluation mode; yields windows (n, channels, *patch) -> (n, outputs × C, *patch)."""
    # Compiled code is for so many windows, and made again for fewer. What is normalised together must not be padded.
    padded = method.compiled and not any(norm.running_mean is None for norm in _batch_norms(method))

    def predict(windows: Tensor) -> Tensor:
        given = len(windows)
        if padded:
            windows = F.pad(windows, (0,) * 9 + (max(WINDOWS[device.type] - given, 0),))
        windows = windows.to(memory_format=torch.channels_last_3d)
        with computing(device, precision):
            return torch.cat(method.predict(windows, tuple(outputs)), dim=1)[:given]

    with evaluating(method):
        yield predict


def predict_case(
    method: Method,
    case: Case,
    outputs: Sequence[str],
    device: torch.device,
    precision: Precision,
    batch: int | None = None,
) -> Tensor:
    """Class probabilities (outputs, C, x, y, z) of one volume, by sliding window; all outputs come from one pass.

    `batch` windows are predicted at once; by default as many as the device likes.
    """
    settings, batch = method.settings, batch or WINDOWS[device.type]
    with predicting(method, outputs, device, precision) as predict:
        image = torch.from_numpy(case.image).to(device)
        stacked = sliding_window(predict, image, settings.patch, settings.stride, batch)
    return stacked.unflatten(0, (len(outputs), method.num_classes))


def check_dice(method: Method, cases: Iterable[Case], device: torch.device, precision: Precision) -> float:
    """Decoder 1's Dice, mean over cases and foreground classes: what the published protocol selects by."""
    scores = []
    for case in cases:
        (predicted,) = hard_labels(predict_case(method, case, ("decoder1",), device, precision))
        label = torch.from_numpy(case.label).to(device)
        for c in range(1, method.num_classes):
            ours, reference = predicted == c, label == c
            size = (ours.sum() + reference.sum()).item()
            scores.append(2 * (ours & reference).sum().item() / size if size else 1.0)
    return float(np.mean(scores))


def set_weights(method: Method, content: dict[str, Any], run: Run) -> None:
    """Take over the weights of a run, the content of their file.

    Raises:
        StudyError: where they are not those of this network.
    """
    try:
        weights = content["method"]
        known = weights.keys() == method.state_dict().keys()  # a network of one's own may have names like the former
        method.load_state_dict(weights if known else in_present_names(weights))
    except (KeyError, RuntimeError, ValueError) as error:
        if is_exhaustion(error):
            raise
        raise StudyError(
            f"run {run.name}: its weights are of another network than this version of the code makes; use the one that "
            "trained it (its commit stands in provenance.json), or delete the run's folder and train it again"
        ) from None


def evaluate(
    run: Run,
    store: Store,
    method: Method,
    weights: dict[str, dict],
    folder: Path,
    distances: str,
    device: torch.device,
    watch: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Metrics of all test cases, and the label maps that figures show.

    Args:
        run: what was trained.
        store: its data.
        method: an instance to load the weights into.
        weights: per selection the content of its file.
        folder: where metrics.csv and predictions.npz are written.
        distances: "voxels" or "mm".
        device: where to predict.
        watch: called with (done, of) after each case.

    Returns:
        Tidy rows, one a selection, output, case and foreground class; Dice and Jaccard are fractions, distances NaN
        where a mask is empty.

    Raises:
        StudyError: where weights are not those of this network.
    """
    common = {name: getattr(run, name) for name in IDENTITY}
    common |= {} if run.fold is None else {"fold": run.fold}
    rows: list[dict[str, Any]] = []
    measuring: list[tuple[dict[str, Any], Future[dict[str, float]]]] = []  # of one case, while the next is predicted
    kept = {}
    cases = store.ids("test")
    with ThreadPoolExecutor(run.settings.threads) as pool:
        for s, (selection, content) in enumerate(weights.items()):
            set_weights(method, content, run)
            precision = to_predict_in(content["precision"], device)
            for n, case_id in enumerate(cases):
                case = store.load(case_id)
                maps = _label_maps(method, case, device, precision, final=selection == "last")
                if selection == "last":
                    kept[case_id] = maps["decoder1"].astype(np.uint8)
                rows += _measured(measuring)
                spacing = case.spacing if distances == "mm" else None
                measuring = [
                    (
                        {**common, "selection": selection, "output": output, "case": case_id, "class": name},
                        pool.submit(case_metrics, predicted == c, case.label == c, spacing),
                    )
                    for output, predicted in maps.items()
                    for c, name in enumerate(store.classes[1:], start=1)
                ]
                if watch:
                    watch(s * len(cases) + n + 1, len(weights) * len(cases))
        rows += _measured(measuring)
    frame = pd.DataFrame(rows)
    with atomic(folder / PREDICTIONS) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **kept)
    with atomic(folder / "metrics.csv") as partial:
        frame.to_csv(partial, index=False, float_format="%.6g")
    return frame


def _label_maps(
    method: Method, case: Case, device: torch.device, precision: Precision, final: bool
) -> dict[str, np.ndarray]:
    """Class indices (x, y, z) by output: the method's own, `LARGEST` and, of final weights, `OWN`."""
    probabilities = predict_case(method, case, method.outputs, device, precision)
    maps = dict(zip(method.outputs, hard_labels(probabilities).cpu().numpy(), strict=True))
    maps[LARGEST] = maps["decoder1"].copy()
    keep_largest(maps[LARGEST], method.num_classes)
    if final and has_own_statistics(method):
        with own_statistics(method):
            alone = predict_case(method, case, ("decoder1",), device, precision, OWN_WINDOWS)
        maps[OWN] = hard_labels(alone)[0].cpu().numpy()
    return maps


def has_own_statistics(method: Method) -> bool:
    """Whether there is `OWN`: with BatchNorm, but for a bottleneck of one voxel, which has no statistics of its own."""
    return bool(_batch_norms(method)) and math.prod(method.settings.patch) > STRIDE**3


def _measured(waiting: Iterable[tuple[dict[str, Any], Future[dict[str, float]]]]) -> list[dict[str, Any]]:
    return [{**facts, **metrics.result()} for facts, metrics in waiting]
