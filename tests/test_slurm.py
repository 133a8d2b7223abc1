"""The Slurm engine on a real Slurm of one node: `tests/slurm/cluster`, or the one that SLURM_CONF names."""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import psutil
import pytest
import submitit
import yaml

from mlrpl import cli, slurm
from mlrpl.errors import StudyError
from mlrpl.files import read_json
from mlrpl.reproduce import reproduce
from mlrpl.results import Results, collect
from mlrpl.slurm import Resources, cancel, minutes, queue, submit
from mlrpl.slurm_job import Command
from mlrpl.status import described, standings
from mlrpl.study import Workplace

CLUSTER = Path(__file__).parent / "slurm" / "cluster"
ROOT = Path(__file__).parents[1]
STUDY = {
    "name": "array", "title": "An array", "seeds": list(range(12)),
    "dataset": {"name": "drawn", "source": "phantom", "options": {"train": 3, "test": 1, "size": [24, 24, 16]}},
    "settings": {
        "patch": [16, 16, 16], "stride": [8, 8, 16], "filters": 2, "iterations": 12, "ramp_iterations": 150,
        "check_from": 4, "check_every": 4, "precision": "float32",
    },
    "runs": [
        {"variant": "vnet", "method": "vnet", "title": "V-Net", "labelled": 1},
        {"variant": "mlrpl", "method": "mlrpl", "title": "MLRPL", "labelled": 1},
    ],
}  # fmt: skip


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    if os.environ.get("SLURM_CONF"):
        yield
        return
    folder = Path(tempfile.mkdtemp(prefix="mlrpl-slurm-"))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    ports = os.environ | {"PORT": str(26817 + 2 * worker)}  # each process of the test run has its own cluster
    made = subprocess.run([CLUSTER, "start", folder], capture_output=True, text=True, check=False, env=ports)
    if made.returncode:
        shutil.rmtree(folder)
        pytest.skip(f"no Slurm on this machine: {made.stderr.strip()}")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    yield
    subprocess.run([CLUSTER, "stop", folder], check=True)
    del os.environ["SLURM_CONF"]
    shutil.rmtree(folder)


def write(folder: Path, **changes: Any) -> str:
    (folder / "array.yaml").write_text(yaml.safe_dump({**STUDY, **changes}))
    return "array.yaml"


def wait(condition, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, subprocess.run(["squeue"], capture_output=True, text=True).stdout
        time.sleep(0.5)


# Without Slurm.


@pytest.mark.parametrize(("text", "expected"), [
    ("90", 90), ("90:00", 90), ("1:30:00", 90), ("1:30:01", 91), ("2-0", 2880), ("1-1:30", 1530), ("0:30", 1),
])  # fmt: skip
def test_time_limits_are_read_as_slurm_writes_them(text, expected):
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "-5", "0", "1h"])
def test_wrong_time_limits_are_refused(text):
    with pytest.raises(StudyError, match="time"):
        minutes(text)


def test_without_slurm_it_is_said_where_to_type_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(StudyError, match="no sbatch on this machine"):
        submit(SimpleNamespace(runs=tmp_path), [], Resources(), None, False, False)
    assert queue() == {}


def test_a_list_of_devices_is_refused_on_slurm_before_anything_is_prepared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError, match="name one device, or none"):
        reproduce("smoke", device="cuda:0,cuda:1", slurm=Resources())
    assert not list(tmp_path.iterdir())


def test_nothing_is_queued_where_nothing_is_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError, match="--report-only runs nothing, and --engine slurm queues every run"):
        reproduce("smoke", slurm=Resources(), report_only=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [("--partition", "gpu"), ("--gpus", "0"), ("--time", "24:00:00"), ("--qos", "a")])
def test_what_is_asked_of_slurm_is_refused_without_it(tmp_path, monkeypatch, capfd, options):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mlrpl", "reproduce", "smoke", *options])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"mlrpl: {options[0]} is for Slurm alone: type --engine slurm too, or leave it out"
    assert not list(tmp_path.iterdir())


# With Slurm. The first two start no training.


