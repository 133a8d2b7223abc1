"""Input that is wrong on purpose: one clear line, no code run, no memory taken that a header merely claims."""

import contextlib
import gzip
import io
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import SimpleITK
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mlrpl import tables
from mlrpl.config import load_study, study_names
from mlrpl.data.bounds import check_nrrd
from mlrpl.data.decathlon import Decathlon
from mlrpl.data.la import PREPARED, LeftAtrium
from mlrpl.data.volumes import read_nifti
from mlrpl.errors import StudyError
from mlrpl.memory import require
from mlrpl.report import Section, write_index
from mlrpl.training import load

CPU = torch.device("cpu")
FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ", 60)),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
HOSTILE_NAMES = [
    "a b",
    "it's",
    'say "x"',
    "Vorhof ü 心房",
    "<img src=x onerror=alert(1)>",
    "-rf",
    "%2e%2e",
    "$(id)",
    "a;b",
]


@contextlib.contextmanager
def little_memory(extra: int = 2_000_000_000) -> Iterator[None]:
    """Whatever tries to take more than this on top fails, instead of filling the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refused_in_one_line(work, *arguments) -> str:
    with pytest.raises(StudyError) as error:
        work(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


# Studies.

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates()
ANYTHING = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
STUDY = yaml.safe_load((Path(__file__).parents[1] / "mlrpl/studies/smoke.yaml").read_text())


def places(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths to every value."""
    for key in content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        yield (*path, key)
        yield from places(content[key], (*path, key))


@FUZZ
@given(st.data())
def test_a_study_with_any_value_anywhere_is_a_study_or_refused(tmp_path, data):
    study = yaml.safe_load(yaml.safe_dump(STUDY))
    *path, last = data.draw(st.sampled_from(list(places(STUDY))))
    place = study
    for key in path:
        place = place[key]
    place[last] = data.draw(ANYTHING)
    (tmp_path / "fuzzed.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    with contextlib.suppress(StudyError):
        list(load_study(str(tmp_path / "fuzzed.yaml")).runs())


@FUZZ
@given(st.binary(max_size=200))
def test_a_study_of_any_bytes_is_refused(tmp_path, data):
    (tmp_path / "fuzzed.yaml").write_bytes(data)
    refused_in_one_line(load_study, str(tmp_path / "fuzzed.yaml"))


LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
)


@pytest.mark.parametrize("text", [
    pytest.param(LAUGHS, id="aliases of aliases"),
    pytest.param("a: &a [*a]", id="itself"),
    pytest.param("[" * 100_000, id="deep"),
    pytest.param("a: " + "9" * 5000, id="a number too long"),
    pytest.param("a: 2001-99-99", id="no date"),
    pytest.param("a: !!python/object/apply:os.system ['touch made']", id="code"),
    pytest.param("x" * 2_000_000, id="large"),
])  # fmt: skip
def test_yaml_that_expands_nests_or_runs_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(text, encoding="utf-8")
    with little_memory():
        assert refused_in_one_line(load_study, "bad.yaml").startswith("study file bad.yaml: ")
    assert not Path("made").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc", "a\nb", "x\n", "..", " ", "A", *HOSTILE_NAMES])
def test_names_that_become_folders_are_letters_digits_and_little_else(tmp_path, name):
    for change in ({"name": name}, {"dataset": {**STUDY["dataset"], "name": name}},
                   {"runs": [{**STUDY["runs"][0], "variant": name}]}):  # fmt: skip
        (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**STUDY, **change}))
        assert "should match pattern" in refused_in_one_line(load_study, str(tmp_path / "bad.yaml"))


def test_the_studies_of_the_package_are_within_the_bounds():
    for name in study_names():
        assert list(load_study(name).runs())


# NIfTI.


