"""What a result was made with: commit, versions, hardware. No user name, host name or absolute path."""

import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

CHANGED = "+changes"  # marks a commit that does not say all
INSTRUCTIONS = ("avx2", "avx512_bf16", "amx_bf16")
PACKAGES = ("torch", "numpy", "scipy", "pandas", "medpy", "papermill", "nbconvert")


@cache
def commit() -> str:
    """The repository's commit, with `CHANGED` where code differs or is not in it; "unknown" outside a repository."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=normal", "--", ".", "../notebooks")
        return git("rev-parse", "--short=12", "HEAD") + (CHANGED if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """The CPU's model name as the operating system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@cache
def instructions() -> frozenset[str]:
    """Which of `INSTRUCTIONS` this CPU has."""
    import torch  # here, since what only reads results does not need it

    try:
        known = {name for name, there in torch.cpu.get_capabilities().items() if there}
    except AttributeError:  # releases of torch that do not say; the operating system does
        known = _cpu_flags()
    return frozenset(INSTRUCTIONS) & known


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def environment() -> dict[str, Any]:
    """Commit, Python, packages and system."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except ImportError:
            continue
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "packages": versions,
        "system": f"{platform.system()} {platform.machine()}",
    }
