"""`tyir-opt`: streams, exit codes, flags, messages."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tyir.tools.tyir_opt import main

IR = """"func.func"() <{sym_name = "f", function_type = (tensor<4xf16>) -> tensor<4xf16>}> ({
^bb0(%x: tensor<4xf16>):
  %dead = "ty.silu"(%x) : (tensor<4xf16>) -> tensor<4xf16>
  %y = "ty.silu"(%x) : (tensor<4xf16>) -> tensor<4xf16> loc("model.layers.0.mlp")
  "func.return"(%y) : (tensor<4xf16>) -> ()
}) : () -> ()
"""
CRASH = (
    "from dataclasses import dataclass\nfrom tyir.pipeline import Pass\n\n@dataclass(frozen=True)\nclass"
    " Crash(Pass):\n    'Crashes.'\n    def run(self, op, context):\n        raise KeyError('boom')\n"
)


@pytest.fixture
def ir(tmp_path: Path) -> Path:
    path = tmp_path / "in.ir"
    path.write_text(IR)
    return path


Capture = pytest.CaptureFixture[str]


def test_ir_on_stdout_and_nothing_else(ir: Path, capsys: Capture) -> None:
    assert main([str(ir), "--cse", "--timing", "--pass-statistics", "--dump-pass-pipeline"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith('"builtin.module"() ({\n') and out.count("ty.silu") == 1
    assert "builtin.module(cse)" in err and "1 cse.merged" in err and "peak MiB" in err


def test_stdin(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(IR.encode())))
    assert main(["--dce"]) == 0
    assert "%dead" not in capsys.readouterr().out


def test_flags_run_in_order(ir: Path, capsys: Capture) -> None:
    assert main(["--dce", str(ir), "--print-op-stats=json=true", "--dump-pass-pipeline"]) == 0
    assert "builtin.module(dce,print-op-stats{json=true})" in capsys.readouterr().err


def test_output_file_appears_only_on_success(ir: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out.ir"
    assert main([str(ir), "--kv-materialize=max-kv=0", "-o", str(out)]) == 1
    assert not out.exists()
    assert main([str(ir), "-o", str(out)]) == 0
    assert out.read_text().startswith('"builtin.module"')
    assert list(tmp_path.glob(".*partial")) == []


def test_output_to_a_pipe_or_through_a_link(ir: Path, tmp_path: Path) -> None:
    pipe, real, link = tmp_path / "pipe", tmp_path / "real.ir", tmp_path / "link.ir"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    assert main([str(ir), "-o", str(pipe)]) == 0
    reader.join()
    assert read[0].startswith('"builtin.module"') and stat.S_ISFIFO(pipe.stat().st_mode)
    real.write_text("")
    link.symlink_to(real)
    assert main([str(ir), "-o", str(link)]) == 0
    assert link.is_symlink() and real.read_text() == read[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--canonicalise"], "unknown option '--canonicalise'\nhelp: did you mean '--canonicalize'?"),
        (
            ["--pass-pipeline=builtin.module(cze)"],
            "<pipeline>:1:16: error: there is no pass or pipeline 'cze'",
        ),
        (["--pass-pipeline=cse", "--dce"], "exclude each other"),
        (["--verify-each=maybe"], "'maybe' is neither 0 nor 1"),
        (["--run-reproducer"], "the input holds no reproducer"),
        (["--load-pass=nowhere.py"], "cannot load nowhere.py"),
        (["-o", "/dev/null/out.ir"], "cannot write /dev/null/out.ir: /dev/null is a file, not a folder"),
    ],
)
def test_user_errors(ir: Path, capsys: Capture, arguments: list[str], message: str) -> None:
    assert main([str(ir), *arguments]) == 1
    out, err = capsys.readouterr()
    assert message in err and "Traceback" not in err and out == ""


def test_missing_file(capsys: Capture) -> None:
    assert main(["nowhere.ir"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: cannot read nowhere.ir: No such file or directory\nhelp: ")


def test_unregistered_ops_need_permission(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "in.ir"
    path.write_text('"ty.sillu"() : () -> ()\n"x.op"() : () -> ()\n')
    assert main([str(path)]) == 1
    err = capsys.readouterr().err
    assert f"{path}:1:1: error: dialect 'ty' has no op 'ty.sillu'" in err
    assert "help: did you mean 'ty.silu'? (--load-dialect FILE.py makes ops known," in err
    assert f"{path}:2:1: error: no dialect declares 'x.op'" in err
    assert main([str(path), "--allow-unregistered-dialect"]) == 0


def test_own_dialect(tmp_path: Path, capsys: Capture) -> None:
    dialect, text = tmp_path / "mine.py", tmp_path / "in.ir"
    dialect.write_text(
        "from __future__ import annotations\nfrom tyir.ir import Value\nfrom tyir.opdef import DeclaredOp,"
        " operand, result\nfrom tyir.traits import Pure\nclass Twice(DeclaredOp, name='mine.twice',"
        " traits=(Pure,)):\n    'x + x'\n    x: Value = operand()\n    out: Value = result()\n    def"
        " infer(self): return self.x.type\n"
    )
    text.write_text(IR.replace("ty.silu", "mine.twice"))
    assert main([str(text), f"--load-dialect={dialect}", "--cse"]) == 0
    assert capsys.readouterr().out.count("mine.twice") == 1


def test_print_ir_flags(ir: Path, tmp_path: Path, capsys: Capture) -> None:
    assert (
        main(
            [
                str(ir),
                "--cse",
                "--dce",
                "--print-ir-after-change",
                "--mlir-print-ir-after-all",
                "--print-ir-before=dce",
            ]
        )
        == 0
    )
    err = capsys.readouterr().err
    assert "// -----// IR Dump After Cse (cse) //----- //" in err
    assert "IR Dump Before Dce (dce)" in err and "IR Dump After Dce" not in err
    assert main([str(ir), "--cse", "--print-ir-after-all", f"--print-ir-tree-dir={tmp_path / 'tree'}"]) == 0
    assert (tmp_path / "tree/builtin_module_no-symbol-name/0_cse.ir").is_file()
    assert main([str(ir), "--pass-pipeline=func.func(cse)", f"--print-ir-tree-dir={tmp_path / 'tree2'}"]) == 0
    assert (tmp_path / "tree2/builtin_module_no-symbol-name/func_func_f/0_cse.ir").is_file()


def test_locations_can_be_left_out(ir: Path, capsys: Capture) -> None:
    assert main([str(ir)]) == 0
    assert 'loc("model.layers.0.mlp")' in capsys.readouterr().out
    assert main([str(ir), "--mlir-print-debuginfo=false"]) == 0
    assert "loc(" not in capsys.readouterr().out
    assert main(["--mlir-print-debuginfo", str(ir)]) == 0


def test_split_input_keeps_line_numbers(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "in.ir"
    path.write_text('"ty.yield"() : () -> ()\n// -----\n\n"x.op"(%a) : (i32) -> ()\n')
    assert main([str(path), "--split-input-file", "--allow-unregistered-dialect"]) == 1
    err = capsys.readouterr().err
    assert f"{path}:1:1: error:" in err and f"{path}:4:8: error: use of undefined value %a" in err


def test_verify_diagnostics_reports_both_ways(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "in.ir"
    path.write_text('// expected-error @below {{something else}}\n"x.op"(%a) : (i32) -> ()\n')
    assert main([str(path), "--verify-diagnostics", "--allow-unregistered-dialect"]) == 1
    err = capsys.readouterr().err
    assert f"{path}:2: error: unexpected error: use of undefined value %a" in err
    assert f'{path}:1: error: expected error "something else" on line 2 was not produced' in err


def test_errors_of_passes_have_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.ir"
    path.write_text(
        IR.replace("%x: tensor<4xf16>", "%x: tensor<4xf16>")
        + "// expected-note-re @unknown {{while running pass 'kv-materialize'}}\n"
    )
    text = path.read_text().replace(
        '"func.func"', '// expected-error @unknown {{max-kv is 0}}\n"func.func"', 1
    )
    path.write_text(text)
    assert main([str(path), "--verify-diagnostics", "--kv-materialize=max-kv=0"]) == 0


def test_internal_error_leaves_a_reproducer(
    ir: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "crash.py").write_text(CRASH)
    load = f"--load-pass={tmp_path / 'crash.py'}"
    assert main([str(ir), load, "--cse", "--crash"]) == 1
    err = capsys.readouterr().err
    assert (
        "crash.py:8:1: error: KeyError: 'boom'" in err
        and "while running pass 'crash'" in err
        and "Traceback" not in err
    )
    reproducer = next(line.split()[-1] for line in err.splitlines() if line.startswith("reproducer:"))
    assert main([reproducer, load, "--run-reproducer"]) == 1
    assert "while running pass 'crash'" in capsys.readouterr().err
    assert main([str(ir), load, "--crash", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_crash_reproducer_starts_at_the_failing_pass(ir: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "repro.ir"
    assert main([str(ir), "--cse", "--kv-materialize=max-kv=0", "--dce", f"--crash-reproducer={file}"]) == 1
    text = file.read_text()
    assert text.count("ty.silu") == 1
    assert 'pipeline: "builtin.module(kv-materialize{max-kv=0 ' in text and '},dce)"' in text
    capsys.readouterr()
    assert main([str(file), "--run-reproducer"]) == 1
    assert "max-kv is 0" in capsys.readouterr().err


def test_lists(capsys: Capture) -> None:
    assert main(["--list-passes"]) == 0
    out = capsys.readouterr().out
    assert "--cse " in out and "max-kv=<an integer>, default 1024" in out and "pipelines:" in out
    assert main(["--show-dialects"]) == 0
    assert capsys.readouterr().out.startswith("aten")


def test_the_entry_point_works(ir: Path) -> None:
    command = [sys.executable, "-P", "-m", "tyir.tools.tyir_opt"]
    done = subprocess.run([*command, str(ir), "--cse"], check=True, capture_output=True, text=True)
    assert done.stdout.count("ty.silu") == 1


def test_closed_pipe_is_silent(ir: Path) -> None:
    command = f'"{sys.executable}" -P -m tyir.tools.tyir_opt "{ir}" | true'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""


PASSES = """
from dataclasses import dataclass
from tyir.pipeline import Pass

