"""What a vision-language model of transformers is made of, by structure, and its two programs to export.

    tower       patches [N, channels * temporal * patch * patch] -> embeddings [tokens, hidden] (and deepstack features)
    language    input ids [1, s], positions [3, 1, s] or [1, s] (and deepstack addends [1, s, hidden]) -> logits [1, s, V]

A tower is exported at one grid.  Everything that depends on the grid is computed before, by transformers' own
functions (`vision_utils`), and given as buffers and tuples: then no value decides what is traced.  A windowed
tower's patches are given in window order, so that the program moves nothing: all it computes on a patch
alone commutes with the order.
"""  # noqa: E501

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final

import torch

from tyir.artifacts.vision import ImageSize
from tyir.diagnostics import TyirError
from tyir.frontends.attention_hook import TOWER
from tyir.frontends.layer_reuse import layers_traced_once
from tyir.frontends.vision.rotary import FixedRotary, Turning, turning_of
from tyir.vision.sizes import even_order

__all__ = ["LANGUAGE_MODEL", "Language", "Tower", "language_of", "tower_of", "turning_of_language"]

LANGUAGE_MODEL: Final = "model.language_model"  # the path of every model's that can be imported
_TEXT_AXES, _TOWER_AXES = 3, 2


def _rebuilt(module: Any) -> Any:
    """The module once more on the CPU, from its configuration."""
    with torch.device("cpu"):
        return type(module)(module.config)


@contextlib.contextmanager
def _replaced(owner: Any, **members: Any) -> Iterator[None]:
    """Attributes and submodules of a module exchanged for the time of an export."""
    missing = object()
    before = {name: getattr(owner, name, missing) for name in members}
    own = {name for name in members if name in owner.__dict__ or name in owner._modules}
    try:
        for name, value in members.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            delattr(owner, name)
            if name in own and value is not missing:
                setattr(owner, name, value)


# ------------------------------------------------------------------------------------------------- language


