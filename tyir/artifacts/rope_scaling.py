"""Rotary scaling that a checkpoint's makers advise and its config.json does not have: `yarn=4`, `linear=2`.

Model cards ask for an entry in config.json, with a factor near the length that is wanted, since YaRN costs
quality on short prompts; here it is given when the model is imported, and the folder stays as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final

from tyir.artifacts.dual_chunk import CONFIG_KEY
from tyir.diagnostics import TyirError

__all__ = ["CHANGING", "RECORDED", "scaled_config"]

# Rope types whose frequencies depend on the length of the prompt: no fixed table describes them.
CHANGING: Final = ("dynamic", "longrope")
RECORDED: Final = "rope_scaling"  # among the model's facts: what it was imported with

_KINDS: Final = ("yarn", "linear")  # one table for all lengths; the others change with the prompt's
_EXAMPLE: Final = "give for example --rope-scaling yarn=4"


def scaled_config(config: Mapping[str, Any], text: str) -> dict[str, Any]:
    """config.json with rotary scaling of a kind and factor, as `yarn=4`.

    What an entry of the same kind says besides stays; `TyirError` for a model that has another kind, or none
    that could be scaled.
    """
    kind, _, number = text.partition("=")
    factor = _factor(number)
    if kind not in _KINDS or factor is None:
        raise TyirError(f"'{text}' is not {' or '.join(_KINDS)} with a factor from 1 on", help=_EXAMPLE)
    if config.get(CONFIG_KEY) is not None:
        raise TyirError(
            f"config.json has a {CONFIG_KEY}, which says how long prompts are computed",
            help="leave --rope-scaling out",
        )
    key = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    entry = config.get(key) or {}
    present = str(entry.get("rope_type", entry.get("type", "default")))
    if present not in ("default", kind):
        raise TyirError(
            f"config.json has rotary scaling of type '{present}', not {kind}", help="leave --rope-scaling out"
        )
    trained = entry.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    theta = entry.get("rope_theta", config.get("rope_theta"))
    if type(trained) is not int or theta is None:
        raise TyirError(
            "config.json has no max_position_embeddings and rope_theta to scale",
            help="leave --rope-scaling out",
        )
    kept = {k: v for k, v in entry.items() if k not in ("type", "rope_type")} if present == kind else {}
    scaling = {**kept, "rope_type": kind, "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = trained
    return {**config, key: scaling, "max_position_embeddings": int(trained * factor)}


def _factor(text: str) -> float | None:
    """A finite factor from 1 on, None for anything else."""
    if not re.fullmatch("[0-9.e+]+", text):  # as the manifest keeps it: no spaces, no underscores
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 1 else None
