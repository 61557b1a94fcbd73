"""Before anything is written: does every die's program fit its DRAM?

Too much is an error with the cheapest remedies, each tried on the module itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tyir.backends.edge10.lowering.die import lower_die
from tyir.backends.edge10.lowering.search import Search
from tyir.backends.edge10.memory.allocate import align
from tyir.backends.edge10.memory.remedies import cheapest_remedies, gib, remedy_text
from tyir.backends.edge10.memory.summary import memory_summary
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.ty import GetGlobal, tensor_type
from tyir.execution.entry_points import alias_of, entry_point
from tyir.ir import Value
from tyir.manifest import BuildOptions, recorded
from tyir.passes.pipelines import remaining_pipeline
from tyir.pipeline import run_pipeline
from tyir.targets.machine import load_machine

__all__ = ["check_memory", "step_bytes"]

_PAGE = 4096


def check_memory(
    dies: Sequence[Module], options: BuildOptions, source: Module, stage: str, machine_name: str | Path
) -> None:
    """`TyirError` when a die of the module (at stage `program`) needs more DRAM than it has; `source` is the
    module it was made of, at `stage`; `machine_name` is the machine's or that of its file.
    """
    machine = load_machine(machine_name)
    capacity = int(machine.dram.capacity_bytes)
    worst = max(dies, key=lambda die: _die_bytes(die, options))
    parts = max((step_bytes(worst, s) for s in options.seqlens), key=lambda p: sum(p.values()))
    needed = sum(parts.values())
    if needed <= capacity:
        return

    if stage == "aten":  # the same for all options
        run_pipeline(source, "to-ty")
        stage = "ty"

    def need(changed: BuildOptions) -> int | None:
        pipeline = remaining_pipeline(stage, changed, str(machine_name), recorded(source))
        return _need(source.clone(), pipeline, changed, machine_name)

    detail = ", ".join(f"{what} {gib(size)}" for what, size in parts.items() if size >= 2**20)
    raise TyirError(
        Diagnostic(
            f"{worst.sym_name} needs {gib(needed)} of DRAM ({detail}), {machine.name} has {gib(capacity)}"
            " per die",
            help=remedy_text(cheapest_remedies(options, capacity, need)),
        )
    )


def step_bytes(die: Module, seqlen: int) -> dict[str, int]:
    """What a step of `seqlen` tokens needs of a die's DRAM, by kind.

    Each tensor lies on pages of its own; what lowering spills is not counted.
    """
    main = entry_point(die, seqlen)
    weights = {op.symbol.leaf: op.result for op in main.walk_type(GetGlobal)}
    results = main.body.terminator.operands
    aliases = [alias_of(main, i) for i in range(len(results))]
    caches = {main.args[alias] for alias in aliases if alias is not None}
    outputs = [v for v, alias in zip(results, aliases) if alias is None]
    inputs = [a for a in main.args if a not in caches]
    return {
        name: sum(map(_bytes, values))
        for name, values in (
            ("weights", weights.values()),
            ("caches", caches),
            ("inputs and outputs", [*inputs, *outputs]),
        )
    }


def _bytes(value: Value) -> int:
    return align(tensor_type(value).nbytes, _PAGE)


def _die_bytes(die: Module, options: BuildOptions) -> int:
    return max(sum(step_bytes(die, s).values()) for s in options.seqlens)


def _need(module: Module, pipeline: str, options: BuildOptions, machine_name: str | Path) -> int | None:
    """Bytes of the largest die with other options, which `pipeline` builds; when it seems to fit, the figure
    is that of its real program.
    """
    machine, search = load_machine(machine_name), Search()
    try:
        run_pipeline(module, pipeline)
        dies = [m for m in module.body if isinstance(m, Module)]
        worst = max(dies, key=lambda die: _die_bytes(die, options))
        needed = _die_bytes(worst, options)
        if needed > machine.dram.capacity_bytes:
            return needed
        lowered = (lower_die(worst, s, machine, search=search) for s in options.seqlens)
        return max(memory_summary(program)["dram"] for program in lowered)
    except TyirError:  # options that this module cannot be compiled with are no remedy
        return None
