"""Whether a run's networks are compiled: torch.compile takes a minute, a step on a GPU then two thirds of its time."""

import os
import shutil
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch

COMPILED_FROM = 5000  # iterations


def compilation_pays(device: torch.device, iterations: int) -> bool:
    """Whether so many iterations there save what torch.compile takes."""
    return device.type == "cuda" and iterations >= COMPILED_FROM


def lacking() -> str:
    """What torch.compile needs for a GPU and this machine lacks; "" where nothing is missing.

    Triton, which makes its programs, builds a module in C that calls them from Python.
    """
    if not (os.getenv("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler is missing (Debian, Ubuntu: apt install gcc)"
    # As Triton asks; Debian's own scheme names a folder for headers that one adds oneself.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    if not Path(sysconfig.get_path("include", scheme), "Python.h").exists():
        return "Python's headers are missing (Debian, Ubuntu: apt install python3-dev)"
    return ""


def not_compiled(device: torch.device, iterations: Iterable[int]) -> str:
    """One line where runs of so many iterations were compiled on that device, if only they could be; else ""."""
    if any(compilation_pays(device, count) for count in iterations) and (what := lacking()):
        return f"not compiled, so a step takes half as long again: {what}"
    return ""
