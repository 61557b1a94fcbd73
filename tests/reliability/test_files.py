"""What stands in a file's place, whatever reads it: a pipe, a device, a folder, a link to itself."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.reliability.cases import MODEL, ROOT, Case, ProcessTally, Zygote, sample

TOOLS = "tyir.tools.tyir_"
PROBES = "tests.reliability.probes:"
REFUSED = frozenset((1,))
SAYS = {
    "fifo": "named pipe",
    "zero": "device",
    "socket": "socket",
    "folder": "",
    "loop": "",
    "dangling": "",
    "missing": "",
}


def make(kind: str, path: Path) -> None:
    """Put something that is no file at `path`."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        here = os.open(path.parent, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{here}/{path.name}")  # its own path may be too long for an address
        os.close(here)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(path.parent / "nothing")


def _light(folder: Path) -> Iterator[tuple[str, Path, str, tuple[str | Path, ...]]]:
    """Label, the path that is spoiled, the tool and its arguments."""
    for name, file, tool, arguments in (
        ("opt", "x.ir", TOOLS + "opt", ("{}",)),
        ("opt --load-pass", "x.py", TOOLS + "opt", ("--load-pass", "{}", "/dev/null")),
        ("opt --load-dialect", "x.py", TOOLS + "opt", ("--load-dialect", "{}", "/dev/null")),
        ("dis", "x.bin", TOOLS + "dis", ("{}",)),
        ("dis --assemble", "x.edge10", TOOLS + "dis", ("--assemble", "{}", "-o", "out")),
        ("sim program", "x.edge10", TOOLS + "sim", ("{}",)),
        ("reduce", "x.ir", TOOLS + "reduce", ("{}", "--command", "false")),
        ("machine", "x.toml", PROBES + "machine", ("{}",)),
        ("trace of requests", "x.jsonl", PROBES + "request_trace", ("{}",)),
        ("gpu model", "x.json", PROBES + "gpu_model", ("{}",)),
        ("params", "x.params", PROBES + "safetensors", ("{}",)),
        ("library", "x.so", PROBES + "library", ("{}",)),
        (
            "partition-dies machine",
            "m.toml",
            TOOLS + "opt",
            (
                str(ROOT / "tests/passes/layer.ir"),
                "-p",
                "kv-materialize{{max-kv=16}},partition-dies{{machine={}}}",
            ),
        ),
    ):
        path = folder / name.replace(" ", "_") / file
        yield name, path, tool, tuple(a.format(path) for a in arguments)
    path = folder / "manifest" / "manifest.json"
    yield "manifest", path, PROBES + "manifest", (path.parent,)
    yield "sim folder", folder / "sim" / "manifest.json", TOOLS + "sim", (folder / "sim",)


def test_not_files(tmp_path: Path, light: Zygote, tally: Callable[[str], ProcessTally], slow: bool) -> None:
    count = tally("not files")
    cases = []
    for kind, says in SAYS.items():
        for name, path, tool, arguments in _light(tmp_path / kind):
            path.parent.mkdir(parents=True)
            make(kind, path)
            # a Python module is looked at by its kind before it is opened
            told = "" if "load" in name or tool.endswith(("dis", "sim", "library")) else says
            if kind == "zero" and name in ("params", "manifest"):  # of a folder, which no link may leave
                told = "is a link out of its folder"
            cases.append(Case(f"{kind} as {name}", tool, arguments, REFUSED, told))
    count.run(light, sample(cases, slow, 10))
    count.close()


def _spoiled(folder: Path, file: str, kind: str) -> Path:
    """The embedded model with one file of another kind."""
    folder.mkdir(parents=True)
    for source in MODEL.iterdir():
        (folder / source.name).symlink_to(source)
    (folder / file).unlink(missing_ok=True)
    if file != "model.safetensors" and file.startswith(("model", "pytorch")):
        (folder / "model.safetensors").unlink()
    make(kind, folder / file)
    return folder


