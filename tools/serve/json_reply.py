"""JSON that any text fits in: lone surrogates go out as escapes, never as a failure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

__all__ = ["event", "json_reply", "line"]


def _dumps(content: Any) -> str:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(content, separators=(",", ":"))
    return text


def json_reply(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(_dumps(content), status, headers, media_type="application/json")


def event(content: Any) -> str:
    """An event of a stream; its lines end in LF: some clients read nothing else."""
    return f"data: {_dumps(content)}\n\n"


def line(content: Any) -> str:
    """A line of a stream of JSON lines."""
    return _dumps(content) + "\n"
