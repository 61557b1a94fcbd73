"""The pytest plugin: `.ir` files whose RUN lines begin with a command of tyir are tests, wherever they lie.

Installed with tyir (entry point `pytest11`), so it is loaded in every run of pytest in that environment: it
imports nothing but pytest, claims no file and no option that could be somebody else's, and what runs the
tests is imported with the first of them.  `-p no:tyir.tools.testing.plugin` turns it off.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

__all__ = ["pytest_addoption", "pytest_collect_file"]

_RUN: Final = re.compile(r"^\s*// RUN:\s*(?:not\s+)?tyir-", re.MULTILINE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("tyir").addoption(
        "--bless-ir",
        dest="bless_ir",
        action="store_true",
        help="write what tools print now into the `// OUT: ` lines of .ir tests",
    )


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path.suffix != ".ir" or not _RUN.search(file_path.read_text(encoding="utf-8", errors="replace")):
        return None
    from tyir.tools.testing.ir_tests import IrFile

    return IrFile.from_parent(parent, path=file_path)
