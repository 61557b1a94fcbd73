"""`tyir-sim`'s answer as text: one model, two models side by side, a sweep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from tyir.runtime_sim.timing.costs import LayerCost
from tyir.runtime_sim.timing.predictor import Interval
from tyir.runtime_sim.timing.summary import Point, StepReport, Summary, SweepRow

__all__ = ["compare_text", "sweep_text", "text_report"]

_ALIKE = 0.01  # layers whose times differ by less are shown on one line


def text_report(s: Summary, top: int) -> str:
    """The whole report, the `top` most expensive ops of each step."""
    lines = [
        (
            f"{s.artifacts} on {s.dies} x {s.machine} (simulated device time plus {s.host_ms_per_step:g} ms"
            " of host time a step)"
        ),
        (
            "calibrated"
            if s.calibrated
            else (
                f"uncalibrated: {len(s.assumed_constants)} constants are assumed; intervals are their bounds,"
                " all together"
            )
        ),
    ]
    if s.overrides:
        lines.append("changed: " + ", ".join(f"{name} = {value:g}" for name, value in s.overrides.items()))
    lines += [
        "",
        f"{'':<34}{'fast':>10}{'point':>10}{'slow':>10}",
        *(f"{label:<34}{_interval(value)}" for label, value in _figures(s)),
    ]
    if s.ttft_by_prompt:
        lines += ["", f"{'':<34}{'fast':>10}{'point':>10}{'slow':>10}{'tokens/s':>10}"]
        lines += [_point("TTFT (ms), prompt of", p, p.tokens) for p in s.ttft_by_prompt]
        lines += [_point("TPOT (ms), position", p, 1) for p in s.tpot_by_position]
    for step in (s.decode_step, s.prefill_step):
        if step is not None:
            lines += ["", *_step(step, top)]
    if s.tornado:
        lines += ["", f"{'assumed constant, alone':<30}{'low':>10}{'high':>10}{'TPOT (ms)':>22}"]
        lines += [
            f"{t.constant:<30}{t.low:>10g}{t.high:>10g}{t.tpot_ms_at_low:>11.4g}{t.tpot_ms_at_high:>11.4g}"
            for t in s.tornado
        ]
    return "\n".join(lines)


def _figures(s: Summary) -> tuple[tuple[str, Interval], ...]:
    return (
        (f"TTFT, {s.prompt_tokens} tokens (ms)", s.ttft_ms),
        (f"TPOT at position {s.pos} (ms)", s.tpot_ms),
        ("prefill (tokens/s)", s.prefill_tokens_per_s),
        ("decode (tokens/s)", s.decode_tokens_per_s),
    )


def _interval(value: Interval) -> str:
    return "".join(f"{_number(figure):>10}" for figure in (value.fast, value.point, value.slow))


def _number(value: float) -> str:
    """Four digits, never an exponent."""
    return f"{value:.4g}" if value < 9999.5 else f"{value:.0f}"


def _point(label: str, p: Point, tokens: int) -> str:
    return f"{label + ' ' + str(p.tokens):<34}{_interval(p.ms)}{_number(tokens * 1000 / p.ms.point):>10}"


def _step(step: StepReport, top: int) -> Iterator[str]:
    yield (
        f"one step of {step.seqlen} at position {step.pos}: {step.device_ms:.4g} ms on the device,"
        f" {step.commands} commands; bound by {step.bound_by}"
    )
    yield "busy: " + ", ".join(f"{unit} {100 * share:.0f} %" for unit, share in step.unit_shares.items())
    yield f"DRAM: {max(step.dram_bytes) / 1e6:.2f} MB a die, {max(step.dram_gbps):.1f} GB/s over the step"
    yield from _collectives(step)
    yield "layers: " + "; ".join(_layers(step.layers))
    yield f"{'op':<22}{'where':<44}{'calls':>6}{'us':>10}{'share':>8}{'MB':>9}{'MMAC':>9}  bounded by"
    total = sum(o.time_ns for o in step.ops) or 1.0
    for o in step.ops[:top]:
        yield (
            f"{o.source:<22}{o.path[-43:]:<44}{o.calls:>6}{o.time_ns / 1e3:>10.2f}{100 * o.time_ns / total:>7.1f}%{o.dram_bytes / 1e6:>9.3f}{o.macs / 1e6:>9.2f}"  # noqa: E501
            f"  {o.bound_by}"
        )
    if len(step.ops) > top:
        rest = sum(o.time_ns for o in step.ops[top:])
        yield f"... and {len(step.ops) - top} more with {100 * rest / total:.1f} % of the time"


def _collectives(step: StepReport) -> Iterator[str]:
    c = step.collectives
    if not c.count:
        return
    least = (
        ""
        if c.least_count is None
        else f"; with everything split the closed form is {c.least_count} with {c.least_bytes:,} bytes"
    )
    yield (
        f"collectives: {c.count} with {c.nbytes:,} bytes; of them {c.sums} sums with {c.sum_bytes:,}"
        f" bytes{least}"
    )
    for item in c.items:
        yield f"  {item.count} x {item.what} of {item.nbytes:,} bytes  {item.path}"


def _layers(layers: Sequence[LayerCost]) -> Iterator[str]:
    """Neighbours that are alike together: "0-26: 1.95 ms each, bounded by dram"."""

    def alike(cost: LayerCost) -> tuple[str, int]:
        return cost.bound_by, round(cost.time_ns / (most * _ALIKE))

    most = max(c.time_ns for c in layers) or 1.0
    for (bound_by, _), group in groupby(layers, alike):
        costs = list(group)
        first, last = costs[0].layer, costs[-1].layer
        where = "outside" if first < 0 else str(first) if first == last else f"{first}-{last}"
        mean = sum(c.time_ns for c in costs) / len(costs)
        yield f"{where}: {mean / 1e6:.4g} ms{' each' if len(costs) > 1 else ''}, bounded by {bound_by}"


def compare_text(a: Summary, b: Summary, top: int) -> str:
    """Two models side by side: the figures, what is busy, and the most expensive ops.

    `top` says how many ops of the decode step.
    """
    lines = [f"{name} = {s.artifacts}, {s.dies} x {s.machine}" for name, s in (("a", a), ("b", b))]
    lines += ["", f"{'':<34}{'a':>12}{'b':>12}{'b / a':>9}"]
    for (label, left), (other, right) in zip(_figures(a), _figures(b)):
        label = label if label == other else f"{label.partition(',')[0]} ({other.rpartition('(')[2]}"
        lines.append(
            f"{label:<34}{_number(left.point):>12}{_number(right.point):>12}{_ratio(left.point, right.point)}"
        )
    steps = (a.decode_step, b.decode_step)
    lines.append(f"{'decode bound by':<34}{steps[0].bound_by:>12}{steps[1].bound_by:>12}")
    for unit in steps[0].unit_shares:
        lines.append(
            f"{unit + ' busy (%)':<34}" + "".join(f"{100 * s.unit_shares[unit]:>12.1f}" for s in steps)
        )
    for what, values in (
        ("DRAM (MB a die and step)", [max(s.dram_bytes) / 1e6 for s in steps]),
        ("collectives a step", [float(s.collectives.count) for s in steps]),
        ("collective bytes a step", [float(s.collectives.nbytes) for s in steps]),
    ):
        lines.append(f"{what:<34}{values[0]:>12.6g}{values[1]:>12.6g}{_ratio(*values)}")
    times = [{(o.source, o.path): o.time_ns / 1000 for o in s.ops} for s in steps]
    lines += ["", f"{'op (us of the decode step)':<66}{'a':>12}{'b':>12}{'b / a':>9}"]
    for op in sorted(set(times[0]) | set(times[1]), key=lambda k: -max(t.get(k, 0.0) for t in times))[:top]:
        cells = "".join(f"{t[op]:>12.2f}" if op in t else f"{'-':>12}" for t in times)
        lines.append(
            f"{op[0]:<22}{op[1][-43:]:<44}{cells}"
            + (_ratio(times[0][op], times[1][op]) if all(op in t for t in times) else "")
        )
    return "\n".join(lines)


def _ratio(a: float, b: float) -> str:
    return f"{b / a:>9.3f}" if a else f"{'-':>9}"


def sweep_text(constant: str, rows: Sequence[SweepRow], prompt: int) -> str:
    """A line for each value of one constant."""
    lines = [f"{constant:<30}{'TTFT ms':>12}{'TPOT ms':>12}{'prefill tok/s':>15}{'decode tok/s':>14}"]
    lines += [
        f"{r.value:<30g}{r.ttft_ms:>12.4g}{r.tpot_ms:>12.4g}{_number(prompt * 1e3 / r.ttft_ms):>15}{_number(1e3 / r.tpot_ms):>14}"  # noqa: E501
        for r in rows
    ]
    return "\n".join(lines)
