"""What tests of serving share: a real server in a thread of this process, and requests by hand."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


@dataclass
class Served:
    """A server that answers at `port`."""

    port: int
    engine: Any
    metrics: Any
    server: Any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON (or text) of a reply; a body that is no `bytes` goes out as JSON."""
        status, text, _ = self.raw(method, path, body, **headers)
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def raw(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=900)
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        fields = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        connection.request(method, path, sent, fields)
        reply = connection.getresponse()
        text = reply.read().decode("utf-8", "replace")
        connection.close()
        return reply.status, text, reply.headers

    def post(self, path: str, **body: Any) -> Any:
        """The JSON of a reply that must be good."""
        status, content = self.ask("POST", path, body)
        assert status == 200, content
        return content

    def events(self, path: str, **body: Any) -> list[Any]:
        """The JSON of a stream's events; lines end in LF, and the last is [DONE]."""
        status, text, headers = self.raw("POST", path, {**body, "stream": True})
        assert status == 200, text
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        *parts, end = text.split("\n\n")
        assert end == "" and parts[-1] == "data: [DONE]" and "\r" not in text
        return [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]

    def counts(self) -> dict[str, float]:
        """What /metrics says, as `counts_of`."""
        return counts_of(self.raw("GET", "/metrics")[1])


class Held:
    """Calls of a function wait until they are released; `calls` is how many there were."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self.called = threading.Event()
        self.released = threading.Event()
        self.calls = 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        self.called.set()
        assert self.released.wait(120)
        return self._function(*arguments, **named)


def counts_of(text: str) -> dict[str, float]:
    """Prometheus' text, by names and what is not always the same of their labels."""
    from prometheus_client.parser import text_string_to_metric_families

    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = [v for k, v in sample.labels.items() if k not in ("model_name", "engine")]
            found[" ".join([sample.name, *labels])] = sample.value
    return found


@contextmanager
def serving(
    folder: Path,
    *,
    patience: float = 10.0,
    settings: Any = None,
    loaded: bool = True,
    fails: str | None = None,
    **options: Any,
) -> Iterator[Served]:
    """A server for the block, ended as a signal would; `loaded`: only begin the block when it takes work.

    `fails`: the error that it must have ended with by then, None for none.
    """
    from tyir.diagnostics import TyirError
    from tyir.tools.serve.async_engine import AsyncEngine
    from tyir.tools.serve.metrics import Metrics
    from tyir.tools.serve.running import Server, listen, serve
    from tyir.tools.serve.settings import Settings

    metrics = Metrics("tiny")
    options = {"template": TEMPLATE, "observer": metrics, **options}
    engine = AsyncEngine(folder, **options)
    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    servers: list[Server] = []
    begun = threading.Event()
    errors: list[str] = []

    def started(server: Server) -> None:
        servers.append(server)
        begun.set()

    def run() -> None:
        made = settings or Settings(names=("tiny", "other"))
        try:
            serve(engine, listening, made, metrics=metrics, patience=patience, started=started)
        except TyirError as error:
            errors.append(error.diagnostics[0].message)

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait(60)
    served = Served(port, engine, metrics, servers[0])
    try:
        if loaded:
            _wait(served)
        yield served
    finally:
        servers[0].handle_exit(15, None)
        thread.join(60)
        assert not thread.is_alive()
        assert errors == ([] if fails is None else [fails])


def _wait(served: Served) -> None:
    import time

    for _ in range(600):
        try:
            if served.raw("GET", "/health")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError("the server did not become ready")
