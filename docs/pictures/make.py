"""The pictures of README and docs: `python docs/pictures/make.py [ARTIFACTS]`.

Without an argument the stages; with the folder that the README's commands make (`build/out/4die`) also the
report, which shows parts of the HTML report of `tyir-sim`.
"""

from __future__ import annotations

import re
import sys
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent

# Stage, what its ops are, and the passes that lead to the next one.
STAGES = (
    ("aten", "torch's ops", "raise-aten"),
    ("ty", "norm, linear, attention", "quantize-weights, kv-materialize"),
    ("kv", "a step with its caches", "partition-dies"),
    ("dist", "a program per die, collectives", "outline-params,\nspecialize-seqlen, outline-layers"),
    ("program", "static shapes, one length", ""),
)
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}"
    ".b{font-weight:700;font-size:14px}.s{font-size:11px;fill:#555}"
)


def svg(width: int, height: int, body: list[str], style: str = STYLE) -> str:
    size = f"width='{width}' height='{height}'"
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' {size} viewBox='0 0 {width} {height}'>"
        f"<style>{style}</style><rect {size} fill='#fff'/>{''.join(body)}</svg>\n"
    )


def text(x: float, y: float, words: str, css: str = "", anchor: str = "middle") -> str:
    return f"<text x='{x:g}' y='{y:g}' text-anchor='{anchor}' class='{css}'>{escape(words)}</text>"


def box(x: float, y: float, width: float, name: str, what: str, color: str) -> list[str]:
    return [
        f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='46' rx='6' fill='{color}' stroke='#999'/>",
        text(x + width / 2, y + 20, name, "b"),
        text(x + width / 2, y + 37, what, "s"),
    ]


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    ends = f"x1='{x1:g}' y1='{y1:g}' x2='{x2:g}' y2='{y2:g}'"
    return f"<line {ends} stroke='#555' stroke-width='1.5' marker-end='url(#a)'/>"


def stages() -> str:
    """The way of a model from the checkpoint to what runs, with the command or the passes on each arrow."""
    body = [
        "<defs><marker id='a' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7'"
        " orient='auto'><path d='M0,0 L8,4 L0,8 z' fill='#555'/></marker></defs>"
    ]
    body += box(20, 20, 170, "checkpoint folder", "config.json, safetensors", "#f3efe6")
    for number, (name, what, passes) in enumerate(STAGES):
        y = 20 + 84 * number
        body += box(330, y, 230, name, what, "#e6f0f3")
        if passes:
            lines = passes.split("\n")
            body.append(arrow(445, y + 46, 445, y + 82))
            top = y + 76 - 7 * len(lines)
            body += [text(455, top + 14 * i, line, "s", "start") for i, line in enumerate(lines)]
    body += [arrow(190, 43, 328, 43), text(259, 36, "tyir-import", "s")]
    last = 20 + 84 * (len(STAGES) - 1)
    body += box(660, last - 20, 230, "llm_die{i}.so", "kernels for this PC (TVM)", "#eaf3e6")
    body += box(660, last + 54, 230, "llm_die{i}.edge10", "commands of the chip's units", "#eaf3e6")
    body += [arrow(560, last + 15, 658, last + 3), arrow(560, last + 31, 658, last + 77)]
    body += [
        text(775, last - 30, "tyir-run, tyir-verify", "s"),
        text(775, last + 116, "tyir-sim, tyir-run --engine edge10", "s"),
    ]
    body += [
        text(20, 190, "Every box in the middle is a file:", "", "start"),
        text(20, 210, "print it, edit it, diff it,", "", "start"),
        text(20, 230, "go on from there.", "", "start"),
        text(20, 262, "tyir-opt runs passes,", "s", "start"),
        text(20, 278, "tyir-compile whatever is left", "s", "start"),
    ]
    return svg(910, last + 130, body)


def report(folder: Path) -> str:
    """What bounds a step of one token, and the timeline of a layer, as the HTML report draws them."""
    from tyir.runtime_sim.report.charts import layer_tracks, unit_bars
    from tyir.tools.sim.sources import Choice, Lengths, open_source

    source = open_source([folder], Choice(None, {}))
    summary = source.summary(Lengths(128, 128), curves=False)
    step, layer = summary.decode_step, summary.decode_step.layers[len(summary.decode_step.layers) // 2].layer
    title = (
        f"A step of one token, {summary.dies} x {summary.machine}: {step.device_ms:.3g} ms on the device,"
        f" bound by {step.bound_by} (uncalibrated)"
    )
    parts = (
        (title, unit_bars(step.units, step.bound_by)),
        (
            f"Timeline of layer {layer}, die 0",
            layer_tracks(source.predictor.step(step.seqlen, step.pos), layer),
        ),
    )
    body, y = [], 8
    for head, chart in parts:
        size = re.match(r"<svg width='(\d+)' height='(\d+)'", chart)
        assert size is not None
        inner = re.sub(r"<title>.*?</title>", "", chart)  # tooltips are for the page
        body += [text(20, y + 18, head, "b", "start"), f"<g transform='translate(20 {y + 28})'>{inner}</g>"]
        y += int(size[2]) + 44
    style = STYLE + "svg .bold{font-weight:700}svg .head{fill:#555}svg .small{font-size:11px}"
    return svg(1100, y, body, style)


if __name__ == "__main__":
    (HERE / "stages.svg").write_text(stages(), encoding="utf-8")
    if len(sys.argv) > 1:
        (HERE / "report.svg").write_text(report(Path(sys.argv[1])), encoding="utf-8")
