"""The description of a GPU-like accelerator: what the kernel models know of a machine.

A sibling of `machine.Machine`, not a part of it.  The NPU is described command by command (cubes, crossbar,
DMA queues, a de-quantisation pipe), because its program is known command by command.  A GPU runs library
kernels whose inner programs are not published; what can be known is the level below: multiprocessors, caches,
DRAM, links, the price of a launch, and the tile shapes that the library offers.  Both descriptions share the
form: one TOML file, every number with unit (in its name), label and source.  At most `MAX_FITTED` constants
may be fitted, each naming the data it was fitted on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Self, get_type_hints

from tyir.diagnostics import Diagnostic, TyirError, did_you_mean
from tyir.targets.constants import Constant, Form, build_sections, entries_of, read_table

__all__ = ["MAX_FITTED", "Accelerator", "DecodeKernel", "load_accelerator"]

MAX_FITTED: Final = 8
Tiles = tuple[tuple[int, int], ...]
_TILES: Final = ("gemm.tiles", "weight_only.tiles")


@dataclass(frozen=True)
class Clock:
    frequency_mhz: float


@dataclass(frozen=True)
class Multiprocessors:
    """`count` of them; each multiplies and accumulates `macs_per_cycle_*` a cycle with its matrix units."""

    count: int
    macs_per_cycle_fp16: float
    macs_per_cycle_int8: float


@dataclass(frozen=True)
class Power:
    """The power limit lowers the clock of matrix work that lasts.

    Full matrix load may run `burst_share` of the peak for `window_us` and `sustained_share` of it afterwards.
    """

    burst_share: float
    sustained_share: float
    window_us: float


@dataclass(frozen=True)
class Dram:
    """Memory beyond the caches.

    `write_cost`: time of a written byte over that of a read one; `ramp_us`: what the first touch of a working
    set beyond the L2 costs.
    """

    bandwidth_gbps: float
    efficiency: float
    write_cost: float
    ramp_us: float


@dataclass(frozen=True)
class L2:
    """The cache that all multiprocessors share.

    `bandwidth_gbps` is what they together get, sharing between neighbours (multicast) included.
    """

    capacity_bytes: float
    bandwidth_gbps: float


@dataclass(frozen=True)
class Launch:
    """What starting a kernel costs.

    `kernel_us`: an empty kernel inside a graph; `ramp_us`: first loads, filling the pipeline, last stores of
    a matrix kernel.
    """

    kernel_us: float
    ramp_us: float


@dataclass(frozen=True)
class Gemm:
    """Matrix product kernels of the library.

    `operand_rows`: see `gpu/gemm.py`; `step_ns`: least time of 64 of k; `split_us`: starting the kernel that
    adds the parts of a split k; `gemv`: 1 if there is a kernel for M = 1.
    """

    efficiency: float
    tile_us: float
    operand_rows: float
    step_ns: float
    split_us: float
    gemv: int


@dataclass(frozen=True)
class WeightOnly:
    """Products with 4-bit weights.

    Bytes of a weight with its scales, weights a block de-quantises per cycle, least time of 64 of k, start of
    a call; kernels of up to `two_blocks_rows` rows keep two blocks on a multiprocessor.
    """

    bytes_per_weight: float
    dequant_per_cycle: float
    step_ns: float
    call_us: float
    gemv_max_rows: int
    two_blocks_rows: int


@dataclass(frozen=True)
class Attention:
    """Attention kernels of the library.

    `efficiency` of the matrix units in prefill; what calls cost besides the launch; `packed_passes` over q,
    k, v that the library's prefill call makes besides.  In decode the grouped kernel takes up to `max_group`
    query heads that share keys, and is chosen when `grouped_fill` times its blocks fill the multiprocessors.
    """

    efficiency: float
    call_us: float
    decode_call_us: float
    packed_passes: float
    max_group: int
    grouped_fill: float


@dataclass(frozen=True)
class DecodeKernel:
    """Attention of one query.

    `resident` owners a multiprocessor, `block_us` to walk 128 keys (`flat_keys` are walked at once),
    `wave_us`, `owner_us` and `first_keys_us` for starting owners that do not fit at once, `touch_us` for a
    cache beyond the L2, `l2_share` of the L2's rate that owners get, `row_tile_share` for every 16 query
    heads of a group beyond the first 16.
    """

    resident: int
    block_us: float
    flat_keys: float
    wave_us: float
    owner_us: float
    first_keys_us: float
    touch_us: float
    l2_share: float
    row_tile_share: float


@dataclass(frozen=True)
class Rowwise:
    """Norms and elementwise kernels.

    `bandwidth_gbps` of reads and writes together, `row_ns_per_byte`: latency of one row in one block of
    threads.  Kernels that were compiled for any width compute `any_width_per_ns` elements' addresses a ns,
    rotations for one width `rotate_per_ns`; `strided_us`: what a copy between views that are not contiguous
    costs beyond a launch.
    """

    bandwidth_gbps: float
    row_ns_per_byte: float
    any_width_per_ns: float
    rotate_per_ns: float
    any_width_row_ns_per_byte: float
    strided_us: float
    call_us: float


@dataclass(frozen=True)
class Link:
    """All-reduce over links of `bandwidth_gbps` per direction: see `kernels.allreduce`."""

    bandwidth_gbps: float
    efficiency: float
    hop_us: float
    spread_us: float
    one_shot_us: float
    peer_us: float
    direct_efficiency: float
    one_shot_max_bytes: float
    two_shot_max_bytes: float
    call_us: float


@dataclass(frozen=True)
class Accelerator:
    """One device and its links.

    `constants` holds every number's provenance by dotted name; `tiles` are the library's (rows, columns):
    `gemm.tiles`, `weight_only.tiles`.
    """

    name: str
    clock: Clock
    sm: Multiprocessors
    power: Power
    dram: Dram
    l2: L2
    launch: Launch
    gemm: Gemm
    weight_only: WeightOnly
    attention: Attention
    grouped_decode: DecodeKernel
    head_decode: DecodeKernel
    rowwise: Rowwise
    link: Link
    tiles: Mapping[str, Tiles]
    constants: Mapping[str, Constant]

    @property
    def sm_flops_per_ns(self) -> float:
        """Peak of one multiprocessor in f16: two operations per multiply-accumulate."""
        return self.sm.macs_per_cycle_fp16 * 2 * self.clock.frequency_mhz * 1e-3

    @property
    def peak_tflops(self) -> float:
        """Dense f16 peak of the device."""
        return self.sm_flops_per_ns * self.sm.count * 1e-3

    @property
    def dram_bytes_per_ns(self) -> float:
        """Sustained read bandwidth: GB/s is bytes per nanosecond."""
        return self.dram.bandwidth_gbps * self.dram.efficiency

    @property
    def fitted(self) -> dict[str, Constant]:
        """The constants that were fitted, by dotted name."""
        return {n: c for n, c in self.constants.items() if c.label == "fitted"}

    def with_values(self, values: Mapping[str, float]) -> Accelerator:
        """The machine with some constants replaced, labels kept: `{"dram.efficiency": 0.9}`.

        `TyirError` for names it does not have.
        """
        unknown = [n for n in values if n not in self.constants]
        if unknown:
            raise TyirError(
                [
                    Diagnostic(f"{self.name} has no constant '{n}'", help=did_you_mean(n, self.constants))
                    for n in unknown
                ]
            )
        changed = {
            n: dataclasses.replace(self.constants[n], value=float(v), low=None, high=None)
            for n, v in values.items()
        }
        return self._from_constants(self.name, {**self.constants, **changed}, self.tiles)

    @classmethod
    def _from_constants(
        cls, name: str, constants: Mapping[str, Constant], tiles: Mapping[str, Tiles]
    ) -> Self:
        return cls(
            name=name, constants=dict(constants), tiles=tiles, **build_sections(_sections(), constants)
        )


def _sections() -> dict[str, Any]:
    return {n: t for n, t in get_type_hints(Accelerator).items() if n not in ("name", "tiles", "constants")}


@cache
def _form() -> Form:
    return Form(_sections(), zeros=True, bounds=False)


def load_accelerator(name_or_path: str | Path) -> Accelerator:
    """An accelerator by name (`runtime_sim/gpu/<name>.toml`) or by the path of a file.

    Everything wrong with the file is reported at once.

    A file with `like = "h200"` needs only what differs: the other constants are that machine's, labelled
    assumed.
    """
    table, where = _table(name_or_path)
    like = table.pop("like", None)
    if like is None:
        return _from_table(table, where)
    base, base_where = _table(str(like))
    if "like" in base:
        raise TyirError(
            f"'{like}' is itself like '{base['like']}'", where=where, help=f'write like = "{base["like"]}"'
        )
    return _from_table(_merged(table, base, str(like)), f"{where} (like {base_where})")


def _merged(table: dict[str, Any], base: dict[str, Any], like: str) -> dict[str, Any]:
    """The sections of `table` with what they lack from `base`, whose numbers are assumptions here."""
    base.pop("name", None)
    merged: dict[str, Any] = dict(table)
    for section, entries in base.items():
        own = table.get(section, {})
        if isinstance(own, dict):
            assumed = {
                k: {**v, "label": "assumed", "source": f"as {like}: {v['source']}"}
                for k, v in entries.items()
                if k not in own
            }
            merged[section] = {**own, **assumed}
    return merged


def _table(name_or_path: str | Path) -> tuple[dict[str, Any], str]:
    """The contents of a machine file, and where they are."""
    return read_table(name_or_path, "tyir.runtime_sim.gpu"), str(Path(name_or_path))


def _from_table(table: dict[str, Any], where: str) -> Accelerator:
    name = str(table.pop("name", Path(where).stem))
    entries = entries_of(table)
    problems: list[Diagnostic] = []
    tiles = {name: _tiles(name, entries.pop(name, None), where, problems) for name in _TILES}
    constants, others = _form().read(entries, where)
    problems += others
    if (fitted := sum(c.label == "fitted" for c in constants.values())) > MAX_FITTED:
        problems.append(
            Diagnostic(f"{fitted} constants are fitted, at most {MAX_FITTED} may be", where=where)
        )
    if problems:
        raise TyirError(problems)
    return Accelerator._from_constants(name, constants, tiles)


def _tiles(name: str, entry: object, where: str, problems: list[Diagnostic]) -> Tiles:
    """`gemm.tiles = { value = [[128, 256], ...], label, source }`."""
    value = entry.get("value") if isinstance(entry, dict) else None
    pairs = isinstance(value, list) and all(
        isinstance(t, list) and len(t) == 2 and all(isinstance(x, int) and x > 0 for x in t) for t in value
    )
    if not value or not pairs or not isinstance(value, list):
        problems.append(
            Diagnostic(
                f"{name}: needs the library's tile shapes",
                where=where,
                help="write value = [[128, 128], [128, 256]]",
            )
        )
        return ()
    return tuple((t[0], t[1]) for t in value)
