"""The charts of the HTML report as inline SVG; every mark has a `<title>`, which browsers show as a tooltip.

What is narrower than a mark can be drawn is added up first, so that a page has thousands of marks whatever
the number of commands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.dialects import edge10
from tyir.runtime_sim.timing.costs import LayerCost, OpCost
from tyir.runtime_sim.timing.engine import DieTiming, Timing
from tyir.runtime_sim.timing.summary import Point, TornadoRow
from tyir.targets.machine import Machine

__all__ = [
    "COLORS",
    "curve",
    "key",
    "layer_bars",
    "layer_tracks",
    "roofline",
    "step_tracks",
    "tornado_bars",
    "unit_bars",
]

WIDTH: Final = 1060
COLORS: Final = {
    "ewdma": "#1f6f8b",
    "eidma": "#3a9ab5",
    "ebdma": "#7cc0d0",
    "eodma": "#a06cb5",
    "dequant": "#c98a1b",
    "cube": "#2e8b57",
    "drain": "#8fbf73",
    "vector": "#c0504d",
    "d2d": "#5b5ea6",
    "dram": "#1f6f8b",
}
MEANING: Final = {
    "ewdma": "weights in",
    "eidma": "features in",
    "ebdma": "scales in",
    "eodma": "out to DRAM",
    "dequant": "4 bit to f16",
    "cube": "matrix products",
    "drain": "sums out",
    "vector": "vector units",
    "d2d": "die to die",
    "dram": "any transfer",
}
_LETTER: Final = 7.5  # pixels of one at 12 px, in a wide font; bold ones are a tenth wider
_SMALL: Final = 0.9 * _LETTER  # at 11 px
_LEFT: Final = 10 + 1.1 * _LETTER * max(len(f"{unit}, {meaning}") for unit, meaning in MEANING.items())
_ROW: Final = 23
_PIXEL: Final = 0.8  # marks with a smaller gap are drawn as one
_SLICES: Final = 300

Array = npt.NDArray[Any]


def _svg(width: float, height: float, body: Iterable[str]) -> str:
    return (
        f"<svg width='{width:g}' height='{height:g}' viewBox='0 0 {width:g} {height:g}'>{''.join(body)}</svg>"
    )


def _rect(x: float, y: float, w: float, h: float, color: str, title: str = "", opacity: float = 1.0) -> str:
    tip = f"<title>{escape(title)}</title>" if title else ""
    faint = f" fill-opacity='{opacity:.2f}'" if opacity < 1 else ""
    return (
        f"<rect x='{x:.2f}' y='{y:.2f}' width='{max(w, 0.5):.2f}' height='{h:.2f}'"
        f" fill='{color}'{faint}>{tip}</rect>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", css: str = "") -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}'"
        f" text-anchor='{anchor}'{f' class={css!r}' if css else ''}>{escape(text)}</text>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, color: str = "#e4e4e4") -> str:
    return f"<line x1='{x1:.1f}' x2='{x2:.1f}' y1='{y1:.1f}' y2='{y2:.1f}' stroke='{color}'/>"


def key(names: Iterable[str]) -> str:
    """What the colours mean."""
    return (
        "<p class='key'>"
        + "".join(f"<span><i style='background:{COLORS[n]}'></i>{n} ({MEANING[n]})</span>" for n in names)
        + "</p>"
    )


# -------------------------------------------------------------------------------------------- curves and bars


def curve(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """A line with its band, and the device's part of it dashed; both axes from zero."""
    width, height, left, right, top, bottom = 520, 250, 62, 20, 26, 40
    most_x, most_y = _round_up(max(p.tokens for p in points) or 1), _round_up(max(p.ms.slow for p in points))

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x / most_x * (width - left - right), top + (height - bottom - top) * (1 - y / most_y)

    def path(pairs: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in pairs))

    band = [*((p.tokens, p.ms.fast) for p in points), *((p.tokens, p.ms.slow) for p in reversed(points))]
    body = []
    for i in range(5):
        x, y = at(most_x * i / 4, most_y * i / 4)
        body += [
            _line(left, y, width - right, y),
            _text(x, height - 18, f"{most_x * i / 4:,.0f}", "middle"),
            _text(left - 6, y + 4, f"{most_y * i / 4:,.4g}", "end"),
        ]
    body += [
        f"<polygon points='{path(band)}' fill='#1f6f8b' fill-opacity='.18'/>",
        (
            f"<polyline points='{path((p.tokens, p.ms.point) for p in points)}' fill='none' stroke='#1f6f8b'"
            " stroke-width='2'/>"
        ),
        (
            f"<polyline points='{path((p.tokens, p.device_ms.point) for p in points)}' fill='none'"
            " stroke='#1f6f8b' stroke-width='1.5' stroke-dasharray='5 4'/>"
        ),
    ]
    for p in points:
        x, y = at(p.tokens, p.ms.point)
        tip = (
            f"{p.tokens} {x_label}: {p.ms.point:.4g} ms ({p.ms.fast:.4g} to {p.ms.slow:.4g}),"
            f" {p.device_ms.point:.4g} ms of them on the device"
        )
        body.append(
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3.5' fill='#1f6f8b'><title>{escape(tip)}</title></circle>"
        )
    return _svg(
        width,
        height + 8,
        [
            *body,
            _text((left + width) / 2, height + 2, x_label, "middle"),
            _text(left, 14, y_label, css="head"),
        ],
    )


