"""What every method is: a network, a loss and a prediction. The training loop knows nothing else."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mlrpl.config import Settings
from mlrpl.data import Batch
from mlrpl.losses import consistency_weight, hard_labels
from mlrpl.networks import Decoder, Encoder, VNet

OUTPUTS = ("decoder1", "mean")


@dataclass(frozen=True)
class Step:
    """Where training stands: `iteration` counts from 1; `generator`'s state is a function of (seed, iteration).

    `scheduled` is where a step recorded for a GPU (`mlrpl.optimisation`) finds the numbers of `Method.schedule`.
    """

    iteration: int
    iterations: int
    generator: torch.Generator
    scheduled: Mapping[str, Tensor] | None = None


class Method(nn.Module):
    """Base of all methods. A subclass sets `self.network` and writes `loss`; its keyword arguments are its options.

    Class attributes:
        title: as tables and figures print it; by default the name of the class.
        result_version: raise it when a change of code changes results, and old runs are no longer taken as finished.
        uses_unlabelled: False for a method whose batches are all labelled.
        needs_unlabelled: False for a method that also trains on a `batch` without unlabelled volumes.
        outputs: what `predict` offers, of `OUTPUTS`.
        terms: of its loss, what log.csv has beside those that all methods have.
        unused_settings: of `Settings`, what the method never reads: changing it is no reason to train again.
        replayable: whether a step is the same work in every iteration, so that a GPU may record and replay it. Of what
            changes, `loss` and `after_step` then use the batch, numbers from `scheduled` (such as `beta`), and draws
            from PyTorch's global generators; and neither waits for the device.
        compiled: whether `compile_parts` was called.

    Args:
        settings: what the study sets.
        in_channels: image channels.
        num_classes: classes, background included.
    """

    title: ClassVar[str]
    result_version: ClassVar[int] = 1
    uses_unlabelled: ClassVar[bool] = True
    needs_unlabelled: ClassVar[bool] = True
    outputs: ClassVar[tuple[str, ...]] = OUTPUTS
    terms: ClassVar[tuple[str, ...]] = ()
    unused_settings: ClassVar[frozenset[str]] = frozenset()
    replayable: ClassVar[bool] = False
    network: VNet
    compiled = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """What one class says of its title and step holds for no other: one that extends it must say so itself."""
        super().__init_subclass__(**kwargs)
        cls.title = vars(cls).get("title", cls.__name__)
        cls.replayable = vars(cls).get("replayable", False)

    def __init__(self, settings: Settings, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.settings = settings
        self.in_channels = in_channels
        self.num_classes = num_classes

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The method's own options and their defaults, those of the method that it extends too if it takes **them."""
        found: dict[str, Any] = {}
        for base in cls.__mro__:
            if "__init__" not in vars(base):
                continue
            parameters = inspect.signature(base.__init__).parameters.values()
            found = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty} | found
            if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
                break  # else it hands options on
        return found

    @classmethod
    def batch_sizes(cls, settings: Settings) -> tuple[int, int]:
        """Labelled and unlabelled volumes of its batches."""
        return settings.batch if cls.uses_unlabelled else (sum(settings.batch), 0)

    def make_network(self, upsamplings: tuple[str, ...]) -> VNet:
        """A V-Net of the study's width with one decoder for each up-sampling."""
        return VNet(self.in_channels, self.num_classes, self.settings.filters, upsamplings)

    def compile_parts(self, **options: Any) -> None:
        """Have torch.compile make one program of each encoder and each decoder; `options` are its.

        A program a batch size: one for all of them would be slower. What the compiler cannot do runs as it did before;
        with TORCH_COMPILE_DISABLE=1 in the environment, all does.
        """
        torch._dynamo.config.suppress_errors = True
        for part in self.modules():
            if isinstance(part, Encoder | Decoder):
                part.compile(dynamic=False, **options)
        self.compiled = not torch._dynamo.config.disable

    def schedule(self, step: Step) -> dict[str, float]:
        """Numbers by name that the iteration alone decides: β, and what a subclass adds to it."""
        return {"beta": consistency_weight(step.iteration, self.settings.ramp_iterations, self.settings.beta_max)}

    def scheduled(self, name: str, step: Step) -> float | Tensor:
        """A number of `schedule` at this step; a scalar on the device where the step is recorded."""
        numbers = self.schedule(step) if step.scheduled is None else step.scheduled
        return numbers[name]

    def beta(self, step: Step) -> float | Tensor:
        """The unsupervised term's weight at this step."""
        return self.scheduled("beta", step)

    def loss(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Named terms of the loss, scalars; "total" is minimised.

        Logged are, where a method has them, "supervised", "mutual" (or its own consistency, by the same name so that
        curves can be compared), "beta", "pseudo_foreground", "dice", and what the class names in `terms`.
        """
        raise NotImplementedError

    def after_step(self, step: Step) -> None:
        """Called after the optimiser's step: moving averages live here."""

    def predict(self, image: Tensor, outputs: tuple[str, ...]) -> list[Tensor]:
        """Class probabilities (N, C, x, y, z), one tensor a requested output, float32.

        Args:
            image: (N, channels, x, y, z).
            outputs: of `self.outputs`. Decoders that no output needs are not run. "disagreement" may be asked of a
                method with several decoders: (N, 1, x, y, z) from 0 to 1, half the L1 distance of two decoders'
                probabilities, mean over their pairs.
        """
        logits, _ = self.network(image, decoders=1 if set(outputs) == {"decoder1"} else None)
        probabilities = [z.float().softmax(1) for z in logits]
        choices = {
            "decoder1": lambda: probabilities[0],
            "mean": lambda: torch.stack(probabilities).mean(0),
            "disagreement": lambda: disagreement(probabilities),
        }
        return [choices[output]() for output in outputs]


def disagreement(probabilities: list[Tensor]) -> Tensor:
    """Half the L1 distance (N, 1, x, y, z) of two decoders' probabilities (N, C, x, y, z), mean over all pairs."""
    pairs = [(p - q).abs().sum(1, keepdim=True) / 2 for p, q in combinations(probabilities, 2)]
    return torch.stack(pairs).mean(0)


@torch.no_grad()
def foreground_fraction(logits: Tensor) -> Tensor:
    """Share of voxels whose arg-max is not background: where it falls to 0, the decoders agree on background."""
    return (hard_labels(logits) > 0).float().mean()
