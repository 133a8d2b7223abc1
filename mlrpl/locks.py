"""Who is at work in a folder: locks that a crash releases, on one machine and on a file system shared by many.

Two locks are held together. `flock` ends with its process, however it ended, and the operating system answers at once;
but some network file systems keep it to one machine. So there is a lease too: a file that is created exclusively, names
its owner and is touched every few seconds. A lease of a process that is gone is taken over at once on its own machine,
and elsewhere when it has not been touched for `LEASE_SECONDS`; so is one that a killed process left without its name.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, SoftFileLease, Timeout
from filelock import LeaseCompromise as Compromise

from mlrpl.errors import StudyError

LEASE_SECONDS = 30.0
GRACE_SECONDS = 2.0  # a killed process holds its flock until the system, and a child just forked, have let go of it


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    host: str
    pid: int


@contextmanager
def locked(folder: Path, busy: str, name: str = "", wait: float = GRACE_SECONDS) -> Iterator[None]:
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
        with FileLock(folder / f".{name}lock", timeout=wait):
            _remove_nameless(_lease_file(folder, name))
            with _lease(folder, name, 1.5 * LEASE_SECONDS):
                yield
    except Timeout:
        raise StudyError(busy) from None


def holder(folder: Path, name: str = "") -> Holder | None:
    """Who holds the lock of a folder; None where nobody does. Looking does not disturb who wants to take it."""
    try:
        owner, touched = _lease(folder, name, 0).owner, _lease_file(folder, name).stat().st_mtime
    except OSError:
        return None
    if owner is None:
        return None
    alive = psutil.pid_exists(owner.pid) if owner.hostname == os.uname().nodename else True
    return Holder(owner.hostname, owner.pid) if alive and time.time() - touched < 2 * LEASE_SECONDS else None


def _lease(folder: Path, name: str, wait: float) -> SoftFileLease:
    return SoftFileLease(
        _lease_file(folder, name), lease_duration=LEASE_SECONDS, timeout=wait, on_compromise=_superseded
    )


def _lease_file(folder: Path, name: str) -> Path:
    return folder / f".{name}owner.lock"


def _remove_nameless(lease: Path) -> None:
    """A process killed between creating its lease and naming itself there leaves an empty file.

    filelock takes one for held as long as it exists. Another machine may be about to write its name, so it is watched
    for as long as any other lease without a sign of life.
    """
    with suppress(FileNotFoundError):
        first, watched_from = lease.stat(), time.monotonic()
        while not (now := lease.stat()).st_size and now.st_mtime_ns == first.st_mtime_ns:
            if time.monotonic() - watched_from > LEASE_SECONDS:
                aside = lease.with_suffix(f".{os.getpid()}")
                lease.rename(aside)
                if aside.stat().st_size:  # another machine was faster, and this is its own
                    with suppress(FileExistsError):
                        os.link(aside, lease)
                aside.unlink()
            time.sleep(0.1)


def _superseded(loss: Compromise) -> None:
    """Somebody else may be at work now: writing on would harm what they write."""
    print(f"mlrpl: the lock was lost ({loss.reason}), so this process ends", file=sys.stderr, flush=True)
    os._exit(1)
