"""Fitting the constants that a machine file calls fitted, on half of the kernels.

By mean absolute log error, which is median-like; kinds weigh the same.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence

from tyir.diagnostics import TyirError
from tyir.runtime_sim.gpu.accelerator import Accelerator
from tyir.tools.gpu.validation_data import NEW, Row

__all__ = ["fit", "is_training"]

_ROWS_PER_KIND = 300
_NOT_FITTED = (NEW, "model", "add+norm", "silu*mul", "softmax", "LLMCompass", "gemm int8")


def is_training(row: Row) -> bool:
    """Whether a row belongs to the training half: by a hash of what was run, so that adding rows moves none.

    Whole models never do.
    """
    if any(word in row.kind for word in _NOT_FITTED):
        return False
    return hashlib.sha256(f"{row.kind} {row.name}".encode()).digest()[0] < 128


def fit(machine: Accelerator, rows: Sequence[Row]) -> Accelerator:
    """The machine with the fitted constants that err least on the training rows.

    By mean absolute log error.

    A fitted constant's `source` names the kinds of kernels it is fitted on; constants with the same source
    are fitted together, group after group in the file's order, the earlier ones kept.  `TyirError` when scipy
    is absent or a kind was not measured.
    """
    try:
        import scipy.optimize  # noqa: F401
    except ImportError:
        raise TyirError("--fit needs scipy", help="pip install 'tyir[dev]'") from None
    kinds = _training(rows)
    for group in dict.fromkeys(c.source for c in machine.fitted.values()):
        names = [n for n, c in machine.fitted.items() if c.source == group]
        chosen = [kinds[k] for k in group.split(", ") if k in kinds]
        if not chosen:
            raise TyirError(
                f"{names[0]} of {machine.name} is fitted on '{group}', which was not measured",
                help=f"measured: {', '.join(kinds)}",
            )
        machine = _fit_group(machine, names, chosen)
    return machine


def _fit_group(machine: Accelerator, names: Sequence[str], kinds: Sequence[Sequence[Row]]) -> Accelerator:
    """Nelder-Mead on the logarithms of some constants, from the values that the machine has."""
    from scipy.optimize import minimize

    start = [machine.constants[n].value for n in names]

    def with_logs(logs: Sequence[float]) -> Accelerator:
        return machine.with_values({n: v * math.exp(x) for n, v, x in zip(names, start, logs)})

    def error(logs: Sequence[float]) -> float:
        if max(abs(x) for x in logs) > 2.0:
            return 10.0
        candidate = with_logs(logs)
        if any(candidate.constants[n].value > 1 for n in names if n.endswith(("efficiency", "share"))):
            return 10.0
        return sum(_kind_error(kind, candidate) for kind in kinds) / len(kinds)

    simplex = [[0.0] * len(names)] + [
        [0.12 if i == j else 0.0 for j in range(len(names))] for i in range(len(names))
    ]
    result = minimize(
        error,
        simplex[0],
        method="Nelder-Mead",
        options={"initial_simplex": simplex, "maxfev": 80 * len(names), "fatol": 1e-5},
    )
    return with_logs([float(x) for x in result.x])


def _training(rows: Sequence[Row]) -> dict[str, list[Row]]:
    kinds: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if is_training(row):
            kinds[row.kind].append(row)
    return {kind: found[:: max(1, len(found) // _ROWS_PER_KIND)] for kind, found in kinds.items()}


def _kind_error(rows: Sequence[Row], machine: Accelerator) -> float:
    return sum(abs(math.log(r.predict(machine) / (r.us * 1000))) for r in rows) / len(rows)
