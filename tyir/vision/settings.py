"""How a checkpoint says its pictures are prepared: geometry, mean, standard deviation, filter.

A folder says it in `processor_config.json` (transformers 5) or `preprocessor_config.json`, of videos also
in `video_preprocessor_config.json`; transformers reads them in this order.  What belongs to the
checkpoint (sizes, limits, mean, standard deviation) must be said: the defaults of transformers' classes
are those of other models.  What all of these processors do alike (bicubic filter, 1/255, RGB) may be left
out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tyir.artifacts.vision import ImageSize
from tyir.diagnostics import TyirError, did_you_mean
from tyir.text.json_files import json_object
from tyir.vision.sizes import Geometry, GridGeometry, SquareGeometry, smart_resize_video

__all__ = ["FILES", "Find", "ImageSettings", "image_settings", "video_settings"]

Find = Callable[[str], bytes | None]

_PROCESSOR: Final = "processor_config.json"
_IMAGE: Final = "preprocessor_config.json"
_VIDEO: Final = "video_preprocessor_config.json"
# What artifacts of a model that takes pictures need beside the tokenizer, to prepare one.
FILES: Final = (_PROCESSOR, _IMAGE, _VIDEO)

_GRID: Final = ("Qwen2VLImageProcessor", "Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor")
_SQUARE: Final = ("CLIPImageProcessor", "CLIPFeatureExtractor", "LlavaImageProcessor")
_CLIP: Final = "clip_vision_model"  # also what LLaVA's tower is when config.json does not say
_FILTERS: Final = range(6)  # Pillow's: nearest, Lanczos, bilinear, bicubic, box, Hamming
_BICUBIC: Final = 3
_RESTORE: Final = "copy it from the original model's folder"


@dataclass(frozen=True)
class ImageSettings:
    """How pixels become numbers: `(value * factor - mean[c]) / std[c]` of pictures brought to a size.

    `factor` and `mean` are None where the checkpoint switches the step off.  `resample`: Pillow's number of
    the filter.  `all_frames`: the limits of a video's pixels are of all its frames together (Qwen3-VL).
    `source`: the file that says so.
    """

    geometry: Geometry
    mean: tuple[float, ...] | None
    std: tuple[float, ...]
    factor: float | None
    resample: int = _BICUBIC
    all_frames: bool = False
    source: str = _IMAGE

    def size(self, width: int, height: int, frames: int = 1) -> ImageSize:
        """What becomes of a picture, or of each of a video's `frames`; `TyirError` for no such picture."""
        geometry = self.geometry
        size = geometry.size(width, height)
        if not self.all_frames or not isinstance(geometry, GridGeometry):
            return size
        count = max(frames, geometry.temporal)
        tall, wide = smart_resize_video(
            count, height, width, geometry.temporal, geometry.unit, geometry.min_pixels, geometry.max_pixels
        )
        return geometry.whole((width, height), (wide, tall))

    def with_limits(self, min_pixels: int | None = None, max_pixels: int | None = None) -> ImageSettings:
        """The same with other limits of a picture's pixels; `TyirError` where there are none."""
        if min_pixels is None and max_pixels is None:
            return self
        if not isinstance(self.geometry, GridGeometry):
            raise TyirError(
                "this model brings every picture to one size: there are no limits of pixels to choose",
                help="leave the limits out",
            )
        low = self.geometry.min_pixels if min_pixels is None else min_pixels
        high = self.geometry.max_pixels if max_pixels is None else max_pixels
        if not 0 < low <= high:
            raise TyirError(
                f"a picture cannot have from {low} to {high} pixels", help="give a smaller limit first"
            )
        return replace(self, geometry=replace(self.geometry, min_pixels=low, max_pixels=high))


def image_settings(find: Find, folder: Path, config: Mapping[str, Any]) -> ImageSettings:
    """The settings for pictures of a model; `find` gives a file of its folder, `config` is its config.json.

    `TyirError` with what to do when the folder does not say them, says something else than a picture can be
    prepared by, or contradicts the tower.
    """
    content, source = _section(find, folder, "image_processor", (_IMAGE,))
    return _Reader(content, source, folder, config).settings()