def turning_of_language(model: Any) -> Turning | None:
    """How the language model turns queries and keys by positions on three axes; None where each token has
    one position.
    """
    language = model.get_submodule(LANGUAGE_MODEL)
    parameters = getattr(language.config, "rope_parameters", None) or {}
    if "mrope_section" not in parameters:
        return None
    rotary = _rebuilt(language.rotary_emb)

    def tables(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = rotary(torch.zeros(1), positions[:, None, :])
        return cos[0], sin[0]

    return turning_of(rotary, _TEXT_AXES, tables)


class Language(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by the type check
    """The language model alone, from ids; `deepstack` addends are given densely, zero at text."""

    def __init__(self, model: Any, turning: Turning | None, deepstack: int) -> None:
        super().__init__()
        self.model_ = model
        self.turning = turning
        self.deepstack = deepstack

    def examples(self, length: int) -> tuple[torch.Tensor, ...]:
        """Arguments for tracing, on the meta device."""
        ids = torch.zeros(1, length, dtype=torch.long, device="meta")
        positions = ids.new_zeros((_TEXT_AXES, 1, length)) if self.turning is not None else ids.clone()
        config = self.model_.get_submodule(LANGUAGE_MODEL).config
        dtype = self.model_.lm_head.weight.dtype
        addends = [
            torch.zeros(1, length, config.hidden_size, dtype=dtype, device="meta")
            for _ in range(self.deepstack)
        ]
        return ids, positions, *addends

    def dimensions(self, length: Any) -> tuple[dict[int, Any], ...]:
        """Which axis of each argument is the length."""
        return ({1: length}, {2 if self.turning is not None else 1: length}, *({1: length},) * self.deepstack)

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """While this holds the model is as it is exported."""
        language = self.model_.get_submodule(LANGUAGE_MODEL)
        members: dict[str, Any] = {}
        if self.turning is not None:
            members["rotary_emb"] = FixedRotary(self.turning)
        if self.deepstack:
            members["_deepstack_process"] = lambda hidden, mask, addend: hidden + addend
        with _replaced(language, **members):
            yield

    def reuse(self) -> contextlib.AbstractContextManager[None]:
        """Equal layers are traced once."""
        return layers_traced_once(self.model_.get_submodule(LANGUAGE_MODEL), f"{LANGUAGE_MODEL}.")

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, *addends: Any) -> torch.Tensor:
        language = self.model_.model.language_model
        embeddings = language.embed_tokens(input_ids)
        others = {"visual_pos_masks": None, "deepstack_visual_embeds": list(addends)} if addends else {}
        hidden = language(
            inputs_embeds=embeddings,
            attention_mask=torch.ones_like(input_ids),
            position_ids=position_ids,
            use_cache=False,
            **others,
        ).last_hidden_state
        logits: torch.Tensor = self.model_.lm_head(hidden)
        return logits


def language_of(model: Any) -> Language:
    """The language model of a vision-language model; `TyirError` for a model of another structure."""
    inner = getattr(model, "model", None)
    if not hasattr(inner, "language_model") or not hasattr(model, "lm_head"):
        raise TyirError(
            f"{type(model).__name__} sees pictures and has no model.language_model with an lm_head",
            help="models in the form of Qwen2.5-VL or LLaVA can be imported; see docs/model-plugin.md",
        )
    return Language(model, turning_of_language(model), deepstack_of(model))


def deepstack_of(model: Any) -> int:
    """How many features of a picture are added to the hidden state of decoder layers."""
    return len(getattr(model.config.vision_config, "deepstack_visual_indexes", None) or ())


# ---------------------------------------------------------------------------------------------------- tower


@dataclass
class Tower:
    """A tower at one grid: the module to export, what stands for its buffers, its input's columns, and
    `order`: group g of merged patches of its input is number order[g] of the processor's.
    """

    module: torch.nn.Module
    columns: int
    path: str
    ready: Callable[[], contextlib.AbstractContextManager[None]]
    real: dict[str, torch.Tensor] = field(default_factory=dict)
    order: tuple[int, ...] = ()


def tower_of(model: Any, size: ImageSize) -> Tower:
    """The tower of a vision-language model for one size; `TyirError` for one of another structure."""
    inner = model.model
    if hasattr(inner, "visual") and hasattr(inner.visual.config, "spatial_merge_size"):
        return _grid_tower(model, size)
    whole = hasattr(model.config, "vision_feature_select_strategy") and not hasattr(inner, "image_newline")
    if whole and hasattr(inner, "vision_tower") and hasattr(inner, "multi_modal_projector"):
        return _square_tower(model, size)
    raise TyirError(
        f"{type(model).__name__} has a vision tower of a structure that is not known",
        help="known: the towers of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and LLaVA; --model-plugin can give a class"
        " with such a tower",
    )


class _Grid(torch.nn.Module):  # type: ignore[misc]  # as above
    def __init__(self, model: Any, numbers: dict[str, Any], real: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.model_ = model
        self.numbers = numbers
        self.names = list(real)
        for name, tensor in real.items():
            self.register_buffer(name, tensor.to("meta"), persistent=False)

    def forward(self, patches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tables = {name: getattr(self, name) for name in self.names}
        out = self.model_.model.visual(patches, grid_thw=None, **self.numbers, **tables)
        return (out.pooler_output, *(getattr(out, "deepstack_features", None) or ()))


def _vision_utils() -> Any:
    try:
        from transformers import vision_utils
    except ImportError:
        import transformers

        raise TyirError(
            f"transformers {transformers.__version__} does not take a tower's tables from its caller",
            help="install transformers 5.24 or later",
        ) from None
    return vision_utils


def _grid_tower(model: Any, size: ImageSize) -> Tower:
    """A tower of Qwen's: patches in merge order, 2D rotary, full attention or windows."""
    utils = _vision_utils()
    visual = model.model.visual
    config, merge = visual.config, visual.config.spatial_merge_size
    if any(side % merge for side in size.grid):
        raise TyirError(
            f"a grid of {size.grid[0]}x{size.grid[1]} patches cannot be merged by {merge}",
            help=f"use sides that are multiples of {merge * config.patch_size} pixels",
        )
    grid = torch.tensor([[1, *size.grid]])
    positions = utils.get_vision_position_ids(grid, merge)
    bounds = tuple(utils.get_vision_cu_seqlens(grid).tolist())
    numbers: dict[str, Any] = {"cu_seqlens": bounds, "max_seqlen": size.patches}
    real: dict[str, torch.Tensor] = {}
    members: dict[str, Any] = {}
    order: tuple[int, ...] = ()
    if hasattr(config, "window_size"):
        index, bounds_of = utils.get_vision_window_index(grid, merge, config.window_size, config.patch_size)
        lengths = tuple(bounds_of.diff().tolist())
        chosen = even_order(lengths)
        index = torch.cat([index.split([n // merge**2 for n in lengths])[number] for number in chosen])
        windows = (0, *accumulate(lengths[number] for number in chosen))
        positions = positions.reshape(len(index), merge * merge, -1)[index].reshape(len(positions), -1)
        order = tuple(index.tolist())
        real["window_index"] = torch.arange(len(index))
        numbers |= {"cu_window_seqlens": windows, "max_window_seqlen": size.patches}
        members["permute_input_for_window_attn"] = lambda x, index, seq_len: x
    if hasattr(config, "num_position_embeddings"):
        real["interp_indices"], real["interp_weights"] = utils.get_vision_interpolation_indices_and_weights(
            grid,
            visual.num_grid_per_side,
            visual.interpolation_mode,
            visual.interpolation_align_corners,
            merge,
        )
    rotary = _rebuilt(visual.rotary_pos_emb)
    turning = turning_of(rotary, _TOWER_AXES, lambda p: rotary(torch.zeros(1), p.T))
    fixed = FixedRotary(turning, positions.T.contiguous().to("meta"))
    real["position_ids"] = positions

    @contextlib.contextmanager
    def ready() -> Iterator[None]:
        before = config._attn_implementation_internal
        config._attn_implementation_internal = TOWER  # at construction transformers would look for a kernel
        try:
            with _replaced(visual, rotary_pos_emb=fixed, **members):
                yield
        finally:
            config._attn_implementation_internal = before

    columns = getattr(config, "in_channels", 3) * config.temporal_patch_size * config.patch_size**2
    tower = _Grid(model, numbers, real)
    path = "model.visual"
    known = {**real, f"{path}.rotary_pos_emb.positions": positions.T.contiguous()}
    return Tower(tower, columns, path, ready, known, order if order != tuple(range(len(order))) else ())


class _Square(torch.nn.Module):  # type: ignore[misc]  # as above
    """A tower that takes whole pictures, given as patches: the picture's numbers are the patches' in another
    shape, and the convolution is made on them one by one.
    """

    def __init__(self, model: Any, size: ImageSize, channels: int, patch: int) -> None:
        super().__init__()
        self.model_ = model
        self.shape = (1, channels, size.grid[0] * patch, size.grid[1] * patch)

    def forward(self, patches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.model_.model.get_image_features(pixel_values=patches.view(self.shape), return_dict=True)
        return (out.pooler_output[0],)


def _square_tower(model: Any, size: ImageSize) -> Tower:
    """LLaVA: a tower of square pictures (CLIP), and a projector."""
    config = model.config.vision_config
    side = config.image_size // config.patch_size
    if size.grid != (side, side):
        raise TyirError(
            f"the tower takes pictures of {config.image_size}x{config.image_size}, {side}x{side} patches, not"
            f" {size.grid[0]}x{size.grid[1]}",
            help="the processor of this model brings every picture to that size",
        )
    vision = model.model.vision_tower
    convolution = _convolution(vision)
    channels, kernel = convolution.in_channels, convolution.kernel_size

    def before(module: Any, args: Any) -> Any:
        return (args[0].view(size.patches, channels, *kernel),)

    def after(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out.flatten(1).transpose(0, 1).view(1, -1, *size.grid)

    @contextlib.contextmanager
    def ready() -> Iterator[None]:
        handles = [convolution.register_forward_pre_hook(before), convolution.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    tower = _Square(model, size, channels, kernel[0])
    return Tower(tower, channels * kernel[0] * kernel[1], "model.vision_tower", ready)


def _convolution(vision: Any) -> Any:
    """The one convolution of a tower, which must cut the picture into patches."""
    found = [m for m in vision.modules() if isinstance(m, torch.nn.Conv2d)]
    if len(found) == 1:
        (module,) = found
        if module.kernel_size == module.stride and module.padding in ("valid", (0, 0), 0):
            return module
    raise TyirError(
        f"{type(vision).__name__} does not begin with one convolution that cuts the picture into patches",
        help="only such towers can be imported",
    )