@dataclass(frozen=True)
class First(Pass):
    NAME

@dataclass(frozen=True)
class Second(Pass):
    pass
"""


def test_two_passes_of_one_file(ir: Path, tmp_path: Path, capsys: Capture) -> None:
    both, other, builtin = (tmp_path / name for name in ("both.py", "a/both.py", "cse.py"))
    other.parent.mkdir()
    both.write_text(PASSES.replace("NAME", "pass"))
    twice = [f"--load-pass={both}"] * 2
    assert main([str(ir), *twice, "--list-passes"]) == 0
    out = capsys.readouterr().out
    assert "--first" in out and "--second" in out and "--both" not in out
    both.write_text(PASSES.replace("NAME", "name = classmethod(lambda cls: 'second')"))
    assert main([str(ir), f"--load-pass={both}", "--both"]) == 1
    assert "declares two passes named 'second': First and Second" in capsys.readouterr().err
    both.write_text(PASSES.replace("NAME", "pass"))
    other.write_text(PASSES.replace("NAME", "name = classmethod(lambda cls: 'x')"))
    assert main([str(ir), f"--load-pass={both}", f"--load-pass={other}"]) == 1
    assert f"{both} has declared a pass 'second' already" in capsys.readouterr().err
    alone = PASSES[: PASSES.index("@dataclass", 100)]
    builtin.write_text(alone.replace("NAME", "pass"))
    assert main([str(ir), f"--load-pass={builtin}"]) == 1
    assert "there is a pass 'cse' already" in capsys.readouterr().err


SAYING = """
from dataclasses import dataclass
from tyir.dialects.ty import Add, Silu
from tyir.pipeline import Pass

