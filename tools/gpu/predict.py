"""`python -m tyir.tools.gpu.predict`: how long a step of a decoder takes on a known GPU.

Kernel by kernel, or beside times that somebody measured.

    python -m tyir.tools.gpu.predict --machine h200 --model llama3-70b --devices 4 --batch 8 --past 1023
    python -m tyir.tools.gpu.predict --machine mine.toml --model path/to/config.json --phase prefill --tokens 2048 --measured-us 45687
    python -m tyir.tools.gpu.predict --machine h200 --rows tests/data/h200/new_models.jsonl --one-model

The machine is a file with a number, a label and a source for everything (`runtime_sim/gpu/README.md` says
how to write one); the model a name or a Hugging Face `config.json`. Nothing here is fitted: a step is the
sum of its kernels (`runtime_sim/gpu/steps.py`).
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tyir.diagnostics import TyirError
from tyir.text.json_files import json_lines
from tyir.tools.cli import ToolParser, run_tool

if TYPE_CHECKING:
    from tyir.runtime_sim.gpu.accelerator import Accelerator
    from tyir.runtime_sim.gpu.steps import Step

__all__ = ["main"]

_ROW_KEYS: Final[dict[str, tuple[type, ...]]] = {
    "model": (str,), "world": (int,), "batch": (int,), "tokens": (int,), "past": (int,), "us": (int, float),
}  # fmt: skip
_ROW: Final = (
    'write {"kind": "model", "model": "llama3-8b", "world": 1, "batch": 1, "tokens": 1, "past": 127,'
    ' "us": 4662.3}'
)


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    from tyir.runtime_sim.gpu.accelerator import load_accelerator
    from tyir.runtime_sim.gpu.steps import Step, model_of

    args = _parser().parse_args(argv)
    machine = load_accelerator(args.machine)
    if args.rows is not None:
        print(_compare(args.rows, machine, not args.one_model))
        return 0
    if args.model is None:
        raise TyirError(
            "no model is named",
            help="--model NAME or --model path/to/config.json; or --rows FILE to compare with measured rows",
        )
    prefill = args.phase == "prefill"
    if prefill and args.tokens is None:
        raise TyirError("--phase prefill needs --tokens", help="--tokens 2048: new tokens of each sequence")
    tokens, past = (args.tokens, args.past or 0) if prefill else (1, 1023 if args.past is None else args.past)
    step = Step(model_of(args.model), args.devices, args.batch, tokens, past, not args.one_model)
    summary = _summary(step, machine, args.measured_us)
    print(json.dumps(summary, indent=1) if args.json else _text(summary))
    return 0


def _summary(step: Step, machine: Accelerator, measured_us: float | None) -> dict[str, Any]:
    """Microseconds of every kernel of a layer, of what follows the layers, and of the step."""
    from tyir.runtime_sim.gpu.steps import kernels, step_ns

    layer, end = kernels(step, machine)
    us = step_ns(step, machine) / 1000
    found: dict[str, Any] = {
        "machine": machine.name,
        "devices": step.devices,
        "batch": step.batch,
        "tokens": step.tokens,
        "past": step.past,
        "layers": step.model.layers,
        "layer_us": {n: ns / 1000 for n, ns in layer.items()},
        "end_us": {n: ns / 1000 for n, ns in end.items()},
        "step_us": us,
        "tokens_per_second": step.rows / us * 1e6,
    }
    if measured_us is not None:
        if not measured_us > 0:
            raise TyirError(f"--measured-us {measured_us} is out of range", help="give microseconds above 0")
        found |= {"measured_us": measured_us, "error_percent": 100 * (us / measured_us - 1)}
    return found


def _text(summary: dict[str, Any]) -> str:
    total = summary["step_us"]
    lines = [
        f"{summary['machine']} x {summary['devices']}, batch {summary['batch']}, {summary['tokens']} new"
        f" tokens after {summary['past']}"
    ]
    lines.append(f"{'kernel':<24}{'us a call':>12}{'calls':>8}{'us':>12}{'%':>7}")
    for part, calls in (("layer_us", summary["layers"]), ("end_us", 1)):
        for name, us in summary[part].items():
            lines.append(
                f"{name:<24}{us:>12.2f}{calls:>8}{us * calls:>12.1f}{100 * us * calls / total:>7.1f}"
            )
    lines.append(
        f"{'step':<24}{'':>20}{total:>12.1f}{100.0:>7.1f}   {summary['tokens_per_second']:.0f} tokens/s"
    )
    if "measured_us" in summary:
        lines.append(f"measured {summary['measured_us']:.1f} us: predicted {summary['error_percent']:+.1f} %")
    return "\n".join(lines)


def _compare(path: Path, machine: Accelerator, any_width: bool) -> str:
    """Every row of a file in the form of `tests/data/h200/models.jsonl`, and the mean errors by phase."""
    from tyir.runtime_sim.gpu.steps import Step, model_of, step_ns

    lines = [
        f"{'model':<16}{'devices':>8}{'batch':>7}{'tokens':>8}{'past':>8}{'measured us':>14}{'predicted':>12}{'%':>8}"  # noqa: E501
    ]
    errors: dict[str, list[float]] = {}
    for where, row in json_lines(path, _ROW):
        if row.get("kind") != "model":
            continue
        wrong = [key for key, kinds in _ROW_KEYS.items() if type(row.get(key)) not in kinds]
        if wrong or not row["us"] > 0:
            message = (
                f"a row needs {', '.join(wrong)}"
                if wrong
                else f"'us' is {row['us']}, a time above 0 is needed"
            )
            raise TyirError(message, where=where, help=_ROW)
        step = Step(model_of(row["model"]), row["world"], row["batch"], row["tokens"], row["past"], any_width)
        us = step_ns(step, machine) / 1000
        error = 100 * (us / row["us"] - 1)
        errors.setdefault("decode" if step.tokens == 1 else "prefill", []).append(error)
        lines.append(
            f"{row['model']:<16}{step.devices:>8}{step.batch:>7}{step.tokens:>8}{step.past:>8}{row['us']:>14.1f}{us:>12.1f}{error:>+8.1f}"
        )
    for phase, found in errors.items():
        mean, bias = sum(map(abs, found)) / len(found), sum(found) / len(found)
        lines.append(
            f"{phase}: {len(found)} steps, MAPE {mean:.1f} %, bias {bias:+.1f} %, max"
            f" {max(map(abs, found)):.1f} %"
        )
    if not errors:
        raise TyirError(
            f"no rows of kind 'model' in {path}",
            help=_ROW,
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="python -m tyir.tools.gpu.predict",
        description=(
            "Time of a decoder's step on a machine of tyir/targets, kernel by kernel; or beside measured"
            " rows."
        ),
        epilog="Tensor parallel over --devices; f16 or bf16 weights; kernels one after another in a graph.",
    )
    parser.add_argument(
        "--machine",
        default="h200",
        metavar="NAME|FILE",
        help="a machine of tyir/targets or a .toml file (default: h200)",
    )
    parser.add_argument(
        "--model", metavar="NAME|FILE", help="a known model, or the config.json of a Llama-like one"
    )
    parser.add_argument("--devices", type=int, default=1, help="GPUs that share every layer (default: 1)")
    parser.add_argument("--phase", choices=("decode", "prefill"), default="decode")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default: 1)")
    parser.add_argument("--tokens", type=int, help="new tokens of each sequence, in prefill")
    parser.add_argument(
        "--past", type=int, help="tokens in the cache (default: 1023 in decode, 0 in prefill)"
    )
    parser.add_argument(
        "--one-model",
        action="store_true",
        help=(
            "elementwise kernels are compiled for this model's widths alone (default: for any, as in a"
            " process that ran others)"
        ),
    )
    parser.add_argument("--measured-us", type=float, metavar="US", help="what was measured: print the error")
    parser.add_argument(
        "--rows",
        type=Path,
        metavar="FILE",
        help="JSON lines of measured steps (kind, model, world, batch, tokens, past, us): print all errors",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
