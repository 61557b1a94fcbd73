"""The table of stages and what passes declare agree; no pass runs where it may not."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tyir.attributes import StringAttr
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.manifest import BuildOptions
from tyir.pass_manager.registry import PassRegistry
from tyir.passes.pipelines import remaining_pipeline
from tyir.pipeline import Pass, build_pipeline, run_pipeline
from tyir.stages import STAGES

REGISTRY = PassRegistry()
STAGED = [name for name in REGISTRY.names() if (found := REGISTRY.find(name)) is not None and found.stage]


def module_at(stage: str) -> Module:
    module = Module.empty()
    module.set_attribute("tyir.stage", StringAttr(stage))
    return module


def test_what_leads_on_from_a_stage_leads_to_the_next_one() -> None:
    order = list(STAGES)
    for here, there in pairwise(order):
        passes = [p for p in build_pipeline(STAGES[here].next).items if isinstance(p, Pass)]
        assert here in passes[0].stage
        reached = [p.to_stage for p in passes if p.to_stage is not None]
        assert reached == ["dist" if here == "kv" else there], here
    assert STAGES[order[-1]].next == ""


def test_every_stage_but_the_last_has_a_pass_that_declares_it() -> None:
    declared = {stage for name in STAGED for stage in found_stage(name)}
    assert declared == set(STAGES) - {"edge10"}


def found_stage(name: str) -> tuple[str, ...]:
    found = REGISTRY.find(name)
    assert found is not None
    return found.stage


@pytest.mark.parametrize("name", STAGED)
def test_a_wrong_stage_is_refused_before_anything_changes(name: str) -> None:
    wanted = found_stage(name)
    for stage in (s for s in STAGES if s not in wanted):
        module = module_at(stage)
        with pytest.raises(
            TyirError, match=f"{name} runs at stage {' or '.join(wanted)}, this module is at stage"
        ):
            run_pipeline(module, name)
        assert module.attributes["tyir.stage"] == StringAttr(stage)


def test_the_help_says_what_to_run() -> None:
    with pytest.raises(TyirError, match="run partition-dies first"):
        run_pipeline(module_at("kv"), "specialize-seqlen")
    with pytest.raises(TyirError, match="run kv-materialize,partition-dies,specialize-seqlen first"):
        run_pipeline(module_at("ty"), "outline-layers")
    with pytest.raises(TyirError, match="start from a file of stage ty"):
        run_pipeline(module_at("dist"), "kv-materialize")


def test_an_unknown_stage_has_no_pipeline() -> None:
    with pytest.raises(TyirError, match="there is no stage 'tie'"):
        remaining_pipeline("tie", BuildOptions())
