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

Where a crop reaches beyond its volume nothing is counted: padding has no label, and it is easy. (Of the crops of the
hippocampus study it is 30 %.)

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

from mlrpl.data import Ahead, Batches
from mlrpl.devices import synchronise
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

OUTSIDE = 255  # in a crop of hidden labels, where there is no volume

# Weights are counted in fine levels, finest where most of them are: near 0 for the margin, −2…2, and near 1 for the
# others, −1…1.
LEVELS = 2048
SMALLEST, LARGEST = 1e-7, 2.0  # distance of a weight from 1
NEAR = 1e-3  # margins below it are counted in levels of equal width


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
        seconds: that training waited for audits so far.
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
        self.references = Ahead(self._reference, stride=every)

    @contextmanager
    def observing(self, network: nn.Module, iteration: int) -> Iterator[bool]:
        """Audit what `network` puts out within, if the iteration is due; yields whether. Its first pass counts.

        Raises:
            StudyError: where that pass is not of the whole batch: its volumes would be taken for others.
        """
        if iteration % self.every:
            yield False
            return
        seen: list[tuple[list[Tensor], list[Tensor]]] = []
        handle = network.register_forward_hook(lambda _module, _inputs, outputs: seen.append(outputs))
        try:
            yield True
        finally:
            handle.remove()
        volumes = sum(self.batches.sizes)
        if not seen or len(seen[0][0][0]) != volumes:
            found = f"of {len(seen[0][0][0])} of a batch's {volumes} volumes" if seen else "missing"
            raise StudyError(
                f"an audit looks at the network's first pass of a step, which is {found}: begin the loss with "
                "self.network(batch.image), or leave this method out of `audit`"
            )
        logits, features = seen[0]
        synchronise(logits[0].device)  # the step's own time is not the audit's
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
        places, reference, distances = self.references(iteration)
        if not places:
            return []
        places = [len(logits[0]) + place for place in places]
        probabilities = [z[places].float().softmax(1) for z in logits]
        counts = count_pairs(probabilities, [f[places] for f in features], reference, distances)
        return rows(*counts, self.classes)

    def _reference(self, iteration: int) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Places in the batch, counted from its end, of crops with a hidden label; their labels; their distances.

        Distances take long, and need nothing of the network: they are worked out beside the training.
        """
        crops = self.batches.unlabelled_crops(iteration, self.labels, OUTSIDE)
        places = [n - len(crops) for n, crop in enumerate(crops) if crop is not None]
        known = [crop for crop in crops if crop is not None]
        return places, np.array(known), np.array([boundary_distance(label) for label in known])


def boundary_distance(label: np.ndarray) -> np.ndarray:
    """Euclidean distance of each voxel of (x, y, z) to the nearest one of another class; infinite where there is none.

    What is `OUTSIDE` has no class, and none of these distances.
    """
    outside = label == OUTSIDE
    present = np.unique(label[~outside])
    distance = np.full(label.shape, np.inf)
    for c in present if len(present) > 1 else ():
        members = label == c
        distance[members] = distance_transform_edt(members | outside)[members]
    return distance


def count_pairs(
    probabilities: Sequence[Tensor], features: Sequence[Tensor], reference: np.ndarray, distances: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Count voxels by all that rows are made from, summed over the ordered pairs of decoders.

    Args:
        probabilities: of each decoder (N, C, x, y, z).
        features: of each decoder (N, F, x, y, z).
        reference: hidden labels (N, x, y, z); voxels that are `OUTSIDE` are not counted.
        distances: each of `boundary_distance`.

    Returns:
        By measure, voxels by (kept by WR, decoders disagree, class, distance, correct, level of the weight); and voxels
        by (…, correct, number of `THRESHOLDS` that the teacher's largest probability exceeds).
    """
    device, classes = probabilities[0].device, probabilities[0].shape[1]
    inside = torch.from_numpy(reference != OUTSIDE).to(device)
    truth = torch.from_numpy(reference.astype(np.int64)).to(device)[inside]
    distance = torch.from_numpy(np.digitize(distances, DISTANCES[1:])).to(device)[inside]
    thresholds = torch.tensor(THRESHOLDS, device=device)
    maps = [hard_labels(p) for p in probabilities]
    sizes = [classes, len(DISTANCES), 2]  # class, distance, correct
    cells = 4 * int(np.prod(sizes))

    levels = [
        {m: _level(m, weigh(m, p, f, y)[inside]) for m in MEASURES}
        for p, f, y in zip(probabilities, features, maps, strict=True)
    ]
    labels = [y[inside] for y in maps]
    exceeded = [torch.bucketize(p.amax(1)[inside], thresholds) for p in probabilities]
    weights = {m: np.zeros((cells, LEVELS)) for m in MEASURES}
    confidence = np.zeros((cells, len(THRESHOLDS) + 1))
    for i, j in permutations(range(len(labels)), 2):
        kept = select("wr", probabilities[i], probabilities[j])[inside]
        cell = kept.long() * 2 + (labels[i] != labels[j])
        for part, size in zip((labels[j], distance, labels[j] == truth), sizes, strict=True):
            cell = cell * size + part
        for counts, bins in [(confidence, exceeded[j]), *((weights[m], levels[j][m]) for m in MEASURES)]:
            counts += _count(cell, bins, counts.shape)
    shape = (2, 2, *sizes, -1)
    return {m: counts.reshape(shape) for m, counts in weights.items()}, confidence.reshape(shape)


