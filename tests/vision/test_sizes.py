"""Sizes, grids and tokens: transformers' own arithmetic, and the table of published shapes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import pytest

from tests.vision.folders import finder, settings_of
from tyir.diagnostics import TyirError
from tyir.vision.settings import ImageSettings, video_settings
from tyir.vision.sizes import (
    GridGeometry,
    by_grid,
    described,
    even_order,
    nearest,
    parse_sizes,
    smart_resize_video,
    window_lengths,
)

# width, height -> resized, grid, tokens, windows (whole ones), of Qwen2.5-VL
QWEN25 = {
    (960, 540): ((952, 532), (38, 68), 646, 45, 32),
    (1920, 1080): ((1316, 728), (52, 94), 1222, 84, None),
    (768, 448): ((756, 448), (32, 54), 432, 28, None),
    (640, 360): ((644, 364), (26, 46), 299, 24, None),
    (336, 336): ((336, 336), (24, 24), 144, 9, 9),
}
# ... of Qwen3-VL with the limit of 1280 * 28 * 28, and tokens
QWEN3 = {
    (960, 540): ((960, 544), (34, 60), 510),
    (1920, 1080): ((1312, 736), (46, 82), 943),
    (768, 448): ((768, 448), (28, 48), 336),
    (640, 360): ((640, 352), (22, 40), 220),
    (336, 336): ((320, 320), (20, 20), 100),
}


@pytest.mark.parametrize("given", QWEN25)
def test_the_table_of_qwen25_vl(given: tuple[int, int]) -> None:
    size = settings_of("Qwen2.5-VL").size(*given)
    resized, grid, tokens, windows, whole = QWEN25[given]
    assert (size.resized, size.grid, size.tokens) == (resized, grid, tokens)
    lengths = window_lengths(size.grid, 2, 112, 14)
    assert (len(lengths), sum(lengths)) == (windows, size.patches)
    assert whole is None or lengths.count(64) == whole


@pytest.mark.parametrize("given", QWEN3)
def test_the_table_of_qwen3_vl(given: tuple[int, int]) -> None:
    settings = settings_of("Qwen3-VL").with_limits(3136, 1280 * 28 * 28)
    size = settings.size(*given)
    assert (size.resized, size.grid, size.tokens) == QWEN3[given]


def test_the_checkpoints_own_limits_and_other_ones() -> None:
    assert settings_of("Qwen2-VL").size(1920, 1080).tokens == 2691
    assert settings_of("Qwen3-VL").size(1920, 1080).tokens == 2040
    lower = settings_of("Qwen2.5-VL").with_limits(256 * 28 * 28)
    assert (lower.size(336, 336).resized, lower.size(336, 336).tokens) == ((448, 448), 256)
    with pytest.raises(TyirError, match="cannot have from 5000 to 4000 pixels"):
        settings_of("Qwen2-VL").with_limits(5000, 4000)
    with pytest.raises(TyirError, match="one size"):
        settings_of("LLaVA-1.5").with_limits(5000)


@pytest.mark.parametrize("given", [(960, 540), (17, 1000), (336, 336), (1, 1)])
def test_llava_has_one_size(given: tuple[int, int]) -> None:
    size = settings_of("LLaVA-1.5").size(*given)
    assert (size.resized, size.grid, size.tokens, size.patches) == ((336, 336), (24, 24), 576, 576)


def test_smart_resize_is_transformers() -> None:
    """Any size and limits, the errors too."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    rng, refused = random.Random(3), 0
    for _ in range(3000):
        width, height = rng.choice([(rng.randint(1, 300), rng.randint(1, 9000)), (rng.randint(1, 4000),) * 2])
        patch, low = rng.choice([14, 16]), rng.choice([3136, 65536, 256 * 784])
        geometry = GridGeometry(patch, 2, 2, low, max(low, rng.randint(low, 20_000_000)))
        try:
            tall, wide = smart_resize(height, width, 2 * patch, geometry.min_pixels, geometry.max_pixels)
        except ValueError:
            refused += 1
            with pytest.raises(TyirError, match="at most 200 times"):
                geometry.size(width, height)
            continue
        size = geometry.size(width, height)
        assert size.resized == (wide, tall)
        assert size.patches * patch**2 == wide * tall
        assert size.tokens * 4 == size.patches
    assert refused


