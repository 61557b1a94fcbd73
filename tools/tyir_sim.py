"""`tyir-sim OUT/{n}die`: how fast the compiled programs run, what bounds them, how sure that is."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

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
    from tyir.runtime_sim.timing.predictor import Predictor
    from tyir.runtime_sim.timing.summary import Summary
    from tyir.tools.sim.sources import Choice, Lengths, Source

__all__ = ["main", "make_parser"]


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = make_parser().parse_args(argv)
    if args.json:
        args.report = "json"
    if args.top < 0:
        raise TyirError(f"--top {args.top} is negative", help="--top 0 lists no ops")
    check_ray_has_a_sweep(args, "dram.bandwidth_gbps=17,30,34")
    if args.probe_host is not None:
        write_output(_probe(args) + "\n", args.output)
        return 0
    if not args.artifacts:
        raise TyirError("there is nothing to simulate", help="give the folder that tyir-compile printed")
    if (host := _processor(args)) is not None:
        from tyir.tools.sim.host_report import host_report

        write_output(host_report(args, host, _values(args)) + "\n", args.output)
        return 0
    if args.threads is not None or args.clock is not None:
        raise TyirError(
            f"--{'threads' if args.threads is not None else 'clock'} is of processors, not of dies",
            help="give it with --probe-host, or --threads with --machine and the file that wrote",
        )
    if args.report == "html" and (args.compare or args.sweep is not None):
        raise TyirError("there is no HTML page of a comparison or a sweep", help="use --report text or json")
    if args.compare:
        write_output(_compare(args) + "\n", args.output)
        return 0
    if len(args.machine) > 1:
        raise TyirError(
            f"--machine is given {len(args.machine)} times",
            help="one machine is simulated at a time; --compare shows one artifact folder on two",
        )
    if len(args.artifacts) == 1 and _is_saved(args.artifacts[0]):
        write_output(_saved(args) + "\n", args.output)
        return 0
    source = _open(args.artifacts, args, _choices(args)[0])
    predictor = source.predictor
    if args.check_plan:
        write_output(_check_plan(predictor) + "\n", args.output)
        return 0
    lengths = _lengths(args)
    prompt, pos = source.lengths(lengths)
    if args.sweep is not None:
        write_output(_sweep(args, predictor, prompt, pos) + "\n", args.output)
        return 0
    if args.trace:
        from tyir.runtime_sim.timing.trace import chrome_trace

        write_output(chrome_trace(predictor.step(min(predictor.seqlens), pos)), str(args.trace))
    summary = source.summary(lengths, tornado=args.tornado)
    write_output(_report(args, summary, predictor) + "\n", args.output)
    return 0


# ------------------------------------------------------------------------------------------- what to simulate


def _open(paths: Sequence[Path], args: argparse.Namespace, choice: Choice) -> Source:
    from tyir.tools.sim.sources import open_source

    return open_source(paths, choice, check=not args.no_check)


def _is_saved(path: Path) -> bool:
    from tyir.tools.sim.sources import is_report

    return is_report(path)


def _lengths(args: argparse.Namespace) -> Lengths:
    from tyir.tools.sim.sources import Lengths

    return Lengths(args.prompt_tokens, args.pos)


def _probe(args: argparse.Namespace) -> str:
    """Measure this computer."""
    from tyir.tools.sim.host_report import probe_report

    if args.artifacts or args.machine or args.set:
        raise TyirError(
            "--probe-host measures this computer, whatever is compiled for it",
            help="leave out artifacts, --machine and --set",
        )
    return probe_report(args)


def _processor(args: argparse.Namespace) -> Path | None:
    """The file of a processor that is asked for as the machine."""
    from tyir.runtime_sim.host.machine import is_host_machine
    from tyir.targets.constants import read_file

    files = [Path(name) for name in args.machine if name.endswith(".toml") and Path(name).is_file()]
    found = [path for path in files if is_host_machine(read_file(path, "machine", "give another file"))]
    if found and len(args.machine) > 1:
        raise TyirError(
            f"{found[0]} is the file of a processor: it is not compared with other machines",
            help="give one --machine",
        )
    return found[0] if found else None


def _choices(args: argparse.Namespace) -> list[Choice]:
    """The machines asked for, with `--set` applied to each; the one that was compiled for when none is."""
    from tyir.tools.sim.sources import Choice

    values = _values(args)
    return [Choice(name, values) for name in args.machine or [None]]


def _values(args: argparse.Namespace) -> dict[str, float]:
    """What `--set` says, by the constants' names."""
    values: dict[str, float] = {}
    for setting in args.set:
        name, equals, value = setting.partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            raise TyirError(
                f"--set {setting}: '{value}' is not a number" if equals else f"--set {setting} lacks a value",
                help="write --set dram.bandwidth_gbps=34.1",
            ) from None
    return values


