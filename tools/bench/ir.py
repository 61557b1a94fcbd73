"""Times the IR itself, in microseconds of CPU time per op, and its memory.

Parse, print, verify, clone, cse, canonicalize and dce.

    python -m tyir.tools.bench.ir --ops 1000,10000,100000
    python -m tyir.tools.bench.ir --impl xdsl --ops 1000,10000        where xDSL is installed; it takes the ops as unregistered

The text is a decoder written by this file: `ty` ops, about 190 bytes an op, with duplicates for cse, pairs
of transposes for canonicalize, dead ops for dce, locations and one blob per norm weight.  Every size runs
in a process of its own; passes get a fresh clone; the smallest of the repeats counts.
"""  # noqa: E501

from __future__ import annotations

import argparse
import gc
import importlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tyir.tools.cli import ToolParser, run_tool

__all__ = ["decoder_text", "main"]

H, HEADS, GROUPS, D, FF = 2048, 16, 4, 128, 5632
HID, HEADED, KV = f"tensor<1x?x{H}xf16>", f"tensor<1x?x{HEADS}x{D}xf16>", f"tensor<1x?x{GROUPS}x{D}xf16>"
TABLE, IDS = f"tensor<1x?x{D // 2}xf16>", "tensor<1x?xi64>"


class _Writer:
    """Lines of ops with numbered results."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.globals: list[str] = []
        self.blobs: list[str] = []
        self.count = 0

    def op(
        self,
        name: str,
        operands: Sequence[tuple[str, str]],
        results: Sequence[str],
        properties: str = "",
        loc: str = "",
    ) -> tuple[str, str]:
        """Append an op; the first result as (name, type)."""
        number, self.count = self.count, self.count + 1
        left = f"%{number}{f':{len(results)}' if len(results) > 1 else ''} = "
        right = results[0] if len(results) == 1 else f"({', '.join(results)})"
        props = f" <{{{properties}}}>" if properties else ""
        place = f' loc("{loc}")' if loc else ""
        types = ", ".join(t for _, t in operands)
        self.lines.append(
            f'    {left}"{name}"({", ".join(v for v, _ in operands)}){props} : ({types}) -> {right}{place}'
        )
        return f"%{number}{'#0' if len(results) > 1 else ''}", results[0]

    def weight(self, key: str, type: str, nbytes: int) -> tuple[str, str]:
        self.globals.append(
            f'  "ty.global"() <{{file = "model.safetensors", key = "{key}", nbytes = {nbytes} : i64, offset ='
            f' {len(self.globals) * 64} : i64, sym_name = "{key}", type = {type}}}> : () -> ()'
        )
        return self.op("ty.get_global", [], [type], f"symbol = @{key}", key)

    def linear(self, path: str, x: tuple[str, str], n: int, k: int) -> tuple[str, str]:
        weight = self.weight(f"{path}.weight", f"tensor<{n}x{k}xf16>", 2 * n * k)
        return self.op("ty.linear", [x, weight], [f"tensor<1x?x{n}xf16>"], "", path)


def _layer(w: _Writer, number: int, h: tuple[str, str]) -> tuple[str, str]:
    path = f"model.layers.{number}"
    inv_freq = f"inv_freq = dense<1.0> : tensor<{D // 2}xf32>"
    cos = w.op(
        "ty.rope_angles", [("%positions", IDS)], [TABLE, TABLE], inv_freq, path
    )  # the same in every layer: for cse
    sin = (cos[0].replace("#0", "#1"), TABLE)
    norm = w.op(
        "ty.rms_norm",
        [h, w.weight(f"{path}.input_layernorm.weight", f"tensor<{H}xf16>", 2 * H)],
        [HID],
        "eps = 1.0e-05 : f64",
        path,
    )
    w.blobs.append(f'      layer{number}.norm: "0x020000000102030405060708"')
    parts = []
    for name, heads, kind in (("q", HEADS, HEADED), ("k", GROUPS, KV), ("v", GROUPS, KV)):
        flat = w.linear(f"{path}.self_attn.{name}_proj", norm, heads * D, H)
        parts.append(w.op("ty.reshape", [flat], [kind], f"shape = array<i64: 1, -1, {heads}, {D}>", path))
    q, k = (w.op("ty.rope", [x, cos, sin], [x[1]], "", path) for x in parts[:2])
    w.op(
        "ty.transpose", [k], [f"tensor<1x{GROUPS}x?x{D}xf16>"], "perm = array<i64: 0, 2, 1, 3>", path
    )  # unused: for dce
    a = w.op("ty.attention", [q, k, parts[2]], [HEADED], "scale = 8.838835e-02 : f64, window = 0 : i64", path)
    for kind in (f"tensor<1x{HEADS}x?x{D}xf16>", HEADED):  # a pair that undoes itself: for canonicalize
        a = w.op("ty.transpose", [a], [kind], "perm = array<i64: 0, 2, 1, 3>", path)
    flat = w.op("ty.reshape", [a], [HID], f"shape = array<i64: 1, -1, {H}>", path)
    h = w.op("ty.add", [h, w.linear(f"{path}.self_attn.o_proj", flat, H, H)], [HID], "", path)
    weight = w.weight(f"{path}.post_attention_layernorm.weight", f"tensor<{H}xf16>", 2 * H)
    norm = w.op("ty.rms_norm", [h, weight], [HID], "eps = 1.0e-05 : f64", path)
    gate, up = (w.linear(f"{path}.mlp.{n}_proj", norm, FF, H) for n in ("gate", "up"))
    both = w.op("ty.silu_mul", [gate, up], [gate[1]], "", path)
    return w.op("ty.add", [h, w.linear(f"{path}.mlp.down_proj", both, H, FF)], [HID], "", path)


def decoder_text(ops: int) -> str:
    """IR text of a decoder of about `ops` ops, weights included."""
    w, h, number = _Writer(), ("%h", HID), 0
    while w.count + len(w.globals) < ops - 3:
        h = _layer(w, number, h)
        number += 1
    head = (
        f'"func.func"() <{{function_type = ({HID}, {IDS}) -> {HID}, sym_name = "main"}}> ({{\n  ^bb0(%h:'
        f" {HID}, %positions: {IDS}):"
    )
    tail = f'    "func.return"({h[0]}) : ({HID}) -> ()\n  }}) : () -> ()\n}}) : () -> ()\n'
    blobs = "{-#\n  dialect_resources: {\n    builtin: {\n" + ",\n".join(w.blobs) + "\n    }\n  }\n#-}\n"
    return "\n".join(['"builtin.module"() ({', *w.globals, "  " + head, *w.lines, tail, blobs])


@dataclass(frozen=True)
class Implementation:
    """What is timed.  `passes` change a module in place."""

    parse: Callable[[str], Any]
    print: Callable[[Any], str]
    verify: Callable[[Any], object]
    clone: Callable[[Any], Any]
    passes: dict[str, Callable[[Any], object]] = field(default_factory=dict)


def tyir() -> Implementation:
    """This project."""
    from tyir.parser import parse_module
    from tyir.passes.canonicalize import PATTERNS
    from tyir.passes.cse import merge_equal
    from tyir.passes.dce import eliminate_dead_code
    from tyir.printer import print_op
    from tyir.rewrite import rewrite_greedily
    from tyir.verifier import verify

    passes: dict[str, Callable[[Any], object]] = {
        "cse": merge_equal,
        "canonicalize": lambda m: rewrite_greedily(m, PATTERNS),
        "dce": eliminate_dead_code,
    }
    return Implementation(parse_module, print_op, verify, lambda m: m.clone(), passes)


def xdsl() -> Implementation:
    """xDSL, with `ty` ops unregistered.

    Its passes leave them alone, so only the text form, the verifier and copying compare.
    """
    sys.setrecursionlimit(100_000)
    context, parser, printer, builtin, func = (
        importlib.import_module(f"xdsl.{name}")
        for name in ("context", "parser", "printer", "dialects.builtin", "dialects.func")
    )

    def parse(text: str) -> Any:
        loaded = context.Context(allow_unregistered=True)
        loaded.load_dialect(builtin.Builtin)
        loaded.load_dialect(func.Func)
        return parser.Parser(loaded, text).parse_module()

    def show(module: Any) -> str:
        stream = io.StringIO()
        printer.Printer(stream, print_generic_format=True).print_op(module)
        return stream.getvalue()

    return Implementation(parse, show, lambda m: m.verify(), lambda m: m.clone())


def _resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def measure(impl: Implementation, ops: int, repeats: int) -> dict[str, float]:
    """Microseconds per op for each phase, and bytes per op after parsing."""
    text = decoder_text(ops)
    count = text.count('"(')
    warm = impl.parse(decoder_text(200))
    impl.verify(warm)
    impl.print(warm)
    gc.collect()
    before = _resident_bytes()
    module = impl.parse(text)
    gc.collect()
    result = {"ops": float(count), "bytes/op": (_resident_bytes() - before) / count}
    phases: Iterator[tuple[str, Callable[[Any], object]]] = iter(
        [
            ("parse", lambda m: impl.parse(text)),
            ("print", impl.print),
            ("verify", impl.verify),
            ("clone", impl.clone),
        ]
    )
    for name, phase in phases:
        result[name] = min(_seconds(phase, module) for _ in range(repeats)) / count * 1e6
    for name, change in impl.passes.items():
        result[name] = min(_seconds(change, impl.clone(module)) for _ in range(repeats)) / count * 1e6
    return result


def _seconds(phase: Callable[[Any], object], module: Any) -> float:
    gc.collect()
    start = time.process_time()
    kept = phase(module)
    seconds = time.process_time() - start
    del kept
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="bench_ir", description="Time the IR per op, on decoders of the given numbers of ops."
    )
    parser.add_argument("--impl", choices=("tyir", "xdsl"), default="tyir")
    parser.add_argument(
        "--ops", default="1000,10000", help="sizes, separated by commas (default: 1000,10000)"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


@run_tool
def main(argv: Sequence[str]) -> int:
    """Run the tool; 0 on success."""
    args = _parser().parse_args(argv)
    if args.worker:
        print(json.dumps(measure(tyir() if args.impl == "tyir" else xdsl(), int(args.ops), args.repeats)))
        return 0
    rows = []
    for size in args.ops.split(","):
        command = [
            sys.executable,
            "-P",
            __file__,
            "--worker",
            "--impl",
            args.impl,
            "--ops",
            size,
            "--repeats",
            str(args.repeats),
        ]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        if len(rows) == 1:
            print("".join(f"{name:>14}" for name in rows[0]))
        print("".join(f"{value:>14.2f}" for value in rows[-1].values()), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"impl": args.impl, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
