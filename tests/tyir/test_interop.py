"""Other tools read what tyir prints, whatever pass it comes from, and tyir reads what they print: the same IR
both ways.

The texts: every part of every `.ir` file of the tests that verifies, as it is and after every pass and
pipeline that accepts it; the stages of the embedded model, with their constants and without.  Skipped, aloud,
where a tool is not installed (`tests/tyir/interop.py` says how).
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tyir.interop import SPLIT, ask, differences, find_tool
from tyir.diagnostics import TyirError
from tyir.parser import parse_module
from tyir.pass_manager.registry import PassRegistry
from tyir.pipeline import PassContext, run_pipeline
from tyir.printer import print_op
from tyir.verifier import verify

TESTS = Path(__file__).resolve().parents[1]
MODEL = TESTS / "models" / "tiny-qwen2"
STAGES = (
    "",
    "to-ty",
    "quantize-weights",
    "kv-materialize{max-kv=64 layout=NHD}",
    "partition-dies{dies=3}",
    "specialize-seqlen{seqlens=1,8}",
    "to-program",
    "plan-memory",
)


@functools.cache
def printed_by_passes() -> tuple[str, ...]:
    """Every text that a pass or pipeline prints for a part of a test file; each text once."""
    registry = PassRegistry()
    pipelines = ["", *registry.names(), *registry.pipelines()]
    texts: dict[str, None] = {}
    for path in sorted(TESTS.rglob("*.ir")):
        for part in path.read_text(encoding="utf-8").split(f"\n{SPLIT}"):
            texts.update(
                dict.fromkeys(text for pipeline in pipelines for text in _run(part, pipeline, registry))
            )
    return tuple(texts)


def _run(text: str, pipeline: str, registry: PassRegistry) -> Iterator[str]:
    """The IR after a pipeline; nothing when the text is a test of errors or the pass refuses it."""
    try:
        module = parse_module(text)
        verify(module)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            run_pipeline(module, pipeline, PassContext(registry=registry))
    except TyirError:
        return
    yield print_op(module)


@functools.cache
def printed_by_stages() -> tuple[str, ...]:
    """The embedded model at every stage, whole and with its constants left out."""
    from tyir.frontends.huggingface import import_model

    module = import_model(MODEL)
    texts = []
    for stage in STAGES:
        run_pipeline(module, stage)
        texts += [print_op(module), print_op(module, elide=16)]
    return tuple(texts)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # snapshot-locations writes a file


@pytest.mark.parametrize(("tool", "generic"), [("mlir-opt", True), ("mlir-opt", False), ("xdsl-opt", True)])
def test_same_ir_through_another_tool(tool: str, generic: bool) -> None:
    """In the generic form, and as mlir-opt prints functions and modules by default."""
    _hold_against(tool, printed_by_passes, generic)


def test_what_xdsl_prints_by_default_is_read() -> None:
    """Read only: xDSL leaves the attributes of a declaration's arguments out."""
    if find_tool("xdsl-opt") is None:
        pytest.skip("xdsl-opt is not installed: nothing was held against it")
    for answer in ask("xdsl-opt", list(printed_by_passes()), generic=False):
        assert answer.text is not None, answer.complaint
        parse_module(answer.text)


@pytest.mark.parametrize("tool", ["mlir-opt", pytest.param("xdsl-opt", marks=pytest.mark.slow)])
def test_stages_of_a_model_through_another_tool(tool: str) -> None:
    _hold_against(tool, printed_by_stages)


def _hold_against(tool: str, texts_of: Callable[[], tuple[str, ...]], generic: bool = True) -> None:
    if find_tool(tool) is None:
        pytest.skip(f"{tool} is not installed: nothing was held against it")
    texts = list(texts_of())
    found = differences(texts, ask(tool, texts, generic))
    assert not found, f"{len(found)} of {len(texts)} texts\n" + "\n\n".join(found[:5])


@pytest.mark.parametrize("texts_of", [printed_by_passes, printed_by_stages])
def test_printed_text_comes_back_unchanged(texts_of: Callable[[], tuple[str, ...]]) -> None:
    for text in texts_of():
        module = parse_module(text)
        assert print_op(module) == text
        assert print_op(parse_module(print_op(module, pretty=True))) == text


def test_there_is_something_to_compare() -> None:
    assert len(printed_by_passes()) > 100
