"""`/health` says whether work is taken: not while loading, also while a long step runs, not after a failure.

What a signal does is in test_serve_http.py, a process that is lost in test_processes_failing.py.
"""

from __future__ import annotations

import http.client
import json
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from tests.e2e.serving import Held, Served, counts_of, serving
from tyir.tools.serve import async_engine

REQUEST = {"prompt": "The old house", "max_tokens": 4, "temperature": 0}


def test_while_it_loads(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """503 for work, to be sent again; what needs no engine is answered."""
    held = Held(async_engine.step_costs)
    monkeypatch.setattr(async_engine, "step_costs", held)
    with serving(four, loaded=False) as served:
        try:
            assert held.called.wait(120)
            assert served.raw("GET", "/health")[0] == 503
            status, content, headers = served.raw("POST", "/v1/completions", REQUEST)
            assert status == 503 and headers["retry-after"]
            assert json.loads(content)["error"]["message"] == "the server is loading"
            assert served.ask("GET", "/v1/models")[0] == 200
        finally:
            held.released.set()
        while served.raw("GET", "/health")[0] != 200:
            pass  # ./tools/test ends what never holds
        assert served.post("/v1/completions", **REQUEST)["usage"]["completion_tokens"] == 4


def test_while_a_step_runs(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that needs no step waits for one, however long it takes."""
    with serving(four) as served:
        held = Held(served.engine.session.step)
        monkeypatch.setattr(served.engine.session, "step", held)
        found: list[Any] = []
        asking = threading.Thread(target=lambda: found.append(served.ask("POST", "/v1/completions", REQUEST)))
        asking.start()
        try:
            assert held.called.wait(120)
            for path in ("/health", "/v1/models", "/metrics", "/load", "/api/tags"):
                assert served.raw("GET", path)[0] == 200
            assert served.post("/tokenize", prompt="The old house")["count"] > 0
            assert not found and served.counts()["vllm:num_requests_running"] == 1
        finally:
            held.released.set()
        asking.join()
        assert found[0][0] == 200 and found[0][1]["usage"]["completion_tokens"] == 4


def test_an_engine_that_dies(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits is told, streamed or not; then the server ends, with what went wrong."""
    said = "the engine has failed: MemoryError: no more"
    with serving(four, fails=said) as served:
        held = Held(_dying)
        monkeypatch.setattr(served.engine.session, "step", held)
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=120)
        fields = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps({**REQUEST, "stream": True}), fields)
        assert held.called.wait(120)
        found: list[Any] = []
        asking = threading.Thread(target=lambda: found.append(served.ask("POST", "/v1/completions", REQUEST)))
        asking.start()
        _until_taken(served, 2)
        held.released.set()
        events = connection.getresponse().read().decode().strip().split("\n\n")
        connection.close()
        asking.join()
        assert events[-1] == "data: [DONE]"
        assert any("MemoryError: no more" in event for event in events[:-1])
        status, content = found[0]
        assert status == 503 and "MemoryError: no more" in content["error"]["message"]
        counts = counts_of(served.metrics.text().decode())
        assert counts["vllm:request_success_total error"] == 2


def _dying(*unused: Any, **named: Any) -> None:
    raise MemoryError("no more")


def _until_taken(served: Served, requests: int) -> None:
    while sum(served.engine.engine.counts) < requests:
        pass
