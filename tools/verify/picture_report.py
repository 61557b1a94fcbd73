"""What `tyir-verify` says of vision-language models."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tyir.execution.artifacts import Artifacts
from tyir.runtime_sim.vision.pictures import read_picture
from tyir.runtime_sim.vision.preprocessor import vision_of
from tyir.runtime_sim.vision.session import VisionSession
from tyir.runtime_sim.vision.tower import Towers
from tyir.tools.cli import note
from tyir.tools.commands.json_forms import PictureChecked, TowerRowsChecked, print_json
from tyir.tools.run.turns import Turns
from tyir.tools.tokenizer import load_tokenizer
from tyir.tools.verify.compare import LayerStates
from tyir.tools.verify.locate import locate, locate_in_tower
from tyir.tools.verify.pictures import (
    QUESTION,
    PictureReference,
    PictureResult,
    check_picture,
    drawn_picture,
)
from tyir.tools.verify.prompt_report import HEAD, TOKENS, agrees, form_of, print_end, row_of, tell_divergence

if TYPE_CHECKING:
    from tyir.frontends.plugin import ModelPlugin

__all__ = ["verify_pictures"]


def verify_pictures(args: argparse.Namespace, artifacts: Artifacts, plugin: ModelPlugin | None) -> int:
    """Compare and print; 1 when the artifacts do not see or say what the model does."""
    states = LayerStates()
    session = VisionSession(artifacts, args.engine, probe=states if args.engine != "edge10" else None)
    turns = Turns(session, load_tokenizer(artifacts))
    sizes = [size.image for size in vision_of(artifacts).sizes]
    if args.image:
        pictures = [read_picture(path) for path in args.image]
    else:
        pictures = [drawn_picture(*size.given) for size in sizes[: args.prompts]]
    reference = PictureReference(session, args.against, artifacts.manifest.options, plugin, args.base)
    question = args.prompt or QUESTION
    tokens = args.tokens if args.tokens is not None else TOKENS[args.full]
    results = [
        check_picture(session, turns, reference, picture, question, tokens, states) for picture in pictures
    ]
    prompts = [r.prompt for r in results]
    seen = all(r.good for r in results)
    good = seen and all(agrees(p, artifacts.manifest.options.kv_dtype) for p in prompts)
    if not args.json:
        _print(results, vision_of(artifacts).exponent)
        print(HEAD)
        for number, prompt in enumerate(prompts):
            print(row_of(number, prompt))
        print_end(prompts, args.engine, good, artifacts.manifest.options.kv_dtype)
    found = None
    if not good and args.engine != "edge10":
        note("looking for the first op that is off")
        if not seen:
            worst = next(r for r in results if not r.good)
            assert turns.preprocessor is not None  # of artifacts with a tower
            patches = turns.preprocessor.image(pictures[results.index(worst)]).parts[0]
            tower = Towers(artifacts, args.engine).tower(patches.size.grid)
            found = locate_in_tower(tower, args.against, patches.patches, plugin=plugin, base=args.base)
        else:  # the language model is the same one for text
            ids = [token for token in prompts[0].ids if token != vision_of(artifacts).ids.image][:24]
            found = locate(artifacts, args.against, ids, args.engine, plugin=plugin, base=args.base)
        tell_divergence(found)
    if args.json:
        print_json(form_of(prompts, good, str(found) if found else None, _pictures(results)))
    return 0 if good else 1


def _print(results: Sequence[PictureResult], exponent: int) -> None:
    """The tower, block by block, over all pictures."""
    for number, result in enumerate(results):
        print(f"picture {number}: {result.name}, embeddings off by {result.relative:.1e} of their mean")
    print(f"\n{'tower':>12}{'min row cosine':>17}{'max |x|':>12}{'in fp32':>12}{'not finite':>12}")
    for rows in zip(*(r.rows for r in results)):
        print(
            f"{rows[0].name:>12}{min(r.cosine for r in rows):>17.7f}{max(r.largest for r in rows):>12.4g}"
            f"{max(r.expected for r in rows):>12.4g}{sum(r.not_finite for r in rows):>12}"
        )
    if exponent:
        print(
            f"max |x| of blocks is the programs', whose stream is 1/{2**exponent} of the model's"
            " (--vision-exponent)"
        )
    print()


def _pictures(results: Sequence[PictureResult]) -> list[PictureChecked]:
    return [
        PictureChecked(
            r.name,
            r.relative,
            tuple(TowerRowsChecked(row.name, row.cosine, row.largest, row.not_finite) for row in r.rows),
        )
        for r in results
    ]
