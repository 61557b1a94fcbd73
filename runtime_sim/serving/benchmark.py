"""Serving requests: arrivals, a first-in-first-out server, and vLLM's metrics.

The server has a clock of its own.

Definitions as in vLLM's `benchmarks/serve.py` and `lib/endpoint_request_func.py`: TTFT is the first token
minus the sending, ITL the gaps between tokens of all requests together, TPOT (latency - TTFT) / (tokens - 1)
of each request with more than one, duration from the first sending to the last token. A request is sent when
it arrives, so waiting for the server is part of its TTFT; with a limit of requests under way it is sent when
the limit allows it.

Artifacts for a batch serve as many requests at once.  What runs when is decided by `Scheduler`, the one that
`tyir-serve` has: what is measured here of the simulated device is what that server would do with it.
"""

from __future__ import annotations

import heapq
import json
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from tyir.artifacts.dual_chunk import DualChunk
from tyir.diagnostics import Diagnostic, TyirError
from tyir.process.files import read_regular
from tyir.runtime_sim.serving.costs import step_costs
from tyir.runtime_sim.serving.scheduler import Scheduler, Step, Task
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
    "sweep_block",
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
    """What takes time: a step of `seqlen` rows for each of `slots` sequences."""

    @property
    def capacity(self) -> int: ...

    @property
    def slots(self) -> int: ...

    @property
    def seqlens(self) -> Sequence[int]: ...

    @property
    def chunks(self) -> DualChunk | None:
        """Borders that no sequence's part of a step crosses."""
        ...

    def run(self, step: Step) -> float:
        """Run it; seconds."""
        ...

    def costs(self) -> Mapping[int, float]:
        """Seconds of a step by its length, which the scheduler chooses lengths by."""
        ...


@dataclass
class SimulatedServer:
    """The timing engine: device time and the machine's host constant.

    Steps are interpolated between a few simulated positions.  Sequences of a batch run the same program: they
    are timed as if all stood where the longest of those that run stands.
    """

    predictor: Predictor
    slots: int = 1
    chunks: DualChunk | None = None

    @property
    def capacity(self) -> int:
        return self.predictor.capacity

    @property
    def seqlens(self) -> Sequence[int]:
        return self.predictor.seqlens

    def run(self, step: Step) -> float:
        position = max(start for start, feed in zip(step.starts, step.feeds) if feed)
        device = self.predictor.between(step.seqlen, position, step.wanted)
        return (device + self.predictor.host_ns) * 1e-9

    def costs(self) -> Mapping[int, float]:
        """Half way through the cache, as far as a step of a length fits there."""
        middle = self.capacity // 2
        ns = {s: self.predictor.between(s, min(middle, self.capacity - s)) for s in self.seqlens}
        return {s: (t + self.predictor.host_ns) * 1e-9 for s, t in ns.items()}


@dataclass
class MeasuredServer:
    """The runtime on this computer: each step is run and its time taken."""

    session: BatchSession

    @property
    def capacity(self) -> int:
        return self.session.manifest.options.max_kv

    @property
    def slots(self) -> int:
        return len(self.session.tokens)

    @property
    def seqlens(self) -> Sequence[int]:
        return self.session.manifest.options.dense_seqlens

    @property
    def chunks(self) -> DualChunk | None:
        return DualChunk.used(self.session.manifest.model, self.capacity)

    def run(self, step: Step) -> float:
        start = time.perf_counter()
        for slot, position in enumerate(step.starts):
            self.session.rewind(slot, position)
        self.session.step(step.feeds, step.seqlen, step.lengths, most=step.most)
        return time.perf_counter() - start

    def costs(self) -> Mapping[int, float]:
        """As a server measures them when it starts."""
        return step_costs(self.session)


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


_TOKENS: Final = 97  # different tokens that requests are made of: their number is what counts


@dataclass(eq=False)
class _Running:
    """A request that has been sent."""

    request: Request
    sent: float
    number: int
    tokens: list[float] = field(default_factory=list)

    def task(self) -> Task:
        """Its prompt, which no other's begins like: caches of other requests are of no use."""
        rest = [1 + i % _TOKENS for i in range(self.request.prompt)]
        most = self.request.prompt + self.request.output
        return Task(rest, salt=str(self.number), most=most)


def serve(
    requests: Iterable[Request],
    server: Server,
    *,
    max_concurrency: int | None = None,
    long_share: float = 0.5,
) -> list[Result]:
    """Run the requests in the order of their arrival; at most `max_concurrency` are sent and not yet done.

    Results in the order of arrival.  What runs when is decided by the server's own `Scheduler`.
    """
    if max_concurrency is not None and max_concurrency < 1:
        raise TyirError(f"max_concurrency must be at least 1, got {max_concurrency}")
    todo = deque(sorted(requests, key=lambda r: r.arrival))
    long = [r for r in todo if r.prompt + r.output - 1 > server.capacity]
    if long:
        raise TyirError(
            f"{len(long)} requests do not fit the cache of {server.capacity} tokens, the first has"
            f" {long[0].prompt} + {long[0].output}",
            help="shorten them, or compile with a larger --max-kv",
        )
    sizes = (server.slots, server.seqlens, server.capacity)
    scheduler = Scheduler(*sizes, long_share=long_share, costs=server.costs(), chunks=server.chunks)
    permits = [0.0] * min(max_concurrency or len(todo), len(todo))  # when each may be taken
    under_way: dict[Task, _Running] = {}
    done: dict[int, Result] = {}
    sent = 0
    clock = 0.0
    while todo or under_way:
        if not under_way:
            clock = max(clock, todo[0].arrival, permits[0])
        while todo and permits and max(todo[0].arrival, permits[0]) <= clock:
            request = todo.popleft()
            one = _Running(request, max(request.arrival, heapq.heappop(permits)), sent)
            sent += 1
            task = one.task()
            under_way[task] = one
            scheduler.add(task)
        step = scheduler.plan()
        assert step is not None
        clock += server.run(step)
        for task in scheduler.ran(step):
            one = under_way[task]
            one.tokens.append(clock)
            task.ids.append(1 + len(task.ids) % _TOKENS)
            if len(one.tokens) == one.request.output:
                done[one.number] = Result(one.request, one.sent, tuple(one.tokens))
                heapq.heappush(permits, clock)
                scheduler.remove(task)
                del under_way[task]
    return [done[number] for number in sorted(done)]


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


def sweep_block(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each of several streams of requests, told apart by the `value` of one number."""
    columns = {
        "req/s": "request_throughput",
        "tok/s": "output_throughput",
        "mean TTFT": "mean_ttft_ms",
        "p99 TTFT": "p99_ttft_ms",
        "mean TPOT": "mean_tpot_ms",
        "p99 TPOT": "p99_tpot_ms",
        "mean E2EL": "mean_e2el_ms",
    }
    if all(row["request_goodput"] is not None for row in rows):
        columns["goodput"] = "request_goodput"
    lines = [f"{name:<16}" + "".join(f"{head:>12}" for head in columns) + "   (ms)"]
    for row in rows:
        lines.append(f"{row['value']:<16g}" + "".join(f"{row[key]:>12.2f}" for key in columns.values()))
    return "\n".join(lines)
