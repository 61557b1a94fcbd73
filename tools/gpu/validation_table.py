"""The validation table: error per kind of kernel and bucket, as text and data.

Ours beside the roofline and the best affine fit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from tyir.runtime_sim.gpu.accelerator import Accelerator
from tyir.tools.gpu.validation_data import NARROW, Row
from tyir.tools.gpu.validation_fit import is_training
from tyir.tools.gpu.validation_floor import neighbour_floor

__all__ = ["Line", "lines_of", "render"]

_BUCKETS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 8192, 65536)


@dataclass(frozen=True)
class Line:
    """Errors in per cent over some rows of one kind.

    Ours, and the mean absolute error of the roofline and of the affine fit; `floor`: see `validation_floor`.
    """

    kind: str
    bucket: str
    count: int
    mape: float
    median: float
    p90: float
    max: float
    bias: float
    held_out: float | None
    roofline: float
    affine: float
    floor: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def lines_of(rows: Sequence[Row], machine: Accelerator) -> list[Line]:
    """One line per kind, then its buckets when there are several.

    Kinds that are told apart by size once more together.
    """
    kinds: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        kinds[row.kind].append(row)
    for narrow in [k for k in kinds if k.endswith(NARROW) and k.removesuffix(NARROW) in kinds]:
        kinds[narrow.removesuffix(NARROW) + " of any size"] = (
            kinds[narrow.removesuffix(NARROW)] + kinds[narrow]
        )
    lines = []
    for kind, found in kinds.items():
        ours = np.array([r.predict(machine) / 1000 / r.us - 1 for r in found])
        roofline = np.array([_roofline_us(r, machine) / r.us - 1 for r in found])
        affine = _affine_errors(found)
        groups = {"all": np.arange(len(found))}
        if len(found) > 12 and not kind.startswith("model") and not kind.endswith("of any size"):
            groups |= _buckets(found)
        for name, index in groups.items():
            unseen = [i for i in index if not is_training(found[i])]
            line = _line(kind, name, ours[index], ours[unseen], roofline[index], affine[index])
            lines.append(replace(line, floor=neighbour_floor(found, machine)) if name == "all" else line)
    return lines


def _line(kind: str, bucket: str, ours: Any, unseen: Any, roofline: Any, affine: Any) -> Line:
    size = np.abs(ours) * 100
    return Line(
        kind,
        bucket,
        len(ours),
        float(size.mean()),
        float(np.median(size)),
        float(np.percentile(size, 90)),
        float(size.max()),
        float(ours.mean() * 100),
        float(np.abs(unseen).mean() * 100) if len(unseen) else None,
        float(np.abs(roofline).mean() * 100),
        float(np.abs(affine).mean() * 100),
    )


def _buckets(rows: Sequence[Row]) -> dict[str, Any]:
    """Row numbers by bucket of M (rows of a product, keys of an attention, bytes of an all-reduce)."""
    edges = _BUCKETS if max(r.m for r in rows) <= _BUCKETS[-1] else tuple(4**i * 1024 for i in range(16))
    values = np.array([r.m for r in rows])
    low, found = 0, {}
    for edge in edges:
        index = np.nonzero((values > low) & (values <= edge))[0]
        if len(index):
            found[f"{low + 1}..{edge}" if edge > low + 1 else f"{edge}"] = index
        low = edge
    return found


def _roofline_us(row: Row, machine: Accelerator) -> float:
    """The larger of matrix time at peak and bytes at nominal bandwidth.

    For a link, bytes at its nominal bandwidth.
    """
    if row.kind.startswith("all-reduce"):
        return row.nbytes / machine.link.bandwidth_gbps / 1000
    return max(row.flops / (machine.peak_tflops * 1e6), row.nbytes / machine.dram.bandwidth_gbps / 1000)


def _affine_errors(rows: Sequence[Row]) -> Any:
    """Relative errors of the best `t0 + bytes / bandwidth + flops / rate` with t0 >= 0.

    By weighted least squares on all rows (it sees its own test).
    """
    times = np.array([r.us for r in rows])
    features = np.array([[1.0, r.nbytes, r.flops] for r in rows])
    features = features[:, features.any(axis=0)]
    scale = features.max(axis=0)
    weight = 1 / times
    for _ in range(20):  # towards least absolute errors
        solution = np.linalg.lstsq(features / scale * weight[:, None], times * weight, rcond=None)[0]
        residual = np.abs(features / scale @ solution / times - 1)
        weight = 1 / times / np.sqrt(np.maximum(residual, 1e-3))
    return features / scale @ solution / times - 1


def render(name: str, lines: Iterable[Line]) -> str:
    """Fixed-width text."""
    text = [
        f"{name}: errors in per cent",
        (
            f"{'kind':<24}{'M':>15}{'n':>7}{'MAPE':>8}{'median':>8}{'p90':>8}{'max':>8}{'bias':>8}{'held out':>10}{'roofline':>10}{'affine':>8}{'floor':>8}"  # noqa: E501
        ),
    ]
    for x in lines:
        unseen, floor = ("" if value is None else f"{value:.1f}" for value in (x.held_out, x.floor))
        text.append(
            f"{x.kind:<24}{x.bucket:>15}{x.count:>7}{x.mape:>8.1f}{x.median:>8.1f}{x.p90:>8.1f}{x.max:>8.0f}{x.bias:>8.1f}{unseen:>10}{x.roofline:>10.1f}{x.affine:>8.1f}{floor:>8}"
        )
    return "\n".join(text) + "\n"
