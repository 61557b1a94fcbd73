"""How long the timing engine takes, on one core: Qwen2.5-7B's shapes on 4 dies, 4-bit weights.

    python -m tyir.tools.bench.simulator                         decode, a prefill step of 96, a prompt of 2,048, the HTML page
    python -m tyir.tools.bench.simulator --programs build/7b     the same; the programs are kept there and taken from there the next time
    python -m tyir.tools.bench.simulator --layers 2 --dies 1 --repeat 1

Seconds are processor time, the least of the repetitions, each from the beginning (a program is unrolled
again):

    read      the files of all dies, binary; and comparing the dies, of which equal ones are simulated once
    unroll    calls and loops to a list of commands, once for each die that differs
    engine    start and end of every command
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tyir.tools.bench.schedule import QWEN2_5_7B, program_module, write_sparse_checkpoint
from tyir.tools.cli import ToolParser, run_tool
from tyir.tools.tyir_compile import numbers

if TYPE_CHECKING:
    from tyir.runtime_sim.timing.program import EdgeProgram
    from tyir.targets.machine import Machine

__all__ = ["StepTime", "main", "time_step", "write_programs"]

T = TypeVar("T")


@dataclass(frozen=True)
class StepTime:
    """Seconds of processor time for one step; `commands` are those of the dies that are simulated."""

    seqlen: int
    pos: int
    commands: int
    read_s: float
    unroll_s: float
    engine_s: float
    step_ms: float

    @property
    def commands_per_s(self) -> float:
        return self.commands / (self.unroll_s + self.engine_s)


def write_programs(
    folder: Path, layers: int, dies: int, seqlens: Sequence[int], max_kv: int, machine: Machine
) -> None:
    """`s{seqlen}/llm_die{i}.bin` for Qwen2.5-7B's shapes."""
    from tyir.backends.edge10.lowering.die import lower_die
    from tyir.dialects.builtin import Module
    from tyir.edge10.binary import encode

    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = write_sparse_checkpoint({**QWEN2_5_7B, "num_hidden_layers": layers}, Path(temporary))
        module = program_module(checkpoint, dies, seqlens, max_kv, "int4", 128, "logits")
        for seqlen in seqlens:
            place = folder / f"s{seqlen}"
            place.mkdir(parents=True, exist_ok=True)
            for number, die in enumerate(die for die in module.body if isinstance(die, Module)):
                (place / f"llm_die{number}.bin").write_bytes(encode(lower_die(die, seqlen, machine)))


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def time_step(folder: Path, seqlen: int, pos: int, machine: Machine, repeat: int) -> StepTime:
    """One step, from the files of all dies to its time."""
    from tyir.runtime_sim.timing.engine import simulate
    from tyir.runtime_sim.timing.program import alike_programs

    best: StepTime | None = None
    for _ in range(repeat):
        read_s, programs = _timed(lambda: _read(folder, seqlen))
        different = [programs[group[0]] for group in alike_programs(programs)]
        unroll_s, steps = _timed(lambda: [p.expand(pos) for p in different])  # noqa: B023
        engine_s, timing = _timed(lambda: simulate(programs, machine, pos))  # noqa: B023
        found = StepTime(
            seqlen, pos, sum(map(len, steps)), read_s, unroll_s, engine_s, timing.total_ns * 1e-6
        )
        best = found if best is None else min(best, found, key=lambda s: s.read_s + s.unroll_s + s.engine_s)
    assert best is not None
    return best


def _read(folder: Path, seqlen: int) -> list[EdgeProgram]:
    from tyir.edge10.binary import read_program
    from tyir.runtime_sim.timing.program import EdgeProgram, alike_programs

    programs = [EdgeProgram(read_program(path)) for path in sorted((folder / f"s{seqlen}").glob("*.bin"))]
    alike_programs(programs)
    return programs