def nifti(path: Path, **header: Any) -> Path:
    """A small volume; fields of its header are then overwritten: (format, offset, value)."""
    plain = path.with_suffix("").with_suffix(".nii") if path.suffix == ".gz" else path
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.ones((4, 5, 6), np.float32)), str(plain))
    data = bytearray(plain.read_bytes())
    for form, at, value in header.values():
        struct.pack_into(form, data, at, *value)
    path.write_bytes(gzip.compress(bytes(data)) if path.suffix == ".gz" else bytes(data))
    return path


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize(("header", "said"), [
    ({"dim": ("<8h", 40, (3, 32767, 32767, 32767, 1, 1, 1, 1))}, "memory"),
    ({"dim": ("<8h", 40, (7, *[32767] * 7))}, "memory"),
    ({"dim": ("<8h", 40, (3, 900, 900, 90, 1, 1, 1, 1))}, "cut short|memory"),
    ({"dim": ("<8h", 40, (3, -6, 5, 4, 1, 1, 1, 1))}, "voxels"),
    ({"dim": ("<8h", 40, (3, 0, 5, 4, 1, 1, 1, 1))}, "voxels"),
    ({"dim": ("<8h", 40, (9, 6, 5, 4, 1, 1, 1, 1))}, "voxels"),
    ({"pixdim": ("<3f", 80, (-1.0, 1.0, 1.0))}, "spacing"),
    ({"pixdim": ("<3f", 80, (1.0, 0.0, 1.0))}, "spacing"),
    ({"pixdim": ("<3f", 80, (1.0, float("nan"), 1.0))}, "spacing"),
    ({"pixdim": ("<3f", 80, (1.0, 1.0, float("inf")))}, "spacing"),
    ({"vox_offset": ("<f", 108, (1e30,))}, "sense"),
    ({"bitpix": ("<h", 72, (-32,))}, "sense"),
    ({"sizeof_hdr": ("<i", 0, (12,))}, "header"),
])  # fmt: skip
def test_a_nifti_header_that_lies_is_refused_before_memory_is_taken(tmp_path, ending, header, said):
    path = nifti(tmp_path / f"case{ending}", **header)
    with little_memory(500_000_000):
        message = refused_in_one_line(read_nifti, tmp_path, path.name)
    assert message.startswith(f"{path.name}")
    assert any(word in message for word in said.split("|")), message


def test_a_nifti_that_expands_beyond_its_header_is_refused(tmp_path):
    path = nifti(tmp_path / "bomb.nii.gz")
    data = gzip.decompress(path.read_bytes())
    with gzip.open(path, "wb") as file:
        file.write(data)
        for _ in range(300):
            file.write(bytes(1 << 20))
    assert path.stat().st_size < 1_000_000
    with little_memory(200_000_000):
        assert "holds more than its header says" in refused_in_one_line(read_nifti, tmp_path, path.name)


@FUZZ
@given(st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), max_size=6), st.integers(0, 900))
def test_a_nifti_with_any_bytes_changed_or_cut_is_read_or_refused(tmp_path, changes, length):
    data = bytearray(nifti(tmp_path / "fuzzed.nii").read_bytes())
    for at, value in changes:
        data[at] = value
    (tmp_path / "fuzzed.nii").write_bytes(data[: length if length % 3 == 0 else None])
    with little_memory(500_000_000), contextlib.suppress(StudyError):
        array, geometry = read_nifti(tmp_path, "fuzzed.nii")
        assert array.ndim == 4
        assert min(geometry["spacing"]) > 0


@pytest.mark.parametrize(("header", "said"), [
    ("sizes: 100000 100000 100000\ntype: short\nencoding: raw", "memory"),
    ("sizes: 900 900 90\ntype: short\nencoding: gzip", "cut short"),
    ("sizes: -4 4 4\ntype: short\nencoding: raw", "voxels"),
    ("sizes: 4 x 4\ntype: short\nencoding: raw", "sense"),
    ("type: short", "sense"),
])  # fmt: skip
def test_an_nrrd_header_that_lies_is_refused(tmp_path, header, said):
    (tmp_path / "case.nrrd").write_bytes(b"NRRD0004\n" + header.encode() + b"\n\n" + bytes(64))
    assert said in refused_in_one_line(check_nrrd, tmp_path / "case.nrrd", "case.nrrd")


# HDF5.


def hdf5(folder: Path, make) -> LeftAtrium:
    """Five cases, the first as `make` writes it."""
    for n in range(5):
        (folder / f"case{n}").mkdir(parents=True, exist_ok=True)
        with h5py.File(folder / f"case{n}" / PREPARED, "w") as file:
            if n:
                file["image"], file["label"] = np.zeros((4, 4, 4), np.float32), np.zeros((4, 4, 4), np.uint8)
            else:
                file["label"] = np.zeros((4, 4, 4), np.uint8)
                make(file)
    return LeftAtrium(LeftAtrium.Options(), folder)


def chunked(file: h5py.File) -> None:
    file.create_dataset("image", shape=(10**5,) * 3, dtype="f4", chunks=(64,) * 3, compression="gzip", fillvalue=1)


def elsewhere(file: h5py.File) -> None:
    file.create_dataset("image", (4, 4, 4), "u1", external=[("/etc/passwd", 0, 64)])


