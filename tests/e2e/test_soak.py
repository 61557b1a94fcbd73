"""Hours of traffic: no token lost or doubled, counters equal to what clients saw, memory flat.

An hour in fast-forward: the engine and scheduler of the server on the simulator's clock, with a model whose
next token is known, so that every answer can be told in advance.  And ten real minutes of a server on this
computer (`TYIR_SOAK_SECONDS` for another time), by clients that come, go and send nonsense:

    pytest tests/e2e/test_soak.py --slow
"""

from __future__ import annotations

import gc
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("prometheus_client", reason="the extra 'serve' is not installed")

from tests.e2e.serving import Served, counts_of, serving
from tyir.execution.artifacts import Artifacts
from tyir.runtime_sim.serving.benchmark import SimulatedServer
from tyir.runtime_sim.serving.engine import Engine
from tyir.runtime_sim.serving.generation import Finish, Generation, Scored
from tyir.runtime_sim.serving.scheduler import QueueFull, Step
from tyir.runtime_sim.session.batch_session import BatchSession
from tyir.runtime_sim.timing.predictor import Predictor
from tyir.runtime_sim.timing.program import load_programs, machine_of
from tyir.tools.serve.metrics import Metrics

VOCABULARY = 97
SLOWER = 100.0  # than the embedded model's steps: as a model of some size takes


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def following(token: int, position: int) -> int:
    """The token after `token` at `position`: any function of both tells a wrong cache from a right one."""
    return (token * 31 + position * 7 + 11) % VOCABULARY


class ClockedSession(BatchSession):
    """The artifacts' steps on the simulator's clock: time passes, and tokens are `following`'s."""

    def __init__(self, folder: Path) -> None:
        artifacts = Artifacts.open(folder)
        super().__init__(artifacts, "interpreter")
        machine, options = machine_of(artifacts), self.manifest.options
        programs = {s: load_programs(artifacts, s) for s in options.seqlens}
        predictor = Predictor(programs.__getitem__, options.seqlens, options.max_kv, machine)
        self.server = SimulatedServer(predictor, options.batch)
        self.clock = 0.0

    def step(
        self,
        parts: Sequence[Sequence[int]],
        seqlen: int,
        lengths: Sequence[int] | None = None,
        *,
        most: Sequence[int] | None = None,
    ) -> list[dict[str, Any]]:
        starts = tuple(map(len, self.tokens))
        self.clock += SLOWER * self.server.run(Step(seqlen, starts, tuple(map(tuple, parts))))
        found = []
        for held, part in zip(self.tokens, parts):
            logits = np.zeros((len(part), VOCABULARY), np.float32)
            for row, token in enumerate(part):
                logits[row, following(token, len(held) + row)] = 1.0
            held += part
            found.append({"logits": logits})
        return found

    def copy(self, source: int, target: int, count: int) -> None:
        self.tokens[target] = self.tokens[source][:count]


@dataclass
class Client:
    """What one of them asks, and hears."""

    prompt: list[int]
    limit: int
    leaves: int | None  # after so many tokens
    heard: list[int] = field(default_factory=list)
    finish: Finish | None = None

    def token(self, scored: Scored, finish: Finish | None) -> Finish | None:
        assert self.finish is None, "nothing after the end"
        self.heard.append(scored.token)
        return finish

    def ended(self, finish: Finish) -> None:
        assert self.finish is None, "one end"
        self.finish = finish

    def wanted(self) -> list[int]:
        token, made = self.prompt[-1], []
        for position in range(len(self.prompt) - 1, len(self.prompt) - 1 + self.limit):
            token = following(token, position)
            made.append(token)
        return made


