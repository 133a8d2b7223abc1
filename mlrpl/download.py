"""Data sets that may be downloaded without asking: fetched, verified, unpacked. For the others, where to register.

pooch fetches and verifies; what is added is going on with an interrupted download, and unpacking that trusts no
archive.
"""

import shutil
import tarfile
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pooch
import requests
from tqdm import tqdm

from mlrpl.errors import StudyError

CHUNK = 2**16  # bytes: what a broken connection may cost
TIMEOUT = 60  # seconds without a byte
RETRIES = 3
BUCKET = "https://msd-for-monai.s3-us-west-2.amazonaws.com/"


@dataclass(frozen=True)
class Archive:
    """A tar file that holds one folder, named as the archive; `md5` as its publisher states it."""

    url: str
    md5: str
    then: str  # what to type next; {folder} is the data set's

    @property
    def file(self) -> str:
        """The archive's own name."""
        return self.url.rsplit("/", 1)[-1]


ARCHIVES = {
    "hippocampus": Archive(
        BUCKET + "Task04_Hippocampus.tar",
        "9d24dba78a72977dbd1d2e110310f31b",
        "make reproduce STUDY=hippocampus DATA={folder}",
    ),
    "heart": Archive(
        BUCKET + "Task02_Heart.tar", "06ee59366e1e5124267b774dbd654057", "mlrpl prepare heart --source {folder}"
    ),
}
REGISTRATION = {
    "la": """
        The left atrium MRIs need a registration: https://www.cardiacatlas.org/atriaseg2018-challenge/
        Unpack them and pass the folder that holds <case>/lgemri.nrrd and <case>/laendo.nrrd, or that of the prepared
        volumes (<case>/mri_norm2.h5): make reproduce STUDY=la DATA=/path""",
    "pancreas": """
        The abdominal CTs come from The Cancer Imaging Archive, by its download manager, images and labels apart:
        https://www.cancerimagingarchive.net/collection/pancreas-ct/
        Pass the folder that holds both PANCREAS_0001 … with the DICOM series and label0001.nii.gz …, or that of the
        prepared volumes (Pancreas_h5/<case>_norm.h5): make reproduce STUDY=pancreas DATA=/path""",
    "brats": """
        The brain MRIs need a registration: https://www.med.upenn.edu/cbica/brats2019/registration.html
        Pass the folder that holds HGG and LGG, or that of the prepared volumes (data/<case>.h5 with train.txt, val.txt,
        test.txt): make reproduce STUDY=brats DATA=/path""",
}


class Resuming:
    """A downloader for pooch that goes on where a `.part` file beside the goal ends, if the server can."""

    def __init__(self, part: Path) -> None:
        self.part = part

    def __call__(self, url: str, output_file: str, _: Any) -> None:
        """Download `url`; the whole file is moved to `output_file`, a part stays for the next time."""
        have = self.part.stat().st_size if self.part.exists() else 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            if response.status_code != requests.codes.requested_range_not_satisfiable:  # else it is whole already
                response.raise_for_status()
                goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
                have = have if goes_on else 0
                length = response.headers.get("Content-Length")
                bar = tqdm(
                    total=have + int(length) if length else None,
                    initial=have,
                    unit="B",
                    unit_scale=True,
                    desc=url.rsplit("/", 1)[-1],
                    disable=None,  # where nobody looks
                )
                with bar, self.part.open("ab" if goes_on else "wb") as file:
                    for chunk in response.iter_content(CHUNK):
                        file.write(chunk)
                        bar.update(len(chunk))
        shutil.move(self.part, output_file)


def download(
    name: str,
    to: Path,
    archives: Mapping[str, Archive] = ARCHIVES,
    retries: int = RETRIES,
) -> Path | None:
    """Fetch a data set into <to>/<its folder>, or print where to register for it.

    Args:
        name: a key of `archives` or of `REGISTRATION`.
        to: made where it is missing.
        archives: what can be downloaded.
        retries: after a broken connection; each goes on where the last one ended.

    Returns:
        The data set's folder; None where it is not for downloading.

    Raises:
        StudyError: for an unknown name, a download that failed or is not what it should be, or an archive that reaches
            out of its folder; nothing of it is left.
    """
    if name in REGISTRATION:
        print(textwrap.dedent(REGISTRATION[name]).strip())
        return None
    if name not in archives:
        raise StudyError(f"no data set {name!r} to download: choose one of {', '.join([*archives, *REGISTRATION])}")
    archive = archives[name]
    folder = to / archive.file.partition(".")[0]
    if folder.is_dir():
        print(f"{folder} is there already. Next: {archive.then.format(folder=folder)}")
        return folder
    fetched = _fetch(archive, to, retries)
    _unpack(fetched, folder)
    fetched.unlink()
    print(f"{folder} is ready. Next: {archive.then.format(folder=folder)}")
    return folder


def _fetch(archive: Archive, to: Path, retries: int) -> Path:
    to.mkdir(parents=True, exist_ok=True)
    base = archive.url.removesuffix(archive.file)
    registry = {archive.file: f"md5:{archive.md5}"}
    cache = pooch.create(path=to, base_url=base, registry=registry, retry_if_failed=retries)
    pooch.get_logger().setLevel("ERROR")
    part = to / f".{archive.file}.part"
    try:
        return Path(cache.fetch(archive.file, downloader=Resuming(part)))
    except ValueError:
        raise StudyError(
            f"{archive.file}: what was downloaded is not the published file (its md5 differs), so it was deleted; "
            "try again later"
        ) from None
    except requests.exceptions.HTTPError as error:
        raise StudyError(f"{archive.file}: the server says {error.response.status_code}; try again later") from None
    except requests.exceptions.RequestException as error:
        raise StudyError(
            f"{archive.file}: the download broke off ({type(error).__name__}); the same command goes on with it"
        ) from None


def _unpack(file: Path, folder: Path) -> None:
    """Unpack the one folder of a tar file as `folder`; a member that leaves it, links or devices refuse the whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with tarfile.open(file) as archive:
            members = archive.getmembers()
            if odd := [member.name for member in members if not (member.isfile() or member.isdir())]:
                raise StudyError(f"{file.name}: {odd[0]} is a link or a device, so nothing was unpacked")
            for member in members:
                _unpack_member(archive, member, partial)
        inside = partial / folder.name
        if not inside.is_dir():
            raise StudyError(f"{file.name}: it holds no folder {folder.name}, so nothing was unpacked")
        inside.replace(folder)
    except (tarfile.TarError, EOFError, FileExistsError, IsADirectoryError, NotADirectoryError):
        raise StudyError(
            f"{file.name}: it is no whole archive, so nothing was unpacked; delete it and download it again"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unpack_member(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """A file or folder of the archive, contents alone. tarfile's own filter is not in Python before 3.11.4."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise StudyError(f"{Path(archive.name).name}: {name} leaves the folder, so nothing was unpacked")
    target = folder / name
    (target if member.isdir() else target.parent).mkdir(parents=True, exist_ok=True)
    if member.isfile():
        with archive.extractfile(member) as packed, target.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
