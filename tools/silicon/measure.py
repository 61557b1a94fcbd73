"""`python -m tyir.tools.silicon.measure --export FILE`: programs to run on a Hopper GPU.

As `tools/silicon/die.cu` reads them.

    nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a tools/silicon/die.cu -o die && ./die programs.bin > tests/data/h200_sm/engine.jsonl

`python -m tyir.tools.silicon.validate` compares what that measured with what the timing engine says of the
same programs.
"""  # noqa: E501

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.edge10.command_times import Transfer, Work
from tyir.edge10.vector_functions import passes_of
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.runtime_sim.timing.unroll import Step
from tyir.targets.collectives import all_reduce_phases
from tyir.targets.machine import Machine, load_machine
from tyir.tools.cli import ToolParser, run_tool
from tyir.tools.silicon.programs import MACHINE, all_programs
from tyir.types import bit_width

__all__ = ["main"]

Words = npt.NDArray[np.uint32]
_MAGIC: Final = 0x79746469
_WORDS: Final = 16
_GRAIN: Final = 16  # bytes that bulk copies are multiples of


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = _parser().parse_args(argv)
    base = load_machine(MACHINE)
    chosen = [
        p for p in all_programs().values() if not args.only or args.only in p.name or args.only == p.kind
    ]
    if not chosen:
        raise TyirError(
            f"no program is of the kind '{args.only}' or has it in its name",
            help="kinds: unit, waiting, stream, model, blind",
        )
    parts = [np.array([_MAGIC, len(chosen)], np.uint32)]
    for entry in chosen:
        machine = entry.machine(base)
        parts += _program(entry.name, entry.programs(base), machine, entry.pos)
    words = np.concatenate(parts)
    args.export.write_bytes(words.astype("<u4").tobytes())
    print(f"{len(chosen)} programs, {words.nbytes / 1e6:.1f} MB: {args.export}")
    return 0


def _program(name: str, dies: Sequence[EdgeProgram], machine: Machine, pos: int) -> list[Words]:
    text = name.encode()
    dram = max((b.address + b.nbytes for p in dies for b in p.buffers.values()), default=0)
    head = [len(text), *np.frombuffer(text.ljust(-(-len(text) // 4) * 4, b"\0"), "<u4").tolist()]
    head += [len(dies), int(machine.dma.outstanding), dram & 0xFFFFFFFF, dram >> 32]
    parts = [np.array(head, np.uint32)]
    for program in dies:
        for commands in _commands(program.expand(pos), len(dies), machine):
            parts += [np.array([len(commands)], np.uint32), commands.reshape(-1)]
    return parts


def _commands(step: Step, dies: int, machine: Machine) -> list[Words]:
    """[commands, 16] of each unit."""
    unit_of_kind = [edge10.UNITS.index(kind.unit) for kind in step.kinds]
    sizes_of_kind = [_sizes(step, kind, dies, machine) for kind in range(len(step.kinds))]
    place, counts = [0] * len(step), [0] * len(edge10.UNITS)
    rows: list[list[list[int]]] = [[] for _ in edge10.UNITS]
    units = [unit_of_kind[kind] for kind in step.kind]
    for index, unit in enumerate(units):
        counts[unit] += 1
        place[index] = counts[unit]
        needs = [0] * len(edge10.UNITS)
        for near in step.near[index]:
            dep = step.base[index] + near
            needs[units[dep]] = max(needs[units[dep]], place[dep])
        sizes = sizes_of_kind[step.kind[index]]
        address = step.addresses.get(index, (0,))[0] + sizes["offset"] if unit < 4 else 0
        address = address // _GRAIN * _GRAIN
        rows[unit].append(
            [
                *needs,
                sizes["a"],
                sizes["b"],
                sizes["c"],
                address & 0xFFFFFFFF,
                address >> 32,
                sizes["sram"],
                sizes["stride"],
            ]
        )
    return [np.array(r, np.uint32).reshape(-1, _WORDS) for r in rows]


def _sizes(step: Step, number: int, dies: int, machine: Machine) -> Mapping[str, int]:
    """The size words of a kind of command."""
    kind = step.kinds[number]
    op, cost = kind.op, kind.cost
    words = dict.fromkeys(("a", "b", "c", "sram", "stride", "offset"), 0)
    if isinstance(op, (edge10.AllReduce, edge10.AllGather)):
        assert isinstance(cost, Transfer)
        nbytes, phases, added = _exchanged(op, dies, machine)
        return {
            **words,
            "a": _grains(nbytes),
            "b": dies,
            "c": _grains(cost.nbytes),
            "sram": added,
            "stride": phases,
        }
    if isinstance(cost, Transfer):
        assert isinstance(op, (edge10.Load, edge10.Store, edge10.Gather))
        run = _grains(-(-cost.nbytes // max(cost.runs, 1)))
        stride = 8 * run if isinstance(op, edge10.Gather) else max(op.dram_strides[-1], run)
        return {
            **words,
            "a": max(run, _GRAIN),
            "b": cost.runs,
            "sram": op.sram,
            "stride": _grains(stride),
            "offset": op.offset,
        }
    return {**words, "a": _iterations(cost, machine)}


def _exchanged(op: edge10.AllReduce | edge10.AllGather, dies: int, machine: Machine) -> tuple[int, int, int]:
    """Bytes from each other die in a phase, how many phases, and iterations of adding.

    As the algorithm that `all_reduce_ns` chooses has them.
    """
    if isinstance(op, edge10.AllGather):
        return op.rows * max(op.sizes), 1, 0
    phases = all_reduce_phases(op.nbytes, op.element, dies, machine)
    nbytes = op.nbytes if phases == 1 else -(-op.nbytes // dies)
    return nbytes, phases, -(-(dies - 1) * nbytes // (bit_width(op.element) // 8) // 64)


def _iterations(work: Work, machine: Machine) -> int:
    """How often a unit's inner loop runs.

    16 x 16 x 16 products, 512 bytes of sums, 256 weights, 64 elements.
    """
    if 0 in work.sizes:
        return 0
    if work.what == "matmul":
        m, n, k = work.sizes
        return -(-m // machine.cube.rows) * -(-n // machine.cube.columns) * -(-k // machine.cube.depth_fp16)
    if work.what == "drain":
        return -(-work.sizes[0] * work.sizes[1] * 4 // 512)
    if work.what == "dequant":
        return -(-work.sizes[0] * work.sizes[1] // 256)
    if work.what in ("top_k", "top_k_capped"):
        rows, cols, _, summed = work.sizes
        softmax = passes_of("softmax" if work.what == "top_k" else "softmax_capped")
        return -(-rows * cols // 64) * passes_of(work.what) + -(-summed // 64) * softmax
    return -(-work.sizes[0] // 64) * passes_of(work.what)


def _grains(nbytes: int) -> int:
    return -(-nbytes // _GRAIN) * _GRAIN


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="tyir-measure-engine",
        description="Write the command programs that hold the timing engine against a GPU.",
    )
    parser.add_argument("--export", type=Path, required=True, metavar="FILE", help="where the programs go")
    parser.add_argument(
        "--only",
        metavar="TEXT",
        help="only programs of this kind (unit, waiting, stream, model, blind) or with this in their name",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
