"""The methods: golden losses and gradients, SS-Net's parts by hand, teachers, and what all methods must keep to."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mlrpl.config import Run, Settings, load_study
from mlrpl.data import Batch, Batches, Case
from mlrpl.data.phantom import draw
from mlrpl.methods import METHODS, Method, Step, as_read, build, volumes_a_step
from mlrpl.methods.acmt import ambiguity_threshold, ambiguous_consistency
from mlrpl.methods.cct import cross_consistency, feature_drop, feature_dropout, feature_noise
from mlrpl.methods.mcnet import mutual_consistency, sharpen
from mlrpl.methods.parts import (
    Selector,
    adversarial_direction,
    frozen_statistics,
    input_noise,
    soft_dice_distance,
    student_share,
    unit,
    update_average,
)
from mlrpl.methods.ssnet import MEMORIES, RADIUS, WIDTH, ClassMemory
from mlrpl.methods.uamt import certainty_threshold, masked_consistency
from mlrpl.methods.urpc import pyramid_consistency
from mlrpl.networks import Encoder, VNet, count_parameters
from mlrpl.optimisation import make_optimizer, optimise
from mlrpl.precision import Precision, worst_layer
from mlrpl.reliability import entropy
from mlrpl.training import seed_iteration

DATA = Path(__file__).parent / "data"
CPU = torch.device("cpu")
PATCH = (32, 16, 16)
SEMI_SUPERVISED = tuple(name for name, method in METHODS.items() if method.uses_unlabelled)
MEAN_TEACHERS = ("uamt", "acmt")

semi_supervised = pytest.mark.parametrize("name", SEMI_SUPERVISED)


def make(name: str, classes: int = 2, channels: int = 1, **settings: object) -> Method:
    """A tiny method, always initialised alike; β is large enough for its unsupervised term to matter."""
    chosen = Settings(**{"patch": PATCH, "filters": 2, "iterations": 10, "beta_max": 100.0, **settings})
    run = Run(study="t", variant="t", method=name, title="t", labelled=1, seed=0, settings=chosen)
    seed_iteration(0, 0, CPU)
    return build(run, channels, classes)


def make_batch(classes: int = 2, channels: int = 1, seed: int = 0, patch: tuple[int, ...] = PATCH) -> Batch:
    """Blobs of every class in noise, two labelled and two unlabelled volumes."""
    generator = torch.Generator().manual_seed(seed)
    fields = torch.randn(4, classes, *(side // 4 for side in patch), generator=generator)
    label = nn.functional.interpolate(fields, patch, mode="trilinear").argmax(1)
    image = label.unsqueeze(1) + 0.3 * torch.randn(4, channels, *patch, generator=generator)
    return Batch(image, label[:2])


def sgd(method: Method) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.01, 0.9, weight_decay=1e-4)


def train_step(method: Method, optimizer: torch.optim.SGD, batch: Batch, iteration: int) -> dict[str, Tensor]:
    step = Step(iteration, method.settings.iterations, seed_iteration(0, iteration, CPU))
    optimizer.zero_grad(set_to_none=True)
    terms = method.loss(batch, step)
    terms["total"].backward()
    optimizer.step()
    method.after_step(step)
    return terms


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def running_statistics(network: nn.Module) -> dict[str, Tensor]:
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {name: buffer.clone() for name, buffer in network.named_buffers() if name.endswith(names)}


# --- golden values ---------------------------------------------------------------------------------------------------


def golden(name: str) -> dict[str, Tensor]:
    with np.load(DATA / f"{name}.npz") as arrays:
        return {key: torch.as_tensor(arrays[key]) for key in arrays.files}


def assert_golden(ours: Tensor | float, expected: Tensor) -> None:
    """To a relative 1e-5 of the largest value."""
    error = (torch.as_tensor(ours).double() - expected.double()).abs().max()
    assert error <= 1e-5 * expected.double().abs().max()


@pytest.mark.parametrize(
    ("name", "consistency"),
    [
        ("urpc", pyramid_consistency),
        ("cct", cross_consistency),
        ("mcnet", mutual_consistency),
        ("mcnet_plus", mutual_consistency),
    ],
)
def test_consistency_of_several_outputs_is_golden(name: str, consistency: Callable[..., Tensor]) -> None:
    values = golden(name)
    logits = values["logits"].requires_grad_()
    loss = consistency(list(logits))  # MC-Net: with its own temperature
    loss.backward()
    assert_golden(loss.detach(), values["consistency"])
    assert_golden(logits.grad, values["grad_logits"])


def test_uamt_is_golden() -> None:
    values = golden("uamt")
    student = values["student"].requires_grad_()
    uncertainty = entropy(values["mc_logits"].softmax(2).mean(0))
    threshold = certainty_threshold(int(values["iteration"]), int(values["iterations"]), 2)
    loss = masked_consistency(student, values["teacher"].softmax(1), uncertainty, threshold)
    loss.backward()
    assert_golden(uncertainty.unsqueeze(1), values["uncertainty"])
    assert_golden(threshold, values["threshold"])
    assert_golden(loss.detach(), values["consistency"])
    assert_golden(student.grad, values["grad_student"])


def test_acmt_is_golden() -> None:
    values = golden("acmt_entropy")
    student = values["student"].requires_grad_()
    threshold = ambiguity_threshold(int(values["iteration"]), int(values["iterations"]))
    loss = ambiguous_consistency(student, values["teacher"].softmax(1), threshold)
    loss.backward()
    assert_golden(threshold, values["threshold"])
    assert_golden(loss.detach(), values["consistency"])
    assert_golden(student.grad, values["grad_student"])


def test_extreme_logits_stay_finite() -> None:
    logits = (200 * torch.randn(4, 2, 3, 4, 4, 4)).requires_grad_()
    for consistency in (pyramid_consistency, cross_consistency, mutual_consistency):
        (gradient,) = torch.autograd.grad(consistency(list(logits)), logits)
        assert gradient.isfinite().all()


def test_sharpening_is_the_published_one() -> None:
    z = torch.randn(2, 2, 3, 3, 3)
    p = z.softmax(1)
    torch.testing.assert_close(sharpen(z, 0.1), p**10 / (p**10 + (1 - p) ** 10))


# --- mean teachers ---------------------------------------------------------------------------------------------------


def test_first_update_copies_then_the_factor_is_bounded() -> None:
    teacher, student = (VNet(filters=2, upsamplings=("deconv",)) for _ in range(2))
    buffers = running_statistics(teacher)
    update_average(teacher, student, student_share(0))
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))
    for t, factor in ((1, 0.5), (4, 0.8), (99, 0.99), (5000, 0.99)):
        before = [p.clone() for p in teacher.parameters()]
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn_like(p))
        update_average(teacher, student, student_share(t))
        for average, old, new in zip(teacher.parameters(), before, student.parameters(), strict=True):
            torch.testing.assert_close(average, factor * old + (1 - factor) * new, atol=1e-6, rtol=1e-5)
    assert same(running_statistics(teacher), buffers)


@pytest.mark.parametrize("name", MEAN_TEACHERS)
def test_teacher_follows_the_student_and_never_receives_gradients(name: str) -> None:
    method = make(name)
    optimizer = sgd(method)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not any(p.requires_grad or id(p) in held for p in method.teacher.parameters())
    assert count_parameters(method) == count_parameters(method.network)
    batch = make_batch()
    for iteration, factor in ((1, 0.0), (2, 0.5)):
        before = [p.clone() for p in method.teacher.parameters()]
        train_step(method, optimizer, batch, iteration)
        assert all(p.grad is None for p in method.teacher.parameters())
        for average, old, new in zip(method.teacher.parameters(), before, method.network.parameters(), strict=True):
            torch.testing.assert_close(average, factor * old + (1 - factor) * new)
    assert method.teacher.training and not method.eval().teacher.training


@pytest.mark.parametrize(("name", "passes"), [("uamt", 1 + 4), ("acmt", 1)])
def test_teacher_sees_noisy_unlabelled_volumes_alone(name: str, passes: int) -> None:
    method, batch = make(name), make_batch()
    seen: list[Tensor] = []
    method.teacher.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    student = running_statistics(method.network)
    method.loss(batch, Step(1, 10, seed_iteration(0, 1, CPU)))
    assert len(seen) == passes
    unlabelled = batch.image[2:]
    noises = []
    for image in seen:
        assert image.shape[0] in (2, 4)
        noise = (image - unlabelled.repeat(len(image) // 2, 1, 1, 1, 1)).split(2)
        noises += noise
        assert all(0 < n.abs().max() < 0.2 + 1e-5 and n.std() > 0.05 for n in noise)
    assert not any(torch.equal(a, b) for i, a in enumerate(noises) for b in noises[:i])
    after = running_statistics(method.network)
    assert all(after[n] == student[n] + 1 for n in after if n.endswith("num_batches_tracked"))  # one student pass


def test_input_noise_is_clamped_normal() -> None:
    noise = input_noise(torch.zeros(50_000))
    assert noise.abs().max() == pytest.approx(0.2)
    assert (noise.abs() < 0.1).float().mean() == pytest.approx(0.683, abs=0.01)


# --- perturbations ---------------------------------------------------------------------------------------------------


def test_feature_noise_is_shared_by_the_volumes() -> None:
    features = torch.rand(3, 4, 6, 6, 6) + 1
    factor = feature_noise(features) / features
    torch.testing.assert_close(factor[0], factor[2])
    assert factor.min() >= 0.7 - 1e-5 and factor.max() <= 1.3 + 1e-5 and factor.std() > 0.1


def test_feature_drop_zeroes_the_most_active_voxels() -> None:
    features = torch.rand(2, 3, 8, 8, 8) * torch.tensor([1.0, 50.0]).view(2, 1, 1, 1, 1)  # each by its own largest
    dropped = feature_drop(features)
    attention = features.mean(1, keepdim=True)
    share = attention / attention.amax((2, 3, 4), keepdim=True)
    kept = (dropped != 0).all(1, keepdim=True)
    assert torch.equal(dropped, features * kept)
    assert not kept[share >= 0.9].any() and kept[share < 0.7].all()
    assert share[kept].max() <= share[~kept].min()  # one factor for all volumes of the level


def test_feature_dropout_is_element_wise() -> None:
    features = torch.ones(2, 3, 8, 8, 8)
    kept = feature_dropout(features) > 0
    assert kept.float().mean() == pytest.approx(0.7, abs=0.03)
    assert all(0.5 < channel.float().mean() < 0.9 for channel in kept.flatten(0, 1))


def test_cct_perturbs_all_maps_of_the_auxiliaries_and_none_of_the_main_decoder() -> None:
    method, batch = make("cct"), make_batch()
    maps: list[list[Tensor]] = []
    for decoder in method.network.decoders:
        decoder.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    encoded: list[list[Tensor]] = []
    method.network.encoder.register_forward_hook(lambda *values: encoded.append(values[2]))
    method.network(batch.image)
    assert len(encoded) == 1 and len(maps) == 4 and all(len(levels) == 5 for levels in maps)
    assert all(torch.equal(ours, plain) for ours, plain in zip(maps[0], encoded[0], strict=True))
    for levels in maps[1:]:
        assert not any(torch.equal(ours, plain) for ours, plain in zip(levels, encoded[0], strict=True))


# --- SS-Net ----------------------------------------------------------------------------------------------------------


def plain_contrast(selectors: tuple[nn.Module, nn.Module], features: Tensor, memory: Tensor) -> Tensor:
    """The contrast of one class, every pair formed, on short lists in place of masks."""

    def weights(selector: Selector, rows: Tensor) -> Tensor:
        hidden = selector.norm(selector.hidden(rows.detach()))  # the weights pass no gradient on to features
        scores = selector.score(nn.functional.leaky_relu(hidden, 0.2)).sigmoid().squeeze(1)
        return len(rows) * scores / scores.sum()

    cosine = torch.cosine_similarity(features[:, None], memory[None], dim=2)
    return ((1 - cosine) * weights(selectors[0], features)[:, None] * weights(selectors[1], memory)[None]).mean()


@pytest.fixture
def memory() -> ClassMemory:
    """Half full."""
    torch.manual_seed(1)
    memory = ClassMemory()
    with torch.no_grad():
        for p in memory.parameters():
            p.add_(0.3 * torch.randn_like(p))
    memory.features.normal_()
    memory.filled[: MEMORIES // 2] = True
    return memory


def test_contrast_and_its_gradient_equal_the_plain_all_pairs_form(memory: ClassMemory) -> None:
    features, member = torch.randn(60, WIDTH).requires_grad_(), torch.rand(60) < 0.4
    selectors = (memory.feature_selector, memory.memory_selector)
    ours = memory.contrast(features, member)
    plain = plain_contrast(selectors, features[member], memory.features[memory.filled])
    torch.testing.assert_close(ours, plain)
    inputs = [features, *memory.parameters()]
    for a, b in zip(*(torch.autograd.grad(loss, inputs) for loss in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_contrast_of_identical_features_is_zero_and_of_opposite_ones_two(memory: ClassMemory) -> None:
    one = torch.randn(WIDTH)
    memory.features[:] = one
    member = torch.arange(50) < 20
    assert memory.contrast(one.expand(50, -1), member).item() == pytest.approx(0, abs=1e-6)
    assert memory.contrast(-3 * one.expand(50, -1), member).item() == pytest.approx(2, abs=1e-5)


def test_contrast_needs_two_features_and_two_memories(memory: ClassMemory) -> None:
    features = torch.randn(60, WIDTH).requires_grad_()
    for members in (0, 1):
        loss = memory.contrast(features, torch.arange(60) < members)
        assert loss == 0
        assert (torch.autograd.grad(loss, features)[0] == 0).all()
    everything = torch.ones(60, dtype=torch.bool)
    assert memory.contrast(features, everything) > 0
    memory.filled[1:] = False
    assert memory.contrast(features, everything) == 0


def test_memory_holds_the_lowest_scores_of_the_members(memory: ClassMemory) -> None:
    rows, member = torch.randn(200, WIDTH), torch.arange(200) % 2 == 1
    memory.remember(rows, member)
    members = rows[member]
    with torch.no_grad():
        selector = memory.feature_selector
        hidden = selector.norm(selector.hidden(members))
        order = selector.score(nn.functional.leaky_relu(hidden, 0.2)).squeeze(1).argsort()
    assert memory.filled.all()
    torch.testing.assert_close(memory.features, members[order[:MEMORIES]])


def test_memory_keeps_all_of_few_members_and_the_old_where_there_are_none(memory: ClassMemory) -> None:
    rows, member = torch.randn(200, WIDTH), torch.arange(200) < 5
    memory.remember(rows, member)
    assert memory.filled.sum() == 5
    kept = {tuple(row.tolist()) for row in memory.features[memory.filled]}
    assert kept == {tuple(row.tolist()) for row in rows[:5]}
    before = {name: value.clone() for name, value in memory.state_dict().items()}
    memory.remember(torch.randn(200, WIDTH), torch.zeros(200, dtype=torch.bool))
    assert same(memory.state_dict(), before)
    reloaded = ClassMemory()
    reloaded.load_state_dict(before)
    assert torch.equal(reloaded.features, memory.features) and torch.equal(reloaded.filled, memory.filled)


def test_memory_is_of_correctly_predicted_foreground_projected_in_eval_mode() -> None:
    method, batch = make("ssnet", classes=3, filters=8), make_batch(classes=3)
    train_step(method, sgd(method), batch, 1)
    projection = copy.deepcopy(method.projection).eval()
    outputs: list[tuple[list[Tensor], list[Tensor]]] = []
    method.network.register_forward_hook(lambda *values: outputs.append(values[2]))
    method.loss(batch, Step(2, 10, seed_iteration(0, 2, CPU)))
    (logits,), (features,) = outputs[0]
    rows = features[:2].detach().permute(0, 2, 3, 4, 1)
    right = logits[:2].argmax(1) == batch.label
    assert method.projection.training
    assert len(method.memories) == 2  # none for the background
    for c, memory in enumerate(method.memories, start=1):
        candidates = projection(rows[right & (batch.label == c)])
        assert memory.filled.sum() == min(len(candidates), MEMORIES) > 1
        for row in memory.features[memory.filled]:
            assert (candidates - row).abs().amax(1).min() < 1e-5


def test_selector_weights_members_alone_and_sums_to_one() -> None:
    torch.manual_seed(0)
    selector, features, member = Selector(8), torch.randn(40, 8), torch.arange(40) < 15
    weights = selector(features, member)
    assert (weights[~member] == 0).all() and (weights[member] > 0).all()
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    torch.testing.assert_close(selector(features[:15], member[:15]), weights[:15])
    assert (selector(features, torch.zeros(40, dtype=torch.bool)) == 0).all()


def test_soft_dice_distance_by_hand() -> None:
    p, q = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1, 1), torch.tensor([0.5, 0.5]).view(1, 2, 1, 1, 1)
    assert soft_dice_distance(p, p) == pytest.approx(0)
    assert soft_dice_distance(p, q) == pytest.approx(0.5)
    assert soft_dice_distance(p, 1 - p) == pytest.approx(1)


def test_adversarial_direction_of_a_linear_distance_is_its_gradient() -> None:
    slope, image = torch.randn(2, 1, 4, 4, 4), torch.randn(2, 1, 4, 4, 4)
    direction = adversarial_direction(lambda x: (slope * x).sum(), image, RADIUS)
    torch.testing.assert_close(direction, unit(slope))


def test_adversarial_direction_is_of_unit_norm_and_raises_the_distance_more_than_a_random_one() -> None:
    torch.manual_seed(0)
    network = VNet(in_channels=2, filters=2, upsamplings=("deconv",), dropout=False)
    image = torch.randn(3, 2, 16, 16, 16)
    target = network(image)[0][0].detach().softmax(1)

    def distance(perturbed: Tensor) -> Tensor:
        return soft_dice_distance(network(perturbed)[0][0].softmax(1), target)

    direction = adversarial_direction(distance, image, RADIUS)
    torch.testing.assert_close(direction.flatten(1).norm(dim=1), torch.ones(3))
    assert not direction.requires_grad and all(p.grad is None for p in network.parameters())
    with torch.no_grad():
        adversarial = distance(image + RADIUS * direction)
        random = [distance(image + RADIUS * unit(torch.rand_like(image) - 0.5)) for _ in range(10)]
    assert adversarial > max(random)


def test_running_statistics_see_the_clean_passes_alone() -> None:
    method, batch = make("ssnet"), make_batch()
    before = running_statistics(method.network)
    with frozen_statistics(method.network):
        assert method.network.training
        method.network(batch.image)
    assert same(running_statistics(method.network), before)
    seen: list[bool] = []
    norm = next(module for module in method.network.modules() if isinstance(module, nn.BatchNorm3d))
    norm.register_forward_pre_hook(lambda *_: seen.append(norm.track_running_stats))
    seed_iteration(0, 1, CPU)
    method.smoothness(batch.image)
    assert seen == [True, False, False] and norm.track_running_stats
    clean = make("ssnet")
    seed_iteration(0, 1, CPU)
    with torch.no_grad():
        clean.network(batch.image)
    assert same(running_statistics(method.network), running_statistics(clean.network))


# --- all methods -----------------------------------------------------------------------------------------------------


@semi_supervised
def test_loss_of_three_classes_and_two_channels(name: str) -> None:
    method, batch = make(name, classes=3, channels=2), make_batch(classes=3, channels=2)
    assert batch.label.shape[0] == 2 and batch.image.shape[0] == 4
    terms = train_step(method, sgd(method), batch, 1)
    assert set(terms) == {"total", "supervised", "mutual", "beta", "pseudo_foreground", "dice"}
    assert all(value.dim() == 0 and value.isfinite() for value in terms.values())
    assert terms["beta"] == pytest.approx(method.beta(Step(1, 10, torch.Generator())))
    assert terms["mutual"] > 0
    idle = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


@semi_supervised
def test_total_is_weighted_as_stated(name: str) -> None:
    supervised, mutual = {"mcnet": (0.5, 1), "mcnet_plus": (0.5, 1), "mlrpl": (0.5, 1), "ssnet": (1, 1)}.get(
        name, (1, 0.1)
    )
    method = make(name)
    terms = method.loss(make_batch(), Step(1, 10, seed_iteration(0, 1, CPU)))
    expected = supervised * terms["supervised"] + mutual * terms["beta"] * terms["mutual"]
    torch.testing.assert_close(terms["total"], expected)


class SoftmaxInputs(TorchDispatchMode):
    """The types that softmax and log-softmax get."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._softmax.default, torch.ops.aten._log_softmax.default):
            self.types.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@semi_supervised
