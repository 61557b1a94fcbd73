"""The timing engine: small programs timed by hand, conservation, determinism, monotonicity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tyir.diagnostics import TyirError
from tyir.printer import print_op
from tyir.runtime_sim.timing.bandwidth import SharedBandwidth
from tyir.runtime_sim.timing.engine import Timing, simulate
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.targets.machine import load_machine

MACHINE = load_machine("edge10").with_overrides(
    {"dram.bandwidth_gbps": 20, "dram.efficiency": 1, "dram.run_overhead_bytes": 0, "sync.launch_us": 0}
)

HEAD = """"builtin.module"() ({
  "edge10.buffer"() <{address = 0 : i64, kind = "input", nbytes = 65536 : i64, sym_name = "x", type = tensor<65536xui8>}> : () -> ()
  "func.func"() <{function_type = () -> (), sym_name = "main_s1"}> ({
    %x = "edge10.address_of"() <{symbol = @x}> : () -> !edge10.address
"""  # noqa: E501
TAIL = """    "func.return"() : () -> ()
  }) {tyir.entry = 1 : i64} : () -> ()
}) : () -> ()
"""


def load(name: str, offset: int, nbytes: int, queue: str = "eidma", deps: str = "") -> str:
    tokens = "".join(f", {d}" for d in deps.split())
    types = "!edge10.address" + ", !edge10.token" * len(deps.split())
    return (
        f'    {name} = "edge10.load"(%x{tokens}) <{{dram_strides = array<i64: 0, 0>, offset = {offset} : i64,'
        f' queue = "{queue}", shape = array<i64: 1, 1, {nbytes}>, sram = {offset} : i64, sram_strides ='
        f" array<i64: 0, 0>}}> : ({types}) -> !edge10.token\n"
    )


def timed(*lines: str) -> Timing:
    return simulate([EdgeProgram.parse(HEAD + "".join(lines) + TAIL)], MACHINE, 0)


def test_one_load() -> None:
    # dispatch and issue 80 ns, latency 150 ns, 20,000 bytes at 20 bytes per ns
    assert timed(load("%a", 0, 20000)).total_ns == pytest.approx(80 + 150 + 1000)


def test_a_second_load_of_the_queue_hides_its_latency() -> None:
    assert timed(load("%a", 0, 20000), load("%b", 20000, 20000)).total_ns == pytest.approx(230 + 2000)


def test_a_dependent_load_does_not() -> None:
    assert timed(load("%a", 0, 20000), load("%b", 20000, 20000, deps="%a")).total_ns == pytest.approx(
        2 * 1230
    )


def test_two_queues_share_dram_fairly() -> None:
    timing = timed(load("%a", 0, 20000), load("%b", 20000, 10000, queue="ewdma"))
    ends = [r.end for r in timing.records[0]]
    assert ends == pytest.approx([230 + 1500, 230 + 1000])  # 10 bytes per ns each until the shorter is done


def test_shared_bandwidth_is_divided_equally_and_capped_by_the_port() -> None:
    """20 bytes per ns, at most 15 for one.  From 0: 1500 bytes alone at 15; from 20: two at 10 each, 1200 and
    900 left.

    The second ends at 20 + 90 = 110, when the first has 300 left: 300 / 15 more, 130.
    """
    dram = SharedBandwidth(rate=20, port=15, most=2)
    dram.begin(0, 1, 1500)
    assert dram.next_end == pytest.approx(100)
    dram.begin(20, 2, 900)
    assert dram.next_end == pytest.approx(110) and dram.end() == 2
    assert dram.next_end == pytest.approx(130) and dram.end() == 1
    assert dram.busy_ns == pytest.approx(130) and dram.next_end == float("inf")


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("group", [0, 16])
def test_conservation(make_model: Callable[..., Any], tokens: int, group: int) -> None:
    """Weights are read once; the timing engine moves the bytes the functional engine moves; the products are
    the model's.
    """
    model = make_model(tokens=tokens, group=group, layers=2)
    spec, pos = model.spec, 13
    engine = model.functional()[0]
    model.fill_caches([engine], pos)
    import numpy as np

    model.step([engine], np.zeros((1, tokens), np.int32), pos)
    streamed = sum(
        b.nbytes
        for b in model.programs[0].buffers.values()
        if b.kind == "weight" and b.sym_name not in ("embed", "rope.cos", "rope.sin")
    )
    rows = tokens * (spec.hidden + 2 * (spec.dim // 2)) * 2 + tokens * 4  # embedding, rotary tables, ids
    cache_read = spec.layers * 2 * spec.kv_heads * (pos + tokens) * spec.dim * 2
    assert engine.loaded_bytes == streamed + rows + cache_read
    stored = spec.layers * 2 * spec.kv_heads * tokens * spec.dim * 2 + tokens * spec.vocab * 4
    timing = simulate(model.programs, model.machine, pos)
    assert timing.dram_bytes[0] == engine.loaded_bytes + stored
    q, kv = spec.heads * spec.dim, spec.kv_heads * spec.dim
    linear = spec.layers * spec.hidden * (2 * q + 2 * kv + 3 * spec.inter) + spec.hidden * spec.vocab
    assert engine.macs == tokens * linear + spec.layers * 2 * tokens * q * (pos + tokens)


def test_deterministic_and_units_are_never_busy_twice(make_model: Callable[..., Any]) -> None:
    model = make_model(dies=2, tokens=8, group=16)
    first, second = (simulate(model.programs, model.machine, 13) for _ in range(2))
    assert [(r.start, r.end) for d in first.records for r in d] == [
        (r.start, r.end) for d in second.records for r in d
    ]
    for records in first.records:
        last: dict[str, float] = {}
        for record in records:
            assert all(records[d].end <= record.start for d in record.command.deps)
            assert record.data >= last.get(
                record.command.unit, 0.0
            )  # a transfer's data, or the whole command, waits for the one before
            last[record.command.unit] = record.end
    assert all(0 <= t <= first.total_ns for die in first.dies for t in die.busy.values())


@pytest.mark.parametrize(
    ("name", "slower", "faster"),
    [
        ("dram.bandwidth_gbps", 10, 60), ("dram.efficiency", 0.4, 0.9), ("clock.frequency_mhz", 250, 1000), ("d2d.hop_us", 4, 0.1), ("vector.lanes", 4, 128),  # noqa: E501
        ("sync.command_ns", 500, 0), ("dequant.weights_per_cycle", 4, 256), ("dram.latency_ns", 500, 0), ("sync.launch_us", 50, 0),  # noqa: E501
    ],
)  # fmt: skip
def test_a_better_machine_is_never_slower(
    make_model: Callable[..., Any], name: str, slower: float, faster: float
) -> None:
    model = make_model(dies=2, tokens=8, group=16)
    base = simulate(model.programs, model.machine, 13).total_ns
    assert simulate(model.programs, model.machine.with_overrides({name: faster}), 13).total_ns <= base
    assert simulate(model.programs, model.machine.with_overrides({name: slower}), 13).total_ns > base


def test_time_grows_with_the_position(make_model: Callable[..., Any]) -> None:
    model = make_model(capacity=600, layers=1, dim=64)
    times = [simulate(model.programs, model.machine, p).total_ns for p in (0, 100, 300, 599)]
    assert times == sorted(times) and times[0] < times[-1]


def test_equal_dies_are_simulated_once_and_exactly(make_model: Callable[..., Any]) -> None:
    model = make_model(dies=2, group=16)
    program = model.programs[0]
    renamed = EdgeProgram.parse(
        print_op(program.module).replace("layer_s1", "block_s1")
    )  # the same program, another signature
    together, apart = (
        simulate([program, program], model.machine, 13),
        simulate([program, renamed], model.machine, 13),
    )
    assert together.dies[0] is together.dies[1] and apart.dies[0] is not apart.dies[1]
    assert together.total_ns == apart.total_ns
    assert together.dies[0].end.tolist() == apart.dies[0].end.tolist() == apart.dies[1].end.tolist()


def test_dies_wait_for_each_other(make_model: Callable[..., Any]) -> None:
    model = make_model(dies=2)
    timing = simulate(model.programs, model.machine, 0)
    ends = [[r.end for r in records if r.command.unit == "d2d"] for records in timing.records]
    assert ends[0] == ends[1]
    with pytest.raises(TyirError, match=r"can never run|do not meet"):
        simulate([model.programs[0], make_model(dies=1).programs[0]], model.machine, 0)


def test_functions_that_call_each_other_without_end() -> None:
    call = '    "func.call"() <{{callee = @{0}}}> : () -> ()\n'
    again = '  "func.func"() <{function_type = () -> (), sym_name = "again"}> ({\n'
    text = HEAD + call.format("again") + TAIL.replace("i64} : () -> ()\n", "i64} : () -> ()\n" + again, 1)
    text = text.replace(
        again, again + call.format("main_s1") + '    "func.return"() : () -> ()\n  }) : () -> ()\n'
    )
    with pytest.raises(TyirError, match="without end: @main_s1 -> @again -> @main_s1"):
        simulate([EdgeProgram.parse(text)], MACHINE, 0)
