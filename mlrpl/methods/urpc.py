"""URPC (Luo, Liao, Chen, Song, Chen, Zhang, Chen, Wang, Zhang: Efficient semi-supervised gross target volume of
nasopharyngeal carcinoma segmentation via uncertainty rectified pyramid consistency, MICCAI 2021; Medical Image Analysis
80, 2022, 102517): predictions at four scales are drawn to their mean, less so where they deviate from it.

With p̄ the mean over the scales s = 1…4 and D_s = Σ_c p̄ (log p̄ − log p_s) per voxel,

    L_s = mean((p̄ − p_s)² e^{−D_s}) / (mean(e^{−D_s}) + 1e-8) + mean(D_s),    L_pc = mean_s L_s

Gradients flow through p̄, D_s and e^{−D_s} too. Total: ½ (CE + Dice), averaged over the scales, + 0.1 β L_pc on the
unlabelled volumes. The published network is a U-Net whose decoder passes the maps on after their dropout; here it is
the V-Net of all methods, and the dropout is the heads' alone.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlrpl.config import Settings
from mlrpl.data import Batch
from mlrpl.losses import ce_dice_loss
from mlrpl.methods.base import Method, Step
from mlrpl.methods.parts import CONSISTENCY, terms
from mlrpl.networks import PointwiseConv3d, VNet

DROPOUT = (0.1, 0.2, 0.3, 0.5)  # before the heads at full, 1/2, 1/4 and 1/8 resolution


def pyramid_consistency(logits: Sequence[Tensor]) -> Tensor:
    """L_pc, a scalar, of the scales' logits at full size, each (N, C, x, y, z)."""
    log_p = torch.stack([z.float().log_softmax(1) for z in logits])
    p = log_p.exp()
    mean = p.mean(0)
    log_mean = log_p.logsumexp(0) - math.log(len(log_p))  # log p̄, finite where p̄ underflows
    deviation = (mean * (log_mean - log_p)).sum(2, keepdim=True)
    certainty = (-deviation).exp()
    axes = (1, 2, 3, 4, 5)
    rectified = ((mean - p).square() * certainty).mean(axes) / (certainty.mean(axes) + 1e-8)
    return (rectified + deviation.mean(axes)).mean()


class PyramidVNet(VNet):
    """V-Net with one decoder (deconv) and a 1×1×1 head on each of its four levels."""

    def __init__(self, in_channels: int, num_classes: int, filters: int) -> None:
        super().__init__(in_channels, num_classes, filters, ("deconv",))
        self.dropouts = nn.ModuleList(nn.Dropout3d(p) for p in DROPOUT)
        self.coarse_heads = nn.ModuleList(PointwiseConv3d(filters * 2**level, num_classes) for level in (1, 2, 3))

    def forward(self, image: Tensor, decoders: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Logits up-sampled to (N, classes, x, y, z), and the features before each head; full resolution first.

        Args:
            image: (N, in_channels, x, y, z).
            decoders: only the first so many heads; default all.
        """
        (decoder,) = self.decoders
        levels = reversed(decoder.levels(self.encoder(image)))
        features = [dropout(level) for dropout, level in zip(self.dropouts[:decoders], levels, strict=False)]
        heads = [decoder.head, *self.coarse_heads]
        logits = [
            F.interpolate(head(f).float(), size=image.shape[2:], mode="trilinear", align_corners=False)
            for head, f in zip(heads, features, strict=False)
        ]
        return logits, features


class URPC(Method):
    """Uncertainty-rectified pyramid consistency; the full-resolution head predicts."""

    outputs: ClassVar[tuple[str, ...]] = ("decoder1",)
    replayable: ClassVar[bool] = True
    unused_settings: ClassVar[frozenset[str]] = frozenset({"head_dropout"})  # its heads' is the method's own

    def __init__(self, settings: Settings, in_channels: int, num_classes: int) -> None:
        super().__init__(settings, in_channels, num_classes)
        self.network = PyramidVNet(in_channels, num_classes, settings.filters)

    def loss(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Every head is supervised on the labelled volumes and held to the heads' mean on the unlabelled ones."""
        logits, _ = self.network(batch.image)
        labelled = len(batch.label)
        supervised = sum(ce_dice_loss(z[:labelled], batch.label) for z in logits) / len(logits)
        consistency = pyramid_consistency([z[labelled:] for z in logits])
        return terms(supervised, consistency, self.beta(step), logits[0], batch.label, (1, CONSISTENCY))
