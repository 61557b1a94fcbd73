"""What a prompt's length costs at run time, simulated: the command programs of a few layers of the model's
sizes, compiled as the model would be, at a few positions (`LongSteps`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.manifest import BuildOptions
from tyir.passes.pipelines import remaining_pipeline
from tyir.pipeline import run_pipeline
from tyir.printer import print_op
from tyir.runtime_sim.session.chunks import plan_chunks
from tyir.runtime_sim.timing.long_steps import LongSteps, OverlappedChunks
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.sharding import even_ranges
from tyir.targets.machine import Machine
from tyir.tools.estimate.model import ModelShape, few_layers

__all__ = ["PromptCost", "decode_programs", "prompt_cost"]

_SHARE = re.compile(r"tyir\.shard = array<[^>]*>")
_LAYERS = 3  # of a stage: one, one more, and one to check


@dataclass(frozen=True)
class PromptCost:
    """Of a prompt that fills the cache: its tokens and steps, the seconds until its end, and the seconds of a
    token after it.

    `overlapped`: the seconds when pipeline stages work on several chunks at a time, which takes steps without
    embedding and head; None with one stage.
    """

    tokens: int
    steps: int
    prefill: float
    token: float
    overlapped: float | None


def prompt_cost(shape: ModelShape, options: BuildOptions, machine: Machine) -> PromptCost:
    """Simulated on all dies, under the machine file as it is; `TyirError` where few layers and positions do
    not say what all of them take.
    """
    capacity, longest, shortest = options.max_kv, max(options.seqlens), min(options.seqlens)
    sparse = None if options.choice is None else longest
    chunks = list(plan_chunks(capacity, 0, options.dense_seqlens, capacity, sparse=sparse))
    steps = {length: _steps(shape, options, machine, length) for length in {longest, shortest}}
    used = {chunk.seqlen for chunk in chunks} - set(steps)
    steps |= {length: _steps(shape, options, machine, length) for length in used}
    last, before = chunks[-1], steps
    if options.output_rows == "last":  # no row of a chunk before the last one is wanted
        lengths = {chunk.seqlen for chunk in chunks[:-1]}
        before = {n: _steps(shape, options, machine, n, wanted=False) if n > 1 else steps[n] for n in lengths}
    prefill = math.fsum(before[c.seqlen].ns(c.start) for c in chunks[:-1]) + steps[last.seqlen].ns(last.start)
    host = machine.host.step_us * 1000
    token = steps[shortest].ns(capacity - shortest) + host
    overlapped = None
    if options.pp > 1:
        trial = replace(options, embedding_as_input=True, output="logits", output_rows="all")
        more = _steps(shape, trial, machine, longest, overlapped=True)
        first = _steps(shape, trial, machine, longest, head=False)
        ends = chunks[-1].start if chunks[-1].seqlen == longest else max(chunks[-1].start - longest, 0)
        others = {c.seqlen for c in chunks if c.seqlen != longest} if sparse is not None else set()
        dense = {n: _steps(shape, trial, machine, n, overlapped=True) for n in others}
        overlapped = math.fsum(dense.get(c.seqlen, more).ns(c.start) for c in chunks) + first.ns(ends)
    return PromptCost(
        capacity,
        len(chunks),
        (prefill + len(chunks) * host) * 1e-9,
        token * 1e-9,
        None if overlapped is None else overlapped * 1e-9,
    )


def _trial(shape: ModelShape, options: BuildOptions) -> tuple[dict[int, int], int]:
    """How many layers each of a few stands for, and how many those few are."""
    stages = even_ranges(shape.layers, options.pp)
    trial = min(_LAYERS, min(count for _, count in stages))
    numbers = range(trial * options.pp)
    return {n: stages[n // trial][1] - trial + 1 for n in numbers if n % trial == 0}, len(numbers)


def decode_programs(
    shape: ModelShape, options: BuildOptions, machine: Machine, file: str
) -> tuple[Sequence[EdgeProgram], dict[int, int]]:
    """Of a step of the shortest length, the programs of all dies with a few layers for each stage, and how
    many layers each of those stands for.  `file`: where `machine` was read from, for the cuts.
    """
    standing_for, layers = _trial(shape, options)
    module, length = few_layers(shape, layers), min(options.seqlens)
    return _programs(module, shape, replace(options, seqlens=(length,)), machine, file), standing_for


def _steps(
    shape: ModelShape,
    options: BuildOptions,
    machine: Machine,
    length: int,
    *,
    head: bool = True,
    overlapped: bool = False,
    wanted: bool = True,
) -> LongSteps:
    """The times of steps of one length; `wanted`: of which a row of the results is."""
    standing_for, layers = _trial(shape, options)
    module = few_layers(shape, layers, head=head and not overlapped)
    choice = options.choice if length == max(options.seqlens) else None
    lengths = (length,) if choice is None else (*options.dense_seqlens, length)
    trial = replace(options, seqlens=lengths, sparse_prefill=() if choice is None else choice.numbers)
    programs = _programs(module, shape, trial, machine)
    bends = () if choice is None else (choice.bend,)
    if overlapped:
        return OverlappedChunks(programs, machine, options.max_kv, standing_for, options.pp, bends)
    return LongSteps(programs, machine, options.max_kv, standing_for, bends, wanted)


def _programs(
    module: Module, shape: ModelShape, options: BuildOptions, machine: Machine, file: str = "edge10"
) -> Sequence[EdgeProgram]:
    from tyir.backends.edge10.lowering.die import lower_die
    from tyir.backends.edge10.lowering.search import Search

    if shape.group is not None:
        options = replace(options, weights="fp16")  # stored quantised
    run_pipeline(module, remaining_pipeline("ty", options, file))
    search, length = Search(), max(options.seqlens)
    lowered: dict[str, EdgeProgram] = {}
    programs = []
    for die in (die for die in module.body if isinstance(die, Module)):
        does = _what_it_does(die)
        if does not in lowered:
            lowered[does] = EdgeProgram(lower_die(die, length, machine, search=search))
        programs.append(lowered[does])
    return programs


def _what_it_does(die: Module) -> str:
    """The functions of a die, without which share of the weights it has: dies that are equal in it take the
    same time.
    """
    functions = (f for f in die.body if isinstance(f, Func))
    return _SHARE.sub("", "\n".join(print_op(f, locations=False) for f in functions))
