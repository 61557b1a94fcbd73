"""Which process runs which dies."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from tyir.diagnostics import TyirError
from tyir.manifest import Manifest

__all__ = ["Cores", "Places", "place", "place_language", "place_tower", "share_cores"]

Places = tuple[tuple[int, ...], ...]  # the dies of each process, in order
Cores = tuple[tuple[int, ...], ...]  # those that each process runs on


def place(dies: int, stages: int, processes: int) -> Places:
    """Neighbouring dies together, as evenly as can be; pipeline stages whole where there are enough of them,
    so that what passes between processes is one hand-over a stage, and sums stay within.

    `TyirError` unless each process gets a die.
    """
    if not 1 <= processes <= dies:
        raise TyirError(
            f"{processes} processes cannot share {dies} {'die' if dies == 1 else 'dies'}",
            help=f"give 1 to {dies}: each process runs one die at least",
        )
    width = dies // stages
    if processes <= stages:
        cuts = [width * cut for cut in _even(stages, processes)]
    else:  # processes are dealt out to stages, and the dies of a stage to its processes
        shares = _even(processes, stages)
        cuts = [0]
        for stage, (low, high) in enumerate(pairwise(shares)):
            cuts += [stage * width + cut for cut in _even(width, high - low)[1:]]
    return tuple(tuple(range(low, high)) for low, high in pairwise(cuts))


def _even(total: int, parts: int) -> list[int]:
    """Where `total` things are cut into parts that differ by one at most, the larger ones first."""
    cuts = [0]
    for part in range(parts):
        cuts.append(cuts[-1] + total // parts + (part < total % parts))
    return cuts


def share_cores(places: Places, stages: int, cores: Sequence[int]) -> Cores:
    """The cores of each process when all run on one machine: the dies of a pipeline stage, which compute at
    the same time, have a part each; a core is shared where there are fewer cores than dies.

    Left to itself the system brings a process that is woken to the core of the one that woke it, where one
    waits for the other.
    """
    width, count = sum(map(len, places)) // stages, len(cores)

    def of(die: int) -> range:
        first, end = (number * count // width for number in (die % width, die % width + 1))
        return range(first, max(end, first + 1))

    return tuple(
        tuple(cores[core] for core in sorted({c for die in dies for c in of(die)})) for dies in places
    )


def place_language(manifest: Manifest, processes: int) -> Places:
    """Of the language programs."""
    return place(manifest.options.dies, manifest.options.pp, processes)


def place_tower(manifest: Manifest, processes: int) -> Places:
    """Of the vision tower's programs: as those of the language programs where there are as many dies; a
    process that is left without a die waits while the others compute.
    """
    if manifest.vision is None:
        return ((),) * processes
    dies = manifest.vision.dies
    if dies == manifest.options.dies:
        return place_language(manifest, processes)
    filled = place(dies, 1, min(dies, processes))
    return filled + ((),) * (processes - len(filled))
