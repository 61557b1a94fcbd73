"""Patches are transformers' pixel_values bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.vision.folders import FAMILIES, hf_processor, settings_of
from tests.vision.scenes import draw
from tyir.diagnostics import TyirError
from tyir.runtime_sim.vision.pictures import Picture, as_picture
from tyir.runtime_sim.vision.pixels import prepare, prepare_video
from tyir.vision.sizes import nearest

SIZES = ((960, 540), (540, 960), (224, 224), (1, 1), (13, 200), (333, 111), (1200, 700))
CUT = ("LLaVA-1.5", "LLaVA padded", "LLaVA v1", "tiny-llava")


def noise(width: int, height: int) -> Image.Image:
    """A picture in which every pixel counts."""
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), np.uint8)
    pixels[: height // 2] = (pixels[: height // 2] // 8) + 100
    return Image.fromarray(pixels)


def reference(family: str, image: Image.Image) -> Any:
    """[N, C * T * P * P] of transformers; a CLIP tower's convolution is cut into its patches."""
    found = hf_processor(family)(images=[image], return_tensors="np")
    if family not in CUT:
        return found["pixel_values"], tuple(found["image_grid_thw"][0])
    pixels = found["pixel_values"][0]
    colours, height, width = pixels.shape
    rows, columns = height // 14, width // 14
    cut = pixels.reshape(colours, rows, 14, columns, 14).transpose(1, 3, 0, 2, 4)
    return cut.reshape(rows * columns, -1), (1, rows, columns)


@pytest.mark.parametrize("family", [*FAMILIES, "tiny-qwen2.5-vl", "tiny-llava"])
def test_patches_are_transformers_bit_for_bit(family: str) -> None:
    settings = settings_of(family)
    for size in SIZES:
        image = noise(*size)
        values, grid = reference(family, image)
        mine = prepare(as_picture(image), settings)
        assert (1, *mine.size.grid) == grid
        assert mine.patches.dtype == np.float32
        np.testing.assert_array_equal(mine.patches, values, err_msg=f"{family} {size}")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "P", "CMYK", "YCbCr"])
def test_other_modes_are_converted_as_transformers_does(mode: str) -> None:
    image = noise(90, 60)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize((90, 60)))
    image = image.convert(mode)
    for family in ("Qwen2-VL", "LLaVA-1.5"):
        mine = prepare(as_picture(image), settings_of(family)).patches
        np.testing.assert_array_equal(mine, reference(family, image)[0])


def test_a_palette_with_a_transparent_colour() -> None:
    image = noise(90, 60).convert("P")
    image.info["transparency"] = 3
    mine = prepare(as_picture(image), settings_of("Qwen2-VL")).patches
    np.testing.assert_array_equal(mine, reference("Qwen2-VL", image)[0])


def test_steps_that_a_checkpoint_switches_off() -> None:
    from dataclasses import replace

    settings, picture = settings_of("Qwen2-VL"), as_picture(noise(56, 56))
    plain = prepare(picture, replace(settings, factor=None, mean=None, std=())).patches
    assert plain.max() == 255
    scaled = prepare(picture, replace(settings, mean=None, std=())).patches
    np.testing.assert_array_equal(scaled, (plain.astype(np.float64) * settings.factor).astype(np.float32))


def test_video_frames_go_in_pairs_and_the_last_is_repeated() -> None:
    """Each pair is the still of its frames where they are equal, and has the first frame's half otherwise."""
    settings = settings_of("tiny-qwen2.5-vl")
    frames = [Picture(draw(seed, (112, 84)).picture) for seed in range(5)]
    pairs = prepare_video(frames, settings)
    assert len(pairs) == 3
    halves = [p.patches.reshape(-1, 3, 2, 14 * 14) for p in pairs]
    stills = [prepare(frame, settings).patches.reshape(-1, 3, 2, 14 * 14) for frame in frames]
    for number, half in enumerate(halves):
        np.testing.assert_array_equal(half[:, :, 0], stills[2 * number][:, :, 0])
        np.testing.assert_array_equal(half[:, :, 1], stills[min(2 * number + 1, 4)][:, :, 1])
    assert len({p.sha256 for p in pairs}) == 3
    with pytest.raises(TyirError, match="no videos"):
        prepare_video(frames, settings_of("tiny-llava"))


def test_a_size_of_ones_own_choice() -> None:
    settings = settings_of("Qwen2.5-VL")
    compiled = [settings.size(168, 112), settings.size(336, 336)]
    picture = as_picture(noise(300, 290))
    made = prepare(picture, settings, nearest(*picture.size, compiled))
    assert made.size.grid == (24, 24)
    wanted = reference("Qwen2.5-VL", noise(300, 290).resize((336, 336), resample=3))[0]
    np.testing.assert_array_equal(made.patches, wanted)
    assert made.sha256 != prepare(picture, settings, compiled[0]).sha256