def _round_up(value: float) -> float:
    """The next number whose quarters have short names."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(
        m * power for m in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 4.8, 6, 8, 10) if m * power >= value * (1 - 1e-9)
    )


def _duration(ns: float) -> str:
    """In the unit that gives a short number."""
    return f"{ns:.4g} ns" if ns < 1e3 else f"{ns / 1e3:.4g} us" if ns < 1e6 else f"{ns / 1e6:.4g} ms"


def unit_bars(shares: dict[str, float], bound_by: str) -> str:
    """How busy each unit is; the one that bounds the step stands out."""
    rows, width = [], 454 - _LEFT
    for number, (unit, share) in enumerate(shares.items()):
        y = number * 21
        rows += [
            _text(_LEFT - 8, y + 14, f"{unit}, {MEANING[unit]}", "end", "bold" if unit == bound_by else ""),
            _rect(_LEFT, y + 3, width, 14, "#f0f0f0"),
            _rect(
                _LEFT,
                y + 3,
                width * min(share, 1),
                14,
                COLORS[unit],
                f"{unit} {100 * share:.1f} %",
                1.0 if unit == bound_by else 0.55,
            ),
            _text(460, y + 14, f"{100 * share:.1f} %", css="bold" if unit == bound_by else ""),
        ]
    return _svg(520, 21 * len(shares) + 4, rows)


def layer_bars(layers: Sequence[LayerCost]) -> str:
    """A bar for each layer, by the time it adds to the step."""
    most = max(c.time_ns for c in layers) or 1.0
    width = min((WIDTH - 100) / len(layers), 60)
    body = [
        _text(74, 16, _duration(most), "end"),
        _text(74, 160, "0", "end"),
        _line(80, 160, WIDTH - 20, 160, "#999"),
    ]
    for number, c in enumerate(layers):
        h, label = 150 * c.time_ns / most, "outside" if c.layer < 0 else str(c.layer)
        tip = (
            f"{'outside the layers' if c.layer < 0 else f'layer {label}'}: {_duration(c.time_ns)},"
            f" {c.dram_bytes / 1e6:.2f} MB, bounded by {c.bound_by}"
        )
        body.append(_rect(80 + number * width + 1, 160 - h, width - 2, h, COLORS[c.bound_by], tip))
        if width > 18 or number % 4 == 1:
            body.append(_text(80 + (number + 0.5) * width, 176, "rest" if c.layer < 0 else label, "middle"))
    return _svg(WIDTH, 184, body)


def tornado_bars(rows: Sequence[TornadoRow], point_ms: float) -> str:
    """A bar for each constant from the device's time at its low bound to that at its high one."""
    ends = [ms for r in rows for ms in (r.device_ms_at_low, r.device_ms_at_high)]
    low, high = min([*ends, point_ms]), max([*ends, point_ms])
    labels = [f"{r.constant} {r.low:g} to {r.high:g}" for r in rows]
    times = [f"{r.device_ms_at_low:.4g} to {r.device_ms_at_high:.4g} ms" for r in rows]
    left, right = (16 + _LETTER * max(map(len, texts), default=0) for texts in (labels, times))
    scale = (WIDTH - left - right) / ((high - low) or 1.0)
    body = []
    for number, (r, label, time) in enumerate(zip(rows, labels, times)):
        y = number * 21
        a, b = sorted((r.device_ms_at_low, r.device_ms_at_high))
        tip = (
            f"{r.constant} from {r.low:g} to {r.high:g}: {r.device_ms_at_low:.4g} to"
            f" {r.device_ms_at_high:.4g} ms. {r.source}"
        )
        body += [
            _text(left - 8, y + 14, label, "end"),
            _rect(left + (a - low) * scale, y + 3, (b - a) * scale, 14, "#c98a1b", tip),
            _text(left + (b - low) * scale + 6, y + 14, time),
        ]
    middle = left + (point_ms - low) * scale
    return _svg(WIDTH, 21 * len(rows) + 4, [*body, _line(middle, 0, middle, 21 * len(rows), "#222")])


