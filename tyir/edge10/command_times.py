"""How long one command takes on its unit, alone: formulas over the machine's constants, each with its source
and an example worked by hand.

Times are nanoseconds, sizes bytes.  GB/s is bytes per nanosecond.  What commands do to each other (queues,
shared DRAM) is `engine`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from tyir.edge10.vector_functions import VECTOR_FUNCTIONS
from tyir.targets.collectives import all_gather_ns, all_reduce_ns
from tyir.targets.machine import Machine

__all__ = [
    "NO_TRANSFER",
    "Transfer",
    "Work",
    "all_gather_ns",
    "all_reduce_ns",
    "dequant_ns",
    "drain_ns",
    "matmul_ns",
    "softmax_ns",
    "top_k_ns",
    "transfer_of",
    "vector_ns",
]


class Transfer(NamedTuple):
    """What a DMA command asks of DRAM: bytes, in how many runs of consecutive addresses."""

    nbytes: int
    runs: int

    def cost_bytes(self, machine: Machine) -> float:
        """Bytes' worth of DRAM time: every run costs `dram.run_overhead_bytes` more (page miss, partial
        bursts).

        Example: 48 rows of 1792 bytes, one run each, overhead 64: 48 * (1792 + 64) = 89,088; as one
        consecutive run 86,016 + 64.
        """
        return self.nbytes + self.runs * machine.dram.run_overhead_bytes


NO_TRANSFER: Final = Transfer(0, 0)


def transfer_of(shape: Sequence[int], dram_strides: Sequence[int]) -> Transfer:
    """[planes, rows, row bytes] with DRAM strides: rows that follow each other without a gap are one run.

    Example: [2, 100, 64] with strides [65536, 64] is 12,800 bytes in 2 runs; with strides [65536, 128] in
    200.
    """
    planes, rows, row = shape
    nbytes = planes * rows * row
    if nbytes == 0:
        return NO_TRANSFER
    runs, extent = (1, rows * row) if rows == 1 or dram_strides[1] == row else (rows, 0)
    return Transfer(nbytes, 1 if runs == 1 and (planes == 1 or dram_strides[0] == extent) else runs * planes)


def matmul_ns(m: int, n: int, k: int, machine: Machine) -> float:
    """f16 product on the cubes: every cube does one rows x columns x depth block a cycle; blocks of [m, n]
    are dealt to the cubes, each walks k.

    cycles = fill + ceil(ceil(m / rows) * ceil(n / columns) / cubes) * ceil(k / depth).  A cube is as busy
    with 1 row as with 16 (ISA: ALPHA, BETA, GAMMA). Example (3 cubes of 16 x 16 x 8, fill 32, 500 MHz): m 1,
    n 48, k 3584: ceil(1 * 3 / 3) * 448 + 32 = 480 cycles = 960 ns.
    """
    if 0 in (m, n, k):
        return 0.0
    cube = machine.cube
    blocks = -(-m // cube.rows) * -(-n // cube.columns)
    return (cube.fill_cycles + -(-blocks // cube.count) * -(-k // cube.depth_fp16)) * machine.cycle_ns


def drain_ns(m: int, n: int, machine: Machine) -> float:
    """Accumulators (f32) to SRAM over the crossbar: 4 bytes an element, `drain_bytes_per_cycle` a cycle.

    Example (128 bytes a cycle, 2 ns): m 1, n 48: ceil(192 / 128) = 2 cycles = 4 ns.
    """
    return math.ceil(m * n * 4 / machine.cube.drain_bytes_per_cycle) * machine.cycle_ns


def dequant_ns(n: int, k: int, machine: Machine) -> float:
    """4-bit weights, or the 8-bit rows of a cache, to f16 through their own pipe.

    Example (128 a cycle, startup 32, 2 ns): n 48, k 3584: 32 + 1344 = 1376 cycles = 2752 ns.
    """
    if 0 in (n, k):
        return 0.0
    return (
        machine.dequant.startup_cycles + math.ceil(n * k / machine.dequant.weights_per_cycle)
    ) * machine.cycle_ns


def vector_ns(function: str, elements: int, machine: Machine) -> float:
    """cycles = startup + elements / (units * lanes) * cycles per element of the function.

    Example (4 units of 64 lanes, startup 32, rms_norm 4, 2 ns): 3584 elements: 32 + 14 * 4 = 88 cycles = 176
    ns.
    """
    if elements == 0:
        return 0.0
    vector = machine.vector
    function_row = VECTOR_FUNCTIONS.get(function)
    per_element = vector.cycles[function_row.priced_as if function_row else function]
    return (
        vector.startup_cycles + math.ceil(elements / (vector.units * vector.lanes)) * per_element
    ) * machine.cycle_ns


def softmax_ns(rows: int, cols: int, machine: Machine) -> float:
    """One block of the online softmax; as `vector_ns` with the softmax's cycles.

    Example (softmax 8 cycles): 7 rows of 128 keys: 32 + ceil(896 / 256) * 8 = 64 cycles = 128 ns.
    """
    return vector_ns("softmax", rows * cols, machine)


def top_k_ns(
    rows: int, cols: int, k: int, summed: int, machine: Machine, *, function: str = "softmax"
) -> float:
    """Every candidate is compared once, at the price of an addition; one that enters a list shifts up to k
    entries, one vector of lanes after the other; `summed` elements of all rows take the online softmax's
    passes (maximum, exponential, sum), at its price.

    Candidate i of a random row is among the k best so far with probability min(1, k / i): about k (1 +
    ln(cols / k)) enter.  One unit serves one row. Example (4 units of 64 lanes, startup 32, add 1, softmax 8,
    2 ns): 1 row of 38016, all summed, k 8: 8 (1 + ln 4752) = 76 enter: 32 + 149 + 76 + 149 * 8 = 1449 cycles
    = 2898 ns.
    """
    if 0 in (rows, cols):
        return 0.0
    vector = machine.vector
    entering = math.ceil(min(cols, k * (1 + math.log(max(cols / k, 1)))))
    shifts = -(-rows // vector.units) * entering * -(-k // vector.lanes)
    compares = math.ceil(rows * cols / (vector.units * vector.lanes))
    sums = math.ceil(summed / (vector.units * vector.lanes)) * vector.cycles[function]
    return (vector.startup_cycles + (compares + shifts) * vector.cycles["add"] + sums) * machine.cycle_ns


def _top_k_capped_ns(rows: int, cols: int, k: int, summed: int, machine: Machine) -> float:
    return top_k_ns(rows, cols, k, summed, machine, function="softmax_capped")


class Work(NamedTuple):
    """What the time of a command on `dequant`, `cube`, `drain` or `vector` depends on: what it does, and the
    sizes that the formula of that name takes; a vector function takes its elements.
    """

    what: str
    sizes: tuple[int, ...]

    def ns(self, machine: Machine) -> float:
        """Its time, without its dispatch."""
        formula = _FORMULAS.get(self.what)
        if formula is not None:
            return formula(*self.sizes, machine)
        (elements,) = self.sizes
        return vector_ns(self.what, elements, machine)


_FORMULAS: Final[dict[str, Callable[..., float]]] = {
    "matmul": matmul_ns,
    "drain": drain_ns,
    "dequant": dequant_ns,
    "top_k": top_k_ns,
    "top_k_capped": _top_k_capped_ns,
}
