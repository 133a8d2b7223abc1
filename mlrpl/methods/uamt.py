"""UA-MT (Yu, Wang, Li, Fu, Heng: Uncertainty-aware self-ensembling model for semi-supervised 3D left atrium
segmentation, MICCAI 2019): a mean teacher whose target counts only where the teacher is certain.

    L_c = Σ_v 1[u < H] ‖p_s − p_t‖² / (2 Σ_v 1[u < H] + 1e-16)          (paper, Eq. 3)

p_s, p_t: probabilities of student and teacher; u: entropy of the mean of 8 passes of the teacher, each with noise on
the input and with dropout (Eq. 2); H = (0.75 + 0.25 ramp(k/K)) ln C. Total: ½ (CE + Dice) + 0.1 β L_c on the
unlabelled volumes. The 2 in L_c, the two classes of the published code, is not in the paper and stays 2 for any C.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from mlrpl.losses import ramp_up
from mlrpl.methods.base import Step
from mlrpl.methods.parts import MeanTeacher
from mlrpl.reliability import entropy

PASSES = 4  # of the pair repeated twice, so that 8 samples are averaged


def certainty_threshold(iteration: int, iterations: int, num_classes: int) -> float:
    """H, in nats: from about 3/4 of the largest entropy up to all of it."""
    return (0.75 + 0.25 * ramp_up(iteration / iterations)) * math.log(num_classes)


def masked_consistency(student: Tensor, teacher: Tensor, uncertainty: Tensor, threshold: float | Tensor) -> Tensor:
    """L_c, a scalar.

    Args:
        student: logits (N, C, x, y, z).
        teacher: probabilities (N, C, x, y, z); constants.
        uncertainty: u (N, x, y, z), in nats.
        threshold: H.
    """
    certain = uncertainty < threshold
    distance = (student.float().softmax(1) - teacher).square().sum(1)
    return (certain * distance).sum() / (2 * certain.sum() + 1e-16)


class UAMT(MeanTeacher):
    """Uncertainty-aware mean teacher."""

    title: ClassVar[str] = "UA-MT"
    replayable: ClassVar[bool] = True

    def schedule(self, step: Step) -> dict[str, float]:
        """The mean teacher's, and "threshold": H."""
        threshold = certainty_threshold(step.iteration, step.iterations, self.num_classes)
        return {**super().schedule(step), "threshold": threshold}

    @torch.no_grad()
    def uncertainty(self, image: Tensor) -> Tensor:
        """Entropy u (N, x, y, z) of the teacher's mean prediction of volumes (N, channels, x, y, z)."""
        twice = image.repeat(2, 1, 1, 1, 1)
        mean = sum(self.teach(twice) for _ in range(PASSES)).unflatten(0, (2, len(image))).sum(0) / (2 * PASSES)
        return entropy(mean)

    def consistency(self, student: Tensor, image: Tensor, step: Step) -> Tensor:
        """One noisy pass is the target, further ones say where it counts."""
        threshold = self.scheduled("threshold", step)
        return masked_consistency(student, self.teach(image), self.uncertainty(image), threshold)
