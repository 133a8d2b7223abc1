"""The methods by name; one file each. A method of one's own is named "module:Class" in a study."""

import importlib
from typing import Any

from mlrpl.config import Run
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

__all__ = ["METHODS", "OUTPUTS", "Method", "Step", "build", "find_method"]

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


def find_method(name: str) -> type[Method]:
    """The class of a method: a key of `METHODS`, or "module:Class".

    Raises:
        StudyError: if there is none.
    """
    if name in METHODS:
        return METHODS[name]
    module, _, attribute = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), attribute) if attribute else None
    except (ImportError, AttributeError) as error:
        raise StudyError(f"method {name!r}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise StudyError(f'no method {name!r}: choose one of {", ".join(METHODS)}, or name your own as "module:Class"')
    return found


def build(run: Run, in_channels: int, num_classes: int) -> Method:
    """The run's method, initialised by PyTorch's defaults from the global random state.

    Raises:
        StudyError: for an unknown method, or an option that it does not have or take.
    """
    method = find_method(run.method)
    if unknown := set(run.options) - set(method.options()):
        known = ", ".join(method.options()) or "none"
        raise StudyError(f"run {run.name}: {run.method} has no option {sorted(unknown)[0]!r} (it has: {known})")
    try:
        return method(run.settings, in_channels, num_classes, **run.options)
    except (TypeError, ValueError) as error:
        raise StudyError(f"run {run.name}: {error}") from None
