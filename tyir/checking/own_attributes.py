"""The attributes named `tyir.*` that ops, arguments and results may carry: what passes and people say to
later passes.

A name that is not in the table means nothing to anybody: `tyir.pim = "split"` would be ignored in silence.
Attributes of one's own have a prefix of one's own, as in MLIR.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from tyir.attributes import ArrayAttr, DictAttr
from tyir.diagnostics import Diagnostic, did_you_mean
from tyir.ir import Op

__all__ = ["OWN_ATTRIBUTES", "unknown_attributes"]

_PREFIX: Final = "tyir."

OWN_ATTRIBUTES: Final[Mapping[str, str]] = {
    # of the outermost module
    "tyir.stage": "where the module stands (`tyir.stages`)",
    "tyir.build": "what passes have built it with (`tyir.manifest`)",
    "tyir.model": "facts of config.json",
    "tyir.checkpoint": "the folder that `ty.global`s are relative to",
    "tyir.files": "size and time of the weights' files when they were imported",
    "tyir.vision": "what pictures become: sizes, grids, tokens (`tyir.artifacts.vision`)",
    "tyir.die": "of a module below it: the die",
    "tyir.machine": "of a command program: the machine it was scheduled for",
    # of ops: where in the model they belong
    "tyir.layer": "the decoder layer",
    "tyir.path": "the module's path in the model",
    "tyir.source": "of a command: the op that it comes from",
    "tyir.keys": "of attention: `int8` where a 4-bit cache has keys of 8 bits",
    # of ops: how they are cut over dies
    "tyir.pin": "what is to be split, replicated or cut by rows whatever it costs",
    "tyir.choice": "what was chosen, and why",
    "tyir.sharding": "where a result lives",
    "tyir.dies": "which dies take part",
    "tyir.blocks": "dies that a cache's blocks of positions are dealt out to, and a block's positions",
    "tyir.shard": "the axis and first row of a die's share",
    "tyir.partial": "a sum that the dies' shares are still to be added up to",
    # of functions, their arguments and results
    "tyir.graph": "which part of the model a function is (`tyir.vision.graphs`)",
    "tyir.entry": "a function that is called from outside, and the tokens of its step",
    "tyir.role": "what the caller gives: tokens, embeddings, position, cache and more (`Role`)",
    "tyir.name": "what it is called outside",
    "tyir.alias": "the argument that a result updates in place",
    # of programs: kernels and memory
    "tyir.kernel": "the host library's function",
    "tyir.place": "where a value lies, written by plan-memory or by hand",
    "tyir.scratch": "where an op's working memory lies",
    "tyir.address": "the buffer of DRAM",
    "tyir.sram": "the bytes of SRAM",
    "tyir.argument": "of a buffer: the argument it holds",
    "tyir.result": "of a buffer: the result it holds",
    "tyir.capacity": "of a cache's buffer: its tokens",
}


def unknown_attributes(op: Op) -> Iterator[Diagnostic]:
    """What is wrong with the names of an op's attributes, and of its arguments' and results'."""
    where = {"": op.attributes}
    for key, what in (("arg_attrs", "argument"), ("res_attrs", "result")):
        dicts = op.properties.get(key)
        if isinstance(dicts, ArrayAttr):
            where |= {f" on {what} {i}": d for i, d in enumerate(dicts) if isinstance(d, DictAttr)}
    for place, attributes in where.items():
        for name in attributes:
            if name.startswith(_PREFIX) and name not in OWN_ATTRIBUTES:
                hint = did_you_mean(name, OWN_ATTRIBUTES)
                yield Diagnostic(
                    f"'{op.name}' has an attribute '{name}'{place}, which nothing reads",
                    help=hint or "give attributes of your own a prefix of your own",
                )
