"""Makes attention come out of `torch.export` as one op: an attention implementation named `tyir` in
transformers' registries.

Every model of transformers that uses `AttentionInterface` calls `_attention` with q, k, v as [b, heads, s,
D]; it emits `tyir::attention` on [b, s, heads, D].  The mask registry hands the model an integer in place of
a mask tensor: the length of the sliding window, 0 for plain causal attention.  A mask or an argument that
this op cannot express is refused, never dropped.

Towers that see pictures ask for no mask and say which rows see each other by bounds (`cu_seq_lens_q`).  They
do so in one call when the implementation's name has `flash` in it, which `TOWER` has; given as a tuple of
numbers the bounds become a property of the op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import CellType
from typing import Any

import torch
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import AttentionInterface

from tyir.diagnostics import TyirError

__all__ = ["IMPLEMENTATION", "TOWER", "install"]

IMPLEMENTATION = "tyir"
TOWER = "tyir_flash"

# Arguments of transformers' attention functions that do not change the result of a forward pass without
# cache.
_HARMLESS = {
    "position_ids",
    "use_cache",
    "cache_position",
    "dropout",
    "output_attentions",
    "output_hidden_states",
    "is_causal",
    "return_dict",
    "past_key_values",
    "inputs_embeds",
    "logits_to_keep",
    "position_embeddings",
    "layer_type",
    "max_length_q",
    "max_length_k",
}


@torch.library.custom_op("tyir::attention", mutates_args=())  # type: ignore[untyped-decorator]
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int,
    softcap: float | None = None,
    causal: bool = True,
    segments: Sequence[int] | None = None,
) -> torch.Tensor:
    """Attention over whole sequences; only ever traced (its meaning is `ty.attention`)."""
    raise TyirError("tyir::attention has no eager kernel: it exists to be exported")


@attention.register_fake  # type: ignore[untyped-decorator]
def _attention_shape(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int,
    softcap: float | None = None,
    causal: bool = True,
    segments: Sequence[int] | None = None,
) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: int | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Any = None,
    cu_seq_lens_k: Any = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    name = type(module).__name__
    both = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    unknown = sorted(k for k, v in others.items() if k not in _HARMLESS and v is not None)
    if unknown:
        raise TyirError(
            f"{name} uses attention features that cannot be represented: {', '.join(unknown)}",
            help="supported: scale, causal mask, sliding window, softcap",
        )
    causal = others.get("is_causal")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    bounds = _bounds(name, cu_seq_lens_q, cu_seq_lens_k)
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        if attention_mask is not None or sliding_window:
            raise TyirError(
                f"{name} is not causal and has a mask, which cannot be represented",
                help="supported: vision towers whose rows see each other, all or within segments",
            )
        return attention(*both, scale, 0, softcap, False, bounds or None), None
    if bounds:
        raise TyirError(
            f"{name} is causal within segments, which cannot be represented",
            help="import sequences one by one",
        )
    if not isinstance(attention_mask, int) or attention_mask != (sliding_window or 0):
        mask = f"a window of {attention_mask}" if isinstance(attention_mask, int) else "a mask of its own"
        raise TyirError(
            f"{name} combines {mask} with sliding_window = {sliding_window}",
            help="supported: a causal mask, or one sliding window in both places",
        )
    return attention(*both, scale, attention_mask, softcap), None


def _bounds(name: str, queries: Any, keys: Any) -> list[int]:
    """The bounds of segments, none where nothing is said."""
    if queries is None:
        return []
    if not isinstance(queries, (tuple, list)) or queries != keys:
        raise TyirError(
            f"{name} has segments that depend on values, which cannot be represented",
            help="import at a fixed size: --image WIDTHxHEIGHT",
        )
    return [int(bound) for bound in queries]


def _mask(*positional: Any, mask_function: Callable[..., Any] = causal_mask_function, **others: Any) -> int:
    """The window of a causal (0) or sliding-window mask."""
    if mask_function is causal_mask_function:
        return 0
    window = _sliding_window(mask_function)
    if window is None:
        raise TyirError(
            f"the model masks attention with {_name(mask_function)}, which cannot be represented",
            help="supported: causal and sliding-window masks",
        )
    return window


def _sliding_window(mask_function: Callable[..., Any]) -> int | None:
    """The window of `and_masks(sliding_window_overlay(w), causal_mask_function)`, None for any other mask
    function.
    """
    found = list(_closure(mask_function).values())
    parts = found[0] if len(found) == 1 else None
    if not isinstance(parts, tuple) or len(parts) != 2 or causal_mask_function not in parts:
        return None
    overlay = next(p for p in parts if p is not causal_mask_function)
    window = _closure(overlay).get("sliding_window")
    return (
        window if _name(overlay).startswith("sliding_window_overlay.") and isinstance(window, int) else None
    )


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    code = getattr(function, "__code__", None)  # a partial or an object that can be called has none
    return {} if code is None else dict(zip(code.co_freevars, map(_contents, cells)))


def _contents(cell: CellType) -> Any:
    """What a closure holds; None for a variable that is not set yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


def install() -> None:
    """Enter the implementation into transformers' registries; doing so again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionInterface.register(TOWER, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
