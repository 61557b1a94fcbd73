"""Dies in several processes beside all of them in one: milliseconds a token, what passes between, and what
the links of a cluster file say it should take.

    python -m tyir.tools.bench.processes out/2die --processes 2 --measure-links cluster.toml
    python -m tyir.tools.bench.processes out/4die --processes 2 --cluster cluster.toml
    python -m tyir.tools.bench.processes out/4die --hosts 10.0.0.1,10.0.0.2 --cluster cluster.toml
    python -m tyir.tools.bench.processes out/2die --processes 2 --prompt 1024

The first writes what messages and exchanges take, without the model; the others predict with it.  What each
process does in a step is timed without the others and without links (`tyir.runtime_sim.processes.rehearsal`),
and played through with the links' figures: no step of a group is looked at for its prediction.  With
`--prompt` a prompt is timed instead of tokens, whole and chunk by chunk, which keeps pipeline stages from
working on several (each chunk then computes a row of logits as well).  Wall time, medians; one process and
several take turns, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tyir.tools.cli import ToolParser, run_tool
from tyir.tools.run.arguments import add_group_arguments, whole

if TYPE_CHECKING:
    from tyir.runtime_sim.processes.group import DieGroup
    from tyir.runtime_sim.session.session import Session

_ROUNDS = 9
_PROMPTS = 5  # rounds of prompts
_TURNS = 20  # of measuring links
_COUNT = 300  # of messages and exchanges, each time
_USUAL = 0.95  # the share of them that counts
_SMALL, _LARGE = 64, 1 << 20  # bytes of the messages that links are measured with


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = make_parser().parse_args(argv)
    from tyir.runtime_sim.processes.rehearsal import Rehearsal, played
    from tyir.runtime_sim.session.session import Session
    from tyir.targets.cluster import load_cluster
    from tyir.tools.run.group_of import open_with_group

    alone = Session(args.artifacts, threads=args.threads)
    args.engine = "host"
    artifacts, group = open_with_group(args, check=True)
    if group is None:
        print("one process: nothing passes between processes")
        return 0
    with group:
        if args.measure_links is not None:
            args.measure_links.write_text(_measured(group), encoding="utf-8")
            print(args.measure_links)
            return 0
        together = Session(artifacts, group=group)
        if args.prompt is not None:
            print(_prompts(alone, together, args.prompt))
            return 0
        for session in (alone, together):
            _tokens(session, 4)
        before = group.traffic
        _tokens(together, args.tokens)
        met, messages, sent = ((b - a) / args.tokens for a, b in zip(before, group.traffic))
        places, options = group.places, artifacts.manifest.options
        rehearsals = [Rehearsal(artifacts, range(options.dies), args.threads)]
        for rank, dies in enumerate(places):
            own = None if group.cores is None else group.cores[rank]
            rehearsals.append(Rehearsal(artifacts, dies, group.threads[rank], own))
        rounds = []
        for _ in range(_ROUNDS):
            rounds.append([_tokens(session, args.tokens) for session in (alone, together)])
            for rehearsal in rehearsals if args.cluster is not None else ():
                rehearsal.steps(args.tokens)
        one, several = (float(np.median([t for r in rounds for t in r[i]])) for i in range(2))
        print(f"{args.artifacts}: {options.dies} dies in {len(places)} processes {places}")
        print(f"one process {one * 1e3:.2f} ms a token, {len(places)} processes {several * 1e3:.2f} ms")
        print(f"a token: {met:.1f} collectives, {messages:.1f} messages, {sent / 1e3:.2f} kB from the first")
        if args.cluster is not None:
            here = tuple(sorted(os.sched_getaffinity(0)))
            cores = None if args.hosts else group.cores or (here,) * len(places)
            every, *parts = (rehearsal.part for rehearsal in rehearsals)
            around = max(one - math.fsum(event.seconds for event in every.events), 0.0)  # choosing a token
            predicted = played(parts, load_cluster(args.cluster), cores) + around
            print(
                f"predicted from {args.cluster} {predicted * 1e3:.2f} ms, {predicted / several - 1:+.0%} of"
                " what was measured"
            )
    return 0


def _tokens(session: Session, count: int) -> list[float]:
    """Seconds of each of so many tokens after a short prompt."""
    session.reset()
    times = [time.perf_counter() for _ in session.generate([5, 17, 99, 4], count + 1)]
    return [b - a for a, b in zip(times, times[1:])]  # noqa: RUF007 - of a list, shorter


def _prompts(alone: Session, together: Session, tokens: int) -> str:
    """What a prompt takes, in words."""
    ids = [5 + number % 90 for number in range(tokens)]
    chunk = max(together.manifest.options.seqlens)
    ways: dict[str, Callable[[], object]] = {
        "one process": lambda: alone.prefill(ids),
        "several processes": lambda: together.prefill(ids),
        "several processes, chunk by chunk": lambda: [
            together.prefill(ids[first : first + chunk]) for first in range(0, tokens, chunk)
        ],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(_PROMPTS + 1):
        for name, run in ways.items():
            for session in (alone, together):
                session.reset()
            began = time.perf_counter()
            run()
            if round_:  # the first touches weights and caches
                times[name].append(time.perf_counter() - began)
    said = ", ".join(f"{name} {float(np.median(t)):.3f} s" for name, t in times.items())
    return f"a prompt of {tokens} tokens in chunks of {chunk}: {said}"


def _measured(group: DieGroup) -> str:
    """A cluster file of this group's links.

    In turns, as what else the machine does changes within seconds; a token has many exchanges, so that
    their mean counts, without the few that something else got in the way of.
    """

    def usual(values: Sequence[float]) -> float:
        return float(np.mean(np.sort(values)[: round(len(values) * _USUAL)]))

    kinds = (
        partial(group.round_trips, _SMALL, _COUNT),
        partial(group.round_trips, _LARGE, _COUNT // 10),
        partial(group.exchanges, _SMALL, _COUNT),
    )
    for run in kinds:
        run()  # warm
    rounds = [[run() for run in kinds] for _ in range(_TURNS)]
    small, large, each = (usual([t for of in rounds for t in of[kind]]) for kind in range(len(kinds)))
    small, large = small / 2, large / 2
    rate = (_LARGE - _SMALL) / max(large - small, 1e-9)
    exchange = each - small
    values = {
        "hop_us": small * 1e6,
        "bandwidth_gbps": rate * 1e-9,
        "exchange_us": max(exchange, 0.0) * 1e6 / (len(group.places) - 1),
    }
    lines = ['name = "measured"', "", "[link]"]
    source = "python -m tyir.tools.bench.processes --measure-links"
    lines += [
        f'{name} = {{ value = {value:.4g}, label = "fitted", source = "{source}" }}'
        for name, value in values.items()
    ]
    return "\n".join(lines) + "\n"


def make_parser() -> argparse.ArgumentParser:
    """The parser."""
    parser = ToolParser(
        prog="python -m tyir.tools.bench.processes",
        description="Time dies in several processes beside all in one, and beside what a cluster file says.",
    )
    parser.add_argument("artifacts", type=Path)
    parser.add_argument("--tokens", type=whole, default=60, metavar="N", help="of each round (default 60)")
    parser.add_argument("--prompt", type=whole, metavar="N", help="time a prompt of so many tokens instead")
    parser.add_argument("--threads", type=int, metavar="N", help="of each process")
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="the links between the machines")
    parser.add_argument(
        "--measure-links", type=Path, metavar="FILE", help="only measure them, and write FILE"
    )
    add_group_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
