"""What all commands have in common: one table of them, their options, exit codes, other programs' names."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.tools.test_mistakes import run
from tyir.diagnostics import TyirError
from tyir.process.progress import Bar, track
from tyir.tools import cli, tyir_doctor
from tyir.tools.cli import EXIT_CODES, ToolParser, run_tool, write_output
from tyir.tools.commands.foreign import FOREIGN_COMMANDS, FOREIGN_OPTIONS, FOREIGN_VALUES
from tyir.tools.commands.json_forms import FORMS
from tyir.tools.commands.table import commands
from tyir.tools.commands.unknown import unknown_options

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
NAMES = list(commands())


def process(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "tyir", *words]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


# ---------------------------------------------------------------------------------------------- the commands


def test_the_files_are_the_scripts() -> None:
    """A command is a file; pyproject.toml, which is written by hand, names each."""
    wanted = {c.script: f"{c.module}:main" for c in commands().values()}
    assert wanted == {name: target for name, target in SCRIPTS.items() if name != "tyir"}
    assert SCRIPTS["tyir"] == "tyir.tools.umbrella:main"


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_what_all_have(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = commands()[name]
    parser = command.parser()
    assert parser.prog == command.script and command.summary and not command.summary.endswith(".")
    known = {o for a in parser._actions for o in a.option_strings}
    assert {"-h", "-q", "--quiet", "-v", "--verbose", "--debug", "--version"} <= known
    assert ("--json" in known) == (name not in ("dis", "completion"))
    for words in (["--version"], [name, "--version"]):
        assert importlib.import_module("tyir.tools.umbrella").main(words) == 0
        assert re.fullmatch(r"tyir \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_forms_are_of_commands() -> None:
    documented = {"tyir-sim", "tyir-bench-serving", *FORMS}
    assert documented == {c.script for c in commands().values() if c.name not in ("dis", "completion")}


def test_the_help_lists_the_commands_and_imports_none(tmp_path: Path) -> None:
    code = (
        "import sys; from tyir.tools.umbrella import main; main(['--help'])\n"
        "heavy = [m for m in sys.modules if m.startswith(('tyir.tools.tyir_', 'numpy', 'torch'))]\n"
        "print(*heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr.split() == []
    assert [line.split()[0] for line in done.stdout.splitlines() if re.match(r"  [a-z]", line)] == NAMES


def test_tyir_is_the_same_command(tmp_path: Path) -> None:
    """`tyir opt` is `tyir-opt`, exit codes and options after it included."""
    ir = tmp_path / "a.ir"
    ir.write_text('"builtin.module"() ({\n}) : () -> ()\n')
    for name, words in (
        ("opt", f"{ir} --cse"),
        ("opt", f"{ir} --cs"),
        ("dis", str(ir)),
        ("sim", "--nothing"),
    ):
        assert run(f"tyir {name} {words}") == run(f"tyir-{name} {words}")
    assert run("tyir help opt")[:2] == run("tyir-opt --help")[:2]
    assert run("tyir tyir-opt --version") == run("tyir --version")


def test_a_command_that_comes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but its file makes it known."""
    import tyir.tools
    import tyir.tools.commands.table as table

    (tmp_path / "tyir_new_one.py").write_text('"""`tyir-new-one X`: does something new.\n\nMore.\n"""\n')
    (tmp_path / "other.py").write_text("")
    monkeypatch.setattr(tyir.tools, "__path__", [*tyir.tools.__path__, str(tmp_path)])
    found = table.commands.__wrapped__()
    assert set(found) - set(NAMES) == {"new-one"}
    assert (found["new-one"].script, found["new-one"].summary) == ("tyir-new-one", "does something new")


# ------------------------------------------------------------------------------------- other programs' names


def test_what_the_table_names_is_ours() -> None:
    """Every option of ours exists in the commands named; none of theirs is one of ours there."""
    for entry in FOREIGN_OPTIONS:
        assert bool(entry.option) == bool(entry.tools) and (entry.option or entry.note), entry
        for tool in entry.tools:
            known = {o for a in commands()[tool].parser()._actions for o in a.option_strings}
            assert entry.option.split()[0] in known, (entry, tool)
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", entry.note):
            assert (
                any(flag in c.parser()._option_string_actions for c in commands().values())
                or flag == "--local-dir"
            ), (entry, flag)
    assert set(FOREIGN_COMMANDS.values()) <= set(commands()) and not set(FOREIGN_COMMANDS) & set(commands())


