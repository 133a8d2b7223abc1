"""What is timed: training step, mutual loss, sliding window and metrics, each in both formulations."""

import copy
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from mlrpl.bench.timing import Work, relative
from mlrpl.config import Run, Settings
from mlrpl.data import Batch, Case
from mlrpl.errors import StudyError
from mlrpl.evaluation import check_dice, predict_case, predicting
from mlrpl.methods import Method, Step, build
from mlrpl.metrics import case_metrics
from mlrpl.networks import to_channels_last
from mlrpl.optimisation import WARM_UP, Optimisation, make_optimizer, optimise, to_device
from mlrpl.precision import Precision, choose_precision, exact
from mlrpl.reliability import entropy, mutual_loss
from mlrpl.training import seed_iteration, stage

FLOAT32 = Precision("float32")
BETA = 0.1  # β of the timed steps


@dataclass(frozen=True)
class Size:
    """What the cost of a step depends on; the defaults are the short studies'."""

    patch: tuple[int, int, int] = (48, 48, 32)
    filters: int = 8
    batch: tuple[int, int] = (2, 2)
    classes: int = 2
    upsamplings: tuple[str, ...] = ("deconv", "nearest")

    @property
    def setting(self) -> str:
        """As the table prints it."""
        return f"{sides(self.patch)}, {self.filters} filters, batch {sum(self.batch)}"


LA = Size((112, 112, 80), 16)


def sides(size: Sequence[int]) -> str:
    """112×112×80."""
    return "×".join(map(str, size))


@cache
def benchmark(name: str) -> ModuleType:
    """A module of the clone's `benchmarks/`.

    Raises:
        StudyError: where the package is installed without its clone.
    """
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.exists() or spec is None or spec.loader is None:
        raise StudyError(f"benchmarks/{name}.py is missing: run from a clone of the repository, installed with pip -e")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def yardstick() -> ModuleType:
    """The plain formulation."""
    return benchmark("plain")


