"""What a newcomer meets first: lock, conda file, Makefile, package."""

import ast
import doctest
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from ruff import find_ruff_bin

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "mlrpl").rglob("*.py")
    if re.search(r"^ *>>> (?!.*SKIP)", path.read_text(encoding="utf-8"), re.MULTILINE)
)
CUDA = re.compile("^(nvidia-|cuda-|triton)")  # what torch's CUDA build brings and pins itself


def pins(lines: list[str]) -> dict[str, str]:
    """Version of each package from lines that are all name==version."""
    pairs = [line.split("==") for line in lines]
    assert [line for line, pair in zip(lines, pairs, strict=True) if len(pair) != 2] == []
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.fixture(scope="module")
def lock() -> dict[str, str]:
    return pins((ROOT / "requirements.lock").read_text(encoding="utf-8").split())


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings_give_what_they_say(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0 == found.failed


def test_conda_file_has_the_versions_of_the_lock(lock):
    conda, pip = [], []
    for entry in yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]:
        pip += entry["pip"] if isinstance(entry, dict) else []
        conda += [entry] if isinstance(entry, str) else []
    assert pip.pop() == "-e ."
    assert pins(pip) == lock
    (python,) = [entry.removeprefix("python=") for entry in conda if entry.startswith("python=")]
    assert tuple(map(int, python.split("."))) >= (3, 11)


def test_lock_holds_every_direct_dependency_within_its_range(lock):
    direct = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
    wrong = [str(r) for r in direct if lock.get(canonicalize_name(r.name)) not in r.specifier]
    assert wrong == []


def test_lock_can_be_installed_on_every_python_that_the_package_allows(lock):
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    needed = {name: metadata.metadata(name).get("Requires-Python", "") for name in lock}
    assert [name for name, range_ in needed.items() if not SpecifierSet(range_).contains(oldest)] == []


def test_lock_is_closed(lock):
    """What a locked package needs is locked too, and nothing is that belongs to one build of torch."""
    missing = set()
    for name in lock:
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            used = needed.marker is None or needed.marker.evaluate({"extra": ""})
            if used and not CUDA.match(needed.name) and canonicalize_name(needed.name) not in lock:
                missing.add(f"{name} needs {needed.name}")
    assert missing == set()
    assert [name for name in lock if CUDA.match(name)] == []
    assert "+" not in lock["torch"]


def imports(source: str) -> set[str]:
    """Top-level names that Python source imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def sources(folder: str) -> list[str]:
    """Python files, and the code cells of notebooks without their magic lines."""
    found = [path.read_text(encoding="utf-8") for path in (ROOT / folder).rglob("*.py")]
    for path in (ROOT / folder).rglob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found += [re.sub(r"(?m)^\s*[%!].*", "", "".join(c["source"])) for c in cells if c["cell_type"] == "code"]
    return found


@pytest.mark.parametrize("folder", ["mlrpl", "notebooks", "tests"])
def test_everything_imported_is_a_declared_dependency(folder):
    declared = PROJECT["dependencies"] + (PROJECT["optional-dependencies"]["dev"] if folder == "tests" else [])
    declared = {canonicalize_name(Requirement(line).name) for line in declared}
    own = {"mlrpl", *(path.stem for path in (ROOT / "tests").glob("*.py"))}
    providers = metadata.packages_distributions()
    undeclared = {
        name
        for name in set().union(*map(imports, sources(folder))) - own - sys.stdlib_module_names
        if not declared & {canonicalize_name(provider) for provider in providers.get(name, [])}
    }
    assert undeclared == set()


@pytest.mark.parametrize("check", [["check"], ["format", "--check"]])
def test_code_is_as_ruff_wants_it(check):
    done = subprocess.run([find_ruff_bin(), *check, "."], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_notebooks_are_kept_without_outputs():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert not cell.get("outputs"), path.name
            assert cell.get("execution_count") is None, path.name


def test_git_keeps_the_code_and_the_results_and_ignores_runs():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone: nothing to ignore")
    paths = ["runs/phantom/log.csv", ".venv/bin/python", "mlrpl/data/store.py", "results/phantom/metrics.csv"]
    ignored = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ignored.stdout.split() == paths[:2]


def test_ci_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_wheel_brings_templates_and_studies(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE", "mlrpl"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path / "out", "."]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("**/*.py", "studies/*.yaml", "templates/**/*.*")
        for path in (ROOT / "mlrpl").glob(pattern)
    }
    assert wanted - inside == set()


# The Makefile, with an interpreter that only says what it was asked for: "calls" is its diary.
PYTHON = r"""#!/bin/sh
case "$1" in
  -c) exit ${TOO_OLD:-0} ;;
  --version) echo "Python 3.9.1"; exit ;;
