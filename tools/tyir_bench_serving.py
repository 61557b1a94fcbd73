"""`tyir-bench-serving OUT/{n}die`: how the compiled model serves a stream of requests, in vLLM's words.

tyir-bench-serving out/4die --request-rate 0.2 --num-prompts 20 --input-len 128 --output-len 64
tyir-bench-serving out/4die --trace requests.jsonl --engine host --result result.json
tyir-bench-serving out/4die --sweep request-rate=0.1,0.2,0.5,inf --ray auto
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyir.diagnostics import TyirError
from tyir.tools.cli import (
    ToolParser,
    add_json_option,
    add_ray_option,
    check_ray_has_a_sweep,
    run_tool,
    write_output,
)

if TYPE_CHECKING:
    from tyir.tools.sim.requests import Asked

__all__ = ["main", "make_parser"]


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = make_parser().parse_args(argv)
    from tyir.runtime_sim.serving.benchmark import text_block
    from tyir.tools.sim.requests import Asked, served

    numbers = {f.name: getattr(args, f.name) for f in fields(Asked) if f.name != "slos"}
    asked = Asked(**numbers, slos=_slos(args.goodput))
    asked.check()
    check_ray_has_a_sweep(args, "request-rate=0.1,0.2,inf")
    if args.sweep is not None:
        whole, text = _swept(args, asked)
    else:
        whole = served(asked)
        text = f"{text_block(whole)}\n{whole['note']}"
    print(json.dumps(whole, indent=1) if args.json else text)
    if args.result:
        write_output(json.dumps(whole, indent=1), str(args.result))
    return 0


def _swept(args: argparse.Namespace, asked: Asked) -> tuple[dict[str, Any], str]:
    """The figures for several values of one number of the requests, as data and as a table."""
    from tyir.runtime_sim.serving.benchmark import sweep_block
    from tyir.tools.cluster.ray_workers import ray_workers
    from tyir.tools.sim.requests import with_value
    from tyir.tools.sim.sweeps import served_each

    if args.ray is not None and args.engine != "sim":
        raise TyirError(
            f"--engine {args.engine} measures this computer, --ray would use others",
            help="leave --ray out, or --engine for the timing simulator",
        )
    name, _, values = args.sweep.partition("=")
    settings = [with_value(asked, name, value) for value in values.split(",")]
    rows = served_each(ray_workers(args.ray), settings)
    found = [{"value": getattr(s, name.replace("-", "_")), **row} for s, row in zip(settings, rows)]
    return {"sweep": name, "rows": found}, f"{sweep_block(name, found)}\n{rows[0]['note']}"


def _slos(items: Sequence[str]) -> dict[str, float]:
    from tyir.runtime_sim.serving.benchmark import SLOS

    slos: dict[str, float] = {}
    for item in items:
        name, _, value = item.partition(":")
        try:
            slos[name] = float(value)
        except ValueError:
            name = ""
        if name in SLOS and not 0 < slos[name] < math.inf:
            raise TyirError(
                f"--goodput {item}: no request can be held to {value} ms",
                help="give a time above 0, such as ttft:500",
            )
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
    parser.add_argument(
        "--sweep",
        metavar="NAME=V,V,..",
        help="a line for each of several values of request-rate, num-prompts, input-len, output-len,"
        " max-concurrency or seed",
    )
    add_ray_option(
        parser,
        "have the values of --sweep simulated by the workers of a Ray cluster, that of this machine (auto) or"
        " another; the figures are the same",
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
