"""`tyir-import`: a Hugging Face folder to an IR file.

    tyir-import HF_DIR -o model.ir [--dtype f16|f32] [--raise]

Writes the module as text (`-o -`: standard output) and one line about it to standard error.  The file appears
complete or not at all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyir.diagnostics import TyirError
from tyir.tools.cli import (
    ToolParser,
    add_json_option,
    check_output,
    note,
    quiet,
    run_tool,
    warn,
    write_output,
)
from tyir.tools.commands.build_arguments import (
    add_base_option,
    add_build_options,
    add_image_option,
    add_vision_tower_option,
)
from tyir.tools.commands.cache_options import add_cache_options, cache_of

if TYPE_CHECKING:
    from tyir.dialects.builtin import Module
    from tyir.tools.commands.json_forms import Imported

__all__ = ["main", "make_parser"]


def make_parser() -> argparse.ArgumentParser:
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
    add_vision_tower_option(parser)
    add_image_option(parser)
    parser.add_argument(
        "--rope-scaling",
        metavar="KIND=FACTOR",
        help="rotary scaling that config.json lacks, as a model card advises it: yarn=4, linear=2",
    )
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
    add_cache_options(parser)
    add_json_option(parser, "print what was imported, or the plan, as JSON")
    add_build_options(
        parser.add_argument_group(
            "options of --plan; --max-kv also chooses the frequencies of rope types that change with the"
            " length"
        )
    )
    return parser


@run_tool
def main(argv: Sequence[str]) -> int:
    """Run the tool; 0 on success."""
    options = make_parser().parse_args(argv)
    if options.plan:
        from tyir.tools.tyir_compile import print_plan

        build = {
            key: value
            for key in ("dies", "pp", "seqlens", "max_kv", "weights", "group_size")
            if (value := getattr(options, key)) is not None
        }
        return print_plan(
            options.folder,
            build,
            options.image,
            options.base,
            vision_tower=options.vision_tower,
            as_json=options.json,
        )
    if options.json and options.output == "-":
        raise TyirError("--json and the IR would both go to standard output", help="add -o FILE.ir")
    check_output(options.output)
    from tyir.printer import print_op

    module = _module(options)
    if options.explain:
        from tyir.tools.estimate.explain import explain

        print(explain(module.clone()))
        if options.output == "-":
            return 0
    if options.raise_:
        from tyir.passes.raise_aten import raise_aten

        raise_aten(module)
    write_output(print_op(module), options.output)
    if options.json:
        from tyir.tools.commands.json_forms import print_json

        print_json(_facts(module, options.output))
    else:
        note(_summary(_facts(module, options.output)))
    return 0


def _module(options: argparse.Namespace) -> Module:
    """What is imported, from the cache where all that is asked for lies in the folder."""
    from tyir.frontends.plugin import plugin_of
    from tyir.manifest import BuildOptions
    from tyir.tools.commands.kept_imports import kept_import

    plugin = plugin_of(options.model_plugin, options.vision_tower)
    positions = BuildOptions.max_kv if options.max_kv is None else options.max_kv

    def imported(warn: Callable[[str], None]) -> Module:
        from tyir.frontends.huggingface import import_model

        return import_model(
            options.folder,
            dtype=options.dtype,
            note=lambda d: warn(d.message),
            check_weights=options.check_weights,
            plugin=plugin,
            positions=positions,
            base=options.base,
            progress=not quiet(),
            images=options.image,
            rope_scaling=options.rope_scaling,
        )

    cache = cache_of(options)
    if plugin is not None or options.base is not None or options.check_weights:
        return imported(warn)
    asked: dict[str, Any] = {"dtype": options.dtype, "images": tuple(options.image)}
    if options.rope_scaling is not None:
        asked["rope_scaling"] = options.rope_scaling
    return kept_import(cache, options.folder, positions, asked, imported, warn)


def _facts(module: Module, output: str) -> Imported:
    from tyir.attributes import DictAttr, IntegerAttr, StringAttr
    from tyir.dialects.ty import Global
    from tyir.tools.commands.json_forms import Imported

    model, files, stage = (module.attributes[key] for key in ("tyir.model", "tyir.files", "tyir.stage"))
    assert isinstance(model, DictAttr) and isinstance(files, DictAttr) and isinstance(stage, StringAttr)
    architecture, layers = model.get("architecture"), model.get("num_hidden_layers")
    assert isinstance(architecture, StringAttr) and isinstance(layers, IntegerAttr)
    weights = [op for op in module.body if isinstance(op, Global)]
    return Imported(
        output=output,
        architecture=architecture.value,
        layers=layers.value,
        parameters=sum(w.type.size for w in weights),
        files=len(files),
        bytes=sum(w.nbytes for w in weights),
        ops=sum(1 for op in module.walk()) - len(weights),
        stage=stage.value,
    )


def _summary(facts: Imported) -> str:
    """`Qwen2ForCausalLM: 6 layers, 5.6 M parameters in 1 file (10.6 MiB), 459 ops at stage ty`."""
    return (
        f"{facts.architecture}: {facts.layers} layers, {_count(facts.parameters)} parameters in {facts.files}"
        f" file{'s' * (facts.files != 1)} ({facts.bytes / 2**20:.1f} MiB), {facts.ops} ops at stage"
        f" {facts.stage}"
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