@dataclass(frozen=True)
class CheckSilu(Pass):
    limit: int = 1

    def run(self, op, context):
        for number, silu in enumerate(op.walk_type(Silu)):
            if number >= self.limit:
                context.error(silu, f"SiLU number {number}", help=f"use at most {self.limit}")
            else:
                context.remark(silu, "a SiLU")
        for add in op.walk_type(Add):
            context.warning(add, "adds")

@dataclass(frozen=True)
class CountOps(Pass):
    def run(self, op, context):
        for inner in op.walk():
            context.count(f"count-ops.{inner.name}")
        context.nothing_changed()
"""
SAID = """func.func @f(%x: tensor<4xf16>) -> tensor<4xf16> {
  // expected-remark @below {{a SiLU}}
  %a = ty.silu %x : tensor<4xf16>
  // expected-error @below {{SiLU number 1}}
  %b = ty.silu %a : tensor<4xf16>
  // expected-warning @below {{adds}}
  %c = ty.add %a, %b : tensor<4xf16>
  return %c : tensor<4xf16>
}
// expected-note @unknown {{while running pass 'check-silu'}}
"""


@pytest.fixture
def saying(tmp_path: Path) -> tuple[str, Path]:
    (tmp_path / "mine.py").write_text(SAYING)
    (tmp_path / "said.ir").write_text(SAID)
    return f"--load-pass={tmp_path / 'mine.py'}", tmp_path / "said.ir"


def test_what_passes_say(saying: tuple[str, Path], capsys: Capture) -> None:
    load, file = saying
    assert main([str(file), load, "--check-silu", "--count-ops"]) == 1
    captured = capsys.readouterr()
    assert not captured.out
    remark, warning, error = (
        captured.err.index(word) for word in ("remark: a SiLU", "warning: adds", "error:")
    )
    assert remark < warning < error
    assert (
        f"{file}:5:3: error: SiLU number 1\n5 |   %b = ty.silu %a : tensor<4xf16>\n  |   ^^" in captured.err
    )
    assert "help: use at most 1\nnote: while running pass 'check-silu'" in captured.err
    assert main([str(file), load, "--check-silu=limit=2", "--count-ops", "--pass-statistics"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("remark:") == 2 and "2 count-ops.ty.silu" in captured.err and captured.out


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("", "", None),
        ("{{a SiLU}}", "{{a GELU}}", "unexpected remark: a SiLU"),
        ("  // expected-warning @below {{adds}}\n", "", "unexpected warning: adds"),
        ("  // expected-error @below {{SiLU number 1}}\n", "", "unexpected error: SiLU number 1"),
        ("expected-remark @below {{a SiLU}}", "expected-warning @below {{a SiLU}}", "unexpected remark"),
        ("{{adds}}", "{{subtracts}}", 'expected warning "subtracts" on line 7 was not produced'),
    ],
)  # fmt: skip
def test_what_passes_say_is_checked(
    saying: tuple[str, Path], old: str, new: str, problem: str | None, capsys: Capture
) -> None:
    load, file = saying
    file.write_text(SAID.replace(old, new) if old else SAID)
    assert main([str(file), load, "--check-silu", "--verify-diagnostics"]) == (problem is not None)
    assert (problem or "") in capsys.readouterr().err


def test_a_graph_for_a_folder_that_is_not_there(ir: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main([str(ir), f"--view-op-graph=file={tmp_path}/no/x.dot"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: cannot write {tmp_path}/no/x.dot: No such file") and "internal" not in err
