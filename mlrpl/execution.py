"""Notebooks executed with papermill: any of a study's, and the two that make up a run."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlrpl import own_code
from mlrpl.errors import StoppedError, StudyError
from mlrpl.files import atomic
from mlrpl.interrupt import passed_on, stop_requests
from mlrpl.memory import ADVICE
from mlrpl.process import import_jsonschema
from mlrpl.study import STAGES, Job, Workplace, alone

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def execute(notebook: str, destination: Path, **parameters: Any) -> None:
    """Execute a notebook of the study with papermill; `destination` appears only when all its cells have run.

    Raises:
        StudyError: with the notebook's own message where a cell fails; the failed notebook is kept as *.failed.ipynb.
        StoppedError: where the notebook ended on request.
    """
    import_jsonschema()
    import papermill  # here, since training alone does not need it
    from papermill.exceptions import PapermillExecutionError

    source = NOTEBOOKS / f"{notebook}.ipynb"
    if not source.exists():
        raise StudyError(
            f"notebooks/{notebook}.ipynb is missing: run from a clone of the repository, installed with pip -e"
        )
    failed = destination.with_suffix(".failed.ipynb")
    with atomic(destination) as partial:
        working = partial.with_name(f"{partial.name}.ipynb")
        try:
            shutil.copyfile(source, working)  # papermill notes where a notebook came from
            papermill.execute_notebook(
                str(working),
                str(working),
                parameters=parameters,
                kernel_name="python3",
                progress_bar=False,
                log_output=False,
                start_timeout=300,  # a busy machine takes its time
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # what goes wrong in a cell is in the notebook
            )
            working.replace(partial)
            failed.unlink(missing_ok=True)
        except PapermillExecutionError as error:
            if error.ename in (StoppedError.__name__, KeyboardInterrupt.__name__):
                raise StoppedError(error.evalue or f"{notebook}: interrupted; the same command goes on") from None
            working.replace(failed)
            reason = error.evalue if error.ename == "StudyError" else f"{error.ename}: {error.evalue}"
            where = "" if error.ename == "StudyError" else own_line(error.traceback)
            raise StudyError(f"{reason.splitlines()[0]}{where} (see {failed})") from None
        except RuntimeError as error:  # the kernel died
            raise StudyError(f"{notebook}: {str(error).splitlines()[0]}; if for want of memory: {ADVICE}") from None
        finally:
            working.unlink(missing_ok=True)


def own_line(traceback: Sequence[str]) -> str:
    """In which line of a file beside the study's an error came about, as " (entropy.py, line 27)"; else nothing."""
    text = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(traceback))  # colours
    places = re.findall(r"^File (.+?):(\d+)", text, re.MULTILINE)
    for name, line in reversed(places):
        path = Path(name).expanduser()
        if any(folder == path.absolute().parent for folder in own_code.folders):
            return f" ({path.name}, line {line})"
    return ""


def execute_run(
    place: Workplace, name: str, device: str | None, tensorboard: bool = False, key: str | None = None
) -> None:
    """What `mlrpl run` does: the two notebooks of one run, each only where needed; `key`: see `Workplace.job`.

    Raises:
        StudyError: where another process is at this run, or a notebook fails.
        StoppedError: on Ctrl-C or SIGTERM; training has finished its checkpoint then.
    """
    with stop_requests() as asked, passed_on(asked):
        try:
            _execute_run(place, place.job(name, key), device, tensorboard)
        except (Exception, KeyboardInterrupt) as error:
            if not asked.is_set() or isinstance(error, StoppedError):
                raise
            raise StoppedError(f"run {name}: interrupted; the same command goes on from its checkpoint") from None


def _execute_run(place: Workplace, job: Job, device: str | None, tensorboard: bool) -> None:
    name = job.run.name
    parameters = notebook_parameters(place, RUN=name, KEY=job.key, DEVICE=device)
    own: dict[str, dict[str, Any]] = {"train": {"TENSORBOARD": tensorboard}, "evaluate": {}}
    with alone(job):
        for stage, notebook in STAGES.items():
            if not (job.finished(stage) and (job.folder / f"{notebook}.ipynb").exists()):
                execute(notebook, job.folder / f"{notebook}.ipynb", **parameters, **own[stage])


def notebook_parameters(place: Workplace, **more: Any) -> dict[str, Any]:
    """The parameters that all notebooks share, and more."""
    return {"STUDY": place.given, "RUNS": str(place.root), **more}
