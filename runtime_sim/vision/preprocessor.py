"""Pictures to patches as compiled artifacts need them: their settings, their sizes, their refusals."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final

from tyir.artifacts.vision import ImageSize, Vision
from tyir.diagnostics import TyirError
from tyir.execution.artifacts import Artifacts
from tyir.runtime_sim.vision.pictures import Picture
from tyir.runtime_sim.vision.pixels import Media, prepare, prepare_video
from tyir.text.json_files import json_object
from tyir.vision.settings import ImageSettings, image_settings, video_settings
from tyir.vision.sizes import GridGeometry, nearest, size_text

__all__ = ["FRAMES_PER_SECOND", "Preprocessor", "part_seconds", "vision_of"]

FRAMES_PER_SECOND: Final = 2.0  # at which these models' own tools sample videos
_CONFIG: Final = "config.json"


def part_seconds(frames: int, step: int, frames_per_second: float) -> tuple[float, ...]:
    """When each part of a video is shown: the middle of its first and last frame."""
    shown = [min(i, frames - 1) / frames_per_second for i in range(-(-frames // step) * step)]
    return tuple((shown[i] + shown[i + step - 1]) / 2 for i in range(0, len(shown), step))


def vision_of(artifacts: Artifacts) -> Vision:
    """What the manifest says of pictures; `TyirError` for artifacts of a model that takes none."""
    if artifacts.manifest.vision is None:
        raise TyirError(
            f"{artifacts.path} takes text only: it was compiled without a size of pictures",
            help="compile a vision-language model with --image WIDTHxHEIGHT",
        )
    return artifacts.manifest.vision


class Preprocessor:
    """Prepares pictures and videos for the towers that a folder holds.

    A picture whose grid was not compiled is refused, with the nearest size that was; with `resize` it is
    brought to that one, and `said` tells so.
    """

    def __init__(self, artifacts: Artifacts, *, resize: bool = False) -> None:
        self.artifacts = artifacts
        self.vision = vision_of(artifacts)
        self.resize = resize
        self.said: list[str] = []

    @property
    def sizes(self) -> list[ImageSize]:
        """The sizes that were compiled, in order."""
        return [size.image for size in self.vision.sizes]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's own configuration."""
        data = self._find(_CONFIG)
        help = "compile the model again, or copy it from the original model's folder"
        if data is None:
            raise TyirError(f"{self.artifacts.path / _CONFIG} is missing", help=help)
        return json_object(data, self.artifacts.path / _CONFIG, help)

    @cached_property
    def image_settings(self) -> ImageSettings:
        """How pictures are prepared: what the folder says, within the limits that were compiled."""
        found = image_settings(self._find, self.artifacts.path, self.config)
        pixels = self.vision.pixels
        if isinstance(found.geometry, GridGeometry):
            found = found.with_limits(pixels.min_pixels, pixels.max_pixels)
        return self._agrees(found)

    @cached_property
    def video_settings(self) -> ImageSettings:
        """The same for frames of videos."""
        return self._agrees(video_settings(self._find, self.artifacts.path, self.config))

    def image(self, picture: Picture) -> Media:
        """A still, ready for the tower; `TyirError` for a size that was not compiled."""
        settings = self.image_settings
        self.said += [f"{picture.name}: {done}" for done in picture.done]
        size = self._compiled(picture.name, picture.size, settings.size(*picture.size))
        return Media((prepare(picture, settings, size),), name=picture.name)

    def video(self, frames: Sequence[Picture], frames_per_second: float = FRAMES_PER_SECOND) -> Media:
        """A video, `temporal` frames a part, shown at the middle of their times.

        `TyirError` for a size that was not compiled, and for a rate that is not a number of frames.
        """
        if not 0 < frames_per_second < float("inf"):
            raise TyirError(
                f"--fps {frames_per_second} is not a number of frames in a second", help="give one above 0"
            )
        if self.vision.ids.video is None:
            raise TyirError("this model takes pictures and no videos", help="give the frames with --image")
        settings, first = self.video_settings, frames[0]
        self.said += [f"{frame.name}: {done}" for frame in frames for done in frame.done]
        size = self._compiled(first.name, first.size, settings.size(*first.size, len(frames)))
        parts = prepare_video(frames, settings, size)
        step = settings.geometry.temporal
        seconds = part_seconds(len(frames), step, frames_per_second)
        return Media(tuple(parts), seconds, step / frames_per_second, f"the video of {first.name}")

    def _compiled(self, name: str, given: tuple[int, int], wanted: ImageSize) -> ImageSize:
        """The compiled size that a picture is brought to."""
        same = next((size for size in self.sizes if size.grid == wanted.grid), None)
        if same is not None:
            return wanted
        near = nearest(*given, self.sizes)
        if self.resize:
            self.said.append(
                f"{name}: brought from {size_text(given)} to {size_text(near.resized)}, the size compiled for"
                f" {near.name} (its own would be {size_text(wanted.resized)})"
            )
            return near
        known = ", ".join(size.name for size in self.sizes)
        raise TyirError(
            f"{name} is {size_text(given)}, which the model sees as {size_text(wanted.resized)}: compiled"
            f" are {known}",
            help=(
                f"compile with --image {size_text(given)} too, or add --resize to bring it to"
                f" {size_text(near.resized)}, the nearest one"
            ),
        )

    def _find(self, name: str) -> bytes | None:
        file = self.artifacts.find(name)
        return None if file is None else file.read()

    def _agrees(self, settings: ImageSettings) -> ImageSettings:
        """`TyirError` when the folder's settings are not those that the programs were compiled with."""
        pixels, geometry = self.vision.pixels, settings.geometry
        mine = (geometry.patch, geometry.merge, geometry.temporal, settings.mean, settings.std)
        theirs = (pixels.patch, pixels.merge, pixels.temporal, pixels.mean, pixels.std)
        plain = settings.mean is None
        if mine[:3] != theirs[:3] or (not plain and mine[3:] != theirs[3:]):
            raise TyirError(
                f"{self.artifacts.path / settings.source} has other settings than those that the programs"
                " were compiled with",
                help="compile the model again, or restore the file",
            )
        return settings
