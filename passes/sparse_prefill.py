"""Steps of the longest length see some blocks of the cache, chosen from real scores; shorter ones see all of it.

    @main_s96(.., %k0, %v0)                                 @main_s96(.., %k0, %v0, %recall0: tensor<1xSxHxf32>)
      %a = kv.attention(%q, %k0n, %v0n, %pos)      -->        %scores, %totals = kv.block_scores(%q, %k0n, %pos)
                                                              %blocks = kv.pick_blocks(%scores, %totals, %pos)
                                                              %a, %shares = kv.sparse_attention(%q, %k0n, %pos, %v0n, %blocks, %totals)
                                                              %recall0n = kv.replace(%recall0, %shares)

What is seen and what `keep`, `block`, `window` and `every` mean is in `tyir.artifacts.sparse_prefill`.  The choice is
made in the step, on the die that has the heads, for each cache head by itself; `recall` is state like a cache (all lengths
have it), so that a caller can say what was left out.  Layers with a sliding window stay as they are.

Never by itself: the pass runs where `--sparse-prefill` asks for it.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tyir.artifacts.sparse_prefill import MOST_TOKENS, RECALL, BlockChoice
from tyir.attributes import DictAttr
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.dialects.kv import (
    BlockScores,
    CachedAttention,
    DualChunkAttention,
    PickBlocks,
    Replace,
    SparseAttention,
)
from tyir.dialects.ty import tensor_type
from tyir.execution.entry_points import argument, entry_points, result
from tyir.ir import Op, Value
from tyir.layers import carry, layer_of
from tyir.manifest import record
from tyir.pipeline import Pass, PassContext
from tyir.types import TensorType, f32

__all__ = ["SparsePrefill"]

_LEAST_SAMPLES = 4  # three that choose and one that measures
_MANY_STEPS = 4  # dense ones for each of the longest length: more are worth a length of their own


def _with_shorter(most: int) -> str:
    """Lengths with one that computes the end of a prompt in two or three steps."""
    return ",".join(map(str, sorted({1, max(most * 3 // 4, 1), most})))


@dataclass(frozen=True)
class SparsePrefill(Pass):
    """Of the cache before the last `window` positions, `keep` blocks of `block` positions for steps of the
    longest length; every `every`-th query is looked at.
    """

    stage: ClassVar[tuple[str, ...]] = ("static",)

    keep: int = 32
    block: int = 256
    window: int = 1024
    every: int = 4

    def run(self, op: Op, context: PassContext) -> None:
        sparse = BlockChoice(self.keep, self.block, self.window, self.every).checked()
        if problems := list(_problems(op, sparse)):
            raise TyirError(problems)
        dies = [m for m in op.walk_type(Module) if any(isinstance(o, Func) for o in m.body)]
        _check_lengths(entry_points(dies[0]), context)
        for die in dies:
            functions = entry_points(die)
            longest = functions[max(functions)]
            layers = {
                number if (layer := layer_of(a)) is None else layer: a
                for number, a in enumerate(_whole(longest))
            }
            states = {
                f"{RECALL}{layer}": TensorType(
                    (1, sparse.samples(max(functions)), tensor_type(a.q).static_shape[2]), f32
                )
                for layer, a in layers.items()
            }
            for function in functions.values():
                given = _add_states(function, states)
                if function is longest:
                    made = [_rewrite(a, s, sparse) for a, s in zip(layers.values(), given, strict=True)]
                    kept = function.body.terminator.operands[: -len(given)]
                    function.body.terminator.operands = [*kept, *made]
            context.statistics["attentions"] = context.statistics.get("attentions", 0) + len(layers)
        record(op, sparse_prefill=sparse.numbers)


def _check_lengths(functions: Mapping[int, Func], context: PassContext) -> None:
    """`TyirError` where nothing is left that sees everything, a warning where that takes many steps."""
    most = max(functions)
    dense = max((length for length in functions if length < most), default=None)
    usual = f"use --seqlens {_with_shorter(most)}"
    if dense is None:
        raise TyirError(
            f"there are steps of {most} tokens only: sparse prefill needs a shorter length, with which the"
            " end of a prompt and generated tokens see everything",
            help=usual,
        )
    if dense * _MANY_STEPS < most:
        context.warning(
            functions[most],
            f"prompts of fewer than {2 * most} tokens, and the end of all others, are computed {dense} at a"
            f" time: steps of {most} tokens leave blocks out, and the next length is {dense}",
            help=usual,
        )


def _whole(function: Func) -> list[CachedAttention]:
    """The attentions that see the whole cache."""
    return [a for a in function.walk_type(CachedAttention) if not a.window]


def _problems(op: Op, sparse: BlockChoice) -> Iterator[Diagnostic]:
    """What stands against it, each once."""
    if "tyir.vision" in op.attributes:
        yield Diagnostic(
            "sparse prefill of a model that sees pictures is not there", help="leave --sparse-prefill out"
        )
    attentions = [
        a
        for die in op.walk_type(Module)
        if (functions := entry_points(die))
        for a in _whole(functions[max(functions)])
    ]
    if not attentions:
        yield Diagnostic(
            "no layer's attention sees the whole cache: there is nothing for sparse prefill to leave out",
            help="leave --sparse-prefill out",
        )
        return
    first = attentions[0]
    batch, tokens, *_ = tensor_type(first.q).static_shape
    where = str(first.loc)
    if any(a.blocks is not None for a in attentions):
        yield Diagnostic(
            "sparse prefill chooses among whole caches, these are cut by tokens",
            where=where,
            help="use --kv-split heads; more dies than key/value heads go into stages, --pp",
        )
    if any(a.layout != "HND" for a in attentions):
        yield Diagnostic(
            "sparse prefill reads blocks of one head, which lie together in caches laid out as HND",
            where=where,
            help="leave --kv-layout NHD out",
        )
    if batch > 1:
        yield Diagnostic(
            f"sparse prefill is for one sequence, these steps have {batch}",
            where=where,
            help="leave --batch out",
        )
    if tokens > MOST_TOKENS:
        yield Diagnostic(
            f"steps of {tokens} tokens are more than sparse prefill looks at together, {MOST_TOKENS}",
            where=where,
            help=f"use --seqlens 1,{MOST_TOKENS}",
        )
    if sparse.samples(tokens) < _LEAST_SAMPLES:
        yield Diagnostic(
            f"{tokens} tokens with every={sparse.every} are {sparse.samples(tokens)} samples; three that"
            " choose and one that measures are needed",
            where=where,
            help=f"use every={max((tokens - 1) // (_LEAST_SAMPLES - 1), 1)}, or longer steps",
        )
    if sparse.blocks(first.held) <= sparse.keep:
        yield Diagnostic(
            f"a cache of {first.held} tokens has {sparse.blocks(first.held)} blocks of {sparse.block}:"
            f" keeping {sparse.keep} leaves nothing out",
            where=where,
            help="keep fewer, or leave --sparse-prefill out",
        )
    if isinstance(first, DualChunkAttention) and first.step % sparse.block:
        yield Diagnostic(
            f"chunks of {first.step} tokens are not whole blocks of {sparse.block}",
            where=where,
            help="use another block=, which divides them",
        )


def _add_states(function: Func, states: dict[str, TensorType]) -> list[Value]:
    """State that the function takes and returns as it is."""
    attrs = [function.arg_attr(i) for i in range(len(function.args))]
    results = [function.res_attr(i) for i in range(len(function.body.terminator.operands))]
    added = [function.body.add_arg(kind, name) for name, kind in states.items()]
    terminator = function.body.terminator
    terminator.operands = [*terminator.operands, *added]
    function.refresh_type()
    function.set_arg_attrs([*attrs, *(argument(name, "cache") for name in states)])
    aliases: list[DictAttr] = [
        result(name, alias=value.index) for name, value in zip(states, added, strict=True)
    ]
    function.set_res_attrs([*results, *aliases])
    return added


def _rewrite(attention: CachedAttention, state: Value, sparse: BlockChoice) -> Value:
    """Put the ops of sparse attention in the place of an attention; the state that they leave."""
    chunks = attention if isinstance(attention, DualChunkAttention) else None
    far = () if chunks is None else (chunks.successive, chunks.inter, chunks.temperature)
    step = None if chunks is None else chunks.step
    meeting: dict[str, Any] = {
        "scale": attention.scale,
        "softcap": attention.softcap,
        "kv_heads": attention.kv_heads,
        "sparse": sparse.numbers,
        "step": step,
        "loc": attention.loc,
    }
    given = (attention.q, attention.k, attention.pos)
    keys_scales = attention.scales[:1]
    scores = BlockScores(*given, (*keys_scales, *far), **meeting)
    picked = PickBlocks(
        scores.scores,
        scores.totals,
        attention.pos,
        kv_heads=attention.kv_heads,
        sparse=sparse.numbers,
        tokens=tensor_type(attention.q).static_shape[1],
        step=step,
        loc=attention.loc,
    )
    seen = SparseAttention(
        *given,
        (*attention.scales, *far),
        v=attention.v,
        blocks=picked.blocks,
        totals=scores.totals,
        **meeting,
    )
    kept = Replace(state, seen.shares, loc=attention.loc)
    for new in (scores, picked, seen, kept):
        carry(new, attention).insert_before(attention)
    attention.replace_with([seen.out])
    return kept.out
