"""Methods of one's own: where their files are found, and what of them a run's key holds.

A study's file may name a method as "module:Class". What lies beside that file comes before any other of its name, the
method's module and the modules that it imports, so that every process of a study, wherever it was started, finds the
same ones.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import io
import sys
import tokenize
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType

PACKAGE = __name__.partition(".")[0]

folders: list[Path] = []  # of the study files that were read, the latest first


def look_in(folder: Path) -> None:
    """Find modules there first, also those that a method imports by itself."""
    for places, place in ((folders, folder), (sys.path, str(folder))):
        if place in places:
            places.remove(place)
        places.insert(0, place)


def load(name: str) -> ModuleType:
    """Import a module, from beside a study's file if it is there.

    Raises whatever its import raises.
    """
    file = next((file for folder in folders for file in _places(folder, name)), None)
    if file is None:
        return importlib.import_module(name)
    known = sys.modules.get(name)
    if known is not None and _file(known) == file:
        return known
    alias = name if known is None else f"{name} in {file.parent}"  # a module of that name, not this one, is in use
    if alias in sys.modules:
        return sys.modules[alias]
    _text(file)
    spec = importlib.util.spec_from_file_location(alias, file)
    module = sys.modules[alias] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[alias]
        raise
    return module


@cache
def texts(cls: type) -> dict[Path, str]:
    """The code that a class is made of, by path relative to the study's folder: its file, and what that imports there.

    As it was when this process first saw it, so as it was imported, whatever has been edited since.
    """
    found: dict[Path, str] = {}
    waiting = [_file(inspect.getmodule(cls))]
    while waiting:
        file = waiting.pop()
        if file is not None and file not in found:
            found[file] = _text(file)
            waiting += _imported(file)
    return {_relative(file): found[file] for file in sorted(found)}


def version(cls: type, more: Iterable[object] = ()) -> str:
    """A hash of a class's code (:func:`texts`) without comments and empty lines, and of `more`."""
    code = [_bare(text) for text in texts(cls).values()] or [inspect.getsource(cls)]
    return hashlib.sha256("\0".join([*code, *map(str, more)]).encode()).hexdigest()[:16]


def _imported(file: Path) -> list[Path]:
    """Files beside a study's that a file imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(_text(file))):
        if isinstance(node, ast.Import):
            origins, names = folders, [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origins = [file.parents[node.level - 1]] if node.level else folders
            stem = [node.module] if node.module else []
            names = [".".join([*stem, *more]) for more in ([], *([alias.name] for alias in node.names))]
        else:
            continue
        for name in names:
            if name and name.partition(".")[0] != PACKAGE:  # this package may lie beside the study's file
                found += next((files for folder in origins if (files := _places(folder, name))), [])
    return found


def _places(folder: Path, name: str) -> list[Path]:
    """The file of a module in a folder; empty where it is not there."""
    path = folder.joinpath(*name.split("."))
    return [place.resolve() for place in (path / "__init__.py", path.with_suffix(".py")) if place.is_file()][:1]


def _relative(file: Path) -> Path:
    return next((file.relative_to(folder) for folder in folders if file.is_relative_to(folder)), Path(file.name))


def _file(module: ModuleType | None) -> Path | None:
    name = getattr(module, "__file__", None)
    return Path(name).resolve() if name and name.endswith(".py") else None


@cache
def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _bare(text: str) -> str:
    """Without comments, empty lines and spaces at the end of lines: editing these is no reason to train again."""
    lines = text.split("\n")  # as tokenize counts them
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())
