"""The tower of a vision-language model from config.json alone: what it holds, and what a picture costs.

Parameters are those that a compile keeps: of a CLIP tower not the blocks behind the state that is used.
Operations are counted as 2 for a multiply-add: matrices of all patches, attention of every pair of patches in
one window (Qwen2.5-VL) or in the picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tyir.artifacts.vision import ImageSize
from tyir.diagnostics import Diagnostic, TyirError
from tyir.targets.machine import Machine
from tyir.vision.settings import ImageSettings, image_settings
from tyir.vision.sizes import described, window_lengths

__all__ = ["PicturePlan", "TowerShape", "picture_plans", "read_tower"]

_RESTORE: Final = "restore config.json"
_DEFAULT_FEATURE: Final = -2  # of LLaVA: the state before the last block


@dataclass(frozen=True)
class TowerShape:
    """A tower's sizes.

    `blocks` of `hidden` channels with an MLP of `matrices` times `width`; `columns` numbers in a patch;
    `merged` channels of a merger's input, `inner` between its two linears (0: it is one), `out` after them;
    `mergers` of them. `windowed`: blocks whose attention stays in windows of `window` pixels; `extra`:
    parameters besides.
    """

    blocks: int
    hidden: int
    width: int
    matrices: int
    columns: int
    merged: int
    inner: int
    out: int
    mergers: int
    merge: int
    patch: int
    extra: int
    windowed: int = 0
    window: int = 0
    class_tokens: int = 0

    @property
    def parameters(self) -> int:
        """All numbers that a compile keeps."""
        merger = self._merger + self.inner + self.out
        return self.columns * self.hidden + self.blocks * self._block + self.mergers * merger + self.extra

    @property
    def _merger(self) -> int:
        """Weights of a merger's linears."""
        return self.merged * self.inner + self.inner * self.out if self.inner else self.merged * self.out

    @property
    def _matrices(self) -> int:
        """Weights of a block's linears."""
        return 4 * self.hidden**2 + self.matrices * self.hidden * self.width

    @property
    def _block(self) -> int:
        return self._matrices + 4 * self.hidden + (self.matrices - 1) * self.width + self.hidden

    def operations(self, size: ImageSize) -> int:
        """Of one picture, or of one pair of video frames."""
        rows = size.patches + self.class_tokens
        whole = 4 * rows**2 * self.hidden
        lengths = window_lengths(size.grid, self.merge, self.window, self.patch) if self.windowed else ()
        windows = 4 * self.hidden * sum(n**2 for n in lengths)
        merger = self._merger * self.mergers
        return (
            2 * rows * self._matrices * self.blocks
            + whole * (self.blocks - self.windowed)
            + windows * self.windowed
            + 2 * size.tokens * merger
            + 2 * size.patches * self.columns * self.hidden
        )


def read_tower(raw: Mapping[str, Any], where: Path) -> TowerShape | None:
    """The tower of a config.json; None for a model of text alone.

    `TyirError` lists the numbers that are missing or cannot be.
    """
    makers = {"qwen2_vl": _qwen2, "qwen2_5_vl": _qwen25, "qwen3_vl": _qwen3, "llava": _llava}
    kind = str(raw.get("model_type"))
    if kind not in makers:
        return None
    vision, text = raw.get("vision_config"), raw.get("text_config")
    numbers = _Numbers(vision if isinstance(vision, dict) else {}, where)
    hidden = (text if isinstance(text, dict) else raw).get("hidden_size", 4096)
    shape = makers[kind](numbers, raw, hidden if isinstance(hidden, int) else 4096)
    if numbers.problems:
        raise TyirError(numbers.problems)
    return shape


