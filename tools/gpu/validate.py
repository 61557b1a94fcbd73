"""`python -m tyir.tools.gpu.validate`: the kernel models against machines that were measured.

Beside the roofline and the best affine fit; for the page the timing engine too.

Per kind of kernel and bucket of rows: mean, median, 90th percentile and maximum of the absolute relative
error, and the signed mean (bias). Every constant that a machine file calls fitted is re-fitted by `--fit` on
the training half of the kernels; the table tells both halves apart. Whole models are never fitted.  A folder
that is absent is skipped with a word.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tyir.tools.cli import ToolParser, run_tool

if TYPE_CHECKING:
    from tyir.tools.gpu.validation_table import Line

__all__ = ["main"]

MACHINES = ("h200", "h100", "a100", "orin")


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    from tyir.runtime_sim.gpu.accelerator import load_accelerator
    from tyir.tools.gpu.validation_data import read_rows
    from tyir.tools.gpu.validation_page import markdown
    from tyir.tools.gpu.validation_table import lines_of, render

    args = _parser().parse_args(argv)
    names = args.machine or list(MACHINES)
    found: dict[str, list[Line]] = {}
    for name in names:
        folders = _folders(name, args.data)
        machine = load_accelerator(name)
        if not folders:
            print(
                f"{name}: no measurements here, skipped (looked in"
                f" {', '.join(map(str, _candidates(name, args.data)))})"
            )
            continue
        rows = read_rows(*folders)
        if args.fit:
            from tyir.tools.gpu.validation_fit import fit

            machine = fit(machine, rows)
            print(
                f"{name}: fitted constants: "
                + ", ".join(f"{n} = {c.value:.4g}" for n, c in machine.fitted.items())
            )
        found[name] = lines_of(rows, machine)
        if not (args.markdown or args.json):
            print(render(name, found[name]))
    if args.json:
        print(json.dumps({n: [line.as_dict() for line in lines] for n, lines in found.items()}, indent=1))
    if args.markdown:
        print(
            markdown(found, {n: load_accelerator(n) for n in found}, [] if args.machine else _engine_lines())
        )
    return 0


def _engine_lines() -> list[str]:
    """The tables of the timing engine on silicon."""
    from tyir.targets.machine import load_machine
    from tyir.tools.silicon.programs import MACHINE
    from tyir.tools.silicon.validate import page_lines

    return page_lines(load_machine(MACHINE))


def _candidates(name: str, data: Path | None) -> list[Path]:
    """Where a machine's measurements may be.

    The folder given, or beside the checkout, and what was measured for the project itself.
    """
    root = Path(__file__).resolve().parents[2]
    return (
        [data / name]
        if data is not None
        else [root.parent / "shared" / "validation" / name, root / "tests" / "data" / name]
    )


def _folders(name: str, data: Path | None) -> list[Path]:
    return [f for f in _candidates(name, data) if f.is_dir()]


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="tyir-validate",
        description=(
            "Compare the kernel models with measured machines: error per kind of kernel and bucket, beside"
            " roofline and affine fit."
        ),
        epilog=(
            "Constants and their sources are in tyir/targets/<machine>.toml; whole models are never fitted."
        ),
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help=(
            "folder with h200/, a100/, orin/ (default: ../shared/validation beside the checkout, or"
            " tests/data)"
        ),
    )
    parser.add_argument(
        "--machine", action="append", choices=MACHINES, help="only this machine; may be repeated"
    )
    parser.add_argument(
        "--fit",
        action="store_true",
        help="re-fit the fitted constants on the training half of the kernels (needs scipy)",
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.add_argument("--markdown", action="store_true", help="print the performance page")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
