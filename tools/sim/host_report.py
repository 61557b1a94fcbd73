"""`tyir-sim` with the file of a processor: how long the compiled host code takes on it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from tyir.diagnostics import TyirError
from tyir.execution.artifacts import Artifacts
from tyir.runtime_sim.host.machine import HostMachine, load_host_machine
from tyir.runtime_sim.host.steps import HostPrediction, HostPredictor, StepTime

__all__ = ["host_report", "probe_report"]


def probe_report(args: argparse.Namespace) -> str:
    """Measures this computer into the file `args.probe_host`; what to say of it."""
    from tyir.tools.cli import check_output, note, write_output
    from tyir.tools.sim.host_probe import probe

    check_output(str(args.probe_host))
    machine = probe(args.probe_host.stem, args.clock or "wall", args.threads, note)
    write_output(machine.as_toml(), str(args.probe_host))
    if args.report == "json":
        return json.dumps({"machine": str(args.probe_host), "constants": _values(machine)}, indent=1)
    memory = machine.memory
    rates = [1 / known["1gb"] for known in (memory.one_thread_byte_ns, memory.all_threads_byte_ns)]
    return (
        f"{args.probe_host}: {len(machine.constants)} constants of {machine.processor.threads} thread"
        f"{'s' * (machine.processor.threads > 1)}, by the {machine.clock}'s clock; weights of 1 GB are read"
        f" at {rates[0]:.1f} GB/s on one thread, {rates[1]:.1f} on all, parts of a loop take"
        f" {machine.parallel.beside:.2f} times their share\n"
        f"tyir-sim OUT/{{n}}die --machine {args.probe_host} predicts with it"
    )


def _values(machine: HostMachine) -> Mapping[str, float]:
    return {name: constant.value for name, constant in machine.constants.items()}


def host_report(args: argparse.Namespace, path: Path, values: Mapping[str, float]) -> str:
    """The prediction for the artifacts `args.artifacts` on the processor of the file `path`, with constants
    changed.  `TyirError` for what is asked of the device's simulation only.
    """
    asked = {
        "--compare": args.compare,
        "--sweep": args.sweep is not None,
        "--tornado": args.tornado,
        "--check-plan": args.check_plan,
        "--trace": args.trace is not None,
        "--report html": args.report == "html",
    }
    if flags := [flag for flag, given in asked.items() if given]:
        raise TyirError(
            f"{path} is the file of a processor: {' and '.join(flags)} would simulate command programs",
            help="leave that out, or give the machine of a die",
        )
    if len(args.artifacts) != 1 or not args.artifacts[0].is_dir():
        raise TyirError(
            "the code of a processor is predicted for one artifact folder",
            help="give the folder that tyir-compile printed, for example out/1die",
        )
    machine = load_host_machine(path).with_overrides(values)
    artifacts = Artifacts.open(args.artifacts[0], check=not args.no_check)
    threads = args.threads if args.threads is not None else machine.processor.threads
    predictor = HostPredictor(artifacts, machine, threads)
    prompt, pos = _lengths(args, predictor)
    shortest, longest = min(predictor.options.seqlens), max(predictor.options.seqlens)
    token, chunk = predictor.step(shortest, pos), predictor.step(longest, 0)
    ttft = predictor.prompt_ms(prompt)
    figures = HostPrediction(
        artifacts=str(args.artifacts[0]),
        machine=machine.name,
        clock=machine.clock,
        threads=threads,
        activations=predictor.activations,
        overrides=dict(values),
        prompt_tokens=prompt,
        pos=pos,
        ttft_ms=ttft,
        tpot_ms=token.ms,
        prefill_tokens_per_s=1e3 * prompt / ttft,
        decode_tokens_per_s=1e3 * predictor.options.batch / token.ms,
        decode_step=token,
        prefill_step=chunk,
    )
    if args.report == "json":
        return json.dumps(asdict(figures), indent=1)
    rate = token.read_bytes / token.ms * 1e-6
    figure = {
        f"TTFT, {prompt} tokens (ms)": f"{ttft:.2f}",
        f"TPOT at position {pos} (ms)": f"{token.ms:.2f}",
        f"prefill of {prompt} (tokens/s)": f"{figures.prefill_tokens_per_s:.1f}",
        f"decode at position {pos} (tokens/s)": f"{figures.decode_tokens_per_s:.1f}",
    }
    return "\n".join(
        [
            f"{figures.artifacts} on {machine.name}: predicted time of the host's code,"
            f" {figures.activations} activations, {threads} thread{'s' * (threads > 1)}, by the"
            f" {machine.clock}'s clock",
            "",
            *(f"{what:40} {value:>10}" for what, value in figure.items()),
            f"a token reads {token.read_bytes / 1e6:.1f} MB, {rate:.1f} GB/s",
            *_table(token),
            *_table(chunk),
        ]
    )


def _table(step: StepTime) -> list[str]:
    return [
        "",
        f"one step of {step.tokens} at position {step.pos}: {step.ms:.2f} ms",
        f"{'kind of kernel':24} {'calls':>6} {'ms':>10}   share",
        *(f"{p.kind:24} {p.kernels:6} {p.ms:10.3f} {100 * p.ms / step.ms:5.1f} %" for p in step.parts),
    ]


def _lengths(args: argparse.Namespace, predictor: HostPredictor) -> tuple[int, int]:
    """Prompt length and decode position, as those of the device's simulation."""
    capacity, shortest = predictor.options.max_kv, min(predictor.options.seqlens)
    prompt = args.prompt_tokens if args.prompt_tokens is not None else max(min(128, capacity - shortest), 1)
    pos = args.pos if args.pos is not None else min(prompt, capacity - shortest)
    if not 1 <= prompt <= capacity:
        raise TyirError(
            f"--prompt-tokens {prompt} is not in 1..{capacity}, the cache's positions",
            help=f"the nearest possible is {min(max(prompt, 1), capacity)}",
        )
    if not 0 <= pos <= capacity - shortest:
        raise TyirError(
            f"--pos {pos} is not in 0..{capacity - shortest}, where a step of {shortest} has room",
            help=f"the nearest possible is {min(max(pos, 0), capacity - shortest)}",
        )
    return prompt, pos
