"""One step of training, and how a GPU repeats it.

A step of MLRPL starts about a thousand kernels, which takes the processor longer than they take a GPU. They are the
same in every iteration, so a GPU records them once, as a CUDA graph, and from then on one call starts them all. What
differs from one iteration to the next lies in tensors that stay where they are: the batch, the learning rate and the
numbers of the method's schedule, such as β; PyTorch hands each replay the state of its random generator.
"""

import os
from collections import deque
from typing import Any

import torch
from torch import Tensor

from mlrpl.data import Batch
from mlrpl.errors import StudyError
from mlrpl.memory import is_exhaustion
from mlrpl.methods import Method, Step
from mlrpl.precision import Precision

STEPS_AHEAD = 3
WARM_UP = 3  # steps before the recording: in them kernels are compiled, chosen and loaded
SWITCH = "MLRPL_REPLAY"  # in the environment; 0: no step is recorded


class RecordedStep(Step):
    """A step whose scheduled numbers alone can be seen: all else would stay as it was when the step was recorded."""

    def __getattribute__(self, name: str) -> Any:
        """Raises StudyError for anything that changes with the iteration."""
        if name in ("iteration", "iterations", "generator"):
            raise StudyError(
                f"a replayable method reads step.{name}, which a recording would freeze: "
                "take it from its schedule, or set replayable = False"
            )
        return super().__getattribute__(name)


def optimise(
    method: Method,
    batch: Batch,
    step: Step,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: Precision,
) -> dict[str, Tensor]:
    """One step of training on a batch that is on the method's device.

    Returns:
        The method's terms, still on the device: nothing here waits for a GPU (but float16's scaler, which must).
    """
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(batch.image.device.type, dtype=precision.dtype, enabled=precision.reduced):
        terms = checked(method, method.loss(batch, step))
    scaler.scale(terms["total"]).backward()
    scaler.step(optimizer)
    scaler.update()
    method.after_step(step)
    return {name: value.detach() for name, value in terms.items()}


def checked(method: Method, terms: Any) -> dict[str, Tensor]:
    """A method's terms as they are; StudyError unless they are scalar tensors, "total" among them."""
    if not isinstance(terms, dict) or "total" not in terms:
        found = ", ".join(map(str, terms)) if isinstance(terms, dict) else type(terms).__name__
        raise StudyError(f'{type(method).__name__}.loss must return a dict of terms with "total"; it returned {found}')
    for name, value in terms.items():
        if not isinstance(value, Tensor) or value.dim():
            what = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise StudyError(f"{type(method).__name__}.loss: {name!r} is {what}, not a scalar tensor")
    return terms


def make_optimizer(method: Method) -> torch.optim.SGD:
    """Stochastic gradient descent over the method's trainable parameters, with its settings.

    On a GPU it is one kernel, which reads its learning rate there.
    """
    settings = method.settings
    parameters = [p for p in method.parameters() if p.requires_grad]
    gpu = parameters[0].is_cuda
    rate = torch.tensor(settings.learning_rate, device=parameters[0].device) if gpu else settings.learning_rate
    return torch.optim.SGD(
        parameters, rate, settings.momentum, weight_decay=settings.weight_decay, fused=True if gpu else None
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate, where the optimizer keeps it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def restore(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Take momenta over from the state of an optimizer of another device, too; the settings stay."""
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state["state"]})


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device; from pinned memory the copy is not waited for."""
    return Batch(batch.image.to(device, non_blocking=True), batch.label.to(device, non_blocking=True))


class Optimisation:
    """Steps of one method on one device: `optimise`, recorded and replayed where that can be.

    It can be on a GPU, with a method that says so (`Method.replayable`), but not in float16, whose scaler waits. With
    MLRPL_REPLAY=0 in the environment nothing is recorded.

    Args:
        method: on its device.
        optimizer: its own.
        scaler: enabled for float16.
        precision: to train in.
        device: where.

    Attributes:
        replays: whether steps are recorded here.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        precision: Precision,
        device: torch.device,
    ) -> None:
        self.method, self.optimizer, self.scaler, self.precision = method, optimizer, scaler, precision
        self.device = device
        wanted = os.getenv(SWITCH, "1") != "0"
        self.replays = device.type == "cuda" and method.replayable and not scaler.is_enabled() and wanted
        self.graph: torch.cuda.CUDAGraph | None = None
        self.steps = 0
        self.begun: deque[torch.cuda.Event] = deque()  # ends of the latest steps

    def __call__(self, batch: Batch, step: Step, observed: bool = False) -> dict[str, Tensor]:
        """One step on a batch that `training.stage` has made ready; returns its terms, still on the device.

        A step that is `observed`, by hooks on the network, is not replayed: a replay calls no module.
        """
        if self.device.type != "cuda":
            return self._optimise(to_device(batch, self.device), step)
        # The processor, which may have little to do, does not run ahead of the GPU by more than this, since each batch
        # that waits to be copied holds memory.
        if len(self.begun) == STEPS_AHEAD:
            self.begun.popleft().synchronize()
        terms = self._on_gpu(batch, step, observed)
        self.begun.append(torch.cuda.Event(blocking=True))
        self.begun[-1].record(torch.cuda.current_stream(self.device))
        return terms

    def _on_gpu(self, batch: Batch, step: Step, observed: bool) -> dict[str, Tensor]:
        if not self.replays:
            return self._optimise(to_device(batch, self.device), step)
        if self.steps == 0:
            self.batch = to_device(batch, self.device)
            self.scheduled = {name: torch.zeros((), device=self.device) for name in self.method.schedule(step)}
            self.stream = torch.cuda.Stream(self.device)
        else:
            self.batch.image.copy_(batch.image, non_blocking=True)
            self.batch.label.copy_(batch.label, non_blocking=True)
        for name, value in self.method.schedule(step).items():
            self.scheduled[name].fill_(value)
        recorded = RecordedStep(step.iteration, step.iterations, step.generator, self.scheduled)
        self.steps += 1
        if observed or self.steps <= WARM_UP:
            return self._beside(recorded)
        if self.graph is None:
            self._record(recorded)
        self.graph.replay()
        return dict(zip(self.terms, torch.stack(list(self.terms.values())).unbind(), strict=True))  # copies

    def _optimise(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        return optimise(self.method, batch, step, self.optimizer, self.scaler, self.precision)

    def _beside(self, step: Step) -> dict[str, Tensor]:
        """Autograd remembers the stream in which a parameter was first used; the recording needs one of its own."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            terms = self._optimise(self.batch, step)
        current.wait_stream(self.stream)
        return terms

    def _record(self, step: Step) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        # Threads that crop the next batches pin memory meanwhile: only this thread's calls are part of the recording.
        # Before it PyTorch waits for the current GPU, which need not be this one.
        try:
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"),
            ):
                self.terms = self._optimise(self.batch, step)
        except RuntimeError as error:
            if is_exhaustion(error):
                raise
            raise StudyError(
                f"a step of {type(self.method).__name__} cannot be recorded ({str(error).splitlines()[0]}): "
                "set replayable = False"
            ) from error