def _count(cell: Tensor, bins: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    flat = cell * shape[1] + bins
    return torch.bincount(flat, minlength=shape[0] * shape[1]).cpu().numpy().reshape(shape)


def _level(measure: str, weight: Tensor) -> Tensor:
    """0…LEVELS − 1, rising with the weight."""
    weight = weight.float().nan_to_num(-2)
    if measure == "margin":
        place = (1 + torch.asinh(weight / NEAR) / np.arcsinh(2 / NEAR)) / 2
    else:
        below = (1 - weight).clamp(SMALLEST, LARGEST)
        place = (np.log10(LARGEST) - below.log10()) / np.log10(LARGEST / SMALLEST)
    return (place * LEVELS).long().clamp(0, LEVELS - 1)


def _weight_of_level(measure: str) -> np.ndarray:
    """The weight in the middle of each level."""
    place = (np.arange(LEVELS) + 0.5) / LEVELS
    if measure == "margin":
        return NEAR * np.sinh((2 * place - 1) * np.arcsinh(2 / NEAR))
    return 1 - LARGEST * (SMALLEST / LARGEST) ** place


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
        levels = whole.sum((0, 1, 2))
        by_rule = {"wr": wr, "matched": whole @ (1 - _lowest(levels, levels.sum() - wr.sum()))}
        by_rule |= {f"> {threshold}": top[..., n + 1 :].sum(-1) for n, threshold in enumerate(THRESHOLDS)}
        for rule, chosen in by_rule.items():
            parts = {"kept": chosen, "dropped": whole.sum(-1) - chosen}
            for name, part in parts.items():
                for group, (wrong, correct) in _groups(part, classes):
                    found.append(_row(scope, group, rule, name, correct + wrong, correct))
    for measure, counts in weights.items():
        middle = _weight_of_level(measure)
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
                up_to = [_lowest(total, total.sum() * n / GROUPS) for n in range(GROUPS + 1)]
                sums = np.diff(up_to, axis=0) @ np.stack([total, correct, total * middle], axis=1)
                for number, values in enumerate(sums, start=1):
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


def _lowest(levels: np.ndarray, wanted: float) -> np.ndarray:
    """Share of each level to take, from the lowest up, so that `wanted` voxels are taken in all."""
    return np.clip((wanted - (levels.cumsum() - levels)) / np.maximum(levels, 1), 0, 1)


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
