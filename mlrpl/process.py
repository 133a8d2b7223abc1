"""Settings of a process that make it fast and change no result on a CPU."""

import ctypes
import importlib
import os
import sys
from contextlib import suppress

import torch

M_MXFAST, M_TRIM_THRESHOLD, M_MMAP_MAX = 1, -1, -4  # malloc.h

# For the environment of a process that trains. Where a large map was, glibc's malloc can put another of that size only
# if it may join the map's place with the crumbs beside it, which its caches of small pieces (this one, and that of
# M_MXFAST) would hold back. Otherwise a step at the size of the left atrium study needs hundreds of megabytes more.
TUNABLES = "GLIBC_TUNABLES"
MALLOC = {TUNABLES: ":".join([*filter(None, [os.getenv(TUNABLES)]), "glibc.malloc.tcache_count=0"])}


def tune(device: torch.device) -> None:
    """Set this process up to train on that device.

    On a GPU, cuDNN tries its algorithms at the first batch of each shape and keeps the fastest; a study has few shapes.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    else:
        keep_freed_memory()


def cpu_count() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """From now on this process keeps the memory that it frees, where the C library is glibc.

    A step allocates and frees the same large maps again and again. glibc's malloc gives them back to the system at
    once, and every page is then faulted in and zeroed anew: a fifth of a step's CPU time. The peak grows by fragments
    alone, and by few in an environment with `MALLOC`.
    """
    with suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for setting, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_MXFAST, 0)):
            mallopt(setting, value)


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
