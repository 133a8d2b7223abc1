"""The command `mlrpl`."""

import errno
import os
import sys
import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from mlrpl.errors import StudyError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Runs = Annotated[str, typer.Option(help="Folder of runs.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: a GPU where there is one.")]


@app.command()
def reproduce(
    study: Annotated[str, typer.Argument(help="Name of a study, or path of a .yaml file.")],
    data: Annotated[str | None, typer.Option(help="Folder of the study's data set.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 2,
    device: Device = None,
    only: Annotated[str | None, typer.Option(help="Only runs with one of these texts (a,b) in their name.")] = None,
    adopt: Annotated[bool, typer.Option(help="Take committed results with the same key as finished.")] = False,
    tensorboard: Annotated[bool, typer.Option(help="Also log for TensorBoard, in each run's folder.")] = False,
    runs: Runs = "runs",
    results: Annotated[str, typer.Option(help="Folder of results.")] = "results",
) -> None:
    """Run a study and write its report; what is finished and unchanged is skipped."""
    from mlrpl.reproduce import reproduce as run_study

    try:
        failures = run_study(
            study,
            data=data,
            jobs=jobs,
            device=device,
            only=only,
            adopt=adopt,
            tensorboard=tensorboard,
            runs=runs,
            results=results,
        )
    except KeyboardInterrupt:  # here, since typer ends without a word
        print("\nmlrpl: interrupted; the same command goes on from the checkpoints", file=sys.stderr)
        raise typer.Exit(130) from None
    if failures:
        raise typer.Exit(1)


@app.command()
def studies() -> None:
    """List the studies that come with the package."""
    from mlrpl.config import load_study, study_names

    for name in study_names():
        study = load_study(name)
        print(f"{name:<14} {study.title}; {len(list(study.runs()))} runs")


@app.command()
def bench(
    device: Device = None,
    quick: Annotated[bool, typer.Option(help="Tiny sizes: shows only that it works.")] = False,
    results: Annotated[str, typer.Option(help="Folder of results.")] = "results",
) -> None:
    """Time the package beside its plain formulation, and a step of each method; results/bench/index.html."""
    from mlrpl.bench import bench as measure

    print(measure(results, device, quick, lambda line: print(line, flush=True)))


@app.command(hidden=True)
def run(
    study: str,
    name: str,
    runs: Runs = "runs",
    device: Device = None,
    tensorboard: bool = False,
    parent: int | None = None,
) -> None:
    """Execute one run's notebooks; `reproduce` starts this."""
    if parent:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    from mlrpl.study import Workplace, execute_run

    execute_run(Workplace(study, runs), name, device, tensorboard)


def _end_with(parent: int) -> None:
    """End with the process that started this one, however it ended: nobody would watch any more."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Entry point: a `StudyError` is one line and exit code 2."""
    try:
        app()
    except StudyError as error:
        print(f"mlrpl: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        where = Path(error.filename).name if error.filename else "output"
        print(f"mlrpl: {where}: cannot be written ({error.strerror}); make room or allow writing", file=sys.stderr)
        sys.exit(2)
