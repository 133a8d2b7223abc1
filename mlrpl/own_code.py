"""Methods of one's own: where their files are found, and what of them a run's key holds.

A study's file may name a method as "module:Class". The module beside that file comes before any other of its name, so
that every process of a study, wherever it was started, finds the same one.
"""

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

folders: list[Path] = []  # of the study files that were read, the latest first


def look_in(folder: Path) -> None:
    """Find modules there from now on, also those that a method imports by itself."""
    if folder in folders:
        folders.remove(folder)
    folders.insert(0, folder)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def load(name: str) -> ModuleType:
    """Import a module, from beside a study's file if it is there.

    Raises whatever its import raises.
    """
    places = (folder.joinpath(*name.split(".")).with_suffix(".py") for folder in folders)
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        return importlib.import_module(name)
    known = sys.modules.get(name)
    if known is not None and _file(known) == file:
        return known
    alias = name if known is None else f"{name} in {file.parent}"  # a module of that name, not this one, is in use
    if alias in sys.modules:
        return sys.modules[alias]
    _code(file)
    spec = importlib.util.spec_from_file_location(alias, file)
    module = sys.modules[alias] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[alias]
        raise
    return module


def files(cls: type) -> list[Path]:
    """The files that a class's code is in: its own, its bases', and what these import from beside a study's file."""
    mine = inspect.getmodule(cls)
    waiting = [mine, *map(inspect.getmodule, cls.__mro__)]
    found: set[Path] = set()
    while waiting:
        module = waiting.pop()
        file = _file(module)
        if file is None or file in found or not (module is mine or _is_own(module, file)):
            continue
        found.add(file)
        for value in vars(module).values():
            if isinstance(value, ModuleType):
                waiting.append(value)
            elif inspect.isclass(value) or inspect.isfunction(value):
                waiting.append(inspect.getmodule(value))
    return sorted(found)


def version(cls: type, more: Iterable[object] = ()) -> str:
    """A hash of a class's code (:func:`files`) without comments and empty lines, and of `more`."""
    texts = [_code(file) for file in files(cls)] or [inspect.getsource(cls)]
    return hashlib.sha256("\0".join([*texts, *map(str, more)]).encode()).hexdigest()[:16]


def _is_own(module: ModuleType, file: Path) -> bool:
    if module.__name__.partition(".")[0] == __name__.partition(".")[0]:
        return False  # this package, should a study's file lie beside it
    return file.parent in folders or file.parent.parent in folders


def _file(module: ModuleType | None) -> Path | None:
    name = getattr(module, "__file__", None)
    return Path(name).resolve() if name and name.endswith(".py") else None


@cache  # as it was when this process first saw it: a file that is edited meanwhile is not what was imported
def _code(file: Path) -> str:
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                lines[row - 1] = lines[row - 1][:column]
    except (tokenize.TokenError, SyntaxError):
        pass  # its import will say what is wrong
    return "\n".join(line.rstrip() for line in lines if line.strip())
