"""`tyir-quantize HF_DIR -o OUT`: a checkpoint with 4-bit weights, chosen by what the model computes.

`tyir-quantize DIR --evaluate TEXT` without `-o` measures: DIR is a checkpoint or a folder of artifacts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tyir.diagnostics import TyirError
from tyir.tools.cli import ToolParser, add_json_option, quiet, run_tool, warn

if TYPE_CHECKING:
    from tyir.tools.quantize.settings import QuantizeSettings

__all__ = ["main", "make_parser"]


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = make_parser().parse_args(argv)
    if args.out is None and args.evaluate is None:
        raise TyirError("nothing is to be done", help="give -o OUT to quantise, --evaluate TEXT to measure")
    from tyir.tools.quantize.text_files import check_text

    for source in (args.calibration, args.evaluate):
        if source is not None:
            check_text(source)
    from tyir.tools.commands.json_forms import print_json
    from tyir.tools.quantize.quantize import Text, check_device, perplexity_of, quantize
    from tyir.tools.quantize.report import measured_form, report_form, summary_lines, write_report

    if args.characters is not None and args.characters < 1:
        raise TyirError(f"--characters {args.characters}: there is nothing to measure", help="give 1 or more")
    text = None if args.evaluate is None else Text(args.evaluate, args.characters)
    if args.out is None:
        assert text is not None
        check_device(args.device)
        measured = perplexity_of(args.model, text, args.window, args.device, not quiet())
        if args.json:
            print_json(measured_form(measured, args.window))
            return 0
        print(f"perplexity {measured.value:.3f} ({measured.tokens} tokens in windows of {args.window})")
        return 0
    outcome = quantize(
        args.model,
        args.out,
        _settings(args),
        calibration=args.calibration,
        evaluate=text,
        format=args.format,
        progress=not quiet(),
        warn=warn,
    )
    for problem in write_report(outcome, args.report) if args.report is not None else ():
        warn(problem)
    if args.json:
        print_json(report_form(outcome))
    else:
        for line in summary_lines(outcome):
            print(line)
        print(outcome.out)
    return 0


def _settings(args: argparse.Namespace) -> QuantizeSettings:
    from tyir.tools.quantize.settings import QuantizeSettings

    return QuantizeSettings(
        method=args.method,
        bits=args.bits,
        group_size=args.group_size,
        zero_point=not args.symmetric,
        lm_head=args.lm_head,
        modules_to_not_convert=tuple(args.skip),
        samples=args.samples,
        window=args.window,
        seed=args.seed,
        sequential=not args.not_sequential,
        smooth=not args.no_scales,
        quick=args.quick,
        device=args.device,
        objective=args.objective,
    )


def make_parser() -> argparse.ArgumentParser:
    parser = ToolParser(prog="tyir-quantize", description=__doc__)
    parser.add_argument("model", type=Path, metavar="HF_DIR", help="checkpoint folder")
    parser.add_argument("-o", "--out", type=Path, metavar="OUT", help="checkpoint folder to write")
    parser.add_argument(
        "--method",
        default="awq+gptq",
        help="awq: scales and ranges by what the model computes; gptq: rounding that makes up for its own"
        " errors; awq+gptq (default): both; rtn: round to nearest",
    )
    parser.add_argument("--bits", type=int, default=4, help="4 (default); 3 and 8 give the table alone")
    parser.add_argument("--group-size", type=int, default=128, metavar="G", help="default 128")
    parser.add_argument("--symmetric", action="store_true", help="no zero points")
    parser.add_argument("--lm-head", action="store_true", help="the output head too, rounded to nearest")
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="PATH",
        help="module path, or whole components of one (mlp.down_proj), that stays as it is; repeatable",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text, .jsonl or .parquet; without it the model generates its own",
    )
    parser.add_argument("--samples", type=int, metavar="N", help="windows to look at (default by model size)")
    parser.add_argument(
        "--window", type=int, default=512, metavar="T", help="tokens of a window, default 512"
    )
    parser.add_argument("--seed", type=int, default=0, help="of drawing windows and generating text")
    parser.add_argument(
        "--not-sequential",
        action="store_true",
        help="inputs do not see the error of the layers before (faster, as AutoAWQ)",
    )
    parser.add_argument(
        "--objective",
        metavar="WHAT",
        help="of method awq, what ranges are for: loss (the model's on the text) or outputs (of linears);"
        " default: of a small model both are tried, and the last fifth of the text decides",
    )
    parser.add_argument("--no-scales", action="store_true", help="ranges alone; norms stay as they are")
    parser.add_argument("--quick", action="store_true", help="the least work: fewest windows and candidates")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--format", help="awq (default), gptq or compressed-tensors")
    parser.add_argument(
        "--evaluate", type=Path, metavar="TEXT", help="measure the perplexity on this text, before and after"
    )
    parser.add_argument("--characters", type=int, metavar="N", help="of TEXT, the first N characters")
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="write report.json, report.html, errors.png"
    )
    add_json_option(parser, "print the report, or the perplexity, as JSON")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
