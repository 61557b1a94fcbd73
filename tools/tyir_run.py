"""`tyir-run OUT/{n}die --prompt "..."`: continue a prompt, or answer a question about pictures.

All dies run in this process.
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tyir.diagnostics import TyirError
from tyir.process.collector import collector_paused
from tyir.tools.cli import Terminated, ToolParser, add_json_option, check_output, note, run_tool
from tyir.tools.commands.build_arguments import numbers
from tyir.tools.run.arguments import add_answer_arguments, add_picture_settings

if TYPE_CHECKING:
    from tyir.runtime_sim.session.session import Session
    from tyir.tools.run.session_of import Opened

__all__ = ["main", "make_parser"]


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = make_parser().parse_args(argv)
    pictures = bool(args.image or args.video)
    if args.ids is not None and (args.prompt is not None or args.chat or pictures):
        raise TyirError("--ids is a prompt by itself", help="leave out --prompt, --chat, --image and --video")
    with collector_paused():  # nothing that loading makes is garbage
        from tyir.tools.run.session_of import open_to_answer

        opened = open_to_answer(args, text=args.ids is None)
    if args.trace_commands is not None:
        _trace_commands(opened.session, args.trace_commands)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale: models write any character
    if args.ids is None and (args.chat or pictures or opened.session.artifacts.manifest.vision is not None):
        from tyir.tools.run.answers import run_turns

        run_turns(args, opened)
        return 0
    given = _given(args, opened)
    return _run_batch(args, opened, given) if len(given) > 1 else _run_one(args, opened, *given[0])


Given = tuple[str | None, Sequence[int]]  # a prompt as text, None where ids were given, and its tokens


def _given(args: argparse.Namespace, opened: Opened) -> list[Given]:
    """What `--ids`, `--prompt` or standard input asks to be continued."""
    from tyir.tools.run.prompts import read_prompts, token_ids

    if args.ids is not None:
        return [(None, ids) for ids in args.ids]
    capacity = opened.session.capacity
    return [(text, token_ids(opened.tokenizer, text, capacity)) for text in read_prompts(args.prompt)]


def _run_one(args: argparse.Namespace, opened: Opened, prompt: str | None, ids: Sequence[int]) -> int:
    """Continue one prompt, streaming: text as text, ids as ids."""
    from tyir.runtime_sim.session.ending import end_reason
    from tyir.tools.commands.json_forms import Prompt, Ran, print_json
    from tyir.tools.run.end_tokens import why
    from tyir.tools.run.session_of import save_cache
    from tyir.tools.run.turns import timed

    session, stops, tokenizer = opened.session, opened.stops, opened.tokenizer
    if args.cache is not None and args.cache.exists():
        session.restore(args.cache)
    shared = session.shared_prefix(ids)
    times: list[float] = []
    made: list[int] = []
    generated = session.generate(ids, opened.limit, sampler=opened.sampler, stop=stops.__contains__)
    tokens = timed(generated, times, made)
    start = time.perf_counter()
    loaded = start - opened.began
    try:
        _stream(args, opened, prompt, ids, tokens)
    except KeyboardInterrupt as interrupt:
        struck = not isinstance(interrupt, Terminated) or interrupt.signal == signal.SIGINT
        if struck and args.cache is not None and len(session.tokens) > shared:
            save_cache(session, args.cache)
            done = f"{min(len(session.tokens), len(ids))} of {len(ids)} prompt tokens"
            note(f"interrupted after {done}: the same command goes on there")
        raise
    if args.cache is not None:
        save_cache(session, args.cache)
    decode = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    if session.recall.steps:
        note(session.recall.text())
    reason = end_reason(made, opened.limit, session.capacity - len(session.tokens), stops.__contains__)
    ended = why(reason, made, stops, tokenizer, session.capacity)
    if args.json:
        answer = Prompt(prompt, len(ids), shared, tuple(made), _text(opened, ids, made), ended)
        first_token = times[0] - start if times else None
        print_json(Ran(str(args.artifacts), args.engine, (answer,), loaded, first_token, decode))
        return 0
    reused = f", {shared} of them from the cache" if shared else ""
    after = f"first token {times[0] - start:.3f} s after that; " if times else ""
    rate = f"{len(times)} tokens" + (f" at {decode:.1f} tokens/s" if len(times) > 1 else "")
    note(
        f"loaded in {loaded:.1f} s; {after}{rate} ({args.engine} engine on this machine, not the device)\n"
        f"{len(ids)} prompt tokens{reused}; ended {ended}"
    )
    return 0


def _stream(
    args: argparse.Namespace,
    opened: Opened,
    prompt: str | None,
    ids: Sequence[int],
    tokens: Iterator[int],
) -> None:
    """Print tokens as they come; with `--json` nothing."""
    from tyir.tools.run.text_stream import TextStream, pieces

    if args.json:
        list(tokens)
        return
    stream: Iterator[str]
    if prompt is None:
        stream = (f"{',' * (number > 0)}{token}" for number, token in enumerate(tokens))
    else:
        stream = pieces(TextStream(opened.tokenizer, ids), tokens)
    first = next(stream, "")  # a prompt that does not fit is refused before anything is printed
    sys.stdout.write((prompt or "") + first)
    for text in stream:
        sys.stdout.write(text)
        sys.stdout.flush()
    print(flush=True)


def _text(opened: Opened, ids: Sequence[int], made: Sequence[int]) -> str | None:
    """What tokens add to the text of a prompt, None where there is no tokenizer."""
    from tyir.tools.run.text_stream import continuation

    return continuation(opened.tokenizer, ids, made) if opened.tokenizer is not None else None


def _trace_commands(session: Session, path: Path) -> None:
    """Write a line for every command to a file, while the session runs."""
    from tyir.runtime_sim.execution.command_trace import CommandTrace
    from tyir.runtime_sim.session.edge10_engine import Edge10Engine

    if not isinstance(session.engine, Edge10Engine):
        raise TyirError(
            "--trace-commands needs the engine that executes commands", help="add --engine edge10"
        )
    check_output(str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        session.engine.observer = CommandTrace(path.open("w", encoding="utf-8", buffering=1))
    except OSError as error:
        raise TyirError(f"cannot write {path}: {error.strerror}", help="write to another place") from None


def _run_batch(args: argparse.Namespace, opened: Opened, given: Sequence[Given]) -> int:
    """Continue several prompts at once, each printed when all are done."""
    from tyir.runtime_sim.session.batch_session import BatchSession
    from tyir.runtime_sim.session.ending import end_reason
    from tyir.tools.commands.json_forms import Prompt, Ran, print_json
    from tyir.tools.run.end_tokens import why

    for option, value in (("--cache", args.cache), ("--trace-commands", args.trace_commands)):
        if value is not None:
            raise TyirError(f"{option} is for one prompt", help="give one --prompt")
    session = BatchSession(
        opened.session.artifacts, args.engine, threads=args.threads, group=opened.session.group
    )
    if len(given) > len(session.tokens):
        raise TyirError(
            f"{len(given)} prompts, and {args.artifacts} runs {len(session.tokens)} at once",
            help=f"compile with --batch {len(given)}, or give fewer",
        )
    start = time.perf_counter()
    loaded = start - opened.began
    stops, limit = opened.stops, opened.limit
    waiting: list[Sequence[int]] = [[] for _ in range(len(session.tokens) - len(given))]
    prompts = [*(ids for _, ids in given), *waiting]
    made = session.generate(prompts, limit, sampler=opened.sampler, stop=stops.__contains__)
    seconds = time.perf_counter() - start
    capacity = session.manifest.options.max_kv
    answers = []
    for (prompt, ids), tokens, held in zip(given, made, session.tokens):
        reason = end_reason(tokens, limit, capacity - len(held), stops.__contains__)
        ended = why(reason, tokens, stops, opened.tokenizer, capacity)
        answers.append(Prompt(prompt, len(ids), 0, tuple(tokens), _text(opened, ids, tokens), ended))
    total = sum(map(len, made))
    if args.json:
        speed = total / seconds
        print_json(Ran(str(args.artifacts), args.engine, tuple(answers), loaded, None, speed))
        return 0
    for answer in answers:
        print(",".join(map(str, answer.tokens)) if answer.text is None else f"{answer.prompt}{answer.text}")
    note(
        f"loaded in {loaded:.1f} s; {len(given)} prompts, {total} tokens in {seconds:.3f} s:"
        f" {total / seconds:.1f} tokens/s ({args.engine} engine on this machine, not the device)"
    )
    for number, answer in enumerate(answers):
        note(f"prompt {number} ended {answer.ended}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="tyir-run",
        description="Continue a prompt, or answer questions about pictures, with compiled artifacts.",
    )
    add_answer_arguments(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        help="the text to continue (default: read from stdin); several with artifacts compiled for a batch",
    )
    parser.add_argument(
        "--ids",
        type=numbers,
        action="append",
        metavar="N,N,..",
        help="a prompt as token ids, for models without a tokenizer; the answer is printed as ids too",
    )
    pictures = parser.add_argument_group("pictures, of artifacts of a vision-language model")
    pictures.add_argument(
        "--image",
        type=Path,
        action="append",
        metavar="FILE",
        help="a picture that the prompt is about; several in the order they are given",
    )
    pictures.add_argument(
        "--video",
        type=Path,
        action="append",
        nargs="+",
        metavar="FRAME",
        help="the frames of a video as pictures in order, or one folder of them",
    )
    add_picture_settings(pictures)
    parser.add_argument(
        "--chat",
        action="store_true",
        help=(
            "answer one line of standard input after the other, each with what was said before, as tyir-chat"
            " does, --image and --prompt first"
        ),
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="the prompt is the whole text, with places for pictures, and no chat template is applied",
    )
    add_json_option(parser, "print everything as JSON when all is done; nothing is streamed")
    parser.add_argument(
        "--trace-commands",
        type=Path,
        metavar="FILE",
        help="with --engine edge10: a line for every command, with what it reads and writes",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
