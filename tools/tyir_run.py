"""`tyir-run OUT/{n}die --prompt "..."`: continue a prompt with compiled artifacts.

All dies run in this process.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyir.diagnostics import TyirError
from tyir.tools.cli import ToolParser, add_debug_option, argument_text, read_stdin, run_tool

if TYPE_CHECKING:
    from tyir.runtime_sim.session.sampling import Sampler
    from tyir.runtime_sim.session.session import Session

__all__ = ["load_tokenizer", "main", "stop_tokens"]


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = _parser().parse_args(argv)
    from tyir.runtime_sim.session.sampling import check_sampling, make_sampler
    from tyir.runtime_sim.session.session import Session

    sampler = make_sampler(args.temperature, args.top_k, args.top_p, args.seed)
    session = Session(args.artifacts, args.engine, check=not args.no_check)
    if args.trace_commands is not None:
        _trace_commands(session, args.trace_commands)
    check_sampling(session.choices, args.temperature, args.top_k)
    tokenizer = load_tokenizer(args.artifacts)
    prompts = args.prompt or [read_stdin()]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    stops = stop_tokens(args.artifacts)
    if len(prompts) > 1:
        return _run_batch(args, prompts, ids, tokenizer, sampler, stops)
    if args.cache is not None and args.cache.exists():
        session.restore(args.cache)
    start = time.perf_counter()
    shared = session.shared_prefix(ids[0])
    reused = f", {shared} of them from the cache" if shared else ""
    times: list[float] = []

    def timed() -> Iterator[int]:
        for token in session.generate(ids[0], args.max_tokens, sampler=sampler, stop=lambda t: t in stops):
            times.append(time.perf_counter())
            yield token

    stream = decode_stream(tokenizer, timed())
    first = next(stream, "")  # a prompt that does not fit is refused before anything is printed
    sys.stdout.write(prompts[0] + first)
    for text in stream:
        sys.stdout.write(text)
        sys.stdout.flush()
    print()
    if args.cache is not None:
        session.save(args.cache)
    if times:
        decode = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
        print(
            f"{len(ids[0])} prompt tokens{reused}, first token after {times[0] - start:.3f} s; {len(times)}"
            f" tokens at {decode:.1f} tokens/s ({args.engine} engine on this machine, not the device)",
            file=sys.stderr,
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
    try:
        session.engine.observer = CommandTrace(path.open("w", encoding="utf-8", buffering=1))
    except OSError as error:
        raise TyirError(f"cannot write {path}: {error.strerror}") from None


def _run_batch(
    args: argparse.Namespace,
    prompts: Sequence[str],
    ids: Sequence[Sequence[int]],
    tokenizer: Any,
    sampler: Sampler,
    stops: set[int],
) -> int:
    """Continue several prompts at once, each printed when all are done."""
    from tyir.runtime_sim.session.batch_session import BatchSession

    if args.cache is not None:
        raise TyirError("--cache is for one prompt", help="give one --prompt")
    if args.trace_commands is not None:
        raise TyirError("--trace-commands is for one prompt", help="give one --prompt")
    session = BatchSession(args.artifacts, args.engine, check=False)
    if len(prompts) > len(session.tokens):
        raise TyirError(
            f"{len(prompts)} prompts, and {args.artifacts} runs {len(session.tokens)} at once",
            help=f"compile with --batch {len(prompts)}, or give fewer",
        )
    start = time.perf_counter()
    waiting: list[list[int]] = [[] for _ in range(len(session.tokens) - len(ids))]
    made = session.generate([*ids, *waiting], args.max_tokens, sampler=sampler, stop=lambda t: t in stops)
    seconds = time.perf_counter() - start
    for prompt, tokens in zip(prompts, made):
        print(prompt + tokenizer.decode(tokens, skip_special_tokens=True))
    total = sum(map(len, made))
    print(
        f"{len(prompts)} prompts, {total} tokens in {seconds:.3f} s: {total / seconds:.1f} tokens/s"
        f" ({args.engine} engine on this machine, not the device)",
        file=sys.stderr,
    )
    return 0


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer saved with the artifacts or the checkpoint; `TyirError` when there is none."""
    if not any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise TyirError(
            f"{folder} holds no tokenizer",
            help="copy the model's tokenizer.json there, or compile from a folder that has one",
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def stop_tokens(folder: Path) -> set[int]:
    """The end-of-sequence ids of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value = _settings(folder / name).get("eos_token_id")
            if value is not None:
                return set(value) if isinstance(value, list) else {value}
    return set()


def _settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `TyirError` when there is none."""
    from tyir.process.files import load_json

    try:
        found = load_json(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise TyirError(f"cannot read {path}: {reason}", help="restore the file, or compile again") from None
    if not isinstance(found, dict):
        raise TyirError(f"{path} does not hold a JSON object", help="restore the file, or compile again")
    return found


def decode_stream(tokenizer: Any, tokens: Iterator[int]) -> Iterator[str]:
    """Text as it becomes final.

    A token may end in the middle of a character, which is held back until it is whole.
    """
    pending: list[int] = []
    shown = 0
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            yield text[shown:]
            shown = len(text)
            if text.endswith("\n"):
                pending, shown = [], 0
    if pending:
        yield tokenizer.decode(pending, skip_special_tokens=True)[shown:]


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(prog="tyir-run", description="Continue a prompt with compiled artifacts.")
    parser.add_argument("artifacts", type=Path, help="the folder tyir-compile printed, for example out/4die")
    parser.add_argument(
        "--prompt",
        type=argument_text,
        action="append",
        help="the text to continue (default: read from stdin); several with artifacts compiled for a batch",
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
        "--max-tokens", type=int, default=64, metavar="N", help="tokens to generate at most (default 64)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default) takes the most likely token"
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=0,
        help="sample among the k most likely tokens (0: all that the program returns)",
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample among the fewest tokens of this total probability"
    )
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument(
        "--engine",
        choices=("host", "interpreter", "edge10"),
        default="host",
        help="what executes the programs (default host)",
    )
    parser.add_argument("--no-check", action="store_true", help="do not verify the artifacts' hashes first")
    parser.add_argument(
        "--trace-commands",
        type=Path,
        metavar="FILE",
        help="with --engine edge10: a line for every command, with what it reads and writes",
    )
    add_debug_option(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
