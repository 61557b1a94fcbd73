"""Times whole models on this processor: artifacts of ours beside other engines, in turn, in one run.

    python -m tyir.tools.bench.engines tyir=out/1die onnxruntime-genai=ort --python onnxruntime-genai=venv/bin/python

Each engine is a process of its own (`engine_process.py`), which waits while others run.  A round gives every engine
one prompt and then tokens after it, and measures ahead of each how fast memory can be read with as many threads
(`bandwidth.c`): on a shared machine that is what its figures are to be held against.  Printed: medians over the
rounds as Markdown; bytes that a token reads are known of our artifacts alone.  On cores that other programs use,
`--threads 1 --clock processor` compares what the engines compute: threads that wait for each other there wait long.

What the engines are given, from a checkpoint CK with weights of 16 bits (each in an environment of its own):

    tyir               tyir-quantize CK --method rtn --lm-head -o Q
                       tyir-compile Q --dies 1 --seqlens 1,128 --max-kv 512 --output-rows last --host-activations int16
    onnxruntime-genai  python -m onnxruntime_genai.models.builder -i CK -o ORT -p int4 -e cpu -c CACHE --extra_options
                       int4_block_size=128 int4_accuracy_level=4 int4_is_symmetric=false prune_lm_head=true
    openvino           OVModelForCausalLM.from_pretrained(CK, export=True, compile=False, quantization_config=
                       OVWeightQuantizationConfig(bits=4, sym=False, group_size=128, ratio=1.0, all_layers=True))
    llama.cpp          a GGUF file of f16, llama_model_quantize to Q4_0
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tyir.diagnostics import TyirError
from tyir.process.cores import usable_cores
from tyir.tools.bench.engine_process import CLOCKS
from tyir.tools.cli import run_tool

__all__ = ["main"]

_HERE = Path(__file__).parent
_COMPILER = "cc"


class _Process:
    """A child that answers each line by one."""

    def __init__(self, command: Sequence[str]) -> None:
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._in: IO[str] = self._child.stdin
        self._out: IO[str] = self._child.stdout
        self.command = command

    def ask(self, line: str) -> str:
        self._in.write(line + "\n")
        self._in.flush()
        return self.answer()

    def answer(self) -> str:
        found = self._out.readline()
        if not found:
            raise TyirError(f"{' '.join(map(str, self.command))} ended with code {self._child.wait()}")
        return found

    def close(self) -> None:
        self._in.close()
        self._child.wait()


@dataclass
class _Measured:
    """One engine's figures, a number for each round: seconds of a token, of a prompt; GB/s beside it."""

    name: str
    nbytes: int | None
    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)

    def row(self, prompt: int, best: tuple[float, float], clock: str) -> str:
        token, whole = statistics.median(self.decode), statistics.median(self.prefill)
        read = statistics.median(self.bandwidth)
        if self.nbytes is None:
            bytes_read = rate = share = ""
        else:
            bytes_read, rate = f"{self.nbytes / 1e6:.0f}", f"{self.nbytes / token / 1e9:.1f}"
            rates = [self.nbytes / t / 1e9 / b for t, b in zip(self.decode, self.bandwidth)]
            # a probe's time is wall time: processor time has no share of it
            share = f"{statistics.median(rates):.0%}" if clock == "wall" else ""
        cells = [
            self.name,
            f"{1 / token:.1f}",
            f"{1 / token / best[0]:.2f}",
            f"{prompt / whole:.0f}",
            f"{prompt / whole / best[1]:.2f}",
            bytes_read,
            rate,
            f"{read:.1f}",
            share,
        ]
        return f"| {' | '.join(cells)} |"


_COLUMNS = (
    "engine",
    "decode tokens/s",
    "of the best other",
    "prefill tokens/s",
    "of the best other",
    "MB a token",
    "GB/s",
    "read bandwidth beside it, GB/s",
    "share",
)


def _bytes_of_token(folder: Path) -> int:
    """What a step of one token reads of the weights: all of them but the rows of the embedding."""
    from tyir.dialects.ty import Embedding, GetGlobal, Global
    from tyir.manifest import Manifest
    from tyir.parser import parse_file

    total = 0
    for program in Manifest.load(folder, check=False).programs:
        if program.seqlen != 1:
            continue
        module = parse_file(folder / program.ir)
        looked_up = {op.table.op for op in module.walk_type(Embedding)}
        names = {g.symbol.leaf for g in module.walk_type(GetGlobal) if g not in looked_up}
        total += sum(g.nbytes for g in module.walk_type(Global) if str(g.sym_name) in names)
    return total


def _pairs(texts: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [(kind, value) for kind, _, value in (text.partition("=") for text in texts)]
    if bad := next((kind for kind, value in pairs if not value), None):
        raise TyirError(f"'{bad}' is not ENGINE=PATH", help="tyir=out/1die, for example")
    return pairs


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Times whole models beside other engines, in turn.")
    parser.add_argument("models", nargs="*", metavar="ENGINE=MODEL", help="tyir=FOLDER, llama.cpp=FILE, ..")
    parser.add_argument("--python", nargs="+", default=[], metavar="ENGINE=PYTHON", help="an engine's Python")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens after it, in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="what is measured: wall time, or where other programs run, with --threads 1, processor time",
    )
    options = parser.parse_args(argv)
    if not options.models:
        raise TyirError("no engines to measure", help="give some: tyir=out/1die llama.cpp=model.gguf")
    models, pythons = _pairs(options.models), dict(_pairs(options.python))
    with tempfile.TemporaryDirectory() as directory:
        probe_file = str(Path(directory) / "bandwidth")
        source = str(_HERE / "bandwidth.c")
        subprocess.run([_COMPILER, "-O3", "-march=native", "-pthread", source, "-o", probe_file], check=True)
        probe = _Process([probe_file, str(options.threads)])
        script = str(_HERE / "engine_process.py")
        processes = [
            _Process(
                [
                    pythons.get(kind, sys.executable),
                    script,
                    kind,
                    model,
                    str(options.threads),
                    str(options.prompt),
                    options.clock,
                ]
            )
            for kind, model in models
        ]
        for process in processes:
            process.answer()
        found = [_Measured(f"{k} {m}", _bytes_of_token(Path(m)) if k == "tyir" else None) for k, m in models]
        for _ in range(options.rounds):
            for measured, process in zip(found, processes):
                before = float(probe.ask(""))
                measured.prefill.append(statistics.median(json.loads(process.ask("prefill"))))
                taken = json.loads(process.ask(f"decode {options.tokens}"))
                measured.decode.append(statistics.median(taken))
                measured.bandwidth.append((before + float(probe.ask(""))) / 2)
        for process in (*processes, probe):
            process.close()
    _print(found, [kind == "tyir" for kind, _ in models], options)
    return 0


def _print(found: Sequence[_Measured], ours: Sequence[bool], options: argparse.Namespace) -> None:
    others = [m for m, own in zip(found, ours) if not own] or found
    best = (
        max(1 / statistics.median(m.decode) for m in others),
        max(options.prompt / statistics.median(m.prefill) for m in others),
    )
    print(
        f"{options.threads} threads, {options.clock} time, a prompt of {options.prompt} tokens and"
        f" {options.tokens} after it, medians of {options.rounds} rounds in turn\n"
    )
    print(f"| {' | '.join(_COLUMNS)} |")
    print(f"| {' | '.join('---' for _ in _COLUMNS)} |")
    for measured in found:
        print(measured.row(options.prompt, best, options.clock))


if __name__ == "__main__":
    sys.exit(main())
