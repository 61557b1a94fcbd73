"""Figures, intervals, the division of time among ops, and the trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pictures import drawings, illegible
from tests.runtime_sim.test_hand_worked import MACHINE, Die
from tyir.dialects import edge10
from tyir.printer import print_op
from tyir.runtime_sim.report import charts
from tyir.runtime_sim.report.comparison import compare_text
from tyir.runtime_sim.report.text import text_report
from tyir.runtime_sim.timing.costs import layer_costs, op_costs, unit_shares
from tyir.runtime_sim.timing.engine import simulate
from tyir.runtime_sim.timing.predictor import Predictor
from tyir.runtime_sim.timing.summary import Summary, summarize
from tyir.runtime_sim.timing.trace import chrome_trace
from tyir.types import f16


@pytest.fixture
def predictor(make_model: Callable[..., Any]) -> Predictor:
    models = {n: make_model(tokens=n, group=16) for n in (1, 8)}
    return Predictor(lambda s: models[s].programs, (1, 8), 40, models[1].machine)


def test_prompt_is_the_sum_of_its_chunks(predictor: Predictor) -> None:
    host = predictor.machine.host.step_us * 1000
    steps = [predictor.step(8, 0), predictor.step(8, 8), predictor.step(1, 16)]
    assert predictor.ttft_ns(17) == pytest.approx(sum(s.total_ns for s in steps) + 3 * host)
    assert predictor.tpot_ns(17) == pytest.approx(predictor.step(1, 17).total_ns + host)
    assert predictor.ttft_ns(9) < predictor.ttft_ns(17)


def test_long_prompts_are_interpolated_closely(make_model: Callable[..., Any]) -> None:
    model = make_model(capacity=400, layers=1)
    predictor = Predictor(lambda s: model.programs, (1,), 400, model.machine)
    exact = sum(predictor.step(1, p).total_ns + predictor.machine.host.step_us * 1000 for p in range(30))
    assert predictor.ttft_ns(30) == pytest.approx(exact, rel=0.01)


def test_interval_holds_the_point_and_shrinks_with_what_is_known(predictor: Predictor) -> None:
    wide = predictor.interval(lambda p: p.tpot_ns(13))
    assert wide.fast < wide.point < wide.slow
    known = predictor.on(predictor.machine.with_overrides({"dram.bandwidth_gbps": 30.4, "host.step_us": 300}))
    narrow = known.interval(lambda p: p.tpot_ns(13))
    assert narrow.point == wide.point and narrow.slow - narrow.fast < wide.slow - wide.fast


def test_sensitivities_are_sorted_and_include_the_host(predictor: Predictor) -> None:
    found = predictor.sensitivities(lambda p: p.tpot_ns(13))
    assert [s.swing for s in found] == sorted((s.swing for s in found), reverse=True)
    assert found[0].name == "host.step_us" and found[0].swing == pytest.approx(900e3)


def test_ops_share_the_whole_step(predictor: Predictor) -> None:
    timing = predictor.step(8, 8)
    costs = op_costs(timing)
    launch = predictor.machine.sync.launch_us * 1000
    assert sum(c.time_ns for c in costs) == pytest.approx(timing.total_ns - launch)
    assert sum(c.dram_bytes for c in costs) == timing.dram_bytes[0]
    q_proj = next(c for c in costs if c.path == "model.layers.*.self_attn.q_proj")
    assert (q_proj.calls, q_proj.macs) == (2, 2 * 8 * 64 * 64)
    assert all(0 <= share <= 1 for share in unit_shares(timing).values())


def test_trace_is_valid_and_tracks_do_not_overlap(make_model: Callable[..., Any]) -> None:
    model = make_model(dies=2, group=16)
    predictor = Predictor(lambda s: model.programs, (1,), 40, model.machine)
    timing = predictor.step(1, 5)
    events = json.loads(chrome_trace(timing))["traceEvents"]
    assert {e["pid"] for e in events} == {0, 1}
    runs = [e for e in events if e["ph"] == "X"]
    assert len(runs) == sum(map(len, timing.records))
    last: dict[tuple[int, int], float] = {}
    for e in runs:
        key = (e["pid"], e["tid"])
        assert e["ts"] >= last.get(key, 0.0) - 1e-5
        last[key] = e["ts"] + e["dur"]


def test_html_page_is_self_contained_and_costs_add_up(make_model: Callable[..., Any], tmp_path: Path) -> None:
    from tyir.tools.tyir_sim import main

    model = make_model(dies=2, group=16)
    paths = []
    for number, module in enumerate(model.lowered):
        paths.append(tmp_path / f"d{number}.edge10")
        paths[-1].write_text(print_op(module))
    out = tmp_path / "r.html"
    assert (
        main([*map(str, paths), "--report", "html", "-o", str(out), "--prompt-tokens", "4", "--tornado"]) == 0
    )
    page = out.read_text()
    assert [wrong for drawing in drawings(page) for wrong in illegible(drawing)] == []
    assert page.count("<svg") >= 7 and "Uncalibrated" in page and "bounded by" in page
    assert "http" not in page and "<script" not in page and "nan" not in page
    timing = simulate(model.programs, model.machine, 4)
    assert sum(c.time_ns for c in layer_costs(timing)) == pytest.approx(
        sum(c.time_ns for c in op_costs(timing))
    )
    assert [c.layer for c in layer_costs(timing)] == [-1, 0, 1]


def test_trace_has_an_arrow_for_each_collective(make_model: Callable[..., Any]) -> None:
    model = make_model(dies=2)
    timing = simulate(model.programs, model.machine, 4)
    events = json.loads(chrome_trace(timing))["traceEvents"]
    starts, ends = ([e for e in events if e["ph"] == kind] for kind in "sf")
    assert len(starts) == len(ends) == sum(r.command.unit == "d2d" for r in timing.records[0])
    assert {e["id"] for e in starts} == {e["id"] for e in ends} and all(e["pid"] == 0 for e in starts)


def test_trace_arrows_of_a_send_lead_to_its_receivers() -> None:
    """Die 0 hands 7168 bytes to dies 1 and 2, after dies 1 and 2 have added among themselves."""
    programs = []
    for number in range(3):
        die = Die(number, 3)
        if number == 0:
            die.add(edge10.Send((), source=0, nbytes=7168, targets=(1, 2)))
        else:
            total = die.add(
                edge10.AllReduce((), source=0, destination=0, nbytes=64, element=f16, dies=(1, 2))
            )
            die.add(edge10.Recv((total,), destination=0, nbytes=7168, peer=0))
        programs.append(die.program())
    events = json.loads(chrome_trace(simulate(programs, MACHINE, 0)))["traceEvents"]
    arrows = {(e["id"], e["name"]): e["pid"] for e in events if e["ph"] == "s"}
    targets = {e["id"]: e["pid"] for e in events if e["ph"] == "f"}
    found = sorted((name, pid, targets[arrow]) for (arrow, name), pid in arrows.items())
    assert found == [("edge10.all_reduce", 1, 2), ("edge10.send", 0, 1), ("edge10.send", 0, 2)]


def test_figures_side_by_side(make_model: Callable[..., Any]) -> None:
    def summary(dies: int) -> Summary:
        models = {n: make_model(tokens=n, group=16, dies=dies) for n in (1, 8)}
        predictor = Predictor(lambda s: models[s].programs, (1, 8), 40, models[1].machine)
        return summarize(predictor, f"out/{dies}die", 12, 12, curves=dies > 1)

    one, two = summary(1), summary(2)
    text = text_report(two, 3)
    assert "collectives: 5 with" in text  # two sums in each of two layers, one gather of logits
    assert [p.tokens for p in two.ttft_by_prompt] == [1, 6, 12, 24, 39] and [
        p.tokens for p in two.tpot_by_position
    ] == [0, 9, 12, 19, 39]
    assert all(p.ms.fast < p.ms.point < p.ms.slow for p in (*two.ttft_by_prompt, *two.tpot_by_position))
    assert (
        two.prefill_step is not None
        and two.prefill_step.seqlen == 8
        and "one step of 8 at position 0" in text
    )
    shown = compare_text(one, two, 4).splitlines()
    ratio = next(line for line in shown if line.startswith("TPOT at position 12")).split()[-1]
    assert float(ratio) == pytest.approx(two.tpot_ms.point / one.tpot_ms.point, abs=6e-4)
    assert Summary.from_json(json.loads(json.dumps(two.as_json())), "a file") == two


def test_device_and_host_add_up_everywhere(predictor: Predictor) -> None:
    s = summarize(predictor, "out", 12, 9, tornado=True)
    host = s.host_ms_per_step
    assert s.prefill_steps == 2  # a chunk of 8, and 4 padded to 8
    assert s.tpot_ms.point - s.tpot_device_ms.point == pytest.approx(host)
    assert s.ttft_ms.point - s.ttft_device_ms.point == pytest.approx(2 * host)
    assert s.tpot_device_ms.point == s.decode_step.device_ms
    for points, steps in ((s.ttft_by_prompt, predictor.prefill_steps), (s.tpot_by_position, lambda n: 1)):
        for p in points:
            assert p.ms.point - p.device_ms.point == pytest.approx(steps(p.tokens) * host)
    *device, last = s.tornado
    assert last.constant == "host.step_us" and not last.of_device and all(r.of_device for r in device)
    swings = [abs(r.device_ms_at_high - r.device_ms_at_low) for r in device]
    assert swings == sorted(swings, reverse=True)


@pytest.mark.parametrize("step_us", [0.001, 1.0, 20.0, 5000.0])
def test_the_host_bounds_decode_when_it_takes_most(predictor: Predictor, step_us: float) -> None:
    other = predictor.on(predictor.machine.with_overrides({"host.step_us": step_us}))
    s = summarize(other, "out", 12, 9, curves=False)
    busiest = s.decode_step.unit_shares[s.decode_step.bound_by] * s.decode_step.device_ms
    assert (s.decode_bound_by == "host") == (step_us / 1000 > busiest)
    assert f"decode bound by {s.decode_bound_by}" in text_report(s, 0)


def test_unlike_lengths_are_never_side_by_side(predictor: Predictor) -> None:
    one, other = (summarize(predictor, "out", 12, pos, curves=False) for pos in (9, 12))
    lines = compare_text(one, other, 5).splitlines()
    assert (
        len([line for line in lines if line.startswith("TTFT, 12 tokens") and line.endswith(" 1.000")]) == 2
    )
    lonely = [line for line in lines if " at position " in line and line.split()[-1] == "-"]
    assert len(lonely) == 4 and all("position 9" in line for line in lonely)
    assert any("unlike lengths" in line for line in lines) and not any("busy (%)" in line for line in lines)
    longer = Predictor(predictor.programs, (8,), 40, predictor.machine)  # its decode step is of 8 tokens
    shown = compare_text(one, summarize(longer, "out", 12, 9, curves=False), 5)
    assert "TPOT at position 9, steps of 8 (ms)" in shown and "1 at position 9 and 8 at position 9" in shown


def test_sweep_prints_a_line_for_each_value(
    make_model: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tyir.tools.tyir_sim import main

    path = tmp_path / "d.edge10"
    path.write_text(print_op(make_model().lowered[0]))
    assert main([str(path), "--prompt-tokens", "4", "--sweep", "dram.bandwidth_gbps=17,30,34"]) == 0
    lines = capsys.readouterr().out.splitlines()
    times = [float(line.split()[2]) for line in lines[1:]]
    assert len(times) == 3 and times == sorted(times, reverse=True)
    assert main([str(path), "--sweep", "dram.bandwidth_gbps"]) == 1
    assert main([str(path), "--compare"]) == 1


def test_labels_of_dots_that_lie_close_do_not_cover_each_other() -> None:
    """Twelve names at one point, at the lower edge, and at the right one."""
    labels = charts._Labels(20, 300, [(100.0, 200.0, 60.0)])
    taken = [(100.0, 200.0, 60.0)]
    for x, y in [(150.0, 58.0)] * 4 + [(10.0, 400.0)] * 4 + [(430.0, 299.0)] * 4:
        at = labels.free(x, x + 80, y)
        assert at - 13 >= 20 and at <= 300
        assert not any(a < x + 80 and x < b and abs(at - c) < 13 for a, b, c in taken)
        taken.append((x, x + 80, at))


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ("<text x='10' y='20'>a word</text><text x='30' y='22'>another</text>", "cover each other"),
        ("<text x='5' y='20' text-anchor='end'>a word</text>", "is cut off"),
        ("<text x='80' y='20'>a long sentence</text>", "is cut off"),
        ("<g transform='translate(60 0)'><text x='30' y='20'>a word</text></g>", "is cut off"),
        ("<line x1='0' y1='0' x2='90' y2='40' marker-end='a'/><text x='30' y='20'>a</text>", "an arrow"),
        ("<text x='10' y='20'>a word</text><text x='10' y='40'>another</text>", ""),
    ],
)
def test_what_cannot_be_read_is_found(body: str, wrong: str) -> None:
    found = illegible(f"<svg viewBox='0 0 100 50'>{body}</svg>")
    assert len(found) == bool(wrong) and wrong in "".join(found)
