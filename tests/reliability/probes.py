"""Readers that no tool calls alone, as tools of their own; run in the children of `zygote.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tyir.tools.cli import run_tool


@run_tool
def machine(argv: Sequence[str]) -> int:
    """Read a machine file."""
    from tyir.targets.machine import load_machine

    load_machine(Path(argv[0]))
    return 0


@run_tool
def request_trace(argv: Sequence[str]) -> int:
    """Read a file of requests."""
    from tyir.runtime_sim.serving.benchmark import read_trace

    read_trace(Path(argv[0]))
    return 0


@run_tool
def manifest(argv: Sequence[str]) -> int:
    """Read a folder's manifest."""
    from tyir.manifest import Manifest

    Manifest.load(Path(argv[0]))
    return 0


@run_tool
def gpu_model(argv: Sequence[str]) -> int:
    """Read a config.json for the kernel models."""
    from tyir.runtime_sim.gpu.steps import model_of

    model_of(argv[0])
    return 0


@run_tool
def safetensors(argv: Sequence[str]) -> int:
    """Map a `.params` file."""
    from tyir.execution.weights import read_safetensors

    read_safetensors(Path(argv[0]))
    return 0


@run_tool
def library(argv: Sequence[str]) -> int:
    """Load a compiled library."""
    from tyir.runtime_sim.session.host_runtime import HostLibrary

    HostLibrary(Path(argv[0]))
    return 0
