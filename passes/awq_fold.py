"""The scales and ranges of an AWQ table go into the weights; the model computes what it did.

    %n = ty.rms_norm %x, @norm
    %y = ty.linear %n, @w
    -->
    %s = ty.get_global @awq.model.layers.0.input_layernorm.scale
    %n = ty.rms_norm %x, f16(ty.divide_channels f32(@norm), %s)
    %w = f16(ty.clamp_groups(ty.multiply_channels(f32(@w), %s), @awq.model...mlp.up_proj.range))
    %y = ty.linear %n, %w

The table (`tyir.execution.awq_table`) lies beside the IR as checkpoint weights do; which of its scales a
model has room for, `tyir.passes._scale_groups` finds by dataflow.  Every parameter is computed in f32 from
what is stored, and rounded once.  A norm that adds 1 to its weight (Gemma) gets (1 + w) / s - 1.
quantize-weights follows, with the table's settings as its options (`tyir.passes.pipelines.awq_pipeline`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final

import numpy as np

from tyir.attributes import DenseElementsAttr, DictAttr, StringAttr, SymbolRefAttr
from tyir.diagnostics import Diagnostic, TyirError, did_you_mean
from tyir.dialects import ty
from tyir.dialects.ty import GetGlobal, tensor_type
from tyir.execution.awq_table import RANGE, SCALE, AwqTable
from tyir.execution.weights import FileStamp
from tyir.ir import Op, Value
from tyir.manifest import record, recorded, sha256_file
from tyir.passes._parameters import ParameterUse, ParameterUses, in_f32, insert_before
from tyir.passes._scale_groups import ScaleGroup, scale_groups
from tyir.pipeline import Pass, PassContext
from tyir.types import TensorType, f32

__all__ = ["AwqFold"]

_PREFIX: Final = "awq."  # of the table's tensors among the module's symbols


@dataclass(frozen=True)
class AwqFold(Pass):
    """Divides producers and multiplies readers by an AWQ table's scales, and clamps weights to its ranges."""

    stage: ClassVar[tuple[str, ...]] = ("ty",)

    table: str = ""

    def run(self, op: Op, context: PassContext) -> None:
        if not self.table:
            raise TyirError(
                "awq-fold needs a table", help="awq-fold{table=awq.safetensors}, a file that the search wrote"
            )
        if "awq" in (done := recorded(op)):
            raise TyirError("the module has an AWQ table folded in already", help="import the model again")
        if "weights" in done:
            raise TyirError(
                "the module's weights are quantised already; a table is folded in before",
                help="run awq-fold before quantize-weights",
            )
        path = Path(self.table).absolute()
        if path.suffix != ".safetensors":
            raise TyirError(
                f"{path.name} does not end in .safetensors, as files of tensors beside a checkpoint do",
                help=f"rename it to {path.stem}.safetensors",
            )
        table = AwqTable.open(path)
        _check_model(op, table, path)
        fold = _Fold(op, table, path)
        fold.run()
        context.statistics["scales"] = len(table.scales)
        context.statistics["ranges"] = len(table.ranges)
        record(op, awq=sha256_file(path))


def _check_model(module: Op, table: AwqTable, path: Path) -> None:
    """`TyirError` when the table says that it was made for another kind of model."""
    model = module.attributes.get("tyir.model")
    found = model.get("model_type") if isinstance(model, DictAttr) else None
    wanted = table.settings.model_type
    if isinstance(found, StringAttr) and wanted and found.value != wanted:
        raise TyirError(
            f"{path} was made for a model of type '{wanted}', this one is '{found.value}'",
            help="give the table of this model, or make one",
        )


@dataclass
class _Change:
    """What is done to one parameter: all operands made of it, and the scales of its rows and columns."""

    uses: list[ParameterUse]
    rows: list[tuple[ParameterUse, str]] = field(default_factory=list)
    columns: tuple[ScaleGroup, str] | None = None
    range: str | None = None


