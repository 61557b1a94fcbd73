"""The performance page: the validation tables of all machines, their fitted constants, and what is weak and
why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from tyir.runtime_sim.gpu.accelerator import Accelerator
from tyir.tools.gpu.validation_table import Line

__all__ = ["markdown"]

_HEAD: Final = """# How far the simulator is from machines that were measured

Written by `python -m tyir.tools.gpu.validate --markdown`; do not edit.  Errors in per cent of the measured time.

* *Held out*: the rows that no constant was fitted on (half of the kernels, by a hash of what was run, and every whole model, norm and elementwise kernel).
* *(new)*: rows that were measured after the models had been fitted, by `python -m tyir.tools.gpu.measure` on 1, 2, 4 and 8 H200 (`tests/data/h200/new_*.jsonl`).  Nothing is fitted on them.
* *(blind)*: six models that were measured when nothing was changed any more (`tests/data/h200/blind_models.jsonl`): the first prediction is the one in the table.
* *(repeat)*: other hosts' H200 once more, after that: qwen2.5-14b on one and two, llama3-8b on two, llama3.2-3b.
* *Roofline*: the larger of operations at peak and bytes at nominal bandwidth.
* *Affine*: the best `t0 + bytes / bandwidth + operations / rate` for that kind, fitted on the very rows it is judged on.
* *Floor*: what remains when our prediction of a held-out row is corrected by the errors at its six nearest measured rows: noise, and switches between kernels that no smooth model follows.
* *M*: rows of a product, keys of an attention, rows of a norm, bytes of an all-reduce.  *Narrow*: a side of the weights is under 512, as in no language model's layers;
  *of any size* is both together.

Two things are held against measurements here.  The *timing engine*, which runs the command programs that the compiler writes, against a multiprocessor of a GPU that executes the same programs
(next section).  And *kernel models*, which stand for the libraries' kernels of GPUs: their inner programs are not published, so that there is nothing for an engine of commands to run.

The kernel models are analytic (tiles, waves, bytes, launches: `runtime_sim/gpu`).  Whole models are sums of these kernels by the recipe in `runtime_sim/gpu/steps.py`; nothing is
fitted on them.  `python -m tyir.tools.gpu.predict --machine h200 --model llama3-70b --devices 4 --batch 8 --past 1023` predicts a step of any dense decoder, kernel by kernel;
`--rows FILE` compares with somebody's measurements; `tests/data/h200/models.jsonl` shows the form.

A step on a GPU is one stream: each kernel starts when the one before has ended, so that an event queue over whole kernels would add their times, which is what `steps.py` does.

Data: H100 and H200 measured for this project (`tests/data/h100`, `h200`, `h100_sm`); A100 by ai-dynamo/aiconfigurator (Apache-2.0) and LLMCompass (BSD-3-Clause); Jetson AGX Orin by
LLMCompassPlus (BSD-3-Clause).
"""  # noqa: E501

_ENGINE: Final = """
## The timing engine, on silicon

`tools/silicon/die.cu` is a die made of one multiprocessor of an H100: its warps are the die's units, shared memory is the SRAM, counters are the tokens.  It executes command programs by the rules
that the engine has: units in order, tokens, four transfers of a queue in flight, one bandwidth for all queues, collectives that wait for all dies (each die is a multiprocessor of its own).
Commands do work of their size: bulk copies between global and shared memory, tensor-core products, conversions, stores, arithmetic, exchanges between blocks; what they compute is of no interest.
The programs are the compiler's own, lowered for a machine file of that multiprocessor (`tyir/targets/hopper_sm.toml`: 192 KB of SRAM, its own speeds), so that the same program is executed by
the silicon and by the engine.

* *One unit*: programs from which the machine file's figures are read off (slopes and intercepts: `python -m tyir.tools.silicon.validate --derive`).
* *Overlaps by hand*: loads, conversions, products, drains and sums through 1, 2 and 4 slots, with 1, 2 and 4 transfers in flight.
* *Compiled steps*: four models of two layers (hidden 512 to 1536), fp16 and int4, 1 to 32 tokens, positions 0 to 1500, on 1 to 8 dies.  No figure is fitted to these, nor to the overlaps.
* *Blind*: two more models (hidden 896 and 1280), 1 to 64 tokens, 8-bit caches, 1, 3 and 6 dies, measured when neither the engine nor the machine file was changed any more.

{table}

Where it is off: with one transfer in flight the engine pays all of the next one's issue after the last byte of the one before, the silicon has prepared it (+14 to +16 % in the worst programs); fp16
steps, bound by products, are 3 to 8 % too slow, since commands that follow a wait begin sooner than those that follow each other; collectives on 8 dies meet later than on 2.  Two rules came from
here (without them the compiled steps were 6 % off): a unit fetches its next command while it waits for tokens (`sync.fetch_ns`), and a transfer takes time to issue for every run of addresses (`dma.run_ns`); for Edge10 both are assumed to be hidden.
What this does not show is Edge10's own constants: those have no public source, and results for it stay intervals.

    python -m tyir.tools.silicon.measure --export programs.bin        # then build and run tools/silicon/die.cu on a Hopper GPU
    python -m tyir.tools.silicon.validate --all
"""  # noqa: E501

_WEAK: Final = """
## What is weak, and why

