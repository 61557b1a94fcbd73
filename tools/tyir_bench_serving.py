"""`tyir-bench-serving OUT/{n}die`: how the compiled model serves a stream of requests, in vLLM's words.

tyir-bench-serving out/4die --request-rate 0.2 --num-prompts 20 --input-len 128 --output-len 64
tyir-bench-serving out/4die --trace requests.jsonl --engine host --result result.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tyir.diagnostics import TyirError
from tyir.tools.cli import ToolParser, add_json_option, run_tool, write_output

if TYPE_CHECKING:
    from tyir.runtime_sim.serving.benchmark import Server

__all__ = ["main", "make_parser"]


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = make_parser().parse_args(argv)
    from tyir.runtime_sim.serving.benchmark import poisson, read_trace, serve, summary, text_block

    _check_positive(args)
    slos = _slos(args.goodput)
    requests = (
        read_trace(args.trace)
        if args.trace
        else poisson(args.num_prompts, args.request_rate, args.input_len, args.output_len, args.seed)
    )
    server, note = _server(args)
    figures = summary(serve(requests, server, max_concurrency=args.max_concurrency), slos)
    whole = {"artifacts": str(args.artifacts), "engine": args.engine, "note": note, **figures}
    if args.json:
        print(json.dumps(whole, indent=1))
    else:
        print(text_block(figures))
        print(note)
    if args.result:
        write_output(json.dumps(whole, indent=1), str(args.result))
    return 0


def _check_positive(args: argparse.Namespace) -> None:
    bad = [
        f"--{name.replace('_', '-')} {value:g}"
        for name in ("num_prompts", "input_len", "output_len", "request_rate", "max_concurrency")
        if (value := getattr(args, name)) is not None and not value > 0
    ]
    if bad:
        raise TyirError(
            f"{', '.join(bad)} must be positive",
            help="the defaults are --num-prompts 10 --input-len 128 --output-len 64 --request-rate inf",
        )


def _server(args: argparse.Namespace) -> tuple[Server, str]:
    if args.engine != "sim":
        from tyir.runtime_sim.serving.benchmark import MeasuredServer
        from tyir.runtime_sim.session.batch_session import BatchSession

        session = BatchSession(args.artifacts, args.engine)
        return (
            MeasuredServer(session),
            f"measured on this computer, engine {args.engine}; no time is spent waiting for arrivals",
        )
    from tyir.artifacts.dual_chunk import DualChunk
    from tyir.execution.artifacts import Artifacts
    from tyir.runtime_sim.serving.benchmark import SimulatedServer
    from tyir.runtime_sim.timing.predictor import Predictor
    from tyir.runtime_sim.timing.program import EdgeProgram, load_programs, machine_of
    from tyir.targets.machine import load_machine

    artifacts = Artifacts.open(args.artifacts)
    manifest = artifacts.manifest
    loaded: dict[int, list[EdgeProgram]] = {}

    def programs(seqlen: int) -> list[EdgeProgram]:
        if seqlen not in loaded:
            loaded[seqlen] = load_programs(artifacts, seqlen)
        return loaded[seqlen]

    machine = load_machine(args.machine) if args.machine is not None else machine_of(artifacts)
    predictor = Predictor(programs, manifest.options.seqlens, manifest.options.max_kv, machine)
    state = "" if machine.calibrated else "; uncalibrated: constants are assumed, see tyir-sim --tornado"
    chunks = DualChunk.used(manifest.model, manifest.options.max_kv)
    return (
        SimulatedServer(predictor, manifest.options.batch, chunks),
        f"simulated, device time; host constant = {machine.host.step_us / 1000:g} ms a step{state}",
    )


def _slos(items: Sequence[str]) -> dict[str, float]:
    from tyir.runtime_sim.serving.benchmark import SLOS

    slos: dict[str, float] = {}
    for item in items:
        name, _, value = item.partition(":")
        try:
            slos[name] = float(value)
        except ValueError:
            name = ""
        if name not in SLOS:
            raise TyirError(
                f"--goodput {item} is none of {', '.join(f'{s}:MS' for s in SLOS)}",
                help="write --goodput ttft:500 tpot:50",
            )
    return slos


def make_parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="tyir-bench-serving",
        description=(
            "Serve a stream of requests, as many at once as the artifacts' batch, and report vLLM's serving"
            " metrics."
        ),
    )
    parser.add_argument("artifacts", type=Path, metavar="OUT/{n}die", help="artifact folder")
    parser.add_argument(
        "--engine",
        choices=("sim", "host", "interpreter", "edge10"),
        default="sim",
        help="timing simulator (default), or run for real",
    )
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help='JSON lines {"arrival": s, "prompt_tokens": n, "output_tokens": n}',
    )
    parser.add_argument(
        "--request-rate",
        type=float,
        default=float("inf"),
        metavar="R",
        help="Poisson arrivals a second (default inf: all at once)",
    )
    parser.add_argument("--num-prompts", type=int, default=10, metavar="N", help="requests (default 10)")
    parser.add_argument("--input-len", type=int, default=128, metavar="N", help="prompt tokens (default 128)")
    parser.add_argument(
        "--output-len", type=int, default=64, metavar="N", help="generated tokens (default 64)"
    )
    parser.add_argument(
        "--max-concurrency",
        type=int,
        metavar="N",
        help="requests sent and not yet done, at most; TTFT then holds no waiting for the others",
    )
    parser.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="service levels, e.g. ttft:500 tpot:50 e2el:5000",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals (default 0)")
    parser.add_argument(
        "--machine", metavar="NAME|FILE", help="machine to simulate (default: the one compiled for)"
    )
    parser.add_argument("--result", type=Path, metavar="FILE", help="also write everything as JSON")
    add_json_option(parser, "print everything as JSON, by vLLM's names")
    return parser


if __name__ == "__main__":
    sys.exit(main())
