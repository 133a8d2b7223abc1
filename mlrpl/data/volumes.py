"""Volumes as files: NIfTI, NRRD and folders of DICOM slices; axes x, y, z as in the file, with their geometry."""

import fnmatch
import gzip
import hashlib
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlrpl.data.bounds import TRAILING, check_nifti, check_nrrd, read_bounded
from mlrpl.data.dicom import read_dicom
from mlrpl.data.grid import Geometry, Volume, check_same_grid, simpleitk, to_itk
from mlrpl.errors import StudyError
from mlrpl.files import atomic

if TYPE_CHECKING:
    import SimpleITK

NIFTI = (".nii.gz", ".nii")
NRRD = (".nrrd", ".nhdr")
ENDINGS = NIFTI + NRRD
FLOATS = {16: "f4", 64: "f8"}  # of NIfTI's data types
HEADER_SIZES = (348, 540)  # NIfTI-1 and 2; read with the wrong byte order they are other numbers


def read_volume(root: Path, name: str) -> Volume:
    """Volume (channels, x, y, z) and geometry of <root>/<name>: a NIfTI or NRRD file, or a folder with a DICOM series.

    Raises:
        StudyError: when it is unreadable, cut short or of another kind.
    """
    path = root / name
    if path.is_dir():
        volume, geometry = read_dicom(path, name)
        return volume[None], geometry
    if ending(name) in NIFTI:
        return read_nifti(root, name)
    if ending(name) in NRRD:
        return _read_nrrd(root, name)
    raise StudyError(
        f"{name}: neither NIfTI ({', '.join(NIFTI)}), NRRD ({', '.join(NRRD)}) nor a folder of DICOM files"
    )


def read_channels(root: Path, names: Sequence[str]) -> Volume:
    """One image (channels, x, y, z) and its geometry from a file, or from several with a channel or more each.

    Raises:
        StudyError: what `read_volume` raises, and where the files are not on one grid.
    """
    volumes = [read_volume(root, name) for name in names]
    for name, volume in zip(names[1:], volumes[1:], strict=True):
        check_same_grid(name, volume, names[0], volumes[0])
    arrays, (geometry, *_) = zip(*volumes, strict=True)
    return np.concatenate(arrays) if len(arrays) > 1 else arrays[0], geometry


def read_label(root: Path, name: str, image_name: str, image: Volume) -> np.ndarray:
    """The label (x, y, z) of an image (channels, x, y, z).

    Raises:
        StudyError: what `read_volume` raises, and where it has channels or is not on the image's grid.
    """
    label, place = read_volume(root, name)
    if len(label) != 1:
        raise StudyError(f"{name}: the label has {len(label)} channels; it must have one")
    check_same_grid(name, (label, place), image_name, image)
    return label[0]


def read_nifti(root: Path, name: str) -> Volume:
    """Volume (channels, x, y, z) and geometry of <root>/<name>; StudyError when it is unreadable or cut short."""
    try:
        size = check_nifti(root / name, name)
        volume = simpleitk().ReadImage(str(root / name))
        stored = _stored_voxels(root / name, volume, size)
    except (RuntimeError, OSError, EOFError, ValueError, zlib.error) as error:
        if isinstance(error, PermissionError):
            raise StudyError(f"{name}: may not be read; allow reading it") from None
        if "orthonormal" in str(error):
            raise StudyError(f"{name}: its axes are not at right angles; resample it, or correct its sform") from None
        raise StudyError(f"{name}: cannot be read as NIfTI, it may be cut short; copy it again") from None
    bad = np.count_nonzero(~np.isfinite(stored))
    if bad:
        raise StudyError(f"{name}: {bad} voxels are NaN or infinite; repair or remove the case")
    return _array_and_geometry(volume, name)


def _read_nrrd(root: Path, name: str) -> Volume:
    check_nrrd(root / name, name)
    try:
        volume = simpleitk().ReadImage(str(root / name))
    except RuntimeError:
        raise StudyError(f"{name}: cannot be read as NRRD, it may be cut short; copy it again") from None
    return _array_and_geometry(volume, name)


def _array_and_geometry(volume: "SimpleITK.Image", name: str) -> Volume:
    array = simpleitk().GetArrayFromImage(volume)  # (z, y, x), (channel, z, y, x) or (z, y, x, component)
    if volume.GetNumberOfComponentsPerPixel() > 1:
        array = np.moveaxis(array, -1, 0)
    elif volume.GetDimension() == 3:
        array = array[None]
    if volume.GetDimension() not in (3, 4) or array.ndim != 4:
        raise StudyError(f"{name}: a volume of {volume.GetDimension()} dimensions; it must have 3, or 4 with channels")
    direction = np.reshape(volume.GetDirection(), (volume.GetDimension(),) * 2)[:3, :3]
    geometry = {"spacing": volume.GetSpacing()[:3], "origin": volume.GetOrigin()[:3], "direction": direction.ravel()}
    return array.transpose(0, 3, 2, 1), {key: [float(v) for v in value] for key, value in geometry.items()}


