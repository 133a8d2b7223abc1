"""What a method of one's own promises, tried before it trains for hours.

A run that was killed goes on as if it had not been: so the second step is done twice, once after the first, once by a
method that was built anew and read the state after the first. On a CPU both must end alike, bit for bit; a GPU, where
two steps of one state differ anyway, must only be able to read that state. A prediction is made, too: the first check,
which needs one, may be an hour away. What is tried is thrown away; training begins as it would have.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from mlrpl.data import Batch
from mlrpl.errors import StudyError
from mlrpl.evaluation import evaluating
from mlrpl.methods import Method, Step
from mlrpl.optimisation import RecordedStep, make_optimizer, optimise, restore, to_device
from mlrpl.precision import Precision, computing
from mlrpl.words import counted

CLOSE = 1e-2  # probabilities of bf16 logits sum to 1 less exactly
KEPT_GRAPH = ("backward through the graph a second time", "modified by an inplace operation")  # as PyTorch says it

Signature = dict[str, tuple[int, ...] | None]


def signature(method: Method) -> Signature:
    """Names of what a checkpoint holds of a method, with the shapes of tensors.

    Raises:
        StudyError: for a module whose size is not known yet.
    """
    state = method.state_dict()
    if lazy := [name for name, value in state.items() if is_lazy(value)]:
        raise StudyError(f"{type(method).__name__}: {lazy[0]!r} has no size yet: no lazy modules, give it its size")
    return {name: tuple(value.shape) if isinstance(value, Tensor) else None for name, value in state.items()}


def check_signature(method: Method, built: Signature) -> None:
    """StudyError where parameters or buffers are others than when the method was built: no checkpoint can be read."""
    now, name = signature(method), type(method).__name__
    if new := now.keys() - built.keys():
        raise StudyError(
            f"{name}: {min(new)!r} is new since it was built: what comes about later is in no optimiser, and a "
            "checkpoint with it cannot be read; make it in __init__"
        )
    if gone := built.keys() - now.keys():
        raise StudyError(f"{name}: {min(gone)!r} is gone since it was built: a checkpoint without it cannot be read")
    for part, shape in now.items():
        if shape != built[part]:
            raise StudyError(
                f"{name}: {part!r} was {built[part]} when it was built and is {shape}: a checkpoint with it cannot be "
                "read; give it its full size in __init__"
            )


def rehearse(
    make: Callable[[], Method],
    batch: Callable[[int], Batch],
    step: Callable[[int], Step],
    precision: Precision,
    device: torch.device,
) -> None:
    """Two steps, a checkpoint and predictions of a method.

    Args:
        make: builds it, the same each time.
        batch: of an iteration, the same each time.
        step: of an iteration; seeds PyTorch's generators for it.
        precision: to compute in.
        device: where.

    Raises:
        StudyError: where going on after a kill would give other weights, or a prediction is not what evaluation needs.
    """
    method = make()
    name, built = type(method).__name__, signature(method)
    optimizer = make_optimizer(method)
    scaler = torch.amp.GradScaler(device.type, enabled=False)

    def do(iteration: int, method: Method, optimizer: torch.optim.Optimizer) -> Step:
        begun = step(iteration)
        prepared = to_device(batch(iteration), device)
        terms = optimise(method, prepared, _as_recorded(method, begun, device), optimizer, scaler, precision)
        if not terms["total"].isfinite():
            raise StudyError(
                f"{name}: the loss is {terms['total'].item()} in its first steps; look at the method's loss"
            )
        check_signature(method, built)
        return begun

    second = min(2, do(1, method, optimizer).iterations)
    state, momenta = copy.deepcopy(method.state_dict()), copy.deepcopy(optimizer.state_dict())
    _check_prediction(method, batch(1).image[:1].to(device), precision, device)
    try:
        do(second, method, optimizer)
    except RuntimeError as error:
        if not any(said in str(error) for said in KEPT_GRAPH):
            raise
        raise StudyError(f"{name}: its second step goes back through the first; detach what a step keeps") from None
    went_on = method.state_dict()
    del method, optimizer  # their memory is not the run's
    again = make()
    again.load_state_dict(state)
    optimizer = make_optimizer(again)
    restore(optimizer, momenta)
    begun = do(second, again, optimizer)
    if device.type == "cpu" and (other := _different(went_on, again.state_dict())):
        raise StudyError(
            f"{name}: a run that is killed would go on differently: {other[0]!r} is another after a checkpoint "
            f"({len(other)} of {len(state)} are); register as buffers what a step leaves to the next, and draw with "
            "torch, numpy or random alone"
        )
    if trained := _trained_twice(again, _as_recorded(again, begun, device)):
        raise StudyError(
            f"{name}: after_step changes {trained!r}, which the optimizer trains, too: a moving average is frozen, "
            "requires_grad_(False), or its passes are under torch.no_grad()"
        )


def _trained_twice(method: Method, step: Step) -> str:
    """Name of a parameter that has a gradient and is changed by `after_step` done once more; empty without any.

    What a projection changes, such as clipping weights, it does not change again.
    """
    before = {name: p.detach().clone() for name, p in method.named_parameters() if p.grad is not None}
    method.after_step(step)
    now = dict(method.named_parameters())
    return next((name for name, value in before.items() if not torch.equal(value, now[name])), "")


def _as_recorded(method: Method, step: Step, device: torch.device) -> Step:
    """What a GPU shows a replayable method of a step; all of it to others."""
    if not method.replayable:
        return step
    scheduled = {name: torch.tensor(value, device=device) for name, value in method.schedule(step).items()}
    return RecordedStep(step.iteration, step.iterations, step.generator, scheduled)


def _different(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Names of what differs; NaN is like NaN."""

    def same(a: Any, b: Any) -> bool:
        return bool(((a == b) | (a != a) & (b != b)).all()) if isinstance(a, Tensor) else a == b

    return [name for name, value in ours.items() if not same(value, theirs[name])]


