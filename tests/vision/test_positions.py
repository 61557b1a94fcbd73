"""Positions are transformers' get_rope_index in every chunking; the table's rows are its rotary module's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tyir.artifacts.vision import Rope
from tyir.runtime_sim.vision.positions import RopePositions, VisionSpan, rope_rows, video_steps

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@dataclass(frozen=True)
class Part:
    """Text of `text` tokens, or an image or video of a grid (times, rows, columns) of patches."""

    text: int = 0
    grid: tuple[int, int, int] | None = None
    video: bool = False
    seconds: float = 1.0


def image(rows: int, columns: int) -> Part:
    return Part(grid=(1, rows, columns))


def video(times: int, rows: int, columns: int, seconds: float = 1.0) -> Part:
    return Part(grid=(times, rows, columns), video=True, seconds=seconds)


PROMPTS: dict[str, list[Part]] = {
    "text": [Part(9)],
    "an image": [Part(3), image(8, 12), Part(5)],
    "an image first and last": [image(4, 4)],
    "three images": [Part(2), image(4, 6), Part(1), image(10, 2), Part(7), image(2, 2), Part(1)],
    "a tall image and much text": [Part(4), image(20, 2), Part(60)],
    "a video": [Part(3), video(5, 4, 6, 0.5), Part(4)],
    "a video and an image": [Part(3), video(2, 4, 6, 2.0), Part(2), image(6, 4), Part(2)],
    "a long video": [Part(1), video(40, 2, 2, 1.7), Part(3)],
}


def model(family: str) -> Any:
    """transformers' model of a family without weights; its get_rope_index reads the configuration alone."""
    import importlib

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    own = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    made = object.__new__(getattr(module, f"{name}Model"))
    object.__setattr__(made, "config", getattr(own, f"{name}Config")())
    return made


def reference(family: str, parts: Sequence[Part]) -> tuple[Any, int]:
    """[3, n] and the delta of transformers."""
    import torch

    kinds: list[int] = []
    for part in parts:
        if part.grid is None:
            kinds += [0] * part.text
        elif part.video and family == "qwen3_vl":  # each temporal patch after its time, as text
            for _ in range(part.grid[0]):
                kinds += [0] * 3 + [2] * (part.grid[1] * part.grid[2] // 4)
        else:
            kinds += [2 if part.video else 1] * (part.grid[0] * part.grid[1] * part.grid[2] // 4)
    given: dict[str, Any] = {}
    for key, wanted in (("image_grid_thw", False), ("video_grid_thw", True)):
        grids = [p.grid for p in parts if p.grid is not None and p.video is wanted]
        given[key] = torch.tensor(grids) if grids else None
    if family == "qwen2_5_vl":
        given["second_per_grid_ts"] = torch.tensor([p.seconds for p in parts if p.video])
    ids = torch.zeros((1, len(kinds)), dtype=torch.long)
    found, delta = model(family).get_rope_index(ids, torch.tensor([kinds]), **given)
    return found[:, 0].numpy(), int(delta)


def mine(family: str, parts: Sequence[Part]) -> RopePositions:
    slot, spans = 0, []
    for part in parts:
        if part.grid is None:
            slot += part.text
            continue
        times, rows, columns = part.grid
        grid = rows // 2, columns // 2
        if part.video and family == "qwen3_vl":
            for _ in range(times):
                spans.append(VisionSpan(slot + 3, grid))
                slot = spans[-1].end
            continue
        rate = model(family).config.vision_config.tokens_per_second if family == "qwen2_5_vl" else None
        steps = video_steps(times, rate, part.seconds) if part.video else (0,)
        spans.append(VisionSpan(slot, grid, steps))
        slot = spans[-1].end
    return RopePositions(slot, spans)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PROMPTS)
def test_positions_are_transformers_in_every_chunking(name: str, family: str) -> None:
    wanted, delta = reference(family, PROMPTS[name])
    found = mine(family, PROMPTS[name])
    assert found.delta == delta
    np.testing.assert_array_equal(found.prompt, wanted)
    rng, length = random.Random(name), wanted.shape[1]
    for sizes in ([1], [7], [96], [rng.randint(1, 9) for _ in range(99)]):
        chunks, start = [], 0
        while start < length:
            chunks.append(found.at(start, min(sizes[len(chunks) % len(sizes)], length - start)))
            start += chunks[-1].shape[1]
        np.testing.assert_array_equal(np.concatenate(chunks, axis=1), wanted)
    # what is generated goes on at its slot plus the delta, also in a chunk that begins before the end
    beyond = found.at(length - 1, 5)
    wanted = np.broadcast_to(np.arange(length, length + 4) + delta, (3, 4))
    np.testing.assert_array_equal(beyond[:, 1:], wanted)
    np.testing.assert_array_equal(found.at(length + 2, 2)[0], [length + 2 + delta, length + 3 + delta])


def test_random_prompts() -> None:
    rng = random.Random(5)
    for _ in range(12):
        parts = []
        for _ in range(rng.randint(1, 5)):
            parts.append(Part(rng.randint(1, 20)))
            sides = 2 * rng.randint(1, 9), 2 * rng.randint(1, 9)
            times, seconds = rng.randint(1, 6), rng.choice([0.5, 1.0, 1 / 3, 2.0, 0.0417])
            parts.append(rng.choice([image(*sides), video(times, *sides, seconds)]))
        parts.append(Part(rng.randint(0, 4)))
        for family in FAMILIES:
            wanted, delta = reference(family, parts)
            found = mine(family, parts)
            np.testing.assert_array_equal(found.prompt, wanted)
            assert found.delta == delta


def test_delta_of_one_image() -> None:
    """max(gh, gw) / 2 - gh * gw / 4: of 960x540 -612 for Qwen2.5-VL, -480 for Qwen3-VL."""
    assert RopePositions(700, [VisionSpan(10, (19, 34))]).delta == -612
    assert RopePositions(700, [VisionSpan(10, (17, 30))]).delta == -480
    assert RopePositions(9).delta == 0
    assert RopePositions(0).at(0, 3).tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_the_table_are_those_of_the_rotary_module(family: str) -> None:
    """The axis of each pair is probed with unit positions; others then give the same numbers in f16."""
    import importlib

    import torch

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    text = model(family).config.text_config
    section = [24, 20, 20] if family == "qwen3_vl" else [16, 24, 24]
    text.rope_parameters = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": section}
    kinds = {"qwen3_vl": "Qwen3VLTextRotaryEmbedding", "qwen2_5_vl": "Qwen2_5_VLRotaryEmbedding"}
    rotary = getattr(module, kinds.get(family, "Qwen2VLRotaryEmbedding"))(text)
    unit = torch.eye(3, dtype=torch.long)[:, None, :]
    cos, sin = rotary(torch.zeros(1), unit)
    assert cos.dim() == 3
    half = cos.shape[-1] // 2
    angle = torch.atan2(sin[0], cos[0])[:, :half].abs()
    rope = Rope(tuple(angle.argmax(0).tolist()), tuple(rotary.inv_freq.tolist()))
    positions = np.random.default_rng(1).integers(0, 3000, (3, 500))
    mine_cos, mine_sin = rope_rows(positions, rope)
    cos, sin = rotary(torch.zeros(1), torch.from_numpy(positions)[:, None, :])
    for found, theirs in ((mine_cos, cos), (mine_sin, sin)):
        difference = abs(found.astype(np.float32) - theirs[0, :, :half].half().float().numpy())
        assert difference.max() <= 2**-11, difference.max()
        assert (difference > 0).mean() < 1e-3
