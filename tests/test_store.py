"""The case store: the same bytes from the same input, all or nothing, and damage is named."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mlrpl.data import open_store, prepare
from mlrpl.data.phantom import Phantom
from mlrpl.data.prepare import block_label
from mlrpl.errors import StudyError

SMALL = {"train": 3, "test": 2, "size": (24, 20, 16)}


def dataset(step=1, **options):
    return SimpleNamespace(name="small", source="phantom", options=SMALL | options, step=step)


def content(folder):
    """Bytes of every file of a folder by relative name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_layout_and_reading(tmp_path):
    done = []
    store = prepare(dataset(), None, tmp_path / "store", lambda *counts: done.append(counts))
    assert done == [(n, 5) for n in range(1, 6)]
    cases = ["train-000", "train-001", "train-002", "test-000", "test-001"]
    assert sorted(content(tmp_path / "store")) == sorted(
        ["store.json", *(f"cases/{case}/{name}.npy" for case in cases for name in ("image", "label"))]
    )
    assert store.ids("train") + store.ids("test") == cases
    assert store.ids("val") == []
    case = store.load("test-001")
    assert (case.id, case.split, case.spacing) == ("test-001", "test", (1.0, 1.0, 1.0))
    assert (case.image.shape, case.image.dtype) == ((1, 24, 20, 16), np.float32)
    assert (case.label.shape, case.label.dtype) == ((24, 20, 16), np.uint8)
    reopened = open_store(tmp_path / "store")
    assert reopened.fingerprint == store.fingerprint
    assert len(store.fingerprint) == 16
    assert visible(tmp_path) == ["store"]


def test_the_same_input_gives_the_same_bytes(tmp_path):
    first = prepare(dataset(), None, tmp_path / "one")
    second = prepare(dataset(), None, tmp_path / "two")
    assert content(first.folder) == content(second.folder)
    text = (first.folder / "store.json").read_text()
    assert str(tmp_path) not in text


def test_the_fingerprint_names_arrays_and_splits(tmp_path):
    prints = [
        prepare(made, None, tmp_path / str(n)).fingerprint
        for n, made in enumerate([dataset(), dataset(seed=1), dataset(train=2), dataset(step=2)])
    ]
    assert len(set(prints)) == 4


def test_a_finished_store_is_opened_and_not_built_again(tmp_path, monkeypatch):
    folder = tmp_path / "store"
    before = prepare(dataset(), None, folder).fingerprint
    monkeypatch.setattr(Phantom, "read", lambda *_: pytest.fail("read again"))
    assert prepare(dataset(), None, folder).fingerprint == before


def test_changed_settings_or_a_damaged_store_are_prepared_again(tmp_path):
    folder = tmp_path / "store"
    old = prepare(dataset(), None, folder).fingerprint
    new = prepare(dataset(seed=1), None, folder).fingerprint
    assert new != old
    assert open_store(folder).fingerprint == new
    (folder / "cases/train-001/image.npy").unlink()
    assert prepare(dataset(seed=1), None, folder).fingerprint == new
    open_store(folder).load("train-001")
    assert visible(tmp_path) == ["store"]


def test_a_source_that_draws_other_cases_is_prepared_again(tmp_path, monkeypatch):
    prepare(dataset(), None, tmp_path / "store")
    monkeypatch.setattr(Phantom, "version", Phantom.version + 1)
    drawn, read = [], Phantom.read
    monkeypatch.setattr(Phantom, "read", lambda self, entry: drawn.append(entry.id) or read(self, entry))
    prepare(dataset(), None, tmp_path / "store")
    assert len(drawn) == 5


KILLED = """
import os, sys
from types import SimpleNamespace
from pathlib import Path
from mlrpl.data import prepare
from mlrpl.data.phantom import Phantom
read, seen = Phantom.read, []
def die(self, entry):
    seen.append(entry)
    if len(seen) == 4:
        os._exit(9)
    return read(self, entry)
Phantom.read = die
prepare(SimpleNamespace(name="small", source="phantom", options=eval(sys.argv[1]), step=1), None, Path(sys.argv[2]))
"""


def run_python(code, *arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        check=False,
        **kwargs,
    )


@pytest.mark.parametrize("before", [False, True])
def test_killed_half_way_then_again_gives_the_same_bytes(tmp_path, before):
    folder = tmp_path / "store"
    if before:
        prepare(dataset(seed=5), None, folder)
        untouched = content(folder)
    killed = run_python(KILLED, SMALL, folder)
    assert killed.returncode == 9, killed.stderr
    if before:
        assert content(folder) == untouched
    else:
        assert not folder.exists()
    prepare(dataset(), None, folder)
    assert content(folder) == content(prepare(dataset(), None, tmp_path / "undisturbed").folder)
    assert visible(tmp_path) == ["store", "undisturbed"]


def test_a_killed_preparation_goes_on_where_it_was(tmp_path, monkeypatch):
    folder = tmp_path / "store"
    assert run_python(KILLED, SMALL, folder).returncode == 9
    finished = {path.stem for path in (tmp_path / ".store.partial/records").glob("*.json")}
    assert finished
    half_written = tmp_path / ".store.partial/.settings.json.9.partial"  # a kill amidst a write leaves such a file
    half_written.write_text("{")
    drawn, read = [], Phantom.read
    monkeypatch.setattr(Phantom, "read", lambda self, entry: drawn.append(entry.id) or read(self, entry))
    store = prepare(dataset(), None, folder)
    assert set(drawn) == {*store.ids("train"), *store.ids("test")} - finished
    assert not (folder / "records").exists()
    assert not (folder / half_written.name).exists()


