"""How close the compiled schedule comes to what the machine file allows.

And how long it takes to compile and simulate.

    python -m tyir.tools.bench.schedule                                    Qwen2.5-7B's shapes, 4-bit weights in groups of 128, 1 and 4 dies
    python -m tyir.tools.bench.schedule --config DIR --weights fp16 --dies 2 --seqlens 1,96,512 --check

No weights are needed: a sparse checkpoint of the shapes is written to a temporary folder (nothing but
headers on disk) and goes through the importer, the passes and the lowering as a real one does.  Bounds,
for the busiest die:

    dram   bytes moved / (dram.bandwidth_gbps * dram.efficiency)
    cube   multiply-accumulates / (cubes * rows * columns * depth * clock)

Attained is the bound over the simulated device time of the step.  The head is part of both: at 96 tokens
the layers are bound by the cube and the head, whose weights are f16, by DRAM, so that their sum stays
below either bound however well each is scheduled.  `--output argmax` leaves out writing all logits,
`--output-rows all,last` computes the head for every row and then for one.
Seconds are processor time.
"""  # noqa: E501

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tyir.tools.cli import ToolParser, run_tool
from tyir.tools.tyir_compile import numbers

if TYPE_CHECKING:
    from tyir.dialects.builtin import Module
    from tyir.runtime_sim.timing.engine import Timing
    from tyir.targets.machine import Machine

__all__ = ["Attained", "main", "measure", "program_module", "write_sparse_checkpoint"]

# https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/config.json
QWEN2_5_7B: Final[dict[str, Any]] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}


@dataclass(frozen=True)
class Attained:
    """One step: what the schedule takes, and the bounds it is held against.

    With the processor seconds that building and simulating it took.
    """

    dies: int
    output: str
    rows: str
    seqlen: int
    pos: int
    step_ms: float
    dram_mb: float
    gmacs: float
    dram_bound_ms: float
    cube_bound_ms: float
    bound_by: str
    commands: int
    lower_s: float
    simulate_s: float
    checked_s: float | None

    @property
    def of_dram(self) -> float:
        return self.dram_bound_ms / self.step_ms

    @property
    def of_cube(self) -> float:
        return self.cube_bound_ms / self.step_ms


def write_sparse_checkpoint(config: dict[str, Any], folder: Path) -> Path:
    """A checkpoint of `config`'s model whose tensors are holes in one sparse safetensors file.

    Returns the folder.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        config_read = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config_read, trust_remote_code=False, dtype=torch.float16)
    header: dict[str, Any] = {}
    end = 0
    tied = config.get("tie_word_embeddings", False)
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        size = math.prod(tensor.shape) * 2
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def program_module(
    checkpoint: Path,
    dies: int,
    seqlens: Sequence[int],
    max_kv: int,
    weights: str,
    group_size: int,
    output: str,
    rows: str = "all",
) -> Module:
    """A checkpoint's module at stage `program`: what both code generators read."""
    from tyir.manifest import BuildOptions
    from tyir.passes.pipelines import remaining_pipeline
    from tyir.pipeline import run_pipeline
    from tyir.tools.api import load_module

    module = load_module(checkpoint)
    options = BuildOptions(
        dies=dies,
        seqlens=tuple(seqlens),
        max_kv=max_kv,
        weights=weights,
        group_size=group_size,
        output=output,
        output_rows=rows,
    )
    run_pipeline(module, remaining_pipeline("aten", options))
    return module


def measure(
    module: Module,
    seqlen: int,
    pos: int,
    machine: Machine,
    *,
    output: str = "logits",
    rows: str = "all",
    check: bool = False,
) -> Attained:
    """Lower all dies of a `program`-stage module for `seqlen` and time one step at `pos`.

    With `check`, its memory accesses are replayed too.
    """
    from tyir.backends.edge10.lowering.die import lower_die
    from tyir.backends.edge10.lowering.search import Search
    from tyir.dialects.builtin import Module as ModuleOp
    from tyir.runtime_sim.timing.engine import simulate
    from tyir.runtime_sim.timing.program import EdgeProgram

    started = time.process_time()
    search = Search()
    programs = [
        EdgeProgram(lower_die(die, seqlen, machine, search=search))
        for die in module.body
        if isinstance(die, ModuleOp)
    ]
    lowered = time.process_time()
    timing = simulate(programs, machine, pos)
    simulated = time.process_time()
    checked = None
    if check:
        from tyir.runtime_sim.execution.check_accesses import check_programs

        check_programs(programs, machine, [pos])
        checked = time.process_time() - simulated
    macs, moved = _most_macs(timing), max(timing.dram_bytes)
    return Attained(
        len(programs),
        output,
        rows,
        seqlen,
        pos,
        timing.total_ns * 1e-6,
        moved * 1e-6,
        macs * 1e-9,
        moved / machine.dram_bytes_per_ns * 1e-6,
        macs / machine.macs_per_cycle_fp16 * machine.cycle_ns * 1e-6,
        timing.bound_by,
        sum(map(len, (d.commands for d in timing.dies))),
        lowered - started,
        simulated - lowered,
        checked,
    )


