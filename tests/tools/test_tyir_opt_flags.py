"""`tyir-opt`'s flags for watching and searching: JSON, bisecting, elided constants, xDSL's pipeline form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tyir.tools.tyir_compile import main as compile_main
from tyir.tools.tyir_opt import main

IR = (
    """"func.func"() <{sym_name = "f", function_type = (tensor<4xf16>) -> (tensor<4xf16>, tensor<30xf32>)}> ({
^bb0(%x: tensor<4xf16>):
  %a = "ty.silu"(%x) : (tensor<4xf16>) -> tensor<4xf16>
  %b = "ty.silu"(%x) : (tensor<4xf16>) -> tensor<4xf16>
  %c = "ty.constant"() <{value = dense<"0x"""
    + "00010203" * 30
    + """"> : tensor<30xf32>}> : () -> tensor<30xf32>
  "func.return"(%b, %c) : (tensor<4xf16>, tensor<30xf32>) -> ()
}) : () -> ()
"""
)
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def ir(tmp_path: Path) -> Path:
    path = tmp_path / "in.ir"
    path.write_text(IR)
    return path


def test_timing_and_statistics_as_json(ir: Path, capsys: Capture) -> None:
    assert main([str(ir), "--cse", "--dce", "--timing=json", "--pass-statistics=json"]) == 0
    timing, statistics = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert [stage["name"] for stage in timing["timing"]["stages"]] == ["cse", "dce"]
    assert timing["timing"]["stages"][0]["peak_mib"] is None or timing["timing"]["peak_mib"] > 1
    assert statistics == {"statistics": {"cse.merged": 1, "dce.deleted": 0}}


def test_bare_format_flags_leave_the_file_alone(ir: Path, capsys: Capture) -> None:
    assert main(["--cse", "--timing", str(ir)]) == 0
    assert "peak MiB" in capsys.readouterr().err
    assert main(["--timing=yaml", str(ir)]) == 1
    assert "'yaml' is neither text nor json" in capsys.readouterr().err


def test_lists_as_json(capsys: Capture) -> None:
    assert main(["--list-passes=json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    kv = next(p for p in listed["passes"] if p["name"] == "kv-materialize")
    assert {"name": "max-kv", "kind": "an integer", "default": "1024"} in kv["options"]
    assert "to-ty" in listed["pipelines"]
    assert main(["--show-dialects=json"]) == 0
    dialects = json.loads(capsys.readouterr().out)["dialects"]
    assert "ty.silu" in [op["name"] for d in dialects for op in d["ops"]]


def test_opt_bisect_limit(ir: Path, capsys: Capture) -> None:
    assert main([str(ir), "--cse", "--dce", "--opt-bisect-limit=1"]) == 0
    err = capsys.readouterr().err.splitlines()
    assert err == [
        "BISECT: running pass (1) cse on 'builtin.module'",
        "BISECT: NOT running pass (2) dce on 'builtin.module'",
    ]
    assert main([str(ir), "--cse", "--opt-bisect-limit=0"]) == 0
    assert capsys.readouterr().out.count("ty.silu") == 2


@pytest.mark.parametrize(
    ("constant", "printed"),
    [
        ("dense<[1, 2, 3, 4]> : vector<4xi32>", "dense_resource<__elided__> : vector<4xi32>"),
        ("dense<7> : vector<4xi32>", "dense<7> : vector<4xi32>"),
        ("dense<[1, 2]> : vector<2xi32>", "dense<[1, 2]> : vector<2xi32>"),
    ],
)
def test_large_vectors_are_elided(constant: str, printed: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "vector.ir"
    path.write_text(f"module attributes {{x = {constant}}} {{\n}}\n")
    assert main([str(path), "--elide-large-constants=3"]) == 0
    assert f"x = {printed}" in capsys.readouterr().out


def test_elided_files_are_refused(ir: Path, tmp_path: Path, capsys: Capture) -> None:
    elided = tmp_path / "elided.ir"
    assert main([str(ir), "--elide-large-constants", "-o", str(elided)]) == 0
    assert "value = dense_resource<__elided__> : tensor<30xf32>" in elided.read_text()
    assert main([str(ir), "--mlir-elide-elementsattrs-if-larger=30"]) == 0
    assert "__elided__" not in capsys.readouterr().out
    assert main([str(elided)]) == 1
    assert (
        "property 'value' was left out when this file was printed (--elide-large-constants)"
        in capsys.readouterr().err
    )
    assert compile_main([str(elided), "-o", str(tmp_path / "out")]) == 1
    assert "its constants are not in it" in capsys.readouterr().err


def test_pipeline_as_xdsl_writes_it(ir: Path, capsys: Capture) -> None:
    assert (
        main([str(ir), "-p", "cse,kv-materialize{max_kv=64}", "--opt-bisect-limit=1", "--dump-pass-pipeline"])
        == 0
    )
    assert "kv-materialize{max-kv=64" in capsys.readouterr().err


def test_only_changed_ops_are_verified(ir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    verified: list[str] = []
    monkeypatch.setattr("tyir.pipeline.verify", lambda op: verified.append(op.name))
    assert main([str(ir), "--pass-pipeline=print-op-stats,func.func(cse),cse"]) == 0
    assert verified == ["func.func"]  # the statistics change nothing, and the second cse finds nothing
    assert main([str(ir), "--cse", "--verify-each=0"]) == 0
    assert verified == ["func.func"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--cse", "--print-ir-after=css"],
            "there is no pass 'css' to print the IR at\nhelp: did you mean 'cse'?",
        ),
        (["other.ir"], "too many inputs: "),
        (["--verify-diagnostics=some"], "'some' is not a value of --verify-diagnostics: all, only-expected"),
    ],
)
def test_wrong_flags(ir: Path, capsys: Capture, arguments: list[str], message: str) -> None:
    assert main([str(ir), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_flags_of_mlir_opt_that_hold_anyway(ir: Path, capsys: Capture) -> None:
    assert (
        main(
            [
                str(ir),
                "-cse",
                "--mlir-disable-threading",
                "--mlir-print-local-scope",
                "-mlir-print-op-generic",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.count("ty.silu") == 1


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tyir 0.")


def test_only_expected_diagnostics_and_patterns(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "in.ir"
    wrong = '%a = "ty.silu"(%y) : (tensor<4xf16>) -> tensor<4xf16>\n'
    path.write_text(wrong)
    assert main([str(path), "--verify-diagnostics"]) == 1
    assert main([str(path), "--verify-diagnostics=only-expected"]) == 0
    path.write_text("// expected-error-re @below {{use of {{[a-z]+}} value %y{{$}}}}\n" + wrong)
    assert main([str(path), "--verify-diagnostics"]) == 0
    path.write_text("// expected-error-re @below {{use.of}}\n" + wrong)
    assert main([str(path), "--verify-diagnostics"]) == 1