def test_probabilities_are_float32_under_autocast(name: str) -> None:
    """Logits may be bf16; what is rounded after the softmax, rounds every sum of the losses."""
    patch = (48, 32, 32)
    method = make(name, patch=patch)
    with torch.autocast("cpu", dtype=torch.bfloat16), SoftmaxInputs() as inputs:
        method.loss(make_batch(patch=patch), Step(1, 10, seed_iteration(0, 1, CPU)))
    assert inputs.types == {torch.float32}


class HostReads(TorchDispatchMode):
    """Operations for whose result or size the host would wait, were the tensors on a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        masks = any(index is not None and index.dtype == torch.bool for index in indices)
        if name in self.WAITING or masks:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@semi_supervised
def test_no_step_waits_for_a_gpu(name: str) -> None:
    method, batch = make(name).train(), make_batch()
    optimizer, scaler = make_optimizer(method), torch.amp.GradScaler("cpu", enabled=False)
    with HostReads() as reads:
        for iteration in (1, 2):  # the first makes teachers and memories
            step = Step(iteration, 10, seed_iteration(0, iteration, CPU))
            reads.seen.clear()  # of the generators' seeds
            optimise(method, batch, step, optimizer, scaler, Precision("float32"))
            assert reads.seen == []
        float(batch.image.sum())
        batch.image[batch.image > 0]
        assert reads.seen == ["_local_scalar_dense", "index"]


@semi_supervised
def test_bfloat16_reaches_every_parameter(name: str) -> None:
    patch = (48, 32, 32)
    method = make(name, patch=patch)
    batch = make_batch(patch=patch)
    step = Step(1, 10, seed_iteration(0, 1, CPU))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = method.loss(batch, step)
    assert all(value.dtype == torch.float32 for value in terms.values())
    terms["total"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_in_float16_goes_where_float32_goes(name: str) -> None:
    """As on a GPU without bf16: with the scaled loss no gradient overflows or is lost.

    The same within rounding, which batch normalisation magnifies: float16's cosine is 0.97 to 0.99 here.
    """
    patch = (32, 32, 32)  # at 32×16×16 rounding alone turns a step by up to 35 degrees
    batch = make_batch(patch=patch)
    batch = batch if METHODS[name].uses_unlabelled else Batch(batch.image[:2], batch.label)
    change = {}
    for precision in (Precision("float32"), Precision("float16")):
        method = make(name, patch=patch, beta_max=1.0)
        before = nn.utils.parameters_to_vector(method.parameters()).detach().clone()
        step = Step(1, 10, seed_iteration(0, 1, CPU))
        optimise(method, batch, step, make_optimizer(method), precision.scaler(CPU), precision)
        change[precision.name] = nn.utils.parameters_to_vector(method.parameters()).detach() - before
    assert nn.functional.cosine_similarity(change["float16"], change["float32"], dim=0) > 0.95
    assert change["float16"].norm() == pytest.approx(change["float32"].norm().item(), rel=0.1)


@semi_supervised
def test_resuming_is_bit_exact(name: str, tmp_path: Path) -> None:
    batches = {iteration: make_batch(classes=3, seed=iteration) for iteration in range(1, 5)}
    straight = make(name, classes=3)
    optimizer = sgd(straight)
    for iteration in (1, 2):
        train_step(straight, optimizer, batches[iteration], iteration)
    torch.save((straight.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    for iteration in (3, 4):
        train_step(straight, optimizer, batches[iteration], iteration)

    resumed = make(name, classes=3)
    again = sgd(resumed)
    state, optimizer_state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state)
    again.load_state_dict(optimizer_state)
    for iteration in (3, 4):
        train_step(resumed, again, batches[iteration], iteration)
    assert same(resumed.state_dict(), straight.state_dict())
    assert not same(state, straight.state_dict())
    image = batches[1].image
    with torch.no_grad():
        pairs = zip(*(m.eval().predict(image, m.outputs) for m in (resumed, straight)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@semi_supervised
def test_labels_of_unlabelled_cases_are_never_read(name: str) -> None:
    random = np.random.default_rng(0)
    labelled, *others = (
        Case(str(n), "train", random.normal(size=(1, 40, 20, 20)).astype(np.float32), None, (1, 1, 1)) for n in range(3)
    )
    label = (labelled.image[0] > 1).astype(np.uint8)
    labelled = Case("l", "train", labelled.image, label, (1, 1, 1))
    poisoned = [Case(c.id, "train", c.image, np.full((40, 20, 20), 255, np.uint8), c.spacing) for c in others]
    states = []
    for unlabelled in (others, poisoned):
        batches = Batches([labelled], unlabelled, PATCH, (), seed=0)
        method = make(name)
        optimizer = sgd(method)
        for iteration in (1, 2):
            train_step(method, optimizer, batches(iteration), iteration)
        states.append(method.state_dict())
    assert same(*states)


@pytest.mark.parametrize("name", METHODS)
def test_prediction_runs_what_it_needs_and_is_a_distribution(name: str) -> None:
    method = make(name, classes=3).eval()
    image = make_batch(classes=3).image
    ran: list[nn.Module] = []
    modules = [*method.network.decoders, *getattr(method.network, "coarse_heads", ())]
    for module in modules:
        module.register_forward_hook(lambda module, *_: ran.append(module))
    with torch.no_grad():
        everything = method.predict(image, method.outputs)
        ran.clear()
        (first,) = method.predict(image, ("decoder1",))
    single = ("vnet", "uamt", "acmt", "urpc", "cct", "ssnet")
    assert method.outputs == (("decoder1",) if name in single else ("decoder1", "mean"))
    if name == "urpc":  # its decoder's levels are taken without calling it as a whole
        assert ran == []
    else:
        assert ran == [method.network.decoders[0]]
    assert torch.equal(first, everything[0])
    assert first.shape == (4, 3, *PATCH) and first.dtype == torch.float32
    torch.testing.assert_close(first.sum(1), torch.ones(4, *PATCH))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_with_instance_normalisation(name: str) -> None:
    method = make(name, normalisation="instance")
    assert not [module for module in method.modules() if isinstance(module, nn.BatchNorm3d)]
    optimizer, batch = sgd(method), make_batch()
    if not method.uses_unlabelled:
        batch = Batch(batch.image[:2], batch.label)
    before = method.network.encoder.stages[0][0].weight.clone()
    for iteration in (1, 2):
        terms = train_step(method, optimizer, batch, iteration)
        assert all(torch.isfinite(term).all() for term in terms.values())
    assert not torch.equal(method.network.encoder.stages[0][0].weight, before)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_do_without_dropout_before_its_heads(name: str) -> None:
    method = make(name, head_dropout=False)
    bottlenecks = [encoder.dropout for encoder in method.modules() if isinstance(encoder, Encoder)]
    left = [module for module in method.modules() if isinstance(module, nn.Dropout3d) and module not in bottlenecks]
    assert all(isinstance(dropout, nn.Dropout3d) for dropout in bottlenecks)
    assert len(left) == (4 if name == "urpc" else 0)  # which has its own


@pytest.mark.parametrize("name", METHODS)
def test_network_suits_the_precision_check_and_refuses_other_patches(name: str) -> None:
    method = make(name)
    assert worst_layer(method.network, PATCH, 2, CPU, torch.float32)[0] == 0
    with pytest.raises(ValueError, match="divisible by 16"):
        method.network(torch.zeros(1, 1, 24, 16, 16))


def test_urpc_heads_are_at_four_scales() -> None:
    network = make("urpc", classes=3).network
    logits, features = network(torch.randn(2, 1, *PATCH))
    assert [z.shape for z in logits] == [(2, 3, *PATCH)] * 4
    assert [f.shape[2] for f in features] == [32, 16, 8, 4]
    assert [dropout.p for dropout in network.dropouts] == [0.1, 0.2, 0.3, 0.5]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_documented(name: str) -> None:
    module = inspect.getmodule(METHODS[name])
    assert module.__doc__ and METHODS[name].__doc__
    assert len(inspect.getsource(module).splitlines()) <= 130


def test_a_run_is_described_by_what_its_method_reads() -> None:
    (run, *_) = load_study("smoke").runs()
    settings = {name: as_read(run.model_copy(update={"method": name}))["settings"] for name in ("vnet", "mlrpl")}
    assert settings["mlrpl"] == run.settings.model_dump()
    assert settings["vnet"]["batch"] == (4, 0)
    assert set(settings["mlrpl"]) - set(settings["vnet"]) == {"beta_max", "ramp_iterations"}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_overfits_one_phantom(name: str) -> None:
    """The middle of one case, labelled and unlabelled at once: Dice above 0.95, the loss at most half of the first."""
    image, label = (array[16:48, 16:48, 12:28] for array in draw(np.random.default_rng(0), (64, 64, 40)))
    image = torch.as_tensor((image - image.mean()) / image.std(), dtype=torch.float32).expand(4, 1, -1, -1, -1)
    label = torch.as_tensor(label, dtype=torch.long).expand(4, -1, -1, -1)
    method = make(name, filters=8, iterations=150, beta_max=0.1, ramp_iterations=150)
    batch = Batch(image, label[:2] if method.uses_unlabelled else label)
    optimizer = sgd(method)
    optimizer.param_groups[0]["lr"] = 0.05
    supervised, dice = [], 0.0
    while dice <= 0.95 and len(supervised) < 150:
        supervised += [
            train_step(method, optimizer, batch, len(supervised) + 1)["supervised"].item() for _ in range(25)
        ]
        with torch.no_grad():
            predicted = method.eval().predict(image[:1], ("decoder1",))[0].argmax(1)
        method.train()
        dice = 2 * (predicted * label[:1]).sum().item() / (predicted + label[:1]).sum().item()
    assert dice > 0.95
    assert np.mean(supervised[-10:]) < supervised[0] / 2


@pytest.mark.parametrize(("name", "encoded", "decoded"), [
    ("vnet", 4, 4),
    ("uamt", 4 + 2 + 4 * 4, 22),  # student, target, four passes on the pair repeated twice
    ("urpc", 4, 4),
    ("cct", 4, 4 * 4),
    ("mcnet", 4, 4 * 2),
    ("mcnet_plus", 4, 4 * 3),
    ("ssnet", 4 * 4, 4 * 4),  # prediction, clean target, the direction's gradient, the perturbed volume
    ("acmt", 4 + 2, 6),
    ("mlrpl", 4, 4 * 2),
])  # fmt: skip
def test_volumes_of_a_step_are_those_of_the_method(name, encoded, decoded):
    (run, *_) = load_study("smoke").runs()
    before = torch.random.get_rng_state()
    assert volumes_a_step(run.model_copy(update={"method": name, "options": {}}), 1, 3) == (encoded, decoded)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("name", "batch"), [("mlrpl", (1, 0)), ("vnet", (1, 0)), ("uamt", (1, 1)), ("acmt", (2, 1))])
@pytest.mark.parametrize("normalisation", ["batch", "instance"])
def test_volumes_of_a_step_are_counted_for_the_smallest_batches_too(name, batch, normalisation):
    (run, *_) = load_study("smoke").runs()
    settings = run.settings.model_copy(update={"batch": batch, "normalisation": normalisation})
    encoded, _ = volumes_a_step(run.model_copy(update={"method": name, "options": {}, "settings": settings}), 1, 2)
    assert encoded >= 1