def video_settings(find: Find, folder: Path, config: Mapping[str, Any]) -> ImageSettings:
    """The same for frames of a video: the limits are others than a picture's."""
    content, source = _section(find, folder, "video_processor", (_VIDEO, _IMAGE))
    return _Reader(content, source, folder, config).settings()


def _section(find: Find, folder: Path, key: str, files: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """What the first file that has something says, and its name."""
    if (data := find(_PROCESSOR)) is not None:
        nested = json_object(data, folder / _PROCESSOR, _RESTORE).get(key)
        if isinstance(nested, dict):
            return nested, _PROCESSOR
    for name in files:
        if (data := find(name)) is not None:
            return json_object(data, folder / name, _RESTORE), name
    raise TyirError(
        f"{folder} does not say how its pictures are prepared: it holds neither {' nor '.join(files)}, nor a"
        f" {_PROCESSOR} with '{key}'",
        help=f"copy {files[-1]} from the original model's folder: another model's would give wrong answers",
    )


class _Reader:
    """One section of settings, read key by key."""

    def __init__(self, content: dict[str, Any], source: str, folder: Path, config: Mapping[str, Any]) -> None:
        self.content = content
        self.source = source
        self.folder = folder
        self.vision: Mapping[str, Any] = config.get("vision_config") or {}
        self.config = config

    def settings(self) -> ImageSettings:
        kind = self._kind()
        if self.content.get("do_resize", True) is not True:
            raise self._wrong("do_resize", "is off: pictures of any size would reach a tower of fixed sizes")
        normalize = self._flag("do_normalize")
        colours = 3
        return ImageSettings(
            geometry=self._grid() if kind in _GRID else self._square(kind),
            mean=self._colours("image_mean", colours) if normalize else None,
            std=self._colours("image_std", colours) if normalize else (),
            factor=self._factor() if self._flag("do_rescale") else None,
            resample=self._filter(),
            all_frames=kind == "Qwen3VLVideoProcessor",
            source=self.source,
        )

    def _kind(self) -> str:
        """The class that the settings are of, without the suffix that names an implementation."""
        key = "video_processor_type" if "video_processor_type" in self.content else "image_processor_type"
        said = self.content.get(key, self.content.get("feature_extractor_type"))
        if said is None and "merge_size" in self.content:
            return _GRID[0]
        if said is None and "crop_size" in self.content:
            return _SQUARE[0]
        name = str(said).removesuffix("Pil").removesuffix("Fast")
        if said is None or name not in (*_GRID, *_SQUARE):
            known = [*_GRID, *_SQUARE]
            raise TyirError(
                f"{self.folder / self.source} is for {str(said)[:80]!r}, which is not one of"
                f" {', '.join(known)}",
                help=did_you_mean(name, known)
                or "prepare the pixels yourself and call the tower with patches",
            )
        return name

    def _grid(self) -> GridGeometry:
        low, high = self._limits()
        geometry = GridGeometry(
            patch=self._count("patch_size"),
            merge=self._count("merge_size"),
            temporal=self._count("temporal_patch_size"),
            min_pixels=low,
            max_pixels=high,
        )
        tower = {
            "patch_size": geometry.patch,
            "spatial_merge_size": geometry.merge,
            "temporal_patch_size": geometry.temporal,
        }
        for key, mine in tower.items():
            self._same(key, mine)
        return geometry

    def _limits(self) -> tuple[int, int]:
        size = self.content.get("size")
        size = size if isinstance(size, dict) else {}
        found = []
        for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            value = self.content.get(old)
            value = size.get(new, size.get(old)) if value is None else value
            found.append(self._number(f"{old} (or size.{new})", value))
        if found[0] > found[1]:
            raise self._wrong("size", f"has {found[0]} pixels at least and {found[1]} at most")
        return found[0], found[1]

    def _square(self, kind: str) -> SquareGeometry:
        size = self.content.get("size")
        edge = size.get("shortest_edge") if isinstance(size, dict) else size
        whole = self._sides("size") if isinstance(size, dict) and edge is None else None
        edge = None if whole is not None else self._number("size.shortest_edge", edge)
        crop = self._sides("crop_size") if self._flag("do_center_crop") else whole
        if crop is None:
            raise self._wrong(
                "do_center_crop", "is off: pictures of any shape would reach a tower of one size"
            )
        side = self.vision.get("image_size")
        if side is not None and crop != (side, side):
            raise self._wrong(
                "crop_size",
                f"makes pictures of {crop[0]}x{crop[1]}, the tower of config.json takes {side}x{side}",
            )
        patch = self._number("patch_size", self.vision.get("patch_size", self.content.get("patch_size")))
        return SquareGeometry(patch, crop, edge, whole, self._pads(kind), self._class_token())

    def _pads(self, kind: str) -> bool:
        """LLaVA's own checkpoints say in config.json whether a picture is padded to a square first."""
        said = self.config.get("image_aspect_ratio")
        if said not in (None, "pad", "square"):
            raise TyirError(
                f"config.json has image_aspect_ratio {str(said)[:40]!r}: pictures are cut into tiles, which"
                " is not built here",
                help="use a model of one tile: LLaVA-1.5 or earlier",
            )
        return said == "pad" or (kind == "LlavaImageProcessor" and self.content.get("do_pad") is True)

    def _class_token(self) -> bool:
        """LLaVA's config.json says whether the class token of its CLIP tower is one of a picture's rows
        (transformers 5.24, `get_image_features` of `modeling_llava.py`); other towers have none.
        """
        whole = self.config.get("vision_feature_select_strategy") == "full"
        return whole and self.vision.get("model_type", _CLIP) == _CLIP

    def _same(self, key: str, mine: int) -> None:
        theirs = self.vision.get(key, mine)
        if theirs != mine:
            name = {"spatial_merge_size": "merge_size"}.get(key, key)
            raise self._wrong(name, f"is {mine}, the tower of config.json has {key} {theirs}")

    def _sides(self, key: str) -> tuple[int, int]:
        """(width, height) of `{"height": .., "width": ..}` or of one number."""
        value = self.content.get(key)
        if isinstance(value, dict):
            return self._number(f"{key}.width", value.get("width")), self._number(
                f"{key}.height", value.get("height")
            )
        side = self._number(key, value)
        return side, side

    def _count(self, key: str) -> int:
        return self._number(key, self.content.get(key))

    def _number(self, key: str, value: Any) -> int:
        if value is None:
            raise self._wrong(key, "is missing")
        if type(value) is not int or not 0 < value < 1 << 31:
            raise self._wrong(key, f"is {json.dumps(value)[:40]}, which is not a number from 1 on")
        return value

    def _flag(self, key: str) -> bool:
        value = self.content.get(key, True)
        if not isinstance(value, bool):
            raise self._wrong(key, f"is {json.dumps(value)[:40]}, which is neither true nor false")
        return value

    def _colours(self, key: str, count: int) -> tuple[float, ...]:
        value = self.content.get(key)
        if value is None:
            raise self._wrong(key, "is missing")
        given = value if isinstance(value, list) else [value] * count
        plain = len(given) == count and all(type(v) in (int, float) and math.isfinite(v) for v in given)
        if not plain or (key == "image_std" and not all(given)):
            raise self._wrong(key, f"is {json.dumps(value)[:60]}, which is not {count} numbers to work with")
        return tuple(float(v) for v in given)

    def _factor(self) -> float:
        value = self.content.get("rescale_factor", 1 / 255)
        if type(value) not in (int, float) or not math.isfinite(value) or not value:
            raise self._wrong(
                "rescale_factor", f"is {json.dumps(value)[:40]}, which is not a number to work with"
            )
        return float(value)

    def _filter(self) -> int:
        value = self.content.get("resample", _BICUBIC)
        if type(value) is not int or value not in _FILTERS:
            raise self._wrong("resample", f"is {json.dumps(value)[:40]}, Pillow's filters are 0 to 5")
        return value

    def _wrong(self, key: str, problem: str) -> TyirError:
        return TyirError(f"'{key}' of {self.folder / self.source} {problem}", help=_RESTORE)
