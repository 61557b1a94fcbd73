"""Everything that `tyir-sim` reports about a compiled model on a machine, as data: text, JSON and HTML show
the same figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tyir.runtime_sim.timing.costs import (
    UNITS,
    CollectiveCount,
    LayerCost,
    OpCost,
    collective_counts,
    layer_costs,
    op_costs,
    unit_shares,
)
from tyir.runtime_sim.timing.engine import Timing
from tyir.runtime_sim.timing.long_steps import LONG
from tyir.runtime_sim.timing.predictor import Interval, Pictures, Predictor
from tyir.targets.collectives import CollectiveNeed

__all__ = [
    "Collectives",
    "PictureReport",
    "Point",
    "StepReport",
    "Summary",
    "SweepRow",
    "TornadoRow",
    "summarize",
    "sweep",
]


@dataclass(frozen=True)
class Point:
    """A time in ms at a number of tokens, of a prompt or cached: with the host's part, and of the device."""

    tokens: int
    ms: Interval
    device_ms: Interval


Least = Callable[[int], Sequence[CollectiveNeed]]


@dataclass(frozen=True)
class Collectives:
    """A step's collectives on die 0 beside the closed form's: the fewest, and their bytes, when everything is
    split (`tyir.targets.collectives`); None where the model's sizes are not known.  Sums may be cut into
    parts to overlap with products: then there are more of them with the same bytes.
    """

    items: tuple[CollectiveCount, ...]
    least_count: int | None
    least_bytes: int | None

    @property
    def count(self) -> int:
        return sum(c.count for c in self.items)

    @property
    def nbytes(self) -> int:
        return sum(c.count * c.nbytes for c in self.items)

    @property
    def sums(self) -> int:
        return sum(c.count for c in self.items if c.what == "all_reduce")

    @property
    def sum_bytes(self) -> int:
        return sum(c.count * c.nbytes for c in self.items if c.what == "all_reduce")


@dataclass(frozen=True)
class StepReport:
    """One step: its time on the device, what bounds it, what is busy how much, and where the time goes (on
    die 0).
    """

    seqlen: int
    pos: int
    device_ms: float
    bound_by: str
    unit_shares: Mapping[str, float]
    dram_bytes: tuple[int, ...]
    dram_gbps: tuple[float, ...]
    commands: int
    layers: tuple[LayerCost, ...]
    ops: tuple[OpCost, ...]
    collectives: Collectives

    @property
    def units(self) -> dict[str, float]:
        """`unit_shares` in the order in which units are always shown, which JSON does not keep."""
        return {unit: self.unit_shares[unit] for unit in UNITS if unit in self.unit_shares}


@dataclass(frozen=True)
class PictureReport:
    """Pictures of one compiled size: `tower_ms` is the tower's pass over one, `tables_ms` what fills the
    request's rotary tables, of the device alone; `ttft_ms` both, and the prefill of its tokens and of the
    prompt's with the host's constant for each step (None: the cache does not hold them).  What the host does
    with pixels is in none.  `cube_bound_ms`: the tower's products alone, dealt out evenly.  `tower`: its pass
    as a step of so many patches.
    """

    size: str
    tokens: int
    dies: int
    tower_ms: Interval
    tables_ms: Interval
    ttft_ms: Interval | None
    cube_bound_ms: float
    tower: StepReport


@dataclass(frozen=True)
class TornadoRow:
    """How far one assumed constant, moved alone between its bounds, moves the time per token: the device's
    part of it, and all of it.

    The two move alike but for the host's constant, which the device does not know.
    """

    constant: str
    low: float
    high: float
    device_ms_at_low: float
    device_ms_at_high: float
    tpot_ms_at_low: float
    tpot_ms_at_high: float
    source: str

    @property
    def of_device(self) -> bool:
        """Whether the device's part moves."""
        return self.device_ms_at_low != self.device_ms_at_high


