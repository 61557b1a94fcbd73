"""`dist`: what dies do together.  Dies that take part in the same collectives hold them in the same order;
how they meet is `tyir.execution.lockstep`.

After `partition-dies` the file holds one `sdy.mesh` and one module `@die{i}` per die.  `dies` of a collective
are those that take part, without it all do; the dies of a pipeline stage meet among themselves, and hand the
residual stream on with `dist.send` and `dist.recv`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.dialects.ty import as_type, axis_in, tensor_type
from tyir.execution import lockstep
from tyir.execution.storage import packed_shape
from tyir.ir import Value
from tyir.opdef import DeclaredOp, attr, operand, optional_operand, result
from tyir.traits import Collective
from tyir.types import TensorType, Type, storage_dtype

__all__ = ["AllGather", "AllReduce", "CollectivePermute", "Recv", "Send"]

Array = npt.NDArray[Any]


def _layout(t: TensorType) -> lockstep.Layout:
    """How a tensor of a type lies in memory."""
    return lockstep.Layout(packed_shape(t), storage_dtype(t.element))


class AllReduce(DeclaredOp, name="dist.all_reduce", traits=(Collective,)):
    """The sum of all dies' operands, on every die: added in f32 in die order, rounded once, so that every die
    gets the same bits.

    A die that has nothing to add (more dies than heads) takes part without an operand.  On a mesh of two
    levels `group` neighbouring dies share a package: what travels between the packages is then a part of the
    sum for each of them.
    """

    x: Value | None = optional_operand(default=None)
    _: KW_ONLY
    dies: tuple[int, ...] | None = attr(default=None)
    group: int | None = attr(default=None)
    out: Value = result()

    def verify(self) -> Iterator[str]:
        if self.x is not None and self.x.type is not self.out.type:
            yield f"operand {self.x.type} and result {self.out.type} differ"

    def request(self, operand: Array | None) -> lockstep.Request:
        """What this die asks of the others."""
        return lockstep.Meet(self.name, self.dies or (), operand, self.combine, self._given, self.name)

    def _given(self, number: int) -> lockstep.Layout:
        return _layout(tensor_type(self.out))

    def combine(self, parts: Sequence[Array | None]) -> Array:
        """The result from the operands of all dies, in die order; None for a die that adds nothing."""
        present = [part for part in parts if part is not None]
        total = present[0].astype(np.float32)
        for part in present[1:]:
            total = total + part.astype(np.float32)
        return as_type(total, tensor_type(self.out).element)


class AllGather(DeclaredOp, name="dist.all_gather", traits=(Collective,)):
    """All dies' operands joined along `axis`, in die order; `sizes` are the lengths of those that take part,
    which may differ.

    A die whose length is 0 takes part without an operand.  Until localize-dies the operand has its global
    shape.
    """

    x: Value | None = optional_operand(default=None)
    _: KW_ONLY
    axis: int = attr()
    sizes: tuple[int, ...] = attr(least=0)
    dies: tuple[int, ...] | None = attr(default=None)
    out: Value = result()

    def verify(self) -> Iterator[str]:
        out = tensor_type(self.out)
        axis_in(self.axis, out)
        if out.dims[self.axis] != sum(self.sizes):
            yield (
                f"sizes {list(self.sizes)} add up to {sum(self.sizes)}, the result {out} has"
                f" {out.dims[self.axis]} along axis {self.axis}"
            )
        elif self.x is not None and not self._may_give(tensor_type(self.x, out.rank).dims[self.axis]):
            yield f"operand {self.x.type} has none of the sizes {list(self.sizes)} along axis {self.axis}"

    def request(self, operand: Array | None) -> lockstep.Request:
        """What this die asks of the others."""
        return lockstep.Meet(self.name, self.dies or (), operand, self.combine, self._given, self.name)

    def _given(self, number: int) -> lockstep.Layout:
        whole = _layout(tensor_type(self.out))
        shape = list(whole.shape)
        shape[self.axis] = self.sizes[number]
        return lockstep.Layout(tuple(shape), whole.dtype)

    def _may_give(self, size: int | None) -> bool:
        """Whether a die's operand may have this length: its own, or the whole before localize-dies."""
        return size in (*self.sizes, sum(self.sizes))

    def combine(self, parts: Sequence[Array | None]) -> Array:
        """The result from the operands of all dies, in die order; None for a die whose length is 0."""
        return np.concatenate([part for part in parts if part is not None], axis=self.axis)


class CollectivePermute(DeclaredOp, name="dist.collective_permute", traits=(Collective,)):
    """A value goes from each source to its target: `pairs` are source, target, source, target, ...; a die
    that has it already keeps it.

    As `stablehlo.collective_permute`, except that a source may have several targets.  Exists from
    insert-collectives to localize-dies, which makes a `dist.send` of it on the sources and a `dist.recv` on
    the targets.
    """

    x: Value = operand()
    _: KW_ONLY
    pairs: tuple[int, ...] = attr()
    out: Value = result()

    def infer(self) -> Type:
        return self.x.type

    @property
    def routes(self) -> tuple[tuple[int, int], ...]:
        """(source, target) of each transfer."""
        return tuple(zip(self.pairs[::2], self.pairs[1::2]))

    def verify(self) -> Iterator[str]:
        targets = self.pairs[1::2]
        if len(self.pairs) % 2 or len(set(targets)) != len(targets):
            yield f"pairs {list(self.pairs)} must be source and target in turn, each target once"


class Send(DeclaredOp, name="dist.send", traits=(Collective,)):
    """Hands `x` to the `targets`, which take it with a `dist.recv` of the same `tag`.

    Does not wait for them.
    """

    x: Value = operand()
    _: KW_ONLY
    targets: tuple[int, ...] = attr()
    tag: int = attr(default=0)

    def request(self, operand: Array | None) -> lockstep.Request:
        """What this die asks of the others."""
        assert operand is not None
        return lockstep.Send(self.targets, self.tag, operand, self.name)

    def verify(self) -> Iterator[str]:
        if not self.targets:
            yield "a send without targets"


class Recv(DeclaredOp, name="dist.recv", traits=(Collective,)):
    """What die `source` sends with this `tag`."""

    _: KW_ONLY
    source: int = attr()
    tag: int = attr(default=0)
    out: Value = result()

    def request(self, operand: Array | None) -> lockstep.Request:
        """What this die asks of the others."""
        return lockstep.Recv(self.source, self.tag, lambda: _layout(tensor_type(self.out)), self.name)
