"""The arguments that commands which run artifacts share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from tyir.diagnostics import TyirError

__all__ = [
    "add_answer_arguments",
    "add_engine_argument",
    "add_group_arguments",
    "add_picture_settings",
    "add_threads_argument",
    "any_number",
    "frames_per_second",
    "whole",
]

_FRAMES_PER_SECOND: Final = 2.0  # runtime_sim/vision/preprocessor.py's, which is not loaded for --help


def any_number(text: str) -> float:
    """A number of any size, NaN too: `make_sampler` says for each argument what is in range."""
    return float(text)


def whole(text: str) -> int:
    """The same for whole numbers."""
    return int(text)


any_number.__name__, whole.__name__ = "float", "int"  # what argparse calls them in its complaints


def frames_per_second(args: argparse.Namespace, *, pictures: bool) -> float:
    """`--fps`, or what it is without; `TyirError` for settings of pictures where a model takes none."""
    given = ["--fps"] * (args.fps is not None) + ["--resize"] * args.resize
    if given and not pictures:
        raise TyirError(
            f"{', '.join(given)}: {args.artifacts} is a model of text, which takes no pictures or videos",
            help=f"leave {' and '.join(given)} out",
        )
    return _FRAMES_PER_SECOND if args.fps is None else float(args.fps)


def add_picture_settings(group: argparse._ArgumentGroup) -> None:
    """What is done to pictures and videos before a model sees them."""
    group.add_argument(
        "--fps", type=any_number, help=f"frames in a second of each video (default {_FRAMES_PER_SECOND:g})"
    )
    group.add_argument(
        "--resize",
        action="store_true",
        help="bring a picture whose size was not compiled to the nearest that was, instead of refusing it",
    )


def add_engine_argument(parser: argparse.ArgumentParser) -> None:
    """What executes the programs."""
    parser.add_argument(
        "--engine",
        choices=("host", "interpreter", "edge10"),
        default="host",
        help="what executes the programs (default host)",
    )


def add_threads_argument(parser: argparse.ArgumentParser) -> None:
    """In how many threads, where it has several."""
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads of the host engine (default: the cores that this process may use)",
    )


def add_group_arguments(parser: argparse.ArgumentParser) -> None:
    """In how many processes, and on which machines."""
    group = parser.add_argument_group("dies in several processes")
    group.add_argument(
        "--processes",
        type=whole,
        metavar="N",
        help="share the dies among so many processes of this machine (default: this one alone)",
    )
    group.add_argument(
        "--hosts",
        metavar="HERE,HOST..",
        help=(
            "share them among machines: an address of this one that the others reach, then those where"
            " tyir-rank waits, as HOST or HOST:PORT"
        ),
    )


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    """The artifacts, how tokens are chosen and how many, the cache, and what executes the programs."""
    parser.add_argument("artifacts", type=Path, help="the folder tyir-compile printed, for example out/4die")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FILE",
        help=(
            "begin with the cache in this file, if it exists, and write it there at the end: a longer prompt"
            " computes only its new tokens"
        ),
    )
    parser.add_argument(
        "--max-tokens",
        type=whole,
        default=64 if parser.prog == "tyir-run" else 512,
        metavar="N",
        help="tokens to generate at most for each prompt (default %(default)s)",
    )
    parser.add_argument(
        "--temperature", type=any_number, default=0.0, help="0 (default) takes the most likely token"
    )
    parser.add_argument(
        "--top-k",
        type=whole,
        default=0,
        help="sample among the k most likely tokens (0: all that the program returns)",
    )
    parser.add_argument(
        "--top-p",
        type=any_number,
        default=1.0,
        help="sample among the fewest tokens of this total probability (without --top-k of the whole"
        " vocabulary: an error where the program returns too few tokens to tell)",
    )
    parser.add_argument(
        "--min-p",
        type=any_number,
        default=0.0,
        help="sample among tokens that have at least this share of the best one's probability",
    )
    parser.add_argument("--seed", type=whole, help="makes sampling repeatable")
    add_engine_argument(parser)
    add_threads_argument(parser)
    add_group_arguments(parser)
    parser.add_argument(
        "--dense",
        action="store_true",
        help="let all steps of a prompt see the whole cache, also where --sparse-prefill has made others",
    )
    parser.add_argument("--no-check", action="store_true", help="verify the hashes of the libraries only")
