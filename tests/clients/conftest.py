"""What the clients are served: the embedded model, compiled once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import MODEL
from tyir.frontends.huggingface import import_model
from tyir.manifest import BuildOptions
from tyir.printer import print_op
from tyir.tools.api import compile_path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts for four sequences of 512 tokens."""
    ir = tmp_path_factory.mktemp("ir") / "model.ir"
    ir.write_text(print_op(import_model(MODEL)))
    options = BuildOptions(dies=1, seqlens=(1, 8, 64), max_kv=512, weights="int4", batch=4)
    return compile_path(ir, tmp_path_factory.mktemp("clients"), options)
