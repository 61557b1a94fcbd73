"""What a quantisation did: lines for a terminal, a JSON file, a page with a plot, and the plot as PNG."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Final

from tyir.tools.cli import write_output
from tyir.tools.commands.json_forms import Measured, Quantized, QuantizedLinear
from tyir.tools.quantize.layer_search import LinearReport, errors_by_layer
from tyir.tools.quantize.perplexity import Perplexity
from tyir.tools.quantize.quantize import Outcome

__all__ = ["measured_form", "report_form", "summary_lines", "write_report"]

_WIDTH: Final = 900
_HEIGHT: Final = 220
_LEFT: Final = 60


def summary_lines(outcome: Outcome) -> Iterator[str]:
    """A line for the errors, and one for the perplexities when they were measured."""
    settings = outcome.settings
    errors = errors_by_layer(outcome.reports)
    what = f"{settings.method}, {settings.bits} bits, groups of {settings.group_size}"
    if errors:
        before = sum(e[0] for e in errors.values()) / len(errors)
        after = sum(e[1] for e in errors.values()) / len(errors)
        yield f"{what}: mean squared error of a linear's output {before:.3%} -> {after:.3%}"
        worst = max(errors, key=lambda i: errors[i][1])
        yield f"largest in layer {worst}: {errors[worst][1]:.3%}"
    if outcome.before is not None and outcome.after is not None:
        yield (
            f"perplexity {outcome.before.value:.3f} -> {outcome.after.value:.3f}"
            f" ({outcome.before.tokens} tokens in windows of {settings.window})"
        )


def report_form(outcome: Outcome) -> Quantized:
    """Everything of the report, for programs."""
    return Quantized(
        output=str(outcome.out),
        settings=asdict(outcome.settings),
        linears=tuple(
            QuantizedLinear(layer=index, **asdict(report))
            for index, each in outcome.reports.items()
            for report in each
        ),
        before=measured_form(outcome.before, outcome.settings.window),
        after=measured_form(outcome.after, outcome.settings.window),
    )


def measured_form(measured: Perplexity | None, window: int) -> Measured | None:
    """A perplexity, for programs."""
    return None if measured is None else Measured(measured.value, measured.tokens, window)


def write_report(outcome: Outcome, folder: Path) -> list[str]:
    """report.json, report.html and, with matplotlib, errors.png; returns what could not be written."""
    write_output(json.dumps(asdict(report_form(outcome)), indent=1) + "\n", str(folder / "report.json"))
    write_output(_page(outcome), str(folder / "report.html"))
    errors = errors_by_layer(outcome.reports)
    try:
        import matplotlib
    except ImportError:
        return ["errors.png needs matplotlib: pip install 'tyir[plots]'; report.html has the plot"]
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 3.5), layout="constrained")
    axes.plot(list(errors), [e[0] for e in errors.values()], label="rounded to nearest")
    axes.plot(list(errors), [e[1] for e in errors.values()], label=outcome.settings.method)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative squared error of outputs")
    axes.legend()
    figure.savefig(folder / "errors.png", dpi=120)
    pyplot.close(figure)
    return []


def _page(outcome: Outcome) -> str:
    lines = "".join(f"<p>{escape(line)}</p>" for line in summary_lines(outcome))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Quantisation</title>"
        "<style>body{font:14px sans-serif;max-width:1000px;margin:2em auto}"
        "table{border-collapse:collapse}td,th{padding:2px 10px;text-align:right}"
        "td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f3f3f3}</style>"
        f"<h1>Quantisation</h1>{lines}<h2>Error by layer</h2>{_plot(outcome)}"
        "<h2>Linears</h2><table><tr><th>linear<th>scale<th>range kept<th>error before<th>after</tr>"
        + "".join(_row(r) for each in outcome.reports.values() for r in each)
        + "</table></html>\n"
    )


def _row(r: LinearReport) -> str:
    scale = "none" if r.ratio is None else f"x^{r.ratio:g}" + (f" / w^{1 - r.ratio:g}" if r.duo else "")
    return (
        f"<tr><td>{escape(r.path)}<td>{scale}<td>{r.kept_range:.1%}"
        f"<td>{r.error_before:.4%}<td>{r.error_after:.4%}</tr>"
    )


def _plot(outcome: Outcome) -> str:
    errors = errors_by_layer(outcome.reports)
    if not errors:
        return "<p>Rounding to nearest searches nothing.</p>"
    top = max(max(e) for e in errors.values()) or 1.0
    step = (_WIDTH - _LEFT - 20) / max(len(errors) - 1, 1)

    def line(values: Sequence[float], color: str, name: str) -> str:
        points = [(_LEFT + i * step, _HEIGHT - 30 - v / top * (_HEIGHT - 50)) for i, v in enumerate(values)]
        marks = "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"><title>layer {i}, {name}:'
            f" {values[i]:.4%}</title></circle>"
            for i, (x, y) in enumerate(points)
        )
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        return f'<polyline points="{way}" fill="none" stroke="{color}"/>{marks}'

    def key(x: float, color: str, name: str) -> str:
        return f'<text x="{x}" y="18" text-anchor="end" fill="{color}">{escape(name)}</text>'

    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
        ' font-size="12">'
        + key(_WIDTH - 20, "#1f6f8b", outcome.settings.method)
        + key(_WIDTH - 110, "#c0504d", "rounded to nearest")
        + f'<text x="4" y="18">{top:.2%}</text><text x="4" y="{_HEIGHT - 26}">0</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 8}">layer 0</text>'
        f'<text x="{_WIDTH - 20}" y="{_HEIGHT - 8}" text-anchor="end">layer {len(errors) - 1}</text>'
        + line([e[0] for e in errors.values()], "#c0504d", "rounded to nearest")
        + line([e[1] for e in errors.values()], "#1f6f8b", outcome.settings.method)
        + "</svg>"
    )
