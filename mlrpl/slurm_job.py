"""What runs inside a Slurm job. It imports next to nothing: this process only waits for the one that does the work."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from submitit.helpers import DelayedSubmission

ANNOUNCED_SECONDS = 100  # for a checkpoint, once Slurm has announced the end; within its --signal


class Command:
    """A command as a job, which goes on by being started again.

    Args:
        arguments: of the process; `--parent <this process>` is added, so that it ends with the job.
        log: where its output goes.
        environment: added to the job's.
    """

    process: subprocess.Popen[bytes] | None = None

    def __init__(self, arguments: Sequence[str], log: str, environment: Mapping[str, str]) -> None:
        self.arguments, self.log, self.environment = list(arguments), log, dict(environment)

    def __call__(self) -> None:
        """Run it to its end.

        Raises:
            RuntimeError: where it fails; the last line of its log says why.
        """
        Path(self.log).parent.mkdir(parents=True, exist_ok=True)
        with Path(self.log).open("wb") as log:
            self.process = subprocess.Popen(
                [*self.arguments, "--parent", str(os.getpid())],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self.environment},
                preexec_fn=_ignore_announcement,
            )
        if code := self.process.wait():
            raise RuntimeError(f"exit code {code}; see {self.log}")

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit before a preemption or the time limit: save, and be queued again."""
        if self.process:  # None: told before it was started
            self.process.terminate()
            deadline = time.monotonic() + ANNOUNCED_SECONDS
            while not _ended(self.process.pid):
                if time.monotonic() > deadline:
                    self.process.kill()  # the last checkpoint by the clock is at most a minute old
                    break
                time.sleep(0.2)
        return DelayedSubmission(Command(self.arguments, self.log, self.environment))


def _ended(pid: int) -> bool:
    """Asked of the system, since this is a signal's handler: what it interrupted may hold subprocess's own lock."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _ignore_announcement() -> None:
    """Slurm's announcement reaches every process of the job; those below this one are told by SIGTERM instead."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
