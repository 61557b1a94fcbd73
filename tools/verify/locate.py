"""Where do artifacts stop computing what the model computes?

Every op of every die against the unpartitioned reference, in the order of execution.

An op is off in direction (cosine) or in size (ratio of norms, of the whole and of each row): a wrong scale,
as of a norm's epsilon, turns nothing, and would be seen only where the next residual is added.

`tyir.shard` and `tyir.partial` on a die's op say which part of the whole its result is; ops are matched by
module path, kind and number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from tyir.artifacts.rope_scaling import RECORDED
from tyir.attributes import DenseArrayAttr
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func
from tyir.dialects.kv import Append, CachedAttention, Rows, TakeRows
from tyir.dialects.ty import GetGlobal, tensor_type
from tyir.execution.artifacts import Artifacts
from tyir.execution.constexpr import ConstantExpressions
from tyir.execution.weights import CheckpointReader, WeightSource, checkpoint_of
from tyir.interpreter import Interpreter, run_lockstep
from tyir.ir import Op
from tyir.layers import layer_in, path_in_calls
from tyir.location import FileLoc, FusedLoc, Location, NameLoc
from tyir.runtime_sim.session.chunks import Chunk
from tyir.runtime_sim.session.session import EngineName, Session
from tyir.runtime_sim.vision.tower import Tower
from tyir.tools.verify.compare import cosine, reference_module, rope_positions, size_ratio, tower_module
from tyir.traits import Collective

if TYPE_CHECKING:
    from tyir.frontends.plugin import ModelPlugin

__all__ = [
    "Agreement",
    "Divergence",
    "Recorder",
    "first_off",
    "locate",
    "locate_in_tower",
    "reference_results",
]

Array = npt.NDArray[Any]


# Rounding is far below these.  Of the embedded model the worst op has cosine 0.999997, is 0.0006 off in size
# and 0.0012 in a row, in fp16 and int4; with a cache of int8 0.99991, 0.0037 and 0.0126.
MIN_COSINE: Final = 0.999
SIZE_OFF: Final = 0.01
ROW_OFF: Final = 0.05
_BOUNDS: Final = (MIN_COSINE, SIZE_OFF, ROW_OFF)
# What a 4-bit cache adds in the embedded model: 0.990 of an op, 0.976 of a layer, 0.01 in size and 0.1 in a
# row.
_FOUR_BIT_BOUNDS: Final = (0.95, 0.05, 0.4)
_SMALL_ROW: Final = 1e-2  # rows below this share of the largest are mostly rounding


@dataclass(frozen=True)
class Agreement:
    """How two tensors agree: their cosine, and the ratio of their norms; of the norms of two rows where those
    are further apart.
    """

    cosine: float
    size: float
    off: bool

    @classmethod
    def of(cls, got: Array, wanted: Array, bounds: tuple[float, float, float] = _BOUNDS) -> Agreement:
        """Of tensors of one shape [..., channels]; `bounds`: the least cosine, and how far the norms of all
        and of a row may be from 1.
        """
        least, size_off, row_off = bounds
        direction, whole = cosine(got, wanted), size_ratio(got, wanted)
        row = _worst_row(got, wanted)
        row_is_off = abs(row - 1) > row_off
        size = row if row_is_off and abs(row - 1) > abs(whole - 1) else whole
        return cls(direction, size, direction < least or abs(whole - 1) > size_off or row_is_off)


def _worst_row(got: Array, wanted: Array) -> float:
    """The ratio of norms of the row where it is furthest from 1, small rows left out."""
    mine, theirs = (
        np.linalg.norm(t.astype(np.float64).reshape(-1, t.shape[-1]), axis=1) for t in (got, wanted)
    )
    large = theirs > _SMALL_ROW * theirs.max(initial=0.0)
    ratios = mine[large] / theirs[large]
    return float(ratios[np.abs(ratios - 1).argmax()]) if large.any() else 1.0


@dataclass(frozen=True)
class Divergence:
    """The first op whose result is off: where in the model, on which dies, how far.

    `size` is the result's norm in the expected one's.
    """

    layer: int | None
    path: str
    op: str
    source: str
    dies: tuple[int, ...]
    cosine: float
    size: float

    def __str__(self) -> str:
        where = f"layer {self.layer}, " if self.layer is not None else ""
        dies = f"die{'s' if len(self.dies) > 1 else ''} {', '.join(map(str, self.dies))}"
        return (
            f"{where}{self.op} at {self.path}{f' ({self.source})' if self.source else ''} on {dies}: cosine"
            f" {self.cosine:.6f}, {self.size:.4g} times the size"
        )


Key = tuple[str, str, int]
_UNCOMPARED: Final = (Call, GetGlobal, Append, Rows, TakeRows)  # what the reference has no op for
_SAME: Final = {
    "kv.attention": "ty.attention",
    "kv.dual_chunk_attention": "ty.attention",
    "kv.merge_attention": "ty.attention",
    "ty.quantized_linear": "ty.linear",
}


def locate(
    folder: str | Path | Artifacts,
    checkpoint: Path,
    ids: Sequence[int],
    engine: EngineName = "host",
    plugin: ModelPlugin | None = None,
    base: Path | None = None,
) -> Divergence | None:
    """Run `ids` through the artifacts and the reference; the first op that is off, or None.

    Op by op, by `Agreement.of`.
    """
    recorder = Recorder()
    session = Session(folder, engine, check=False, probe=recorder, dense=True)
    scaling = session.manifest.model.get(RECORDED)
    positions = rope_positions(session.manifest.model, session.capacity, len(ids) + 1)
    module = reference_module(checkpoint, session.manifest.options, plugin, base, scaling, positions)
    expected = reference_results(module, ids, CheckpointReader(checkpoint_of(module)))
    for _ in session.generate(ids, 1):
        pass  # one run of each step, whichever rows it returns
    four = session.manifest.options.kv_dtype == "int4"
    return first_off(expected, recorder, _FOUR_BIT_BOUNDS if four else _BOUNDS)


def first_off(
    expected: Mapping[Key, tuple[Array, str]],
    recorder: Recorder,
    bounds: tuple[float, float, float] = _BOUNDS,
) -> Divergence | None:
    """The first op, in the order of execution, that is off on any die by more than `Agreement.of` takes."""
    for key, parts in recorder.parts.items():
        if key not in expected:
            continue
        wanted, source = expected[key]
        off = {die: found for die, found in _compare(wanted, parts, bounds) if found.off}
        if off:
            path, _name, _ = key
            worst = min(off.values(), key=lambda a: a.cosine - abs(a.size - 1))
            return Divergence(
                layer_in(path),
                path,
                recorder.ops[key].name,
                source,
                tuple(sorted(off)),
                worst.cosine,
                worst.size,
            )
    return None


def locate_in_tower(
    tower: Tower,
    checkpoint: Path,
    patches: Array,
    plugin: ModelPlugin | None = None,
    base: Path | None = None,
) -> Divergence | None:
    """The first op of a vision tower that is off for `patches` [N, C] in the processor's order, or None."""
    image = tower.size.image
    recorder = Recorder()
    chunk = Chunk(0, image.patches, image.patches)
    tower.probe = lambda die, stack, op, results: recorder(chunk, die, stack, op, results)
    tower.run(patches)
    module = tower_module(checkpoint, image, tower.vision.exponent, plugin, base)
    (name,) = [str(f.sym_name) for f in module.body if isinstance(f, Func)]
    given = tower.ordered(patches.astype(np.float16))
    expected = _results_of(module, name, [given], CheckpointReader(checkpoint_of(module)))
    return first_off(expected, recorder)


