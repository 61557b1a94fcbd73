"""How long a collective takes: the one formula that the compiler's choices and the timing engine share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tyir.targets.machine import Machine
from tyir.types import Type, bit_width

__all__ = ["all_gather_ns", "all_reduce_ns"]


def all_reduce_ns(nbytes: int, element: Type, dies: int, machine: Machine) -> float:
    """Sum over the dies: software, then the faster of one-shot (everybody sends everything to everybody) and reduce-scatter + all-gather.

    Within a package (all-to-all links of bandwidth B per direction and die), N dies, n bytes, one hop h:
        one-shot    h + (N - 1) n / B + adds of (N - 1) n                two-phase   2 (h + (N - 1) / N n / B) + adds of (N - 1) / N n
    Over packages, two levels: reduce-scatter inside, all-reduce of n / g bytes between them, all-gather inside.
    Thakur et al., "Optimization of collective communication operations in MPICH", 2005; two levels as in TyLLM's group of dies.
    Example (4 dies, 7168 bytes f16, B 32, h 1000, software 2000, 256 lanes, add 1 cycle, 2 ns): one-shot 1000 + 672 + 84 = 1756, two-phase 2000 + 336 + 22 = 2358;
    with the software 3756 ns.
    """
    if dies <= 1:
        return 0.0
    group = min(dies, machine.d2d.package_dies)
    packages = -(-dies // group)
    width = bit_width(element) // 8
    hop, rate = machine.d2d.hop_us * 1000, machine.d2d.bandwidth_gbps
    two_phase = 2 * (hop + (group - 1) / group * nbytes / rate) + _adds(nbytes * (group - 1) // group // width, machine)
    one_shot = hop + (group - 1) * nbytes / rate + _adds((group - 1) * nbytes // width, machine)
    software = machine.d2d.collective_us * 1000
    if packages == 1:
        return software + min(one_shot, two_phase)
    share = nbytes / group
    between = 2 * (machine.c2c.hop_us * 1000 + (packages - 1) / packages * share / machine.c2c.bandwidth_gbps) + _adds(
        int(share * (packages - 1) / packages / width), machine
    )
    return software + two_phase + between


def _adds(elements: int, machine: Machine) -> float:
    """Adding received elements on the vector units, without a startup of its own.  Example: 10,752 f16 additions: 42 cycles = 84 ns."""
    return math.ceil(elements / (machine.vector.units * machine.vector.lanes)) * machine.vector.add_cycles * machine.cycle_ns


def all_gather_ns(rows: int, sizes: Sequence[int], machine: Machine) -> float:
    """Everybody sends its piece to everybody: one hop and the larger of what one die sends and receives.

    Example (4 pieces of 1000 bytes, B 32, h 1000, software 2000): 2000 + 1000 + 3000 / 32 = 3093.75 ns.
    """
    dies = len(sizes)
    if dies <= 1:
        return 0.0
    group = min(dies, machine.d2d.package_dies)
    packages = -(-dies // group)
    pieces = [rows * s for s in sizes]
    total, largest = sum(pieces), max(pieces)
    busiest = max(max((group - 1) * largest, total // packages - min(pieces)), 0)
    inside = machine.d2d.hop_us * 1000 + busiest / machine.d2d.bandwidth_gbps
    if packages == 1:
        return machine.d2d.collective_us * 1000 + inside
    between = machine.c2c.hop_us * 1000 + (total - total / packages) / group / machine.c2c.bandwidth_gbps
    return machine.d2d.collective_us * 1000 + inside + between + (total - total / packages) / machine.d2d.bandwidth_gbps
