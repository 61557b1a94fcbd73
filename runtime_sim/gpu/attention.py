"""Time of attention over f16 keys and values: prefill by causal tiles, decode by splitting the cache.

Prefill: a block of threads owns 128 query rows of one head and walks the 128-key blocks it can see; i-th
rows see i + 1 of them (causal).

    block = 4 * 128 * 128 * head_dim / (peak of one multiprocessor * efficiency)         two products
    owner = ramp + blocks * block                                                       first keys, last stores
    run   = max(longest owner, sum of owners / multiprocessors + longest owner / 2)
    total = launch + ramp + call + (run^2 + (bytes / DRAM rate)^2)^(1/2)

The half: owners of different lengths are dealt greedily, and at the end one as long as the longest is on
average half done when the others have finished (Graham 1969 bounds it by one).  Flash attention: Dao et
al. 2022; tiles in the causal case: FlashAttention-2.

Decode, by one of two kernels, each with constants of its own (`accelerator.DecodeKernel`): *grouped* reads
keys once for all query heads that share them, with one owner per sequence and group; *heads* has one owner
per query head.  The library takes the grouped one for groups of up to `max_group` heads whose blocks of
128 keys, times `grouped_fill`, are at least as many as the multiprocessors (TensorRT-LLM,
decoderXQARunner.h: 4). Both may split a cache into parts (flash decoding):

    walk   = start + blocks of one part * block_us          a block of threads walks up to `flat_keys` at once: 64 of them take as long
    start  = nothing for what fits at once, else the larger of wave_us and (waves - 1) * resident * (owner_us, and first_keys_us if there are more than 8 keys)
    memory = the larger of  distinct bytes / DRAM rate  and  bytes of all owners / (L2 rate * l2_share); and touch_us * (1 - exp(-bytes / L2))
    total  = launch + ramp + call + (walk^2 + memory^2)^(1/2) * (1 + row_tile_share for every 16 heads of a group beyond 16) [+ launch + ramp / 2 of the kernel that combines the parts]

A benchmark's cache may hold keys alone, which are read as values too, and the same ones in every call
(`Attention.keys_alone`).  The grouped kernel reads a tile's keys and values together: DRAM delivers half.
A head's block reads all its keys and then its values: these come from the L2 if it still holds what the
resident blocks have read meanwhile; and what fits the L2 as a whole is there from the call before.  What
is not found is read at the DRAM's rate, the rest at the L2's, one after the other.

Blocks of threads come in sizes of which 1, 2, ... `resident` fit a multiprocessor; the library keeps the
largest until a quarter more owners wait than fit. Minimised over the number of parts; the cache is split
from 8 blocks on, and not into more parts than fit at once.
"""  # noqa: E501

from __future__ import annotations

import math
from dataclasses import dataclass

from tyir.runtime_sim.gpu.accelerator import Accelerator, DecodeKernel
from tyir.runtime_sim.gpu.gemm import matrix_rate
from tyir.runtime_sim.gpu.rowwise import stream_ns

__all__ = ["Attention", "attention_ns", "decode_ns", "prefill_ns"]

BLOCK = 128
_SPLIT_FROM = 8  # blocks
_ROW_TILE = 16  # query heads of one matrix instruction
_CROWDED = 1.25
_FIRST_KEYS = 8  # what an owner looks at before its walk
_PARTS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class Attention:
    """`queries` new tokens a sequence that see `keys` keys (the new ones among them).

    Causal when there is more than one.

    `keys_alone`: the cache is a benchmark's that holds no values: keys are read in their place, and call
    after call the same.
    """

    batch: int
    query_heads: int
    kv_heads: int
    head_dim: int
    queries: int
    keys: int
    causal: bool = True
    keys_alone: bool = False

    @property
    def kv_bytes(self) -> float:
        """Keys and values, f16.

        Example: batch 1, 8 heads of 128, 1024 keys: 2 * 2 * 8 * 128 * 1024 = 4,194,304.
        """
        return 4.0 * self.batch * self.kv_heads * self.head_dim * self.keys


def attention_ns(shape: Attention, machine: Accelerator, sustained: bool | None = None) -> float:
    """Nanoseconds of one call."""
    return decode_ns(shape, machine) if shape.queries == 1 else prefill_ns(shape, machine, sustained)