# -------------------------------------------------------------------------------------------------- timelines


def step_tracks(step: Timing) -> str:
    """One track per unit over the whole step of die 0.

    The darker, the larger the part of the slice that the unit is busy.
    """
    die, total = step.dies[0], step.total_ns
    edges = np.linspace(0, total, _SLICES + 1)
    width = (WIDTH - _LEFT - 20) / _SLICES
    body = _track_names()
    for number, queue in enumerate(_queues(die)):
        data, end = die.data[queue], die.end[queue]
        if not len(queue):
            continue
        done = np.concatenate([[0.0], np.cumsum(end - data)])
        times = np.stack([data, end], axis=1).reshape(-1)
        busy = np.diff(np.interp(edges, times, np.stack([done[:-1], done[1:]], axis=1).reshape(-1))) / (
            total / _SLICES
        )
        for i in np.flatnonzero(busy > 0.005).tolist():
            tip = f"{edge10.UNITS[number]}: {100 * busy[i]:.0f} % busy at {edges[i] / 1000:,.0f} us"
            body.append(
                _rect(
                    _LEFT + i * width,
                    number * _ROW + 2,
                    width,
                    17,
                    COLORS[edge10.UNITS[number]],
                    tip,
                    min(float(busy[i]), 1.0),
                )
            )
    return _svg(WIDTH, len(edge10.UNITS) * _ROW + 20, [*body, *_times(0, total)])


def layer_tracks(step: Timing, layer: int) -> str:
    """One track per unit of die 0 while a layer's products run.

    What other layers do meanwhile is shown too, paler.
    """
    die = step.dies[0]
    mine = np.array(die.commands.layer) == layer
    on = np.array([edge10.UNITS.index(k.unit) for k in die.commands.kinds])[die.commands.kind]
    inner = mine & (on >= len(edge10.DMA_UNITS))
    chosen = inner if inner.any() else mine
    low, high = float(die.start[chosen].min()), float(die.end[chosen].max())
    scale = (WIDTH - _LEFT - 20) / ((high - low) or 1.0)
    body = _track_names()
    for number, queue in enumerate(_queues(die)):
        seen = queue[(die.end[queue] > low) & (die.data[queue] < high)]
        if not len(seen):
            continue
        a = _LEFT + (np.maximum(die.data[seen], low) - low) * scale
        b = _LEFT + (np.minimum(die.end[seen], high) - low) * scale
        cuts = np.concatenate(
            [
                [0],
                1 + np.flatnonzero((a[1:] - b[:-1] >= _PIXEL) | (mine[seen][1:] != mine[seen][:-1])),
                [len(seen)],
            ]
        )
        for first, last in zip(cuts[:-1].tolist(), (cuts[1:] - 1).tolist()):
            tip, own = _mark(die, seen[first : last + 1]), bool(mine[seen[first]])
            body.append(
                _rect(
                    float(a[first]),
                    number * _ROW + 2,
                    float(b[last] - a[first]),
                    17,
                    COLORS[edge10.UNITS[number]],
                    tip,
                    1.0 if own else 0.3,
                )
            )
    return _svg(WIDTH, len(edge10.UNITS) * _ROW + 20, [*body, *_times(low, high)])


