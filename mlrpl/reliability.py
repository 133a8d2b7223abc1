"""Which pseudo-labels are reliable (WR), and how reliable are they (HR): the heart of the paper.

Su, Luo, Lian, Lin, Li: Mutual learning with reliable pseudo label for semi-supervised medical image segmentation,
Medical Image Analysis 94 (2024) 103111, Section 3.

Notation: decoders k = 1…K; z_k logits and p_k = softmax(z_k), (N, C, x, y, z); f_k the features before decoder k's
1×1×1 head, (N, F, x, y, z); ŷ_k = argmax_c p_k. In a pair (i, j), j is the teacher and i the student.

**Which (WR).** Decoder i learns from decoder j at voxel v only where j is surer:

    H_k(v) = −Σ_c p_k log(p_k + 1e-6),        m_ij(v) = 1[H_i(v) > H_j(v)]

The sign is right as it stands, though it is often asked about. Entropy is *un*certainty, so "the teacher is surer"
reads H_j < H_i: the student's entropy exceeds the teacher's. Turned round, the surer decoder would copy the less sure
one. m_ij and m_ji are never both 1, so at no voxel do two decoders teach each other; at equal entropies neither
teaches.

**How (HR).** A pseudo-label is trusted as far as features and probabilities tell the same story. Per volume and class,
the prototype is the mean feature of the voxels that j assigns to the class; where the similarity to it and the
probability agree, the weight is near 1:

    q_jc = Σ_v f_j 1[ŷ_j = c] / (Σ_v 1[ŷ_j = c] + 1e-6),   s_jc = cos(f_j, q_jc),   w_j = mean_c [1 − (s_jc − p_jc)²]

A class that j assigns nowhere has a zero prototype: its similarity is 0 and its part of the weight is 1 − p².

**Mutual loss.** m, w and ŷ are constants; gradients flow through the student's cross-entropy alone:

    L_mut = Σ_{i≠j} [ Σ_v m_ij w_j CE(z_i, ŷ_j) / (Σ_v m_ij + 1e-6) ]
"""

from collections.abc import Sequence
from itertools import permutations
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from mlrpl.losses import hard_labels, one_hot

EPSILON = 1e-6

SELECTIONS = ("wr", "all", "threshold")
WEIGHTINGS = ("mse", "none", "sim", "prob", "multiply", "avg", "margin")
PIECES = 1024  # of a volume's voxels, at most, over which a GPU adds up prototypes


def entropy(probabilities: Tensor) -> Tensor:
    """H = −Σ_c p log(p + 1e-6), in nats: (N, C, x, y, z) -> (N, x, y, z)."""
    return -(probabilities * (probabilities + EPSILON).log()).sum(1)


