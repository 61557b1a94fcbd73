"""`tyir-sim` on hand-written command programs: figures, overrides, traces, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tyir.tools.tyir_sim import main

GPU = str(Path(__file__).parents[2] / "runtime_sim" / "gpu" / "h200.toml")

PROGRAM = """"builtin.module"() <{sym_name = "die0"}> ({
  "edge10.buffer"() <{address = 0 : i64, kind = "weight", nbytes = 1048576 : i64, sym_name = "w", type = tensor<1048576xui8>}> : () -> ()
  "edge10.buffer"() <{address = 1048576 : i64, kind = "kv", nbytes = 65536 : i64, sym_name = "k", type = tensor<1x2x128x128xf16>}> : () -> ()
  "func.func"() <{function_type = () -> (), sym_name = "main_s1"}> ({
    %w = "edge10.address_of"() <{symbol = @w}> : () -> !edge10.address
    %a = "edge10.load"(%w) <{dram_strides = array<i64: 0, 0>, queue = "ewdma", shape = array<i64: 1, 1, 1048576>, sram = 0 : i64, sram_strides = array<i64: 0, 0>}> {tyir.source = "ty.linear"} : (!edge10.address) -> !edge10.token
    "func.return"() : () -> ()
  }) {tyir.entry = 1 : i64} : () -> ()
}) {tyir.machine = "edge10"} : () -> ()
"""  # noqa: E501


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "llm_die0.edge10"
    path.write_text(PROGRAM)
    return str(path)


def test_text_says_uncalibrated_and_gives_intervals(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([program, "--pos", "7"]) == 0
    out = capsys.readouterr().out
    assert (
        "uncalibrated" in out
        and "TPOT at position 7" in out
        and "bound by dram" in out
        and "ty.linear" in out
    )


def test_json_and_overrides(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    figures = []
    for setting in ("dram.bandwidth_gbps=20", "dram.bandwidth_gbps=40"):
        assert (
            main(
                [
                    program,
                    "--report",
                    "json",
                    "--set",
                    setting,
                    "--set",
                    "dram.efficiency=1",
                    "--set",
                    "dram.run_overhead_bytes=0",
                ]
            )
            == 0
        )
        figures.append(json.loads(capsys.readouterr().out))
    slow, fast = (f["decode_step"]["device_ms"] for f in figures)
    assert slow - fast == pytest.approx(1048576 * (1 / 20 - 1 / 40) * 1e-6)
    assert figures[0]["overrides"]["dram.bandwidth_gbps"] == 20 and not figures[0]["calibrated"]
    assert figures[0]["tpot_ms"]["fast"] < figures[0]["tpot_ms"]["point"] < figures[0]["tpot_ms"]["slow"]


def test_trace_is_written(program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    assert main([program, "--trace", str(trace)]) == 0
    assert len([e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "dram.bandwidth=3"], "did you mean 'dram.bandwidth_gbps'?"),
        (["--set", "dram.bandwidth_gbps=fast"], "'fast' is not a number"),
        (["--set", "dram.bandwidth_gbps"], "lacks a value"),
        (["--pos", "200"], "leaves no room for a step of 1 in a cache of 128"),
        (["--prompt-tokens", "0"], "the nearest possible is 1"),
        (["--pos", "-1"], "--pos -1 is negative"),
        (["--machine", "edge11"], "known machines: "),
        (["--machine", GPU], "describes no die that runs command programs"),
        (["--machine", "mine.toml"], "cannot read the machine file mine.toml"),
        (["--set", "dram.bandwidth_gbps=-3"], "must be positive"),
        (["--sweep", "dram.bandwith=1,2"], "has no constant 'dram.bandwith'"),
        (["--sweep", "dram.bandwidth_gbps=1,x"], "'1,x' is not a list of numbers"),
        (["--report", "html", "--sweep", "dram.bandwidth_gbps=1"], "no HTML page"),
        (["--compare"], "--compare takes two artifact folders, 1 given"),
        (["--top", "-1"], "--top 0 lists no ops"),
        (["nothing"], "nothing does not exist"),
        (["--machine", "edge10", "--machine", "hopper_sm"], "--machine is given 2 times"),
        (
            ["--compare", "--machine", "a", "--machine", "b", "--machine", "c"],
            "1 given and 3 machines",
        ),
    ],
)
def test_refusals(
    program: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([program, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_folders_without_artifacts_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "holds no manifest.json" in capsys.readouterr().err


def test_check_plan(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([program, "--check-plan"]) == 0
    assert (
        "memory plan of 1 die, lengths 1: 2 commands replayed with an empty and a full cache"
        in capsys.readouterr().out
    )
    Path(program).write_text(PROGRAM.replace("address = 1048576", "address = 1048000"))
    assert main([program, "--check-plan"]) == 1
    captured = capsys.readouterr()
    assert not captured.out and "buffers @w at 0..1048576 and @k at 1048000..1113536 overlap" in captured.err


def test_a_machine_with_less_sram_than_the_program_uses(
    program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program loads a MiB; half of that cannot have been."""
    assert main([program, "--set", "sram.capacity_bytes=524288"]) == 1
    captured = capsys.readouterr()
    assert (
        not captured.out
        and "use 1,048,576 bytes of SRAM, edge10 has 524,288" in captured.err
        and "tyir-compile --machine" in captured.err
    )


