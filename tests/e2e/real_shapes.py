"""Two layers of real models' shapes with random weights, cut over 1 to 16 dies: are the numbers those of one
die, how even is the load, what is held twice.

    pytest tests/e2e/test_real_shapes.py --slow -s      # minutes per model; -k 'Llama3 and awq' for some

prints one line for each number of dies.  fp16 weights and those quantised by the compiler ("int4") are drawn
in memory; "awq" is a checkpoint folder in AutoAWQ's layout, imported as a user's is.  The reference (one die)
runs once per model, weights are drawn, unpacked and quantised once and sliced without copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from tests.frontends.real_models import write_checkpoint
from tests.llm import Shape, build, dies_of
from tyir.backends.edge10.weight_windows import WindowReader
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.dialects.kv import CachedAttention
from tyir.dialects.ty import Param, SiluMul, tensor_type
from tyir.execution.weights import CheckpointReader, WeightSource
from tyir.frontends.huggingface import import_model
from tyir.interpreter import Interpreter, run_lockstep
from tyir.pipeline import run_pipeline

__all__ = [
    "MODELS",
    "WEIGHTS",
    "Cut",
    "RealShape",
    "Row",
    "Weights",
    "cut_of",
    "measure",
    "partition",
    "table_head",
    "table_line",
]

Array = npt.NDArray[Any]
Weights = Literal["fp16", "int4", "awq"]
WEIGHTS: Final[tuple[Weights, ...]] = ("fp16", "int4", "awq")
VOCABULARY: Final = 4099  # a prime, small enough for the logits of many runs
IDS: Final = np.array([[5, 17, 300, 42, 9, 1000, 77, 3]], np.int32)
GROUP: Final = 128


@dataclass(frozen=True)
class RealShape:
    """Sizes from the model's public config.json."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    width: int
    vocabulary: int
    bias: bool = False

    def shape(self, layers: int, vocabulary: int) -> Shape:
        return Shape(
            layers,
            self.hidden,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.width,
            vocabulary,
            bias=self.bias,
            tied=False,
        )


MODELS: Final = {
    "Qwen1.5-1.8B": RealShape(16, 16, 128, 2048, 5504, 151936, bias=True),
    "Qwen2.5-1.5B": RealShape(12, 2, 128, 1536, 8960, 151936, bias=True),
    "Qwen2.5-7B": RealShape(28, 4, 128, 3584, 18944, 152064, bias=True),
    "Qwen3-8B": RealShape(32, 8, 128, 4096, 12288, 151936),
    "Llama3-8B": RealShape(32, 8, 128, 4096, 14336, 128256),
    "DeepSeek-R1-Distill-Qwen-32B": RealShape(40, 8, 128, 5120, 27648, 152064, bias=True),
}


@dataclass(frozen=True)
class Cut:
    """What each die holds of a layer, and of all weights with the real vocabulary.

    `imbalance`: the largest die's bytes of weights over the mean; `kv_factor`: key/value heads held by all
    dies over those of the model.
    """

    queries: tuple[int, ...]
    kv_heads: tuple[int, ...]
    mlp_groups: tuple[int, ...]
    imbalance: float
    kv_factor: float


