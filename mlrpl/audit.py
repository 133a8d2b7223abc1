"""Which pseudo-labels are right? Measured during training, with labels that the method never sees.

The unlabelled cases of a benchmark do have labels. At intervals the audit cuts them as the iteration's batch has cut
the images, and counts how the pseudo-labels of that very batch compare:

* **Which (WR).** Coverage and precision of what WR keeps and drops, beside confidence thresholds: those of the
  paper's ablation, and the surest voxels of the same batch, as many as WR keeps ("matched"), so that the choice alone
  is compared.
* **How (HR).** Each measure's weight as a predictor of correctness: area under the ROC curve, and in ten groups of
  equal size from the lowest weights to the highest the mean weight beside the share that is right.

Nothing is predicted anew. What the network hands to the loss is looked at on its way, in training mode: with dropout
and the batch's statistics, since these are the pseudo-labels that the students learn from, at the voxels and in the
precision in which they learn. In evaluation mode the audit would measure other, better pseudo-labels, and cost a pass.

The audit only observes. It draws no random number and changes no tensor; the hidden labels are in its hands alone
(`mlrpl.training.make_batches` takes them from the cases that are trained on). So it is not part of a run's key.

Terms: a *pair* (i, j) of decoders, teacher j, student i, as in `mlrpl.reliability`; all counts are sums over the
ordered pairs, as the mutual loss is. *class*: the pseudo-label's. *distance*: of a voxel to the nearest voxel of
another reference class within the crop, in voxels, so 1 at the boundary.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn

from mlrpl.data import Batches
from mlrpl.errors import StudyError
from mlrpl.losses import hard_labels
from mlrpl.reliability import WEIGHTINGS, select, weigh

COLUMNS = ("iteration", "scope", "class", "distance", "score", "bin", "voxels", "correct", "weight", "auroc")
MEASURES = tuple(name for name in WEIGHTINGS if name != "none")
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # those of the paper's ablation
RULES = ("wr", "matched", *(f"> {threshold}" for threshold in THRESHOLDS))
SCOPES = ("all", "disagree", "kept")  # all voxels; where the pair's labels differ; what WR keeps
DISTANCES = (1, 2, 4, 8, 16)  # lower ends of the bins, voxels
DISTANCE_NAMES = (*(f"{low}–{high}" for low, high in pairwise(DISTANCES)), f"≥ {DISTANCES[-1]}")
GROUPS = 10  # of equal size, in a reliability diagram

# Weights are counted in fine levels, finest near their upper end, where most of them are.
LEVELS = 1024
SMALLEST, LARGEST = 1e-7, 4.0  # distance of a weight from the upper end
UPPER = {name: 2.0 if name == "margin" else 1.0 for name in MEASURES}


class Audit:
    """Watches a network through one iteration's loss and counts what its pseudo-labels were worth.

    Args:
        every: iterations from one audit to the next.
        batches: the training's.
        labels: the hidden label (x, y, z) of each unlabelled case that has one, by case id.
        classes: names, background first.
        add: called with each row, by the names of `COLUMNS`.
        seconds: spent before this run was resumed.

    Raises:
        StudyError: where no unlabelled case has a label.

    Attributes:
        seconds: spent in audits so far.
    """

    def __init__(
        self,
        every: int,
        batches: Batches,
        labels: Mapping[str, np.ndarray],
        classes: Sequence[str],
        add: Callable[..., None],
        seconds: float = 0.0,
    ) -> None:
        if not labels:
            raise StudyError("an audit needs unlabelled training cases whose labels are known; drop `audit`")
        self.every, self.batches, self.labels, self.classes, self.add = every, batches, labels, tuple(classes), add
        self.seconds = seconds

    @contextmanager
    def observing(self, network: nn.Module, iteration: int) -> Iterator[None]:
        """Audit what `network` puts out within, where the iteration is due; its first pass counts."""
        if iteration % self.every:
            yield
            return
        seen: list[tuple[list[Tensor], list[Tensor]]] = []
        handle = network.register_forward_hook(lambda _module, _inputs, outputs: seen.append(outputs))
        try:
            yield
        finally:
            handle.remove()
        logits, features = seen[0]
        if logits[0].is_cuda:
            torch.cuda.synchronize(logits[0].device)  # the step's own time is not the audit's
        started = time.perf_counter()
        for row in self.measure(iteration, logits, features):
            self.add(iteration=iteration, **row)
        self.seconds += time.perf_counter() - started

    @torch.no_grad()
    def measure(self, iteration: int, logits: Sequence[Tensor], features: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Rows of one iteration; none where no case of its batch has a hidden label.

        Args:
            iteration: counted from 1; its unlabelled crops are the last volumes of the batch.
            logits: of each decoder (N, C, x, y, z).
            features: of each decoder (N, F, x, y, z).
        """
        crops = self.batches.unlabelled_crops(iteration, self.labels)
        places = [n - len(crops) for n, crop in enumerate(crops) if crop is not None]
        if not places:
            return []
        reference = np.stack([crop for crop in crops if crop is not None])
        places = [len(logits[0]) + place for place in places]
        probabilities = [z[places].float().softmax(1) for z in logits]
        counts = count_pairs(probabilities, [f[places] for f in features], reference)
        return rows(*counts, self.classes)


