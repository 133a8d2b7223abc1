"""Settings of a process that make it fast and change no result on a CPU."""

import ctypes
import importlib
import os
import sys

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


def keep_freed_memory() -> bool:
    """From now on this process keeps the memory that it frees; False where the C library has no such setting.

    A step allocates and frees the same large maps again and again. glibc's malloc gives them back to the system at
    once, and every page is then faulted in and zeroed anew: a fifth of a step's CPU time. The peak grows by fragments
    alone, and by few in an environment with `MALLOC`.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_MXFAST, 0))


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
