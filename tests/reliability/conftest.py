"""What the breaking programs share: processes that fork, artifacts, and the count of an area."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.reliability.cases import MODEL, ProcessTally, Zygote


@pytest.fixture
def slow(request: pytest.FixtureRequest) -> bool:
    """Whether all cases are run."""
    return bool(request.config.getoption("--slow"))


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Callable[[str], ProcessTally]:
    """`tally(area)`: the count of an area."""
    return lambda area: ProcessTally(area, record_property)


@pytest.fixture(scope="session")
def light(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Children with the IR's tools."""
    names = ("tyir_opt", "tyir_dis", "tyir_sim", "tyir_reduce", "gpu.predict", "silicon.validate")
    zygote = Zygote(
        [
            *(f"tyir.tools.{name}" for name in names),
            "tyir.parser",
            "tyir.printer",
            "tyir.verifier",
            "tyir.targets.machine",
            "tyir.passes.pipelines",
        ],
        tmp_path_factory.mktemp("light"),
    )
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def importing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Children with the front end."""
    zygote = Zygote(
        [
            "tyir.tools.tyir_import",
            "tyir.tools.tyir_compile",
            "tyir.frontends.huggingface",
            "tyir.frontends.torch_export",
            "tyir.frontends.gguf.files",
            "tyir.frontends.torch_files",
            "transformers.models.qwen2.modeling_qwen2",
        ],
        tmp_path_factory.mktemp("importing"),
    )
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def early(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Children with the front end that cannot load torch."""
    names = ("huggingface", "checkpoint", "gguf.files", "tensor_names")
    zygote = Zygote(
        [
            "tests.reliability.no_torch",
            "tyir.tools.tyir_import",
            *(f"tyir.frontends.{name}" for name in names),
        ],
        tmp_path_factory.mktemp("early"),
    )
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model on one die, in 64 positions; nobody writes to it."""
    from tyir.manifest import BuildOptions
    from tyir.tools.api import compile_path

    out = tmp_path_factory.mktemp("compiled")
    return compile_path(MODEL, out, BuildOptions(dies=1, seqlens=(1, 8), max_kv=64, weights="int4"))


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Children with what executes artifacts and reads tokenizers."""
    zygote = Zygote(
        [
            *(f"tyir.tools.{name}" for name in ("tyir_run", "tyir_sim", "tyir_verify", "tokenizer")),
            "tyir.tools.run.text_stream",
            "tyir.tools.run.end_tokens",
            "tyir.runtime_sim.session.host_runtime",
            "tyir.runtime_sim.session.batch_session",
            "tyir.runtime_sim.session.edge10_engine",
            "transformers.models.auto.tokenization_auto",
            "transformers.tokenization_utils_tokenizers",
        ],
        tmp_path_factory.mktemp("running"),
    )
    yield zygote
    zygote.close()
