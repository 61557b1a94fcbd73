"""Answers of `tyir-run` that a chat template asks for: one question about pictures, or a chat."""

from __future__ import annotations

import argparse

from tyir.diagnostics import TyirError
from tyir.runtime_sim.vision.preprocessor import vision_of
from tyir.tools.run.conversation import converse
from tyir.tools.run.prompts import read_prompts
from tyir.tools.run.session_of import Opened, save_cache
from tyir.tools.run.speaker import Speaker
from tyir.tools.run.turns import Turns

__all__ = ["run_turns"]


def run_turns(args: argparse.Namespace, opened: Opened) -> None:
    """Answer `--prompt` about `--image` and `--video`, then with `--chat` what standard input asks."""
    images, videos = args.image or [], args.video or []
    if images or videos:
        vision_of(opened.session.artifacts)  # said before a template is asked for
    turns = Turns(opened.session, opened.tokenizer, resize=args.resize, raw=args.raw)
    speaker = Speaker(opened, turns, as_json=args.json)
    if args.cache is not None and args.cache.exists():
        opened.session.restore(args.cache)
    if args.prompt is not None or not args.chat:
        prompts = read_prompts(args.prompt)
        if len(prompts) > 1:
            raise TyirError(
                "questions about pictures are answered one at a time", help="give one --prompt, or --chat"
            )
        speaker.answer(turns.ask(prompts[0], images, videos, args.fps))
        images, videos = [], []
    if args.chat:
        converse(speaker, args.fps, images, videos)
    if args.cache is not None:
        save_cache(opened.session, args.cache)
    if args.json:
        speaker.print_json()