def select(
    selection: str,
    student: Tensor,
    teacher: Tensor,
    threshold: float | None = None,
    entropies: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Where the student learns from the teacher, boolean (N, x, y, z).

    Args:
        selection: "wr", where the teacher's entropy is the lower one; "threshold", where its largest probability
            exceeds `threshold`, whatever the student thinks (the field's usual rule); "all", everywhere.
        student: the student's probabilities (N, C, x, y, z).
        teacher: the teacher's.
        threshold: τ of "threshold".
        entropies: the student's and the teacher's, where they are known already.

    Raises:
        ValueError: for another selection, or "threshold" without one.
    """
    if selection == "wr":
        of_student, of_teacher = entropies or (entropy(student), entropy(teacher))
        return of_student > of_teacher
    if selection == "all":
        return torch.ones_like(teacher[:, 0], dtype=torch.bool)
    if selection == "threshold":
        if threshold is None:
            raise ValueError('selection "threshold" needs a threshold')
        return teacher.amax(1) > threshold
    raise ValueError(f"unknown selection {selection!r}: choose one of {', '.join(SELECTIONS)}")


def prototype_similarity(features: Tensor, pseudo_labels: Tensor, num_classes: int) -> Tensor:
    """s_c(v) = cos(f(v), q_c), the similarity of each voxel to its volume's class prototypes.

    Args:
        features: (N, F, x, y, z).
        pseudo_labels: (N, x, y, z), integers 0…C-1.
        num_classes: C.

    Returns:
        (N, C, x, y, z) in −1…1; 0 for a class that no voxel of the volume is assigned to.
    """
    flat = features.to(torch.promote_types(features.dtype, torch.float32)).flatten(2)
    member = one_hot(pseudo_labels, num_classes).to(flat.dtype).flatten(2)
    # Two small matrix products in place of an (N, C, F, x, y, z) tensor; not in float16, in which a sum over a
    # volume's voxels is infinite.
    with torch.autocast(features.device.type, enabled=False):
        sums = _class_sums(member, flat, gcd(flat.shape[2], PIECES) if flat.is_cuda else 1)
        prototypes = sums / (member.sum(2, keepdim=True) + EPSILON)
        similarity = F.normalize(prototypes, dim=2, eps=1e-8) @ flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-8)
    return similarity.unflatten(2, features.shape[2:])


def _class_sums(member: Tensor, features: Tensor, pieces: int) -> Tensor:
    """Sums (N, C, F) of features (N, F, voxels) over each class's members (N, C, voxels), one product a piece.

    A GPU's matrix product leaves a sum over a million voxels to a handful of threads: 29 ms on an H200, in pieces 0.2.
    """
    voxels = features.transpose(1, 2)
    return (member.unflatten(2, (pieces, -1)).transpose(1, 2) @ voxels.unflatten(1, (pieces, -1))).sum(1)


def weigh(weighting: str, probabilities: Tensor, features: Tensor, pseudo_labels: Tensor) -> Tensor:
    """The teacher's weight w(v) = HR, (N, x, y, z).

    Args:
        weighting: "mse", the paper's; its single measures "sim" (s at ŷ) and "prob" (largest p), their product
            "multiply" and mean "avg"; "margin" (s at ŷ minus the largest other s: the paper's outlook); or "none" (1).
        probabilities: the teacher's (N, C, x, y, z).
        features: the teacher's (N, F, x, y, z).
        pseudo_labels: the teacher's arg-max (N, x, y, z).

    Raises:
        ValueError: for another weighting.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {weighting!r}: choose one of {', '.join(WEIGHTINGS)}")
    confidence = probabilities.amax(1)
    if weighting == "none":
        return torch.ones_like(confidence)
    if weighting == "prob":
        return confidence
    similarity = prototype_similarity(features, pseudo_labels, probabilities.shape[1])
    if weighting == "mse":
        return 1 - (similarity - probabilities).square().mean(1)
    own = similarity.gather(1, pseudo_labels.unsqueeze(1)).squeeze(1)
    if weighting == "sim":
        return own
    if weighting == "multiply":
        return own * confidence
    if weighting == "avg":
        return (own + confidence) / 2
    others = similarity.scatter(1, pseudo_labels.unsqueeze(1), -torch.inf)
    return own - others.amax(1)


def mutual_loss(
    logits: Sequence[Tensor],
    features: Sequence[Tensor],
    selection: str = "wr",
    weighting: str = "mse",
    threshold: float | None = None,
) -> Tensor:
    """L_mut, summed over the ordered pairs of decoders; voxels of all volumes, labelled and unlabelled.

    Args:
        logits: K tensors (N, C, x, y, z).
        features: K tensors (N, F, x, y, z); never receive a gradient.
        selection: see `select`.
        weighting: see `weigh`.
        threshold: see `select`.

    Returns:
        A scalar.
    """
    log_probabilities = [_planes(z).log_softmax(1) for z in logits]
    with torch.no_grad():
        targets = _targets([log_p.exp() for log_p in log_probabilities], features, selection, weighting, threshold)
    return -sum((target * log_p).sum() for target, log_p in zip(targets, log_probabilities, strict=True))


def _targets(
    probabilities: Sequence[Tensor],
    features: Sequence[Tensor],
    selection: str,
    weighting: str,
    threshold: float | None,
) -> list[Tensor]:
    """T_i = Σ_{j≠i} m_ij w_j / (Σ_v m_ij + 1e-6) · one-hot(ŷ_j), so that L_mut = −Σ_i Σ_v Σ_c T_i log p_i.

    All constants of the loss in one map (N, C, x, y, z) a student: what is left for autograd is a log-softmax.
    """
    pseudo_labels = [hard_labels(p) for p in probabilities]
    weights = [weigh(weighting, *teacher) for teacher in zip(probabilities, features, pseudo_labels, strict=True)]
    entropies = [entropy(p) for p in probabilities] if selection == "wr" else [None] * len(probabilities)
    targets = [torch.zeros_like(p) for p in probabilities]
    for i, j in permutations(range(len(probabilities)), 2):
        mask = select(selection, probabilities[i], probabilities[j], threshold, (entropies[i], entropies[j]))
        scale = mask * weights[j] / (mask.sum() + EPSILON)
        targets[i].scatter_add_(1, pseudo_labels[j].unsqueeze(1), scale.unsqueeze(1))
    return targets


def _planes(logits: Tensor) -> Tensor:
    """At least float32, one contiguous plane a class: sums over two or three classes are slow in channels-last."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32), memory_format=torch.contiguous_format)
