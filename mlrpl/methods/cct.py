"""CCT (Ouali, Hudelot, Tami: Semi-supervised semantic segmentation with cross-consistency training, CVPR 2020):
auxiliary decoders see perturbed encoder maps and must agree with the main decoder.

    L_u = mean over auxiliaries a of mean (p_main − p_a)²

over the unlabelled volumes, classes and voxels. Three auxiliaries, each with one perturbation of all five encoder maps:
feature noise, dropout, feature drop (paper, Section 3.2). As in SSL4MIS's code, which brought CCT to medical images:
gradients flow through the main output too, and auxiliaries learn from labels as well. Total: ½ (CE + Dice), averaged
over the four decoders, + 0.1 β L_u.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mlrpl.config import Settings
from mlrpl.data import Batch
from mlrpl.losses import ce_dice_loss
from mlrpl.methods.base import Method, Step
from mlrpl.methods.parts import CONSISTENCY, terms
from mlrpl.networks import VNet


def feature_noise(features: Tensor) -> Tensor:
    """× (1 + U(−0.3, 0.3)), one noise tensor for all volumes: (N, F, x, y, z)."""
    noise = torch.empty_like(features[0], dtype=torch.float32).uniform_(-0.3, 0.3)
    return features * (1 + noise).to(features.dtype)


def feature_dropout(features: Tensor) -> Tensor:
    """Element-wise dropout 0.3, on in every mode: only auxiliary decoders see it."""
    return F.dropout(features, 0.3)


def feature_drop(features: Tensor) -> Tensor:
    """Zero the voxels whose channel mean reaches U(0.7, 0.9) × the largest of their volume: (N, F, x, y, z)."""
    attention = features.detach().float().mean(1, keepdim=True)
    factor = torch.empty((), device=features.device).uniform_(0.7, 0.9)
    return features * (attention < factor * attention.amax((2, 3, 4), keepdim=True))


PERTURBATIONS = (feature_noise, feature_dropout, feature_drop)


def cross_consistency(logits: Sequence[Tensor]) -> Tensor:
    """L_u, a scalar, of the decoders' logits, the main one's first, each (N, C, x, y, z)."""
    main, *auxiliaries = (z.float().softmax(1) for z in logits)
    return sum((main - p).square().mean() for p in auxiliaries) / len(auxiliaries)


class CrossConsistencyVNet(VNet):
    """V-Net with a main decoder and one auxiliary decoder a perturbation, all deconv."""

    def __init__(self, in_channels: int, num_classes: int, filters: int) -> None:
        super().__init__(in_channels, num_classes, filters, ("deconv",) * (1 + len(PERTURBATIONS)))

    def forward(self, image: Tensor, decoders: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Logits (N, classes, x, y, z) and features (N, filters, x, y, z), the main decoder's first.

        Args:
            image: (N, in_channels, x, y, z).
            decoders: only the first so many; default all.
        """
        main, *auxiliaries = self.decoders[:decoders]
        maps = self.encoder(image)
        outputs = [main(maps)]
        for decoder, perturb in zip(auxiliaries, PERTURBATIONS, strict=False):
            outputs.append(decoder([perturb(features) for features in maps]))
        return [logits for logits, _ in outputs], [features for _, features in outputs]


class CCT(Method):
    """Cross-consistency training; the main decoder predicts."""

    outputs: ClassVar[tuple[str, ...]] = ("decoder1",)
    replayable: ClassVar[bool] = True

    def __init__(self, settings: Settings, in_channels: int, num_classes: int) -> None:
        super().__init__(settings, in_channels, num_classes)
        self.network = CrossConsistencyVNet(in_channels, num_classes, settings.filters)

    def loss(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """All decoders are supervised on the labelled volumes and made to agree on the unlabelled ones."""
        logits, _ = self.network(batch.image)
        labelled = len(batch.label)
        supervised = sum(ce_dice_loss(z[:labelled], batch.label) for z in logits) / len(logits)
        consistency = cross_consistency([z[labelled:] for z in logits])
        return terms(supervised, consistency, self.beta(step), logits[0], batch.label, (1, CONSISTENCY))
