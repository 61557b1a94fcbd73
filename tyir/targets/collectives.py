"""Collectives: how long one takes (the one formula that the compiler's choices and the timing engine share),
and how few a step can do with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tyir.sharding import vocabulary_ranges
from tyir.targets.machine import Machine
from tyir.types import Type, bit_width

__all__ = [
    "CollectiveNeed",
    "all_gather_ns",
    "all_reduce_ns",
    "all_reduce_phases",
    "minimal_collectives",
    "send_ns",
]


def all_reduce_ns(nbytes: int, element: Type, dies: int, machine: Machine, group: int | None = None) -> float:
    """Sum over the dies: software, then the faster of one-shot (everybody sends everything to everybody)
    and reduce-scatter + all-gather.

    Within a package (all-to-all links of bandwidth B per direction and die), N dies, n bytes, one hop h:
        one-shot    h + (N - 1) n / B + adds of (N - 1) n                two-phase   2 (h + (N - 1) / N n / B) + adds of (N - 1) / N n
    Over packages (`group` dies each, by default as many as a package has), two levels: reduce-scatter inside, all-reduce of n / g bytes between them, all-gather inside.
    Thakur et al., "Optimization of collective communication operations in MPICH", 2005; two levels as in TyLLM's group of dies.
    Example (4 dies, 7168 bytes f16, B 32, h 1000, software 2000, 256 lanes, add 1 cycle, 2 ns): one-shot 1000 + 672 + 84 = 1756, two-phase 2000 + 336 + 22 = 2358;
    with the software 3756 ns.
    """  # noqa: E501
    if dies <= 1:
        return 0.0
    group = min(dies, group or int(machine.d2d.package_dies))
    packages = -(-dies // group)
    width = bit_width(element) // 8
    one_shot, two_phase = _within_package_ns(nbytes, width, group, machine)
    software = machine.d2d.collective_us * 1000
    if packages == 1:
        return software + min(one_shot, two_phase)
    share = nbytes / group
    between = 2 * (
        machine.c2c.hop_us * 1000 + (packages - 1) / packages * share / machine.c2c.bandwidth_gbps
    ) + _adds(int(share * (packages - 1) / packages / width), machine)
    return software + two_phase + between


def all_reduce_phases(nbytes: int, element: Type, dies: int, machine: Machine) -> int:
    """How often the dies of one package exchange: 1 when everybody sends everything, 2 for reduce-scatter and
    all-gather.
    """
    one_shot, two_phase = _within_package_ns(nbytes, bit_width(element) // 8, dies, machine)
    return 1 if one_shot <= two_phase else 2


def _within_package_ns(nbytes: int, width: int, dies: int, machine: Machine) -> tuple[float, float]:
    """Both algorithms, without the software."""
    hop, rate = machine.d2d.hop_us * 1000, machine.d2d.bandwidth_gbps
    one_shot = hop + (dies - 1) * nbytes / rate + _adds((dies - 1) * nbytes // width, machine)
    return one_shot, 2 * (hop + (dies - 1) / dies * nbytes / rate) + _adds(
        nbytes * (dies - 1) // dies // width, machine
    )


def _adds(elements: int, machine: Machine) -> float:
    """Adding received elements on the vector units, without a startup of its own.

    Example: 10,752 f16 additions: 42 cycles = 84 ns.
    """
    return (
        math.ceil(elements / (machine.vector.units * machine.vector.lanes))
        * machine.vector.cycles["add"]
        * machine.cycle_ns
    )


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
    return (
        machine.d2d.collective_us * 1000
        + inside
        + between
        + (total - total / packages) / machine.d2d.bandwidth_gbps
    )


def send_ns(nbytes: int, source: int, targets: Sequence[int], machine: Machine) -> float:
    """One die's bytes to each of some others: software, the longest hop, and the copies one after the other
    over the source's port.

    Dies are numbered by package.  Example (7168 bytes to one die of the package, B 32, h 1000, software
    2000): 2000 + 1000 + 224 = 3224 ns.
    """
    package = int(machine.d2d.package_dies)
    links = [machine.d2d if target // package == source // package else machine.c2c for target in targets]
    hop = max(link.hop_us for link in links) * 1000
    return float(machine.d2d.collective_us * 1000 + hop + sum(nbytes / link.bandwidth_gbps for link in links))


@dataclass(frozen=True)
class CollectiveNeed:
    """`count` collectives of `dies` dies, each leaving `nbytes` on a die (a send: taking them from it)."""

    what: Literal["all_reduce", "all_gather", "send", "recv"]
    dies: int
    count: int
    nbytes: int


def minimal_collectives(
    layers: int,
    hidden: int,
    vocabulary: int,
    tokens: int,
    dies: int,
    *,
    stages: int = 1,
    stage: int = 0,
    top_k: int = 0,
    embedding_as_input: bool = False,
    kv_parts: int = 1,
    heads: int = 0,
    width: int = 0,
    rows: int | None = None,
) -> tuple[CollectiveNeed, ...]:
    """The fewest collectives, and their bytes, of a step on a die of pipeline stage `stage` when attention,
    MLPs, embedding and head are split over the dies.

    Two sums a layer of the stage, of one f16 hidden vector a token: what follows each needs the whole vector
    (Shoeybi et al., Megatron-LM, arXiv:1909.08053); one for the embedding; the residual stream handed from
    stage to stage and at the end to all dies; one gather of the logits (f32), or of every die's `top_k` best
    values and ids and its sum.  Where `kv_parts` dies share caches by tokens, also two gathers a layer: the
    `heads` queries of `width` that read their heads, f16, and each die's part of attention, f32 and two more.
    `tokens` counts those of all sequences, `rows` those of them whose results are returned (None: all), which
    alone the last stage hands on.  Example (28 layers of 3584, 4 dies, 1 token, vocabulary 152064): 57 sums
    of 7168 bytes and a gather of 608,256.
    """
    if dies == 1:
        return ()
    vector, members = tokens * hidden * 2, dies // stages
    rows = tokens if rows is None else rows
    own = layers // stages + (stage < layers % stages)
    first, last, end = stage == 0, stage == stages - 1, rows * hidden * 2
    columns = (
        vocabulary
        if not top_k
        else sum(2 * min(top_k, size) + 1 for _, size in vocabulary_ranges(vocabulary, dies) if size)
    )
    needs = (
        CollectiveNeed("all_reduce", members, 2 * own if members > 1 else 0, vector),
        CollectiveNeed("all_gather", kv_parts, own * (kv_parts > 1), tokens * heads * width * 2),
        CollectiveNeed(
            "all_gather", kv_parts, own * (kv_parts > 1), tokens * heads * kv_parts * (width + 2) * 4
        ),
        CollectiveNeed("all_reduce", dies, int(not embedding_as_input), vector),
        CollectiveNeed("send", 2, int(stages > 1), end if last else vector),
        CollectiveNeed("recv", 2, int(not first), vector),
        CollectiveNeed("recv", 2, int(not last), end),
        CollectiveNeed("all_gather", dies, 1, rows * columns * 4),
    )
    return tuple(need for need in needs if need.count)
