"""Answers as they come: generated, streamed, remembered, and what they took told on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tyir.runtime_sim.session.ending import end_reason
from tyir.runtime_sim.session.session import Session
from tyir.runtime_sim.vision.request import VisionRequest
from tyir.tools.cli import note
from tyir.tools.commands import json_forms
from tyir.tools.run.end_tokens import why
from tyir.tools.run.session_of import Opened
from tyir.tools.run.text_stream import TextStream, pieces
from tyir.tools.run.turns import Prompt, Turns, timed

__all__ = ["Speaker"]

_INTERRUPTED = "by Ctrl-C"


class Speaker:
    """Answers the prompts of a conversation; with `as_json` nothing is written before `print_json`."""

    def __init__(self, opened: Opened, turns: Turns, *, as_json: bool = False) -> None:
        self.opened, self.turns, self.as_json = opened, turns, as_json
        self.loaded = time.perf_counter() - opened.began
        self.answers: list[json_forms.Prompt] = []
        self._first_token: float | None = None
        self._decoded = 0
        self._decoding = 0.0
        self._told = 0

    def answer(self, prompt: Prompt, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Generate, write, and remember the answer.

        It ends early when `interrupted` holds after a token.  When the prompt is refused, or nothing was
        said before the interruption, the question is taken back as if it had not been asked.
        """
        session, start = self.turns.session, time.perf_counter()
        for line in self.turns.said[self._told :]:
            note(line)
        self._told = len(self.turns.said)
        times: list[float] = []
        made: list[int] = []
        shared = _shared(session, prompt)
        tokens = session.generate(
            prompt.given,  # type: ignore[arg-type]  # a session of pictures takes requests, others tokens
            self.opened.limit,
            sampler=self.opened.sampler,
            stop=lambda token: token in self.opened.stops or interrupted(),
        )
        parts: list[str] = []
        try:
            for text in pieces(TextStream(self.turns.tokenizer, prompt.ids), timed(tokens, times, made)):
                parts.append(text)
                if not self.as_json:
                    sys.stdout.write(text)
                    sys.stdout.flush()
        except BaseException:
            self.turns.take_back(prompt)
            raise
        if not self.as_json:
            print(flush=True)
        answer = "".join(parts)
        stopped = bool(made) and made[-1] in self.opened.stops
        if interrupted() and not stopped and not answer.strip():
            self.turns.take_back(prompt)
        else:
            self.turns.chat.answered(answer)
        self._report(prompt, answer, start, times, made, shared, interrupted() and not stopped)

    def print_json(self) -> None:
        """All answers as one form."""
        session = self.turns.session
        rate = self._decoded / self._decoding if self._decoding else 0.0
        json_forms.print_json(
            json_forms.Ran(
                str(session.artifacts.path),
                session.engine_name,
                tuple(self.answers),
                self.loaded,
                self._first_token,
                rate,
            )
        )

    def _report(
        self,
        prompt: Prompt,
        answer: str,
        start: float,
        times: list[float],
        made: list[int],
        shared: int,
        interrupted: bool,
    ) -> None:
        session = self.turns.session
        seconds = dict(prompt.seconds)
        template = seconds.pop("template", 0.0)
        if times:
            seconds["prefill"] = times[0] - start + template
        first = sum(seconds.values())
        reason = end_reason(
            made, self.opened.limit, session.capacity - len(session.tokens), self.opened.stops.__contains__
        )
        ended = why(reason, made, self.opened.stops, self.turns.tokenizer, session.capacity)
        told = json_forms.Prompt(
            prompt.text,
            len(prompt.ids),
            shared,
            tuple(made),
            answer,
            _INTERRUPTED if interrupted else ended,
            prompt.pictures,
            seconds,
        )
        self.answers.append(told)
        if len(self.answers) == 1 and made:
            self._first_token = first
        decoding = times[-1] - times[0] if len(times) > 1 else 0.0
        self._decoded += max(len(times) - 1, 0)
        self._decoding += decoding
        if not self.as_json:
            self._say(told, first, (len(times) - 1) / decoding if decoding else 0.0)

    def _say(self, told: json_forms.Prompt, first: float, decode: float) -> None:
        split = ", ".join(f"{name} {value:.3f}" for name, value in told.seconds.items())
        pictures = f", {told.pictures} picture{'s' * (told.pictures != 1)}" if told.pictures else ""
        reused = f", {told.reused_tokens} of them from the cache" if told.reused_tokens else ""
        count = len(told.tokens)
        rate = f"{count} tokens" + (f" at {decode:.1f} tokens/s" if count > 1 else "")
        loaded = f"loaded in {self.loaded:.1f} s; " if len(self.answers) == 1 else ""
        after = " after that" if loaded else ""
        note(
            f"{loaded}first token {first:.3f} s{after} ({split}); {rate}"
            f" ({self.turns.session.engine_name} engine on this machine, not the device)\n"
            f"{told.prompt_tokens} prompt tokens{pictures}{reused}; ended {told.ended}"
        )


def _shared(session: Session, prompt: Prompt) -> int:
    """How many tokens of a prompt the cache holds."""
    if isinstance(prompt.given, VisionRequest):
        from tyir.runtime_sim.vision.session import VisionSession

        assert isinstance(session, VisionSession)
        return session.shared_with(prompt.given)
    return session.shared_prefix(prompt.given)
