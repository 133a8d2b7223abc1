"""Locks that a crash releases, and devices that runs do not share."""

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock

from mlrpl import locks, workers
from mlrpl.devices import share_devices
from mlrpl.errors import StudyError
from mlrpl.locks import holder, locked
from mlrpl.workers import run_all, usual_jobs


def hold(folder: Path, ready) -> None:
    with locked(folder, "busy"):
        ready.set()
        time.sleep(600)


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of tmp_path."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


@pytest.mark.fault("a lock's holder is killed")
def test_a_lock_has_one_holder_and_a_crash_releases_it(tmp_path, other):
    with pytest.raises(StudyError, match="busy"), locked(tmp_path, "busy"):
        pass
    assert (holder(tmp_path).host, holder(tmp_path).pid) == (os.uname().nodename, other.pid)
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    assert holder(tmp_path) is None
    started = time.monotonic()
    with locked(tmp_path, "busy"):
        assert time.monotonic() - started < 5
        assert holder(tmp_path).pid == os.getpid()
    assert holder(tmp_path) is None


@pytest.mark.fault("a second process at a run")
def test_where_the_file_system_does_not_share_flock_the_lease_still_holds(tmp_path, other, monkeypatch):
    """As two machines see it: each is granted the flock of its own."""
    monkeypatch.setattr(locks, "FileLock", lambda path, timeout: FileLock(f"{path}.mine", timeout=timeout))
    monkeypatch.setattr(locks, "LEASE_SECONDS", 30.0)
    lease = locks._lease
    monkeypatch.setattr(locks, "_lease", lambda folder, name, wait: lease(folder, name, 1))
    with pytest.raises(StudyError, match="busy"), locked(tmp_path, "busy"):
        pass


def test_who_was_killed_a_moment_ago_may_still_be_letting_go(tmp_path):
    flock = FileLock(tmp_path / ".lock", thread_local=False)
    flock.acquire()
    letting_go = threading.Timer(0.3, flock.release)
    letting_go.start()
    with locked(tmp_path, "busy"):
        letting_go.join()


@pytest.mark.fault("a lock's holder is killed")
def test_a_lease_that_a_killed_process_left_empty_does_not_hold_for_ever(tmp_path, monkeypatch):
    """kill -9 between creating the file and writing the name into it."""
    monkeypatch.setattr(locks, "LEASE_SECONDS", 1.0)
    (tmp_path / ".owner.lock").touch()
    assert holder(tmp_path) is None
    with locked(tmp_path, "busy"):
        assert holder(tmp_path).pid == os.getpid()


def test_an_empty_lease_that_is_still_touched_is_somebody_s(tmp_path, monkeypatch):
    """As another machine sees it while the name is on its way."""
    monkeypatch.setattr(locks, "LEASE_SECONDS", 3.0)
    lease, ended = tmp_path / ".owner.lock", threading.Event()
    lease.touch()

    def beat() -> None:
        while not ended.wait(0.1):
            lease.touch()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        with pytest.raises(StudyError, match="busy"), locked(tmp_path, "busy"):
            pass
        assert lease.exists()
    finally:
        ended.set()
        thread.join()


def test_locks_of_other_names_and_folders_are_free(tmp_path):
    (tmp_path / "other").mkdir()
    with locked(tmp_path, "busy"), locked(tmp_path, "busy", "work."), locked(tmp_path / "other", "busy"):
        assert holder(tmp_path, "work.") is not None
        assert holder(tmp_path, "nobody.") is None


@pytest.mark.parametrize(("device", "gpus", "expected"), [
    (None, 0, [None, None, None]),  # each run finds the CPU itself
    (None, 1, [None, None, None]),
    (None, 2, ["cuda:0", "cuda:1", "cuda:0"]),
    ("cuda", 4, ["cuda:0", "cuda:1", "cuda:2"]),
    ("cuda:1", 4, ["cuda:1", "cuda:1", "cuda:1"]),  # as asked
    ("cuda:2,cuda:0", 4, ["cuda:2", "cuda:0", "cuda:2"]),
    ("cpu", 4, ["cpu", "cpu", "cpu"]),
])  # fmt: skip
def test_each_run_gets_a_device_of_its_own(monkeypatch, device, gpus, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert share_devices(device, 3) == expected


@pytest.mark.parametrize(("device", "cores", "threads", "expected"), [
    ("cpu", 1, 1, 1), ("cpu", 2, 1, 2), ("cpu", 16, 1, 4), ("cpu", 2, 2, 1), ("cpu", 2, 4, 1),
    (None, 16, 1, 3), ("cuda", 16, 1, 3), ("cuda:1", 16, 1, 1), ("cuda:0,cuda:2", 16, 1, 2),
])  # fmt: skip
def test_runs_at_a_time_follow_the_machine(monkeypatch, device, cores, threads, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert usual_jobs(device, threads) == expected


def test_runs_that_go_on_at_a_time_never_share_a_device(tmp_path, monkeypatch):
    """Seven runs of various lengths on three GPUs; processes stand in for the runs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.02)
    used: list[tuple[str, subprocess.Popen]] = []

    def start_run(place, job, device, tensorboard):
        assert device not in [name for name, process in used if process.poll() is None]
        used.append((device, subprocess.Popen(["sleep", job.run.name])))
        return used[-1][1]

    monkeypatch.setattr(workers, "start_run", start_run)
    lengths = ["0.3", "0.05", "0.2", "0.05", "0.1", "0.02", "0.1"]
    settings = SimpleNamespace(iterations=1)
    runs = [SimpleNamespace(name=length, settings=settings) for length in lengths]
    jobs = [SimpleNamespace(run=r, folder=tmp_path, executed=True, finished=lambda _: False) for r in runs]
    assert run_all(SimpleNamespace(), jobs, 3, None) == {}
    assert len(used) == 7
    assert {name for name, _ in used} == {"cuda:0", "cuda:1", "cuda:2"}
