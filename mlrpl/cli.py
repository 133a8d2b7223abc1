"""The command `mlrpl`."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import Annotated, Literal

import typer

from mlrpl.errors import StoppedError, StudyError
from mlrpl.words import counted

UNWRITABLE = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR,
)  # fmt: skip

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

StudyName = Annotated[str, typer.Argument(help="Name of a study, or path of a .yaml file.")]
Only = Annotated[str | None, typer.Option(help="Only runs with one of these (a,b) in their name.")]
Runs = Annotated[str, typer.Option(help="Folder of runs.")]
Results = Annotated[str, typer.Option(help="Folder of results.")]
Parent = Annotated[int | None, typer.Option(hidden=True)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: a GPU where there is one.")]


@app.command()
def reproduce(
    study: StudyName,
    data: Annotated[str | None, typer.Option(help="Folder of the study's data set.")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at a time; default: one a core, at most 4; one a GPU; on Slurm no limit."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:0,cuda:1 …; default: the GPUs that are there.")
    ] = None,
    only: Only = None,
    adopt: Annotated[bool, typer.Option(help="Take committed results with the same key as finished.")] = False,
    tensorboard: Annotated[bool, typer.Option(help="Also log for TensorBoard, in each run's folder.")] = False,
    runs: Runs = "runs",
    results: Results = "results",
    engine: Annotated[Literal["local", "slurm"], typer.Option(help="Where the runs go.")] = "local",
    partition: Annotated[str | None, typer.Option(help="Slurm: partition.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="Slurm: GPUs a run; default: none.")] = None,
    time: Annotated[
        str | None,
        typer.Option(help="Slurm: time limit of a job; a run goes on in the next; default: 24:00:00."),
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Slurm: memory a run, as 16G.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm: account.")] = None,
    qos: Annotated[str | None, typer.Option(help="Slurm: quality of service.")] = None,
    report_only: Annotated[bool, typer.Option(help="Run nothing; report what is finished.")] = False,
    parent: Parent = None,
) -> None:
    """Run a study and write its report; what is finished and unchanged is skipped."""
    from mlrpl.reproduce import reproduce as run_study
    from mlrpl.slurm import Resources

    _end_with(parent)
    options = {
        "partition": partition, "gpus": gpus, "time": time, "memory": memory, "account": account, "qos": qos,
    }  # fmt: skip
    asked = {name: value for name, value in options.items() if value is not None}
    if asked and engine != "slurm":
        raise StudyError(f"--{next(iter(asked))} is for Slurm alone: type --engine slurm too, or leave it out")
    on_slurm = Resources(**asked, at_once=jobs) if engine == "slurm" else None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's request is a Ctrl-C
    with _interruptible():
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
            slurm=on_slurm,
            report_only=report_only,
        )
    if failures:
        raise typer.Exit(1)


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="A study; or a new name for your own data.")],
    source: Annotated[str | None, typer.Option(help="Folder of the data set.")] = None,
    hardware: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="Propose for it; default: what is here.")
    ] = None,
    runs: Runs = "runs",
) -> None:
    """Prepare a study's data. A new name makes a study of your own data: NAME.yaml, proposed from the images."""
    from mlrpl.steps import prepare_study

    prepare_study(name, source, runs, hardware)


@app.command()
def download(
    name: Annotated[str, typer.Argument(help="hippocampus or heart; for la, pancreas, brats: where to register.")],
    to: Annotated[str, typer.Option(help="Folder for data sets.")] = "data",
) -> None:
    """Download a data set; an interrupted download goes on."""
    from mlrpl.download import download as fetch

    with _interruptible():
        fetch(name, Path(to))


@app.command()
def train(study: StudyName, only: Only = None, device: Device = None, runs: Runs = "runs") -> None:
    """Train the runs of a prepared study; stops and resumes."""
    from mlrpl.steps import train_study

    with _interruptible():
        train_study(study, only, device, runs)


@app.command()
def evaluate(
    study: StudyName, only: Only = None, device: Device = None, runs: Runs = "runs", results: Results = "results"
) -> None:
    """Measure the trained runs of a study on their test cases."""
    from mlrpl.steps import evaluate_study

    evaluate_study(study, only, device, runs, results)


@app.command()
def predict(
    run: Annotated[str, typer.Argument(metavar="RUN", help="STUDY, or STUDY/RUN; the folds of a run are averaged.")],
    images: Annotated[list[str], typer.Argument(help="NIfTI or NRRD files, folders of them, DICOM folders.")],
    output: Annotated[str, typer.Option(help="Folder of the predictions.")],
    probabilities: Annotated[bool, typer.Option(help="Also write each class's probability.")] = False,
    disagreement: Annotated[bool, typer.Option(help="Also write how far the decoders are apart.")] = False,
    largest: Annotated[bool, typer.Option(help="Keep the largest component of each class alone.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace predictions that are there already.")] = False,
    device: Device = None,
    runs: Runs = "runs",
) -> None:
    """Segment images with a trained run; each label map lies on its image's own grid. Not for diagnosis."""
    from mlrpl.steps import predict_images

    options = {
        "probabilities": probabilities,
        "disagreement": disagreement,
        "largest": largest,
        "overwrite": overwrite,
    }
    if predict_images(run, images, output, device, runs, **options):
        raise typer.Exit(1)


