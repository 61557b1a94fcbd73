"""What stands before every request: its size, its key, and whether the server is still taking any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tyir.tools.serve.errors import RequestError, error_reply
from tyir.tools.serve.settings import Settings

__all__ = ["Guard"]

_OPEN: Final = frozenset({"/health", "/", "/page.js", "/page.css", "/page.svg"})  # without a key
_SMALL: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class Guard:
    """An ASGI middleware that answers for the application where it must not be asked.

    `refuses` says why no work is taken, None when it is.
    """

    def __init__(self, app: Any, settings: Settings, refuses: Callable[[], str | None]) -> None:
        self._app = app
        self._settings = settings
        self._refuses = refuses

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refused = self._refused(scope["method"], scope["path"], headers)
        if refused is not None:
            await error_reply(refused)(scope, receive, send)
            return
        try:
            body = await self._body(receive) if scope["method"] not in _SMALL else b""
        except RequestError as error:
            await error_reply(error)(scope, receive, send)
            return
        given = False

        async def replay() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    def _refused(self, method: str, path: str, headers: dict[bytes, bytes]) -> RequestError | None:
        if self._settings.keys and path not in _OPEN:
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not self._settings.opens(key.strip()):
                return RequestError(401, "the API key is missing or wrong", None, "invalid_api_key")
        if method not in _SMALL and (why := self._refuses()) is not None:
            return RequestError(503, why)
        return None

    async def _body(self, receive: Any) -> bytes:
        """All of it, before anything reads a part."""
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RequestError(400, "the connection was closed before the request was complete")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._settings.max_body:
                raise RequestError(400, f"a request may have {self._settings.max_body} bytes")
            if not message.get("more_body"):
                return b"".join(parts)
