"""What a compile would make and need, from config.json or a GGUF file's metadata alone.

No tensor is read, torch is not imported.  What weights and caches take is exact (`die_needs`); speed and host
figures are estimates, how they are made is said beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from tyir.diagnostics import Diagnostic, TyirError
from tyir.frontends.adapters import base_of
from tyir.frontends.vision.llava import picture_folder
from tyir.manifest import BuildOptions
from tyir.passes.annotate_sharding import MAX_DIES
from tyir.runtime_sim.timing.long_steps import LONG
from tyir.targets.machine import Machine, load_machine
from tyir.tools.commands.json_forms import Planned, PlannedDie, PlannedLength, PlannedOnCards, PlannedPrompt
from tyir.tools.estimate.cards import OnCards, spread
from tyir.tools.estimate.die_needs import DieNeed, DieNeeds, memory_problems
from tyir.tools.estimate.group_size import check_group
from tyir.tools.estimate.long_context import PromptCost, prompt_cost
from tyir.tools.estimate.model import ModelShape
from tyir.tools.estimate.plan_text import lines
from tyir.tools.estimate.shape import read_config, read_shape
from tyir.tools.estimate.tower import PicturePlan, TowerShape, picture_plans, read_tower

__all__ = [
    "LongestCache",
    "Plan",
    "longest_caches",
    "make_plan",
    "on_cards",
]


@dataclass(frozen=True)
class Plan:
    """All figures; times in seconds, sizes in bytes.

    `problems` says what does not fit and the nearest setting that does.
    """

    shape: ModelShape
    options: BuildOptions
    machine: Machine
    group: int | None
    dies: tuple[DieNeed, ...]
    tokens_per_second: tuple[float, float, float]
    host_ram: int
    host_disk: int
    host_seconds: tuple[float, float]
    problems: tuple[Diagnostic, ...]
    tower: TowerShape | None = None
    pictures: tuple[PicturePlan, ...] = ()
    longest: tuple[LongestCache, ...] = ()
    prompt: PromptCost | None = None
    on_cards: tuple[OnCards, ...] = ()
    kv_parts: int = 1

    def text(self) -> str:
        """The plan as lines for a terminal."""
        return "\n".join(lines(self))

    def as_form(self) -> Planned:
        """The plan as `--json` prints it."""
        return Planned(
            model=self.shape.name,
            layers=self.shape.layers,
            parameters=self.shape.parameters,
            group_size=self.group,
            options=asdict(self.options),
            dies=tuple(PlannedDie(d.weights, d.kv_cache, d.activations, d.total) for d in self.dies),
            dram_bytes=int(self.machine.dram.capacity_bytes),
            tokens_per_second=self.tokens_per_second,
            host_ram_bytes=self.host_ram,
            host_disk_bytes=self.host_disk,
            host_seconds=self.host_seconds,
            problems=tuple(p.render() for p in self.problems),
            longest=tuple(PlannedLength(n.dies, n.stages, n.tokens, n.kv_split) for n in self.longest),
            prompt=None
            if (p := self.prompt) is None
            else PlannedPrompt(p.tokens, p.steps, p.prefill, p.token, p.overlapped),
            on_cards=tuple(
                PlannedOnCards(c.spread.stages, c.largest, c.spread.token, c.spread.links, c.spread.bound_by)
                for c in self.on_cards
            ),
        )


@dataclass(frozen=True)
class LongestCache:
    """How many tokens each of several sequences can cache on so many dies in so many pipeline stages, with
    the plan's other options; 0 where the weights alone are too much.  `kv_split`: what such a cache is cut
    by.
    """

    dies: int
    stages: int
    tokens: int
    kv_split: str


def longest_caches(
    shape: ModelShape, options: BuildOptions, machine: Machine, tower: int = 0
) -> Iterator[LongestCache]:
    """For 1, 4, 8 and 16 dies and those of the options, in 1, 2 and 4 stages and those of the options."""
    for stages in sorted({1, 2, 4, options.pp}):
        if stages > shape.layers:
            continue
        split = "heads" if options.kv_split == "heads" else "auto"  # not all dies can be cut by tokens
        trial = replace(options, pp=stages, dies=stages, die_map=(), mesh=(), kv_split=split)
        cuts = DieNeeds(shape, trial, tower)
        for dies in sorted({1, 4, 8, MAX_DIES, options.dies}):
            if dies % stages == 0 and (stages == 1 or dies > stages):
                yield LongestCache(dies, stages, *cuts.longest(dies, int(machine.dram.capacity_bytes)))


def make_plan(
    folder: Path,
    options: BuildOptions,
    machine_file: str | Path = "edge10",
    images: Sequence[tuple[int, int]] = (),
    base: Path | None = None,
    vision_tower: Path | None = None,
    *,
    long: bool = False,
    cards: Sequence[OnCards] = (),
) -> Plan:
    """The plan for compiling `folder`, or the LoRA adapter in it with its `base`, with `options`.

    `images`: the sizes (width, height) of pictures, `vision_tower`: the folder of the tower of a LLaVA in its
    own format.  `long`: of a cache of more than 32,768 tokens
    also how many tokens fit on other dies and, if it fits, what a prompt of that length takes (simulated,
    some seconds).  `cards`: what `on_cards` found, to be printed with the rest.

    `TyirError` when the config or the options cannot be at all.
    """
    where, raw = read_config(base_of(folder, base) or folder, vision_tower)
    tower = read_tower(raw, where)
    cuts = _die_needs(read_shape(folder, base, vision_tower), options, machine_file, tower)
    shape, options, machine = cuts.shape, cuts.options, load_machine(machine_file)
    if tower is None and images:
        raise TyirError(f"{shape.name} takes text only", help="leave --image out")
    said = where.parent if vision_tower is None else picture_folder(where.parent, vision_tower)
    pictures = () if tower is None else tuple(_pictures(said, raw, tower, images, machine, options))
    group = shape.group if shape.group is not None else options.group_size if options.quantizes else None
    check_group(shape, group, stored=shape.group is not None)
    needs = cuts.needs(options.dies, options.max_kv)
    parts = cuts.kv_parts(options.dies, options.max_kv)
    weights, code = sum(n.weights + n.tower for n in needs), options.dies * len(options.seqlens)
    linear, table = shape.width * shape.hidden, shape.vocabulary * shape.hidden
    ram = _BASE_RAM + max(4 * table, linear * (4 if group is None else 14))
    fast, slow = (
        _IMPORT_SECONDS + 0.1 * shape.layers + code * c + weights / r for c, r in ((0.5, 4e8), (3.0, 5e7))
    )
    problems = (*memory_problems(cuts, machine), *_too_large(pictures, options))
    long = long and options.max_kv > LONG
    return Plan(
        shape,
        options,
        machine,
        group,
        tuple(needs),
        _speed(needs, machine, shape, options.pp, parts),
        ram,
        weights + code * _CODE_BYTES,
        (fast, slow),
        problems,
        tower,
        pictures,
        tuple(longest_caches(shape, options, machine, cuts.tower)) if long else (),
        prompt_cost(shape, options, machine) if long and not problems else None,
        tuple(cards),
        parts,
    )


def _die_needs(
    shape: ModelShape, options: BuildOptions, machine_file: str | Path, tower: TowerShape | None
) -> DieNeeds:
    """What a checkpoint's dies need, with the options that its kind of model settles."""
    if tower is not None:
        options = replace(options, embedding_as_input=True)  # rows of pictures stand among those of tokens
    nbytes = 0 if tower is None else 2 * tower.parameters
    return DieNeeds(shape, options, nbytes, machine_file)


