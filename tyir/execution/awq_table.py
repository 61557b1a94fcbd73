"""The AWQ table: what the search chose for a model, in one safetensors file that anybody can read and edit.

    model.layers.0.input_layernorm.scale      f32 [K]         of the channels that this norm gives
    model.layers.0.self_attn.v_proj.scale     f32 [G * D]     of the values of G key/value heads
    model.layers.0.mlp.up_proj.scale          f32 [K]
    model.layers.0.mlp.down_proj.range        f32 [2, N, K/g] lowest and highest value of each group
    __metadata__: {"tyir.awq": "{\\"version\\": 1, \\"bits\\": 4, \\"group_size\\": 128, ...}"}

A **scale** belongs to a producer, a norm or a linear, by its module path: what the producer gives is divided
by it (a norm's weight and bias, a linear's rows and bias), and the input channels of every linear that reads
it are multiplied.  A scale of v_proj is repeated for the query heads that read a key/value head.  A **range**
belongs to a linear: after scaling its weight is clamped, group by group, to [lowest, highest].  Which scales
a model has room for says `tyir.passes._scale_groups`; `awq-fold` applies the table.

The arithmetic, tensor by tensor (`QuantizeGroups.evaluate` has the last step):

    norm:    f16(f32(weight) / scale)
    linear:  w = f32(weight) / producer's scale of its rows * scale of its columns     in f32, in this order
             w = f16(min(max(w, lowest), highest))                                     rounded once
             q, s, z = quantise the f16 weight as without a table
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Self

import numpy as np
import numpy.typing as npt
from annotated_types import Interval, MaxLen

from tyir.artifacts.schema import Matches, checked, closed, first_of
from tyir.diagnostics import Diagnostic, TyirError
from tyir.execution.safetensors_layout import SafetensorsLayout
from tyir.execution.weights import FileEntry, give_back_pages, safetensors_header
from tyir.process.files import open_regular, parse_json

__all__ = ["RANGE", "SCALE", "AwqSettings", "AwqTable"]

Array = npt.NDArray[np.float32]

SCALE: Final = ".scale"
RANGE: Final = ".range"
_KEY: Final = "tyir.awq"
_VERSION: Final = 1
_MEND: Final = "mend the entry, or make the table again"
_RANK: Final = {SCALE: 1, RANGE: 3}
_SHAPE: Final = {SCALE: "[channels]", RANGE: "[2, rows, groups]"}


@closed
@dataclass(frozen=True)
class AwqSettings:
    """What a table was made for.

    `bits`, `group_size`, `zero_point` (False: symmetric, -lowest = highest): of the quantisation to come.
    `model_type`: of the model's config.json.  `modules_to_not_convert`: module paths, or runs of whole
    components of them, whose linears stay as they are.  `lm_head`: whether the head is quantised.
    """

    version: Annotated[int, Interval(ge=_VERSION, le=_VERSION)] = _VERSION
    bits: Annotated[int, Interval(ge=2, le=8)] = 4
    group_size: Annotated[int, Interval(ge=1, le=2**31 - 1)] = 128
    zero_point: bool = True
    model_type: Annotated[str, Matches("[A-Za-z0-9_.-]*"), MaxLen(100)] = ""
    modules_to_not_convert: tuple[str, ...] = ()
    lm_head: bool = False


@dataclass(frozen=True)
class AwqTable:
    """A table in memory, mapped from its file, or read when it is asked for (mappings that do so).

    `scales`: by the path of the producer, f32 [K]; `ranges`: by the path of the linear, f32 [2, N, K/g].
    `entries`: where each tensor lies in the file, by its whole name; empty for a table that was not opened.
    """

    settings: AwqSettings
    scales: Mapping[str, Array] = field(default_factory=dict)
    ranges: Mapping[str, Array] = field(default_factory=dict)
    entries: Mapping[str, FileEntry] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Self:
        """The table of a file, its arrays mapped from it.

        `TyirError` lists what is wrong: no safetensors file, metadata that is missing or of another kind, and
        entries (by name) of another dtype or shape, with values that are not finite, scales that are not
        positive, ranges upside down.
        """
        try:
            with open_regular(path) as file:
                data: npt.NDArray[np.uint8] = np.memmap(file, np.uint8, "r")
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise TyirError(
                f"cannot read the AWQ table {path}: {why}", help="give the file that the search wrote"
            ) from None
        entries, metadata = safetensors_header(data, path)
        settings = _settings(metadata, path)
        arrays: dict[str, dict[str, Array]] = {SCALE: {}, RANGE: {}}
        problems = []
        for name, entry in entries.items():
            kind = next((k for k in _RANK if name.endswith(k) and name != k), None)
            if kind is None:
                problems.append(
                    Diagnostic(
                        f"'{name}' is neither a scale nor a range",
                        help="name it MODULE.PATH.scale or MODULE.PATH.range, or remove it",
                    )
                )
            elif entry.dtype != "F32":
                problems.append(Diagnostic(f"'{name}' has dtype {entry.dtype}, F32 is needed", help=_MEND))
            else:
                found = data[entry.start : entry.end].view(np.float32).reshape(entry.shape)
                arrays[kind][name.removesuffix(kind)] = found
        table = cls(settings, arrays[SCALE], arrays[RANGE], entries)
        problems += table._problems()
        give_back_pages(data, 0, len(data))
        if problems:
            raise TyirError(first_of(problems, str(path), _MEND))
        return table

    def save(self, path: Path) -> None:
        """Write the table, in place of what was there, at once: equal tables have equal bytes.

        One tensor is held at a time, so mappings may read them from other files.  `TyirError` as for `open`.
        """
        if problems := list(self._problems()):
            raise TyirError(first_of(problems, str(path), _MEND))
        shapes = dict(sorted((name, array.shape) for name, array in self._tensors()))
        layout = SafetensorsLayout(
            {name: ("F32", shape) for name, shape in shapes.items()}, {_KEY: self._metadata}
        )
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(descriptor)
        try:
            with layout.create(Path(temporary)) as file:
                for name, array in self._tensors():
                    file.seek(layout.slots[name].offset)
                    file.write(np.ascontiguousarray(array, "<f4").tobytes())
            mask = os.umask(0)
            os.umask(mask)
            Path(temporary).chmod(0o666 & ~mask)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @cached_property
    def _metadata(self) -> str:
        return json.dumps(asdict(self.settings), separators=(", ", ": "))

    def _tensors(self) -> Iterator[tuple[str, Array]]:
        yield from ((path + SCALE, array) for path, array in self.scales.items())
        yield from ((path + RANGE, array) for path, array in self.ranges.items())

    def _problems(self) -> Iterator[Diagnostic]:
        """What is wrong with entries, whatever model they are for."""
        for name, array in self._tensors():
            kind = SCALE if name.endswith(SCALE) else RANGE
            if array.ndim != _RANK[kind] or (kind == RANGE and len(array) != 2):
                yield Diagnostic(
                    f"'{name}' has shape {list(array.shape)}, {_SHAPE[kind]} is needed", help=_MEND
                )
            elif array.dtype != np.float32:
                yield Diagnostic(f"'{name}' is {array.dtype}, float32 is needed", help=_MEND)
            elif (place := _first(~np.isfinite(array))) is not None:
                yield Diagnostic(f"'{name}' holds {array[place]} at {list(place)}", help=_MEND)
            elif kind == SCALE and (place := _first(array <= 0)) is not None:
                yield Diagnostic(
                    f"'{name}' holds {array[place]:g} at {list(place)}; scales are positive",
                    help="write 1 for a channel that is not to be scaled",
                )
            elif kind == RANGE and (place := _first(array[0] > array[1])) is not None:
                low, high = (float(bound[place]) for bound in array)
                yield Diagnostic(
                    f"'{name}' has its lowest value {low:g} above its highest {high:g} at {list(place)}",
                    help="exchange the two, or make the table again",
                )
            elif (
                kind == RANGE
                and not self.settings.zero_point
                and (place := _first(array[0] != -array[1])) is not None
            ):
                low, high = (float(bound[place]) for bound in array)
                yield Diagnostic(
                    f"'{name}' is {low:g} to {high:g} at {list(place)}, but the table is symmetric"
                    " (zero_point false)",
                    help="make lowest and highest equal but for the sign, or set zero_point to true",
                )


def _first(wrong: npt.NDArray[np.bool_]) -> tuple[int, ...] | None:
    """Where the first True stands."""
    if not wrong.any():
        return None
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(wrong)), wrong.shape))


def _settings(metadata: Mapping[str, Any], path: Path) -> AwqSettings:
    """The settings of a file's metadata; `TyirError` when it has none or others than are known."""
    text = metadata.get(_KEY)
    if not isinstance(text, str):
        raise TyirError(
            f"{path} is not an AWQ table: its metadata has no '{_KEY}'",
            help="give the file that the search wrote (awq.safetensors), not a checkpoint's",
        )
    try:
        value = parse_json(text.encode(), finite=True)
    except ValueError as error:
        raise TyirError(f"{path}: its '{_KEY}' is not JSON: {error}", help=_MEND) from None
    return checked(AwqSettings, value, f"{path}: {_KEY}", _MEND)
