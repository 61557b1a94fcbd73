'''Declaring operations: one class per op, everything else is derived.

    class Linear(DeclaredOp, name="ty.linear", traits=(Pure,)):
        """out[b, s, n] = sum_k x[b, s, k] * weight[n, k] + bias[n]"""

        x: Value = operand()
        weight: Value = operand()
        bias: Value | None = optional_operand(default=None)
        _: KW_ONLY
        eps: float = attr(default=1e-6)
        out: Value = result()

        def infer(self) -> Type: ...                        # result types from operands and properties
        def verify(self) -> Iterator[str]: ...              # what kinds cannot say
        def evaluate(self, x, weight, bias=None): ...       # reference meaning on numpy arrays

Operands are the constructor's positional arguments; `_: KW_ONLY` (from dataclasses) before the properties tells type checkers that those go by keyword.
From this come the typed constructor `Linear(x, w, eps=1e-5, loc=...)`, accessors, the check of kinds (`check_declaration`), the text forms
(properties by name, operands in order) and the reference documentation.  At most one operand (and one result) may be optional or variadic, so
that counts need no segment attribute.
'''  # noqa: E501

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, dataclass_transform

from tyir.attributes import (
    ArrayAttr,
    Attribute,
    BoolAttr,
    DenseArrayAttr,
    DenseElementsAttr,
    DenseResourceAttr,
    DictAttr,
    FloatAttr,
    IntegerAttr,
    StringAttr,
    SymbolRefAttr,
    UnitAttr,
)
from tyir.diagnostics import Diagnostic, TyirError
from tyir.ir import EMPTY_DICT, Op, Region, Value
from tyir.location import UNKNOWN, Location
from tyir.traits import Trait
from tyir.types import FloatType, FunctionType, IntegerType, TensorType, Type, f64, i64

__all__ = [
    "AttrField",
    "DeclaredOp",
    "OperandField",
    "RegionField",
    "ResultField",
    "attr",
    "operand",
    "optional_operand",
    "region",
    "result",
    "variadic_operand",
    "variadic_result",
]

if TYPE_CHECKING:
    from tyir.checking.symbols import SymbolTables

Arity = Literal["one", "optional", "variadic"]
_MISSING: Final = object()


@dataclass(frozen=True)
class _Codec:
    """How a property's Python value and its attribute correspond; `always`: what `encode` gives is accepted,
    whatever it was given.
    """

    kind: str
    encode: Callable[[Any], Attribute]
    decode: Callable[[Any], Any]
    accepts: Callable[[Attribute], bool]
    always: bool = False


def _is(*classes: type) -> Callable[[Attribute], bool]:
    return lambda a: isinstance(a, classes)


def _same(value: Any) -> Any:
    return value


def _is_int_array(a: Attribute) -> bool:
    return isinstance(a, DenseArrayAttr) and isinstance(a.element, IntegerType)


# Uniqued attributes live as long as the process: these are found without making another to compare.
_integers: Final[dict[int, IntegerAttr]] = {}
_arrays: Final[dict[tuple[int, ...], DenseArrayAttr]] = {}


def _integer(value: Any) -> IntegerAttr:
    if type(value) is not int:
        return value if isinstance(value, IntegerAttr) else IntegerAttr(value, i64)
    found = _integers.get(value)
    if found is None:
        found = _integers[value] = IntegerAttr(value, i64)
    return found


def _integer_array(values: Any) -> DenseArrayAttr:
    if type(values) is not tuple:
        return DenseArrayAttr.i64(values)
    found = _arrays.get(values)
    if found is None:
        found = _arrays[values] = DenseArrayAttr.i64(values)
    return found