esac
echo "python $*" >>"$DIARY"
case "$*" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$MLRPL" "$3/bin/mlrpl" ;;
  *"$BREAK_AT"*) [ -z "$BREAK_AT" ] || exit 1 ;;
esac
"""
MLRPL = r"""#!/bin/sh
for word; do printf '[%s]' "$word"; done >>"$DIARY"
echo >>"$DIARY"
"""


@pytest.fixture
def make(tmp_path):
    """``make(arguments, **environment)`` in a copy of the project; ``make.calls()`` empties the diary."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"python3": PYTHON, "mlrpl": MLRPL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    diary = tmp_path / "diary"

    def run(*arguments, **environment):
        base = {"PATH": os.environ["PATH"], "DIARY": str(diary), "MLRPL": str(tools / "mlrpl")}
        command = ["make", "--no-print-directory", *arguments]
        if not any(argument.startswith("PYTHON=") for argument in arguments):
            command.append(f"PYTHON={tools / 'python3'}")
        return subprocess.run(
            command, cwd=tmp_path, env=base | environment, capture_output=True, text=True, check=False
        )

    def calls():
        text = diary.read_text() if diary.exists() else ""
        diary.unlink(missing_ok=True)
        return text.splitlines()

    run.calls, run.folder, run.tools = calls, tmp_path, tools
    return run


INSTALLATION = [
    "python -m venv .venv",
    "python -m pip install -r requirements.lock",
    "python -m pip install --no-deps --no-build-isolation -e .",
]


def test_help_is_the_default_and_lists_every_target(make):
    shown = make().stdout
    targets = "reproduce data bench test test-all test-faults advisories lab lint lock clean"
    for target in targets.split():
        assert re.search(rf"^  {target} ", shown, re.M), target
    variables = "STUDY DATA DATASET JOBS DEVICE ONLY ENGINE ADOPT ENV PYTHON TORCH_INDEX"
    for variable in variables.split():
        assert f"  {variable}=" in shown
    assert make.calls() == []


def test_environment_is_made_once_and_again_when_its_inputs_change(make):
    assert make("reproduce").returncode == 0
    assert make.calls() == [*INSTALLATION, "[reproduce][phantom]"]
    assert make("reproduce").returncode == 0
    assert make.calls() == ["[reproduce][phantom]"]
    stamp = (make.folder / ".venv" / ".complete").stat().st_mtime
    os.utime(make.folder / "requirements.lock", (stamp + 5, stamp + 5))
    assert make("environment").returncode == 0
    assert make.calls() == INSTALLATION


def test_interrupted_installation_starts_over(make):
    assert make("test", BREAK_AT="-r requirements.lock").returncode != 0
    assert not (make.folder / ".venv" / ".complete").exists()
    half = make.folder / ".venv" / "half-installed"
    half.touch()
    make.calls()
    assert make("test").returncode == 0
    assert not half.exists()
    assert make.calls() == [*INSTALLATION, "python -m pytest -n 2 --dist worksteal"]


