"""Each unit's time in a program of a few commands, with the cycles worked out on paper.

The machine is the shipped `edge10.toml` with round numbers for what DRAM does: 20 bytes per ns, no bytes lost
for a run, launch 0.  A cycle is 2 ns; dispatching a command takes 40 ns, issuing a transfer 40 more, DRAM's
latency is 150 ns, a queue has 4 transfers in flight, a port of the on-chip memory takes 64 bytes per ns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tyir.attributes import ArrayAttr, IntegerAttr, StringAttr, SymbolRefAttr
from tyir.dialects import edge10
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func, Return
from tyir.edge10.vector_functions import VECTOR_FUNCTIONS
from tyir.execution.entry_points import mark_entry
from tyir.ir import Op, Value
from tyir.runtime_sim.timing.engine import Timing, simulate
from tyir.runtime_sim.timing.predictor import Predictor
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.targets.machine import Machine, load_machine
from tyir.types import TensorType, f16, i64, ui8

SHIPPED = load_machine("edge10")
MACHINE = SHIPPED.with_overrides(
    {"dram.bandwidth_gbps": 20, "dram.efficiency": 1, "dram.run_overhead_bytes": 0, "sync.launch_us": 0}
)


class Die:
    """A program written command by command; each method appends one and returns its token."""

    def __init__(self, number: int = 0, dies: int = 1) -> None:
        self.number, self.dies = number, dies
        self.module = Module.empty(f"die{number}")
        self.module.set_attribute("tyir.die", IntegerAttr(number, i64))
        self.module.set_attribute("tyir.machine", StringAttr("edge10"))
        self.module.body.append(
            edge10.Buffer(
                sym_name="x", address=0, nbytes=1 << 24, kind="input", type=TensorType((1 << 24,), ui8)
            )
        )
        self.main = Func.make("main_s1", [], [])
        mark_entry(self.main, 1)
        self.module.body.append(self.main)
        self.x = self.add(edge10.AddressOf(symbol=SymbolRefAttr("x")))

    def add(self, op: Op) -> Value:
        return self.main.body.append(op).result

    def load(self, nbytes: int, *deps: Value, queue: str = "eidma", rows: int = 1) -> Value:
        """`rows` rows of `nbytes`, far apart in DRAM when there are several."""
        shape, apart = (1, rows, nbytes), 2 * nbytes
        return self.add(
            edge10.Load(
                (self.x, *deps),
                sram=0,
                shape=shape,
                dram_strides=(0, apart),
                sram_strides=(0, nbytes),
                queue=queue,
            )
        )

    def store(self, nbytes: int, *deps: Value) -> Value:
        shape = (1, 1, nbytes)
        return self.add(
            edge10.Store(
                (self.x, *deps), sram=0, shape=shape, dram_strides=(0, nbytes), sram_strides=(0, nbytes)
            )
        )

    def matmul(self, m: int, n: int, k: int, *deps: Value) -> Value:
        return self.add(
            edge10.Matmul(
                deps,
                lhs=0,
                lhs_strides=(k * 2, 0),
                rhs=0,
                rhs_stride=k * 2,
                acc=0,
                acc_stride=n * 4,
                m=(m, 1),
                n=n,
                k=k,
            )
        )

    def drain(self, m: int, n: int, *deps: Value) -> Value:
        return self.add(
            edge10.Drain(
                deps, acc=0, acc_stride=n * 4, m=(m, 1), n=n, sram=0, sram_strides=(n * 2, 0), element=f16
            )
        )

    def dequant(self, n: int, k: int, *deps: Value) -> Value:
        return self.add(
            edge10.Dequant(
                deps,
                q=0,
                q_stride=k // 2,
                scales=0,
                scale_stride=2,
                zeros=0,
                zero_stride=1,
                group_size=k,
                out=0,
                n=n,
                k=k,
            )
        )

    def vector(self, function: str, rows: int, cols: int, *deps: Value) -> Value:
        row = VECTOR_FUNCTIONS[function]
        inputs, outputs = len(row.inputs), len(row.outputs)
        return self.add(
            edge10.VectorOp(
                deps,
                function=function,
                inputs=(0,) * inputs,
                outputs=(0,) * outputs,
                input_types=ArrayAttr([f16] * inputs),
                output_types=ArrayAttr([f16] * outputs),
                rows=rows,
                cols=cols,
            )
        )

    def all_reduce(self, nbytes: int, *deps: Value) -> Value:
        return self.add(edge10.AllReduce(deps, source=0, destination=0, nbytes=nbytes, element=f16))

    def all_gather(self, nbytes: int, *deps: Value, memory: str = "sram") -> Value:
        args = (self.x, *deps) if memory == "dram" else deps
        sizes = (nbytes,) * self.dies
        return self.add(
            edge10.AllGather(
                args, source=0, destination=0, destination_memory=memory, rows=1, sizes=sizes, die=self.number
            )
        )

    def program(self) -> EdgeProgram:
        self.main.body.append(Return(values=[]))
        return EdgeProgram(self.module)


def timed(write: Callable[[Die], Any], dies: int = 1, machine: Machine = MACHINE) -> Timing:
    """The time of a program that `write` writes for each die."""
    programs = []
    for number in range(dies):
        die = Die(number, dies)
        write(die)
        programs.append(die.program())
    return simulate(programs, machine, 0)


def ends(timing: Timing, die: int = 0) -> list[float]:
    return [float(t) for t in timing.dies[die].end]


# ---------------------------------------------------------------------------------------- DRAM and its queues


@pytest.mark.parametrize(
    ("nbytes", "rows", "expected"),
    [(1792, 48, 89_088 / 20), (86_016, 1, 86_080 / 20), (64, 1344, 172_032 / 20)],
)
def test_dram_is_less_efficient_for_small_runs(nbytes: int, rows: int, expected: float) -> None:
    """86,016 bytes, 64 lost for each run: 48 runs cost 86,016 + 3,072 = 89,088 bytes of time (96.6 %
    efficient), one costs 86,080, 1344 runs of 64 bytes twice.
    """
    machine = MACHINE.with_overrides({"dram.run_overhead_bytes": 64})
    assert timed(lambda die: die.load(nbytes, rows=rows), machine=machine).total_ns == pytest.approx(
        230 + expected
    )


def test_dram_efficiency_scales_the_bandwidth() -> None:
    """34.1 GB/s at 0.65: 22.165 bytes per ns; a million bytes take 45,116.2 ns after dispatch 40, issue 40
    and latency 150.
    """
    machine = MACHINE.with_overrides({"dram.bandwidth_gbps": 34.1, "dram.efficiency": 0.65})
    assert timed(lambda die: die.load(1_000_000), machine=machine).total_ns == pytest.approx(
        230 + 1_000_000 / 22.165
    )


def test_outstanding_transfers_hide_the_latency() -> None:
    """Six transfers of 200 bytes (10 ns each), latency 1000, issue every 80 ns.

    Four in flight: issued at 0, 80, 160, 240, the fifth when the first is done at 80 + 1000 + 10 = 1090, the
    sixth at 1170 (the second is done then): 1170 + 80 + 1000 + 10 = 2260.  One in flight: 6 * 1090 = 6540.
    Six in flight: 400 + 80 + 1000 + 10 = 1490.
    """

    def six(die: Die) -> None:
        for _ in range(6):
            die.load(200)

    for outstanding, expected in ((1, 6540), (4, 2260), (6, 1490)):
        machine = MACHINE.with_overrides({"dram.latency_ns": 1000, "dma.outstanding": outstanding})
        assert timed(six, machine=machine).total_ns == pytest.approx(expected)


def test_runs_take_time_to_issue() -> None:
    """Eight runs at 5 ns each: 40 more before the first of two transfers has been issued, and before the
    second: 2 * (80 + 40) + 150 + 8 * 200 / 20 = 470.
    """
    machine = MACHINE.with_overrides({"dma.run_ns": 5})
    assert timed(
        lambda die: [die.load(200, rows=8) for _ in range(2)], machine=machine
    ).total_ns == pytest.approx(470)


def test_a_command_is_fetched_while_its_unit_waits() -> None:
    """Fetching takes 30 ns.

    Two drains of 128 bytes (2 ns) after each other: 2 * (30 + 40 + 2) = 144.  The second waiting for a load
    that ends at 30 + 230 + 1 = 261: 261 + 42.
    """
    machine = MACHINE.with_overrides({"sync.fetch_ns": 30})
    assert timed(lambda die: (die.drain(1, 32), die.drain(1, 32)), machine=machine).total_ns == pytest.approx(
        144
    )

    def waiting(die: Die) -> None:
        loaded = die.load(20)
        die.drain(1, 32)
        die.drain(1, 32, loaded)

    assert timed(waiting, machine=machine).total_ns == pytest.approx(303)


def test_units_of_one_control_slow_each_other() -> None:
    """Ten drains of 128 bytes take 10 * (40 + 2) = 420.  A queue of the same control (units 2 and 6 of 4
    controls) adds a tenth to each: 462; a queue of another control nothing.
    """
    machine = MACHINE.with_overrides({"sync.controls": 4, "sync.waiting_overhead": 0.1})

    def beside(queue: str) -> Callable[[Die], object]:
        return lambda die: (die.load(20, queue=queue), *(die.drain(1, 32) for _ in range(10)))

    assert timed(beside("eidma"), machine=machine).total_ns == pytest.approx(420)
    assert timed(beside("ebdma"), machine=machine).total_ns == pytest.approx(462)
    assert timed(beside("ebdma")).total_ns == pytest.approx(420)


def test_a_queue_issues_one_transfer_at_a_time() -> None:
    """Four transfers of 20 bytes (1 ns): issued every 80 ns, the last at 240: 240 + 80 + 150 + 1 = 471.  On
    four queues all are issued at once.

    Then they share the 20 bytes per ns: 80 bytes take 4 ns: 230 + 4 = 234.
    """
    assert timed(lambda die: [die.load(20) for _ in range(4)]).total_ns == pytest.approx(471)

    def apart(die: Die) -> None:
        for queue in ("ewdma", "eidma", "ebdma"):
            die.load(20, queue=queue)
        die.store(20)

    assert timed(apart).total_ns == pytest.approx(234)


def test_a_port_caps_one_queue_and_not_two() -> None:
    """DRAM of 100 bytes per ns, ports of 64: 6400 bytes take 100 ns alone; two queues get 50 each: 128 ns for
    both.
    """
    machine = MACHINE.with_overrides({"dram.bandwidth_gbps": 100})
    assert timed(lambda die: die.load(6400), machine=machine).total_ns == pytest.approx(230 + 100)
    assert timed(
        lambda die: (die.load(6400), die.load(6400, queue="ewdma")), machine=machine
    ).total_ns == pytest.approx(230 + 128)


def test_collectives_and_dma_share_the_dram() -> None:
    """Two dies gather 40,000 bytes each into DRAM (80,000 a die) from 0 on, beside a load of 20,000 that
    moves data from 230 on.

    Alone the gather has 20 bytes per ns: 4,600 by 230.  Then 10 each: the load ends at 230 + 2,000 = 2,230,
    the gather has 80,000 - 4,600 - 20,000 = 55,400 left and 20 per ns: 2,770 more, 5,000.  The links would be
    done at 40 + 2,000 + 1,000 + 40,000 / 32 = 4,290.
    """

    def both(die: Die) -> None:
        die.all_gather(40_000, memory="dram")
        die.load(20_000)

    timing = timed(both, dies=2)
    assert ends(timing) == pytest.approx([5000, 2230])
    assert timing.dram_bytes == (100_000, 100_000)


# ---------------------------------------------------------------------------------------------------- compute


@pytest.mark.parametrize(
    ("m", "n", "k", "cycles"),
    [
        (
            1,
            48,
            3584,
            32 + 448,
        ),  # 3 blocks of 16 columns on 3 cubes, 448 steps of 8; one row costs what sixteen do
        (16, 48, 3584, 32 + 448),
        (17, 48, 3584, 32 + 2 * 448),  # a second block of rows for one row
        (96, 240, 640, 32 + 30 * 80),  # 6 * 15 = 90 blocks, 30 a cube
        (16, 64, 8, 32 + 2),  # 4 blocks on 3 cubes: one cube has two
        (16, 48, 9, 32 + 2),  # a second step of the depth for one element
    ],
)
def test_cubes(m: int, n: int, k: int, cycles: int) -> None:
    """Dispatch 40 ns, fill 32 cycles, then the blocks of the busiest cube, each as many cycles as there are
    steps of 8 in k.
    """
    assert timed(lambda die: die.matmul(m, n, k)).total_ns == pytest.approx(40 + 2 * cycles)


def test_utilisation_with_one_row_is_a_sixteenth() -> None:
    """m 1, n 4800, k 8192: 300 blocks, 100 a cube, 1024 steps: 102,432 cycles for 39,321,600 products: 383.9
    of the 6,144 a cycle.
    """
    timing = timed(lambda die: die.matmul(1, 4800, 8192))
    cycles = (timing.total_ns - 40) / 2
    assert cycles == pytest.approx(102_432)
    assert 4800 * 8192 / cycles / MACHINE.macs_per_cycle_fp16 == pytest.approx(1 / 16, rel=1e-3)


def test_dequantisation_pipe() -> None:
    """48 * 3584 weights at 128 a cycle after 32: 32 + 1344 = 1376 cycles; the second tile follows with its
    own dispatch and startup.
    """
    assert timed(lambda die: die.dequant(48, 3584)).total_ns == pytest.approx(40 + 2 * 1376)
    assert timed(lambda die: (die.dequant(48, 3584), die.dequant(1, 130))).total_ns == pytest.approx(
        40 + 2 * 1376 + 40 + 2 * (32 + 2)
    )


def test_drain_over_the_crossbar() -> None:
    """f32 sums at 128 bytes a cycle: 1 * 48 * 4 = 192 bytes, 2 cycles; 96 * 240 * 4 = 92,160, 720 cycles."""
    assert timed(lambda die: die.drain(1, 48)).total_ns == pytest.approx(40 + 4)
    assert timed(lambda die: die.drain(96, 240)).total_ns == pytest.approx(40 + 1440)


@pytest.mark.parametrize(
    ("function", "per_element"),
    [
        ("add", 1), ("mul", 1), ("scale", 1), ("cast", 1), ("copy", 1), ("fill", 1), ("silu", 4), ("silu_mul", 5), ("rms_norm", 4), ("rope", 4), ("rescale_add", 2),  # noqa: E501
        ("divide_rows", 2), ("quantize_rows", 4), ("quantize_groups", 4),
        ("layer_norm", 6), ("layer_norm_bias", 6), ("relu", 1),
        ("softcap", 4), ("gelu", 6), ("gelu_tanh", 6), ("gelu_quick", 6), ("gelu_mul", 7),
        ("gelu_mul_tanh", 7), ("gelu_mul_quick", 7), ("merge_attention", 2), ("share", 4),
    ],
)  # fmt: skip
def test_vector_units_by_function(function: str, per_element: int) -> None:
    """3584 elements over 4 units of 64 lanes are 14 passes: 32 + 14 * cycles; one element more is a pass
    more.
    """
    assert timed(lambda die: die.vector(function, 1, 3584)).total_ns == pytest.approx(
        40 + 2 * (32 + 14 * per_element)
    )
    assert timed(lambda die: die.vector(function, 1, 3585)).total_ns == pytest.approx(
        40 + 2 * (32 + 15 * per_element)
    )


def test_every_vector_function_is_worked_by_hand() -> None:
    marks = [m for m in test_vector_units_by_function.pytestmark if m.name == "parametrize"]
    assert {name for name, _ in marks[0].args[1]} == set(VECTOR_FUNCTIONS)


# ----------------------------------------------------------------------------------------------- between dies


def test_all_reduce_within_a_package() -> None:
    """4 dies, 7168 bytes: dispatch 40, software 2000, one-shot: hop 1000, 3 * 7168 / 32 = 672, adding 3 *
    3584 elements in 42 cycles = 84: 3796 ns.

    A MiB goes in two phases: 2 * (1000 + 3/4 MiB / 32 = 24,576) and adding 393,216 elements in 1536 cycles =
    3072: 40 + 2000 + 51,152 + 3072 = 56,264.
    """
    assert timed(lambda die: die.all_reduce(7168), dies=4).total_ns == pytest.approx(3796)
    assert timed(lambda die: die.all_reduce(1 << 20), dies=4).total_ns == pytest.approx(56_264)


def test_all_reduce_over_packages() -> None:
    """16 dies, 8192 bytes: inside 2 * (1000 + 6144 / 32 = 192) and 3072 additions in 12 cycles = 24; between
    4 packages, 2048 bytes: 2 * (3000 + 1536 / 16 = 96) and 768 in 3 cycles = 6.

    40 + 2000 + 2384 + 24 + 6192 + 6 = 10,646 ns.
    """
    assert timed(lambda die: die.all_reduce(8192), dies=16).total_ns == pytest.approx(10_646)


def test_all_gather() -> None:
    """4 pieces of 1000 bytes: dispatch 40, software 2000, hop 1000, each die sends its piece three times:
    3000 / 32 = 93.75.
    """
    assert timed(lambda die: die.all_gather(1000), dies=4).total_ns == pytest.approx(3133.75)


def test_a_collective_begins_with_the_last_die() -> None:
    """Die 1 first does a product of 40 + 2 * 480 = 1000 ns; the sum of 2 dies and 7168 bytes: 40 + 2000 +
    1000 + 224 + 28 = 3292.
    """

    def uneven(die: Die) -> None:
        done = die.matmul(1, 48, 3584) if die.number else die.add(edge10.Join(tokens=()))
        die.all_reduce(7168, done)

    timing = timed(uneven, dies=2)
    assert ends(timing)[-1] == ends(timing, 1)[-1] == pytest.approx(1000 + 3292)


# ---------------------------------------------------------------------------------------- order, launch, host


def test_a_unit_takes_its_commands_in_order() -> None:
    """The second product waits for nothing but stands behind the first, which waits for a load of 230 + 1000
    ns: 1230 + 1000 + 1000.
    """

    def queue(die: Die) -> None:
        die.matmul(1, 48, 3584, die.load(20_000))
        die.matmul(1, 48, 3584)

    assert ends(timed(queue)) == pytest.approx([1230, 2230, 3230])


def test_units_work_at_the_same_time() -> None:
    """Weights come (1230), are de-quantised (2792), multiplied (1000), drained (44): a chain of 5066; a
    second tile is de-quantised behind the first: 2792 more.
    """

    def tile(die: Die) -> Value:
        return die.drain(1, 48, die.matmul(1, 48, 3584, die.dequant(48, 3584, die.load(20_000))))

    assert timed(tile).total_ns == pytest.approx(1230 + 2792 + 1000 + 44)
    assert timed(lambda die: (tile(die), tile(die))).total_ns == pytest.approx(1230 + 2 * 2792 + 1000 + 44)


def test_each_command_pays_for_its_dispatch_and_the_step_for_its_launch() -> None:
    """Ten additions of 256 elements, one after the other: 10 * (40 + 2 * 33) = 1060; launch 10 us more; a
    token needs 300 us of the host besides.
    """

    def chain(die: Die) -> None:
        token: Sequence[Value] = ()
        for _ in range(10):
            token = (die.vector("add", 1, 256, *token),)

    assert timed(chain).total_ns == pytest.approx(1060)
    die = Die()
    chain(die)
    program = die.program()
    assert simulate([program], SHIPPED, 0).total_ns == pytest.approx(10_000 + 1060)
    assert Predictor(lambda s: [program], (1,), 64, SHIPPED).tpot_ns(0) == pytest.approx(
        300_000 + 10_000 + 1060
    )