def _prompt_s(
    folder: Path, tokens: int, seqlens: Sequence[int], max_kv: int, machine: Machine
) -> tuple[float, float, int]:
    """Seconds for all chunks of a prompt, each simulated; its time in ms; and how many chunks."""
    from tyir.runtime_sim.session.chunks import plan_chunks
    from tyir.runtime_sim.timing.engine import simulate

    programs = {s: _read(folder, s) for s in seqlens}
    chunks = list(plan_chunks(tokens, 0, tuple(seqlens), max_kv))
    seconds, total = _timed(
        lambda: sum(simulate(programs[c.seqlen], machine, c.start).total_ns for c in chunks)
    )
    return seconds, total * 1e-6, len(chunks)


def _page_s(folder: Path, seqlens: Sequence[int], max_kv: int, machine: Machine) -> tuple[float, int]:
    """Seconds for the HTML page with everything it needs, and its size in bytes."""
    from tyir.runtime_sim.report.html import html_report
    from tyir.runtime_sim.timing.predictor import Predictor
    from tyir.runtime_sim.timing.summary import summarize

    programs = {s: _read(folder, s) for s in seqlens}

    def page() -> str:
        predictor = Predictor(lambda s: programs[s], tuple(seqlens), max_kv, machine)
        return html_report(summarize(predictor, "bench", 128, 128), predictor)

    seconds, text = _timed(page)
    return seconds, len(text)


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = _parser().parse_args(argv)
    from tyir.targets.machine import load_machine

    machine = load_machine(args.machine)
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = args.programs or Path(temporary)
        if not all((folder / f"s{s}" / f"llm_die{args.dies - 1}.bin").is_file() for s in args.seqlens):
            write_programs(folder, args.layers, args.dies, args.seqlens, args.max_kv, machine)
        steps = [time_step(folder, s, args.pos if s == 1 else 0, machine, args.repeat) for s in args.seqlens]
        prompt_s, prompt_ms, chunks = _prompt_s(folder, args.prompt, args.seqlens, args.max_kv, machine)
        page_s, page_bytes = _page_s(folder, args.seqlens, args.max_kv, machine)
    if args.json:
        print(
            json.dumps(
                {"steps": [asdict(s) for s in steps], "prompt_s": prompt_s, "page_s": page_s}, indent=1
            )
        )
        return 0
    print(
        f"{args.dies} dies, {args.layers}"
        f" layers\n{'tokens':>7}{'at':>6}{'step ms':>10}{'commands':>10}{'read s':>8}{'unroll s':>10}{'engine s':>10}{'commands/s':>12}"  # noqa: E501
    )
    for s in steps:
        print(
            f"{s.seqlen:>7}{s.pos:>6}{s.step_ms:>10.3f}{s.commands:>10}{s.read_s:>8.3f}{s.unroll_s:>10.3f}{s.engine_s:>10.3f}{s.commands_per_s:>12,.0f}"
        )
    print(
        f"a prompt of {args.prompt}: {prompt_ms:.1f} ms on the device, all {chunks} chunks simulated in"
        f" {prompt_s:.2f} s"
    )
    print(f"the HTML page ({page_bytes / 1e6:.2f} MB): {page_s:.2f} s")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(prog="bench_simulator", description="Time the timing engine on Qwen2.5-7B's shapes.")
    parser.add_argument(
        "--programs",
        type=Path,
        metavar="DIR",
        help="where the compiled programs are kept (default: made anew)",
    )
    parser.add_argument("--layers", type=int, default=28, metavar="N", help="decoder layers (default 28)")
    parser.add_argument("--dies", type=int, default=4, metavar="N", help="number of dies (default 4)")
    parser.add_argument(
        "--seqlens", type=numbers, default=(1, 96), metavar="N,N", help="tokens per step (default 1,96)"
    )
    parser.add_argument(
        "--pos",
        type=int,
        default=128,
        metavar="N",
        help="cached tokens of a step of one token; longer ones start at 0 (default 128)",
    )
    parser.add_argument(
        "--prompt", type=int, default=2048, metavar="N", help="tokens of the prompt (default 2048)"
    )
    parser.add_argument(
        "--max-kv", type=int, default=4096, metavar="N", help="positions of the cache (default 4096)"
    )
    parser.add_argument(
        "--machine", default="edge10", metavar="NAME|FILE", help="machine file (default edge10)"
    )
    parser.add_argument(
        "--repeat",
        type=int,
        default=5,
        metavar="N",
        help="repetitions of a step, the least counts (default 5)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
