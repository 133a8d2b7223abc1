"""MLRPL (Su, Luo, Lian, Lin, Li: Mutual learning with reliable pseudo label for semi-supervised medical image
segmentation, Medical Image Analysis 94, 2024, 103111).

One encoder, two decoders that differ in how they up-sample. Total loss (paper, Section 3):

    γ L_sup + β(t) L_mut

L_sup: Dice loss of each decoder on the labelled half, summed. L_mut: `mlrpl.reliability.mutual_loss` on all volumes.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from mlrpl.config import Settings
from mlrpl.data import Batch
from mlrpl.losses import dice_loss
from mlrpl.methods.base import Method, Step
from mlrpl.methods.parts import terms
from mlrpl.reliability import mutual_loss


class MLRPL(Method):
    """Mutual learning with reliable pseudo labels.

    With the study setting `beta_max: 0` it is the control: the same network, batches and supervised loss without the
    mutual loss; with `batch: [2, 0]` besides, the control that sees no unlabelled volume, not even in BatchNorm's
    statistics. With `selection: all, weighting: none` it is cross pseudo supervision (Chen et al., CVPR 2021).

    Args:
        settings: what the study sets.
        in_channels: image channels.
        num_classes: classes, background included.
        gamma: γ, the supervised loss's weight.
        selection: which pseudo-labels count, see `mlrpl.reliability.select`.
        weighting: how much, see `mlrpl.reliability.weigh`.
        threshold: τ where selection is "threshold".
        upsamplings: one decoder each.
    """

    needs_unlabelled: ClassVar[bool] = False
    replayable: ClassVar[bool] = True

    def __init__(
        self,
        settings: Settings,
        in_channels: int,
        num_classes: int,
        gamma: float = 0.5,
        selection: str = "wr",
        weighting: str = "mse",
        threshold: float | None = None,
        upsamplings: tuple[str, ...] = ("deconv", "nearest"),
    ) -> None:
        super().__init__(settings, in_channels, num_classes)
        if not upsamplings:
            raise ValueError("upsamplings must name a decoder")
        if threshold is not None and selection != "threshold":
            raise ValueError(f'threshold is read by selection "threshold" alone, not by "{selection}"')
        if len(upsamplings) == 1:  # its mean is itself, and nothing disagrees with it
            self.outputs = ("decoder1",)
        self.network = self.make_network(tuple(upsamplings))
        self.gamma = gamma
        self.reliability = {"selection": selection, "weighting": weighting, "threshold": threshold}
        self.mutual_loss = mutual_loss
        voxel = [torch.zeros(1, num_classes, 1, 1, 1)] * 2
        mutual_loss(voxel, voxel, **self.reliability)  # a wrong option is told now, not hours later

    def compile_parts(self, **options: Any) -> None:
        """As every method's, and the mutual loss."""
        super().compile_parts(**options)
        self.mutual_loss = torch.compile(self.mutual_loss, dynamic=False, **options)  # a subclass may have its own

    def loss(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """γ L_sup + β L_mut. The mutual loss is measured in the control too, where β is 0."""
        logits, features = self.network(batch.image)
        labelled = len(batch.label)
        supervised = sum(dice_loss(z[:labelled].float().softmax(1), batch.label) for z in logits)
        with torch.set_grad_enabled(self.settings.beta_max > 0):
            mutual = self.mutual_loss(logits, features, **self.reliability)
        return terms(supervised, mutual, self.beta(step), logits[0], batch.label, (self.gamma, 1))
