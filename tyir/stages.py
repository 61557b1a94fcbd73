"""The stages of a compilation in order: which ops may exist at each, and what takes a module to the next.

`tyir.stage` on the outermost module names the stage.  Whatever the table does not allow there is a leftover
of an earlier stage, and the error names the pass that should have removed it.  Ops of dialects that are not
tyir's (a user's own) are legal everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from tyir.attributes import BoolAttr, StringAttr
from tyir.diagnostics import TyirError, did_you_mean
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.ir import Op, Value
from tyir.types import TensorType

__all__ = ["STAGES", "Stage", "check_stage", "require_stage", "stage_of"]

KEY: Final = "tyir.stage"
_INNER: Final = "sharded"  # lies inside the pass that leads on from the stage before
_BASE: Final = frozenset({"builtin", "func"})
_WEIGHTS: Final = ("ty.global", "ty.param", "ty.get_global", "ty.yield")


@dataclass(frozen=True)
class Stage:
    """`dialects` and single `ops` that may exist; `leftovers` maps ops (or `dialect.*`) to the pass that
    removes them.  `next` is the pass or pipeline that takes a module on.

    `static` forbids `?` dimensions of function arguments; `in_functions` lists leftovers that are legal in
    weight initializers.
    """

    name: str
    next: str
    dialects: frozenset[str]
    ops: frozenset[str] = frozenset()
    leftovers: dict[str, str] = field(default_factory=dict)
    in_functions: dict[str, str] = field(default_factory=dict)
    static: bool = False

    def culprit(self, op: Op) -> str | None:
        """The pass that should have removed the op, or None when the op is legal here."""
        name = op.name
        if name in self.leftovers:
            return None if name in _STAYS and _STAYS[name](op) else self.leftovers[name]
        if op.dialect in self.dialects or name in self.ops:
            return None
        return self.leftovers.get(f"{op.dialect}.*")


def _sees_both_ways(op: Op) -> bool:
    """Attention without a cache, of a vision tower."""
    causal = op.properties.get("causal")
    return isinstance(causal, BoolAttr) and not causal.value


def _of_constants(op: Op) -> bool:
    """Tables of positions that are known, of a vision tower: a weight expression."""
    return all(value.op is not None and not value.op.operands for value in op.operands)


# Leftovers of the language model's stages that are none in a vision tower.
_STAYS: Final[dict[str, Callable[[Op], bool]]] = {
    "ty.attention": _sees_both_ways,
    "ty.rope_angles": _of_constants,
}
_TO_TY: Final = {"aten.*": "raise-aten"}
_TO_KV: Final = {**_TO_TY, "ty.attention": "kv-materialize", "ty.rope_angles": "kv-materialize"}
_WEIGHT_WORK: Final = {
    "ty.quantize_groups": "outline-params",
    "ty.rope_table": "outline-params",
    "ty.rope_angles": "outline-params",
    "ty.mix_rows": "outline-params",
    "ty.pair_scales": "outline-params",
}
_EARLY: Final = {
    "kv.*": "(none: it belongs to the stage kv)",
    "dist.*": "(none: it belongs to the stage dist)",
}
_NO_COMMANDS: Final = {"edge10.*": "(none: it belongs to the stage edge10)"}

STAGES: Final[dict[str, Stage]] = {
    stage.name: stage
    for stage in (
        Stage(
            "aten",
            "to-ty",
            _BASE | {"aten"},
            frozenset((*_WEIGHTS, "ty.constant", "ty.cast")),
            {**_EARLY, **_NO_COMMANDS},
        ),
        Stage("ty", "kv-materialize", _BASE | {"ty"}, leftovers={**_TO_TY, **_EARLY, **_NO_COMMANDS}),
        Stage(
            "kv",
            "partition-dies",
            _BASE | {"ty", "kv"},
            leftovers={**_TO_KV, "dist.*": _EARLY["dist.*"], **_NO_COMMANDS},
        ),
        Stage(  # inside partition-dies
            "sharded",
            "propagate-sharding,insert-collectives,localize-dies",
            _BASE | {"ty", "kv", "dist"},
            leftovers={**_TO_KV, **_NO_COMMANDS},
        ),
        Stage(
            "dist",
            "specialize-seqlen",
            _BASE | {"ty", "kv", "dist"},
            leftovers={**_TO_KV, **_NO_COMMANDS},
        ),
        Stage(
            "static",
            "to-program",
            _BASE | {"ty", "kv", "dist"},
            leftovers={**_TO_KV, **_NO_COMMANDS},
            static=True,
        ),
        Stage(
            "program",
            "lower-edge10",
            _BASE | {"ty", "kv", "dist"},
            frozenset(("edge10.buffer",)),
            {**_TO_KV, **_NO_COMMANDS},
            _WEIGHT_WORK,
            static=True,
        ),  # buffers: plan-memory
        Stage(
            "edge10",
            "",
            _BASE | {"edge10"},
            frozenset((*_WEIGHTS, "sdy.mesh")),
            {**_TO_KV, "ty.*": "lower-edge10", "kv.*": "lower-edge10", "dist.*": "lower-edge10"},
        ),
    )
}


def stage_of(op: Op) -> str | None:
    """The stage a module says it is at."""
    value = op.attributes.get(KEY)
    return value.value if isinstance(value, StringAttr) else None


def require_stage(op: Op, what: str, wanted: Sequence[str]) -> None:
    """`TyirError` that says what to run, unless the module that `op` is or lies in stands at one of the
    stages `wanted` or does not say where it stands (hand-written IR).
    """
    root = op
    while root.parent_op is not None:
        root = root.parent_op
    stage = stage_of(root)
    if stage is None or stage in wanted or stage not in STAGES:
        return
    order = list(STAGES)
    here, first = order.index(stage), order.index(wanted[0])
    if here < first:
        ways = [STAGES[s].next for s in order[here:first] if s != _INNER or s == stage]
        help = f"run {','.join(ways)} first"
    else:
        help = f"{what} has been run on it, or what comes after it: start from a file of stage {wanted[0]}"
    raise TyirError(f"{what} runs at stage {' or '.join(wanted)}, this module is at stage {stage}", help=help)


def check_stage(root: Op) -> Iterator[tuple[Op, str]]:
    """Every op that the root module's stage does not allow, with a message that names the pass which should
    have removed it.
    """
    name = stage_of(root) if isinstance(root, Module) and root.parent_op is None else None
    if name is None:
        return
    stage = STAGES.get(name)
    if stage is None:
        yield root, f"says it is at stage '{name}'; stages are {', '.join(STAGES)}{_hint(name)}"
        return
    verdicts: dict[type[Op], str | None] = {}
    for op in root.walk():
        cls = type(op)
        if cls not in verdicts or op.name in _STAYS:
            verdicts[cls] = stage.culprit(op)
        if (culprit := verdicts[cls]) is not None:
            yield op, _leftover(name, culprit)
        elif op.name in stage.in_functions and isinstance(op.parent_op, Func):
            yield (
                op,
                f"{_leftover(name, stage.in_functions[op.name])}, where functions hold no weight expressions",
            )
        elif (
            stage.static
            and isinstance(op, Func)
            and any(isinstance(a.type, TensorType) and not a.type.is_static for a in _arguments(op))
        ):
            yield (
                op,
                "has arguments with '?' dimensions at stage "
                + f"'{name}'; specialize-seqlen should have made them static",
            )


def _leftover(stage: str, culprit: str) -> str:
    if culprit.startswith("("):
        return f"cannot exist at stage '{stage}' {culprit}"
    return f"cannot exist at stage '{stage}'; {culprit} should have removed it"


def _arguments(function: Func) -> list[Value]:
    return list(function.regions[0].blocks[0].args) if function.regions and function.regions[0].blocks else []


def _hint(name: str) -> str:
    hint = did_you_mean(name, STAGES)
    return f"; {hint}" if hint else ""
