"""Who is at work in a folder: locks that a crash releases, on one machine and on a file system shared by many.

Two locks are held together. `flock` ends with its process, however it ended, and the operating system answers at once;
but some network file systems keep it to one machine. So there is a lease too: a file that is created exclusively, names
its owner and is touched every few seconds. A lease of a process that is gone is taken over at once on its own machine,
and elsewhere when it has not been touched for `LEASE_SECONDS`.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, SoftFileLease, Timeout
from filelock import LeaseCompromise as Compromise

from mlrpl.errors import StudyError

LEASE_SECONDS = 30.0


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    host: str
    pid: int


@contextmanager
def locked(folder: Path, busy: str, name: str = "", wait: float = 0) -> Iterator[None]:
    """Hold the lock of a folder.

    Args:
        folder: must exist.
        busy: what to say where somebody else holds it.
        name: tells several locks of one folder apart.
        wait: seconds to wait for somebody else; a lease without a sign of life is waited for in any case.

    Raises:
        StudyError: with `busy`.
    """
    try:
        with FileLock(folder / f".{name}lock", timeout=wait), _lease(folder, name, 1.5 * LEASE_SECONDS):
            yield
    except Timeout:
        raise StudyError(busy) from None


def holder(folder: Path, name: str = "") -> Holder | None:
    """Who holds the lock of a folder; None where nobody does. Looking does not disturb who wants to take it."""
    path = folder / f".{name}owner.lock"
    try:
        owner, touched = _lease(folder, name, 0).owner, path.stat().st_mtime
    except OSError:
        return None
    if owner is None:
        return None
    alive = psutil.pid_exists(owner.pid) if owner.hostname == os.uname().nodename else True
    return Holder(owner.hostname, owner.pid) if alive and time.time() - touched < 2 * LEASE_SECONDS else None


def _lease(folder: Path, name: str, wait: float) -> SoftFileLease:
    return SoftFileLease(
        folder / f".{name}owner.lock", lease_duration=LEASE_SECONDS, timeout=wait, on_compromise=_superseded
    )


def _superseded(loss: Compromise) -> None:
    """Somebody else may be at work now: writing on would harm what they write."""
    print(f"mlrpl: the lock was lost ({loss.reason}), so this process ends", file=sys.stderr, flush=True)
    os._exit(1)
