"""Where do artifacts stop computing what the model computes?

Every op of every die against the unpartitioned reference, in the order of execution.

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

from tyir.attributes import DenseArrayAttr
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func
from tyir.dialects.kv import Append, Rows
from tyir.dialects.ty import GetGlobal, tensor_type
from tyir.execution.artifacts import Artifacts
from tyir.execution.constexpr import ConstantExpressions
from tyir.execution.weights import CheckpointReader, checkpoint_of
from tyir.interpreter import Interpreter, run_lockstep
from tyir.ir import Op
from tyir.layers import layer_in, path_in_calls
from tyir.location import FileLoc, FusedLoc, Location, NameLoc
from tyir.runtime_sim.session.chunks import Chunk
from tyir.runtime_sim.session.session import EngineName, Session
from tyir.runtime_sim.vision.tower import Tower
from tyir.tools.verify.compare import cosine, reference_module, tower_module
from tyir.traits import Collective

if TYPE_CHECKING:
    from tyir.frontends.plugin import ModelPlugin

__all__ = ["Divergence", "locate", "locate_in_tower"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Divergence:
    """The first op whose result is off: where in the model, on which dies, how far."""

    layer: int | None
    path: str
    op: str
    source: str
    dies: tuple[int, ...]
    cosine: float

    def __str__(self) -> str:
        where = f"layer {self.layer}, " if self.layer is not None else ""
        dies = f"die{'s' if len(self.dies) > 1 else ''} {', '.join(map(str, self.dies))}"
        return (
            f"{where}{self.op} at {self.path}{f' ({self.source})' if self.source else ''} on {dies}: cosine"
            f" {self.cosine:.6f}"
        )


Key = tuple[str, str, int]
_SAME: Final = {"kv.attention": "ty.attention", "ty.quantized_linear": "ty.linear"}


def locate(
    folder: Path | Artifacts,
    checkpoint: Path,
    ids: Sequence[int],
    engine: EngineName = "host",
    threshold: float = 0.999,
    plugin: ModelPlugin | None = None,
    base: Path | None = None,
) -> Divergence | None:
    """Run `ids` through the artifacts and the reference; the first op that is off, or None.

    Op by op; an op is off when its cosine is below `threshold`.
    """
    recorder = _Recorder()
    session = Session(folder, engine, check=False, probe=recorder)
    module = reference_module(checkpoint, session.manifest.options, plugin, base)
    expected = _reference_results(module, ids)
    session.next_tokens(ids)
    return _first_off(recorder, expected, threshold)


def _first_off(
    recorder: _Recorder, expected: Mapping[Key, tuple[Array, str]], threshold: float
) -> Divergence | None:
    for key, parts in recorder.parts.items():
        if key not in expected:
            continue
        worst, dies = 1.0, set[int]()
        wanted, source = expected[key]
        for die, value in _compare(wanted, parts):
            if value < threshold:
                dies.add(die)
            worst = min(worst, value)
        if dies:
            path, _name, _ = key
            op = recorder.ops[key]
            return Divergence(layer_in(path), path, op.name, source, tuple(sorted(dies)), worst)
    return None


def locate_in_tower(
    tower: Tower,
    checkpoint: Path,
    patches: Array,
    threshold: float = 0.999,
    plugin: ModelPlugin | None = None,
    base: Path | None = None,
) -> Divergence | None:
    """The first op of a vision tower that is off for `patches` [N, C] in the processor's order, or None."""
    image = tower.size.image
    recorder = _Recorder()
    chunk = Chunk(0, image.patches, image.patches)
    tower.probe = lambda die, stack, op, results: recorder(chunk, die, stack, op, results)
    tower.run(patches)
    module = tower_module(checkpoint, image, plugin, base)
    (name,) = [str(f.sym_name) for f in module.body if isinstance(f, Func)]
    given = tower.ordered(patches.astype(np.float16))
    expected = _results_of(module, name, [given])
    return _first_off(recorder, expected, threshold)


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
        if path is None or isinstance(op, (Call, GetGlobal, Append, Rows)) or op.has_trait(Collective):
            return None
        if op.results and self.constants.is_constant(op.results[0]):
            return None  # of weights alone, as rotary tables of one size are: dies have the result
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


class _Recorder:
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
        self.parts[key].append(
            _Part(die, chunk.start, chunk.count, np.array(results[0]), cut, "tyir.partial" in op.attributes)
        )


def _compare(expected: Array, parts: Sequence[_Part]) -> Iterator[tuple[int, float]]:
    """(die, cosine) for each part; addends are summed over the dies first."""
    addends: dict[int, list[_Part]] = defaultdict(list)
    for part in parts:
        if part.partial:
            addends[part.start].append(part)
            continue
        wanted = expected[:, part.start : part.start + part.count]
        if part.shard is not None:
            axis, offset = part.shard
            wanted = np.take(wanted, range(offset, offset + part.array.shape[axis]), axis=axis)
        yield part.die, cosine(part.array[:, : part.count], wanted)
    for group in addends.values():
        total = sum(p.array[:, : p.count].astype(np.float32) for p in group)
        value = cosine(np.asarray(total), expected[:, group[0].start : group[0].start + group[0].count])
        for part in group:
            yield part.die, value


def _reference_results(module: Module, ids: Sequence[int]) -> Mapping[Key, tuple[Array, str]]:
    """The result of every op of the reference, and the line of the model's source it came from."""
    positions = np.arange(len(ids), dtype=np.int64)[None]
    main = next(f for f in module.body if isinstance(f, Func) and str(f.sym_name) == "main")
    if len(tensor_type(main.args[1]).dims) == 3:  # time, row and column, all the same for text
        positions = np.broadcast_to(positions, (3, 1, len(ids)))
    inputs: list[Array] = [np.array([list(ids)], np.int64), positions]
    for addend in main.args[2:]:  # what pictures add to the first layers: nothing
        width = int(tensor_type(addend).dims[-1] or 1)
        inputs.append(np.zeros((1, len(ids), width), np.float16))
    return _results_of(module, "main", inputs)


def _results_of(module: Module, function: str, inputs: Sequence[Array]) -> Mapping[Key, tuple[Array, str]]:
    """The same of any function."""
    found: dict[Key, tuple[Array, str]] = {}
    keys = _Keys()

    def probe(stack: tuple[Call, ...], op: Op, results: tuple[Array, ...]) -> None:
        key = keys.of(op, stack)
        if key is not None and results and results[0].ndim >= 3:
            found[key] = results[0], _source(op.loc)

    interpreter = Interpreter(module, CheckpointReader(checkpoint_of(module)), probe=probe)
    run_lockstep([interpreter.run(function, list(inputs))])
    return found