def on_cards(
    folder: Path,
    options: BuildOptions,
    machine_file: Path,
    cards: int,
    base: Path | None = None,
    vision_tower: Path | None = None,
) -> Iterator[OnCards]:
    """What a token takes on so many cards, the machine file's packages, with the dies as one group and with a
    pipeline stage a card: simulated, some seconds each.  `TyirError` as of `make_plan`.
    """
    where, raw = read_config(base_of(folder, base) or folder, vision_tower)
    shape = read_shape(folder, base, vision_tower)
    cuts = _die_needs(shape, options, machine_file, read_tower(raw, where))
    for each in spread(cuts.shape, cuts.options, machine_file, cards):
        cut = replace(cuts.options, pp=each.stages, die_map=(), mesh=())
        of = DieNeeds(cuts.shape, cut, cuts.tower, cuts.machine)
        yield OnCards(each, max(n.total for n in of.needs(cut.dies, cut.max_kv)))


def _pictures(
    folder: Path,
    raw: Mapping[str, Any],
    tower: TowerShape,
    images: Sequence[tuple[int, int]],
    machine: Machine,
    options: BuildOptions,
) -> Iterator[PicturePlan]:
    """Plans of what pictures of these sizes cost, one for each grid."""
    seen = set()
    for plan in picture_plans(folder, raw, tower, images, machine, options.dies) if images else ():
        if plan.size.grid not in seen:
            seen.add(plan.size.grid)
            yield plan


def _too_large(pictures: Sequence[PicturePlan], options: BuildOptions) -> Iterator[Diagnostic]:
    """Pictures that leave a prompt no room in the cache."""
    for size in (plan.size for plan in pictures if plan.size.tokens >= options.max_kv):
        enough = -(-(size.tokens + 256) // 256) * 256
        yield Diagnostic(
            f"a picture of {size.name} takes {size.tokens} tokens, the cache holds {options.max_kv}",
            help=f"--max-kv {enough} leaves room for a question, or give a smaller --image",
        )


# Measured on 2 cores with the embedded model: libraries 0.65 GiB, import 5 to 7 s, host code 0.5 to 1.5 s and
# about 0.5 MiB per die and length.
_BASE_RAM: Final = 700 * 2**20
_CODE_BYTES: Final = 2**19
_IMPORT_SECONDS: Final = 5.0


def _speed(
    needs: list[DieNeed], machine: Machine, shape: ModelShape, stages: int, kv_parts: int
) -> tuple[float, float, float]:
    """(slow, point, fast) tokens/s of decoding with a full cache.

    The slowest die's bytes over DRAM bandwidth x efficiency, two all-reduces a layer (and two gathers where
    caches are cut by tokens), the host.

    Pipeline stages read one after the other, the head on all dies together.
    """
    size = len(needs) // stages
    groups = [needs[first : first + size] for first in range(0, len(needs), size)]
    nbytes = sum(max(n.streamed + n.kv_cache for n in group) for group in groups) + max(n.head for n in needs)

    def at(bound: str) -> float:
        def value(name: str, faster: str) -> float:
            constant = machine.constants[name]
            wanted = {"point": None, "fast": faster, "slow": "low" if faster == "high" else "high"}[bound]
            found = None if wanted is None else getattr(constant, wanted)
            return constant.value if found is None else float(found)

        stream = nbytes / (value("dram.bandwidth_gbps", "high") * value("dram.efficiency", "high") * 1e9)
        collectives = (
            ((4 if kv_parts > 1 else 2) * shape.layers + 2)
            * (value("d2d.collective_us", "low") + value("d2d.hop_us", "low"))
            * 1e-6
            if len(needs) > 1
            else 0.0
        )
        return 1 / (
            stream + collectives + (value("host.step_us", "low") + value("sync.launch_us", "low")) * 1e-6
        )

    return at("slow"), at("point"), at("fast")
