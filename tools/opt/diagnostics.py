"""`tyir-opt --verify-diagnostics`: the errors, warnings and remarks that a file should give stand in it as
comments.

In MLIR's notation.

    // expected-error @below {{redefines symbol}}        also @above, @+2, @-1, @unknown; without @: the comment's own line
    // expected-note-re {{while running pass '{{.*}}'}}   regular expressions stand in inner braces

Every annotation must be met by a diagnostic of its severity on its line whose message holds the text, and
every error, warning and remark by an annotation (not so with `only-expected`); notes need none.
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tyir.diagnostics import Diagnostic

__all__ = ["check_expected"]

_ANNOTATION = re.compile(
    r"//.*?\bexpected-(error|warning|note|remark)(?P<re>-re)?\s*(?:@\s*([+-]\d+|above|below|unknown))?\s*\{\{(?(re)(.*)|(.*?))\}\}"
)
_LINE = re.compile(r":(\d+):\d+(?:\)|$|,)")


@dataclass
class _Expected:
    severity: str
    pattern: re.Pattern[str]
    shown: str
    line: int | None
    at: int
    met: bool = False


def _annotations(text: str) -> Iterator[_Expected]:
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        for match in _ANNOTATION.finditer(line):
            severity, is_pattern, offset, with_patterns, message = match.groups()
            message = with_patterns or message or ""
            pattern = re.compile(_with_patterns(message) if is_pattern else re.escape(message))
            yield _Expected(severity, pattern, message, _target(lines, number, offset), number)


def _with_patterns(message: str) -> str:
    """`text {{pattern}} text` as one regular expression."""
    parts = re.split(r"\{\{(.*?)\}\}", message)
    return "".join(part if index % 2 else re.escape(part) for index, part in enumerate(parts))


def _target(lines: list[str], number: int, offset: str | None) -> int | None:
    if offset in (None, "unknown"):
        return number if offset is None else None
    if offset == "above":
        return _next_code(lines, number, -1)
    if offset == "below":
        return _next_code(lines, number, 1)
    assert offset is not None
    return number + int(offset)


def _next_code(lines: list[str], number: int, step: int) -> int:
    """The nearest line that is not only an annotation: annotations for one line may be stacked."""
    number += step
    while 1 <= number <= len(lines) and re.match(r"\s*//.*expected-", lines[number - 1]):
        number += step
    return number


def _line_of(diagnostic: Diagnostic) -> int | None:
    if diagnostic.label is not None:
        return diagnostic.label.source.line_col(diagnostic.label.start)[0]
    match = _LINE.search(diagnostic.where)
    return int(match[1]) if match else None


def check_expected(
    text: str, diagnostics: Iterable[Diagnostic], name: str, only_expected: bool = False
) -> list[str]:
    """What does not agree between annotations and diagnostics; empty when all is as expected.

    `only_expected` ignores diagnostics without annotation.
    """
    expected = list(_annotations(text))
    problems: list[str] = []
    for diagnostic in _flattened(diagnostics):
        line = _line_of(diagnostic)
        fitting = [
            e
            for e in expected
            if e.severity == diagnostic.severity and e.line == line and e.pattern.search(diagnostic.message)
        ]
        unmet = next((e for e in fitting if not e.met), None)
        if unmet is not None:
            unmet.met = True
        elif not fitting and not only_expected and diagnostic.severity != "note":
            problems.append(
                f"{name}:{line or '?'}: error: unexpected {diagnostic.severity}: {diagnostic.message}"
            )
    for e in expected:
        if not e.met:
            place = f"on line {e.line}" if e.line is not None else "without a line"
            problems.append(
                f'{name}:{e.at}: error: expected {e.severity} "{e.shown}" {place} was not produced'
            )
    return problems


def _flattened(diagnostics: Iterable[Diagnostic]) -> Iterator[Diagnostic]:
    for diagnostic in diagnostics:
        yield diagnostic
        yield from _flattened(diagnostic.notes)