def test_settings_reach_the_command_as_typed_and_only_those_given(make):
    data = "/a folder/with 'quotes' and \"more\""
    made = make("reproduce", "STUDY=la", f"DATA={data}", "JOBS=1", "DEVICE=cuda:1", "ONLY=mlrpl 8", "ADOPT=1")
    assert made.returncode == 0, made.stderr
    words = ["reproduce", "la", "--jobs", "1", "--data", data, "--device", "cuda:1", "--only", "mlrpl 8", "--adopt"]
    assert make.calls()[-1] == "".join(f"[{word}]" for word in words)
    make("reproduce", "ADOPT=0")
    assert make.calls()[-1] == "[reproduce][phantom]"


def test_data_names_its_data_set(make):
    assert make("data", "DATASET=hippocampus").returncode == 0
    assert make.calls()[-1] == "[download][hippocampus]"
    made = make("data")
    assert made.returncode != 0
    assert "make data DATASET=hippocampus" in made.stderr


def test_a_cluster_gets_what_is_asked_of_it_and_no_limit_of_runs_unless_typed(make):
    make("reproduce", "STUDY=la", "ENGINE=slurm", "PARTITION=gpu", "GPUS=1", "TIME=2-0")
    words = ["reproduce", "la", "--engine", "slurm", "--partition", "gpu", "--gpus", "1", "--time", "2-0"]
    assert make.calls()[-1] == "".join(f"[{word}]" for word in words)
    make("reproduce", "ENGINE=slurm", "JOBS=9")
    assert make.calls()[-1] == "[reproduce][phantom][--jobs][9][--engine][slurm]"
    make("reproduce", "PARTITION=gpu", "TIME=2-0")  # the command refuses it without an engine
    assert make.calls()[-1] == "[reproduce][phantom][--partition][gpu][--time][2-0]"
    make("reproduce", TIME="%E real")  # somebody's own variable
    assert make.calls()[-1] == "[reproduce][phantom]"


def test_the_fault_tests_are_a_target_of_their_own(make):
    make("test-faults")
    assert make.calls()[-1] == "python -m pytest -n 2 --dist worksteal -m fault"


def test_slow_tests_run_on_request(make):
    make("test-all")
    assert make.calls()[-1] == "python -m pytest -n 2 --dist worksteal -m slow or not slow"


def test_build_of_torch_is_taken_from_its_index_first(make, lock):
    make("environment", "TORCH_INDEX=https://example.org/cpu")
    torch = f"python -m pip install --index-url https://example.org/cpu torch=={lock['torch']}"
    assert make.calls() == [INSTALLATION[0], torch, *INSTALLATION[1:]]


def test_old_or_missing_interpreter_is_told_in_one_line(make):
    for made, version in ((make("test", TOO_OLD="1"), "Python 3.9.1"), (make("test", "PYTHON=no-such"), "not there")):
        assert made.returncode != 0
        (line,) = [line for line in made.stderr.splitlines() if not line.startswith("make: ***")]
        assert "Python 3.11 or newer" in line
        assert version in line
    assert not (make.folder / ".venv").exists()


def test_active_environment_is_used_as_it_is(make):
    path = f"{make.tools}:{os.environ['PATH']}"
    assert make("reproduce", "ENV=active", PATH=path, CONDA_PREFIX="/somewhere").returncode == 0
    assert make.calls() == ["[reproduce][phantom]"]
    assert not (make.folder / ".venv").exists()
    made = make("reproduce", "ENV=active", PATH=path)
    assert made.returncode != 0
    assert "no conda or virtual environment is active" in made.stderr
    made = make("reproduce", "ENV=active", PATH="/usr/bin:/bin", VIRTUAL_ENV="/somewhere")
    assert made.returncode != 0
    assert "lacks mlrpl" in made.stderr


def test_clean_keeps_runs_and_results(make):
    make("environment")
    for name in ("runs", "results"):
        (make.folder / name).mkdir()
        (make.folder / name / "precious").touch()
    made = make("clean")
    assert not (make.folder / ".venv").exists()
    assert (make.folder / "runs" / "precious").exists()
    assert (make.folder / "results" / "precious").exists()
    assert "runs/ and results/ are as they were" in made.stdout
