"""vLLM serves artifacts through `examples/vllm-tyir`: the tokens and log-likelihoods are the same.

Needs the environment `vllm` (`environments.py`), and `lm-eval` for one of the tests.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from tests.clients.environments import python_of
from tests.clients.test_clients import SENTENCES, evaluated
from tests.e2e.conftest import MODEL
from tests.e2e.serving import Served, counts_of, serving
from tests.once import once
from tyir.frontends.huggingface import import_model
from tyir.manifest import BuildOptions
from tyir.printer import print_op
from tyir.runtime_sim.session.session import Session
from tyir.tools.api import compile_path

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
START = 900.0  # seconds that vLLM may take, on a machine with much else to do


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`compiled(output)`: artifacts on two dies, for four sequences of 512 tokens."""
    python_of("vllm")  # skipped before anything is compiled

    def made(output: str) -> Path:
        def make(folder: Path) -> None:
            ir = folder / "model.ir"
            ir.write_text(print_op(import_model(MODEL)))
            options = BuildOptions(
                dies=2, seqlens=(1, 8, 64), max_kv=512, weights="int4", batch=4, output=output
            )
            compile_path(ir, folder, options)

        return once(tmp_path_factory, f"vllm-{output}", make) / "2die"

    return made


@pytest.fixture(scope="module")
def two(compiled: Callable[[str], Path]) -> Path:
    """Artifacts that return logits."""
    return compiled("logits")


def environment(python: Path) -> dict[str, str]:
    """What vLLM's processes see: the plug-in is found by its entry point, as it would be by a user's."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "VLLM_PLUGINS")}
    kept |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    return {**kept, "PATH": f"{python.parent}:{kept['PATH']}"}


def run(*arguments: str) -> str:
    """What a program of the environment prints; it must end well."""
    python = python_of("vllm")
    done = subprocess.run(
        [str(python.parent / arguments[0]), *arguments[1:]],
        capture_output=True, text=True, env=environment(python), timeout=START,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-6000:])
    return done.stdout


def reported(script: str, *arguments: Path) -> Any:
    """The JSON that a script of this folder prints, among what vLLM's processes do."""
    lines = run("python", str(HERE / script), *map(str, arguments)).splitlines()
    return json.loads(next(line for line in reversed(lines) if line.startswith('{"')))