def test_values_of_others_are_answered_where_they_are_refused() -> None:
    for (flag, value), cure in FOREIGN_VALUES.items():
        takers = [c for c in commands().values() if flag in c.parser()._option_string_actions]
        refused = 0
        for command in takers:
            code, _, err = run(f"{command.script} {flag} {value}")
            refused += code == 1 and f"help: {cure}" in err
        assert refused, (flag, value)


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--tensor_parallel_size=4", "vLLM's --tensor_parallel_size is --dies N here"),
        ("--tp", "vLLM's --tp is --dies N here"),
        ("--Max-Model-Len", "--max-kv N here"),
        ("-max-kv", "write --max-kv"),
        ("--max_kv", "write --max-kv"),
        ("--seqlen", "did you mean '--seqlens'?"),
        ("--grid-search", "tyir-compile --help lists the options"),
    ],
)
def test_spellings(flag: str, answer: str) -> None:
    error = unknown_options(commands()["compile"].parser(), [flag])
    assert answer in error.diagnostics[0].help


def test_all_unknown_flags_are_answered_at_once() -> None:
    with pytest.raises(TyirError) as caught:
        commands()["compile"].parser().parse_args(["--tp", "4", "m", "-o", "o", "--die", "2", "--x"])
    assert len(caught.value.diagnostics) == 3


@pytest.mark.parametrize("words", [["1", "--x", "2"], ["--x", "1", "2"], ["1", "2", "--x"]])
def test_options_may_stand_between_files(words: list[str]) -> None:
    parser = ToolParser(prog="t")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--x", action="store_true")
    assert parser.parse_args(words).files == ["1", "2"]


# -------------------------------------------------------------------------------------- exit codes, messages


