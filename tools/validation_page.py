"""The performance page: the validation tables of all machines, their fitted constants, and what is weak and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from tyir.targets.accelerator import Accelerator
from tyir.tools.validation_table import Line

__all__ = ["markdown"]

_HEAD: Final = """# How far the kernel models are from machines that were measured

Written by `python -m tyir.tools.validate --markdown`; do not edit.  Errors in per cent of the measured time.

* *Held out*: the rows that no constant was fitted on (half of the kernels, by a hash of what was run, and every whole model, norm and elementwise kernel).
* *(new)*: rows that were measured after the models had been fitted, by `python -m tyir.tools.measure_gpu` on 1, 2, 4 and 8 H200 (`tests/data/h200/new_*.jsonl`).  Nothing is fitted on them.
* *(blind)*: six models that were measured when nothing was changed any more (`tests/data/h200/blind_models.jsonl`): the first prediction is the one in the table.
* *Roofline*: the larger of operations at peak and bytes at nominal bandwidth.
* *Affine*: the best `t0 + bytes / bandwidth + operations / rate` for that kind, fitted on the very rows it is judged on.
* *Floor*: what remains when our prediction of a held-out row is corrected by the errors at its six nearest measured rows: noise, and switches between kernels that no smooth model follows.
* *M*: rows of a product, keys of an attention, rows of a norm, bytes of an all-reduce.  *Narrow*: a side of the weights is under 512, as in no language model's layers;
  *of any size* is both together.

The models are analytic (tiles, waves, bytes, launches: `runtime_sim/kernels`).  Whole models are sums of these kernels by the recipe in `runtime_sim/kernels/steps.py`; nothing is
fitted on them.  `python -m tyir.tools.predict --machine h200 --model llama3-70b --devices 4 --batch 8 --past 1023` predicts a step of any dense decoder, kernel by kernel;
`--rows FILE` compares with somebody's measurements; `tests/data/h200/models.jsonl` shows the form.

Why not the event-driven engine that runs Edge10 programs: its events are commands of known units on known bytes (DMA queues, cubes, ports), and a library kernel's inside is not published.
A step on a GPU is one stream: each kernel starts when the one before has ended, so that an event queue over whole kernels adds their times, which is what `steps.py` does.
What overlaps (loads with products, blocks with blocks) does so inside a kernel, where the formulas stand for it.  Shared are the form of the machine file and its checks, the labels and
sources of constants, and the quantities.  So these tables validate the quantities and the way of modelling, not the event queue; that one is held by tests worked out by hand.

Data: H200 measured for this project (`tests/data/h200`); A100 by ai-dynamo/aiconfigurator (Apache-2.0) and LLMCompass (BSD-3-Clause); Jetson AGX Orin by
LLMCompassPlus (BSD-3-Clause).
"""

_WEAK: Final = """
## What is weak, and why

* **Rows measured afresh, and how blind they were.** The models as fitted before were held against them first, unchanged: decode 1.5 % and prefill 2.2 % on one H200 (seven models, five of them
  new), but 4.6 % and 8.0 % on two and four, 5.5 % and 15 % on eight and llama3-70b on two; products of new shapes 9.9 %, all-reduce of four and eight devices 21 and 28 %.  What was wrong was found
  at kernels and mended by mechanism (ring primitives, few blocks bound by their own bytes, the price of a split k, kernels compiled for any width): the tables above are after that, so for those
  mechanisms the rows are no longer blind; no constant is fitted on them, a few are read off them and say so in `tyir/targets/h200.toml`.
  The *(blind)* rows were measured last: qwen2.5-3b, phi3-mini (no shared keys, heads of 96) and llama3.2-1b (heads of 64) on one device (phi3-mini on two as well), mistral-nemo-12b on one, two and four,
  qwen2.5-14b and qwen2.5-72b on four.
* **Eight devices**: prefill is predicted about 7 % too slow, more the larger the share of all-reduce in the step: the model keeps the power-limited clock, and a device that waits for
  its links a third of the time seems to run above it.  Isolated all-reduces of 16 to 64 KiB take 33 us on eight devices
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
* **A100 all-reduce by LLMCompass** (another library version, 4 devices) lies far above NCCL's own latency table between 64 KB and 4 MB.
* **H200 long products** run at the power limit: the window after which the clock drops is a constant of the measurement as much as of the machine.
* **Assumed and derived constants** were chosen with the data at hand (tile lists, split rules, `step_ns`, `operand_rows`, starts of waves in decode): they are not counted as fitted, and a
  machine nobody measured would not have them confirmed.  `h100.toml` is such a machine: the H200 with other memory.
"""


def markdown(found: Mapping[str, Sequence[Line]], machines: Mapping[str, Accelerator]) -> str:
    """The page: tables, then the fitted constants."""
    parts = [_HEAD]
    for name, lines in found.items():
        parts.append(
            f"## {name}\n\n| kind | M | n | MAPE | median | p90 | max | bias | held out | roofline | affine | floor |\n| --- "
            + "| ---: " * 11
            + "|"
        )
        for x in lines:
            kind = f"**{x.kind}**" if x.bucket == "all" else ""
            unseen, floor = ("" if value is None else f"{value:.1f}" for value in (x.held_out, x.floor))
            parts.append(
                f"| {kind} | {x.bucket} | {x.count} | {x.mape:.1f} | {x.median:.1f} | {x.p90:.1f} | {x.max:.0f} | {x.bias:+.1f} | {unseen} | {x.roofline:.1f} | {x.affine:.1f} | {floor} |"
            )
        fitted = [f"| `{n}` | {c.value:.4g} | {c.source} |" for n, c in machines[name].fitted.items()]
        parts.append("\n".join(["", "| fitted constant | value | fitted on |", "| --- | ---: | --- |", *fitted, ""]))
    return "\n".join([*parts, _WEAK])