class Vllm:
    """A vLLM that answers at `port`."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        sent = None if body is None else json.dumps({"model": "tiny", **body})
        connection.request(method, path, sent, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        text = reply.read().decode()
        connection.close()
        return reply.status, text

    def post(self, **body: Any) -> Any:
        """The choice of a completion, which must be good."""
        status, text = self.ask("POST", "/v1/completions", body)
        assert status == 200, text
        return json.loads(text)["choices"][0]

    @property
    def healthy(self) -> bool:
        try:
            return self.ask("GET", "/health")[0] == 200
        except OSError:
            return False


@pytest.fixture(scope="module")
def vllm(two: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    """`vllm serve OUT/2die`."""
    python = python_of("vllm")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    line = [
        str(python.parent / "vllm"), "serve", str(two), "--served-model-name", "tiny", "--host", "127.0.0.1",
        "--port", str(port), "--additional-config", '{"engine": "host", "threads": 2}',
    ]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(
            line, env=environment(python), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    served = Vllm(port)
    try:
        until = time.monotonic() + START
        while not served.healthy:
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-8000:]
            time.sleep(2)
        yield served
        assert served.healthy, log.read_text()[-8000:]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def own(two: Path) -> Iterator[Served]:
    """`tyir-serve` of the same artifacts."""
    with serving(two) as made:
        yield made


def test_greedy_tokens_are_a_sessions(vllm: Vllm, two: Path) -> None:
    """Eight prompts at once on four slots, 32 tokens each, the longest prompt of 315."""
    rng = np.random.default_rng(0)
    prompts = [[int(t) for t in rng.integers(5, 4000, n)] for n in (1, 3, 8, 9, 40, 64, 130, 315)]
    asked = {"max_tokens": 32, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with ThreadPoolExecutor(len(prompts)) as together:
        found = list(together.map(lambda p: vllm.post(prompt=p, **asked)["token_ids"], prompts))
    assert sum(map(len, found)) == 256
    assert found == [list(Session(two).generate(p, 32)) for p in prompts]


def test_the_cache_can_be_filled(vllm: Vllm, two: Path) -> None:
    """To the last position, and what does not fit is refused before it is computed."""
    prompt = [int(t) for t in np.random.default_rng(1).integers(5, 4000, 500)]
    asked = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    reply = vllm.post(prompt=prompt, max_tokens=12, **asked)
    assert reply["token_ids"] == list(Session(two).generate(prompt, 12))
    assert vllm.ask("POST", "/v1/completions", {"prompt": prompt * 2, "max_tokens": 1})[0] == 400


def test_samples_are_the_servers(vllm: Vllm, own: Served) -> None:
    """Equal seeds give equal texts, whoever else is answered beside; penalties and biases too."""
    plain = {"prompt": "The old house", "max_tokens": 12, "temperature": 0.9}
    asked = [
        {**plain, "top_p": 0.9, "seed": 3},
        {**plain, "top_k": 8, "min_p": 0.05, "seed": 4},
        {**plain, "seed": 5, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {**plain, "seed": 6, "logit_bias": {"300": 5.0, "17": -100.0}},
        {**plain, "seed": 7, "allowed_token_ids": list(range(100, 400))},
        {**plain, "seed": 8, "min_tokens": 12},
    ]
    wanted = [own.post("/v1/completions", **one)["choices"][0]["text"] for one in asked]
    with ThreadPoolExecutor(len(asked)) as together:
        assert list(together.map(lambda one: vllm.post(**one)["text"], asked)) == wanted
    assert len(set(wanted)) == len(wanted)
    assert vllm.post(**asked[0])["text"] == wanted[0]


def test_schemas_are_kept_to(vllm: Vllm) -> None:
    for backend in ({"regex": "[a-c]{4}"}, {"choice": ["left", "right"]}):
        asked = {"prompt": "The old house", "max_tokens": 12, "temperature": 0.9, "seed": 3}
        text = vllm.post(**asked, structured_outputs=backend)["text"]
        assert re.fullmatch("[a-c]{4}|left|right", text)


def test_log_probabilities_are_the_servers(vllm: Vllm, own: Served) -> None:
    """Of prompts and answers, of every token and of the most likely ones: within 1e-6."""
    for prompt in (*SENTENCES, " ".join(SENTENCES * 6)):
        asked = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 3}
        wanted = own.post("/v1/completions", **asked)["choices"][0]["logprobs"]
        found = vllm.post(**asked)["logprobs"]
        assert found["tokens"] == wanted["tokens"]
        assert found["token_logprobs"][0] is None and wanted["token_logprobs"][0] is None
        assert found["token_logprobs"][1:] == pytest.approx(wanted["token_logprobs"][1:], abs=1e-6, rel=0)
        for theirs, ours in zip(found["top_logprobs"][1:], wanted["top_logprobs"][1:]):
            assert theirs == pytest.approx(ours, abs=1e-6, rel=0)


def test_lm_eval_reads_the_same(vllm: Vllm, own: Served, two: Path, tmp_path: Path) -> None:
    """Every log-likelihood within 1e-6 of `tyir-serve`'s."""
    wanted = evaluated(own.url, two, tmp_path / "own")
    found = evaluated(vllm.url, two, tmp_path / "vllm")
    assert len(wanted) == 9
    assert found == pytest.approx(wanted, abs=1e-6, rel=0)


def test_one_request_alone_cannot_end_it(vllm: Vllm) -> None:
    """Where nothing may follow, as where only an end may and none yet: it is answered all the same."""
    asked = {"prompt": "The old house", "max_tokens": 3, "temperature": 0, "min_tokens": 3}
    vllm.post(**asked, stop_token_ids=[300], allowed_token_ids=[300])
    status, text = vllm.ask("POST", "/v1/completions", {**asked, "logit_bias": {"99999999": 1.0}})
    assert status == 400 and "99999999" in text
    assert vllm.healthy


