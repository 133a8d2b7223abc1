"""The methods by name; one file each. A method of one's own is named "module:Class" in a study."""

from typing import Any

import torch
from torch import nn

from mlrpl import own_code
from mlrpl.config import Run
from mlrpl.data import Batch
from mlrpl.errors import StudyError
from mlrpl.methods.acmt import ACMT
from mlrpl.methods.base import OUTPUTS, Method, Step
from mlrpl.methods.cct import CCT
from mlrpl.methods.mcnet import MCNet, MCNetPlus
from mlrpl.methods.mlrpl import MLRPL
from mlrpl.methods.ssnet import SSNet
from mlrpl.methods.uamt import UAMT
from mlrpl.methods.urpc import URPC
from mlrpl.methods.vnet import SupervisedVNet
from mlrpl.networks import STRIDE, Decoder, Encoder, counted_volumes, keep_all_channels, normalise_instances

__all__ = [
    "METHODS",
    "OUTPUTS",
    "Method",
    "Step",
    "as_read",
    "build",
    "find_method",
    "result_version",
    "volumes_a_step",
]

METHODS: dict[str, type[Method]] = {
    "vnet": SupervisedVNet,
    "uamt": UAMT,
    "urpc": URPC,
    "cct": CCT,
    "mcnet": MCNet,
    "mcnet_plus": MCNetPlus,
    "ssnet": SSNet,
    "acmt": ACMT,
    "mlrpl": MLRPL,
}
NUMBER = ("a number", {int, float})  # also where the default is whole: 1 and 0.5 are both weights
KINDS = {bool: ("true or false", {bool}), int: NUMBER, float: NUMBER, str: ("text", {str})}  # of options, by default


def find_method(name: str) -> type[Method]:
    """The class of a method: a key of `METHODS`, or "module:Class".

    Raises:
        StudyError: if there is none.
    """
    if name in METHODS:
        return METHODS[name]
    module, _, attribute = name.partition(":")
    try:
        found: Any = getattr(own_code.load(module), attribute) if attribute else None
    except (ImportError, AttributeError) as error:
        advice = f"; write {module[:-3].replace('/', '.')}:{attribute}" if module.endswith(".py") else ""
        raise StudyError(f"method {name!r}: {error}{advice}") from None
    except Exception as error:  # whatever is wrong in a file of one's own
        raise StudyError(f"method {name!r}: {type(error).__name__}: {error}") from None
    if isinstance(found, type) and issubclass(found, Method):
        return found
    if attribute:
        raise StudyError(f"method {name!r}: {attribute} is no class that extends mlrpl.methods.Method")
    raise StudyError(f'no method {name!r}: choose one of {", ".join(METHODS)}, or name your own as "module:Class"')


def result_version(method: type[Method]) -> int | str:
    """What a run's key holds of a method's code.

    A method's own `result_version`; a method of one's own that sets none is versioned by its code
    (`mlrpl.own_code.version`) and the versions of the methods that it extends: an edited method never passes for a
    finished one.
    """
    if "result_version" in vars(method) or method in METHODS.values():
        return method.result_version
    extended = [base.result_version for base in method.__mro__ if base in METHODS.values()]
    return own_code.version(method, extended)


def as_read(run: Run) -> dict[str, Any]:
    """What a run's method reads of it, by name: with its own number of volumes a batch, without settings of no use."""
    method, values = find_method(run.method), run.model_dump()
    settings = values["settings"] | {"batch": method.batch_sizes(run.settings)}
    return values | {"settings": {name: v for name, v in settings.items() if name not in method.unused_settings}}


def build(run: Run, in_channels: int, num_classes: int) -> Method:
    """The run's method, initialised by PyTorch's defaults from the global random state.

    Raises:
        StudyError: for an unknown method, or an option that it does not have or take.
    """
    method = find_method(run.method)
    if unknown := set(run.options) - set(method.options()):
        known = ", ".join(method.options()) or "none"
        raise StudyError(f"run {run.name}: {run.method} has no option {sorted(unknown)[0]!r} (it has: {known})")
    for name, value in run.options.items():
        kind, types = KINDS.get(type(method.options()[name]), ("", {type(value)}))
        if type(value) not in types:
            raise StudyError(f"run {run.name}: {name} of {run.method} must be {kind}, not {value!r}")
    if method.needs_unlabelled and not run.settings.batch[1]:
        raise StudyError(f"run {run.name}: {run.method} learns from unlabelled volumes, and batch has none")
    if "decoder1" not in method.outputs or not set(method.outputs) <= set(OUTPUTS):
        raise StudyError(
            f"run {run.name}: outputs of {run.method} are {', '.join(method.outputs) or 'none'}: decoder1 must be "
            f"among them, and none but {', '.join(OUTPUTS)}"
        )
    if isinstance(method.terms, str):
        raise StudyError(f'run {run.name}: terms of {run.method} must be a tuple of names, as in ("{method.terms}",)')
    try:
        built = method(run.settings, in_channels, num_classes, **run.options)
    except (TypeError, ValueError) as error:
        raise StudyError(f"run {run.name}: {error}") from None
    except Exception as error:  # whatever is wrong in a method of one's own
        raise StudyError(f"run {run.name}: {run.method}: {type(error).__name__}: {error}") from None
    if not isinstance(getattr(built, "network", None), nn.Module):
        raise StudyError(f"run {run.name}: {run.method} sets no self.network")
    if hidden := [name for name in (*vars(built), *built._modules) if callable(getattr(Method, name, None))]:
        raise StudyError(
            f"run {run.name}: {run.method} sets self.{hidden[0]}, which hides Method.{hidden[0]}: "
            "give the attribute another name"
        )
    if loose := _unregistered(built):
        raise StudyError(
            f"run {run.name}: {run.method}: self.{loose} holds networks or parameters that nothing trains, saves or "
            "moves to a GPU: make it an nn.ModuleList, nn.ModuleDict or nn.ParameterList"
        )
    if method.loss is Method.loss:
        raise StudyError(f"run {run.name}: {run.method} has no loss(self, batch, step)")
    if run.settings.normalisation == "instance":
        normalise_instances(built)
    if not run.settings.head_dropout:
        keep_all_channels(built)
    return built


def _unregistered(method: nn.Module) -> str:
    """Name of a list, tuple or dict with modules or parameters that PyTorch does not know of; empty without any."""
    known = {id(part) for part in (*method.modules(), *method.parameters())}
    for module in method.modules():
        for name in vars(module).keys() - vars(nn.Module()).keys():
            held = vars(module)[name]
            parts = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else ()
            if any(isinstance(part, nn.Module | nn.Parameter) and id(part) not in known for part in parts):
                return name
    return ""


def volumes_a_step(run: Run, in_channels: int, num_classes: int) -> tuple[int, int]:
    """Volumes that go forward through encoders, and through decoders, in one training step of the run.

    Counted in a step on a small patch, of two voxels at the bottleneck, since one alone cannot be normalised; passes
    without gradient, such as a teacher's, count too.
    """
    settings = run.settings.model_copy(update={"patch": (2 * STRIDE, STRIDE, STRIDE)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        method = build(run.model_copy(update={"settings": settings}), in_channels, num_classes).train()
        labelled, _ = method.batch_sizes(settings)
        image = torch.randn(sum(settings.batch), in_channels, *settings.patch)
        batch = Batch(image, torch.randint(num_classes, (labelled, *settings.patch)))
        with counted_volumes(method) as passes:
            method.loss(batch, Step(1, settings.iterations, torch.Generator()))
    return sum(passes[Encoder]), sum(passes[Decoder])
