"""`tyir-serve OUT/{n}die`: answer OpenAI's and Ollama's clients, and a page in the browser.

tyir-serve out/4die --port 8000
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tyir.diagnostics import TyirError
from tyir.process.extras import require
from tyir.tools.cli import ToolParser, add_json_option, note, run_tool, warn
from tyir.tools.run.arguments import add_engine_argument, add_group_arguments, add_threads_argument

__all__ = ["main", "make_parser"]

_NEEDED: Final = ("fastapi", "uvicorn", "prometheus_client", "transformers")
_KEY: Final = "TYIR_API_KEY"
_BODY: Final = 4 << 20  # bytes of a request
_SEEING_BODY: Final = 24 << 20  # with pictures, a third more as base64


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = make_parser().parse_args(argv)
    require("serving", *_NEEDED, extra="serve")
    _check(args)
    from tyir.tools.commands.json_forms import Serving, print_json
    from tyir.tools.run.chat import read_template
    from tyir.tools.run.group_of import open_with_group
    from tyir.tools.serve.async_engine import AsyncEngine
    from tyir.tools.serve.metrics import Metrics
    from tyir.tools.serve.running import listen, serve
    from tyir.tools.serve.settings import Settings
    from tyir.tools.tokenizer import without_models

    keys = _keys(args)
    names = args.served_model_name or [args.artifacts.resolve().parent.name or "tyir"]
    metrics = Metrics(names[0])
    template = read_template(args.chat_template) if args.chat_template is not None else None
    artifacts, group = open_with_group(args, check=not args.no_check)
    with without_models():
        engine = AsyncEngine(
            artifacts,
            args.engine,
            template=template,
            most_waiting=args.max_queue,
            most_waiting_tokens=args.max_queued_tokens,
            long_share=args.prefill_share,
            queue_timeout=args.queue_timeout,
            request_timeout=args.request_timeout,
            observer=metrics,
            threads=args.threads,
            group=group,
            resize=args.resize,
        )
    if group is not None:
        group.on_failure = lambda problem: engine.engine.fail(problem.diagnostics[0].message)
    listening = listen(args.host, args.port)
    host, port = listening.getsockname()[:2]
    if not keys and host not in ("127.0.0.1", "::1"):
        warn(f"whoever reaches {host} can use this server; --api-key-file or {_KEY} close it")
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    if args.json:
        found = Serving(str(args.artifacts), url, tuple(names), engine.slots, engine.capacity, args.max_queue)
        print_json(found)
    else:
        print(f"serving {names[0]} at {url}")
    sys.stdout.flush()
    note(f"{engine.slots} at once, {engine.capacity} tokens each, {args.max_queue} may wait")
    settings = Settings(
        names=tuple(names),
        keys=Settings.hashed(keys),
        max_body=args.max_body or (_BODY if engine.eyes is None else _SEEING_BODY),
        always_usage=not args.usage_on_request,
        tool_parser=None if args.tool_call_parser == "none" else args.tool_call_parser,
    )
    serve(
        engine,
        listening,
        settings,
        metrics=metrics,
        patience=args.shutdown_timeout,
        log_level="info" if args.verbose else "warning",
    )
    return 0


def _check(args: argparse.Namespace) -> None:
    queued = args.max_queued_tokens
    limits = {name: getattr(args, name) for name in ("queue_timeout", "request_timeout")}
    for name, holds, wanted in (
        ("port", 0 <= args.port < 1 << 16, "0 (a free one) to 65535"),
        ("max_queue", args.max_queue >= 0, "0 or more requests"),
        (
            "max_queued_tokens",
            queued is None or queued > 0,
            "1 or more tokens",
        ),
        *((n, v is None or v > 0, "a number of seconds above 0") for n, v in limits.items()),
        ("prefill_share", 0 < args.prefill_share <= 1, "a share above 0, at most 1"),
        ("shutdown_timeout", args.shutdown_timeout >= 0, "0 or more seconds"),
        ("max_body", args.max_body is None or args.max_body > 0, "1 or more bytes"),
    ):
        if not holds:
            value = getattr(args, name)
            raise TyirError(f"--{name.replace('_', '-')} {value} is out of range", help=f"give {wanted}")


def _keys(args: argparse.Namespace) -> list[str]:
    keys = [*args.api_key, *os.environ.get(_KEY, "").split()]
    if args.api_key_file is not None:
        from tyir.process.files import read_regular

        try:
            keys += read_regular(args.api_key_file, 1 << 20).decode().split()
        except (OSError, UnicodeDecodeError) as error:
            raise TyirError(
                f"cannot read {args.api_key_file}: {_reason(error)}", help="give a file with a key a line"
            ) from None
        if not keys:
            raise TyirError(f"{args.api_key_file} holds no key", help="write a key in each line")
    return keys


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8 text"


def make_parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="tyir-serve",
        description="Answer OpenAI's and Ollama's clients, and a page in the browser, from artifacts.",
    )
    parser.add_argument("artifacts", type=Path, metavar="OUT/{n}die", help="the folder tyir-compile printed")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument(
        "--port", type=int, default=8000, help="port (default 8000; 0: a free one, which is printed)"
    )
    parser.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="what clients call the model; several are aliases (default: the folder's name)",
    )
    add_engine_argument(parser)
    add_threads_argument(parser)
    add_group_arguments(parser)
    parser.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="Jinja, instead of the artifacts' (or where they have none)",
    )
    parser.add_argument(
        "--tool-call-parser",
        choices=("hermes", "none"),
        default="hermes",
        help="how calls of tools are read from answers (default hermes, as Qwen writes them)",
    )
    parser.add_argument(
        "--resize",
        action="store_true",
        help="bring pictures of other sizes to the nearest one that was compiled",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-queue",
        type=int,
        default=64,
        metavar="N",
        help="requests that may wait for a slot; more get 429 (default 64)",
    )
    limits.add_argument(
        "--max-queued-tokens", type=int, metavar="N", help="tokens of their prompts together (default: any)"
    )
    limits.add_argument(
        "--queue-timeout",
        type=float,
        metavar="S",
        help="how long one may wait before it gets 504 (default: any)",
    )
    limits.add_argument(
        "--request-timeout", type=float, metavar="S", help="how long an answer may take in all (default: any)"
    )
    limits.add_argument(
        "--prefill-share",
        type=float,
        default=0.5,
        metavar="S",
        help="how many steps may be long while somebody is being answered (default 0.5)",
    )
    limits.add_argument(
        "--max-body",
        type=int,
        metavar="BYTES",
        help="of a request (default 4 MiB, of a model that sees pictures 24 MiB)",
    )
    limits.add_argument(
        "--shutdown-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="how long answers may take to end after SIGTERM (default 30)",
    )
    parser.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"opens the server, which is closed then; the list of processes shows it, {_KEY} does not",
    )
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="a key in each line")
    parser.add_argument(
        "--usage-on-request",
        action="store_true",
        help="streams end with their usage only where stream_options asks for it",
    )
    add_json_option(parser, "say where it serves as JSON")
    parser.add_argument("--no-check", action="store_true", help="verify the hashes of the libraries only")
    return parser


if __name__ == "__main__":
    sys.exit(main())