def write_nifti(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """Write a volume (x, y, z), compressed, atomically; StudyError where it cannot be written, or not to its end."""
    with atomic(path) as partial:
        working = partial.with_name(f"{partial.name}.nii.gz")  # ITK goes by the ending
        try:
            simpleitk().WriteImage(to_itk(array, geometry), str(working), useCompression=True)
            if not _is_whole(working):  # of a disk that is full ITK says nothing
                raise StudyError(f"{path}: could not be written to its end; is the disk full?")
            working.replace(partial)
        except RuntimeError:
            raise StudyError(f"{path}: cannot be written; give a folder that you may write into") from None
        finally:
            working.unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    """Whether a compressed NIfTI file holds all that its header says."""
    try:
        left = check_nifti(path, path.name)
        with gzip.open(path) as file:
            while piece := file.read(1 << 22):
                left -= len(piece)
    except (StudyError, OSError, EOFError, zlib.error):
        return False
    return left <= 0


def channels_of(path: Path) -> int:
    """Channels of a NIfTI file by its header: its fourth side, or the numbers of a voxel; 1 where it cannot be read."""
    reader = simpleitk().ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return 1
    return (*reader.GetSize(), 1)[3] * reader.GetNumberOfComponents()


def nifti_files(folder: Path) -> dict[str, str]:
    """NIfTI files of a folder by name without ending; hidden files (macOS leaves some) are not data."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    files: dict[str, str] = {}
    for name in names:
        if not name.startswith(".") and ending(name) in NIFTI:
            case = without_ending(name)
            if case in files:
                raise StudyError(f"{folder.name}: both {files[case]} and {name}; remove one of them")
            files[case] = name
    return files


def ending(name: str) -> str:
    """The ending of a volume's file name, empty where it has none that is known."""
    return next((known for known in ENDINGS if name.lower().endswith(known)), "")


def without_ending(name: str) -> str:
    """A volume's file name without its ending, however that is written."""
    return name[: len(name) - len(ending(name))]


def below(root: Path, pattern: str) -> list[Path]:
    """Files and folders of that name pattern anywhere below the root, sorted; also through links, no folder twice.

    Links come last, in the order of their names: of a folder with a link beside it the folder counts. One that leads to
    where the root itself is would find other data.
    """
    found: list[Path] = []
    seen: set[Path] = set()
    folders, links = [root], []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        real = folder.resolve()
        if real in seen or (folder != root and root.resolve().is_relative_to(real)):
            continue
        seen.add(real)
        if folder != root and fnmatch.fnmatchcase(folder.name, pattern):
            found.append(folder)
        for path in sorted(folder.iterdir()):
            if path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            elif fnmatch.fnmatchcase(path.name, pattern):
                found.append(path)
    return sorted(found)


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def changed_at(path: Path) -> int:
    """When a file, or the newest in a folder, was last written or put there (ns)."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    found = [file.stat() for file in files]
    return max((max(each.st_mtime_ns, each.st_ctime_ns) for each in found), default=0)


def checksum(path: Path) -> str:
    """SHA-256 of a file; of a folder that of its files' sorted checksums, so that their names do not matter."""
    if path.is_dir():
        inside = sorted(checksum(file) for file in path.rglob("*") if file.is_file())
        return hashlib.sha256("".join(inside).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stored_voxels(path: Path, volume: "SimpleITK.Image", size: int) -> np.ndarray:
    """The numbers as they lie in the file; whole numbers as bytes, since they need no look.

    ITK reads a file that is cut short as zeros, and NaN as zero, without a word: hence this look at the file. Raises
    ValueError when it is shorter than its header says, and gzip's errors.
    """
    data = read_bounded(path, size + TRAILING)
    header = {key: int(float(volume.GetMetaData(key))) for key in ("vox_offset", "bitpix", "datatype", "dim[0]")}
    count = math.prod(int(volume.GetMetaData(f"dim[{axis + 1}]")) for axis in range(header["dim[0]"]))
    order = "<" if int.from_bytes(data[:4], "little") in HEADER_SIZES else ">"
    dtype = f"{order}{FLOATS[header['datatype']]}" if header["datatype"] in FLOATS else f"V{header['bitpix'] // 8}"
    stored = np.frombuffer(data, dtype, count, header["vox_offset"])
    return stored if header["datatype"] in FLOATS else stored.view(np.uint8)
