"""`tyir-sim OUT/{n}die`: how fast the compiled programs run, what bounds them, how sure that is."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tyir.diagnostics import TyirError
from tyir.process.files import download_hint
from tyir.tools.cli import ToolParser, add_json_option, run_tool, write_output

if TYPE_CHECKING:
    from tyir.ir import Op
    from tyir.manifest import Manifest
    from tyir.runtime_sim.timing.predictor import Predictor
    from tyir.runtime_sim.timing.program import EdgeProgram
    from tyir.runtime_sim.timing.summary import Summary
    from tyir.targets.collectives import CollectiveNeed
    from tyir.targets.machine import Machine

__all__ = ["main", "make_parser"]


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = make_parser().parse_args(argv)
    if args.json:
        args.report = "json"
    if missing := [str(p) for p in args.artifacts if not p.exists()]:
        hint = download_hint(missing[0])
        raise TyirError(
            f"{', '.join(missing)} does not exist",
            help=f"{hint}, and compiled (tyir-compile)"
            if hint
            else "give the folder that tyir-compile printed, for example out/4die",
        )
    if args.top < 0:
        raise TyirError(f"--top {args.top} is negative", help="--top 0 lists no ops")
    if args.report == "html" and (args.compare or args.sweep):
        raise TyirError("there is no HTML page of a comparison or a sweep", help="use --report text or json")
    if args.compare:
        write_output(_compare(args) + "\n", args.output)
        return 0
    predictor, name, manifest = _predictor(args.artifacts, args)
    if args.check_plan:
        write_output(_check_plan(predictor) + "\n", args.output)
        return 0
    prompt, pos = _positions(args, predictor)
    if args.sweep:
        write_output(_sweep(args, predictor, prompt, pos) + "\n", args.output)
        return 0
    if args.trace:
        from tyir.runtime_sim.timing.trace import chrome_trace

        write_output(chrome_trace(predictor.step(min(predictor.seqlens), pos)), str(args.trace))
    write_output(
        _report(args, _summary(args, predictor, name, manifest, prompt, pos), predictor) + "\n", args.output
    )
    return 0


# ------------------------------------------------------------------------------------------- what to simulate


def _predictor(paths: Sequence[Path], args: argparse.Namespace) -> tuple[Predictor, str, Manifest | None]:
    """The predictor of what was given, what to call it, and the manifest of a folder.

    An artifact folder, or the programs (`.edge10`, `.bin`) of all dies for one length.
    """
    from tyir.edge10.binary import read_program
    from tyir.runtime_sim.timing.predictor import Predictor
    from tyir.runtime_sim.timing.program import EdgeProgram

    if all(p.is_file() for p in paths):
        programs = [EdgeProgram(read_program(p)) for p in paths]
        lengths = {p.seqlen for p in programs}
        if len(lengths) > 1:
            raise TyirError(
                f"the programs are for different lengths: {', '.join(map(str, sorted(lengths)))}",
                help="give the files of all dies of one length",
            )
        name = str(paths[0]) if len(paths) == 1 else f"{len(programs)} programs"
        return (
            Predictor(
                lambda s: programs,
                tuple(lengths),
                _capacity(programs),
                _machine(args, lambda: _named_machine(programs[0])),
            ),
            name,
            None,
        )
    if len(paths) > 1:
        raise TyirError(
            "more than one folder given",
            help=(
                "give one artifact folder, or the .edge10 files of all dies for one length; --compare takes"
                " two folders"
            ),
        )
    from tyir.execution.artifacts import Artifacts
    from tyir.runtime_sim.timing.program import load_programs, machine_of

    artifacts = Artifacts.open(paths[0], check=not args.no_check)
    manifest = artifacts.manifest
    loaded: dict[int, list[EdgeProgram]] = {}

    def programs_of(seqlen: int) -> list[EdgeProgram]:
        if seqlen not in loaded:
            loaded[seqlen] = load_programs(artifacts, seqlen)
        return loaded[seqlen]

    machine = _machine(args, lambda: machine_of(artifacts))
    predictor = Predictor(programs_of, manifest.options.seqlens, manifest.options.max_kv, machine)
    return predictor, str(paths[0]), manifest


def _capacity(programs: Sequence[EdgeProgram]) -> int:
    """Positions of the cache, from its buffers."""
    return min(
        (
            _int_attribute(b, "tyir.capacity") or b.type.static_shape[2]
            for p in programs
            for b in p.buffers.values()
            if b.kind == "kv"
        ),
        default=1 << 30,
    )


def _int_attribute(op: Op, name: str) -> int | None:
    from tyir.attributes import IntegerAttr

    value = op.attributes.get(name)
    return value.value if isinstance(value, IntegerAttr) else None


def _machine(args: argparse.Namespace, compiled_for: Callable[[], Machine]) -> Machine:
    """The machine asked for, or the one that the programs were compiled for, with `--set` applied."""
    from tyir.targets.machine import load_machine

    machine = load_machine(args.machine) if args.machine else compiled_for()
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
    return machine.with_overrides(values)


def _named_machine(program: EdgeProgram) -> Machine:
    """The machine that a program names."""
    from tyir.attributes import StringAttr
    from tyir.targets.machine import load_machine

    name = program.module.attributes.get("tyir.machine")
    return load_machine(name.value if isinstance(name, StringAttr) else "edge10")


def _positions(args: argparse.Namespace, predictor: Predictor) -> tuple[int, int]:
    """Prompt length and decode position.

    By default a prompt of 128 tokens (less if the cache is smaller) and the position after it.
    """
    capacity, shortest = predictor.capacity, min(predictor.seqlens)
    prompt = args.prompt_tokens if args.prompt_tokens is not None else max(min(128, capacity - shortest), 1)
    pos = args.pos if args.pos is not None else min(prompt, capacity - shortest)
    if not 1 <= prompt <= capacity:
        raise TyirError(
            f"--prompt-tokens {prompt} is not in 1..{capacity}, the cache's positions",
            help=f"the nearest possible is {min(max(prompt, 1), capacity)}",
        )
    if pos < 0:
        raise TyirError(
            f"--pos {pos} is negative", help="it is the number of tokens in the cache, 0 for the first"
        )
    if pos > capacity - shortest:
        raise TyirError(
            f"--pos {pos} leaves no room for a step of {shortest} in a cache of {capacity}",
            help=f"give a position in 0..{capacity - shortest}",
        )
    return prompt, pos


# ------------------------------------------------------------------------------------------------ the answers


def _report(args: argparse.Namespace, summary: Summary, predictor: Predictor) -> str:
    if args.report == "json":
        return json.dumps(summary.as_json(), indent=1)
    if args.report == "html":
        from tyir.runtime_sim.report.html import html_report

        return html_report(summary, predictor)
    from tyir.runtime_sim.report.text import text_report

    return text_report(summary, args.top)


def _summary(
    args: argparse.Namespace,
    predictor: Predictor,
    name: str,
    manifest: Manifest | None,
    prompt: int,
    pos: int,
) -> Summary:
    from tyir.runtime_sim.timing.summary import summarize

    return summarize(
        predictor,
        name,
        prompt,
        pos,
        least=_least(manifest) if manifest is not None else None,
        curves=not args.compare,
        tornado=args.tornado and not args.compare,
    )


def _least(manifest: Manifest) -> Callable[[int], Sequence[CollectiveNeed]] | None:
    """The closed form of the collectives on the main die, for a step of so many tokens.

    None where the manifest does not say the model's sizes.
    """
    from tyir.passes.select_output import parse_output
    from tyir.targets.collectives import minimal_collectives

    layers, hidden, vocabulary = (
        manifest.model.get(name) for name in ("num_hidden_layers", "hidden_size", "vocab_size")
    )
    if not (isinstance(layers, int) and isinstance(hidden, int) and isinstance(vocabulary, int)):
        return None
    options = manifest.options
    return lambda tokens: minimal_collectives(
        layers,
        hidden,
        vocabulary,
        tokens * options.batch,
        options.dies,
        stages=options.pp,
        top_k=parse_output(options.output),
        embedding_as_input=options.embedding_as_input,
    )


def _compare(args: argparse.Namespace) -> str:
    """Two artifact folders (or two programs of one die) side by side."""
    if len(args.artifacts) != 2:
        raise TyirError(
            f"--compare takes two artifact folders, {len(args.artifacts)} given",
            help="tyir-sim --compare out/1die out/4die",
        )
    found = []
    for path in args.artifacts:
        predictor, name, manifest = _predictor([path], args)
        found.append(_summary(args, predictor, name, manifest, *_positions(args, predictor)))
    if args.report == "json":
        return json.dumps({"a": found[0].as_json(), "b": found[1].as_json()}, indent=1)
    from tyir.runtime_sim.report.text import compare_text

    return compare_text(found[0], found[1], args.top)


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
    rows = sweep(predictor, name, numbers, prompt, pos)
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
        nargs="+",
        metavar="OUT/{n}die",
        help="artifact folder, or the program files (.edge10, .bin) of all dies for one length",
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
        metavar="NAME|FILE",
        help="machine to simulate (default: the one the programs were compiled for)",
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
    parser.add_argument("--compare", action="store_true", help="compare two artifact folders")
    parser.add_argument(
        "--sweep", metavar="NAME=V,V,..", help="the figures for several values of one constant"
    )
    parser.add_argument(
        "--tornado",
        action="store_true",
        help="also show how far each assumed constant alone moves the time per token",
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
