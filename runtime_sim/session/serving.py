"""Serving requests: arrivals, a first-in-first-out server, and vLLM's metrics.

The server has a clock of its own.

Definitions as in vLLM's `benchmarks/serve.py` and `lib/endpoint_request_func.py`: TTFT is the first token
minus the sending, ITL the gaps between tokens of all requests together, TPOT (latency - TTFT) / (tokens - 1)
of each request with more than one, duration from the first sending to the last token. A request is sent when
it arrives, so waiting for the server is part of its TTFT; with a limit of requests under way it is sent when
the limit allows it.

Artifacts for a batch serve as many requests at once, scheduled between steps (Yu et al., "Orca", OSDI 2022):
prompts that wait for a free sequence run first and together, otherwise every running request gets its next
token.
"""

from __future__ import annotations

import heapq
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from tyir.diagnostics import Diagnostic, TyirError
from tyir.process.files import read_regular
from tyir.runtime_sim.timing.predictor import Predictor

if TYPE_CHECKING:
    from tyir.runtime_sim.session.batch_session import BatchSession

__all__ = [
    "MeasuredServer",
    "Request",
    "Result",
    "Server",
    "SimulatedServer",
    "goodput",
    "poisson",
    "read_trace",
    "serve",
    "summary",
    "text_block",
]

SLOS: Final = ("ttft", "tpot", "e2el")
_MAX_TRACE: Final = 256 << 20  # bytes of a file of requests, a few million of them


@dataclass(frozen=True)
class Request:
    """Arrival in seconds from the start, length of the prompt, tokens to generate (at least one)."""

    arrival: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Result:
    """When a request was sent and when each of its tokens came, in seconds from the start."""

    request: Request
    sent: float
    tokens: tuple[float, ...]

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.sent

    @property
    def latency(self) -> float:
        return self.tokens[-1] - self.sent

    @property
    def tpot(self) -> float | None:
        """None for a request of one token."""
        return (self.latency - self.ttft) / (len(self.tokens) - 1) if len(self.tokens) > 1 else None

    @property
    def itl(self) -> list[float]:
        return [b - a for a, b in pairwise(self.tokens)]


class Server(Protocol):
    """What takes time, in seconds: prompts up to their first tokens, and one more token each.

    Sequences are numbered from 0 to `slots` - 1.
    """

    @property
    def capacity(self) -> int: ...

    @property
    def slots(self) -> int: ...

    def prefill(self, prompts: Mapping[int, int]) -> float:
        """New requests, by sequence their number of prompt tokens."""
        ...

    def decode(self, positions: Mapping[int, int]) -> float:
        """Running requests, by sequence how many tokens are cached."""
        ...


@dataclass
class SimulatedServer:
    """The timing engine: device time and the machine's host constant.

    Decode steps are interpolated between a few simulated positions.

    Sequences of a batch run the same program: they are timed as if all stood where the longest stands.
    """

    predictor: Predictor
    slots: int = 1

    @property
    def capacity(self) -> int:
        return self.predictor.capacity

    def prefill(self, prompts: Mapping[int, int]) -> float:
        return self.predictor.ttft_ns(max(prompts.values())) * 1e-9

    def decode(self, positions: Mapping[int, int]) -> float:
        return self.predictor.tpot_ns(max(positions.values()), exact=False) * 1e-9


@dataclass
class MeasuredServer:
    """The runtime on this computer: each step is run and its time taken.

    Tokens are arbitrary; their number is what counts.
    """

    session: BatchSession

    @property
    def capacity(self) -> int:
        return self.session.manifest.options.max_kv

    @property
    def slots(self) -> int:
        return len(self.session.tokens)

    def prefill(self, prompts: Mapping[int, int]) -> float:
        for slot in prompts:
            self.session.tokens[slot] = []
        return self._timed({slot: [1 + i % 97 for i in range(count)] for slot, count in prompts.items()})

    def decode(self, positions: Mapping[int, int]) -> float:
        return self._timed({slot: [1 + position % 97] for slot, position in positions.items()})

    def _timed(self, tokens: Mapping[int, list[int]]) -> float:
        start = time.perf_counter()
        self.session.generate([tokens.get(slot, []) for slot in range(self.slots)], 1)
        return time.perf_counter() - start


