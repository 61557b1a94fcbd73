"""Files of pictures, as RGB pixels: what was converted is said, what cannot be is refused.

Pillow decodes (the extra `vision`), from a list of formats: others start programs of the system or read
no picture.  Transparency goes onto white, as in transformers' `image_transforms.convert_to_rgb`; rotation
by EXIF and 16 bits are undone first, which that leaves to the caller.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.process.files import read_regular
from tyir.vision.sizes import size_text

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MOST_PIXELS", "Picture", "as_picture", "decode_picture", "pillow", "read_frames", "read_picture"]

MOST_PIXELS: Final = 100_000_000  # 300 MB as RGB; a camera's have 12 to 60 million
_MOST_BYTES: Final = 256 << 20
_MOST_FRAMES: Final = 2048
_FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
_SUFFIXES: Final = (
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".avif",
)
_CONVERT: Final = "save it as PNG or JPEG with any program that shows pictures"
_ORIENTATION: Final = 0x0112  # EXIF's tag, 1 being upright


@dataclass(frozen=True, eq=False)
class Picture:
    """Pixels [height, width, 3] uint8, RGB, with what was done to get them.

    `name`: what messages call it.
    """

    pixels: npt.NDArray[np.uint8]
    name: str = "the picture"
    done: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.pixels.shape[1], self.pixels.shape[0]

    @cached_property
    def sha256(self) -> str:
        """Of shape and pixels: two pictures that look the same to the tower have the same."""
        found = hashlib.sha256(repr(self.pixels.shape).encode())
        found.update(self.pixels.tobytes())
        return found.hexdigest()


def pillow() -> Any:
    """`PIL.Image`; `TyirError` when Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise TyirError(
            f"reading and resizing pictures needs Pillow, which cannot be imported: {error}",
            help="pip install 'tyir[vision]'",
        ) from None
    return Image


def read_picture(path: Path) -> Picture:
    """The picture in a file.

    `TyirError` for a file that cannot be read, is empty, is no picture of a known format, is damaged or
    cut off, or holds more than `MOST_PIXELS`.
    """
    return decode_picture(_read(path), str(path))


def decode_picture(data: bytes, name: str, most_pixels: int = MOST_PIXELS) -> Picture:
    """The picture in the bytes of a file, which messages call `name`; `TyirError` as `read_picture`."""
    if not data:
        raise TyirError(f"the picture {name} is empty: the file has no bytes", help="copy it again")
    image = _open(data, name)
    width, height = image.size
    if width < 1 or height < 1:
        raise TyirError(f"{name} is a picture of {width}x{height}: it has no pixels", help=_CONVERT)
    if width * height > most_pixels:
        raise TyirError(
            f"{name} has {width}x{height} pixels, more than the {most_pixels} that are read",
            help="make it smaller; the model sees far fewer pixels anyway",
        )
    with _decoding(name):
        frames = getattr(image, "n_frames", 1)
        first = () if frames == 1 else (f"the first of {frames} frames is taken",)
        image.load()
        return as_picture(image, name, first)


def as_picture(image: Image, name: str = "the picture", done: Sequence[str] = ()) -> Picture:
    """A picture that Pillow holds, upright and in RGB."""
    from PIL import ImageOps

    said = list(done)
    turned = image.getexif().get(_ORIENTATION, 1)
    if turned in range(2, 9):
        image = ImageOps.exif_transpose(image)
        said.append(f"turned upright (EXIF orientation {turned})")
    image, more = _rgb(image, name)
    return Picture(np.array(image), name, (*said, *more))


def read_frames(paths: Sequence[Path]) -> list[Picture]:
    """The frames of a video: files in the order given, or all pictures of one folder in the order of names.

    `TyirError` when there are none, or their sizes differ.
    """
    files = list(paths)
    if len(files) == 1 and files[0].is_dir():
        files = sorted(f for f in files[0].iterdir() if f.suffix.lower() in _SUFFIXES)
        if not files:
            raise TyirError(
                f"{paths[0]} holds no pictures ({', '.join(_SUFFIXES)})",
                help="cut the video into frames first: ffmpeg -i video.mp4 -vf fps=2 frames/%04d.png",
            )
    if not 0 < len(files) <= _MOST_FRAMES:
        raise TyirError(
            f"a video of {len(files)} frames cannot be read", help=f"give from 1 to {_MOST_FRAMES} frames"
        )
    frames = [read_picture(file) for file in files]
    other = next((f for f in frames if f.size != frames[0].size), None)
    if other is not None:
        raise TyirError(
            f"the frames of a video have one size: {frames[0].name} is {size_text(frames[0].size)},"
            f" {other.name} {size_text(other.size)}",
            help="give frames of one video, or give the pictures with --image",
        )
    return frames


# ------------------------------------------------------------------------------------------------ decoding


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, _MOST_BYTES)
    except OSError as error:
        raise TyirError(
            f"cannot read the picture {path}: {error.strerror or error}",
            help="give a file that holds a picture",
        ) from None


def _open(data: bytes, name: str) -> Image:
    pil = pillow()
    from PIL import UnidentifiedImageError

    try:
        with _decoding(name):
            image: Image = pil.open(io.BytesIO(data), formats=_FORMATS)
            return image
    except UnidentifiedImageError:
        known = ", ".join(_FORMATS)
        raise TyirError(
            f"{name} is not a picture of a format that is read ({known})", help=_CONVERT
        ) from None


class _decoding:
    """Whatever Pillow raises on damaged data, as a sentence; its warnings are not needed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> None:
        self._warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._warnings.__exit__(None, None, None)
        from PIL import UnidentifiedImageError
        from PIL.Image import DecompressionBombError

        if isinstance(error, DecompressionBombError):
            raise TyirError(
                f"{self.name} holds far more pixels than the {MOST_PIXELS} that are read",
                help="make it smaller; the model sees far fewer pixels anyway",
            ) from None
        if isinstance(error, Exception) and not isinstance(error, (TyirError, UnidentifiedImageError)):
            # decoders raise OSError, SyntaxError, ValueError, struct.error, ... as the data leads them to
            line = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise TyirError(
                f"the picture {self.name} is damaged or cut off: {line}",
                help="copy it again, or save it anew",
            ) from None


def _rgb(image: Image, name: str) -> tuple[Image, tuple[str, ...]]:
    """The picture in RGB, and what that took."""
    mode, done = image.mode, tuple[str, ...]()
    if mode == "F":
        raise TyirError(
            f"{name} holds floating-point numbers, and nothing says which is white", help=_CONVERT
        )
    if mode == "I" or mode.startswith("I;16"):
        image, mode = _eight_bits(image), "L"
        done = ("16 bits reduced to 8",)
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        pil = pillow()
        own = image.convert("RGBA")
        white = pil.new("RGBA", own.size, (255, 255, 255, 255))
        return pil.alpha_composite(white, own).convert("RGB"), (*done, "transparent parts laid onto white")
    said = {"L": "grey", "1": "black and white", "P": "a palette", "RGB": ""}.get(mode, mode)
    return image.convert("RGB"), (*done, f"converted from {said} to RGB") if said else done


def _eight_bits(image: Image) -> Image:
    """Grey of 16 bits (or Pillow's 32, which holds 16) by its upper 8, as Pillow reads colours of 16 bits."""
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    made: Image = pillow().fromarray((values >> 8).astype(np.uint8))
    return made
