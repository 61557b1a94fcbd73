"""Where a model leaves room for scales per channel: what one producer gives is divided by them, and every
linear that reads it is multiplied.

    %n = ty.rms_norm %x, %norm          %norm / s
    %q = ty.linear %n, %wq              %wq * s by columns
    %k = ty.linear %n, %wk              %wk * s by columns

Found by dataflow, whatever modules are called: nothing but linears may read the producer's values, along a
way that a positive factor per channel passes unchanged:

* a norm's weight and bias, to the linears that read it;
* the ungated operand of a gated product (`silu(gate) * up`), to the linear after the product: the activation
  is the gate's, which is not scaled;
* the values of attention, whose rows are sums of them with factors that are the channel's own; a key/value
  head that several query heads read has the same scales in all of them;
* a linear straight into a linear, or through ReLU or a constant factor; not through GELU or SiLU.

A producer's parameter must be its own (a shared one would be divided elsewhere too), and every linear that is
made of a reader's parameter must read these values.  Norms of the queries and keys (Qwen3, Gemma 3, OLMo 2)
stand after the linears, so they see what they saw: the group of norm, q, k and v is the same with and without
them.  A norm over what a linear gives has no linear to be divided: its own input is what it divides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from tyir.dialects import ty
from tyir.dialects.ty import tensor_type
from tyir.ir import Op, Value
from tyir.layers import layer_of
from tyir.passes._parameters import ParameterUse, ParameterUses
from tyir.traits import Gated

__all__ = ["ScaleGroup", "scale_groups"]

_WEIGHT: Final = 1  # the operand of a linear or a norm
_BIAS: Final = 2


@dataclass(frozen=True)
class ScaleGroup:
    """Channels that can be scaled.

    `kind`: "norm", "gated", "attention" or "linear".  `producer` and `readers` are module paths as the
    checkpoint names them, each once; a packed module (`qkv_proj`) is one reader.  `channels`: how many scales
    there are.  `head`, `repeats`: each run of `head` scales stands `repeats` times in the readers' columns.
    `scaled` are the parameters of the producer that are divided (weight, bias), by rows; `columns` those of
    the readers, one for each linear.
    """

    kind: str
    layer: int | None
    producer: str
    readers: tuple[str, ...]
    channels: int
    head: int
    repeats: int
    scaled: tuple[ParameterUse, ...]
    columns: tuple[ParameterUse, ...]

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """Which rows of the producer's weight are divided, one for each scale."""
        rows = self.scaled[0].rows
        assert rows is not None
        return rows

    def of_columns(self, scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The scales [channels] as the readers' input channels have them [K]."""
        return np.repeat(scale.reshape(-1, self.head), self.repeats, axis=0).reshape(-1)


def scale_groups(module: Op, *, head: bool = False) -> list[ScaleGroup]:
    """The scale groups of a module at stage `ty` (or of its function), in the order of their producers.

    Those of the decoder layers; with `head` also that of the norm before an output head with weights of its
    own.  The module must hold floating-point linears still: `quantize-weights` takes them away.
    """
    return _Finder(module).groups(head)


class _Finder:
    def __init__(self, module: Op) -> None:
        self.module = module
        self.uses = ParameterUses(module)

    def groups(self, head: bool) -> list[ScaleGroup]:
        found: dict[str, ScaleGroup] = {}
        for op in self.module.walk():
            group = self._group_of(op)
            if group is not None and (head or group.layer is not None):
                found.setdefault(group.producer, group)  # a table has one entry for each path
        return list(found.values())

    def _group_of(self, op: Op) -> ScaleGroup | None:
        if not isinstance(op, (ty.RmsNorm, ty.LayerNorm, ty.Linear)):
            return None
        scaled = self._rows(op)
        if scaled is None or scaled[0].rows is None:
            return None
        channels = len(scaled[0].rows)
        readers: list[ty.Linear] = []
        kind = "linear" if isinstance(op, ty.Linear) else "norm"
        way = self._follow(op.results[0], _Way(kind, channels, 1), readers)
        columns = None if way is None else self._columns(readers)
        if way is None or columns is None or {u.name for u in columns} & {u.name for u in scaled}:
            return None
        if any(tensor_type(u.root).static_shape[1] != channels * way.repeats for u in columns):
            return None  # the channels of each head, and other than those of all heads
        return ScaleGroup(
            kind=way.kind,
            layer=layer_of(op),
            producer=self.uses.path(scaled[0]),
            readers=tuple(dict.fromkeys(self.uses.path(u) for u in columns)),
            channels=channels,
            head=way.head,
            repeats=way.repeats,
            scaled=scaled,
            columns=columns,
        )

    def _rows(self, op: Op) -> tuple[ParameterUse, ...] | None:
        """The producer's parameters, when their rows are its own."""
        found = []
        for index in range(_WEIGHT, len(op.operands)):
            use = self.uses.of(op, index)
            if use is None or use.rows is None or tensor_type(use.value).rank != self._rank(op, index):
                return None
            sharing = self.uses.sharing(use)
            if sharing is None or any(u is not use and _overlap(u, use) for u in sharing):
                return None
            found.append(use)
        return tuple(found) or None

    @staticmethod
    def _rank(op: Op, index: int) -> int:
        return 2 if isinstance(op, ty.Linear) and index == _WEIGHT else 1

    def _columns(self, readers: Sequence[ty.Linear]) -> tuple[ParameterUse, ...] | None:
        """The readers' weights, when no other op is made of the same parameters."""
        columns: list[ParameterUse] = []
        for reader in readers:
            use = self.uses.of(reader, _WEIGHT)
            sharing = self.uses.sharing(use) if use is not None and use.rows is not None else None
            if use is None or sharing is None or any(u.user not in readers for u in sharing):
                return None
            columns.append(use)
        return tuple(columns) or None

    def _follow(self, value: Value, way: _Way, readers: list[ty.Linear]) -> _Way | None:
        """How the channels of `value` reach linears, which are added; None when anything else reads them."""
        end: _Way | None = None
        for user in value.users:
            if isinstance(user, ty.Linear):
                reached: _Way | None = way if user.x is value and user.weight is not value else None
                if reached is not None and user not in readers:
                    readers.append(user)
            else:
                step = _step(user, value, way)
                reached = None if step is None else self._follow(user.results[0], step, readers)
            if reached is None or (end is not None and end != reached):
                return None
            end = reached
        return end


def _overlap(one: ParameterUse, other: ParameterUse) -> bool:
    return one.rows is None or other.rows is None or bool(np.isin(one.rows, other.rows).any())


@dataclass(frozen=True)
class _Way:
    """What the channels have passed: each run of `head` of them stands `repeats` times."""

    kind: str
    head: int
    repeats: int


def _step(user: Op, value: Value, way: _Way) -> _Way | None:
    """The way after an op; None when a factor per channel does not pass it unchanged."""
    match user:
        case ty.Reshape():
            return way if _channels(user.x) == _channels(user.out) else None
        case ty.Relu() | ty.Scale():
            return way
        case ty.Mul() if user.lhs is not user.rhs:
            return _Way("gated" if way.kind == "linear" else way.kind, way.head, way.repeats)
        case ty.Attention() if user.v is value and value not in (user.q, user.k):
            heads, shared = tensor_type(user.q).dims[2] or 1, tensor_type(user.v).dims[2] or 1
            size = tensor_type(user.v).dims[3] or 1
            return _Way("attention" if way.kind == "linear" else way.kind, size, heads // shared)
    if user.has_trait(Gated) and user.operands[1] is value and user.operands[0] is not value:
        return _Way("gated" if way.kind == "linear" else way.kind, way.head, way.repeats)
    return None


def _channels(value: Value) -> int:
    """The channels of [b, s, C] or [b, s, heads, C / heads]: what comes after the tokens."""
    return math.prod(d or 0 for d in tensor_type(value).dims[2:])