@pytest.mark.parametrize(("make", "said"), [
    (chunked, "of memory, but"),
    (elsewhere, "lies in another file"),
    (lambda file: file.update(image=h5py.ExternalLink("/etc/hostname", "image")), "no dataset 'image'"),
    (lambda file: file.update(image=h5py.SoftLink("/label")), "no dataset 'image'"),
    (lambda file: file.create_group("image"), "no dataset 'image'"),
    (lambda file: file.create_dataset("image", data=["text"], dtype=h5py.string_dtype()), "not three of numbers"),
    (lambda file: file.create_dataset("image", data=np.zeros((2, 2, 2), "c8")), "not three of numbers"),
    (lambda file: file.create_dataset("image", data=np.zeros((2, 2), "f4")), "has 2 dimensions"),
    (lambda file: file.create_dataset("image", shape=(0, 4, 4), dtype="f4"), "says 0 × 4 × 4 voxels"),
], ids=range(9))  # fmt: skip
def test_hdf5_that_lies_or_points_elsewhere_is_refused(tmp_path, make, said):
    source = hdf5(tmp_path, make)
    entry = next(entry for entry in source.entries if entry.id == "case0")
    with little_memory(1_000_000_000):
        assert said in refused_in_one_line(source.read, entry)


@FUZZ
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8))
@example([(0.359375, 1)])  # h5py's answer is a KeyError
def test_hdf5_with_any_bytes_changed_is_read_or_refused(tmp_path, changes):
    source = hdf5(tmp_path, lambda file: file.create_dataset("image", data=np.zeros((4, 4, 4), "f4")))
    path = tmp_path / "case0" / PREPARED
    data = bytearray(path.read_bytes())
    for where, value in changes:
        data[int(where * (len(data) - 1))] = value
    path.write_bytes(data)
    entry = next(entry for entry in source.entries if entry.id == "case0")
    with little_memory(1_000_000_000), contextlib.suppress(StudyError):
        assert source.read(entry).image.ndim == 4


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", *HOSTILE_NAMES])
def test_lists_name_cases_that_are_there_and_nothing_else(tmp_path, name):
    hdf5(tmp_path, lambda file: file.create_dataset("image", data=np.zeros((4, 4, 4), "f4")))
    (tmp_path / "train.list").write_text(f"case1\n{name}\n", encoding="utf-8")
    (tmp_path / "test.list").write_text("case2\n")
    message = refused_in_one_line(LeftAtrium, LeftAtrium.Options(), tmp_path)
    assert message.startswith("train.list names case ")


@pytest.mark.parametrize("name", [name for name in HOSTILE_NAMES if "/" not in name])
def test_cases_with_odd_names_are_read(tmp_path, name):
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
        for case in ("plain", name):
            nifti(tmp_path / folder / f"{case}.nii")
    (tmp_path / "dataset.json").write_text('{"labels": {"0": "b", "1": "a"}, "modality": {"0": "MRI"}}')
    source = Decathlon(Decathlon.Options(test=1), tmp_path)
    assert {entry.id for entry in source.entries} == {"plain", name}


# Checkpoints.


class Payload:
    """Unpickled without care it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["torch", "legacy", "pickle", "inside a tensor's file"])
def test_no_kind_of_checkpoint_runs_code(tmp_path, kind):
    path, content = tmp_path / "last.pt", {"method": Payload(tmp_path / "made")}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    if kind.startswith("inside"):
        packed = io.BytesIO()
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        path.write_bytes(packed.getvalue())
    assert "cannot be read as weights" in refused_in_one_line(load, path, CPU)
    assert not (tmp_path / "made").exists()


@FUZZ
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=10), st.booleans())
def test_a_checkpoint_with_any_bytes_changed_is_read_or_refused(tmp_path, changes, legacy):
    path = tmp_path / "last.pt"
    content = {"key": "k", "iteration": 3, "method": {"weight": torch.ones(3, 4), "step": torch.tensor(5)}}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    data = bytearray(path.read_bytes())
    for where, value in changes:
        data[int(where * (len(data) - 1))] = value
    path.write_bytes(data)
    with little_memory(), contextlib.suppress(StudyError):
        load(path, CPU)


# Memory and pages.


def test_memory_is_refused_by_what_is_left():
    require(1, "a byte", "do nothing")
    message = refused_in_one_line(require, 10**18, "a batch", "lower the patch")
    assert message.startswith("a batch needs 1e+09 GB of memory, but ")
    assert message.endswith(" is left; lower the patch")


SCRIPT = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def test_pages_show_hostile_text_and_obey_none_of_it(tmp_path):
    table = pd.DataFrame({SCRIPT: [SCRIPT, "b"], "n": [1.0, 2.0]})
    section = Section(SCRIPT, text=SCRIPT, table=table, caption=f"[x](javascript:alert(3)) {SCRIPT}")
    write_index(
        tmp_path / "index.html", title=SCRIPT, lead=SCRIPT, sections=[section], provenance={SCRIPT: {"a": SCRIPT}}
    )
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<img" not in page
    assert "<script>alert" not in page
    assert 'href="javascript' not in page
    assert page.count("&lt;script&gt;alert(1)") >= 6


def test_tables_in_notebooks_escape_what_they_show():
    page = tables.show(pd.DataFrame({SCRIPT: [SCRIPT]})).to_html()
    assert "<script>" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;") == 2
