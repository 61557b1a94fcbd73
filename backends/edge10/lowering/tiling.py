"""Choosing tiles: the sizes [m, n, k] in which a matrix product is computed, and the blocks of attention.

Tiles must fit their slots in SRAM and half of the accumulators (the other half is being drained).  Among
those that fit, the one that takes the least time wins, by the same formulas as the simulator's
(`tyir.edge10.command_times`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from tyir.backends.edge10.memory.allocate import ALIGNMENT, SramPlan, align
from tyir.diagnostics import TyirError
from tyir.edge10.command_times import dequant_ns, drain_ns, matmul_ns, softmax_ns, vector_ns
from tyir.targets.machine import Machine

__all__ = [
    "STRIP_ROWS",
    "WIDEST_BLOCK",
    "AttentionBlocks",
    "MatmulShape",
    "Tiles",
    "accumulator_bytes",
    "attention_blocks",
    "choose_tiles",
    "segment_blocks",
    "side_columns",
    "spans",
    "tiles_ns",
]


def spans(size: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, length) of consecutive pieces of at most `step`."""
    for start in range(0, size, step):
        yield start, min(step, size - start)


@dataclass(frozen=True)
class MatmulShape:
    """out[m, n] = x[m, k] w[n, k]; `group_size` 0 for an f16 weight; `x_in_sram` says where x lives.

    `piece_bytes` is what each result needs of `piece_limit` bytes of temporaries before it is where it
    belongs, 0 when it is drained there directly. `block` fixes how many columns, of all rows, are handed on
    together (0: free): what the dies agree on for a collective.
    """

    m: int
    n: int
    k: int
    group_size: int
    x_in_sram: bool
    piece_bytes: int
    piece_limit: int = 0
    block: int = 0

    @property
    def weight_row_bytes(self) -> int:
        return (self.k + 1) // 2 if self.group_size else self.k * 2

    @property
    def scale_row_bytes(self) -> int:
        return self.k // self.group_size * 2 if self.group_size else 0

    @property
    def zero_row_bytes(self) -> int:
        return (self.k // self.group_size + 1) // 2 if self.group_size else 0


@dataclass(frozen=True)
class Tiles:
    """Weight tiles of [n, k] for m rows; the sums of `block` columns (several tiles) stay in the accumulators
    until they are drained together.
    """

    m: int
    n: int
    k: int
    block: int


WIDEST_BLOCK = (
    256  # columns: longer runs of results gain little, and every block is waited for by what comes next
)


@lru_cache(maxsize=4096)
def choose_tiles(shape: MatmulShape, machine: Machine, plan: SramPlan) -> Tiles:
    """The cheapest tiles that fit; `TyirError` when none does."""
    best = min(
        (
            (tiles_ns(shape, t, machine), -t.block, t)
            for m, n, k in _candidates(shape, machine)
            if (t := _fit(shape, m, n, k, machine, plan)) is not None
        ),
        default=None,
        key=lambda c: c[:2],
    )
    if best is None:
        raise TyirError(
            f"no tile of a [{shape.m}, {shape.k}] x [{shape.k}, {shape.n}] product fits {plan.capacity} bytes"
            f" of SRAM and {machine.accumulator_bytes} of accumulators",
            help="use a smaller group_size or sequence length, or a machine with more SRAM",
        )
    return best[2]


def _candidates(shape: MatmulShape, machine: Machine) -> Iterator[tuple[int, int, int]]:
    cube = machine.cube
    unit = shape.group_size or 64
    ms = sorted({align(-(-shape.m // parts), cube.rows) for parts in (1, 2, 3, 4, 6, 8, 12, 16, 32)})
    ks = sorted(
        {min(align(-(-shape.k // parts), unit), shape.k) for parts in range(1, min(65, shape.k // unit + 2))}
    )
    wave = cube.columns * cube.count
    ns = {wave * i for i in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)} | {
        cube.columns * i for i in (1, 2, 4, 5, 8, 16)
    }
    widest = min(shape.n, shape.block or shape.n)
    for m in ms:
        for n in sorted({min(n, align(widest, cube.columns)) for n in ns}):
            if (
                shape.block % n and n < widest
            ):  # a narrow last tile leaves the next one no time to be dequantised
                continue
            for k in ks:
                yield min(m, shape.m), min(n, widest), k


def _fit(shape: MatmulShape, m: int, n: int, k: int, machine: Machine, plan: SramPlan) -> Tiles | None:
    """Tiles of these sizes with the widest block that fits, or None when they do not fit at all."""
    if (
        k > machine.cube.max_k
        or n * k * 2 > plan.wide.largest
        or (shape.group_size and n * ((k + 1) // 2) > plan.packed.largest)
    ):
        return None
    if not shape.x_in_sram and m * k * 2 > plan.temp_bytes // 4:
        return None
    rows = align(m, machine.cube.rows)
    widest = machine.accumulator_bytes // 2 // 4 // rows // machine.cube.columns * machine.cube.columns
    if shape.piece_bytes:
        widest = min(widest, shape.piece_limit // ((shape.m if shape.block else m) * shape.piece_bytes))
    if n > side_columns(shape, plan):
        return None
    if shape.block:
        return Tiles(m, n, k, min(shape.block, shape.n)) if min(shape.block, shape.n) <= widest else None
    blocks = min(widest, max(WIDEST_BLOCK, n), shape.n) // n
    return Tiles(m, n, k, min(blocks * n, shape.n)) if blocks else None


def side_columns(shape: MatmulShape, plan: SramPlan) -> int:
    """How many columns' scales and zeros fit a slot; the bias of a block needs one too."""
    return (plan.side.largest - 2 * ALIGNMENT) // max(shape.scale_row_bytes + shape.zero_row_bytes, 2)


# What the other units need counts this much: too little to outweigh a real difference of the busiest one's
# time, enough to tell apart the many tiles that leave it the same.  Not a figure of a machine.
_REST: Final = 0.02


def tiles_ns(shape: MatmulShape, tiles: Tiles, machine: Machine) -> float:
    """Nanoseconds, by the formulas that the timing engine uses: the busiest of DRAM, weight queue, dequant
    and cube, and a little of the others' time.

    The units overlap, so the busiest decides; what the others need tells apart what it leaves equal.
    """
    pieces_m, pieces_n, pieces_k = -(-shape.m // tiles.m), -(-shape.n // tiles.n), -(-shape.k // tiles.k)
    weights = shape.n * (shape.weight_row_bytes + shape.scale_row_bytes + shape.zero_row_bytes)
    runs = shape.n * pieces_k if pieces_k > 1 else pieces_n
    x_bytes = 0 if shape.x_in_sram else shape.m * shape.k * 2 * pieces_n
    stored = shape.m * shape.n * shape.piece_bytes
    dram = (
        pieces_m * (weights + runs * machine.dram.run_overhead_bytes) + x_bytes + stored
    ) / machine.dram_bytes_per_ns
    commands = pieces_m * pieces_n * pieces_k
    queue = (
        commands * (machine.dma.issue_ns + machine.sync.dispatch_ns) + pieces_m * runs * machine.dma.run_ns
    )
    cube = pieces_m * sum(
        count_n * count_k * (machine.sync.dispatch_ns + matmul_ns(tiles.m, n, k, machine))
        for n, count_n in _pieces(shape.n, tiles.n)
        for k, count_k in _pieces(shape.k, tiles.k)
    )
    dequant = (
        commands * (machine.sync.dispatch_ns + dequant_ns(tiles.n, tiles.k, machine))
        if shape.group_size
        else 0.0
    )
    return max(dram + queue, cube, dequant) + _REST * (dram + queue + cube + dequant)


def _pieces(size: int, step: int) -> Iterator[tuple[int, int]]:
    """(length, how many) of the pieces of `spans`."""
    if size >= step:
        yield step, size // step
    if size % step:
        yield size % step, 1


STRIP_ROWS: Final = 128  # what most strips have: their scores leave room in the accumulators for others


@dataclass(frozen=True)
class AttentionBlocks:
    """`queries` tokens at a time over blocks of `keys` cached rows, of which a turn of the loop has `sets`;
    either all heads together or one cache head with its queries after the other.

    The heads are worked on in strips of at most `strip` heads, `STRIP_ROWS` rows: while one strip's softmax
    runs, the cube is at another's product.  A block's scores are products of `columns` keys each; the scores
    of `buffers` strips have a place, and the products with V of `products` of them.  `part`: the result is
    rows of f32 that are to be merged.
    `stored`: of keys and of values the bytes of a row and of its scales in the cache, nothing of f16.
    `beside`: bytes of each of the lists of chosen blocks, of what was asked of all, and of the shares.
    """

    queries: int
    keys: int
    all_heads: bool
    strip: int
    stored: tuple[tuple[int, int], ...] = ()
    strip_rows: int = 0  # 0: a strip has all queries
    rotations: int = 1  # that the queries are given in; with several, scores have a temperature
    columns: int = 0
    sets: int = 1
    buffers: int = 1
    products: int = 1
    part: bool = False
    beside: tuple[int, ...] = ()

    @property
    def strip_queries(self) -> int:
        """Queries of a strip."""
        return min(self.strip_rows or self.queries, self.queries)

    def strips(self, heads: int) -> int:
        """How many there are of so many heads."""
        return -(-heads // self.strip) * -(-self.queries // self.strip_queries)

    def layout(self, heads: int, groups: int, dim: int, *, transfers: bool = True) -> dict[str, int]:
        """Bytes of each temporary, in order of their place.

        Of an 8-bit or 4-bit cache a block is its f16 rows, which are made of the stored rows and the scales.
        A row of probabilities takes the place of its scores.  `transfers`: the queries or the result lie in
        DRAM.
        """
        rows, block = self.queries * heads, groups * self.keys
        sizes = {f"{name}{number}": align(block * dim * 2) for number in range(self.sets) for name in "kv"}
        for name, parts in zip("kv", self.stored):
            sizes |= {name + part: align(block * row) for part, row in zip(("_q", "_scales"), parts)}
        of_strip = self.strip_queries * min(self.strip, heads)
        for number in range(self.buffers):
            sizes[f"scores{number}"] = align(of_strip * self.keys * 4)
            sizes[f"alpha{number}"] = align(of_strip * 4)
        for number in range(self.products):
            sizes[f"product{number}"] = align(of_strip * dim * 4)
        sizes |= {"sum": align(rows * dim * 4), "maximum": align(rows * 4), "total": align(rows * 4)}
        if self.rotations > 1:
            sizes["temperature"] = align(4)
        sizes |= dict(zip(("lists", "asked", "shares"), map(align, self.beside)))
        if not transfers:
            return sizes
        queries = (f"q{number}" for number in range(self.rotations))
        out = rows * (dim + 2) * 4 if self.part else rows * dim * 2
        return sizes | dict.fromkeys(queries, align(rows * dim * 2)) | {"out": align(out)}

    def accumulators(self, rows: int, dim: int, machine: Machine) -> tuple[tuple[int, int], tuple[int, int]]:
        """Size and number of the parts of the accumulators that take a strip's scores, and of those that take
        its products with V; `rows` are those of the largest product.
        """
        whole = machine.accumulator_bytes
        scores = accumulator_bytes(rows, self.columns or self.keys, machine)
        products = accumulator_bytes(rows, dim, machine)
        count = 2 if 2 * scores + 2 * products <= whole else 1
        return (scores, min(4, (whole - count * products) // scores)), (products, count)

    def fitting(self, heads: int, dim: int, largest: int, machine: Machine) -> AttentionBlocks | None:
        """With as many columns as let the scores of two products lie in the accumulators beside a product
        with V, in products of one size; None where not even sixteen do.  Each product has at most `largest`
        heads.
        """
        rows = self.strip_queries * min(self.strip, largest, heads)
        left = machine.accumulator_bytes - accumulator_bytes(rows, dim, machine)
        unit = machine.cube.columns
        most = left // 2 // accumulator_bytes(rows, unit, machine) * unit
        if most < unit:
            return None
        parts = -(-self.keys // most)
        return replace(self, columns=align(-(-self.keys // parts), unit))


# Of a block\'s time: tells apart what is equal otherwise, larger blocks are fewer commands.
_TURN: Final = 0.02
_KEYS: Final = (768, 576, 512, 384, 256, 192, 128, 64, 32, 16)  # of a block
_STRIPS: Final = (STRIP_ROWS, 96, 64)  # queries of a strip, where it has some of them
# Blocks of a turn, places for scores and for products with V: the more, the more overlaps.
_DEPTHS: Final = (
    (2, 4, 2),
    (2, 3, 2),
    (2, 3, 1),
    (2, 2, 1),
    (1, 4, 2),
    (1, 3, 2),
    (1, 3, 1),
    (1, 2, 1),
    (1, 1, 1),
)


@lru_cache(maxsize=4096)
def attention_blocks(
    tokens: int,
    heads: int,
    groups: int,
    dim: int,
    largest_group: int,
    machine: Machine,
    room: int,
    *,
    capacity: int = 1 << 31,
    transfers: bool = True,
    stored: tuple[tuple[int, int], ...] = (),
    rotations: int = 1,
    block: int | None = None,
    listed: int | None = None,
    beside: tuple[int, ...] = (),
) -> AttentionBlocks:
    """The cheapest blocks that fit `room` bytes, over a long cache: every piece of the tokens reads the cache
    again.  No block is longer than the cache of `capacity` rows.  `block`: of a cache that is cut by tokens,
    the rows whose positions follow each other; the rows of a block are some of those.  `listed`: the rows of
    blocks that come by lists, `beside` as `AttentionBlocks` has it.
    """

    def candidates() -> Iterator[AttentionBlocks]:
        for queries in sorted({-(-tokens // parts) for parts in range(1, tokens + 1)}, reverse=True):
            for all_heads in (True, False):
                h = heads if all_heads else largest_group
                strip = h if queries * h <= STRIP_ROWS else max(1, min(largest_group, STRIP_ROWS // queries))
                yield AttentionBlocks(
                    *(queries, 0, all_heads, strip, stored),
                    rotations=rotations,
                    part=block is not None,
                    beside=beside,
                )

    if block is not None and not _dividing(block):
        raise TyirError(
            f"a cache is cut into blocks of {block} positions; a die's attention takes {_KEYS[-1]} at a time",
            help=f"use kv-block={align(block, _KEYS[-1])}",
        )
    return _cheapest(
        candidates(),
        (tokens, heads, groups, dim, largest_group),
        machine,
        room,
        capacity,
        transfers,
        (listed,) if listed is not None else _KEYS if block is None else _dividing(block),
    )


def _dividing(block: int) -> tuple[int, ...]:
    """The numbers of keys that blocks of so many positions are made of."""
    return tuple(keys for keys in _KEYS if block % keys == 0)


def _cheapest(
    candidates: Iterator[AttentionBlocks],
    sizes: tuple[int, int, int, int, int],
    machine: Machine,
    room: int,
    longest: int,
    transfers: bool,
    numbers: Sequence[int] = _KEYS,
) -> AttentionBlocks:
    """The best of the candidates with any of these `numbers` of keys in a block; `sizes` are tokens, heads,
    cache heads, their width, and the most heads of one cache head.
    """
    tokens, heads, groups, dim, largest = sizes
    best: tuple[float, AttentionBlocks] | None = None
    all_keys = sorted({min(k, align(longest, machine.cube.columns)) for k in numbers}, reverse=True)
    for blocks in candidates:
        h, g = (heads, groups) if blocks.all_heads else (largest, 1)
        for keys in all_keys:
            sized = replace(blocks, keys=keys).fitting(h, dim, largest, machine)
            for sets, buffers, products in _DEPTHS if sized is not None else ():
                assert sized is not None
                steps = sized.strips(h) * sets
                if buffers > max(steps, 1) or (sets > 1 and keys >= longest):
                    continue
                found = replace(sized, sets=sets, buffers=buffers, products=products)
                if sum(found.layout(h, g, dim, transfers=transfers).values()) > room:
                    continue
                steady, alone = _block_ns(found, h, g, dim, min(keys, longest), machine)
                turns = -(-longest // keys)
                cost = turns * steady + (turns if sets == 1 else 1) * alone
                cost *= -(-tokens // blocks.queries) * groups / g
                if best is None or cost < best[0]:
                    best = cost, found
                break  # less room than that is slower
    if best is None:
        raise _no_blocks(heads, dim, room)
    return best[1]


def _no_blocks(heads: int, dim: int, room: int) -> TyirError:
    return TyirError(
        f"one token's attention over {heads} heads of {dim} does not fit {room} bytes of SRAM for"
        " temporaries",
        help="use more dies, so that each holds fewer heads",
    )


@lru_cache(maxsize=4096)
def segment_blocks(
    tokens: int,
    longest: int,
    heads: int,
    groups: int,
    dim: int,
    machine: Machine,
    room: int,
    *,
    transfers: bool = True,
) -> AttentionBlocks:
    """As `attention_blocks`, of a tower: `tokens` queries see segments of at most `longest` keys.

    There are many of both, so that strips of queries alternate as those of heads do.
    """
    most = min(tokens, longest)

    def candidates() -> Iterator[AttentionBlocks]:
        pieces = sorted({-(-most // parts) for parts in range(1, most + 1)}, reverse=True)
        for queries, strip_rows, all_heads in itertools.product(pieces, _STRIPS, (True, False)):
            h = heads if all_heads else heads // groups
            strip = h if queries * h <= STRIP_ROWS else 1
            part = align(-(-queries // -(-queries // strip_rows)), machine.cube.rows)
            yield AttentionBlocks(queries, 0, all_heads, strip, strip_rows=part)

    return _cheapest(
        candidates(), (tokens, heads, groups, dim, heads // groups), machine, room, longest, transfers
    )


def _block_ns(
    blocks: AttentionBlocks, heads: int, groups: int, dim: int, keys: int, machine: Machine
) -> tuple[float, float]:
    """About how long a block of keys takes: the busiest unit, or the chain of a strip's commands where too
    few of them alternate; and what comes beside where nothing else runs meanwhile, its loads and a chain.
    """
    rows, dispatch = blocks.strip_queries * min(blocks.strip, heads), machine.sync.dispatch_ns
    parts = [min(count, keys - first) for first, count in spans(blocks.keys, blocks.columns) if first < keys]
    products = matmul_ns(rows, dim, keys, machine)
    cube = _scores_ns(rows, parts, dim, machine) + dispatch + products
    drain = sum(dispatch + drain_ns(rows, n, machine) for n in (*parts, dim))
    vector = softmax_ns(rows, keys, machine) + vector_ns("rescale_add", rows * dim, machine) + 2 * dispatch
    strips = blocks.strips(heads)
    chain = cube + drain + vector
    under_way = min(strips * blocks.sets, blocks.buffers, 3)
    busiest = strips * max(cube, drain, vector, chain / under_way)
    nbytes = groups * keys * (sum(map(sum, blocks.stored)) or 4 * dim)
    loads = 2 * (dispatch + machine.dma.issue_ns) + nbytes / machine.dram_bytes_per_ns
    return max(busiest, loads) + _TURN * chain, machine.dram.latency_ns + loads + chain


def _scores_ns(rows: int, columns: Sequence[int], dim: int, machine: Machine) -> float:
    """Until the last product of a block's scores is done: two are in the accumulators at a time, so that the
    third waits until the first is drained.
    """
    now, drained = 0.0, [0.0, 0.0]
    for n in columns:
        now = max(now, drained[-2]) + machine.sync.dispatch_ns + matmul_ns(rows, n, dim, machine)
        drained.append(max(now, drained[-1]) + machine.sync.dispatch_ns + drain_ns(rows, n, machine))
    return now


def accumulator_bytes(rows: int, columns: int, machine: Machine) -> int:
    """What a product's sums take of the accumulators."""
    return align(rows, machine.cube.rows) * align(columns, machine.cube.columns) * 4
