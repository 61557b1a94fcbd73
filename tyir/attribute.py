"""What types, attributes and locations have in common: they are immutable, and *uniqued*.

Two attributes that print alike are the same Python object, so equality is identity and hashing costs nothing.
That is what lets CSE key on tuples of attributes and lets thousands of ops share one property dictionary.  As
in an MLIR context, uniqued attributes live as long as the process.

The text form of each class is written in `tyir.text.attribute_printer` and read in
`tyir.text.attribute_parser`.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

__all__ = ["Attribute"]


class _Uniqued(type):
    """Metaclass that returns the existing instance for equal constructor arguments."""

    _by_args: dict[Any, Any]
    _by_key: dict[Any, Any]
    _slot_values: Any

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> None:
        super().__init__(name, bases, namespace)
        cls._by_args = {}
        cls._by_key = {}
        slots = [slot for slot in namespace.get("__slots__", ()) if slot != "__weakref__"]
        cls._slot_values = staticmethod(attrgetter(*slots)) if slots else None

    if not TYPE_CHECKING:  # a typed metaclass __call__ would hide the constructors from type checkers

        def __call__(cls, *args, **kwargs):
            if kwargs or not cls._args_are_key:
                new = super().__call__(*args, **kwargs)
                return cls._by_key.setdefault(new._key(), new)
            try:
                found = cls._by_args.get(args)
            except TypeError:  # a list among the arguments
                return cls._by_key.setdefault((new := super().__call__(*args))._key(), new)
            if found is None:
                new = super().__call__(*args)
                found = cls._by_args[args] = cls._by_key.setdefault(new._key(), new)
            return found


class Attribute(metaclass=_Uniqued):
    """Base of everything that can stand as the value of a property or attribute."""

    __slots__ = ("__weakref__",)
    # Constructor arguments may be used as a look-up key (False where 0.0 and -0.0, or 1 and True, must
    # differ).
    _args_are_key: ClassVar[bool] = True

    def _key(self) -> Any:
        values = type(self)._slot_values
        return None if values is None else values(self)

    def __str__(self) -> str:
        from tyir.text.attribute_printer import attribute_text

        return attribute_text(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"

    def __reduce__(self) -> Any:
        slots = [slot for slot in type(self).__slots__ if slot != "__weakref__"]
        return _unique, (type(self), {slot: getattr(self, slot) for slot in slots})

    def __copy__(self) -> Attribute:
        return self

    def __deepcopy__(self, memo: object) -> Attribute:
        return self


def _unique(cls: type[Attribute], values: dict[str, Any]) -> Attribute:
    """The attribute of these slots: the existing one, as when it is constructed."""
    new = object.__new__(cls)
    for slot, value in values.items():
        object.__setattr__(new, slot, value)
    found: Attribute = cls._by_key.setdefault(new._key(), new)
    return found
