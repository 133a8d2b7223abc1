"""A step that a GPU records: what may be recorded, and (where there is a GPU) that a replay is the step itself."""

import pytest
import torch
from test_methods import make, make_batch
from torch import Tensor

from mlrpl.data import Batch
from mlrpl.errors import StudyError
from mlrpl.methods import METHODS, Method, Step
from mlrpl.methods.vnet import SupervisedVNet
from mlrpl.optimisation import SWITCH, WARM_UP, Optimisation, RecordedStep, make_optimizer, optimise, restore, set_rate
from mlrpl.precision import Precision, exact
from mlrpl.training import seed_iteration, stage

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FLOAT32 = Precision("float32")
REPLAYABLE = [name for name, method in METHODS.items() if method.replayable]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def no_scaler(device: torch.device = CPU) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device.type, enabled=False)


def batch_for(method: Method) -> Batch:
    batch = make_batch()
    return batch if method.uses_unlabelled else Batch(batch.image[:2], batch.label)


def one_step(method: Method, step: Step) -> tuple[dict[str, Tensor], list[Tensor]]:
    seed_iteration(0, 7, CPU)
    terms = optimise(method, batch_for(method), step, make_optimizer(method), no_scaler(), FLOAT32)
    return terms, list(method.parameters())


@pytest.mark.parametrize("name", REPLAYABLE)
def test_a_replayable_step_sees_scheduled_numbers_alone_and_is_the_same_step(name: str) -> None:
    usual = Step(7, 10, torch.Generator())
    terms, weights = one_step(make(name).train(), usual)
    numbers = {key: torch.tensor(value) for key, value in make(name).schedule(usual).items()}
    recorded_terms, recorded_weights = one_step(make(name).train(), RecordedStep(7, 10, torch.Generator(), numbers))
    assert terms.keys() == recorded_terms.keys()
    for term in terms:
        assert torch.allclose(terms[term], recorded_terms[term], rtol=1e-6)
    assert all(torch.allclose(w, b, atol=1e-6) for w, b in zip(weights, recorded_weights, strict=True))


class Fading(SupervisedVNet):
    """Looks at the iteration, which its schedule should tell."""

    def loss(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        return {name: value / step.iteration for name, value in super().loss(batch, step).items()}


def test_what_looks_at_the_iteration_cannot_be_recorded() -> None:
    method = Fading(make("vnet").settings, 1, 2).train()
    one_step(method, Step(7, 10, torch.Generator()))
    with pytest.raises(StudyError, match="which a recording would freeze"):
        one_step(method, RecordedStep(7, 10, torch.Generator(), method.schedule(Step(7, 10, torch.Generator()))))


def test_each_number_that_a_method_schedules_moves_with_the_iteration() -> None:
    for name in REPLAYABLE:
        first, later = (make(name, iterations=1000).schedule(Step(k, 1000, torch.Generator())) for k in (2, 700))
        assert all(first[number] != later[number] for number in first)


def test_recorded_on_gpus_alone_and_not_where_a_scaler_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)

    def replays(method: Method, device: torch.device, scaled: bool = False) -> bool:
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        return Optimisation(method, make_optimizer(method), scaler, FLOAT32, device).replays

    method, unknown = make("mlrpl"), make("mlrpl")
    unknown.replayable = False
    assert replays(method, GPU)
    assert not replays(method, CPU)
    assert not replays(method, GPU, scaled=True)
    assert not replays(unknown, GPU)
    monkeypatch.setenv(SWITCH, "0")
    assert not replays(method, GPU)


@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
def test_the_rate_is_set_where_it_is_kept(rate: float | Tensor) -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], rate)
    set_rate(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5
    if isinstance(rate, Tensor):
        assert optimizer.param_groups[0]["lr"] is rate
    weight.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.full((3,), -0.5))


def test_momenta_are_restored_and_another_devices_settings_are_not() -> None:
    method = make("vnet").train()
    first = make_optimizer(method)
    step = Step(1, 10, seed_iteration(0, 1, CPU))
    optimise(method, batch_for(method), step, first, no_scaler(), FLOAT32)
    state = first.state_dict()
    state["param_groups"][0] |= {"fused": True, "lr": torch.tensor(0.25)}  # as a GPU's checkpoint holds them
    second = make_optimizer(method)
    restore(second, state)
    group = second.param_groups[0]
    assert not group["fused"] and group["lr"] == method.settings.learning_rate
    for old, new in zip(first.state.values(), second.state.values(), strict=True):
        assert torch.equal(old["momentum_buffer"], new["momentum_buffer"])


def trained(name: str, iterations: list[int], rates: list[float], observed: int = -1) -> tuple[list[dict], Tensor]:
    """Terms of each step, and the weights after the last."""
    method = make(name).to(GPU).train()
    optimizer = make_optimizer(method)
    optimisation = Optimisation(method, optimizer, no_scaler(GPU), FLOAT32, GPU)
    found = []
    for iteration, rate in zip(iterations, rates, strict=True):
        step = Step(iteration, 1000, seed_iteration(0, iteration, GPU))
        set_rate(optimizer, rate)
        batch = batch_for(method)
        batch.image.add_(0.01 * iteration)
        terms = optimisation(stage(batch, GPU), step, iteration == observed)
        found.append({term: value.item() for term, value in terms.items()})
    assert (optimisation.graph is not None) == optimisation.replays
    return found, torch.cat([p.detach().flatten().cpu() for p in method.parameters()])


@needs_gpu
@pytest.mark.parametrize("name", REPLAYABLE)
def test_replayed_a_run_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch and scheduled numbers move from step to step; an audited step comes between replays.

    Weights move (a teacher's by half and a fifth of the way) in the last two steps alone: a GPU adds up in another
    order each time, and after a few steps at a rate of 0.01 two usual runs of MLRPL are a hundredth apart.
    """
    iterations = [147, 148, 149, 150, 299, 300, 2, 5]
    rates = [0.0] * 6 + [1e-3, 2e-3]
    with exact():
        replayed, weights = trained(name, iterations, rates, observed=299)
        monkeypatch.setenv(SWITCH, "0")
        usual, expected = trained(name, iterations, rates)
    for ours, theirs in zip(replayed, usual, strict=True):
        for counted in {"dice", "pseudo_foreground"} & ours.keys():  # whole voxels, which rounding may turn
            assert ours.pop(counted) == pytest.approx(theirs.pop(counted), abs=2e-3)
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    moved = expected - torch.cat([p.detach().flatten() for p in make(name).parameters()])
    assert (weights - expected).norm() < 1e-2 * moved.norm()


@needs_gpu
def test_each_replay_draws_its_own_dropout() -> None:
    iterations = [9] * (WARM_UP + 1) + [6, 9]
    (*_, first, other, again), _ = trained("mlrpl", iterations, [0.0] * len(iterations))
    assert first["supervised"] != other["supervised"]
    iterations = [9] * (WARM_UP + 2)
    (*_, one, two), _ = trained("mlrpl", iterations, [0.0] * len(iterations))
    assert one["supervised"] == pytest.approx(two["supervised"], rel=1e-5)
    assert again["supervised"] == pytest.approx(one["supervised"], rel=1e-5)
