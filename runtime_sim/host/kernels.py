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

__all__ = ["Work", "bytes_of", "work_of"]

_KIND_OF: Final = {op: kind for kind, ops in ROWWISE.items() for op in ops}
_ACTIVATION_BYTES: Final = {
    "fp32": 4,
    "int16": 2,
    "int8": 1,
    "f16": 4,
}  # as a product of many tokens has them
_OF_AN_ELEMENT: Final = {"top_k": 16, "activation": 16, "norm": 4}  # operations, by which threads are started


@dataclass(frozen=True)
class Work:
    """One kernel: the section of the machine that says its constants, and how many it has of each of them.

    `operations`: by how many the code decides whether several threads are started; `items`: parts that
    threads share, 0 for many.  `weight_bytes` are read once.
    """

    kind: str
    counts: Mapping[str, float]
    operations: int
    items: int = 0
    weight_bytes: int = 0

    def shared(self, threads: int) -> float:
        """By how much the busiest thread has more than its part."""
        return -(-self.items // threads) * threads / self.items if self.items else 1.0


def bytes_of(value: Value) -> int:
    """Of a tensor as it is stored."""
    t = tensor_type(value)
    return math.prod(packed_shape(t)) * storage_dtype(t.element).itemsize


def work_of(op: Op, position: int, activations: str, processor: Processor) -> Work:
    """The work of an op's kernel in a step at a position.

    `activations`: what 4-bit weights are multiplied with.  `TyirError` for an op whose kernel has no model.
    """
    if isinstance(op, ty.QuantizedLinear):
        rounded = activations != "fp32" and op.group_size % processor.integer_group == 0
        mode = activations if rounded else "fp32"
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
        return Work(kind, {"call": 1, "element": size}, size * _OF_AN_ELEMENT.get(kind, 2))
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


def _product(op: Op, weight: tuple[Value, ...], mode: str, group: int, processor: Processor) -> Work:
    n, k = tensor_type(weight[0]).static_shape
    m = tensor_type(op.operands[0]).size // k
    read = sum(map(bytes_of, weight))
    if m <= processor.few_tokens:
        counts: dict[str, float] = {"call": 1, "row": n, "byte": read, "more_mac": (m - 1) * n * k}
        return Work(f"product_{mode}_token", counts, m * n * k, weight_bytes=read)
    macs = m * n * k
    held = m * k * _ACTIVATION_BYTES[mode] / processor.cache_bytes
    spill = min(1.0, max(0.0, 2 * held - 1))  # none where they fill half of the cache, all where they fill it
    counts = {
        "call": 1,
        "weight": n * k,
        "mac": macs,
        "sum": macs / group,
        "input": m * k,
        "spill": spill * macs,
    }
    return Work(f"product_{mode}_chunk", counts, macs, weight_bytes=read)


def _tile(queries: int, processor: Processor) -> int:
    """The most queries of a tile that leave none over."""
    return max(d for d in range(1, processor.attention_queries + 1) if queries % d == 0)


def _attention(kind: str, tiles: int, queries: int, keys: float, width: int, operations: int) -> Work:
    """`tiles` of `queries` each, over so many keys in the mean."""
    rows, scores = tiles * keys, tiles * keys * queries
    counts = {
        "call": 1,
        "tile": tiles,
        "element": 2 * rows * width,
        "mac": 2 * scores * width,
        "score": scores,
    }
    return Work(kind, counts, operations, items=tiles)


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
    return _attention(kind, tiles, max(together, tokens), keys, width, b * s * heads * width * op.held)


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
    return _attention("attention_f16_chunk", tiles, tokens, keys, width, b * s * heads * width * longest)


def _meeting(op: Op) -> Work:
    """Where dies meet each makes, in the mean, its own result of what all of them bring."""
    values = op.results or op.operands
    size = sum(tensor_type(v).size for v in values)
    return Work("meeting", {"call": 1, "element": size}, 0)