def test_an_array_is_queued_once_shown_and_cancelled(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = Workplace(write(tmp_path))
    place.runs.mkdir(parents=True)
    assert {standing.state for standing in standings(place)} == {"waiting"}
    said = submit(place, place.jobs[:5], Resources(time="10", at_once=1), "cpu", False, False)
    assert said.startswith("5 runs queued as Slurm job ")
    record = read_json(place.runs / "slurm.json")
    assert len(record["runs"]) == 5
    assert record["report"] in queue()
    assert {*record["runs"].values()} <= queue().keys()
    assert "5 were queued before" in submit(place, place.jobs[:6], Resources(time="10"), "cpu", False, False)
    states = [standing.state for standing in standings(place)]
    assert states.count("queued") + states.count("running") == 6
    assert states.count("waiting") == 18
    assert "24 runs: " in described(place).splitlines()[0]
    assert cancel(place) == 7
    wait(lambda: not queue())
    assert cancel(place) == 0


@pytest.fixture
def nothing_starts(cluster) -> Iterator[None]:
    """What is queued waits."""
    names = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True, check=True).stdout.split()
    update = ["scontrol", "update", f"PartitionName={names[0]}"]
    subprocess.run([*update, "State=DOWN"], check=True)
    yield
    subprocess.run([*update, "State=UP"], check=True)


