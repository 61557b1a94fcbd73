"""Time of one matrix product [m, k] x [k, n] by the best of the library's kernels.

Tiles are dealt to multiprocessors in waves, k is split when there are few tiles.

For a tile of R x C and a split of k into s parts there are W = ceil(m / R) * ceil(n / C) * s blocks, run
in waves of at most one per multiprocessor (two where said below):

    wave of c blocks = (matrix^4 + memory^4)^(1/4) + tile R C / 128^2         overlap of both, rounded where they meet; the stores of a tile wait for its last product
    matrix = the larger of  2 R C (k / s) (1 + q (1 / R + 1 / C)) / (peak of one multiprocessor * efficiency)      q = gemm.operand_rows
                            the same work over the power-limited rate of the whole device
    memory = (bytes^2 + latency^2)^(1/2)          few blocks cannot ask for enough bytes at once to fill the DRAM: 14 blocks of the H200 get 1.6 TB/s, 28 get 2.5, 80 get 4.0
    bytes  = the larger of  the blocks' share of the bytes / DRAM rate      and      what the blocks load / L2 rate
    latency = ceil(k / s / 64) * step
    total  = launch + ramp * min(1, k / 512) + waves (+ for s > 1 split_us, or another call of the 4-bit kernels, to add the parts, and partial sums in f32 through the L2)

De-quantising a block's weights, columns * (k / s) / dequant, hides half behind the matrix units: (own^1.5
+ dequant^1.5)^(2/3).  A block alone waits for its own chain of loads, shifts and conversions: two on one
multiprocessor, which the 4-bit kernels of few rows allow, de-quantise twice as much in the same time. The
factor with q is the reading of operands out of shared memory: a multiprocessor that does 1024
multiply-accumulates and reads 128 bytes a cycle would need 16 rows for it if nothing overlapped.  Weights
come from DRAM (the measurements rotate them); written bytes cost `dram.write_cost`; a working set that
replaces the L2's contents costs `dram.ramp_us * (1 - exp(-bytes / L2))`. Tile and wave quantisation:
NVIDIA, "Matrix Multiplication Background", 2023; the search over tile shapes follows LLMCompass (ISCA
2024).
"""  # noqa: E501

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from tyir.runtime_sim.gpu.accelerator import Accelerator

__all__ = ["Product", "gemm_ns", "is_long", "weight_only_ns", "weight_only_product"]

_SPLITS = (1, 2, 3, 4, 5, 6, 8, 11, 16)
_WEIGHT_ONLY_SPLITS = (1, 2, 3, 4)
_WEIGHT_ONLY_MIN_SPLIT_K = 1024
_DEQUANT_OVERLAP = 1.5  # between 1 (one after the other) and infinity (the longer alone)
_TILE_AREA = 128 * 128  # of which `gemm.tile_us` is the time
_STEP = 64  # of k, per stage of a kernel's pipeline
_PIPELINE = 8  # steps of k until loads, matrix units and stores all work
_MIN_SPLIT_K = 256
_MAX_WAVES_OF_SPLIT = 8


