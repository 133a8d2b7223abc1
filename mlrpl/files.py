"""Writing so that a kill at any moment leaves the old file or the new one, never half of one."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from mlrpl.errors import StudyError

# Columns of our own tables that hold names, whatever these look like: a case "001", a class "2", a study "2024".
TEXT = (
    "study", "run", "method", "variant", "title", "case", "class", "key", "commit", "ablation", "precision", "device",
)  # fmt: skip


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes `path`'s place when the block ends well and is removed when not.

    >>> with atomic(Path("table.csv")) as partial:          # doctest: +SKIP
    ...     frame.to_csv(partial)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_temporary(folder: Path) -> None:
    """Files that a killed process left half-written; called where nobody writes."""
    for path in folder.glob(".*.partial*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def copy_whole(source: Path, destination: Path) -> None:
    """Copy a file's content atomically."""
    with atomic(destination) as partial:
        shutil.copyfile(source, partial)


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> pd.DataFrame:
    """A table of ours from its csv file: names as text, also "001" or "NA"; NaN for what is empty, and nothing else."""
    return pd.read_csv(path, dtype=dict.fromkeys(TEXT, str), keep_default_na=False, na_values=[""])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is none.

    Raises:
        StudyError: where a file is there but cannot be read: what it records must not pass for undone.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror or error})") from None
    return content if isinstance(content, dict) else {}