def _source(location: Location) -> str:
    if isinstance(location, NameLoc) and isinstance(location.child, FileLoc):
        return f"{location.child.file}:{location.child.line}"
    if isinstance(location, FusedLoc):
        return next((s for part in location.parts if (s := _source(part))), "")
    return ""


class _Keys:
    """Names each op of a run, the same way for the reference and for a die.

    By module path, kind and number among its like.
    """

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], int] = defaultdict(int)
        self.constants = ConstantExpressions()

    def of(self, op: Op, stack: tuple[Call, ...]) -> Key | None:
        path = path_in_calls(op, stack)
        if path is None or isinstance(op, _UNCOMPARED) or op.has_trait(Collective):
            return None
        if op.results and self.constants.is_constant(op.results[0]):
            return None  # of weights alone, as rotary tables of one size are: dies have the result
        if isinstance(op, CachedAttention) and op.blocks is not None:
            return None  # a part: what is merged of all dies' has the name
        name = _SAME.get(op.name, op.name)
        number = self.counts[path, name]
        self.counts[path, name] += 1
        return (path, name, number)


@dataclass(frozen=True)
class _Part:
    die: int
    start: int
    count: int
    array: Array
    shard: tuple[int, int] | None
    partial: bool


class Recorder:
    """A `StepProbe` that keeps every op's result on every die."""

    def __init__(self) -> None:
        self.parts: dict[Key, list[_Part]] = defaultdict(list)
        self.ops: dict[Key, Op] = {}
        self.keys: dict[tuple[int, int], _Keys] = defaultdict(_Keys)

    def __call__(
        self, chunk: Chunk, die: int, stack: tuple[Call, ...], op: Op, results: tuple[Array, ...]
    ) -> None:
        key = self.keys[die, chunk.start].of(op, stack)
        if key is None or not results or results[0].ndim < 3:
            return
        shard = op.attributes.get("tyir.shard")
        cut = (shard.ints()[0], shard.ints()[1]) if isinstance(shard, DenseArrayAttr) else None
        self.ops.setdefault(key, op)
        start, count = chunk.start, chunk.count
        if results[0].shape[1] == 1 and count > 1:  # behind `ty.select_row`: of the last token
            start, count = start + count - 1, 1
        self.parts[key].append(
            _Part(die, start, count, np.array(results[0]), cut, "tyir.partial" in op.attributes)
        )