@dataclass(frozen=True, slots=True)
class Product:
    """A product and what its operands weigh.

    Bytes per weight and per activation, and the weights per nanosecond that one multiprocessor de-quantises
    (infinite: none to do).
    """

    m: int
    n: int
    k: int
    weight_bytes: float = 2.0
    activation_bytes: float = 2.0
    dequant_per_ns: float = math.inf
    matrix_speed: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether the weights need no de-quantisation."""
        return self.dequant_per_ns == math.inf

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k

    def dram_bytes(self, machine: Accelerator) -> float:
        """Bytes' worth of DRAM time.

        Example: m 1, n 4096, k 4096, write cost 1.5: 2 * 4096 * 4096 + 2 * 4096 + 1.5 * 2 * 4096 =
        33,574,912.
        """
        return self.n * self.k * self.weight_bytes + self.activation_bytes * self.m * (
            self.k + self.n * machine.dram.write_cost
        )


def gemm_ns(product: Product, machine: Accelerator, sustained: bool | None = None) -> float:
    """Nanoseconds of a product alone in a graph.

    `sustained`: whether the device is at its power limit (None: if this product alone is long enough for it).
    """
    rate = matrix_rate(product.flops, machine, sustained) * product.matrix_speed
    tiles = machine.tiles["gemm.tiles" if product.plain else "weight_only.tiles"]
    best = min(_tiled_ns(product, machine, tile, rate) for tile in tiles)
    start = machine.launch.kernel_us + machine.launch.ramp_us * min(1.0, product.k / (_PIPELINE * _STEP))
    rows = machine.gemm.gemv if product.plain else machine.weight_only.gemv_max_rows
    if product.m <= rows:
        best = min(
            best,
            math.hypot(
                product.dram_bytes(machine) / machine.dram_bytes_per_ns,
                0.0 if product.plain else _latency_ns(product, product.k, machine),
            ),
        )
    return start * 1000 + best + first_touch_ns(product.dram_bytes(machine), machine)


def weight_only_product(m: int, n: int, k: int, machine: Accelerator) -> Product:
    """4-bit weights with scales, f16 activations."""
    dequant = machine.weight_only.dequant_per_cycle * machine.clock.frequency_mhz * 1e-3
    return Product(m, n, k, machine.weight_only.bytes_per_weight, dequant_per_ns=dequant)


def weight_only_ns(m: int, n: int, k: int, machine: Accelerator) -> float:
    """As `gemm_ns`, with the call's own cost (`weight_only.call_us`) instead of the graph's launch."""
    return (
        gemm_ns(weight_only_product(m, n, k, machine), machine)
        + (machine.weight_only.call_us - machine.launch.kernel_us) * 1000
    )


def matrix_rate(flops: float, machine: Accelerator, sustained: bool | None) -> float:
    """Operations per nanosecond that power lets the device do.

    Example (peak 1000 per ns, burst 0.8, sustained 0.7, window 900 us): 1e9 operations take 1250 us at 800,
    more than the window, so 700.
    """
    peak = machine.sm_flops_per_ns * machine.sm.count
    long = is_long(flops, machine) if sustained is None else sustained
    return peak * (machine.power.sustained_share if long else machine.power.burst_share)


def is_long(flops: float, machine: Accelerator) -> bool:
    """Whether so much matrix work in a row lasts beyond the window after which power limits the clock."""
    burst = machine.sm_flops_per_ns * machine.sm.count * machine.power.burst_share
    return flops / burst > machine.power.window_us * 1000


def first_touch_ns(nbytes: float, machine: Accelerator) -> float:
    """What replacing the L2's contents costs, at most `dram.ramp_us`.

    Example: ramp 4 us, bytes as many as the L2 has: 4000 * (1 - 1 / e) = 2528 ns.
    """
    return machine.dram.ramp_us * 1000 * -math.expm1(-nbytes / machine.l2.capacity_bytes)


def _tiled_ns(product: Product, machine: Accelerator, tile: tuple[int, int], rate: float) -> float:
    """The best split of k for one tile shape."""
    blocks = -(-product.m // tile[0]) * -(-product.n // tile[1])
    best = math.inf
    for parts in _SPLITS if product.plain else _WEIGHT_ONLY_SPLITS:
        if parts > 1 and (
            product.k // parts < (_MIN_SPLIT_K if product.plain else _WEIGHT_ONLY_MIN_SPLIT_K)
            or blocks * (parts - 1) >= machine.sm.count * _MAX_WAVES_OF_SPLIT
        ):
            break
        best = min(best, _split_ns(product, machine, tile, blocks, parts, rate))
    return best


def _split_ns(
    product: Product, machine: Accelerator, tile: tuple[int, int], blocks: int, parts: int, rate: float
) -> float:
    """All waves of one tile shape and split."""
    rows, columns = tile
    depth = -(-product.k // parts)
    total = blocks * parts
    resident = 1 if product.plain or rows > machine.weight_only.two_blocks_rows else 2
    full, rest = divmod(total, machine.sm.count * resident)
    work = 2.0 * rows * columns * depth
    own = (
        work
        * (1 + machine.gemm.operand_rows * (1 / rows + 1 / columns))
        / (machine.sm_flops_per_ns * machine.gemm.efficiency * product.matrix_speed)
    )
    loaded = (
        min(rows, product.m) * product.activation_bytes + min(columns, product.n) * product.weight_bytes
    ) * depth
    memory = max(
        product.dram_bytes(machine) / total / machine.dram_bytes_per_ns, loaded / machine.l2.bandwidth_gbps
    )
    wave = _Wave(
        machine.sm.count,
        own,
        columns * depth / product.dequant_per_ns,
        work / rate,
        memory,
        _latency_ns(product, depth, machine),
        machine.gemm.tile_us * 1000 * rows * columns / _TILE_AREA,
    )
    time = full * wave.ns(machine.sm.count * resident) + (wave.ns(rest) if rest else 0)
    if parts > 1:
        starts = machine.gemm.split_us if product.plain else machine.weight_only.call_us
        time += starts * 1000 + 8.0 * parts * product.m * product.n / machine.l2.bandwidth_gbps
    return time


def _latency_ns(product: Product, depth: int, machine: Accelerator) -> float:
    """What a block needs to walk `depth` of k however little it computes.

    Example: 1000 of k, 80 ns a step: 16 steps, 1280 ns.
    """
    return -(-depth // _STEP) * (machine.gemm.step_ns if product.plain else machine.weight_only.step_ns)


class _Wave(NamedTuple):
    """What blocks of one wave need, in ns, on so many `multiprocessors`.

    `own` matrix time and `dequant` of one block, `shared` part of the power-limited rate, `memory` part of
    the bytes, `latency` of its k, `tile` to store.
    """

    multiprocessors: int
    own: float
    dequant: float
    shared: float
    memory: float
    latency: float
    tile: float

    def ns(self, blocks: int) -> float:
        """Time of a wave of so many blocks.

        Those on one multiprocessor share its matrix units, and the stores of one hide behind the other.

        Example (tile 200 ns, nothing to de-quantise): 100 blocks on 108, own 5000, shared 40, memory 30,
        latency 4000: matrix 5000, memory (3000^2 + 4000^2)^(1/2) = 5000: 2^(1/4) * 5000 + 200 = 6146 ns.
        """
        own = self.own * -(-blocks // self.multiprocessors)
        own = (own**_DEQUANT_OVERLAP + self.dequant**_DEQUANT_OVERLAP) ** (1 / _DEQUANT_OVERLAP)
        matrix, memory = max(own, blocks * self.shared), math.hypot(blocks * self.memory, self.latency)
        return float((matrix**4 + memory**4) ** 0.25 + self.tile)
