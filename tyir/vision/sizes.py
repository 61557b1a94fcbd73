"""The size a picture is brought to, its grid of patches and its tokens.

Two kinds of model (transformers 5.24, `models/qwen2_vl/image_processing_pil_qwen2_vl.py` and
`models/clip/image_processing_pil_clip.py`): `GridGeometry` keeps the picture's shape, with sides that are
multiples of a merged patch (Qwen2-VL, Qwen2.5-VL, Qwen3-VL); `SquareGeometry` makes every picture the same
square (CLIP towers of LLaVA), cut out of the middle or padded first.

Widths stand before heights, as in `960x540`; a grid is (rows, columns), as the tower has it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

from tyir.artifacts.vision import ImageSize
from tyir.diagnostics import TyirError

__all__ = [
    "MOST_ASPECT",
    "Geometry",
    "GridGeometry",
    "SquareGeometry",
    "by_grid",
    "described",
    "even_order",
    "nearest",
    "parse_sizes",
    "size_text",
    "smart_resize",
    "smart_resize_video",
    "window_lengths",
]

MOST_ASPECT: Final = 200  # longer to shorter side; transformers refuses more
_MOST_SIDE: Final = 1 << 16
_MOST_SIZES: Final = 64


def size_text(size: tuple[int, ...]) -> str:
    """`960x540`."""
    return f"{size[0]}x{size[1]}"


def described(size: ImageSize) -> str:
    """What becomes of pictures of a size, for people."""
    grid = f"{size.grid[0]} rows of {size.grid[1]} patches"
    return f"{size.name} becomes {size_text(size.resized)}, {grid}, {size.tokens} tokens"


@dataclass(frozen=True)
class GridGeometry:
    """Sides that are multiples of `patch * merge`, and from `min_pixels` to `max_pixels` in all.

    `temporal` frames make one patch; of a still, the picture is repeated.
    """

    patch: int
    merge: int
    temporal: int
    min_pixels: int
    max_pixels: int

    @property
    def unit(self) -> int:
        """Pixels of a token's side."""
        return self.patch * self.merge

    def size(self, width: int, height: int) -> ImageSize:
        """The size of a picture; `TyirError` for one that has no pixels or is too narrow."""
        check_sides(width, height)
        tall, wide = smart_resize(height, width, self.unit, self.min_pixels, self.max_pixels)
        return self.whole((width, height), (wide, tall))

    def whole(self, given: tuple[int, int], resized: tuple[int, int]) -> ImageSize:
        """`given` brought to `resized`, whose sides are multiples of the unit."""
        grid = resized[1] // self.patch, resized[0] // self.patch
        return ImageSize(given, resized, grid, grid[0] * grid[1] // self.merge**2)


@dataclass(frozen=True)
class SquareGeometry:
    """Every picture becomes `crop` (width, height), in patches of `patch`.

    `edge`: the length that the shorter side is brought to, or None when the picture is brought to `resize`
    whatever its shape; then the middle is cut out.  `pad`: the picture is padded to a square with the mean
    colour first, as LLaVA's own code does.  `class_token`: the tower's class token is one more token of the
    picture, before the patches'.
    """

    patch: int
    crop: tuple[int, int]
    edge: int | None = None
    resize: tuple[int, int] | None = None
    pad: bool = False
    class_token: bool = False

    @property
    def merge(self) -> int:
        """Each patch is a token."""
        return 1

    @property
    def temporal(self) -> int:
        """A patch is of one picture."""
        return 1

    def size(self, width: int, height: int) -> ImageSize:
        """The size of a picture, the same for all; `TyirError` for one without pixels."""
        check_sides(width, height)
        grid = self.crop[1] // self.patch, self.crop[0] // self.patch
        return ImageSize((width, height), self.crop, grid, grid[0] * grid[1] + self.class_token)

    def scaled(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) a picture is scaled to before the middle is cut out.

        `get_resize_output_image_size` of transformers' `image_transforms.py`: the longer side is rounded
        down.
        """
        if self.edge is None:
            return self.resize or self.crop
        short, long = min(width, height), max(width, height)
        other = int(self.edge * long / short)
        return (self.edge, other) if width <= height else (other, self.edge)


Geometry = GridGeometry | SquareGeometry


def check_sides(width: int, height: int) -> None:
    """`TyirError` unless a picture has pixels, and is not too narrow to be brought to another size."""
    if width < 1 or height < 1:
        raise TyirError(f"a picture of {width}x{height} has no pixels", help="give one that has")
    if max(width, height) > MOST_ASPECT * min(width, height):
        raise TyirError(
            f"a picture of {width}x{height} is {max(width, height) / min(width, height):.0f} times as long"
            f" as it is wide, the model takes at most {MOST_ASPECT} times",
            help="cut it into pieces, or pad it",
        )


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in multiples of `factor` with a number of pixels within the limits.

    Python's rounding of halves to even counts: 336 / 32 = 10.5 gives 10 (transformers 5.24,
    `image_processing_pil_qwen2_vl.py`).
    """
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if tall * wide > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        tall = max(factor, math.floor(height / beta / factor) * factor)
        wide = max(factor, math.floor(width / beta / factor) * factor)
    elif tall * wide < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        tall = math.ceil(height * beta / factor) * factor
        wide = math.ceil(width * beta / factor) * factor
    return tall, wide


def smart_resize_video(
    frames: int, height: int, width: int, temporal: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """(height, width) of Qwen3-VL's video frames, whose limits are of all frames together.

    Transformers 5.24, `video_processing_qwen3_vl.py`; `frames` is at least `temporal`.
    """
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    count = round(frames / temporal) * temporal
    if count * tall * wide > max_pixels:
        beta = math.sqrt(frames * height * width / max_pixels)
        tall = max(factor, math.floor(height / beta / factor) * factor)
        wide = max(factor, math.floor(width / beta / factor) * factor)
    elif count * tall * wide < min_pixels:
        beta = math.sqrt(min_pixels / (frames * height * width))
        tall = math.ceil(height * beta / factor) * factor
        wide = math.ceil(width * beta / factor) * factor
    return tall, wide


def window_lengths(grid: tuple[int, ...], merge: int, window: int, patch: int) -> tuple[int, ...]:
    """Patches in each window of Qwen2.5-VL's tower, row by row; those at the border are smaller.

    `window` is a side in pixels (`get_vision_window_index` of transformers' `vision_utils.py`).
    """
    side = window // merge // patch
    rows, columns = (_cuts(n // merge, side) for n in grid)
    return tuple(r * c * merge**2 for r in rows for c in columns)


def even_order(lengths: Sequence[int]) -> tuple[int, ...]:
    """The order of windows in which 2, 3 or 4 dies that share a tower by its rows get the most equal shares,
    each a run of whole windows.

    Attention within windows does not see their order, and attention over all not that of its rows.

    >>> even_order((64, 64, 64, 64))
    (0, 1, 2, 3)
    """

    def unevenness(order: tuple[int, ...]) -> float:
        ends = tuple(accumulate(lengths[number] for number in order))
        return sum(_largest_share(ends, dies) * dies / (ends[-1] or 1) for dies in (2, 3, 4)) if ends else 0.0

    tried = (tuple(range(len(lengths))), *(_in_parts(lengths, parts) for parts in (4, 6, 8, 12, 16)))
    return min(tried, key=unevenness)


def _largest_share(ends: Sequence[int], dies: int) -> int:
    """Of runs that end where windows do, nearest to equal shares."""
    cuts = [min(ends, key=lambda end: abs(end * dies - die * ends[-1])) for die in range(1, dies + 1)]
    return max(end - start for start, end in pairwise((0, *cuts)))


def _in_parts(lengths: Sequence[int], parts: int) -> tuple[int, ...]:
    """Windows so that parts of the whole end nearest to where windows do: each in turn takes those whose sum
    comes nearest, the largest ones that do, so that small ones are left to fit.
    """
    left = sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))
    order: list[int] = []
    done, total = 0, sum(lengths)
    for part in range(1, parts):
        wanted = total * part / parts - done
        sums: dict[int, tuple[int, ...]] = {0: ()}  # by sum the windows that make it, the largest first
        for number in left:
            for made, of in list(sums.items()):
                if made < wanted:
                    sums.setdefault(made + lengths[number], (*of, number))
        best = min(sums, key=lambda made: (abs(made - wanted), made))
        done += best
        order += sorted(sums[best])
        left = [n for n in left if n not in sums[best]]
    return (*order, *sorted(left))


def _cuts(length: int, side: int) -> list[int]:
    return [min(side, length - start) for start in range(0, length, side)]


# -------------------------------------------------------------------------------------- sizes of a compile


def parse_sizes(text: str, option: str = "--image") -> tuple[tuple[int, int], ...]:
    """`960x540,1920x1080` as (width, height) each, in order, each once; `TyirError` for anything else."""
    found: dict[tuple[int, int], None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,6})[xX×]([0-9]{1,6})\s*", part)
        if match is None:
            raise TyirError(
                f"{option} {text[:80]!r}: {part.strip()[:40]!r} is not a size",
                help=f"write width x height in pixels, several with commas: {option} 960x540,1920x1080",
            )
        width, height = int(match[1]), int(match[2])
        if not (0 < width <= _MOST_SIDE and 0 < height <= _MOST_SIDE):
            raise TyirError(
                f"{option}: {width}x{height} is out of range", help=f"sides are from 1 to {_MOST_SIDE} pixels"
            )
        check_sides(width, height)
        found[width, height] = None
    if len(found) > _MOST_SIZES:
        raise TyirError(f"{option} names {len(found)} sizes", help=f"give at most {_MOST_SIZES}")
    return tuple(found)


def by_grid(sizes: Iterable[ImageSize]) -> dict[tuple[int, ...], list[ImageSize]]:
    """The sizes that share a program: those of one grid, in order."""
    found: dict[tuple[int, ...], list[ImageSize]] = {}
    for size in sizes:
        found.setdefault(size.grid, []).append(size)
    return found


def nearest(width: int, height: int, compiled: Sequence[ImageSize]) -> ImageSize:
    """The compiled size that changes a picture least: its shape counts more than how large it is.

    Of equal ones the first.
    """

    def change(size: ImageSize) -> float:
        wider, taller = math.log(size.resized[0] / width), math.log(size.resized[1] / height)
        return 2 * abs(wider - taller) + abs(wider + taller) / 2

    return min(compiled, key=change)
