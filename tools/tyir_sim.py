"""`tyir-sim OUT/{n}die`: how fast the compiled programs run on the device, what bounds them, and how sure that is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyir.diagnostics import TyirError
from tyir.tools.cli import ToolParser, add_debug_option, run_tool, write_output

if TYPE_CHECKING:
    from tyir.runtime_sim.program import EdgeProgram
    from tyir.runtime_sim.report import Interval, Predictor, Sensitivity
    from tyir.targets.machine import Machine

__all__ = ["main"]


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = _parser().parse_args(argv)
    if args.compare and len(args.artifacts) != 2:
        raise TyirError(f"--compare takes two artifact folders, {len(args.artifacts)} given", help="tyir-sim --compare out/1die out/4die")
    if args.compare:
        return _compare(args)
    predictor, name = _predictor(args)
    prompt, pos = _positions(args, predictor)
    if args.sweep:
        print(_sweep(args, predictor, prompt, pos))
        return 0
    summary = _summary(predictor, name, prompt, pos, args)
    if args.trace:
        from tyir.runtime_sim.trace import chrome_trace

        write_output(chrome_trace(predictor.step(min(predictor.seqlens), pos)), str(args.trace))
    if args.report == "json":
        print(json.dumps(summary, indent=1))
    elif args.report == "html":
        write_output(_html(predictor, summary, prompt, pos), args.output)
    else:
        print(_text(summary, args.top))
    return 0


# ------------------------------------------------------------------------------------------------------------- what to simulate


def _predictor(args: argparse.Namespace) -> tuple[Predictor, str]:
    """From an artifact folder, or from the `.edge10` files of all dies for one length."""
    from tyir.parser import parse_file
    from tyir.runtime_sim.program import EdgeProgram
    from tyir.runtime_sim.report import Predictor

    paths: list[Path] = args.artifacts
    if all(p.suffix == ".edge10" for p in paths):
        programs = [EdgeProgram(parse_file(p)) for p in paths]
        lengths = {p.seqlen for p in programs}
        if len(lengths) > 1:
            raise TyirError(
                f"the programs are for different lengths: {', '.join(map(str, sorted(lengths)))}",
                help="give the files of all dies of one length",
            )
        return Predictor(lambda s: programs, tuple(lengths), _capacity(programs), _machine(args, programs)), f"{len(programs)} programs"
    if len(paths) > 1:
        raise TyirError("more than one folder given", help="give one artifact folder, or the .edge10 files of all dies for one length")
    from tyir.manifest import Manifest
    from tyir.runtime_sim.program import load_programs

    manifest = Manifest.load(paths[0], check=not args.no_check)
    loaded: dict[int, list[EdgeProgram]] = {}

    def programs_of(seqlen: int) -> list[EdgeProgram]:
        if seqlen not in loaded:
            loaded[seqlen] = load_programs(paths[0], manifest, seqlen)
        return loaded[seqlen]

    machine = _machine(args, programs_of(min(manifest.options.seqlens)))
    return Predictor(programs_of, manifest.options.seqlens, manifest.options.max_kv, machine), str(paths[0])


def _capacity(programs: Sequence[EdgeProgram]) -> int:
    """Positions of the cache, from its buffers."""
    return min((b.type.static_shape[2] for p in programs for b in p.buffers.values() if b.kind == "kv"), default=1 << 30)


def _machine(args: argparse.Namespace, programs: Sequence[EdgeProgram]) -> Machine:
    from tyir.attributes import StringAttr
    from tyir.targets.machine import load_machine

    compiled_for = programs[0].module.attributes.get("tyir.machine")
    machine = load_machine(args.machine or (compiled_for.value if isinstance(compiled_for, StringAttr) else "edge10"))
    values: dict[str, float] = {}
    for setting in args.set:
        name, equals, value = setting.partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            raise TyirError(
                f"--set {setting}: '{value}' is not a number" if equals else f"--set {setting} lacks a value",
                help="write --set dram.bandwidth_gbps=34.1",
            ) from None
    return machine.with_overrides(values)


def _positions(args: argparse.Namespace, predictor: Predictor) -> tuple[int, int]:
    """Prompt length and decode position, by default a prompt of 128 tokens (less if the cache is smaller) and the position after it."""
    capacity, shortest = predictor.capacity, min(predictor.seqlens)
    prompt = args.prompt_tokens if args.prompt_tokens is not None else min(128, capacity - shortest)
    pos = args.pos if args.pos is not None else min(prompt, capacity - shortest)
    if not 1 <= prompt <= capacity:
        raise TyirError(
            f"--prompt-tokens {prompt} is not in 1..{capacity}, the cache's positions",
            help=f"the nearest possible is {min(max(prompt, 1), capacity)}",
        )
    if not 0 <= pos <= capacity - shortest:
        raise TyirError(
            f"--pos {pos} leaves no room for a step of {shortest} in a cache of {capacity}",
            help=f"give a position in 0..{capacity - shortest}",
        )
    return prompt, pos


# ------------------------------------------------------------------------------------------------------------- figures


def _summary(predictor: Predictor, name: str, prompt: int, pos: int, args: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import asdict

    from tyir.runtime_sim.report import op_costs, unit_shares

    machine = predictor.machine
    ttft, tpot = predictor.interval(lambda p: p.ttft_ns(prompt)), predictor.interval(lambda p: p.tpot_ns(pos))
    timing = predictor.step(min(predictor.seqlens), pos)
    summary: dict[str, Any] = {
        "artifacts": name,
        "machine": machine.name,
        "dies": len(timing.records),
        "seqlens": list(predictor.seqlens),
        "max_kv": predictor.capacity,
        "calibrated": machine.calibrated,
        "assumed_constants": [n for n, _ in machine.assumed()],
        "overrides": {n: c.value for n, c in machine.constants.items() if c.label == "override"},
        "prompt_tokens": prompt,
        "pos": pos,
        "ttft_ms": _scaled(ttft, 1e-6),
        "tpot_ms": _scaled(tpot, 1e-6),
        "decode_tokens_per_s": _rate(tpot, 1),
        "prefill_tokens_per_s": _rate(ttft, prompt),
        "host_ms_per_step": machine.host.step_us / 1000,
        "step": {
            "seqlen": timing.seqlen,
            "device_ms": timing.total_ns * 1e-6,
            "bound_by": timing.bound_by,
            "unit_shares": dict(unit_shares(timing)),
            "dram_bytes": list(timing.dram_bytes),
            "dram_gbps": [b / timing.total_ns for b in timing.dram_bytes],
            "commands": sum(map(len, timing.records)),
        },
        "ops": [asdict(c) for c in op_costs(timing)],
    }
    if args.tornado:
        summary["tornado"] = [_tornado_row(s) for s in predictor.sensitivities(lambda p: p.tpot_ns(pos)) if s.swing > 0]
    return summary


def _scaled(value: Interval, factor: float) -> dict[str, float]:
    return {"fast": value.fast * factor, "point": value.point * factor, "slow": value.slow * factor}


def _rate(value: Interval, tokens: int) -> dict[str, float]:
    return {"fast": tokens * 1e9 / value.fast, "point": tokens * 1e9 / value.point, "slow": tokens * 1e9 / value.slow}


def _tornado_row(s: Sensitivity) -> dict[str, Any]:
    return {
        "constant": s.name,
        "low": s.constant.low,
        "high": s.constant.high,
        "tpot_ms_at_low": s.at_low * 1e-6,
        "tpot_ms_at_high": s.at_high * 1e-6,
        "source": s.constant.source,
    }


# ------------------------------------------------------------------------------------------------------------- other reports


def _html(predictor: Predictor, summary: dict[str, Any], prompt: int, pos: int) -> str:
    from tyir.runtime_sim.report import layer_costs, op_costs
    from tyir.runtime_sim.report_html import HtmlData, html_report

    shortest = min(predictor.seqlens)
    last = predictor.capacity - shortest
    prompts = sorted({min(n, last) for n in (1, prompt // 2 or 1, prompt, prompt * 2)})
    positions = sorted({0, min(pos, last), last // 2, last})

    def curve(figure: Callable[[Predictor, int], float], points: Sequence[int]) -> list[tuple[int, float, float, float]]:
        rows = []
        for n in points:
            value = predictor.interval(lambda p, n=n: figure(p, n))  # type: ignore[misc]
            rows.append((n, value.fast * 1e-6, value.point * 1e-6, value.slow * 1e-6))
        return rows

    step = predictor.step(shortest, pos)
    ttft, tpot = curve(lambda p, n: p.ttft_ns(n), prompts), curve(lambda p, n: p.tpot_ns(n), positions)
    return html_report(HtmlData(summary, predictor.machine, step, op_costs(step), layer_costs(step), ttft, tpot))


def _sweep(args: argparse.Namespace, predictor: Predictor, prompt: int, pos: int) -> str:
    """A line for each value of one constant."""
    name, _, values = args.sweep.partition("=")
    try:
        numbers = [float(v) for v in values.split(",")]
    except ValueError:
        raise TyirError(
            f"--sweep {args.sweep}: '{values}' is no list of numbers", help="write --sweep dram.bandwidth_gbps=17,30,34"
        ) from None
    lines = [f"{name:<30}{'TTFT ms':>12}{'TPOT ms':>12}{'prefill tok/s':>15}{'decode tok/s':>14}"]
    rows = []
    for value in numbers:
        at = predictor.on(predictor.machine.with_overrides({name: value}))
        ttft, tpot = at.ttft_ns(prompt), at.tpot_ns(pos)
        rows.append({"value": value, "ttft_ms": ttft * 1e-6, "tpot_ms": tpot * 1e-6})
        lines.append(f"{value:<30g}{ttft * 1e-6:>12.4g}{tpot * 1e-6:>12.4g}{prompt * 1e9 / ttft:>15.4g}{1e9 / tpot:>14.4g}")
    return json.dumps({"constant": name, "rows": rows}, indent=1) if args.report == "json" else "\n".join(lines)


def _compare(args: argparse.Namespace) -> int:
    """Two artifact folders side by side, op by op."""
    found = []
    for folder in args.artifacts:
        one = argparse.Namespace(**{**vars(args), "artifacts": [folder]})
        predictor, name = _predictor(one)
        prompt, pos = _positions(one, predictor)
        found.append(_summary(predictor, name, prompt, pos, one))
    a, b = found
    if args.report == "json":
        print(json.dumps({"a": a, "b": b}, indent=1))
        return 0
    print(f"a = {a['artifacts']}, {a['dies']} dies\nb = {b['artifacts']}, {b['dies']} dies\n\n{'':<34}{'a':>12}{'b':>12}{'b / a':>9}")
    for label, key in (
        ("TTFT (ms)", "ttft_ms"),
        ("TPOT (ms)", "tpot_ms"),
        ("prefill (tokens/s)", "prefill_tokens_per_s"),
        ("decode (tokens/s)", "decode_tokens_per_s"),
    ):
        print(f"{label:<34}{a[key]['point']:>12.4g}{b[key]['point']:>12.4g}{b[key]['point'] / a[key]['point']:>9.3f}")
    times = [{(o["source"], o["path"]): o["time_ns"] / 1000 for o in s["ops"]} for s in found]
    print(f"\n{'op (us of the decode step)':<66}{'a':>12}{'b':>12}")
    keys = sorted(set(times[0]) | set(times[1]), key=lambda k: -max(t.get(k, 0.0) for t in times))
    for op in keys[: args.top]:
        print(f"{op[0]:<22}{op[1][-43:]:<44}" + "".join(f"{t[op]:>12.2f}" if op in t else f"{'-':>12}" for t in times))
    return 0


# ------------------------------------------------------------------------------------------------------------- text


def _text(s: dict[str, Any], top: int) -> str:
    state = (
        "calibrated"
        if s["calibrated"]
        else f"uncalibrated: {len(s['assumed_constants'])} constants are assumed; intervals are their bounds, all together"
    )
    lines = [
        f"{s['artifacts']} on {s['dies']} x {s['machine']} (simulated device time plus {s['host_ms_per_step']:g} ms of host time a step)",
        state,
        "",
    ]
    lines.append(f"{'':<34}{'fast':>10}{'point':>10}{'slow':>10}")
    for label, key in (
        (f"TTFT, {s['prompt_tokens']} tokens (ms)", "ttft_ms"), (f"TPOT at position {s['pos']} (ms)", "tpot_ms"), ("prefill (tokens/s)", "prefill_tokens_per_s"),
        ("decode (tokens/s)", "decode_tokens_per_s"),
    ):  # fmt: skip
        lines.append(f"{label:<34}" + "".join(f"{s[key][k]:>10.4g}" for k in ("fast", "point", "slow")))
    step = s["step"]
    lines += [
        "",
        f"one step of {step['seqlen']} at position {s['pos']}: {step['device_ms']:.4g} ms on the device, {step['commands']} commands; bound by {step['bound_by']}",
    ]
    lines.append("busy: " + ", ".join(f"{unit} {100 * share:.0f} %" for unit, share in step["unit_shares"].items()))
    lines.append(f"DRAM: {max(step['dram_bytes']) / 1e6:.2f} MB a die, {max(step['dram_gbps']):.1f} GB/s over the step")
    lines += ["", f"{'op':<22}{'where':<44}{'calls':>6}{'us':>10}{'share':>8}{'MB':>9}{'MMAC':>9}  bounded by"]
    total = sum(o["time_ns"] for o in s["ops"]) or 1.0
    for o in s["ops"][:top]:
        lines.append(
            f"{o['source']:<22}{o['path'][-43:]:<44}{o['calls']:>6}{o['time_ns'] / 1e3:>10.2f}{100 * o['time_ns'] / total:>7.1f}%{o['dram_bytes'] / 1e6:>9.3f}{o['macs'] / 1e6:>9.2f}  {o['bound_by']}"
        )
    if "tornado" in s:
        lines += ["", f"{'assumed constant, alone':<30}{'low':>10}{'high':>10}{'TPOT (ms)':>22}"]
        lines += [
            f"{t['constant']:<30}{t['low']:>10g}{t['high']:>10g}{t['tpot_ms_at_low']:>11.4g}{t['tpot_ms_at_high']:>11.4g}"
            for t in s["tornado"]
        ]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="tyir-sim",
        description="Simulate the time that compiled command programs take on the device.",
        epilog="Every constant of the machine is in its .toml file with unit, source and bounds; --set changes one for this run.",
    )
    parser.add_argument(
        "artifacts", type=Path, nargs="+", metavar="OUT/{n}die", help="artifact folder, or the .edge10 files of all dies for one length"
    )
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="length of the prompt for the time to first token (default 128)")
    parser.add_argument("--pos", type=int, metavar="N", help="cached tokens for the time per output token (default: the prompt's)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a constant, e.g. dram.bandwidth_gbps=34.1; may be repeated"
    )
    parser.add_argument("--machine", metavar="NAME|FILE", help="machine to simulate (default: the one the programs were compiled for)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write the decode step as a Chrome trace (JSON, opens in Perfetto)")
    parser.add_argument("--report", choices=("text", "json", "html"), default="text", help="how to print the result (default text)")
    parser.add_argument("-o", "--output", default="-", metavar="FILE", help="where the HTML page goes (default: standard output)")
    parser.add_argument("--compare", action="store_true", help="compare two artifact folders")
    parser.add_argument("--sweep", metavar="NAME=V,V,..", help="the figures for several values of one constant")
    parser.add_argument("--tornado", action="store_true", help="also show how far each assumed constant alone moves the time per token")
    parser.add_argument("--top", type=int, default=12, metavar="N", help="how many ops to list (default 12)")
    parser.add_argument("--no-check", action="store_true", help="do not verify the artifacts' hashes")
    add_debug_option(parser)
    return parser