_CODECS: Final[dict[str, _Codec]] = {
    "int": _Codec("integer", _integer, lambda a: a.value, _is(IntegerAttr), always=True),
    "float": _Codec(
        "float",
        lambda v: v if isinstance(v, FloatAttr) else FloatAttr(v, f64),
        lambda a: a.value,
        _is(FloatAttr),
        always=True,
    ),
    "str": _Codec("string", StringAttr, lambda a: a.value, _is(StringAttr), always=True),
    "bool": _Codec("boolean", BoolAttr, lambda a: a.value, _is(BoolAttr), always=True),
    "tuple[int, ...]": _Codec(
        "integer array", _integer_array, lambda a: a.values, _is_int_array, always=True
    ),
    "Type": _Codec("type", _same, _same, _is(Type)),
    "TensorType": _Codec("tensor type", _same, _same, _is(TensorType)),
    "FunctionType": _Codec("function type", _same, _same, _is(FunctionType)),
    "FloatType": _Codec("float type", _same, _same, _is(FloatType)),
    "SymbolRefAttr": _Codec(
        "symbol", lambda v: SymbolRefAttr(v) if isinstance(v, str) else v, _same, _is(SymbolRefAttr)
    ),
    "DictAttr": _Codec("dictionary", _same, _same, _is(DictAttr)),
    "ArrayAttr": _Codec("array", _same, _same, _is(ArrayAttr)),
    "DenseElementsAttr": _Codec("dense elements", _same, _same, _is(DenseElementsAttr)),
    "UnitAttr": _Codec("unit", _same, _same, _is(UnitAttr)),
    "Attribute": _Codec("attribute", _same, _same, _is(Attribute)),
}


class OperandField:
    """An operand (or a group of them) by name."""

    def __init__(self, arity: Arity = "one") -> None:
        self.arity: Final = arity
        self.name = ""
        self.position = 0

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def slice(self, op: Op, fields: Sequence[OperandField | ResultField], count: int) -> tuple[int, int]:
        """Start and end of this field among `count` operands."""
        spare = count - sum(f.arity == "one" for f in fields)
        start = 0
        for f in fields:
            size = 1 if f.arity == "one" else max(spare, 0)
            if f is self:
                return start, start + size
            start += size
        raise AssertionError

    def __get__(self, op: Any, owner: type | None = None) -> Any:
        if op is None:
            return self
        if op.plain_operands:
            return op._operands[self.position]
        start, end = self.slice(op, op.operand_fields, len(op._operands))
        if self.arity == "one":
            return op._operands[start]
        if self.arity == "optional":
            return op._operands[start] if end > start else None
        return op._operands[start:end]

    def __set__(self, op: Any, value: Any) -> None:
        start, end = self.slice(op, op.operand_fields, len(op._operands))
        new = list(op._operands)
        new[start:end] = value if self.arity == "variadic" else [] if value is None else [value]
        op.operands = new


class ResultField(OperandField):
    """A result (or a group of them) by name."""

    def __get__(self, op: Any, owner: type | None = None) -> Any:
        if op is None:
            return self
        start, end = self.slice(op, op.result_fields, len(op.results))
        return op.results[start] if self.arity == "one" else op.results[start:end]

    def __set__(self, op: Any, value: Any) -> None:
        raise AttributeError("results cannot be assigned")


class AttrField:
    """A property by name, seen as a Python value.

    `key` is what the IR calls it, if that cannot be the Python name.
    """

    def __init__(
        self,
        default: Any = _MISSING,
        choices: tuple[str, ...] = (),
        key: str = "",
        least: int | None = None,
    ) -> None:
        self.default: Final = default
        self.choices: Final = choices
        self.least: Final = least
        self.key = key
        self.name = ""
        self.owner: type | None = None
        self.codec: _Codec
        self.optional = False

    def __set_name__(self, owner: type, name: str) -> None:
        self.owner = owner
        self.name = name
        self.key = self.key or name

    @property
    def has_default(self) -> bool:
        return self.default is not _MISSING

    def bind(self, annotation: str, owner: str) -> None:
        self.optional = annotation.endswith("| None")
        kind = annotation.removesuffix("| None").strip()
        if kind not in _CODECS:
            raise TypeError(
                f"{owner}.{self.name}: no property kind {annotation!r}; known: {', '.join(_CODECS)}"
            )
        self.codec = _CODECS[kind]

    def __get__(self, op: Any, owner: type | None = None) -> Any:
        if op is None:
            return self
        value = op.properties._map.get(self.key)
        if value is None:
            return None if self.default is _MISSING else self.default
        try:
            return self.codec.decode(value)
        except AttributeError:  # of another kind, which the verifier reports
            if self.key == "sym_name":
                return None  # as `Op.sym_name`: the op defines no symbol
            raise TyirError(f"property '{self.key}' must be {self.codec.kind}, got {value}") from None

    def __set__(self, op: Any, value: Any) -> None:
        op.properties = (
            op.properties.without(self.key)
            if value is None
            else op.properties.with_entry(self.key, self.codec.encode(value))
        )

    def check(self, op: Op) -> str | None:
        value = op.properties._map.get(self.key)
        if value is None:
            return (
                None
                if self.optional or self.default is not _MISSING
                else f"property '{self.key}' ({self.codec.kind}) is missing"
            )
        if not self.codec.accepts(value):
            if isinstance(value, DenseResourceAttr) and value.key == "__elided__":
                return (
                    f"property '{self.key}' was left out when this file was printed"
                    " (--elide-large-constants); print it again without"
                )
            return f"property '{self.key}' must be {self.codec.kind}, got {value}"
        if self.choices and isinstance(value, StringAttr) and value.value not in self.choices:
            return f"property '{self.key}' must be one of {', '.join(self.choices)}, got '{value.value}'"
        if self.least is not None:
            number = self.codec.decode(value)
            smallest = min(number, default=self.least) if isinstance(number, tuple) else number
            if smallest < self.least:
                shown = list(number) if isinstance(number, tuple) else number
                return f"property '{self.key}' must be at least {self.least}, got {shown}"
        return None


