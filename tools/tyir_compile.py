"""`tyir-compile (HF_DIR | model.ir) -o out/`: a model becomes a folder of artifacts.

A checkpoint, or a module at any stage.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

from tyir.artifacts.vision import VISION_EXPONENT, VisionSplit
from tyir.diagnostics import TyirError
from tyir.manifest import BuildOptions
from tyir.tools.cli import ToolParser, add_json_option, add_ray_option, note, run_tool, warn, whole_number
from tyir.tools.commands.build_arguments import (
    add_base_option,
    add_build_options,
    add_image_option,
    add_vision_tower_option,
    numbers,
    sparse,
)
from tyir.tools.commands.cache_options import add_cache_options, cache_of

if TYPE_CHECKING:
    from tyir.process.stopwatch import Stopwatch
    from tyir.tools.commands.json_forms import Artifacts
    from tyir.tools.estimate.cards import OnCards

__all__ = ["main", "make_parser", "numbers"]

_CARDS: Final = 2


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = make_parser().parse_args(argv)
    options = {
        f.name: value for f in fields(BuildOptions) if (value := getattr(args, f.name, None)) is not None
    }
    if args.plan and args.model.suffix == ".ir":
        raise TyirError(
            f"--plan reads a checkpoint's config.json, {args.model} is a module",
            help="give the folder that it was imported from",
        )
    if args.cluster is None:
        if args.cards is not None:
            raise TyirError(
                f"--cards {args.cards} says nothing without the links between the cards",
                help="add --cluster FILE (docs/processes.md), or leave --cards out",
            )
        return _run(args, options, args.machine)
    with _on_cards(args, options) as (machine, rows, stages):
        return _run(args, options | stages, machine, rows)


@contextmanager
def _on_cards(
    args: argparse.Namespace, options: Mapping[str, Any]
) -> Iterator[tuple[str, Sequence[OnCards], dict[str, int]]]:
    """A machine file whose packages are cards, linked as --cluster says; what a token takes on them, for
    --plan and to choose a checkpoint's pipeline stages; and the option that gives these.
    """
    from tyir.targets.cluster import load_cluster
    from tyir.targets.machine import load_machine
    from tyir.tools.api import check_options
    from tyir.tools.estimate.cards import check_cards, fastest_on_cards
    from tyir.tools.estimate.group_size import settle_group_size
    from tyir.tools.estimate.plan import on_cards

    module = args.model.suffix == ".ir"
    if module and "dies" not in options:
        raise TyirError(
            "how many dies the cards have is not said", help="repeat the --dies that the .ir file is for"
        )
    cards = _CARDS if args.cards is None else args.cards
    cluster, dies = load_cluster(args.cluster), options.get("dies", BuildOptions.dies)
    check_cards(dies, cards)
    machine = cluster.joined(load_machine(args.machine or "edge10"), dies // cards)
    with tempfile.TemporaryDirectory(prefix="tyir-cards-") as folder:
        file = Path(folder) / "machine.toml"
        file.write_text(machine.as_toml(), encoding="utf-8")
        free = not module and args.model_plugin is None and options.keys().isdisjoint(("pp", "mesh"))
        if not (free or args.plan):
            yield str(file), (), {}
            return
        settled = BuildOptions(**settle_group_size(args.model, options))
        check_options(settled)
        rows = tuple(on_cards(args.model, settled, file, cards, args.base, args.vision_tower))
        fastest = fastest_on_cards(rows, machine) if free else None
        if fastest is None:
            yield str(file), rows, {}
            return
        taken = fastest.spread.stages
        times = ", ".join(f"{r.spread.token * 1e3:.3g} ms in {r.spread.stages}" for r in rows)
        if not args.plan:  # which has a table
            note(f"pipeline stages: {taken} (simulated, a token takes {times}; --pp {taken} to pin it)")
        yield str(file), rows, {"pp": taken}


def _run(
    args: argparse.Namespace,
    options: Mapping[str, Any],
    machine: str | None,
    cards: Sequence[OnCards] = (),
) -> int:
    """Plan or compile, for the machine of a name or file; `cards`: what a plan says of several cards."""
    from tyir.process.stopwatch import Stopwatch
    from tyir.tools.api import compile_path
    from tyir.tools.cluster.ray_workers import ray_workers

    if args.plan:
        unused = [
            f"{name} {value}"
            for name, value in (("-o", args.out), ("--json-log", args.json_log))
            if value is not None
        ]
        if unused:
            are = "is" if len(unused) == 1 else "are"
            warn(f"{', '.join(unused)} {are} not used: --plan writes nothing")
        return print_plan(
            args.model,
            options,
            args.image,
            args.base,
            machine,
            vision_tower=args.vision_tower,
            cards=cards,
            as_json=args.json,
        )
    if args.out is None:
        raise TyirError("no output folder", help="add -o out/, or --plan to see what would be needed")
    watch = Stopwatch(told=_log(args.json_log))
    of_folders = {
        "--model-plugin is for checkpoint folders": args.model_plugin,
        "--base is for folders of adapters": args.base,
        "--vision-tower is for checkpoint folders": args.vision_tower,
    }
    for what, given in of_folders.items():
        if given is not None and args.model.suffix == ".ir":
            raise TyirError(
                f"{what}; a module has been imported already",
                help="give it to tyir-import",
            )
    from tyir.frontends.plugin import plugin_of

    target = compile_path(
        args.model,
        args.out,
        options,
        watch=watch,
        progress=not args.quiet,
        mcpu=args.mcpu,
        host_activations=args.host_activations,
        warn=warn,
        say=note,
        plugin=plugin_of(args.model_plugin, args.vision_tower),
        base=args.base,
        awq_table=args.awq_table,
        calibration=args.calibration,
        binary=args.binary,
        machine=machine,
        backend=args.backend,
        images=args.image,
        vision_dies=args.vision_dies,
        vision_die_map=args.vision_die_map or (),
        vision_exponent=args.vision_exponent,
        jobs=args.jobs,
        cache=cache_of(args),
        workers=ray_workers(args.ray),
        vision_split=args.vision_split,
        tune=args.tune,
    )
    if args.timing:
        print(watch.report(), file=sys.stderr)
    if watch.told is not None:
        watch.told({"event": "done", "artifacts": str(target)})
    if args.json:
        from tyir.tools.commands.json_forms import print_json

        print_json(_facts(target, watch))
    else:
        print(target)
    return 0


def _log(path: Path | None) -> Callable[[Mapping[str, object]], None] | None:
    """Writes what happens to a file, an object a line."""
    if path is None:
        return None
    import json
    import threading
    import time

    from tyir.process.progress import report_to

    file = path.open("a", buffering=1, encoding="utf-8")  # open until the command ends
    lock = threading.Lock()

    def told(event: Mapping[str, object]) -> None:
        line = json.dumps({"time": round(time.time(), 3), **event})
        with lock:
            file.write(line + "\n")

    report_to(told)
    return told


def _facts(target: Path, watch: Stopwatch) -> Artifacts:
    from tyir.manifest import MANIFEST
    from tyir.process.files import load_json
    from tyir.tools.commands.json_forms import Artifacts, Stage

    manifest = load_json(target / MANIFEST)  # written a moment ago: as it should be
    return Artifacts(
        artifacts=str(target),
        files=len(manifest["files"]) + 1,
        bytes=sum(f.stat().st_size for f in target.rglob("*") if f.is_file()),
        options={option.name: manifest["options"][option.name] for option in fields(BuildOptions)},
        seconds=sum(s.seconds for s in watch.stages),
        stages=tuple(Stage(s.name, s.seconds, s.peak_mib, s.cpu_seconds) for s in watch.stages),
    )


def print_plan(
    model: Path,
    given: Mapping[str, Any],
    images: Sequence[tuple[int, int]] = (),
    base: Path | None = None,
    machine: str | None = None,
    *,
    vision_tower: Path | None = None,
    cards: Sequence[OnCards] = (),
    as_json: bool = False,
) -> int:
    """Print the plan of a compile; `TyirError` when something does not fit."""
    from tyir.tools.api import check_options
    from tyir.tools.estimate.group_size import settle_group_size
    from tyir.tools.estimate.plan import make_plan

    options = BuildOptions(**settle_group_size(model, given))
    check_options(options)
    plan = make_plan(model, options, machine or "edge10", images, base, vision_tower, long=True, cards=cards)
    if as_json:
        from tyir.tools.commands.json_forms import print_json

        print_json(plan.as_form())
    else:
        print(plan.text())
    if plan.problems:
        raise TyirError(plan.problems)
    return 0


def _jobs(text: str) -> int:
    if (number := whole_number(text)) < 1:
        raise TyirError(f"{number} jobs: at least 1", help="leave --jobs out for one a processor")
    return number


def make_parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="tyir-compile",
        description=(
            "Compile a Hugging Face checkpoint, or a module written by tyir-import or tyir-opt, into"
            " OUT/{n}die."
        ),
        epilog=(
            "What an .ir file has been built with already holds where an option is not given; an option that"
            " contradicts it is an error.  On success the only line on stdout is the folder of the artifacts;"
            " nothing has to be renamed, copied or deleted by hand."
        ),
    )
    parser.add_argument("model", type=Path, help="checkpoint folder, or an .ir file at any stage")
    parser.add_argument("-o", "--out", type=Path, metavar="OUT", help="artifacts go to OUT/{n}die")
    add_build_options(parser)
    parser.add_argument(
        "--model-plugin",
        type=Path,
        metavar="FILE",
        help="Python file that says how a checkpoint of your own is read (docs/model-plugin.md)",
    )
    add_base_option(parser)
    add_vision_tower_option(parser)
    add_image_option(parser)
    parser.add_argument(
        "--vision-dies", type=int, metavar="M", help="dies of the vision tower (default: those of --dies)"
    )
    parser.add_argument(
        "--vision-split",
        choices=get_args(VisionSplit),
        default="cost",
        help=(
            "how the vision tower is cut over its dies: by heads and inner channels, by rows of patches with"
            " all weights on every die, or as the machine file says is faster (default)"
        ),
    )
    parser.add_argument(
        "--vision-exponent",
        type=int,
        metavar="K",
        help=(
            "divide the residual stream of the vision tower by 2^K, exactly, so that f16 holds it (default"
            f" {VISION_EXPONENT}); tyir-verify shows how large it gets"
        ),
    )
    parser.add_argument(
        "--vision-die-map",
        type=numbers,
        metavar="D,D,..",
        help="physical dies of the vision tower, the main one first (default: those of --die-map)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="with --weights awq: text, .jsonl or .parquet; without it the model generates its own",
    )
    parser.add_argument(
        "--awq-table",
        type=Path,
        metavar="FILE",
        help="AWQ table (.safetensors) that the weights are scaled and quantised with (docs/quantise.md)",
    )
    parser.add_argument(
        "--die-map",
        type=numbers,
        metavar="D,D,..",
        help="physical dies, the main one first (default 0,1,..)",
    )
    parser.add_argument(
        "--mesh",
        type=numbers,
        metavar="G,N",
        help=(
            "the dies of a stage as G groups of N: sums go first within a group, then between them (default:"
            " packages)"
        ),
    )
    parser.add_argument(
        "--plan", action="store_true", help="only say, from config.json, what the compile would need and make"
    )
    parser.add_argument(
        "--embedding-as-input",
        action="store_const",
        const=True,
        help="the host embeds the tokens; the table goes to embedding.params",
    )
    parser.add_argument(
        "--kv-dtype",
        choices=("fp16", "int8", "int4"),
        help=(
            "what the caches hold: fp16 (default), int8 with a scale per head and token, or int4 with one per"
            " head, token and 32 channels (keys that it would not hold are of 8 bits, by layer)"
        ),
    )
    parser.add_argument(
        "--kv-layout",
        choices=("HND", "NHD"),
        help=(
            "what follows what in a cache: a head's tokens (HND, default: attention reads long runs) or a"
            " token's heads (NHD: a token is written as one)"
        ),
    )
    parser.add_argument(
        "--kv-split",
        choices=("auto", "heads", "tokens"),
        help=(
            "what dies have of a cache with fewer heads than dies: copies of a head (heads), blocks of its"
            " tokens in turn (tokens), or as the machine file says is faster, half full (auto, default)"
        ),
    )
    parser.add_argument(
        "--sparse-prefill",
        type=sparse,
        metavar="keep=N,..",
        help=(
            "steps of the longest length see N blocks of the cache for each of its heads, chosen from"
            " real scores, beside the last tokens; the end of a prompt and generated tokens see all of it"
            " (docs/sparse-prefill.md); also block=, window= and every= (256, 1024, 4); default: all steps"
            " see all"
        ),
    )
    parser.add_argument(
        "--output",
        metavar="KIND",
        help="what a step returns: logits (default), argmax, or topk=K: the K best tokens",
    )
    parser.add_argument(
        "--output-rows",
        choices=("all", "last"),
        help=(
            "of which tokens a step returns it: all (default), or the last of each sequence, which is what"
            " generation needs: the head is computed for one row; echo with logprobs, perplexity and"
            " prompt_logprobs need all"
        ),
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="B",
        help="sequences per step (default 1); weights are read once for all of them",
    )
    parser.add_argument(
        "--machine",
        metavar="NAME|FILE",
        help="die that the command programs are scheduled for (default edge10; docs/machines.md)",
    )
    parser.add_argument(
        "--cluster",
        type=Path,
        metavar="FILE",
        help="the dies lie on cards in several machines, linked as this file says (docs/processes.md): cuts"
        " are chosen for it, and --pp of a checkpoint too: one stage or one a card, as a token is quicker",
    )
    parser.add_argument(
        "--cards", type=whole_number, metavar="N", help=f"of --cluster: how many (default {_CARDS})"
    )
    parser.add_argument(
        "--backend",
        default="edge10",
        metavar="NAME",
        help="what writes the artifacts (default edge10; docs/backends.md)",
    )
    parser.add_argument(
        "--binary",
        action="store_true",
        help="write command programs as bytes (.bin, a sixth of the size) instead of text (.edge10)",
    )
    parser.add_argument(
        "--mcpu", help="host CPU the libraries are built for, an LLVM name (default: this machine's)"
    )
    parser.add_argument(
        "--tune",
        type=whole_number,
        metavar="SECONDS",
        help="try for so long how this processor reads weights fastest, on the model's own products"
        " (docs/host.md); results are the same bits",
    )
    parser.add_argument(
        "--json-log",
        type=Path,
        metavar="FILE",
        help="append what happens to FILE, a JSON object a line: stages with time and memory, progress",
    )
    parser.add_argument(
        "--jobs",
        type=_jobs,
        metavar="N",
        help="threads that write weights, beside the one that makes programs (default: one a processor);"
        " artifacts are the same bytes for every N",
    )
    add_ray_option(
        parser,
        "have weights computed and host code built by the workers of a Ray cluster, that of this machine"
        " (auto) or another; artifacts are the same bytes",
    )
    add_cache_options(parser)
    parser.add_argument(
        "--host-activations",
        choices=("fp32", "int16", "int8"),
        help="what the host's code multiplies 4-bit weights with: int16, fast and as exact as f16 (default"
        " where the processor has AVX2), fp32, or int8: faster prompts, and an error of its own"
        " (docs/host.md)",
    )
    parser.add_argument(
        "--timing", action="store_true", help="print time and peak memory of each stage on stderr"
    )
    add_json_option(parser, "print the folder with what was built, or the plan, as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
