"""A running `tyir-serve`, as a client sees it: tokens a second by how many ask at once, the times of tokens
beside those in /metrics, and how long a stream and /health wait while a long prompt arrives.

    python -m tyir.tools.bench.serving http://127.0.0.1:8000

Nothing else may ask the server meanwhile.  Wall time, which is what a client has; on a machine with nothing
else to do, the client's own share included.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from itertools import pairwise
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np

from tyir.diagnostics import TyirError
from tyir.tools.cli import ToolParser, run_tool

_HISTOGRAMS: Final = {
    "TTFT": "vllm:time_to_first_token_seconds",
    "TPOT": "vllm:request_time_per_output_token_seconds",
    "ITL": "vllm:inter_token_latency_seconds",
}


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = make_parser().parse_args(argv)
    place = urlsplit(args.url)
    try:
        card = _get(place.netloc, "/v1/models")["data"][0]
    except OSError as error:
        raise TyirError(
            f"no server answers at {args.url}: {error.strerror or error}", help="start tyir-serve first"
        ) from None
    slots, capacity = card["tyir"]["batch"], card["max_model_len"]
    rng = np.random.default_rng(0)
    print(
        f"{card['tyir']['dies']} dies, {slots} slots of {capacity} tokens; {args.rounds} rounds, in each of"
        f" them {args.requests} requests of {args.input} + {args.output} tokens by how many ask at once"
    )
    _rates(place.netloc, rng, args, sorted({1, 2, slots}))
    _agreement(place.netloc, rng, args, slots)
    _stall(place.netloc, rng, capacity)
    return 0


def _rates(netloc: str, rng: np.random.Generator, args: argparse.Namespace, counts: Sequence[int]) -> None:
    """Tokens a second by how many ask at once: in turn, so that what else the computer does meets them all,
    and beside each other within a round.
    """
    rates: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(args.rounds):
        for count in counts:
            seconds = _together(netloc, _prompts(rng, args), args.output, count)
            rates[count].append(args.requests * args.output / seconds)
    for count, found in rates.items():
        factors = [rate / one for rate, one in zip(found, rates[1])]
        print(
            f"{count} at once: {np.median(found):7.1f} tokens/s ({min(found):.1f} to {max(found):.1f}),"
            f" {np.median(factors):.2f} x one at a time ({min(factors):.2f} to {max(factors):.2f})"
        )


def _prompts(rng: np.random.Generator, args: argparse.Namespace) -> list[list[int]]:
    """Without a common begin, which would not be computed again."""
    return [[int(t) for t in rng.integers(5, 1000, args.input)] for _ in range(args.requests)]


def _agreement(netloc: str, rng: np.random.Generator, args: argparse.Namespace, count: int) -> None:
    """What clients of streams see beside what the server says of the same requests, in milliseconds."""
    before = _times(netloc)
    streams: list[tuple[float, list[float]]] = []
    left = [prompt for _ in range(args.rounds) for prompt in _prompts(rng, args)]

    def work() -> None:
        while left:
            times: list[float] = []
            begun = time.perf_counter()
            try:
                prompt = left.pop()
            except IndexError:
                return
            _stream(netloc, prompt, args.output, times)
            streams.append((begun, times))

    _all(work, count)
    seen = {
        "TTFT": [times[0] - begun for begun, times in streams],
        "TPOT": [(times[-1] - times[0]) / (len(times) - 1) for _, times in streams],
        "ITL": [later - earlier for _, times in streams for earlier, later in pairwise(times)],
    }
    for name, (number, seconds) in _times(netloc).items():
        number, seconds = number - before[name][0], seconds - before[name][1]
        if number != len(seen[name]):
            raise ValueError(f"{name}: the server counts {number:g} and the client {len(seen[name])}")
        client, server = float(np.mean(seen[name])) * 1000, seconds / number * 1000
        print(
            f"mean {name} of {len(streams)} streams, {count} at once: {client:.1f} ms, the server says"
            f" {server:.1f} ({(client / server - 1) * 100:+.1f} %)"
        )


def _stall(netloc: str, rng: np.random.Generator, capacity: int) -> None:
    """How long a stream and /health wait while a long prompt is computed."""
    long = capacity * 7 // 8
    times: list[float] = []
    healthy: list[float] = []
    over = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        stream = pool.submit(_stream, netloc, [5, 6, 7], capacity // 2, times)
        while len(times) < 10 and not stream.done():
            time.sleep(0.005)
        before = _steps(netloc)
        visitor = pool.submit(_visit, netloc, over, healthy)
        begun = time.perf_counter()
        try:
            _ask(netloc, [int(t) for t in rng.integers(5, 1000, long)], 1)
        finally:
            over.set()
        ended = time.perf_counter()
        visitor.result()
        stream.result()
    gaps = [b - a for a, b in pairwise(times) if begun <= b <= ended]
    after = _steps(netloc)
    mean = {}
    for seqlen, (count, seconds) in after.items():
        earlier = before.get(seqlen, (0.0, 0.0))
        if count > earlier[0]:
            mean[seqlen] = (seconds - earlier[1]) / (count - earlier[0])
    longest = mean[max(mean, key=int)]
    print(
        f"a prompt of {long} tokens took {ended - begun:.3f} s; {len(gaps)} tokens of a stream came, median"
        f" {np.median(gaps) * 1000:.1f} ms, p99 {np.percentile(gaps, 99) * 1000:.1f} ms; a longest step"
        f" {longest * 1000:.1f} ms on average; /health {len(healthy)} times, median"
        f" {np.median(healthy) * 1000:.1f} ms, at most {max(healthy) * 1000:.1f} ms"
    )


def _visit(netloc: str, over: threading.Event, healthy: list[float]) -> None:
    while not over.is_set():
        begun = time.perf_counter()
        connection = http.client.HTTPConnection(netloc, timeout=60)
        connection.request("GET", "/health")
        connection.getresponse().read()
        healthy.append(time.perf_counter() - begun)
        connection.close()
        over.wait(0.02)


def _together(netloc: str, prompts: Sequence[list[int]], output: int, count: int) -> float:
    """Seconds for all prompts, `count` at a time."""
    left = list(prompts)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if not left:
                    return
                prompt = left.pop()
            _ask(netloc, prompt, output)

    return _all(work, count)


def _all(work: Callable[[], None], count: int) -> float:
    """Seconds until `count` threads have done the work; what ends one of them ends the bench."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(work) for _ in range(count)]:
            future.result()
    return time.perf_counter() - begun