class _Fold:
    def __init__(self, module: Op, table: AwqTable, path: Path) -> None:
        self.module, self.table, self.path = module, table, path
        self.uses = ParameterUses(module)
        self.changes: dict[tuple[str, bool], _Change] = {}
        self.symbols: dict[str, TensorType] = {}
        self.order = {op: number for number, op in enumerate(module.walk())}

    def run(self) -> None:
        groups = {group.producer: group for group in scale_groups(self.module, head=True)}
        linears = self._linears()
        problems = [
            *self._scale_problems(groups, linears),
            *self._range_problems(linears),
        ]
        if problems:
            raise TyirError(problems)
        for path in self.table.scales:
            self._plan_scale(groups[path], path + SCALE)
        for path in self.table.ranges:
            self._change(linears[path]).range = path + RANGE
        for change in self.changes.values():
            self._apply(change)
        self._declare()

    def _linears(self) -> dict[str, ParameterUse]:
        """The weights of floating-point linears by module path; one for a packed module."""
        found: dict[str, ParameterUse] = {}
        for use in self.uses:
            if isinstance(use.user, ty.Linear) and use.index == 1 and use.rows is not None:
                found.setdefault(self.uses.path(use), use)
        return found

    # ---------------------------------------------------------------------------------------- what is wrong

    def _scale_problems(
        self, groups: Mapping[str, ScaleGroup], linears: Iterable[str]
    ) -> Iterator[Diagnostic]:
        for path, scale in self.table.scales.items():
            name, group = path + SCALE, groups.get(path)
            if group is None:
                known = {*linears, *(p for use in self.uses if (p := self.uses.path(use)))}
                yield Diagnostic(
                    f"{self.path.name}: '{name}' belongs to {_what(path, known)}",
                    help=(path not in known and did_you_mean(path, groups))
                    or "remove the entry; scales are for norms that only linears read, up_proj, v_proj",
                )
            elif scale.shape != (group.channels,):
                yield Diagnostic(
                    f"{self.path.name}: '{name}' has {len(scale)} scales, {path} gives"
                    f" {group.channels} channels",
                    help="give the table of this model, or make one",
                )

    def _range_problems(self, linears: Mapping[str, ParameterUse]) -> Iterator[Diagnostic]:
        size = self.table.settings.group_size
        for path, ranges in self.table.ranges.items():
            name, use = path + RANGE, linears.get(path)
            if use is None:
                known = {p for each in self.uses if (p := self.uses.path(each))}
                yield Diagnostic(
                    f"{self.path.name}: '{name}' belongs to {_what(path, known, 'a linear')}",
                    help=(path not in known and did_you_mean(path, linears))
                    or "remove the entry; ranges are for linears",
                )
                continue
            n, k = tensor_type(use.root).static_shape
            if ranges.shape != (2, n, k // size) or k % size:
                yield Diagnostic(
                    f"{self.path.name}: '{name}' has shape {list(ranges.shape)}, the {n}x{k} weight of {path}"
                    f" in groups of {size} needs {[2, n, k // size] if k % size == 0 else 'another size'}",
                    help="give the table of this model, or make one",
                )

    # --------------------------------------------------------------------------------------------- the work

    def _change(self, use: ParameterUse) -> _Change:
        """The change of the parameter that a use is of; of a head that shares the embedding's table, of this
        use alone.
        """
        sharing = self.uses.sharing(use)
        alone = sharing is None or any(not isinstance(u.user, type(use.user)) for u in sharing)
        key = (use.name, alone)
        if key not in self.changes:
            self.changes[key] = _Change([use] if alone or sharing is None else sharing)
        return self.changes[key]

    def _plan_scale(self, group: ScaleGroup, name: str) -> None:
        for use in group.scaled:
            self._change(use).rows.append((use, name))
        for use in group.columns:
            self._change(use).columns = (group, name)

    def _apply(self, change: _Change) -> None:
        """The parameter in f32, divided, multiplied, clamped, rounded once, in place of what was there."""
        first = min(change.uses, key=lambda use: self.order[use.user])
        user, element = first.user, tensor_type(first.value).element
        value = in_f32(first.root, user)
        for use, name in change.rows:
            value = self._divided(value, use, name, user)
        if change.columns is not None:
            group, name = change.columns
            scales = self._columns(group, name, user)
            value = insert_before(user, ty.MultiplyChannels(value, scales, axis=1)).result
        if change.range is not None:
            value = insert_before(user, ty.ClampGroups(value, self._entry(change.range, user))).result
        if element is not f32:
            value = insert_before(user, ty.Cast(value, element=element)).result
        for use in change.uses:
            use.put(value)

    def _divided(self, value: Value, use: ParameterUse, name: str, user: Op) -> Value:
        scales = self._of_rows(self._entry(name, user), use, user)
        shift = use.shift
        if shift is None:
            return insert_before(user, ty.DivideChannels(value, scales, axis=0)).result
        # 1 + w is divided, and what the model adds is taken away again
        sum_ = insert_before(user, ty.Add(value, _as_f32(shift, user))).result
        quotient = insert_before(user, ty.DivideChannels(sum_, scales, axis=0)).result
        minus = insert_before(user, ty.Scale(_as_f32(shift, user), factor=-1.0)).result
        return insert_before(user, ty.Add(quotient, minus)).result

    def _of_rows(self, scales: Value, use: ParameterUse, user: Op) -> Value:
        """The scales of all rows of a parameter: 1 for those that the producer does not have."""
        assert use.rows is not None
        total, count = tensor_type(use.root).static_shape[0], len(use.rows)
        first = int(use.rows[0])
        if np.array_equal(use.rows, np.arange(first, first + count)):
            around = [(0, first), (first + count, total)]
            before, after = [[_ones(b - a, user)] if b > a else [] for a, b in around]
            parts = [*before, scales, *after]
            return scales if len(parts) == 1 else insert_before(user, ty.Concat(tuple(parts), axis=0)).result
        places = np.full(total, count)
        places[use.rows] = np.arange(count)
        whole = insert_before(user, ty.Concat((scales, _ones(1, user)), axis=0)).result
        return insert_before(user, ty.Take(whole, axis=0, indices=tuple(places.tolist()))).result

    def _columns(self, group: ScaleGroup, name: str, user: Op) -> Value:
        """The scales as the readers' columns have them, each head's as often as query heads read it."""
        scales = self._entry(name, user)
        if group.repeats == 1:
            return scales
        shaped = insert_before(user, ty.Reshape(scales, shape=(-1, group.head))).result
        repeated = insert_before(user, ty.Repeat(shaped, axis=0, times=group.repeats)).result
        return insert_before(user, ty.Reshape(repeated, shape=(-1,))).result

    def _entry(self, name: str, user: Op) -> Value:
        """A tensor of the table."""
        kind = self.symbols.setdefault(name, TensorType(self.table.entries[name].shape, f32))
        reference = GetGlobal(symbol=SymbolRefAttr(_PREFIX + name), result_types=[kind])
        return insert_before(user, reference).result

    def _declare(self) -> None:
        """The table's tensors as `ty.global`s, and its file among those that are looked at before use."""
        first = self.module.body.first_op
        for name, kind in self.symbols.items():
            entry = self.table.entries[name]
            self.module.body.insert(
                ty.Global(
                    sym_name=_PREFIX + name,
                    type=kind,
                    file=str(self.path),
                    key=name,
                    offset=entry.start,
                    nbytes=entry.end - entry.start,
                ),
                before=first,
            )
        files = self.module.attributes.get("tyir.files")
        listed = dict(files.items()) if isinstance(files, DictAttr) else {}
        stamp = FileStamp.of(self.path).attribute()
        self.module.set_attribute("tyir.files", DictAttr({**listed, str(self.path): stamp}))


def _what(path: str, known: Iterable[str], wanted: str = "") -> str:
    """What a path is that a table has an entry for and the model no room."""
    if path not in set(known):
        return f"'{path}', which the model does not have"
    if wanted:
        return f"'{path}', which is not {wanted}"
    return f"'{path}', whose channels cannot be scaled: something else than linears reads them"


def _as_f32(value: Value, user: Op) -> Value:
    if tensor_type(value).element is f32:
        return value
    return insert_before(user, ty.Cast(value, element=f32)).result


def _ones(count: int, user: Op) -> Value:
    one = np.float32(1).tobytes()
    return insert_before(user, ty.Constant(value=DenseElementsAttr(one, TensorType((count,), f32)))).result
