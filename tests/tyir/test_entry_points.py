"""What is called from outside is what `tyir.entry` says, whatever it is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from tyir.backends.edge10.lowering.die import lower_die
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.edge10 import Command
from tyir.dialects.func import Func
from tyir.execution.entry_points import (
    aliasing,
    argument,
    arguments,
    entry_point,
    entry_points,
    mark_entry,
    result,
    role_of,
)
from tyir.parser import parse_module
from tyir.pipeline import run_pipeline
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.targets.machine import load_machine

MACHINE = load_machine("edge10")
LAYER = Path(__file__).parents[1] / "passes" / "layer.ir"


def test_an_entry_point_is_found_by_its_tokens() -> None:
    module = Module.empty("die0")
    for name, tokens in (("long", 8), ("short", 1), ("layer", None)):
        function = module.body.append(Func.make(name, []))
        if tokens is not None:
            mark_entry(function, tokens)
    assert {n: f.sym_name for n, f in entry_points(module).items()} == {8: "long", 1: "short"}
    with pytest.raises(TyirError, match=r"no entry point for 4 tokens .*\nhelp: sequence lengths here: 8, 1"):
        entry_point(module, 4)
    with pytest.raises(TyirError, match="help: specialize-seqlen makes entry points"):
        entry_point(Module.empty(), 1)
    mark_entry(module.body.append(Func.make("other", [])), 8)
    with pytest.raises(TyirError, match="@long and @other are both the entry point for 8 tokens"):
        entry_points(module)


def test_names_only_speak_to_people() -> None:
    """A renamed entry point with a renamed position lowers to the same commands."""
    module = parse_module(LAYER.read_text())
    run_pipeline(
        module,
        "kv-materialize{max-kv=16},partition-dies{dies=1},specialize-seqlen{seqlens=4},to-program",
    )
    (die,) = (o for o in module.body if isinstance(o, Module))
    main = entry_point(die, 4)
    assert [role_of(main, i) for i in range(4)] == ["tokens", "position", "cache", "cache"]
    wanted = [(op.name, op.properties) for op in lower_die(die, 4, MACHINE).walk_type(Command)]
    main.sym_name = "step"
    (position,) = arguments(main, "position")
    position.name = "where"
    main.set_arg_attrs([argument(f"a{i}", role_of(main, i)) for i in range(4)])  # type: ignore[arg-type]
    program = lower_die(die, 4, MACHINE)
    assert [(op.name, op.properties) for op in program.walk_type(Command)] == wanted
    assert (EdgeProgram(program).seqlen, EdgeProgram(program).entry) == (4, "step")


def test_a_command_program_without_an_entry_point_is_refused() -> None:
    with pytest.raises(TyirError, match=r"one entry point \(tyir.entry\), this one has 0"):
        EdgeProgram(Module.empty("die0"))


def test_a_result_updates_the_argument_it_is_said_to() -> None:
    assert aliasing(result("k0"), 3) == result("k0", alias=3)