class Listening:
    """A `Listener` for a client, whose `prompt` is its prompt."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.token = client.token
        self.ended = client.ended

    def prompt(self, scored: Sequence[Scored]) -> None:
        raise AssertionError("nobody asked for the prompt's")


def fast_forward(folder: Path, seconds: float, gap: float, seed: int = 0) -> tuple[int, list[int]]:
    """Random traffic for so long on the clock, a request each `gap` seconds; how many tokens were made, and
    memory at each quarter.
    """
    rng = random.Random(seed)
    session = ClockedSession(folder)
    metrics = Metrics("tiny")
    engine = Engine(
        session,
        most_waiting=12,
        queue_timeout=2.0,
        request_timeout=20.0,
        observer=metrics,
        now=lambda: session.clock,
    )
    engine.vocabulary = VOCABULARY
    engine.scheduler.weigh(session.server.costs())
    texts = [[rng.randrange(VOCABULARY) for _ in range(engine.capacity)] for _ in range(5)]
    asked: dict[Generation, Client] = {}
    reasons: Counter[str] = Counter()
    refused = made = prompts = 0
    arrival, quarters, memory = 0.0, 1, []
    while session.clock < seconds or asked:
        while arrival <= session.clock and arrival < seconds:
            begin = rng.choice(texts)[: rng.randrange(1, engine.capacity // 2)]
            prompt = [*begin, rng.randrange(VOCABULARY)]
            limit = rng.randrange(1, engine.capacity - len(prompt) + 1)
            client = Client(prompt, limit, rng.choice([None, None, None, rng.randrange(1, 20)]))
            one = Generation(prompt, Listening(client), limit)
            try:
                engine.add(one)
                asked[one] = client
            except QueueFull:
                refused += 1
            # bursts beside calm: half of the arrivals follow each other at once
            arrival += rng.choice([0.0, rng.expovariate(0.5 / gap)])
        if not engine.step():
            session.clock = max(session.clock, min(arrival, seconds))
        for one, client in list(asked.items()):
            if client.finish is None and client.leaves is not None and len(client.heard) >= client.leaves:
                engine.cancel(one)
            if client.finish is not None:
                reason = client.finish.reason
                wanted = client.wanted()
                assert client.heard == wanted[: len(client.heard)] == one.made, (reason, client)
                assert reason != "length" or len(client.heard) == client.limit
                assert reason in ("length", "abort", "timeout"), client.finish
                reasons[reason] += 1
                made += len(client.heard)
                prompts += len(client.prompt) if client.heard else 0
                del asked[one]
        if session.clock >= seconds * quarters / 4:
            memory.append(resident())
            quarters += 1
    counts = counts_of(metrics.text().decode())
    assert counts["vllm:generation_tokens_total"] == made
    assert counts["vllm:prompt_tokens_total"] == prompts
    for reason, count in reasons.items():
        assert counts[f"vllm:request_success_total {reason}"] == count
    assert counts["vllm:e2e_request_latency_seconds_count"] == sum(reasons.values())
    assert engine.counts == (0, 0) and reasons["length"] and reasons["abort"]
    print(f"{session.clock:.0f} s on the clock: {made} tokens, {dict(reasons)}, {refused} refused, {memory}")
    return made, memory


def test_minutes_in_fast_forward(four: Path) -> None:
    made, _ = fast_forward(four, 100.0, 1.0)
    assert made > 1000


@pytest.mark.slow
def test_an_hour_in_fast_forward(four: Path) -> None:
    made, memory = fast_forward(four, 3600.0, 1.5)
    assert made > 50_000
    assert memory[-1] <= memory[0] * 1.02, memory


# ------------------------------------------------------------------------------------------ on this computer


@dataclass
class Seen:
    """What the clients of a server saw, all together."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: Counter[str] = field(default_factory=Counter)
    solo: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, **more: int) -> None:
        with self.lock:
            self.counts.update(more)


WORDS = [
    "the",
    "old",
    "house",
    "stood",
    "at",
    "end",
    "of",
    "a",
    "cold",
    "road",
    "and",
    "she",
    "looked",
    "at",
    "him",
    "in",
    "the",
    "morning",
]
NONSENSE: list[tuple[str, Any]] = [
    ("/v1/completions", b"{"),
    ("/v1/completions", {"prompt": []}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 10**9}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ("/api/generate", {"model": "none", "prompt": "a"}),
]


