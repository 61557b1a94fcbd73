"""Artifacts of the embedded model, compiled once per configuration and run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.once import once
from tyir.frontends.huggingface import import_model
from tyir.manifest import BuildOptions
from tyir.printer import print_op
from tyir.tools.api import compile_path
from tyir.tools.verify.compare import Reference

MODEL = Path(__file__).parents[1] / "models" / "tiny-qwen2"
MAX_KV = 128

Artifacts = Callable[[int, str], Path]


@pytest.fixture(scope="session")
def model() -> Path:
    return MODEL


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as `.ir` at stage aten."""

    def make(folder: Path) -> None:
        (folder / "model.ir").write_text(print_op(import_model(MODEL)))

    return once(tmp_path_factory, "imported", make) / "model.ir"


@pytest.fixture(scope="session")
def artifacts(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """`artifacts(dies, weights)`: the folder compiled for lengths 1 and 8 and a cache of 128 tokens."""

    def compiled(dies: int, weights: str) -> Path:
        options = BuildOptions(dies=dies, seqlens=(1, 8), max_kv=MAX_KV, weights=weights)
        name = f"{weights}-{dies}"
        return once(tmp_path_factory, name, lambda out: compile_path(imported, out, options)) / f"{dies}die"

    return compiled


@pytest.fixture(scope="session")
def four(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts for four sequences at once."""
    options = BuildOptions(dies=1, seqlens=(1, 8), max_kv=MAX_KV, weights="int4", batch=4)
    return once(tmp_path_factory, "four", lambda out: compile_path(imported, out, options)) / "1die"


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Reference]:
    """Hugging Face fp32 on the weights of a kind, with its answers remembered."""

    @functools.cache
    def make(weights: str) -> Reference:
        return _Remembering(MODEL, BuildOptions(weights=weights))

    return make


class _Remembering(Reference):
    """A reference that answers a question once: the same prompts are asked for every number of dies."""

    def __init__(self, folder: Path, options: BuildOptions) -> None:
        super().__init__(folder, options)
        self.answers: dict[tuple[int, ...], Any] = {}

    def continue_greedily(self, ids: Sequence[int], count: int) -> list[int]:
        key = (count, *ids)
        if key not in self.answers:
            self.answers[key] = super().continue_greedily(ids, count)
        return list(self.answers[key])

    def run(self, ids: Sequence[int]) -> Any:
        key = (-1, *ids)
        if key not in self.answers:
            self.answers[key] = super().run(ids)
        return self.answers[key]
