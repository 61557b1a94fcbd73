"""The HTML report: one self-contained page (no scripts, no external resources) with the figures, the timeline, the roofline and the cost of each layer.

Charts are inline SVG drawn here; every mark has a `<title>`, which browsers show as a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

from tyir.dialects import edge10
from tyir.runtime_sim.engine import Record, Timing
from tyir.runtime_sim.report import LayerCost, OpCost
from tyir.targets.machine import Machine

__all__ = ["HtmlData", "html_report"]

_WIDTH: Final = 1060
_COLORS: Final = {
    "ewdma": "#1f6f8b", "eidma": "#3a9ab5", "ebdma": "#7cc0d0", "eodma": "#a06cb5", "dequant": "#c98a1b", "cube": "#2e8b57", "drain": "#8fbf73",
    "vector": "#c0504d", "d2d": "#5b5ea6", "dram": "#1f6f8b",
}  # fmt: skip
_STYLE: Final = """
body{font:14px/1.45 system-ui,sans-serif;color:#222;background:#fff;max-width:1100px;margin:24px auto;padding:0 20px}
h1{font-size:22px;margin:0 0 4px}h2{font-size:17px;margin:30px 0 6px;border-bottom:1px solid #ddd;padding-bottom:3px}p{margin:4px 0 8px;color:#444}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:3px 12px 3px 0;text-align:right;border-bottom:1px solid #eee}
td:first-child,th:first-child,td.l,th.l{text-align:left}th{color:#555;font-weight:600}.note{color:#8a4b00;background:#fff6e5;padding:6px 10px;border-radius:4px}
svg{display:block;font:12px system-ui,sans-serif}svg text{fill:#333}.key span{display:inline-block;margin-right:14px}.key i{display:inline-block;width:11px;height:11px;
margin-right:5px;border-radius:2px}
"""


@dataclass(frozen=True)
class HtmlData:
    """What the page shows: tyir-sim's summary, the decode step (and its ops and layers), and curves of (tokens, fast, point, slow) in ms."""

    summary: dict[str, Any]
    machine: Machine
    step: Timing
    ops: Sequence[OpCost]
    layers: Sequence[LayerCost]
    ttft: Sequence[tuple[int, float, float, float]]
    tpot: Sequence[tuple[int, float, float, float]]


def html_report(data: HtmlData) -> str:
    """The page's text."""
    s = data.summary
    title = f"{s['artifacts']} on {s['dies']} x {s['machine']}"
    note = (
        "calibrated"
        if s["calibrated"]
        else f"Uncalibrated: {len(s['assumed_constants'])} constants of the machine file are assumed. Intervals hold all of them at their faster and slower bounds."
    )
    parts = [
        f"<h1>{escape(title)}</h1><p>Simulated device time plus {s['host_ms_per_step']:g} ms of host time a step.</p><p class='note'>{escape(note)}</p>",
        "<h2>Speed</h2>", _speed(s), "<h2>Time to first token by prompt length, time per token by position</h2>",
        f"<div style='display:flex;gap:20px'>{_curve(data.ttft, 'prompt tokens', 'TTFT (ms)')}{_curve(data.tpot, 'position', 'TPOT (ms)')}</div>",
        "<p>Line: the machine file as it is; band: all assumed constants at their bounds.</p>",
        f"<h2>Utilisation in one step of {data.step.seqlen} at position {data.step.pos}: {data.step.total_ns * 1e-6:.3f} ms, bound by {data.step.bound_by}</h2>",
        _bars(s["step"]["unit_shares"]), "<h2>Timeline, die 0</h2>", _key(edge10.UNITS), _timeline(data.step),
        "<p>Whole step above (the darker, the busier), its busiest hundredth below; a transfer is shown while its data moves.</p>", "<h2>Time by layer</h2>", _layers(data.layers),
        "<h2>Roofline</h2>", _roofline(data.ops, data.machine), "<p>One dot per op of the model, area by time; hover for its name.</p>", "<h2>Ops</h2>", _ops(data.ops),
    ]  # fmt: skip
    return f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title><style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"


def _speed(s: dict[str, Any]) -> str:
    rows = (
        (f"TTFT, {s['prompt_tokens']} tokens (ms)", "ttft_ms"), (f"TPOT at position {s['pos']} (ms)", "tpot_ms"), ("prefill (tokens/s)", "prefill_tokens_per_s"),
        ("decode (tokens/s)", "decode_tokens_per_s"),
    )  # fmt: skip
    body = "".join(
        f"<tr><td>{escape(n)}</td>" + "".join(f"<td>{_number(s[k][c])}</td>" for c in ("fast", "point", "slow")) + "</tr>" for n, k in rows
    )
    return f"<table><tr><th></th><th>fast</th><th>point</th><th>slow</th></tr>{body}</table>"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _svg(width: float, height: float, body: Iterable[str]) -> str:
    return f"<svg width='{width:g}' height='{height:g}' viewBox='0 0 {width:g} {height:g}'>{''.join(body)}</svg>"


def _rect(x: float, y: float, w: float, h: float, color: str, title: str = "") -> str:
    tip = f"<title>{escape(title)}</title>" if title else ""
    return f"<rect x='{x:.2f}' y='{y:.2f}' width='{max(w, 0.3):.2f}' height='{h:.2f}' fill='{color}'>{tip}</rect>"


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'>{escape(text)}</text>"


def _key(names: Iterable[str]) -> str:
    return "<p class='key'>" + "".join(f"<span><i style='background:{_COLORS[n]}'></i>{n}</span>" for n in names) + "</p>"


def _curve(points: Sequence[tuple[int, float, float, float]], x_label: str, y_label: str) -> str:
    """A line with its band; both axes from zero."""
    width, height, left, bottom = 520, 250, 62, 40
    most_x, most_y = max(p[0] for p in points) or 1, max(p[3] for p in points) * 1.05

    def at(x: float, y: float) -> str:
        return f"{left + x / most_x * (width - left - 20):.1f},{(height - bottom - 18) * (1 - y / most_y) + 26:.1f}"

    band = " ".join([*(at(p[0], p[1]) for p in points), *(at(p[0], p[3]) for p in reversed(points))])
    body = [
        f"<polygon points='{band}' fill='#cfe3ea'/>",
        f"<polyline points='{' '.join(at(p[0], p[2]) for p in points)}' fill='none' stroke='#1f6f8b' stroke-width='2'/>",
    ]
    for i in range(5):
        x, y = at(most_x * i / 4, most_y * i / 4).split(",")
        body += [
            _text(float(x), height - 16, f"{most_x * i / 4:.0f}", "middle"),
            _text(left - 6, float(y) + 4, f"{most_y * i / 4:,.{0 if most_y > 100 else 2}f}", "end"),
        ]
        body.append(f"<line x1='{left}' x2='{width - 20}' y1='{y}' y2='{y}' stroke='#ddd'/>")
    for n, fast, point, slow in points:
        x, y = at(n, point).split(",")
        body.append(
            f"<circle cx='{x}' cy='{y}' r='3' fill='#1f6f8b'><title>{n}: {point:.4g} ms ({fast:.4g} to {slow:.4g})</title></circle>"
        )
    return _svg(width, height + 8, [*body, _text(width / 2, height + 2, x_label, "middle"), _text(4, 14, y_label)])


def _bars(shares: dict[str, float]) -> str:
    rows = []
    for number, (unit, share) in enumerate(shares.items()):
        y = number * 22
        rows += [
            _text(70, y + 14, unit, "end"),
            _rect(80, y + 3, 600, 14, "#f0f0f0"),
            _rect(80, y + 3, 600 * share, 14, _COLORS[unit], f"{unit} {100 * share:.1f} %"),
        ]
        rows.append(_text(690, y + 14, f"{100 * share:.1f} %"))
    return _svg(_WIDTH, 22 * len(shares) + 4, rows)


def _timeline(step: Timing) -> str:
    records = step.records[0]
    slices = [0] * 100
    for r in records:
        slices[min(int(r.data / step.total_ns * 100), 99)] += 1
    busiest = max(range(100), key=lambda i: slices[i])
    low = step.total_ns * busiest / 100
    whole, zoom = _densities(records, step.total_ns), _tracks(records, low, low + step.total_ns / 100, 250)
    return _svg(_WIDTH, 500, [*whole, *zoom])


def _tracks(records: Sequence[Record], low: float, high: float, top: float) -> list[str]:
    """One track per unit from `low` to `high` ns; marks that would be narrower than a pixel are joined with their neighbours."""
    left, scale = 80, (_WIDTH - 100) / (high - low)
    out = []
    for number, unit in enumerate(edge10.UNITS):
        y = top + number * 23
        out += [_text(left - 8, y + 14, unit, "end"), _rect(left, y + 2, _WIDTH - 100, 17, "#f4f4f4")]
        start = end = -1.0
        name = ""
        for r in sorted((r for r in records if r.command.unit == unit and r.end > low and r.data < high), key=lambda r: r.data):
            a, b = left + (max(r.data, low) - low) * scale, left + (min(r.end, high) - low) * scale
            if end >= 0 and a - end < 0.7 and (b - start < 1.5 or end - start < 1.5):
                end, name = max(end, b), f"{unit}: several commands"
                continue
            if end >= 0:
                out.append(_rect(start, y + 2, end - start, 17, _COLORS[unit], name))
            start, end, name = a, b, f"{unit}: {r.command.path or r.command.op.name}, {(r.end - r.data) / 1000:.2f} us"
        if end >= 0:
            out.append(_rect(start, y + 2, end - start, 17, _COLORS[unit], name))
    return out + _times(low, high, top)


def _times(low: float, high: float, top: float) -> list[str]:
    """The time axis under the tracks."""
    y, anchors = top + len(edge10.UNITS) * 23 + 14, ("start", "middle", "middle", "middle", "end")
    return [_text(80 + (_WIDTH - 100) * i / 4, y, f"{(low + (high - low) * i / 4) / 1000:,.1f} us", anchors[i]) for i in range(5)]


def _densities(records: Sequence[Record], total: float) -> list[str]:
    """One track per unit over the whole step: the darker, the larger the part of the slice that the unit is busy."""
    left, count = 80, 240
    width, slice_ns = (_WIDTH - 100) / count, total / count
    out = []
    for number, unit in enumerate(edge10.UNITS):
        y = number * 23
        out += [_text(left - 8, y + 14, unit, "end"), _rect(left, y + 2, _WIDTH - 100, 17, "#f4f4f4")]
        busy = [0.0] * count
        for r in (r for r in records if r.command.unit == unit):
            for i in range(int(r.data / slice_ns), min(int(r.end / slice_ns), count - 1) + 1):
                busy[i] += max(0.0, min(r.end, (i + 1) * slice_ns) - max(r.data, i * slice_ns))
        for i, ns in enumerate(busy):
            if share := min(ns / slice_ns, 1.0):
                tip = f"<title>{unit}: {100 * share:.0f} % busy at {i * slice_ns / 1000:,.0f} us</title>"
                out.append(
                    f"<rect x='{left + i * width:.2f}' y='{y + 2}' width='{width:.2f}' height='17' fill='{_COLORS[unit]}' fill-opacity='{share:.2f}'>{tip}</rect>"
                )
    return out + _times(0, total, 0)


def _layers(layers: Sequence[LayerCost]) -> str:
    most = max(c.time_ns for c in layers) or 1.0
    width = (_WIDTH - 100) / len(layers)
    body = []
    for number, c in enumerate(layers):
        h = 150 * c.time_ns / most
        label = "rest" if c.layer < 0 else str(c.layer)
        body.append(
            _rect(
                80 + number * width + 1,
                160 - h,
                width - 2,
                h,
                _COLORS[c.bound_by],
                f"layer {label}: {c.time_ns / 1000:.1f} us, bound by {c.bound_by}",
            )
        )
        if width > 18 or number % 4 == 0:
            body.append(_text(80 + (number + 0.5) * width, 176, label, "middle"))
    body += [_text(74, 16, f"{most / 1000:.1f} us", "end"), _text(74, 160, "0", "end")]
    return (
        _key(dict.fromkeys(c.bound_by for c in layers))
        + _svg(_WIDTH, 184, body)
        + "<p>Colour: the unit that bounds the layer; rest: embedding, norm and head.</p>"
    )


def _roofline(ops: Sequence[OpCost], machine: Machine) -> str:
    """GMAC/s over MAC per byte of DRAM, both logarithmic."""
    peak, bandwidth = machine.macs_per_cycle_fp16 / machine.cycle_ns, machine.dram_bytes_per_ns
    dots = [o for o in ops if o.macs and o.dram_bytes and o.time_ns]
    xs = [o.macs / o.dram_bytes for o in dots] + [0.1, peak / bandwidth * 10]
    ys = [o.macs / o.time_ns for o in dots] + [peak * 2, bandwidth * min(xs)]
    x0, x1, y0, y1 = math.log10(min(xs)) - 0.1, math.log10(max(xs)) + 0.1, math.log10(min(ys)) - 0.2, math.log10(max(ys)) + 0.1
    left, width, height = 80, 760, 320

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (math.log10(x) - x0) / (x1 - x0) * (width - left), (height - 40) * (1 - (math.log10(y) - y0) / (y1 - y0)) + 10

    start, ridge, end = at(10**x0, bandwidth * 10**x0), at(peak / bandwidth, peak), at(10**x1, peak)
    body = [
        f"<polyline points='{' '.join(f'{x:.1f},{y:.1f}' for x, y in (start, ridge, end))}' fill='none' stroke='#555' stroke-width='2'/>"
    ]
    for exponent in range(math.ceil(y0), math.floor(y1) + 1):
        y = at(10**x0, 10.0**exponent)[1]
        body += [
            f"<line x1='{left}' x2='{width}' y1='{y:.1f}' y2='{y:.1f}' stroke='#eee'/>",
            _text(left - 6, y + 4, f"{10.0**exponent:g}", "end"),
        ]
    for exponent in range(math.ceil(x0), math.floor(x1) + 1):
        body.append(_text(at(10.0**exponent, 10**y0)[0], height - 14, f"{10.0**exponent:g}", "middle"))
    total = sum(o.time_ns for o in ops) or 1.0
    for o in dots:
        x, y = at(o.macs / o.dram_bytes, o.macs / o.time_ns)
        tip = f"{o.path or o.source}: {o.macs / o.time_ns:.1f} GMAC/s, {o.macs / o.dram_bytes:.2f} MAC/byte, {100 * o.time_ns / total:.1f} % of the step, bound by {o.bound_by}"
        body.append(
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{4 + 14 * math.sqrt(o.time_ns / total):.1f}' fill='{_COLORS[o.bound_by]}' fill-opacity='.6'><title>{escape(tip)}</title></circle>"
        )
    body += [
        _text(end[0] - 4, end[1] - 6, f"cubes {peak:.0f} GMAC/s", "end"), _text(ridge[0] - 150, (start[1] + ridge[1]) / 2 - 12, f"DRAM {bandwidth:.1f} GB/s", "middle"),
        _text(width / 2, height, "MAC per byte of DRAM", "middle"), _text(4, 14, "GMAC/s"),
    ]  # fmt: skip
    return _svg(width + 20, height + 6, body)


def _ops(ops: Sequence[OpCost]) -> str:
    total = sum(o.time_ns for o in ops) or 1.0
    rows = "".join(
        f"<tr><td>{escape(o.source)}</td><td class='l'>{escape(o.path)}</td><td>{o.calls}</td><td>{o.time_ns / 1000:.2f}</td><td>{100 * o.time_ns / total:.1f} %</td>"
        f"<td>{o.dram_bytes / 1e6:.3f}</td><td>{o.macs / 1e6:.2f}</td><td class='l'>{o.bound_by}</td></tr>"
        for o in ops[:40]
    )
    return f"<table><tr><th>op</th><th class='l'>where</th><th>calls</th><th>us</th><th>share</th><th>MB</th><th>MMAC</th><th class='l'>bounded by</th></tr>{rows}</table>"
