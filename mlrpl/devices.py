"""Devices: found by name, shared among the runs that go on at a time, waited for, and told of in results."""

import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mlrpl.errors import StudyError
from mlrpl.provenance import processor
from mlrpl.words import counted


def parse_device(name: str | None = None) -> torch.device:
    """The device of that name; by default a GPU where there is one. It is not touched: a GPU may be another's alone.

    Raises:
        StudyError: for a name that PyTorch does not know, or a GPU that is not there.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise _unusable(name, error) from None
    # PyTorch takes 999 for -25.
    if device.type == "cuda" and not 0 <= (device.index or 0) < torch.cuda.device_count():
        found = counted(torch.cuda.device_count(), "GPU")
        raise StudyError(f"device {name!r} cannot be used: PyTorch finds {found} here")
    return device


def first_device(device: str | None) -> torch.device:
    """Of devices as typed, separated by commas, the first; as `parse_device` otherwise."""
    return parse_device(device.split(",")[0] if device else None)


def find_device(name: str | None = None) -> torch.device:
    """As `parse_device`, and it was tried.

    Raises:
        StudyError: for a device that cannot be used.
    """
    device = parse_device(name)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise _unusable(name or str(device), error) from None
    return device


def _unusable(name: str | None, error: Exception) -> StudyError:
    return StudyError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}")


def share_devices(device: str | None, at_once: int) -> list[str | None]:
    """The device of each of the runs that go on at a time: every GPU in turn where none or just "cuda" is asked for.

    Args:
        device: as typed; several may be named, separated by commas.
        at_once: runs at a time.
    """
    given: list[str | None] = list(device.split(",")) if device else [None]
    if given in ([None], ["cuda"]) and (count := torch.cuda.device_count()) > 1:
        given = [f"cuda:{number}" for number in range(count)]
    return [given[slot % len(given)] for slot in range(at_once)]


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the widest vector instructions that PyTorch uses: "CPU: … (AVX2)".

    One model name stands for processors with different instructions, which differ in speed and in a result's last bits.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU: {processor()} ({torch.backends.cpu.get_cpu_capability()})"


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """How long one call takes, the device's work included."""
    synchronise(device)
    started = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - started


def peak_memory_mb(device: torch.device) -> int:
    """Largest memory of this process (CPU) or of PyTorch on the GPU so far, in MB.

    Linux's own account is read first: getrusage's also holds what the process that started this one had.
    """
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6)
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(kilobytes * 1024 / 1e6)
