"""What all tests share: one thread a process, no window, no user settings, and a browser where there is one."""

import os
from collections.abc import Iterator

import pytest

# Before anything imports torch or matplotlib, and for every process that a test starts.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MPLBACKEND": "agg",
    "JUPYTER_PLATFORM_DIRS": "1",  # Jupyter asks for a decision, or warns
}

import browser as chromium


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