def boundary_distance(label: np.ndarray) -> np.ndarray:
    """Euclidean distance of each voxel of (x, y, z) to the nearest one of another class; infinite where it is alone."""
    present = np.unique(label)
    if len(present) < 2:
        return np.full(label.shape, np.inf)
    return sum(distance_transform_edt(label == c) for c in present)


def count_pairs(
    probabilities: Sequence[Tensor], features: Sequence[Tensor], reference: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Count voxels by all that rows are made from, summed over the ordered pairs of decoders.

    Args:
        probabilities: of each decoder (N, C, x, y, z).
        features: of each decoder (N, F, x, y, z).
        reference: hidden labels (N, x, y, z).

    Returns:
        By measure, voxels by (kept by WR, decoders disagree, class, distance, correct, level of the weight); and voxels
        by (…, correct, number of `THRESHOLDS` that the teacher's largest probability exceeds).
    """
    device, classes = probabilities[0].device, probabilities[0].shape[1]
    truth = torch.from_numpy(reference.astype(np.int64)).to(device)
    distances = np.stack([boundary_distance(label) for label in reference])
    distance = torch.from_numpy(np.digitize(distances, DISTANCES[1:])).to(device)
    thresholds = torch.tensor(THRESHOLDS, device=device)
    labels = [hard_labels(p) for p in probabilities]
    inner = [classes, len(DISTANCES), 2]  # class, distance, correct
    cells = 4 * int(np.prod(inner))

    levels = [
        {m: _level(weigh(m, p, f, y), UPPER[m]) for m in MEASURES}
        for p, f, y in zip(probabilities, features, labels, strict=True)
    ]
    exceeded = [torch.bucketize(p.amax(1), thresholds) for p in probabilities]
    weights = {m: np.zeros((cells, LEVELS)) for m in MEASURES}
    confidence = np.zeros((cells, len(THRESHOLDS) + 1))
    for i, j in permutations(range(len(labels)), 2):
        kept = select("wr", probabilities[i], probabilities[j])
        cell = kept.long() * 2 + (labels[i] != labels[j])
        for part, size in zip((labels[j], distance, labels[j] == truth), inner, strict=True):
            cell = cell * size + part
        for counts, bins in [(confidence, exceeded[j]), *((weights[m], levels[j][m]) for m in MEASURES)]:
            counts += _count(cell, bins, counts.shape)
    shape = (2, 2, *inner, -1)
    return {m: counts.reshape(shape) for m, counts in weights.items()}, confidence.reshape(shape)


def _count(cell: Tensor, bins: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    flat = (cell * shape[1] + bins).flatten()
    return torch.bincount(flat, minlength=shape[0] * shape[1]).cpu().numpy().reshape(shape)


def _level(weight: Tensor, upper: float) -> Tensor:
    """0…LEVELS − 1, rising with the weight."""
    span = np.log10(LARGEST / SMALLEST)
    below = (upper - weight.float()).nan_to_num(LARGEST).clamp(SMALLEST, LARGEST)
    return ((np.log10(LARGEST) - below.log10()) * (LEVELS / span)).long().clamp(0, LEVELS - 1)


def _weight_of_level(upper: float) -> np.ndarray:
    """The weight in the middle of each level."""
    span = np.log10(LARGEST / SMALLEST)
    return upper - 10 ** (np.log10(LARGEST) - (np.arange(LEVELS) + 0.5) * span / LEVELS)


def rows(weights: Mapping[str, np.ndarray], confidence: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of `COLUMNS` (but the iteration) from what `count_pairs` returns; empty groups are left out.

    A rule's rows have the bins "kept" and "dropped"; a measure's have "all", with the AUROC, and, not by distance, the
    groups of equal size 1…10 of its reliability diagram. `weight` is the mean over the row's voxels.
    """
    found: list[dict[str, Any]] = []
    kept = weights["prob"].sum(-1)[1]
    for scope in ("all", "disagree"):
        # (class, distance, correct, …), what is kept of it by each rule
        whole, top = _scope(weights["prob"], scope), _scope(confidence, scope)
        wr = kept.sum(0) if scope == "all" else kept[1]
        share = _matched(whole.sum((0, 1, 2)), wr.sum())
        by_rule = {"wr": wr, "matched": whole @ share}
        by_rule |= {f"> {threshold}": top[..., n + 1 :].sum(-1) for n, threshold in enumerate(THRESHOLDS)}
        for rule, chosen in by_rule.items():
            parts = {"kept": chosen, "dropped": whole.sum(-1) - chosen}
            for name, part in parts.items():
                for group, (wrong, correct) in _groups(part, classes):
                    found.append(_row(scope, group, rule, name, correct + wrong, correct))
    for measure, counts in weights.items():
        middle = _weight_of_level(UPPER[measure])
        for scope in SCOPES:
            for group, (wrong, correct) in _groups(_scope(counts, scope), classes):
                total = wrong + correct
                found.append(
                    _row(
                        scope, group, measure, "all", total.sum(), correct.sum(), total @ middle, auroc(wrong, correct)
                    )
                )
                if group["distance"] != "all" or not total.any():
                    continue
                rank = (total.cumsum() - total / 2) / total.sum()  # of each level's middle voxel
                place = np.minimum((rank * GROUPS).astype(int), GROUPS - 1)
                sums = [np.bincount(place, v, GROUPS) for v in (total, correct, total * middle)]
                for number, values in enumerate(zip(*sums, strict=True), start=1):
                    found.append(_row(scope, group, measure, str(number), *values))
    return [row for row in found if row["voxels"] > 0]


def auroc(wrong: np.ndarray, correct: np.ndarray) -> float:
    """Chance that a right voxel has a higher score than a wrong one, ties counting half; NaN where one kind is missing.

    Args:
        wrong: number of wrong voxels by level of the score, lowest first.
        correct: number of right ones.
    """
    if not (wrong.any() and correct.any()):
        return float("nan")
    below = wrong.cumsum() - wrong / 2
    return float(correct @ below / (correct.sum() * wrong.sum()))


def _scope(counts: np.ndarray, scope: str) -> np.ndarray:
    """Counts by (class, distance, correct, …) within a scope."""
    return {"all": counts.sum((0, 1)), "disagree": counts[:, 1].sum(0), "kept": counts[1].sum(0)}[scope]


def _matched(levels: np.ndarray, wanted: float) -> np.ndarray:
    """Share of each level to take, from the highest down, so that `wanted` voxels are taken in all."""
    above = levels[::-1].cumsum()[::-1] - levels
    return np.clip((wanted - above) / np.maximum(levels, 1), 0, 1)


def _groups(counts: np.ndarray, classes: Sequence[str]) -> Iterator[tuple[dict[str, str], np.ndarray]]:
    """Counts of all voxels, of each class and at each distance, from counts by (class, distance, correct, …)."""
    yield {"class": "all", "distance": "all"}, counts.sum((0, 1))
    for c, name in enumerate(classes):
        yield {"class": name, "distance": "all"}, counts[c].sum(0)
    for d, name in enumerate(DISTANCE_NAMES):
        yield {"class": "all", "distance": name}, counts[:, d].sum(0)


def _row(
    scope: str,
    group: dict[str, str],
    score: str,
    bins: str,
    voxels: float,
    correct: float,
    weights: float = float("nan"),
    area: float = float("nan"),
) -> dict[str, Any]:
    mean = weights / voxels if voxels else float("nan")
    counts = {"voxels": float(voxels), "correct": float(correct), "weight": float(mean), "auroc": area}
    return {"scope": scope, **group, "score": score, "bin": bins, **counts}
