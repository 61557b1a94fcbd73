"""What folders say of their pictures, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.vision.folders import CLIP, FAMILIES, LLAVA, QWEN2, finder, settings_of
from tyir.diagnostics import TyirError
from tyir.vision.settings import image_settings, video_settings
from tyir.vision.sizes import GridGeometry, SquareGeometry

IMAGE, PROCESSOR = "preprocessor_config.json", "processor_config.json"
VIDEO = "video_preprocessor_config.json"


def read(files: dict[str, Any], config: dict[str, Any] | None = None) -> Any:
    return image_settings(finder(files), Path("model"), config or {})


def test_each_family() -> None:
    assert settings_of("Qwen2-VL").geometry == GridGeometry(14, 2, 2, 3136, 12845056)
    assert settings_of("Qwen3-VL").geometry == GridGeometry(16, 2, 2, 65536, 16777216)
    assert settings_of("LLaVA-1.5").geometry == SquareGeometry(14, (336, 336), 336)
    assert settings_of("LLaVA padded").geometry == SquareGeometry(14, (336, 336), 336, pad=True)
    assert settings_of("LLaVA v1").geometry == SquareGeometry(14, (224, 224), 224, pad=True)
    assert settings_of("tiny-qwen2.5-vl").geometry == GridGeometry(14, 2, 2, 3136, 200704)
    assert settings_of("tiny-llava").geometry == SquareGeometry(14, (126, 126), 126)
    assert settings_of("Qwen3-VL").mean == (0.5, 0.5, 0.5)


def test_the_order_of_files_is_transformers() -> None:
    """A nested section of processor_config.json first; one without it says nothing."""
    nested = {PROCESSOR: {"image_processor": {**QWEN2, "patch_size": 16}}, IMAGE: QWEN2}
    assert read(nested).geometry.patch == 16
    assert read({PROCESSOR: {"processor_class": "x"}, IMAGE: QWEN2}).geometry.patch == 14


def test_videos_have_their_own_file_or_the_pictures() -> None:
    own = {**QWEN2, "patch_size": 16, "video_processor_type": "Qwen2VLVideoProcessor"}
    both = finder({IMAGE: QWEN2, VIDEO: own})
    assert video_settings(both, Path("m"), {}).geometry.patch == 16
    assert video_settings(finder({IMAGE: QWEN2}), Path("m"), {}).geometry.patch == 14
    tiny = settings_of("tiny-qwen2.5-vl")
    assert isinstance(tiny.geometry, GridGeometry)
    assert not tiny.all_frames


@pytest.mark.parametrize("files", [{}, {PROCESSOR: {"processor_class": "x"}}, {"config.json": {}}])
def test_a_folder_that_says_nothing_is_refused(files: dict[str, Any]) -> None:
    with pytest.raises(TyirError, match=r"neither preprocessor_config.json, nor a processor_con") as error:
        read(files)
    assert "copy preprocessor_config.json from the original model's folder" in error.value.render()


def without(key: str, files: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in files.items() if k != key}


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no mean": (without("image_mean", QWEN2), {}, "'image_mean' of .* is missing"),
    "no limits": (without("max_pixels", QWEN2), {}, r"'max_pixels \(or size.longest_edge\)'"),
    "no patch": (without("patch_size", QWEN2), {}, "'patch_size' of .* is missing"),
    "a patch of text": ({**QWEN2, "patch_size": "14"}, {}, "not a number from 1 on"),
    "a patch of nothing": ({**QWEN2, "merge_size": 0}, {}, "not a number from 1 on"),
    "limits the wrong way round": ({**QWEN2, "min_pixels": 10**8}, {}, "at least"),
    "std of zero": ({**QWEN2, "image_std": [1, 0, 1]}, {}, "numbers to work with"),
    "two means": ({**QWEN2, "image_mean": [1, 0]}, {}, "3 numbers"),
    "no resizing": ({**QWEN2, "do_resize": False}, {}, "'do_resize' .* is off"),
    "an unknown filter": ({**QWEN2, "resample": 9}, {}, "filters are 0 to 5"),
    "an unknown class": ({**QWEN2, "image_processor_type": "PixtralImageProcessor"}, {}, "not one of"),
    "no class at all": ({**CLIP}, {}, "is for 'None'"),
    "another tower": (QWEN2, {"vision_config": {"patch_size": 16}}, "config.json has patch_size 16"),
    "another merge": (QWEN2, {"vision_config": {"spatial_merge_size": 4}}, "'merge_size' .* is 2"),
    "another crop": (LLAVA, {"vision_config": {"image_size": 224, "patch_size": 14}}, "takes 224x224"),
    "no crop": ({**LLAVA, "do_center_crop": False}, {}, "'do_center_crop'"),
    "tiles": (LLAVA, {"image_aspect_ratio": "anyres", "vision_config": {"patch_size": 14}}, "cut into tiles"),
    "a flag of text": ({**LLAVA, "do_normalize": "yes"}, {}, "neither true nor false"),
    "a factor of zero": ({**QWEN2, "rescale_factor": 0}, {}, "not a number to work with"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_picture_cannot_be_prepared_by_is_refused(name: str) -> None:
    files, config, message = WRONG[name]
    with pytest.raises(TyirError, match=message) as error:
        read({IMAGE: files}, config)
    assert "help: " in error.value.render()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff"])
def test_a_damaged_file_is_refused(data: bytes) -> None:
    with pytest.raises(TyirError, match=IMAGE):
        read({IMAGE: data})


def test_families_are_all_read() -> None:
    for family in FAMILIES:
        assert settings_of(family).factor == 1 / 255
