"""Times single steps of artifacts on the host engine, in turn within one process.

    python -m tyir.tools.bench.steps out/1die out/4die --threads 1 --position 130 --position 4000
    python -m tyir.tools.bench.steps out/1die out/2die --tokens 128

Every artifact takes a step at a position, then the next one, round by round, so that all of them meet the same
disturbances; caches hold random numbers.  Artifacts of an older tyir are run by this one, as their libraries allow.
Printed as Markdown: medians of the wall time and of the processor time of all threads, milliseconds, and both beside
those of the first artifact.  On cores that other programs use, `taskset -c 0` with `--threads 1` compares what is
computed; which threads share a core's caches and wait for each other does not come into it.
"""  # noqa: E501

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tyir.diagnostics import TyirError
from tyir.tools.cli import ToolParser, run_tool

if TYPE_CHECKING:
    from tyir.runtime_sim.session.session import Session

__all__ = ["Step", "fill_caches", "main", "open_session"]


class Step:
    """A step of one artifact at one position; its times in ms, `wall` and of the `processor`."""

    def __init__(self, session: Session, tokens: int, position: int) -> None:
        from tyir.artifacts.consistency import cache_inputs
        from tyir.runtime_sim.session.chunks import Chunk

        self.tokens, self.position = tokens, position
        self._engine = session.engine
        program = session.manifest.program(0, tokens)
        caches = cache_inputs(program)
        self._inputs: dict[str, Any] = {
            t.name: np.zeros(t.shape, t.storage_dtype)
            for i, t in enumerate(program.inputs)
            if i not in caches
        }
        self._inputs["pos"][...] = position
        self._chunk = Chunk(position, tokens, tokens)
        self.wall: list[float] = []
        self.processor: list[float] = []

    def run(self) -> None:
        """Once, without being timed."""
        self._engine.step(self._inputs, self._chunk)

    def time(self) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        self.run()
        self.processor.append(1e3 * (time.process_time() - processor))
        self.wall.append(1e3 * (time.perf_counter() - wall))


def open_session(folder: Path, threads: int | None) -> Session:
    from tyir.execution.artifacts import Artifacts
    from tyir.runtime_sim.session.session import Session

    return Session(Artifacts.open(folder, check=False), threads=threads)


def _check(session: Session, folder: Path, tokens: int, positions: Sequence[int]) -> None:
    """`TyirError` for a step that the artifacts do not have, or that their cache does not hold."""
    options = session.manifest.options
    if tokens not in options.seqlens:
        lengths = ", ".join(map(str, options.seqlens))
        raise TyirError(
            f"{folder} has no step of {tokens} tokens", help=f"use --tokens with one of {lengths}"
        )
    for position in positions:
        if not 0 <= position <= options.max_kv - tokens:
            raise TyirError(
                f"a step of {tokens} at {position} does not fit the {options.max_kv} positions of {folder}",
                help=f"use --position 0 to {options.max_kv - tokens}",
            )


def fill_caches(session: Session) -> None:
    """Random numbers for what earlier tokens would have left."""
    random = np.random.default_rng(0)
    for array in session.engine.caches().values():
        if array.dtype == np.float16:
            array[...] = random.standard_normal(array.shape, np.float32)


@run_tool
def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = ToolParser(description=__doc__, formatter_class=raw)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=1, help="of a step: a compiled length (1)")
    parser.add_argument("--position", type=int, action="append", help="tokens before it (130), repeatable")
    parser.add_argument("--threads", type=int, help="of each (all cores)")
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise TyirError(f"--rounds is {args.rounds}: a median needs 1 at least", help="use --rounds 40")
    sessions = [open_session(folder, args.threads) for folder in args.artifacts]
    for session, folder in zip(sessions, args.artifacts, strict=True):
        _check(session, folder, args.tokens, args.position or [130])
    print("| position | artifacts | wall ms | processor ms | of the first's wall | of its processor time |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for position in args.position or [130]:
        steps = [Step(session, args.tokens, position) for session in sessions]
        for session, step in zip(sessions, steps, strict=True):
            step.run()
            fill_caches(session)
        for _ in range(args.rounds):
            for step in steps:
                step.time()
        first = [statistics.median(times) for times in (steps[0].wall, steps[0].processor)]
        for folder, step in zip(args.artifacts, steps, strict=True):
            own = [statistics.median(times) for times in (step.wall, step.processor)]
            print(
                f"| {position} | {folder} | {own[0]:.1f} | {own[1]:.1f} | {own[0] / first[0]:.2f}"
                f" | {own[1] / first[1]:.2f} |"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
