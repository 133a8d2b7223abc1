"""What a method of one's own may do wrong, and is told before it trains for hours."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from mlrpl.config import Run, Settings
from mlrpl.data import Batch
from mlrpl.errors import StudyError
from mlrpl.methods import METHODS, Method, Step, build
from mlrpl.precision import Precision
from mlrpl.rehearsal import check_signature, rehearse, signature
from mlrpl.training import seed_iteration

CPU = torch.device("cpu")
PATCH = (32, 16, 16)


def settings() -> Settings:
    return Settings(patch=PATCH, stride=PATCH, filters=2, iterations=8)


def rehearsed(make, labelled: int = 2) -> None:
    def batch(iteration: int) -> Batch:
        generator = torch.Generator().manual_seed(iteration)
        image = torch.randn(4, 1, *PATCH, generator=generator)
        return Batch(image, torch.randint(2, (labelled, *PATCH), generator=generator))

    def made() -> Method:
        seed_iteration(0, 0, CPU)
        return make()

    def step(iteration: int) -> Step:
        return Step(iteration, 8, seed_iteration(0, iteration, CPU))

    rehearse(made, batch, step, Precision("float32"), CPU)


class Good(Method):
    """Its memory, its draws and its teacher's like are as they should be."""

    outputs = ("decoder1",)

    def __init__(self):
        super().__init__(settings(), 1, 2)
        self.network = self.make_network(("deconv",))
        self.register_buffer("memory", torch.zeros(3))
        self.scratch = None  # what lasts for a step alone is nobody's business

    def weight(self):
        return torch.rand(()) + np.random.rand() + random.random()  # noqa: NPY002

    def remembered(self, logits):
        kept = self.memory.sum()
        self.memory = self.memory.roll(1)
        self.memory[0] = logits.detach().mean()
        return kept

    def loss(self, batch, step):
        logits = self.network(batch.image)[0][0].float()
        self.scratch = logits.detach()
        return {"total": logits.square().mean() * (self.weight() + self.remembered(logits))}


class NotSaved(Good):
    def __init__(self):
        super().__init__()
        self.kept = torch.zeros(())

    def remembered(self, logits):
        before, self.kept = self.kept, logits.detach().mean()
        return before


class NotPersistent(Good):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.zeros(()), persistent=False)

    remembered = NotSaved.remembered


class Counting(Good):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def remembered(self, logits):
        self.calls += 1
        return self.calls


class OwnRandomness(Good):
    generator = np.random.default_rng()

    def weight(self):
        return self.generator.random()


class Growing(Good):
    def remembered(self, logits):
        self.memory = torch.cat([self.memory, logits.detach().mean()[None]])[-64:]
        return self.memory.sum()


class MadeLater(Good):
    def remembered(self, logits):
        if not hasattr(self, "head"):
            self.head = nn.Linear(1, 1)
        return self.head(logits.mean()[None]).sum()


class NotDetached(Good):
    kept = None

    def remembered(self, logits):
        before, self.kept = self.kept, logits.mean()
        return before if before is not None else 0


class KeepsAGraph(Good):
    """It reaches no activation, but parameters that the optimiser has changed."""

    kept = None

    def remembered(self, logits):
        before, self.kept = self.kept, next(self.parameters()).square().sum()
        return before if before is not None else 0


class MadeInTheSecond(Good):
    def remembered(self, logits):
        self.calls = getattr(self, "calls", 0) + 1
        return MadeLater.remembered(self, logits) if self.calls > 1 else 0


class NotFinite(Good):
    def weight(self):
        return torch.nan


class Lazy(Good):
    def __init__(self):
        super().__init__()
        self.head = nn.LazyLinear(2)


