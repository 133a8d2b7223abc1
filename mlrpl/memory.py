"""Memory: how much there is, asked before much is taken, and what to say when it was too little."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from mlrpl.errors import StudyError

ADVICE = "lower the study's batch, patch or filters, or JOBS (runs at a time)"
CGROUP = Path("/sys/fs/cgroup")


def available() -> int:
    """Bytes that this process can still take: the least of what the machine, its control group and its limits leave."""
    left = [psutil.virtual_memory().available]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        left.append(soft - psutil.Process().memory_info().vms)
    with suppress(OSError, ValueError):  # no control group, or no limit ("max")
        used = int((CGROUP / "memory.current").read_text()) - _reclaimable((CGROUP / "memory.stat").read_text())
        left.append(int((CGROUP / "memory.max").read_text()) - used)
    return max(0, min(left))


def _reclaimable(statistics: str) -> int:
    """Bytes of a control group that hold files read earlier: the system gives them to whoever asks for memory."""
    return int(dict(line.split() for line in statistics.splitlines()).get("inactive_file", 0))


def require(needed: int, what: str, advice: str) -> None:
    """Refuse what does not fit, before it is allocated.

    Args:
        needed: bytes.
        what: takes them, as the subject of a sentence.
        advice: what to do about it.

    Raises:
        StudyError: where less is left.
    """
    if needed > (left := available()):
        raise StudyError(f"{what} needs {_gigabytes(needed)} of memory, but {_gigabytes(left)} is left; {advice}")


@contextmanager
def exhaustion_explained(what: str, advice: str = ADVICE) -> Iterator[None]:
    """Say in one line what to do where memory runs out within; by default, which setting to lower.

    Raises:
        StudyError: for PyTorch's several ways to say so, and Python's.
    """
    try:
        yield
    except MemoryError:
        raise StudyError(f"{what}: out of memory; {advice}") from None
    except RuntimeError as error:  # also torch.OutOfMemoryError
        if not is_exhaustion(error):
            raise
        where = "out of GPU memory" if "CUDA" in str(error) else "out of memory"
        raise StudyError(f"{what}: {where}; {advice}") from None


def is_exhaustion(error: Exception) -> bool:
    """Whether PyTorch says, in one of its several ways, that memory ran out."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "out of memory" in text


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
