"""SS-Net (Wu, Wu, Wu, Ge, Cai: Exploring smoothness and class-separation for semi-supervised medical image
segmentation, MICCAI 2022): predictions must withstand adversarial noise, and features must lie near a memory of their
class.

    total = Dice loss + β [L_smooth + 0.1 (L_contrast of labelled + L_contrast of unlabelled volumes)]

**Smoothness** (all volumes). L_smooth = D(p(x), p(x + 10 d)), D the soft Dice distance and d the
adversarial direction after one power step at radius 10. Every pass is in training mode, dropout drawn anew.

**Separation** (after Alonso et al., ICCV 2021). The last feature map goes through a projection, then a
prediction head. Per foreground class, V features f_i weighted by a selector's σ(s_i), M memories m_j by another's:

    L_contrast = (1/C) Σ_c mean_ij (1 − cos(f_i, m_j)) a_i b_j,    a_i = V σ(s_i) / Σ σ(s),  b_j likewise
               = (1/C) Σ_c [1 − ⟨Σ_i (a_i / V) f_i/‖f_i‖, Σ_j (b_j / M) m_j/‖m_j‖⟩]

The second line, equal to the first, never forms the pairs. Followed from the published code rather than the text: the
memory is rebuilt in each iteration from the batch's correctly predicted foreground; the selector's *lowest* scores are
kept (it sorts ascending); a class without new features keeps its old ones; background's memory stays empty, so that the
background takes no part in the contrast, and needs no selectors. Selectors, the memory's too, see features as they
are; only the cosine sees them at length 1.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlrpl.config import Settings
from mlrpl.data import Batch
from mlrpl.losses import dice_loss, hard_labels
from mlrpl.methods.base import Method, Step
from mlrpl.methods.parts import Selector, adversarial_direction, frozen_statistics, mlp, soft_dice_distance, terms

RADIUS = 10.0  # L2 norm of the perturbation, per volume
WIDTH = 32  # of the heads
MEMORIES = 32  # per class
CONTRAST = 0.1  # the contrast's weight


class ClassMemory(nn.Module):
    """One foreground class's memory, up to `MEMORIES` projected features, and its two selectors."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_selector = Selector(WIDTH)
        self.memory_selector = Selector(WIDTH)
        self.register_buffer("features", torch.zeros(MEMORIES, WIDTH))
        self.register_buffer("filled", torch.zeros(MEMORIES, dtype=torch.bool))

    @torch.no_grad()
    def remember(self, projected: Tensor, member: Tensor) -> None:
        """Keep the members of the lowest weights; without members, keep what is there.

        Args:
            projected: (V, WIDTH).
            member: which of them are correctly predicted voxels of the class, boolean (V,).
        """
        weights = self.feature_selector(projected, member).masked_fill(~member, torch.inf)
        kept = weights.topk(MEMORIES, largest=False).indices
        new = member.any()
        self.features.copy_(torch.where(new, projected[kept], self.features))
        self.filled.copy_(torch.where(new, member[kept], self.filled))

    def contrast(self, features: Tensor, member: Tensor) -> Tensor:
        """The weighted mean of 1 − cos over pairs of members and memories, or 0 with fewer than two of either.

        Args:
            features: (V, WIDTH).
            member: which of them belong to the class, boolean (V,).
        """
        ours = self.feature_selector(features.detach(), member) @ F.normalize(features, dim=1)
        theirs = self.memory_selector(self.features, self.filled) @ F.normalize(self.features, dim=1)
        return torch.where((member.sum() > 1) & (self.filled.sum() > 1), 1 - ours @ theirs, 0.0)


class SSNet(Method):
    """Smoothness and class separation on a V-Net with one decoder."""

    title: ClassVar[str] = "SS-Net"
    outputs: ClassVar[tuple[str, ...]] = ("decoder1",)
    replayable: ClassVar[bool] = True

    def __init__(self, settings: Settings, in_channels: int, num_classes: int) -> None:
        super().__init__(settings, in_channels, num_classes)
        self.network = self.make_network(("deconv",))
        self.projection = mlp(settings.filters, WIDTH)
        self.prediction = mlp(WIDTH, WIDTH)
        self.memories = nn.ModuleList(ClassMemory() for _ in range(1, num_classes))

    def loss(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Dice of the labelled volumes, smoothness of all, separation of both halves."""
        (logits,), (features,) = self.network(batch.image)
        labelled = len(batch.label)
        supervised = dice_loss(logits[:labelled].float().softmax(1), batch.label)
        predicted = hard_labels(logits)
        with torch.autocast(batch.image.device.type, enabled=False):  # small heads, small differences: float32
            halves = [half.permute(0, 2, 3, 4, 1).flatten(0, 3) for half in features.float().tensor_split([labelled])]
            correct = batch.label.where(predicted[:labelled] == batch.label, 0)
            self.remember(halves[0], correct.flatten())
            contrast = self.contrast(halves[0], batch.label.flatten())
            contrast = contrast + self.contrast(halves[1], predicted[labelled:].flatten())
        mutual = self.smoothness(batch.image) + CONTRAST * contrast
        return terms(supervised, mutual, self.beta(step), logits, batch.label, (1, 1))

    @torch.no_grad()
    def remember(self, features: Tensor, labels: Tensor) -> None:
        """Rebuild the memory from labelled voxels (V, filters); label 0: not predicted correctly as foreground."""
        self.projection.eval()
        projected = self.projection(features)
        self.projection.train(self.training)
        for c, memory in enumerate(self.memories, start=1):
            memory.remember(projected, labels == c)

    def contrast(self, features: Tensor, labels: Tensor) -> Tensor:
        """L_contrast, a scalar, of voxels (V, filters) with labels or pseudo-labels (V,)."""
        predicted = self.prediction(self.projection(features))
        losses = [memory.contrast(predicted, labels == c) for c, memory in enumerate(self.memories, start=1)]
        return sum(losses) / self.num_classes

    def smoothness(self, image: Tensor) -> Tensor:
        """L_smooth, a scalar; of its passes only the clean one moves BatchNorm's running statistics (a second time)."""
        with torch.no_grad():
            target = self.network(image)[0][0].float().softmax(1)

        def distance(perturbed: Tensor) -> Tensor:
            return soft_dice_distance(self.network(perturbed)[0][0].float().softmax(1), target)

        with frozen_statistics(self.network):
            return distance(image + RADIUS * adversarial_direction(distance, image, RADIUS))
