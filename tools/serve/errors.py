"""What a request is refused with, in OpenAI's shape: {"error": {message, type, param, code}}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from starlette.responses import Response

from tyir.diagnostics import TyirError
from tyir.runtime_sim.serving.scheduler import QueueFull
from tyir.tools.serve.json_reply import json_reply

__all__ = ["RequestError", "error_body", "error_reply", "json_text", "refusal"]

_TYPES: Final = {
    400: "BadRequestError",
    401: "invalid_request_error",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    429: "RateLimitError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}
_RETRY: Final = {429: "1", 503: "5"}  # seconds


class RequestError(Exception):
    """A request that is not answered: HTTP status, why, and which field is at fault."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code


def refusal(error: TyirError, param: str | None = None) -> RequestError:
    """What a `TyirError` is to a client: it is about their request; a full queue is nobody's fault."""
    text = ". ".join(d.message + (f" ({d.help})" if d.help else "") for d in error.diagnostics[:5])
    return RequestError(429 if isinstance(error, QueueFull) else 400, text, param)


def error_body(error: RequestError) -> Mapping[str, Any]:
    kind = _TYPES.get(error.status, "InternalServerError" if error.status >= 500 else "BadRequestError")
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": error.code or error.status,
        }
    }


def json_text(value: Any, param: str) -> str:
    """JSON of a part of a request; `RequestError` for what is nested deeper than can be written."""
    try:
        return json.dumps(value)
    except (RecursionError, ValueError):
        raise RequestError(400, f"{param} is nested too deeply", param) from None


def error_reply(error: RequestError) -> Response:
    headers = {"Retry-After": _RETRY[error.status]} if error.status in _RETRY else {}
    return json_reply(error_body(error), error.status, headers)
