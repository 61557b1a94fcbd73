"""Values from a file against the annotations of a dataclass.

A schema is a dataclass whose fields say type and range in their annotations
(https://docs.pydantic.dev/latest/concepts/dataclasses/, `annotated_types` for ranges, `Matches` for texts):

    max_kv: Annotated[int, Interval(ge=1, le=2**31 - 1)]
    kv_layout: Annotated[str, Matches("HND|NHD")]

pydantic does the checking.  It is imported when the first file is read and not before: it takes longer to
load than `tyir-opt --help` to run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Final, TypeVar, cast, get_args, get_type_hints

from tyir.diagnostics import Diagnostic, TyirError, did_you_mean

__all__ = [
    "MOST_SHOWN",
    "Matches",
    "canonical",
    "checked",
    "closed",
    "first_of",
    "sha256_of",
    "with_others",
]

MOST_SHOWN: Final = 12  # problems of one file that are listed

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Matches:
    """A text that a regular expression describes from beginning to end; `meaning` completes "it is not"."""

    pattern: str
    meaning: str = ""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        schema = core_schema.str_schema(pattern=f"^(?:{self.pattern})$")
        if not self.meaning:
            return schema
        return core_schema.custom_error_schema(
            schema, custom_error_type="meaning", custom_error_message=f"it is not {self.meaning}"
        )


def closed(record: type[T]) -> type[T]:
    """A dataclass or `TypedDict` whose keys are all there are."""
    record.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return record


def with_others(record: type[T]) -> type[T]:
    """A `TypedDict` beside whose keys others may stand, of any value."""
    record.__pydantic_config__ = {"extra": "allow"}  # type: ignore[attr-defined]
    return record


def canonical(value: Any) -> str:
    """The one text of a JSON value, whatever its layout in a file: sorted keys, no spaces.

    `ValueError` when a number in it is not finite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_of(value: Any) -> str:
    """SHA-256 of a JSON value in its canonical form."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------- the schema


def checked(schema: type[T], value: Any, where: str, help: str) -> T:
    """The dataclass that a JSON value describes.

    `TyirError` lists what is missing, unknown (with the nearest name that is known), of another type or out
    of range, each by its place: `options.max_kv`.
    """
    from pydantic import ValidationError

    try:
        made: T = _adapter(cast(Hashable, schema)).validate_json(canonical(value), strict=True)
    except ValidationError as error:
        problems = [_problem(schema, e["loc"], e["type"], e["msg"], e.get("input")) for e in error.errors()]
        raise TyirError(first_of(problems, where, help)) from None
    return made


@cache
def _adapter(schema: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def first_of(problems: Sequence[Diagnostic], where: str, help: str) -> list[Diagnostic]:
    """The first problems of a file, of the others the number; `help` for those that have no help of their
    own.
    """
    found = [Diagnostic(f"{where}: {p.message}", help=p.help or help) for p in problems[:MOST_SHOWN]]
    if len(problems) > MOST_SHOWN:
        found.append(Diagnostic(f"{where}: and {len(problems) - MOST_SHOWN} more like these", help=help))
    return found


_SAYS: Final = {
    "missing": "is missing",
    "unexpected_keyword_argument": "is an unknown key",
    "extra_forbidden": "is an unknown key",
}


def _problem(schema: Any, place: tuple[int | str, ...], kind: str, message: str, value: Any) -> Diagnostic:
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)[1:120]
    says = _SAYS.get(kind)
    if says is None:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:50]}..."
        says = f"is {shown}: {message[:1].lower()}{message[1:]}"
    near = did_you_mean(str(place[-1]), set(_keys(schema))) if says == "is an unknown key" and place else ""
    return Diagnostic(f"{name or 'the whole'} {says}", help=near)


def _keys(schema: Any) -> Iterator[str]:
    """The keys of a schema and of those inside it."""
    if is_dataclass(schema):
        yield from (f.name for f in fields(schema))
    elif hasattr(schema, "__total__"):
        yield from schema.__annotations__
    declared = isinstance(schema, type) and hasattr(schema, "__annotations__")
    for each in get_type_hints(schema).values() if declared else get_args(schema):
        yield from _keys(each)
