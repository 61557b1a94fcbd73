"""Streams, locales, limits and surroundings of real processes: each works, or is refused with one message."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.reliability.cases import MODEL, ROOT, ProcessTally, run_process, sample

OPT = (sys.executable, "-m", "tyir.tools.tyir_opt")
IMPORT = (sys.executable, "-m", "tyir.tools.tyir_import", str(MODEL))
LARGE = str(ROOT / "tests" / "passes" / "layer.ir")
FINE, REFUSED, EITHER = frozenset((0,)), frozenset((1,)), frozenset((0, 1))
PIPE = frozenset((0, 141))  # the reader may go before or after everything is written


@dataclass(frozen=True)
class Surrounding:
    """A command in a place: `shell` is a line of bash with the command as "$@"."""

    name: str
    command: tuple[str, ...]
    wanted: frozenset[int]
    shell: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    remove: tuple[str, ...] = ()
    silent: bool = False  # standard error is not there to say anything on


def _streams() -> Iterator[Surrounding]:
    commands = {
        "IR": ((*OPT, LARGE), True),
        "an error": ((*OPT, "no-such-file.ir"), False),
        "help": ((*OPT, "--help"), True),
        "passes": ((*OPT, "--list-passes"), True),
        "IR to a file": ((*OPT, LARGE, "-o", "out.ir"), None),
    }
    for name, (command, writes) in commands.items():
        plain = REFUSED if writes is False else FINE
        full = plain if writes is None else REFUSED
        for where, shell, wanted, silent in (
            ("stdin closed", '"$@" <&-', plain, False),
            ("stdout closed", '"$@" >&-', full, False),
            ("stderr closed", '"$@" 2>&-', plain, True),
            ("all closed", '"$@" <&- >&- 2>&-', full, True),
            ("stdout full", '"$@" >/dev/full', full, False),
            ("stderr full", '"$@" 2>/dev/full', plain, True),
            ("both full", '"$@" >/dev/full 2>&1', full, True),
            ("stdout unread", '"$@" | true; exit ${PIPESTATUS[0]}', plain if not writes else PIPE, False),
            (
                "stderr unread",
                '{ "$@" 2>&1 >/dev/null; echo $? >code; } | true; exit $(cat code)',
                plain,
                True,
            ),
            ("stdout read-only", '"$@" 1</dev/null', full, False),
            ("stdout a socket's end", '"$@" > >(exec true); exit $?', plain if not writes else PIPE, False),
        ):
            yield Surrounding(f"{name}, {where}", command, wanted, shell, silent=silent)
    for where, shell, wanted in (
        ("closed", '"$@" <&-', REFUSED),
        ("a folder", '"$@" <.', REFUSED),
        ("write-only", '"$@" 0>/dev/null', REFUSED),
        ("empty", '"$@" </dev/null', FINE),
        ("not UTF-8", "printf '\\xff' | \"$@\"", REFUSED),
        ("zeros", 'head -c 100000 /dev/zero | "$@"', REFUSED),
        ("IR", f'"$@" <{LARGE}', FINE),
    ):
        yield Surrounding(f"standard input {where}", OPT, wanted, shell)
        yield Surrounding(f"standard input {where}, as -", (*OPT, "-"), wanted, shell)


def _locales() -> Iterator[Surrounding]:
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    text = 'printf \'"x.op"() {a = "é日🦊"} : () -> () loc("é")\\n\' >"é.ir"; "$@"'
    for locale in ("C", "POSIX", "C.UTF-8", "en_US.ISO-8859-1", "tr_TR.UTF-8", "nonsense", ""):
        for more in ({}, plain, {"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "ascii"}):
            environment = {"LC_ALL": locale, "LANG": locale, **more}
            name = f"{locale!r} {' '.join(more)}"
            unknown = "--allow-unregistered-dialect"
            yield Surrounding(f"locale {name}", (*OPT, "é.ir", unknown), FINE, text, environment)
            yield Surrounding(f"locale {name}, an error", (*OPT, "é.ir"), REFUSED, text, environment)
            yield Surrounding(f"locale {name}, no file", (*OPT, "日本.ir"), REFUSED, text, environment)


def _surroundings() -> Iterator[Surrounding]:
    command = (*OPT, LARGE, "--canonicalize", "--cse")
    for terminal in ("dumb", "", "nonsense", "xterm-256color"):
        yield Surrounding(f"TERM={terminal}", command, FINE, environment={"TERM": terminal})
    for name, value in (
        ("COLUMNS", "0"),
        ("COLUMNS", "-5"),
        ("COLUMNS", "x"),
        ("LINES", "0"),
        ("NO_COLOR", "1"),
        ("PYTHONHASHSEED", "7"),
        ("PYTHONOPTIMIZE", "2"),
        ("PYTHONWARNINGS", "error"),
        ("PYTHONUNBUFFERED", "1"),
        ("PYTHONDEVMODE", "1"),
        ("HOME", "/nonexistent"),
        ("HOME", ""),
        ("TMPDIR", "/nonexistent"),
        ("TMPDIR", "/dev/null"),
        ("PATH", "/nonexistent"),
        ("PATH", ""),
    ):
        yield Surrounding(f"{name}={value}", command, FINE, environment={name: value})
        yield Surrounding(f"{name}={value}, help", (*OPT, "--help"), FINE, environment={name: value})
    for name in ("HOME", "TMPDIR", "PATH", "TERM", "LANG", "USER", "SHELL"):
        yield Surrounding(f"no {name}", command, FINE, remove=(name,))
    yield Surrounding("nothing set", command, FINE, 'exec env -i "$@"')
    yield Surrounding("-O", (sys.executable, "-O", "-m", *command[2:]), FINE)
    yield Surrounding("-OO", (sys.executable, "-OO", "-m", *command[2:]), FINE)
    yield Surrounding("-I", (sys.executable, "-I", "-m", *command[2:]), FINE)
    gone = 'mkdir gone && cd gone && rmdir ../gone && "$@"'
    yield Surrounding("no current folder", command, FINE, gone)
    yield Surrounding("no current folder, a file of it", (*OPT, "x.ir"), REFUSED, gone)
    yield Surrounding("no current folder, written to", (*command, "-o", "x.ir"), REFUSED, gone)
    yield Surrounding("a folder without files", (*command, "-o", "x.ir"), REFUSED, 'cd /proc && "$@"')
    yield Surrounding("-o -", (*command, "-o", "-"), FINE)
    for words in (
        ("-",),
        ("--", "-"),
        ("--", LARGE),
        ("-o",),
        ("--no-such",),
        ("-x",),
        ("",),
        (LARGE, LARGE),
        ("-o", ""),
    ):
        yield Surrounding(f"arguments {words}"[:60], (*OPT, *words), EITHER)


def _limits() -> Iterator[Surrounding]:
    command = (*OPT, LARGE, "--canonicalize", "--cse")
    for flag, values in (
        ("-v", (150_000, 200_000, 250_000, 300_000, 400_000, 600_000, 1_000_000)),
        ("-s", (128, 256, 512, 1024, 1 << 20)),
        ("-n", (5, 6, 7, 8, 10, 16, 64)),
        ("-d", (40_000, 80_000, 400_000)),
        ("-l", (0,)),
        ("-u", (1, 50)),
        ("-f", (0, 1)),
    ):
        for value in values:
            yield Surrounding(f"ulimit {flag} {value}", command, EITHER, f'ulimit {flag} {value}; "$@"')
            out = (*command, "-o", "out.ir")
            yield Surrounding(
                f"ulimit {flag} {value}, to a file", out, EITHER, f'ulimit {flag} {value}; "$@"'
            )
    deep = "printf '\"x.n\"() ({%.0s' $(seq 990) >d.ir; printf '}) : () -> ()%.0s' $(seq 990) >>d.ir; "
    for size in (128, 512):
        nested = (*OPT, "d.ir", "--allow-unregistered-dialect", "--canonicalize")
        yield Surrounding(f"990 regions, ulimit -s {size}", nested, EITHER, deep + f'ulimit -s {size}; "$@"')
    for name in (
        "OMP_NUM_THREADS",
        "TVM_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "RAYON_NUM_THREADS",
    ):
        for value in ("0", "-1", "5000", "9" * 30, "x", "", "1.5", "4,2", " 3 ", "٣"):
            few = {name: value}
            yield Surrounding(f"{name}={value}", command, FINE, environment=few)
            tight = 'ulimit -v 900000; "$@"'
            yield Surrounding(f"{name}={value}, ulimit -v", command, EITHER, tight, environment=few)


def _limits_of_artifacts(artifacts: Path) -> Iterator[Surrounding]:
    """What executes and times compiled programs, and makes them: TVM, transformers and torch are loaded."""
    run = (
        sys.executable,
        "-m",
        "tyir.tools.tyir_run",
        str(artifacts),
        "--prompt",
        "The",
        "--max-tokens",
        "2",
    )
    sim = (sys.executable, "-m", "tyir.tools.tyir_sim", str(artifacts))
    options = ("--dies", "1", "--seqlens", "1", "--max-kv", "16", "-q", "-o", "out")
    build = (sys.executable, "-m", "tyir.tools.tyir_compile", str(MODEL), *options)
    for flag, values in (
        ("-v", (300_000, 600_000, 1_000_000, 2_000_000, 4_000_000)),
        ("-n", (6, 8, 12, 24, 64)),
        ("-f", (0, 1, 100)),
        ("-u", (1, 20)),
        ("-s", (256,)),
    ):
        for value in values:
            for name, command in (("run", run), ("sim", sim), ("compile", build)):
                yield Surrounding(
                    f"{name}, ulimit {flag} {value}", command, EITHER, f'ulimit {flag} {value}; "$@"'
                )


def _large_limits() -> Iterator[Surrounding]:
    """The front end, which loads torch."""
    out = (*IMPORT, "-o", "out.ir")
    for value in (600_000, 1_000_000, 1_500_000, 2_500_000, 4_000_000):
        yield Surrounding(f"import, ulimit -v {value}", out, EITHER, f'ulimit -v {value}; "$@"')
    for value in (8, 32, 64):
        yield Surrounding(f"import, ulimit -n {value}", out, EITHER, f'ulimit -n {value}; "$@"')
    yield Surrounding("import, ulimit -s 256", out, EITHER, 'ulimit -s 256; "$@"')
    yield Surrounding("import, no HOME", out, FINE, remove=("HOME",))
    yield Surrounding("import, HOME not there", out, FINE, environment={"HOME": "/nonexistent"})
    yield Surrounding("import, OMP_NUM_THREADS=5000", out, FINE, environment={"OMP_NUM_THREADS": "5000"})
    yield Surrounding("import, -O", (sys.executable, "-O", *out[1:]), FINE)
    yield Surrounding("import, stdout full", IMPORT, REFUSED, '"$@" >/dev/full')
    yield Surrounding("import, stdout closed", IMPORT, REFUSED, '"$@" >&-')
    yield Surrounding("import, to /dev/full", (*IMPORT, "-o", "/dev/full"), REFUSED)
    yield Surrounding("import, ulimit -f 1", out, REFUSED, 'ulimit -f 1; "$@"')


def _run(count: ProcessTally, cases: list[Surrounding], folder: Path) -> None:
    for number, case in enumerate(cases):
        place = folder / f"{count.area}{number}".replace(" ", "-")
        place.mkdir()
        found = run_process(case.command, place, case.environment, case.remove, case.shell)
        if case.silent:
            fits = found.code in case.wanted and not found.err
            shown = (
                None
                if fits
                else f"exit code {found.code}, not one of {sorted(case.wanted)}: {found.err[-300:]}"
            )
            count.tried += 1
            if shown is not None:
                count.failures.append(f"{case.name}: {shown}")
        else:
            count.add(case.name, found, case.wanted)


def test_streams(tmp_path: Path, tally: Callable[[str], ProcessTally], slow: bool) -> None:
    count = tally("streams")
    _run(count, sample(_streams(), slow, 3), tmp_path)
    count.close()


def test_locales(tmp_path: Path, tally: Callable[[str], ProcessTally], slow: bool) -> None:
    count = tally("locales")
    _run(count, sample(_locales(), slow, 1), tmp_path)
    count.close()


def test_surroundings(tmp_path: Path, tally: Callable[[str], ProcessTally], slow: bool) -> None:
    count = tally("surroundings")
    _run(count, sample(_surroundings(), slow, 1), tmp_path)
    count.close()


@pytest.mark.parametrize(
    ("module", "limit", "told"),
    [("hashlib", 1 << 28, True), ("json", 1 << 28, True), ("hashlib", -1, False), ("numpy", 1 << 28, False)],
)
def test_a_python_that_lacks_a_part_lacks_memory(
    monkeypatch: pytest.MonkeyPatch, module: str, limit: int, told: bool
) -> None:
    """Where there is a limit, and of Python's own modules alone: of others it would be a bug."""
    import resource

    from tyir.process.system_errors import system_error

    monkeypatch.setattr(resource, "getrlimit", lambda what: (limit, limit))
    found = system_error(ImportError(f"cannot import name 'x' from '{module}'", name=module))
    assert (found is not None and found.message == "there is not enough memory") == told


@pytest.mark.slow
def test_limits_of_artifacts(tmp_path: Path, compiled: Path, tally: Callable[[str], ProcessTally]) -> None:
    count = tally("limits of tyir-run, -sim, -compile")
    _run(count, list(_limits_of_artifacts(compiled)), tmp_path)
    count.close()


def test_limits(tmp_path: Path, tally: Callable[[str], ProcessTally], slow: bool) -> None:
    count = tally("limits")
    _run(count, sample(_limits(), slow, 1), tmp_path)
    if slow:
        (tmp_path / "large").mkdir()
        _run(count, list(_large_limits()), tmp_path / "large")
    count.close()