def cut_of(model: RealShape, dies: int, int4: bool) -> Cut:
    """The cut of a model, from the types alone."""
    module, _ = build(model.shape(2, model.vocabulary), draw=False)
    partition(module, dies, int4, "specialize-seqlen{seqlens=1},outline-params")
    parts = dies_of(module)
    attentions = [next(d.walk_type(CachedAttention), None) for d in parts]
    gates = [next(d.walk_type(SiluMul), None) for d in parts]
    caches = tuple(0 if a is None else tensor_type(a.k).static_shape[1] for a in attentions)
    weights = [sum(p.type.nbytes for p in d.walk_type(Param)) for d in parts]
    return Cut(
        tuple(0 if a is None else tensor_type(a.q).static_shape[2] for a in attentions),
        caches,
        tuple(0 if g is None else tensor_type(g.gate).static_shape[2] // GROUP for g in gates),
        max(weights) * dies / sum(weights),
        sum(caches) / model.kv_heads,
    )


def partition(module: Module, dies: int, int4: bool, then: str, cache: str = "max-kv=16") -> None:
    """Cut a model at stage `ty` over the dies and run the passes `then`."""
    quantize = f"quantize-weights{{group-size={GROUP}}}," if int4 else ""
    run_pipeline(
        module, f"{quantize}kv-materialize{{{cache}}},partition-dies{{dies={dies} strategy=split}},{then}"
    )


@dataclass(frozen=True)
class Row:
    """One model on one number of dies against one die.

    `cosine`: the smallest of the eight positions' logits; `drift`: how far the errors lean to one side,
    |mean| over mean magnitude; `largest`: the largest error over the largest logit.
    """

    model: str
    weights: str
    dies: int
    cosine: float
    drift: float
    largest: float
    cut: Cut


def measure(name: str, weights: Weights, dies: Sequence[int], folder: Path) -> Iterator[Row]:
    """Rows for the given numbers of dies; `folder` is for a checkpoint."""
    model = MODELS[name]
    make, source = _checkpoint(name, folder) if weights == "awq" else _in_memory(model)
    evaluator = WindowReader(source, remember=1 << 40)
    quantize = weights == "int4"
    wanted = _logits(make(), evaluator, 1, quantize)
    norm = np.linalg.norm(wanted, axis=1)
    for count in dies:
        got = _logits(make(), evaluator, count, quantize)
        cosine = (got * wanted).sum(axis=1) / (np.linalg.norm(got, axis=1) * norm)
        error = got - wanted
        drift = abs(float(error.mean())) / float(np.abs(error).mean() + 1e-12)
        largest = float(np.abs(error).max() / np.abs(wanted).max())
        yield Row(
            name, weights, count, float(cosine.min()), drift, largest, cut_of(model, count, weights != "fp16")
        )


def _in_memory(model: RealShape) -> tuple[Callable[[], Module], WeightSource]:
    """A maker of the module at stage `ty`, and random weights."""
    shape = model.shape(2, VOCABULARY)
    return lambda: build(shape, draw=False)[0], build(shape)[1]


def _checkpoint(name: str, folder: Path) -> tuple[Callable[[], Module], WeightSource]:
    """The same from a checkpoint in AutoAWQ's GEMM layout that is written to `folder`, groups of 128."""
    write_checkpoint(folder, name, "awq", vocabulary=VOCABULARY)
    module = import_model(folder)
    run_pipeline(module, "to-ty")
    return module.clone, CheckpointReader(folder)


def _logits(module: Module, evaluator: WindowReader, dies: int, int4: bool) -> Array:
    """Logits [8, V] of the eight tokens as one chunk."""
    partition(module, dies, int4, "specialize-seqlen{seqlens=8},to-program")
    runs = []
    for die in dies_of(module):
        constants = {str(p.sym_name): evaluator.evaluate(p) for p in die.body if isinstance(p, Param)}
        main = die.lookup("main_s8")
        assert isinstance(main, Func)
        caches = [np.zeros(tensor_type(a).static_shape, np.float16) for a in main.args[2:]]
        runs.append(
            Interpreter(die, constants=constants).run("main_s8", [IDS, np.zeros(1, np.int32), *caches])
        )
    return run_lockstep(runs)[0][0][0].astype(np.float64)


def table_head() -> str:
    """The columns of `table_line`."""
    return (
        f"{'model':<30}{'':>6}{'dies':>5}{'1 - cosine':>12}{'drift':>8}{'largest':>9}{'load':>7}{'KV':>6} "
        f" query heads | KV heads | MLP groups of {GROUP}"
    )


def table_line(row: Row) -> str:
    """One row; equal neighbouring sizes are written once."""

    def text(sizes: tuple[int, ...]) -> str:
        runs: list[tuple[int, int]] = []
        for size in sizes:
            runs = (
                [*runs[:-1], (size, runs[-1][1] + 1)] if runs and runs[-1][0] == size else [*runs, (size, 1)]
            )
        return ",".join(f"{s}x{n}" if n > 1 else str(s) for s, n in runs)

    c = row.cut
    return (
        f"{row.model:<30}{row.weights:>6}{row.dies:>5}{1 - row.cosine:>12.1e}{row.drift:>8.3f}{row.largest:>9.1e}{c.imbalance:>7.3f}{c.kv_factor:>6.2f}"  # noqa: E501
        f"  {text(c.queries)} | {text(c.kv_heads)} | {text(c.mlp_groups)}"
    )
