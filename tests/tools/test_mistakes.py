"""Each mistake of `tests/tools/mistakes.py` is answered with its cure; `docs/mistakes.md` shows them."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.e2e.small_models import save_llama
from tests.tools.mistakes import MISTAKES, SECTIONS, Mistake
from tyir.tools.commands.table import find_command

PAGE = Path(__file__).resolve().parents[2] / "docs" / "mistakes.md"
HEAD = """\
<!-- written by pytest --bless tests/tools/test_mistakes.py; do not edit -->
# Mistakes, and what one is told

Command lines of people who come from another program, or slip, with the answer of each.  The exit code is
1, nothing has been written, and `help:` says what to do.  An answer
without a cure is a bug: please report it.
"""
OP = """from tyir.ir import Value
from tyir.opdef import DeclaredOp, operand, result


class Twice(DeclaredOp, name="mine.twice"):
    x: Value = operand()
    out: Value = result()
"""
PASS = """\
from dataclasses import dataclass

from tyir.pipeline import Pass, PassContext


@dataclass(frozen=True)
class CountMacs(Pass):
    \"\"\"Count.\"\"\"

    def run(self, op, context: PassContext) -> None:
        context.tally("macs")
"""


def run(line: str, stdin: str = "") -> tuple[int, str, str]:
    """A command line in this process: exit code, standard output, standard error."""
    name, *words = shlex.split(line)
    out, err = io.StringIO(), io.StringIO()
    before, sys.stdin = sys.stdin, io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if name == "tyir":
                from tyir.tools.umbrella import main
            else:
                command = find_command(name)
                assert command is not None
                main = __import__(command.module, fromlist=["main"]).main
            code = main(words)
    finally:
        sys.stdin = before
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, another one, its IR at two stages, artifacts, and files that are wrong."""
    from tyir.manifest import BuildOptions
    from tyir.parser import parse_file
    from tyir.pipeline import run_pipeline
    from tyir.printer import print_op
    from tyir.tools.api import compile_path, load_module

    folder = tmp_path_factory.mktemp("mistakes")
    with contextlib.chdir(folder):
        save_llama(Path("model"), lambda model: None, num_hidden_layers=1)
        save_llama(Path("other"), lambda model: None, num_hidden_layers=1, intermediate_size=96)
        module = load_module(Path("model"))
        run_pipeline(module, "to-ty")
        Path("ty.ir").write_text(print_op(module))
        compile_path(Path("ty.ir"), Path("out"), BuildOptions(dies=1, seqlens=(1,), max_kv=16))
        run_pipeline(module := parse_file(Path("ty.ir")), "kv-materialize{max-kv=16}")
        text = print_op(module)
        Path("kv.ir").write_text(text)
        Path("pim.ir").write_text(text.replace("tyir.stage =", 'tyir.pim = "split", tyir.stage =', 1))
        Path("arith.mlir").write_text(
            '"builtin.module"() ({\n  %0 = "arith.constant"() {value = 1 : i32} : () -> i32\n}) : () -> ()\n'
        )
        Path("count_macs.py").write_text(PASS)
        Path("broken.py").write_text("def run(self, op:\n    pass\n")
        Path("mine.py").write_text(OP)
        Path("own.ir").write_text(
            "func.func @f(%x: tensor<4xf16>) -> tensor<4xf16> {\n"
            "  %a = mine.twice %x : tensor<4xf16>\n  return %a : tensor<4xf16>\n}\n"
        )
        Path("plugin.py").write_text("plugins = None\n")
    return folder


def answer(mistake: Mistake, place: Path) -> str:
    """What a mistake is told; fails unless it is an error with a cure that leaves nothing behind."""
    with contextlib.chdir(place):
        before = sorted(Path().iterdir())
        code, out, err = run(mistake.line, mistake.stdin)
        assert sorted(Path().iterdir()) == before
    assert (code, out) == (1, ""), (mistake.line, code, out, err)
    assert re.search(r"^help: \S", err, re.MULTILINE) and "internal error" not in err, err
    assert re.search(r"error: ", err) and "Traceback" not in err, err
    assert mistake.cure in err, err
    err = re.sub(r"tyir-reproducer-\w+\.ir", "tyir-reproducer-1.ir", err)
    err = re.sub(r"/\S*(?=/tyir-reproducer)", "/tmp", err)
    return err.replace(f"{place}/", "")


def written(answers: dict[Mistake, str]) -> str:
    parts = [HEAD]
    for who, title in SECTIONS.items():
        parts.append(f"## {title}\n")
        for mistake, text in answers.items():
            if mistake.who == who:
                parts.append(f"```\n$ {mistake.line}\n{text.rstrip()}\n```\n")
    return "\n".join(parts)


def test_every_mistake_is_answered_with_its_cure(place: Path, request: pytest.FixtureRequest) -> None:
    found: dict[Mistake, str] = {}
    wrong: list[str] = []
    for mistake in MISTAKES:
        try:
            found[mistake] = answer(mistake, place)
        except AssertionError as error:
            wrong.append(f"$ {mistake.line}  [{mistake.cure}]\n{error}")
    assert not wrong, "\n\n".join(wrong)
    if request.config.getoption("--bless"):
        PAGE.write_text(written(found), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == written(found), "pytest --bless tests/tools/test_mistakes.py"


def test_the_table_is_as_long_as_it_says() -> None:
    lines = [mistake.line for mistake in MISTAKES]
    assert len(set(lines)) == len(lines) >= 60
    assert {mistake.who for mistake in MISTAKES} == set(SECTIONS)
    assert all(sum(m.who == who for m in MISTAKES) >= 5 for who in ("vLLM", "llama.cpp", "MLIR", "tpu-mlir"))


def test_a_full_cache_is_said(place: Path) -> None:
    """Not an error: the answer ends, and says why."""
    with contextlib.chdir(place):
        code, _, err = run("tyir-run out/1die --prompt ab --max-tokens 600")
    assert code == 0 and "because the cache of 16 positions is full" in err and "--max-kv" in err