* **Rows measured afresh, and how blind they were.** The models as fitted before were held against them first, unchanged: decode 1.5 % and prefill 2.2 % on one H200 (seven models, five of them
  new), but 4.6 % and 8.0 % on two and four, 5.5 % and 15 % on eight and llama3-70b on two; products of new shapes 9.9 %, all-reduce of four and eight devices 21 and 28 %.  What was wrong was found
  at kernels and mended by mechanism (ring primitives, few blocks bound by their own bytes, the price of a split k, kernels compiled for any width): the tables above are after that, so for those
  mechanisms the rows are no longer blind; no constant is fitted on them, a few are read off them and say so in `runtime_sim/gpu/h200.toml`.
  The *(blind)* rows were measured last: qwen2.5-3b, phi3-mini (no shared keys, heads of 96) and llama3.2-1b (heads of 64) on one device (phi3-mini on two as well), mistral-nemo-12b on one, two and four,
  qwen2.5-14b and qwen2.5-72b on four.
* **Several devices in prefill** were 4 % (four) and 7 % (eight) too slow while the model kept the power-limited clock; a device that waits for its links a third of the time runs above it.  By the
  cube law that stands in `runtime_sim/gpu/steps.py`, which has no fitted constant but was added with these rows at hand, they are within 2 and 3 %.  Isolated all-reduces of 16 to 64 KiB take 33 us on eight devices
  where the same ones inside a step take 18, and the model says the latter.  Two hosts differ by a quarter in small all-reduces.
* **Elementwise kernels** depend on what else the process compiled: `models.jsonl` looks like kernels for any width, `new_models.jsonl` was measured with kernels for one model
  (`predict --one-model`).  The recipe of `models.jsonl` is known as a list of kernels only; the rows measured afresh repeat its decode steps within 0 to 4 % and its prefill steps within 2 to 12 %.
* **Which kernel a library picks is not public.** The models search tiles for the least time; a library's heuristic often does not take it.  On the A100, M = 1024
  against 4096 x 4096 weights takes 204 us and M = 768 takes 104 us: 256 x 128 tiles in two waves, where 128 x 128 tiles would be faster.  That is the tail of the bf16 rows.
* **A100 W4A16** jumps where it was measured (4096 x 8192 at M = 64, 80, 96: 68, 261, 86 us): a correction by measured neighbours still leaves the floor in the table.
* **A100 decode attention** was measured on caches that hold no values: the collector (aiconfigurator, `collector/trtllm/collect_attn.py`) allocates keys alone (`CacheType.SELFKONLY`), which are then
  read as values too, and replays one call.  So up to 3.3 TB/s seem to come from a memory of 2.0.  The model follows the bytes: values that the L2 still holds from the keys (27 MB of running heads at
  256 keys each, not 55 at 512), caches that fit it from call to call; it would predict a real cache, without these, up to twice as slow.  The rule by which TensorRT-LLM takes turns between
  a kernel for groups of heads and one for single heads is public and in the model; where a cache is split is not.
* **GPT-3 layers by LLMCompass** (4 A100, 8 sequences) are within 3 % as a whole, in prefill and in decode, where errors of the parts cancel: their small all-reduces take twice what NCCL's own
  table says.  Nothing is fitted to them; LLMCompass' own simulator is 2 and 12 % off.
* **A100 all-reduce by LLMCompass** (another library version, 4 devices) lies far above NCCL's own latency table between 64 KB and 4 MB.
* **H200 long products** run at the power limit: the window after which the clock drops is a constant of the measurement as much as of the machine.
* **Assumed and derived constants** were chosen with the data at hand (tile lists, split rules, `step_ns`, `operand_rows`, starts of waves in decode): they are not counted as fitted, and a
  machine nobody measured would not have them confirmed.  `h100.toml` was such a machine, the H200 with the memory of its data sheet, when its kernels and models were measured: products 5.6 %,
  decode and prefill attention 4.5 and 6.0 %, whole models 1.9 % in decode and 5.2 % in prefill, too slow by 4 to 9 % where the power limit rules.  The two constants of that limit were then fitted
  to its products, and the DRAM's efficiency read off: the table above.
* **Rotations** of queries and keys take 207 to 614 elements a ns depending on the number of heads, by no rule that was found; the median stands in `h200.toml`.
"""  # noqa: E501


def markdown(
    found: Mapping[str, Sequence[Line]], machines: Mapping[str, Accelerator], engine: Sequence[str] = ()
) -> str:
    """The page: the engine's table if there is one, the kernels' tables, each with its fitted constants."""
    parts = [_HEAD, *([_ENGINE.replace("{table}", "\n".join(engine))] if engine else [])]
    for name, lines in found.items():
        parts.append(
            f"## {name}\n\n| kind | M | n | MAPE | median | p90 | max | bias | held out | roofline | affine |"
            " floor |\n| --- " + "| ---: " * 11 + "|"
        )
        for x in lines:
            kind = f"**{x.kind}**" if x.bucket == "all" else ""
            unseen, floor = ("" if value is None else f"{value:.1f}" for value in (x.held_out, x.floor))
            parts.append(
                f"| {kind} | {x.bucket} | {x.count} | {x.mape:.1f} | {x.median:.1f} | {x.p90:.1f} |"
                f" {x.max:.0f} | {x.bias:+.1f} | {unseen} | {x.roofline:.1f} | {x.affine:.1f} | {floor} |"
            )
        fitted = [f"| `{n}` | {c.value:.4g} | {c.source} |" for n, c in machines[name].fitted.items()]
        parts.append(
            "\n".join(["", "| fitted constant | value | fitted on |", "| --- | ---: | --- |", *fitted, ""])
        )
    return "\n".join([*parts, _WEAK])