class RegionField:
    """A region by name."""

    def __init__(self) -> None:
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, op: Any, owner: type | None = None) -> Any:
        return self if op is None else op.regions[op.region_fields.index(self)]


_FIELDS: Final = (OperandField, AttrField, RegionField)


def _annotation_text(annotation: Any) -> str:
    """How an annotation is written, also where the module does not keep annotations as texts."""
    if isinstance(annotation, str):
        return annotation
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = [_annotation_text(part) for part in parts if part is not types.NoneType]
        return " | ".join([*kinds, "None"] if types.NoneType in parts else kinds)
    return annotation.__name__ if isinstance(annotation, type) and not parts else str(annotation)


def operand() -> Any:
    """Exactly one operand."""
    return OperandField()


def optional_operand(*, default: None = None) -> Any:
    """Zero or one operand; None when absent."""
    return OperandField("optional")


def variadic_operand(*, default: tuple[()] = ()) -> Any:
    """Any number of operands, a tuple."""
    return OperandField("variadic")


def result(*, init: Literal[False] = False) -> Any:
    """Exactly one result; its type comes from `infer` or the constructor's `result_types`."""
    return ResultField()


def variadic_result(*, init: Literal[False] = False) -> Any:
    """Any number of results, a tuple."""
    return ResultField("variadic")


def attr(
    *,
    default: Any = _MISSING,
    choices: tuple[str, ...] = (),
    key: str = "",
    least: int | None = None,
    kw_only: bool = True,
) -> Any:
    """A property, given by keyword; its kind comes from the annotation (int, float, str, bool, tuple[int,
    ...], TensorType, ...).

    `key` is its name in the IR where that cannot be a field's (`name`, which every op has already).  Strings
    may be limited to `choices`, integers (each of a tuple's) to numbers from `least` on; `infer` and `verify`
    see only properties that are as declared.
    """
    return AttrField(default, choices, key, least)


def region(*, default: Region | None = None, kw_only: bool = True) -> Any:
    """A region, given by keyword to the constructor."""
    return RegionField()


def _constructor_only(*, default: Any = None, kw_only: bool = True) -> Any:
    """A constructor argument of every declared op, for type checkers."""


class _OpMeta(type):
    """Gives every declared op empty `__slots__`, so that an op costs no instance dictionary."""

    def __new__(
        mcs, class_name: str, bases: tuple[type, ...], namespace: dict[str, Any], /, **kwargs: Any
    ) -> Any:
        namespace.setdefault("__slots__", ())
        return super().__new__(mcs, class_name, bases, namespace, **kwargs)

    def __init__(
        cls, class_name: str, bases: tuple[type, ...], namespace: dict[str, Any], /, **kwargs: Any
    ) -> None:
        super().__init__(class_name, bases, namespace)


def _counts(fields: Sequence[OperandField]) -> tuple[int, int | None]:
    """The least and the most values a group of fields takes; None for any number."""
    least = sum(f.arity == "one" for f in fields)
    if any(f.arity == "variadic" for f in fields):
        return least, None
    return least, least + sum(f.arity == "optional" for f in fields)


