"""What a compile would make and need, from config.json or a GGUF file's metadata alone.

No tensor is read, torch is not imported.

Weights and caches are those of the real passes, run on a model of one layer with the config's sizes (a test
holds them against compiled artifacts).  Speed and host figures are estimates; how they are made is said
beside them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from tyir.artifacts.token_blocks import TokenBlocks
from tyir.backends.edge10.memory.remedies import cheapest_remedies, gib, remedy_text
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.dialects.kv import Rows, TakeRows
from tyir.dialects.ty import Embedding, GetGlobal, Linear, Param, tensor_type
from tyir.execution.entry_points import alias_of
from tyir.frontends.adapters import base_of
from tyir.frontends.vision.llava import picture_folder
from tyir.layers import layer_in
from tyir.manifest import BuildOptions, recorded
from tyir.passes.annotate_sharding import MAX_DIES
from tyir.passes.quantize_weights import largest_group_size
from tyir.pipeline import run_pipeline
from tyir.runtime_sim.timing.long_steps import LONG
from tyir.sharding import even_ranges
from tyir.targets.machine import Machine, load_machine
from tyir.tools.commands.build_arguments import AUTO
from tyir.tools.commands.json_forms import Planned, PlannedDie, PlannedLength, PlannedOnCards, PlannedPrompt
from tyir.tools.estimate.cards import Spread, spread
from tyir.tools.estimate.long_context import PromptCost, prompt_cost
from tyir.tools.estimate.model import ModelShape, few_layers
from tyir.tools.estimate.shape import read_config, read_shape
from tyir.tools.estimate.tower import PicturePlan, TowerShape, picture_plans, read_tower

__all__ = [
    "DieNeed",
    "DieNeeds",
    "LongestCache",
    "OnCards",
    "Plan",
    "duration",
    "fastest_on_cards",
    "longest_caches",
    "make_plan",
    "on_cards",
    "settle_group_size",
]

# ---------------------------------------------------------------------------------------------------- bytes


@dataclass(frozen=True)
class DieNeed:
    """Bytes of DRAM on one die.

    Of the weights every token reads `streamed` in the layers and `head` after them.  `tower`: weights that
    pictures go through.
    """

    weights: int
    streamed: int
    head: int
    kv_cache: int
    activations: int
    tower: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.tower + self.kv_cache + self.activations


class DieNeeds:
    """Needs of one model with one kind of weights, for any number of dies.

    The real passes, run once per number on a model of one layer per pipeline stage.
    """

    def __init__(
        self, shape: ModelShape, options: BuildOptions, tower: int = 0, machine: str | Path = "edge10"
    ) -> None:
        """`tower`: bytes of a vision tower, which each die may hold whole.  `machine`: name or file of the
        one that cuts are chosen for.
        """
        self.shape, self.options, self.tower, self.machine = shape, options, tower, machine
        self._of_split: dict[tuple[int, str], _Parts] = {}
        self._splits: dict[tuple[int, int], str] = {}

    def needs(self, dies: int, max_kv: int) -> list[DieNeed]:
        """With caches of `max_kv` tokens; `TyirError` where they cannot be cut as the options say."""
        return self._needs(dies, max_kv, self.kv_split(dies, max_kv))

    def kv_split(self, dies: int, max_kv: int) -> str:
        """What such caches are cut by, heads or tokens."""
        asked = self.options.kv_split
        if asked == "auto" and (dies, max_kv) not in self._splits:
            module = self._partitioned(dies, f"max-kv={max(max_kv, 1)}", "annotate-sharding", "")
            self._splits[dies, max_kv] = str(recorded(module)["kv_split"])
        return asked if asked != "auto" else self._splits[dies, max_kv]

    def kv_parts(self, dies: int, max_kv: int) -> int:
        """How many dies share each block of such caches' heads."""
        return self._parts(dies, self.kv_split(dies, max_kv)).count

    def longest(self, dies: int, capacity: int) -> tuple[int, str]:
        """The tokens that the die with the least room for them can cache, of `capacity` bytes, and what that
        cache is cut by: needs grow in a straight line, by whole blocks of all dies.
        """
        asked = self.options.kv_split
        for split in ("tokens", "heads") if asked == "auto" else (asked,):
            try:
                parts = self._parts(dies, split)
            except TyirError:  # no copies to cut by tokens
                if asked == split:
                    raise
                continue
            turn = 1 if split == "heads" else parts.count * self.options.kv_block
            none, one = (self._needs(dies, tokens, split, far=True) for tokens in (0, turn))
            rooms = [
                (capacity - a.total) // max(b.total - a.total, 1) for a, b in zip(none, one, strict=True)
            ]
            tokens = max(min(rooms), 0) * turn
            if asked != "auto" or split == "heads" or (tokens and self.kv_split(dies, tokens) == split):
                return tokens, split
        raise AssertionError("every model can be cut by heads")

    def _needs(self, dies: int, max_kv: int, split: str, *, far: bool = False) -> list[DieNeed]:
        """`far`: with the second rotary table that a longer cache may need, whatever this one does."""
        s, o, parts = self.shape, self.options, self._parts(dies, split)
        turned = max_kv + (s.short_positions if far or max_kv > s.short_positions else 0)
        rows = TokenBlocks(0, parts.count, o.kv_block).rows(max_kv) if parts.count > 1 else max_kv
        tokens = max(o.seqlens)
        returned = 1 if o.takes_row(tokens) else tokens
        activations = o.batch * (returned * s.vocabulary * 4 + tokens * 4)
        return [
            DieNeed(w + rope * turned, streamed, head, kv * rows * o.batch, activations, self.tower)
            for w, streamed, head, kv, rope in parts.dies
        ]

    def _parts(self, dies: int, split: str) -> _Parts:
        if (dies, split) not in self._of_split:
            self._of_split[dies, split] = self._run(dies, split)
        return self._of_split[dies, split]

    def _run(self, dies: int, split: str) -> _Parts:
        """Of a model whose cache has `_PROBE` tokens."""
        cut = f"kv-split={split} kv-block=1"
        module = self._partitioned(dies, f"max-kv={_PROBE}", "partition-dies", cut)
        run_pipeline(module, "specialize-seqlen{seqlens=1},outline-params")
        count = recorded(module).get("kv_parts", 1)
        assert isinstance(count, int)
        shares = [
            layers for _, layers in even_ranges(self.shape.layers, self.options.pp)
        ]  # how many layers each layer of the trial stands for
        parts = [die for die in module.body if isinstance(die, Module)]
        found = (
            self._die(die, shares, number * self.options.pp // dies, _PROBE // count)
            for number, die in enumerate(parts)
        )
        return _Parts(count, tuple(found))

    def _partitioned(self, dies: int, cache: str, step: str, cut: str) -> Module:
        """A model of one layer a stage, up to a pass that cuts it."""
        o, module = self.options, few_layers(self.shape, self.options.pp)
        entry = " embedding-as-input=true" if o.embedding_as_input else ""
        entry += f" dtype={o.kv_dtype}"
        quantize = (
            f"quantize-weights{{group-size={o.group_size}}},"
            if o.quantizes and self.shape.group is None
            else ""
        )
        batch = f"specialize-batch{{batch={o.batch}}}," if o.batch > 1 and not cut else ""
        cut = cut or f"kv-split={o.kv_split} kv-block={o.kv_block}"
        run_pipeline(
            module,
            f"{quantize}kv-materialize{{{cache}{entry}}},{batch}{step}{{dies={dies}"
            f" pp={o.pp} machine='{self.machine}' {cut}}}",
        )
        return module

    def _die(self, die: Module, shares: Sequence[int], stage: int, held: int) -> tuple[int, ...]:
        """Bytes of weights without the rotary tables, those of them that a token reads in layers and outside;
        of a cached row, and of a token's rows of the tables.
        """
        layers, once, table, rope = 0, 0, 0, 0
        (function,) = [f for f in die.body if isinstance(f, Func)]
        rows = {
            g.symbol.leaf
            for e in function.body
            if isinstance(e, (Embedding, Rows, TakeRows))
            for g in [e.table.op]
            if isinstance(g, GetGlobal)
        }
        heads = {
            v.symbol.leaf
            for op in function.walk_type(Linear)
            for v in [op.weight.op]
            if isinstance(v, GetGlobal)
        }
        for param in die.walk_type(Param):
            name, nbytes = str(param.sym_name), param.type.nbytes
            if (layer := layer_in(name)) is not None:
                layers += nbytes * shares[layer]
            elif name.startswith("rope."):
                rope += nbytes
            else:
                once += nbytes
                table += nbytes if name in rows - heads else 0  # only one row of it is read
        results = range(len(function.body.terminator.operands))
        states = [alias for i in results if (alias := alias_of(function, i)) is not None]
        cache = sum(tensor_type(function.args[alias]).nbytes for alias in states)
        return layers + once, layers, once - table, shares[stage] * cache // held, rope // _PROBE


@dataclass(frozen=True)
class _Parts:
    """How many dies share the blocks of the caches' heads, and of each die what `DieNeeds._die` says."""

    count: int
    dies: tuple[tuple[int, ...], ...]


# Tokens of the trial's cache, a multiple of any number of dies; caches and tables are proportional to it.
_PROBE: Final = math.lcm(*range(1, MAX_DIES + 1))


# --------------------------------------------------------------------------------------------------- the plan


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
        return "\n".join(_lines(self))

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
class OnCards:
    """What a token takes with the dies on several cards, and the bytes of the die that holds most."""

    spread: Spread
    largest: int


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
    _check_group(shape, group, stored=shape.group is not None)
    needs = cuts.needs(options.dies, options.max_kv)
    parts = cuts.kv_parts(options.dies, options.max_kv)
    weights, code = sum(n.weights + n.tower for n in needs), options.dies * len(options.seqlens)
    linear, table = shape.width * shape.hidden, shape.vocabulary * shape.hidden
    ram = _BASE_RAM + max(4 * table, linear * (4 if group is None else 14))
    fast, slow = (
        _IMPORT_SECONDS + 0.1 * shape.layers + code * c + weights / r for c, r in ((0.5, 4e8), (3.0, 5e7))
    )
    problems = (*_memory_problems(cuts, machine), *_too_large(pictures, options))
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


def fastest_on_cards(found: Sequence[OnCards], machine: Machine) -> OnCards | None:
    """The quickest token of those that fit the dies' DRAM; None: none fits."""
    fitting = (c for c in found if c.largest <= machine.dram.capacity_bytes)
    return min(fitting, key=lambda c: c.spread.token, default=None)


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


def _check_group(shape: ModelShape, group: int | None, *, stored: bool) -> None:
    channels = {k for _, _, k, _ in shape.linears}
    common = math.gcd(*channels)
    if group is None or (group > 0 and common % group == 0) or (group == 0 and stored):
        return
    said = ", ".join(map(str, sorted(channels)))
    if stored:
        raise TyirError(
            f"the checkpoint's groups of {group} channels do not divide the decoder linears' input channels"
            f" ({said})",
            help="its config.json is another model's, or was edited: restore it",
        )
    raise TyirError(
        f"group size {group} does not divide the decoder linears' input channels ({said})",
        help=f"--group-size {largest_group_size(channels, group)} divides them all; auto chooses",
    )


def settle_group_size(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a compile with a group size that divides: `auto` as a number.

    From config.json alone, so that nothing is imported in vain; `TyirError` when the size given does not
    divide.  A config that says too little settles nothing: the quantising pass looks at the model itself.
    """
    found = dict(options)
    if found.get("weights") != "int4":
        if found.get("group_size") == AUTO:
            del found["group_size"]
        return found
    try:
        shape = read_shape(folder)
    except TyirError:
        return found
    if shape.group is not None:  # quantised already
        if found.get("group_size") == AUTO:
            del found["group_size"]
        return found
    size = found.get("group_size", BuildOptions.group_size)
    if size == AUTO:
        found["group_size"] = largest_group_size({k for _, _, k, _ in shape.linears}, BuildOptions.group_size)
    else:
        _check_group(shape, size, stored=False)
    return found


def _memory_problems(cuts: DieNeeds, machine: Machine) -> Iterator[Diagnostic]:
    """At most one: what does not fit, and the cheapest options that do."""
    options, capacity = cuts.options, int(machine.dram.capacity_bytes)
    worst = max(cuts.needs(options.dies, options.max_kv), key=lambda n: n.total)
    if worst.total <= capacity:
        return
    known = {_kind(options): cuts}

    def need(changed: BuildOptions) -> int | None:
        if changed.weights != options.weights and cuts.shape.group is not None:
            return None  # the checkpoint's weights are quantised already
        if changed.dies % changed.pp or changed.pp > cuts.shape.layers:
            return None
        if changed.quantizes:
            common = math.gcd(*(k for _, _, k, _ in cuts.shape.linears))
            changed = replace(changed, group_size=math.gcd(common, changed.group_size))
        of = known.setdefault(_kind(changed), DieNeeds(cuts.shape, changed, cuts.tower, cuts.machine))
        try:
            return max(n.total for n in of.needs(changed.dies, changed.max_kv))
        except TyirError:  # caches that cannot be cut as the options say
            return None

    left = capacity - worst.weights - worst.tower - worst.activations
    if left > 0:
        message = f"max-kv {options.max_kv} needs {gib(worst.kv_cache)} per die and {gib(left)} are left"
    else:
        message = (
            f"the weights need {gib(worst.weights + worst.tower)} per die, {machine.name} has {gib(capacity)}"
        )
    yield Diagnostic(message, help=remedy_text(cheapest_remedies(options, capacity, need)))


def _kind(options: BuildOptions) -> BuildOptions:
    """What a trial's bytes per die and token depend on."""
    return replace(options, dies=1, die_map=(), mesh=(), max_kv=1)


_MARK: Final = {"heads": "", "tokens": " t"}


def duration(seconds: float) -> str:
    """`41 s`, `13.7 min` or `4.6 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _lines(plan: Plan) -> Iterator[str]:
    s, o, m = plan.shape, plan.options, plan.machine
    kind = (
        "fp16"
        if plan.group is None
        else f"int4 in groups of {plan.group or 'a row'}"
        + (" (the checkpoint's)" if s.group is not None else "")
    )
    yield f"{s.name}: {s.layers} layers, {s.parameters / 1e9:.3f} G parameters; decoder weights {kind}"
    stages = f" in {o.pp} pipeline stages" if o.pp > 1 else ""
    yield (
        f"{o.dies} die{'s' * (o.dies > 1)} of {m.name}{stages}, lengths {','.join(map(str, o.seqlens))}, a"
        f" cache of {o.max_kv} tokens"
        + (f", cut by tokens over each {plan.kv_parts} dies" if plan.kv_parts > 1 else "")
    )
    yield f"{'die':>4}{'weights':>12}{'KV cache':>12}{'activations':>13}{'total':>12}{'of DRAM':>9}"
    for i, n in enumerate(plan.dies):
        share = f"{100 * n.total / m.dram.capacity_bytes:.0f} %"
        yield f"{i:>4}{gib(n.weights):>12}{gib(n.kv_cache):>12}{gib(n.activations):>13}{gib(n.total):>12}{share:>9}"  # noqa: E501
    each = max(n.kv_cache for n in plan.dies) // (o.max_kv * o.batch)
    yield f"cache: {each:,} bytes a token on the largest die ({o.kv_dtype})"
    if o.kv_dtype == "int4":
        yield (
            "  layers whose keys 4 bits would not hold are found when weights are read, and named: theirs"
            " then take 8 bits, a layer about 1.4 times as much"
        )
    if plan.tower is not None:
        size = 2 * plan.tower.parameters
        yield (
            f"tower: {plan.tower.blocks} blocks, {plan.tower.parameters / 1e6:.1f} M parameters in fp16,"
            f" {gib(size)}: whole on each die, which it is at most"
        )
        for picture in plan.pictures:
            yield from picture.lines(o.max_kv)
    sram = m.sram.capacity_bytes
    state = max(o.seqlens) * s.hidden * 2
    yield (
        f"on-chip: the hidden state of the longest step takes {gib(state)} of {gib(sram)}; weights are tiled"
        " into the rest"
    )
    slow, point, fast = plan.tokens_per_second
    yield f"decoding: {slow:.1f} to {fast:.1f} tokens/s (point {point:.1f}) with a full cache"
    yield (
        "  = 1 / (bytes of the slowest die / (DRAM bandwidth x efficiency) + collectives + host step),"
        f" constants and bounds of {m.name}"
    )
    yield (
        f"host: about {gib(plan.host_ram)} of memory, {gib(plan.host_disk)} of disk,"
        f" {plan.host_seconds[0]:.0f} to {plan.host_seconds[1]:.0f} s"
    )
    yield (
        "  = libraries + the largest tensor's intermediates; artifacts; import + 0.5 to 3 s of code per die"
        " and length + 50 to 400 MB/s of weights"
    )
    if (p := plan.prompt) is not None:
        yield (
            f"a prompt of {p.tokens} tokens: {p.steps} steps, {duration(p.prefill)} until the first token,"
            f" then {1000 * p.token:.0f} ms a token"
        )
        if (choice := plan.options.choice) is not None:
            yield (
                f"  steps of {max(plan.options.seqlens)} tokens see {choice.keep} blocks of {choice.block}"
                f" for each range of the cache, and the last {choice.window} tokens; the end of the prompt"
                " sees all of it (sparse prefill)"
            )
        if p.overlapped is not None:
            yield (
                f"  {duration(p.overlapped)} if the pipeline stages work on several chunks at a time, as with"
                " --embedding-as-input --output-rows last"
                + (" (less what sparse steps wait to measure)" if plan.options.choice is not None else "")
            )
        yield (
            "  = one layer of each kind simulated on the command programs at a few positions, with"
            f" {m.name}'s point constants; the runtime keeps a row of logits and the cache, whatever the"
            " length"
        )
    if plan.on_cards:
        pos = o.max_kv - min(o.seqlens)
        yield f"cards of {m.d2d.package_dies} dies: a token at position {pos}, simulated"
        yield f"{'stages':>8}{'largest die':>14}{'ms a token':>12}{'between cards':>15}{'bound by':>10}"
        for c in plan.on_cards:
            ms, links = c.spread.token * 1e3, c.spread.links * 1e3
            yield f"{c.spread.stages:>8}{gib(c.largest):>14}{ms:>12.1f}{links:>15.2f}{c.spread.bound_by:>10}"
        fastest = fastest_on_cards(plan.on_cards, m)
        yield "  none fits" if fastest is None else f"  fastest that fits: --pp {fastest.spread.stages}"
    if plan.longest:
        yield f"tokens that {'a sequence' if o.batch == 1 else 'each sequence'} can cache, {o.kv_dtype}:"
        stages_found = sorted({n.stages for n in plan.longest})
        yield f"{'dies':>6}" + "".join(f"{f'pp {k}':>14}" for k in stages_found)
        for dies in sorted({n.dies for n in plan.longest}):
            found = {n.stages: f"{n.tokens}{_MARK[n.kv_split]}" for n in plan.longest if n.dies == dies}
            yield f"{dies:>6}" + "".join(f"{found.get(k, '-'):>14}" for k in stages_found)
        if any(n.kv_split == "tokens" for n in plan.longest):
            yield f"  {_MARK['tokens'].strip()}: caches cut by tokens (--kv-split)"
    if o.max_kv > s.positions:
        yield f"note: the cache holds {o.max_kv} tokens, the model was trained for {s.positions} positions"