def _compare(
    expected: Array, parts: Sequence[_Part], bounds: tuple[float, float, float]
) -> Iterator[tuple[int, Agreement]]:
    """(die, agreement) for each part; addends are summed over the dies first."""
    addends: dict[int, list[_Part]] = defaultdict(list)
    for part in parts:
        if part.partial:
            addends[part.start].append(part)
            continue
        wanted = expected[:, part.start : part.start + part.count]
        if part.shard is not None:
            axis, offset = part.shard
            wanted = np.take(wanted, range(offset, offset + part.array.shape[axis]), axis=axis)
        yield part.die, Agreement.of(part.array[:, : part.count], wanted, bounds)
    for group in addends.values():
        total = sum(p.array[:, : p.count].astype(np.float32) for p in group)
        columns = slice(group[0].start, group[0].start + group[0].count)
        value = Agreement.of(np.asarray(total), expected[:, columns], bounds)
        for part in group:
            yield part.die, value


def reference_results(
    module: Module, ids: Sequence[int], weights: WeightSource
) -> Mapping[Key, tuple[Array, str]]:
    """The result of every op of the reference, and the line of the model's source it came from."""
    positions = np.arange(len(ids), dtype=np.int64)[None]
    main = next(f for f in module.body if isinstance(f, Func) and str(f.sym_name) == "main")
    if len(tensor_type(main.args[1]).dims) == 3:  # time, row and column, all the same for text
        positions = np.broadcast_to(positions, (3, 1, len(ids)))
    inputs: list[Array] = [np.array([list(ids)], np.int64), positions]
    for addend in main.args[2:]:  # what pictures add to the first layers: nothing
        width = int(tensor_type(addend).dims[-1] or 1)
        inputs.append(np.zeros((1, len(ids), width), np.float16))
    return _results_of(module, "main", inputs, weights)


def _results_of(
    module: Module, function: str, inputs: Sequence[Array], weights: WeightSource
) -> Mapping[Key, tuple[Array, str]]:
    """The same of any function."""
    found: dict[Key, tuple[Array, str]] = {}
    keys = _Keys()

    def probe(stack: tuple[Call, ...], op: Op, results: tuple[Array, ...]) -> None:
        key = keys.of(op, stack)
        if key is not None and results and results[0].ndim >= 3:
            found[key] = results[0], _source(op.loc)

    interpreter = Interpreter(module, weights, probe=probe)
    run_lockstep([interpreter.run(function, list(inputs))])
    return found
