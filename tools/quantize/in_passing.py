"""A checkpoint that is quantised on the way to something else: `tyir-compile --weights awq`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tyir.diagnostics import TyirError
from tyir.tools.quantize.quantize import quantize
from tyir.tools.quantize.settings import QuantizeSettings

__all__ = ["quantized_beside"]


@contextmanager
def quantized_beside(
    model: Path,
    out: Path,
    group_size: int,
    *,
    calibration: Path | None = None,
    progress: bool = False,
    warn: Callable[[str], None] = lambda message: None,
) -> Iterator[Path]:
    """The checkpoint that `tyir-quantize` makes of the folder `model`, beside `out` (the same disk, which has
    to hold the artifacts anyway); it is gone afterwards, whatever happened.

    Raises `TyirError`.
    """
    if calibration is None:
        warn("no calibration text is given: the model generates its own (--calibration FILE)")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".awq", dir=out.parent)
    except OSError as error:
        raise TyirError(f"cannot write to {out.parent}: {error.strerror}", help="choose another -o") from None
    with folder as name:
        yield quantize(
            model,
            Path(name) / model.resolve().name,
            QuantizeSettings(group_size=group_size),
            calibration=calibration,
            progress=progress,
            warn=warn,
        ).out