def prefill_ns(shape: Attention, machine: Accelerator, sustained: bool | None = None) -> float:
    """Causal (or full) attention of several queries a sequence.

    Example (block 2 us, ramp 3 us, launch and call 2 us, 4 multiprocessors, no packing, much bandwidth): 4
    heads, 256 queries: owners of 1 and 2 blocks, 5 and 7 us, 4 each: 48 / 4 + 7 / 2 = 15.5 us, launch, call
    and ramp 5 us: 20.5 us.
    """
    tiles = -(-shape.queries // BLOCK)
    past = shape.keys - shape.queries
    seen = [
        -(-(past + min((i + 1) * BLOCK, shape.queries)) // BLOCK) if shape.causal else -(-shape.keys // BLOCK)
        for i in range(tiles)
    ]
    rows = min(BLOCK, -(-shape.queries // 16) * 16)
    heads = shape.batch * shape.query_heads
    flops = 4.0 * rows * BLOCK * shape.head_dim * sum(seen) * heads
    burst = machine.sm_flops_per_ns * machine.sm.count * machine.power.burst_share
    speed = matrix_rate(flops, machine, sustained) / burst
    block = (
        4.0 * rows * BLOCK * shape.head_dim / (machine.sm_flops_per_ns * machine.attention.efficiency * speed)
    )
    ramp = machine.launch.ramp_us * 1000
    longest = ramp + max(seen) * block
    owners = heads * (tiles * ramp + sum(seen) * block)
    run = (
        longest
        if heads * tiles <= machine.sm.count
        else max(longest, owners / machine.sm.count + longest / 2)
    )
    moved = (shape.kv_bytes + 4.0 * heads * shape.queries * shape.head_dim) / machine.dram_bytes_per_ns
    call = machine.attention.call_us if shape.causal or tiles > 1 else machine.attention.decode_call_us
    return (
        (machine.launch.kernel_us + call) * 1000 + ramp + math.hypot(run, moved) + _packing_ns(shape, machine)
    )


def _packing_ns(shape: Attention, machine: Accelerator) -> float:
    """Splitting packed q, k, v and appending to the cache, where the library's call includes it.

    Everything is read and written once per pass.
    """
    if not machine.attention.packed_passes:
        return 0.0
    nbytes = 2.0 * shape.batch * shape.queries * (shape.query_heads + 2 * shape.kv_heads) * shape.head_dim
    return machine.attention.packed_passes * stream_ns(nbytes, machine)


def decode_ns(shape: Attention, machine: Accelerator) -> float:
    """One query a sequence.

    Example (launch and call 2 us, ramp 2 us, block 1 us, 4000 bytes a ns, 100 multiprocessors, 8 groups): 128
    keys, 524,288 bytes: 2 + 2 + (1^2 + 0.13^2)^(1/2) = 5.01 us.
    """
    grouped = _is_grouped(shape, machine)
    kernel = machine.grouped_decode if grouped else machine.head_decode
    owners = shape.batch * (shape.kv_heads if grouped else shape.query_heads)
    blocks = -(-shape.keys // BLOCK)
    walked = (
        max(shape.keys, min(4 * shape.keys, kernel.flat_keys), BLOCK / 4) / BLOCK
    )  # a warp's share is walked even for one key
    ramp = machine.launch.ramp_us * 1000
    combine = machine.launch.kernel_us * 1000 + ramp / 2
    tiles = (
        1 + kernel.row_tile_share * (-(-shape.query_heads // shape.kv_heads // _ROW_TILE) - 1)
        if grouped
        else 1.0
    )
    best = float("inf")
    for parts in _PARTS:
        if parts > 1 and (
            parts > blocks or blocks < _SPLIT_FROM or owners * parts > machine.sm.count * kernel.resident
        ):
            break
        walk = (
            _start_ns(owners * parts, shape.keys, kernel, machine) + walked / parts * kernel.block_us * 1000
        )
        moved = _cache_ns(shape, owners, parts, kernel, machine, grouped)
        best = min(best, math.hypot(walk, moved) * tiles + (combine if parts > 1 else 0.0))
    return (machine.launch.kernel_us + machine.attention.decode_call_us) * 1000 + ramp + best


def _is_grouped(shape: Attention, machine: Accelerator) -> bool:
    """Whether the library reads keys once per group."""
    fill = shape.batch * shape.kv_heads * max(1, shape.keys // BLOCK) * machine.attention.grouped_fill
    return 1 < shape.query_heads / shape.kv_heads <= machine.attention.max_group and fill >= machine.sm.count


def _cache_ns(
    shape: Attention, owners: int, parts: int, kernel: DecodeKernel, machine: Accelerator, grouped: bool
) -> float:
    """Reading the cache: DRAM delivers distinct bytes, the L2 what every owner asks for."""
    asked = 4.0 * owners * shape.head_dim * shape.keys
    l2_rate, capacity = machine.l2.bandwidth_gbps * kernel.l2_share, machine.l2.capacity_bytes
    touch = kernel.touch_us * 1000 * -math.expm1(-shape.kv_bytes / capacity)
    if not shape.keys_alone or grouped:
        distinct = shape.kv_bytes / (2 if shape.keys_alone else 1)
        return max(distinct / machine.dram_bytes_per_ns, asked / l2_rate) + touch
    distinct = shape.kv_bytes / 2
    running = min(owners * parts, machine.sm.count * kernel.resident)
    again = _held(running * shape.keys / parts * shape.head_dim * 2.0, capacity)
    read = distinct * (1 - _held(distinct, capacity)) * (2 - again)
    return read / machine.dram_bytes_per_ns + (asked - read) / l2_rate + touch


def _held(nbytes: float, capacity: float) -> float:
    """Which part of bytes that are read again and again a cache of `capacity` still holds.

    Nearly all or nearly nothing, and half when they just fill it.

    Example: half of the capacity 1 / (1 + 2^-6) = 0.985; twice the capacity 0.015.
    """
    return float(1 / (1 + (nbytes / capacity) ** 6))


def _start_ns(owners: int, keys: int, kernel: DecodeKernel, machine: Accelerator) -> float:
    """What starting the owners costs beyond those that fit at once.

    Example (100 multiprocessors, resident 2, wave 8 us, owner 2 us, 4 keys): 100 owners 0; 120: 8; 200: 0;
    1000, 5 waves: 4 * 2 * 2 = 16 us.
    """
    count = machine.sm.count
    for held in range(1, kernel.resident + 1):
        if owners <= _CROWDED * count * held:
            return 0.0 if owners <= count * held else kernel.wave_us * 1000
    each = kernel.owner_us + (kernel.first_keys_us if keys > _FIRST_KEYS else 0.0)
    waves = -(-owners // (count * kernel.resident))
    return max(kernel.wave_us, (waves - 1) * kernel.resident * each) * 1000
