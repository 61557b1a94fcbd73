"""What a manifest says of a vision-language model: how a picture becomes patches, which sizes were compiled,
and how image embeddings and rotary tables enter the language programs.

    vision
      pixels    patch side, frames of a patch, merged patches a side, mean, standard deviation, limits
      ids       tokens that stand for images and mark their begin and end
      rope      which row of the positions turns each pair of channels, with its frequency; absent: plain positions
      dies, die_map, deepstack, exponent
      sizes     per compiled size: given, resized, grid, tokens, order of the patches, a program per die

Sizes are (width, height) in pixels as `--image 252x168` spells them, grids (rows, columns) in patches.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final, Literal

from annotated_types import Interval, MaxLen, MinLen

from tyir.artifacts.programs import MAX_DIES, Count, DieProgram, Name
from tyir.artifacts.schema import closed

__all__ = [
    "MAX_EXPONENT",
    "VISION_EXPONENT",
    "ImageSize",
    "Pixels",
    "Rope",
    "TokenIds",
    "Vision",
    "VisionSize",
    "VisionSplit",
]

Index = Annotated[int, Interval(ge=0, le=2**31 - 1)]
Pair = Annotated[tuple[Count, ...], MinLen(2), MaxLen(2)]
Channels = Annotated[tuple[float, ...], MinLen(1), MaxLen(4)]
MAX_EXPONENT: Final = 12  # of a tower's residual stream: beyond, small weights would vanish
# Divides it by 64: f16 then holds what is up to 4.2e6, and no loss was measurable (docs/vision.md).
VISION_EXPONENT: Final = 6
VisionSplit = Literal["cost", "heads", "rows"]  # of a tower over its dies


@closed
@dataclass(frozen=True)
class ImageSize:
    """One size of pictures: `given` and `resized` (width, height) in pixels, `grid` (rows, columns) in
    patches, `tokens` embeddings of one picture (of one pair of video frames).
    """

    given: Pair
    resized: Pair
    grid: Pair
    tokens: Count

    @property
    def patches(self) -> int:
        """Rows of the tower's input."""
        return self.grid[0] * self.grid[1]

    @property
    def name(self) -> str:
        """`252x168`: the size as it was given, width first."""
        return f"{self.given[0]}x{self.given[1]}"


@closed
@dataclass(frozen=True)
class Pixels:
    """How pixels become the tower's input [patches, channels * temporal * patch * patch].

    `patch`: pixels of a patch's side; `temporal`: frames of a patch (a still is repeated); `merge`: patches
    of a token's side.  pixel -> (pixel * rescale - mean) / std in f32.  `min_pixels`, `max_pixels`: what a
    picture is resized to lie between; None where the checkpoint has one size only.
    """

    channels: Count
    temporal: Count
    patch: Count
    merge: Count
    mean: Channels
    std: Channels
    rescale: float = 1 / 255
    min_pixels: Count | None = None
    max_pixels: Count | None = None

    @property
    def columns(self) -> int:
        """Numbers of one patch."""
        return self.channels * self.temporal * self.patch * self.patch


@closed
@dataclass(frozen=True)
class TokenIds:
    """Tokens of the vocabulary: `image` and `video` are repeated once per embedding, `start` and `end` stand
    around them; None where the model has none.
    """

    image: Index
    video: Index | None = None
    start: Index | None = None
    end: Index | None = None


@closed
@dataclass(frozen=True)
class Rope:
    """The tables `rope_cos` and `rope_sin` [max_kv, D/2] that the language programs take, row = cache slot.

    Pair i of a slot at positions p [3] (time, row, column) is the angle p[axes[i]] * inv_freq[i] in f32; cos
    and sin are multiplied by `scale` and rounded to the programs' type.

    `program` makes them of `positions` i32 [3, max_kv], each below max_kv; artifacts of older compilers have
    none.
    """

    axes: Annotated[tuple[Annotated[int, Interval(ge=0, le=2)], ...], MinLen(1), MaxLen(4096)]
    inv_freq: Annotated[tuple[float, ...], MinLen(1), MaxLen(4096)]
    scale: float = 1.0
    program: DieProgram | None = None


@closed
@dataclass(frozen=True)
class VisionSize:
    """A compiled size: `programs` take `patches` [patches, columns] and return `embeddings` [tokens, hidden]
    (and `deepstack0`, ... of the same shape).

    `order`: the programs' g-th group of merge * merge patches, and g-th embedding, is number order[g] of the
    processor's; empty: the processor's own order.
    """

    image: ImageSize
    order: Annotated[tuple[Index, ...], MaxLen(1 << 20)]
    programs: Annotated[tuple[DieProgram, ...], MinLen(1)]


@closed
@dataclass(frozen=True)
class Vision:
    """All of it; `deepstack`: how many further outputs of the tower are added to the language model's hidden
    states, given to its programs as `deepstack0`, ... [1, seqlen, hidden], zero at text; `exponent`: the
    tower's residual stream is divided by this power of two (`scale-residual`).
    """

    model_type: Name
    dies: Annotated[int, Interval(ge=1, le=MAX_DIES)]
    die_map: tuple[Annotated[int, Interval(ge=0, le=2**15)], ...]
    pixels: Pixels
    ids: TokenIds
    sizes: Annotated[tuple[VisionSize, ...], MinLen(1), MaxLen(256)]
    deepstack: Annotated[int, Interval(ge=0, le=64)] = 0
    rope: Rope | None = None
    exponent: Annotated[int, Interval(ge=0, le=MAX_EXPONENT)] = 0

    def program(self, size: int, die: int) -> DieProgram:
        """The program of the size number `size` for a die."""
        return next(p for p in self.sizes[size].programs if p.die == die)

    @property
    def programs(self) -> tuple[DieProgram, ...]:
        """All of them: the towers' and that of the rotary tables."""
        tables = () if self.rope is None or self.rope.program is None else (self.rope.program,)
        return (*(p for size in self.sizes for p in size.programs), *tables)