def visitor(served: Served, seen: Seen, until: float, number: int) -> None:
    """Asks until the time is over; what is seeded is asked again and must be the same."""
    import http.client

    rng = random.Random(number)
    while time.monotonic() < until:
        kind = rng.choice(["whole", "whole", "stream", "leave", "nonsense"])
        if kind == "nonsense":
            path, body = rng.choice(NONSENSE)
            status, _, _ = served.raw("POST", path, body)
            if status not in (400, 404):
                seen.problems.append(f"{path} {body!r}: {status}")
            continue
        shared = random.Random(rng.randrange(40))  # 40 requests, each many times
        body = {
            "prompt": " ".join(shared.choices(WORDS, k=shared.randrange(1, 25))),
            "max_tokens": shared.randrange(1, 24),
            "seed": shared.randrange(100),
            "temperature": shared.choice([0, 0.8]),
            "ignore_eos": True,
        }
        if kind == "whole":
            status, text, _ = served.raw("POST", "/v1/completions", body)
            if status == 429:
                seen.add(refused=1)
                continue
            reply = json.loads(text)
            if status != 200:
                seen.problems.append(text)
                continue
            said, usage = reply["choices"][0]["text"], reply["usage"]
        else:
            connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=900)
            sent = json.dumps({**body, "stream": True})
            connection.request("POST", "/v1/completions", sent, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            if reply.status != 200:
                reply.read()
                connection.close()
                seen.add(refused=1)
                continue
            if kind == "leave":
                reply.read1(200)
                connection.close()
                seen.add(left=1)
                continue
            parts = reply.read().decode().split("\n\n")
            connection.close()
            events = [json.loads(p.removeprefix("data: ")) for p in parts if p.startswith("data: {")]
            said, usage = "".join(e["choices"][0]["text"] for e in events[:-1]), events[-1]["usage"]
        if usage["completion_tokens"] != body["max_tokens"]:
            seen.problems.append(f"{body}: {usage}")
        seen.add(answered=1, made=usage["completion_tokens"], asked=usage["prompt_tokens"])
        with seen.lock:
            if seen.solo.setdefault(json.dumps(body), said) != said:
                seen.problems.append(f"{body}: {said!r} and {seen.solo[json.dumps(body)]!r}")


@pytest.mark.slow
def test_minutes_on_this_computer(four: Path) -> None:
    seconds = float(os.environ.get("TYIR_SOAK_SECONDS", "600"))
    with serving(four, most_waiting=4) as served:
        seen, begun = Seen(), time.monotonic()
        threads = [
            threading.Thread(target=visitor, args=(served, seen, begun + seconds, n)) for n in range(9)
        ]
        for thread in threads:
            thread.start()
        memory = []
        while any(t.is_alive() for t in threads):
            time.sleep(seconds / 20)
            memory.append(resident())
        for _ in range(200):
            if served.engine.engine.counts == (0, 0):
                break
            time.sleep(0.05)
        counts = served.counts()
    print(f"{seconds:g} s: {dict(seen.counts)}, memory {memory[len(memory) // 4 :: len(memory) // 4]}")
    assert not seen.problems, seen.problems[:3]
    ended = counts["vllm:request_success_total length"]
    aborted = counts.get("vllm:request_success_total abort", 0)
    assert ended + aborted == seen.counts["answered"] + seen.counts["left"]
    assert aborted <= seen.counts["left"]  # some had ended before their client left
    assert counts["vllm:generation_tokens_total"] >= seen.counts["made"]
    assert counts.get("vllm:admission_rejections_total queue_full", 0) == seen.counts["refused"]
    assert counts["vllm:num_requests_running"] == counts["vllm:num_requests_waiting"] == 0
    later = memory[len(memory) // 4 :]
    assert later[-1] <= later[0] * 1.02, memory
