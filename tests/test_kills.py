"""kill -9 in every step: whatever the moment, going on ends with the bytes of an undisturbed study.

A short form; `make test-faults` sets KILLS=200.
"""

import os
import random
from pathlib import Path

import kills
import pytest

KILLS = int(os.environ.get("KILLS", 12))
SHARES = {"prepare": 0.2, "train": 0.3, "evaluate": 0.2, "report": 0.3}


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> dict[str, kills.Stage]:
    """Each begins where the one before it ended."""
    root = tmp_path_factory.mktemp("kills")
    steps = {"prepare": kills.prepare, "train": kills.run, "evaluate": kills.run, "report": kills.report}
    base, stages = kills.write_study(root / "base"), {}
    for name, step in steps.items():
        if name == "evaluate":
            base = without_evaluation(base, root / "trained")
        (root / name).mkdir()
        stages[name] = kills.Stage(step, base, root / name)
        base = stages[name].done
    return stages


def without_evaluation(done: Path, folder: Path) -> Path:
    kills.shutil.copytree(done, folder)
    (run,) = (folder / "runs/killed").glob(f"{kills.RUN}-*")
    for name in ("metrics.csv", "predictions.npz", "03-evaluate.ipynb"):
        (run / name).unlink()
    provenance = kills.json.loads((run / "provenance.json").read_text())
    del provenance["evaluate"]
    (run / "provenance.json").write_text(kills.json.dumps(provenance))
    return folder


def test_what_must_be_the_same_is_not_little(stages):
    """The undisturbed executions agree on all that matters, so that the comparison below can fail."""
    same = {name.rpartition("/")[2] for stage in stages.values() for name in stage.same}
    assert {"store.json", "image.npy", "last.pt", "published.pt", "log.csv", "checks.csv", "metrics.csv"} <= same
    assert {"predictions.npz", "runs.csv", "curves.csv", "comparison.csv", "distributions.svg", "contours.svg"} <= same
    for name, stage in stages.items():
        assert stage.events > 5, name


@pytest.mark.parametrize(
    "stage", [pytest.param(name, marks=pytest.mark.fault(f"kill -9 in {name}")) for name in SHARES]
)
def test_killed_anywhere_it_ends_with_the_right_bytes(stages, stage, record_property):
    seed = random.randrange(10**9)
    times = round(KILLS * SHARES[stage])
    lost = stages[stage].kill(times, random.Random(seed))
    record_property("tried", times)
    record_property("lost", lost)
    assert lost == 0, f"seed {seed}"


@pytest.mark.slow
@pytest.mark.parametrize("stage", SHARES)
def test_killed_at_each_moment_of_writing_it_ends_with_the_right_bytes(stages, stage):
    """All of them, once: chance takes long to find the few between two files that belong together."""
    assert stages[stage].kill_at_each_event() == 0


@pytest.mark.fault("two studies write into the same folders")
def test_two_studies_that_share_their_folders_do_not_harm_each_other(tmp_path):
    """At the same time, on the same case store and the same page over all studies."""
    for shared in ("runs", "results"):
        (tmp_path / shared).mkdir()
    for name in ("first", "second"):
        folder = kills.write_study(tmp_path / name, name=name, title=name)
        for shared in ("runs", "results"):
            (folder / shared).symlink_to(tmp_path / shared)
    processes = [kills.start(kills.whole, tmp_path / name)[0] for name in ("first", "second")]
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0, 0]
    rows = [(tmp_path / "results" / name / "metrics.csv").read_text() for name in ("first", "second")]
    assert rows[0].replace("first", "second") == rows[1]
    overview = (tmp_path / "results/index.html").read_text(encoding="utf-8")
    assert all(f'href="{name}/index.html"' in overview for name in ("first", "second"))
    assert list(tmp_path.rglob("*.partial*")) == []
