"""The table of methods: what each of them makes of a model's perplexity, under the same conditions.

    python -m tyir.tools.quantize.table MODEL --calibration TEXT --evaluate OTHER --characters 120000

Prints Markdown: a row for each method, a column for each number of bits; in brackets the part of what
rounding to nearest loses that the method does not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from tyir.tools.cli import ToolParser, run_tool

__all__ = ["main", "rows_of"]

_PLAIN: Final = "rtn"

Measured = Mapping[tuple[str, int], tuple[float, float]]
"""(method, bits) -> the perplexity of the model, and of what the method makes of it."""


def rows_of(measured: Measured) -> list[str]:
    """The table's lines.

    >>> print(*rows_of({("rtn", 4): (10.0, 12.0), ("awq", 4): (10.0, 10.5)}), sep="\\n")
    | | 4 bits |
    | --- | --- |
    | model (perplexity) | 10.000 |
    | `rtn` | 12.000 |
    | `awq` | 10.500 (75.0 %) |
    """
    methods = list(dict.fromkeys(method for method, _ in measured))
    bits = list(dict.fromkeys(number for _, number in measured))

    def cell(method: str, number: int) -> str:
        if (method, number) not in measured:
            return ""
        before, after = measured[method, number]
        nearest = measured.get((_PLAIN, number))
        if method == _PLAIN or nearest is None or nearest[1] <= before:
            return f"{after:.3f}"
        return f"{after:.3f} ({(nearest[1] - after) / (nearest[1] - before):.1%})".replace("%)", " %)")

    def line(cells: Sequence[str]) -> str:
        return "|" + "|".join(f" {c} " if c else " " for c in cells) + "|"

    plain = [next(m[0] for (_, n), m in measured.items() if n == number) for number in bits]
    return [
        line(["", *(f"{number} bits" for number in bits)]),
        line(["---"] * (len(bits) + 1)),
        line(["model (perplexity)", *(f"{value:.3f}" for value in plain)]),
        *(line([f"`{method}`", *(cell(method, number) for number in bits)]) for method in methods),
    ]


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = _parser().parse_args(argv)
    from tyir.tools.quantize.quantize import Text, quantize
    from tyir.tools.quantize.settings import QuantizeSettings

    measured = {}
    for bits in args.bits:
        for method in args.methods:
            settings = QuantizeSettings(method=method, bits=bits, group_size=args.group_size)
            with tempfile.TemporaryDirectory(prefix="tyir-table-") as folder:
                outcome = quantize(
                    args.model,
                    Path(folder) / "out",
                    settings,
                    calibration=args.calibration,
                    evaluate=Text(args.evaluate, args.characters),
                )
            assert outcome.before is not None and outcome.after is not None
            measured[method, bits] = (outcome.before.value, outcome.after.value)
            print(f"{method}, {bits} bits: {outcome.after.value:.3f}", file=sys.stderr)
    print(*rows_of(measured), sep="\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(prog="python -m tyir.tools.quantize.table", description=__doc__)
    parser.add_argument("model", type=Path, metavar="HF_DIR", help="checkpoint folder")
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE", help="text to search on")
    parser.add_argument("--evaluate", type=Path, required=True, metavar="TEXT", help="text to measure on")
    parser.add_argument("--characters", type=int, metavar="N", help="of the text, its first ones")
    parser.add_argument("--group-size", type=int, default=128, metavar="G", help="default 128")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3], help="default 4 3")
    parser.add_argument(
        "--methods", nargs="+", default=["rtn", "awq", "gptq", "awq+gptq"], help="default all"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