def _most_macs(timing: Timing) -> int:

    return max(sum(c.op.macs(c.scalars) for c in d.commands) for d in timing.dies)


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = _parser().parse_args(argv)
    from tyir.targets.machine import load_machine

    machine = load_machine(args.machine)
    found: list[Attained] = []
    with tempfile.TemporaryDirectory() as temporary:
        config = QWEN2_5_7B if args.config is None else json.loads((args.config / "config.json").read_text())
        folder = write_sparse_checkpoint(
            {**config, **({"num_hidden_layers": args.layers} if args.layers else {})}, Path(temporary)
        )
        ways = itertools.product(args.dies, args.output.split(","), args.output_rows.split(","))
        for dies, output, rows in ways:
            module = program_module(
                folder, dies, args.seqlens, args.max_kv, args.weights, args.group_size, output, rows
            )
            for seqlen in args.seqlens:
                found.append(
                    measure(
                        module,
                        seqlen,
                        args.pos if seqlen == 1 else 0,
                        machine,
                        output=output,
                        rows=rows,
                        check=args.check,
                    )
                )
                if not args.json:
                    print(_row(found[-1]) if len(found) > 1 else f"{_HEAD}\n{_row(found[-1])}", flush=True)
    if args.json:
        print(
            json.dumps([{**asdict(r), "of_dram": r.of_dram, "of_cube": r.of_cube} for r in found], indent=1)
        )
    return 0


_HEAD: Final = (
    f"{'dies':>4}{'output':>8}{'rows':>6}{'tokens':>8}{'at':>6}{'step ms':>10}{'DRAM MB':>10}{'GMAC':>8}{'of DRAM':>9}{'of cube':>9}"  # noqa: E501
    f"  {'bound by':<9}{'commands':>9}{'lower s':>9}{'sim s':>7}{'check s':>9}"
)


def _row(r: Attained) -> str:
    return (
        f"{r.dies:>4}{r.output:>8}{r.rows:>6}{r.seqlen:>8}{r.pos:>6}{r.step_ms:>10.3f}{r.dram_mb:>10.2f}{r.gmacs:>8.2f}{100 * r.of_dram:>7.1f}"  # noqa: E501
        f" %{100 * r.of_cube:>7.1f} %  {r.bound_by:<9}{r.commands:>9}{r.lower_s:>9.2f}{r.simulate_s:>7.2f}"
        + (f"{r.checked_s:>9.2f}" if r.checked_s is not None else f"{'-':>9}")
    )


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="bench_schedule",
        description="Hold the compiled schedule against the DRAM and cube bounds of the machine file.",
    )
    parser.add_argument(
        "--config", type=Path, metavar="DIR", help="folder with a config.json (default: Qwen2.5-7B's shapes)"
    )
    parser.add_argument(
        "--layers", type=int, default=0, metavar="N", help="other number of layers than the config's"
    )
    parser.add_argument(
        "--dies", type=numbers, default=(1, 4), metavar="N,N", help="numbers of dies (default 1,4)"
    )
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
        "--max-kv", type=int, default=2048, metavar="N", help="positions of the cache (default 2048)"
    )
    parser.add_argument(
        "--weights",
        choices=("fp16", "int4"),
        default="int4",
        help="decoder weights (default int4; the head stays fp16)",
    )
    parser.add_argument(
        "--group-size", type=int, default=128, metavar="N", help="input channels per scale (default 128)"
    )
    parser.add_argument(
        "--output",
        default="logits,argmax",
        metavar="KIND,KIND",
        help="logits, argmax or topk=K, one after the other (default logits,argmax)",
    )
    parser.add_argument(
        "--output-rows",
        default="all",
        metavar="ROWS,ROWS",
        help="all, last, or both: of which tokens a step returns it (default all)",
    )
    parser.add_argument(
        "--machine", default="edge10", metavar="NAME|FILE", help="machine file (default edge10)"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="replay every command's memory accesses: bounds, unwritten bytes, races",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
