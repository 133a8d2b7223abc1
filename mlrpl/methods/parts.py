"""What several methods share, their terms and the mean teacher; then the heads and the adversary of SS-Net.

All random draws, here as in the methods, come from PyTorch's global generators, as dropout's do: the loop seeds them
anew for each iteration.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlrpl.config import Settings
from mlrpl.data import Batch
from mlrpl.losses import batch_dice, ce_dice_loss
from mlrpl.methods.base import Method, Step, foreground_fraction

CONSISTENCY = 0.1  # factor before β in the methods that follow UA-MT's code (UA-MT, AC-MT, URPC, CCT)


def terms(
    supervised: Tensor,
    mutual: Tensor,
    beta: float | Tensor,
    logits: Tensor,
    labels: Tensor,
    weights: tuple[float, float],
) -> dict[str, Tensor]:
    """What a semi-supervised method's `loss` returns.

    Args:
        supervised: its supervised loss, a scalar.
        mutual: its unsupervised loss, a scalar.
        beta: β.
        logits: of the output that predicts (N, C, x, y, z), labelled volumes first.
        labels: of the labelled volumes (n, x, y, z).
        weights: (a, b) of the total, a · supervised + b · β · mutual.
    """
    return {
        "total": weights[0] * supervised + weights[1] * beta * mutual,
        "supervised": supervised,
        "mutual": mutual,
        "beta": supervised.new_zeros(()) + beta,
        "pseudo_foreground": foreground_fraction(logits[len(labels) :]),
        "dice": batch_dice(logits[: len(labels)], labels),
    }


class MeanTeacher(Method):
    """Student and teacher V-Net (Tarvainen & Valpola, NeurIPS 2017): the base of UA-MT and AC-MT.

    The teacher starts as the student's copy, never receives a gradient, and stays in training mode: its dropout is on,
    and its BatchNorm layers see the statistics of its own batch. The student predicts.
    """

    outputs: ClassVar[tuple[str, ...]] = ("decoder1",)

    def __init__(self, settings: Settings, in_channels: int, num_classes: int) -> None:
        super().__init__(settings, in_channels, num_classes)
        self.network = self.make_network(("deconv",))
        self.teacher = copy.deepcopy(self.network).requires_grad_(False)

    def schedule(self, step: Step) -> dict[str, float]:
        """β, and "share": the student's in the teacher after the step, which is update t = k − 1."""
        return {**super().schedule(step), "share": student_share(step.iteration - 1)}

    @torch.no_grad()
    def teach(self, image: Tensor) -> Tensor:
        """The teacher's probabilities of noisy volumes: (N, channels, x, y, z) -> (N, C, x, y, z), float32."""
        (logits,), _ = self.teacher(image + input_noise(image))
        return logits.float().softmax(1)

    def consistency(self, student: Tensor, image: Tensor, step: Step) -> Tensor:
        """The unsupervised loss, a scalar, of the student's logits (N, C, x, y, z) of unlabelled volumes."""
        raise NotImplementedError

    def loss(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """½ (CE + Dice) of the labelled, 0.1 β consistency of the unlabelled volumes."""
        (logits,), _ = self.network(batch.image)
        labelled = len(batch.label)
        supervised = ce_dice_loss(logits[:labelled], batch.label)
        consistency = self.consistency(logits[labelled:], batch.image[labelled:], step)
        return terms(supervised, consistency, self.beta(step), logits, batch.label, (1, CONSISTENCY))

    def after_step(self, step: Step) -> None:
        """Update the teacher."""
        update_average(self.teacher, self.network, self.scheduled("share", step))


def student_share(t: int) -> float:
    """The student's share in update t of the teacher, 1 − min(1 − 1/(t+1), 0.99): t = 0 copies."""
    return 1 - min(1 - 1 / (t + 1), 0.99)


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, share: float | Tensor) -> None:
    """Move the parameters (not the buffers) of `average` to those of `network` by this share of the way."""
    for mean, parameter in zip(average.parameters(), network.parameters(), strict=True):
        mean.lerp_(parameter, share)


def input_noise(image: Tensor) -> Tensor:
    """clamp(0.1 · N(0, 1), ±0.2) of the image's shape; images are z-scored."""
    return (0.1 * torch.randn_like(image)).clamp(-0.2, 0.2)


def mlp(in_features: int, width: int) -> nn.Sequential:
    """Head on vectors (V, in_features) -> (V, width): Linear, BatchNorm, ReLU, Linear."""
    return nn.Sequential(
        nn.Linear(in_features, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True), nn.Linear(width, width)
    )


class Selector(nn.Module):
    """Weights for the members among features: Linear, BatchNorm, LeakyReLU 0.2, Linear, σ (Alonso et al., ICCV 2021).

    Features (V, width) and a boolean mask (V,) give weights (V,): 0 outside the mask, of sum 1 within (0 if it is
    empty). A mask in place of a shorter list: nothing depends on the members' number, and no GPU is waited for.
    BatchNorm takes its statistics over the members alone; it keeps no running ones, as a selector works in training
    only.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width, track_running_stats=False)
        self.score = nn.Linear(width, 1)

    def forward(self, features: Tensor, member: Tensor) -> Tensor:
        hidden = self.hidden(features)
        share = member / member.sum().clamp(min=1)
        centred = hidden - share @ hidden
        variance = share @ centred.square()
        hidden = centred * (self.norm.weight * (variance + self.norm.eps).rsqrt()) + self.norm.bias
        weight = self.score(F.leaky_relu(hidden, 0.2)).squeeze(1).sigmoid() * member
        return weight / weight.sum().clamp(min=1e-12)


def soft_dice_distance(p: Tensor, q: Tensor) -> Tensor:
    """1 − (2Σpq + 1e-8)/(Σp + Σq + 1e-8) of two predictions (N, C, x, y, z), over all channels and the batch."""
    return 1 - (2 * (p * q).sum() + 1e-8) / (p.sum() + q.sum() + 1e-8)


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Within, BatchNorm layers in training mode use the batch's statistics but leave their running ones alone."""
    tracking = [module for module in network.modules() if getattr(module, "track_running_stats", False)]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


def adversarial_direction(distance: Callable[[Tensor], Tensor], image: Tensor, radius: float) -> Tensor:
    """The direction in which `distance` grows fastest, after one power step (Miyato et al., TPAMI 2019).

    Parameters get no gradient from it.

    Args:
        distance: of a perturbed image, a scalar.
        image: (N, channels, x, y, z).
        radius: where the gradient is taken: at image + radius · a random direction.

    Returns:
        Like `image`, of unit L2 norm per volume.
    """
    direction = unit(torch.rand_like(image) - 0.5).requires_grad_()
    # Only the gradient's direction counts, so it is scaled up by the voxels' number: float16 would lose it.
    (gradient,) = torch.autograd.grad(distance(image + radius * direction) * image[0, 0].numel(), direction)
    return unit(gradient)


def unit(image: Tensor) -> Tensor:
    """Each volume of (N, channels, x, y, z) divided by its L2 norm."""
    return image / torch.linalg.vector_norm(image, dim=(1, 2, 3, 4), keepdim=True).clamp(min=1e-12)
