"""MC-Net (Wu, Xu, Ge, Cai, Zhang: Semi-supervised left atrium segmentation with mutual consistency training, MICCAI
2021) and MC-Net+ (Wu, Ge, Zhang, Xu, Zhang, Xia, Cai: Mutual consistency learning for semi-supervised medical image
segmentation, Medical Image Analysis 81, 2022, 102530): decoders that differ in their up-sampling are drawn to one
another's sharpened predictions.

    L_mc = Σ_{i≠j} mean (p_i − sharpen(p_j))²,    sharpen(p) = p^{1/T} / Σ_c p^{1/T},  T = 0.1

The mean is over all volumes, labelled and unlabelled, classes and voxels. Gradients flow through both p_i and the
sharpened p_j, as in the published code. Total: 0.5 · (Dice loss, summed over decoders) + β L_mc. For two classes the
sharpening is the papers' (p^{1/T} / (p^{1/T} + (1 − p)^{1/T})); the sum over C classes is this repository's.
"""

from collections.abc import Sequence
from itertools import permutations
from typing import ClassVar

from torch import Tensor

from mlrpl.config import Settings
from mlrpl.data import Batch
from mlrpl.losses import dice_loss
from mlrpl.methods.base import Method, Step
from mlrpl.methods.parts import terms

GAMMA = 0.5  # the supervised loss's weight
TEMPERATURE = 0.1


def sharpen(logits: Tensor, temperature: float) -> Tensor:
    """p^{1/T} / Σ_c p^{1/T} of p = softmax(z), which is softmax(z / T): (N, C, x, y, z)."""
    return (logits / temperature).softmax(1)


def mutual_consistency(logits: Sequence[Tensor]) -> Tensor:
    """L_mc, a scalar, of the decoders' logits, each (N, C, x, y, z)."""
    probabilities = [z.float().softmax(1) for z in logits]
    targets = [sharpen(z.float(), TEMPERATURE) for z in logits]
    pairs = permutations(range(len(logits)), 2)
    return sum((probabilities[i] - targets[j]).square().mean() for i, j in pairs)


class MCNet(Method):
    """MC-Net: two decoders, transposed convolutions and trilinear interpolation."""

    title: ClassVar[str] = "MC-Net"
    upsamplings: ClassVar[tuple[str, ...]] = ("deconv", "trilinear")
    replayable: ClassVar[bool] = True

    def __init__(self, settings: Settings, in_channels: int, num_classes: int) -> None:
        super().__init__(settings, in_channels, num_classes)
        self.network = self.make_network(self.upsamplings)

    def loss(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """0.5 · Dice of the labelled, β · mutual consistency of all volumes."""
        logits, _ = self.network(batch.image)
        labelled = len(batch.label)
        supervised = sum(dice_loss(z[:labelled].float().softmax(1), batch.label) for z in logits)
        return terms(supervised, mutual_consistency(logits), self.beta(step), logits[0], batch.label, (GAMMA, 1))


class MCNetPlus(MCNet):
    """MC-Net+: a third decoder, nearest-neighbour interpolation."""

    title: ClassVar[str] = "MC-Net+"
    upsamplings: ClassVar[tuple[str, ...]] = ("deconv", "trilinear", "nearest")
    replayable: ClassVar[bool] = True
