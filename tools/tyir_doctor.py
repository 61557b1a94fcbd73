"""`tyir-doctor`: what commands run with here, and what of it is in their way.

Versions, compiler, processor, memory, disk and terminal; each trouble with its cure.  For bug reports.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tyir.process.extras import EXTRA_OF
from tyir.tools.cli import ToolParser, add_json_option, run_tool

if TYPE_CHECKING:
    from tyir.tools.commands.json_forms import Doctor, Trouble

__all__ = ["main", "make_parser"]

_LIBRARIES: Final = ("torch", "transformers", "apache-tvm", "numpy", "safetensors")
_EXTRAS: Final = {"gguf": "gguf", "sentencepiece": "sentencepiece", "shtab": "completion"}
# x86-64 features in the order they came; the last ones that a processor has say how fast host code is.
_FEATURES: Final = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile")
_LEAST_MEMORY: Final = 2 << 30  # bytes: libraries alone take 0.65 GiB
_LEAST_DISK: Final = 2 << 30


@run_tool
def main(argv: Sequence[str]) -> int:
    """Say what is here; 1 when something is in the way of compiling."""
    args = make_parser().parse_args(argv)
    from tyir.tools.commands.json_forms import print_json

    found = examine()
    if args.json:
        print_json(found)
    else:
        print("\n".join(_lines(found)))
    return 1 if any(t.fatal for t in found.troubles) else 0


def examine() -> Doctor:
    """Everything about this process and machine; nothing heavy is imported."""
    from tyir.tools.commands.json_forms import Doctor

    cwd, tmp = Path.cwd(), Path(tempfile.gettempdir())
    limit = _cgroup_cpus()
    values = {
        "tyir": _version("tyir"),
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "libraries": {name: _version(name) for name in (*_LIBRARIES, *_EXTRAS)},
        "compiler": _compiler(),
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "features": tuple(f for f in _FEATURES if f in _cpuinfo("flags").split()),
        "processors": os.cpu_count() or 1,
        "usable_processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "processor_limit": limit,
        "memory_bytes": _memory("MemTotal"),
        "memory_available_bytes": _memory("MemAvailable"),
        "memory_limit_bytes": _cgroup_memory(),
        "cwd_free_bytes": _free(cwd),
        "tmp": str(tmp),
        "tmp_free_bytes": _free(tmp),
        "stdout_is_terminal": sys.stdout.isatty(),
        "encoding": sys.getfilesystemencoding(),
        "locale": os.environ.get("LC_ALL") or os.environ.get("LC_CTYPE") or os.environ.get("LANG") or "",
    }
    troubles = tuple(_troubles(values, cwd, tmp))
    return Doctor(**values, troubles=troubles)  # type: ignore[arg-type]


def _troubles(found: dict[str, object], cwd: Path, tmp: Path) -> Iterator[Trouble]:
    from tyir.tools.commands.json_forms import Trouble

    libraries = found["libraries"]
    assert isinstance(libraries, dict)
    missing = [name for name in _LIBRARIES if libraries[name] is None]
    if missing:
        extra = next((EXTRA_OF[name] for name in missing if name in EXTRA_OF), None)
        cure = "pip install tyir" if extra is None else f"pip install 'tyir[{extra}]'"
        yield Trouble(f"not installed: {', '.join(missing)}", cure, True)
    for name, wanted in _pinned().items():
        if libraries.get(name) and not _satisfies(str(libraries[name]), wanted):
            yield Trouble(
                f"{name} {libraries[name]} is installed, tyir needs {wanted}",
                f"pip install '{name}{wanted}'",
                False,
            )
    if found["compiler"] is None:
        yield Trouble(
            "there is no C or C++ compiler to link host libraries with",
            "install gcc or clang (Debian, Ubuntu: apt install g++), or name one in CXX",
            True,
        )
    if platform.machine() in ("x86_64", "AMD64") and "avx2" not in found["features"]:  # type: ignore[operator]
        yield Trouble("the processor has no AVX2", "host code runs, slowly; simulate with tyir-sim", False)
    memory = [m for m in (found["memory_available_bytes"], found["memory_limit_bytes"]) if isinstance(m, int)]
    if memory and min(memory) < _LEAST_MEMORY:
        yield Trouble(
            f"{_gib(min(memory))} of memory can be used", "close other programs, or raise the limit", False
        )
    for what, folder, key in (
        ("the current folder", cwd, "cwd_free_bytes"),
        ("temporary files", tmp, "tmp_free_bytes"),
    ):
        free = found[key]
        if isinstance(free, int) and free < _LEAST_DISK:
            cure = "set TMPDIR to a larger disk" if key == "tmp_free_bytes" else "write to a larger disk"
            yield Trouble(f"{_gib(free)} are free for {what} ({folder})", cure, False)
        if not os.access(folder, os.W_OK):
            cure = "set TMPDIR to a folder of yours" if key == "tmp_free_bytes" else "give -o another folder"
            yield Trouble(f"nothing may be written to {folder}", cure, key == "tmp_free_bytes")
    if str(found["encoding"]).replace("-", "").lower() != "utf8":
        yield Trouble(f"names of files are encoded as {found['encoding']}", "export LC_ALL=C.UTF-8", False)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _pinned() -> dict[str, str]:
    """What the installed tyir needs of its libraries, and to compile: name -> versions."""
    needs = {}
    for line in metadata.requires("tyir") or ():
        requirement = line.partition(";")
        name = requirement[0].strip()
        for i, character in enumerate(name):
            if character in "=<>~!":
                if "extra" not in requirement[2] or "compile" in requirement[2]:
                    needs[name[:i].strip()] = name[i:].strip()
                break
    return {name: needs[name] for name in _LIBRARIES if name in needs}


def _satisfies(version: str, wanted: str) -> bool:
    """Whether a version is among those wanted; versions that cannot be compared count as they are."""
    from importlib.util import find_spec

    if find_spec("packaging") is None:
        return True
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        return version.partition("+")[0] in SpecifierSet(wanted, prereleases=True)
    except InvalidSpecifier:
        return True


def _compiler() -> str | None:
    """The first line that the compiler says of itself; the search is that of tools/_setup.sh and TVM."""
    for name in (os.environ.get("CXX", ""), os.environ.get("CC", ""), "g++", "gcc", "clang++", "clang", "cc"):
        path = shutil.which(name.split()[0]) if name.split() else None
        if path is None:
            continue
        try:
            done = subprocess.run(
                [path, "--version"], capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return f"{path}: {(done.stdout.splitlines() or [''])[0]}"
    return None


def _cpuinfo(key: str) -> str:
    return _field(Path("/proc/cpuinfo"), key)


def _memory(key: str) -> int | None:
    text = _field(Path("/proc/meminfo"), key).split()
    return int(text[0]) * 1024 if text else None


def _field(path: Path, key: str) -> str:
    """The first `key: value` of a file of /proc; empty where there is none."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next(
        (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), ""
    )


