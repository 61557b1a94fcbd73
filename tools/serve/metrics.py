"""What is counted, by vLLM's names for Prometheus, and a few of our own (`tyir:`)."""

from __future__ import annotations

from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from tyir.runtime_sim.serving.engine import Engine, Observer
from tyir.runtime_sim.serving.generation import Generation
from tyir.runtime_sim.serving.scheduler import Step

__all__ = ["Metrics"]

# vLLM's buckets (vllm/v1/metrics/loggers.py): seconds of a token, seconds of a request, numbers of tokens
_TOKEN: Final = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
_REQUEST: Final = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_COUNTS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_REASONS: Final = ("stop", "length", "abort", "error", "timeout")


class Metrics(Observer):
    """Counts of one engine; every label set has the model's name and the engine's number."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = (model, "0")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts that were computed or reused")
        self._made = self._counter("generation_tokens", "Tokens that were generated")
        self._queries = self._counter(
            "prefix_cache_queries", "Tokens of prompts that caches were searched for"
        )
        self._hits = self._counter("prefix_cache_hits", "Tokens of prompts that a cache held")
        self._counter("num_preemptions", "Requests that lost their place; none does here")
        self._success = self._counter("request_success", "Requests that ended", "finished_reason")
        self._refused = self._counter("admission_rejections", "Requests that were refused at once", "reason")
        for reason in _REASONS:
            self._success.labels(*self._labels, reason)
        self._ttft = self._histogram("time_to_first_token_seconds", "Time to first token", _TOKEN)
        self._itl = self._histogram("inter_token_latency_seconds", "Time between tokens", _TOKEN)
        self._tpot = self._histogram("request_time_per_output_token_seconds", "Mean time of a token", _TOKEN)
        self._e2e = self._histogram("e2e_request_latency_seconds", "Time of a request", _REQUEST)
        self._queue = self._histogram(
            "request_queue_time_seconds", "Time before a request got a slot", _REQUEST
        )
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "From the slot to the first token", _REQUEST
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "From the first token to the last", _REQUEST
        )
        self._inference = self._histogram(
            "request_inference_time_seconds", "From the slot to the last token", _REQUEST
        )
        self._prompts = self._histogram("request_prompt_tokens", "Tokens of a prompt", _COUNTS)
        self._answers = self._histogram("request_generation_tokens", "Tokens of an answer", _COUNTS)
        self._limits = self._histogram("request_params_max_tokens", "Tokens asked for at most", _COUNTS)
        self._n = self._histogram("request_params_n", "Answers asked for", (1, 2, 5, 10, 20))
        self._iteration = self._histogram(
            "iteration_tokens_total", "Tokens of a step", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
        )
        own = {"registry": self.registry}
        self._steps = Counter("tyir:steps", "Steps by their length", ["seqlen"], **own)  # type: ignore[arg-type]
        self._seconds = Counter("tyir:step_seconds", "Time of steps by their length", ["seqlen"], **own)  # type: ignore[arg-type]
        self._padded = Counter("tyir:padded_tokens", "Rows of steps that held no token", **own)  # type: ignore[arg-type]

    def watch(self, engine: Engine, config: dict[str, str]) -> None:
        """Show an engine's state whenever it is asked for, and what it was built with."""
        self.registry.register(_State(engine, self._labels))
        info = Gauge("vllm:cache_config_info", "What the caches are", sorted(config), registry=self.registry)
        info.labels(**config).set(1)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return bytes(generate_latest(self.registry))

    def refused(self, reason: str) -> None:
        """A request was refused at once."""
        self._refused.labels(*self._labels, reason).inc()

    def asked(self, n: int) -> None:
        """A request was taken."""
        self._n.labels(*self._labels).observe(n)

    # ------------------------------------------------------------------------------- from the engine's thread

    def stepped(self, step: Step, slots: int, seconds: float) -> None:
        self._steps.labels(str(step.seqlen)).inc()
        self._seconds.labels(str(step.seqlen)).inc(seconds)
        self._padded.inc(step.seqlen * slots - step.tokens)
        self._iteration.labels(*self._labels).observe(step.tokens)

    def admitted(self, generation: Generation) -> None:
        labels, times = self._labels, generation.times
        self._queue.labels(*labels).observe(times.scheduled - times.arrived)
        self._queries.labels(*labels).inc(len(generation.prompt))
        self._hits.labels(*labels).inc(generation.task.cached)

    def chosen(self, generation: Generation, gap: float | None) -> None:
        labels, times = self._labels, generation.times
        self._made.labels(*labels).inc()
        if gap is None:
            self._prompt.labels(*labels).inc(len(generation.prompt))
            self._ttft.labels(*labels).observe(times.first - times.arrived)
        else:
            self._itl.labels(*labels).observe(gap)

    def ended(self, generation: Generation) -> None:
        labels, times, made = self._labels, generation.times, len(generation.made)
        finish = generation.finish
        self._success.labels(*labels, finish.reason if finish is not None else "abort").inc()
        self._e2e.labels(*labels).observe(times.ended - times.arrived)
        self._prompts.labels(*labels).observe(len(generation.prompt))
        self._answers.labels(*labels).observe(made)
        self._limits.labels(*labels).observe(generation.limit)
        if made:
            self._prefill.labels(*labels).observe(times.first - times.scheduled)
            self._decode.labels(*labels).observe(times.last - times.first)
            self._inference.labels(*labels).observe(times.last - times.scheduled)
        if made > 1:
            self._tpot.labels(*labels).observe((times.last - times.first) / (made - 1))

    def _counter(self, name: str, words: str, *more: str) -> Counter:
        made = Counter(f"vllm:{name}", words, ["model_name", "engine", *more], registry=self.registry)
        if not more:
            made.labels(*self._labels)
        return made

    def _histogram(self, name: str, words: str, buckets: Any) -> Histogram:
        made = Histogram(
            f"vllm:{name}", words, ["model_name", "engine"], buckets=buckets, registry=self.registry
        )
        made.labels(*self._labels)
        return made


class _State:
    """What an engine is doing when the metrics are read."""

    def __init__(self, engine: Engine, labels: tuple[str, str]) -> None:
        self._engine = engine
        self._labels = labels

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> list[Any]:
        running, waiting = self._engine.counts
        slots = len(self._engine.scheduler.running)
        found = []
        for name, words, value in (
            ("num_requests_running", "Requests that have a slot", running),
            ("num_requests_waiting", "Requests that wait for a slot", waiting),
            ("kv_cache_usage_perc", "Part of the caches in use", self._engine.cache_usage),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", words, labels=["model_name", "engine"])
            gauge.add_metric(self._labels, value)
            found.append(gauge)
        gauge = GaugeMetricFamily("tyir:slots", "Slots by what they do", labels=["state"])
        gauge.add_metric(["running"], running)
        gauge.add_metric(["free"], slots - running)
        return [*found, gauge]
