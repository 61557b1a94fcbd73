"""Which stage a module must stand at for a pass that takes it to the next: a wrong one is an error that says
what to run, before anything is changed.
"""

from __future__ import annotations

from typing import Final

from tyir.attributes import StringAttr
from tyir.diagnostics import TyirError
from tyir.ir import Op

__all__ = ["require_stage"]

# The stages in order, and what takes a module from each to the next.
_WAY: Final = {
    "aten": "to-ty",
    "ty": "kv-materialize",
    "kv": "partition-dies",
    "sharded": "localize-dies",
    "dist": "specialize-seqlen",
    "static": "to-program",
    "program": "lower-edge10",
    "edge10": "",
}


def require_stage(module: Op, pass_name: str, *wanted: str) -> None:
    """`TyirError` unless the module stands at one of the stages `wanted`, or does not say where it stands
    (hand-written IR).
    """
    attribute = module.attributes.get("tyir.stage")
    if not isinstance(attribute, StringAttr) or attribute.value in wanted or attribute.value not in _WAY:
        return
    order = list(_WAY)
    here, first = order.index(attribute.value), order.index(wanted[0])
    if here < first:
        ways = [_WAY[stage] for stage in order[here:first] if stage != "sharded"]
        help = f"run {','.join(ways)} first"
    else:
        help = (
            f"{pass_name} has been run on it, or what comes after it: start from a file of stage {wanted[0]}"
        )
    raise TyirError(
        f"{pass_name} runs at stage {' or '.join(wanted)}, this module is at stage {attribute.value}",
        help=help,
    )