@dataclass(frozen=True)
class Summary:
    """All figures of a compiled model on a machine.

    `ttft_ms`, `tpot_ms` and the rates made of them are device time and the host's constant for each step (a
    prompt takes `prefill_steps` of them); `..._device_ms` is the device's part, which alone is simulated.
    `decode_bound_by` is "host" when its constant takes more of a token's time than any unit.  An interval's
    ends have every assumed constant at its faster and at its slower bound.
    """

    artifacts: str
    machine: str
    dies: int
    seqlens: tuple[int, ...]
    max_kv: int
    calibrated: bool
    assumed_constants: tuple[str, ...]
    overrides: Mapping[str, float]
    host_ms_per_step: float
    prompt_tokens: int
    pos: int
    prefill_steps: int
    ttft_ms: Interval
    ttft_device_ms: Interval
    tpot_ms: Interval
    tpot_device_ms: Interval
    decode_bound_by: str
    prefill_tokens_per_s: Interval
    decode_tokens_per_s: Interval
    ttft_by_prompt: tuple[Point, ...]
    tpot_by_position: tuple[Point, ...]
    decode_step: StepReport
    prefill_step: StepReport | None
    tornado: tuple[TornadoRow, ...]
    pictures: tuple[PictureReport, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `json.dumps`."""
        return asdict(self)

    @property
    def decode_host_share(self) -> float:
        """The host's part of the time per token."""
        return self.host_ms_per_step / self.tpot_ms.point

    @staticmethod
    def from_json(values: Any, where: str) -> Summary:
        """The summary that `as_json` gave.

        `TyirError` when the values are none; `where` is for messages.
        """
        from tyir.artifacts.schema import checked

        return checked(Summary, values, where, f"simulate again: tyir-sim ARTIFACTS --report json -o {where}")


def summarize(
    predictor: Predictor,
    artifacts: str,
    prompt: int,
    pos: int,
    *,
    least: Least | None = None,
    curves: bool = True,
    tornado: bool = False,
) -> Summary:
    """All figures for a prompt of `prompt` tokens and a decode step at position `pos`.

    `least` gives the closed form's collectives of a step of so many tokens.  `curves`: also for other prompts
    and positions; `tornado`: also one run of the decode step for each bound of each assumed constant.
    """
    machine = predictor.machine
    shortest, longest = min(predictor.seqlens), max(predictor.seqlens)
    prefill_device = predictor.interval(lambda p: p.prefill_device_ns(prompt))
    decode_device = predictor.interval(lambda p: p.decode_device_ns(pos))
    host, prefill_steps = predictor.interval(lambda p: p.host_ns), predictor.prefill_steps(prompt)
    ttft, tpot = prefill_device.plus(host, prefill_steps), decode_device.plus(host)
    decode = predictor.step(shortest, min(pos, LONG))  # a step with all its commands
    prompts, positions = _points(predictor, prompt, pos) if curves else ([], [])
    return Summary(
        artifacts=artifacts,
        machine=machine.name,
        dies=predictor.dies,
        seqlens=predictor.seqlens,
        max_kv=predictor.capacity,
        calibrated=machine.calibrated,
        assumed_constants=tuple(name for name, _ in machine.assumed()),
        overrides={name: c.value for name, c in machine.constants.items() if c.label == "override"},
        host_ms_per_step=machine.host.step_us / 1000,
        prompt_tokens=prompt,
        pos=pos,
        prefill_steps=prefill_steps,
        ttft_ms=ttft.map(_ms),
        ttft_device_ms=prefill_device.map(_ms),
        tpot_ms=tpot.map(_ms),
        tpot_device_ms=decode_device.map(_ms),
        decode_bound_by=_bound_with_host(decode, predictor.host_ns),
        prefill_tokens_per_s=ttft.map(lambda ns: prompt * 1e9 / ns),
        decode_tokens_per_s=tpot.map(lambda ns: 1e9 / ns),
        ttft_by_prompt=tuple(_ttft_point(predictor, n) for n in prompts),
        tpot_by_position=tuple(_tpot_point(predictor, n) for n in positions),
        decode_step=_step_report(decode, least),
        prefill_step=_step_report(predictor.step(longest, 0), least) if longest > shortest else None,
        tornado=_tornado(predictor, pos) if tornado else (),
        pictures=tuple(_picture(predictor, pictures, prompt) for pictures in predictor.pictures),
    )


def _picture(predictor: Predictor, pictures: Pictures, prompt: int) -> PictureReport:
    timing, machine = predictor.tower(pictures), predictor.machine
    tower = predictor.interval(lambda p: p.tower(pictures).total_ns)
    tables = predictor.interval(lambda p: p.tables_ns())
    tokens = pictures.tokens + prompt
    ttft = predictor.interval(lambda p: p.ttft_ns(tokens)) if tokens <= predictor.capacity else None
    macs = sum(op.macs for die in range(len(timing.dies)) for op in op_costs(timing, die))
    cycles = macs / len(timing.dies) / machine.macs_per_cycle_fp16
    return PictureReport(
        size=pictures.size,
        tokens=pictures.tokens,
        dies=len(timing.dies),
        tower_ms=tower.map(_ms),
        tables_ms=tables.map(_ms),
        ttft_ms=None if ttft is None else ttft.plus(tower).plus(tables).map(_ms),
        cube_bound_ms=_ms(cycles * machine.cycle_ns),
        tower=_step_report(timing, None),
    )


def _ms(ns: float) -> float:
    return ns * 1e-6


def _points(predictor: Predictor, prompt: int, pos: int) -> tuple[list[int], list[int]]:
    """Prompt lengths around the given one, positions over the whole cache."""
    last = predictor.capacity - min(predictor.seqlens)
    prompts = {min(max(n, 1), max(last, 1)) for n in (1, prompt // 2, prompt, 2 * prompt, 4 * prompt)}
    positions = {0, min(pos, last), last // 4, last // 2, last}
    return sorted(prompts), sorted(positions)


def _ttft_point(predictor: Predictor, tokens: int) -> Point:
    device = predictor.interval(lambda p: p.prefill_device_ns(tokens, exact=False))
    return _point(predictor, tokens, device, predictor.prefill_steps(tokens))


def _tpot_point(predictor: Predictor, pos: int) -> Point:
    return _point(predictor, pos, predictor.interval(lambda p: p.decode_device_ns(pos, exact=False)), 1)


def _point(predictor: Predictor, tokens: int, device: Interval, steps: int) -> Point:
    """A point of a curve, for a figure of so many steps."""
    host = predictor.interval(lambda p: p.host_ns)
    return Point(tokens, device.plus(host, steps).map(_ms), device.map(_ms))


def _bound_with_host(step: Timing, host_ns: float) -> str:
    """What takes most of a step's time when the host's constant comes after it."""
    return "host" if host_ns > step.share(step.bound_by) * step.total_ns else step.bound_by


def _step_report(timing: Timing, least: Least | None) -> StepReport:
    return StepReport(
        seqlen=timing.seqlen,
        pos=timing.pos,
        device_ms=timing.total_ns * 1e-6,
        bound_by=timing.bound_by,
        unit_shares=dict(unit_shares(timing)),
        dram_bytes=timing.dram_bytes,
        dram_gbps=tuple(nbytes / timing.total_ns for nbytes in timing.dram_bytes),
        commands=sum(len(die.commands) for die in timing.dies),
        layers=tuple(layer_costs(timing)),
        ops=tuple(op_costs(timing)),
        collectives=_collectives(timing, least),
    )


def _collectives(timing: Timing, least: Least | None) -> Collectives:
    items = tuple(collective_counts(timing))
    if least is None:
        return Collectives(items, None, None)
    needs = least(timing.seqlen)
    return Collectives(items, sum(n.count for n in needs), sum(n.count * n.nbytes for n in needs))


def _tornado(predictor: Predictor, pos: int) -> tuple[TornadoRow, ...]:
    """The constants that move the device's part, the most important first; then the host's."""
    rows = []
    for s in predictor.sensitivities(lambda p: p.decode_device_ns(pos)):
        low, high = (
            predictor.machine.with_bounds({s.name: end}).host.step_us * 1000 for end in (False, True)
        )
        if s.swing > 0 or low != high:
            rows.append(
                TornadoRow(
                    constant=s.name,
                    low=s.constant.low or 0.0,
                    high=s.constant.high or 0.0,
                    device_ms_at_low=_ms(s.at_low),
                    device_ms_at_high=_ms(s.at_high),
                    tpot_ms_at_low=_ms(s.at_low + low),
                    tpot_ms_at_high=_ms(s.at_high + high),
                    source=s.constant.source,
                )
            )
    return tuple(rows)


@dataclass(frozen=True)
class SweepRow:
    """The figures with one constant at `value`."""

    value: float
    ttft_ms: float
    ttft_device_ms: float
    tpot_ms: float
    tpot_device_ms: float


def sweep(
    predictor: Predictor, constant: str, values: Sequence[float], prompt: int, pos: int
) -> list[SweepRow]:
    """The figures for several values of one constant; `TyirError` when the machine has no such constant or
    cannot have such a value.
    """
    machines = [predictor.machine.with_overrides({constant: value}) for value in values]
    return [
        SweepRow(
            value,
            _ms(at.ttft_ns(prompt)),
            _ms(at.prefill_device_ns(prompt)),
            _ms(at.tpot_ns(pos)),
            _ms(at.decode_device_ns(pos)),
        )
        for value, at in zip(values, (predictor.on(m) for m in machines))
    ]
