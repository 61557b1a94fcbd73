"""`tyir-chat OUT/{n}die`: talk with a compiled model, which is told what was said before."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from tyir.process.collector import collector_paused
from tyir.tools.cli import ToolParser, add_json_option, note, run_tool
from tyir.tools.run.arguments import add_answer_arguments, add_picture_settings

__all__ = ["main", "make_parser"]


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = make_parser().parse_args(argv)
    with collector_paused():  # nothing that loading makes is garbage
        from tyir.tools.run.chat import read_template
        from tyir.tools.run.conversation import converse
        from tyir.tools.run.session_of import open_to_answer, save_cache
        from tyir.tools.run.speaker import Speaker
        from tyir.tools.run.turns import Turns

        template = read_template(args.chat_template) if args.chat_template is not None else None
        opened = open_to_answer(args)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale: models write any character
    turns = Turns(opened.session, opened.tokenizer, resize=args.resize, template=template, system=args.system)
    if args.cache is not None and args.cache.exists():
        opened.session.restore(args.cache)
    if sys.stdin is not None and sys.stdin.isatty():
        note(f"{opened.session.capacity} tokens fit; /help lists the commands, Ctrl-C ends an answer")
    speaker = Speaker(opened, turns, as_json=args.json)
    converse(speaker, args.fps)
    if args.cache is not None:
        save_cache(opened.session, args.cache)
    if args.json:
        speaker.print_json()
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="tyir-chat",
        description="Answer one line of standard input after the other, each with what was said before: with"
        " the model's chat template, computing only what is new. Lines that begin with / are commands:"
        " /reset starts over, /quit ends, /image FILE shows a picture, /help lists them. Ctrl-C ends an"
        " answer.",
    )
    add_answer_arguments(parser)
    parser.add_argument(
        "--system", metavar="TEXT", default="", help="what the model is told before the conversation"
    )
    parser.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="Jinja in place of the model's own template, or for a model that has none",
    )
    add_picture_settings(parser.add_argument_group("pictures, of artifacts of a vision-language model"))
    add_json_option(parser, "print the whole conversation as JSON at its end; nothing is streamed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
