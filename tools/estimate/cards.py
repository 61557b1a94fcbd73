"""A model over several cards in machines of their own: its dies as one group whose sums pass between the
cards, beside pipeline stages of which each card has its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tyir.diagnostics import TyirError
from tyir.manifest import BuildOptions
from tyir.runtime_sim.timing.engine import simulate
from tyir.runtime_sim.timing.long_steps import LongSteps
from tyir.targets.machine import Machine, load_machine
from tyir.tools.estimate.long_context import decode_programs
from tyir.tools.estimate.model import ModelShape

__all__ = ["OnCards", "Spread", "check_cards", "fastest_on_cards", "spread"]

_FREE = {"c2c.hop_us": 1e-6, "c2c.bandwidth_gbps": 1e6}  # links that cost nothing


@dataclass(frozen=True)
class Spread:
    """A token at the cache's last position, with the layers in so many stages: seconds with the host's part,
    those of them that the links between cards cost, and what bounds the device.
    """

    stages: int
    token: float
    links: float
    bound_by: str


@dataclass(frozen=True)
class OnCards:
    """What a token takes with the dies on several cards, and the bytes of the die that holds most."""

    spread: Spread
    largest: int


def check_cards(dies: int, cards: int) -> None:
    """`TyirError` unless each card has as many dies."""
    if cards < 2 or dies % cards:
        raise TyirError(
            f"{dies} dies are not shared evenly by {cards} cards" if cards > 1 else f"{cards} cards",
            help=f"give --cards 2 or more, and a --dies that it divides, as {2 * cards if cards > 1 else 2}",
        )


def fastest_on_cards(found: Sequence[OnCards], machine: Machine) -> OnCards | None:
    """The quickest token of those that fit the dies' DRAM; None: none fits."""
    fitting = (c for c in found if c.largest <= machine.dram.capacity_bytes)
    return min(fitting, key=lambda c: c.spread.token, default=None)


def spread(shape: ModelShape, options: BuildOptions, machine_file: Path, cards: int) -> Iterator[Spread]:
    """Tensor parallelism over all cards, and stages of which each is a card's, simulated under a machine file
    whose packages are cards (`tyir.targets.cluster.Cluster.joined`).
    """
    machine = load_machine(machine_file)
    for stages in sorted({1, cards, options.pp}):
        if stages <= shape.layers and options.dies % stages == 0:
            yield _spread(shape, replace(options, pp=stages, die_map=(), mesh=()), machine, machine_file)


def _spread(shape: ModelShape, options: BuildOptions, machine: Machine, file: Path) -> Spread:
    programs, standing_for = decode_programs(shape, options, machine, str(file))
    pos = options.max_kv - min(options.seqlens)

    def seconds(on: Machine) -> float:
        return LongSteps(programs, on, options.max_kv, standing_for).ns(pos) * 1e-9

    device = seconds(machine)
    return Spread(
        options.pp,
        device + machine.host.step_us * 1e-6,
        device - seconds(machine.with_overrides(_FREE)),
        simulate(programs, machine, pos).bound_by,
    )
