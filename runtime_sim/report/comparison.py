"""Two of `tyir-sim`'s answers side by side.

Only what was asked alike is put on one line: a time for another prompt, position or length of step stands on
a line of its own, without a ratio.
"""

from __future__ import annotations

from collections.abc import Iterator

from tyir.runtime_sim.report.text import figures, host_line, number
from tyir.runtime_sim.timing.summary import StepReport, Summary

__all__ = ["compare_text"]

_LABEL = 46


def compare_text(a: Summary, b: Summary, top: int) -> str:
    """Two models, or one on two machines: the figures, what is busy, and the most expensive ops.

    `top` says how many ops of the decode step.
    """
    lines = [f"{name} = {s.artifacts}, {s.dies} x {s.machine}" for name, s in (("a", a), ("b", b))]
    lines += [f"{name}: changed {_changed(s)}" for name, s in (("a", a), ("b", b)) if s.overrides]
    lines += [
        f"{name}: uncalibrated, {len(s.assumed_constants)} constants are assumed"
        for name, s in (("a", a), ("b", b))
        if not s.calibrated
    ]
    lines += ["", f"{'':<{_LABEL}}{'a':>12}{'b':>12}{'b / a':>9}"]
    left, right = ({label: value.point for label, value in figures(s)} for s in (a, b))
    lines += [_row(label, left.get(label), right.get(label)) for label in dict.fromkeys([*left, *right])]
    lines += [f"{name}: {host_line(s)}" for name, s in (("a", a), ("b", b))]
    steps = (a.decode_step, b.decode_step)
    asked = [(s.seqlen, s.pos) for s in steps]
    if asked[0] == asked[1]:
        lines += ["", *_steps(*steps, top)]
    else:
        told = " and ".join(f"{n} at position {pos}" for n, pos in asked)
        lines += ["", f"the decode steps are of unlike lengths, {told}: their units and ops are not compared"]
    return "\n".join(lines)


def _changed(s: Summary) -> str:
    return ", ".join(f"{name} = {value:g}" for name, value in s.overrides.items())


def _row(label: str, a: float | None, b: float | None) -> str:
    cells = "".join(f"{'-' if value is None else number(value):>12}" for value in (a, b))
    return f"{label:<{_LABEL}}{cells}" + (_ratio(a, b) if a is not None and b is not None else "")


def _steps(a: StepReport, b: StepReport, top: int) -> Iterator[str]:
    """The device in two decode steps of one length at one position."""
    steps = (a, b)
    yield f"{'device in the decode step bound by':<{_LABEL}}{a.bound_by:>12}{b.bound_by:>12}"
    for unit in a.units:
        shares = "".join(f"{100 * s.units.get(unit, 0.0):>12.1f}" for s in steps)
        yield f"{unit + ' busy (%)':<{_LABEL}}{shares}"
    yield _row("DRAM (MB a die and step)", *(max(s.dram_bytes) / 1e6 for s in steps))
    yield _row("collectives a step", *(float(s.collectives.count) for s in steps))
    yield _row("collective bytes a step", *(float(s.collectives.nbytes) for s in steps))
    times = [{(o.source, o.path): o.time_ns / 1000 for o in s.ops} for s in steps]
    yield ""
    yield f"{'op (us of the decode step)':<66}{'a':>12}{'b':>12}{'b / a':>9}"
    for op in sorted(set(times[0]) | set(times[1]), key=lambda k: -max(t.get(k, 0.0) for t in times))[:top]:
        cells = "".join(f"{t[op]:>12.2f}" if op in t else f"{'-':>12}" for t in times)
        both = all(op in t for t in times)
        yield f"{op[0]:<22}{op[1][-43:]:<44}{cells}" + (_ratio(times[0][op], times[1][op]) if both else "")


def _ratio(a: float, b: float) -> str:
    return f"{b / a:>9.3f}" if a else f"{'-':>9}"