def test_video_frames_of_qwen3_share_their_limits() -> None:
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    rng = random.Random(4)
    for _ in range(1000):
        frames, height, width = rng.randint(2, 200), rng.randint(20, 1100), rng.randint(20, 2000)
        wanted = smart_resize(frames, height, width, 2, 32, 131072, 786432)
        assert smart_resize_video(frames, height, width, 2, 32, 131072, 786432) == wanted
    video = {
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": 0.5,
        "image_std": 0.5,
        "size": {"shortest_edge": 131072, "longest_edge": 786432},
        "video_processor_type": "Qwen3VLVideoProcessor",
    }
    settings = video_settings(finder({"video_preprocessor_config.json": video}), Path("model"), {})
    assert settings.size(640, 360, frames=2).resized != settings.size(640, 360, frames=40).resized


@pytest.mark.parametrize("grid", [(8, 8), (4, 4), (2, 2), (10, 14), (6, 26), (38, 68), (24, 24), (2, 50)])
@pytest.mark.parametrize("window", [56, 112])
def test_windows_are_those_of_the_tower(grid: tuple[int, int], window: int) -> None:
    import torch
    from transformers.vision_utils import get_vision_window_index

    _, bounds = get_vision_window_index(torch.tensor([[1, *grid]]), 2, window, 14)
    assert window_lengths(grid, 2, window, 14) == tuple(bounds.diff().tolist())


def test_sizes_as_they_are_written() -> None:
    assert parse_sizes("960x540,1920X1080 , 960x540") == ((960, 540), (1920, 1080))
    wrong = ("", "960", "960x", "960*540", "0x5", "960x540,,1x1", "70000x4", "-3x4", "1e3x4", "9999999x4")
    for text in wrong:
        with pytest.raises(TyirError, match=r"not a size|out of range"):
            parse_sizes(text)
    with pytest.raises(TyirError, match="201 times"):
        parse_sizes("1x201")


def test_sizes_of_one_grid_share_a_program_and_the_nearest_is_named() -> None:
    settings: ImageSettings = settings_of("Qwen2.5-VL")
    sizes = [settings.size(*given) for given in parse_sizes("960x540,950x536,336x336,540x960")]
    assert [len(group) for group in by_grid(sizes).values()] == [2, 1, 1]
    assert nearest(1000, 500, sizes).given == (960, 540)
    assert nearest(500, 1000, sizes).given == (540, 960)
    assert nearest(100, 90, sizes).given == (336, 336)
    assert described(sizes[0]) == "960x540 becomes 952x532, 38 rows of 68 patches, 646 tokens"


def test_a_picture_without_pixels_is_refused() -> None:
    for family in ("Qwen2-VL", "LLaVA-1.5"):
        for sides in ((0, 5), (5, 0)):
            with pytest.raises(TyirError, match="no pixels"):
                settings_of(family).size(*sides)
    assert settings_of("Qwen2-VL").size(1, 200).tokens >= 1


@pytest.mark.parametrize(
    ("grid", "before", "after"),
    [
        ((38, 68), (1304, 888, 672), (1304, 864, 656)),
        ((26, 46), (624, 432, 320), (604, 416, 304)),
        ((32, 54), (864, 608, 432), (864, 608, 432)),  # none is better for all
    ],
)
def test_windows_are_put_where_dies_can_share_them(
    grid: tuple[int, int], before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    """The patches of the die with most of them, of 2, 3 and 4."""
    lengths = window_lengths(grid, 2, 112, 14)
    order = even_order(lengths)
    assert sorted(order) == list(range(len(lengths)))

    def largest(of: Sequence[int], dies: int) -> int:
        ends = list(accumulate(of))
        cuts = [0, *(min(ends, key=lambda e: abs(e * dies - d * ends[-1])) for d in range(1, dies + 1))]
        return max(b - a for a, b in pairwise(cuts))

    assert tuple(largest(lengths, dies) for dies in (2, 3, 4)) == before
    assert tuple(largest([lengths[n] for n in order], dies) for dies in (2, 3, 4)) == after


@pytest.mark.parametrize("lengths", [(), (64,), (16, 16), (64,) * 7, tuple(range(4, 120, 4))])
def test_no_window_is_lost(lengths: tuple[int, ...]) -> None:
    assert sorted(even_order(lengths)) == list(range(len(lengths)))
