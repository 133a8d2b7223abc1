"""What a file claims, looked at before anything of that size is allocated.

A header of a few bytes can ask for petabytes, and a compressed file can expand a thousandfold.
"""

import gzip
import math
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mlrpl.errors import StudyError
from mlrpl.memory import require

BYTES_A_VOXEL = 32  # at the peak of reading and z-scoring: the file's voxels, and several copies in double precision
DEFLATE = 1032  # the most that a byte of gzip can expand to
TRAILING = 1 << 20  # bytes that may follow the voxels
HEADER = 540
NIFTI = {348: ("8h", 40, "2h", 70, "8f", 76, "f", 108), 540: ("8q", 16, "2h", 12, "8d", 104, "q", 168)}
NRRD_BYTES = {"char": 1, "8": 1, "short": 2, "16": 2, "int": 4, "32": 4, "float": 4, "long": 8, "64": 8, "double": 8}


def check_nifti(path: Path, name: str) -> int:
    """Look at a NIfTI file's header.

    Returns:
        Bytes of the file, unpacked, up to the last voxel.

    Raises:
        StudyError: for sizes or a spacing that cannot be, a file that is too small for them, or too little memory.
        OSError, EOFError, zlib.error: where not even the header can be read.
    """
    header = read_bounded(path, HEADER, cut=True)
    order = next((o for o in "<>" if len(header) >= 4 and struct.unpack(f"{o}i", header[:4])[0] in NIFTI), None)
    if order is None:
        raise StudyError(f"{name}: cannot be read as NIfTI, its header is not one; copy it again")
    try:
        form = NIFTI[struct.unpack(f"{order}i", header[:4])[0]]
        fields = [
            struct.unpack_from(f"{order}{code}", header, at) for code, at in zip(form[::2], form[1::2], strict=True)
        ]
    except struct.error:
        raise StudyError(f"{name}: cannot be read as NIfTI, it may be cut short; copy it again") from None
    dims, (_, bits), spacing, (offset,) = fields
    sides = dims[1 : dims[0] + 1] if 1 <= dims[0] <= 7 else ()
    check_sizes(sides, name)
    check_spacing(spacing[1 : min(len(sides), 3) + 1], name)
    if not (bits > 0 and math.isfinite(offset) and 0 <= offset < TRAILING):
        raise StudyError(f"{name}: cannot be read as NIfTI, its header makes no sense; copy it again")
    needed = int(offset) + math.prod(sides) * bits // 8
    held = path.stat().st_size * (DEFLATE if path.suffix.lower() == ".gz" else 1)
    if held < needed:
        raise StudyError(f"{name}: cannot be read as NIfTI, it may be cut short; copy it again")
    return needed


def check_nrrd(path: Path, name: str) -> None:
    """Look at an NRRD file's header; raises as `check_nifti`."""
    with path.open("rb") as file:
        text = file.read(1 << 16).split(b"\n\n")[0].decode("latin-1")
    fields = dict(re.findall(r"^([a-z ]+):\s*(.*?)\s*$", text, re.M))
    try:
        sides = [int(side) for side in fields["sizes"].split()]
        kind = next(size for word, size in NRRD_BYTES.items() if word in fields["type"])
    except (KeyError, ValueError, StopIteration):
        raise StudyError(f"{name}: cannot be read as NRRD, its header makes no sense; copy it again") from None
    check_sizes(sides, name)
    packed = fields.get("encoding", "raw") != "raw"
    detached = {"data file", "datafile"} & fields.keys()
    if not detached and path.stat().st_size * (DEFLATE if packed else 1) < math.prod(sides) * kind:
        raise StudyError(f"{name}: cannot be read as NRRD, it may be cut short; copy it again")


def check_sizes(sides: Sequence[int], name: str) -> None:
    """StudyError for sides that cannot be, or a volume that memory cannot hold."""
    if not sides or min(sides) < 1:
        raise StudyError(f"{name}: its header says {' × '.join(map(str, sides)) or 'no'} voxels; replace the file")
    require(math.prod(sides) * BYTES_A_VOXEL, f"{name} ({' × '.join(map(str, sides))} voxels)", "crop or replace it")


def check_spacing(spacing: Sequence[float], name: str) -> None:
    """StudyError unless all are lengths."""
    if not all(math.isfinite(side) and side > 0 for side in spacing):
        said = ", ".join(f"{side:g}" for side in spacing)
        raise StudyError(f"{name}: its spacing is ({said}) mm, but must be positive; correct its header")


def read_bounded(path: Path, limit: int, cut: bool = False) -> bytes:
    """A file's bytes, unpacked where its name ends in .gz; reads to its end, so that gzip's checksum is compared.

    Args:
        path: the file.
        limit: bytes that it may hold.
        cut: return the first `limit` bytes of a longer one instead of refusing it.

    Raises:
        StudyError: where it holds more.
        OSError, EOFError, zlib.error: where it cannot be read.
    """
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        data = file.read(limit if cut else limit + 1)
    if len(data) > limit:
        raise StudyError(f"{path.name}: holds more than its header says, so it was not read; replace the file")
    return data


# What h5py makes of HDF5's own errors, whichever byte of a file is damaged.
H5_ERRORS = (OSError, RuntimeError, KeyError, TypeError, ValueError, OverflowError)


def read_h5(file: h5py.File, key: str, name: str) -> np.ndarray:
    """A dataset (x, y, z) of an open HDF5 file.

    Raises:
        StudyError: where it is missing, lies in another file, holds no numbers or more than memory can.
        H5_ERRORS: where it cannot be read.
    """
    link: Any = file.get(key, getlink=True) if key in file else None
    found = file[key] if isinstance(link, h5py.HardLink) else None
    if not isinstance(found, h5py.Dataset):
        raise StudyError(f"{name}: no dataset '{key}' in this file; replace it")
    if found.external or found.is_virtual:
        raise StudyError(f"{name}: its dataset '{key}' lies in another file; replace it")
    if found.dtype.kind not in "biuf" or found.ndim != 3:
        raise StudyError(
            f"{name}: '{key}' has {found.ndim} dimensions of {found.dtype}, not three of numbers; replace it"
        )
    check_sizes(found.shape, name)
    return found[()]
