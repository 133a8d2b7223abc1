"""A step that a GPU records: what may be recorded, and (where there is a GPU) that a replay is the step itself."""

import pytest
import torch
from test_methods import make, make_batch
from torch import Tensor

from mlrpl.data import Batch
from mlrpl.errors import StudyError
from mlrpl.methods import METHODS, Method, Step
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


def one_step(name: str, step: Step) -> tuple[dict[str, Tensor], list[Tensor]]:
    method = make(name).train()
    seed_iteration(0, 7, CPU)
    terms = optimise(method, batch_for(method), step, make_optimizer(method), no_scaler(), FLOAT32)
    return terms, list(method.parameters())


@pytest.mark.parametrize("name", REPLAYABLE)
def test_a_replayable_step_sees_beta_alone_and_is_the_same_step(name: str) -> None:
    usual = Step(7, 10, torch.Generator())
    beta = torch.tensor(make(name).beta(usual))
    terms, weights = one_step(name, usual)
    recorded_terms, recorded_weights = one_step(name, RecordedStep(7, 10, torch.Generator(), beta))
    assert terms.keys() == recorded_terms.keys()
    for term in terms:
        assert torch.allclose(terms[term], recorded_terms[term], rtol=1e-6)
    assert all(torch.allclose(w, b, atol=1e-6) for w, b in zip(weights, recorded_weights, strict=True))


def test_what_looks_at_the_iteration_is_not_replayable() -> None:
    for name in METHODS.keys() - REPLAYABLE - {"ssnet"}:
        with pytest.raises(StudyError, match="which a recording would freeze"):
            one_step(name, RecordedStep(7, 10, torch.Generator(), torch.tensor(1.0)))


def test_recorded_on_gpus_alone_and_not_where_a_scaler_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)

    def replays(name: str, device: torch.device, scaled: bool = False) -> bool:
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        method = make(name)
        return Optimisation(method, make_optimizer(method), scaler, FLOAT32, device).replays

    assert replays("mlrpl", GPU)
    assert not replays("mlrpl", CPU)
    assert not replays("mlrpl", GPU, scaled=True)
    assert not replays("uamt", GPU)
    monkeypatch.setenv(SWITCH, "0")
    assert not replays("mlrpl", GPU)


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


def trained(name: str, iterations: list[int], observed: int = -1, rate: float = 0.01) -> tuple[list[dict], Tensor]:
    """Terms of each step, and the weights after the last."""
    method = make(name).to(GPU).train()
    optimizer = make_optimizer(method)
    optimisation = Optimisation(method, optimizer, no_scaler(GPU), FLOAT32, GPU)
    found = []
    for iteration in iterations:
        step = Step(iteration, 1000, seed_iteration(0, iteration, GPU))
        set_rate(optimizer, rate / (1 + iteration % 3))
        batch = batch_for(method)
        batch.image.add_(0.01 * iteration)
        terms = optimisation(stage(batch, GPU), step, iteration == observed)
        found.append({term: value.item() for term, value in terms.items()})
    assert (optimisation.graph is not None) == optimisation.replays
    return found, torch.cat([p.detach().flatten().cpu() for p in method.parameters()])


@needs_gpu
@pytest.mark.parametrize("name", REPLAYABLE)
def test_replayed_a_run_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """β moves at 150 and 300, the rate and the batch at every step; an audited step comes between replays."""
    iterations = [146, 147, 148, 149, 150, 151, 299, 300]
    with exact():
        replayed, weights = trained(name, iterations, observed=151)
        monkeypatch.setenv(SWITCH, "0")
        usual, expected = trained(name, iterations)
    for ours, theirs in zip(replayed, usual, strict=True):
        for counted in {"dice", "pseudo_foreground"} & ours.keys():  # whole voxels, which rounding may turn
            assert ours.pop(counted) == pytest.approx(theirs.pop(counted), abs=2e-3)
        assert ours == pytest.approx(theirs, rel=2e-2, abs=1e-4)  # a GPU adds up in another order each time
    assert torch.allclose(weights, expected, atol=5e-3)


@needs_gpu
def test_each_replay_draws_its_own_dropout() -> None:
    (*_, first, other, again), _ = trained("mlrpl", [9] * (WARM_UP + 1) + [6, 9], rate=0.0)
    assert first["supervised"] != other["supervised"]
    iterations = [9] * (WARM_UP + 1) + [9]
    (*_, one, two), _ = trained("mlrpl", iterations, rate=0.0)
    assert one["supervised"] == pytest.approx(two["supervised"], rel=1e-5)
    assert again["supervised"] == pytest.approx(one["supervised"], rel=1e-5)
