"""`tyir-rank FOLDER..`: wait on this machine for a model whose dies run on several, and run some of them.

    b$ tyir-rank out/4die --host 10.0.0.2
    a$ tyir-run out/4die --hosts 10.0.0.1,10.0.0.2 --prompt "..."

The artifacts are found by what they are, not by where they lie: the folders are looked through.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tyir.tools.cli import ToolParser, add_json_option, note, run_tool

__all__ = ["main", "make_parser"]


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = make_parser().parse_args(argv)
    from tyir.runtime_sim.processes.hosts import RankServer
    from tyir.tools.commands.json_forms import Waiting, print_json

    server = RankServer(args.host, args.port, args.folders)
    host, port = server.address
    if args.json:
        print_json(Waiting(host, port, tuple(map(str, args.folders))))
    else:
        print(f"waiting at {host}:{port}")
    sys.stdout.flush()
    try:
        while True:
            code = server.serve_one()
            note(f"a group has ended ({'as it was told' if code == 0 else f'exit code {code}'})")
            if not args.keep:
                return 1 if code else 0
    finally:
        server.close()


def make_parser() -> argparse.ArgumentParser:
    from tyir.runtime_sim.processes.hosts import PORT

    parser = ToolParser(
        prog="tyir-rank",
        description="Wait on this machine for a model whose dies run on several machines, and run some of"
        " them: tyir-run, tyir-chat and tyir-serve --hosts begin it.",
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="where the artifacts lie, or above"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address of this machine to listen on (default 127.0.0.1)"
    )
    parser.add_argument(
        "--port", type=int, default=PORT, help="port (default %(default)s; 0: a free one, which is printed)"
    )
    parser.add_argument("--keep", action="store_true", help="wait again when a group has ended")
    add_json_option(parser, "say where it waits as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
