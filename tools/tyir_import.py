"""`tyir-import`: a Hugging Face folder to an IR file.

    tyir-import HF_DIR -o model.ir [--dtype f16|f32] [--raise]

Writes the module as text (`-o -`: standard output) and one line about it to standard error.  The file appears
complete or not at all.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tyir.tools.build_arguments import add_base_option, add_build_options, add_image_option
from tyir.tools.cli import ToolParser, add_debug_option, run_tool, warn

if TYPE_CHECKING:
    from tyir.dialects.builtin import Module

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="tyir-import",
        description="Import a Hugging Face model folder as tyir IR; weights stay in the folder.",
    )
    parser.add_argument(
        "folder", type=Path, metavar="HF_DIR", help="folder with config.json and *.safetensors"
    )
    parser.add_argument(
        "-o",
        "--output",
        default="-",
        metavar="FILE",
        help="where to write the IR; - is standard output (the default)",
    )
    parser.add_argument(
        "--dtype",
        choices=("f16", "f32"),
        default="f16",
        help="element type the model computes in (default: f16)",
    )
    parser.add_argument(
        "--raise",
        dest="raise_",
        action="store_true",
        help="also run raise-aten, so that the file is at stage ty",
    )
    parser.add_argument(
        "--model-plugin",
        type=Path,
        metavar="FILE",
        help="Python file with a model class, rename rules, packed tensors or a base checkpoint",
    )
    add_base_option(parser)
    add_image_option(parser)
    parser.add_argument(
        "--check-weights",
        action="store_true",
        help="also read every weight: NaN, infinity and f16 overflow are errors",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="say what was recognised as what, with counts per layer; IR is written only with -o FILE",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="only say, from config.json, what compiling with the options below would need and make",
    )
    add_build_options(
        parser.add_argument_group(
            "options of --plan; --max-kv also chooses the frequencies of rope types that change with the"
            " length"
        )
    )
    add_debug_option(parser)
    return parser


@run_tool
def main(argv: Sequence[str]) -> int:
    """Run the tool; 0 on success."""
    options = _parser().parse_args(argv)
    if options.plan:
        from tyir.manifest import BuildOptions
        from tyir.tools.tyir_compile import print_plan

        build = {
            key: value
            for key in ("dies", "pp", "seqlens", "max_kv", "weights", "group_size")
            if (value := getattr(options, key)) is not None
        }
        return print_plan(options.folder, BuildOptions(**build), options.image)
    if options.output != "-":
        _check_output(Path(options.output))
    from tyir.frontends.huggingface import import_model
    from tyir.manifest import BuildOptions
    from tyir.printer import print_op

    plugin = None
    if options.model_plugin is not None:
        from tyir.frontends.plugin import load_plugin

        plugin = load_plugin(options.model_plugin)
    module = import_model(
        options.folder,
        dtype=options.dtype,
        note=lambda d: warn(d.message),
        check_weights=options.check_weights,
        plugin=plugin,
        positions=BuildOptions.max_kv if options.max_kv is None else options.max_kv,
        base=options.base,
        images=options.image,
    )
    if options.explain:
        from tyir.tools.explain import explain

        print(explain(module.clone()))
        if options.output == "-":
            return 0
    if options.raise_:
        from tyir.passes.raise_aten import raise_aten

        raise_aten(module)
    text = print_op(module)
    if options.output == "-":
        sys.stdout.write(text)
    else:
        write_atomically(Path(options.output), text)
    print(_summary(module), file=sys.stderr)
    return 0


def _check_output(path: Path) -> None:
    """Refuse a place that cannot be written before the seconds of work."""
    from tyir.diagnostics import TyirError

    if path.is_dir():
        raise TyirError(f"{path} is a folder", help="give a file name, such as model.ir")
    if not path.parent.is_dir():
        raise TyirError(f"folder {path.parent} does not exist", help="create it, or write somewhere else")


def write_atomically(path: Path, text: str) -> None:
    """Write a file by way of a temporary one beside it.

    An existing file keeps its permissions' defaults and is replaced whole.
    """
    if path.exists() and not path.is_file():  # a device or a pipe is written to, never replaced
        path.write_text(text, encoding="utf-8")
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes files private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _summary(module: Module) -> str:
    """`Qwen2ForCausalLM: 6 layers, 5.6 M parameters in 1 file (10.6 MiB), 459 ops at stage ty`."""
    from tyir.attributes import DictAttr, IntegerAttr, StringAttr
    from tyir.dialects.ty import Global

    model, files, stage = (module.attributes[key] for key in ("tyir.model", "tyir.files", "tyir.stage"))
    assert isinstance(model, DictAttr) and isinstance(files, DictAttr) and isinstance(stage, StringAttr)
    architecture, layers = model.get("architecture"), model.get("num_hidden_layers")
    assert isinstance(architecture, StringAttr) and isinstance(layers, IntegerAttr)
    weights = [op for op in module.body if isinstance(op, Global)]
    parameters, size = sum(w.type.size for w in weights), sum(w.nbytes for w in weights)
    ops = sum(1 for op in module.walk()) - len(weights)
    plural = "" if len(files) == 1 else "s"
    return (
        f"{architecture.value}: {layers.value} layers, {_count(parameters)} parameters in {len(files)}"
        f" file{plural} ({size / 2**20:.1f} MiB), {ops} ops at stage {stage.value}"
    )


def _count(number: int) -> str:
    return (
        f"{number / 1e9:.2f} G"
        if number >= 1e9
        else f"{number / 1e6:.1f} M"
        if number >= 1e6
        else f"{number / 1e3:.1f} k"
    )


if __name__ == "__main__":
    sys.exit(main())