# ------------------------------------------------------------------------------------------------ the answers


def _saved(args: argparse.Namespace) -> str:
    """A saved report shown again."""
    from tyir.tools.sim.sources import read_report

    path = args.artifacts[0]
    _refuse_simulating(args, path)
    if args.report == "html":
        raise TyirError(
            f"{path} is a saved report, which holds no timeline for an HTML page",
            help="simulate the artifacts again with --report html",
        )
    return _report(args, read_report(path), None)


def _refuse_simulating(args: argparse.Namespace, path: Path) -> None:
    """What is asked of a simulation cannot be asked of a report that was saved."""
    asked = {
        "--set": bool(args.set),
        "--machine": bool(args.machine),
        "--prompt-tokens": args.prompt_tokens is not None,
        "--pos": args.pos is not None,
        "--sweep": args.sweep is not None,
        "--tornado": args.tornado,
        "--check-plan": args.check_plan,
        "--trace": args.trace is not None,
    }
    if flags := [flag for flag, given in asked.items() if given]:
        raise TyirError(
            f"{path} is a saved report: {' and '.join(flags)} would have to simulate",
            help="give the artifact folder instead of the report",
        )


def _report(args: argparse.Namespace, summary: Summary, predictor: Predictor | None) -> str:
    if args.report == "json":
        return json.dumps(summary.as_json(), indent=1)
    if args.report == "html" and predictor is not None:
        from tyir.runtime_sim.report.html import html_report

        return html_report(summary, predictor)
    from tyir.runtime_sim.report.text import text_report

    return text_report(summary, args.top)


def _compare(args: argparse.Namespace) -> str:
    """Two of: artifact folders, programs of one die, saved reports; or one of them on two machines."""
    from tyir.runtime_sim.report.comparison import compare_text
    from tyir.tools.sim.sources import Lengths, common_lengths, read_report

    paths, choices = list(args.artifacts), _choices(args)
    if len(paths) == 1 and args.machine:  # on the machine it was compiled for, unless two are named
        if len(choices) == 1:
            choices.insert(0, replace(choices[0], name=None))
        paths *= 2
    if len(paths) != 2 or len(choices) > 2:
        machines = f" and {len(choices)} machines" if len(choices) > 1 else ""
        raise TyirError(
            f"--compare takes two artifact folders, {len(args.artifacts)} given{machines}",
            help="tyir-sim out/1die --compare out/4die, or one folder with --machine twice",
        )
    if len(choices) == 1:
        choices *= 2
    saved = {i: read_report(p) for i, p in enumerate(paths) if _is_saved(p)}
    if len(saved) == 2:
        _refuse_simulating(args, paths[0])
    opened = {i: _open([p], args, choices[i]) for i, p in enumerate(paths) if i not in saved}
    lengths = _lengths(args)
    if saved and opened and lengths == Lengths(None, None):  # what the report was asked, or nearest to it
        told = next(iter(saved.values()))
        lengths = next(iter(opened.values())).within(Lengths(told.prompt_tokens, told.pos))
    if opened:
        lengths = common_lengths(list(opened.values()), lengths)
    both = [saved[i] if i in saved else opened[i].summary(lengths, curves=False) for i in range(2)]
    if args.report == "json":
        return json.dumps({"a": both[0].as_json(), "b": both[1].as_json()}, indent=1)
    return compare_text(both[0], both[1], args.top)


