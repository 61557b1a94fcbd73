"""`tyir-verify OUT/{n}die --against HF_DIR`: compare artifacts with Hugging Face.

When they differ it names the op at fault.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tyir.diagnostics import TyirError
from tyir.process.files import load_json
from tyir.tools.cli import ToolParser, add_json_option, detail, note, quiet, run_tool
from tyir.tools.commands.build_arguments import add_base_option, add_vision_tower_option, numbers
from tyir.tools.run.arguments import add_engine_argument

if TYPE_CHECKING:
    from tyir.execution.artifacts import Artifacts
    from tyir.manifest import Manifest
    from tyir.tools.verify.compare import PromptResult

__all__ = ["main", "make_parser"]

_WHOLE: Final = "8 prompts of 64 tokens"


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point; exit code 1 when the artifacts do not compute what the model computes."""
    args = make_parser().parse_args(argv)
    from tyir.artifacts.rope_scaling import RECORDED
    from tyir.execution.artifacts import Artifacts
    from tyir.frontends.plugin import plugin_of
    from tyir.process.progress import Bar
    from tyir.runtime_sim.session.session import Session
    from tyir.tools.commands.json_forms import print_json
    from tyir.tools.verify.compare import LayerStates, Reference, check_prompt
    from tyir.tools.verify.locate import locate
    from tyir.tools.verify.prompt_report import (
        HEAD,
        TOKENS,
        agrees,
        form_of,
        print_end,
        row_of,
        tell_divergence,
    )

    states = LayerStates()
    _check_checkpoint(args.against)
    artifacts = Artifacts.open(args.artifacts)
    _check_amount(args, artifacts.manifest.vision is not None)
    _check_same_model(artifacts.manifest, args.against, args.base)
    if artifacts.manifest.vision is not None and args.ids is None:
        from tyir.tools.verify.picture_report import verify_pictures

        return verify_pictures(args, artifacts, plugin_of(args.model_plugin, args.vision_tower))
    if args.image:
        from tyir.runtime_sim.vision.preprocessor import vision_of

        vision_of(artifacts)
    session = Session(
        artifacts, args.engine, probe=states if args.engine != "edge10" else None, dense=True
    )  # the model that is compared with sees everything
    prompts = _prompts(args, session.artifacts)
    plugin = plugin_of(args.model_plugin, args.vision_tower)
    detail("loading the model that is compared with")
    scaling = session.manifest.model.get(RECORDED)
    reference = Reference(args.against, session.manifest.options, plugin, args.base, scaling)
    tokens = args.tokens if args.tokens is not None else TOKENS[args.full]
    counts = [min(tokens, session.capacity - len(ids)) for ids in prompts]
    results: list[PromptResult] = []
    if not args.json:
        print(HEAD)
    with Bar("verification", 2 * sum(counts), "step", show=not quiet()) as bar:
        for number, (ids, count) in enumerate(zip(prompts, counts)):
            session.sequence = states.sequence = (
                number % session.manifest.options.batch
            )  # every sequence of a batch has its turn
            results.append(check_prompt(session, reference, ids, count, states, bar.advance))
            if not args.json and len(results[-1].logit_cosine):
                bar.line(row_of(number, results[-1]))
    if not results or not all(len(r.logit_cosine) for r in results):
        raise TyirError("no position was compared", help="give a prompt, or leave --prompt and --ids out")
    kv_dtype = session.manifest.options.kv_dtype
    good = all(agrees(r, kv_dtype) for r in results)
    if not args.json:
        print_end(results, args.engine, good, kv_dtype)
        if not args.full and args.prompt is None and args.ids is None:
            note(f"compared {len(prompts)} prompts of {tokens} tokens; --full compares {_WHOLE}")
    if session.choices is not None:
        note(
            f"these artifacts return {session.choices} token{'s' if session.choices > 1 else ''} of each"
            " position: only those and their logits were compared; compile with --output logits to"
            " compare all"
        )
    found = None
    if not good and args.engine != "edge10":
        note("looking for the first op that is off")
        worst = min(results, key=lambda r: r.logit_cosine.min() - abs(r.logit_size - 1))
        found = locate(
            session.artifacts,
            args.against,
            worst.ids[: worst.prompt_length + 8],
            args.engine,
            plugin=plugin,
            base=args.base,
        )
        tell_divergence(found)
    if args.json:
        print_json(form_of(results, good, str(found) if found else None))
    return 0 if good else 1


