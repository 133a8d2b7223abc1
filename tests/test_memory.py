"""How much memory is left, where a control group limits it."""

import pytest

from mlrpl import memory
from mlrpl.errors import StudyError

GIGABYTE = 10**9


@pytest.fixture
def group(tmp_path, monkeypatch):
    """A control group of 16 GB, 15 of them in use, 12 of these for files read earlier."""
    for name, text in {
        "max": f"{16 * GIGABYTE}",
        "current": f"{15 * GIGABYTE}",
        "stat": f"anon {3 * GIGABYTE}\nfile {12 * GIGABYTE}\ninactive_file {12 * GIGABYTE}",
    }.items():
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("", (), {"available": 64 * GIGABYTE}))
    return tmp_path


def test_files_read_earlier_do_not_count_as_memory_in_use(group):
    assert memory.available() == 13 * GIGABYTE


def test_a_group_without_limit_leaves_what_the_machine_has(group):
    (group / "memory.max").write_text("max\n")
    assert memory.available() == 64 * GIGABYTE


def test_what_does_not_fit_is_refused_with_advice(group):
    memory.require(12 * GIGABYTE, "run a", "use fewer cases")
    with pytest.raises(StudyError, match="run a needs 14 GB of memory, but 13 GB is left; use fewer cases"):
        memory.require(14 * GIGABYTE, "run a", "use fewer cases")
