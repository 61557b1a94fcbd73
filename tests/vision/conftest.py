"""Artifacts of the embedded vision-language models, compiled once per number of dies and run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.once import once
from tests.vision.folders import MODELS
from tests.vision.reference import HuggingFace
from tests.vision.scenes import SIZES
from tyir.manifest import BuildOptions
from tyir.tools.api import compile_path

MAX_KV = 512


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`compiled(name, dies)`: the folder, for two sizes and steps of 16 tokens; `compiled(name, dies, True)`:
    for all sizes that are drawn, steps of 1 and 16.  A name is one of `tests/models` or a folder's path.
    """

    def make(name: str, dies: int, every: bool = False) -> Path:
        sizes, lengths = (SIZES, (1, 16)) if every else (SIZES[:2], (16,))
        options = BuildOptions(dies=dies, seqlens=lengths, max_kv=MAX_KV)

        def fill(out: Path) -> None:
            compile_path(MODELS / name, out, options, images=sizes)

        return once(tmp_path_factory, f"{Path(name).name}-{len(lengths)}-{dies}", fill) / f"{dies}die"

    return make


@pytest.fixture(scope="session")
def references() -> Callable[[str], HuggingFace]:
    """Hugging Face's model of a name, in fp32."""
    return functools.cache(lambda name: HuggingFace(MODELS / name))


@pytest.fixture(scope="session")
def text_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts of a model that takes no pictures."""
    options = BuildOptions(dies=1, seqlens=(1,), max_kv=64)
    return (
        once(tmp_path_factory, "text", lambda out: compile_path(MODELS / "tiny-qwen2", out, options)) / "1die"
    )
