"""The table of tried and survived cases, at the end of the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.cases import MODEL, Tally, Zygote


@pytest.fixture
def slow(request: pytest.FixtureRequest) -> bool:
    """Whether all cases are run."""
    return bool(request.config.getoption("--slow"))


@pytest.fixture
def tally(record_property: Any) -> Iterator[Callable[[str], Tally]]:
    """`tally(area)`: the count of an area, closed at the end of the test."""
    made: list[Tally] = []

    def make(area: str) -> Tally:
        made.append(Tally(area, record_property))
        return made[-1]

    yield make


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


def pytest_terminal_summary(terminalreporter: Any) -> None:
    rows: dict[str, list[Any]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "reliability" and getattr(report, "when", "") == "call":
                    area, tried, survived, seconds, slowest = value
                    row = rows.setdefault(area, [0, 0, 0.0, ""])
                    row[0] += tried
                    row[1] += survived
                    row[2:] = max(row[2:], [seconds, slowest])
    if not rows:
        return
    terminalreporter.section("reliability: cases tried and survived")
    for area, (tried, survived, seconds, slowest) in sorted(rows.items()):
        terminalreporter.write_line(
            f"{area:<40}{tried:>6}{survived:>6}   slowest {seconds:5.1f} s: {slowest}"
        )
    total = [sum(row[i] for row in rows.values()) for i in (0, 1)]
    terminalreporter.write_line(f"{'all':<40}{total[0]:>6}{total[1]:>6}")
