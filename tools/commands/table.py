"""Which commands there are: a file `tools/tyir_<name>.py` is one, and its docstring says what it does.

    sim   tyir-sim   tyir.tools.tyir_sim   how fast the compiled programs run, what bounds them, ...

Nothing of a command is imported for this.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import tyir.tools

__all__ = ["Command", "commands", "find_command"]


@dataclass(frozen=True)
class Command:
    """`name` as in `tyir NAME`; `module` holds its `main` and `make_parser`."""

    name: str
    file: Path

    @property
    def script(self) -> str:
        return f"tyir-{self.name}"

    @property
    def module(self) -> str:
        return f"tyir.tools.{self.file.stem}"

    @property
    def summary(self) -> str:
        """The first sentence of the module's docstring, without the command line it begins with."""
        text = ast.get_docstring(ast.parse(self.file.read_text(encoding="utf-8"))) or ""
        first = " ".join(text.partition("\n\n")[0].split())
        return first.rpartition("`: ")[2].removesuffix(".")

    def parser(self) -> argparse.ArgumentParser:
        """Its parser, which importing the module makes known and nothing heavy with it."""
        found: argparse.ArgumentParser = importlib.import_module(self.module).make_parser()
        return found


@cache
def commands() -> dict[str, Command]:
    """All commands, by name; in the order of a model's way, then of the alphabet."""
    found: dict[str, Command] = {}
    for folder in map(Path, tyir.tools.__path__):
        for module in pkgutil.iter_modules([str(folder)]):
            if module.name.startswith("tyir_"):
                name = module.name.removeprefix("tyir_").replace("_", "-")
                found.setdefault(name, Command(name, folder / f"{module.name}.py"))
    first = ("import", "opt", "quantize", "compile", "run", "chat", "serve", "verify", "sim")
    order = {name: number for number, name in enumerate(first)}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def find_command(name: str) -> Command | None:
    """The command of a name, with or without `tyir-`."""
    return commands().get(name.removeprefix("tyir-"))