class _Numbers:
    """Whole numbers of a vision_config by name."""

    def __init__(self, values: Mapping[str, Any], where: Path) -> None:
        self.values, self.where = values, where
        self.problems: list[Diagnostic] = []

    def __call__(self, *names: str, default: int | None = None) -> int:
        value = next((self.values[name] for name in names if name in self.values), default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            self.problems.append(
                Diagnostic(
                    f"vision_config.{names[0]} is {value!r}; a positive whole number is needed",
                    where=str(self.where),
                    help=_RESTORE,
                )
            )
            return 1
        return value

    def list(self, name: str) -> Sequence[int]:
        """A list of whole numbers from 0 on."""
        value = self.values.get(name)
        if isinstance(value, list) and all(type(v) is int and v >= 0 for v in value):
            return value
        self.problems.append(
            Diagnostic(
                f"vision_config.{name} is {value!r}; a list of whole numbers is needed",
                where=str(self.where),
                help=_RESTORE,
            )
        )
        return []


def _patches(number: _Numbers) -> dict[str, int]:
    """What the three Qwen towers share."""
    patch, merge = number("patch_size"), number("spatial_merge_size")
    columns = number("in_channels", "in_chans", default=3) * number("temporal_patch_size") * patch**2
    return {"patch": patch, "merge": merge, "columns": columns}


def _qwen2(number: _Numbers, raw: Mapping[str, Any], hidden: int) -> TowerShape:
    wide, common = number("embed_dim"), _patches(number)
    merged, depth = wide * common["merge"] ** 2, number("depth")
    norms = depth * 4 * wide + 2 * wide
    out = number("hidden_size")
    return TowerShape(
        depth, wide, number("mlp_ratio") * wide, 2, merged=merged, inner=merged, out=out, mergers=1,
        extra=norms, **common,
    )  # fmt: skip


def _qwen25(number: _Numbers, raw: Mapping[str, Any], hidden: int) -> TowerShape:
    wide, common, depth = number("hidden_size"), _patches(number), number("depth")
    merged = wide * common["merge"] ** 2
    full = [i for i in number.list("fullatt_block_indexes") if i < depth]
    return TowerShape(
        depth, wide, number("intermediate_size"), 3, merged=merged, inner=merged,
        out=number("out_hidden_size"), mergers=1, extra=depth * 2 * wide + wide,
        windowed=depth - len(set(full)), window=number("window_size"), **common,
    )  # fmt: skip


def _qwen3(number: _Numbers, raw: Mapping[str, Any], hidden: int) -> TowerShape:
    wide, common, depth = number("hidden_size"), _patches(number), number("depth")
    merged, mergers = wide * common["merge"] ** 2, 1 + len(number.list("deepstack_visual_indexes"))
    norms = depth * 4 * wide + 2 * wide + (mergers - 1) * 2 * merged
    return TowerShape(
        depth, wide, number("intermediate_size"), 2, merged=merged, inner=merged,
        out=number("out_hidden_size"), mergers=mergers,
        extra=norms + wide + number("num_position_embeddings") * wide, **common,
    )  # fmt: skip


def _llava(number: _Numbers, raw: Mapping[str, Any], hidden: int) -> TowerShape:
    wide, patch, depth = number("hidden_size"), number("patch_size"), number("num_hidden_layers")
    used, states = _states(raw.get("vision_feature_layer", _DEFAULT_FEATURE), depth)
    rows = (number("image_size") // patch) ** 2 + 1
    columns = number("num_channels", default=3) * patch**2
    inner = 0 if raw.get("mm_projector_type") == "linear" else hidden
    return TowerShape(
        used, wide, number("intermediate_size"), 2, merged=states * wide, inner=inner, out=hidden,
        mergers=1, merge=1, patch=patch, columns=columns, class_tokens=1,
        extra=used * 4 * wide + 2 * wide + (rows + 1) * wide,
    )  # fmt: skip


def _states(feature: Any, depth: int) -> tuple[int, int]:
    """How many blocks LLaVA's projector needs, and the states of how many it takes side by side: state n is
    that after n blocks, counted from the last with -1.
    """
    said = [f for f in (feature if isinstance(feature, list) else [feature]) if isinstance(f, int)]
    needed = [f if f >= 0 else depth + 1 + f for f in said] or [depth]
    return min(max(*needed, 1), depth), len(needed)


# --------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class PicturePlan:
    """What pictures of one size cost: `operations`, and `seconds` at the peak of all dies' matrix units."""

    size: ImageSize
    operations: int
    seconds: float

    def lines(self, max_kv: int) -> Iterator[str]:
        """For a terminal."""
        yield f"picture {described(self.size)}"
        yield (
            f"  {self.operations / 1e12:.3g} TFLOP in the tower, at least {self.seconds:.3g} s;"
            f" {max_kv // self.size.tokens} of them fill the cache"
        )


def picture_plans(
    folder: Path,
    raw: Mapping[str, Any],
    tower: TowerShape,
    sizes: Sequence[tuple[int, int]],
    machine: Machine,
    dies: int,
) -> list[PicturePlan]:
    """A plan for each size (width, height), as the folder's own settings have it."""
    settings: ImageSettings = image_settings(lambda name: _read(folder / name), folder, raw)
    peak = machine.peak_fp16_tflops * 1e12 * dies
    found = [settings.size(*size) for size in sizes]
    return [PicturePlan(s, tower.operations(s), tower.operations(s) / peak) for s in found]


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