def _check_checkpoint(path: Path) -> None:
    """`TyirError` unless `path` is a checkpoint.

    A GGUF file, or a folder that holds one, needs no config.json: its metadata describe the model; an
    adapter's base has one.
    """
    from tyir.frontends.checkpoint import is_compiled, no_checkpoint

    if is_compiled(path):
        raise TyirError(no_checkpoint(path))
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return
    from tyir.frontends.gguf.files import gguf_model

    if gguf_model(path):
        return
    if not path.exists():
        raise TyirError(no_checkpoint(path))
    raise TyirError(
        f"{path} holds no config.json and no GGUF file",
        help="--against takes the checkpoint folder the artifacts were compiled from",
    )


# What two checkpoints of one model have alike, whatever their weights are stored as.
_SIZES: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def _check_same_model(manifest: Manifest, path: Path, base: Path | None) -> None:
    """`TyirError` when the sizes in a checkpoint's config.json are not those of the artifacts: said before
    anything is compared, or quantised by the sizes of another model.
    """
    from tyir.frontends.vision.llava import is_llava
    from tyir.tools.estimate.shape import language_config

    folder = base if base is not None and not (path / "config.json").is_file() else path
    try:
        config = load_json(folder / "config.json")
    except (OSError, ValueError):
        return  # a GGUF file; what is wrong with a config.json is said when the model is read
    if not isinstance(config, dict):
        return
    compiled: Mapping[str, object] = {**manifest.model}
    sizes = language_config(config)
    other = [
        f"{key} {sizes[key]}, the artifacts {compiled[key]}"
        for key in _SIZES
        if key in sizes and key in compiled and sizes[key] != compiled[key]
    ]
    seen = manifest.vision.model_type if manifest.vision is not None else None
    kind = "llava" if is_llava(config) else config.get("model_type")
    if seen is not None and kind != seen:
        other.insert(0, f"model_type {kind}, the artifacts {seen}")
    if other:
        raise TyirError(
            f"{path} is not the model that these artifacts were compiled from: it has {'; '.join(other)}",
            help="give --against the checkpoint that was compiled, or compile this one",
        )


def _check_amount(args: argparse.Namespace, pictures: bool) -> None:
    """`TyirError` where what is asked for would compare nothing, or something else as well.

    With `pictures`, --prompts counts those, and --prompt is the question about each.
    """
    from tyir.tools.verify.compare import PROMPTS

    if args.prompt == "" or args.ids == ():
        raise TyirError(
            f"--{'ids' if args.ids == () else 'prompt'} is empty: there is nothing to compare",
            help="give at least one token, or leave it out for the built-in prompts",
        )
    text = args.prompt is not None and not pictures
    own = "--ids" if args.ids is not None else "--prompt" if text else None
    other = "--prompt" if own == "--ids" and args.prompt is not None else "--prompts"
    if own is not None and (other == "--prompt" or args.prompts not in (None, 1)):
        raise TyirError(f"{own} is one prompt, {other} asks for others", help=f"leave out {other}")
    if args.prompts is None:
        args.prompts = len(PROMPTS) if args.full else 2
    if not 1 <= args.prompts <= len(PROMPTS):
        raise TyirError(
            f"--prompts {args.prompts} is not in 1..{len(PROMPTS)}, the built-in prompts",
            help=f"the nearest possible is {min(max(args.prompts, 1), len(PROMPTS))}",
        )
    if args.tokens is not None and args.tokens < 1:
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
        prompts = [token_ids(tokenizer, text, artifacts.manifest.options.max_kv) for text in texts]
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


def make_parser() -> argparse.ArgumentParser:
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
    add_vision_tower_option(parser)
    parser.add_argument("--prompt", help="one prompt of your own instead of the built-in ones")
    parser.add_argument(
        "--ids",
        type=numbers,
        metavar="N,N,..",
        help="one prompt as token ids, for models without a tokenizer",
    )
    parser.add_argument(
        "--prompts", type=int, metavar="N", help="how many of the 8 built-in prompts (default 2)"
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
    parser.add_argument("--tokens", type=int, metavar="N", help="greedy tokens per prompt (default 32)")
    parser.add_argument("--full", action="store_true", help=f"compare {_WHOLE}, unless given otherwise")
    add_engine_argument(parser)
    add_json_option(parser, "print the comparison as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