def read_trace(path: Path) -> list[Request]:
    """JSON lines {"arrival": seconds, "prompt_tokens": n, "output_tokens": n} by time of arrival.

    `TyirError` names every bad line.
    """
    requests: list[Request] = []
    problems: list[Diagnostic] = []
    try:
        lines = read_regular(path, _MAX_TRACE).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TyirError(f"cannot read {path}: {error}", help="give a file of JSON lines") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            request = Request(float(row["arrival"]), int(row["prompt_tokens"]), int(row["output_tokens"]))
            if not 0 <= request.arrival < math.inf or request.prompt < 1 or request.output < 1:
                raise ValueError("times must not be negative and counts must be positive")
            requests.append(request)
        except (KeyError, TypeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            problems.append(
                Diagnostic(
                    what,
                    where=f"{path}:{number}",
                    help='write {"arrival": 0.5, "prompt_tokens": 128, "output_tokens": 64}',
                )
            )
    if problems or not requests:
        raise TyirError(problems or [Diagnostic(f"{path} holds no request")])
    return sorted(requests, key=lambda r: r.arrival)


def poisson(count: int, rate: float, prompt: int, output: int, seed: int = 0) -> list[Request]:
    """`count` equal requests with exponential gaps of mean 1 / rate seconds; rate infinity: all at once."""
    gaps = np.zeros(count) if math.isinf(rate) else np.random.default_rng(seed).exponential(1 / rate, count)
    return [Request(float(t), prompt, output) for t in np.cumsum(gaps) - gaps[0]]


@dataclass
class _Running:
    """A request in one of the server's sequences."""

    request: Request
    sent: float
    tokens: list[float] = field(default_factory=list)

    @property
    def cached(self) -> int:
        return self.request.prompt + len(self.tokens) - 1


def serve(requests: Iterable[Request], server: Server, *, max_concurrency: int | None = None) -> list[Result]:
    """Run the requests in the order of their arrival; at most `max_concurrency` are sent and not yet done.

    Results in the order of arrival.
    """
    if max_concurrency is not None and max_concurrency < 1:
        raise TyirError(f"max_concurrency must be at least 1, got {max_concurrency}")
    todo = sorted(requests, key=lambda r: r.arrival)
    long = [r for r in todo if r.prompt + r.output - 1 > server.capacity]
    if long:
        raise TyirError(
            f"{len(long)} requests do not fit the cache of {server.capacity} tokens, the first has"
            f" {long[0].prompt} + {long[0].output}",
            help="shorten them, or compile with a larger --max-kv",
        )
    permits = [0.0] * min(max_concurrency or len(todo), len(todo))  # when each may be taken
    order = {id(r): number for number, r in enumerate(todo)}
    running: dict[int, _Running] = {}
    results: list[Result] = []
    clock = 0.0
    while todo or running:
        if not running:
            clock = max(clock, todo[0].arrival, permits[0])
        free = [slot for slot in range(server.slots) if slot not in running]
        admitted: dict[int, _Running] = {}
        while todo and free and permits and max(todo[0].arrival, permits[0]) <= clock:
            request = todo.pop(0)
            admitted[free.pop(0)] = _Running(request, max(request.arrival, heapq.heappop(permits)))
        if admitted:
            clock += server.prefill({slot: r.request.prompt for slot, r in admitted.items()})
        else:
            clock += server.decode({slot: r.cached for slot, r in running.items()})
        running.update(admitted)
        for slot in admitted or list(running):
            one = running[slot]
            one.tokens.append(clock)
            if len(one.tokens) == one.request.output:
                results.append(Result(one.request, one.sent, tuple(one.tokens)))
                heapq.heappush(permits, clock)
                del running[slot]
    return sorted(results, key=lambda r: order[id(r.request)])


def goodput(results: Sequence[Result], slos: Mapping[str, float], duration: float) -> float:
    """Requests a second that meet every given bound (`ttft`, `tpot`, `e2el`, in ms).

    A request of one token has TPOT 0.
    """

    def meets(result: Result) -> bool:
        values = {"ttft": result.ttft, "tpot": result.tpot or 0.0, "e2el": result.latency}
        return all(values[name] * 1000 <= bound for name, bound in slos.items())

    return sum(map(meets, results)) / duration


def summary(results: Sequence[Result], slos: Mapping[str, float] | None = None) -> dict[str, Any]:
    """All figures by vLLM's JSON names.

    Times in ms, rates per second, standard deviations of the population, percentiles linear.
    """
    start, end = min(r.sent for r in results), max(r.tokens[-1] for r in results)
    duration = end - start
    inputs, outputs = sum(r.request.prompt for r in results), sum(len(r.tokens) for r in results)
    seconds = [int(t - start) for r in results for t in r.tokens]
    events = sorted([(r.sent, 1) for r in results] + [(r.tokens[-1], -1) for r in results])
    found: dict[str, Any] = {
        "completed": len(results),
        "duration": duration,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(results) / duration,
        "request_goodput": goodput(results, slos, duration) if slos else None,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
        "max_output_tokens_per_s": float(max(np.bincount(seconds))),
        "max_concurrent_requests": int(max(np.cumsum([e for _, e in events]))),
    }
    samples = {
        "ttft": [r.ttft for r in results],
        "tpot": [t for r in results if (t := r.tpot) is not None],
        "itl": [g for r in results for g in r.itl],
        "e2el": [r.latency for r in results],
    }
    for name, seconds_of in samples.items():
        ms = np.array(seconds_of or [0.0]) * 1000
        figures = {
            "mean": np.mean(ms),
            "median": np.median(ms),
            "std": np.std(ms),
            "p99": np.percentile(ms, 99),
        }
        found.update({f"{figure}_{name}_ms": float(value) for figure, value in figures.items()})
    found["requests"] = [
        {**asdict(r.request), "sent": r.sent, "ttft": r.ttft, "tpot": r.tpot, "e2el": r.latency, "itl": r.itl}
        for r in results
    ]
    return found


def text_block(figures: Mapping[str, Any]) -> str:
    """vLLM's block, with its words and columns."""
    lines = [f"{' Serving Benchmark Result ':=^50}"]
    for label, key, form in (
        ("Successful requests:", "completed", "d"), ("Benchmark duration (s):", "duration", ".2f"), ("Total input tokens:", "total_input_tokens", "d"),  # noqa: E501
        ("Total generated tokens:", "total_output_tokens", "d"), ("Request throughput (req/s):", "request_throughput", ".2f"),  # noqa: E501
        ("Request goodput (req/s):", "request_goodput", ".2f"), ("Output token throughput (tok/s):", "output_throughput", ".2f"),  # noqa: E501
        ("Peak output token throughput (tok/s):", "max_output_tokens_per_s", ".2f"), ("Peak concurrent requests:", "max_concurrent_requests", ".2f"),  # noqa: E501
        ("Total Token throughput (tok/s):", "total_token_throughput", ".2f"),
    ):  # fmt: skip
        if figures[key] is not None:
            lines.append(f"{label:<40} {figures[key]:<10{form}}".rstrip())
    for title, name, short in (
        ("Time to First Token", "ttft", "TTFT"), ("Time per Output Token (excl. 1st token)", "tpot", "TPOT"), ("Inter-token Latency", "itl", "ITL"),  # noqa: E501
        ("End-to-end Latency", "e2el", "E2EL"),
    ):  # fmt: skip
        lines.append(f"{title:-^50}")
        lines += [
            f"{f'{figure.capitalize()} {short} (ms):':<40} {figures[f'{figure}_{name}_ms']:<10.2f}".rstrip()
            for figure in ("mean", "median", "p99")
        ]
    return "\n".join([*lines, "=" * 50])
