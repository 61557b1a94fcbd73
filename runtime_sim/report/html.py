"""The HTML report: one self-contained page without scripts or external resources.

It has the figures, what bounds them, the timeline, rooflines and costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from tyir.runtime_sim.report.charts import (
    curve,
    key,
    layer_bars,
    layer_tracks,
    roofline,
    step_tracks,
    tornado_bars,
    unit_bars,
)
from tyir.runtime_sim.report.text import host_line
from tyir.runtime_sim.timing.costs import OpCost
from tyir.runtime_sim.timing.predictor import Interval, Predictor
from tyir.runtime_sim.timing.summary import StepReport, Summary
from tyir.targets.machine import Machine

__all__ = ["html_report"]

_TOP_OPS: Final = 25
_STYLE: Final = """
body{font:14px/1.45 system-ui,sans-serif;color:#222;background:#fff;max-width:1080px;margin:24px auto;padding:0 20px}
h1{font-size:22px;margin:0 0 4px}h2{font-size:17px;margin:30px 0 6px;border-bottom:1px solid #ddd;padding-bottom:3px}h3{font-size:14px;margin:8px 0 4px}p{margin:4px 0 8px;color:#444}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px}td,th{padding:3px 12px 3px 0;text-align:right;border-bottom:1px solid #eee}
td.l,th.l{text-align:left}th{color:#555;font-weight:600}.note{color:#8a4b00;background:#fff6e5;padding:6px 10px;border-radius:4px}
.cards{display:flex;gap:14px;margin:14px 0}.card{flex:1;border:1px solid #ddd;border-radius:6px;padding:10px 14px}.card b{font-size:26px;display:block}.card span{color:#555}
.two{display:flex;gap:20px}.two>div{flex:1;min-width:0}summary{cursor:pointer;color:#1f6f8b}
svg{display:block;font:12px system-ui,sans-serif}svg text{fill:#333}svg .bold{font-weight:700}svg .head{fill:#555}svg .small{font-size:11px;fill:#222;paint-order:stroke;stroke:#fff;stroke-width:3px}
.key span{display:inline-block;margin-right:14px}.key i{display:inline-block;width:11px;height:11px;margin-right:5px;border-radius:2px}
"""  # noqa: E501


def html_report(s: Summary, predictor: Predictor) -> str:
    """The page's text; `predictor` is what `s` was made with."""
    title = f"{s.artifacts} on {s.dies} x {s.machine}"
    step = predictor.step(s.decode_step.seqlen, s.decode_step.pos)
    parts = [f"<h1>{escape(title)}</h1>", *_head(s), _cards(s)]
    if s.ttft_by_prompt:
        parts += [
            "<h2>By length</h2>",
            _two(
                curve(s.ttft_by_prompt, "prompt tokens", "time to first token (ms)"),
                curve(s.tpot_by_position, "cached tokens", "time per output token (ms)"),
            ),
            f"<p>Line: the machine file as it is; dashed: the device's part of it. {_band(s)}</p>",
        ]
    parts += ["<h2>What bounds a step</h2>", _two(*(_bounds(r) for r in _steps(s)))]
    parts += [
        f"<h2>Where the time of {_name(s.decode_step)} goes, by layer</h2>",
        key(dict.fromkeys(c.bound_by for c in s.decode_step.layers)),
        layer_bars(s.decode_step.layers),
    ]
    parts.append(
        "<p>Height: what the layer adds to the step; colour: the unit busiest with it; rest: what stands"
        " outside the layers (embedding, norm, head).</p>"
    )
    for report in _steps(s):
        parts += _layer_timeline(report, predictor)
    parts += [
        f"<h2>Timeline of {_name(s.decode_step)}, die 0</h2>",
        step_tracks(step),
        "<p>The darker, the busier.</p>",
    ]
    parts += [
        "<h2>Roofline</h2>",
        _two(*(f"<h3>{_name(r)}</h3>{roofline(r.ops, predictor.machine)}" for r in _steps(s))),
    ]
    parts += [
        key(dict.fromkeys(o.bound_by for r in _steps(s) for o in r.ops if o.macs)),
        (
            "<p>One dot per op of the model with products, area by the time that it adds to the step; rate"
            " while its busiest unit works on it.</p>"
        ),
    ]
    if s.tornado:
        parts += [
            "<h2>Which assumed constant moves the device's part of the time per token</h2>",
            tornado_bars([r for r in s.tornado if r.of_device], s.tpot_device_ms.point),
            *_host_row(s),
        ]
    for report in _steps(s):
        parts += [f"<h2>Ops of {_name(report)}</h2>", _ops(report.ops)]
    if s.dies > 1:
        parts += ["<h2>Collectives</h2>", *(_collectives(r) for r in _steps(s))]
    parts += ["<h2>Machine</h2>", _constants(predictor.machine)]
    return (
        "<!doctype html><html lang='en'><meta"
        f" charset='utf-8'><title>{escape(title)}</title><style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"  # noqa: E501
    )


def _layer_timeline(report: StepReport, predictor: Predictor) -> list[str]:
    """The middle layer of a step."""
    layers = [c.layer for c in report.layers if c.layer >= 0]
    if not layers:
        return []
    middle = layers[len(layers) // 2]
    return [
        f"<h2>Timeline of layer {middle} in {_name(report)}, die 0</h2>",
        layer_tracks(predictor.step(report.seqlen, report.pos), middle),
        (
            "<p>Paler: commands of other layers in the same time. A transfer is shown while its data moves."
            " Hover for names and times.</p>"
        ),
    ]


def _steps(s: Summary) -> list[StepReport]:
    return [s.decode_step] if s.prefill_step is None else [s.decode_step, s.prefill_step]


def _name(step: StepReport) -> str:
    return f"a step of {step.seqlen} token{'s' if step.seqlen > 1 else ''} at position {step.pos}"


def _host_row(s: Summary) -> list[str]:
    """What the host's constant does to all of the time, which the bars are not about."""
    return [
        f"<p>{escape(r.constant)} from {r.low:g} to {r.high:g} moves all of the time per token, and"
        f" nothing of the device: {r.tpot_ms_at_low:.4g} to {r.tpot_ms_at_high:.4g} ms.</p>"
        for r in s.tornado
        if not r.of_device
    ]


def _two(*cells: str) -> str:
    return "<div class='two'>" + "".join(f"<div>{cell}</div>" for cell in cells) + "</div>"


def _head(s: Summary) -> list[str]:
    lines = [
        f"<p>Simulated device time, and {s.host_ms_per_step:g} ms of host time a step, which the machine file"
        f" says; compiled lengths {', '.join(map(str, s.seqlens))}, cache of {s.max_kv:,} tokens.</p>"
    ]
    host = host_line(s)
    css = " class='note'" if s.decode_bound_by == "host" else ""
    lines.append(f"<p{css}>{host[:1].upper()}{host[1:]}.</p>")
    if s.overrides:
        lines.append(
            "<p>Changed: "
            + escape(", ".join(f"{name} = {value:g}" for name, value in s.overrides.items()))
            + "</p>"
        )
    if not s.calibrated:
        lines.append(
            f"<p class='note'>Uncalibrated: {len(s.assumed_constants)} constants of the machine file are"
            f" assumed. {_band(s)}</p>"
        )
    return lines


def _band(s: Summary) -> str:
    return (
        ""
        if s.calibrated
        else "Intervals hold all assumed constants at their faster and at their slower bounds."
    )


def _cards(s: Summary) -> str:
    def card(label: str, value: Interval, device: Interval, unit: str) -> str:
        low, high = sorted((value.fast, value.slow))
        return (
            f"<div class='card'><span>{escape(label)}</span><b>{_number(value.point)}"
            f" {unit}</b><span>{_number(low)} to {_number(high)}</span><br><span>device alone:"
            f" {_number(device.point)} {unit}</span></div>"
        )

    rates = (
        s.tpot_device_ms.map(lambda ms: 1000 / ms),
        s.ttft_device_ms.map(lambda ms: s.prompt_tokens * 1000 / ms),
    )
    return (
        "<div class='cards'>"
        + card(f"first token, prompt of {s.prompt_tokens}", s.ttft_ms, s.ttft_device_ms, "ms")
        + card(f"each token after {s.pos} cached", s.tpot_ms, s.tpot_device_ms, "ms")
        + card("decode", s.decode_tokens_per_s, rates[0], "tokens/s")
        + card("prefill", s.prefill_tokens_per_s, rates[1], "tokens/s")
        + "</div>"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _bounds(step: StepReport) -> str:
    return (
        f"<h3>{_name(step).capitalize()}: {step.device_ms:.4g} ms on the device, bounded by"
        f" {step.bound_by}</h3>{unit_bars(step.units, step.bound_by)}<p>{max(step.dram_bytes) / 1e6:,.1f}"
        f" MB of DRAM a die, {max(step.dram_gbps):.1f} GB/s over the step; {step.commands:,} commands</p>"
    )


def _ops(ops: Sequence[OpCost]) -> str:
    total = sum(o.time_ns for o in ops) or 1.0
    rows = "".join(
        f"<tr><td class='l'>{escape(o.source)}</td><td"
        f" class='l'>{escape(o.path)}</td><td>{o.calls}</td><td>{o.time_ns / 1000:,.2f}</td><td>{100 * o.time_ns / total:.1f}"  # noqa: E501
        f" %</td><td>{o.dram_bytes / 1e6:,.3f}</td><td>{o.macs / 1e6:,.2f}</td><td"
        f" class='l'>{o.bound_by}</td></tr>"
        for o in ops[:_TOP_OPS]
    )
    more = (
        f"<p>{len(ops) - _TOP_OPS} more with {100 * sum(o.time_ns for o in ops[_TOP_OPS:]) / total:.1f} % of"
        " the time.</p>"
        if len(ops) > _TOP_OPS
        else ""
    )
    head = (
        "<th class='l'>op</th><th"
        " class='l'>where</th><th>calls</th><th>us</th><th>share</th><th>MB</th><th>MMAC</th><th"
        " class='l'>bounded by</th>"
    )
    return f"<table><tr>{head}</tr>{rows}</table>{more}"


def _collectives(step: StepReport) -> str:
    c = step.collectives
    least = (
        ""
        if c.least_count is None
        else (
            f"; the closed form of a model split in everything is {c.least_count} with {c.least_bytes:,}"
            " bytes"
        )
    )
    rows = "".join(
        f"<tr><td class='l'>{i.what}</td><td"
        f" class='l'>{escape(i.path)}</td><td>{i.count}</td><td>{i.nbytes:,}</td><td>{i.count * i.nbytes:,}</td></tr>"  # noqa: E501
        for i in c.items
    )
    head = (
        "<th class='l'>collective</th><th class='l'>where</th><th>in a step</th><th>bytes of"
        " one</th><th>bytes of all</th>"
    )
    return (
        f"<p>{_name(step).capitalize()}: {c.count} collectives with {c.nbytes:,}"
        f" bytes{least}.</p><table><tr>{head}</tr>{rows}</table>"
    )


def _constants(machine: Machine) -> str:
    rows = "".join(
        "<tr><td"
        f" class='l'>{escape(name)}</td><td>{c.value:g}</td><td>{'' if c.low is None else f'{c.low:g} to {c.high:g}'}</td><td"  # noqa: E501
        f" class='l'>{c.label}</td><td class='l'>{escape(c.source)}</td></tr>"
        for name, c in machine.constants.items()
    )
    head = (
        "<th class='l'>constant</th><th>value</th><th>bounds</th><th class='l'>label</th><th"
        " class='l'>source</th>"
    )
    return (
        f"<details><summary>{len(machine.constants)} constants of {escape(machine.name)}, with where they"
        f" come from</summary><table><tr>{head}</tr>{rows}</table></details>"
    )
