"""What a method of one's own promises, tried before it trains for hours.

A run that was killed goes on as if it had not been: so the second step is done twice, once after the first, once by a
method that was built anew and read the state after the first. A prediction is made, too: the first check, which needs
one, may be an hour away. What is tried is thrown away; training begins as it would have.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from mlrpl.data import Batch
from mlrpl.errors import StudyError
from mlrpl.methods import Method, Step
from mlrpl.optimisation import RecordedStep, make_optimizer, optimise, restore, to_device
from mlrpl.precision import Precision, computing
from mlrpl.words import counted

CLOSE = 1e-2  # probabilities of bf16 logits sum to 1 less exactly

Signature = dict[str, tuple[int, ...]]


def signature(method: Method) -> Signature:
    """Names and shapes of what a checkpoint holds of a method."""
    return {name: tuple(value.shape) for name, value in method.state_dict().items()}


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
    """Two steps, a checkpoint and a prediction of a method.

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

    def do(iteration: int, method: Method, optimizer: torch.optim.Optimizer) -> None:
        prepared = to_device(batch(iteration), device)
        optimise(method, prepared, _as_recorded(method, step(iteration), device), optimizer, scaler, precision)

    do(1, method, optimizer)
    check_signature(method, built)
    state, momenta = copy.deepcopy(method.state_dict()), copy.deepcopy(optimizer.state_dict())
    _check_prediction(method, batch(1).image[:1].to(device), precision, device)
    try:
        do(2, method, optimizer)
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise StudyError(f"{name}: its second step goes back through the first; detach what a step keeps") from None
    again = make()
    again.load_state_dict(state)
    optimizer = make_optimizer(again)
    restore(optimizer, momenta)
    do(2, again, optimizer)
    if device.type == "cpu" and (other := _different(method.state_dict(), again.state_dict())):
        raise StudyError(
            f"{name}: a run that is killed would go on differently: after two steps, with a checkpoint between them, "
            f"{other[0]!r} is another ({len(other)} of {len(state)} are). What one step leaves to the next must be a "
            "parameter or a persistent buffer, and what is drawn must come from PyTorch, NumPy or random as they are "
            "seeded for each iteration"
        )


def _as_recorded(method: Method, step: Step, device: torch.device) -> Step:
    """What a GPU shows a replayable method of a step; all of it to others."""
    if not method.replayable:
        return step
    scheduled = {name: torch.tensor(value, device=device) for name, value in method.schedule(step).items()}
    return RecordedStep(step.iteration, step.iterations, step.generator, scheduled)


def _different(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names of tensors that differ; NaN is like NaN."""
    return [
        name
        for name, value in ours.items()
        if not ((value == theirs[name]) | (value != value) & (theirs[name] != theirs[name])).all()
    ]


def _check_prediction(method: Method, image: Tensor, precision: Precision, device: torch.device) -> None:
    """StudyError unless `predict` gives what its docstring says."""
    method.eval()
    with torch.inference_mode(), computing(device, precision):
        predicted = method.predict(image.to(memory_format=torch.channels_last_3d), method.outputs)
    method.train()
    shape = (1, method.num_classes, *image.shape[2:])
    if not isinstance(predicted, list | tuple) or not all(isinstance(each, Tensor) for each in predicted):
        found = f"a {type(predicted).__name__}, not a list of tensors"
    elif len(predicted) != len(method.outputs):
        found = f"{counted(len(predicted), 'tensor')} for the outputs {', '.join(method.outputs)}"
    elif wrong := [tuple(each.shape) for each in predicted if each.shape != shape]:
        found = f"{wrong[0]} for {tuple(image.shape)}, not {shape}"
    elif not all(each.is_floating_point() and (each >= 0).all() for each in predicted):
        found = "numbers below 0 or no fractions: it must give probabilities, not logits or labels"
    elif not all(((each.float().sum(1) - 1).abs() < CLOSE).all() for each in predicted):
        found = "what does not sum to 1 over the classes: it must give probabilities"
    else:
        return
    raise StudyError(f"{type(method).__name__}.predict gives {found}")
