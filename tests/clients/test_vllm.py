"""vLLM serves artifacts through `examples/vllm-tyir`: the same tokens, the same log-likelihoods.

Needs the environment `vllm` (`environments.py`), and `lm-eval` for the second test.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from tests.clients.environments import python_of
from tests.clients.test_clients import evaluated
from tests.e2e.serving import serving
from tyir.runtime_sim.session.session import Session

pytestmark = pytest.mark.slow

START = 900.0  # seconds that vLLM may take, on a machine with much else to do


def command(python: Path, folder: Path, *options: str) -> tuple[list[str], dict[str, str]]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"VLLM_PLUGINS": "tyir", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    environment |= {"HF_HUB_OFFLINE": "1", "PATH": f"{python.parent}:{environment['PATH']}"}
    vllm = python.parent / "vllm"
    return [str(vllm), "serve", str(folder), "--served-model-name", "tiny", *options], environment


@pytest.fixture(scope="module")
def vllm(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a vLLM that serves the artifacts."""
    python = python_of("vllm")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line, environment = command(python, folder, "--host", "127.0.0.1", "--port", str(port))
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            line, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            until = time.monotonic() + START
            while not healthy(port):
                assert process.poll() is None, log.read_text()[-6000:]
                assert time.monotonic() < until, log.read_text()[-6000:]
                time.sleep(2)
            yield port
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def healthy(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


def post(port: int, body: dict[str, Any]) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request(
        "POST", "/v1/completions", json.dumps({"model": "tiny", **body}), {"Content-Type": "application/json"}
    )
    reply = connection.getresponse()
    content = json.loads(reply.read())
    connection.close()
    assert reply.status == 200, content
    return content


def test_greedy_tokens_are_a_sessions(vllm: int, folder: Path) -> None:
    """Eight prompts at once on four slots, 32 tokens each, the longest prompt of 315."""
    rng = np.random.default_rng(0)
    prompts = [[int(t) for t in rng.integers(5, 4000, n)] for n in (1, 3, 8, 9, 40, 64, 130, 315)]
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        body = {"prompt": prompts[number], "max_tokens": 32, "temperature": 0, "ignore_eos": True}
        reply = post(vllm, {**body, "return_token_ids": True})
        found[number] = reply["choices"][0]["token_ids"]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = {n: list(Session(folder).generate(p, 32)) for n, p in enumerate(prompts)}
    assert found == wanted


def test_samples_and_schemas(vllm: int, folder: Path) -> None:
    """Equal seeds give what `tyir-serve` gives; a regular expression is kept to."""
    asked = {"prompt": "The old house", "max_tokens": 12, "temperature": 0.9, "top_p": 0.9, "seed": 3}
    with serving(folder) as made:
        own = made.post("/v1/completions", **asked)["choices"][0]["text"]
    assert post(vllm, asked)["choices"][0]["text"] == own
    held = post(vllm, {**asked, "structured_outputs": {"regex": "[a-c]{4}"}})["choices"][0]["text"]
    assert re.fullmatch("[a-c]{4}", held)


def test_lm_eval_reads_the_same(vllm: int, folder: Path, tmp_path: Path) -> None:
    """Every log-likelihood within 1e-6 of `tyir-serve`'s."""
    with serving(folder) as made:
        own = evaluated(made.url, folder, tmp_path / "own")
    theirs = evaluated(f"http://127.0.0.1:{vllm}", folder, tmp_path / "vllm")
    assert own.keys() == theirs.keys() and len(own) == 9
    for key, value in own.items():
        assert theirs[key] == pytest.approx(value, rel=1e-6), key


def test_what_artifacts_cannot_do_is_refused(folder: Path) -> None:
    line, environment = command(python_of("vllm"), folder, "--tensor-parallel-size", "2")
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=START)
    assert done.returncode != 0 and "compile with --dies" in done.stdout + done.stderr