@app.command()
def studies() -> None:
    """List the studies that come with the package."""
    from mlrpl.config import load_study, study_names

    width = max(map(len, study_names()))
    for name in study_names():
        study = load_study(name)
        # As in `mlrpl reproduce`, runs that coincide are one.
        runs = {repr((r.method, r.options, r.settings, r.labelled, r.seed, r.fold)) for r in study.runs()}
        print(f"{name:<{width}}  {study.title}; {counted(len(runs), 'run')}")


@app.command()
def status(study: StudyName, runs: Runs = "runs", results: Results = "results") -> None:
    """Where every run of a study stands."""
    from mlrpl.status import described
    from mlrpl.study import Workplace

    print(described(Workplace(study, runs, results)))


@app.command()
def cost(
    study: StudyName,
    data: Annotated[str | None, typer.Option(help="Folder of the study's data set, where it is not prepared.")] = None,
    only: Only = None,
    device: Device = None,
    runs: Runs = "runs",
) -> None:
    """How long a study takes on this machine, from a few steps and windows of each run."""
    from mlrpl.steps import cost_study

    cost_study(study, data, only, device, runs)


@app.command()
def verify(
    study: StudyName,
    retrain: Annotated[
        str | None, typer.Option(help="Also train this run anew on the CPU; compare bit for bit.")
    ] = None,
    runs: Runs = "runs",
    results: Results = "results",
) -> None:
    """Recompute a study's tables from its rows, and its rows from its runs where they are at hand."""
    from mlrpl.study import Workplace
    from mlrpl.verify import verify as check

    findings = check(Workplace(study, runs, results), retrain)
    print("\n".join(map(str, findings)))
    if any(finding.wrong for finding in findings):
        raise typer.Exit(1)


@app.command()
def cancel(study: StudyName, runs: Runs = "runs") -> None:
    """Stop a study's Slurm jobs, or the process that reproduces it here; checkpoints are finished first."""
    from mlrpl.locks import holder
    from mlrpl.slurm import cancel as cancel_jobs
    from mlrpl.study import Workplace

    place = Workplace(study, runs)
    cancelled, owner = cancel_jobs(place), holder(place.runs)
    told = [f"{cancelled} Slurm jobs"] if cancelled else []
    if owner and owner.host == os.uname().nodename:
        os.kill(owner.pid, signal.SIGTERM)  # a script's background commands do not hear SIGINT
        told.append(f"process {owner.pid}")
    print(f"asked to end: {' and '.join(told)}" if told else f"study {place.study.name}: nothing is queued or running")


@app.command()
def bench(
    device: Device = None,
    quick: Annotated[bool, typer.Option(help="Tiny sizes: shows only that it works.")] = False,
    minutes: Annotated[float | None, typer.Option(help="After which no further measurement is begun.")] = None,
    results: Results = "results",
) -> None:
    """Time the package beside its plain formulation, and a step of each method; results/bench/index.html."""
    from mlrpl.bench import bench as measure
    from mlrpl.memory import exhaustion_explained

    with exhaustion_explained("bench", "the plain step at the size of `la` needs about 10 GB"):
        print(measure(results, device, quick, lambda line: print(line, flush=True), minutes))


@app.command()
def channels(
    study: StudyName,
    run: Annotated[str, typer.Argument(metavar="RUN", help="One of the study's, trained here.")],
    batches: Annotated[int, typer.Option(min=0, help="Feed so many to the final weights; 0: read the log.")] = 0,
    runs: Runs = "runs",
) -> None:
    """Losses of MLRPL by how many channels the dropout before its heads left; rows as CSV."""
    from mlrpl.channels import losses
    from mlrpl.study import Workplace

    losses(Workplace(study, runs), run, batches).to_csv(sys.stdout, index=False, float_format="%.4g")


@app.command(hidden=True)
def run(
    study: str,
    name: str,
    runs: Runs = "runs",
    device: Device = None,
    tensorboard: bool = False,
    key: str | None = None,
    parent: Parent = None,
) -> None:
    """Execute one run's notebooks; `reproduce` starts this."""
    _end_with(parent)
    from mlrpl.execution import execute_run
    from mlrpl.study import Workplace

    execute_run(Workplace(study, runs), name, device, tensorboard, key)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Says after a Ctrl-C how to go on; typer itself would end without a word."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nmlrpl: interrupted; the same command goes on", file=sys.stderr)
        raise typer.Exit(StoppedError.exit_code) from None


def _end_with(parent: int | None) -> None:
    """End with the process that started this one, however it ended: nobody would watch any more."""

    def watch() -> None:
        while os.getppid() == parent:
            sleep(1)
        os._exit(1)

    if parent:
        threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Entry point: a `StudyError` is one line and exit code 2."""
    try:
        app()
    except StudyError as error:
        print(f"mlrpl: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        where = Path(error.filename).name if error.filename else "output"
        print(f"mlrpl: {where}: cannot be written ({error.strerror}); make room or allow writing", file=sys.stderr)
        sys.exit(2)
