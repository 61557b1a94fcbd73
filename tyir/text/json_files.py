"""JSON and text files that people write, edit and download: what is wrong with one, with its line and column
where there is one.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tyir.diagnostics import Diagnostic, TyirError
from tyir.process.files import MAX_JSON, json_kind, parse_json, read_regular, stand_in

__all__ = ["json_lines", "json_object", "read_json_object", "token_ids", "utf8_text"]

_BYTE_ORDER_MARKS: Final = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_json_object(path: Path, help: str) -> dict[str, Any]:
    """The JSON object in a file.

    `TyirError` with `help`, at line and column where there is one, for a file that cannot be read, is not
    UTF-8, not JSON or another value than an object.
    """
    try:
        data = read_regular(path, MAX_JSON)
    except OSError as error:
        raise TyirError(f"cannot read {path.name}: {error.strerror}", where=str(path), help=help) from None
    return json_object(data, path, help)


def json_object(data: bytes, path: Path, help: str) -> dict[str, Any]:
    """The same of the bytes of a file; `path` is for messages."""
    name = path.name
    utf8_text(data, path, help)
    try:
        content = parse_json(data)
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno}:{error.colno}"
        raise TyirError(
            Diagnostic(f"{name} is not valid JSON: {error.msg}", where=place, help=help)
        ) from None
    except ValueError as error:
        raise TyirError(f"{name} cannot be read as JSON: {error}", where=str(path), help=help) from None
    if not isinstance(content, dict):
        message = f"{name} holds a JSON {json_kind(content)}, an object is needed"
        raise TyirError(message, where=str(path), help=help)
    return content


def utf8_text(data: bytes, path: Path, help: str) -> str:
    """The text of the bytes of a file; `path` is for messages.

    `TyirError` for what a download left in its place, and for what editors make of a file: another encoding,
    or UTF-8 that begins with a mark of its byte order, which would be a character of the text.
    """
    name = path.name
    if (instead := stand_in(data)) is not None:
        raise TyirError(f"{name} is {instead[0]}, not the file itself", where=str(path), help=instead[1])
    if data.startswith(_BYTE_ORDER_MARKS):
        message = f"{name} begins with a byte order mark"
        raise TyirError(message, where=str(path), help=f"save it as UTF-8 without one, or {help}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise TyirError(f"{name} is not UTF-8 text", where=str(path), help=help) from None


def json_lines(path: Path, help: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file that has one on each line, with the place ("file:line") of each.

    `TyirError` with `help` for a file that cannot be read, and at the first line that is not such an object;
    numbers are finite.
    """
    try:
        lines = read_regular(path, MAX_JSON).splitlines()
    except OSError as error:
        raise TyirError(f"cannot read {path}: {error.strerror}", help=help) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = parse_json(line, finite=True)
        except UnicodeDecodeError:
            raise TyirError("the line is not UTF-8 text", where=where, help=help) from None
        except ValueError as error:
            raise TyirError(f"the line is not valid JSON: {error}", where=where, help=help) from None
        if not isinstance(row, dict):
            message = f"the line holds a JSON {json_kind(row)}, an object is needed"
            raise TyirError(message, where=where, help=help)
        yield where, row


def token_ids(content: Mapping[str, Any], key: str, path: Path, data: bytes) -> list[int]:
    """The token ids that a config of Hugging Face's has for `key`: none, one or a list.

    `TyirError` for another value, with the line of `data`, the file at `path`, that it stands in.
    """
    value = content.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        lines = data.decode("utf-8").splitlines()
        line = next((n for n, text in enumerate(lines, 1) if f'"{key}"' in text), 1)
        raise TyirError(
            f"'{key}' of {path.name} is {json.dumps(value)}: a token id, or a list of them, is needed",
            where=f"{path}:{line}",
            help="restore the file of the original model",
        )
    return ids