@dataclass_transform(
    field_specifiers=(
        operand,
        optional_operand,
        variadic_operand,
        result,
        variadic_result,
        attr,
        region,
        _constructor_only,
    )
)
class _Declaration(Op, metaclass=_OpMeta):
    """Where the transform begins: type checkers count the fields of classes below this one (PEP 681)."""


class DeclaredOp(_Declaration):
    """Base of all declared ops."""

    __slots__ = ()

    operand_fields: ClassVar[tuple[OperandField, ...]] = ()
    result_fields: ClassVar[tuple[ResultField, ...]] = ()
    attr_fields: ClassVar[tuple[AttrField, ...]] = ()
    region_fields: ClassVar[tuple[RegionField, ...]] = ()
    operand_names: ClassVar[frozenset[str]] = frozenset()
    plain_operands: ClassVar[bool] = True
    operand_counts: ClassVar[tuple[int, int | None]] = (0, 0)  # least and most; None: any number
    result_counts: ClassVar[tuple[int, int | None]] = (0, 0)
    property_names: ClassVar[frozenset[str]] = frozenset()
    doubtful_fields: ClassVar[tuple[AttrField, ...]] = ()  # that a constructor's argument can be wrong for
    registered: ClassVar[bool] = True

    # the constructor's own arguments; at run time loc and attributes are Op's slots, result_types is not kept
    if TYPE_CHECKING:
        loc: Location = _constructor_only(default=UNKNOWN, kw_only=True)
        result_types: Sequence[Type] = _constructor_only(default=(), kw_only=True)
        attributes: DictAttr = _constructor_only(default=EMPTY_DICT, kw_only=True)

    def __init_subclass__(cls, *, name: str, traits: tuple[type[Trait], ...] = (), **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = name
        cls.traits = frozenset(traits).union(*(base.traits for base in cls.__bases__ if issubclass(base, Op)))
        fields: dict[str, Any] = {}
        for base in reversed(cls.__mro__):  # a declared op that derives another has its fields, in front
            fields |= {key: value for key, value in base.__dict__.items() if isinstance(value, _FIELDS)}
            fields |= {key: value for key, value in base.__dict__.items() if key in fields}
        cls.operand_fields = tuple(f for f in fields.values() if type(f) is OperandField)
        cls.result_fields = tuple(f for f in fields.values() if type(f) is ResultField)
        cls.attr_fields = tuple(f for f in fields.values() if type(f) is AttrField)
        cls.region_fields = tuple(f for f in fields.values() if type(f) is RegionField)
        for group in (cls.operand_fields, cls.result_fields):
            if sum(f.arity != "one" for f in group) > 1:
                raise TypeError(f"{name}: more than one optional or variadic field in a group")
            for position, field in enumerate(group):
                field.position = position
        cls.operand_names = frozenset(f.name for f in cls.operand_fields)
        cls.plain_operands = all(f.arity == "one" for f in cls.operand_fields)
        cls.operand_counts, cls.result_counts = _counts(cls.operand_fields), _counts(cls.result_fields)
        cls.property_names = frozenset(f.key for f in cls.attr_fields)
        for attr_field in cls.attr_fields:
            if attr_field.owner is cls:
                attr_field.bind(_annotation_text(cls.__annotations__.get(attr_field.name)), name)
        cls.doubtful_fields = tuple(
            f for f in cls.attr_fields if f.choices or f.least is not None or not f.codec.always
        )

    def __init__(
        self,
        *args: Any,
        loc: Location = UNKNOWN,
        result_types: Sequence[Type] = (),
        attributes: DictAttr = EMPTY_DICT,
        **given: Any,
    ) -> None:
        cls = type(self)
        positional = len(args) == len(cls.operand_fields) and cls.operand_names.isdisjoint(given)
        if positional and cls.plain_operands and None not in args:
            operands = args
        else:
            operands = self._taken_operands(args, given)
        properties: dict[str, Attribute] = {}
        for a in cls.attr_fields:
            value = given.pop(a.name, None)
            if value is None and a.default is not _MISSING:
                value = a.default
            if value is not None:
                properties[a.key] = a.codec.encode(value)
            elif not a.optional:
                raise TypeError(f"{cls.name}: property '{a.name}' is missing")
        regions = tuple([given.pop(r.name, None) or Region() for r in cls.region_fields])
        if given:
            raise TypeError(f"{cls.name} has no {', '.join(map(repr, given))}")
        self._operands = operands
        for value in operands:
            value.uses.append(self)
        self.properties = DictAttr.of(properties)
        self.attributes = attributes
        self.regions = regions
        for r in regions:
            r.op = self
        self.successors = ()
        self.loc = loc
        self.block = self._prev = self._next = None
        self.results = ()
        if not result_types and cls.result_fields:
            result_types = self._result_types()
        self.results = tuple([Value(t, self, i) for i, t in enumerate(result_types)])

    def _taken_operands(self, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Value, ...]:
        """The operands in order, by position and by name; those by name are taken out of `given`."""
        cls = type(self)
        if len(args) > len(cls.operand_fields):
            raise TypeError(
                f"{cls.name} takes {len(cls.operand_fields)} positional operands, {len(args)} given"
            )
        for f, value in zip(cls.operand_fields, args):
            if f.name in given:
                raise TypeError(f"{cls.name}: operand '{f.name}' is given twice, by position and by name")
            given[f.name] = value
        operands: list[Value] = []
        for f in cls.operand_fields:
            value = given.pop(f.name, () if f.arity == "variadic" else None)
            if f.arity == "variadic":
                operands.extend(value)
            elif value is not None:
                operands.append(value)
            elif f.arity == "one":
                raise TypeError(f"{cls.name}: operand '{f.name}' is missing")
        return tuple(operands)

    def _result_types(self) -> tuple[Type, ...]:
        """What `infer` gives for a new op; `TyirError` names the op and what is wrong with it."""
        try:
            problems = [p for f in type(self).doubtful_fields if (p := f.check(self))]
            if problems:
                raise TyirError([Diagnostic(problem) for problem in problems])
            inferred = self.infer()
        except TyirError as error:
            self.drop_references()
            named = [replace(d, message=f"'{self.name}' {d.message}") for d in error.diagnostics]
            raise TyirError(named) from None
        return (inferred,) if isinstance(inferred, Type) else tuple(inferred)

    def infer(self) -> Type | Sequence[Type]:
        """The result types; `TyirError`, worded like `verify`'s messages, when the operands allow none.

        An op whose types do not follow from its operands does not override this and takes `result_types`.
        """
        raise TypeError(f"{self.name}: result types do not follow from the operands; pass result_types")

    def evaluate(self, *operands: Any) -> Any:
        """The op's meaning on numpy arrays: the oracle of every test.

        Returns one array, or a tuple of them.
        """
        raise TypeError(f"{self.name} has no reference evaluation")

    def fold(self) -> Sequence[Value | Attribute] | None:
        """What the results always equal (an existing value, or a constant), or None.

        The canonicalizer asks; types must be the results' own.
        """
        return None

    def verify_symbols(self, tables: SymbolTables) -> Iterator[str]:
        """What is wrong with the symbols that an op with the trait `SymbolUser` refers to."""
        return iter(())

    @classmethod
    def materialize(cls, value: Attribute) -> DeclaredOp | None:
        """The op of this class whose result is `value`, a folder's; None when there is none."""
        return None

    def check_declaration(self) -> Iterator[Diagnostic | str]:
        """Counts and kinds against the declaration, inferred result types against the actual ones."""
        cls = type(self)
        for what, (least, most), values in (
            ("operand", cls.operand_counts, self._operands),
            ("result", cls.result_counts, self.results),
        ):
            if len(values) < least or (most is not None and len(values) > most):
                wanted = (
                    str(least) if most == least else f"{least} or {most}" if most else f"at least {least}"
                )
                yield f"expects {wanted} {what}{'' if wanted == '1' else 's'}, got {len(values)}"
                return
        problems = [p for f in cls.attr_fields if (p := f.check(self))]
        known = cls.property_names
        problems += [f"has no property '{k}'" for k in self.properties._map if k not in known]
        if len(self.regions) != len(cls.region_fields):
            problems.append(f"expects {len(cls.region_fields)} regions, got {len(self.regions)}")
        yield from problems
        if not problems and cls.result_fields and cls.infer is not DeclaredOp.infer:
            inferred = self.infer()
            wanted_types: Iterable[Type] = (inferred,) if isinstance(inferred, Type) else inferred
            for value, wanted_type in zip(self.results, wanted_types):
                if value.type is not wanted_type:
                    yield f"result type is {value.type} but the operands give {wanted_type}"
