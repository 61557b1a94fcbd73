"""Group sizes of 4-bit weights, from config.json alone: nothing is imported in vain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tyir.diagnostics import TyirError
from tyir.manifest import BuildOptions
from tyir.passes.quantize_weights import largest_group_size
from tyir.tools.commands.build_arguments import AUTO
from tyir.tools.estimate.model import ModelShape
from tyir.tools.estimate.shape import read_shape

__all__ = ["check_group", "settle_group_size"]


def check_group(shape: ModelShape, group: int | None, *, stored: bool) -> None:
    """`TyirError` unless such groups divide every decoder linear; `stored`: the checkpoint has them."""
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
        check_group(shape, size, stored=False)
    return found