def test_another_preparation_takes_nothing_from_a_killed_one(tmp_path):
    assert run_python(KILLED, SMALL, tmp_path / "store").returncode == 9
    other = prepare(dataset(seed=9), None, tmp_path / "store")
    assert content(other.folder) == content(prepare(dataset(seed=9), None, tmp_path / "undisturbed").folder)


def test_the_number_of_workers_changes_nothing(tmp_path):
    one = prepare(dataset(), None, tmp_path / "one", workers=1)
    assert content(one.folder) == content(prepare(dataset(), None, tmp_path / "three", workers=3).folder)


FULL = """
import signal, sys
from pathlib import Path
from types import SimpleNamespace
from mlrpl.data import prepare
from mlrpl.errors import StudyError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    prepare(SimpleNamespace(name="small", source="phantom", options=eval(sys.argv[1]), step=1), None, Path(sys.argv[2]))
except StudyError as error:
    sys.exit(str(error))
"""


def test_a_write_that_fails_is_one_line_and_leaves_nothing(tmp_path):
    def limit():  # as a full disk does: a file cannot grow
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    result = run_python(FULL, SMALL, tmp_path / "store", preexec_fn=limit)
    assert result.returncode == 1
    assert result.stderr.strip() == f"{tmp_path / 'store'}: cannot write the case store: File too large"
    assert visible(tmp_path) == []


@pytest.fixture
def unprivileged():
    """Become nobody for a while: mode bits do not bind root. Yields a folder that nobody may read and not write."""
    if os.getuid() != 0:
        pytest.skip("needs root to become another user")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)

        @contextlib.contextmanager
        def nobody():
            os.seteuid(65534)
            try:
                yield
            finally:
                os.seteuid(0)

        yield Path(folder), nobody


def test_a_read_only_place_is_one_line_and_a_finished_store_there_opens(unprivileged):
    parent, nobody = unprivileged
    with nobody(), pytest.raises(StudyError) as error:
        prepare(dataset(), None, parent / "store")
    assert one_line(error) == f"{parent / 'store'}: cannot write the case store: Permission denied"
    assert visible(parent) == []
    expected = prepare(dataset(), None, parent / "store").fingerprint
    with nobody():
        assert prepare(dataset(), None, parent / "store").fingerprint == expected


def damage_json(folder):
    (folder / "store.json").write_text("{")


def damage_index(folder):
    index = json.loads((folder / "store.json").read_text())
    del index["cases"][0]["arrays"]
    (folder / "store.json").write_text(json.dumps(index))


def damage_format(folder):
    (folder / "store.json").write_text('{"format": 0}')


def damage_missing(folder):
    (folder / "cases/train-001/label.npy").unlink()


def damage_short(folder):
    path = folder / "cases/train-001/image.npy"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (damage_json, "store.json"),
        (damage_index, "store.json"),
        (damage_format, "format"),
        (damage_missing, "cases/train-001/label.npy"),
        (damage_short, "cases/train-001/image.npy"),
    ],
)
def test_opening_names_what_is_damaged(tmp_path, damage, named):
    folder = prepare(dataset(), None, tmp_path / "store").folder
    damage(folder)
    with pytest.raises(StudyError, match=named) as error:
        open_store(folder)
    one_line(error)


def test_loading_names_a_changed_byte(tmp_path):
    store = prepare(dataset(), None, tmp_path / "store")
    path = store.folder / "cases/train-001/image.npy"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    reopened = open_store(store.folder)
    reopened.load("train-000")
    with pytest.raises(StudyError, match=r"cases/train-001/image\.npy") as error:
        reopened.load("train-001")
    assert "prepare" in one_line(error)


def test_missing_store_and_unknown_case(tmp_path):
    with pytest.raises(StudyError, match="no case store"):
        open_store(tmp_path / "nowhere")
    with pytest.raises(StudyError, match="train-999"):
        prepare(dataset(), None, tmp_path / "store").load("train-999")


def test_an_unknown_source_is_named(tmp_path):
    with pytest.raises(StudyError, match="'mri'"):
        prepare(SimpleNamespace(name="x", source="mri", options={}, step=1), None, tmp_path / "store")


def test_half_resolution(tmp_path):
    whole = prepare(dataset(), None, tmp_path / "whole").load("train-000")
    half = prepare(dataset(step=2), None, tmp_path / "half").load("train-000")
    np.testing.assert_array_equal(half.image, whole.image[:, ::2, ::2, ::2])
    blocks = whole.label.reshape(12, 2, 10, 2, 8, 2).mean(axis=(1, 3, 5))
    np.testing.assert_array_equal(half.label, blocks > 0.5)
    assert half.spacing == (2.0, 2.0, 2.0)


def test_block_label_of_several_classes_and_odd_sizes():
    label = np.zeros((5, 4, 2), np.uint8)
    label[:2, :2] = 1  # a whole block of class 1
    label[2:4, :2, 0] = 2  # exactly half: background
    label[:2, 2:] = 3
    label[0, 2, 0] = 2  # 7 of 8
    label[4, :2] = 2  # a block that the border cuts to half its size, all class 2
    result = block_label(label, 2)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result[..., 0], [[1, 3], [0, 0], [2, 0]])