def test_exit_codes_are_those_documented(tmp_path: Path) -> None:
    """Every code of the table happens, and nothing else is said of them anywhere."""
    found = {0: process("--version", cwd=tmp_path).returncode, 1: process("complie", cwd=tmp_path).returncode}
    for code, number in ((130, "SIGINT"), (143, "SIGTERM"), (129, "SIGHUP")):
        kill = f"import os, signal; os.kill(os.getpid(), signal.{number})"
        program = (
            "import sys; from tyir.tools.cli import run_tool\n"
            f"@run_tool\ndef main(argv):\n    {kill}\n    import time; time.sleep(60)\nsys.exit(main())"
        )
        command = ["bash", "-c", 'trap - INT; exec "$0" "$@"', sys.executable, "-P", "-c", program]
        found[code] = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode
    pipe = f"set -o pipefail; {sys.executable} -P -m tyir opt --list-passes | head -c 0"
    found[141] = subprocess.run(["bash", "-c", pipe], cwd=tmp_path, check=False).returncode
    assert found == {code: code for code in EXIT_CODES}


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_colours_are_for_terminals(
    environment: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in ({"TERM": "xterm"} | environment).items():
        monkeypatch.setenv(name, value)
    for stream, wanted in ((Terminal(), coloured), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        cli.warn("careful")
        assert ("\x1b[1;33mwarning\x1b[0m: careful" in stream.getvalue()) == wanted
        assert "careful" in stream.getvalue()


def test_quiet_and_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for flag in ("-q", "", "-v"):
        ToolParser(prog="t").parse_args(flag.split())
        cli.note("a note"), cli.detail("a detail"), cli.warn("a warning")
        said[flag] = capsys.readouterr().err.split("\n")[:-1]
    ToolParser(prog="t").parse_args([])
    assert said == {
        "-q": ["warning: a warning"],
        "": ["a note", "warning: a warning"],
        "-v": ["a note", "a detail", "warning: a warning"],
    }


@pytest.mark.parametrize("kind", ["raises", "calls a library", "calls tyir", "in a helper", "when loaded"])
def test_an_error_in_ones_own_file_names_its_line(kind: str, tmp_path: Path) -> None:
    """Whatever the error passes through above the file's own frame."""
    body, line = {
        "raises": ("        op.missing", 9),
        "calls a library": ("        import json; json.loads('{')", 9),
        "calls tyir": ("        context.registry.find(3)", 9),
        "in a helper": ("        helper()\n\ndef helper():\n    1 / 0", 12),
        "when loaded": ("        pass\n\n1 / 0", 11),
    }[kind]
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom tyir.pipeline import Pass\n\n@dataclass(frozen=True)\n"
        f'class Mine(Pass):\n    """Do."""\n\n    def run(self, op, context):\n{body}\n'
    )
    (tmp_path / "a.ir").write_text('"builtin.module"() ({\n}) : () -> ()\n')
    code, _, err = run(f"tyir-opt {tmp_path / 'a.ir'} --load-pass {file} --mine")
    assert code == 1 and f"{file}:{line}:1: error: " in err and "help: " in err, err
    assert "bug in tyir" not in err and "internal" not in err


def test_an_error_of_ours_is_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    """Seen from a file of tyir: this test's own frame is none."""
    import tyir.dtypes

    code = compile("def fail(argv):\n    1 / 0\n", tyir.dtypes.__file__, "exec")
    names: dict[str, Any] = {}
    exec(code, names)
    assert run_tool(names["fail"])([]) == 1
    assert "this is a bug in tyir" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- files, progress


@pytest.mark.parametrize("name", ["new/folder/out.ir", "a.ir", "new/b.ir"])
def test_folders_of_an_output_are_made(name: str, tmp_path: Path) -> None:
    for content in ("text", b"bytes", "again"):
        write_output(content, str(tmp_path / name))
        data = content.encode() if isinstance(content, str) else content
        assert (tmp_path / name).read_bytes() == data
    assert [p.name for p in (tmp_path / name).parent.iterdir()] == [Path(name).name]


@pytest.mark.parametrize(("name", "said"), [("", "is a folder"), ("file/x", "is a file, not a folder")])
def test_what_cannot_be_written_is_said_before(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TyirError, match=said) as caught:
        cli.check_output(str(tmp_path / name))
    assert caught.value.diagnostics[0].help


def test_every_output_option_makes_folders(tmp_path: Path) -> None:
    ir = tmp_path / "a.ir"
    ir.write_text('"builtin.module"() ({\n}) : () -> ()\n')
    for line in (
        f"tyir-opt {ir} -o {tmp_path}/1/2/o.ir",
        f"tyir-reduce {ir} --command 'false' -o {tmp_path}/3/4/o.ir",
    ):
        assert run(line)[0] == 0
    assert (tmp_path / "1/2/o.ir").read_text() and (tmp_path / "3/4/o.ir").read_text()
    assert run(f"tyir-opt {ir} --crash-reproducer={tmp_path}/5/r.ir --raise-aten --to-program")[0] == 1
    assert (tmp_path / "5/r.ir").exists()


def test_progress_in_a_pipe_is_lines_or_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for seconds, flags, lines in ((1.0, "-v", 0), (6.0, "", 0), (6.0, "-v", 3)):
        ToolParser(prog="t").parse_args(flags.split())
        for _ in track(range(8), "work", "piece", show=True):
            now[0] += seconds
        err = capsys.readouterr().err
        assert "\r" not in err and len(err.splitlines()) == lines
    assert err.splitlines()[0] == "work: 2 of 8 pieces, about 36 s left"
    ToolParser(prog="t").parse_args([])
    assert list(track(range(8), "work", "piece", show=False)) == list(range(8))
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_is_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with Bar("import", 100, show=True) as bar:
        bar.stage("reading", 40)
        bar.stage("tracing", 60)
    text = sys.stderr.getvalue()
    assert "import: 100%|" in text and " left" in text and bar.done == 100


def test_a_bar_that_is_left_by_an_error_is_not_full() -> None:
    with pytest.raises(ValueError), Bar("import", 100) as bar:
        bar.stage("reading", 40)
        bar.stage("tracing", 60)
        raise ValueError
    assert bar.done == 40


# ------------------------------------------------------------------------------------- doctor and completion


def test_doctor_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert tyir_doctor.main(["--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert found["python"] == sys.version.split()[0] and found["processors"] == os.cpu_count()
    assert found["libraries"]["torch"] and found["cwd_free_bytes"] > 0
    assert tyir_doctor.main([]) in (0, 1)
    text = capsys.readouterr().out
    assert found["processor"] in text and found["libraries"]["torch"] in text


@pytest.mark.parametrize(
    ("change", "what", "fatal"),
    [
        ("no compiler", "no C or C++ compiler", True),
        ("no torch", "not installed: torch", True),
        ("old torch", "torch 1.0 is installed, tyir needs", False),
        ("no memory", "of memory can be used", False),
        ("no disk", "are free for temporary files", False),
        ("ascii", "names of files are encoded as", False),
    ],
)
def test_doctor_names_the_cure(
    change: str, what: str, fatal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = tyir_doctor._version
    patches: dict[str, Any] = {
        "no compiler": ("_compiler", lambda: None),
        "no torch": ("_version", lambda n: None if n == "torch" else version(n)),
        "old torch": ("_version", lambda n: "1.0" if n == "torch" else version(n)),
        "no memory": ("_cgroup_memory", lambda: 1 << 29),
        "no disk": ("_free", lambda folder: 1 << 20),
    }
    if change == "ascii":
        monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    else:
        monkeypatch.setattr(tyir_doctor, *patches[change])
    code = tyir_doctor.main(["--json"])
    troubles = json.loads(capsys.readouterr().out)["troubles"]
    (found,) = [t for t in troubles if what in t["what"]]
    assert found["cure"] and found["fatal"] == fatal and (code == 1 or not fatal)


# What is typed, and what it becomes: the commands of `tyir` and the programs alike, and file names.
TYPED = {
    "tyir si": "sim",
    "tyir ch": "chat",
    "tyir sim --torn": "--tornado",
    "tyir-sim --torn": "--tornado",
    "tyir-run out --engine i": "interpreter",
    "tyir run out --engine i": "interpreter",
    "tyir-bench-serving --goo": "--goodput",
    "tyir-compile --group-s": "--group-size",
    "tyir-completion z": "zsh",
}
_BASH_TYPES = r"""
source tyir.bash
while read -ra COMP_WORDS; do
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
  [[ $(complete -p "${COMP_WORDS[0]}") =~ -F\ ([^ ]+) ]]
  "${BASH_REMATCH[1]}" "${COMP_WORDS[0]}" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
  echo "${COMPREPLY[@]}"
done
"""
# A shell of its own in a terminal, as nothing else completes in zsh: each line is typed and shown.
_ZSH_TYPES = r"""
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell 'PROMPT=; fpath=($PWD $fpath); autoload -Uz compinit; compinit -D -u'
zpty -w shell 'bindkey "^I" complete-word'
zpty -w shell 'show() { print -r -- "<$BUFFER>"; BUFFER=; }; zle -N show; bindkey "^X" show; print rea''dy'
zpty -r -m shell out '*ready*'
while IFS= read -r line; do
  zpty -w -n shell "$line"$'\t\C-x'
  zpty -r -m shell out '*<*>*' && print -r -- "${${out##*<}%%>*}"
done
zpty -d shell
"""


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_their_options(shell: str, tmp_path: Path) -> None:
    """In the shell itself."""
    pytest.importorskip("shtab")
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    code, out, _ = run(f"tyir completion {shell}")
    assert code == 0 and all(name in out for name in NAMES)
    (tmp_path / ("tyir.bash" if shell == "bash" else "_tyir")).write_text(out)
    program = _BASH_TYPES if shell == "bash" else _ZSH_TYPES
    lines = "".join(f"{line}\n" for line in TYPED)
    done = subprocess.run(
        [shell, *["-f"][: shell == "zsh"], "-c", program],
        cwd=tmp_path, input=lines, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert [line.split()[-1] for line in done.stdout.splitlines()] == list(TYPED.values()), done.stderr


def test_completion_without_shtab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    code, out, err = run("tyir completion bash")
    assert (code, out) == (1, "") and "pip install 'tyir[completion]'" in err


@pytest.mark.parametrize("text", ["1,", ",", ",1", "1,,2", "1, ,2"])
def test_a_list_has_no_empty_places(text: str) -> None:
    from tyir.tools.commands.build_arguments import numbers

    with pytest.raises(TyirError, match="is not a whole number"):
        numbers(text)
    assert numbers(" 1, 8 ") == (1, 8)