def make_run(method: str, size: Size, **options: Any) -> Run:
    """A run of that size, never trained to its end."""
    settings = Settings(
        patch=size.patch,
        stride=tuple(side // 2 for side in size.patch),
        filters=size.filters,
        batch=size.batch,
        beta_max=BETA,
        ramp_iterations=150,
    )
    return Run(
        study="bench",
        variant=method,
        method=method,
        title=method,
        labelled=1,
        seed=0,
        settings=settings,
        options=options,
    )


def make_method(method: str, size: Size, device: torch.device, **options: Any) -> Method:
    """A freshly initialised method, as the training loop makes it."""
    seed_iteration(0, 0, torch.device("cpu"))
    return to_channels_last(build(make_run(method, size, **options), 1, size.classes)).to(device)


def make_batch(method: Method, size: Size) -> Batch:
    """A batch on the CPU: noise, and labels that are about one third foreground."""
    random = torch.Generator().manual_seed(1)
    volumes = sum(size.batch)
    labelled = size.batch[0] if method.uses_unlabelled else volumes
    image = torch.randn(volumes, 1, *size.patch, generator=random)
    label = torch.randint(0, 3 * (size.classes - 1), (labelled, *size.patch), generator=random)
    return Batch(image, label.where(label < size.classes, 0))


class Pair:
    """MLRPL and its yardstick with the same weights, on one device."""

    def __init__(self, size: Size, device: torch.device, precision: Precision | None = None) -> None:
        self.size, self.device = size, device
        self.method = make_method("mlrpl", size, device, upsamplings=size.upsamplings)
        self.precision = precision or choose_precision("auto", self.method.network, size.patch, sum(size.batch), device)
        self.plain = yardstick().PlainVNet(1, size.classes, size.filters, size.upsamplings).to(device)
        for ours, plain in self.parameters():
            plain.data.copy_(ours.data)

    def parameters(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """The same parameter of both: in either they come in the order data flows."""
        return list(zip(self.method.network.parameters(), self.plain.parameters(), strict=True))


def exact_gradients(pair: Pair) -> tuple[Tensor, Tensor]:
    """All gradients of one step in both formulations, in double precision on a small patch.

    In float32 either one may be off by a percent of the exact gradient: near a ReLU's zero, rounding decides.
    """
    pair = copy.deepcopy(pair)
    size = replace(pair.size, patch=(32, 32, 32), batch=(1, 1))
    batch = make_batch(pair.method, size)
    image, label = batch.image.double().to(pair.device), batch.label.to(pair.device)
    method, plain = pair.method.double(), pair.plain.double()
    still = torch.optim.SGD(plain.parameters(), 0.0)
    iteration = method.settings.ramp_iterations
    step = Step(iteration, iteration, seed_iteration(0, iteration, pair.device))
    ours = Batch(image.to(memory_format=torch.channels_last_3d), label)
    optimise(method, ours, step, make_optimizer(method), torch.amp.GradScaler(enabled=False), FLOAT32)
    seed_iteration(0, iteration, pair.device)
    yardstick().train_step(plain, still, image, label, BETA)
    sides = zip(*pair.parameters(), strict=True)
    first, second = (torch.cat([p.grad.contiguous().flatten() for p in side]) for side in sides)
    return first, second


def training_step(size: Size, device: torch.device, goal: float | None = None) -> Work:
    """One iteration of MLRPL: from the batch in main memory to the moved weights."""
    pair = Pair(size, device)
    method, settings = pair.method, pair.method.settings
    optimizer = make_optimizer(method)
    scaler = pair.precision.scaler(device)
    as_run = Optimisation(method, optimizer, scaler, pair.precision, device)
    plain_optimizer = torch.optim.SGD(pair.plain.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    batch = make_batch(method, size)
    staged = stage(batch, device)
    iteration = settings.ramp_iterations

    def next_step() -> Step:
        return Step(iteration, settings.iterations, seed_iteration(0, iteration, device))

    def ours() -> dict[str, Tensor]:
        return as_run(staged, next_step())

    def ours_exact() -> dict[str, Tensor]:
        still = torch.amp.GradScaler(device.type, enabled=False)
        return optimise(method, to_device(staged, device), next_step(), optimizer, still, FLOAT32)

    def plain() -> dict[str, float]:
        seed_iteration(0, iteration, device)
        image, label = batch.image.to(device), batch.label.to(device)
        return yardstick().train_step(pair.plain, plain_optimizer, image, label, BETA)

    def difference() -> float:
        gradients = exact_gradients(pair)
        with exact():
            terms, expected = ours_exact(), plain()
        losses = [abs(terms[name].item() - value) / max(abs(value), 1e-12) for name, value in expected.items()]
        return max(*losses, relative(*gradients))

    warm_up = WARM_UP + 1  # with the recording
    return Work("training step", size.setting, ours, plain, difference, goal, needs_bf16=True, warm_up=warm_up)


def mutual_losses(size: Size, device: torch.device, goal: float | None = None) -> Work:
    """The mutual loss alone, forwards and backwards, on the maps that the two networks would give it."""
    dtype = Pair(replace(size, patch=(16, 16, 16), filters=1), device).precision.dtype
    random = torch.Generator().manual_seed(2)
    shape = (sum(size.batch), size.classes, *size.patch)
    maps = [2 * torch.randn(shape, generator=random).to(device) for _ in size.upsamplings]
    # Which decoder is the surer one must not be a matter of rounding: where two are about equal, they are set apart.
    entropies = torch.stack([entropy(z.double().softmax(1)) for z in maps]).sort(0).values
    tied = (entropies.diff(dim=0) < 1e-5).any(0).unsqueeze(1)
    maps = [torch.where(tied, z * (1 + k), z) for k, z in enumerate(maps)]
    features = [
        torch.randn(shape[0], size.filters, *size.patch, generator=random).relu().to(device) for _ in size.upsamplings
    ]

    def prepared(arrange: torch.memory_format, kind: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [z.to(kind, memory_format=arrange, copy=True).requires_grad_() for z in maps]
        return leaves, [f.to(kind, memory_format=arrange) for f in features]

    def run(loss: Any, leaves: list[Tensor], features: list[Tensor]) -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        total = loss(leaves, features)
        total.backward()
        return total.detach()

    plain = prepared(torch.contiguous_format, torch.float32)
    ours = prepared(torch.channels_last_3d, dtype)

    def difference() -> float:
        inputs = prepared(torch.channels_last_3d, torch.float32)
        with exact():
            losses = run(mutual_loss, *inputs), run(yardstick().mutual_loss, *plain)
        gradients = [torch.stack([leaf.grad for leaf in leaves]) for leaves in (inputs[0], plain[0])]
        return max(relative(*losses), relative(*gradients))

    return Work(
        "mutual loss",
        size.setting,
        lambda: run(mutual_loss, *ours),
        lambda: run(yardstick().mutual_loss, *plain),
        difference,
        goal,
    )


def make_case(size: Sequence[int], number: int = 0) -> Case:
    """A volume of noise with a smooth blob as its label."""
    random = np.random.default_rng(number)
    image = random.standard_normal((1, *size), dtype=np.float32)
    return Case(f"case-{number}", "test", image, blob(size, number).astype(np.uint8), (1.0, 1.0, 1.0))


def blob(size: Sequence[int], number: int, roughness: float = 0.1) -> np.ndarray:
    """A mask (x, y, z): an ellipsoid with a random smooth surface, a margin away from the volume's border."""
    grid = np.meshgrid(*(np.linspace(-1.3, 1.3, side) for side in size), indexing="ij")
    noise = gaussian_filter(np.random.default_rng(number).standard_normal(tuple(size)), 4)
    return np.sqrt(sum(g**2 for g in grid)) + roughness * noise / noise.std() < 0.9


def sliding_windows(
    size: Size, volume: Sequence[int], stride: Sequence[int], device: torch.device, goal: float | None = None
) -> Iterator[Work]:
    """A whole volume's probabilities: of decoder 1 alone, and of decoder 1 and the mean of both."""
    pair = Pair(size, device)
    pair.plain.eval()
    pair.method.settings = pair.method.settings.model_copy(update={"stride": tuple(stride)})
    case = make_case(volume)

    def ours(outputs: Sequence[str], precision: Precision = pair.precision) -> Tensor:
        return predict_case(pair.method, case, outputs, device, precision)

    def plain() -> tuple[np.ndarray, np.ndarray]:
        return yardstick().test_single_case(pair.plain, case.image[0], size.patch, stride, size.classes)

    setting = f"{sides(volume)}, windows at {sides(stride)}"
    for name, outputs in {"one decoder": ("decoder1",), "both decoders": ("decoder1", "mean")}.items():

        def difference(outputs: Sequence[str] = outputs) -> float:
            with exact():
                found, expected = ours(outputs, FLOAT32), plain()
            return max(relative(f, torch.from_numpy(e)) for f, e in zip(found, expected, strict=False))

        yield Work(
            f"sliding window, {name}",
            setting,
            lambda outputs=outputs: ours(outputs),
            plain,
            difference,
            goal if len(outputs) == 1 else None,
            needs_bf16=True,
        )


def library_window(size: Size, volume: Sequence[int], stride: Sequence[int], device: torch.device) -> Work:
    """The same windows of the same network, averaged by the package and by MONAI (`pip install monai`)."""
    pair = Pair(size, device)
    pair.method.settings = pair.method.settings.model_copy(update={"stride": tuple(stride)})
    case = make_case(volume)
    image = torch.from_numpy(case.image)[None]

    def ours(precision: Precision = pair.precision) -> Tensor:
        return predict_case(pair.method, case, ("decoder1",), device, precision)

    def theirs(precision: Precision = pair.precision) -> Tensor:
        with predicting(pair.method, ("decoder1",), device, precision) as predict:
            return benchmark("library").sliding_window(predict, image.to(device), size.patch, stride)

    def difference() -> float:
        with exact():
            return relative(ours(FLOAT32), theirs(FLOAT32))

    setting = f"{sides(volume)}, windows at {sides(stride)}"
    return Work("sliding window beside MONAI's", setting, ours, theirs, difference, needs_bf16=True)


def metrics(volume: Sequence[int], cases: int, goal: float | None = None) -> Iterator[Work]:
    """The four metrics of some cases, in voxels (bit-equal to MedPy's) and in mm."""
    masks = [(blob(volume, 2 * n, 0.15), blob(volume, 2 * n + 1)) for n in range(cases)]
    for unit, spacing, tolerance in (("voxels", None, 0.0), ("mm", (0.625, 0.7, 1.25), 1e-6)):

        def ours(spacing: Any = spacing) -> list[dict[str, float]]:
            return [case_metrics(*pair, spacing) for pair in masks]

        def plain(spacing: Any = spacing) -> list[dict[str, float]]:
            return [yardstick().calculate_metric_percase(*pair, spacing) for pair in masks]

        def difference(ours: Any = ours, plain: Any = plain) -> float:
            pairs = zip(ours(), plain(), strict=True)
            return max(abs(found[name] - expected[name]) for found, expected in pairs for name in expected)

        yield Work(
            f"metrics in {unit}",
            f"{cases} cases of {sides(volume)}",
            ours,
            plain,
            difference,
            goal,
            tolerance=tolerance,
        )


def published_check(size: Size, volume: Sequence[int], cases: int, device: torch.device) -> Work:
    """Decoder 1's mean Dice over some cases, as the published protocol measures it during training."""
    pair = Pair(size, device)
    pair.plain.eval()
    stored = [make_case(volume, number=n) for n in range(cases)]
    stride = pair.method.settings.stride

    def plain() -> float:
        dice = []
        for case in stored:
            first, _ = yardstick().test_single_case(pair.plain, case.image[0], size.patch, stride, size.classes)
            predicted, reference = np.argmax(first, axis=0) == 1, case.label == 1
            dice.append(2 * (predicted & reference).sum() / (predicted.sum() + reference.sum()))
        return float(np.mean(dice))

    def difference() -> float:
        with exact():
            return abs(check_dice(pair.method, stored, device, FLOAT32) - plain())

    return Work(
        "published check",
        f"{cases} cases of {sides(volume)}",
        lambda: check_dice(pair.method, stored, device, pair.precision),
        plain,
        difference,
    )


def growth(base: Size, quick: bool, device: torch.device) -> Iterator[tuple[str, float, Work]]:
    """(what grows, its value, work): the step over patch, batch, decoders and classes; the check over cases."""
    three = ("deconv", "nearest", "trilinear")
    patches = [(32, 16, 16), (32, 32, 16)] if quick else [(32, 32, 32), (48, 48, 32), (64, 64, 48), (80, 80, 64)]
    sizes = {
        "patch": [(prod(patch), replace(base, patch=patch)) for patch in patches],
        "batch": [(2 * n, replace(base, batch=(n, n))) for n in ((1, 2) if quick else (1, 2, 4))],
        "decoders": [(k, replace(base, upsamplings=three[:k])) for k in ((2, 3) if quick else (1, 2, 3))],
        "classes": [(c, replace(base, classes=c)) for c in ((2, 3) if quick else (2, 3, 5, 9))],
    }
    for what, points in sizes.items():
        for value, size in points:
            yield what, value, training_step(size, device)
    volume = tuple(side * 3 // 2 for side in base.patch)
    for cases in (1, 2) if quick else (1, 2, 4):
        yield "cases", cases, published_check(base, volume, cases, device)
