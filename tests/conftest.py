"""What all tests share: one thread a process, no window, no user settings, and a browser where there is one."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

# Before anything imports torch or matplotlib, and for every process that a test starts.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MPLBACKEND": "agg",
    "JUPYTER_PLATFORM_DIRS": "1",  # Jupyter asks for a decision, or warns
}

import browser as chromium


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes half of the time first, so that one process does it and another all the rest."""
    items.sort(key=lambda item: item.path.name != "test_reproduce.py")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if marker := item.get_closest_marker("fault"):
        item.user_properties.append(("fault", marker.args[0]))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Which faults were done, how often, and how many of them lost something."""
    rows: dict[str, list[int]] = {}
    for report in [r for outcome in ("passed", "failed") for r in terminalreporter.stats.get(outcome, [])]:
        facts = dict(report.user_properties)
        if "fault" in facts and (report.when == "call" or report.failed):
            row = rows.setdefault(facts["fault"], [0, 0])
            row[0] += facts.get("tried", 1)
            row[1] += max(facts.get("lost", 0), int(report.failed))
    if rows:
        terminalreporter.section("faults")
        terminalreporter.line("| fault | times tried | lost |\n| --- | ---: | ---: |")
        for name, (tried, lost) in rows.items():
            terminalreporter.line(f"| {name} | {tried} | {lost} |")


@pytest.fixture(autouse=True, scope="session")
def _own_settings(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Jupyter, IPython and matplotlib must neither read nor write the user's own settings."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "MPLCONFIGDIR"):
        os.environ[name] = str(tmp_path_factory.mktemp(name.lower()))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    """Headless Chromium without a network."""
    program = chromium.find()
    if program is None:
        pytest.skip("no Chromium on this machine: pages are not tried in a browser")
    browser = chromium.Browser(program, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()
