"""AC-MT (Xu, Wang, Lu, Luo, Yan, Zheng, Tong: Ambiguity-selective consistency regularization for mean-teacher
semi-supervised medical image segmentation, Medical Image Analysis 88, 2023, 102880), with its entropy selection: a mean
teacher whose target counts only where the student is unsure.

    L_c = Σ_v m ‖p_s − p_t‖² / (C Σ_v m + 1e-16),    m = 1[H(p_s) / ln C ≥ 0.75 + 0.20 ramp(k/K)]

p_s, p_t: probabilities of student and teacher (one pass, noise on the input); m is a constant. The C in L_c comes
from the published code, which takes the mask on every channel. Total: ½ (CE + Dice) + 0.1 β L_c on the unlabelled
volumes.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from mlrpl.losses import ramp_up
from mlrpl.methods.base import Step
from mlrpl.methods.parts import MeanTeacher
from mlrpl.reliability import entropy


def ambiguity_threshold(iteration: int, iterations: int) -> float:
    """Share of the largest entropy from which on a voxel is ambiguous: from about 0.75 up to 0.95."""
    return 0.75 + 0.20 * ramp_up(iteration / iterations)


def ambiguous_consistency(student: Tensor, teacher: Tensor, threshold: float | Tensor) -> Tensor:
    """L_c, a scalar.

    Args:
        student: logits (N, C, x, y, z).
        teacher: probabilities (N, C, x, y, z); constants.
        threshold: see `ambiguity_threshold`.
    """
    probabilities = student.float().softmax(1)
    classes = student.shape[1]
    with torch.no_grad():
        ambiguous = entropy(probabilities) / math.log(classes) >= threshold
    distance = (probabilities - teacher).square().sum(1)
    return (ambiguous * distance).sum() / (classes * ambiguous.sum() + 1e-16)


class ACMT(MeanTeacher):
    """Ambiguity-consensus mean teacher, entropy selection."""

    title: ClassVar[str] = "AC-MT"
    replayable: ClassVar[bool] = True

    def schedule(self, step: Step) -> dict[str, float]:
        """The mean teacher's, and "threshold": see `ambiguity_threshold`."""
        return {**super().schedule(step), "threshold": ambiguity_threshold(step.iteration, step.iterations)}

    def consistency(self, student: Tensor, image: Tensor, step: Step) -> Tensor:
        """The teacher's target on the voxels that the student finds ambiguous."""
        return ambiguous_consistency(student, self.teach(image), self.scheduled("threshold", step))
