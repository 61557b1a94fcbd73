"""Finding passes by name: `kv-materialize` is the class `KvMaterialize` of `tyir.passes.kv_materialize`,
imported when first asked for.

Other sources: entry points of the group `tyir.passes` (name -> a Pass class, or a module holding one) and
files given to `load_pass_file`. `tyir` imports `tyir.passes` nowhere by name: the layers stay apart.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final

from tyir.diagnostics import TyirError
from tyir.ir import Op

if TYPE_CHECKING:
    from tyir.pipeline import Pass

__all__ = ["PassRegistry"]

_PACKAGE: Final = "tyir.passes"
_GROUP: Final = "tyir.passes"
_RENAME: Final = "a pass is named after its class, and one alone in a file after the file too: rename it"


_loaded: dict[str, ModuleType] = {}  # what `load_module_file` has put into `sys.modules`


@dataclass
class PassRegistry:
    """Passes and named pipelines; `extra` holds what the user loaded from files."""

    extra: dict[str, type[Pass]] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)  # where those of `extra` come from
    _found: dict[str, type[Pass] | None] = field(default_factory=dict, repr=False, compare=False)

    def names(self) -> list[str]:
        """Every pass, sorted; nothing is imported for it."""
        spec = importlib.util.find_spec(_PACKAGE)
        folders = list(spec.submodule_search_locations or []) if spec is not None else []
        modules = {
            m.name.replace("_", "-")
            for m in pkgutil.iter_modules(folders)
            if not m.name.startswith("_") and _is_pass_file(folders, m.name)
        }
        modules.update(e.name for e in importlib.metadata.entry_points(group=_GROUP))
        return sorted(modules | set(self.extra))

    def pipelines(self) -> dict[str, str]:
        """The named pipelines of `tyir.passes.pipelines`."""
        if importlib.util.find_spec(f"{_PACKAGE}.pipelines") is None:
            return {}
        table = importlib.import_module(f"{_PACKAGE}.pipelines").PIPELINES
        return dict(table)

    def find(self, name: str) -> type[Pass] | None:
        """The pass of a name, or None."""
        if name in self.extra:
            return self.extra[name]
        if name not in self._found:  # looking through packages takes milliseconds, pipelines repeat names
            self._found[name] = self._look_for(name)
        return self._found[name]

    @staticmethod
    def _look_for(name: str) -> type[Pass] | None:
        module_name = name.replace("-", "_")
        is_name = "_" not in name and module_name.isidentifier()
        if is_name and importlib.util.find_spec(f"{_PACKAGE}.{module_name}") is not None:
            found = _pass_named(name, importlib.import_module(f"{_PACKAGE}.{module_name}"))
            if found is not None:
                return found
        for entry in importlib.metadata.entry_points(group=_GROUP, name=name):
            loaded = entry.load()
            return _pass_named(name, loaded) if isinstance(loaded, ModuleType) else loaded
        return None

    def load_file(self, path: str | Path) -> list[str]:
        """Make the passes of a Python file known; returns their names, of a lone pass also the file's.

        `TyirError` when it cannot be loaded, holds none, or two passes would have one name.
        """
        module = load_module_file(path)
        classes = list(pass_classes(module))
        if not classes:
            own = [v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__]
            if any(isinstance(v, type) and issubclass(v, Op) for v in own):
                help = f"it declares ops: --load-dialect={path}"
            else:
                help = "a pass is a frozen dataclass deriving tyir.pipeline.Pass"
            raise TyirError(f"{path} declares no pass", help=help)
        names: dict[str, type[Pass]] = {}
        for cls in classes:
            if (name := cls.name()) in names:
                raise TyirError(
                    f"{path} declares two passes named '{name}': {names[name].__name__} and {cls.__name__}",
                    help="a pass is named after its class: rename one of them",
                )
            names[name] = cls
        if len(classes) == 1:
            names.setdefault(Path(path).stem.replace("_", "-"), classes[0])
        for name in names:
            other = self.files.get(name)
            if name not in self.extra and self.find(name) is not None:
                raise TyirError(f"{path}: there is a pass '{name}' already", help=_RENAME)
            if other is not None and other.resolve() != Path(path).resolve():
                raise TyirError(f"{path}: {other} has declared a pass '{name}' already", help=_RENAME)
        self.extra.update(names)
        self.files.update(dict.fromkeys(names, Path(path)))
        return list(names)


def pass_classes(module: ModuleType) -> Iterator[type[Pass]]:
    """The passes a module defines itself."""
    from tyir.pipeline import Pass

    for value in vars(module).values():
        if (
            isinstance(value, type)
            and issubclass(value, Pass)
            and value is not Pass
            and value.__module__ == module.__name__
            and not value.__name__.startswith("_")
        ):
            yield value


def _pass_named(name: str, module: ModuleType) -> type[Pass] | None:
    """The pass that a name stands for in a module: the only one, or that of several which is called so.

    None when there is none; `TyirError` when there are several and none is called so.
    """
    classes = list(pass_classes(module))
    if len(classes) < 2:
        return classes[0] if classes else None
    found = next((cls for cls in classes if cls.name() == name), None)
    if found is None:
        raise TyirError(
            f"{module.__name__} declares {len(classes)} passes, none of them named '{name}':"
            f" {', '.join(cls.name() for cls in classes)}",
            help=f"name one: {name} = {module.__name__}:{classes[0].__name__}",
        )
    return found


def load_module_file(path: str | Path) -> ModuleType:
    """Import a Python file by path; `TyirError` names what is wrong with it."""
    file = Path(path)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise TyirError(
            f"cannot load {path}: there is no such Python file", help="give the path of a .py file"
        )
    module = importlib.util.module_from_spec(spec)
    shadowed = sys.modules.get(file.stem)
    sys.modules[file.stem] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a file that ends the process is not the end of a command
        raise TyirError(
            f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}",
            where=_line_of(error, file),
            help="the file cannot be loaded as it is: mend this line; --debug shows the traceback",
        ) from error
    finally:
        if shadowed is not None and shadowed is not _loaded.get(file.stem):
            sys.modules[file.stem] = shadowed  # a library's module keeps its name
        else:
            _loaded[file.stem] = module
    return module


def _line_of(error: BaseException, file: Path) -> str:
    """The line of `file` that an error at loading comes from."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}:{error.offset or 1}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
    return f"{file}:{lines[-1] if lines else 1}:1"


def _is_pass_file(folders: list[str], module_name: str) -> bool:
    """Whether a file of the passes folder declares a class deriving `Pass` (read, not imported: listing must
    be fast).
    """
    for folder in folders:
        path = Path(folder) / f"{module_name}.py"
        if path.is_file():
            return "(Pass)" in path.read_text(encoding="utf-8")
    return False