def compared(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.fixture
def shorter(tmp_path: Path) -> str:
    """The program with a cache of 64 tokens."""
    path = tmp_path / "shorter.edge10"
    path.write_text(PROGRAM.replace("1x2x128x128", "1x2x64x256"))
    return str(path)


def test_two_are_compared_in_any_order(
    program: str, shorter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = compared(capsys, program, "--compare", shorter)
    assert shown == compared(capsys, "--compare", program, shorter)
    assert shown == compared(capsys, program, shorter, "--compare")
    assert "a = " + program in shown and "b = " + shorter in shown
    # the smaller cache decides for both, so that every row has a ratio
    assert "TTFT, 63 tokens (ms)" in shown and "TPOT at position 63 (ms)" in shown
    assert not [line for line in shown.splitlines() if line.startswith(("TTFT", "TPOT")) and " - " in line]


@pytest.mark.parametrize(
    "machines", [["edge10", "faster"], ["faster"], ["faster", "edge10"], ["faster", "faster"]]
)
def test_one_artifact_on_two_machines(
    program: str, tmp_path: Path, machines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "faster.toml"
    file.write_text(
        'base = "edge10"\n[dram]\nbandwidth_gbps = {value = 68.3, label = "published", source = "two"}\n'
    )
    paths = {"edge10": "edge10", "faster": str(file)}
    flags = [word for name in machines for word in ("--machine", paths[name])]
    shown = compared(capsys, program, "--compare", *flags).splitlines()
    a, b = machines if len(machines) == 2 else ["edge10", *machines]
    assert shown[:2] == [f"a = {program}, 1 x {a}", f"b = {program}, 1 x {b}"]
    ratio = next(float(line.split()[-1]) for line in shown if line.startswith("TPOT") and "device" in line)
    assert (ratio < 0.7, ratio > 1.4) == (a < b, a > b)  # "edge10" < "faster"


def test_saved_reports(
    program: str, shorter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of them, one beside artifacts, and one alone."""
    saved = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    for path, report in zip((program, shorter), saved):
        assert main([path, "--report", "json", "-o", report, "--top", "1"]) == 0
    text = compared(capsys, *saved, "--compare")
    assert "TTFT, 127 tokens (ms)" in text and "TTFT, 63 tokens (ms)" in text and "unlike lengths" in text
    assert "TPOT at position 127 (ms)" in compared(capsys, program, "--compare", saved[0])
    assert "unlike lengths" in compared(capsys, saved[0], "--compare", shorter)
    assert compared(capsys, saved[0]) == compared(capsys, program)
    assert main([*saved, "--compare", "--pos", "3"]) == 1
    assert "--pos would have to simulate" in capsys.readouterr().err
    assert main([saved[0], "--report", "html"]) == 1 and "holds no timeline" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: {"a": values, "b": values}, "is a comparison"),
        (
            lambda values: {k: v for k, v in values.items() if k != "tpot_device_ms"},
            "tpot_device_ms is missing",
        ),
        (lambda values: {**values, "dies": "two"}, "dies is 'two'"),
        (lambda values: {**values, "pos": 1.5}, "pos is 1.5"),
    ],
)
def test_what_is_no_report_is_said(
    program: str, tmp_path: Path, change: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([program, "--report", "json"]) == 0
    path = tmp_path / "r.json"
    path.write_text(json.dumps(change(json.loads(capsys.readouterr().out))))
    assert main([str(path), "--compare", program]) == 1
    assert message in capsys.readouterr().err


def test_a_sweep_shows_the_device_alone(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a step that DRAM bounds, twice the bandwidth is nearly twice the rate; the host hides it."""
    shown = compared(capsys, program, "--sweep", "dram.bandwidth_gbps=10,20")
    slow, fast = (list(map(float, line.split())) for line in shown.splitlines()[1:])
    assert fast[-1] / slow[-1] > 1.5 and fast[-2] / slow[-2] < 1.3
