"""Downloads: resumed, verified, unpacked without trust; against a server of the test's own."""

import hashlib
import io
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mlrpl.download import CHUNK, REGISTRATION, Archive, download
from mlrpl.errors import StudyError

NAME = "Task00_Test.tar"
FOLDER = "Task00_Test"


def tar(members):
    """A tar file of {name: content, or a function that changes the member}."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if callable(content):
                content(info)
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


GOOD = tar({f"{FOLDER}/dataset.json": b"{}", f"{FOLDER}/imagesTr/a.nii.gz": bytes(range(256)) * 800})


class Handler(BaseHTTPRequestHandler):
    """Serves `content`; breaks off after `budgets` bytes a request; honours ranges when `ranges`."""

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append(asked)
        content, start = server.content, 0
        if self.path != f"/files/{NAME}":
            self.send_error(404)
            return
        if asked and server.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        budget = server.budgets.pop(0) if server.budgets else len(content)
        self.wfile.write(content[start : start + budget])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.budgets, server.ranges, server.asked = GOOD, [], True, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(server, to, md5=None, file=NAME, retries=0):
    md5 = md5 or hashlib.md5(server.content).hexdigest()
    archive = Archive(f"http://127.0.0.1:{server.server_port}/files/{file}", md5, "next {folder}")
    return download("test", to, {"test": archive}, retries)


def refused(server, to, *named, **options):
    with pytest.raises(StudyError) as error:
        fetch(server, to, **options)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in named), str(error.value)


def left(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_download_once(server, tmp_path, capsys):
    folder = fetch(server, tmp_path / "data")
    assert folder == tmp_path / "data" / FOLDER
    assert left(tmp_path / "data") == [f"{FOLDER}/dataset.json", f"{FOLDER}/imagesTr/a.nii.gz"]
    assert (folder / "imagesTr/a.nii.gz").read_bytes() == bytes(range(256)) * 800
    assert f"next {folder}" in capsys.readouterr().out
    fetch(server, tmp_path / "data")
    assert len(server.asked) == 1


def test_a_broken_download_goes_on_where_it_was(server, tmp_path):
    server.budgets = [2 * CHUNK, CHUNK]
    refused(server, tmp_path, "goes on")
    assert left(tmp_path) == [f".{NAME}.part"]
    assert (tmp_path / f".{NAME}.part").read_bytes() == GOOD[: 2 * CHUNK]
    folder = fetch(server, tmp_path, retries=1)
    assert server.asked == [None, f"bytes={2 * CHUNK}-", f"bytes={3 * CHUNK}-"]
    assert (folder / "imagesTr/a.nii.gz").read_bytes() == bytes(range(256)) * 800
    assert not (tmp_path / f".{NAME}.part").exists()


def test_a_server_that_cannot_go_on_starts_over(server, tmp_path):
    server.budgets, server.ranges = [CHUNK], False
    refused(server, tmp_path, "goes on")
    fetch(server, tmp_path)
    assert server.asked == [None, f"bytes={CHUNK}-"]


def test_a_part_that_is_whole_already(server, tmp_path):
    (tmp_path / f".{NAME}.part").write_bytes(GOOD)
    fetch(server, tmp_path)
    assert server.asked == [f"bytes={len(GOOD)}-"]


def test_a_corrupted_download_is_deleted(server, tmp_path):
    right = hashlib.md5(GOOD).hexdigest()
    server.content = GOOD[:5000] + b"\xff" + GOOD[5001:]
    refused(server, tmp_path, NAME, "md5", md5=right)
    assert left(tmp_path) == []
    server.content = GOOD
    fetch(server, tmp_path, md5=right)


def test_a_corrupted_part_is_not_kept(server, tmp_path):
    (tmp_path / f".{NAME}.part").write_bytes(b"something else")
    refused(server, tmp_path, "md5")
    assert left(tmp_path) == []
    fetch(server, tmp_path)


def link(kind, target):
    def change(info):
        info.type, info.linkname = kind, target

    return change


@pytest.mark.parametrize(
    "members",
    [
        {"../evil": b"x"},
        {f"{FOLDER}/../../evil": b"x"},
        {f"{FOLDER}/way": link(tarfile.SYMTYPE, "../.."), f"{FOLDER}/way/evil": b"x"},
        {f"{FOLDER}/way": link(tarfile.SYMTYPE, "/etc/passwd")},
        {f"{FOLDER}/way": link(tarfile.LNKTYPE, "../evil")},
        {f"{FOLDER}/way": link(tarfile.FIFOTYPE, "")},
        {"other/file": b"x"},
        {FOLDER: b"a file where a folder should be"},
    ],
)
def test_hostile_archives_leave_nothing(server, tmp_path, members):
    server.content = tar({f"{FOLDER}/dataset.json": b"{}", **members} if "other/file" not in members else members)
    refused(server, tmp_path / "data", NAME, "nothing was unpacked")
    assert left(tmp_path) == [f"data/{NAME}"]
    assert not (tmp_path / "data" / FOLDER).exists()


def test_an_absolute_path_is_refused(server, tmp_path):
    server.content = tar({f"{FOLDER}/dataset.json": b"{}", str(tmp_path / "elsewhere"): b"x"})
    refused(server, tmp_path / "data", "elsewhere leaves the folder, so nothing was unpacked")
    assert left(tmp_path) == [f"data/{NAME}"]


@pytest.mark.parametrize("length", [0, 300, 20_000])
def test_an_archive_that_is_cut_short(server, tmp_path, length):
    server.content = GOOD[:length]
    refused(server, tmp_path, NAME, "nothing was unpacked")
    assert not (tmp_path / FOLDER).exists()


def test_what_the_server_does_not_have(server, tmp_path):
    refused(server, tmp_path, "404", file="Task99.tar")
    server.shutdown()
    assert left(tmp_path) == []


@pytest.mark.parametrize("name", sorted(REGISTRATION))
def test_where_to_register(name, tmp_path, capsys):
    assert download(name, tmp_path) is None
    shown = capsys.readouterr().out
    assert "https://" in shown and f"STUDY={name} DATA=" in shown
    assert left(tmp_path) == []


def test_an_unknown_data_set(tmp_path):
    with pytest.raises(StudyError, match="hippocampus, heart, la, pancreas, brats"):
        download("kidney", tmp_path)
