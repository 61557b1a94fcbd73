"""`tyir-run OUT/{n}die --prompt "..."`: continue a prompt, or answer a question about pictures.

All dies run in this process.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyir.diagnostics import TyirError
from tyir.tools.cli import ToolParser, add_json_option, check_output, note, run_tool

if TYPE_CHECKING:
    from tyir.execution.artifacts import Artifacts
    from tyir.runtime_sim.session.sampling import Sampler
    from tyir.runtime_sim.session.session import Session

__all__ = ["main", "make_parser"]


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = make_parser().parse_args(argv)
    start = time.perf_counter() - _age()
    from tyir.runtime_sim.session.ending import check_limit, end_reason
    from tyir.runtime_sim.session.sampling import check_sampling, make_sampler
    from tyir.tools.commands.json_forms import Prompt, Ran, print_json
    from tyir.tools.run.end_tokens import end_tokens, why
    from tyir.tools.run.prompts import read_prompts, token_ids
    from tyir.tools.run.session_of import open_session
    from tyir.tools.run.text_stream import TextStream, continuation, pieces
    from tyir.tools.tokenizer import load_tokenizer

    sampler = make_sampler(args.temperature, args.top_k, args.top_p, args.seed, args.min_p)
    check_limit(args.max_tokens)
    session = open_session(args.artifacts, args.engine, check=not args.no_check, threads=args.threads)
    if args.trace_commands is not None:
        _trace_commands(session, args.trace_commands)
    check_sampling(session.choices, args.temperature, args.top_k)
    tokenizer = load_tokenizer(session.artifacts)
    pictures = bool(args.image or args.video)
    if args.chat or pictures or session.artifacts.manifest.vision is not None:
        from tyir.tools.run.answers import run_turns

        stops = end_tokens(session.artifacts, tokenizer)
        return run_turns(args, session, tokenizer, sampler, stops, time.perf_counter() - start)
    prompts = read_prompts(args.prompt)
    ids = [token_ids(tokenizer, prompt, session.capacity) for prompt in prompts]
    stops = end_tokens(session.artifacts, tokenizer)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale: models write any character
    if len(prompts) > 1:
        return _run_batch(args, session.artifacts, prompts, ids, tokenizer, sampler, stops, start)
    if args.cache is not None and args.cache.exists():
        session.restore(args.cache)
    shared = session.shared_prefix(ids[0])
    times: list[float] = []
    made: list[int] = []

    def timed() -> Iterator[int]:
        for token in session.generate(ids[0], args.max_tokens, sampler=sampler, stop=stops.__contains__):
            times.append(time.perf_counter())
            made.append(token)
            yield token

    loaded = time.perf_counter() - start
    start = time.perf_counter()
    if args.json:
        list(timed())
    else:
        stream = pieces(TextStream(tokenizer, ids[0]), timed())
        first = next(stream, "")  # a prompt that does not fit is refused before anything is printed
        sys.stdout.write(prompts[0] + first)
        for text in stream:
            sys.stdout.write(text)
            sys.stdout.flush()
        print(flush=True)
    if args.cache is not None:
        session.save(args.cache)
    decode = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    reason = end_reason(made, args.max_tokens, session.capacity - len(session.tokens), stops.__contains__)
    ended = why(reason, made, stops, tokenizer, session.capacity)
    if args.json:
        answer = Prompt(
            prompts[0], len(ids[0]), shared, tuple(made), continuation(tokenizer, ids[0], made), ended
        )
        first_token = times[0] - start if times else None
        print_json(Ran(str(args.artifacts), args.engine, (answer,), loaded, first_token, decode))
        return 0
    reused = f", {shared} of them from the cache" if shared else ""
    after = f"first token {times[0] - start:.3f} s after that, " if times else ""
    rate = (
        f"{len(times)} tokens at {decode:.1f} tokens/s"
        if len(times) > 1
        else f"{len(times)} token{'s' * (not times)}"
    )
    note(
        f"loaded in {loaded:.1f} s; {after}{rate} ({args.engine} engine on this machine, not the device)\n"
        f"{len(ids[0])} prompt tokens{reused}; ended {ended}"
    )
    return 0


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


def _run_batch(
    args: argparse.Namespace,
    artifacts: Artifacts,
    prompts: Sequence[str],
    ids: Sequence[Sequence[int]],
    tokenizer: Any,
    sampler: Sampler,
    stops: Mapping[int, str],
    began: float,
) -> int:
    """Continue several prompts at once, each printed when all are done."""
    from tyir.runtime_sim.session.batch_session import BatchSession
    from tyir.runtime_sim.session.ending import end_reason
    from tyir.tools.commands.json_forms import Prompt, Ran, print_json
    from tyir.tools.run.end_tokens import why
    from tyir.tools.run.text_stream import continuation

    if args.cache is not None:
        raise TyirError("--cache is for one prompt", help="give one --prompt")
    if args.trace_commands is not None:
        raise TyirError("--trace-commands is for one prompt", help="give one --prompt")
    session = BatchSession(artifacts, args.engine, threads=args.threads)
    if len(prompts) > len(session.tokens):
        raise TyirError(
            f"{len(prompts)} prompts, and {args.artifacts} runs {len(session.tokens)} at once",
            help=f"compile with --batch {len(prompts)}, or give fewer",
        )
    start = time.perf_counter()
    loaded = start - began
    waiting: list[list[int]] = [[] for _ in range(len(session.tokens) - len(ids))]
    made = session.generate([*ids, *waiting], args.max_tokens, sampler=sampler, stop=stops.__contains__)
    seconds = time.perf_counter() - start
    capacity = session.manifest.options.max_kv
    answers = []
    for prompt, own, tokens, held in zip(prompts, ids, made, session.tokens):
        reason = end_reason(tokens, args.max_tokens, capacity - len(held), stops.__contains__)
        ended = why(reason, tokens, stops, tokenizer, capacity)
        text = continuation(tokenizer, own, tokens)
        answers.append(Prompt(prompt, len(own), 0, tuple(tokens), text, ended))
    total = sum(map(len, made))
    if args.json:
        speed = total / seconds
        print_json(Ran(str(args.artifacts), args.engine, tuple(answers), loaded, None, speed))
        return 0
    for answer in answers:
        print(f"{answer.prompt}{answer.text}")
    note(
        f"loaded in {loaded:.1f} s; {len(prompts)} prompts, {total} tokens in {seconds:.3f} s:"
        f" {total / seconds:.1f} tokens/s ({args.engine} engine on this machine, not the device)"
    )
    for number, answer in enumerate(answers):
        note(f"prompt {number} ended {answer.ended}")
    return 0


def _age() -> float:
    """Seconds since this process began, or 0 where the system does not tell or a program has called `main`:
    what the interpreter and imports took belongs to the loading.
    """
    if sys.argv[:1] and not Path(sys.argv[0]).name.startswith(("tyir", "__main__")):
        return 0.0
    try:
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK"), 0.0)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


def number(text: str) -> float:
    """A number of any size, NaN too: `make_sampler` says for each argument what is in range."""
    return float(text)


def whole_number(text: str) -> int:
    """The same for whole numbers."""
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="tyir-run",
        description="Continue a prompt, or answer questions about pictures, with compiled artifacts.",
    )
    parser.add_argument("artifacts", type=Path, help="the folder tyir-compile printed, for example out/4die")
    parser.add_argument(
        "--prompt",
        action="append",
        help="the text to continue (default: read from stdin); several with artifacts compiled for a batch",
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
    pictures.add_argument(
        "--fps", type=number, default=2.0, help="frames in a second of each --video (default 2)"
    )
    pictures.add_argument(
        "--resize",
        action="store_true",
        help="bring a picture whose size was not compiled to the nearest that was, instead of refusing it",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help=(
            "answer one line of standard input after the other, each with what was said before; /image FILE"
            " shows a picture, /video FRAME.. a video, /reset starts over"
        ),
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="the prompt is the whole text, with places for pictures, and no chat template is applied",
    )
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
        type=whole_number,
        default=64,
        metavar="N",
        help="tokens to generate at most (default 64)",
    )
    parser.add_argument(
        "--temperature", type=number, default=0.0, help="0 (default) takes the most likely token"
    )
    parser.add_argument(
        "--top-k",
        type=whole_number,
        default=0,
        help="sample among the k most likely tokens (0: all that the program returns)",
    )
    parser.add_argument(
        "--top-p", type=number, default=1.0, help="sample among the fewest tokens of this total probability"
    )
    parser.add_argument(
        "--min-p",
        type=number,
        default=0.0,
        help="sample among tokens that have at least this share of the best one's probability",
    )
    parser.add_argument("--seed", type=whole_number, help="makes sampling repeatable")
    parser.add_argument(
        "--engine",
        choices=("host", "interpreter", "edge10"),
        default="host",
        help="what executes the programs (default host)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads of the host engine (default: the cores that this process may use)",
    )
    parser.add_argument("--no-check", action="store_true", help="verify the hashes of the libraries only")
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
