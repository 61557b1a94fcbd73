"""The process that serves: a socket, uvicorn, and an end that lets answers be finished."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import uvicorn

from tyir.diagnostics import TyirError
from tyir.tools.serve.app import Gate, make_app
from tyir.tools.serve.async_engine import AsyncEngine
from tyir.tools.serve.metrics import Metrics
from tyir.tools.serve.settings import Settings

__all__ = ["Server", "listen", "serve"]

_LARGEST_HEADER: Final = 16 << 10


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.  `TyirError` when it cannot."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise TyirError(
            f"cannot listen on {host}:{port}: {reason}", help="give another --port or --host"
        ) from None


class Server(uvicorn.Server):
    """uvicorn, but the first signal lets what is being answered end: until then new work gets a 503.

    After `patience` seconds the rest is ended with an error; a second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, engine: AsyncEngine, gate: Gate, patience: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._gate = gate
        self._patience = patience
        self._until = float("inf")

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Called for SIGINT and SIGTERM."""
        if self._gate.draining:
            self._until = 0.0
        else:
            self._gate.draining = True
            self._until = time.monotonic() + self._patience

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to go on to uvicorn's own end."""
        if self._engine.engine.failed is not None:
            return True
        if self._gate.draining:
            if time.monotonic() >= self._until:
                self._engine.engine.cancel_all()
            if not any(self._engine.engine.counts):
                return True
        return await super().on_tick(counter)


def serve(
    engine: AsyncEngine,
    listening: socket.socket,
    settings: Settings,
    *,
    metrics: Metrics,
    patience: float = 30.0,
    log_level: str = "warning",
    started: Callable[[Server], None] = lambda server: None,
) -> None:
    """Answer until a signal ends it; `TyirError` when the engine fails.

    `started` is given the server before it runs: tests end it.
    """
    gate = Gate(engine)
    config = uvicorn.Config(
        make_app(engine, settings, metrics, gate),
        log_level=log_level,
        access_log=False,
        lifespan="off",
        h11_max_incomplete_event_size=_LARGEST_HEADER,
        timeout_graceful_shutdown=5,
        server_header=False,
    )
    server = Server(config, engine, gate, patience)
    loading = threading.Thread(target=_load, args=(engine,), name="tyir-load", daemon=True)
    loading.start()
    started(server)
    try:
        server.run(sockets=[listening])
    finally:
        loading.join()
        engine.stop()
        listening.close()
    if engine.engine.failed is not None:
        raise TyirError(f"the engine has failed: {engine.engine.failed}")


def _load(engine: AsyncEngine) -> None:
    try:
        engine.start()
    except Exception as error:  # said by `serve`, when uvicorn has ended
        engine.engine.failed = str(error)
