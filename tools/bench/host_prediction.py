"""Holds what `tyir-sim --machine HOST.toml` predicts against measured steps of the same artifacts, in one run.

    tyir-sim --probe-host host.toml
    python -m tyir.tools.bench.host_prediction host.toml out/1die out/4die --position 128 --position 4000 --prefill 128

Every artifact takes a step of each kind that it holds, then the next one, round by round, so that all of them meet the
same disturbances, each behind one of its own that is not counted: as a token follows a token, and the threads of the artifact
before fall asleep.  Caches hold random numbers.  Printed as Markdown: medians and the quickest in milliseconds, what is predicted, and how
far that is from both in per cent; at the end the mean and the largest error.  The quickest is what the model is of, the
median what others leave of the machine.  `--clock processor` is for cores that other
programs use as well: one thread, the time that it has on its core, beside a file that was measured so.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tyir.diagnostics import TyirError
from tyir.runtime_sim.host.machine import load_host_machine
from tyir.runtime_sim.host.steps import HostPredictor
from tyir.tools.bench.steps import Step, fill_caches, open_session
from tyir.tools.cli import ToolParser, add_json_option, run_tool

__all__ = ["main"]


@dataclass(frozen=True)
class _Row:
    """A step, measured and predicted, in ms."""

    artifacts: str
    activations: str
    tokens: int
    position: int
    threads: int
    measured_ms: float
    quickest_ms: float
    predicted_ms: float

    @property
    def error(self) -> float:
        """Of the prediction, as a share of the median."""
        return self.predicted_ms / self.measured_ms - 1

    @property
    def error_of_quickest(self) -> float:
        return self.predicted_ms / self.quickest_ms - 1


@dataclass
class _Compared:
    """A step of an artifact folder."""

    folder: Path
    step: Step
    predicted_ms: float
    activations: str


def _steps(
    folder: Path, predictor: HostPredictor, tokens: int, positions: Sequence[int], threads: int
) -> list[_Compared]:
    """The steps of so many tokens that the artifacts hold."""
    session = open_session(folder, threads)
    options = session.manifest.options
    if tokens not in options.seqlens:
        return []
    steps = []
    for position in positions:
        if position + tokens <= options.max_kv:
            step = Step(session, tokens, position)
            step.run()
            predicted = predictor.step(tokens, position).ms
            steps.append(_Compared(folder, step, predicted, predictor.activations))
    fill_caches(session)
    return steps


def _rows(
    compared: Sequence[_Compared], threads: int, rounds: int, times: Callable[[Step], list[float]]
) -> list[_Row]:
    for _ in range(rounds):
        for one in compared:
            one.step.run()
            one.step.time()
    return [
        _Row(
            str(c.folder),
            c.activations,
            c.step.tokens,
            c.step.position,
            threads,
            statistics.median(times(c.step)),
            min(times(c.step)),
            c.predicted_ms,
        )
        for c in compared
    ]


@run_tool
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", type=Path, help="what tyir-sim --probe-host wrote")
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument(
        "--position", type=int, action="append", help="of a step of one token (128), repeatable"
    )
    parser.add_argument("--prefill", type=int, default=128, help="tokens of a chunk, a compiled length (128)")
    parser.add_argument("--threads", type=int, action="append", help="of each (1), repeatable")
    parser.add_argument("--rounds", type=int, default=9)
    add_json_option(parser)
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise TyirError(f"--rounds is {args.rounds}: a median needs 1 at least", help="use --rounds 9")
    machine = load_host_machine(args.machine)
    from tyir.execution.artifacts import Artifacts

    rows: list[_Row] = []
    for threads in args.threads or [1]:
        compared: list[_Compared] = []
        for folder in args.artifacts:
            predictor = HostPredictor(Artifacts.open(folder, check=False), machine, threads)
            compared += _steps(folder, predictor, 1, args.position or [128], threads)
            compared += _steps(folder, predictor, args.prefill, [0], threads)
        if not compared:
            raise TyirError(
                "none of the artifacts holds such a step",
                help="use a --position within their caches, and for --prefill a compiled length",
            )
        rows += _rows(
            compared, threads, args.rounds, lambda s: s.wall if machine.clock == "wall" else s.processor
        )
        del compared
    if args.json:
        table = [
            {**asdict(row), "error": row.error, "error_of_quickest": row.error_of_quickest} for row in rows
        ]
        print(json.dumps({"clock": machine.clock, "rows": table}, indent=1))
        return 0
    print(f"{args.rounds} rounds by the {machine.clock}'s clock.\n")
    print(
        "| artifacts | activations | tokens | position | threads"
        " | median ms | quickest | predicted | error | of the quickest |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        print(
            f"| {row.artifacts} | {row.activations} | {row.tokens} | {row.position} | {row.threads}"
            f" | {row.measured_ms:.2f} | {row.quickest_ms:.2f} | {row.predicted_ms:.2f}"
            f" | {100 * row.error:+.1f} % | {100 * row.error_of_quickest:+.1f} % |"
        )
    print(
        f"\nOf medians: {_summary([row.error for row in rows])}"
        f"\nOf the quickest: {_summary([row.error_of_quickest for row in rows])}"
    )
    return 0


def _summary(errors: Sequence[float]) -> str:
    sizes = [abs(e) for e in errors]
    return (
        f"mean error {100 * statistics.mean(sizes):.1f} %, largest {100 * max(sizes):.1f} %,"
        f" {sum(size <= 0.1 for size in sizes)} of {len(sizes)} within 10 %."
    )


if __name__ == "__main__":
    sys.exit(main())
