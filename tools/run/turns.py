"""One question after the other: pictures prepared, the tower run, the prompt put together, timed apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tyir.runtime_sim.session.session import Session
from tyir.runtime_sim.vision.pictures import Picture, read_frames, read_picture
from tyir.runtime_sim.vision.pixels import Media
from tyir.runtime_sim.vision.preprocessor import FRAMES_PER_SECOND, Preprocessor
from tyir.runtime_sim.vision.request import VisionRequest
from tyir.runtime_sim.vision.session import VisionSession
from tyir.tools.run.chat import Chat, chat_template, marks_of
from tyir.tools.run.prompts import token_ids
from tyir.tools.run.seeing import Seeing

__all__ = ["Prompt", "Turns", "timed"]


@dataclass
class Prompt:
    """What a session is given, with the seconds that went into it: `seconds` by what they were spent on."""

    text: str
    given: Sequence[int] | VisionRequest
    pictures: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def ids(self) -> Sequence[int]:
        """Its tokens."""
        return self.given.ids if isinstance(self.given, VisionRequest) else self.given


class Turns:
    """A conversation of a session; `said` collects what was done to pictures on their way."""

    def __init__(
        self,
        session: Session,
        tokenizer: Any,
        *,
        resize: bool = False,
        raw: bool = False,
        template: str | None = None,
        system: str = "",
    ) -> None:
        """`template`: Jinja in place of the folder's; `system`: what the model is told before everything."""
        self.session = session
        self.tokenizer = tokenizer
        self.marks = marks_of(session.artifacts, tokenizer)
        self.seeing: Seeing | None = None
        if isinstance(session, VisionSession) and self.marks is not None:
            self.seeing = Seeing(
                session.artifacts,
                session.engine_name,
                tokenizer,
                self.marks,
                resize=resize,
                group=session.group,
            )
        if template is None:
            template = "" if raw else chat_template(session.artifacts, tokenizer, self.marks)
        self.chat = Chat(tokenizer, template, self.marks, system)
        self.raw = raw

    @property
    def failed(self) -> bool:
        """Whether nothing can be asked any more: a process that dies ran in is gone."""
        return self.session.group is not None and self.session.group.problem is not None

    @property
    def preprocessor(self) -> Preprocessor | None:
        """What prepares pictures; None for a model that takes none."""
        return self.seeing.preprocessor if self.seeing is not None else None

    @property
    def said(self) -> list[str]:
        """What was done to pictures."""
        return self.preprocessor.said if self.preprocessor is not None else []

    def ask(
        self,
        question: str,
        images: Sequence[Path] = (),
        videos: Sequence[Sequence[Path]] = (),
        frames_per_second: float = FRAMES_PER_SECOND,
        shown: Sequence[Picture] = (),
    ) -> Prompt:
        """The prompt of the next turn, about pictures in files and such as are `shown`; `TyirError` for
        what cannot be shown to the model, and the turn is as if it had not been asked.
        """
        clock = _Clock()
        media: list[Media] = []
        if (prepare := self.preprocessor) is not None:
            media += [prepare.image(read_picture(path)) for path in images]
            media += [prepare.image(picture) for picture in shown]
            media += [prepare.video(read_frames(paths), frames_per_second) for paths in videos]
        elif images or videos:
            from tyir.runtime_sim.vision.preprocessor import vision_of

            vision_of(self.session.artifacts)
        clock.lap("preprocess")
        before = len(self.chat.messages), len(self.chat.media)
        try:
            if self.raw:
                self.chat.media += media
                text = question
            else:
                text = self.chat.ask(question, media)
            given = self._given(text, clock)
        except BaseException:
            del self.chat.messages[before[0] :], self.chat.media[before[1] :]
            raise
        return Prompt(text, given, len(media), clock.seconds)

    def take_back(self, prompt: Prompt) -> None:
        """The last question, of which this is the prompt, is as if it had not been asked."""
        chat = self.chat
        del chat.media[len(chat.media) - prompt.pictures :]
        if not self.raw:
            chat.messages.pop()

    def _given(self, text: str, clock: _Clock) -> Sequence[int] | VisionRequest:
        if self.seeing is None:
            return token_ids(self.tokenizer, text)
        return self.seeing.request(text, self.chat.media, clock.lap)


class _Clock:
    """Seconds by name, one after the other."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._now = now
        self._last = now()

    def lap(self, name: str) -> None:
        self._last, before = self._now(), self._last
        self.seconds[name] = self.seconds.get(name, 0.0) + self._last - before


def timed(tokens: Iterator[int], times: list[float], made: list[int]) -> Iterator[int]:
    """The tokens as they come, each with the moment it came."""
    for token in tokens:
        times.append(time.perf_counter())
        made.append(token)
        yield token
