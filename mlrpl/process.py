"""Settings of a process that make it fast and change no result on a CPU."""

import ctypes
import importlib
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def tune(device: torch.device) -> None:
    """Set this process up to train on that device.

    On a GPU, cuDNN tries its algorithms at the first batch of each shape and keeps the fastest; a study has few shapes.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    else:
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """From now on this process keeps the memory that it frees; False where the C library has no such setting.

    A step allocates and frees the same large maps again and again. glibc's malloc gives them back to the system at
    once, and every page is then faulted in and zeroed anew: a fifth of a step's CPU time. The peak grows by fragments
    alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def import_jsonschema() -> None:
    """Import jsonschema, which checks notebooks, without the grammar of international web addresses.

    Where that package is there, jsonschema imports it, and it compiles its grammar for seconds at every start of a
    process; no notebook has such an address to check.
    """
    grammar = "rfc3987_syntax"
    if grammar in sys.modules:
        return
    sys.modules[grammar] = None  # type: ignore[assignment]  # as good as not installed
    try:
        importlib.import_module("jsonschema")
    finally:
        del sys.modules[grammar]
