"""Bytes of DRAM that a compiled model needs on each die, and which options need less.

Weights and caches are those of the real passes, run on a model of one layer with the config's sizes (a test holds them
against compiled artifacts).
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tyir.artifacts.token_blocks import TokenBlocks
from tyir.backends.edge10.memory.remedies import cheapest_remedies, gib, remedy_text
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.dialects.kv import Rows, TakeRows
from tyir.dialects.ty import Embedding, GetGlobal, Linear, Param, tensor_type
from tyir.execution.entry_points import alias_of
from tyir.layers import layer_in
from tyir.manifest import BuildOptions, recorded
from tyir.passes.annotate_sharding import MAX_DIES
from tyir.pipeline import run_pipeline
from tyir.sharding import even_ranges
from tyir.targets.machine import Machine
from tyir.tools.estimate.model import ModelShape, few_layers

__all__ = ["DieNeed", "DieNeeds", "memory_problems"]


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


def memory_problems(cuts: DieNeeds, machine: Machine) -> Iterator[Diagnostic]:
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
