"""`sdy`: the part of Shardy's vocabulary that tyir uses, spelled as Shardy spells it
(https://github.com/openxla/shardy).

`sdy.mesh` names the dies; `sdy.sharding` attributes say along which axes of the mesh a value's dimensions are
cut.  Shardy's shardings are even; which rows each die really has stands beside them in `tyir.sharding`
(`tyir.sharding`, this project's module of that name).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY

from tyir.attributes import Attribute, OpaqueAttr
from tyir.opdef import DeclaredOp, attr
from tyir.traits import Symbol

__all__ = ["Mesh"]

_AXIS = r"\"\w+\"=[0-9]{1,9}"
_MESH = re.compile(
    rf"<\[({_AXIS}(?:, {_AXIS})*)\](?:, device_ids=\[((?:[0-9]{{1,9}}(?:, ?[0-9]{{1,9}})*)?)\])?>"
)


class Mesh(DeclaredOp, name="sdy.mesh", traits=(Symbol,)):
    """The dies of a board as a mesh of named axes, `#sdy.mesh<["die"=4]>` or `#sdy.mesh<["group"=4, "die"=4],
    device_ids=[...]>`.

    `device_ids` are the physical dies in the order of the programs; the first is the main one.
    """

    _: KW_ONLY
    sym_name: str = attr()
    mesh: Attribute = attr()

    @classmethod
    def make(cls, axes: Sequence[tuple[str, int]], devices: Sequence[int], name: str = "mesh") -> Mesh:
        """A mesh; `device_ids` are written only when they are not 0, 1, 2, ..."""
        text = ", ".join(f'"{axis}"={size}' for axis, size in axes)
        ids = (
            ""
            if list(devices) == list(range(len(devices)))
            else f", device_ids=[{', '.join(map(str, devices))}]"
        )
        return cls(sym_name=name, mesh=OpaqueAttr("sdy.mesh", f"<[{text}]{ids}>"))

    @property
    def axes(self) -> tuple[tuple[str, int], ...]:
        """Axis names and sizes."""
        match = self._match()
        pairs = match.group(1).split(", ") if match else []
        return tuple((p.split("=")[0].strip('"'), int(p.split("=")[1])) for p in pairs)

    @property
    def dies(self) -> int:
        """How many dies there are."""
        count = 1
        for _, size in self.axes:
            count *= size
        return count

    @property
    def devices(self) -> tuple[int, ...]:
        """The physical die of each program."""
        match = self._match()
        listed = match.group(2) if match else None
        return tuple(int(d) for d in listed.split(",")) if listed else tuple(range(self.dies))

    def _match(self) -> re.Match[str] | None:
        return _MESH.fullmatch(self.mesh.body) if isinstance(self.mesh, OpaqueAttr) else None

    def verify(self) -> Iterator[str]:
        if self._match() is None:
            yield f'mesh must be like #sdy.mesh<["die"=4]>, got {self.mesh}'
        elif sorted(set(self.devices)) != sorted(self.devices) or len(self.devices) != self.dies:
            yield f"device_ids {list(self.devices)} must name {self.dies} different dies"
