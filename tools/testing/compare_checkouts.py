"""Two checkouts compile the same models: which bytes of the artifacts differ, and how fast each is.

    python -m tyir.tools.testing.compare_checkouts OLD NEW                   all cases, then speeds
    python -m tyir.tools.testing.compare_checkouts OLD NEW --cases tiny      the embedded model only

For refactoring: a move must change no byte.  Each checkout is installed into a folder of its own (the
libraries are this environment's) and run from there, so that neither sees the other.  Cases: the embedded
model with fp16 and int4 weights on 1 to 4 dies, and two layers of Qwen2.5-7B's shapes with random weights on
1 and 4 dies; all for lengths 1 and 8.  Speeds are medians of the processor time of alternating runs: reading,
verifying and printing IR, importing the embedded model, and lowering it to command programs.

Exit code 1 when a file differs, is missing or new.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tyir.manifest import sha256_file
from tyir.tools.cli import run_tool

__all__ = ["main"]

# Two decoder layers of Qwen2.5-7B (its config.json on the hub) with a small vocabulary: the layers count.
_SEVEN_B = """
import sys, torch, transformers
torch.manual_seed(0)
config = transformers.Qwen2Config(vocab_size=4096, hidden_size=3584, intermediate_size=18944,
    num_hidden_layers=2, num_attention_heads=28, num_key_value_heads=4,
    max_position_embeddings=32768, rope_theta=1e6)
torch.set_default_dtype(torch.float16)
transformers.Qwen2ForCausalLM(config).save_pretrained(sys.argv[1])
"""

# What is timed, by names that every checkout has: seconds of processor time on the last line.
_PRELUDE = """
import pathlib, sys, time
model = pathlib.Path(sys.argv[1])
PIPELINE = "to-ty,kv-materialize,partition-dies{dies=4},specialize-seqlen{seqlens=1,8},to-program"
"""
_TIMED = {
    "read, verify and print IR": """
from tyir.parser import parse_module
from tyir.printer import print_op
from tyir.verifier import verify
from tyir.frontends.huggingface import import_model
text = print_op(import_model(model))
begin = time.process_time()
for _ in range(5):
    module = parse_module(text)
    verify(module)
    print_op(module)
print(time.process_time() - begin)
""",
    "import a checkpoint": """
from tyir.frontends.huggingface import import_model
import_model(model)  # torch and transformers are loaded
begin = time.process_time()
import_model(model)
print(time.process_time() - begin)
""",
    "run the passes and lower": """
from tyir.pipeline import run_pipeline
from tyir.frontends.huggingface import import_model
module = import_model(model)
begin = time.process_time()
run_pipeline(module, PIPELINE + ",lower-edge10{seqlen=8}")
print(time.process_time() - begin)
""",
    "import tyir": """
begin = time.process_time()
import tyir.parser, tyir.printer, tyir.verifier, tyir.pipeline
print(time.process_time() - begin)
""",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One compile: a checkpoint folder, the kind of weights and the number of dies."""

    model: Path
    weights: str
    dies: int

    @property
    def name(self) -> str:
        return f"{self.model.name} {self.weights} {self.dies} dies"


@dataclass(frozen=True)
class Checkout:
    """A checkout installed into a folder of its own."""

    source: Path
    site: Path

    def python(self, arguments: Sequence[str]) -> str:
        """What `python ARGUMENTS` prints with this checkout's tyir."""
        environment = {**os.environ, "PYTHONPATH": str(self.site), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-P", *arguments]
        done = subprocess.run(command, env=environment, cwd=self.site, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{self.source}: {' '.join(command)}\n{done.stderr}")
        return done.stdout


def install(source: Path, site: Path) -> Checkout:
    """Install the checkout at `source` without its libraries; from a copy, a build leaves files behind."""
    copy = site.with_name(f"{site.name}-source")
    shutil.copytree(
        source, copy, ignore=shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", "tests")
    )
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(copy)], check=True)
    return Checkout(source, site)


