"""Answers of `tyir-run`: one question about pictures, or a chat on standard input."""

from __future__ import annotations

import argparse
import io
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tyir.diagnostics import TyirError
from tyir.runtime_sim.session.ending import end_reason
from tyir.runtime_sim.session.sampling import Sampler
from tyir.runtime_sim.session.session import Session
from tyir.runtime_sim.vision.request import VisionRequest
from tyir.tools.cli import note
from tyir.tools.run.end_tokens import why
from tyir.tools.run.prompts import read_prompts
from tyir.tools.run.text_stream import TextStream, pieces
from tyir.tools.run.turns import Prompt, Turns, timed

__all__ = ["run_turns"]

_COMMANDS: Final = ("/image", "/video", "/reset")


def run_turns(
    args: argparse.Namespace,
    session: Session,
    tokenizer: Any,
    sampler: Sampler,
    stops: Mapping[int, str],
    loaded: float,
) -> int:
    """Answer `--prompt` about `--image` and `--video`, then with `--chat` what standard input asks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale: models write any character
    if args.chat and args.json:
        raise TyirError("--json is for one question, --chat for many", help="leave one of them out")
    turns = Turns(session, tokenizer, resize=args.resize, raw=args.raw)
    speaker = _Speaker(args, turns, sampler, stops, loaded)
    images, videos = args.image or [], args.video or []
    if args.cache is not None and args.cache.exists():
        session.restore(args.cache)
    if args.prompt is not None or not args.chat:
        prompts = read_prompts(args.prompt)
        if len(prompts) > 1:
            raise TyirError(
                "questions about pictures are answered one at a time", help="give one --prompt, or --chat"
            )
        speaker.answer(turns.ask(prompts[0], images, videos, args.fps))
        images, videos = [], []
    if args.chat:
        _chat(args, turns, speaker, images, videos)
    if args.cache is not None:
        session.save(args.cache)
    return 0


class _Speaker:
    """Writes answers as they come, and what they took to standard error."""

    def __init__(
        self,
        args: argparse.Namespace,
        turns: Turns,
        sampler: Sampler,
        stops: Mapping[int, str],
        loaded: float,
    ) -> None:
        self.args, self.turns, self.sampler, self.stops = args, turns, sampler, stops
        self.loaded = loaded
        self._told = 0

    def answer(self, prompt: Prompt) -> None:
        """Generate, write, and remember the answer."""
        session, start = self.turns.session, time.perf_counter()
        for line in self.turns.said[self._told :]:
            note(line)
        self._told = len(self.turns.said)
        times: list[float] = []
        made: list[int] = []
        shared = _shared(session, prompt)
        tokens = session.generate(
            prompt.given,  # type: ignore[arg-type]  # a session of pictures takes requests, others tokens
            self.args.max_tokens,
            sampler=self.sampler,
            stop=self.stops.__contains__,
        )
        parts = []
        for text in pieces(TextStream(self.turns.tokenizer, prompt.ids), timed(tokens, times, made)):
            parts.append(text)
            if not self.args.json:
                sys.stdout.write(text)
                sys.stdout.flush()
        if not self.args.json:
            print(flush=True)
        answer = "".join(parts)
        self.turns.chat.answered(answer)
        self._report(prompt, answer, start, times, made, shared)

    def _report(
        self,
        prompt: Prompt,
        answer: str,
        start: float,
        times: list[float],
        made: list[int],
        shared: int,
    ) -> None:
        session = self.turns.session
        decode = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
        seconds = dict(prompt.seconds)
        template = seconds.pop("template", 0.0)
        if times:
            seconds["prefill"] = times[0] - start + template
        first = sum(seconds.values())
        split = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
        pictures = f", {prompt.pictures} picture{'s' * (prompt.pictures != 1)}" if prompt.pictures else ""
        reused = f", {shared} of them from the cache" if shared else ""
        reason = end_reason(
            made, self.args.max_tokens, session.capacity - len(session.tokens), self.stops.__contains__
        )
        ended = why(reason, made, self.stops, self.turns.tokenizer, session.capacity)
        if self.args.json:
            self._print_json(prompt, answer, made, shared, ended, seconds, decode)
            return
        rate = f"{len(times)} tokens at {decode:.1f} tokens/s" if len(times) > 1 else f"{len(times)} token"
        note(
            f"loaded in {self.loaded:.1f} s; first token {first:.3f} s after that ({split}), {rate}"
            f" ({self.args.engine} engine on this machine, not the device)\n"
            f"{len(prompt.ids)} prompt tokens{pictures}{reused}; ended {ended}"
        )

    def _print_json(
        self,
        prompt: Prompt,
        answer: str,
        made: list[int],
        shared: int,
        ended: str,
        seconds: Mapping[str, float],
        decode: float,
    ) -> None:
        from tyir.tools.commands import json_forms

        told = json_forms.Prompt(
            prompt.text, len(prompt.ids), shared, tuple(made), answer, ended, prompt.pictures, dict(seconds)
        )
        first = sum(seconds.values()) if made else None
        form = json_forms.Ran(str(self.args.artifacts), self.args.engine, (told,), self.loaded, first, decode)
        json_forms.print_json(form)


def _shared(session: Session, prompt: Prompt) -> int:
    """How many tokens of a prompt the cache holds."""
    if isinstance(prompt.given, VisionRequest):
        from tyir.runtime_sim.vision.session import VisionSession

        assert isinstance(session, VisionSession)
        return session.shared_with(prompt.given)
    return session.shared_prefix(prompt.given)


def _chat(
    args: argparse.Namespace, turns: Turns, speaker: _Speaker, images: list[Path], videos: list[list[Path]]
) -> None:
    """One line after the other; pictures that a line shows belong to the next question.

    At a terminal an error is told and the turn is as if it had not been asked; from a pipe it ends the chat.
    """
    at_terminal = sys.stdin.isatty()
    for line in _lines(at_terminal):
        try:
            name, _, rest = line.partition(" ")
            if name == "/reset":
                turns.chat.forget()
                turns.session.reset()
                images, videos = [], []
            elif name == "/image":
                images += map(Path, shlex.split(rest))
            elif name == "/video":
                videos.append([Path(part) for part in shlex.split(rest)])
            elif name.startswith("/") and name[1:].isalpha():
                raise TyirError(f"there is no command {name}", help=f"there are {', '.join(_COMMANDS)}")
            elif line:
                shown, images, videos = (images, videos), [], []
                speaker.answer(turns.ask(line, *shown, args.fps))
        except TyirError as error:
            if not at_terminal:
                raise
            print(error.render(), file=sys.stderr)


def _lines(at_terminal: bool) -> Iterator[str]:
    """Lines of standard input, without the end of a line."""
    while True:
        if at_terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()
