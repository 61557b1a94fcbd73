"""`tyir-verify OUT/{n}die --against HF_DIR`: compare artifacts with Hugging Face.

When they differ it names the op at fault.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tyir.diagnostics import TyirError
from tyir.tools.build_arguments import add_base_option, numbers
from tyir.tools.cli import ToolParser, add_debug_option, run_tool

if TYPE_CHECKING:
    from tyir.execution.artifacts import Artifacts
    from tyir.frontends.plugin import ModelPlugin

__all__ = ["main"]

LOGIT_COSINE: Final = 0.9999


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point; exit code 1 when the artifacts do not compute what the model computes."""
    args = _parser().parse_args(argv)
    from tyir.execution.artifacts import Artifacts
    from tyir.runtime_sim.session.session import Session
    from tyir.tools.verify.compare import LayerStates, PromptResult, Reference, check_prompt
    from tyir.tools.verify.locate import locate

    states = LayerStates()
    _check_amount(args)
    _check_checkpoint(args.against)
    artifacts = Artifacts.open(args.artifacts)
    if artifacts.manifest.vision is not None and args.ids is None:
        from tyir.tools.verify.report import verify_pictures

        return verify_pictures(args, artifacts, _plugin(args.model_plugin))
    if args.image:
        from tyir.runtime_sim.vision.preprocessor import vision_of

        vision_of(artifacts)
    session = Session(artifacts, args.engine, probe=states if args.engine != "edge10" else None)
    prompts = _prompts(args, session.artifacts)
    plugin = _plugin(args.model_plugin)
    reference = Reference(args.against, session.manifest.options, plugin, args.base)
    results: list[PromptResult] = []
    for number, ids in enumerate(prompts):
        session.sequence = states.sequence = (
            number % session.manifest.options.batch
        )  # every sequence of a batch has its turn
        count = min(args.tokens, session.capacity - len(ids))
        results.append(check_prompt(session, reference, ids, count, states))
    if not results or not all(len(r.logit_cosine) for r in results):
        raise TyirError("no position was compared", help="give a prompt, or leave --prompt and --ids out")
    good = all(r.logit_cosine.min() >= LOGIT_COSINE and not r.differing for r in results)
    if args.json:
        print(json.dumps(summary_of(results, good), indent=1))
    else:
        print_prompts(results, args.engine, good)
    if session.choices is not None:
        print(
            f"these artifacts return {session.choices} token{'s' if session.choices > 1 else ''} of each"
            " position: only those and their logits were compared; compile with --output logits to"
            " compare all",
            file=sys.stderr,
        )
    if good:
        return 0
    if args.engine != "edge10":
        worst = min(results, key=lambda r: r.logit_cosine.min())
        found = locate(
            session.artifacts,
            args.against,
            worst.ids[: worst.prompt_length + 8],
            args.engine,
            plugin=plugin,
            base=args.base,
        )
        print(
            (
                f"first divergence: {found}"
                if found
                else "no single op is off by more than rounding: errors add up over the layers"
            ),
            file=sys.stderr,
        )
    return 1


def _plugin(path: Path | None) -> ModelPlugin | None:
    if path is None:
        return None
    from tyir.frontends.plugin import load_plugin

    return load_plugin(path)


def _check_checkpoint(path: Path) -> None:
    """`TyirError` unless `path` is a checkpoint.

    A GGUF file, or a folder that holds one, needs no config.json: its metadata describe the model; an
    adapter's base has one.
    """
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return
    from tyir.frontends.gguf.files import gguf_model

    if not gguf_model(path):
        raise TyirError(
            f"{path} holds no config.json and no GGUF file",
            help="--against takes the checkpoint folder the artifacts were compiled from",
        )


def _check_amount(args: argparse.Namespace) -> None:
    """`TyirError` where what is asked for would compare nothing."""
    from tyir.tools.verify.compare import PROMPTS

    if args.prompt == "" or args.ids == ():
        raise TyirError(
            f"--{'ids' if args.ids == () else 'prompt'} is empty: there is nothing to compare",
            help="give at least one token, or leave it out for the built-in prompts",
        )
    if not 1 <= args.prompts <= len(PROMPTS):
        raise TyirError(
            f"--prompts {args.prompts} is not in 1..{len(PROMPTS)}, the built-in prompts",
            help=f"the nearest possible is {min(max(args.prompts, 1), len(PROMPTS))}",
        )
    if args.tokens < 1:
        raise TyirError(f"--tokens {args.tokens}: there is nothing to compare", help="give 1 or more")


