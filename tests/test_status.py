"""What `mlrpl status` and `mlrpl cancel` say of runs on this machine; on Slurm: test_slurm.py."""

import shutil
import signal
import sys
from pathlib import Path

import pytest
import yaml

from mlrpl import cli
from mlrpl.errors import StudyError
from mlrpl.files import write_json
from mlrpl.locks import locked
from mlrpl.results import Results, collect
from mlrpl.status import described, standings
from mlrpl.study import Workplace

STUDY = {
    "name": "stands", "title": "Stands", "seeds": [0, 1, 2, 3, 4],
    "dataset": {"name": "drawn", "source": "phantom", "options": {"train": 3, "test": 1, "size": [24, 24, 16]}},
    "settings": {
        "patch": [16, 16, 16], "stride": [8, 8, 16], "filters": 2, "iterations": 2, "check_from": 2, "check_every": 2,
        "precision": "float32",
    },
    "runs": [{"variant": "vnet", "method": "vnet", "title": "V-Net", "labelled": 1}],
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch) -> Workplace:
    monkeypatch.chdir(tmp_path)
    Path("stands.yaml").write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    return Workplace("stands.yaml")


def test_nothing_run_yet_is_said(place):
    with pytest.raises(StudyError, match="nothing in runs/ yet; type mlrpl train or"):
        standings(place)


def test_runs_trained_and_evaluated_one_step_at_a_time_are_told_too(place):
    name, folder = place.jobs[0].run.name, place.jobs[0].folder
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    write_json(folder / "progress.json", {"iteration": 1, "seconds_left": 90})
    first, *_ = standings(place)
    assert (first.state, first.detail) == ("stopped", "iteration 1 of 2, 2 min left")
    (folder / "checkpoint.pt").unlink()
    place.train(name, "cpu")
    first, *_ = standings(place)
    assert (first.state, first.detail) == ("trained", "not evaluated yet")
    place.evaluate(name, "cpu")
    first, *others = standings(place)
    assert first.state == "finished" and first.detail.endswith("of training")
    assert {standing.state for standing in others} == {"waiting"}
    (folder / "worker.log").write_text("mlrpl: run vnet-1-s0: the loss is nan at iteration 1\n")  # of a time before
    assert standings(place)[0] == first


def test_what_another_study_has_done_is_done_unless_it_lacks_the_audit(place):
    name = "mlrpl-1-s0"
    runs = [*STUDY["runs"], {"variant": "mlrpl", "method": "mlrpl", "title": "MLRPL", "labelled": 1}]
    for study, changes in {"with-mine": {}, "audited": {"audit": {"every": 1}}}.items():
        Path(f"{study}.yaml").write_text(yaml.safe_dump({**STUDY, "name": study, "runs": runs, **changes}))
    for run in ("vnet-1-s0", "vnet-1-s1", "vnet-1-s2"):
        place.train(run, "cpu")
        if run != "vnet-1-s2":  # another process may be at it
            place.evaluate(run, "cpu")
    mine, audited = Workplace("with-mine.yaml"), Workplace("audited.yaml")
    assert [job.complete for job in mine.jobs if job.run.method == "vnet"] == [True, True, False, False, False]
    assert mine.job("vnet-1-s0").folder == place.job("vnet-1-s0").folder
    assert mine.job("vnet-1-s2").folder.parent == mine.runs
    mine.train(name, "cpu")
    mine.evaluate(name, "cpu")
    assert not audited.job(name).finished("train") and audited.job(name).key == mine.job(name).key
    unfinished = mine.root / "zzz" / mine.job(name).folder.name  # of a third study, named after the finished one
    unfinished.mkdir(parents=True)
    Path("fourth.yaml").write_text(yaml.safe_dump({**STUDY, "name": "fourth", "runs": runs}))
    assert Workplace("fourth.yaml").job(name).folder == mine.job(name).folder
    audited.train(name, "cpu")
    assert (audited.job(name).folder / "audit.csv").exists() and audited.job(name).folder.parent == audited.runs


