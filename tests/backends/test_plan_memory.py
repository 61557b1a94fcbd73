"""`plan-memory`: what it writes is what lower-edge10 does without it, and a plan changed by hand is followed,
refused or found out.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.llm import Shape, build, dies_of
from tyir.backends.edge10.lowering.die import lower_die
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.manifest import BuildOptions, Manifest
from tyir.parser import parse_module
from tyir.pipeline import PassContext, run_pipeline
from tyir.printer import print_op
from tyir.runtime_sim.execution.check_accesses import check_lengths
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.targets.machine import load_machine
from tyir.tools.api import compile_path
from tyir.verifier import verify

MACHINE = load_machine("edge10")
MODEL = Path(__file__).parents[1] / "models" / "tiny-qwen2"
SHAPE = Shape(hidden=128, heads=4, kv_heads=2, head_dim=32, width=256, vocabulary=300)


def program(options: str = "dies=2", seqlens: str = "1,8", quantize: str = "") -> Module:
    """A small model at stage `program`."""
    module, _ = build(SHAPE, draw=False)
    run_pipeline(
        module,
        f"{quantize}kv-materialize{{max-kv=256}},partition-dies{{{options}}},specialize-seqlen{{seqlens={seqlens}}},to-program",
    )
    return module


def planned_text(module: Module) -> str:
    """The module with its plan, printed."""
    run_pipeline(module, "plan-memory")
    verify(module)
    return print_op(module)


def lowered(module: Module, lengths: tuple[int, ...] = (1, 8)) -> dict[int, list[Module]]:
    return {n: [lower_die(die, n, MACHINE) for die in dies_of(module)] for n in lengths}


def check(module: Module) -> None:
    check_lengths(
        {n: [EdgeProgram(die) for die in dies] for n, dies in lowered(module).items()}, MACHINE, 256
    )


@pytest.mark.parametrize(
    ("options", "seqlens", "quantize"),
    [
        ("dies=2", "1,8", ""),
        ("dies=3", "1,40", "quantize-weights{group-size=64},"),
        ("dies=4 pp=2", "1,8", ""),
        ("dies=1", "8,200", ""),
    ],
)
def test_a_plan_says_what_would_be_done_without_it(options: str, seqlens: str, quantize: str) -> None:
    lengths = tuple(map(int, seqlens.split(",")))
    wanted = lowered(program(options, seqlens, quantize), lengths)
    text = planned_text(program(options, seqlens, quantize))
    read = parse_module(text)
    for length, dies in lowered(read, lengths).items():
        assert [print_op(d) for d in dies] == [print_op(d) for d in wanted[length]]
    assert planned_text(read) == text, "planning a plan changes nothing"


def test_statistics_are_the_largest_die() -> None:
    context = PassContext()
    module = program()
    run_pipeline(module, "plan-memory", context)
    check(module)
    ends = [
        b.address + b.nbytes
        for dies in lowered(module).values()
        for die in dies
        for b in EdgeProgram(die).buffers.values()
    ]
    assert context.statistics["dram"] == max(ends)


def edited(pattern: str, replacement: str) -> Module:
    text = planned_text(program())
    changed, count = re.subn(pattern, replacement, text, count=1)
    assert count == 1
    return parse_module(changed)


def test_a_place_changed_by_hand_is_followed() -> None:
    """The first norm's result moves to the end of the arena, where nothing lies."""
    module = edited(r'("ty\.rms_norm"[^\n]*tyir\.place = )"sram \d+\.\.\d+"', r'\1"sram 1500032..1500288"')
    check(module)
    assert "outputs = array<i64: 1500032>" in print_op(lowered(module)[1][0])


def test_a_place_on_top_of_another_is_found_out() -> None:
    """The sum after attention, which the layer still adds to, and its norm."""
    text = planned_text(program())
    taken = re.search(r'"ty\.add"[^\n]*tyir\.place = ("sram (\d+)\.\.\d+")', text)
    assert taken is not None
    norm = rf'"sram {taken[2]}..{int(taken[2]) + 256}"'
    module = edited(
        r'("ty\.rms_norm"[^\n]*post_attention_layernorm\.weight[^\n]*tyir\.place = )"sram \d+\.\.\d+"',
        rf"\1{norm}",
    )
    with pytest.raises(
        TyirError,
        match=(
            r"@layer_s1: a result of .ty.add. \(sram (.|\n)* and a result of .ty.rms_norm. (.|\n)* share"
            r" bytes while both are live"
        ),
    ):
        lowered(module)


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (r'tyir\.place = "sram \d+\.\.\d+"', 'tyir.place = "sram 0..8"', r"needs 256 bytes, its place 'sram 0\.\.8' has 8\n(.|\n)*\"sram 0\.\.256\""),  # noqa: E501
        (r'tyir\.place = "sram \d+\.\.\d+"', 'tyir.place = "dram"', r"'dram' is not a place(.|\n)*write \"sram 4096\.\.8192\""),  # noqa: E501
        (r'tyir\.place = "sram \d+\.\.\d+"', 'tyir.place = "@spil.layer_s1 0..256"', "there is no buffer @spil.layer_s1"),  # noqa: E501
        (r'("ty\.param"\(\) <\{sym_name = "model\.norm\.weight"(?:.|\n)*?\}\) \{tyir\.address = )\d+', r"\g<1>64", r"@model\.\S+ at 0\.\.\d+ and @\S+ at 64\.\.320 overlap"),  # noqa: E501
        (r"temp = 44 : i64", "temp = 250 : i64", r"leaves -\d+ of 256 parts"),
        (r"temp = 44 : i64", "temp = true", r"is not a division of SRAM(.|\n)*write \{temp = 44 : i64, side = array<i64: 4, 4>"),  # noqa: E501
    ],
)  # fmt: skip
def test_what_is_no_plan_is_refused(pattern: str, replacement: str, message: str) -> None:
    with pytest.raises(TyirError, match=message):
        lowered(edited(pattern, replacement))


def test_a_division_changed_by_hand_is_followed() -> None:
    module = edited(r"packed = array<i64: 8, 4>", "packed = array<i64: 12, 4>")
    check(module)
    assert print_op(lowered(module)[1][0]) != print_op(lowered(program())[1][0])


def test_a_weight_moved_in_one_length_moves_in_all() -> None:
    module = edited(
        r'("ty\.param"\(\) <\{sym_name = "model\.norm\.weight"(?:.|\n)*?\}\) \{tyir\.address = )\d+',
        r"\g<1>64000000",
    )
    check(module)
    for dies in lowered(module).values():
        assert EdgeProgram(dies[0]).buffers["model.norm.weight"].address == 64000000


def test_a_planned_module_compiles_to_the_same_artifacts(tmp_path: Path) -> None:
    from tyir.frontends.huggingface import import_model
    from tyir.passes.pipelines import remaining_pipeline

    options = BuildOptions(dies=2, seqlens=(1, 8), max_kv=128, weights="int4")
    module = import_model(MODEL)
    run_pipeline(module, remaining_pipeline("aten", options) + ",plan-memory")
    (tmp_path / "planned.ir").write_text(print_op(module))
    folders = [
        compile_path(p, tmp_path / name, options)
        for name, p in (("a", MODEL), ("b", tmp_path / "planned.ir"))
    ]
    files = [Manifest.load(f).files for f in folders]
    differing = {name for name in files[0] if files[0][name] != files[1][name]}
    assert files[0].keys() == files[1].keys() and all(n.endswith((".ir", ".so")) for n in differing), (
        differing
    )
