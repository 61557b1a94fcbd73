"""A running `tyir-serve`, as a client sees it: tokens a second by how many ask at once, and how long a stream
waits for its next token while a long prompt arrives.

    python -m tyir.tools.bench.serving http://127.0.0.1:8000

Wall time, which is what a client has; on a machine with nothing else to do, the client's own share included.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from tyir.tools.cli import ToolParser, run_tool


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = make_parser().parse_args(argv)
    place = urlsplit(args.url)
    card = _get(place.netloc, "/v1/models")["data"][0]
    slots, capacity = card["tyir"]["batch"], card["max_model_len"]
    rng = np.random.default_rng(0)
    print(
        f"{slots} slots of {capacity} tokens; {args.requests} requests of {args.input} + {args.output} tokens"
    )
    rates = {}
    for count in sorted({1, 2, slots}):
        prompts = [[int(t) for t in rng.integers(5, 1000, args.input)] for _ in range(args.requests)]
        seconds = _together(place.netloc, prompts, args.output, count)
        rates[count] = args.requests * args.output / seconds
        print(f"{count} at once: {rates[count]:7.1f} tokens/s, {rates[count] / rates[1]:.2f} x")
    long = capacity * 7 // 8
    times: list[float] = []
    stream = threading.Thread(target=_stream, args=(place.netloc, [5, 6, 7], capacity // 2, times))
    stream.start()
    while len(times) < 10:
        time.sleep(0.005)
    before = _steps(place.netloc)
    begun = time.perf_counter()
    _ask(place.netloc, [int(t) for t in rng.integers(5, 1000, long)], 1)
    ended = time.perf_counter()
    stream.join()
    gaps = [b - a for a, b in pairwise(times) if begun <= b <= ended]
    after = _steps(place.netloc)
    mean = {}
    for seqlen, (count, seconds) in after.items():
        earlier = before.get(seqlen, (0.0, 0.0))
        if count > earlier[0]:
            mean[seqlen] = (seconds - earlier[1]) / (count - earlier[0])
    longest = mean[max(mean, key=int)]
    print(
        f"a prompt of {long} tokens took {ended - begun:.3f} s; {len(gaps)} tokens of a stream came, median"
        f" {np.median(gaps) * 1000:.1f} ms, p99 {np.percentile(gaps, 99) * 1000:.1f} ms; a longest step"
        f" {longest * 1000:.1f} ms on average"
    )
    return 0


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

    threads = [threading.Thread(target=work) for _ in range(count)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begun


def _body(prompt: list[int], output: int, **more: Any) -> bytes:
    fields = {"prompt": prompt, "max_tokens": output, "ignore_eos": True, "temperature": 0, **more}
    return json.dumps(fields).encode()


def _ask(netloc: str, prompt: list[int], output: int) -> None:
    connection = http.client.HTTPConnection(netloc, timeout=600)
    connection.request("POST", "/v1/completions", _body(prompt, output), {"Content-Type": "application/json"})
    reply = json.loads(connection.getresponse().read())
    if reply["usage"]["completion_tokens"] != output:
        raise ValueError(f"{reply['usage']} where {output} tokens were asked for")


def _stream(netloc: str, prompt: list[int], output: int, times: list[float]) -> None:
    connection = http.client.HTTPConnection(netloc, timeout=600)
    body = _body(prompt, output, stream=True)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    while line := reply.readline():
        if b'"text"' in line:
            times.append(time.perf_counter())


def _get(netloc: str, path: str) -> Any:
    connection = http.client.HTTPConnection(netloc, timeout=60)
    connection.request("GET", path)
    return json.loads(connection.getresponse().read())


def _steps(netloc: str) -> dict[str, tuple[float, float]]:
    """Steps and their seconds so far, by length."""
    from prometheus_client.parser import text_string_to_metric_families

    connection = http.client.HTTPConnection(netloc, timeout=60)
    connection.request("GET", "/metrics")
    found: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(connection.getresponse().read().decode()):
        for sample in family.samples:
            if sample.name in ("tyir:steps_total", "tyir:step_seconds_total"):
                at = int(sample.name == "tyir:step_seconds_total")
                found.setdefault(sample.labels["seqlen"], [0.0, 0.0])[at] = sample.value
    return {seqlen: (values[0], values[1]) for seqlen, values in found.items()}


def make_parser() -> argparse.ArgumentParser:
    parser = ToolParser(prog="serving", description="Rates and waits of a running tyir-serve.")
    parser.add_argument("url", help="where it serves, for example http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=12, help="for each rate (default 12)")
    parser.add_argument("--input", type=int, default=16, help="tokens of a prompt (default 16)")
    parser.add_argument("--output", type=int, default=32, help="tokens of an answer (default 32)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