def test_every_state_is_told_with_its_detail(place):
    finished, running, failed, stopped, _ = place.jobs
    for job in (running, failed, stopped):
        job.folder.mkdir(parents=True)
    place.train(finished.run.name, "cpu")
    place.evaluate(finished.run.name, "cpu")
    for notebook in ("02-train", "03-evaluate"):
        (finished.folder / f"{notebook}.ipynb").touch()
    write_json(running.folder / "progress.json", {"iteration": 1, "iterations": 2, "seconds_left": 600})
    (failed.folder / "worker.log").write_text("noise\nmlrpl: run vnet-1-s2: the loss is nan at iteration 7\n")
    (stopped.folder / "worker.log").write_text("mlrpl: run vnet-1-s3: interrupted; the same command goes on\n")
    with locked(running.folder, "busy"):
        found = {standing.run: standing for standing in standings(place)}
        text = described(place)
    assert [standing.state for standing in found.values()] == ["finished", "running", "failed", "stopped", "waiting"]
    assert found["vnet-1-s1"].detail.startswith("iteration 1 of 2, 10 min left; process ")
    log = failed.folder / "worker.log"
    assert found["vnet-1-s2"].detail == f"run vnet-1-s2: the loss is nan at iteration 7 ({log})"
    head, *lines = text.splitlines()
    assert head == "Study stands: 5 runs: 1 finished, 1 running, 1 failed, 1 stopped, 1 waiting"
    assert len(lines) == 5


def test_a_run_whose_process_is_still_importing_is_starting_not_failed(place):
    folder = place.jobs[0].folder
    folder.mkdir(parents=True)
    (folder / "worker.log").touch()
    with locked(place.runs, "busy"):
        assert (standings(place)[0].state, standings(place)[0].detail) == ("running", "starting")
    assert standings(place)[0].state == "failed"  # nobody is at it any more


def test_runs_that_coincide_are_told_once_and_committed_rows_are_named(place, monkeypatch, capfd):
    variants = [
        {"variant": "wr-hr", "title": "+ WR + HR"},
        {"variant": "ce", "title": "CE", "options": {"selection": "all"}},
    ]
    runs = [{"variant": "mlrpl", "method": "mlrpl", "title": "MLRPL", "labelled": 1}]
    ablation = {"name": "parts", "title": "Parts", "axis": "Loss", "labelled": 1, "seeds": [0], "variants": variants}
    changed = {**STUDY, "seeds": [0], "runs": runs, "ablations": [ablation]}
    Path("stands.yaml").write_text(yaml.safe_dump(changed), encoding="utf-8")
    place = Workplace("stands.yaml")
    assert len(place.jobs) == 3
    for stage in (place.train, place.evaluate):
        stage("mlrpl-1-s0", "cpu")
    told = {standing.run: standing.state for standing in standings(place)}
    assert told == {"mlrpl-1-s0": "finished", "parts-ce-1-s0": "waiting"}
    place.results.mkdir(parents=True)
    collect(place.jobs, Results.load(place.results)).save(place.results)
    shutil.rmtree(place.job("mlrpl-1-s0").folder)
    first, other = standings(Workplace("stands.yaml"))
    assert first.state == "committed" and first.detail == f"in {place.results}/; --adopt takes it as finished"
    assert other.state == "waiting"
    place.results.parent.rename("elsewhere")
    monkeypatch.setattr(sys, "argv", ["mlrpl", "status", "stands.yaml", "--results", "elsewhere"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert "committed  in elsewhere/stands/; --adopt takes it" in capfd.readouterr().out
    shutil.rmtree(place.runs)
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "nothing in runs/ yet; elsewhere/stands/ holds rows of 1 run, which --adopt" in capfd.readouterr().err


def test_cancel_asks_the_process_that_reproduces_the_study(place, monkeypatch, capfd):
    asked = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    monkeypatch.setattr(sys, "argv", ["mlrpl", "cancel", "stands.yaml"])
    place.runs.mkdir(parents=True)
    try:
        with locked(place.runs, "busy"), pytest.raises(SystemExit, match="0"):
            cli.main()
        assert asked == [signal.SIGTERM]  # a script's background commands do not hear SIGINT
        with pytest.raises(SystemExit, match="0"):
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, previous)
    told = capfd.readouterr().out.splitlines()
    assert told[0].startswith("asked to end: process ")
    assert told[1] == "study stands: nothing is queued or running"
