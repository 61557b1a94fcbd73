"""The command program computes what the interpreter computes, and breaks loudly when it is wrong."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tyir.backends.edge10.lowering.ops.attention_block import in_turn
from tyir.dialects import edge10
from tyir.runtime_sim.execution.command_trace import CommandTrace
from tyir.targets.machine import load_machine


@pytest.mark.parametrize("dies", [1, 2])
@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize(("tokens", "pos"), [(1, 0), (1, 13), (8, 0), (8, 13)])
def test_program_equals_interpreter(
    make_model: Callable[..., Any], dies: int, group: int, tokens: int, pos: int
) -> None:
    compare(make_model(dies=dies, group=group, tokens=tokens), pos, steps=2)


def compare(model: Any, pos: int, steps: int = 1) -> None:
    """Both engines from the same caches: logits agree to f16 rounding (probabilities are f16 on the chip, f32
    in the reference).
    """
    tokens = model.spec.tokens
    engines = model.functional()
    model.fill_caches(engines, pos)
    ids = np.arange(tokens, dtype=np.int32)[None] * 7 % 80
    for step in range(steps):
        expected = model.interpret(ids, pos + step * tokens)
        got = model.step(engines, ids, pos + step * tokens)
        np.testing.assert_allclose(got, expected, atol=4e-3 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 64, "group": 16, "hidden": 128},
        {"tokens": 64, "inter": 256, "dies": 2},
        {"tokens": 8, "group": 16, "window": 5},
    ],
)
def test_what_does_not_fit_sram_goes_through_dram(
    make_model: Callable[..., Any], sizes: dict[str, int]
) -> None:
    small = load_machine("edge10").with_overrides({"sram.capacity_bytes": 48 << 10})
    model = make_model(machine=small, **sizes)
    assert sizes["tokens"] == 8 or any(b.kind == "activation" for b in model.programs[0].buffers.values())
    compare(model, 3)


@pytest.mark.parametrize("window", [1, 5, 64])
@pytest.mark.parametrize("tokens", [1, 8])
def test_sliding_window(make_model: Callable[..., Any], window: int, tokens: int) -> None:
    compare(make_model(window=window, tokens=tokens), 21)


def test_blocks_of_a_long_cache(make_model: Callable[..., Any]) -> None:
    model = make_model(capacity=700, layers=1, kv_heads=2, heads=6, vocab=96)
    for pos in (255, 256, 257, 699):
        compare(model, pos)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tokens", "sram"),
    [(1, 1, 1, 96), (2, 1, 40, 128), (5, 1, 40, 192), (7, 1, 24, 160), (4, 2, 24, 160)],
)
def test_turns_of_two_blocks_each(
    make_model: Callable[..., Any], heads: int, kv_heads: int, tokens: int, sram: int
) -> None:
    """Small SRAM makes small blocks: a loop of several turns, the last with one block, two, or a part of one,
    of one strip and of more; what is under way from turn to turn is checked for races.
    """
    small = load_machine("edge10").with_overrides({"sram.capacity_bytes": sram << 10})
    sizes = {"heads": heads, "kv_heads": kv_heads, "tokens": tokens, "hidden": 32, "inter": 32, "vocab": 96}
    model = make_model(machine=small, capacity=700, layers=1, **sizes)
    loops = [loop for program in model.programs for loop in program.module.walk_type(edge10.For)]
    assert loops and all(len(loop.operands) > 6 for loop in loops)
    for pos in (0, 130, 389, 650):
        compare(model, pos)


@pytest.mark.parametrize("steps", range(1, 25))
@pytest.mark.parametrize("buffers", [1, 2, 3, 4])
def test_a_place_for_scores_is_free_when_it_is_taken_again(steps: int, buffers: int) -> None:
    """Three steps are under way: with four places the same one comes back after three steps at the earliest,
    with three after two (the old scores are used up first then), from turn to turn as well.
    """
    if buffers > steps:
        return
    places = in_turn(steps, buffers)
    assert len(places) == steps and set(places) <= set(range(buffers))
    again = min(
        next(d for d in range(1, steps + 1) if places[(i + d) % steps] == places[i]) for i in range(steps)
    )
    enough = 3 if buffers == 4 and steps not in (5,) else min(buffers - 1, 2) or 1
    assert again >= enough


def test_padding_beyond_the_cache_is_dropped(make_model: Callable[..., Any]) -> None:
    """The last chunk of a full cache: rows past its end are padding; what the others compute is not
    touched.
    """
    model = make_model(tokens=8, capacity=40)
    engines = model.functional()
    model.fill_caches(engines, 35)
    ids = np.arange(8, dtype=np.int32)[None]
    expected, got = model.interpret(ids, 35), model.step(engines, ids, 35)
    np.testing.assert_allclose(got[:, :5], expected[:, :5], atol=4e-3 * np.abs(expected).max(), rtol=0)


def test_caches_persist_and_lengths_share_them(make_model: Callable[..., Any]) -> None:
    """A prompt of 8 tokens by the program for 8, then a token by the program for 1, against one run of 9
    single tokens.
    """
    prefill, decode = make_model(tokens=8), make_model(tokens=1)
    ids = np.arange(9, dtype=np.int32)[None] * 5
    first, second = prefill.functional(), decode.functional()
    second[0].share_memory(first[0])
    prefill.step(first, ids[:, :8], 0)
    chunked = decode.step(second, ids[:, 8:], 8)
    alone = decode.functional()
    for pos in range(9):
        single = decode.step(alone, ids[:, pos : pos + 1], pos)
    np.testing.assert_allclose(chunked, single, atol=4e-3 * np.abs(single).max(), rtol=0)


@pytest.mark.parametrize(
    "sizes", [{"tokens": 150, "group": 16, "dies": 2}, {"tokens": 208, "inter": 512, "hidden": 128}]
)
@pytest.mark.parametrize("capacity", [3 << 20, 192 << 10], ids=["large SRAM", "small SRAM"])
def test_very_many_tokens_go_through_a_layer_in_blocks_of_rows(
    make_model: Callable[..., Any], sizes: dict[str, int], capacity: int
) -> None:
    machine = load_machine("edge10").with_overrides({"sram.capacity_bytes": capacity})
    model = make_model(machine=machine, capacity=240, **sizes)
    assert {op.first_query for op in model.lowered[0].walk_type(edge10.SoftmaxBlock)} >= {0, 80}
    compare(model, 17)


def test_every_command_can_be_observed(make_model: Callable[..., Any]) -> None:
    """One line each, in order; what a command has written is what the next one reads."""
    model = make_model(group=16, layers=1)
    dies = model.functional()
    file = io.StringIO()
    dies[0].observer = CommandTrace(file)
    model.step(dies, np.zeros((1, 1), np.int32), 0)
    lines = file.getvalue().splitlines()
    commands = model.programs[0].expand(0)
    assert [line.partition(":")[0] for line in lines] == [
        f"die 0 {command.describe()}" for command in commands
    ]
    norm = next(i for i, line in enumerate(lines) if "input_layernorm" in line and "vector" in line)
    assert (
        lines[norm].count("reads SRAM") == 2
        and "writes SRAM" in lines[norm]
        and "64 float16, " in lines[norm]
    )
    stored = next(line for line in lines if "edge10.store" in line and "@k0" in line)
    assert "reads SRAM at" in stored and "writes @k0 at 0 (" in stored
