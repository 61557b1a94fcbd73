"""The command-line options that say where finished pieces are kept.

Here so that `--help` of the tools that share them loads nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tyir.diagnostics import TyirError
from tyir.tools.cli import warn

if TYPE_CHECKING:
    from tyir.process.cache import Cache

__all__ = ["add_cache_options", "cache_of"]

_CACHE_GIGABYTES: Final = 20.0


def add_cache_options(parser: argparse._ActionsContainer) -> None:
    """Where the cache is, how much it takes, and whether there is one."""
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="where finished pieces are kept and looked for (default $XDG_CACHE_HOME/tyir, ~/.cache/tyir)",
    )
    parser.add_argument("--no-cache", action="store_true", help="keep and look for no pieces")
    parser.add_argument(
        "--cache-size",
        type=_gigabytes,
        metavar="GB",
        help="what the cache may take of the disk beside artifacts that are there (default 20)",
    )


def cache_of(args: argparse.Namespace) -> Cache | None:
    """The cache that was asked for; the default one, where it cannot be used, is done without."""
    from tyir.process.cache import Cache, default_folder

    if args.no_cache:
        if args.cache_dir is not None or args.cache_size is not None:
            given = "--cache-dir" if args.cache_dir is not None else "--cache-size"
            raise TyirError(
                f"{given} says something of a cache, --no-cache that there is none", help="leave one out"
            )
        return None
    limit = int((_CACHE_GIGABYTES if args.cache_size is None else args.cache_size) * 1e9)
    if args.cache_dir is not None:
        return Cache.open(args.cache_dir, limit)
    try:
        return Cache.open(default_folder(), limit)
    except TyirError as error:
        warn(f"nothing is cached: {error.diagnostics[0].message}")
        return None


def _gigabytes(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e9:
        raise TyirError(f"a cache of '{text}' GB", help="use a number such as 20, or --no-cache")
    return number
