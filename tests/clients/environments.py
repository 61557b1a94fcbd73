"""Environments of published clients, each of its own: their requirements exclude one another and tyir's.

    python -m tests.clients.environments lm-eval langchain     # from the index, into build/clients
    pytest tests/clients --slow                                 # what is not there is skipped by name

`TYIR_CLIENTS` names another folder of environments.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

__all__ = ["REQUIREMENTS", "python_of"]

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS: dict[str, list[str]] = {
    "langchain": ["langchain-openai==1.7.4", "openai", "ollama"],
    "lm-eval": ["lm-eval[api]==0.4.13", "transformers>=5"],
    "schemathesis": ["schemathesis"],
    "dify": ["dify-plugin==0.7.4"],
    "evalscope": ["evalscope[perf]==1.14.1"],
}


def folder() -> Path:
    """Where the environments are."""
    return Path(os.environ.get("TYIR_CLIENTS", ROOT / "build" / "clients"))


def python_of(name: str) -> Path:
    """The interpreter of an environment; skips the test where there is none."""
    python = folder() / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment of {name}: python -m tests.clients.environments {name}")
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description="Install environments of clients.")
    parser.add_argument("names", nargs="+", choices=sorted(REQUIREMENTS))
    for name in parser.parse_args().names:
        place = folder() / name
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        command = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", *REQUIREMENTS[name]]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
