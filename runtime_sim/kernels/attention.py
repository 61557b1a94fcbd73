"""Time of attention over f16 keys and values: prefill by causal tiles, decode by splitting the cache.

Prefill: a block of threads owns 128 query rows of one head and walks the 128-key blocks it can see; i-th rows see i + 1 of them (causal).

    block = 4 * 128 * 128 * head_dim / (peak of one multiprocessor * efficiency)         two products
    owner = ramp + blocks * block                                                       first keys, last stores
    run   = max(longest owner, sum of owners / multiprocessors + longest owner / 2)
    total = launch + ramp + call + (run^2 + (bytes / DRAM rate)^2)^(1/2)

The half: owners of different lengths are dealt greedily, and at the end one as long as the longest is on average half done when the others have finished
(Graham 1969 bounds it by one).  Flash attention: Dao et al. 2022; tiles in the causal case: FlashAttention-2.

Decode: one owner per sequence, group of query heads that share keys, and part of the cache (flash decoding):

    walk  = (waves - 1) * owner_us + waves * blocks of one part * block_us     owners_per_sm of them hide each other's latency
    total = launch + ramp + call + (walk^2 + (bytes / DRAM rate)^2)^(1/2) [+ launch + ramp / 2 of the kernel that combines the parts]

Larger groups than `max_group` run as if every query head had its own keys.  Minimised over the number of parts; the cache is split from 8 blocks on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tyir.runtime_sim.kernels.gemm import first_touch_ns, matrix_rate
from tyir.runtime_sim.kernels.rowwise import stream_ns
from tyir.targets.accelerator import Accelerator

__all__ = ["Attention", "attention_ns", "decode_ns", "prefill_ns"]

BLOCK = 128
_SPLIT_FROM = 8  # blocks
_PARTS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class Attention:
    """`queries` new tokens a sequence that see `keys` keys (the new ones among them); causal when there is more than one."""

    batch: int
    query_heads: int
    kv_heads: int
    head_dim: int
    queries: int
    keys: int
    causal: bool = True

    @property
    def kv_bytes(self) -> float:
        """Keys and values, f16.  Example: batch 1, 8 heads of 128, 1024 keys: 2 * 2 * 8 * 128 * 1024 = 4,194,304."""
        return 4.0 * self.batch * self.kv_heads * self.head_dim * self.keys


def attention_ns(shape: Attention, machine: Accelerator, sustained: bool | None = None) -> float:
    """Nanoseconds of one call."""
    return decode_ns(shape, machine) if shape.queries == 1 else prefill_ns(shape, machine, sustained)


def prefill_ns(shape: Attention, machine: Accelerator, sustained: bool | None = None) -> float:
    """Causal (or full) attention of several queries a sequence.

    Example (block 2 us, ramp 3 us, launch and call 2 us, 4 multiprocessors, no packing, much bandwidth): 4 heads, 256 queries: owners of 1 and 2 blocks, 5 and 7 us, 4 each:
    48 / 4 + 7 / 2 = 15.5 us, launch, call and ramp 5 us: 20.5 us.
    """
    tiles = -(-shape.queries // BLOCK)
    past = shape.keys - shape.queries
    seen = [-(-(past + min((i + 1) * BLOCK, shape.queries)) // BLOCK) if shape.causal else -(-shape.keys // BLOCK) for i in range(tiles)]
    rows = min(BLOCK, -(-shape.queries // 16) * 16)
    heads = shape.batch * shape.query_heads
    flops = 4.0 * rows * BLOCK * shape.head_dim * sum(seen) * heads
    burst = machine.sm_flops_per_ns * machine.sm.count * machine.power.burst_share
    speed = matrix_rate(flops, machine, sustained) / burst
    block = 4.0 * rows * BLOCK * shape.head_dim / (machine.sm_flops_per_ns * machine.attention.efficiency * speed)
    ramp = machine.launch.ramp_us * 1000
    longest = ramp + max(seen) * block
    owners = heads * (tiles * ramp + sum(seen) * block)
    run = longest if heads * tiles <= machine.sm.count else max(longest, owners / machine.sm.count + longest / 2)
    moved = (shape.kv_bytes + 4.0 * heads * shape.queries * shape.head_dim) / machine.dram_bytes_per_ns
    call = machine.attention.call_us if shape.causal or tiles > 1 else machine.attention.decode_call_us
    return (machine.launch.kernel_us + call) * 1000 + ramp + math.hypot(run, moved) + _packing_ns(shape, machine)


def _packing_ns(shape: Attention, machine: Accelerator) -> float:
    """Splitting packed q, k, v and appending to the cache, where the library's call includes it: everything is read and written once per pass."""
    if not machine.attention.packed_passes:
        return 0.0
    nbytes = 2.0 * shape.batch * shape.queries * (shape.query_heads + 2 * shape.kv_heads) * shape.head_dim
    return machine.attention.packed_passes * stream_ns(nbytes, machine)


def decode_ns(shape: Attention, machine: Accelerator) -> float:
    """One query a sequence.

    Example (launch and call 2 us, ramp 2 us, block 1 us, 4000 bytes a ns, 100 multiprocessors, 8 groups): 128 keys, 524,288 bytes:
    2 + 2 + (1^2 + 0.13^2)^(1/2) = 5.01 us.
    """
    grouped = 1 < shape.query_heads / shape.kv_heads <= machine.attention.max_group
    owners = shape.batch * (shape.kv_heads if grouped else shape.query_heads)
    blocks = -(-shape.keys // BLOCK)
    walked = max(shape.keys / BLOCK, 0.25)  # a warp's share is walked even for one key
    nbytes = shape.kv_bytes * (machine.attention.grouped_read_share if grouped else 1.0)
    moved = nbytes / machine.dram_bytes_per_ns + first_touch_ns(nbytes, machine)
    ramp = machine.launch.ramp_us * 1000
    combine = machine.launch.kernel_us * 1000 + ramp / 2
    owner = machine.attention.grouped_owner_us if grouped else machine.attention.owner_us
    best = float("inf")
    for parts in _PARTS:
        if parts > 1 and (parts > blocks or blocks < _SPLIT_FROM):
            break
        waves = -(-owners * parts // (machine.sm.count * machine.attention.owners_per_sm))
        walk = ((waves - 1) * owner + waves * walked / parts * machine.attention.block_us) * 1000
        best = min(best, math.hypot(walk, moved) + (combine if parts > 1 else 0.0))
    return (machine.launch.kernel_us + machine.attention.decode_call_us) * 1000 + ramp + best
