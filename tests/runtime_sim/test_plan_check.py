"""The check of a memory plan: good programs pass, each of ten bad ones is refused for its own reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tyir.backends.edge10.memory.summary import memory_summary
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.parser import parse_module
from tyir.runtime_sim.execution.check_accesses import check_lengths, check_plan, check_programs
from tyir.runtime_sim.execution.functional import run_step
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.targets.machine import load_machine

MACHINE = load_machine("edge10")
TOKEN, ADDRESS = "!edge10.token", "!edge10.address"


def buffer(name: str, address: int, kind: str, nbytes: int = 256) -> str:
    return (
        f'"edge10.buffer"() <{{address = {address} : i64, kind = "{kind}", nbytes = {nbytes} : i64, sym_name'
        f' = "{name}", type = tensor<{nbytes}xui8>}}> : () -> ()\n'
    )


def transfer(
    kind: str, name: str, base: str, offset: int, sram: int, deps: str = "", nbytes: int = 256
) -> str:
    tokens = [f"%{d}" for d in deps.split()]
    queue = 'queue = "eidma", ' if kind == "load" else ""
    return (
        f'%{name} = "edge10.{kind}"({", ".join([f"%{base}", *tokens])}) <{{dram_strides = array<i64: 0, 0>,'
        f" offset = {offset} : i64, {queue}"
        f"shape = array<i64: 1, 1, {nbytes}>, sram = {sram} : i64, sram_strides = array<i64: 0, 0>}}> :"
        f" ({', '.join([ADDRESS, *[TOKEN] * len(tokens)])}) -> {TOKEN}\n"
    )


def drain(name: str, acc: int, sram: int, deps: str = "") -> str:
    tokens = [f"%{d}" for d in deps.split()]
    return (
        f'%{name} = "edge10.drain"({", ".join(tokens)}) <{{acc = {acc} : i64, acc_stride = 256 : i64, element'
        f" = f32, m = array<i64: 1, 1>, n = 64 : i64, sram = {sram} : i64, "
        f"sram_strides = array<i64: 256, 0>}}> : ({', '.join([TOKEN] * len(tokens))}) -> {TOKEN}\n"
    )


def matmul(name: str, acc: int, lhs: int, deps: str = "") -> str:
    tokens = [f"%{d}" for d in deps.split()]
    return (
        f'%{name} = "edge10.matmul"({", ".join(tokens)}) <{{acc = {acc} : i64, acc_stride = 256 : i64, k = 1'
        f" : i64, lhs = {lhs} : i64, lhs_strides = array<i64: 2, 0>, "
        f"m = array<i64: 1, 1>, n = 64 : i64, rhs = {lhs} : i64, rhs_stride = 2 : i64}}> :"
        f" ({', '.join([TOKEN] * len(tokens))}) -> {TOKEN}\n"
    )


X, W, Y = buffer("x", 0, "input"), buffer("w", 4096, "weight"), buffer("y", 8192, "output")
LOAD, STORE = transfer("load", "a", "x", 0, 0), transfer("store", "b", "y", 0, 0, "a")


def step_of(buffers: str, body: str) -> Module:
    """A program of one function."""
    text = (
        f'"builtin.module"() ({{\n{buffers}"func.func"() <{{function_type = () -> (), sym_name = "main_s1"}}>'
        f' ({{\n{body}"func.return"() : () -> ()\n}}) {{tyir.entry = 1 : i64}} : () -> ()\n}}) : () -> ()\n'
    )
    return parse_module(text)


def check(body: str, buffers: str = X + W + Y) -> None:
    heads = "".join(f'%{n} = "edge10.address_of"() <{{symbol = @{n}}}> : () -> {ADDRESS}\n' for n in "xwy")
    check_plan(step_of(buffers, heads + body), MACHINE)


def test_a_good_plan() -> None:
    check(LOAD + STORE)
    check(
        transfer("load", "a", "w", 0, 0)
        + matmul("m", 0, 0, "a")
        + drain("d", 0, 512, "m")
        + transfer("store", "b", "y", 0, 512, "d")
    )


BAD = {
    "two buffers overlap": (
        LOAD,
        X + buffer("w", 128, "weight") + Y,
        r"@x at 0\.\.256 and @w at 128\.\.384 overlap",
    ),
    "a buffer inside another": (LOAD, buffer("x", 0, "input", 8192) + W + Y, "@x at .* and @w at .* overlap"),
    "a buffer beyond DRAM": (
        LOAD,
        X + W + buffer("y", 1 << 33, "output"),
        "outside the die's 8589934592 bytes",
    ),
    "a transfer beyond its buffer": (transfer("load", "a", "x", 128, 0), "", "lie in no buffer"),
    "SRAM beyond its end": (transfer("load", "a", "x", 0, 3145600), "", "of SRAM, which has 3145728"),
    "accumulators beyond their end": (
        LOAD + matmul("m", 196500, 0, "a"),
        "",
        "of the accumulators, which has 196608",
    ),
    "bytes never written": (transfer("store", "b", "y", 0, 1024), "", "not all of which have been written"),
    "accumulators never written": (
        drain("d", 1024, 0),
        "",
        "reads bytes .* of the accumulators, not all of which have been written",
    ),
    "a write to a weight": (LOAD + transfer("store", "b", "w", 0, 0, "a"), "", "which is a weight buffer"),
    "a read that nothing orders after its write": (
        LOAD + transfer("store", "b", "y", 0, 0),
        "",
        "(?s)race on bytes .* of SRAM",
    ),
    "SRAM given out twice": (
        LOAD + STORE + transfer("load", "c", "w", 0, 0),
        "",
        "(?s)race on bytes .* of SRAM",
    ),
    "an output read back too early": (
        LOAD + STORE + transfer("load", "c", "y", 0, 1024),
        "",
        "(?s)race on bytes .* of DRAM buffer @y",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_plan(name: str) -> None:
    body, buffers, message = BAD[name]
    with pytest.raises(TyirError, match=message):
        check(body, buffers or X + W + Y)


SHARED = {
    "a cache at another address": (
        buffer("k", 8192, "kv"),
        "@k is kept between steps, but lies at 4096 in one program and at 8192",
    ),
    "an activation over the other's cache": (
        buffer("y", 4000, "activation"),
        "@y of one program lies over @k, which another program",
    ),
    "a cache over the other's weight": (
        buffer("k2", 64, "kv"),
        "@k2 of one program lies over @w(.|\n)*@w of one program lies over @k2",
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_lengths_that_do_not_share(name: str) -> None:
    """Two programs of a die; each has a good plan by itself."""
    line, message = SHARED[name]
    programs = [
        EdgeProgram(step_of(buffers, ""))
        for buffers in (buffer("w", 0, "weight") + buffer("k", 4096, "kv"), line)
    ]
    with pytest.raises(TyirError, match=message):
        check_lengths({1: programs[:1], 8: programs[1:]}, MACHINE, 16)


@pytest.mark.parametrize("tokens", [2, 1200])
def test_compiled_lengths_share(make_model: Callable[..., Any], tokens: int) -> None:
    """Longer steps have larger inputs, and weights and caches all the same where the others look for them."""
    models = {n: make_model(tokens=n, dies=2, capacity=1300) for n in (1, tokens)}
    assert check_lengths({n: m.programs for n, m in models.items()}, MACHINE, 1300) > 0


@pytest.mark.parametrize("sizes", [{"tokens": 8, "group": 16, "dies": 2}, {"tokens": 1, "capacity": 300}])
def test_compiled_programs_pass(make_model: Callable[..., Any], sizes: dict[str, int]) -> None:
    model = make_model(**sizes)
    check_programs(model.programs, model.machine, [0, 13, 32])


def test_summary(make_model: Callable[..., Any]) -> None:
    model = make_model(tokens=8, group=16)
    summary = memory_summary(model.lowered[0])
    buffers = model.programs[0].buffers.values()
    assert summary["kv"] == 2 * 2 * 2 * 40 * 16 * 2  # layers, k and v, heads, positions, dim, f16
    assert summary["weights"] == sum(b.nbytes for b in buffers if b.kind == "weight")
    assert summary["dram"] == max(b.address + b.nbytes for b in buffers)
    assert 0 < summary["sram"] <= model.machine.sram.capacity_bytes
    die = model.functional()[0]
    run_step([die], {"ids": np.zeros((1, 8), np.int32)}, 0)
    assert summary["sram"] >= int(die.memory.sram.written.nonzero()[0].max()) + 1
