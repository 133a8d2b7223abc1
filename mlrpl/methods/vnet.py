"""V-Net (Milletari, Navab, Ahmadi: V-Net, 3DV 2016): the supervised baseline, labelled volumes only.

Trained on the labelled cases alone it is the lower bound of a comparison; on all training cases with their labels, the
upper bound. Its loss is the one that the field's supervised baseline is published with: ½ (CE + squared Dice).
"""

from typing import ClassVar

from torch import Tensor

from mlrpl.config import Settings
from mlrpl.data import Batch
from mlrpl.losses import batch_dice, ce_dice_loss
from mlrpl.methods.base import Method, Step


class SupervisedVNet(Method):
    """One deconv decoder on batches that are labelled throughout."""

    title: ClassVar[str] = "V-Net"
    uses_unlabelled: ClassVar[bool] = False
    needs_unlabelled: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("decoder1",)
    replayable: ClassVar[bool] = True
    unused_settings: ClassVar[frozenset[str]] = frozenset({"beta_max", "ramp_iterations"})

    def __init__(self, settings: Settings, in_channels: int, num_classes: int) -> None:
        super().__init__(settings, in_channels, num_classes)
        self.network = self.make_network(("deconv",))

    def loss(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Cross-entropy and squared Dice loss of the labelled batch."""
        (logits,), _ = self.network(batch.image)
        supervised = ce_dice_loss(logits, batch.label)
        return {"total": supervised, "supervised": supervised, "dice": batch_dice(logits, batch.label)}
