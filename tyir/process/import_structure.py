"""What transformers finds out about its own models when it is imported, found once and kept in the cache.

    with import_structure_kept():
        from transformers import AutoTokenizer

`import transformers` reads the 3,400 files of its folder `models` for the names that they export, and reads them
again for the first of these names that is asked for (`create_import_structure_from_path` in
`transformers/utils/import_utils.py`, 5.24): two thirds of the second that loading a tokenizer's class takes.
The answer depends on nothing but that function and those files.  Inside this context it is the function's own,
of the same files by name, size and time of change.
"""  # noqa: E501

from __future__ import annotations

import contextlib
import importlib.machinery
import marshal
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any, Final

from tyir.diagnostics import TyirError
from tyir.process.cache import Cache, cache_key, default_folder

__all__ = ["import_structure_kept"]

_MODULE: Final = "transformers.utils.import_utils"
_FUNCTION: Final = "create_import_structure_from_path"

Find = Callable[[str | os.PathLike[str]], Any]


@contextlib.contextmanager
def import_structure_kept() -> Iterator[None]:
    """Inside this context transformers, loaded already or not, is told what its models export."""
    replaced: list[tuple[ModuleType, Find]] = []

    def replace(module: ModuleType) -> None:
        find = getattr(module, _FUNCTION, None)
        if find is not None and module.__file__ is not None:  # else of a release that does it otherwise
            replaced.append((module, find))
            setattr(module, _FUNCTION, _kept(find, module.__file__))

    finder = _AfterImport(_MODULE, replace)
    if (module := sys.modules.get(_MODULE)) is not None:
        replace(module)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for module, find in replaced:
            setattr(module, _FUNCTION, find)


def _kept(find: Find, file: str) -> Find:
    """In place of the function `find` of the module in `file`: asked about the folder of all models once for
    each state of its files.
    """
    models = os.path.join(os.path.dirname(os.path.dirname(file)), "models")
    found: bytes | None = None

    def find_or_take(path: str | os.PathLike[str]) -> Any:
        nonlocal found
        folder = os.path.dirname(path) if os.path.isfile(path) else os.fspath(path)
        if folder != models:
            return find(path)
        if found is not None:
            return marshal.loads(found)
        key = cache_key("import structure", sys.version, _state(file, os.stat(file)), *_states(models))
        cache = None
        with contextlib.suppress(TyirError):  # where there is no folder for it, the files are read
            cache = Cache.open(default_folder())
            found = cache.read(key)
        if found is not None:
            return marshal.loads(found)
        structure = find(path)
        with contextlib.suppress(ValueError):  # else there is more in it than dictionaries, sets and texts
            found = marshal.dumps(structure)
            if cache is not None:
                cache.write(key, found)
        return structure

    return find_or_take


def _states(folder: str) -> Iterator[str]:
    """Every file below a folder, with what changes when its bytes do."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not entry.is_dir():
                yield _state(entry.path, entry.stat())
            elif entry.name != "__pycache__":
                yield from _states(entry.path)


def _state(path: str, status: os.stat_result) -> str:
    return f"{path} {status.st_size} {status.st_mtime_ns}"


class _AfterImport(MetaPathFinder):
    """Calls `then` with the module `name` as soon as it has been executed."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name, self._then = name, then

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name == self._name else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_then(module: ModuleType) -> None:
            execute(module)
            self._then(module)

        spec.loader.exec_module = execute_then  # type: ignore[method-assign]
        return spec
