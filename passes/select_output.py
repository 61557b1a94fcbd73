"""What a step returns: the logits, or of each position the k best tokens with their values.

    func.return %logits, %k0n, ...     -->     %values, %ids, %logsumexp = ty.top_k(%logits) {k = 8}
                                               func.return %values, %ids, %logsumexp, %k0n, ...

`argmax` is k = 1.  The results are called `top_values` (f32 [b, s, k]), `top_ids` (i32 [b, s, k]) and
`logsumexp` (f32 [b, s]: what turns a value into the logarithm of its token's probability).  A soft cap of the
logits becomes the top-k's.  Runs before partition-dies, which then lets each die choose among its own columns
of the vocabulary and gathers the few candidates instead of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from tyir.diagnostics import TyirError
from tyir.dialects.func import Func
from tyir.dialects.ty import Softcap, TopK, tensor_type
from tyir.execution.entry_points import result
from tyir.ir import Op
from tyir.layers import carry
from tyir.manifest import record
from tyir.pipeline import Pass, PassContext

__all__ = ["SelectOutput", "output_of", "parse_output"]

LOGITS: Final = result("logits")
OUTPUTS: Final = ("top_values", "top_ids", "logsumexp")  # in the order of `ty.top_k`'s results

_MOST_DIGITS: Final = 18  # of K: an i64 holds all such numbers


def parse_output(text: str) -> int:
    """How many tokens of each position a program with this output returns: `logits` 0, `argmax` 1, `topk=8`
    8.  Raises `TyirError` for anything else.
    """
    if text in ("logits", "argmax"):
        return int(text == "argmax")
    kind, equals, count = text.partition("=")
    if kind == "topk" and equals and count.isdecimal() and len(count) <= _MOST_DIGITS and int(count) >= 1:
        return int(count)
    raise TyirError(
        f"--output '{text}' is none of logits, argmax and topk=K with K >= 1",
        help="use topk=1"
        if kind == "topk" and equals
        else "use topk=8"
        if kind == "topk"
        else "the folder of the artifacts is given by -o",
    )


def output_of(k: int) -> str:
    """The output's name: the inverse of `parse_output`."""
    return {0: "logits", 1: "argmax"}.get(k, f"topk={k}")


@dataclass(frozen=True)
class SelectOutput(Pass):
    """`kind` argmax or topk with `k`; logits changes nothing."""

    stage: ClassVar[tuple[str, ...]] = ("kv",)

    kind: Literal["logits", "argmax", "topk"] = "argmax"
    k: int = 0

    def run(self, op: Op, context: PassContext) -> None:
        count = self._count()
        functions = [f for f in op.walk_type(Func) if f.body.terminator.operands and f.res_attr(0) == LOGITS]
        if not functions:
            raise TyirError("no function returns logits", help="run select-output once, after kv-materialize")
        for function in functions if count else ():
            _select(function, count)
        record(op, output=output_of(count))

    def _count(self) -> int:
        if self.kind == "topk":
            if self.k < 1:
                raise TyirError(
                    f"k={self.k}: at least 1 token must be returned", help="use select-output{kind=topk k=8}"
                )
            return self.k
        if self.k not in (0, 1):
            raise TyirError(
                f"k={self.k} goes with kind=topk, not with kind={self.kind}",
                help=f"use select-output{{kind=topk k={self.k}}}",
            )
        return int(self.kind == "argmax")


def _select(function: Func, k: int) -> None:
    terminator = function.body.terminator
    logits, *rest = terminator.operands
    vocabulary = tensor_type(logits).dims[-1] or 0
    if k > vocabulary:
        raise TyirError(
            f"k={k} is more than the {vocabulary} tokens of the vocabulary", help=f"use k={vocabulary}"
        )
    cap = logits.op if isinstance(logits.op, Softcap) else None
    top = TopK(
        logits if cap is None else cap.x,
        k=k,
        softcap=None if cap is None else cap.cap,
        loc=terminator.loc if logits.op is None else logits.op.loc,
    )
    carry(top, logits.op).insert_before(terminator)
    attrs = [function.res_attr(i) for i in range(1, 1 + len(rest))]
    terminator.operands = [*top.results, *rest]
    if cap is not None:
        cap.erase()
    function.refresh_type()
    function.set_res_attrs([*map(result, OUTPUTS), *attrs])
