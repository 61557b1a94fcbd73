"""What a kernel of a die's library has of what takes time, from the op that it is made for.

The op says shapes and elements; what is counted is what the loops of `backends/host/kernels` do.  A kernel that has no
count here is refused by its name: it would cost nothing.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tyir.diagnostics import TyirError
from tyir.dialects import kv, ty
from tyir.dialects.ty import tensor_type
from tyir.execution.storage import packed_shape
from tyir.ir import Op, Value
from tyir.runtime_sim.host.machine import CACHES, ROWWISE, Processor
from tyir.traits import Collective
from tyir.types import storage_dtype

__all__ = ["Loop", "Work", "bytes_of", "work_of"]

_KIND_OF: Final = {op: kind for kind, ops in ROWWISE.items() for op in ops}
_ACTIVATION_BYTES: Final = {"fp32": 4, "int16": 2, "int8": 1, "f16": 4}  # as many tokens are multiplied
# Operations by which loops of the kernels decide about threads, where these are not multiplications.
_OF_AN_INPUT: Final = {"fp32": 4, "int16": 8, "int8": 8, "f16": 4}
_OF_AN_ELEMENT: Final = {
    "norm": 4,
    "rope": 2,
    "elementwise": 1,
    "activation": 8,
    "movement": 0,
    "quantize_rows": 4,
    "top_k": 16,
    "merge_attention": 1,
}


@dataclass(frozen=True)
class Loop:
    """A part of a kernel: how many it has of each constant of its section, and bytes of a weight or a cache
    that come from memory.

    `operations`: by how many the code decides whether threads share it, 0 where one does it; `items`: what is
    cut in equal parts for them, 0 for so many that it does not matter.
    """

    counts: Mapping[str, float]
    operations: int = 0
    items: int = 0
    read_bytes: float = 0

    def threads(self, most: int, least_operations: int) -> int:
        """How many share it, of `most`."""
        return most if self.operations >= least_operations and self.items != 1 else 1

    def share(self, threads: int) -> float:
        """What the busiest of them has of it."""
        return -(-self.items // threads) / self.items if self.items else 1 / threads


@dataclass(frozen=True)
class Work:
    """One kernel: the section of the machine that says its constants, and its loops, one after the other."""

    kind: str
    loops: tuple[Loop, ...]

    @property
    def counts(self) -> dict[str, float]:
        """Those of all loops."""
        return {name: count for loop in self.loops for name, count in loop.counts.items()}

    @property
    def read_bytes(self) -> float:
        """Those of all loops."""
        return sum(loop.read_bytes for loop in self.loops)


def bytes_of(value: Value) -> int:
    """Of a tensor as it is stored."""
    t = tensor_type(value)
    return math.prod(packed_shape(t)) * storage_dtype(t.element).itemsize


def work_of(op: Op, position: int, activations: str, processor: Processor) -> Work:
    """The work of an op's kernel in a step at a position.

    `activations`: what 4-bit weights are multiplied with.  `TyirError` for an op whose kernel has no model.
    """
    if isinstance(op, ty.QuantizedLinear):
        mode = _mode(op, activations, processor)
        return _product(op, (op.q, op.scales, op.zeros), mode, op.group_size, processor)
    if isinstance(op, ty.Linear):
        return _product(op, (op.weight,), "f16", tensor_type(op.weight).static_shape[1], processor)
    if isinstance(op, kv.CachedAttention):
        return _cached(op, position, processor)
    if isinstance(op, ty.Attention):
        return _both_ways(op, processor)
    if op.has_trait(Collective):
        return _meeting(op)
    if (kind := _KIND_OF.get(op.name)) is not None:
        size = _elements(op)
        return Work(kind, (Loop({"call": 1, "element": size}, size * _OF_AN_ELEMENT[kind]),))
    raise TyirError(
        f"there is no model of how long the kernel of '{op.name}' takes",
        help="this program cannot be predicted on a processor; tyir-sim --machine edge10 simulates it",
    )


def _elements(op: Op) -> int:
    """Those that a kernel goes through: of what it is given for another tensor, and else of what it makes."""
    if isinstance(op, (kv.Append, kv.Replace)):
        return tensor_type(op.operands[1]).size
    if _KIND_OF[op.name] in ("top_k", "quantize_rows", "merge_attention"):
        return tensor_type(op.operands[0]).size
    return sum(tensor_type(v).size for v in op.results)


def _mode(op: ty.QuantizedLinear, activations: str, processor: Processor) -> str:
    """What 4-bit weights are multiplied as: groups that are not whole vectors as they are."""
    return activations if op.group_size % processor.integer_group == 0 else "fp32"


def _product(op: Op, weight: tuple[Value, ...], mode: str, group: int, processor: Processor) -> Work:
    n, k = tensor_type(weight[0]).static_shape
    m = tensor_type(op.operands[0]).size // k
    read = sum(map(bytes_of, weight))
    macs = m * n * k
    if m <= processor.few_tokens:
        few = {"row": n, "byte": read, "more_mac": macs - n * k}
        return Work(f"product_{mode}_token", (Loop({"input": m * k}), Loop(few, macs, read_bytes=read)))
    held = m * k * _ACTIVATION_BYTES[mode] / processor.cache_bytes
    spill = min(1.0, max(0.0, 2 * held - 1))  # none where they fill half of the cache, all where they fill it
    many = {"weight": n * k, "mac": macs, "sum": macs / group, "spill": spill * macs}
    ready = Loop({"input": m * k}, m * k * _OF_AN_INPUT[mode])
    return Work(f"product_{mode}_chunk", (Loop({"call": 1}), ready, Loop(many, macs, read_bytes=read)))


def _tile(queries: int, processor: Processor) -> int:
    """The most queries of a tile that leave none over."""
    return max(d for d in range(1, processor.attention_queries + 1) if queries % d == 0)


def _cached(op: kv.CachedAttention, position: int, processor: Processor) -> Work:
    b, s, heads, width = tensor_type(op.q).static_shape
    element = str(tensor_type(op.k).element)
    if element not in CACHES:
        raise TyirError(
            f"there is no model of how long '{op.name}' takes over a cache of {element}",
            help=f"caches that have one hold {' or '.join(CACHES)}",
        )
    changes = [h for h in range(1, heads) if op.kv_heads[h] != op.kv_heads[h - 1]]
    together = _tile(math.gcd(heads, *changes), processor) if s == 1 else 1
    tokens = _tile(s, processor) if together == 1 else 1
    tiles = b * (heads // together) * (s // tokens)
    keys = sum(_keys(op, position + first, tokens) for first in range(0, s, tokens)) / (s // tokens)
    kind = f"attention_{element}_{'token' if s == 1 else 'chunk'}"
    seen = sum(map(bytes_of, (op.k, op.v))) / op.held * keys
    operations = b * s * heads * width * op.held
    rows, scores = 2 * tiles * keys * width, b * heads * s * keys
    counts = {"query": b * heads * s, "element": rows}
    if s == 1:
        counts["mac"] = 2 * scores * width
    else:
        counts["score"] = scores
    return Work(kind, (Loop(counts, operations, tiles, seen),))


def _keys(op: kv.CachedAttention, first: int, tokens: int) -> int:
    """Rows of the cache that a tile of `tokens` queries from position `first` on visits."""
    low = max(first + 1 - op.window, 0) if op.window else 0
    high = first + tokens
    if (blocks := op.token_blocks) is not None:
        low, high = blocks.rows_before(low), blocks.rows_before(high)
    return max(min(high, op.held) - low, 0)


def _both_ways(op: ty.Attention, processor: Processor) -> Work:
    b, s, heads, width = tensor_type(op.q).static_shape
    spans = op.spans()
    tokens = _tile(math.gcd(*(end for _, end in spans)) if op.segments else s, processor)
    keys = sum((end - first) ** 2 for first, end in spans) / s
    longest = max(end - first for first, end in spans)
    tiles = b * heads * (s // tokens)
    counts = {"query": b * heads * s, "element": 2 * tiles * keys * width, "score": b * heads * s * keys}
    return Work("attention_f16_chunk", (Loop(counts, b * s * heads * width * longest, tiles),))


def _meeting(op: Op) -> Work:
    """Where dies meet each makes, in the mean, its own result of what all of them bring."""
    values = op.results or op.operands
    size = sum(tensor_type(v).size for v in values)
    return Work("meeting", (Loop({"call": 1, "element": size}),))
