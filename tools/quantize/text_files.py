"""Files of text: for calibration, and for measuring a perplexity.

| source | what is read |
| --- | --- |
| `*.jsonl` | one JSON object a line, its field `text` (or `content`), or a JSON string |
| `*.parquet` | the column `text` (or `content`); needs pyarrow |
| any other file | UTF-8 text, as a whole |
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from tyir.diagnostics import TyirError
from tyir.process.files import open_regular, stand_in

__all__ = ["check_text", "texts_of"]

_FIELDS: Final = ("text", "content")


def check_text(source: Path) -> None:
    """`TyirError` when a file cannot be opened: said before the model is loaded."""
    _opened(source).close()


def _opened(source: Path) -> IO[bytes]:
    try:
        return open_regular(source)
    except OSError as error:
        raise TyirError(f"cannot read {source}: {error.strerror}", help="give a text file") from None


def texts_of(source: Path) -> Iterator[str]:
    """The texts of a file; `TyirError` names it and what is wrong."""
    if source.suffix == ".parquet":
        yield from _parquet(source)
        return
    try:
        with _opened(source) as file:
            text = file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise TyirError(
            f"{source} is not UTF-8 text: byte {error.start}", help="give UTF-8 text, .jsonl or .parquet"
        ) from None
    if (instead := stand_in(text.encode()[:1024])) is not None:
        raise TyirError(f"{source} is {instead[0]}, not the file itself", help=instead[1])
    if source.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _of_line(line, f"{source}:{number}")


def _of_line(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise TyirError(f"{where} is not JSON: {error}", help="each line is one JSON object") from None
    if isinstance(value, dict):
        value = next((value[f] for f in _FIELDS if f in value), None)
    if not isinstance(value, str):
        raise TyirError(
            f"{where} has no text",
            help=f'write {{"text": "..."}}; fields that are read: {", ".join(_FIELDS)}',
        )
    return value


def _parquet(source: Path) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise TyirError(
            f"{source} needs pyarrow, which is not installed", help="pip install 'tyir[quantize]'"
        ) from None
    try:
        names = parquet.read_schema(source).names
        field = next((f for f in _FIELDS if f in names), None)
        if field is None:
            raise TyirError(
                f"{source} has no column of text (it has {', '.join(names)})",
                help=f"columns that are read: {', '.join(_FIELDS)}",
            )
        yield from (t for t in parquet.read_table(source, columns=[field])[field].to_pylist() if t)
    except (OSError, ValueError) as error:
        raise TyirError(f"cannot read {source}: {error}", help="give a Parquet file") from None