class WithMoreState(Good):
    """State that is no tensor is read from the checkpoint, and a part stays in evaluation mode as it was set."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.frozen = nn.BatchNorm3d(2).eval()

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]

    def remembered(self, logits):
        self.calls += 1
        return self.calls + self.frozen(logits).mean()


class ReadsTheIteration(Good):
    replayable = True

    def weight(self):
        return 1.0

    def loss(self, batch, step):
        return {"total": super().loss(batch, step)["total"] * step.iteration}


class TrainedTeacher(Good):
    """Its moving average is not frozen, and its pass has gradients: the optimizer trains it, too."""

    frozen = False

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.network).requires_grad_(not self.frozen)

    def remembered(self, logits):
        return (self.teacher(torch.ones(1, 1, *PATCH))[0][0].float() - logits).square().mean()

    @torch.no_grad()
    def after_step(self, step):
        for mine, theirs in zip(self.teacher.parameters(), self.network.parameters(), strict=True):
            mine.lerp_(theirs, 0.1)


class FrozenTeacher(TrainedTeacher):
    frozen = True


class Clipping(Good):
    @torch.no_grad()
    def after_step(self, step):
        for parameter in self.parameters():
            parameter.clamp_(-0.01, 0.01)


class OneTensor(Good):
    def __init__(self):
        super().__init__()
        self.network = nn.Conv3d(1, 2, 3, padding=1)

    def loss(self, batch, step):
        return {"total": self.network(batch.image).square().mean()}


class Predicting(Good):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def predict(self, image, outputs):
        return self.change(super().predict(image, outputs))


@pytest.mark.parametrize("make", [Good, WithMoreState, FrozenTeacher, Clipping])
def test_what_is_as_it_should_be_passes(make):
    rehearsed(make)


@pytest.mark.parametrize("name", METHODS)
def test_the_packages_own_methods_pass(name):
    """They are not asked in training; their like of one's own would be."""
    run = Run(study="s", variant=name, method=name, title=name, labelled=2, seed=0, settings=settings())
    rehearsed(lambda: build(run, 1, 2), METHODS[name].batch_sizes(run.settings)[0])


@pytest.mark.parametrize(("make", "said"), [
    (NotSaved, "NotSaved: a run that is killed would go on differently"),
    (NotPersistent, "NotPersistent: a run that is killed would go on differently"),
    (Counting, "Counting: a run that is killed would go on differently"),
    (OwnRandomness, "OwnRandomness: a run that is killed would go on differently"),
    (Growing, r"Growing: 'memory' was \(3,\) when it was built and is \(4,\)"),
    (MadeLater, "MadeLater: 'head.bias' is new since it was built"),
    (NotDetached, "NotDetached: its second step goes back through the first; detach what a step keeps"),
    (KeepsAGraph, "KeepsAGraph: its second step goes back through the first; detach what a step keeps"),
    (MadeInTheSecond, "MadeInTheSecond: 'head.bias' is new since it was built"),
    (NotFinite, "NotFinite: the loss is nan in its first steps; look at the method's loss"),
    (Lazy, "Lazy: 'head.weight' has no size yet: no lazy modules"),
    (ReadsTheIteration, "a replayable method reads step.iteration, which a recording would freeze"),
    (TrainedTeacher, "TrainedTeacher: after_step changes 'teacher.*', which the optimizer trains, too: "),
    (OneTensor, "OneTensor.network gives no two lists, .*: write OneTensor.predict; its docstring in "),
    (lambda: Predicting(lambda p: p[0]), r"Predicting.predict\(image .*\) gives a Tensor, not a list of tensors"),
    (lambda: Predicting(lambda p: [0.5]), "gives a list of float, not of tensors"),
    (lambda: Predicting(lambda p: p * 2), r"predict\(image \(2, 1, 32, 16, 16\), \('decoder1',\)\) gives 2 tensors"),
    (lambda: Predicting(lambda p: [p[0][:1]]), r"gives \(1, 2, 32, 16, 16\), not \(2, 2, 32, 16, 16\)"),
    (lambda: Predicting(lambda p: [p[0] / 0]), "gives numbers that are not finite"),
    (lambda: Predicting(lambda p: [p[0][..., ::2]]), r"gives \(2, 2, 32, 16, 8\), not "),
    (lambda: Predicting(lambda p: [p[0].log()]), "gives numbers below 0 or no fractions: .* not logits or labels"),
    (lambda: Predicting(lambda p: [p[0] * 2]), "gives what does not sum to 1 over the classes"),
])  # fmt: skip
def test_what_would_fail_later_is_told_in_one_line(make, said):
    with pytest.raises(StudyError, match=said) as error:
        rehearsed(make)
    assert "\n" not in str(error.value)


def test_a_buffer_that_changes_its_shape_later_is_told_at_the_checkpoint():
    method = Good()
    built = signature(method)
    check_signature(method, built)
    del method.memory
    with pytest.raises(StudyError, match="Good: 'memory' is gone"):
        check_signature(method, built)
