"""Machines beside each other: what links one to another, and how long what passes between them takes.

    name = "two PCs"
    [link]
    hop_us = { value = 60, label = "fitted", source = "python -m tyir.tools.bench.processes ..." }
    bandwidth_gbps = { value = 1.2, label = "fitted", source = "..." }
    exchange_us = { value = 150, label = "fitted", source = "..." }

The numbers are given as those of a machine file are (`tyir.targets.constants`), every one with its source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyir.diagnostics import TyirError
from tyir.targets.constants import Constant, Form, build_sections, entries_of, read_file
from tyir.targets.machine import Machine

__all__ = ["Cluster", "Link", "load_cluster"]


@dataclass(frozen=True)
class Link:
    """From one machine to another: a message takes `hop_us` and its bytes at `bandwidth_gbps`; where all
    machines of a group tell each other something, each spends `exchange_us` beside that for every other.
    """

    hop_us: float
    bandwidth_gbps: float
    exchange_us: float


@dataclass(frozen=True)
class Cluster:
    """Equal machines, each linked to each other."""

    name: str
    link: Link
    constants: Mapping[str, Constant]

    def message_ns(self, nbytes: int) -> float:
        """One message, from when it is sent to when it is there.

        Example (4096 bytes, hop 60, 1 GB/s): 60000 + 4096 = 64096 ns.
        """
        return self.link.hop_us * 1000 + nbytes / self.link.bandwidth_gbps

    def exchange_ns(self, nbytes: int, machines: int) -> float:
        """Each of the machines sends `nbytes` to each other: they leave one after the other over one port.

        Example (3 machines, 4096 bytes, hop 60, 1 GB/s, exchange 150): 2 * 150000 + 60000 + 2 * 4096 =
        368192 ns.
        """
        others = machines - 1
        if not others:
            return 0.0
        return others * self.link.exchange_us * 1000 + self.message_ns(others * nbytes)

    def joined(self, machine: Machine, dies: int) -> Machine:
        """The machine with cards of so many dies, one in each of these machines: a card's dies are linked as
        those of a package, and reach other cards over the link, of which each has a share.

        What one card tells the others passes through both hosts, so a hop of it costs an exchange.
        """
        hop, exchange = self.constants["link.hop_us"], self.constants["link.exchange_us"]
        rate = self.constants["link.bandwidth_gbps"]

        def constant(what: str, scale: float, *of: Constant) -> Constant:
            """The sum of some, scaled; with bounds where one of them has some."""
            value = sum(c.value for c in of) * scale
            low, high = (
                sum(c.value if bound is None else bound for c, bound in zip(of, bounds)) * scale
                for bounds in ([c.low for c in of], [c.high for c in of])
            )
            label = next((c.label for c in of if c.label == "assumed"), of[0].label)
            source = f"{of[0].source}; {what} of {self.name}"
            return Constant(value, label, source, *((low, high) if low < high else (None, None)))

        return machine.with_constants(
            f"{machine.name} in {self.name}",
            {
                "d2d.package_dies": Constant(dies, "derived", "dies of one card"),
                "c2c.hop_us": constant("hop and exchange", 1, hop, exchange),
                "c2c.bandwidth_gbps": constant(f"a {dies}th of the link", 1 / dies, rate),
            },
        )


def load_cluster(path: Path) -> Cluster:
    """What a cluster's file describes; everything wrong with it is reported at once."""
    table = read_file(path, "cluster", "give a file as docs/processes.md describes it")
    name = table.pop("name", path.stem)
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 80:
        raise TyirError(
            f"name = {str(name)[:80]!r} is not a name", help='write name = "two PCs"', where=str(path)
        )
    sections: dict[str, Any] = {"link": Link}
    constants, problems = Form(sections, zeros=False, bounds=True).read(entries_of(table), str(path), None)
    if problems:
        raise TyirError(problems)
    return Cluster(name, constants=constants, **build_sections(sections, constants))