def test_not_files_in_checkpoints(
    tmp_path: Path, importing: Zygote, tally: Callable[[str], ProcessTally], slow: bool
) -> None:
    count = tally("not files in checkpoints")
    cases = []
    for kind in SAYS:
        for file in (
            "config.json",
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "model.gguf",
            "quantize_config.json",
            "quant_config.json",
        ):
            folder = _spoiled(tmp_path / kind / file, file, kind)
            wanted = frozenset((0, 1)) if file.startswith("quant") else REFUSED
            cases.append(
                Case(f"{kind} as {file}", TOOLS + "import", (folder, "-o", tmp_path / "out.ir"), wanted)
            )
        folder = _spoiled(tmp_path / kind / "plan", "config.json", kind)
        cases.append(Case(f"--plan of {kind}", TOOLS + "import", (folder, "--plan"), REFUSED))
        path = tmp_path / f"{kind}.ir"
        make(kind, path)
        cases.append(Case(f"compile of {kind}", TOOLS + "compile", (path, "-o", tmp_path / "out"), REFUSED))
        path = tmp_path / f"{kind}.py"
        make(kind, path)
        cases.append(
            Case(f"plugin of {kind}", TOOLS + "import", (MODEL, "--model-plugin", path, "-o", "out"), REFUSED)
        )
    count.run(importing, sample(cases, slow, 3))
    count.close()


NAMES: tuple[bytes, ...] = (
    b"a b.ir",
    b"-x.ir",
    b"--cse",
    b"a\nb.ir",
    b"a\tb.ir",
    b"\xff\xfe.ir",
    b"caf\xc3\xa9.ir",
    b"caf\xe9.ir",
    b"'\".ir",
    b"$(x).ir",
    b"a;b.ir",
    b"{}.ir",
    b"%s.ir",
    b"\\.ir",
    b"*.ir",
    b"x" * 252 + b".ir",
    b"x" * 253 + b".ir",
    "日本.ir".encode(),
    "🦊.ir".encode(),
    b".ir",
    b"..ir",
    b"#.ir",
    b"~.ir",
    b"a/../b.ir",
    b"\x01\x7f.ir",
    b"\xed\xa0\x80.ir",
)


def test_names(tmp_path: Path, light: Zygote, tally: Callable[[str], ProcessTally], slow: bool) -> None:
    """Every name that the system takes is read and written, every other is refused by it."""
    count = tally("names of files")
    (tmp_path / "a").mkdir()
    text = '"x.op"() {a = "b"} : () -> ()\n'
    cases = []
    for number, name in enumerate(sample(NAMES, slow, 3)):
        path = os.fsencode(tmp_path) + b"/" + bytes(name)
        fits = len(bytes(name)) <= 255
        if fits:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        wanted = frozenset((0,)) if fits else REFUSED
        flags = ("--allow-unregistered-dialect",)
        out = os.fsencode(tmp_path) + f"/out{number}.".encode() + bytes(name)[-200:].replace(b"/", b"_")
        cases.append(Case(f"read {name!r}", TOOLS + "opt", (path, *flags), wanted))
        cases.append(Case(f"write {name!r}", TOOLS + "opt", (path, "-o", out, *flags), wanted))
        cases.append(Case(f"fail on {name!r}", TOOLS + "opt", (path,), REFUSED))
        long = b"x" * 4000 + bytes(name)
        cases.append(Case(f"no path {name!r}", TOOLS + "opt", (long,), REFUSED))
        cases.append(Case(f"write no path {name!r}", TOOLS + "opt", ("/dev/null", "-o", long), REFUSED))
    for kind in ("fifo", "loop", "folder", "dangling"):
        target = tmp_path / f"out.{kind}"
        make(kind, target)
        if kind != "fifo":
            wanted = REFUSED if kind == "folder" else frozenset((0,))  # a link that leads nowhere is replaced
            cases.append(Case(f"write to {kind}", TOOLS + "opt", ("/dev/null", "-o", target), REFUSED))
            cases.append(Case(f"write IR to {kind}", TOOLS + "opt", (path, "-o", target, *flags), wanted))
    for target in ("/dev/full", "/proc/x", "/proc/no/folder/x", "/dev/null/x", "", ".", "/"):
        cases.append(Case(f"write to {target!r}", TOOLS + "opt", (path, "-o", target, *flags), REFUSED))
    count.run(light, cases)
    count.close()