def _body(prompt: list[int], output: int, **more: Any) -> bytes:
    fields = {"prompt": prompt, "max_tokens": output, "ignore_eos": True, "temperature": 0, **more}
    return json.dumps(fields).encode()


def _answer(connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
    """The answer to a request, if it is one."""
    reply = connection.getresponse()
    if reply.status != HTTPStatus.OK:
        said = reply.read(1000).decode(errors="replace")
        raise TyirError(
            f"the server answered {reply.status}: {said}",
            help="wait until /health says 200, and look at what it prints",
        )
    return reply


def _ask(netloc: str, prompt: list[int], output: int) -> None:
    connection = http.client.HTTPConnection(netloc, timeout=600)
    connection.request("POST", "/v1/completions", _body(prompt, output), {"Content-Type": "application/json"})
    reply = json.loads(_answer(connection).read())
    if reply["usage"]["completion_tokens"] != output:
        raise ValueError(f"{reply['usage']} where {output} tokens were asked for")


def _stream(netloc: str, prompt: list[int], output: int, times: list[float]) -> None:
    connection = http.client.HTTPConnection(netloc, timeout=600)
    body = _body(prompt, output, stream=True)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    reply = _answer(connection)
    while line := reply.readline():
        if b'"text"' in line:
            times.append(time.perf_counter())


def _get(netloc: str, path: str) -> Any:
    connection = http.client.HTTPConnection(netloc, timeout=60)
    connection.request("GET", path)
    return json.loads(_answer(connection).read())


def _metrics(netloc: str) -> Iterator[Any]:
    """The samples of /metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    connection = http.client.HTTPConnection(netloc, timeout=60)
    connection.request("GET", "/metrics")
    for family in text_string_to_metric_families(connection.getresponse().read().decode()):
        yield from family.samples


def _steps(netloc: str) -> dict[str, tuple[float, float]]:
    """Steps and their seconds so far, by length."""
    found: dict[str, list[float]] = {}
    for sample in _metrics(netloc):
        if sample.name in ("tyir:steps_total", "tyir:step_seconds_total"):
            at = int(sample.name == "tyir:step_seconds_total")
            found.setdefault(sample.labels["seqlen"], [0.0, 0.0])[at] = sample.value
    return {seqlen: (values[0], values[1]) for seqlen, values in found.items()}


def _times(netloc: str) -> dict[str, tuple[float, float]]:
    """How often the server has measured each time so far, and the seconds of all of them."""
    values = {sample.name: sample.value for sample in _metrics(netloc)}
    return {name: (values[f"{h}_count"], values[f"{h}_sum"]) for name, h in _HISTOGRAMS.items()}


def make_parser() -> argparse.ArgumentParser:
    parser = ToolParser(prog="serving", description="Rates and waits of a running tyir-serve.")
    parser.add_argument("url", help="where it serves, for example http://127.0.0.1:8000")
    parser.add_argument("--rounds", type=int, default=5, help="medians of so many (default 5)")
    parser.add_argument("--requests", type=int, default=12, help="for each rate and round (default 12)")
    parser.add_argument("--input", type=int, default=16, help="tokens of a prompt (default 16)")
    parser.add_argument("--output", type=int, default=32, help="tokens of an answer (default 32)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
