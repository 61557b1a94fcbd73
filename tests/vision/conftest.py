"""Artifacts of the embedded vision-language models, compiled once per number of dies and session."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vision.folders import MODELS
from tests.vision.reference import HuggingFace
from tests.vision.scenes import SIZES
from tyir.manifest import BuildOptions
from tyir.tools.api import compile_path

MAX_KV = 512


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """`compiled(name, dies)`: the folder, for all sizes that are drawn, steps of 1 and 16 tokens."""
    out = tmp_path_factory.mktemp("vision")

    @functools.cache
    def make(name: str, dies: int) -> Path:
        options = BuildOptions(dies=dies, seqlens=(1, 16), max_kv=MAX_KV)
        return compile_path(MODELS / name, out / name, options, images=SIZES)

    return make


@pytest.fixture(scope="session")
def references() -> Callable[[str], HuggingFace]:
    """Hugging Face's model of a name, in fp32."""
    return functools.cache(lambda name: HuggingFace(MODELS / name))


@pytest.fixture(scope="session")
def text_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts of a model that takes no pictures."""
    out = tmp_path_factory.mktemp("text")
    return compile_path(MODELS / "tiny-qwen2", out, BuildOptions(dies=1, seqlens=(1,), max_kv=64))