def test_what_changed_while_it_waited_is_queued_anew_and_nothing_else(nothing_starts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def queued(place: Workplace, *names: str) -> dict[str, str]:
        submit(place, [place.job(name) for name in names], Resources(time="10"), "cpu", False, False)
        return read_json(place.runs / "slurm.json")["runs"]

    place = Workplace(write(tmp_path))
    place.runs.mkdir(parents=True)
    queued(place, "vnet-1-s0", "mlrpl-1-s0")
    before = queued(place, "vnet-1-s1", "mlrpl-1-s1")  # another part of the runs: the first ones keep their keys
    place = Workplace(write(tmp_path, runs=[STUDY["runs"][0] | {"settings": {"iterations": 11}}, STUDY["runs"][1]]))
    after = queued(place, "vnet-1-s0", "mlrpl-1-s0", "mlrpl-1-s1")
    assert [name for name in before if after[name] != before[name]] == ["vnet-1-s0"]
    wait(lambda: before["vnet-1-s0"] not in queue())
    last = queued(place, *before)
    assert [name for name in after if last[name] != after[name]] == ["vnet-1-s1"]
    assert cancel(place) == 5
    wait(lambda: not queue())


WORK = """
import signal, sys, time
from pathlib import Path
def save(*_):
    Path("saved").write_text("checkpoint")
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
if Path("saved").exists():
    Path("done").write_text("after " + Path("saved").read_text())
else:
    Path("started").touch()
    time.sleep(600)
"""


@pytest.mark.parametrize("how", ["announced", "requeued"])
@pytest.mark.fault("a Slurm job is preempted or queued again")
def test_a_job_that_is_preempted_saves_and_goes_on(cluster, tmp_path, monkeypatch, how):
    """Slurm's announcement of a preemption or time limit reaches every process of the job, as it does here."""
    monkeypatch.chdir(tmp_path)
    executor = submitit.SlurmExecutor(tmp_path / "slurm", max_num_timeout=9)
    executor.update_parameters(time=10, job_name="work", signal_delay_s=30, additional_parameters={"requeue": True})
    job = executor.submit(Command([sys.executable, "-c", WORK], "work.log", {}))
    wait((tmp_path / "started").exists)
    time.sleep(1)
    if how == "announced":
        subprocess.run(["scancel", "--signal=USR2", job.job_id], check=True)
    else:
        subprocess.run(["scontrol", "requeue", job.job_id], check=True)
    wait((tmp_path / "done").exists)
    assert (tmp_path / "done").read_text() == "after checkpoint"
    wait(lambda: not queue())


def test_an_announcement_before_the_process_is_started_is_no_error():
    command = Command(["true"], "work.log", {"A": "b"})
    again = command.checkpoint().function
    assert (again.arguments, again.log, again.environment) == (command.arguments, command.log, command.environment)


# The notebooks' code without Jupyter, so that many runs take little; and slow enough to be hit in the middle.
QUICK = """
import time
import nbformat
import mlrpl.execution
import mlrpl.study
from mlrpl.methods.mlrpl import MLRPL

def execute(notebook, destination, **parameters):
    place = mlrpl.study.Workplace(parameters["STUDY"], parameters["RUNS"])
    {"02-train": place.train, "03-evaluate": place.evaluate}[notebook](parameters["RUN"], parameters["DEVICE"])
    nbformat.write(nbformat.v4.new_notebook(), destination)

mlrpl.execution.execute = execute

class Quick(MLRPL):
    def loss(self, batch, step):
        time.sleep(0.2)
        return super().loss(batch, step)
"""


@pytest.mark.slow
@pytest.mark.fault("Slurm jobs killed and queued again")
def test_a_study_under_random_kills_ends_with_the_rows_of_an_undisturbed_one(
    cluster, tmp_path, monkeypatch, record_property
):
    """24 runs in two slots; what is undisturbed runs in this process, one after the other."""
    (tmp_path / "quick.py").write_text(QUICK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    runs = [{**run, "method": "quick:Quick"} for run in STUDY["runs"]]
    runs[1]["settings"] = {"beta_max": 0.5}
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, runs=runs)

    monkeypatch.chdir(tmp_path / "here")
    here = Workplace("array.yaml")
    assert len(here.jobs) == 24
    with monkeypatch.context() as hurried:
        hurried.setattr(time, "sleep", lambda _: None)
        for job in here.jobs:
            here.train(job.run.name, "cpu")
            here.evaluate(job.run.name, "cpu")
    collect(here.jobs, Results.load(tmp_path / "nothing")).save(tmp_path / "expected")

    monkeypatch.chdir(tmp_path / "there")
    command = [sys.executable, "-m", "mlrpl", "reproduce", "array.yaml", "--engine", "slurm", "--device", "cpu"]
    killed = {"requeued": 0, "announced": 0, "kill -9": 0}
    for _ in range(10):
        subprocess.run(command, check=True, capture_output=True)
        while ours := [job for job, (state, _) in queue().items() if state != "COMPLETING"]:
            time.sleep(random.uniform(2, 20))
            running = [job for job, (state, _) in queue().items() if state == "RUNNING" and "_" in job]
            if running and sum(killed.values()) < 24:
                how = random.choice(list(killed))
                killed[how] += kill(how, random.choice(running))
            assert ours
        if all(standing.state == "finished" for standing in standings(Workplace("array.yaml"))):
            break
    print(killed)
    record_property("tried", sum(killed.values()))
    assert sum(killed.values()) >= 6
    for name in ("metrics", "checks"):
        assert Path(f"results/array/{name}.csv").read_bytes() == (tmp_path / f"expected/{name}.csv").read_bytes(), name
    measured_of = {
        "runs": ["seconds", "step_seconds", "seconds_evaluate", "peak_memory_mb", "commit"],
        "curves": ["seconds"],
    }
    for name, measured in measured_of.items():
        found, expected = (
            pd.read_csv(at / f"{name}.csv", dtype=str).drop(columns=measured)
            for at in (Path("results/array"), tmp_path / "expected")
        )
        pd.testing.assert_frame_equal(found, expected)
    assert list(Path("runs").rglob("*.partial*")) == []


def kill(how: str, job: str) -> bool:
    """Requeue or announce through Slurm; kill -9 the process of the run, whose job then fails."""
    if how == "kill -9":
        found = [p for p in psutil.process_iter(["cmdline"]) if "array.yaml" in (p.info["cmdline"] or [])]
        found = [p for p in found if p.info["cmdline"][3:4] == ["run"]]
        if found:
            random.choice(found).kill()
        return bool(found)
    asked = {"requeued": ["scontrol", "requeue", job], "announced": ["scancel", "--signal=USR2", job]}[how]
    try:
        return subprocess.run(asked, capture_output=True, check=False, timeout=5).returncode == 0
    except subprocess.TimeoutExpired:  # of a job that is just being started scancel asks again and again
        return False


@pytest.mark.slow
def test_a_thousand_runs_are_expanded_queued_and_shown_in_under_a_minute(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    place = Workplace(write(tmp_path, seeds=list(range(500))))
    place.runs.mkdir(parents=True)
    assert len(place.jobs) == 1000
    expanded = time.monotonic()
    monkeypatch.setattr(slurm, "run_command", lambda *_: [sys.executable, "-c", "0"])
    submit(place, place.jobs, Resources(time="10"), "cpu", False, False)
    queued = time.monotonic()
    text = described(Workplace("array.yaml"))
    shown = time.monotonic()
    cancel(place)
    print(f"expanded in {expanded - started:.1f} s, queued in {queued - expanded:.1f}, shown in {shown - queued:.1f}")
    assert len(text.splitlines()) == 1001
    assert shown - started < 60
    wait(lambda: not queue())