def _mark(die: DieTiming, commands: Array) -> str:
    """What a mark stands for."""
    first, last = (die.commands[int(commands[i])] for i in (0, -1))
    busy = float((die.end[commands] - die.data[commands]).sum()) / 1000
    where = first.path if first.path == last.path else f"{first.path} to {last.path}"
    return f"{first.unit}: {where}, {busy:.2f} us" + (
        f" in {len(commands)} commands" if len(commands) > 1 else ""
    )


def _queues(die: DieTiming) -> list[Array]:
    """Each unit's commands."""
    of_kind = np.array([edge10.UNITS.index(k.unit) for k in die.commands.kinds], np.int64)
    unit = of_kind[np.array(die.commands.kind, np.int64)]
    return [np.flatnonzero(unit == number) for number in range(len(edge10.UNITS))]


def _track_names() -> list[str]:
    body = []
    for number, unit in enumerate(edge10.UNITS):
        y = number * _ROW
        body += [
            _text(_LEFT - 8, y + 14, f"{unit}, {MEANING[unit]}", "end"),
            _rect(_LEFT, y + 2, WIDTH - _LEFT - 20, 17, "#f4f4f4"),
        ]
    return body


def _times(low: float, high: float) -> list[str]:
    """The time axis under the tracks."""
    y, anchors = len(edge10.UNITS) * _ROW + 14, ("start", "middle", "middle", "middle", "end")
    return [
        _text(
            _LEFT + (WIDTH - _LEFT - 20) * i / 4,
            y,
            f"{(low + (high - low) * i / 4) / 1000:,.1f} us",
            anchors[i],
        )
        for i in range(5)
    ]


# --------------------------------------------------------------------------------------------------- roofline


