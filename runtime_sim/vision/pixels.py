"""Pixels to the tower's input, equal bit for bit to transformers' Pillow processors.

    prepare(picture, settings).patches        # [N, C * T * P * P] float32, in the order of the processor

Transformers 5.24, `image_processing_backends.PilBackend`: Pillow's own resampling in uint8, the factor in
float64 rounded to float32, mean and standard deviation in float32.  A value of 8 bits has 256 results per
colour, so that all of the arithmetic is a table.

Order of patches: of `GridGeometry` the four of a token are neighbours (block row, block column, row, column),
of `SquareGeometry` row by row.  Inside a patch: colour, frame, row, column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.artifacts.vision import ImageSize
from tyir.diagnostics import TyirError
from tyir.runtime_sim.vision.pictures import Picture, pillow
from tyir.vision.settings import ImageSettings
from tyir.vision.sizes import GridGeometry, SquareGeometry

__all__ = ["Media", "Patches", "prepare", "prepare_video"]

Array = npt.NDArray[Any]
_COLOURS: Final = 3


@dataclass(frozen=True, eq=False)
class Patches:
    """Input of one run of the tower: `patches` [N, C * T * P * P] float32 of a picture of `size`.

    `sha256`: of the pictures they were made of, with what they were brought to.
    """

    patches: npt.NDArray[np.float32]
    size: ImageSize
    sha256: str


@dataclass(frozen=True, eq=False)
class Media:
    """A picture or a video of a prompt: a run of the tower for each of `parts`.

    `seconds`: of a video, when each part is shown; empty of a picture.  `interval`: the seconds that a part
    stands for.  `name`: what messages call it.
    """

    parts: tuple[Patches, ...]
    seconds: tuple[float, ...] = ()
    interval: float = 1.0
    name: str = "the picture"

    @property
    def is_video(self) -> bool:
        """Whether the tokens of videos stand for it."""
        return bool(self.seconds)

    @property
    def size(self) -> ImageSize:
        """Of each part."""
        return self.parts[0].size


def prepare(picture: Picture, settings: ImageSettings, size: ImageSize | None = None) -> Patches:
    """The patches of a still, which the model sees `temporal` times.

    `size`: one to bring it to in place of the rule's.
    """
    size = settings.size(*picture.size) if size is None else size
    return _patches([picture] * settings.geometry.temporal, settings, size)


def prepare_video(
    frames: Sequence[Picture], settings: ImageSettings, size: ImageSize | None = None
) -> list[Patches]:
    """The patches of each group of `temporal` frames; the last frame is repeated until it is full.

    `TyirError` for a model that takes stills only.
    """
    step = settings.geometry.temporal
    if not isinstance(settings.geometry, GridGeometry):
        raise TyirError("this model takes pictures and no videos", help="give the frames with --image")
    size = settings.size(*frames[0].size, len(frames)) if size is None else size
    whole = [*frames, *[frames[-1]] * (-len(frames) % step)]
    return [_patches(whole[i : i + step], settings, size) for i in range(0, len(whole), step)]


def _patches(frames: Sequence[Picture], settings: ImageSettings, size: ImageSize) -> Patches:
    table = _table(settings)
    made: dict[int, Array] = {}  # a still is resized once
    for frame in frames:
        if id(frame) not in made:
            pixels = _resized(frame, settings, size)
            made[id(frame)] = np.stack([table[c][pixels[..., c]] for c in range(_COLOURS)])
    values = np.stack([made[id(frame)] for frame in frames], axis=1)  # [C, T, H, W]
    digest = "+".join([*dict.fromkeys(frame.sha256 for frame in frames), str(size.resized)])
    return Patches(_cut(values, settings.geometry.patch, settings.geometry.merge), size, digest)


def _cut(values: Array, patch: int, merge: int) -> Array:
    """[C, T, H, W] to [N, C * T * P * P], tokens of `merge` x `merge` patches together."""
    colours, frames, height, width = values.shape
    rows, columns = height // (patch * merge), width // (patch * merge)
    blocks = values.reshape(colours, frames, rows, merge, patch, columns, merge, patch)
    order = blocks.transpose(2, 5, 3, 6, 0, 1, 4, 7)
    return np.ascontiguousarray(order.reshape(rows * columns * merge**2, -1))


def _table(settings: ImageSettings) -> Array:
    """What each value of 8 bits becomes, [colours, 256] float32."""
    values: Array = np.arange(256, dtype=np.uint8)
    if settings.factor is not None:
        values = (values.astype(np.float64) * settings.factor).astype(np.float32)
    values = values.astype(np.float32)
    if settings.mean is None:
        return np.stack([values] * _COLOURS)
    mean, std = np.array(settings.mean, np.float32), np.array(settings.std, np.float32)
    return np.stack([(values - mean[c]) / std[c] for c in range(_COLOURS)])


# ------------------------------------------------------------------------------------------------ geometry


def _resized(picture: Picture, settings: ImageSettings, size: ImageSize) -> npt.NDArray[np.uint8]:
    """[height, width, 3] uint8 of the size that the tower takes."""
    geometry = settings.geometry
    if isinstance(geometry, GridGeometry):
        return _scale(picture.pixels, size.resized, settings.resample)
    pixels = _padded(picture.pixels, settings) if geometry.pad else picture.pixels
    scaled = _scale(pixels, geometry.scaled(pixels.shape[1], pixels.shape[0]), settings.resample)
    return _cropped(scaled, geometry)


def _scale(pixels: npt.NDArray[np.uint8], size: tuple[int, ...], resample: int) -> npt.NDArray[np.uint8]:
    image = pillow().fromarray(np.ascontiguousarray(pixels))
    return np.array(image.resize(size, resample=resample))


def _padded(pixels: npt.NDArray[np.uint8], settings: ImageSettings) -> npt.NDArray[np.uint8]:
    """In the middle of a square of the mean colour (`LlavaImageProcessorPil.pad_to_square`)."""
    height, width = pixels.shape[:2]
    side = max(height, width)
    colour = [int(value * 255) for value in settings.mean or (0.0,) * _COLOURS]
    whole = np.empty((side, side, _COLOURS), np.uint8)
    whole[:] = np.array(colour, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    whole[top : top + height, left : left + width] = pixels
    return whole


def _cropped(pixels: npt.NDArray[np.uint8], geometry: SquareGeometry) -> npt.NDArray[np.uint8]:
    """The middle, with black around a picture that is smaller (`image_transforms.center_crop`)."""
    wide, tall = geometry.crop
    whole = np.zeros((max(tall, pixels.shape[0]), max(wide, pixels.shape[1]), _COLOURS), np.uint8)
    top, left = (math.ceil((whole.shape[i] - pixels.shape[i]) / 2) for i in range(2))
    whole[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    first_row = (pixels.shape[0] - tall) // 2 + top
    first_column = (pixels.shape[1] - wide) // 2 + left
    return whole[first_row : first_row + tall, first_column : first_column + wide]
