"""Ending on request: Ctrl-C, or the SIGTERM that a scheduler sends, is answered when what is begun has been saved.

The request goes down the tree of processes: `mlrpl reproduce` asks its runs, a run asks its notebook's kernel, and the
training loop in the kernel finishes its checkpoint.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

AGAIN_SECONDS = 2  # a kernel that is still starting ignores the first request


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
    """Pass the request on to this process's children, as Ctrl-C, until they have ended."""
    done = threading.Event()

    def pass_on() -> None:
        asked.wait()
        while not done.wait(AGAIN_SECONDS if interrupt_children() else 0.1):
            pass

    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()


def interrupt_children() -> bool:
    """Send SIGINT to the processes that this one started; False where there is none."""
    children = psutil.Process().children()
    for child in children:
        try:
            child.send_signal(signal.SIGINT)
        except psutil.NoSuchProcess:
            continue
    return bool(children)
