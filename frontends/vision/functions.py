"""The towers of a vision-language model as functions, and what the module says of its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.artifacts.json_attributes import to_attribute
from tyir.artifacts.vision import ImageSize, Pixels, Rope, TokenIds
from tyir.attributes import DenseArrayAttr, DictAttr
from tyir.dialects.func import Func
from tyir.frontends.graph_importer import import_graph
from tyir.frontends.torch_export import MetaModel, export_tower, real_buffer
from tyir.frontends.vision.parts import deepstack_of, turning_of_language
from tyir.frontends.weights import Weights
from tyir.vision.graphs import VISION, mark_graph
from tyir.vision.settings import ImageSettings, image_settings
from tyir.vision.sizes import GridGeometry, by_grid

__all__ = ["settings_of", "tower_functions", "vision_attribute"]


def settings_of(folder: Path, config: Mapping[str, Any]) -> ImageSettings:
    """How a checkpoint's pictures are prepared; `TyirError` where it does not say so."""

    def find(name: str) -> bytes | None:
        path = folder / name
        return path.read_bytes() if path.is_file() else None

    return image_settings(find, folder, config)


def tower_functions(meta: MetaModel, weights: Weights, images: Sequence[ImageSize]) -> list[Func]:
    """`@visual_{W}x{H}(%patches) -> embeddings (and deepstack features)` for each grid among the sizes."""
    functions = []
    for same in by_grid(images).values():
        program, tower = export_tower(meta, same[0])

        def buffer(name: str, real: Mapping[str, Any]) -> npt.NDArray[Any]:
            return np.asarray(real[name].numpy()) if name in real else real_buffer(meta, name)

        function = import_graph(program, weights, partial(buffer, real=tower.real), f"visual_{same[0].name}")
        function.args[0].name = "patches"
        sizes = to_attribute([asdict(size) for size in same])
        mark_graph(function, VISION, images=sizes, order=DenseArrayAttr.i64(tower.order))
        functions.append(function)
    return functions


def vision_attribute(meta: MetaModel, settings: ImageSettings) -> DictAttr:
    """`tyir.vision` of the module: what does not depend on a size (`tyir.artifacts.vision.Vision`)."""
    config, vision = meta.config, meta.config.vision_config
    geometry = settings.geometry
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3
    limits = (
        {"min_pixels": geometry.min_pixels, "max_pixels": geometry.max_pixels}
        if isinstance(geometry, GridGeometry)
        else {}
    )
    pixels = Pixels(
        channels=channels,
        temporal=geometry.temporal,
        patch=geometry.patch,
        merge=geometry.merge,
        mean=settings.mean or (0.0,) * channels,
        std=settings.std or (1.0,) * channels,
        rescale=1.0 if settings.factor is None else settings.factor,
        **limits,
    )
    found: dict[str, Any] = {
        key: getattr(config, f"{name}_token_id", None)
        for key, name in (
            ("image", "image"),
            ("video", "video"),
            ("start", "vision_start"),
            ("end", "vision_end"),
        )
    }
    ids = TokenIds(**found)
    facts: dict[str, Any] = {
        "model_type": config.model_type,
        "pixels": asdict(pixels),
        "ids": asdict(ids),
        "deepstack": deepstack_of(meta.model),
    }
    if (turning := turning_of_language(meta.model)) is not None:
        facts["rope"] = asdict(Rope(turning.axis, turning.inv_freq, turning.scale))
    said = to_attribute(facts)
    assert isinstance(said, DictAttr)
    return said
