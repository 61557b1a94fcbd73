"""Places of pictures in a prompt: one token of the template for each, repeated to as many as it has rows.

Transformers 5.24, `processing_utils.ProcessorMixin.get_text_with_replacements`: the text is expanded before
it is split into tokens.  Qwen3-VL's videos are told apart by times: each part of one is `<0.3 seconds>`,
then a picture of its own between the marks of its begin and end (`processing_qwen3_vl.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from tyir.artifacts.vision import TokenIds
from tyir.diagnostics import TyirError
from tyir.runtime_sim.vision.pixels import Media
from tyir.runtime_sim.vision.positions import VisionSpan, video_steps

__all__ = ["Marks", "Placed", "VideoRule", "expand", "places_in", "spans_of"]

_TIMED: Final = "qwen3_vl"


@dataclass(frozen=True)
class VideoRule:
    """How a family counts time in its videos.

    `timed`: times are written as text, and a video is a row of pictures (Qwen3-VL).  `tokens_per_second`:
    positions that a second takes (Qwen2.5-VL), or None when each part takes one (Qwen2-VL).
    """

    timed: bool = False
    tokens_per_second: float | None = None

    @classmethod
    def of(cls, model_type: str, vision_config: dict[str, object]) -> VideoRule:
        """Of a model's config.json; `TyirError` when it lacks the rate that its family counts by."""
        if not model_type.startswith("qwen2_5_vl"):
            return cls(timed=model_type.startswith(_TIMED))
        rate = vision_config.get("tokens_per_second")
        if not isinstance(rate, (int, float)) or isinstance(rate, bool) or not 0 < rate < 1e6:
            raise TyirError(
                "vision_config of config.json does not say how many tokens_per_second a video has",
                help="restore config.json of the original model",
            )
        return cls(tokens_per_second=float(rate))


@dataclass(frozen=True)
class Marks:
    """The tokens of a prompt that stand for pictures, as text: of one row of a picture and of a video, and
    around them; None where the model has none.
    """

    image: str
    video: str | None = None
    start: str | None = None
    end: str | None = None


@dataclass(frozen=True, eq=False)
class Placed:
    """A picture or video at its place: the spans of its tokens, in all as many as its parts have rows."""

    media: Media
    spans: tuple[VisionSpan, ...]

    def parts(self) -> Iterator[tuple[int, int]]:
        """The first token and the number of tokens of each part."""
        tokens = self.media.size.tokens
        starts = [
            span.start + offset for span in self.spans for offset in range(0, span.count, tokens)
        ]  # a span of a video that is not timed holds all of its parts
        yield from ((start, tokens) for start in starts)


def places_in(text: str, marks: Marks) -> tuple[int, int]:
    """How many places for pictures and for videos a text has."""
    return text.count(marks.image), text.count(marks.video) if marks.video else 0


def expand(text: str, media: Sequence[Media], marks: Marks, rule: VideoRule) -> str:
    """The text with each place as long as what comes there.

    `TyirError` unless there is a place for each picture and each video, and none is left.
    """
    given = sum(not m.is_video for m in media), sum(m.is_video for m in media)
    places = places_in(text, marks)
    for what, mark, has, wants in zip(("picture", "video"), (marks.image, marks.video), places, given):
        if has != wants:
            raise TyirError(
                f"the prompt has {has} {_plural(what, 'place', has)} ({mark}) and {wants}"
                f" {what}{'s' * (wants != 1)} {'is' if wants == 1 else 'are'} given",
                help=f"write {mark} once for each {what}, or leave it out: the chat template puts it first",
            )
    waiting = {
        False: iter([m for m in media if not m.is_video]),
        True: iter([m for m in media if m.is_video]),
    }
    known = [re.escape(mark) for mark in (marks.image, marks.video) if mark]

    def replaced(match: re.Match[str]) -> str:
        return _rows(next(waiting[match[0] == marks.video]), match[0], marks, rule)

    return re.sub("|".join(known), replaced, text)


def _plural(what: str, noun: str, count: int) -> str:
    return f"{noun}{'s' * (count != 1)} for {what}s"


def _rows(media: Media, mark: str, marks: Marks, rule: VideoRule) -> str:
    """What stands for one picture or video."""
    tokens = media.size.tokens
    if not (media.is_video and rule.timed):
        return mark * (tokens * len(media.parts))
    start, end = marks.start or "", marks.end or ""
    return "".join(f"<{seconds:.1f} seconds>{start}{mark * tokens}{end}" for seconds in media.seconds)


def spans_of(
    ids: Sequence[int], media: Sequence[Media], tokens: TokenIds, merge: int, rule: VideoRule
) -> list[Placed]:
    """Where the rows of each picture and video go in a prompt that `expand` has made.

    `TyirError` when the tokenizer made other tokens of the places than the model knows.
    """
    runs = {False: _runs(ids, tokens.image), True: _runs(ids, tokens.video)}
    placed = []
    for item in media:
        grid = _grid_of_tokens(item, merge)
        spans: list[VisionSpan] = []
        parts = len(item.parts)
        for steps in _steps(item, rule):
            start, found = next(runs[item.is_video], (0, 0))
            span = VisionSpan(start, grid, steps)
            runs[item.is_video] = _after(runs[item.is_video], start, found, span.count)
            if found < span.count:
                raise TyirError(
                    f"{item.name} takes {parts * item.size.tokens} tokens, the prompt has a row of {found}",
                    help="use the tokenizer of the original model: it has to know the token of pictures",
                )
            spans.append(span)
        placed.append(Placed(item, tuple(spans)))
    left = next(runs[False], None) or next(runs[True], None)
    if left is not None:
        raise TyirError(
            f"the prompt has tokens for pictures at {left[0]} and no picture for them",
            help="give one more --image",
        )
    return placed


def _grid_of_tokens(media: Media, merge: int) -> tuple[int, int]:
    """Rows and columns of a picture's tokens; with a class token they are a row of as many (the models of
    such towers count all tokens alike).
    """
    rows, columns = (side // merge for side in media.size.grid)
    return (rows, columns) if rows * columns == media.size.tokens else (1, media.size.tokens)


def _steps(media: Media, rule: VideoRule) -> list[tuple[int, ...]]:
    """The times, as positions, of each span of a picture or video."""
    if not media.is_video or rule.timed:
        return [(0,)] * len(media.parts)
    return [video_steps(len(media.parts), rule.tokens_per_second, media.interval)]


def _runs(ids: Sequence[int], token: int | None) -> Iterator[tuple[int, int]]:
    """Start and length of each row of one token."""
    start = None
    for number, each in enumerate(ids):
        if each == token and start is None:
            start = number
        elif each != token and start is not None:
            yield start, number - start
            start = None
    if start is not None:
        yield start, len(ids) - start


def _after(runs: Iterator[tuple[int, int]], start: int, found: int, taken: int) -> Iterator[tuple[int, int]]:
    """The rows that are left: two pictures side by side are one row of tokens."""
    if found > taken:
        yield start + taken, found - taken
    yield from runs