def _check_prediction(method: Method, image: Tensor, precision: Precision, device: torch.device) -> None:
    """StudyError unless `predict` gives what its docstring says, of two volumes; as checks ask and as tests do."""
    images = image.expand(2, *image.shape[1:]).contiguous(memory_format=torch.channels_last_3d)
    for outputs in dict.fromkeys([("decoder1",), tuple(method.outputs)]):
        with evaluating(method), torch.inference_mode(), computing(device, precision), _own_predict_asked_for(method):
            predicted = method.predict(images, outputs)
        if found := _wrong(predicted, outputs, (2, method.num_classes, *image.shape[2:])):
            asked = f"predict(image {tuple(images.shape)}, {outputs})"
            raise StudyError(f"{type(method).__name__}.{asked} gives {found}")


@contextmanager
def _own_predict_asked_for(method: Method) -> Iterator[None]:
    """StudyError where `Method.predict` fails because the network is of another kind than `mlrpl.networks.VNet`."""
    try:
        yield
    except (TypeError, ValueError, AttributeError) as error:
        if type(method).predict is not Method.predict:
            raise
        name = type(method).__name__
        raise StudyError(
            f"{name}.network gives no two lists, logits and features of each decoder ({str(error).splitlines()[0]}): "
            f"write {name}.predict; its docstring in mlrpl/methods/base.py says what it gives"
        ) from None


def _wrong(predicted: Any, outputs: tuple[str, ...], shape: tuple[int, ...]) -> str:
    """What is wrong with a prediction; empty where nothing is."""
    if not isinstance(predicted, list | tuple):
        return f"a {type(predicted).__name__}, not a list of tensors"
    if other := [type(each).__name__ for each in predicted if not isinstance(each, Tensor)]:
        return f"a list of {other[0]}, not of tensors"
    if len(predicted) != len(outputs):
        return counted(len(predicted), "tensor")
    if other := [tuple(each.shape) for each in predicted if each.shape != shape]:
        return f"{other[0]}, not {shape}"
    if not all(each.isfinite().all() for each in predicted):
        return "numbers that are not finite"
    if not all(each.is_floating_point() and (each >= 0).all() for each in predicted):
        return "numbers below 0 or no fractions: it must give probabilities, not logits or labels"
    if not all(((each.float().sum(1) - 1).abs() < CLOSE).all() for each in predicted):
        return "what does not sum to 1 over the classes: it must give probabilities"
    return ""
