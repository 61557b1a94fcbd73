"""What `tyir-bench-serving` is asked: a stream of requests, and the server that they go to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tyir.artifacts.dual_chunk import DualChunk
from tyir.diagnostics import TyirError, did_you_mean
from tyir.execution.artifacts import Artifacts
from tyir.runtime_sim.serving.benchmark import (
    MeasuredServer,
    Server,
    SimulatedServer,
    poisson,
    read_trace,
    serve,
    summary,
)
from tyir.runtime_sim.timing.predictor import Predictor
from tyir.runtime_sim.timing.program import EdgeProgram, load_programs, machine_of
from tyir.targets.machine import load_machine

__all__ = ["SWEPT", "Asked", "served", "with_value"]

# What several values can be tried of, and whether they are whole numbers.
SWEPT: Final = {
    "request-rate": False,
    "num-prompts": True,
    "input-len": True,
    "output-len": True,
    "max-concurrency": True,
    "seed": True,
}


@dataclass(frozen=True)
class Asked:
    """`trace`: a file of requests, None for Poisson arrivals.  `slos`: service levels in ms, by name."""

    artifacts: Path
    engine: Any
    machine: str | None
    trace: Path | None
    num_prompts: int
    request_rate: float
    input_len: int
    output_len: int
    seed: int
    max_concurrency: int | None
    slos: Mapping[str, float]

    def check(self) -> None:
        """`TyirError` for numbers that are not positive, and for a seed that generators do not take."""
        if self.seed < 0:
            raise TyirError(f"--seed {self.seed} must be 0 or more", help="the default is --seed 0")
        bad = [
            f"--{name.replace('_', '-')} {value:g}"
            for name in ("num_prompts", "input_len", "output_len", "request_rate", "max_concurrency")
            if (value := getattr(self, name)) is not None and not value > 0
        ]
        if bad:
            raise TyirError(
                f"{', '.join(bad)} must be positive",
                help="the defaults are --num-prompts 10 --input-len 128 --output-len 64 --request-rate inf",
            )


def with_value(asked: Asked, name: str, value: str) -> Asked:
    """With one of its numbers (`SWEPT`) changed; `TyirError` for what is not one."""
    if name not in SWEPT:
        raise TyirError(
            f"--sweep {name}: requests have no such number",
            help=did_you_mean(name, SWEPT) or f"one of {', '.join(SWEPT)}",
        )
    if asked.trace is not None and name != "max-concurrency":
        raise TyirError(
            f"--sweep {name} changes requests that are made, and --trace gives them",
            help="leave --trace out, or try values of max-concurrency",
        )
    try:
        number: Any = int(value) if SWEPT[name] else float(value)
    except ValueError:
        raise TyirError(
            f"--sweep {name}: '{value}' is not a {'whole number' if SWEPT[name] else 'number'}",
            help="write --sweep request-rate=0.1,0.2,inf",
        ) from None
    changed = replace(asked, **{name.replace("-", "_"): number})
    changed.check()
    return changed


def served(asked: Asked) -> dict[str, Any]:
    """vLLM's figures of one stream of requests, and what they were made with."""
    requests = (
        read_trace(asked.trace)
        if asked.trace
        else poisson(asked.num_prompts, asked.request_rate, asked.input_len, asked.output_len, asked.seed)
    )
    server, note = _server(asked)
    figures = summary(serve(requests, server, max_concurrency=asked.max_concurrency), asked.slos)
    return {"artifacts": str(asked.artifacts), "engine": asked.engine, "note": note, **figures}


def _server(asked: Asked) -> tuple[Server, str]:
    if asked.engine != "sim":
        from tyir.runtime_sim.session.batch_session import BatchSession

        session = BatchSession(asked.artifacts, asked.engine)
        return (
            MeasuredServer(session),
            f"measured on this computer, engine {asked.engine}; no time is spent waiting for arrivals",
        )
    artifacts = Artifacts.open(asked.artifacts)
    manifest = artifacts.manifest
    loaded: dict[int, list[EdgeProgram]] = {}

    def programs(seqlen: int) -> list[EdgeProgram]:
        if seqlen not in loaded:
            loaded[seqlen] = load_programs(artifacts, seqlen)
        return loaded[seqlen]

    machine = load_machine(asked.machine) if asked.machine is not None else machine_of(artifacts)
    predictor = Predictor(programs, manifest.options.dense_seqlens, manifest.options.max_kv, machine)
    state = "" if machine.calibrated else "; uncalibrated: constants are assumed, see tyir-sim --tornado"
    chunks = DualChunk.used(manifest.model, manifest.options.max_kv)
    return (
        SimulatedServer(predictor, manifest.options.batch, chunks),
        f"simulated, device time; host constant = {machine.host.step_us / 1000:g} ms a step{state}",
    )
