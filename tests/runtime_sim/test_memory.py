"""The checks that hardware does not make: bounds, unwritten bytes, races."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tyir.diagnostics import TyirError
from tyir.printer import print_op
from tyir.runtime_sim.execution.functional import FunctionalDie, run_step
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.targets.machine import load_machine

HEAD = """"builtin.module"() ({
  "edge10.buffer"() <{address = 0 : i64, kind = "input", nbytes = 256 : i64, sym_name = "x", type = tensor<256xui8>}> : () -> ()
  "edge10.buffer"() <{address = 4096 : i64, kind = "output", nbytes = 256 : i64, sym_name = "y", type = tensor<256xui8>}> : () -> ()
  "func.func"() <{function_type = () -> (), sym_name = "main_s1"}> ({
    %x = "edge10.address_of"() <{symbol = @x}> : () -> !edge10.address
    %y = "edge10.address_of"() <{symbol = @y}> : () -> !edge10.address
"""  # noqa: E501
TAIL = """    "func.return"() : () -> ()
  }) {tyir.entry = 1 : i64} : () -> ()
}) : () -> ()
"""
LOAD = (
    '%a = "edge10.load"(%x) <{dram_strides = array<i64: 0, 16>, offset = OFF : i64, queue = "eidma", shape ='
    " array<i64: 1, 16, 16>, sram = 0 : i64, sram_strides = array<i64: 0, 16>}> : (!edge10.address) ->"
    " !edge10.token\n"
)
STORE = (
    '%b = "edge10.store"(%y DEP) <{dram_strides = array<i64: 0, 16>, offset = 0 : i64, shape = array<i64: 1,'
    " 16, 16>, sram = SRAM : i64, sram_strides = array<i64: 0, 16>}> : (!edge10.address TYPE) ->"
    " !edge10.token\n"
)


def run(body: str) -> np.ndarray[Any, Any]:
    die = FunctionalDie(EdgeProgram.parse(HEAD + body + TAIL), {}, load_machine())
    return run_step([die], {"x": np.arange(256, dtype=np.uint8)}, 0)["y"]


def load(offset: int = 0) -> str:
    return LOAD.replace("OFF", str(offset))


def store(dep: str = "%a", sram: int = 0) -> str:
    text = STORE.replace("SRAM", str(sram))
    return text.replace(" DEP", f", {dep}" if dep else "").replace(" TYPE", ", !edge10.token" if dep else "")


def test_a_copy_through_sram() -> None:
    assert run(load() + store()).tolist() == list(range(256))


def test_a_missing_token_is_a_race_that_names_both_commands() -> None:
    with pytest.raises(
        TyirError,
        match=(
            r"(?s)race on bytes 0\.\.256 of SRAM.*#0 edge10.load on eidma.*writes.*#1 edge10.store on"
            r" eodma.*reads"
        ),
    ):
        run(load() + store(dep=""))


def test_unwritten_bytes() -> None:
    with pytest.raises(
        TyirError,
        match=r"#1 edge10\.store on eodma reads bytes 8\.\.264 of SRAM, not all of which have been written",
    ):
        run(load() + store(sram=8))


def test_bounds() -> None:
    with pytest.raises(
        TyirError,
        match=r"touches DRAM bytes 128\.\.384, which lie in no buffer; the nearest is @x at 0\.\.256",
    ):
        run(load(128) + store())
    with pytest.raises(TyirError, match="of SRAM, which has 3145728"):
        run(load() + store(sram=3145720))


def test_tokens_of_the_lowering_matter(make_model: Callable[..., Any]) -> None:
    """Taking any one token away from a command is noticed, unless another token or the unit's order implies
    it; most are needed.
    """
    model = make_model(layers=1, tokens=8, group=16)
    text = print_op(model.lowered[0])
    lines = text.splitlines()
    rng = np.random.default_rng(0)
    candidates = [
        i
        for i, line in enumerate(lines)
        if re.search(r'"edge10\.(matmul|drain|dequant|vector|softmax_block|store)"', line)
        and "!edge10.token" in line.split(" : (")[1].split(" -> ")[0]
    ]
    noticed = 0
    chosen = rng.choice(candidates, 12, replace=False)
    for number in chosen:
        changed = list(lines)
        changed[number] = _without_last_operand(lines[number])
        die = FunctionalDie(
            EdgeProgram.parse("\n".join(changed)), filled(model.functional()[0]), model.machine
        )
        try:
            run_step([die], {"ids": np.zeros((1, 8), np.int32)}, 0)
        except TyirError as error:
            assert "race" in str(error) or "not all of which have been written" in str(error)
            noticed += 1
    assert noticed >= len(chosen) // 2


def filled(die: FunctionalDie) -> dict[str, Any]:
    """The bytes of every buffer that holds data, by name: what another die can be started with."""
    dram = die.memory.dram
    return {b.sym_name: s.data for b, s in zip(dram.buffers, dram.stored) if s.written is None}


def _without_last_operand(line: str) -> str:
    line = re.sub(
        r"\(([^()]*)\) <\{", lambda m: f"({', '.join(m.group(1).split(', ')[:-1])}) <{{", line, count=1
    )
    return re.sub(
        r" : \(([^()]*)\) -> ", lambda m: f" : ({', '.join(m.group(1).split(', ')[:-1])}) -> ", line, count=1
    )


def test_what_the_host_writes_is_written_for_all_programs_of_a_die() -> None:
    """Two lengths share a cache: one that is filled through either is there for both."""

    def die(length: int) -> FunctionalDie:
        text = (HEAD + load() + store() + TAIL).replace("tyir.entry = 1", f"tyir.entry = {length}")
        return FunctionalDie(EdgeProgram.parse(text.replace('"input"', '"kv"')), {}, load_machine())

    one, eight = die(1), die(8)
    eight.share_memory(one)
    for target, reader in ((one, eight), (eight, one)):
        wanted = np.random.default_rng(len(reader.program.entry)).integers(0, 256, 256).astype(np.uint8)
        target.memory.dram.write_buffer("x", wanted)
        np.testing.assert_array_equal(run_step([reader], {}, 0)["y"], wanted)