def _cgroup(*names: str) -> str:
    """A limit of the control group, of version 2 or 1; empty where there is none."""
    for name in names:
        try:
            return (Path("/sys/fs/cgroup") / name).read_text().strip()
        except OSError:
            continue
    return ""


def _cgroup_cpus() -> float | None:
    quota, _, period = _cgroup("cpu.max").partition(" ")
    if not quota:
        quota, period = _cgroup("cpu/cpu.cfs_quota_us"), _cgroup("cpu/cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


def _cgroup_memory() -> int | None:
    text = _cgroup("memory.max", "memory/memory.limit_in_bytes")
    return int(text) if text.isdecimal() and int(text) < 1 << 60 else None


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _gib(count: object) -> str:
    return f"{count / 2**30:.1f} GiB" if isinstance(count, (int, float)) else "not known"


def _lines(d: Doctor) -> Iterator[str]:
    yield f"tyir         {d.tyir} on Python {d.python} ({d.executable})"
    yield f"system       {d.system}"
    yield "libraries    " + ", ".join(f"{n} {v or '-'}" for n, v in d.libraries.items())
    yield f"compiler     {d.compiler or 'none'}"
    yield f"processor    {d.processor}: {' '.join(d.features) or 'no features known'}"
    usable = (
        "" if d.usable_processors in (None, d.processors) else f", {d.usable_processors} for this process"
    )
    limit = "" if d.processor_limit is None else f", limited to {d.processor_limit:g}"
    yield f"processors   {d.processors}{usable}{limit}"
    limited = "" if d.memory_limit_bytes is None else f", limited to {_gib(d.memory_limit_bytes)}"
    yield f"memory       {_gib(d.memory_bytes)}, {_gib(d.memory_available_bytes)} available{limited}"
    yield f"disk         {_gib(d.cwd_free_bytes)} free here, {_gib(d.tmp_free_bytes)} in {d.tmp}"
    terminal = "a terminal" if d.stdout_is_terminal else "not a terminal"
    yield f"output       {terminal}, {d.encoding}, locale {d.locale or 'not set'}"
    for trouble in d.troubles:
        yield f"{'error' if trouble.fatal else 'warning'}: {trouble.what}\nhelp: {trouble.cure}"
    if not d.troubles:
        yield "nothing is in the way"


def make_parser() -> ToolParser:
    """The parser of `tyir-doctor`."""
    parser = ToolParser(
        prog="tyir-doctor",
        description="Say what commands run with here, and what is in their way; for bug reports.",
        epilog="The exit code is 1 when something is in the way of compiling.",
    )
    add_json_option(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
