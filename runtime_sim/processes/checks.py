"""What is looked at before a process runs its dies: the artifacts, this machine's processor, its memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from tyir.artifacts.consistency import cache_inputs
from tyir.diagnostics import Diagnostic, TyirError
from tyir.execution.artifacts import Artifacts
from tyir.execution.processor import check_processor
from tyir.manifest import MANIFEST, DieProgram, Manifest
from tyir.process.memory import available_memory
from tyir.runtime_sim.processes.placement import place_language, place_tower

__all__ = ["files_of", "files_of_rank", "find_artifacts", "memory_of", "problems_here"]

_DEPTH = 3  # of folders below those that are named


def find_artifacts(manifest: str, folders: Sequence[Path]) -> Path:
    """The folder whose manifest has this SHA-256, among `folders` and what lies in them: a path is another on
    every machine.

    `TyirError` names what was found instead.
    """
    others: list[str] = []
    for file in _manifests(folders):
        with suppress(OSError):
            found = hashlib.sha256(file.read_bytes()).hexdigest()
            if found == manifest:
                return file.parent
            others.append(f"{file.parent} ({found[:12]})")
    instead = f"; there are {', '.join(others[:5])}" if others else ""
    raise TyirError(
        f"no artifacts with manifest {manifest[:12]} are in {', '.join(map(str, folders))}{instead}",
        help="copy the folder that the first process runs, or compile there with equal options",
    )


def _manifests(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        for depth in range(_DEPTH + 1):
            yield from sorted(folder.glob("*/" * depth + MANIFEST))


def files_of(programs: Iterable[DieProgram]) -> set[str]:
    """The files of programs."""
    return {name for program in programs for name in program.files}


def files_of_rank(processes: int, rank: int) -> Callable[[Manifest], Collection[str]]:
    """Of a manifest, the files that one of so many processes uses: all but those of the others' dies."""

    def used(manifest: Manifest) -> Collection[str]:
        own = files_of(_programs(manifest, processes, rank))
        theirs = files_of(p for other in range(processes) for p in _programs(manifest, processes, other))
        return manifest.files.keys() - (theirs - own)

    return used


def _programs(manifest: Manifest, processes: int, rank: int) -> list[DieProgram]:
    found = [p for p in manifest.programs if p.die in place_language(manifest, processes)[rank]]
    if manifest.vision is not None:
        tower = place_tower(manifest, processes)[rank]
        found += [p for size in manifest.vision.sizes for p in size.programs if p.die in tower]
    return found


def memory_of(manifest: Manifest, processes: int, rank: int) -> int:
    """Bytes that one of so many processes needs for its dies' weights, which are mapped, and caches."""
    programs = _programs(manifest, processes, rank)
    weights = {p.params: manifest.files[p.params]["size"] for p in programs if p.params in manifest.files}
    caches: dict[tuple[int, str], int] = {}
    for program in (p for p in manifest.programs if p in programs):
        for index in cache_inputs(program):
            info = program.inputs[index]
            caches[program.die, info.name] = math.prod(info.shape) * info.storage_dtype.itemsize
    return sum(weights.values()) + sum(caches.values())


def problems_here(
    artifacts: Artifacts, *, compiled: bool, needed: int, available: int | None = None
) -> list[Diagnostic]:
    """Why this machine cannot run programs of these artifacts; nothing when it can.

    `needed`: bytes of all processes that are to run here; `available`: what there is, None to ask the system.
    """
    problems: list[Diagnostic] = []
    if compiled:
        host = artifacts.manifest.build["host"]
        try:
            check_processor(host["mcpu"], host["features"], artifacts.path)
        except TyirError as error:
            problems += error.diagnostics
    free = available_memory() if available is None else available
    if free is not None and needed > free:
        problems.append(
            Diagnostic(
                f"its dies' weights and caches take {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB of"
                " memory are free",
                help="give fewer dies to this machine, with another machine beside it, or free memory",
            )
        )
    return problems
