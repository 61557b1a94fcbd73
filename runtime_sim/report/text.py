"""`tyir-sim`'s answer as text: one model, or a sweep of one constant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from tyir.runtime_sim.timing.costs import LayerCost
from tyir.runtime_sim.timing.predictor import Interval
from tyir.runtime_sim.timing.summary import PictureReport, Point, StepReport, Summary, SweepRow, TornadoRow

__all__ = ["figures", "host_line", "number", "sweep_text", "text_report"]

_ALIKE = 0.01  # layers whose times differ by less are shown on one line
_LABEL = 46


def text_report(s: Summary, top: int) -> str:
    """The whole report, the `top` most expensive ops of each step."""
    lines = [
        (
            f"{s.artifacts} on {s.dies} x {s.machine}: simulated device time, and {s.host_ms_per_step:g} ms"
            " of host time a step, which the machine file says"
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
        f"{'':<{_LABEL}}{'fast':>10}{'point':>10}{'slow':>10}",
        *(f"{label:<{_LABEL}}{_interval(value)}" for label, value in figures(s)),
        host_line(s),
    ]
    if s.ttft_by_prompt:
        heads = ("fast", "point", "slow", "of device", "tokens/s")
        lines += ["", " " * _LABEL + "".join(f"{head:>10}" for head in heads)]
        lines += [_point("TTFT (ms), prompt of", p, p.tokens) for p in s.ttft_by_prompt]
        lines += [_point("TPOT (ms), position", p, 1) for p in s.tpot_by_position]
    for step in (s.decode_step, s.prefill_step):
        if step is not None:
            head = f"one step of {step.seqlen} at position {step.pos}"
            lines += ["", *_step(step, head, top)]
    for picture in s.pictures:
        lines += ["", *_picture(picture, top)]
    if s.tornado:
        lines += ["", *_tornado(s.tornado)]
    return "\n".join(lines)


def figures(s: Summary) -> Iterator[tuple[str, Interval]]:
    """What is told first: each time and rate, then the device's part of it.

    A label says every length that its figure depends on: figures of one label may be compared.
    """
    steps = "" if s.decode_step.seqlen == 1 else f", steps of {s.decode_step.seqlen}"
    yield f"TTFT, {s.prompt_tokens} tokens (ms)", s.ttft_ms
    yield f"TTFT, {s.prompt_tokens} tokens, device (ms)", s.ttft_device_ms
    yield f"TPOT at position {s.pos}{steps} (ms)", s.tpot_ms
    yield f"TPOT at position {s.pos}{steps}, device (ms)", s.tpot_device_ms
    yield f"prefill of {s.prompt_tokens} (tokens/s)", s.prefill_tokens_per_s
    yield (
        f"prefill of {s.prompt_tokens}, device (tokens/s)",
        s.ttft_device_ms.map(lambda ms: s.prompt_tokens * 1000 / ms),
    )
    yield f"decode at position {s.pos}{steps} (tokens/s)", s.decode_tokens_per_s
    yield (
        f"decode at position {s.pos}{steps}, device (tokens/s)",
        s.tpot_device_ms.map(lambda ms: 1000 / ms),
    )
    for p in s.pictures:
        yield f"tower, a picture of {p.size}, device (ms)", p.tower_ms
        if p.tables_ms.point:
            yield "rotary tables of a request with it, device (ms)", p.tables_ms
        if p.ttft_ms is not None:
            yield f"TTFT, it and {s.prompt_tokens} tokens (ms)", p.ttft_ms


def host_line(s: Summary) -> str:
    """What bounds a token, the host being counted."""
    share = f"{100 * s.decode_host_share:.0f} % of a token's time is the host's"
    if s.decode_bound_by == "host":
        return f"decode bound by host: {share}, which is assumed; the device's part is what is simulated"
    return f"decode bound by {s.decode_bound_by}: {share}"


def _interval(value: Interval) -> str:
    return "".join(f"{number(figure):>10}" for figure in (value.fast, value.point, value.slow))


def number(value: float) -> str:
    """Four digits, never an exponent."""
    return f"{value:.4g}" if value < 9999.5 else f"{value:.0f}"


def _point(label: str, p: Point, tokens: int) -> str:
    more = f"{number(p.device_ms.point):>10}{number(tokens * 1000 / p.ms.point):>10}"
    return f"{label + ' ' + str(p.tokens):<{_LABEL}}{_interval(p.ms)}{more}"


def _tornado(rows: Sequence[TornadoRow]) -> Iterator[str]:
    """The device's part first, as it is what the constants are constants of; the host's row last."""
    yield f"{'':<50}{'device (ms) at':>22}{'TPOT (ms) at':>22}"
    yield f"{'assumed constant, alone':<30}{'low':>10}{'high':>10}" + f"{'low':>11}{'high':>11}" * 2
    for r in rows:
        device = (
            f"{r.device_ms_at_low:>11.4g}{r.device_ms_at_high:>11.4g}" if r.of_device else f"{'-':>11}" * 2
        )
        ends = f"{r.tpot_ms_at_low:>11.4g}{r.tpot_ms_at_high:>11.4g}"
        yield f"{r.constant:<30}{r.low:>10g}{r.high:>10g}{device}{ends}"


def _picture(picture: PictureReport, top: int) -> Iterator[str]:
    share = 100 * picture.cube_bound_ms / picture.tower.device_ms
    dies = f"{picture.dies} die{'s' if picture.dies > 1 else ''}"
    yield from _step(picture.tower, f"the tower on {dies}, {picture.size}, {picture.tokens} tokens", top)
    yield (
        f"its products alone, dealt out evenly: {picture.cube_bound_ms:.4g} ms, {share:.0f} % of the time;"
        " what the host does with pixels is in no figure"
    )


def _step(step: StepReport, head: str, top: int) -> Iterator[str]:
    yield (
        f"{head}: {step.device_ms:.4g} ms on the device, {step.commands} commands; bound by {step.bound_by}"
    )
    yield "busy: " + ", ".join(f"{unit} {100 * share:.0f} %" for unit, share in step.units.items())
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


def sweep_text(constant: str, rows: Sequence[SweepRow], prompt: int) -> str:
    """A line for each value of one constant: all of the time, and the device's part."""
    heads = ("TTFT ms", "of device", "TPOT ms", "of device", "prefill tok/s", "decode tok/s", "of device")
    lines = [f"{constant:<30}" + "".join(f"{head:>14}" for head in heads)]
    for r in rows:
        cells = (
            r.ttft_ms,
            r.ttft_device_ms,
            r.tpot_ms,
            r.tpot_device_ms,
            prompt * 1e3 / r.ttft_ms,
            1e3 / r.tpot_ms,
            1e3 / r.tpot_device_ms,
        )
        lines.append(f"{r.value:<30g}" + "".join(f"{number(cell):>14}" for cell in cells))
    return "\n".join(lines)