def _prompts(args: argparse.Namespace, artifacts: Artifacts) -> list[list[int]]:
    """The token ids of each prompt; `TyirError` for a prompt without any and for ids that are no tokens."""
    from tyir.tools.run.prompts import token_ids
    from tyir.tools.tokenizer import load_tokenizer
    from tyir.tools.verify.compare import PROMPTS

    vocabulary = artifacts.manifest.model.get("vocab_size")
    if args.ids is not None:
        prompts = [list(args.ids)]
    else:
        tokenizer = load_tokenizer(artifacts)
        texts = [args.prompt] if args.prompt is not None else PROMPTS[: args.prompts]
        prompts = [token_ids(tokenizer, text) for text in texts]
    for ids in prompts:
        if not ids:
            raise TyirError("a prompt has no tokens: there is nothing to compare", help="give a longer one")
        bad = next((i for i in ids if i < 0 or (vocabulary is not None and i >= vocabulary)), None)
        if bad is not None:
            raise TyirError(
                f"token {bad} is not in the vocabulary of {vocabulary}",
                help=f"tokens are numbered 0 to {vocabulary - 1}" if vocabulary is not None else "",
            )
    return prompts


def print_prompts(results: Sequence[object], engine: str, good: bool) -> None:
    from tyir.tools.verify.compare import PromptResult

    rows = [r for r in results if isinstance(r, PromptResult)]
    print(
        f"{'prompt':>6}{'tokens':>8}{'positions':>11}{'min logit cosine':>18}{'max logit error':>17}{'same greedy tokens':>20}"  # noqa: E501
    )
    for number, r in enumerate(rows):
        same = r.positions - len(r.differing) - len(r.ties)
        ties = f" (+{len(r.ties)} tied)" if r.ties else ""
        print(
            f"{number:>6}{r.prompt_length:>8}{len(r.logit_cosine):>11}{r.logit_cosine.min():>18.7f}{r.logit_error.max():>17.4f}{f'{same}/{r.positions}{ties}':>20}"
        )
    layers = [min(column) for column in zip(*(r.layer_cosine for r in rows))]
    if layers:
        print("\nlayer  min cosine of the hidden state after it")
        for i, layer in enumerate(layers):
            print(f"{i:>5}  {layer:.7f}")
    tied = sum(len(r.ties) for r in rows)
    note = f"; {tied} near ties of Hugging Face's own logits fell the other way" if tied else ""
    print(
        f"\n{'OK' if good else 'DIFFERENT'}: {engine} engine against Hugging Face fp32 on the same"
        f" weights{note}"
    )


def summary_of(results: Sequence[object], good: bool) -> dict[str, object]:
    from tyir.tools.verify.compare import PromptResult

    rows = [r for r in results if isinstance(r, PromptResult)]
    return {
        "ok": good,
        "min_logit_cosine": min(float(r.logit_cosine.min()) for r in rows),
        "max_logit_error": max(float(r.logit_error.max()) for r in rows),
        "tokens": sum(r.positions for r in rows),
        "differing": sum(len(r.differing) for r in rows),
        "ties": sum(len(r.ties) for r in rows),
        "layer_cosine": [min(column) for column in zip(*(r.layer_cosine for r in rows))],
    }


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="tyir-verify",
        description="Compare compiled artifacts with Hugging Face in fp32 on the same weights.",
    )
    parser.add_argument("artifacts", type=Path, help="the folder tyir-compile printed, for example out/4die")
    parser.add_argument("--against", type=Path, required=True, metavar="HF_DIR", help="the checkpoint folder")
    parser.add_argument(
        "--model-plugin", type=Path, metavar="FILE", help="the plugin the artifacts were compiled with"
    )
    add_base_option(parser)
    parser.add_argument("--prompt", help="one prompt of your own instead of the built-in ones")
    parser.add_argument(
        "--ids",
        type=numbers,
        metavar="N,N,..",
        help="one prompt as token ids, for models without a tokenizer",
    )
    parser.add_argument(
        "--prompts", type=int, default=8, metavar="N", help="how many of the 8 built-in prompts (default 8)"
    )
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        metavar="FILE",
        help=(
            "of a vision-language model: a picture to ask about, instead of a drawn one for each compiled"
            " size; --prompt is the question"
        ),
    )
    parser.add_argument(
        "--tokens", type=int, default=64, metavar="N", help="greedy tokens per prompt (default 64)"
    )
    parser.add_argument(
        "--engine",
        choices=("host", "interpreter", "edge10"),
        default="host",
        help="what executes the programs (default host)",
    )
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    add_debug_option(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
