"""Ending on request: Ctrl-C, or the SIGTERM that a scheduler sends, is answered when what is begun has been saved.

The request goes down the tree of processes: `mlrpl reproduce` asks its runs, a run asks its notebook's kernel, and the
training loop in the kernel finishes its checkpoint.
"""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

LOOK_SECONDS = 0.2


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, instead of breaking off what runs; never set outside the main thread."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def passed_on(asked: threading.Event) -> Iterator[None]:
    """Pass the request on to this process's children, as Ctrl-C: once to each, as soon as it listens."""
    done = threading.Event()

    def pass_on() -> None:
        told: set[int] = set()
        while not done.wait(LOOK_SECONDS):
            for child in psutil.Process().children() if asked.is_set() else ():
                if child.pid not in told and listens(child.pid):
                    with suppress(psutil.NoSuchProcess):
                        child.send_signal(signal.SIGINT)
                    told.add(child.pid)

    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()


def listens(pid: int) -> bool:
    """Whether a process handles SIGINT now; a notebook's kernel ignores it between cells."""
    try:
        caught = re.search(
            r"^SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"), re.MULTILINE
        )
    except OSError:  # no /proc, as on macOS
        return True
    return bool(caught and int(caught[1], 16) >> (signal.SIGINT - 1) & 1)