def _check_plan(predictor: Predictor) -> str:
    """Replay the memory plan of all programs; `TyirError` at the first thing wrong."""
    from tyir.runtime_sim.execution.check_accesses import check_lengths

    programs = {length: predictor.programs(length) for length in predictor.seqlens}
    commands = check_lengths(programs, predictor.machine, predictor.capacity)
    dies, lengths = len(next(iter(programs.values()))), ", ".join(map(str, programs))
    return (
        f"memory plan of {dies} die{'s' * (dies > 1)}, lengths {lengths}: {commands:,} commands replayed with"
        " an empty and a full cache; all within memory, nothing read before it is written, no buffers share"
        " bytes, no race, weights and caches at one address for all lengths"
    )


def _sweep(args: argparse.Namespace, predictor: Predictor, prompt: int, pos: int) -> str:
    """The figures for several values of one constant."""
    from tyir.runtime_sim.report.text import sweep_text
    from tyir.runtime_sim.timing.summary import sweep

    name, _, values = args.sweep.partition("=")
    try:
        numbers = [float(v) for v in values.split(",")]
    except ValueError:
        raise TyirError(
            f"--sweep {args.sweep}: '{values}' is not a list of numbers",
            help="write --sweep dram.bandwidth_gbps=17,30,34",
        ) from None
    if args.ray is None:
        rows = sweep(predictor, name, numbers, prompt, pos)
    else:
        from tyir.tools.cluster.ray_workers import RayWorkers
        from tyir.tools.sim.sweeps import swept

        for number in numbers:  # what is wrong with them is said before a worker is asked
            predictor.machine.with_overrides({name: number})
        workers = RayWorkers(args.ray)
        rows = swept(workers, args.artifacts, _choices(args)[0], name, numbers, prompt, pos)
    if args.report == "json":
        return json.dumps({"constant": name, "rows": [asdict(r) for r in rows]}, indent=1)
    return sweep_text(name, rows, prompt)


def make_parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="tyir-sim",
        description="Simulate the time that compiled command programs take on the device.",
        epilog=(
            "Every constant of the machine is in its .toml file with unit, source and bounds; --set changes"
            " one for this run."
        ),
    )
    parser.add_argument(
        "artifacts",
        type=Path,
        nargs="*",
        metavar="OUT/{n}die",
        help=(
            "artifact folder, or the program files (.edge10, .bin) of all dies for one length, or a report"
            " saved with --report json"
        ),
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help="length of the prompt for the time to first token (default 128)",
    )
    parser.add_argument(
        "--pos",
        type=int,
        metavar="N",
        help="cached tokens for the time per output token (default: the prompt's)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a constant, e.g. dram.bandwidth_gbps=34.1; may be repeated",
    )
    parser.add_argument(
        "--machine",
        action="append",
        default=[],
        metavar="NAME|FILE",
        help=(
            "machine to simulate (default: the one the programs were compiled for); with --compare, twice for"
            " one artifact folder on two; a file that --probe-host wrote: the host's code on that processor"
        ),
    )
    parser.add_argument(
        "--probe-host",
        type=Path,
        metavar="FILE",
        help="measure this computer's processor, a minute or two, and write its machine file",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="of a processor: the most to measure (all cores), or those to predict for (all measured)",
    )
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        help="measure by the wall's clock (default) or, on busy cores, the processor's: one thread",
    )
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write the decode step as a Chrome trace (JSON, opens in Perfetto)",
    )
    parser.add_argument(
        "--report",
        choices=("text", "json", "html"),
        default="text",
        help="how to print the result (default text)",
    )
    add_json_option(parser, "the same as --report json")
    parser.add_argument(
        "-o", "--output", default="-", metavar="FILE", help="where the report goes (default: standard output)"
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help=(
            "compare two: artifact folders, programs, reports saved as JSON, or one of them on two machines"
        ),
    )
    parser.add_argument(
        "--sweep", metavar="NAME=V,V,..", help="the figures for several values of one constant"
    )
    add_ray_option(
        parser,
        "have the values of --sweep simulated by the workers of a Ray cluster, that of this machine (auto) or"
        " another; the figures are the same",
    )
    parser.add_argument(
        "--tornado",
        action="store_true",
        help=("also show how far each assumed constant alone moves the device's part of the time per token"),
    )
    parser.add_argument(
        "--check-plan",
        action="store_true",
        help="no times: replay every command's memory accesses and say whether the memory plan holds",
    )
    parser.add_argument("--top", type=int, default=12, metavar="N", help="how many ops to list (default 12)")
    parser.add_argument("--no-check", action="store_true", help="do not verify the artifacts' hashes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
