"""Losses and ramp-ups that the methods share. Probabilities and logits are (N, C, x, y, z), labels (N, x, y, z)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

RAMP_STEP = 150  # the published code moves β once in 150 iterations


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Labels (N, x, y, z) as float32 (N, C, x, y, z)."""
    return torch.stack([labels == c for c in range(num_classes)], dim=1).float()


def hard_labels(scores: Tensor) -> Tensor:
    """Argmax over the classes, (N, C, x, y, z) -> (N, x, y, z), the first of equal ones.

    Class by class, since torch.argmax over a short strided dimension is many times slower on a CPU.
    """
    best = scores[:, 0]
    labels = (scores[:, 1] > best).long()
    for c in range(2, scores.shape[1]):
        best = torch.maximum(best, scores[:, c - 1])
        labels = torch.where(scores[:, c] > best, c, labels)
    return labels


def dice_loss(probabilities: Tensor, labels: Tensor) -> Tensor:
    """1 − (2Σ p y + 1e-8)/(Σ p + Σ y + 1e-8) over the whole batch, mean over the foreground classes (paper, Eq. 1).

    Args:
        probabilities: (N, C, x, y, z), the softmax of one decoder.
        labels: (N, x, y, z), integers 0…C-1.
    """
    p = probabilities[:, 1:].float()
    y = one_hot(labels, probabilities.shape[1])[:, 1:]
    axes = (0, 2, 3, 4)
    overlap = (p * y).sum(axes)
    return (1 - (2 * overlap + 1e-8) / (p.sum(axes) + y.sum(axes) + 1e-8)).mean()


def squared_dice_loss(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Mean over all classes, background too, of 1 − (2Σpy + 1e-5)/(Σp² + Σy² + 1e-5); see `ce_dice_loss`."""
    p = probabilities.float()
    y = one_hot(labels, probabilities.shape[1])
    axes = (0, 2, 3, 4)
    overlap = (p * y).sum(axes)
    return (1 - (2 * overlap + 1e-5) / ((p * p).sum(axes) + (y * y).sum(axes) + 1e-5)).mean()


def ce_dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """½ (cross-entropy + squared Dice loss), the supervised loss of V-Net, UA-MT, URPC, CCT and AC-MT."""
    logits = logits.float()
    return 0.5 * (F.cross_entropy(logits, labels) + squared_dice_loss(logits.softmax(1), labels))


def ramp_up(x: float) -> float:
    """exp(−5 (1 − min(x, 1))²): about 0.0067 at x = 0 and 1 from x = 1 on (Laine & Aila, ICLR 2017)."""
    return math.exp(-5 * (1 - min(max(x, 0.0), 1.0)) ** 2)


def consistency_weight(iteration: int, ramp_iterations: int, maximum: float) -> float:
    """β(k) of the unsupervised term: `maximum` · ramp, moved once in 150 iterations as published.

    Args:
        iteration: counted from 1.
        ramp_iterations: iterations until the maximum (published: 40 · 150 = 6,000).
        maximum: β's maximum (published: 1).
    """
    return maximum * ramp_up(iteration // RAMP_STEP * RAMP_STEP / ramp_iterations)


@torch.no_grad()
def batch_dice(logits: Tensor, labels: Tensor) -> Tensor:
    """Dice of the arg-max labels over a batch, mean over foreground classes: a progress figure, not a result.

    Of a class that neither holds 1, as of a case (`mlrpl.metrics`).
    """
    predicted = one_hot(hard_labels(logits), logits.shape[1])[:, 1:]
    reference = one_hot(labels, logits.shape[1])[:, 1:]
    axes = (0, 2, 3, 4)
    size = (predicted + reference).sum(axes)
    return torch.where(size > 0, 2 * (predicted * reference).sum(axes) / size.clamp(min=1), 1.0).mean()
