"""Rotary modules with positions on several axes (time, row, column) become one op.

transformers has a module per family for this, with slices and in-place copies inside.  What such a module
computes is always: pair i of channels is turned by position[axis(i)] * frequency(i).  Both are found by
asking the module itself, on the CPU, and the whole table is then compared bit by bit on other positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from tyir.diagnostics import TyirError

__all__ = ["FixedRotary", "Turning", "turning_of"]

_TRIED: Final = 257  # positions that the table is compared on


@torch.library.custom_op("tyir::rope_angles", mutates_args=())  # type: ignore[untyped-decorator]
def rope_angles(
    positions: torch.Tensor,
    inv_freq: Sequence[float],
    axis: Sequence[int],
    scale: float,
    like: torch.Tensor,
    wide: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [A, ..] to cosines and sines [.., D/2] of the type of `like`, or f32 when `wide`.

    Only ever traced (its meaning is `ty.rope_angles`).
    """
    raise TyirError("tyir::rope_angles has no eager kernel: it exists to be exported")


@rope_angles.register_fake  # type: ignore[untyped-decorator]
def _shapes(
    positions: torch.Tensor,
    inv_freq: Sequence[float],
    axis: Sequence[int],
    scale: float,
    like: torch.Tensor,
    wide: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*positions.shape[1:], len(inv_freq))
    dtype = torch.float32 if wide else like.dtype
    return like.new_empty(shape, dtype=dtype), like.new_empty(shape, dtype=dtype)


@dataclass(frozen=True)
class Turning:
    """What a rotary module does: the axis and the frequency of each pair of channels, and the factor of all
    cosines and sines.
    """

    axis: tuple[int, ...]
    inv_freq: tuple[float, ...]
    scale: float

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [.., D] in f32 of positions [A, ..], each half twice as transformers wants
        them.
        """
        turned = positions.float()[list(self.axis)].movedim(0, -1)
        angles = turned * torch.tensor(self.inv_freq, dtype=torch.float32)
        cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def turning_of(
    module: Any, axes: int, tables: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> Turning:
    """What a rotary module on the CPU does; `tables` calls it with positions [axes, n] and gives cosines and
    sines [n, D] in f32.

    `TyirError` when a pair is turned by more than one axis, or the tables are not those of the formula.
    """
    name = type(module).__name__
    cos, sin = tables(
        torch.cat([torch.zeros(axes, 1, dtype=torch.long), torch.eye(axes, dtype=torch.long)], 1)
    )
    scale = float(cos[0, 0])
    half = cos.shape[-1] // 2
    angles = torch.atan2(sin[1:, :half], cos[1:, :half])  # [axis, pair]: row j is position 1 on axis j
    axis = angles.abs().argmax(0)
    known = module.inv_freq.float()
    nearest = (known[None, :] - angles.gather(0, axis[None])[0, :, None]).abs().argmin(1)
    found = Turning(tuple(axis.tolist()), tuple(known[nearest].tolist()), scale)
    others = torch.randint(0, 4000, (axes, _TRIED), generator=torch.Generator().manual_seed(0))
    if any(not torch.equal(a, b) for a, b in zip(found.tables(others), tables(others))):
        raise TyirError(
            f"{name} does not turn each pair of channels by one of its {axes} axes of positions",
            help="give a model class with another rotary embedding: --model-plugin",
        )
    return found


class FixedRotary(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by the type check
    """Stands for a rotary module while the model is exported, and emits `tyir::rope_angles`.

    `positions`: the buffer of positions [A, n] to take instead of those the model gives; the tables are f32
    then, as a tower's are, otherwise of the hidden state's type.
    """

    def __init__(self, turning: Turning, positions: torch.Tensor | None = None) -> None:
        super().__init__()
        self.turning = turning
        self.fixed = positions is not None
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        positions = self.positions if self.fixed else position_ids
        turning = self.turning
        cos, sin = torch.ops.tyir.rope_angles(
            positions, list(turning.inv_freq), list(turning.axis), turning.scale, x, self.fixed
        )
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