def test_a_client_that_goes_away_frees_its_slot(vllm: Vllm) -> None:
    sockets = []
    for _ in range(6):
        connection = http.client.HTTPConnection("127.0.0.1", vllm.port, timeout=60)
        body = {"model": "tiny", "prompt": [5, 17], "max_tokens": 500, "ignore_eos": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        sockets.append(connection)
    running = lambda: counts_of(vllm.ask("GET", "/metrics")[1])["vllm:num_requests_running"]  # noqa: E731
    until = time.monotonic() + 120
    while running() < 4:
        assert time.monotonic() < until
    for connection in sockets:
        connection.close()
    while running() > 0:
        assert time.monotonic() < until
        time.sleep(0.1)


def bench(url: str, two: Path, out: Path) -> dict[str, Any]:
    """The figures of `vllm bench serve --backend openai`: eight requests, four at once."""
    run(
        "vllm", "bench", "serve", "--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions",
        "--model", "tiny", "--tokenizer", str(two), "--dataset-name", "random", "--random-input-len", "32",
        "--random-output-len", "16", "--num-prompts", "8", "--max-concurrency", "4", "--ignore-eos",
        "--save-result", "--result-dir", str(out), "--result-filename", "found.json",
    )  # fmt: skip
    found: dict[str, Any] = json.loads((out / "found.json").read_text())
    return found


@pytest.mark.parametrize("server", ["vllm", "own"])
def test_vllm_bench_serve(server: str, two: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    found = bench(request.getfixturevalue(server).url, two, tmp_path)
    assert (found["completed"], found.get("failed", 0)) == (8, 0)
    assert found["total_output_tokens"] == 8 * 16
    print(json.dumps({k: v for k, v in found.items() if isinstance(v, float)}))


def test_what_artifacts_cannot_do_is_refused(two: Path, compiled: Callable[[str], Path]) -> None:
    """By name, with what to do, before anything is loaded; and requests that need logits of those without."""
    found = reported("vllm_refusals.py", two, compiled("topk=8"), MODEL)
    for option, words in (
        ("tensor_parallel_size", "--tensor-parallel-size 2: dies are not vLLM's ranks, the artifacts hold 2"),
        ("max_model_len", "compile with --max-kv 1024"),
        ("max_num_seqs", "compile with --batch 9"),
        ("quantization", "--quantization"),
        ("enable_lora", "--enable-lora"),
        ("speculative_config", "--speculative-config"),
        ("kv_cache_dtype", "--kv-cache-dtype fp8"),
        ("block_size", "--block-size 32"),
        ("logprobs_mode", "--logprobs-mode"),
        ("engine", "there is no engine 'hots'; did you mean"),
        ("threads", "threads 0 is out of range"),
        ("key", "--additional-config has no 'thread'"),
        ("checkpoint", "vllm-tyir serves artifacts of tyir-compile"),
    ):
        assert words in found["options"][option], (option, found["options"][option])
    assert found["settled"] == [512, 4, 256, 64, False, False, 512]
    for name in ("prompt_logprobs", "top_p", "structured_outputs", "bad_words", "logit_bias"):
        assert "compile with --output logits" in found["requests"][name], name
    assert "ask for 8 at most" in found["requests"]["many logprobs"]
    for name in ("logprobs", "top_k", "greedy"):
        assert found["requests"][name] == "", name


def test_best_tokens_from_python(compiled: Callable[[str], Path]) -> None:
    """vLLM's `LLM` on artifacts that return the eight best tokens: greedy and top-k sampling."""
    folder = compiled("topk=8")
    found = reported("vllm_offline.py", folder)
    prompts = [[5, 17, 300], [42], list(range(100, 180))]
    assert found["greedy"] == [list(Session(folder).generate(p, 8)) for p in prompts]
    assert found["sampled"] == found["again"] != found["greedy"]
