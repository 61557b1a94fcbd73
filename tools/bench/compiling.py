"""Time and memory of compiling a checkpoint of real size, beside `cp -r` of the same checkpoint.

    python -m tyir.tools.bench.compiling CHECKPOINT [--depths 4,8,16,28,56] [--plot FILE.svg] [--json] [...]

For each depth a checkpoint of so many layers is written (layers of CHECKPOINT, again from the first when it
has fewer), copied with `cp -r`, and compiled three times through `tyir-compile`, each in a process of its
own: with an empty cache, with nothing changed, and with another --max-kv.  Wall and processor seconds; memory
is the process's peak, mapped pages counted; `stages` are what `--timing` says, `parts` the processor seconds
of some of them together: code generation (the host's code), command programs, passes.  The plot shows these
of the runs with an empty cache beside each other, and all of every run.  Everything is in a folder that is
gone afterwards; it needs three times the checkpoint of the greatest depth.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tyir.diagnostics import TyirError
from tyir.execution.safetensors_layout import SafetensorsLayout
from tyir.execution.weights import FileEntry, safetensors_header
from tyir.process.files import load_json
from tyir.tools.cli import run_tool
from tyir.tools.commands.build_arguments import numbers

__all__ = ["main", "write_depth"]

_LAYER: Final = re.compile(r"(.*\.layers\.)(\d+)(\..*)")
_BLOCK: Final = 16 << 20
_COLD: Final = "cold cache"


def write_depth(source: Path, folder: Path, layers: int) -> int:
    """Write a checkpoint of `layers` layers with those of another; returns the bytes of its tensors."""
    import numpy as np

    config = load_json(source / "config.json")
    there = config["num_hidden_layers"]
    stored: dict[str, tuple[Path, FileEntry]] = {}
    for path in sorted(source.glob("*.safetensors")):
        stored.update(
            (k, (path, e)) for k, e in safetensors_header(np.memmap(path, np.uint8, "r"), path)[0].items()
        )
    wanted: dict[str, tuple[Path, FileEntry]] = {}
    for name, place in stored.items():
        if (found := _LAYER.fullmatch(name)) is None:
            wanted[name] = place
            continue
        for layer in range(int(found[2]), layers, there):
            wanted[f"{found[1]}{layer}{found[3]}"] = place
    folder.mkdir(parents=True)
    if isinstance(types := config.get("layer_types"), list):
        config["layer_types"] = [types[layer % there] for layer in range(layers)]
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    layout = SafetensorsLayout({n: (e.dtype, e.shape) for n, (_, e) in wanted.items()}, {"format": "pt"})
    with layout.create(folder / "model.safetensors") as file:
        for name, (path, entry) in wanted.items():
            file.seek(layout.slots[name].offset)
            with path.open("rb") as tensor:
                tensor.seek(entry.start)
                for begin in range(entry.start, entry.end, _BLOCK):
                    file.write(tensor.read(min(_BLOCK, entry.end - begin)))
    return layout.size


def _run(command: Sequence[str | Path]) -> dict[str, Any]:
    """Seconds of wall and processor, and the peak memory of a process and its output as JSON."""
    start = time.perf_counter()
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise TyirError(f"{command[0]} ended with {process.returncode}")
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
        "stages": json.loads(said)["stages"] if said else [],
    }


def measure(source: Path, layers: int, work: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of one depth."""
    model = work / "model"
    size = write_depth(source, model, layers)
    time.sleep(2.5)  # files that have changed just now are not cached
    row = {"layers": layers, "gb": size / 1e9}
    yield {**row, "what": "cp -r", **_run(["cp", "-r", model, work / "copy"])}
    shutil.rmtree(work / "copy")
    options = ["--dies", args.dies, "--seqlens", args.seqlens, "--cache-dir", work / "cache", "-q", "--json"]
    options += ["--jobs", args.jobs] if args.jobs else []
    command = [sys.executable, "-P", "-m", "tyir.tools.tyir_compile", model, "-o", work / "out", *options]
    for what, max_kv in (
        (_COLD, args.max_kv),
        ("nothing changed", args.max_kv),
        ("other --max-kv", args.max_kv // 2),
    ):
        yield {**row, "what": what, **_run([*command, "--max-kv", str(max_kv)])}
    for each in work.iterdir():
        shutil.rmtree(each)


# What stages are called that a part is the sum of.
_PARTS: Final = {"host code": "host code ", "command programs": "edge10 ", "passes": "passes"}


def parts_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Processor seconds of each part of a run; those of threads are in the stages, children's are not."""
    return {
        part: float(sum(s["cpu_seconds"] for s in row["stages"] if s["name"].startswith(beginning)))
        for part, beginning in _PARTS.items()
    }


def _pyplot() -> Any:
    """matplotlib's, to draw into files that are the same for the same numbers."""
    try:
        import matplotlib
    except ImportError:
        raise TyirError("the plot needs matplotlib", help="pip install 'tyir[plots]'") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "tyir"
    from matplotlib import pyplot

    return pyplot


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Processor seconds against depth: parts of runs with an empty cache, and all of every kind of run."""
    pyplot = _pyplot()
    figure, (parts, whole) = pyplot.subplots(1, 2, figsize=(10, 4))
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = [row for row in rows if row["what"] == what]
        depths = [r["layers"] for r in mine]
        whole.plot(depths, [r["cpu_seconds"] for r in mine], marker="o", label=what)
        if what == _COLD:
            for part in _PARTS:
                parts.plot(depths, [r["parts"][part] for r in mine], marker="o", label=part)
    for axes, name in ((parts, f"processor seconds, {_COLD}, by part"), (whole, "processor seconds, all")):
        axes.set(xlabel="decoder layers", ylabel=name, ylim=(0, None), xlim=(0, None))
        axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench_compile", description="Time and memory of large compiles.")
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", help="folder whose layers the measured checkpoints are made of"
    )
    parser.add_argument("--depths", type=numbers, default=(4, 8, 16), metavar="N,N,..")
    parser.add_argument("--dies", default="4")
    parser.add_argument("--seqlens", default="1,8,96")
    parser.add_argument("--max-kv", type=int, default=4096)
    parser.add_argument("--jobs", default=None)
    parser.add_argument("--work", type=Path, help="where the folder of all of it is made (default: TMPDIR)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw seconds against depth (.svg or .png)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = make_parser().parse_args(argv)
    if args.checkpoint is None:
        raise TyirError("no checkpoint to measure with", help="give the folder of one of real size")
    if args.plot is not None:
        _pyplot()  # missing: said before the minutes of measuring
    rows: list[dict[str, Any]] = []
    if not args.json:
        columns = "".join(f"{part:>18}" for part in _PARTS)
        print(
            f"{'layers':>6}{'GB':>7}  {'what':<16}{'seconds':>9}{'processor':>11}{columns}{'peak MiB':>10}"
            f"{'load':>7}"
        )
    for layers in args.depths:
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            for row in measure(args.checkpoint, layers, Path(work), args):
                rows.append({**row, "load": os.getloadavg()[0], "parts": parts_of(row)})
                if not args.json:
                    columns = "".join(f"{seconds:>18.1f}" for seconds in rows[-1]["parts"].values())
                    print(
                        f"{layers:>6}{row['gb']:>7.2f}  {row['what']:<16}{row['seconds']:>9.1f}"
                        f"{row['cpu_seconds']:>11.1f}{columns}{row['peak_mib']:>10.0f}"
                        f"{rows[-1]['load']:>7.1f}",
                        flush=True,
                    )
    if args.json:
        print(json.dumps(rows, indent=1))
    if args.plot is not None:
        plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
