"""The IR after every stage, the compiled library and the command program give the same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.llm import Step
from tyir.dialects.builtin import Module
from tyir.execution.weights import CheckpointReader
from tyir.interpreter import Interpreter, run_lockstep
from tyir.parser import parse_file, parse_module
from tyir.pipeline import run_pipeline
from tyir.printer import print_op
from tyir.runtime_sim.session.session import ENGINES, EngineName, Session

IDS = [5, 17, 300, 42, 9, 1000, 77, 3, 8, 900, 11]
TOLERANCE = 0.06  # of logits up to about 15: a few f16 roundings per layer


def whole_sequence(module: Module, weights: CheckpointReader) -> npt.NDArray[np.float32]:
    inputs = [np.array([IDS]), np.arange(len(IDS))[None]]
    return np.asarray(run_lockstep([Interpreter(module, weights).run("main", inputs)])[0][0][0], np.float32)


@pytest.mark.parametrize("quantize", ["", "quantize-weights"])
def test_every_stage(imported: Path, model: Path, quantize: str) -> None:
    module, weights = parse_file(imported), CheckpointReader(model)
    results = {}
    if not quantize:
        results["aten"] = whole_sequence(module, weights)
    run_pipeline(module, "to-ty" + (f",{quantize}" if quantize else ""))
    wanted = whole_sequence(module, weights)
    for stage, pipeline in (("kv", "kv-materialize{max-kv=32}"), ("dist", "partition-dies{dies=3}")):
        run_pipeline(module, pipeline)
        module = parse_module(print_op(module))  # what is between the stages is a file
        step = Step(module, weights)
        results[stage] = np.concatenate([step.feed(IDS[:8]), step.feed(IDS[8:])])
    for stage, pipeline in (("static", "specialize-seqlen{seqlens=3,8}"), ("program", "to-program")):
        run_pipeline(module, pipeline)
        module = parse_module(print_op(module))
        step = Step(module, weights)
        results[stage] = np.concatenate([step.feed(IDS[:8], "main_s8"), step.feed(IDS[8:], "main_s3")])
    worst = {stage: float(np.abs(got - wanted).max()) for stage, got in results.items()}
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize(("dies", "weights"), [(1, "fp16"), (3, "int4"), (4, "fp16")])
def test_three_executions(artifacts: Callable[[int, str], Path], dies: int, weights: str) -> None:
    """Compiled library, reference interpreter and command program, on the same artifacts."""
    logits = {}
    for engine in ENGINES:
        session = Session(artifacts(dies, weights), engine)
        logits[engine] = np.concatenate([session.feed(IDS), session.feed([7])])
    worst = {engine: float(np.abs(logits[engine] - logits["interpreter"]).max()) for engine in logits}
    assert max(worst.values()) < TOLERANCE, worst
    assert worst["interpreter"] == 0.0


def test_engines_are_the_documented_ones() -> None:
    names: tuple[EngineName, ...] = ("host", "interpreter", "edge10")
    assert names == ENGINES