def differing_files(old: Path, new: Path) -> Iterator[str]:
    """A line for every file that only one of the folders has or that differs, with a `.json`'s keys."""
    files = {p.relative_to(root) for root in (old, new) for p in root.rglob("*") if p.is_file()}
    for name in sorted(files):
        a, b = old / name, new / name
        if not a.is_file() or not b.is_file():
            yield f"{name}: only the {'new' if b.is_file() else 'old'} checkout writes it"
        elif sha256_file(a) != sha256_file(b):
            keys = f" in {', '.join(_differing_keys(a, b))}" if name.suffix == ".json" else ""
            yield f"{name}: differs{keys} ({a.stat().st_size:,} and {b.stat().st_size:,} bytes)"


def _differing_keys(old: Path, new: Path) -> list[str]:
    a, b = (json.loads(p.read_text(encoding="utf-8")) for p in (old, new))
    return sorted(k for k in {*a, *b} if a.get(k) != b.get(k))


def compare(case: Case, checkouts: Sequence[Checkout], work: Path) -> list[str]:
    """Compile a case with both checkouts; returns the lines of `differing_files`."""
    folders = []
    for index, checkout in enumerate(checkouts):
        out = work / f"out{index}"
        options = ["--dies", str(case.dies), "--seqlens", "1,8", "--max-kv", "512", "--weights", case.weights]
        checkout.python(["-m", "tyir.tools.tyir_compile", str(case.model), "-o", str(out), *options])
        folders.append(out / f"{case.dies}die")
    problems = list(differing_files(*folders))
    for folder in folders:
        shutil.rmtree(folder.parent)
    return problems


def cases(which: str, tiny: Path, work: Path) -> Iterator[Case]:
    """The compiles that `--cases` asks for."""
    if which in ("all", "tiny"):
        yield from (Case(tiny, weights, dies) for weights in ("fp16", "int4") for dies in (1, 2, 3, 4))
    if which in ("all", "7b"):
        model = work / "7b-pair"
        subprocess.run([sys.executable, "-c", _SEVEN_B, str(model)], check=True)
        yield from (Case(model, weights, dies) for weights in ("fp16", "int4") for dies in (1, 4))


def compare_speed(checkouts: Sequence[Checkout], model: Path, runs: int) -> None:
    """Print the medians of both checkouts and their ratio."""
    print(f"\n{'processor seconds':<28}{'old':>10}{'new':>10}{'new / old':>12}")
    for name, code in _TIMED.items():
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(runs):
            for checkout, samples in zip(checkouts, seconds):
                samples.append(float(checkout.python(["-c", _PRELUDE + code, str(model)]).split()[-1]))
        old, new = (statistics.median(samples) for samples in seconds)
        print(f"{name:<28}{old:>10.3f}{new:>10.3f}{new / old:>12.2f}", flush=True)


def _run(arguments: argparse.Namespace) -> int:
    differ = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        roots = [Path(p).resolve() for p in (arguments.old, arguments.new)]
        checkouts = [install(root, work / f"site{i}") for i, root in enumerate(roots)]
        tiny = roots[0] / "tests" / "models" / "tiny-qwen2"
        for case in cases(arguments.cases, tiny, work):
            problems = compare(case, checkouts, work)
            differ += bool(problems)
            print(
                f"{case.name:<40}{'identical' if not problems else f'{len(problems)} files differ'}",
                flush=True,
            )
            for problem in problems:
                print(f"  {problem}", flush=True)
        if arguments.runs:
            compare_speed(checkouts, tiny, arguments.runs)
    return 1 if differ else 0


@run_tool
def main(argv: Sequence[str]) -> int:
    """Run the tool; 0 when every file is identical."""
    parser = argparse.ArgumentParser(
        prog="compare_checkouts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", help="folder of one checkout")
    parser.add_argument("new", help="folder of the other")
    parser.add_argument("--cases", choices=("all", "tiny", "7b", "none"), default="all", help="default: all")
    parser.add_argument("--runs", type=int, default=3, help="runs of each timing; 0: none (default: 3)")
    return _run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
