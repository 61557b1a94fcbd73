"""Libraries that not every use of tyir needs: which extra brings them.

Running compiled artifacts needs what `pip install tyir` installs; compiling, serving and quantising need
more.  Whatever imports such a library says `require` first, so that a user is told what to install.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final

from tyir.diagnostics import TyirError

__all__ = [
    "EXTRA_OF",
    "begin_command",
    "is_command",
    "missing_library",
    "require",
    "scipy_hidden",
    "torch_hidden",
]

# Module -> the extra of pyproject.toml that brings it (tests/tyir/test_extras.py compares).
EXTRA_OF: Final = {
    "torch": "compile",
    "transformers": "compile",
    "safetensors": "compile",
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "llguidance": "serve",
    "gguf": "gguf",
    "PIL": "vision",
    "pyarrow": "quantize",
    "sentencepiece": "sentencepiece",
    "matplotlib": "plots",
    "shtab": "completion",
    "ray": "ray",
}


def require(what: str, *modules: str, extra: str | None = None) -> None:
    """`TyirError` when one of the modules is not installed: that `what` needs it, and the extra that has it
    (`extra`, else the first one's).
    """
    absent = [name for name in modules if not _here(name)]
    if absent:
        are = "is" if len(absent) == 1 else "are"
        raise TyirError(
            f"{what} needs {', '.join(absent)}, which {are} not installed",
            help=f"pip install 'tyir[{extra or EXTRA_OF[absent[0]]}]'",
        )


def missing_library(error: BaseException) -> TyirError | None:
    """What to say of an import that failed because an extra is not installed; None for anything else."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if name not in EXTRA_OF or _here(name):
        return None
    return TyirError(
        f"this needs {name}, which is not installed", help=f"pip install 'tyir[{EXTRA_OF[name]}]'"
    )


def _here(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None


def torch_hidden() -> AbstractContextManager[None]:
    """Inside this context an import of torch fails, unless torch is loaded already.

    TVM imports torch where it is installed, to exchange torch tensors faster; here that would cost two
    seconds and 180 MB for nothing.
    """
    return _hidden("torch")


_commands = False  # whether this process is a command of tyir's, and nobody else's


def begin_command() -> None:
    """Said by a command that has the process for itself."""
    global _commands
    _commands = True


def is_command() -> bool:
    """Whether this process is one of tyir's commands, and no program that has called its `main`."""
    return _commands


def scipy_hidden() -> AbstractContextManager[None]:
    """Inside this context, in the process of a command, scipy is not installed, unless it is loaded already.

    transformers imports it for losses of models that find objects, which no command of tyir's computes: a
    third of a second.  Elsewhere a program may train one after tyir has been imported.
    """
    return _hidden("scipy") if is_command() else nullcontext()


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # the documented way to make an import fail
    try:
        yield
    finally:
        del sys.modules[name]
