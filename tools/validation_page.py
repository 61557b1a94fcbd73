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
* *Roofline*: the larger of operations at peak and bytes at nominal bandwidth.
* *Affine*: the best `t0 + bytes / bandwidth + operations / rate` for that kind, fitted on the very rows it is judged on.
* *M*: rows of a product, keys of an attention, rows of a norm, bytes of an all-reduce.  *Narrow*: a side of the weights is under 512; no language model has such.

The models are analytic (tiles, waves, bytes, launches: `runtime_sim/kernels`).  They share the form of the machine file and the quantities with the event-driven
engine that runs Edge10 programs, not its event core: what a library kernel does inside is not known command by command.
Whole models are sums of these kernels by the recipe in `runtime_sim/kernels/steps.py`; nothing is fitted on them.

Data: H200 measured for this project (`tests/data/h200`); A100 by ai-dynamo/aiconfigurator (Apache-2.0) and LLMCompass (BSD-3-Clause); Jetson AGX Orin by
LLMCompassPlus (BSD-3-Clause).
"""

_WEAK: Final = """
## What is weak, and why

* **Which kernel a library picks is not public.** The models search tiles for the least time; a library's heuristic often does not take it.  On the A100, M = 1024
  against 4096 x 4096 weights takes 204 us and M = 768 takes 104 us: 256 x 128 tiles in two waves, where 128 x 128 tiles would be faster.  That is the tail of the bf16 rows.
* **A100 W4A16 at few rows** is measured with a timer tick of 1.024 us, and times jump: M = 2 differs from the geometric mean of M = 1 and M = 4 by 14 % on average
  (6 % in bf16).  No smooth model can be under about 10 % there; from 512 rows on the error is that of bf16.
* **A100 decode attention** misses its target of 8 %.  Kernels with unpublished geometry take turns by the size of the group, and rows with shared keys move up to
  3.3 TB/s of cache on a 2.0 TB/s memory, so the measured caches must share blocks; `attention.grouped_read_share` = 0.5 stands for that and, like `max_group` and the owners'
  start-up times, was read off a few rows of the data.
* **A100 all-reduce by LLMCompass** (another library version, 4 devices) lies far above NCCL's own latency table between 64 KB and 4 MB.
* **Elementwise kernels of the H200**: silu * mul of 18944 columns runs at 1.7 TB/s and of 8960 columns at 4.0 TB/s; one bandwidth cannot hold both.
  Prefill of models with small layers is predicted a few per cent too fast for the same reason.
* **H200 long products** run at the power limit: the window after which the clock drops is a constant of the measurement as much as of the machine.
* **Assumed constants** were chosen before fitting but with the data at hand (tile lists, split rules, `step_ns`, `operand_rows`): they are not counted as fitted, and a machine
  nobody measured would not have them confirmed.
"""


def markdown(found: Mapping[str, Sequence[Line]], machines: Mapping[str, Accelerator]) -> str:
    """The page: tables, then the fitted constants."""
    parts = [_HEAD]
    for name, lines in found.items():
        parts.append(
            f"## {name}\n\n| kind | M | n | MAPE | median | p90 | max | bias | held out | roofline | affine |\n| --- "
            + "| ---: " * 10
            + "|"
        )
        for x in lines:
            kind = f"**{x.kind}**" if x.bucket == "all" else ""
            unseen = "" if x.held_out is None else f"{x.held_out:.1f}"
            parts.append(
                f"| {kind} | {x.bucket} | {x.count} | {x.mape:.1f} | {x.median:.1f} | {x.p90:.1f} | {x.max:.0f} | {x.bias:+.1f} | {unseen} | {x.roofline:.1f} | {x.affine:.1f} |"
            )
        fitted = [f"| `{n}` | {c.value:.4g} | {c.source} |" for n, c in machines[name].fitted.items()]
        parts.append("\n".join(["", "| fitted constant | value | fitted on |", "| --- | ---: | --- |", *fitted, ""]))
    return "\n".join([*parts, _WEAK])