def roofline(ops: Sequence[OpCost], machine: Machine) -> str:
    """GMAC/s while an op's busiest unit works on it, over MAC per byte of DRAM, both logarithmic.

    One dot per op with products, its area by the time that it adds.
    """
    peak, bandwidth = machine.macs_per_cycle_fp16 / machine.cycle_ns, machine.dram_bytes_per_ns
    dots = sorted((o for o in ops if o.macs and o.dram_bytes and o.time_ns), key=lambda o: -o.time_ns)
    xs = [o.macs / o.dram_bytes for o in dots] + [0.5, peak / bandwidth * 10]
    ys = [_rate(o) for o in dots] + [peak * 2, bandwidth * min(xs)]
    x0, x1, y0, y1 = (
        math.log10(min(xs)) - 0.1,
        math.log10(max(xs)) + 0.1,
        math.log10(min(ys)) - 0.2,
        math.log10(max(ys)) + 0.1,
    )
    left, width, height = 62, 510, 320

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (math.log10(x) - x0) / (x1 - x0) * (width - left),
            (height - 40) * (1 - (math.log10(y) - y0) / (y1 - y0)) + 20,
        )

    start, ridge, end = at(10**x0, bandwidth * 10**x0), at(peak / bandwidth, peak), at(10**x1, peak)
    body = []
    for exponent in range(math.ceil(y0), math.floor(y1) + 1):
        y = at(10**x0, 10.0**exponent)[1]
        body += [_line(left, y, width, y), _text(left - 6, y + 4, f"{10.0**exponent:,g}", "end")]
    body += [
        _text(at(10.0**e, 10**y0)[0], height - 8, f"{10.0**e:g}", "middle")
        for e in range(math.ceil(x0), math.floor(x1) + 1)
    ]
    body.append(
        f"<polyline points='{' '.join(f'{x:.1f},{y:.1f}' for x, y in (start, ridge, end))}' fill='none'"
        " stroke='#555' stroke-width='2'/>"
    )
    total = sum(o.time_ns for o in ops) or 1.0
    captions = [
        (width - 4, end[1] - 6, f"cubes {peak:,.0f} GMAC/s"),
        (
            0.3 * start[0] + 0.7 * ridge[0] - 8,
            0.3 * start[1] + 0.7 * ridge[1] - 8,
            f"DRAM {bandwidth:.1f} GB/s",
        ),
    ]
    taken = [(x - _LETTER * len(words), x, y) for x, y, words in captions]
    named: dict[tuple[float, float, float], list[str]] = {}
    for o in dots:
        x, y = at(o.macs / o.dram_bytes, _rate(o))
        name = o.path or o.source
        tip = (
            f"{name}: {_rate(o):.1f} GMAC/s, {o.macs / o.dram_bytes:.2f} MAC/byte,"
            f" {100 * o.time_ns / total:.1f} % of the step, bounded by {o.bound_by}"
        )
        radius = 3 + 14 * math.sqrt(o.time_ns / total)
        taken.append((x - radius, x + radius, y + 4))
        body.append(
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{radius:.1f}'"
            f" fill='{COLORS[o.bound_by]}' fill-opacity='.6'><title>{escape(tip)}</title></circle>"
        )
        if o.time_ns > 0.02 * total:
            near = next(
                (place for place in named if abs(place[0] - x) < 60 and abs(place[1] - y) < 14),
                (x, y, radius),
            )
            named.setdefault(near, []).append(name.rpartition(".")[2])
    labels = _Labels(20, height - 26, taken)
    for (x, y, radius), names in named.items():
        shown = names if len(names) <= 3 else [*names[:2], f"and {len(names) - 2} more"]
        label = ", ".join(shown).replace(", and", " and")
        long = _SMALL * len(label)
        right = x + radius + 5 + long < width
        x += (radius + 5) * (1 if right else -1)
        x = x if right else max(x, left + long)
        y = labels.free(x if right else x - long, x + long if right else x, y + 4)
        body.append(_text(x, y, label, "start" if right else "end", "small"))
    body += [
        *(_text(x, y, words, "end") for x, y, words in captions),
        _text((left + width) / 2, height + 6, "MAC per byte of DRAM", "middle"),
        _text(left, 12, "GMAC/s", css="head"),
    ]
    return _svg(width + 10, height + 12, body)


class _Labels:
    """Where lines of text stand (left, right, base line), between two heights; none covers another."""

    _HIGH: Final = 13.0

    def __init__(self, top: float, bottom: float, taken: Sequence[tuple[float, float, float]]) -> None:
        self._top, self._bottom, self._taken = top, bottom, list(taken)

    def free(self, left: float, right: float, y: float) -> float:
        """The base line nearest to y where nothing else stands, taken from now on."""
        y = min(max(y, self._top + self._HIGH), self._bottom)
        steps = sorted(range(-24, 25), key=lambda n: (abs(n), -n))
        tried = [y + n * self._HIGH / 2 for n in steps]
        fits = [
            t for t in tried if self._top + self._HIGH <= t <= self._bottom and self._is_free(left, right, t)
        ]
        y = fits[0] if fits else y
        self._taken.append((left, right, y))
        return y

    def _is_free(self, left: float, right: float, y: float) -> bool:
        return not any(a < right and left < b and abs(y - at) < self._HIGH for a, b, at in self._taken)


def _rate(op: OpCost) -> float:
    """GMAC/s."""
    return op.macs / max(op.time_ns, op.busy_ns)
